"""Full attention: every head keeps the keys and values of every token, and every step reads them all.

The mechanism that all others of the course are held against: exact, and the most expensive to remember.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import expect
from kvlearn.attention.base import Mechanism, register
from kvlearn.attention.cache import KV, Cache
from kvlearn.attention.core import causal_attention, merge_heads, split_heads, upcast
from kvlearn.attention.rope import Rope, RopeConfig

# One token a row over its cache: q (B, H, D), keys and values (B, G, S, D), lengths (B,) int32 -> (B, H, D).
DecodeStep = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class KVCache(Cache):
    """Keys and values of all tokens so far, in memory that is allocated once; slot s holds position s."""

    def __init__(
        self, batch: int, n_heads: int, max_len: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(batch, max_len, device)
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point type, got {dtype}")
        # Zeros, not whatever the memory held: a masked slot weighs 0, and 0 · NaN would be NaN.
        self.k = torch.zeros(batch, n_heads, max_len, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v]

    def append(self, k: Float[Tensor, "B H T D"], v: Float[Tensor, "B H T D"]) -> KV:
        """Write new keys and values behind the old ones; return views of all of them, never a copy."""
        n_heads, head_dim = self.k.shape[1], self.k.shape[3]
        for name, new in (("k", k), ("v", v)):
            expect.tensor(name, new, (self.batch, n_heads, k.shape[2], head_dim), device=self.device)
        self.expect_room(k.shape[2])
        positions = self.positions(k.shape[2])
        for buffer, new in ((self.k, k), (self.v, v)):
            new = new.detach().to(buffer.dtype)
            if self.lengths is None:
                buffer[:, :, self.length : self.length + k.shape[2]] = new
            else:
                buffer.scatter_(2, positions[:, None, :, None].expand(new.shape), new)
        self.advance(k.shape[2])
        return KV(self.k[:, :, : self.length], self.v[:, :, : self.length], positions)


@register("full")
class FullAttention(Mechanism):
    """Causal multi-head attention with RoPE, and the cache that makes a step cost one row.

        head_h = softmax(q_h K_hᵀ / √D) V_h,   y = [head_1 … head_H] W_o

    Cache: 2 · B · H · max_len · D numbers, all of them read by every step at full length. ``decode``, where
    it is set, does the steps of one token: ``kvlearn.kernels.decode_attention``, say.
    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2; RoPE as in rope.py.
    """

    decode: DecodeStep | None = None

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        rope: RopeConfig | None = RopeConfig(),
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        width = self.n_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, width, bias=False)
        self.k_proj = nn.Linear(d_model, width, bias=False)
        self.v_proj = nn.Linear(d_model, width, bias=False)
        self.o_proj = nn.Linear(width, d_model, bias=False)
        self.rope = Rope(self.head_dim, rope) if rope is not None else None

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check(x, cache, KVCache)
        k, v, positions = self.kv(x, cache) if source is None else self.check_source(source, x)
        q = self.rotate(split_heads(self.q_proj(x), self.n_heads), positions)
        if self.decode is not None and isinstance(cache, KVCache) and source is None and x.shape[1] == 1:
            lengths = (positions[:, 0] + 1).expand(len(x)).to(torch.int32)
            heads = self.decode(q[:, :, 0], cache.k, cache.v, lengths).unsqueeze(2)
        else:
            heads = causal_attention(q, k.to(q.dtype), v.to(q.dtype), positions)
        return self.o_proj(merge_heads(heads))

    def kv(self, x: Float[Tensor, "B T M"], cache: Cache | None = None) -> KV:
        self.check(x, cache, KVCache)
        positions = (
            torch.arange(x.shape[1], device=x.device)[None] if cache is None else cache.positions(x.shape[1])
        )
        k = self.rotate(split_heads(self.k_proj(x), self.n_heads), positions)
        v = split_heads(self.v_proj(x), self.n_heads)
        return cache.append(k, v) if isinstance(cache, KVCache) else KV(k, v, positions)

    def check_source(self, source: KV, x: Tensor) -> KV:
        """The door for another layer's keys and values."""
        expect.instance("source", source, KV)
        expect.tensor("source.k", source.k, (len(x), self.n_heads, "tokens", self.head_dim), device=x.device)
        expect.tensor("source.v", source.v, tuple(source.k.shape), device=x.device)
        expect.tensor("source.positions", source.positions, ("1 or batch", x.shape[1]))
        return source

    def rotate(self, heads: Float[Tensor, "B H T D"], positions: Tensor) -> Float[Tensor, "B H T D"]:
        return self.rope(heads, positions) if self.rope is not None else heads

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        keys, values, positions = self.kv(x)
        k, v = upcast(keys), upcast(values)
        q = upcast(self.rotate(split_heads(self.q_proj(x), self.n_heads), positions))
        heads = torch.empty_like(q)
        for t in range(x.shape[1]):
            scores = torch.einsum("bhd, bhsd -> bhs", q[:, :, t], k[:, :, : t + 1]) / self.head_dim**0.5
            heads[:, :, t] = torch.einsum("bhs, bhsd -> bhd", scores.softmax(-1), v[:, :, : t + 1])
        return self.o_proj(merge_heads(heads).to(x.dtype))

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KVCache:
        return KVCache(batch, self.n_heads, max_len, self.head_dim, *self.dtype_and_device(dtype, device))

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """2 · B · H · max_len · D · bytes a number."""
        expect.positive("max_len", max_len)
        expect.positive("batch", batch)
        return 2 * batch * self.n_heads * max_len * self.head_dim * self.dtype_and_device(dtype)[0].itemsize

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Everything stored so far: 2 · B · H · length · D · bytes a number.

        (PyTorch's attention wants one dtype: a cache in another than the weights' is converted at every step,
        which saves memory and costs time. A kernel can read it as it is.)
        """
        expect.positive("length", length)
        return self.cache_bytes(length, batch=batch, dtype=dtype)

    @classmethod
    def tiny(cls) -> "FullAttention":
        return cls(d_model=24, n_heads=3, head_dim=8)
