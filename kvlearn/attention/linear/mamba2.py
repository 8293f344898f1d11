"""Mamba-2: the state space model whose decay all numbers of a head share, and so a linear attention."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import register
from kvlearn.attention.core import merge_heads, split_heads, upcast
from kvlearn.attention.linear.decay import linear_attention
from kvlearn.attention.linear.forms import for_heads
from kvlearn.attention.linear.short_conv import ShortConvolution
from kvlearn.attention.linear.state import State, StateMechanism
from kvlearn.attention.linear.step_size import step_biases


class GateThenNorm(nn.Module):
    """w ⊙ RMSNorm(y ⊙ silu(gate)), the norm over each of ``n_groups`` parts of y by itself; fp32 at least."""

    def __init__(self, width: int, n_groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.n_groups, self.eps = n_groups, eps

    def forward(self, y: Float[Tensor, "B T E"], gate: Float[Tensor, "B T E"]) -> Float[Tensor, "B T E"]:
        parts = (upcast(y) * F.silu(upcast(gate))).unflatten(-1, (self.n_groups, -1))
        return F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * upcast(self.weight)


@register("mamba2")
class Mamba2(StateMechanism):
    """A selective state space model with one decay a head: linear attention with C, B, dt x for q, k, v.

        z, (x, B, C), dt' = input W_in;   (x, B, C) = silu(conv(x, B, C));   dt = softplus(dt' + b_dt)
        S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)ᵀ,   A = -exp(A_log) < 0       S: (N, P), one a head
        y_t = S_tᵀ C_t + D x_t;   out = RMSNorm(y ⊙ silu(z)) W_o

    A head has P = head_dim numbers, expand · d_model / n_heads unless given. B and C, of N = d_state numbers,
    are shared by the heads of each of ``n_groups`` groups, as keys and values are in grouped-query attention;
    the norm, too, is over a group. ``conv`` is the width of the convolution. A model of Mamba-2 has no other
    layers: ``ModelConfig(d_ff=0, layers=("mamba2",))``.

    Cache: B · (H · N · P + (conv - 1) · (H · P + 2 · n_groups · N)) numbers; by default, with d_model of 768,
    196 608 and 5376.
    Source: Dao & Gu, "Transformers are SSMs" (2024), sections 6 and 7; the norm, its groups and the initial
    weights are those of the code published with it.
    """

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
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        if head_dim is None:
            self.head_dim *= validate.positive("expand", expand)
        self.d_state = validate.positive("d_state", d_state)
        self.n_groups = validate.divides("n_groups", n_groups, "n_heads", self.n_heads)
        self.d_inner, shared = self.n_heads * self.head_dim, self.n_groups * self.d_state
        self.widths = self.d_inner, shared, shared  # of x, B and C
        self.in_proj = nn.Linear(self.d_model, self.d_inner + sum(self.widths) + self.n_heads, bias=False)
        self.conv = ShortConvolution(sum(self.widths), validate.at_least("conv", conv, 2), bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GateThenNorm(self.d_inner, self.n_groups, norm_eps)
        self.o_proj = nn.Linear(self.d_inner, self.d_model, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """A between -16 and -1, D = 1, and steps dt that begin between 0.001 and 0.1."""
        self.dt_bias.copy_(step_biases(self.n_heads))
        self.A_log.copy_(torch.empty(self.n_heads).uniform_(1, 16).log())
        nn.init.ones_(self.D)

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"memory": (self.n_heads, self.d_state, self.head_dim), "past": self.conv.past_shape}

    def mix(self, x: Float[Tensor, "B T M"], state: State, form: str) -> tuple[Tensor, State]:
        gate, mixed, dt = self.in_proj(x).split((self.d_inner, sum(self.widths), self.n_heads), dim=-1)
        mixed, past = self.conv.run(mixed, state["past"])
        heads, B, C = F.silu(mixed).split(self.widths, dim=-1)
        v = upcast(split_heads(heads, self.n_heads))
        dt = F.softplus(upcast(dt) + upcast(self.dt_bias)).mT  # (B, H, T)
        log_decay = -upcast(self.A_log).exp()[:, None] * dt
        B, C = (for_heads(upcast(split_heads(part, self.n_groups)), self.n_heads) for part in (B, C))
        y, memory = linear_attention(
            C, B, dt[..., None] * v, log_decay, state["memory"], form=form, chunk=self.chunk
        )
        y = merge_heads(y + upcast(self.D)[:, None, None] * v)
        return self.o_proj(self.norm(y, gate).to(x.dtype)), {"memory": memory, "past": past}

    @classmethod
    def tiny(cls) -> "Mamba2":
        return cls(d_model=24, n_heads=4, d_state=6, n_groups=2)
