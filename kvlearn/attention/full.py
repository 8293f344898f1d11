"""Full attention and grouped-query attention: every step reads the keys and values of every token.

Full attention gives every query head a KV head of its own. It is the mechanism that all others of the course
are compared with: exact, and the one with the largest cache. With fewer KV heads than query heads it is
grouped-query attention (GQA), with a single one multi-query attention (MQA).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import (
    KV,
    Cache,
    DecodeStep,
    KVCache,
    Mechanism,
    NoCache,
    decode_step,
    register,
    token_positions,
)
from kvlearn.attention.core import causal_attention, merge_heads, split_heads, upcast
from kvlearn.attention.rope import Rope, RopeConfig, rotate_naive


@register("gqa")
class GroupedQueryAttention(Mechanism):
    """Causal attention with RoPE of H query heads over G KV heads: query head h reads KV head h // (H/G).

        head_h = softmax(q_h K_gᵀ / √D) V_g,  g = h // (H/G),   y = [head_1 … head_H] W_o

    Cache: 2 · B · G · max_len · D numbers, all of them read by every step at full length, each once for all
    query heads of its group. ``n_kv_heads`` (G) must divide ``n_heads``; 1 is multi-query attention, n_heads
    is full attention.

    A ``reader`` has no keys and values of its own: it reads another layer's, passed as ``source``, and stores
    0 bytes. ``decode``, if set, computes the attention of steps of one token.
    Sources: Vaswani et al., "Attention Is All You Need" (2017), section 3.2; Shazeer, "Fast Transformer
    Decoding" (2019), section 3 (MQA); Ainslie et al., "GQA" (2023), section 2.2; readers: Brandon et al.,
    "Cross-Layer Attention" (2024).
    """

    decode: DecodeStep | None = None

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int = 1,
        head_dim: int | None = None,
        rope: RopeConfig | None = RopeConfig(),
        reader: bool = False,
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        self.n_kv_heads = validate.divides("n_kv_heads", n_kv_heads, "n_heads", self.n_heads)
        self.reader = validate.instance("reader", reader, bool)
        self.q_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        if not reader:
            self.k_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=False)
            self.v_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)
        self.rope = Rope(self.head_dim, rope)

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        if source is None and not self.reader:
            kv = self.project_kv(x, cache)  # (B, G, S, D) each
        else:
            kind = NoCache if self.reader else KVCache
            kv = self.check_source(x, cache, kind, source, self.n_kv_heads)
        q = self.rope(split_heads(self.q_proj(x), self.n_heads), kv.positions)  # (B, H, T, D)
        if self.decode is not None and cache is not None and x.shape[1] == 1:
            heads = decode_step(self.decode, q, kv)
        else:
            heads = self.attend(q, kv)
        return self.o_proj(merge_heads(heads))

    @property
    def pools(self) -> list[int]:
        """The KV head that each query head reads."""
        return [h * self.n_kv_heads // self.n_heads for h in range(self.n_heads)]

    def attend(self, q: Float[Tensor, "B H T D"], kv: KV) -> Float[Tensor, "B H T D"]:
        """Every query over the keys up to its own position."""
        return causal_attention(q, kv.k.to(q.dtype), kv.v.to(q.dtype), kv.positions)

    def project_kv(self, x: Float[Tensor, "B T M"], cache: Cache | None = None) -> KV:
        if self.reader:
            raise TypeError("source: this layer is a reader; it has no keys and values of its own")
        self.check_inputs(x, cache, KVCache)
        positions = token_positions(x, cache)
        k = self.rope(split_heads(self.k_proj(x), self.n_kv_heads), positions)
        v = split_heads(self.v_proj(x), self.n_kv_heads)
        return cache.append(k, v) if isinstance(cache, KVCache) else KV(k, v, positions)

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        B, T, D, wide = len(x), x.shape[1], self.head_dim, upcast(x)
        q, k, v = (
            (wide @ upcast(w.weight).T).reshape(B, T, -1, D) for w in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate_naive(q, self.rope.config), rotate_naive(k, self.rope.config)
        heads = torch.zeros_like(q)
        for t in range(T):
            for h in range(self.n_heads):
                g = h // (self.n_heads // self.n_kv_heads)
                scores = torch.einsum("bd, bsd -> bs", q[:, t, h], k[:, : t + 1, g]) / D**0.5
                heads[:, t, h] = torch.einsum("bs, bsd -> bd", scores.softmax(-1), v[:, : t + 1, g])
        return (heads.flatten(2) @ upcast(self.o_proj.weight).T).to(x.dtype)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Cache:
        dtype, device = self.dtype_and_device(dtype, device)
        if self.reader:
            return NoCache(batch, max_len, device)
        return KVCache(batch, self.n_kv_heads, max_len, self.head_dim, dtype, device)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """2 · B · G · max_len · D · bytes per number; 0 for a reader."""
        numbers = 2 * self.n_kv_heads * validate.positive("max_len", max_len) * self.head_dim
        return 0 if self.reader else self.to_bytes(numbers, batch, dtype)

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """2 · B · G · length · D · bytes per number; for a reader too, which reads its source again.

        (PyTorch's attention needs one dtype: a cache in another than the weights' is converted at every step.
        It saves memory and costs time. A kernel can read it unconverted.)
        """
        numbers = 2 * self.n_kv_heads * validate.positive("length", length) * self.head_dim
        return self.to_bytes(numbers, batch, dtype)

    @classmethod
    def tiny(cls, **options: Any) -> "GroupedQueryAttention":
        return cls(d_model=24, n_heads=6, n_kv_heads=2, head_dim=8, **options)

    @classmethod
    def tiny_at_limit(cls) -> tuple[Mechanism, Mechanism] | None:
        """As many KV heads as query heads."""
        full, limit = FullAttention.tiny(), cls(d_model=24, n_heads=3, n_kv_heads=3)
        limit.load_state_dict(full.state_dict())
        return limit, full


@register("full")
class FullAttention(GroupedQueryAttention):
    """Multi-head attention: ``gqa`` with a KV head for every query head.

        head_h = softmax(q_h K_hᵀ / √D) V_h,   y = [head_1 … head_H] W_o

    Cache: 2 · B · H · max_len · D numbers, all of them read by every step at full length.
    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        rope: RopeConfig | None = RopeConfig(),
        reader: bool = False,
    ) -> None:
        super().__init__(d_model, n_heads, n_kv_heads=n_heads, head_dim=head_dim, rope=rope, reader=reader)

    @classmethod
    def tiny(cls, **options: Any) -> "FullAttention":
        return cls(d_model=24, n_heads=3, head_dim=8, **options)

    @classmethod
    def tiny_at_limit(cls) -> None:
        return None
