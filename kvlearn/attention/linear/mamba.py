"""Mamba: a selective scan between a short convolution and a gate, which is a whole layer by itself."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import register
from kvlearn.attention.core import upcast
from kvlearn.attention.linear.scan import FORMS, selective_scan
from kvlearn.attention.linear.short_conv import ShortConvolution
from kvlearn.attention.linear.state import State, StateMechanism
from kvlearn.attention.linear.step_size import step_biases


@register("mamba")
class Mamba(StateMechanism):
    """A selective state space model of E = expand · d_model channels, with N = d_state numbers each.

        u, z = x W_in;   u = silu(conv(u))                        (B, T, E) each
        dt', B, C = u W_x;   dt = softplus(dt' W_dt + b_dt)       dt' of ``dt_rank``, B and C of N numbers
        h_t = exp(dt_t A) ⊙ h_{t-1} + dt_t B_t u_t,   A = -exp(A_log) < 0       h: (E, N)
        y_t = h_t C_t + D ⊙ u_t;   out = (y ⊙ silu(z)) W_o

    A model of Mamba has no other layers: ``ModelConfig(d_ff=0, layers=("mamba",))``. There are no heads:
    ``n_heads`` must divide d_model and means nothing else. ``conv`` is the width of the convolution,
    ``dt_rank`` is d_model / 16, rounded up, unless given. By default it has about 6 · d_model² weights.

    Cache: B · E · (N + conv - 1) numbers: 38 · d_model by default.
    Source: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), algorithm 2
    and sections 3.4 to 3.6; the initial weights are those of the code published with it.
    """

    forms = FORMS
    undecayed = ("A_log",)

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
    ) -> None:
        super().__init__(d_model, n_heads, None)
        self.d_inner = validate.positive("expand", expand) * self.d_model
        self.d_state = validate.positive("d_state", d_state)
        self.dt_rank = validate.positive("dt_rank", -(-self.d_model // 16) if dt_rank is None else dt_rank)
        self.in_proj = nn.Linear(self.d_model, 2 * self.d_inner, bias=False)
        self.conv = ShortConvolution(self.d_inner, validate.at_least("conv", conv, 2), bias=conv_bias)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * self.d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, self.d_state))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.o_proj = nn.Linear(self.d_inner, self.d_model, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """A = -1 … -N in every channel, D = 1, and steps dt that begin between 0.001 and 0.1."""
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        self.dt_proj.bias.copy_(step_biases(self.d_inner))
        self.A_log.copy_(torch.arange(1, self.d_state + 1).log())
        nn.init.ones_(self.D)

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"memory": (self.d_inner, self.d_state), "past": self.conv.past_shape}

    def mix(self, x: Float[Tensor, "B T M"], state: State, form: str) -> tuple[Tensor, State]:
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        u, past = self.conv.run(u, state["past"])
        u = F.silu(u)
        dt, B, C = self.x_proj(u).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        # The bias is added in fp32: near -7 half precision would move the step by percents.
        dt = F.softplus(upcast(F.linear(dt, self.dt_proj.weight)) + upcast(self.dt_proj.bias))
        A = -upcast(self.A_log).exp()
        y, memory = selective_scan(u, dt, A, B, C, self.D, state["memory"], form=form, chunk=self.chunk)
        y = (y * F.silu(upcast(gate))).to(x.dtype)
        return self.o_proj(y), {"memory": memory, "past": past}

    @classmethod
    def tiny(cls) -> "Mamba":
        return cls(d_model=24, n_heads=3, d_state=4, dt_rank=3)
