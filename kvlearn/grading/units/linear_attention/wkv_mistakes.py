"""06.7: the mistakes that people make with the weights of wkv."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvlearn.grading.units.linear_attention.wkv import EXERCISE

__all__ = ["EXERCISE", "by_exponents", "exponents"]


def faded(w: Tensor, u: Tensor, k: Tensor, t: int, steps: Tensor) -> Tensor:
    """Exponents of the tokens up to t, (B, t + 1, C): the past by so many steps, the token's own last."""
    return torch.cat((k[:, :t] - steps[:, None] * w, (u + k[:, t])[:, None]), 1)


def exponents(w: Tensor, u: Tensor, k: Tensor, t: int) -> Tensor:
    """The right ones."""
    return faded(w, u, k, t, torch.arange(t - 1, -1, -1))


def by_exponents(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, give: Callable[[Tensor, Tensor, Tensor, int], Tensor]
) -> Tensor:
    """A stable average with whatever exponents ``give`` gives, all outputs one after the other."""
    outs = []
    for t in range(k.shape[1]):
        weights = give(w, u, k, t).softmax(1)
        outs.append((weights * v[:, : t + 1]).sum(1))
    return torch.stack(outs, 1)


@EXERCISE.misconception("the bonus without effect")
def no_bonus(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weights are those of u = 0. Either u was forgotten, or it was given to the past tokens as well
    (kept in the state): what all weights have in common cancels in the average. The bonus e^u belongs to the
    token's own weight alone, and e^k without it is written to the state."""
    return by_exponents(w, torch.zeros_like(u), k, v, exponents)


@EXERCISE.misconception("the bonus on the past, not on the token")
def bonus_on_past(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The past tokens weigh e^(u + …), the token itself e^k: it is the other way round. The state holds plain
    e^k, which only fades; u lifts the token's own weight for this one output."""
    return by_exponents(w, -u, k, v, exponents)


@EXERCISE.misconception("the bonus multiplied, not in the exponent")
def bonus_factor(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The token's own weight was u e^k. u stands in the exponent, e^(u + k): so it may be any number, and the
    weight stays positive."""
    outs = []
    for t in range(k.shape[1]):
        weights = exponents(w, torch.zeros_like(u), k, t).softmax(1)
        weights[:, -1] *= u
        outs.append((weights * v[:, : t + 1]).sum(1) / weights.sum(1))
    return torch.stack(outs, 1)


@EXERCISE.misconception("the token's own weight without its key")
def bonus_alone(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The token's own weight was e^u, whatever its key. u is added to the key: e^(u + k)."""

    def give(w: Tensor, u: Tensor, k: Tensor, t: int) -> Tensor:
        return torch.cat((exponents(w, u, k, t)[:, :-1], u.expand(len(k), 1, -1)), 1)

    return by_exponents(w, u, k, v, give)


@EXERCISE.misconception("faded twice a step")
def faded_twice(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The past fades by e^(−2w) a step: the decay was put into the running maximum, m − w, and once more into
    the sums. e^(m − w − n) holds it already."""
    return by_exponents(2 * w, u, k, v, exponents)


@EXERCISE.misconception("the decay off by one")
def decay_early(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """e^(−(t−s) w): the token before has faded by one step already. In RWKV-4 it has not, e^(−(t−1−s) w): the
    state is read as it was left, and fades when the next token is written. (So fade first and then add e^k
    v, not both.)"""

    def give(w: Tensor, u: Tensor, k: Tensor, t: int) -> Tensor:
        return faded(w, u, k, t, torch.arange(t, 0, -1))

    return by_exponents(w, u, k, v, give)


@EXERCISE.misconception("written before it is read")
def counted_twice(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The state was brought up to date first, so the token counts twice: once in the state, with e^k, and
    once more with its bonus; and what came before has faded a step too far. Read first, then write."""

    def give(w: Tensor, u: Tensor, k: Tensor, t: int) -> Tensor:
        return faded(w, torch.logaddexp(u, torch.zeros_like(u)), k, t, torch.arange(t, 0, -1))

    return by_exponents(w, u, k, v, give)


@EXERCISE.misconception("the past grows")
def growing(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """e^(+w) a step: the oldest tokens weigh most. w is positive and what fades is multiplied by e^(−w)."""
    return by_exponents(-w, u, k, v, exponents)


@EXERCISE.misconception("no decay")
def no_decay(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """w was not used: every past token weighs e^k for ever. Each step multiplies both sums by e^(−w)."""
    return by_exponents(torch.zeros_like(w), u, k, v, exponents)


@EXERCISE.misconception("w taken for the raw parameter")
def raw_decay(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The decay a step was e^(−e^w), as in RWKV's code, where the parameter is a logarithm. Here w is the
    rate itself, positive already: e^(−w)."""
    return by_exponents(w.exp(), u, k, v, exponents)


@EXERCISE.misconception("w taken for the factor itself")
def factor_decay(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sums were multiplied by w a step, not by e^(−w). w is a rate, and may be above 1."""
    return by_exponents(-w.log(), u, k, v, exponents)


@EXERCISE.misconception("all of the past faded alike")
def one_step_decay(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All past tokens had faded by one step, e^(−w), however old. Each step fades them once more: e^(−(t−1−s)
    w)."""

    def give(w: Tensor, u: Tensor, k: Tensor, t: int) -> Tensor:
        return faded(w, u, k, t, torch.ones(t))

    return by_exponents(w, u, k, v, give)


@EXERCISE.misconception("decay counted from the beginning")
def from_start(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weight of token s was e^(k − s w): the oldest weighs most, and it does not change as time goes on.
    What counts is the distance to the token that reads: t − 1 − s."""

    def give(w: Tensor, u: Tensor, k: Tensor, t: int) -> Tensor:
        return faded(w, u, k, t, torch.arange(t))

    return by_exponents(w, u, k, v, give)


@EXERCISE.misconception("a sum, not an average")
def not_divided(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The numerator alone was returned. wkv divides it by the sum of the same weights."""
    outs = []
    for t in range(k.shape[1]):
        weights = exponents(w, u, k, t).exp()
        outs.append((weights * v[:, : t + 1]).sum(1))
    return torch.stack(outs, 1)


@EXERCISE.misconception("the token missing in the average")
def past_only(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Only the past was averaged (and the first token, which has none, gave zeros). The token itself counts
    with e^(u + k), in the numerator and in the denominator."""
    out = torch.zeros_like(v)
    for t in range(1, k.shape[1]):
        weights = exponents(w, u, k, t)[:, :-1].softmax(1)
        out[:, t] = (weights * v[:, :t]).sum(1)
    return out


@EXERCISE.misconception("every channel with the decay of the first")
def one_decay(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One w was used for all channels. w and u are (C,): each channel fades at a pace of its own."""
    return by_exponents(w[:1].expand_as(w), u, k, v, exponents)


@EXERCISE.misconception("the future seen")
def not_causal(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tokens to come were averaged, too, with |t − 1 − s| steps of decay. A token sees those before it and
    itself."""
    at = torch.arange(k.shape[1])
    distance = (at[:, None] - 1 - at).abs()[..., None]
    powers = k[:, None] - distance * w  # (B, T, T, C): the last T is the past and the future
    powers[:, at, at] = u + k
    return (powers.softmax(2) * v[:, None]).sum(2)
