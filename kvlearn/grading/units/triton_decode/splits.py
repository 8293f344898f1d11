"""11.5: the context cut into splits and merged again, held against attention over all keys at once."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial
from kvlearn.grading.units.triton_decode.kernels import BLOCK, READY_MADE, attend_rows, run

EXERCISE = Exercise(
    id="11.5",
    slug="splits",
    title="Split the context, merge the parts",
    answers=("split_attention",),
    forbidden={**READY_MADE, torch.logsumexp: "torch.logsumexp"},
    hints=(
        "Count in tiles: `tiles = tl.cdiv(length, BLOCK)`, and each split gets `tl.cdiv(tiles, n_splits)` of "
        "them. Rounded down, the last keys would belong to nobody.",
        "`lo = split * each * BLOCK`, and `hi = tl.minimum(lo + each * BLOCK, length)`. A split behind the "
        "end has lo ≥ hi: its loop never runs, and it stores 0 and −∞. That is as it should be.",
        "The merge: subtract the largest lse of all parts, take exp2, and divide by the sum: "
        "`weights = tl.exp2(lse - top)`, and out is the sum of weights · parts over the sum of weights.",
        "In a row of length 0 every lse is −∞, and so is their maximum: −∞ − (−∞) is NaN. Subtract 0 there,"
        " and divide by 1 where the sum of weights is 0.",
    ),
)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, int]


def draw(t: Trial, lengths: list[int], n_splits: int) -> Inputs:
    """Room for 96 keys a row: as many tiles as 2, 3 or 6 splits can share."""
    B, D, S = len(lengths), t.pick(8, 32), 96
    rows = torch.tensor(lengths, dtype=torch.int32)
    return 2 * t.randn(B, D), t.randn(B, S, D), t.randn(B, S, D), rows, n_splits


def same(t: Trial, split_attention: Answer, inputs: Inputs, tolerance: float | None = None) -> None:
    out, _ = t.pair(run(split_attention, *inputs, own=("merge_parts",)), "a pair (out, lse of the parts)")
    t.close(out, attend_rows(*inputs[:4]), "out:", tolerance)


@EXERCISE.requirement(1, "splits of whole tiles", rounds=2)
def even(t: Trial, split_attention: Answer) -> None:
    """attention over all keys, (B, D), from 2 splits or 3 of whole tiles"""
    n_splits = t.pick(2, 3)
    same(t, split_attention, draw(t, [n_splits * BLOCK, n_splits * BLOCK], n_splits))


@EXERCISE.requirement(1, "any length, any number of splits", rounds=2)
def ragged(t: Trial, split_attention: Answer) -> None:
    """the same for lengths that fill neither tiles nor splits, and for a single split; inputs unchanged"""
    n_splits = 1 if t.round == 1 else t.pick(2, 3)
    same(t, split_attention, draw(t, [t.integer(18, 30), t.integer(34, 46)], n_splits))
    t.unchanged()


@EXERCISE.requirement(1, "a short row beside a long one", rounds=1)
def empty_splits(t: Trial, split_attention: Answer) -> None:
    """a split without keys, and there are some where a row has fewer tiles than splits, contributes
    nothing"""
    same(t, split_attention, draw(t, [t.integer(1, 15), t.integer(34, 46)], t.pick(3, 5)))


@EXERCISE.requirement(1, "length 0", rounds=1)
def empty_row(t: Trial, split_attention: Answer) -> None:
    """0, not NaN, for a row whose splits are all empty"""
    same(t, split_attention, draw(t, [0, t.integer(18, 30)], 3))


@EXERCISE.requirement(1, "large scores", rounds=1)
def large(t: Trial, split_attention: Answer) -> None:
    """finite and right when the scores, and with them the lse, reach ±1000"""
    q, k, v, lengths, n_splits = draw(t, [20, 40], 3)
    k = k + 200.0 * torch.tensor([1.0, -1.0])[:, None, None] * q[:, None] / q.norm(dim=-1)[:, None, None]
    same(t, split_attention, (q, k, v, lengths, n_splits), 1e-2)


@EXERCISE.requirement(1, "the work is shared", rounds=2)
def shared(t: Trial, split_attention: Answer) -> None:
    """the fullest split of a row has ⌈tiles / splits⌉ tiles, tiles counted from the row's length; with q = 0
    every key adds 1 to a part's 2^lse, so the parts tell how many keys they saw"""
    n_splits = t.pick(2, 3)
    q, k, v, lengths, n_splits = draw(t, [t.integer(20, 31), t.integer(50, 62)], n_splits)
    got = run(split_attention, torch.zeros_like(q), k, v, lengths, n_splits, own=("merge_parts",))
    _, lse = t.pair(got, "a pair (out, lse)")
    if not t.shape(lse, (len(q), n_splits), "lse of the parts:"):
        return
    seen = torch.exp2(lse.double()).round().long()
    for b, length in enumerate(lengths.tolist()):
        tiles = (length + BLOCK - 1) // BLOCK
        most = (tiles + n_splits - 1) // n_splits * BLOCK
        counts = seen[b].tolist()
        last = max((i for i, n in enumerate(counts) if n), default=0)
        whole = all(n % BLOCK == 0 for n in counts[:last])
        good = sum(counts) == length and max(counts) <= min(most, length) and whole
        what = f"{length} keys over {n_splits} splits, at most {most} in one, in whole tiles but the last"
        t.true(good, what, f"splits with {', '.join(map(str, counts))} keys")
