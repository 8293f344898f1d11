"""RWKV-4's time mixing: an attention-like average without queries, one number of decay a channel."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn.attention.base import register
from kvlearn.attention.core import upcast
from kvlearn.attention.linear.state import State, StateMechanism
from kvlearn.attention.linear.token_shift import rising, token_before
from kvlearn.attention.linear.wkv import LOWEST, wkv


@register("rwkv4")
class Rwkv4(StateMechanism):
    """RWKV-4's layer that mixes tokens; what stands for its feed-forward is ``rwkv4_channel``.

        k_t = W_k (μ_k ⊙ x_t + (1 - μ_k) ⊙ x_{t-1}),   v_t and r_t alike with μ_v and μ_r
        y_t = W_o (σ(r_t) ⊙ wkv_t),   wkv_t as in ``wkv``, with w = e^time_decay and u = time_first

    Each of the d_model channels is a head of size 1; ``n_heads`` must divide d_model and means nothing else.
    The published start of decays and μ depends on how deep a layer stands, which a layer does not know here:
    each begins as the one in the middle of the depth.

    Cache: B · 4 · d_model numbers: the last token's input, and three for the sums. RWKV-4-14B, with a d_model
    of 5120, keeps 20,480 of them a layer, 82 kB in fp32.
    Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer Era" (2023), on time mixing.
    """

    forms = ("recurrent", "chunked")
    state_starts: ClassVar[Mapping[str, float]] = {"top": LOWEST}
    chunk = 256

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__(d_model, n_heads, None)
        self.time_mix_key = nn.Parameter(torch.empty(d_model))
        self.time_mix_value = nn.Parameter(torch.empty(d_model))
        self.time_mix_receptance = nn.Parameter(torch.empty(d_model))
        self.time_decay = nn.Parameter(torch.empty(d_model))
        self.time_first = nn.Parameter(torch.empty(d_model))
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.r_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """The published code's start, at half the depth: decays from slow, e^-5 a token, to fast, e^3."""
        channels = torch.arange(self.d_model)
        depth = 0.5
        self.time_mix_key.copy_(rising(self.d_model, 1 - depth))
        self.time_mix_value.copy_(rising(self.d_model, 1 - depth) + 0.3 * depth)
        self.time_mix_receptance.copy_(rising(self.d_model, 0.5 * (1 - depth)))
        part = channels / max(self.d_model - 1, 1)
        self.time_decay.copy_(-5 + 8 * part ** (0.7 + 1.3 * depth))
        self.time_first.copy_(math.log(0.3) + 0.5 * ((channels + 1) % 3 - 1))

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("last", "num", "den", "top"), (self.d_model,))

    def mix(self, x: Float[Tensor, "B T M"], state: State, form: str) -> tuple[Tensor, State]:
        past = token_before(x, state["last"])
        k = self.k_proj(torch.lerp(past, x, self.time_mix_key))
        v = self.v_proj(torch.lerp(past, x, self.time_mix_value))
        r = self.r_proj(torch.lerp(past, x, self.time_mix_receptance))
        w = upcast(self.time_decay).clamp_max(60.0).exp()  # e^-(e^60) is 0 long since, and e^89 overflows
        sums = (state["num"], state["den"], state["top"])
        average, sums = wkv(w, self.time_first, k, v, sums, form=form, chunk=self.chunk)
        y = self.o_proj((torch.sigmoid(upcast(r)) * average).to(x.dtype))
        return y, {"last": upcast(x[:, -1]), **sums._asdict()}

    @classmethod
    def tiny(cls) -> "Rwkv4":
        return cls(d_model=24, n_heads=3)
