"""Softmax attention over cached keys and values: what full attention and grouped attention have in common.

H query heads read G KV heads. What the mechanisms differ in is G, and which KV head a query head reads.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import Mechanism
from kvlearn.attention.cache import KV, Cache, KVCache, NoCache, TokenCache
from kvlearn.attention.core import causal_attention, merge_heads, split_heads, upcast
from kvlearn.attention.rope import Rope, RopeConfig

# One token a row over its cache: q (B, H, D), keys and values (B, G, S, D), lengths (B,) int32 -> (B, H, D).
DecodeStep = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Queries (B, H, T, D) over keys and values, to the heads' outputs (B, H, T, D).
Attend = Callable[[Tensor, KV], Tensor]


class KVAttention(Mechanism):
    """Causal attention with RoPE of H query heads over G KV heads, and a cache of the latter.

        head_h = softmax(q_h K_gᵀ / √D) V_g,  g = pools[h],   y = [head_1 … head_H] W_o

    Cache: 2 · B · G · max_len · D numbers, all of them read by every step at full length. A ``reader`` has no
    keys and values of its own: it reads another layer's, handed over as ``source``, and stores 0 bytes.
    ``decode``, where it is set, does the steps of one token: ``kvlearn.kernels.decode_attention``, say.
    """

    decode: DecodeStep | None = None
    cache_kind: type[TokenCache] = KVCache

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int | None,
        rope: RopeConfig | None,
        reader: bool,
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        self.n_kv_heads = validate.positive("n_kv_heads", n_kv_heads)
        self.reader = reader
        self.q_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        if not reader:
            self.k_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=False)
            self.v_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)
        self.rope = Rope(self.head_dim, rope) if rope is not None else None

    @property
    def pools(self) -> list[int]:
        """Which KV head each query head reads: neighbours share one."""
        return [h * self.n_kv_heads // self.n_heads for h in range(self.n_heads)]

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check(x, cache, NoCache if self.reader else self.cache_kind)
        own = source is None and not self.reader
        kv = self.kv(x, cache) if own else self.check_source(source, x)
        q = self.rotate(split_heads(self.q_proj(x), self.n_heads), kv.positions)
        one_token = self.decode is not None and cache is not None and x.shape[1] == 1
        heads = self.attend(self.step if one_token else self.pass_over, x, q, kv)
        return self.o_proj(merge_heads(heads))

    def attend(self, attention: Attend, x: Tensor, q: Tensor, kv: KV) -> Float[Tensor, "B H T D"]:
        """Every query head over the KV head it reads. (``x`` is for those who choose it by the token.)"""
        return attention(q, kv)

    def pass_over(self, q: Float[Tensor, "B H T D"], kv: KV) -> Float[Tensor, "B H T D"]:
        """Any number of tokens, by PyTorch."""
        return causal_attention(q, kv.k.to(q.dtype), kv.v.to(q.dtype), kv.positions)

    def step(self, q: Float[Tensor, "B H 1 D"], kv: KV) -> Float[Tensor, "B H 1 D"]:
        """One token, by ``decode``."""
        assert self.decode is not None
        return self.decode(q[:, :, 0], kv.k, kv.v, self.step_lengths(q, kv)).unsqueeze(2)

    def step_lengths(self, q: Tensor, kv: KV) -> Int[Tensor, "B"]:
        """How many slots of each row hold something; they are its first ones."""
        return (kv.positions[:, 0] + 1).clamp_max(kv.k.shape[2]).expand(len(q)).to(torch.int32)

    def kv(self, x: Float[Tensor, "B T M"], cache: Cache | None = None) -> KV:
        if self.reader:
            raise TypeError("source: this layer is a reader; it has no keys and values of its own")
        self.check(x, cache, self.cache_kind)
        positions = (
            torch.arange(x.shape[1], device=x.device)[None] if cache is None else cache.positions(x.shape[1])
        )
        k = self.rotate(split_heads(self.k_proj(x), self.n_kv_heads), positions)
        v = split_heads(self.v_proj(x), self.n_kv_heads)
        return cache.append(k, v) if isinstance(cache, TokenCache) else KV(k, v, positions)

    def check_source(self, source: KV | None, x: Tensor) -> KV:
        """The door for another layer's keys and values."""
        kv: KV = validate.instance("source", source, KV)
        validate.tensor("source.k", kv.k, (len(x), self.n_kv_heads, "tokens", self.head_dim), device=x.device)
        validate.tensor("source.v", kv.v, tuple(kv.k.shape), device=x.device)
        validate.tensor("source.positions", kv.positions, ("1 or batch", x.shape[1]))
        if kv.key_positions is not None:
            validate.tensor("source.key_positions", kv.key_positions, ("1 or batch", kv.k.shape[2]))
        return kv

    def rotate(self, heads: Float[Tensor, "B H T D"], positions: Tensor) -> Float[Tensor, "B H T D"]:
        return self.rope(heads, positions) if self.rope is not None else heads

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        keys, values, positions = self.kv(x)
        k, v = upcast(keys), upcast(values)
        q = upcast(self.rotate(split_heads(self.q_proj(x), self.n_heads), positions))
        heads = torch.empty_like(q)
        for h, g in enumerate(self.pools):
            for t in range(x.shape[1]):
                seen = self.seen(t)
                scores = torch.einsum("bd, bsd -> bs", q[:, h, t], k[:, g, seen]) / self.head_dim**0.5
                heads[:, h, t] = torch.einsum("bs, bsd -> bd", self.weigh(scores, h), v[:, g, seen])
        return self.o_proj(merge_heads(heads).to(x.dtype))

    def seen(self, t: int) -> list[int]:
        """The positions that the token at position t attends to."""
        return list(range(t + 1))

    def weigh(self, scores: Float[Tensor, "B S"], h: int) -> Float[Tensor, "B S"]:
        """The weights that head h gives by its scores."""
        return scores.softmax(-1)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Cache:
        dtype, at = self.dtype_and_device(dtype, device)
        sizes = validate.positive("batch", batch), validate.positive("max_len", max_len)
        return NoCache(*sizes, at) if self.reader else self.own_cache(*sizes, dtype, at)

    def own_cache(self, batch: int, max_len: int, dtype: torch.dtype, at: torch.device) -> TokenCache:
        """The empty cache of a layer that has keys and values of its own."""
        return KVCache(batch, self.n_kv_heads, max_len, self.head_dim, dtype, at)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """2 · B · G · D · the tokens kept of ``max_len`` · bytes a number; of a reader, 0."""
        kept = self.tokens_kept(validate.positive("max_len", max_len))
        return 0 if self.reader else self.kv_bytes(kept, batch, dtype)

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """What the last of ``length`` tokens sees, each KV head once for all who share it; of a reader, its
        owner's again.

        (PyTorch's attention wants one dtype: a cache in another than the weights' is converted at every step,
        which saves memory and costs time. A kernel can read it as it is.)
        """
        return self.kv_bytes(self.tokens_read(validate.positive("length", length)), batch, dtype)

    def tokens_kept(self, max_len: int) -> int:
        """How many tokens a cache for ``max_len`` has room for."""
        return max_len

    def tokens_read(self, length: int) -> int:
        """How many tokens a step reads, at the last of ``length``."""
        return length

    def kv_bytes(self, tokens: int, batch: int, dtype: torch.dtype | None) -> int:
        """2 · B · G · tokens · D · bytes a number."""
        numbers = 2 * validate.positive("batch", batch) * self.n_kv_heads * self.head_dim
        return numbers * tokens * self.dtype_and_device(dtype)[0].itemsize
