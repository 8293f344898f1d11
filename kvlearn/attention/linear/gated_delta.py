"""Gated DeltaNet: the delta rule with a state that also fades; three of four layers of Qwen3-Next."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn.attention.base import register
from kvlearn.attention.core import split_heads, upcast
from kvlearn.attention.linear.delta import DeltaNet
from kvlearn.attention.linear.gated_norm import GatedNorm
from kvlearn.attention.linear.step_size import step_biases


@register("gated_delta")
class GatedDeltaNet(DeltaNet):
    """DeltaNet with a decay that the token chooses, and an output gate.

        log a_t = -exp(A_log) softplus(W_a x_t + dt_bias),   S' = a_t S_{t-1}              of each head
        S_t = S' + β_t k_t (v_t - S'ᵀ k_t)ᵀ,   y_t = W_o [RMSNorm(S_tᵀ q_t) ⊙ silu(W_g x_t)]

    The rule replaces what stands under one key, the decay clears all at once. Queries, keys, values, β and
    the options are DeltaNet's; queries are also divided by √K. Heads start with A uniform in (0.01, 16), and
    with a step softplus(dt_bias) log-uniform in (0.001, 0.1), so that they forget at very different rates.

    Cache: as DeltaNet's. A layer of Qwen3-Next-80B-A3B, with H = 32, K = V = 128, 16 key heads and conv 4,
    keeps 548,864 numbers, 2.2 MB in fp32.
    Source: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2025), section 3.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        key_dim: int | None = None,
        n_key_heads: int | None = None,
        conv: int | None = 4,
    ) -> None:
        super().__init__(
            d_model, n_heads, head_dim=head_dim, key_dim=key_dim, n_key_heads=n_key_heads, conv=conv
        )
        self.scale = self.key_dim**-0.5
        self.a_proj = nn.Linear(d_model, self.n_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GatedNorm(self.head_dim)
        self.g_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        self.A_log.uniform_(0.01, 16).log_()
        self.dt_bias.copy_(step_biases(self.n_heads))

    def log_decay(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B H T"]:
        """log a_t of each head."""
        step = F.softplus(upcast(self.a_proj(x)) + upcast(self.dt_bias))
        return -(upcast(self.A_log).exp() * step).mT

    def normed(self, out: Float[Tensor, "B H T V"], x: Float[Tensor, "B T M"]) -> Float[Tensor, "B H T V"]:
        """What the heads have read, each normalised and gated."""
        return self.norm(out, split_heads(self.g_proj(x), self.n_heads))
