"""Retention: linear attention that fades, each head at a constant speed of its own, with rotated keys."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import register
from kvlearn.attention.core import merge_heads, split_heads
from kvlearn.attention.linear.decay import linear_attention
from kvlearn.attention.linear.gated_norm import GatedNorm
from kvlearn.attention.linear.state import State, StateMechanism
from kvlearn.attention.rope import Rope, RopeConfig


def log_decays(n_heads: int, decay: Sequence[float] | None) -> tuple[float, ...]:
    """log γ of every head; γ_h = 1 - 2^(-5 - h) unless given."""
    if decay is None:
        return tuple(math.log1p(-(2.0 ** (-5 - h))) for h in range(n_heads))
    given = tuple(float(a) for a in validate.instance("decay", decay, Iterable))
    if len(given) != n_heads or not all(0 < a <= 1 for a in given):
        raise ValueError(f"decay: expected {n_heads} numbers in (0, 1], one a head, got {given}")
    return tuple(map(math.log, given))


@register("retention")
class Retention(StateMechanism):
    """Attention without softmax, whose weights turn and fade with the distance of two tokens.

        head_t = Σ_{s ≤ t} γ^(t-s) ⟨R_t q_t, R_s k_s⟩ v_s / √K = S_tᵀ q_t / √K
        S_t = γ R_{-1} S_{t-1} + k_t v_tᵀ
        y = [GatedNorm(head_1) … GatedNorm(head_H)] W_o,   gates W_g x

    R is RoPE. Only distances count, so the state keeps its keys as the newest token sees them: every token
    turns it on by one step, and no position has to be known. ``decay`` gives γ of every head, else
    1 - 2^(-5-h): head h forgets half in about 22 · 2^h tokens. Queries and keys have ``key_dim`` numbers,
    head_dim unless given; half of it is the paper's. The paper's norm also takes off the mean.

    Cache: B · H · key_dim · D numbers.
    Source: Sun et al., "Retentive Network" (2023), equations 3 to 8.
    """

    log_decay: Float[Tensor, "H"]

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        key_dim: int | None = None,
        rope: RopeConfig | None = RopeConfig(),
        decay: Sequence[float] | None = None,
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        self.key_dim = validate.positive("key_dim", self.head_dim if key_dim is None else key_dim)
        if rope is not None and self.key_dim % 2:
            raise ValueError(f"key_dim: expected an even number for RoPE, got {self.key_dim}")
        self.log_decays = log_decays(self.n_heads, decay)
        self.register_buffer("log_decay", torch.tensor(self.log_decays), persistent=False)
        self.rope = None if rope is None else Rope(self.key_dim, rope)
        self.q_proj = nn.Linear(d_model, self.n_heads * self.key_dim, bias=False)
        self.k_proj = nn.Linear(d_model, self.n_heads * self.key_dim, bias=False)
        self.v_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        self.g_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        self.norm = GatedNorm(self.head_dim)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Retention":
        """Moves with its model, but is fp32 at least: a decay near 1, rounded, would be another half-life."""
        super()._apply(fn, recurse)
        inside = torch.promote_types(self.log_decay.dtype, torch.float32)
        self.log_decay = torch.tensor(self.log_decays, dtype=inside, device=self.log_decay.device)
        return self

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"memory": (self.n_heads, self.key_dim, self.head_dim)}

    def mix(self, x: Float[Tensor, "B T M"], state: State, form: str) -> tuple[Tensor, State]:
        T = x.shape[1]
        q, k, v, gate = (
            split_heads(made, self.n_heads)
            for made in (
                self.q_proj(x) * self.key_dim**-0.5,
                self.k_proj(x),
                self.v_proj(x),
                self.g_proj(x),
            )
        )
        if self.rope is not None:
            positions = torch.arange(1, T + 1, device=x.device)[None]  # behind the token of the state, at 0
            q, k = self.rope(q, positions), self.rope(k, positions)
        log_decay = self.log_decay[:, None].expand(len(x), -1, T)
        heads, memory = linear_attention(q, k, v, log_decay, state["memory"], form=form, chunk=self.chunk)
        y = self.o_proj(merge_heads(self.norm(heads, gate)).to(x.dtype))
        return y, {"memory": self.turned_back(memory, T)}

    def turned_back(self, memory: Float[Tensor, "B H K V"], n_tokens: int) -> Float[Tensor, "B H K V"]:
        """The state of keys as a token sees them that stands ``n_tokens`` further: R_{-n} of its columns."""
        if self.rope is None:
            return memory
        columns = memory.mT.flatten(1, 2).unsqueeze(2)  # (B, H · V, 1, K), all to one position
        back = torch.full((1, 1), -n_tokens, device=memory.device)
        turned = self.rope(columns, back) / self.rope.factor  # YaRN's factor is in the keys already
        return turned.squeeze(2).unflatten(1, (self.n_heads, -1)).mT

    @classmethod
    def tiny(cls) -> "Retention":
        return cls(d_model=24, n_heads=3, head_dim=8, key_dim=6, decay=(0.5, 0.9, 1.0))
