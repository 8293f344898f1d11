"""11.7: the mistakes that people make when they choose the splits."""

from collections.abc import Callable

from kvlearn.grading.units.triton_decode.choose import EXERCISE

__all__ = ["EXERCISE"]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def search(
    pairs: int,
    tiles: int,
    places: int,
    waves: Callable[[int, int], int] = cdiv,
    extra: int = 1,
    last: bool = False,
) -> int:
    """The best of 1 to ``tiles`` splits; right for the right numbers."""
    times = {s: waves(pairs * s, places) * (cdiv(tiles, s) + extra) for s in range(1, max(tiles, 1) + 1)}
    best = [s for s, time in times.items() if time == min(times.values())]
    return best[-1] if last else best[0]


@EXERCISE.misconception("query heads counted")
def query_heads(
    lengths: list[int], n_heads: int, n_kv_heads: int, block: int, mps: int, resident: int
) -> int:
    """The programs were counted with n_heads. A program serves a whole group of query heads (exercise
    11.4), so there are only batch · n_kv_heads of them, and the machine stays emptier than you think."""
    return search(len(lengths) * n_heads, cdiv(max(lengths), block), mps * resident)


@EXERCISE.misconception("the batch not counted")
def one_sequence(
    lengths: list[int], n_heads: int, n_kv_heads: int, block: int, mps: int, resident: int
) -> int:
    """The programs were counted for one sequence. Every sequence of the batch brings its own, and a large
    batch fills the machine without any splits."""
    return search(n_kv_heads, cdiv(max(lengths), block), mps * resident)


@EXERCISE.misconception("the KV heads not counted")
def one_head(lengths: list[int], n_heads: int, n_kv_heads: int, block: int, mps: int, resident: int) -> int:
    """The programs were counted as one a sequence. Every KV head has a program of its own: batch ·
    n_kv_heads."""
    return search(len(lengths), cdiv(max(lengths), block), mps * resident)


@EXERCISE.misconception("the resident programs forgotten")
def one_resident(
    lengths: list[int], n_heads: int, n_kv_heads: int, block: int, mps: int, resident: int
) -> int:
    """A wave was taken to be one program a multiprocessor. As many as fit run side by side on it,
    `resident` of them, so that one computes while the other waits for memory."""
    return search(len(lengths) * n_kv_heads, cdiv(max(lengths), block), mps)


@EXERCISE.misconception("waves rounded down")
def floored(lengths: list[int], n_heads: int, n_kv_heads: int, block: int, mps: int, resident: int) -> int:
    """programs // places leaves out the last wave, which is not full and takes as long as the others.
    Round up: `-(-a // b)`."""
    return search(
        len(lengths) * n_kv_heads, cdiv(max(lengths), block), mps * resident, lambda a, b: max(a // b, 1)
    )


@EXERCISE.misconception("the partial tile not counted")
def tiles_floored(
    lengths: list[int], n_heads: int, n_kv_heads: int, block: int, mps: int, resident: int
) -> int:
    """Tiles were counted as length // block. The last one is not full and has to be read all the same: round
    up."""
    return search(len(lengths) * n_kv_heads, max(lengths) // block, mps * resident)


@EXERCISE.misconception("starting and merging cost nothing")
def free(lengths: list[int], n_heads: int, n_kv_heads: int, block: int, mps: int, resident: int) -> int:
    """The time was taken as waves · ⌈tiles / s⌉. Every program also starts, and its result has to be
    merged: one tile's time more in every wave. Without it, splits are cut finer and finer for nothing."""
    return search(len(lengths) * n_kv_heads, cdiv(max(lengths), block), mps * resident, extra=0)


@EXERCISE.misconception("the most splits of equals")
def most(lengths: list[int], n_heads: int, n_kv_heads: int, block: int, mps: int, resident: int) -> int:
    """Where several numbers of splits take the same time, the largest was taken. Fewer splits mean fewer
    partial results to write, read and merge: take the smallest."""
    return search(len(lengths) * n_kv_heads, cdiv(max(lengths), block), mps * resident, last=True)


@EXERCISE.misconception("as many splits as fit into one wave")
def one_wave(lengths: list[int], n_heads: int, n_kv_heads: int, block: int, mps: int, resident: int) -> int:
    """places // pairs splits fill one wave as far as whole splits go. With 20 pairs on 36 places that is
    1, and nearly half the machine idles; two waves of shorter programs may be done sooner. Compare the
    times."""
    pairs = len(lengths) * n_kv_heads
    return min(max(mps * resident // pairs, 1), cdiv(max(lengths), block))


@EXERCISE.misconception("rounded up to more than one wave")
def just_over(lengths: list[int], n_heads: int, n_kv_heads: int, block: int, mps: int, resident: int) -> int:
    """⌈places / pairs⌉ splits make a few programs more than the machine holds. They wait for a wave of
    their own, and the step takes nearly twice as long. Compare the times of all numbers of splits."""
    pairs = len(lengths) * n_kv_heads
    return min(cdiv(mps * resident, pairs), cdiv(max(lengths), block))


@EXERCISE.misconception("as many splits as possible")
def always_most(
    lengths: list[int], n_heads: int, n_kv_heads: int, block: int, mps: int, resident: int
) -> int:
    """One split for each tile. The machine is full, and every program starts, computes one tile and hands
    over a partial result to merge: half of the time or more goes into that. Split only until the
    machine is full."""
    return cdiv(max(lengths), block)


@EXERCISE.misconception("never split")
def never(lengths: list[int], n_heads: int, n_kv_heads: int, block: int, mps: int, resident: int) -> int:
    """Always 1, which is right only for a batch that fills the machine. One sequence with two KV heads is
    two programs, and all other multiprocessors wait. (A time with fractions of a wave gives 1 too: a
    machine that is a tenth full takes as long as a full one. Round the waves up.)"""
    return 1


@EXERCISE.misconception("the shortest row's tiles")
def shortest(lengths: list[int], n_heads: int, n_kv_heads: int, block: int, mps: int, resident: int) -> int:
    """The tiles were counted from the shortest row. The step ends when the *longest* row is done:
    max(lengths)."""
    return search(len(lengths) * n_kv_heads, cdiv(min(lengths), block), mps * resident)


@EXERCISE.misconception("all rows' tiles added up")
def summed(lengths: list[int], n_heads: int, n_kv_heads: int, block: int, mps: int, resident: int) -> int:
    """The tiles of all rows were added. Rows are worked on side by side, by programs of their own; a wave
    lasts as long as the longest row's share, ⌈tiles of the longest / s⌉."""
    tiles = sum(cdiv(length, block) for length in lengths)
    return search(len(lengths) * n_kv_heads, tiles, mps * resident)


@EXERCISE.misconception("only powers of two tried")
def powers(lengths: list[int], n_heads: int, n_kv_heads: int, block: int, mps: int, resident: int) -> int:
    """Only 1, 2, 4, 8 … splits were compared. The number is a run-time argument and the grid takes any: 132
    multiprocessors and 4 pairs want 33."""
    tiles, pairs = cdiv(max(lengths), block), len(lengths) * n_kv_heads
    tried = [1 << i for i in range(tiles.bit_length())]
    return min(tried, key=lambda s: cdiv(pairs * s, mps * resident) * (cdiv(tiles, s) + 1))


@EXERCISE.misconception("the lengths added up")
def added(lengths: list[int], n_heads: int, n_kv_heads: int, block: int, mps: int, resident: int) -> int:
    """The tiles were counted from the sum of the lengths. Rows are worked on side by side, by programs of
    their own; a wave lasts as long as the longest row's share: max(lengths)."""
    return search(len(lengths) * n_kv_heads, cdiv(sum(lengths), block), mps * resident)


@EXERCISE.misconception("the largest number not tried")
def one_short(lengths: list[int], n_heads: int, n_kv_heads: int, block: int, mps: int, resident: int) -> int:
    """`range(1, tiles)` ends at tiles − 1. Short contexts on an empty machine are done first with one
    split for each tile: `range(1, tiles + 1)`."""
    tiles, pairs = cdiv(max(lengths), block), len(lengths) * n_kv_heads
    tried = range(1, max(tiles, 2))
    return min(tried, key=lambda s: cdiv(pairs * s, mps * resident) * (cdiv(tiles, s) + 1))
