"""RWKV-7: the state learns while it reads; each token says what it forgets, how fast, and what it writes."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import register
from kvlearn.attention.core import merge_heads, split_heads, upcast
from kvlearn.attention.linear.generalised_delta_rule import generalised_delta_rule
from kvlearn.attention.linear.state import State, StateMechanism
from kvlearn.attention.linear.token_shift import rising, token_before


@register("rwkv7")
class Rwkv7(StateMechanism):
    """RWKV-7's time mixing.

        x^□_t = x_t + μ_□ ⊙ (x_{t-1} - x_t)                               for □ = r, w, k, v, a, g
        r, k, v = W_r x^r, W_k x^k, W_v x^v;   a = σ(low-rank of x^a);   g = low-rank of x^g
        decay = exp(-e^{-1/2} σ(low-rank of x^w));   κ = normalised(k ⊙ ξ);   k̃ = k ⊙ (1 + (a - 1) ⊙ α)
        S_t = diag(decay_t) S_{t-1} - (a_t ⊙ κ_t)(κ_tᵀ S_{t-1}) + k̃_t v_tᵀ
        y_t = W_o (g_t ⊙ (norm(S_tᵀ r_t) + (r_t · (ρ ⊙ k̃_t)) v_t))

    a, the in-context learning rate, is a number of each feature: what is removed, κ, and what replaces it, k̃,
    are two keys. A decay is never under e^{-0.607} = 0.545. The norm is LayerNorm of each head. ``rank`` is
    that of decay and rate, the published code's for this d_model unless given; the gate's is twice as much.
    Left out is the residual of values: in the paper, all layers but the first mix the first one's v into
    theirs, and layers here know of no other.

    Cache: B · (H · D² + d_model) numbers: one matrix a head, and the last token's input. RWKV-7-2.9B, with 40
    heads of 64 and d_model 2560, keeps 166,400 of them a layer, 0.67 MB in fp32.
    Source: Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution" (2025), on time mixing.
    """

    chunk = 32
    undecayed = ("time_mix",)

    def __init__(
        self, d_model: int, n_heads: int, *, head_dim: int | None = None, rank: int | None = None
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        width = self.n_heads * self.head_dim
        suggested = max(32, round(2.5 * d_model**0.5 / 32) * 32)
        self.rank = validate.positive("rank", suggested if rank is None else rank)
        self.time_mix = nn.Parameter(torch.empty(6, d_model))
        self.r_proj = nn.Linear(d_model, width, bias=False)
        self.k_proj = nn.Linear(d_model, width, bias=False)
        self.v_proj = nn.Linear(d_model, width, bias=False)
        self.o_proj = nn.Linear(width, d_model, bias=False)
        self.decay_down, self.decay_up = self.low_rank(self.rank, bias=True)
        self.rate_down, self.rate_up = self.low_rank(self.rank, bias=True)
        self.gate_down, self.gate_up = self.low_rank(2 * self.rank, bias=False)
        self.removal_scale = nn.Parameter(torch.empty(width))  # ξ
        self.rate_in_key = nn.Parameter(torch.empty(width))  # α
        self.bonus = nn.Parameter(torch.empty(width))  # ρ
        self.norm = nn.GroupNorm(self.n_heads, width, eps=1e-5 * self.head_dim)
        self.initialise()

    def low_rank(self, rank: int, bias: bool) -> tuple[nn.Linear, nn.Linear]:
        width = self.n_heads * self.head_dim
        return nn.Linear(self.d_model, rank, bias=False), nn.Linear(rank, width, bias=bias)

    @torch.no_grad()
    def initialise(self) -> None:
        """The published code's start, at half the depth, since a layer does not know where it stands."""
        D, depth = self.head_dim, 0.5
        for mix, power in zip(self.time_mix, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
            mix.copy_(1 - rising(self.d_model, power * (1 - depth)))
        part = torch.linspace(0, 1, self.n_heads * D)
        in_head = torch.linspace(-1, 1, D).repeat(self.n_heads) if D > 1 else torch.zeros(self.n_heads)
        zigzag = in_head * in_head.abs()
        self.decay_up.bias.copy_(-5.5 + 6 * part ** (1 + depth**0.3) + 2.5 * zigzag)
        self.rate_up.bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * (part - 0.5))
        for down, up in (
            (self.decay_down, self.decay_up),
            (self.rate_down, self.rate_up),
            (self.gate_down, self.gate_up),
        ):
            nn.init.zeros_(down.weight)
            nn.init.orthogonal_(up.weight, gain=0.1 * max(1.0, up.in_features / up.out_features) ** 0.5)
        self.removal_scale.copy_(0.71 - 0.1 * (part - 0.5))
        self.rate_in_key.fill_(1.02)
        self.bonus.fill_(-0.04)

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"last": (self.d_model,), "memory": (self.n_heads, self.head_dim, self.head_dim)}

    def mix(self, x: Float[Tensor, "B T M"], state: State, form: str) -> tuple[Tensor, State]:
        step = token_before(x, state["last"]) - x
        xr, xw, xk, xv, xa, xg = (x + step * mix for mix in self.time_mix)
        r, k, v = upcast(self.r_proj(xr)), upcast(self.k_proj(xk)), upcast(self.v_proj(xv))
        speed = torch.sigmoid(upcast(self.decay_up(torch.tanh(self.decay_down(xw)))))
        rate = torch.sigmoid(upcast(self.rate_up(self.rate_down(xa))))
        gate = upcast(self.gate_up(torch.sigmoid(self.gate_down(xg))))
        removal, key = k * self.removal_scale, k * (1 + (rate - 1) * self.rate_in_key)
        r, key, v, bonus, rate, removal, log_decay = (
            split_heads(part, self.n_heads)
            for part in (r, key, v, r * key * self.bonus, rate, removal, -(torch.e**-0.5) * speed)
        )
        removal = F.normalize(removal, dim=-1)
        heads, memory = generalised_delta_rule(
            r, key, v, removal, -rate * removal, log_decay, state["memory"], form=form, chunk=self.chunk
        )
        out = merge_heads(self.normed(heads) + bonus.sum(dim=-1, keepdim=True) * v)
        return self.o_proj((gate * out).to(x.dtype)), {"last": upcast(x[:, -1]), "memory": memory}

    def normed(self, heads: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T D"]:
        """LayerNorm of each head, with weights of its own."""
        weight, bias = (upcast(p).view(self.n_heads, 1, -1) for p in (self.norm.weight, self.norm.bias))
        return F.layer_norm(heads, heads.shape[-1:], eps=self.norm.eps) * weight + bias

    @classmethod
    def tiny(cls) -> "Rwkv7":
        return cls(d_model=24, n_heads=3, head_dim=8, rank=4)
