"""06.6: the mistakes that people make with the step itself."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.grading.units.linear_attention.mamba import EXERCISE
from kvlearn.grading.units.linear_attention.mamba_mistakes import from_delta, right_step

__all__ = ["EXERCISE"]

Outs = tuple[Tensor, Tensor]


def right(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    return from_delta(A_log, F.softplus(dt + dt_bias), B)


def read(h: Tensor, C: Tensor) -> Tensor:
    return (h * C[:, None]).sum(-1)


@EXERCISE.misconception("the old state read", discretise=right)
def reads_old(x: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor, h: Tensor) -> Outs:
    """y was read from h as it came, so the token reaches its own output through D alone. The state is brought
    up to date first: y = C · h with the new h."""
    return read(h, C) + D * x, right_step(x, A_bar, B_bar, C, D, h)[1]


@EXERCISE.misconception("D forgotten", discretise=right)
def no_skip(x: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor, h: Tensor) -> Outs:
    """y = C · h alone. D x is the way round the state: what a channel needs of the very token need not go
    through the memory."""
    y, h = right_step(x, A_bar, B_bar, C, D, h)
    return y - D * x, h


@EXERCISE.misconception("x added, without D", discretise=right)
def plain_skip(x: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor, h: Tensor) -> Outs:
    """y = C · h + x, as if D were 1. It is initialised so, but it is learnt, one number for each channel."""
    y, h = right_step(x, A_bar, B_bar, C, D, h)
    return y - D * x + x, h


@EXERCISE.misconception("D added, not multiplied", discretise=right)
def added_skip(x: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor, h: Tensor) -> Outs:
    """y = C · h + D, a bias. D multiplies the input of its channel: D x."""
    y, h = right_step(x, A_bar, B_bar, C, D, h)
    return y - D * x + D, h


@EXERCISE.misconception("B and C exchanged", discretise=right)
def exchanged(x: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor, h: Tensor) -> Outs:
    """C wrote and B̄ read. B is what an input writes (the key of attention), C what is asked for (the query):
    h = Ā h + B̄ x, y = C · h."""
    h = A_bar * h + C[:, None] * x[..., None]
    return (h * B_bar).sum(-1) + D * x, h


@EXERCISE.misconception("the input faded, too", discretise=right)
def input_fades(x: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor, h: Tensor) -> Outs:
    """h = Ā (h + B̄ x): the new input has lost a step's worth before it was ever read. Ā is for what was
    there before."""
    h = A_bar * (h + B_bar * x[..., None])
    return read(h, C) + D * x, h


@EXERCISE.misconception("the state does not fade", discretise=right)
def no_fading(x: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor, h: Tensor) -> Outs:
    """h = h + B̄ x: everything is added up for ever and Ā is not used. h = Ā h + B̄ x."""
    h = h + B_bar * x[..., None]
    return read(h, C) + D * x, h


@EXERCISE.misconception("a mean of old and new", discretise=right)
def blended(x: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor, h: Tensor) -> Outs:
    """h = Ā h + (1 − Ā) B̄ x, as in a gated unit. How much is written is already in B̄, through Δ."""
    h = A_bar * h + (1 - A_bar) * B_bar * x[..., None]
    return read(h, C) + D * x, h


@EXERCISE.misconception("x written without B_bar", discretise=right)
def no_input_matrix(x: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor, h: Tensor) -> Outs:
    """h = Ā h + x: all N states of a channel took the same. B̄ says into which of them the input goes, and
    how much of it."""
    h = A_bar * h + x[..., None]
    return read(h, C) + D * x, h


@EXERCISE.misconception("a mean over the states", discretise=right)
def averaged(x: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor, h: Tensor) -> Outs:
    """The N products C h were averaged. y is their sum, the dot product of C with the N states of a
    channel."""
    h = A_bar * h + B_bar * x[..., None]
    return (h * C[:, None]).mean(-1) + D * x, h


@EXERCISE.misconception("C forgotten", discretise=right)
def summed(x: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor, h: Tensor) -> Outs:
    """The N states of a channel were added up as they are. C, which the token chooses, says what is read of
    each: y = Σ_n C_n h_n + D x."""
    h = A_bar * h + B_bar * x[..., None]
    return h.sum(-1) + D * x, h


@EXERCISE.misconception("written in place", discretise=right)
def in_place(x: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor, h: Tensor) -> Outs:
    """The numbers are right, but something that was handed in has changed, most likely the state (`mul_`,
    `+=`, `copy_`): whoever keeps it, to go back or to branch, has lost it. Return new tensors."""
    h.mul_(A_bar).add_(B_bar * x[..., None])
    return read(h, C) + D * x, h


@EXERCISE.misconception("the old state returned", discretise=right)
def not_returned(x: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor, h: Tensor) -> Outs:
    """y knows this token, the state returned does not: the next step begins where this one began. Return the
    new h."""
    return right_step(x, A_bar, B_bar, C, D, h)[0], torch.clone(h)
