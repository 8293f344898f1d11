"""Parts of a decode kernel, as functions that kernels call, and the launches: memory, padding and grid."""

from typing import Any

from torch import Tensor

from kvlearn.teaching.interpreter import tl, triton


@triton.jit
def online(m, total, acc, scores, v):
    """Online softmax: m, total and acc with one more tile counted in.

    scores (BLOCK,), scaled and to base 2, and v (BLOCK, D); m and total are numbers, acc is (D,).
    """
    new = tl.maximum(m, tl.max(scores, axis=0))
    old = tl.exp2(m - new)
    weights = tl.exp2(scores - new)
    return new, total * old + tl.sum(weights, axis=0), acc * old + tl.sum(weights[:, None] * v, axis=0)


@triton.jit
def online_rows(m, total, acc, scores):
    """Online softmax of several rows at once: m and total with one more tile counted in.

    scores (ROWS, BLOCK); m and total (ROWS,), acc (ROWS, D). acc is rescaled to the new m, and no more: the
    tile's weights, exp2(scores - m), times its values are still to be added.
    """
    new = tl.maximum(m, tl.max(scores, axis=1))
    old = tl.exp2(m - new)
    weights = tl.exp2(scores - new[:, None])
    return new, total * old + tl.sum(weights, axis=1), acc * old[:, None]


@triton.jit
def load_tile(POOL, keys, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """One tile of the keys or of the values, (BLOCK, BLOCK_D).

    ``keys`` (BLOCK,) are its rows in K or V, of D numbers each; 0 where ``live`` (BLOCK,) is false, and in
    the columns behind D.
    """
    d = tl.arange(0, BLOCK_D)
    at = keys[:, None] * D + d[None, :]
    here = live[:, None] & (d < D)[None, :]
    return tl.load(POOL + at, mask=here, other=0.0)


@triton.jit
def attend_keys(q, K, V, row, lo, hi, D: tl.constexpr, BLOCK: tl.constexpr):
    """Attention to some keys: m, total and acc of the keys lo, lo + 1, …, hi - 1, tile by tile.

    q (D,) is scaled; key n is in row ``row + n`` of K and V. Without keys: −∞, 0 and 0.
    """
    m = float("-inf")
    total = 0.0
    acc = tl.zeros([D], tl.float32)
    for start in range(lo, hi, BLOCK):
        n = start + tl.arange(0, BLOCK)
        k = load_tile(K, row + n, n < hi, D, D)
        v = load_tile(V, row + n, n < hi, D, D)
        scores = tl.where(n < hi, tl.sum(q[None, :] * k, axis=1), float("-inf"))
        m, total, acc = online(m, total, acc, scores, v)
    return m, total, acc


@triton.jit
def merge_parts(PARTS, LSE, first, n, D: tl.constexpr, SPLITS: tl.constexpr):
    """The n parts (D,) from part number ``first`` on, merged by their base-2 lse."""
    s = tl.arange(0, SPLITS)
    there = s < n
    at = (first + s)[:, None] * D + tl.arange(0, D)[None, :]
    parts = tl.load(PARTS + at, mask=there[:, None], other=0.0)
    lse = tl.load(LSE + first + s, mask=there, other=float("-inf"))
    top = tl.max(lse, axis=0)
    weights = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, axis=0)
    return tl.sum(weights[:, None] * parts, axis=0) / tl.where(total == 0, 1.0, total)


def launch_grouped(kernel: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Packed query heads: one program for each sequence and KV head; GROUP query heads share a KV head."""
    B, H, D = q.shape
    G, S = k.shape[1:3]
    out = q.new_full((B * H + 16, D), float("nan"))  # room behind, so that a stray row breaks nothing
    padded = max(16, triton.next_power_of_2(D))
    kernel[(B, G)](q, k, v, out, S, H=H, G=G, GROUP=H // G, D=D, ROWS=16, BLOCK=16, BLOCK_D=padded)
    return out[: B * H].view(B, H, D)


def launch_split(
    part_kernel: Any, merge_kernel: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int
) -> tuple[Tensor, Tensor]:
    """Split decode, one program for each row and split, then one for each row. Out, lse of the parts."""
    B, D = q.shape
    parts, lse = q.new_empty(B, n_splits, D), q.new_empty(B, n_splits)
    capacity, scale = k.shape[1], D**-0.5
    part_kernel[(B, n_splits)](q, k, v, lengths, parts, lse, capacity, n_splits, scale, D=D, BLOCK=16)
    out = q.new_full((B, D), float("nan"))
    merge_kernel[(B,)](parts, lse, out, n_splits, D=D, SPLITS=triton.next_power_of_2(n_splits))
    return out, lse


def launch_once(
    kernel: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int, first: int, tickets: Any
) -> tuple[Tensor, Tensor]:
    """Split decode in one launch, one program for each split and row. Out, and how often a row was merged."""
    B, D = q.shape
    nan = float("nan")
    out, parts, lse = (
        q.new_full((B, D), nan),
        q.new_full((B, n_splits, D), nan),
        q.new_full((B, n_splits), nan),
    )
    merges = lengths.new_zeros(B)
    kernel[(n_splits, B)](
        q, k, v, lengths, parts, lse, tickets(q), merges, out, k.shape[1], n_splits, first, D**-0.5,
        D=D, SPLITS=triton.next_power_of_2(n_splits), BLOCK=16,
    )  # fmt: skip
    return out, merges
