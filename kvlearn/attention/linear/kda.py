"""Kimi delta attention: the gated delta rule with a decay for each key feature; three of four Kimi layers."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import register
from kvlearn.attention.core import merge_heads, split_heads, upcast
from kvlearn.attention.linear.delta import unit
from kvlearn.attention.linear.gated_norm import GatedNorm
from kvlearn.attention.linear.generalised_delta_rule import generalised_delta_rule
from kvlearn.attention.linear.short_conv import ShortConvolution
from kvlearn.attention.linear.state import State, StateMechanism
from kvlearn.attention.linear.step_size import step_biases


@register("kda")
class KimiDeltaAttention(StateMechanism):
    """Gated DeltaNet in which every feature of a key fades at a speed of its own.

        [q k v]_t = silu(conv([W_q x, W_k x, W_v x]))_t,   q, k divided by their lengths,   β_t = σ(W_b x_t)
        log a_t = -exp(A_log) softplus(W_f↑ W_f↓ x_t + dt_bias),   K numbers a head; A_log is one a head
        S' = diag(a_t) S_{t-1},   S_t = S' + β_t k_t (v_t - S'ᵀ k_t)ᵀ
        y_t = W_o [RMSNorm(S_tᵀ q_t / √K) ⊙ σ(W_g↑ W_g↓ x_t)]

    As no position is encoded elsewhere, the decays are all that tells near from far. Decay and gate pass
    through ``rank`` numbers, head_dim unless given. ``conv`` is the width of the short convolution.

    Cache: B · (H · D² + 3 · (conv - 1) · H · D) numbers in fp32. A layer of Kimi-Linear-48B-A3B, with H = 32,
    D = 128 and conv 4, keeps 561,152 of them, 2.2 MB.
    Source: Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture" (2025), on KDA.
    """

    chunk = 32

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        rank: int | None = None,
        conv: int = 4,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        width = self.n_heads * self.head_dim
        rank = validate.positive("rank", self.head_dim if rank is None else rank)
        self.q_proj = nn.Linear(d_model, width, bias=False)
        self.k_proj = nn.Linear(d_model, width, bias=False)
        self.v_proj = nn.Linear(d_model, width, bias=False)
        self.b_proj = nn.Linear(d_model, self.n_heads, bias=False)
        self.conv = ShortConvolution(3 * width, validate.at_least("conv", conv, 2))
        self.decay_down = nn.Linear(d_model, rank, bias=False)
        self.decay_up = nn.Linear(rank, width, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(width))
        self.gate_down = nn.Linear(d_model, rank, bias=False)
        self.gate_up = nn.Linear(rank, width, bias=False)
        self.norm = GatedNorm(self.head_dim, norm_eps, torch.sigmoid)
        self.o_proj = nn.Linear(width, d_model, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """A uniform in (1, 16), steps log-uniform in (0.001, 0.1): log a from -1.6 to -0.001 at first."""
        self.A_log.uniform_(1, 16).log_()
        self.dt_bias.copy_(step_biases(len(self.dt_bias)))

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"memory": (self.n_heads, self.head_dim, self.head_dim), "past": self.conv.past_shape}

    def mix(self, x: Float[Tensor, "B T M"], state: State, form: str) -> tuple[Tensor, State]:
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
        qkv, past = self.conv.run(qkv, state["past"])
        q, k, v = (split_heads(part, self.n_heads) for part in F.silu(upcast(qkv)).chunk(3, dim=-1))
        q, k = unit(q) * self.head_dim**-0.5, unit(k)
        written = torch.sigmoid(upcast(self.b_proj(x))).mT[..., None] * k
        log_decay = self.log_decay(x)
        out, memory = generalised_delta_rule(
            q, written, v, log_decay.exp() * k, -written, log_decay, state["memory"],
            form=form, chunk=self.chunk,
        )  # fmt: skip
        out = self.norm(out, split_heads(self.gate_up(self.gate_down(x)), self.n_heads))
        return self.o_proj(merge_heads(out).to(x.dtype)), {"memory": memory, "past": past}

    def log_decay(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B H T K"]:
        """log a_t of each feature of each head."""
        step = F.softplus(upcast(self.decay_up(self.decay_down(x))) + upcast(self.dt_bias))
        return -upcast(self.A_log).exp()[:, None, None] * split_heads(step, self.n_heads)

    @classmethod
    def tiny(cls) -> "KimiDeltaAttention":
        return cls(d_model=24, n_heads=3, head_dim=8, rank=5)
