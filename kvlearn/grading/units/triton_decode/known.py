# mypy: disallow-untyped-defs=False
"""What earlier exercises of unit 11 have shown, as functions that kernels call in later ones."""

from kvlearn.grading.units.triton_decode.given import tl, triton


@triton.jit
def online(m, total, acc, scores, v):
    """11.2, as a function: m, total and acc with one more tile counted in.

    scores (BLOCK,), scaled and to base 2, and v (BLOCK, D); m and total are numbers, acc is (D,).
    """
    new = tl.maximum(m, tl.max(scores, axis=0))
    old = tl.exp2(m - new)
    weights = tl.exp2(scores - new)
    return new, total * old + tl.sum(weights, axis=0), acc * old + tl.sum(weights[:, None] * v, axis=0)


@triton.jit
def online_rows(m, total, acc, scores):
    """11.2, as a function, for several rows at once: m and total with one more tile counted in.

    scores (ROWS, BLOCK); m and total (ROWS,), acc (ROWS, D). acc is rescaled to the new m, and no more: the
    tile's weights, exp2(scores - m), times its values are still to be added.
    """
    new = tl.maximum(m, tl.max(scores, axis=1))
    old = tl.exp2(m - new)
    weights = tl.exp2(scores - new[:, None])
    return new, total * old + tl.sum(weights, axis=1), acc * old[:, None]


@triton.jit
def load_tile(POOL, keys, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """11.3, as a function: one tile of the keys or of the values, (BLOCK, BLOCK_D).

    ``keys`` (BLOCK,) are its rows in K or V, of D numbers each; 0 where ``live`` (BLOCK,) is false, and in
    the columns behind D.
    """
    d = tl.arange(0, BLOCK_D)
    at = keys[:, None] * D + d[None, :]
    here = live[:, None] & (d < D)[None, :]
    return tl.load(POOL + at, mask=here, other=0.0)


@triton.jit
def attend_keys(q, K, V, row, lo, hi, D: tl.constexpr, BLOCK: tl.constexpr):
    """11.3, as a function: m, total and acc of the keys lo, lo + 1, …, hi - 1, tile by tile.

    q (D,) is scaled; key n stands in row ``row + n`` of K and V. Without keys: −∞, 0 and 0.
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
    """11.5, as a function: the n parts (D,) from part number ``first`` on, merged by their base-2 lse."""
    s = tl.arange(0, SPLITS)
    there = s < n
    at = (first + s)[:, None] * D + tl.arange(0, D)[None, :]
    parts = tl.load(PARTS + at, mask=there[:, None], other=0.0)
    lse = tl.load(LSE + first + s, mask=there, other=float("-inf"))
    top = tl.max(lse, axis=0)
    weights = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, axis=0)
    return tl.sum(weights[:, None] * parts, axis=0) / tl.where(total == 0, 1.0, total)
