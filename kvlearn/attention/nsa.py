"""Native sparse attention (NSA): the whole past compressed, some blocks of it in full, and a window.

Three branches of attention, each with keys and values of its own, and gates that add them up:

    compressed  k̃_i = φ(the l keys from i · d on), ṽ_i likewise,   o_cmp = softmax(q k̃ᵀ / √D) ṽ     (7, 8)
    selected    o_slc = attention to the n_blocks blocks of l' tokens with the largest weight in k̃  (9 to 12)
    window      o_win = attention to the last ``window`` tokens
    head = Σ_c sigmoid(W_g x)_c · o_c over the three branches c,   y = [head_1 … head_H] W_o         (5)

Numbers in parentheses are equations of Yuan et al., "Native Sparse Attention" (2025). Letters beside those of
core.py:

    l   tokens of a compressed block         d   tokens from the start of one to the next: neighbours overlap
    l'  tokens of a block to select          C   complete compressed blocks: ⌊(S - l) / d⌋ + 1, or none
    N   blocks to select from
"""

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import KV, Cache, KVCache, Mechanism, register, token_positions
from kvlearn.attention.core import (
    TILE,
    attend_blockwise,
    attend_to_blocks,
    by_tiles,
    grouped_attention,
    merge_heads,
    recomputed,
    split_heads,
    top_blocks,
    upcast,
)
from kvlearn.attention.full import FullAttention
from kvlearn.attention.rope import Rope, RopeConfig, rotate_naive
from kvlearn.attention.window import RingCache, Window


@dataclass(frozen=True)
class Sizes:
    """The lengths that a cache depends on: compressed blocks of l tokens, one every d, and the window."""

    compress: int
    stride: int
    window: int

    def complete(self, length: int) -> int:
        """C: how many compressed blocks ``length`` tokens fill."""
        return max(0, (length - self.compress) // self.stride + 1)

    def blocks(self, kv: Float[Tensor, "2 B G T D"]) -> Float[Tensor, "2 B G C l D"]:
        """The tokens of the compressed blocks that T tokens fill; a view, in which neighbours overlap."""
        if not self.complete(kv.shape[3]):
            return kv[:, :, :, :0, None].expand(-1, -1, -1, -1, self.compress, -1)
        return kv.unfold(3, self.compress, self.stride).transpose(-1, -2)


class BlockMap(nn.Module):
    """φ: a block of l keys (or values) to one, by a small network that encodes positions in the block.

        φ(k_1 … k_l) = W_2 gelu(W_1 [k_1 + e_1, …, k_l + e_l])

    The same for all KV heads. Source: Yuan et al., "Native Sparse Attention" (2025), φ of equation 7, which
    says only that it is an MLP and that it encodes positions in the block.
    """

    def __init__(self, head_dim: int, compress: int) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(compress, head_dim) * 0.02)
        self.mix = nn.Linear(compress * head_dim, head_dim)
        self.out = nn.Linear(head_dim, head_dim)

    def forward(self, blocks: Float[Tensor, "... l D"]) -> Float[Tensor, "... D"]:
        return self.out(F.gelu(self.mix((blocks + self.places).flatten(-2))))

    def naive(self, block: Float[Tensor, "B l G D"]) -> Float[Tensor, "B G D"]:
        """The equation, token by token, with gelu(z) = z · (1 + erf(z / √2)) / 2."""
        D, hidden = block.shape[-1], upcast(self.mix.bias)
        for j in range(block.shape[1]):
            columns = upcast(self.mix.weight[:, j * D : (j + 1) * D])
            hidden = hidden + (block[:, j] + upcast(self.places[j])) @ columns.T
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        return hidden @ upcast(self.out.weight).T + upcast(self.out.bias)


class NSACache(Cache):
    """The keys and values of the three branches, and the tokens that are not compressed yet.

    ``compressed``  keys and values of the compressed blocks, C of ``max_len``          (2, B, G, C, D)
    ``waiting``     the tokens since the start of the block that is not complete yet    (2, B, G, l - 1, D)
    ``tokens``      keys and values to select from: all of them
    ``ring``        keys and values of the last ``window`` tokens
    """

    can_trim = False  # overwritten and compressed tokens cannot be restored

    def __init__(
        self,
        batch: int,
        n_heads: int,
        max_len: int,
        head_dim: int,
        sizes: Sizes,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(batch, max_len, device)
        self.sizes = sizes
        self.tokens = KVCache(batch, n_heads, max_len, head_dim, dtype, device)
        self.ring = RingCache(batch, n_heads, max_len, head_dim, sizes.window, 0, dtype, device)
        shape = (2, batch, n_heads, min(sizes.compress - 1, max_len), head_dim)
        self.waiting = torch.zeros(shape, dtype=dtype, device=device)
        shape = (2, batch, n_heads, sizes.complete(max_len), head_dim)
        self.compressed = torch.zeros(shape, dtype=dtype, device=device)

    def tensors(self) -> list[Tensor]:
        return [self.compressed, self.waiting, *self.tokens.tensors(), *self.ring.tensors()]

    def reset(self) -> None:
        super().reset()
        self.tokens.reset()
        self.ring.reset()

    def append(self, k: Float[Tensor, "B H T D"], v: Float[Tensor, "B H T D"]) -> tuple[KV, KV]:
        """Write the keys and values of selection and of the window, side by side on dimension 1 (H = 2G).

        Returns the keys and values of each that the new tokens may read.
        """
        _, n_heads, _, head_dim = self.tokens.k.shape
        for name, new in (("k", k), ("v", v)):
            validate.tensor(name, new, (self.batch, 2 * n_heads, k.shape[2], head_dim), device=self.device)
        (k_slc, k_win), (v_slc, v_win) = k.chunk(2, dim=1), v.chunk(2, dim=1)
        self.advance(k.shape[2])
        return self.tokens.append(k_slc, v_slc), self.ring.append(k_win, v_win)

    def completed_blocks(self, kv: Float[Tensor, "2 B G T D"]) -> Float[Tensor, "2 B G n l D"]:
        """The blocks that the newest tokens, counted by ``append`` before, complete; the rest waits.

        Only a step that completes a block, one in d, reads the tokens that wait.
        """
        kv, old = kv.detach().to(self.waiting.dtype), self.length - kv.shape[3]
        done, complete = self.sizes.complete(old), self.sizes.complete(self.length)
        n_waiting = old - done * self.sizes.stride
        if complete == done:
            self.waiting[:, :, :, n_waiting : n_waiting + kv.shape[3]] = kv
            return self.sizes.blocks(kv[:, :, :, :0])
        kv = torch.cat((self.waiting[:, :, :, :n_waiting], kv), dim=3)
        rest = kv[:, :, :, (complete - done) * self.sizes.stride :]
        self.waiting[:, :, :, : rest.shape[3]] = rest
        return self.sizes.blocks(kv)

    def append_compressed(self, new: Float[Tensor, "2 B G n D"]) -> Float[Tensor, "2 B G C D"]:
        """Write the newest compressed keys and values; return a view of all that are complete."""
        complete = self.compressed[:, :, :, : self.sizes.complete(self.length)]
        complete[:, :, :, complete.shape[3] - new.shape[3] :] = new.detach().to(complete.dtype)
        return complete


def compressed_weights(
    q: Float[Tensor, "B H T D"],
    positions: Int[Tensor, "1 T"],
    k_cmp: Float[Tensor, "B G C D"],
    sizes: Sizes,
) -> Float[Tensor, "B G n T C"]:
    """p = softmax(q k̃ᵀ / √D) over the complete compressed blocks, for the n query heads of each KV head.

    A compressed block is visible from its last token on; a query without visible blocks has only zeros.
    Source: Yuan et al., "Native Sparse Attention" (2025), equation 8.
    """
    groups = upcast(q).unflatten(1, (k_cmp.shape[1], -1)) / q.shape[-1] ** 0.5
    scores = torch.einsum("bgntd, bgcd -> bgntc", groups, k_cmp.to(groups.dtype))
    ends = torch.arange(k_cmp.shape[2], device=q.device) * sizes.stride + sizes.compress - 1
    visible = ends <= positions[0, :, None]
    scores = scores.masked_fill(~visible & visible.any(-1, keepdim=True), -torch.inf)
    return scores.softmax(-1) * visible


def attend_to_compressed(
    q: Float[Tensor, "B H T D"],
    positions: Int[Tensor, "1 T"],
    k_cmp: Float[Tensor, "B G C D"],
    v_cmp: Float[Tensor, "B G C D"],
    sizes: Sizes,
) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B G n T C"]]:
    """o_cmp = p ṽ, and the weights p, by which blocks are selected."""
    weights = compressed_weights(q, positions, k_cmp, sizes)
    out = torch.einsum("bgntc, bgcd -> bgntd", weights, v_cmp.to(weights.dtype))
    return out.flatten(1, 2).to(q.dtype), weights


@torch.no_grad()
def block_scores(
    weights: Float[Tensor, "B G n T C"], sizes: Sizes, block: int, length: int
) -> Float[Tensor, "B G T N"]:
    """The weight that lies in each of the N blocks of ``block`` tokens, the heads of a KV head together.

        score_j = Σ_heads Σ_{m < l'/d} Σ_{n < l/d} p[j · l'/d + m - n]

    A compressed block consists of l/d strides, a block to select of l'/d: each of the former adds its weight
    once for every stride that it has in the latter. Blocks are counted from 0; counted from 1, as in the
    paper, the index is j · l'/d - m - n. Source: equations 9 and 10.
    """
    n_blocks, overlap, parts = -(-length // block), sizes.compress // sizes.stride, block // sizes.stride
    p = F.pad(weights.sum(2), (overlap - 1, n_blocks * parts - weights.shape[-1]))
    return p.unfold(-1, overlap, 1).sum(-1).unflatten(-1, (n_blocks, parts)).sum(-1)


def select_blocks(
    scores: Float[Tensor, "B G T N"], own: Int[Tensor, "1 T"], n_blocks: int, n_local: int
) -> Bool[Tensor, "B G T N"]:
    """The first block, the last ``n_local`` up to a query's own, and the best of those between: ``n_blocks``.

    Source: equation 11; which blocks are always selected: section 4.1.
    """
    own, index = own[:, None, :, None], torch.arange(scores.shape[-1], device=scores.device)
    always = (index <= own) & ((index == 0) | (index > own - n_local))
    return top_blocks(scores, (index < own) & ~always, n_blocks - 1 - n_local) | always


@register("nsa")
class NativeSparseAttention(Mechanism):
    """Native sparse attention: gates add attention to compressed blocks, selected blocks and a window.

    The first block and the last ``n_local`` ones, the own half-filled one among them, are always selected.
    The query heads of a KV head select together, so that each block is read once for all of them. The
    selection has no gradient; its weights learn by the compressed branch.

    ``compress`` is l, ``stride`` d, ``block`` l'; d divides both, and l is at most l'. A compressed key is
    rotated after φ, to its block's first position; the paper does not say how positions enter, and has an MLP
    in place of W_g.

    Cache: 2 · B · G · D · (max_len + min(max_len, window) + C + l - 1) numbers: *more* than full attention.
    A step *reads* 1/d of the past compressed, n_blocks · l' tokens and a window.
    Raises ValueError for sizes that do not fit each other as above.
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
        n_kv_heads = self.n_heads if n_kv_heads is None else n_kv_heads
        self.n_kv_heads = validate.divides("n_kv_heads", n_kv_heads, "n_heads", self.n_heads)
        self.block = validate.positive("block", block)
        compress = validate.positive("compress", compress)
        validate.at_most("compress", compress, self.block, "block")
        for name, length in (("compress", compress), ("block", self.block)):
            stride = validate.divides("stride", stride, name, length)
        self.n_local = validate.positive("n_local", n_local)
        self.n_blocks = validate.at_least("n_blocks", n_blocks, self.n_local + 1)
        self.sizes = Sizes(compress, stride, validate.positive("window", window))

        width = 3 * self.n_kv_heads * self.head_dim  # for compression, selection, window
        self.q_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, width, bias=False)
        self.v_proj = nn.Linear(d_model, width, bias=False)
        self.gate_proj = nn.Linear(d_model, 3 * self.n_heads)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)
        self.k_map, self.v_map = (BlockMap(self.head_dim, compress) for _ in range(2))
        self.rope = Rope(self.head_dim, rope)

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, NSACache, source)
        positions = token_positions(x, cache)
        q = self.rope(split_heads(self.q_proj(x), self.n_heads), positions)  # (B, H, T, D)
        (k_cmp, v_cmp), tokens, window = self.project_branches(x, positions, cache)
        compressed, selected = by_tiles(
            self.compress_and_select, q, positions, k_cmp, v_cmp, tokens.k, tokens.v
        )  # (B, H, T, D) each
        near = attend_blockwise(q, window, Window(self.sizes.window), TILE, attend_window)
        gate_cmp, gate_slc, gate_win = self.gates(x)  # (B, H, T, 1) each
        heads = gate_cmp * compressed + gate_slc * selected + gate_win * near
        return self.o_proj(merge_heads(heads))

    def project_branches(
        self, x: Float[Tensor, "B T M"], positions: Int[Tensor, "1 T"], cache: Cache | None
    ) -> tuple[Float[Tensor, "2 B G C D"], KV, KV]:
        """Keys and values of each branch: compressed, to select from, window; those in ``cache`` included."""
        if isinstance(cache, NSACache):
            self.check_sizes(cache)
            cache.check_room(x.shape[1])
        n = self.n_kv_heads
        k, v = (split_heads(project(x), 3 * n) for project in (self.k_proj, self.v_proj))
        raw = torch.stack((k[:, :n], v[:, :n]))  # not rotated: φ encodes only positions in a block
        k, v = self.rope(k[:, n:], positions), v[:, n:]
        if not isinstance(cache, NSACache):
            tokens, window = (KV(*kv, positions) for kv in zip(k.chunk(2, 1), v.chunk(2, 1), strict=True))
            return self.compress(self.sizes.blocks(raw), 0), tokens, window
        first = self.sizes.complete(cache.length)
        tokens, window = cache.append(k, v)
        blocks = cache.completed_blocks(raw).to(x.dtype)
        new = self.compress(blocks, first) if blocks.shape[3] else blocks[:, :, :, :, 0]
        return cache.append_compressed(new), tokens, window

    def compress(self, blocks: Float[Tensor, "2 B G C l D"], first: int) -> Float[Tensor, "2 B G C D"]:
        """Complete blocks, of which the first has the number ``first``, to a key and a value each."""
        starts = (first + torch.arange(blocks.shape[3], device=blocks.device)) * self.sizes.stride
        return torch.stack((self.rope(self.k_map(blocks[0]), starts[None]), self.v_map(blocks[1])))

    def compress_and_select(
        self,
        q: Float[Tensor, "B H T D"],
        positions: Int[Tensor, "1 T"],
        k_cmp: Float[Tensor, "B G C D"],
        v_cmp: Float[Tensor, "B G C D"],
        k: Float[Tensor, "B G S D"],
        v: Float[Tensor, "B G S D"],
    ) -> Float[Tensor, "2 B H T D"]:
        """The compressed branch, and the selected branch that reads the blocks of its largest weights."""
        compressed, weights = recomputed(attend_to_compressed)(q, positions, k_cmp, v_cmp, self.sizes)
        blocks = self.select(weights, positions, k.shape[2])
        return torch.stack((compressed, recomputed(attend_to_blocks)(q, k, v, positions, blocks, self.block)))

    def select(
        self, weights: Float[Tensor, "B G n T C"], positions: Int[Tensor, "1 T"], length: int
    ) -> Bool[Tensor, "B G T N"]:
        """True at the blocks of ``length`` tokens to read, by the weights of the compressed branch."""
        scores = block_scores(weights, self.sizes, self.block, length)
        return select_blocks(scores, positions // self.block, self.n_blocks, self.n_local)

    def gates(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "3 B H T 1"]:
        """The weight from 0 to 1 of each branch, compressed, selected, window, in each head."""
        return self.gate_proj(x).sigmoid().unflatten(-1, (3, -1)).permute(2, 0, 3, 1)[..., None]

    @torch.no_grad()
    def selected_blocks(self, x: Float[Tensor, "B T M"]) -> Bool[Tensor, "B G T N"]:
        """True at the blocks that the heads of each KV head read for each token of a whole sequence."""
        positions = token_positions(x, None)
        q = self.rope(split_heads(self.q_proj(x), self.n_heads), positions)
        (k_cmp, _), _, _ = self.project_branches(x, positions, None)
        return self.select(compressed_weights(q, positions, k_cmp, self.sizes), positions, x.shape[1])

    def check_sizes(self, cache: NSACache) -> None:
        """Raise ValueError where ``cache`` belongs to a layer of other sizes; called before writing."""
        shape = (cache.batch, self.n_kv_heads, cache.max_len, self.head_dim)
        validate.tensor("cache.tokens.k", cache.tokens.k, shape)
        if cache.sizes != self.sizes:
            raise ValueError(f"cache: expected one with {self.sizes}, got {cache.sizes}")

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        B, T, D, H, G = len(x), x.shape[1], self.head_dim, self.n_heads, self.n_kv_heads
        wide, config, length, d = upcast(x), self.rope.config, self.sizes.compress, self.sizes.stride
        q = rotate_naive((wide @ upcast(self.q_proj.weight).T).reshape(B, T, H, D), config)
        k, v = (
            (wide @ upcast(w.weight).T).reshape(B, T, 3, G, D).unbind(2) for w in (self.k_proj, self.v_proj)
        )
        gate = torch.sigmoid(wide @ upcast(self.gate_proj.weight).T + upcast(self.gate_proj.bias))
        gate = gate.reshape(B, T, 3, H, 1)
        starts = range(0, T - length + 1, d)  # of the compressed blocks
        k_cmp = [self.k_map.naive(k[0][:, i : i + length]) for i in starts]  # (B, G, D) each
        k_cmp = [rotate_naive(key[:, None], config, [i])[:, 0] for i, key in zip(starts, k_cmp, strict=True)]
        v_cmp = [self.v_map.naive(v[0][:, i : i + length]) for i in starts]
        k_slc, k_win = rotate_naive(k[1], config), rotate_naive(k[2], config)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            weights = (q @ k.T / D**0.5).softmax(-1)
            return weights @ v, weights

        heads = torch.zeros_like(q)
        for b, g, t in product(range(B), range(G), range(T)):
            group, own = slice(g * H // G, (g + 1) * H // G), t // self.block
            query, (gate_cmp, gate_slc, gate_win) = q[b, t, group], gate[b, t, :, group]
            score, complete = [0.0] * (own + 1), [c for c, i in enumerate(starts) if i + length <= t + 1]
            if complete:
                keys, values = (torch.stack([e[c][b, g] for c in complete]) for e in (k_cmp, v_cmp))
                out, weights = attend(query, keys, values)
                heads[b, t, group] += gate_cmp * out
                for c, weight in zip(complete, weights.detach().sum(0).tolist(), strict=True):
                    for part in range(starts[c], starts[c] + length, d):
                        score[part // self.block] += weight  # each stride lies in one block
            always = {0, *range(max(0, own - self.n_local + 1), own + 1)}
            free = sorted(set(range(own)) - always, key=lambda j: -score[j])
            read = always.union(free[: self.n_blocks - 1 - self.n_local])
            selected = [s for s in range(t + 1) if s // self.block in read]
            heads[b, t, group] += gate_slc * attend(query, k_slc[b, selected, g], v[1][b, selected, g])[0]
            near = list(range(max(0, t - self.sizes.window + 1), t + 1))
            heads[b, t, group] += gate_win * attend(query, k_win[b, near, g], v[2][b, near, g])[0]
        return (heads.flatten(2) @ upcast(self.o_proj.weight).T).to(x.dtype)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> NSACache:
        dtype, device = self.dtype_and_device(dtype, device)
        return NSACache(batch, self.n_kv_heads, max_len, self.head_dim, self.sizes, dtype, device)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """2 · B · G · D · (max_len + min(max_len, window) + C + min(l - 1, max_len)) · bytes per number.

        C = ⌊(max_len - l) / d⌋ + 1 compressed blocks, or none.
        """
        length, stride = self.sizes.compress, self.sizes.stride
        window = min(validate.positive("max_len", max_len), self.sizes.window)
        compressed = max(0, (max_len - length) // stride + 1)
        tokens = max_len + window + compressed + min(length - 1, max_len)
        return self.to_bytes(2 * self.n_kv_heads * self.head_dim * tokens, batch, dtype)

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """2 · B · G · D · (C + selected + min(length, window) + waiting) · bytes per number.

        C compressed blocks, or none; the tokens of the selected blocks, the own half-filled one among them;
        and in a step that completes a compressed block, one in d, the l - 1 tokens that waited for it.
        """
        past, before = divmod(validate.positive("length", length) - 1, self.block)
        selected = min(past, self.n_blocks - 1) * self.block + before + 1
        since_first = length - self.sizes.compress  # tokens since the first compressed block was complete
        compressed = max(0, since_first // self.sizes.stride + 1)
        completes = since_first >= 0 and since_first % self.sizes.stride == 0
        waiting = self.sizes.compress - 1 if completes else 0
        tokens = compressed + selected + min(length, self.sizes.window) + waiting
        return self.to_bytes(2 * self.n_kv_heads * self.head_dim * tokens, batch, dtype)

    @classmethod
    def tiny(cls) -> "NativeSparseAttention":
        """It selects 3 blocks of 4 from the 10th token on; its window is full at the 4th."""
        blocks = {"compress": 2, "stride": 1, "block": 3, "n_blocks": 3, "n_local": 1}
        return cls(24, 4, n_kv_heads=2, head_dim=8, window=4, **blocks)  # type: ignore[arg-type]

    @classmethod
    def tiny_at_limit(cls) -> tuple[Mechanism, Mechanism]:
        """All blocks selected, and the gates of the two other branches closed."""
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


def attend_window(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """A tile of queries over the keys of their windows."""
    return grouped_attention(q, k.to(q.dtype), v.to(q.dtype), mask)
