"""DeltaNet: linear attention whose state is corrected rather than added to."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import register
from kvlearn.attention.core import merge_heads, split_heads, upcast
from kvlearn.attention.linear.delta_rule import delta_rule
from kvlearn.attention.linear.forms import for_heads
from kvlearn.attention.linear.gated_norm import HeadNorm
from kvlearn.attention.linear.short_conv import ShortConvolution
from kvlearn.attention.linear.state import State, StateMechanism


def unit(x: Float[Tensor, "... D"], eps: float = 1e-6) -> Float[Tensor, "... D"]:
    """x / √(|x|² + eps), in fp32 at least: of length 1, and 0 for 0."""
    x = upcast(x)
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + eps)


@register("delta")
class DeltaNet(StateMechanism):
    """The delta rule as a layer: keys and queries of length 1, a step size of each token's own choice.

        [q k v]_t = silu(conv([W_q x, W_k x, W_v x]))_t,   q, k divided by their lengths,   β_t = σ(W_b x_t)
        S_t = S_{t-1} + β_t k_t (v_t - S_{t-1}ᵀ k_t)ᵀ,   y_t = W_o [RMSNorm(S_tᵀ q_t) of each head]

    A key of length 1 and 0 < β < 1 move what the state gives for this key towards v_t, by the share β.
    ``conv`` is the width of the short convolution, None for none. Keys have ``key_dim`` numbers, head_dim
    unless given; with ``n_key_heads`` below ``n_heads``, each key and query head serves n_heads / n_key_heads
    neighbouring states. Raises ValueError where n_key_heads does not divide n_heads, and for a conv below 2.

    Cache: B · (H · K · V + (conv - 1) · (2 · n_key_heads · K + H · V)) numbers in fp32.
    Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (2024),
    section 3; the rule in a linear transformer is from Schlag et al., "Linear Transformers Are Secretly Fast
    Weight Programmers" (2021), section 4.2.
    """

    scale = 1.0  # of queries; nearly without effect before a norm

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
        super().__init__(d_model, n_heads, head_dim)
        self.key_dim = validate.positive("key_dim", self.head_dim if key_dim is None else key_dim)
        n_key_heads = self.n_heads if n_key_heads is None else n_key_heads
        self.n_key_heads = validate.divides("n_key_heads", n_key_heads, "n_heads", self.n_heads)
        keys, values = self.n_key_heads * self.key_dim, self.n_heads * self.head_dim
        self.widths = [keys, keys, values]
        self.q_proj = nn.Linear(d_model, keys, bias=False)
        self.k_proj = nn.Linear(d_model, keys, bias=False)
        self.v_proj = nn.Linear(d_model, values, bias=False)
        self.b_proj = nn.Linear(d_model, self.n_heads, bias=False)
        self.conv = (
            None if conv is None else ShortConvolution(sum(self.widths), validate.at_least("conv", conv, 2))
        )
        self.norm = HeadNorm(self.head_dim)
        self.o_proj = nn.Linear(values, d_model, bias=False)

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"memory": (self.n_heads, self.key_dim, self.head_dim)}
        return shapes if self.conv is None else {**shapes, "past": self.conv.past_shape}

    def mix(self, x: Float[Tensor, "B T M"], state: State, form: str) -> tuple[Tensor, State]:
        after = {}
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
        if self.conv is not None:
            qkv, after["past"] = self.conv.run(qkv, state["past"])
        q, k, v = F.silu(upcast(qkv)).split(self.widths, dim=-1)
        q, k = (for_heads(unit(split_heads(x, self.n_key_heads)), self.n_heads) for x in (q, k))
        out, after["memory"] = delta_rule(
            self.scale * q,
            k,
            split_heads(v, self.n_heads),
            torch.sigmoid(upcast(self.b_proj(x))).mT,
            self.log_decay(x),
            state["memory"],
            form=form,
            chunk=self.chunk,
        )
        return self.o_proj(merge_heads(self.normed(out, x)).to(x.dtype)), after

    def log_decay(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B H T"] | None:
        """None: nothing fades."""
        return None

    def normed(self, out: Float[Tensor, "B H T V"], x: Float[Tensor, "B T M"]) -> Float[Tensor, "B H T V"]:
        """What the heads have read, each normalised."""
        return self.norm(out)

    @classmethod
    def tiny(cls) -> "DeltaNet":
        return cls(d_model=24, n_heads=4, head_dim=8, key_dim=6, n_key_heads=2)
