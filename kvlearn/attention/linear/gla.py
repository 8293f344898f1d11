"""Gated linear attention: a state in which each key channel fades as the token at hand decides."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import register
from kvlearn.attention.core import merge_heads, split_heads, upcast
from kvlearn.attention.linear.channel_decay import gated_linear_attention
from kvlearn.attention.linear.gated_norm import GatedNorm
from kvlearn.attention.linear.state import State, StateMechanism


@register("gla")
class GatedLinearAttention(StateMechanism):
    """Linear attention that forgets by channel, at speeds it reads off the token.

        a_t = σ(W₂ W₁ x_t + b)^(1/16)               W₁: d_model -> rank;  a_t: K numbers a head
        S_t = diag(a_t) S_{t-1} + k_t v_tᵀ,   head_t = S_tᵀ q_t / √K
        y = [GatedNorm(head_1) … GatedNorm(head_H)] W_o,   gates W_g x

    The root keeps decays near 1: a gate that is half open forgets half in 16 tokens. Positions come from the
    fading alone. Queries and keys have ``key_dim`` numbers, half of head_dim unless given.

    Cache: B · H · key_dim · D numbers.
    Source: Yang et al., "Gated Linear Attention Transformers" (2024), section 4.4.
    """

    chunk = 128
    temperature = 16

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        key_dim: int | None = None,
        rank: int = 16,
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        self.key_dim = validate.positive(
            "key_dim", max(self.head_dim // 2, 1) if key_dim is None else key_dim
        )
        validate.positive("rank", rank)
        self.q_proj = nn.Linear(d_model, self.n_heads * self.key_dim, bias=False)
        self.k_proj = nn.Linear(d_model, self.n_heads * self.key_dim, bias=False)
        self.v_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        self.decay_down = nn.Linear(d_model, rank, bias=False)
        self.decay_up = nn.Linear(rank, self.n_heads * self.key_dim)
        self.g_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        self.norm = GatedNorm(self.head_dim)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"memory": (self.n_heads, self.key_dim, self.head_dim)}

    def mix(self, x: Float[Tensor, "B T M"], state: State, form: str) -> tuple[Tensor, State]:
        q, k, v, gate, decay = (
            split_heads(made, self.n_heads)
            for made in (
                self.q_proj(x) * self.key_dim**-0.5,
                self.k_proj(x),
                self.v_proj(x),
                self.g_proj(x),
                self.decay_up(self.decay_down(x)),
            )
        )
        log_decay = F.logsigmoid(upcast(decay)) / self.temperature
        heads, memory = gated_linear_attention(
            q, k, v, log_decay, state["memory"], form=form, chunk=self.chunk
        )
        return self.o_proj(merge_heads(self.norm(heads, gate)).to(x.dtype)), {"memory": memory}

    @classmethod
    def tiny(cls) -> "GatedLinearAttention":
        return cls(d_model=24, n_heads=3, head_dim=8, key_dim=6, rank=5)
