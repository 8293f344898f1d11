"""11.5: the mistakes that people make when they split, as short PyTorch emulations."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvlearn.grading.units.triton_decode.kernels import BLOCK, LOG2E
from kvlearn.grading.units.triton_decode.splits import EXERCISE

__all__ = ["EXERCISE"]

Pair = tuple[Tensor, Tensor]
Bounds = Callable[[int, int, int, int], tuple[int, int]]  # of (split, n_splits, length, capacity)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def right_bounds(split: int, n_splits: int, length: int, capacity: int) -> tuple[int, int]:
    each = cdiv(cdiv(length, BLOCK), n_splits) * BLOCK
    return split * each, min((split + 1) * each, length)


def parts_of(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int, bounds: Bounds = right_bounds
) -> Pair:
    """What the first kernel stores: (B, splits, D) normalised, and lse (B, splits) in base 2."""
    parts = q.new_zeros(len(q), n_splits, q.shape[1])
    lse = q.new_full((len(q), n_splits), -torch.inf)
    scores = torch.einsum("bd,bsd->bs", q, k) * (q.shape[1] ** -0.5 * LOG2E)
    for b, length in enumerate(lengths.tolist()):
        for split in range(n_splits):
            lo, hi = bounds(split, n_splits, length, k.shape[1])
            if lo < min(hi, k.shape[1]):
                top = scores[b, lo:hi].max()
                weights = torch.exp2(scores[b, lo:hi] - top)
                parts[b, split] = weights @ v[b, lo:hi] / weights.sum()
                lse[b, split] = top + weights.sum().log2()
    return parts, lse


def merge(parts: Tensor, lse: Tensor, guard: bool = True) -> Tensor:
    top = lse.amax(1, keepdim=True)
    weights = torch.exp2(lse - (top.nan_to_num(neginf=0.0) if guard else top))
    total = weights.sum(1, keepdim=True)
    out = torch.einsum("bn,bnd->bd", weights, parts)
    return out / (torch.where(total == 0, 1.0, total) if guard else total)


def split_by(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int, bounds: Bounds) -> Pair:
    parts, lse = parts_of(q, k, v, lengths, n_splits, bounds)
    return merge(parts, lse), lse


@EXERCISE.misconception("the keys per split rounded down")
def rounded_down(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """Each split gets length // n_splits keys, and what is left over belongs to nobody: the newest tokens are
    lost. Round up, `tl.cdiv`, and cut the last split off at the length."""

    def bounds(split: int, n_splits: int, length: int, capacity: int) -> tuple[int, int]:
        each = length // n_splits
        return split * each, (split + 1) * each

    return split_by(q, k, v, lengths, n_splits, bounds)


@EXERCISE.misconception("the tiles per split rounded down")
def tiles_rounded_down(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """Each split gets tiles // n_splits tiles, and the tiles left over belong to nobody (with fewer tiles
    than splits that is all of them). Round up: `tl.cdiv(tiles, n_splits)`."""

    def bounds(split: int, n_splits: int, length: int, capacity: int) -> tuple[int, int]:
        each = cdiv(length, BLOCK) // n_splits * BLOCK
        return split * each, min((split + 1) * each, length)

    return split_by(q, k, v, lengths, n_splits, bounds)


@EXERCISE.misconception("the partial tile is lost")
def whole_tiles(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """Tiles were counted as length // BLOCK, without the last one, which is not full. The newest tokens
    are in it: `tl.cdiv(length, BLOCK)`."""

    def bounds(split: int, n_splits: int, length: int, capacity: int) -> tuple[int, int]:
        each = cdiv(length // BLOCK, n_splits) * BLOCK
        return split * each, min((split + 1) * each, length)

    return split_by(q, k, v, lengths, n_splits, bounds)


@EXERCISE.misconception("the ends not cut off at the length")
def past_the_end(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """`hi` is a multiple of the tile, so the last split goes on behind the row's keys: the mask in the
    loop is `n < hi`. `tl.minimum(…, length)` ends it."""

    def bounds(split: int, n_splits: int, length: int, capacity: int) -> tuple[int, int]:
        each = cdiv(cdiv(length, BLOCK), n_splits) * BLOCK
        return split * each, (split + 1) * each

    return split_by(q, k, v, lengths, n_splits, bounds)


@EXERCISE.misconception("every split begins at 0")
def from_zero(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """The ends are right and the beginnings are not: every split counts the keys of the ones before it too. A
    key belongs to exactly one split; split number s begins where s − 1 ends."""

    def bounds(split: int, n_splits: int, length: int, capacity: int) -> tuple[int, int]:
        return 0, right_bounds(split, n_splits, length, capacity)[1]

    return split_by(q, k, v, lengths, n_splits, bounds)


@EXERCISE.misconception("neighbours share a key")
def overlapping(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """`hi` is taken as the last key and not as the one behind it, so the key at each boundary counts in two
    splits. The mask is `n < hi`: the split ends before hi."""

    def bounds(split: int, n_splits: int, length: int, capacity: int) -> tuple[int, int]:
        lo, hi = right_bounds(split, n_splits, length, capacity)
        return lo, min(hi + 1, length) if lo < hi else hi

    return split_by(q, k, v, lengths, n_splits, bounds)


@EXERCISE.misconception("split by the capacity")
def by_capacity(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """The splits divide the room that a row has, not its length. The result is right, but a row that fills a
    third of its room leaves two thirds of its programs idle: the length belongs into the division."""

    def bounds(split: int, n_splits: int, length: int, capacity: int) -> tuple[int, int]:
        each = cdiv(cdiv(capacity, BLOCK), n_splits) * BLOCK
        return split * each, min((split + 1) * each, length)

    return split_by(q, k, v, lengths, n_splits, bounds)


@EXERCISE.misconception("the first split does everything")
def no_split(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """The first split goes from 0 to the length and the others get nothing. The result is right, and no
    time is saved: one program still reads all keys, one tile after the other."""
    return split_by(q, k, v, lengths, n_splits, lambda s, n, length, c: (0, length) if s == 0 else (0, 0))


@EXERCISE.misconception("cut in the middle of a tile")
def by_keys(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """Each split got ⌈length / n_splits⌉ keys. The result is right, but the cuts fall inside tiles: every
    split ends in a partial tile of its own, and its loads no longer begin where memory likes them to.
    Count in tiles."""

    def bounds(split: int, n_splits: int, length: int, capacity: int) -> tuple[int, int]:
        each = cdiv(length, n_splits)
        return split * each, min((split + 1) * each, length)

    return split_by(q, k, v, lengths, n_splits, bounds)


@EXERCISE.misconception("tiles taken for keys")
def tiles_for_keys(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """The share of a split was counted in tiles and used as a number of keys: a sixteenth of the row is read.
    `lo` and `hi` are keys, so multiply by BLOCK."""

    def bounds(split: int, n_splits: int, length: int, capacity: int) -> tuple[int, int]:
        each = cdiv(cdiv(length, BLOCK), n_splits)
        return split * each, min((split + 1) * each, length)

    return split_by(q, k, v, lengths, n_splits, bounds)
