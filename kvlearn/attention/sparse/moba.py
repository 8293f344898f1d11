"""Mixture of block attention (MoBA): a query reads its own block and the past blocks that it likes best."""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvlearn import validate
from kvlearn.attention.base import Mechanism, register
from kvlearn.attention.cache import KV, Cache, KVCache
from kvlearn.attention.core import merge_heads, split_heads, upcast
from kvlearn.attention.full import FullAttention
from kvlearn.attention.kv_attention import KVAttention
from kvlearn.attention.rope import RopeConfig
from kvlearn.attention.sparse.blocks import attend_to_blocks, best_blocks, by_tiles


def block_means(k: Float[Tensor, "B G S D"], block: int) -> Float[Tensor, "B G N D"]:
    """The mean of each complete block of keys; a half-filled last block has none."""
    n = k.shape[2] // block
    return upcast(k[:, :, : n * block]).unflatten(2, (n, block)).mean(3).to(k.dtype)


class BlockCache(KVCache):
    """Keys and values of all tokens so far, and the mean key of every complete block.

    A half-filled block needs no state of its own: its keys are here, and the step that fills it reads them
    anyway.
    """

    def __init__(
        self,
        batch: int,
        n_heads: int,
        max_len: int,
        head_dim: int,
        block: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(batch, n_heads, max_len, head_dim, dtype, device)
        self.block = block
        self.means = torch.zeros(batch, n_heads, max_len // block, head_dim, dtype=dtype, device=device)

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v, self.means]

    def append(self, k: Float[Tensor, "B H T D"], v: Float[Tensor, "B H T D"]) -> KV:
        before = [self.length] if self.lengths is None else self.lengths.tolist()
        kv = super().append(k, v)
        for row, length in enumerate(before):
            rows = slice(None) if self.lengths is None else slice(row, row + 1)
            old, new = length // self.block, (length + k.shape[2]) // self.block
            if new > old:
                filled = self.k[rows, :, old * self.block : new * self.block]
                self.means[rows, :, old:new] = block_means(filled, self.block)
        return kv


@register("moba")
class MixtureOfBlockAttention(KVAttention):
    """Softmax attention of each query to ``n_blocks`` blocks of ``block`` keys, its own among them.

        s_i = ⟨q, mean of the keys of block i⟩                      of the complete blocks before its own
        I   = the query's own block, up to itself, and the n_blocks - 1 blocks of the highest s_i
        head_h = softmax(q_h K[I]ᵀ / √D) V[I],   y = [head_1 … head_H] W_o

    There is nothing to learn in the choice, and no gradient through it. The half-filled block is always read
    and never scored: its mean would tell of tokens to come. Keys are averaged as they are cached, rotated.

    Every query head chooses for itself, as in the paper. So the H/G readers of a KV head may want as many
    different blocks, and it reads their union: sharing keys saves less here than it does for ``gqa``.
    Cache: full attention's 2 · B · G · max_len · D numbers, and D more for every block and KV head.

    A pass attends in tiles of queries, over the union of what they chose; the memory of its scores grows with
    the length, not with its square. Where ``n_blocks`` covers everything, this is full attention.
    Source: Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs" (2025), equations 2 to 6.
    """

    chooses_by_content = True
    cache_kind = BlockCache
    kv = Mechanism.kv  # keys and values alone, without the means, are not what another layer would read

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        block: int = 16,
        n_blocks: int = 4,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: RopeConfig | None = RopeConfig(),
    ) -> None:
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        validate.divides("n_kv_heads", n_kv_heads, "n_heads", validate.positive("n_heads", n_heads))
        super().__init__(d_model, n_heads, n_kv_heads, head_dim, rope, reader=False)
        self.block = validate.positive("block", block)
        self.n_blocks = validate.positive("n_blocks", n_blocks)

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.refuse(source)
        q, kv, means = self.project(x, cache)
        return self.o_proj(merge_heads(by_tiles(self.attend_tile, q, kv.positions, kv.k, kv.v, means)))

    def project(self, x: Float[Tensor, "B T M"], cache: Cache | None) -> tuple[Tensor, KV, Tensor]:
        """Queries; keys and values of all tokens; the means of the blocks that are before someone's own."""
        if isinstance(cache, BlockCache):
            validate.tensor("cache.k", cache.k, (cache.batch, self.n_kv_heads, cache.max_len, self.head_dim))
            if cache.block != self.block:
                raise ValueError(f"cache: expected one with block={self.block}, got block={cache.block}")
        kv = super().kv(x, cache)
        q = self.rotate(split_heads(self.q_proj(x), self.n_heads), kv.positions)
        if cache is None:
            return q, kv, block_means(kv.k[:, :, :-1].detach(), self.block)
        return q, kv, cast(BlockCache, cache).means[:, :, : (cache.length - 1) // self.block]

    def attend_tile(
        self, q: Float[Tensor, "B H T D"], positions: Int[Tensor, "#B T"], k: Tensor, v: Tensor, means: Tensor
    ) -> Float[Tensor, "B H T D"]:
        return attend_to_blocks(q, k, v, positions, self.choose(q, positions, means), self.block)

    @torch.no_grad()
    def choose(
        self, q: Float[Tensor, "B H T D"], positions: Int[Tensor, "#B T"], means: Float[Tensor, "B G Np D"]
    ) -> Bool[Tensor, "B H T N"]:
        """The blocks that each query reads: its own, and the best of those before it."""
        pools = upcast(q).unflatten(1, (self.n_kv_heads, -1))
        scores = torch.einsum("bgntd, bgid -> bgnti", pools, means.to(pools.dtype)).flatten(1, 2)
        own = (positions // self.block)[:, None, :, None]
        index = torch.arange(means.shape[2] + 1, device=q.device)
        return best_blocks(F.pad(scores, (0, 1)), index < own, self.n_blocks - 1) | (index == own)

    def chosen(self, x: Float[Tensor, "B T M"]) -> Bool[Tensor, "B H T N"]:
        """Which blocks each query head of each token reads: the picture of this attention."""
        q, kv, means = self.project(x, None)
        return self.choose(q, kv.positions, means)

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        keys, values, positions = super().kv(x)
        k, v = upcast(keys), upcast(values)
        q = upcast(self.rotate(split_heads(self.q_proj(x), self.n_heads), positions))
        heads = torch.empty_like(q)
        for b in range(len(x)):
            for h, g in enumerate(self.pools):
                for t in range(x.shape[1]):
                    own = t // self.block
                    blocks = k[b, g, : own * self.block].unflatten(0, (own, self.block))
                    best = (blocks.mean(1) @ q[b, h, t]).argsort(descending=True, stable=True)
                    read = {own, *best[: self.n_blocks - 1].tolist()}
                    seen = [s for s in range(t + 1) if s // self.block in read]
                    weights = (k[b, g, seen] @ q[b, h, t] / self.head_dim**0.5).softmax(-1)
                    heads[b, h, t] = weights @ v[b, g, seen]
        return self.o_proj(merge_heads(heads).to(x.dtype))

    def own_cache(self, batch: int, max_len: int, dtype: torch.dtype, at: torch.device) -> BlockCache:
        return BlockCache(batch, self.n_kv_heads, max_len, self.head_dim, self.block, dtype, at)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · G · D · (2 · max_len + ⌊max_len / block⌋) · bytes a number."""
        blocks = validate.positive("max_len", max_len) // self.block
        return self.kv_bytes(max_len, batch, dtype) + self.kv_bytes(blocks, batch, dtype) // 2

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """The means of the blocks before the last token's own, the filled part of that, and what is chosen.

        Of past blocks a KV head reads (n_blocks - 1) · H/G *at most*: fewer where its readers agree, which
        only the content decides.
        """
        past, filled = divmod(validate.positive("length", length) - 1, self.block)
        blocks = min(past, (self.n_blocks - 1) * (self.n_heads // self.n_kv_heads))
        read = self.kv_bytes(blocks * self.block + filled + 1, batch, dtype)
        return read + self.kv_bytes(past, batch, dtype) // 2

    @classmethod
    def tiny(cls) -> "MixtureOfBlockAttention":
        return cls(d_model=24, n_heads=4, n_kv_heads=2, head_dim=8, block=3, n_blocks=2)

    @classmethod
    def tiny_at_limit(cls) -> tuple[Mechanism, Mechanism]:
        """As many blocks as there are."""
        full, limit = FullAttention.tiny(), cls(d_model=24, n_heads=3, block=3, n_blocks=5)
        limit.load_state_dict(full.state_dict())
        return limit, full
