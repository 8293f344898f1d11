"""11.2: online softmax in a kernel, held against the softmax of all scores at once."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial
from kvlearn.grading.units.triton_decode.kernels import BLOCK, READY_MADE, attend_rows, run

EXERCISE = Exercise(
    id="11.2",
    slug="online",
    title="Online softmax in a kernel",
    answers=("online_attention",),
    forbidden=READY_MADE,
    hints=(
        "Bring the scores to base 2 first: `scores * scale * LOG2E`. Then `tl.exp2` takes the place of exp "
        "everywhere, and the result is the same softmax.",
        "The new maximum is `tl.maximum(m, tl.max(scores, axis=0))`, and the tile's weights are "
        "`tl.exp2(scores - new)`: every exponent is at most 0, so nothing overflows.",
        "`total` and `acc` were counted from the old maximum. Multiply both by `tl.exp2(m - new)` before you "
        "add the tile's share. In the first tile m is −∞, and that factor is 0.",
        "The tile's share of `acc` is `tl.sum(weights[:, None] * v, axis=0)`, its share of `total` is "
        "`tl.sum(weights, axis=0)`. Last of all, `m = new`. Nothing is divided inside the loop.",
    ),
)

QKV = tuple[Tensor, Tensor, Tensor]


def draw(t: Trial, n_tiles: int) -> QKV:
    B, D, S = t.pick(2, 3), t.pick(8, 16), n_tiles * BLOCK
    return t.randn(B, D), t.randn(B, S, D), t.randn(B, S, D)


def aligned(t: Trial, scores: Tensor) -> QKV:
    """Keys that give these scores (B, S), but for a little noise."""
    B, S = scores.shape
    q, _, _ = draw(t, 1)
    q = q[:1].expand(B, -1).contiguous()
    D = q.shape[1]
    k = scores[..., None] * q[:, None] / q.square().sum(-1)[:, None, None] * D**0.5
    return q, k + 0.01 * t.randn(B, S, D), t.randn(B, S, D)


def same(t: Trial, online_attention: Answer, inputs: QKV, tolerance: float | None = None) -> None:
    got = run(online_attention, *inputs, own=("online", "online_rows"))
    t.close(got, attend_rows(*inputs), tolerance=tolerance)


@EXERCISE.requirement(1, "one tile", rounds=2)
def one_tile(t: Trial, online_attention: Answer) -> None:
    """softmax(q kᵀ / √D) v, (B, D), over 16 keys"""
    same(t, online_attention, draw(t, 1))


@EXERCISE.requirement(2, "several tiles", rounds=2)
def several_tiles(t: Trial, online_attention: Answer) -> None:
    """the same over 32 to 64 keys; q, k and v unchanged"""
    same(t, online_attention, draw(t, t.integer(2, 4)))
    t.unchanged()


@EXERCISE.requirement(1, "a maximum that rises, and one that falls", rounds=2)
def moving_maximum(t: Trial, online_attention: Answer) -> None:
    """right where the largest score stands in the last tile, and where it stands in the first"""
    slope = torch.arange(3).repeat_interleave(BLOCK) * t.pick(2.0, 3.0)
    same(t, online_attention, aligned(t, torch.stack([slope, -slope]) + t.randn(2, len(slope))), 1e-3)


@EXERCISE.requirement(1, "scores up to ±1000", rounds=2)
def large(t: Trial, online_attention: Answer) -> None:
    """finite and right where exp of a score would overflow, in whichever tile it stands"""
    hills = torch.arange(3).repeat_interleave(BLOCK) * 400.0
    scores = torch.stack([hills - 100, 900 - hills]) + 2 * t.randn(2, len(hills))
    same(t, online_attention, aligned(t, scores), 1e-2)


@EXERCISE.requirement(1, "all scores far below 0", rounds=2)
def low(t: Trial, online_attention: Answer) -> None:
    """right where all scores of a row are near −500: their largest is what counts, not 0"""
    scores = t.randn(2, 2 * BLOCK) - 500
    same(t, online_attention, aligned(t, scores), 1e-2)
