"""The selective scan: a state of N numbers for every channel, each of which fades at a rate of its own.

    h_t = exp(dt_t A) ⊙ h_{t-1} + dt_t B_t x_t        h: (E, N), one row a channel
    y_t = h_t C_t + D ⊙ x_t

The token chooses dt (how far the channel's clock moves on), B (what is written) and C (what is read); A and D
are weights. As every entry of h has a decay of its own, no product of matrices gives all tokens at once, as
it does for a decay that heads share (decay.py): a scan has no parallel form, and is bound by memory.

Letters of this file: E channels, N numbers of the state a channel, L tokens of a segment.
Source: Gu & Dao, "Mamba" (2023), equation 2 and algorithm 2; A is discretised as in its equation 4 (exact),
B by dt B (Euler's step), as in the code published with it.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvlearn import validate
from kvlearn.attention.linear.forms import Outcome, check_state, no_autocast

FORMS = ("recurrent", "chunked")


def selective_scan(
    x: Float[Tensor, "B T E"],
    dt: Float[Tensor, "B T E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    D: Float[Tensor, " E"],
    state: Float[Tensor, "B E N"] | None = None,
    *,
    form: str = "chunked",
    chunk: int = 64,
) -> Outcome:
    """Outputs (B, T, E) and the last state (B, E, N), both in fp32 at least, by one of the forms.

    "recurrent" is the equation, token by token; "chunked" does all but the recurrence itself for ``chunk``
    tokens together. Its memory beside inputs and outputs is 2 · B · chunk · E · N numbers, whatever T is; the
    backward pass takes 3 of these, and T / chunk states. It cannot be differentiated twice. No ``state`` is
    one of zeros. Raises ValueError or TypeError for tensors that do not fit each other, for dt below 0, and
    for A above 0 or infinite.
    """
    validate.one_of("form", form, FORMS)
    validate.positive("chunk", chunk)
    state = _check(x, dt, A, B, C, D, state)
    x, dt, A, B, C, D = (t.to(state.dtype).contiguous() for t in (x, dt, A, B, C, D))
    if form == "recurrent":
        with no_autocast(x.device):
            y, state = recurrent(x, dt, A, B, C, state)
        return torch.addcmul(y, D, x), state
    # Channels last: they are many, and what runs over them is contiguous.
    others = A.mT.contiguous(), B, C, state.mT.contiguous()
    y, state = _Segments.apply(dt * x, dt, *others, chunk, torch.is_grad_enabled())
    return torch.addcmul(y, D, x), state.mT


def recurrent(
    x: Float[Tensor, "B T E"],
    dt: Float[Tensor, "B T E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    state: Float[Tensor, "B E N"],
) -> Outcome:
    """One token after the other: fade, write, read; without D."""
    ys = []
    for t in range(x.shape[1]):
        decay = (dt[:, t, :, None] * A).exp()
        state = decay * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        ys.append((state @ C[:, t, :, None])[..., 0])
    return torch.stack(ys, dim=1), state


def _states(
    written: Float[Tensor, "B L E"],
    dt: Float[Tensor, "B L E"],
    A: Float[Tensor, "N E"],
    B: Float[Tensor, "B L N"],
    before: Float[Tensor, "B N E"],
) -> tuple[Float[Tensor, "B L N E"], Float[Tensor, "B L1 N E"]]:
    """The decays of a segment, and its states: the one before it, then one a token."""
    decay = (dt[:, :, None] * A).exp_()
    h = before.new_empty(len(before), dt.shape[1] + 1, *A.shape)
    h[:, 0] = before
    torch.mul(written[:, :, None], B[..., None], out=h[:, 1:])
    states = h.unbind(1)
    for t, a in enumerate(decay.unbind(1)):
        states[t + 1].addcmul_(a, states[t])  # the only thing done a token: one operator, in place
    return decay, h


class _Segments(torch.autograd.Function):
    """The scan without D, segment by segment, with channels last and dt x given as ``written``.

    Kept for the backward pass are the inputs and the states before each segment; what lies inside a segment
    is computed again there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        written: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor,
        chunk: int,
        keep: bool,
    ) -> Outcome:
        y, borders = torch.empty_like(written), []
        for u, d, b, c, out in zip(*(t.split(chunk, dim=1) for t in (written, dt, B, C, y)), strict=True):
            if keep:
                borders.append(state)
            _, h = _states(u, d, A, b, state)
            torch.matmul(c[:, :, None], h[:, 1:], out=out[:, :, None])
            state = h[:, -1].clone()  # not a view, which would keep all of the segment
        ctx.save_for_backward(written, dt, A, B, C, *borders)
        ctx.chunk = chunk
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        """From the last token to the first, with g_t = C_t ⊗ ∂y_t + exp(dt_{t+1} A) ⊙ g_{t+1} for ∂h_t."""
        written, dt, A, B, C, *borders = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (written, dt, B, C)]
        grad_A = torch.zeros_like(A)
        pieces = zip(
            *(t.split(ctx.chunk, dim=1) for t in (written, dt, B, C, grad_y, *grads)), borders, strict=True
        )
        for u, d, b, c, grad, grad_u, grad_d, grad_b, grad_c, before in reversed(list(pieces)):
            decay, h = _states(u, d, A, b, before)
            g = c[..., None] * grad[:, :, None]
            g[:, -1] += grad_state
            steps, decays = g.unbind(1), decay.unbind(1)
            for t in range(len(steps) - 1, 0, -1):
                steps[t - 1].addcmul_(decays[t], steps[t])
            grad_state = decays[0] * steps[0]
            torch.matmul(b[:, :, None], g, out=grad_u[:, :, None])
            torch.matmul(g, u[..., None], out=grad_b[..., None])
            torch.matmul(h[:, 1:], grad[..., None], out=grad_c[..., None])
            exponent = decay.mul_(h[:, :-1]).mul_(g)  # the gradient of dt A; h and g are free from here on
            torch.sum(torch.mul(exponent, A, out=g), dim=2, out=grad_d)
            grad_A += exponent.mul_(d[:, :, None]).sum(dim=(0, 1))
        grad_u, grad_d, grad_b, grad_c = grads
        return grad_u, grad_d, grad_A, grad_b, grad_c, grad_state, None, None


def _check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None
) -> Float[Tensor, "B E N"]:
    """The door of the scan; the state in the dtype of its sums, zeros for None."""
    validate.tensor("x", x, ("batch", "time", "channels"))
    validate.at_least("x.shape[1] (time)", x.shape[1], 1)
    rows, time, E = x.shape
    N = validate.tensor("A", A, (E, "state"), device=x.device).shape[1]
    validate.tensor("dt", dt, (rows, time, E), device=x.device)
    validate.tensor("B", B, (rows, time, N), device=x.device)
    validate.tensor("C", C, (rows, time, N), device=x.device)
    validate.tensor("D", D, (E,), device=x.device)
    if x.device.type == "cpu":  # elsewhere a look at the values would synchronise
        if not bool((dt >= 0).all()):  # NaN fails too
            raise ValueError(f"dt: expected at least 0, got {float(dt.detach().min())}")
        least, most = (float(bound) for bound in A.detach().aminmax())
        if not (-math.inf < least and most <= 0):
            raise ValueError(f"A: expected finite numbers of at most 0, got {least} to {most}")
    return check_state(state, (rows, E, N), x)
