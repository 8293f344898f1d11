"""06.6: the mistakes that people make when they discretise as Mamba does."""

import torch.nn.functional as F
from torch import Tensor

from kvlearn.grading.units.linear_attention.mamba import EXERCISE

__all__ = ["EXERCISE"]

Outs = tuple[Tensor, Tensor]


def rates(A_log: Tensor) -> Tensor:
    return -A_log.exp()


def step_of(dt: Tensor, dt_bias: Tensor) -> Tensor:
    return F.softplus(dt + dt_bias)


def from_delta(A_log: Tensor, delta: Tensor, B: Tensor) -> Outs:
    """The right discretisation for a step size (batch, E)."""
    delta = delta[..., None]
    return (delta * rates(A_log)).exp(), delta * B[:, None]


def right_step(x: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor, h: Tensor) -> Outs:
    h = A_bar * h + B_bar * x[..., None]
    return (h * C[:, None]).sum(-1) + D * x, h


@EXERCISE.misconception("the sign of A lost", mamba_step=right_step)
def grows(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """A = exp(A_log) without the minus: Ā = exp(Δ A) is above 1 and the state grows without end. A_log is the
    logarithm of the *size* of A; the rate itself is −exp(A_log), which makes every state fade."""
    delta = step_of(dt, dt_bias)[..., None]
    return (delta * A_log.exp()).exp(), delta * B[:, None]


@EXERCISE.misconception("A_log taken for A", mamba_step=right_step)
def log_as_rate(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """Ā = exp(Δ A_log): where A_log is positive the state explodes. The parameter is stored as a logarithm so
    that A = −exp(A_log) stays negative whatever training does to it."""
    delta = step_of(dt, dt_bias)[..., None]
    return (delta * A_log).exp(), delta * B[:, None]


@EXERCISE.misconception("A_log taken for A, with a minus before it", mamba_step=right_step)
def minus_log(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """A = −A_log, without the exponential. A_log may be negative, and then this A is positive and the state
    grows. A = −exp(A_log)."""
    delta = step_of(dt, dt_bias)[..., None]
    return (-delta * A_log).exp(), delta * B[:, None]


@EXERCISE.misconception("Δ A not exponentiated", mamba_step=right_step)
def not_exponentiated(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """Ā = Δ A, a negative number: the state would change its sign at every step. The solution of h' = A h
    after a time Δ is exp(Δ A) h."""
    delta = step_of(dt, dt_bias)[..., None]
    return delta * rates(A_log), delta * B[:, None]


@EXERCISE.misconception("Euler's form for A, too", mamba_step=right_step)
def euler(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """Ā = 1 + Δ A is the Euler form, good for small steps; for long ones it is negative and even below −1.
    Mamba simplifies B̄ only; Ā is the exact exp(Δ A)."""
    delta = step_of(dt, dt_bias)[..., None]
    return 1 + delta * rates(A_log), delta * B[:, None]


@EXERCISE.misconception("the bilinear form", mamba_step=right_step)
def bilinear(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """(1 + ΔA/2) / (1 − ΔA/2) for Ā, and ΔB / (1 − ΔA/2) for B̄: the bilinear rule, which S4 uses. For a long
    step it goes to −1, where exp(Δ A) goes to 0. Mamba takes exp(Δ A) and Δ B."""
    delta = step_of(dt, dt_bias)[..., None]
    half = delta * rates(A_log) / 2
    return (1 + half) / (1 - half), delta * B[:, None] / (1 - half)


@EXERCISE.misconception("exp(Δ) times A", mamba_step=right_step)
def exp_times(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """Ā = exp(Δ) · A. The exponential is taken of the product: exp(Δ A)."""
    delta = step_of(dt, dt_bias)[..., None]
    return delta.exp() * rates(A_log), delta * B[:, None]


@EXERCISE.misconception("Δ missing in A_bar", mamba_step=right_step)
def a_without_delta(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """Ā = exp(A), the same for every token. Δ is how long the token makes the state fade: exp(Δ A). Without
    it nothing is selected."""
    delta = step_of(dt, dt_bias)[..., None]
    return rates(A_log).exp().expand(*dt.shape, -1), delta * B[:, None]


@EXERCISE.misconception("Δ missing in B_bar", mamba_step=right_step)
def b_without_delta(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """B̄ = B: a token with a step of almost 0, which should leave the state alone, writes as much as any
    other. B̄ = Δ B; the same Δ says how much is forgotten and how much is written."""
    A_bar, _ = from_delta(A_log, step_of(dt, dt_bias), B)
    return A_bar, B[:, None].expand_as(A_bar)


@EXERCISE.misconception("the exact form for B", mamba_step=right_step)
def zero_order_hold(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """B̄ = (exp(Δ A) − 1) / A · B is the exact zero-order hold, as Mamba's paper writes it (equation 4). Its
    code uses the first term of the series, Δ B, since little is lost by it, and that was asked for. For
    small Δ A the two agree; for long steps Δ B is the larger."""
    A_bar, _ = from_delta(A_log, step_of(dt, dt_bias), B)
    return A_bar, (A_bar - 1) / rates(A_log) * B[:, None]


@EXERCISE.misconception("B times what is forgotten", mamba_step=right_step)
def complement(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """B̄ = (1 − Ā) B, as a gated unit has it: what is forgotten makes room for what is written. In Mamba the
    share written is Δ itself, B̄ = Δ B, whatever A is."""
    A_bar, _ = from_delta(A_log, step_of(dt, dt_bias), B)
    return A_bar, (1 - A_bar) * B[:, None]


@EXERCISE.misconception("B faded, too", mamba_step=right_step)
def b_faded(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """B̄ = Δ exp(Δ A) B: the new input has faded before it is written. It comes with this token; only the old
    state fades. B̄ = Δ B."""
    A_bar, B_bar = from_delta(A_log, step_of(dt, dt_bias), B)
    return A_bar, A_bar * B_bar


@EXERCISE.misconception("softplus missing", mamba_step=right_step)
def no_softplus(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """Δ = dt + dt_bias as it stands, which may be negative: then Ā is above 1 and the state grows. softplus
    makes every step positive."""
    return from_delta(A_log, dt + dt_bias, B)


@EXERCISE.misconception("ReLU for softplus", mamba_step=right_step)
def relu(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """Negative dt + dt_bias were cut off at 0: such a token does nothing at all and gets no gradient.
    softplus, log(1 + exp(x)), is positive everywhere."""
    return from_delta(A_log, (dt + dt_bias).relu(), B)


@EXERCISE.misconception("exp for softplus", mamba_step=right_step)
def exp_step(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """Δ = exp(dt + dt_bias). For very negative numbers softplus is nearly that, but for positive ones it goes
    on like x itself: log(1 + exp(x))."""
    return from_delta(A_log, (dt + dt_bias).exp(), B)


@EXERCISE.misconception("softplus overflows", mamba_step=right_step)
def overflows(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """log(1 + exp(x)) was written out: from x = 89 on exp(x) is infinite in fp32, and so is Δ. For such x
    softplus(x) is x; F.softplus and logaddexp know that."""
    return from_delta(A_log, (1 + (dt + dt_bias).exp()).log(), B)


@EXERCISE.misconception("dt_bias forgotten", mamba_step=right_step)
def no_bias(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """Δ = softplus(dt), without dt_bias. The bias is where a channel's own pace is: it is initialised so that
    softplus(dt_bias) lies between 0.001 and 0.1."""
    return from_delta(A_log, F.softplus(dt), B)


@EXERCISE.misconception("dt_bias added after the softplus", mamba_step=right_step)
def bias_after(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """Δ = softplus(dt) + dt_bias may be negative. The bias belongs inside: softplus(dt + dt_bias)."""
    return from_delta(A_log, F.softplus(dt) + dt_bias, B)


@EXERCISE.misconception("one step size for all channels", mamba_step=right_step)
def one_delta(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """Δ was averaged over the channels. In Mamba every channel has a step size of its own, (batch, E). (One
    for a whole head is Mamba-2, and there A is one number a head, too.)"""
    delta = step_of(dt, dt_bias)
    return from_delta(A_log, delta.mean(-1, keepdim=True).expand_as(delta), B)


@EXERCISE.misconception("the two the wrong way round", mamba_step=right_step)
def exchanged(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """B_bar was returned first. Return what fades the state, then what writes: (A_bar, B_bar)."""
    A_bar, B_bar = from_delta(A_log, step_of(dt, dt_bias), B)
    return B_bar, A_bar


@EXERCISE.misconception("one rate for all states of a channel", mamba_step=right_step)
def mean_rate(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> Outs:
    """All N states of a channel were given one rate, the mean of A over N. Each has its own: slow ones
    remember long, fast ones follow the input."""
    delta = step_of(dt, dt_bias)[..., None]
    A = rates(A_log).mean(-1, keepdim=True).expand_as(A_log)
    return (delta * A).exp(), delta * B[:, None]
