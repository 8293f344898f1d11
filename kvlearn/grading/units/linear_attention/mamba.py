"""06.6: Mamba's discretisation and its step, held against loops over channels and states in float64."""

import math

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
    id="06.6",
    slug="mamba",
    title="Mamba's discretisation and step",
    answers=("discretise", "mamba_step"),
    hints=(
        "Three things in order: the step size Δ = softplus(dt + dt_bias), (batch, E); the rates A = "
        "−exp(A_log), (E, N), all negative; and then Ā and B̄, (batch, E, N).",
        "Broadcast: Δ gets a dimension at the end, `delta[..., None]`, B one in the middle, `B[:, None]`. "
        "Ā = exp(Δ A) lies between 0 and 1, since Δ is positive and A negative.",
        "softplus(x) = log(1 + exp(x)) overflows for x = 100, where it simply is x. "
        "`torch.nn.functional.softplus` takes care of that, and `torch.logaddexp` would, too.",
        "The step: h ← Ā h + B̄ x, where x (batch, E) is the same for all N states of a channel; then y = "
        "Σ_n C h + D x, read from the *new* h. Write `h = A_bar * h + …`, so that the old h stays.",
    ),
)

Given = tuple[Tensor, Tensor, Tensor, Tensor]  # A_log, dt, dt_bias, B
Step = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # x, A_bar, B_bar, C, D, h
BARS, OUTS = "two tensors, (A_bar, B_bar)", "two tensors, (y, h)"


def sizes(t: Trial) -> tuple[int, int, int]:
    return t.pick(2, 3), t.pick(5, 6, 7), t.pick(4, 8, 9)


def draw(t: Trial, least: float, most: float, A_log: float, *, bias: bool = True) -> Given:
    """Parameters with dt + dt_bias between ``least`` and ``most``, and A_log around a number."""
    batch, E, N = sizes(t)
    raw = least + (most - least) * torch.rand(batch, E, generator=t.generator)
    dt_bias = t.randn(E) if bias else torch.zeros(E)
    return A_log + t.randn(E, N) / 2, raw - dt_bias, dt_bias, t.randn(batch, N)


def bars(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """One number after the other, as Python computes."""
    raw = [[a + b for a, b in zip(row, dt_bias.tolist(), strict=True)] for row in dt.tolist()]
    delta = [[max(x, 0.0) + math.log1p(math.exp(-abs(x))) for x in row] for row in raw]
    sizes = [[math.exp(a) for a in row] for row in A_log.tolist()]
    A_bar = [
        [[math.exp(-d * a) for a in rates] for d, rates in zip(row, sizes, strict=True)] for row in delta
    ]
    B_bar = [[[d * b for b in inputs] for d in row] for row, inputs in zip(delta, B.tolist(), strict=True)]
    return torch.tensor(A_bar, dtype=dt.dtype), torch.tensor(B_bar, dtype=dt.dtype)


def both(t: Trial, discretise: Answer, given: Given, when: str = "") -> None:
    got, want = t.pair(discretise(*given), BARS), bars(*given)
    for one, right, name in zip(got, want, ("A_bar", "B_bar"), strict=True):
        t.close(one, right, f"{when}{name}:")


def draw_step(t: Trial) -> Step:
    batch, E, N = sizes(t)
    A_bar = t.randn(batch, E, N).sigmoid()
    x, B_bar, C, D = t.randn(batch, E), t.randn(batch, E, N), t.randn(batch, N), t.randn(E)
    return x, A_bar, B_bar, C, D, t.randn(batch, E, N)


@EXERCISE.requirement(1, "discretise: what fades")
def fades(t: Trial, discretise: Answer, mamba_step: Answer) -> None:
    """A_bar = exp(Δ A) with A = −exp(A_log), here for steps so long that softplus changes nothing: between 0
    and 1"""
    given = draw(t, 20, 40, -3.5, bias=False)
    A_bar, _ = t.pair(discretise(*given), BARS)
    t.close(A_bar, bars(*given)[0], "A_bar:")


@EXERCISE.requirement(1, "discretise: what is written")
def written(t: Trial, discretise: Answer, mamba_step: Answer) -> None:
    """B_bar = Δ B in the simplified form, whatever A is, again for long steps"""
    given = draw(t, 20, 40, -3.5, bias=False)
    _, B_bar = t.pair(discretise(*given), BARS)
    t.close(B_bar, bars(*given)[1], "B_bar:")


@EXERCISE.requirement(1, "discretise: the step size")
def step_size(t: Trial, discretise: Answer, mamba_step: Answer) -> None:
    """Δ = softplus(dt + dt_bias), in A_bar and B_bar, also where dt + dt_bias is negative"""
    both(t, discretise, draw(t, -3, 2, 0.0))


@EXERCISE.requirement(1, "discretise: steps of any length")
def any_size(t: Trial, discretise: Answer, mamba_step: Answer) -> None:
    """no infinity and no NaN for dt + dt_bias of 100, and for −100, where nothing fades and nothing is
    written"""
    both(t, discretise, draw(t, 95, 130, -4.5), "long steps, ")
    both(t, discretise, draw(t, -130, -95, 0.0), "short steps, ")


@EXERCISE.requirement(1, "mamba_step: the state")
def state(t: Trial, discretise: Answer, mamba_step: Answer) -> None:
    """h = A_bar · h + B_bar · x, for each channel and each of its N states"""
    given = x, A_bar, B_bar, _, _, h = draw_step(t)
    _, new = t.pair(mamba_step(*given), OUTS)
    want = torch.empty_like(h)
    for b, e in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        want[b, e] = A_bar[b, e].double() * h[b, e] + B_bar[b, e].double() * float(x[b, e])
    t.close(new, want, "h:")


@EXERCISE.requirement(1, "mamba_step: the output")
def output(t: Trial, discretise: Answer, mamba_step: Answer) -> None:
    """y = Σ_n C h + D x, read from the state that is returned"""
    given = x, _, _, C, D, h = draw_step(t)
    y, new = t.pair(mamba_step(*given), OUTS)
    if not t.shape(new, tuple(h.shape), "h:"):
        return
    t.note(new, None)  # what was read from, so that another mistake's state is told from it
    want = torch.empty_like(x)
    for b, e in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        want[b, e] = C[b].double() @ new[b, e].double() + float(D[e]) * float(x[b, e])
    t.close(y, want, "y:")


@EXERCISE.requirement(1, "nothing overwritten")
def unchanged(t: Trial, discretise: Answer, mamba_step: Answer) -> None:
    """y (batch, E) and h (batch, E, N) are new tensors; the old state and the parameters stay as they were"""
    given = draw_step(t)
    y, h = t.pair(mamba_step(*given), OUTS)
    t.form(y, tuple(given[0].shape), torch.float32)
    t.form(h, tuple(given[5].shape), torch.float32)
    t.pair(discretise(*draw(t, -3, 2, 0.0)), BARS)
    t.unchanged()
