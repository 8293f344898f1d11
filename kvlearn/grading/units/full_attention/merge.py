"""01.7: merging partial attention by log-sum-exp, held against attention over all keys at once."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

Part = tuple[Tensor, Tensor]

EXERCISE = Exercise(
    id="01.7",
    slug="merge",
    title="Merge two partial results (online softmax)",
    answers=("merge",),
    hints=(
        "out_a was divided by exp(lse_a), the sum of its exponentials. To combine, undo that: each part "
        "weighs exp(lse), and the common divisor is exp(lse_a) + exp(lse_b).",
        "So lse = log(exp(lse_a) + exp(lse_b)), which is `torch.logaddexp(lse_a, lse_b)`, and out = "
        "exp(lse_a − lse)·out_a + exp(lse_b − lse)·out_b. Weights are (B, H, T): add a dimension with "
        "`[..., None]`.",
        "exp(100) overflows in fp32. Take only differences into exp: lse_a − lse is never positive, so "
        "its exponential is at most 1.",
        "With both parts empty, lse − lse is −∞ − (−∞) = NaN. Replace −∞ by any finite number in what "
        "you subtract: `lse.masked_fill(lse == -torch.inf, 0.0)`. exp(−∞ − 0) is 0, as it should be.",
    ),
)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Part:
    """Attention over these keys in double precision, and the log-sum-exp of its scores."""
    scores = q.double() @ k.double().transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.double()).float(), scores.logsumexp(-1).float()


def draw(t: Trial, *n_keys: int) -> tuple[list[Part], Part]:
    """Partial results over these numbers of keys, and the result over all of them together."""
    B, H, T, _, D = t.sizes()
    q, k, v = t.randn(B, H, T, D), t.randn(B, H, sum(n_keys), D), t.randn(B, H, sum(n_keys), D)
    parts = [attend(q, *kv) for kv in zip(k.split(n_keys, dim=2), v.split(n_keys, dim=2), strict=True)]
    return parts, attend(q, k, v)


def same_as(t: Trial, got: object, want: Part, tolerance: float | None = None) -> Part:
    out, lse = t.pair(got, "a pair (out, lse)")
    t.close(out, want[0], "out:", tolerance)
    t.close(lse, want[1], "lse:", tolerance)
    return out, lse


def empty(part: Part) -> Part:
    """What attention over no keys gives, in the shape of ``part``."""
    return torch.zeros_like(part[0]), torch.full_like(part[1], -torch.inf)


@EXERCISE.requirement(2, "two ordinary parts")
def ordinary(t: Trial, merge: Answer) -> None:
    """out (B, H, T, D) and lse (B, H, T) as if all keys had been seen together"""
    (a, b), whole = draw(t, t.integer(2, 9), t.integer(2, 9))
    same_as(t, merge(*a, *b), whole)


@EXERCISE.requirement(1, "large scores")
def large(t: Trial, merge: Answer) -> None:
    """finite and right with log-sum-exps of +200 (exp overflows) and of −200 (every exp is 0)"""
    (a, b), whole = draw(t, t.integer(2, 9), t.integer(2, 9))
    for shift in (200.0, -200.0):
        got = merge(a[0], a[1] + shift, b[0], b[1] + shift)
        same_as(t, got, (whole[0], whole[1] + shift), tolerance=1e-3)


@EXERCISE.requirement(1, "one part empty")
def one_empty(t: Trial, merge: Answer) -> None:
    """an empty part (out 0, lse −∞) contributes nothing, whichever side it stands on"""
    (a,), _ = draw(t, t.integer(2, 9))
    same_as(t, merge(*a, *empty(a)), a)
    same_as(t, merge(*empty(a), *a), a)


@EXERCISE.requirement(1, "both parts empty")
def both_empty(t: Trial, merge: Answer) -> None:
    """out 0 and lse −∞, not NaN, for the rows in which both are empty; the other rows as ever"""
    (a, b), (out, lse) = draw(t, t.integer(2, 9), t.integer(2, 9))
    rows = t.mask(*lse.shape) if lse.shape[2] > 1 else torch.ones(lse.shape, dtype=torch.bool)
    for part_out, part_lse in (a, b, (out, lse)):
        part_out[rows], part_lse[rows] = 0.0, -torch.inf
    same_as(t, merge(*a, *b), (out, lse))


@EXERCISE.requirement(1, "three parts in any order")
def three(t: Trial, merge: Answer) -> None:
    """merging goes on with what merging gave, in whichever order; the inputs stay unchanged"""
    parts, whole = draw(t, t.integer(1, 6), t.integer(2, 9), t.integer(1, 6))
    t.random.shuffle(parts)
    first = t.pair(merge(*parts[0], *parts[1]), "a pair (out, lse)")
    same_as(t, merge(*parts[2], *first), whole)
    t.unchanged()


def weigh(a: Part, b: Part, weight_a: Tensor, weight_b: Tensor) -> Tensor:
    return weight_a[..., None] * a[0] + weight_b[..., None] * b[0]


def right_weights(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    return torch.exp(lse_a - base), torch.exp(lse_b - base), lse


@EXERCISE.misconception("no running maximum")
def no_maximum(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
    """exp is taken of the log-sum-exps themselves. On paper that is the formula; in fp32 exp(89) is
    infinite and exp(−104) is 0, so large scores give ∞/∞ or 0/0. Subtract the larger one first: only
    differences matter."""
    weight_a, weight_b = lse_a.exp(), lse_b.exp()
    total = weight_a + weight_b
    some = torch.where((lse_a == -torch.inf) & (lse_b == -torch.inf), 1.0, total)
    return weigh((out_a, lse_a), (out_b, lse_b), weight_a / some, weight_b / some), total.log()


@EXERCISE.misconception("the plain average")
def average(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
    """Both parts get the weight ½. They have seen different keys: the one whose scores were higher, or
    that saw more keys, must weigh more. That is what the log-sum-exp is kept for."""
    half = torch.full_like(lse_a, 0.5)
    return weigh((out_a, lse_a), (out_b, lse_b), half, half), right_weights(lse_a, lse_b)[2]


@EXERCISE.misconception("weighted by lse, not by exp(lse)")
def by_lse(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
    """The weights are lse_a / (lse_a + lse_b). The log-sum-exp is a logarithm, and may well be negative: the
    parts weigh exp(lse)."""
    total = lse_a + lse_b
    out = weigh((out_a, lse_a), (out_b, lse_b), lse_a / total, lse_b / total)
    return out, right_weights(lse_a, lse_b)[2]


@EXERCISE.misconception("−∞ − (−∞) = NaN")
def nan_when_empty(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
    """Where both parts are empty, the maximum is −∞ too, and −∞ minus −∞ is NaN. It happens as soon as the
    cache is split: short rows of a batch leave whole splits empty. Subtract a finite number there."""
    lse = torch.logaddexp(lse_a, lse_b)
    return weigh((out_a, lse_a), (out_b, lse_b), torch.exp(lse_a - lse), torch.exp(lse_b - lse)), lse


@EXERCISE.misconception("not divided by the new sum")
def not_normalised(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
    """The outputs are rescaled to the common maximum and added, but their weights do not add up to 1.
    Divide by the sum of the two weights: it is the softmax's denominator over all keys."""
    lse = right_weights(lse_a, lse_b)[2]
    largest = torch.maximum(lse_a, lse_b).masked_fill(lse == -torch.inf, 0.0)
    return weigh((out_a, lse_a), (out_b, lse_b), torch.exp(lse_a - largest), torch.exp(lse_b - largest)), lse


@EXERCISE.misconception("the new lse is the larger of the two")
def only_maximum(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
    """The output is right, but the lse returned is the maximum, not log(exp(lse_a) + exp(lse_b)). Two
    parts look fine; with the third the first two weigh too little."""
    weight_a, weight_b, _ = right_weights(lse_a, lse_b)
    return weigh((out_a, lse_a), (out_b, lse_b), weight_a, weight_b), torch.maximum(lse_a, lse_b)


@EXERCISE.misconception("the maximum not added back")
def maximum_lost(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
    """The output is right, but the lse returned is log Σ exp(lse − max): relative to a maximum that nobody
    knows any more. Add the maximum again, or the next merge weighs this part as if its scores were
    about 0."""
    weight_a, weight_b, lse = right_weights(lse_a, lse_b)
    largest = torch.maximum(lse_a, lse_b).masked_fill(lse == -torch.inf, 0.0)
    return weigh((out_a, lse_a), (out_b, lse_b), weight_a, weight_b), lse - largest
