"""11.7: how many splits, held against trying every number of them with a bare count of what runs when."""

import heapq

from kvlearn.grading.compare import plain_number
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
    id="11.7",
    slug="choose",
    title="Choose the number of splits",
    answers=("choose_splits",),
    hints=(
        "Without splits there is one program for each pair of a sequence and a *KV* head: len(lengths) · "
        "n_kv_heads. With s splits there are s times as many.",
        "The machine runs multiprocessors · resident programs at once. The rest waits: "
        "⌈programs / (multiprocessors · resident)⌉ waves, and a wave that is nearly empty takes as long as a "
        "full one.",
        "A wave takes as long as its longest program: ⌈tiles / s⌉ tiles of the longest row, and one tile's "
        "time on top for starting and merging. `-(-a // b)` rounds a quotient up.",
        "Try every s from 1 to the number of tiles: "
        "`min(range(1, tiles + 1), key=lambda s: waves(s) * (-(-tiles // s) + 1))`. `min` gives the first of "
        "several, and so the fewest splits.",
    ),
)

Case = tuple[list[int], int, int, int, int]


def time_of(splits: int, lengths: list[int], n_kv_heads: int, block: int, machine: int) -> int:
    """Plays the launch: each program takes the first free place of the machine."""
    tiles = max(len(range(0, length, block)) for length in lengths)
    longest = max(len(range(split, tiles, splits)) for split in range(splits)) + 1
    places = [0] * machine
    for _program in range(len(lengths) * n_kv_heads * splits):
        heapq.heappush(places, heapq.heappop(places) + longest)
    return max(places)


def best(lengths: list[int], n_heads: int, n_kv_heads: int, block: int, machine: int) -> int:
    tiles = max(len(range(0, length, block)) for length in lengths)
    times = [time_of(s, lengths, n_kv_heads, block, machine) for s in range(1, tiles + 1)]
    return 1 + times.index(min(times))


def same(t: Trial, choose_splits: Answer, case: Case, multiprocessors: int, resident: int) -> None:
    lengths, n_heads, n_kv_heads, block, _ = case
    got = choose_splits(lengths, n_heads, n_kv_heads, block, multiprocessors, resident)
    want = best(lengths, n_heads, n_kv_heads, block, multiprocessors * resident)
    plain = plain_number(got)
    if isinstance(plain, float) and plain.is_integer():
        got = int(plain)
    t.number(got, want, "splits:")


def case(t: Trial, batch: int, tiles: int, n_kv_heads: int, group: int = 1, spread: bool = False) -> Case:
    """A batch whose longest row has this many tiles."""
    block = t.pick(16, 32, 64)
    longest = tiles * block - t.integer(1, block - 1)
    short = (lambda: t.integer(1, longest // 2)) if spread else (lambda: longest)
    lengths = [longest, *(short() for _ in range(batch - 1))]
    t.random.shuffle(lengths)
    return lengths, n_kv_heads * group, n_kv_heads, block, 0


@EXERCISE.requirement(1, "one long sequence", rounds=4)
def one_long(t: Trial, choose_splits: Answer) -> None:
    """fills a machine with 20 to 60 multiprocessors for one sequence and 1, 2 or 3 KV heads"""
    same(t, choose_splits, case(t, 1, t.integer(50, 150), t.pick(1, 2, 3)), t.integer(20, 60), 1)


@EXERCISE.requirement(1, "a batch that fills the machine", rounds=4)
def full_batch(t: Trial, choose_splits: Answer) -> None:
    """1 where sequences times KV heads are as many as the machine holds, or two or three times as many"""
    n_kv_heads, resident = t.pick(2, 4), t.pick(1, 2)
    batch = t.integer(4, 8)
    multiprocessors = batch * n_kv_heads // resident
    same(
        t,
        choose_splits,
        case(t, batch * t.integer(1, 3), t.integer(6, 20), n_kv_heads),
        multiprocessors,
        resident,
    )


@EXERCISE.requirement(1, "grouped heads and several programs a multiprocessor", rounds=4)
def grouped(t: Trial, choose_splits: Answer) -> None:
    """counts KV heads, not query heads, and what the machine holds at a time"""
    shape = case(t, t.integer(2, 4), t.integer(40, 90), t.pick(2, 3), t.pick(4, 8))
    same(t, choose_splits, shape, t.integer(20, 40), t.pick(2, 3))


@EXERCISE.requirement(1, "short contexts, rows of different length, awkward numbers", rounds=9)
def awkward(t: Trial, choose_splits: Answer) -> None:
    """never more splits than tiles of the longest row; no wave for a handful of programs"""
    tiles = t.integer(2, 3) if t.round == 0 else t.integer(3, 25)
    n_kv_heads = 1 if t.round == 0 else t.pick(1, 3, 5)
    shape = case(t, t.integer(2, 5), tiles, n_kv_heads, t.pick(1, 4), spread=True)
    same(t, choose_splits, shape, t.integer(11, 37), t.pick(1, 2))
