"""11.3: a kernel's last tile, where keys end and other memory begins; held against attention row by row."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial
from kvlearn.grading.units.triton_decode.kernels import BLOCK, NAN, READY_MADE, attend_rows, run

EXERCISE = Exercise(
    id="11.3",
    slug="tail",
    title="Masks at the tail",
    answers=("ragged_attention",),
    forbidden=READY_MADE,
    hints=(
        "One boolean for each key of the tile says all there is to say: `live = n < length`. The keys are "
        "numbered from 0, so the last live one is length − 1.",
        "`tl.load(pointers, mask=live[:, None], other=0.0)` does not touch what is masked and gives 0 there. "
        "K and V both need it: a weight of 0 does not make a NaN in V harmless, 0 · NaN is NaN.",
        "A masked key has the score 0 after that, and exp2(0 − m) is a weight. Set it to −∞: "
        '`tl.where(live, scores, float("-inf"))`, before the maximum is taken.',
        "A row of length 0 never enters the loop, and its `total` is 0. Divide by 1 there: "
        "`acc / tl.where(total == 0, 1.0, total)` gives 0.",
    ),
)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(t: Trial, lengths: list[int], capacity: int, behind: float | None = None) -> Inputs:
    """q (B, D), k and v (B, S, D) with room for ``capacity`` keys; ``behind`` fills what lies behind the
    lengths."""
    B, D = len(lengths), t.pick(8, 32)
    k, v = t.randn(B, capacity, D), t.randn(B, capacity, D)
    for b, length in enumerate(lengths):
        if behind is not None:
            k[b, length:] = v[b, length:] = behind
    return 2 * t.randn(B, D), k, v, torch.tensor(lengths, dtype=torch.int32)


def same(t: Trial, ragged_attention: Answer, inputs: Inputs) -> None:
    t.close(run(ragged_attention, *inputs, own=("attend_keys", "load_tile")), attend_rows(*inputs))


@EXERCISE.requirement(1, "lengths that fill their tiles", rounds=2)
def whole_tiles(t: Trial, ragged_attention: Answer) -> None:
    """attention of each row to its own 16, 32 or 48 keys, (B, D)"""
    same(t, ragged_attention, draw(t, t.pick([16, 48], [32, 16]), 3 * BLOCK))


@EXERCISE.requirement(1, "lengths that do not", rounds=2)
def partial_tiles(t: Trial, ragged_attention: Answer) -> None:
    """the same for any length; what lies behind a row's keys has no weight; inputs unchanged"""
    lengths = [t.integer(2, 14), t.integer(BLOCK + 2, 2 * BLOCK - 2)]
    same(t, ragged_attention, draw(t, lengths, 3 * BLOCK))
    t.unchanged()


@EXERCISE.requirement(1, "NaN behind the keys", rounds=2)
def poisoned(t: Trial, ragged_attention: Answer) -> None:
    """memory behind the lengths may hold anything, NaN too, and none of it reaches the result"""
    same(t, ragged_attention, draw(t, [t.integer(2, 14), 2 * BLOCK], 2 * BLOCK, NAN))


@EXERCISE.requirement(1, "one key, and one key more than a tile", rounds=1)
def edges(t: Trial, ragged_attention: Answer) -> None:
    """right for the lengths 1, 15, 17 and 31"""
    same(t, ragged_attention, draw(t, t.pick([1, 17, 31], [15, 1, 17]), 2 * BLOCK, t.pick(1e4, -1e4)))


@EXERCISE.requirement(1, "length 0", rounds=1)
def empty(t: Trial, ragged_attention: Answer) -> None:
    """0 for a row without keys, and the others as ever"""
    same(t, ragged_attention, draw(t, t.pick([0, 16, 5], [20, 0, 16]), 2 * BLOCK))


@EXERCISE.requirement(1, "a cache that ends inside a tile", rounds=2)
def short_cache(t: Trial, ragged_attention: Answer) -> None:
    """room for 20 to 30 keys in a row, all of them live: nothing is read behind the end of K and V"""
    capacity = t.integer(20, 30)
    same(t, ragged_attention, draw(t, [capacity, capacity], capacity))
