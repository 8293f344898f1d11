"""Native sparse attention (NSA): the past in coarse strokes, a few blocks of it whole, and what is near."""

from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import Mechanism, register
from kvlearn.attention.cache import KV, Cache
from kvlearn.attention.columns import attend_columns
from kvlearn.attention.core import grouped_attention, merge_heads, split_heads, upcast
from kvlearn.attention.full import FullAttention
from kvlearn.attention.rope import Rope, RopeConfig
from kvlearn.attention.sliding.window import BLOCK, Window
from kvlearn.attention.sparse.blocks import attend_to_blocks, by_tiles
from kvlearn.attention.sparse.nsa_memory import BlockMap, Memory, Sizes, SparseCache, whole_blocks
from kvlearn.attention.sparse.nsa_selection import block_scores, compressed_weights, select_blocks


@register("nsa")
class NativeSparseAttention(Mechanism):
    """Three branches of attention, each with keys and values of its own, weighed by gates of the token.

        compressed  k̃_i = φ(the l keys from i · d on), ṽ_i so too,   o = softmax(q k̃ᵀ / √D) ṽ     (7, 8)
        selected    o = attention to the n_blocks blocks of l' tokens that k̃ speaks for           (9 to 12)
        window      o = attention to the last ``window`` tokens
        head = Σ_branches sigmoid(W_g x)_branch · o_branch,   y = [head_1 … head_H] W_o           (5)

    The first block and the last ``n_local`` ones, the own half-filled one among them, are always selected.
    The query heads of a KV head select together, so that each block is read once for all of them. The choice
    has no gradient; the weights that make it learn by the compressed branch.

    ``compress`` is l, ``stride`` d, ``block`` l'; d divides both, and l is at most l'. A compressed key is
    rotated after φ, to its block's first position; the paper does not say how positions enter, and has an MLP
    in place of W_g.

    Cache: 2 · B · G · D · (max_len + min(max_len, window) + compressed blocks + l - 1) numbers: *more* than
    full attention. A step *reads* 1/d of the past compressed, n_blocks · l' tokens and a window.
    Source: Yuan et al., "Native Sparse Attention" (2025), section 3.
    """

    chooses_by_content = True

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        compress: int = 8,
        stride: int = 4,
        block: int = 16,
        n_blocks: int = 6,
        n_local: int = 2,
        window: int = 32,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: RopeConfig | None = RopeConfig(),
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        self.n_kv_heads = self.n_heads if n_kv_heads is None else n_kv_heads
        validate.divides("n_kv_heads", self.n_kv_heads, "n_heads", n_heads)
        self.block = validate.positive("block", block)
        validate.at_most("compress", validate.positive("compress", compress), block, "block")
        for name, length in (("compress", compress), ("block", block)):
            validate.divides("stride", stride, name, length)
        self.n_local = validate.positive("n_local", n_local)
        self.n_blocks = validate.at_least("n_blocks", n_blocks, n_local + 1)
        self.sizes = Sizes(compress, stride, validate.positive("window", window))

        width = 3 * self.n_kv_heads * self.head_dim  # for compression, selection, window
        self.q_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, width, bias=False)
        self.v_proj = nn.Linear(d_model, width, bias=False)
        self.gate_proj = nn.Linear(d_model, 3 * self.n_heads)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)
        self.k_map, self.v_map = (BlockMap(self.head_dim, compress) for _ in range(2))
        self.rope = Rope(self.head_dim, rope) if rope is not None else None

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.refuse(source)
        self.check(x, cache, SparseCache)
        entries, tokens, window = self.remember(x, cache)
        q = self.rotate(split_heads(self.q_proj(x), self.n_heads), tokens.positions)
        far = by_tiles(self.attend_far, q, tokens.positions, *entries, tokens.k, tokens.v)
        near = attend_columns(q, window, Window(self.sizes.window), BLOCK, attend_near)
        heads = (self.gates(x) * torch.cat((far, near[None]))).sum(0)
        return self.o_proj(merge_heads(heads))

    def gates(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "3 B H T 1"]:
        """How much of each branch, compressed, selected and window, a head takes: each from 0 to 1."""
        return self.gate_proj(x).sigmoid().unflatten(-1, (3, -1)).permute(2, 0, 3, 1)[..., None]

    def remember(self, x: Float[Tensor, "B T M"], cache: Cache | None) -> Memory:
        """Keys and values of ``x`` for every branch, written behind what ``cache`` holds."""
        T = x.shape[1]
        if isinstance(cache, SparseCache):
            shape = (cache.batch, self.n_kv_heads, cache.max_len, self.head_dim)
            validate.tensor("cache.tokens.k", cache.tokens.k, shape)
            if cache.sizes != self.sizes:
                raise ValueError(f"cache: expected one with {self.sizes}, got {cache.sizes}")
            cache.expect_room(T)
        positions = torch.arange(T, device=x.device)[None] if cache is None else cache.positions(T)
        n = self.n_kv_heads
        k, v = (split_heads(project(x), 3 * n) for project in (self.k_proj, self.v_proj))
        raw = torch.stack((k[:, :n], v[:, :n]))  # not rotated: φ knows places in a block only
        k, v = self.rotate(k[:, n:], positions), v[:, n:]
        if not isinstance(cache, SparseCache):
            entries = self.compress(whole_blocks(raw, self.sizes), 0)
            tokens, window = (KV(*kv, positions) for kv in zip(k.chunk(2, 1), v.chunk(2, 1), strict=True))
            return Memory(entries, tokens, window)
        done = self.sizes.whole(cache.length)
        tokens, window = cache.append(k, v)
        blocks = cache.fill(raw).to(x.dtype)
        if blocks.shape[3]:
            cache.add(self.compress(blocks, done))
        return Memory(cache.compressed, tokens, window)

    def compress(self, blocks: Float[Tensor, "2 B G C l D"], first: int) -> Float[Tensor, "2 B G C D"]:
        """Whole blocks, of which the first has the number ``first``, to a key and a value each."""
        starts = (first + torch.arange(blocks.shape[3], device=blocks.device)) * self.sizes.stride
        return torch.stack((self.rotate(self.k_map(blocks[0]), starts[None]), self.v_map(blocks[1])))

    def attend_far(
        self,
        q: Float[Tensor, "B H T D"],
        positions: Int[Tensor, "1 T"],
        entries_k: Float[Tensor, "B G C D"],
        entries_v: Float[Tensor, "B G C D"],
        k: Float[Tensor, "B G S D"],
        v: Float[Tensor, "B G S D"],
    ) -> Float[Tensor, "2 B H T D"]:
        """The compressed branch, and the selected one that follows its weights."""
        weights = compressed_weights(q, positions, entries_k, self.sizes)
        coarse = torch.einsum("bgntc, bgcd -> bgntd", weights, entries_v.to(weights.dtype))
        coarse = coarse.flatten(1, 2).to(q.dtype)
        chosen = self.select(weights, positions, k.shape[2])
        return torch.stack((coarse, attend_to_blocks(q, k, v, positions, chosen, self.block)))

    def select(self, weights: Tensor, positions: Tensor, length: int) -> Bool[Tensor, "B G T N"]:
        """The blocks of ``length`` tokens to read, by the weights of the compressed branch."""
        scores = block_scores(weights, self.sizes, self.block, length)
        return select_blocks(scores, positions // self.block, self.n_blocks, self.n_local)

    def chosen(self, x: Float[Tensor, "B T M"]) -> Bool[Tensor, "B G T N"]:
        """Which blocks the heads of each KV head read for each token: the picture of the selected branch."""
        entries, tokens, _ = self.remember(x, None)
        q = self.rotate(split_heads(self.q_proj(x), self.n_heads), tokens.positions)
        weights = compressed_weights(q, tokens.positions, entries[0], self.sizes)
        return self.select(weights, tokens.positions, x.shape[1])

    def rotate(self, heads: Float[Tensor, "B H T D"], positions: Tensor) -> Float[Tensor, "B H T D"]:
        return self.rope(heads, positions) if self.rope is not None else heads

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        sizes, G = self.sizes, self.n_kv_heads
        positions = torch.arange(x.shape[1], device=x.device)[None]
        q = self.rotate(split_heads(self.q_proj(x), self.n_heads), positions)
        k, v = (split_heads(project(x), 3 * G).chunk(3, dim=1) for project in (self.k_proj, self.v_proj))
        raw, turned = torch.stack((k[0], v[0])), [self.rotate(keys, positions) for keys in k]
        pools, gates = upcast(q).unflatten(1, (G, -1)), self.gates(x).unflatten(2, (G, -1))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            weights = (q @ upcast(k).T / self.head_dim**0.5).softmax(-1)
            return weights @ upcast(v), weights.detach()

        heads = torch.zeros_like(pools)
        for b, g, t in product(range(len(x)), range(G), positions[0].tolist()):
            query, gate, own = pools[b, g, :, t], gates[:, b, g, :, t], t // self.block
            score, starts = [0.0] * (own + 1), range(0, t + 2 - sizes.compress, sizes.stride)
            if len(starts):
                blocks = torch.stack([raw[:, b, g, i : i + sizes.compress] for i in starts], dim=1)
                out, weights = attend(query, *self.compress(blocks[:, None, None], 0)[:, 0, 0])
                heads[b, g, :, t] += gate[0] * out
                for start, weight in zip(starts, weights.sum(0).tolist(), strict=True):
                    for part in range(start, start + sizes.compress, sizes.stride):
                        score[part // self.block] += weight  # each stride lies in one block
            fixed = {0, *range(max(0, own - self.n_local + 1), own + 1)}
            free = sorted(set(range(own)) - fixed, key=lambda j: -score[j])
            read = fixed.union(free[: self.n_blocks - 1 - self.n_local])
            selected = [s for s in range(t + 1) if s // self.block in read]
            near = list(range(max(0, t - sizes.window + 1), t + 1))
            for branch, seen in ((1, selected), (2, near)):
                out, _ = attend(query, turned[branch][b, g, seen], v[branch][b, g, seen])
                heads[b, g, :, t] += gate[branch] * out
        return self.o_proj(merge_heads(heads.flatten(1, 2)).to(x.dtype))

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> SparseCache:
        dtype, at = self.dtype_and_device(dtype, device)
        return SparseCache(batch, self.n_kv_heads, max_len, self.head_dim, self.sizes, dtype, at)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """2 · B · G · D · (max_len + min(max_len, window) + C + min(l - 1, max_len)) · bytes a number, where
        C = ⌊(max_len - l) / d⌋ + 1 compressed blocks become whole.
        """
        ring = min(validate.positive("max_len", max_len), self.sizes.window)
        waiting = min(self.sizes.compress - 1, max_len)
        return self.kv_bytes(max_len + ring + self.sizes.whole(max_len) + waiting, batch, dtype)

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """All compressed blocks, the selected blocks and the window; and of a step that makes a compressed
        block whole, one in d, the l - 1 tokens that waited for it.
        """
        past, filled = divmod(validate.positive("length", length) - 1, self.block)
        whole = self.sizes.whole(length)
        waited = self.sizes.compress - 1 if whole > self.sizes.whole(length - 1) else 0
        selected = min(past, self.n_blocks - 1) * self.block + filled + 1
        return self.kv_bytes(whole + selected + min(length, self.sizes.window) + waited, batch, dtype)

    def kv_bytes(self, tokens: int, batch: int, dtype: torch.dtype | None) -> int:
        """A key and a value for so many tokens, in each KV head."""
        numbers = 2 * validate.positive("batch", batch) * self.n_kv_heads * self.head_dim
        return tokens * numbers * self.dtype_and_device(dtype)[0].itemsize

    @classmethod
    def tiny(cls) -> "NativeSparseAttention":
        """From 9 tokens on it reads 3 blocks of more, and from 5 on its window wraps."""
        blocks = {"compress": 2, "stride": 1, "block": 3, "n_blocks": 3, "n_local": 1}
        return cls(24, 4, n_kv_heads=2, head_dim=8, window=4, **blocks)  # type: ignore[arg-type]

    @classmethod
    def tiny_at_limit(cls) -> tuple[Mechanism, Mechanism]:
        """All blocks selected, and the gates of the two other branches shut."""
        full = FullAttention.tiny()
        limit = cls(d_model=24, n_heads=3, compress=2, stride=1, block=2, n_blocks=7, window=3)
        with torch.no_grad():
            for name in ("k_proj", "v_proj"):
                getattr(limit, name).weight.unflatten(0, (3, -1))[1] = getattr(full, name).weight
            limit.q_proj.weight.copy_(full.q_proj.weight)
            limit.o_proj.weight.copy_(full.o_proj.weight)
            limit.gate_proj.weight.zero_()
            limit.gate_proj.bias.copy_(torch.tensor([-100.0, 100.0, -100.0]).repeat_interleave(3))
        return limit, full


def attend_near(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """A tile of queries over the columns of its windows."""
    return grouped_attention(q, k.to(q.dtype), v.to(q.dtype), mask)
