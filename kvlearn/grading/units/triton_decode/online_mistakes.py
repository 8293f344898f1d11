"""11.2: the mistakes that people make with the running softmax, as short PyTorch loops over the tiles."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvlearn.grading.units.triton_decode.kernels import BLOCK, LOG2E
from kvlearn.grading.units.triton_decode.online import EXERCISE

__all__ = ["EXERCISE"]

State = tuple[Tensor, Tensor, Tensor]
Body = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], State]


def walk(
    q: Tensor, k: Tensor, v: Tensor, body: Body, scale: float = LOG2E, start: float = -torch.inf
) -> Tensor:
    """``body(scores, v, m, total, acc)`` on every tile; ``scale`` is on top of 1/√D."""
    m, total, acc = q.new_full(q.shape[:1], start), q.new_zeros(len(q)), torch.zeros_like(q)
    for first in range(0, k.shape[1], BLOCK):
        tile = slice(first, first + BLOCK)
        scores = torch.einsum("bd,bnd->bn", q, k[:, tile]) * (scale * q.shape[1] ** -0.5)
        m, total, acc = body(scores, v[:, tile], m, total, acc)
    return acc / total[:, None]


def weigh(weights: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bn,bnd->bd", weights, v)


def step(scores: Tensor, v: Tensor, m: Tensor, total: Tensor, acc: Tensor) -> State:
    """The right body."""
    new = torch.maximum(m, scores.amax(1))
    weights, old = torch.exp2(scores - new[:, None]), torch.exp2(m - new)
    return new, total * old + weights.sum(1), acc * old[:, None] + weigh(weights, v)


@EXERCISE.misconception("the accumulator is not rescaled")
def accumulator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """When the maximum rises, `total` is brought down to the new one and `acc` is not: the values of earlier
    tiles weigh too much. Whatever was summed up under the old maximum must be multiplied by
    `tl.exp2(m - new)`, numerator and denominator alike."""

    def body(scores: Tensor, v: Tensor, m: Tensor, total: Tensor, acc: Tensor) -> State:
        new, total, right = step(scores, v, m, total, acc)
        return new, total, right + acc * (1 - torch.exp2(m - new))[:, None]

    return walk(q, k, v, body)


@EXERCISE.misconception("the sum is not rescaled")
def denominator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """When the maximum rises, `acc` is brought down to the new one and `total` is not: the output comes out
    too small. Whatever was summed up under the old maximum must be multiplied by `tl.exp2(m - new)`,
    numerator and denominator alike."""

    def body(scores: Tensor, v: Tensor, m: Tensor, total: Tensor, acc: Tensor) -> State:
        new, right, acc = step(scores, v, m, total, acc)
        return new, right + total * (1 - torch.exp2(m - new)), acc

    return walk(q, k, v, body)


@EXERCISE.misconception("nothing is rescaled when the maximum rises")
def nothing_rescaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each tile is counted from the maximum known at the time, and the sums of earlier tiles stay as they
    are. Numbers that are relative to different maxima cannot be added: multiply `total` and `acc` by
    `tl.exp2(m - new)` first."""

    def body(scores: Tensor, v: Tensor, m: Tensor, total: Tensor, acc: Tensor) -> State:
        new = torch.maximum(m, scores.amax(1))
        weights = torch.exp2(scores - new[:, None])
        return new, total + weights.sum(1), acc + weigh(weights, v)

    return walk(q, k, v, body)


@EXERCISE.misconception("exp2 without log₂e")
def base_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp was replaced by exp2 and the scores were left as they are, so every weight is 2^score in place of
    e^score: a softmax at a higher temperature. eˣ = 2^(x · log₂e): multiply the scores by LOG2E once."""
    return walk(q, k, v, step, scale=1.0)


@EXERCISE.misconception("exp together with log₂e")
def both_bases(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scores were multiplied by log₂e, and then `tl.exp` was taken of them: a softmax that is too sharp.
    The factor LOG2E belongs to `tl.exp2`, `tl.exp` needs none."""
    return walk(q, k, v, step, scale=LOG2E**2)


@EXERCISE.misconception("the scale is forgotten")
def no_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The products q·k went into the softmax without 1/√D, so it is too sharp. In a kernel the factor
    `scale * LOG2E` costs nothing: one multiplication serves the scale and the base."""
    return walk(q, k, v, step, scale=LOG2E * q.shape[1] ** 0.5)


@EXERCISE.misconception("the scale is applied twice")
def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scores were divided by √D twice, that is, by D: the softmax is too flat. `scale` is 1/√D
    already."""
    return walk(q, k, v, step, scale=LOG2E * q.shape[1] ** -0.5)


@EXERCISE.misconception("the scale upside down")
def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scores were divided by `scale`, or multiplied by √D. `scale` is 1/√D already: multiply by it."""
    return walk(q, k, v, step, scale=LOG2E * q.shape[1])


@EXERCISE.misconception("the products neither scaled nor brought to base 2")
def raw(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """exp2 was taken of the bare products q·k: 1/√D is missing, and log₂e too. What goes into exp2 is
    `scores * scale * LOG2E`."""
    return walk(q, k, v, step, scale=q.shape[1] ** 0.5)


@EXERCISE.misconception("divided by the sum in every tile")
def normalised_each_tile(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`acc` is divided by `total` inside the loop, and then once more behind it. Until the last tile has been
    seen the denominator is not known: keep `acc` a plain sum, and divide once, behind the loop (which also
    saves a division in every tile)."""

    def body(scores: Tensor, v: Tensor, m: Tensor, total: Tensor, acc: Tensor) -> State:
        new, total, acc = step(scores, v, m, total, acc)
        return new, total, acc / total[:, None]

    return walk(q, k, v, body)


@EXERCISE.misconception("the maximum is never below 0")
def from_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The running maximum starts at 0, so a row whose scores all lie far below 0 has nothing but
    exp2(−700) = 0, and 0 / 0 is NaN. A maximum starts at −∞, the largest number of none."""
    return walk(q, k, v, step, start=0.0)


@EXERCISE.misconception("NaN from the first tile on")
def old_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Before the first tile m is −∞, and there are several ways from there to NaN. Weights from the *old*
    maximum, exp2(scores − m), are infinite. The factor upside down, exp2(new − m), is infinite, and ∞ ·
    0 is NaN. And if the tile's own maximum does not enter, `new` is still −∞. Weights are exp2(scores −
    new), the factor is exp2(m − new), new is finite: nothing is ever above 1."""

    def body(scores: Tensor, v: Tensor, m: Tensor, total: Tensor, acc: Tensor) -> State:
        new = torch.maximum(m, scores.amax(1))
        weights, old = torch.exp2(scores - m[:, None]), torch.exp2(m - new)
        return new, total * old + weights.sum(1), acc * old[:, None] + weigh(weights, v)

    return walk(q, k, v, body)


@EXERCISE.misconception("no maximum at all")
def no_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weights are exp of the scores themselves. On paper that is the formula; in fp32 exp(89) is infinite
    and exp(−104) is 0, so that large scores give ∞/∞ and low ones 0/0. Subtract the running maximum."""

    def body(scores: Tensor, v: Tensor, m: Tensor, total: Tensor, acc: Tensor) -> State:
        weights = torch.exp2(scores)
        return m, total + weights.sum(1), acc + weigh(weights, v)

    return walk(q, k, v, body)


@EXERCISE.misconception("this tile's maximum in place of the running one")
def falling_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`new` is the maximum of this tile alone, and falls where the scores fall. Then exp2(m − new) is
    larger than 1, and overflows where the fall is deep. The running maximum is `tl.maximum(m,
    tl.max(scores, axis=0))` and never falls."""

    def body(scores: Tensor, v: Tensor, m: Tensor, total: Tensor, acc: Tensor) -> State:
        new = scores.amax(1)
        weights, old = torch.exp2(scores - new[:, None]), torch.exp2(m - new)
        return new, total * old + weights.sum(1), acc * old[:, None] + weigh(weights, v)

    return walk(q, k, v, body)


@EXERCISE.misconception("rescaled after adding")
def rescaled_late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The factor exp2(m − new) was applied to the sums after this tile's share had been added, so it shrinks
    that share too (in the first tile: to 0). Only what was there before stands under the old maximum."""

    def body(scores: Tensor, v: Tensor, m: Tensor, total: Tensor, acc: Tensor) -> State:
        new = torch.maximum(m, scores.amax(1))
        weights, old = torch.exp2(scores - new[:, None]), torch.exp2(m - new)
        return new, (total + weights.sum(1)) * old, (acc + weigh(weights, v)) * old[:, None]

    return walk(q, k, v, body)


@EXERCISE.misconception("only the last tile counts")
def last_tile(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Only the last 16 keys are left. Either `acc` and `total` are set in each tile and not added to, or `m`
    keeps its −∞ (the line `m = new` is missing), so that the factor exp2(m − new) is always 0."""
    return walk(q, k[:, -BLOCK:], v[:, -BLOCK:], step)


@EXERCISE.misconception("the unweighted mean of the values")
def mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every key has the same weight: the scores do not enter, or cancel out. Each value is weighted by
    exp2(score − new) of its own key, `weights[:, None] * v`."""
    return v.mean(1)
