"""01.7: the mistakes that people make when they merge."""

import torch
from torch import Tensor

from kvlearn.grading.units.full_attention.merge import EXERCISE, Part

__all__ = ["EXERCISE"]


def weigh(a: Part, b: Part, weight_a: Tensor, weight_b: Tensor) -> Tensor:
    return weight_a[..., None] * a[0] + weight_b[..., None] * b[0]


def right_weights(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    return torch.exp(lse_a - base), torch.exp(lse_b - base), lse


@EXERCISE.misconception("no running maximum")
def no_maximum(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
    """exp is taken of the log-sum-exps themselves. On paper that is the formula; in fp32 exp(89) is
    infinite and exp(−104) is 0, so large scores and empty parts give ∞/∞ or 0/0. Subtract the larger one
    first: only differences matter."""
    weight_a, weight_b = lse_a.exp(), lse_b.exp()
    total = weight_a + weight_b
    out = weigh((out_a, lse_a), (out_b, lse_b), weight_a, weight_b) / total[..., None]
    return out, total.log()


@EXERCISE.misconception("no running maximum, beside a guard for empty parts")
def no_maximum_guarded(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
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


@EXERCISE.misconception("the outputs added")
def plain_sum(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
    """The outputs are added as they are. Each is an average over its own keys already; the average over all
    keys lies between the two, with weights exp(lse_a − lse) and exp(lse_b − lse) that add up to 1."""
    return out_a + out_b, right_weights(lse_a, lse_b)[2]


@EXERCISE.misconception("the log-sum-exps added")
def lse_added(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
    """The new lse is lse_a + lse_b. They are logarithms: their sum belongs to the *product* of the two
    denominators, and what is wanted is their sum, `torch.logaddexp(lse_a, lse_b)`."""
    lse = lse_a + lse_b
    return weigh((out_a, lse_a), (out_b, lse_b), torch.exp(lse_a - lse), torch.exp(lse_b - lse)), lse


@EXERCISE.misconception("the weights swapped")
def swapped_weights(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
    """Each part got the other one's weight, so the one with the smaller scores counts most. out_a goes with
    exp(lse_a − lse)."""
    weight_a, weight_b, lse = right_weights(lse_a, lse_b)
    return weigh((out_a, lse_a), (out_b, lse_b), weight_b, weight_a), lse


@EXERCISE.misconception("(lse, out) returned")
def swapped_results(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
    """The two results are there, in the wrong order: merge returns (out, lse), as attention over the keys
    does, so that what it returns can be merged again."""
    weight_a, weight_b, lse = right_weights(lse_a, lse_b)
    return lse, weigh((out_a, lse_a), (out_b, lse_b), weight_a, weight_b)


@EXERCISE.misconception("one maximum for all rows")
def global_maximum(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Part:
    """The largest log-sum-exp of the whole tensor is subtracted everywhere. A row that lies 200 below it
    becomes exp(−200) = 0 and is lost. Every row has a maximum of its own: `torch.maximum(lse_a, lse_b)`."""
    largest = torch.maximum(lse_a.max(), lse_b.max())
    weight_a, weight_b = torch.exp(lse_a - largest), torch.exp(lse_b - largest)
    total = weight_a + weight_b
    out = weigh((out_a, lse_a), (out_b, lse_b), weight_a, weight_b) / total[..., None]
    return out.nan_to_num(), (largest + total.log()).masked_fill(total.isnan(), -torch.inf)
