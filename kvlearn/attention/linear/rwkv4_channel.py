"""RWKV-4's channel mixing: a feed-forward that sees two tokens, and so needs a cache."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import register
from kvlearn.attention.core import upcast
from kvlearn.attention.linear.state import State, StateMechanism
from kvlearn.attention.linear.token_shift import rising, token_before


@register("rwkv4_channel")
class Rwkv4ChannelMix(StateMechanism):
    """RWKV-4's feed-forward, a layer of its own here, since a step of it needs the token before.

        k_t = relu(W_k (μ_k ⊙ x_t + (1 - μ_k) ⊙ x_{t-1}))²,   r_t = W_r (μ_r ⊙ x_t + (1 - μ_r) ⊙ x_{t-1})
        y_t = σ(r_t) ⊙ W_v k_t

    A model of it takes layers=("rwkv4", "rwkv4_channel") and d_ff=0. ``hidden`` is the width of k, 4 d_model
    unless given; ``n_heads`` must divide d_model and means nothing else. W_v is called ``o_proj``, as what
    leads back to the residual stream is in every mechanism.

    Cache: B · d_model numbers, the last token's input.
    Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer Era" (2023), on channel mixing.
    """

    forms = ("recurrent", "chunked")

    def __init__(self, d_model: int, n_heads: int, *, hidden: int | None = None) -> None:
        super().__init__(d_model, n_heads, None)
        self.hidden = validate.positive("hidden", 4 * d_model if hidden is None else hidden)
        self.time_mix_key = nn.Parameter(torch.empty(d_model))
        self.time_mix_receptance = nn.Parameter(torch.empty(d_model))
        self.k_proj = nn.Linear(d_model, self.hidden, bias=False)
        self.r_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(self.hidden, d_model, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """The published code's start of μ, at half the depth, as in ``rwkv4``."""
        self.time_mix_key.copy_(rising(self.d_model, 0.5))
        self.time_mix_receptance.copy_(rising(self.d_model, 0.5))

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"last": (self.d_model,)}

    def mix(self, x: Float[Tensor, "B T M"], state: State, form: str) -> tuple[Tensor, State]:
        if form == "recurrent" and x.shape[1] > 1:
            ys = []
            for token in x.split(1, dim=1):
                y, state = self.mix(token, state, form)
                ys.append(y)
            return torch.cat(ys, dim=1), state
        past = token_before(x, state["last"])
        k = torch.relu(self.k_proj(torch.lerp(past, x, self.time_mix_key)))
        r = self.r_proj(torch.lerp(past, x, self.time_mix_receptance))
        return torch.sigmoid(r) * self.o_proj(k.square()), {"last": upcast(x[:, -1])}

    @classmethod
    def tiny(cls) -> "Rwkv4ChannelMix":
        return cls(d_model=24, n_heads=3, hidden=40)
