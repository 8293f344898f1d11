"""Mamba and Mamba-2: state space models whose write, read and decay depend on the token.

    h_t = exp(dt_t A) ⊙ h_{t-1} + dt_t B_t x_t        h: (E, N), one row per channel
    y_t = h_t C_t + D ⊙ x_t

The token determines dt (the size of its step in time), B (the write) and C (the read); A and D are weights.
In Mamba every entry of h has a decay of its own, so no product of matrices gives all tokens at once: the
selective scan has no parallel form, and its speed is bound by memory. In Mamba-2 all numbers of a head share
one decay, and the recurrence is linear attention with C, B and dt x as q, k and v.

Letters beside those of core.py: E channels, N state numbers per channel, P channels per head, L tokens of a
segment.
Sources: Gu & Dao, "Mamba" (2023), equation 2 and algorithm 2; A is discretised as in its equation 4 (exact),
B by dt B (Euler's step), as in the code published with it. Dao & Gu, "Transformers are SSMs" (2024),
sections 6 and 7.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kvlearn import validate
from kvlearn.attention.base import KV, Cache, Mechanism, register
from kvlearn.attention.core import merge_heads, rms_norm_naive, split_heads, upcast
from kvlearn.attention.linear import linear_attention
from kvlearn.attention.recurrent import (
    FORMS,
    ShortConvolution,
    StateCache,
    check_state,
    drawn,
    expand_heads,
    load_state,
    naive_softplus,
    no_autocast,
    state_dtype,
    step_biases,
    store_state,
)

SCAN_FORMS = ("recurrent", "chunked")


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
) -> tuple[Float[Tensor, "B T E"], Float[Tensor, "B E N"]]:
    """Mamba's recurrence in one of the forms: outputs and last state, both in fp32 at least.

    "recurrent" is the equation, token by token; "chunked" does all but the recurrence itself for ``chunk``
    tokens together. Beside inputs and outputs it holds 2 · B · chunk · E · N numbers, whatever T is; the
    backward pass holds 3 of these, and T / chunk states. It cannot be differentiated twice. With ``state``
    None the first state is 0. Raises ValueError or TypeError for tensors that do not fit each other, for dt
    below 0, and for A above 0 or infinite.
    """
    validate.one_of("form", form, SCAN_FORMS)
    chunk = validate.positive("chunk", chunk)
    state = check_scan(x, dt, A, B, C, D, state)
    x, dt, A, B, C, D = (t.to(state.dtype).contiguous() for t in (x, dt, A, B, C, D))
    if form == "recurrent":
        with no_autocast(x.device):
            y, state = scan_recurrent(x, dt, A, B, C, state)
        return torch.addcmul(y, D, x), state
    # Channels last: they are many, and the inner loop over them is contiguous.
    others = A.mT.contiguous(), B, C, state.mT.contiguous()
    with no_autocast(x.device):
        y, state = SegmentedScan.apply(dt * x, dt, *others, chunk, torch.is_grad_enabled())
    return torch.addcmul(y, D, x), state.mT


def scan_recurrent(
    x: Float[Tensor, "B T E"],
    dt: Float[Tensor, "B T E"],
    A: Float[Tensor, "E N"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    state: Float[Tensor, "B E N"],
) -> tuple[Float[Tensor, "B T E"], Float[Tensor, "B E N"]]:
    """One token after the other: decay, write, read; without D."""
    ys = []
    for t in range(x.shape[1]):
        decay = (dt[:, t, :, None] * A).exp()
        state = decay * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        ys.append((state @ C[:, t, :, None])[..., 0])
    return torch.stack(ys, dim=1), state


def segment_states(
    dt_x: Float[Tensor, "B L E"],
    dt: Float[Tensor, "B L E"],
    A: Float[Tensor, "N E"],
    B: Float[Tensor, "B L N"],
    before: Float[Tensor, "B N E"],
) -> tuple[Float[Tensor, "L B N E"], Float[Tensor, "L1 B N E"]]:
    """The decays of a segment, and its states: the one before it, then one per token. Time is in front."""
    dt_x, dt, B = (x.transpose(0, 1) for x in (dt_x, dt, B))
    decay = (dt[:, :, None] * A).exp_()
    h = before.new_empty(len(dt) + 1, *before.shape)
    h[0] = before
    torch.mul(dt_x[:, :, None], B[..., None], out=h[1:])
    states = h.unbind()
    for t, a in enumerate(decay.unbind()):
        states[t + 1].addcmul_(a, states[t])  # all that is done per token: one operator, in place
    return decay, h


class SegmentedScan(torch.autograd.Function):
    """The scan without D, segment by segment, with channels last and with dt x in place of x.

    It keeps for the backward pass the inputs and the states before each segment; the states inside a segment
    are computed again there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        dt_x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor,
        chunk: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        y, starts = torch.empty_like(dt_x), []
        for u, d, b, c, out in zip(*(t.split(chunk, dim=1) for t in (dt_x, dt, B, C, y)), strict=True):
            if keep:
                starts.append(state)
            _, h = segment_states(u, d, A, b, state)
            out.copy_((c.transpose(0, 1)[:, :, None] @ h[1:])[:, :, 0].transpose(0, 1))
            state = h[-1].clone()  # not a view, which would keep all of the segment
        ctx.save_for_backward(dt_x, dt, A, B, C, *starts)
        ctx.chunk = chunk
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        """From the last token to the first, with g_t = C_t ⊗ ∂y_t + exp(dt_{t+1} A) ⊙ g_{t+1} for ∂h_t."""
        dt_x, dt, A, B, C, *starts = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (dt_x, dt, B, C)]
        grad_A = torch.zeros_like(A)
        segments = zip(
            *(t.split(ctx.chunk, dim=1) for t in (dt_x, dt, B, C, grad_y, *grads)), starts, strict=True
        )
        for u, d, b, c, grad, grad_u, grad_d, grad_b, grad_c, before in reversed(list(segments)):
            decay, h = segment_states(u, d, A, b, before)
            u, d, b, c, grad, grad_u, grad_d, grad_b, grad_c = (
                x.transpose(0, 1) for x in (u, d, b, c, grad, grad_u, grad_d, grad_b, grad_c)
            )
            g = torch.mul(c[..., None], grad[:, :, None], out=torch.empty_like(h[1:]))
            g[-1] += grad_state
            steps, decays = g.unbind(), decay.unbind()
            for t in range(len(steps) - 1, 0, -1):
                steps[t - 1].addcmul_(decays[t], steps[t])
            grad_state = decays[0] * steps[0]
            with no_autocast(g.device):
                grad_u.copy_((b[:, :, None] @ g)[:, :, 0])
                grad_b.copy_((g @ u[..., None])[..., 0])
                grad_c.copy_((h[1:] @ grad[..., None])[..., 0])
            exponent = decay.mul_(h[:-1]).mul_(g)  # the gradient of dt A; h and g are free from here on
            grad_d.copy_(torch.mul(exponent, A, out=g).sum(dim=2))
            grad_A += exponent.mul_(d[:, :, None]).sum(dim=(0, 1))
        grad_u, grad_d, grad_b, grad_c = grads
        return grad_u, grad_d, grad_A, grad_b, grad_c, grad_state, None, None


def check_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None
) -> Float[Tensor, "B E N"]:
    """Check the inputs of the scan; returns the state in the dtype of its sums, zeros for None."""
    validate.tensor("x", x, ("batch", "time", "channels"))
    validate.at_least("x.shape[0] (batch)", x.shape[0], 1)
    validate.at_least("x.shape[1] (time)", x.shape[1], 1)
    rows, time, E = x.shape
    N = validate.tensor("A", A, (E, "state"), device=x.device).shape[1]
    validate.tensor("dt", dt, (rows, time, E), device=x.device)
    validate.tensor("B", B, (rows, time, N), device=x.device)
    validate.tensor("C", C, (rows, time, N), device=x.device)
    validate.tensor("D", D, (E,), device=x.device)
    for name, each in (("x", x), ("dt", dt), ("A", A), ("B", B), ("C", C), ("D", D)):
        validate.floating(name, each.dtype)
    if validate.may_read(x):
        if not bool((dt >= 0).all()):  # NaN fails too
            raise ValueError(f"dt: expected at least 0, got {float(dt.detach().min())}")
        least, most = (float(bound) for bound in A.detach().aminmax())
        if not (-math.inf < least and most <= 0):
            raise ValueError(f"A: expected finite numbers of at most 0, got {least} to {most}")
    return check_state(state, (rows, E, N), x)


@register("mamba")
class Mamba(Mechanism):
    """A selective state space model of E = expand · d_model channels, with N = d_state numbers each.

        u, z = x W_in;   u = silu(conv(u))                        (B, T, E) each
        dt', B, C = u W_x;   dt = softplus(dt' W_dt + b_dt)       dt' of ``dt_rank``, B and C of N numbers
        h_t = exp(dt_t A) ⊙ h_{t-1} + dt_t B_t u_t,   A = -exp(A_log) < 0       h: (E, N)
        y_t = h_t C_t + D ⊙ u_t;   out = (y ⊙ silu(z)) W_o

    A model of Mamba has no MLP beside it: ``ModelConfig(d_ff=0, layers=("mamba",))``. There are no heads:
    ``n_heads`` must divide d_model and has no other effect. ``conv`` is the width of the convolution,
    ``dt_rank`` is d_model / 16, rounded up, unless given. By default it has about 6 · d_model² weights. With
    ``norms``, dt', B and C each have an RMSNorm, as in Jamba and Falcon-Mamba.

    Cache: B · E · (N + conv - 1) numbers: 38 · d_model by default.
    Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), algorithm 2
    and sections 3.4 to 3.6; the initial weights are those of the code published with it.
    """

    forms = SCAN_FORMS
    form = "chunked"
    chunk = 64
    no_weight_decay = ("A_log",)

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        expand: int = 2,
        d_state: int = 16,
        conv: int = 4,
        conv_bias: bool = True,
        dt_rank: int | None = None,
        norms: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(d_model, n_heads, None)
        self.d_inner = validate.positive("expand", expand) * self.d_model
        self.d_state = validate.positive("d_state", d_state)
        self.dt_rank = validate.positive("dt_rank", -(-self.d_model // 16) if dt_rank is None else dt_rank)
        self.in_proj = nn.Linear(self.d_model, 2 * self.d_inner, bias=False)
        validate.instance("conv_bias", conv_bias, bool)
        validate.instance("norms", norms, bool)
        self.conv = ShortConvolution(self.d_inner, validate.at_least("conv", conv, 2), bias=conv_bias)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * self.d_state, bias=False)
        sizes = {"dt": self.dt_rank, "B": self.d_state, "C": self.d_state}
        validate.above("norm_eps", norm_eps, 0)
        self.norms = nn.ModuleDict({k: nn.RMSNorm(n, norm_eps) for k, n in sizes.items()}) if norms else None
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, self.d_state))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.o_proj = nn.Linear(self.d_inner, self.d_model, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """A = -1 … -N in every channel, D = 1, and steps dt that begin between 0.001 and 0.1."""
        most = self.dt_rank**-0.5
        self.dt_proj.weight.copy_(drawn((self.d_inner, self.dt_rank), -most, most))
        self.dt_proj.bias.copy_(step_biases(self.d_inner))
        self.A_log.copy_(torch.arange(1, self.d_state + 1, dtype=torch.float64).log())
        nn.init.ones_(self.D)

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, StateCache, source)
        state, form = load_state(self, x, cache)
        u, gate = self.in_proj(x).chunk(2, dim=-1)  # (B, T, E) each
        u, past = self.conv.run(u, state["past"])
        u = F.silu(u)
        dt, B, C = self.x_proj(u).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        if self.norms is not None:
            dt, B, C = self.norms["dt"](dt), self.norms["B"](B), self.norms["C"](C)
        # The bias is added in fp32: near -7 half precision would change the step by percents.
        dt = F.softplus(upcast(F.linear(dt, self.dt_proj.weight)) + upcast(self.dt_proj.bias))  # (B, T, E)
        A = -upcast(self.A_log).exp()
        y, memory = selective_scan(u, dt, A, B, C, self.D, state["memory"], form=form, chunk=self.chunk)
        store_state(cache, {"memory": memory, "past": past}, x.shape[1])
        return self.o_proj((y * F.silu(upcast(gate))).to(x.dtype))

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        E, N, R = self.d_inner, self.d_state, self.dt_rank
        projected = upcast(x) @ upcast(self.in_proj.weight).T
        u, gate = self.conv.naive(projected[..., :E]), projected[..., E:]
        u = u * torch.sigmoid(u)
        mixed = u @ upcast(self.x_proj.weight).T
        dt, B, C = mixed[..., :R], mixed[..., R : R + N], mixed[..., R + N :]
        if self.norms is not None:
            dt, B, C = (
                rms_norm_naive(part, self.norms[name])  # type: ignore[arg-type]
                for part, name in ((dt, "dt"), (B, "B"), (C, "C"))
            )
        dt = naive_softplus(dt @ upcast(self.dt_proj.weight).T + upcast(self.dt_proj.bias))
        A, D = -torch.exp(upcast(self.A_log)), upcast(self.D)
        h, ys = u.new_zeros(len(x), E, N), []
        for t in range(x.shape[1]):
            written = torch.einsum("be, bn -> ben", dt[:, t] * u[:, t], B[:, t])
            h = torch.exp(dt[:, t, :, None] * A) * h + written
            ys.append(torch.einsum("ben, bn -> be", h, C[:, t]) + D * u[:, t])
        y = torch.stack(ys, dim=1) * gate * torch.sigmoid(gate)
        return (y @ upcast(self.o_proj.weight).T).to(x.dtype)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StateCache:
        shapes = {"memory": (self.d_inner, self.d_state), "past": self.conv.past_shape}
        device = self.dtype_and_device(None, device)[1]
        return StateCache(batch, max_len, shapes, state_dtype(self, dtype), device)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · E · (N + conv - 1) · 4 bytes (8 in fp64), whatever ``max_len`` is."""
        validate.positive("max_len", max_len)
        numbers = self.d_inner * (self.d_state + self.conv.kernel_size[0] - 1)
        return self.to_bytes(numbers, batch, state_dtype(self, dtype))

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """All of the state, once. (A step also writes all of it, which no mechanism counts here.)"""
        return self.cache_bytes(validate.positive("length", length), batch=batch, dtype=dtype)

    @classmethod
    def tiny(cls) -> "Mamba":
        return cls(d_model=24, n_heads=3, d_state=4, dt_rank=3)


class GateAndNorm(nn.Module):
    """w ⊙ RMSNorm(y ⊙ silu(gate)), the norm over each of ``n_groups`` parts of y; fp32 at least.

    ``kind`` "norm_gate" is w ⊙ RMSNorm(y) ⊙ silu(gate), "gate" is y ⊙ silu(gate).
    """

    def __init__(self, width: int, n_groups: int, eps: float, kind: str) -> None:
        super().__init__()
        self.kind = validate.one_of("norm", kind, ("gate_norm", "norm_gate", "gate"))
        self.weight = None if kind == "gate" else nn.Parameter(torch.ones(width))
        self.n_groups, self.eps = n_groups, validate.above("norm_eps", eps, 0)

    def forward(self, y: Float[Tensor, "B T E"], gate: Float[Tensor, "B T E"]) -> Float[Tensor, "B T E"]:
        y, gate = upcast(y), F.silu(upcast(gate))
        if self.weight is None:
            return y * gate
        parts = (y * gate if self.kind == "gate_norm" else y).unflatten(-1, (self.n_groups, -1))
        y = F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * upcast(self.weight)
        return y if self.kind == "gate_norm" else y * gate


@register("mamba2")
class Mamba2(Mechanism):
    """A selective state space model with one decay per head: linear attention with C, B, dt x for q, k, v.

        z, (x, B, C), dt' = input W_in;   (x, B, C) = silu(conv(x, B, C));   dt = softplus(dt' + b_dt)
        S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)ᵀ,   A = -exp(A_log) < 0       S: (N, P), one per head
        y_t = S_tᵀ C_t + D x_t;   out = RMSNorm(y ⊙ silu(z)) W_o

    A head has P = head_dim numbers, expand · d_model / n_heads unless given. B and C, of N = d_state numbers,
    are shared by the heads of each of ``n_groups`` groups, as keys and values are in grouped-query attention;
    the norm, too, is over a group. ``norm`` "norm_gate" gates after the norm, "gate" has no norm (Falcon-H1);
    ``dt_limit`` clamps dt to [least, most]. ``conv`` is the width of the convolution. A model of Mamba-2 has
    no MLP beside it: ``ModelConfig(d_ff=0, layers=("mamba2",))``.

    Cache: B · (H · N · P + (conv - 1) · (H · P + 2 · n_groups · N)) numbers; by default, with d_model of 768,
    196 608 and 5376.
    Source: Dao & Gu, "Transformers are SSMs" (2024), sections 6 and 7; the norm, its groups and the initial
    weights are those of the code published with it.
    """

    forms = FORMS
    form = "chunked"
    chunk = 64

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        expand: int = 2,
        d_state: int = 128,
        n_groups: int = 1,
        conv: int = 4,
        conv_bias: bool = True,
        norm: Literal["gate_norm", "norm_gate", "gate"] = "gate_norm",
        norm_eps: float = 1e-5,
        dt_limit: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        if head_dim is None:
            self.head_dim *= validate.positive("expand", expand)
        numbers = [
            n for n in validate.instance("dt_limit", dt_limit, (list, tuple)) if isinstance(n, int | float)
        ]
        if len(numbers) != 2 or len(dt_limit) != 2 or not 0 <= dt_limit[0] < dt_limit[1]:
            raise ValueError(f"dt_limit: expected 0 ≤ least < most, got {dt_limit}")
        self.dt_limit = float(dt_limit[0]), float(dt_limit[1])
        self.d_state = validate.positive("d_state", d_state)
        self.n_groups = validate.divides("n_groups", n_groups, "n_heads", self.n_heads)
        self.d_inner, shared = self.n_heads * self.head_dim, self.n_groups * self.d_state
        self.widths = self.d_inner, shared, shared  # of x, B and C
        self.in_proj = nn.Linear(self.d_model, self.d_inner + sum(self.widths) + self.n_heads, bias=False)
        validate.instance("conv_bias", conv_bias, bool)
        self.conv = ShortConvolution(sum(self.widths), validate.at_least("conv", conv, 2), bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GateAndNorm(self.d_inner, self.n_groups, norm_eps, norm)
        self.o_proj = nn.Linear(self.d_inner, self.d_model, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """A between -16 and -1, D = 1, and steps dt that begin between 0.001 and 0.1."""
        self.dt_bias.copy_(step_biases(self.n_heads))
        self.A_log.copy_(drawn((self.n_heads,), 1.0, 16.0).log())
        nn.init.ones_(self.D)

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, StateCache, source)
        state, form = load_state(self, x, cache)
        gate, mixed, dt = self.in_proj(x).split((self.d_inner, sum(self.widths), self.n_heads), dim=-1)
        mixed, past = self.conv.run(mixed, state["past"])
        heads, B, C = F.silu(mixed).split(self.widths, dim=-1)
        v = upcast(split_heads(heads, self.n_heads))  # (B, H, T, P)
        B, C = (expand_heads(upcast(split_heads(part, self.n_groups)), self.n_heads) for part in (B, C))
        dt = F.softplus(upcast(dt) + upcast(self.dt_bias)).clamp(*self.dt_limit).mT  # (B, H, T)
        log_decay = -upcast(self.A_log).exp()[:, None] * dt
        y, memory = linear_attention(
            C, B, dt[..., None] * v, log_decay, state["memory"], form=form, chunk=self.chunk
        )  # (B, H, T, P)
        store_state(cache, {"memory": memory, "past": past}, x.shape[1])
        y = merge_heads(y + upcast(self.D)[:, None, None] * v)
        return self.o_proj(self.norm(y, gate).to(x.dtype))

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        (b, T), H, E, N = x.shape[:2], self.n_heads, self.d_inner, self.d_state
        projected = upcast(x) @ upcast(self.in_proj.weight).T
        gate, mixed, dt = projected[..., :E], projected[..., E:-H], projected[..., -H:]
        mixed = self.conv.naive(mixed)
        mixed = mixed * torch.sigmoid(mixed)
        v = mixed[..., :E].reshape(b, T, H, -1)
        B, C = mixed[..., E:].reshape(b, T, 2, self.n_groups, N).unbind(2)
        least, most = self.dt_limit
        dt = naive_softplus(dt + upcast(self.dt_bias))
        dt = torch.where(dt < least, least, torch.where(dt > most, most, dt))
        decay, D = torch.exp(-torch.exp(upcast(self.A_log)) * dt), upcast(self.D)
        y = torch.zeros_like(v)
        for h in range(H):
            g, S = h // (H // self.n_groups), v.new_zeros(b, N, v.shape[3])
            for t in range(T):
                written = torch.einsum("bn, b, bp -> bnp", B[:, t, g], dt[:, t, h], v[:, t, h])
                S = decay[:, t, h, None, None] * S + written
                y[:, t, h] = torch.einsum("bnp, bn -> bp", S, C[:, t, g]) + D[h] * v[:, t, h]
        y, gate = y.flatten(2), gate * torch.sigmoid(gate)
        if self.norm.kind != "norm_gate":
            y = y * gate
        if self.norm.weight is not None:
            y = y.reshape(b, T, self.n_groups, -1)
            y = y / torch.sqrt((y**2).mean(-1, keepdim=True) + self.norm.eps)
            y = y.flatten(2) * upcast(self.norm.weight)
        if self.norm.kind == "norm_gate":
            y = y * gate
        return (y @ upcast(self.o_proj.weight).T).to(x.dtype)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StateCache:
        shapes = {"memory": (self.n_heads, self.d_state, self.head_dim), "past": self.conv.past_shape}
        device = self.dtype_and_device(None, device)[1]
        return StateCache(batch, max_len, shapes, state_dtype(self, dtype), device)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · (H · N · P + (conv - 1) · (H · P + 2 · n_groups · N)) · 4 bytes (8 in fp64)."""
        validate.positive("max_len", max_len)
        numbers = self.n_heads * self.d_state * self.head_dim
        numbers += (self.conv.kernel_size[0] - 1) * (
            self.n_heads * self.head_dim + 2 * self.n_groups * self.d_state
        )
        return self.to_bytes(numbers, batch, state_dtype(self, dtype))

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """All of the state, once. (A step also writes all of it, which no mechanism counts here.)"""
        return self.cache_bytes(validate.positive("length", length), batch=batch, dtype=dtype)

    @classmethod
    def tiny(cls) -> "Mamba2":
        return cls(d_model=24, n_heads=4, d_state=6, n_groups=2)
