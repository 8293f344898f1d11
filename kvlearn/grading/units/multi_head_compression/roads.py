"""03.6: what both roads cost, held against a count head by head and a search."""

from functools import cache
from typing import Any

from kvlearn.grading.compare import describe, plain_number
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial

EXERCISE = Exercise(
    id="03.6",
    slug="roads",
    title="Two roads: count, and choose",
    answers=("roads",),
    hints=(
        "A product of an (n, m) with an (m, p) matrix has n·p results of m multiply-adds each: 2·n·m·p "
        "FLOPs. Write down the products of each road, with their shapes, and add.",
        "Naive: first S tokens go up, (S, R) @ (R, 2·H·D), once, however many queries there are. Then for "
        "every head (T, D + Dr) @ (D + Dr, S) for the scores and (T, S) @ (S, D) for the output.",
        "Absorbed: for every head (T, D) @ (D, R) in and (T, R) @ (R, D) out; between them (T, R + Dr) @ "
        "(R + Dr, S) and (T, S) @ (S, R). Nothing here happens once for each token of the cache *except* "
        "attention, whose rows are now R + Dr wide.",
        "Both are straight lines in T. Absorbed starts at 0, naive at 4·S·R·H·D. With `slope` the "
        "difference of what one more query costs, absorbed wins while T · slope < 4·S·R·H·D: always if "
        "slope ≤ 0, else up to `(4 * S * R * H * D - 1) // slope`, which leaves a tie out.",
    ),
)

Shape = tuple[int, int, int, int, int]

# H, D, R, Dr of DeepSeek-V2-Lite, DeepSeek-V2 and -V3, MiniCPM3 and Kimi K2, from their config.json.
MODELS = [(16, 128, 512, 64), (128, 128, 512, 64), (40, 64, 256, 32), (64, 128, 512, 64)]


def product(n: int, m: int, p: int) -> int:
    """FLOPs of an (n, m) by an (m, p) matrix."""
    return 2 * n * m * p


def naive(H: int, D: int, R: int, Dr: int, S: int, T: int) -> int:
    one_head = 2 * product(S, R, D) + product(T, D + Dr, S) + product(T, S, D)
    return H * one_head


def absorbed(H: int, D: int, R: int, Dr: int, S: int, T: int) -> int:
    one_head = product(T, D, R) + product(T, R + Dr, S) + product(T, S, R) + product(T, R, D)
    return H * one_head


@cache
def largest(H: int, D: int, R: int, Dr: int, S: int) -> int | None:
    """Tries T: doubling until absorbed loses, then halving the interval."""

    def wins(T: int) -> bool:
        return absorbed(H, D, R, Dr, S, T) < naive(H, D, R, Dr, S, T)

    low, high = 0, 1
    while wins(high):
        low, high = high, 2 * high
        if high > 10**18:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if wins(middle) else (low, middle)
    return low


def model(t: Trial, S: int | None = None) -> tuple[int, ...]:
    """H, D, R, Dr, S, T of a real model: a few queries before a long cache."""
    return *MODELS[t.round % len(MODELS)], S or t.integer(1000, 9000), t.pick(1, 4, 256, 700)


def field(t: Trial, got: Any, name: str) -> Any:
    if not isinstance(got, dict) or name not in got:
        came = f"keys {list(got)[:6]}" if isinstance(got, dict) else describe(got)
        t.true(False, f"a dict with the key {name!r}", came)
        raise Stop
    return got[name]


def largest_is(t: Trial, roads: Answer, shape: tuple[int, ...], want: int | None) -> None:
    got = field(t, roads(*shape), "largest_T")
    if want is None:
        shown = describe(got) if got is not None else "None"
        t.true(got is None, "largest_T None: absorbed wins at any T", f"largest_T {shown}")
        return
    plain = plain_number(got)
    whole = int(plain) if plain is not None and abs(plain) < 1e18 and plain == int(plain) else plain
    if whole is None and got is None:
        t.true(False, f"largest_T {want:,}", "largest_T None, which means that absorbed always wins")
        return
    t.number(got if whole is None else whole, want, "largest_T")


@EXERCISE.requirement(1, "naive", rounds=4)
def naive_flops(t: Trial, roads: Answer) -> None:
    """2·S·R·H·2D to decompress, then 2·T·S·H·(2D + Dr) to attend; shapes of DeepSeek, MiniCPM3, Kimi K2"""
    shape = model(t)
    t.number(field(t, roads(*shape), "naive"), naive(*shape), "naive")


@EXERCISE.requirement(1, "absorbed", rounds=4)
def absorbed_flops(t: Trial, roads: Answer) -> None:
    """2·T·H·D·R · 2 for the ways in and out, and 2·T·S·H·(2R + Dr) to attend"""
    shape = model(t)
    t.number(field(t, roads(*shape), "absorbed"), absorbed(*shape), "absorbed")


@EXERCISE.requirement(2, "the largest T at which absorbed wins", rounds=4)
def largest_t(t: Trial, roads: Answer) -> None:
    """the last whole number of queries at which absorbed has fewer FLOPs, whatever T was handed in"""
    shape = model(t)
    largest_is(t, roads, shape, largest(*shape[:-1]))


@EXERCISE.requirement(1, "where absorbed always wins, or never")
def always_or_never(t: Trial, roads: Answer) -> None:
    """None where it wins at every T, as with R < D and a long cache; 0 where it loses already at T = 1"""
    H, T = t.pick(3, 5, 8), t.integer(1, 9)
    D = t.pick(64, 96, 128)
    always = (H, D, D // 2, 16, t.integer(1000, 5000), T)
    largest_is(t, roads, always, None)
    never = (H, D, 4 * D, 16, 1, T)
    largest_is(t, roads, never, 0)


@EXERCISE.requirement(1, "a tie", rounds=2)
def tie(t: Trial, roads: Answer) -> None:
    """equal FLOPs are no win: the largest T is the one before"""
    D = t.pick(16, 32, 64)
    shape = (t.pick(3, 5, 8), D, 2 * D, t.pick(8, 16), 2 * D, t.integer(1, 9))
    largest_is(t, roads, shape, largest(*shape[:-1]))
