"""Mixture of block attention (MoBA): a query reads its own block and the best of the blocks before it.

Keys are cut into blocks of fixed length. The mean of a block's keys says whether the block is worth reading:

    s_i = ⟨q, mean of the keys of block i⟩                      for the complete blocks before the query's own
    I   = the query's own block, up to itself, and the n_blocks - 1 blocks of the highest s_i
    head_h = softmax(q_h K[I]ᵀ / √D) V[I],   y = [head_1 … head_H] W_o

Letters beside those of core.py: N blocks of keys, Np complete blocks before the last token's own.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import KV, Cache, KVCache, Mechanism, register, token_positions
from kvlearn.attention.core import (
    attend_to_blocks,
    by_tiles,
    merge_heads,
    recomputed,
    split_heads,
    top_blocks,
    upcast,
)
from kvlearn.attention.full import FullAttention
from kvlearn.attention.rope import Rope, RopeConfig, rotate_naive


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
        """``KVCache.append``, and the means of the blocks that the new keys complete."""
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
class MixtureOfBlockAttention(Mechanism):
    """Softmax attention of each query to ``n_blocks`` blocks of ``block`` keys, its own block among them.

    The equation is that of the module. The selection has no weights and no gradient. The half-filled block is
    always read and never scored: its mean would contain later tokens. Keys are averaged as they are cached,
    after RoPE.

    Each query head has its own selection, as in the paper. So the H/G readers of a KV head may select as many
    different blocks, and the KV head reads their union: sharing keys saves less here than for ``gqa``.
    Cache: full attention's 2 · B · G · max_len · D numbers, and D more for every block and KV head.

    A pass attends in tiles of queries, over the union of their blocks; the memory of its scores grows with
    the length, not with its square. Where ``n_blocks`` covers everything, this is full attention.
    Raises ValueError for a ``block`` or ``n_blocks`` below 1.
    Source: Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs" (2025), equations 2 to 6.
    """

    chooses_by_content = True

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
        super().__init__(d_model, n_heads, head_dim)
        n_kv_heads = self.n_heads if n_kv_heads is None else n_kv_heads
        self.n_kv_heads = validate.divides("n_kv_heads", n_kv_heads, "n_heads", self.n_heads)
        self.block = validate.positive("block", block)
        self.n_blocks = validate.positive("n_blocks", n_blocks)
        self.q_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)
        self.rope = Rope(self.head_dim, rope)

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, BlockCache, source)
        positions = token_positions(x, cache)
        q = self.rope(split_heads(self.q_proj(x), self.n_heads), positions)  # (B, H, T, D)
        k = self.rope(split_heads(self.k_proj(x), self.n_kv_heads), positions)  # (B, G, T, D)
        v = split_heads(self.v_proj(x), self.n_kv_heads)
        if isinstance(cache, BlockCache):
            self.check_sizes(cache)
            k, v, _ = cache.append(k, v)  # (B, G, S, D)
            means = cache.means[:, :, : (cache.length - 1) // self.block]  # (B, G, Np, D)
        else:
            means = block_means(k[:, :, :-1].detach(), self.block)
        return self.o_proj(merge_heads(by_tiles(self.attend_tile, q, positions, k, v, means)))

    def attend_tile(
        self, q: Float[Tensor, "B H T D"], positions: Int[Tensor, "#B T"], k: Tensor, v: Tensor, means: Tensor
    ) -> Float[Tensor, "B H T D"]:
        """Some queries over the blocks that they select."""
        blocks = self.select(q, positions, means)
        return recomputed(attend_to_blocks)(q, k, v, positions, blocks, self.block)

    @torch.no_grad()
    def select(
        self, q: Float[Tensor, "B H T D"], positions: Int[Tensor, "#B T"], means: Float[Tensor, "B G Np D"]
    ) -> Bool[Tensor, "B H T N"]:
        """True at the blocks that each query reads: its own, and the best of those before it."""
        groups = upcast(q).unflatten(1, (self.n_kv_heads, -1))
        scores = torch.einsum("bgntd, bgid -> bgnti", groups, means.to(groups.dtype)).flatten(1, 2)
        own = (positions // self.block)[:, None, :, None]
        index = torch.arange(means.shape[2] + 1, device=q.device)
        return top_blocks(F.pad(scores, (0, 1)), index < own, self.n_blocks - 1) | (index == own)

    @torch.no_grad()
    def selected_blocks(self, x: Float[Tensor, "B T M"]) -> Bool[Tensor, "B H T N"]:
        """True at the blocks that each query head reads for each token of a whole sequence."""
        positions = token_positions(x, None)
        q = self.rope(split_heads(self.q_proj(x), self.n_heads), positions)
        k = self.rope(split_heads(self.k_proj(x), self.n_kv_heads), positions)
        return self.select(q, positions, block_means(k[:, :, :-1], self.block))

    def check_sizes(self, cache: BlockCache) -> None:
        """Raise ValueError where ``cache`` belongs to a layer of other sizes; called before writing."""
        shape = (cache.batch, self.n_kv_heads, cache.max_len, self.head_dim)
        validate.tensor("cache.k", cache.k, shape)
        if cache.block != self.block:
            raise ValueError(f"cache: expected one with block={self.block}, got block={cache.block}")

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        B, T, D, wide = len(x), x.shape[1], self.head_dim, upcast(x)
        q, k, v = (
            (wide @ upcast(w.weight).T).reshape(B, T, -1, D) for w in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate_naive(q, self.rope.config), rotate_naive(k, self.rope.config)
        heads = torch.zeros_like(q)
        for b in range(B):
            for t in range(T):
                own = t // self.block
                for h in range(self.n_heads):
                    g = h // (self.n_heads // self.n_kv_heads)
                    scores = [0.0] * own
                    for i in range(own):
                        keys = k[b, i * self.block : (i + 1) * self.block, g]
                        scores[i] = float((keys.sum(0) / self.block @ q[b, t, h]).detach())
                    best = sorted(range(own), key=lambda i: -scores[i])[: self.n_blocks - 1]
                    read = [s for s in range(t + 1) if s // self.block in (*best, own)]
                    weights = (k[b, read, g] @ q[b, t, h] / D**0.5).softmax(-1)
                    heads[b, t, h] = weights @ v[b, read, g]
        return (heads.flatten(2) @ upcast(self.o_proj.weight).T).to(x.dtype)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> BlockCache:
        dtype, device = self.dtype_and_device(dtype, device)
        return BlockCache(batch, self.n_kv_heads, max_len, self.head_dim, self.block, dtype, device)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · G · D · (2 · max_len + ⌊max_len / block⌋) · bytes per number."""
        tokens = 2 * validate.positive("max_len", max_len) + max_len // self.block
        return self.to_bytes(self.n_kv_heads * tokens * self.head_dim, batch, dtype)

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · G · D · (2 · (selected · block + filled) + past) · bytes per number.

        ``past`` blocks before the last token's own are scored by their means; of its own block ``filled``
        keys are read. A KV head reads ``selected`` = (n_blocks - 1) · H/G past blocks *at most*: fewer where
        its readers select the same, which depends on the content.
        """
        past, before = divmod(validate.positive("length", length) - 1, self.block)
        selected = min(past, (self.n_blocks - 1) * (self.n_heads // self.n_kv_heads))
        tokens = 2 * (selected * self.block + before + 1) + past
        return self.to_bytes(self.n_kv_heads * tokens * self.head_dim, batch, dtype)

    @classmethod
    def tiny(cls) -> "MixtureOfBlockAttention":
        return cls(d_model=24, n_heads=4, n_kv_heads=2, head_dim=8, block=3, n_blocks=2)

    @classmethod
    def tiny_at_limit(cls) -> tuple[Mechanism, Mechanism]:
        """As many blocks as there are."""
        full, limit = FullAttention.tiny(), cls(d_model=24, n_heads=3, block=3, n_blocks=5)
        limit.load_state_dict(full.state_dict())
        return limit, full
