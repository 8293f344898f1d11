"""Linear attention: the softmax replaced by a kernel, so that the past fits into one matrix a head."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import register
from kvlearn.attention.core import merge_heads, split_heads, upcast
from kvlearn.attention.linear.decay import linear_attention
from kvlearn.attention.linear.state import State, StateMechanism


def elu_features(x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """φ(x) = elu(x) + 1: x + 1 above 0, eˣ below; D features, all positive.

    Source: Katharopoulos et al., "Transformers are RNNs" (2020), equation 7.
    """
    return x.relu() + x.clamp_max(0).exp()  # a small eˣ would round to 0 beside elu's -1


def taylor_features(x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
    """The features of exp's Taylor series to the second order, F = 1 + D + D(D + 1)/2.

        φ(q)·φ(k) = 1 + s + s²/2 ≈ exp(s),   s = q·k / √D

    A product of features may be negative, their sum never: 1 + s + s²/2 = ((1 + s)² + 1)/2 ≥ 1/2. Each pair
    i < j comes once, times √2, in place of twice.
    Source: Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff"
    (Based, 2024), section 4.1; after Zhang et al., "The Hedgehog & the Porcupine" (2024).
    """
    D = x.shape[-1]
    x = x / D**0.25
    i, j = torch.triu_indices(D, D, device=x.device)
    pairs = x[..., i] * x[..., j] * 0.5 ** ((i == j).to(x) / 2)
    return torch.cat((torch.ones_like(x[..., :1]), x, pairs), dim=-1)


FEATURES = {"elu": elu_features, "taylor": taylor_features}


def normalised(sums: Float[Tensor, "B H T V1"]) -> Float[Tensor, "B H T V"]:
    """Outputs divided by the last of them, which is the sum of the weights.

    Where the features have underflowed, weights sum to 0 and the output is 0. ValueError where they sum to
    less: features that let this happen make no weights.
    """
    out, total = sums[..., :-1], sums[..., -1:]
    if total.device.type == "cpu" and not bool((total >= 0).all()):  # elsewhere a look would synchronise
        least = float(total.detach().min())
        raise ValueError(f"q, k: expected features whose products sum to at least 0, got {least:.3g}")
    return out / total.clamp_min(torch.finfo(total.dtype).tiny)


@register("linear")
class LinearAttention(StateMechanism):
    """Attention with the weights φ(q_t)·φ(k_s) in place of exp(q_t·k_s / √D).

        head_t = Σ_{s ≤ t} (φ(q_t)·φ(k_s)) v_s / Σ_{s ≤ t} φ(q_t)·φ(k_s) = S_tᵀ φ(q_t) / (z_t·φ(q_t))
        S_t = S_{t-1} + φ(k_t) v_tᵀ,   z_t = z_{t-1} + φ(k_t),   y = [head_1 … head_H] W_o

    z is kept as one more column of S: the sum for a value that is always 1. φ is ``elu_features`` or
    ``taylor_features``. Queries and keys have ``key_dim`` numbers, head_dim unless given: Taylor's features
    grow with its square.

    Cache: B · H · F · (D + 1) numbers, F features.
    Source: Katharopoulos et al., "Transformers are RNNs" (2020), equations 4 to 12.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        key_dim: int | None = None,
        features: str = "elu",
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        self.key_dim = validate.positive("key_dim", self.head_dim if key_dim is None else key_dim)
        self.features = FEATURES[validate.one_of("features", features, FEATURES)]
        self.n_features = len(self.features(torch.empty(self.key_dim, device="meta")))
        self.q_proj = nn.Linear(d_model, self.n_heads * self.key_dim, bias=False)
        self.k_proj = nn.Linear(d_model, self.n_heads * self.key_dim, bias=False)
        self.v_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"memory": (self.n_heads, self.n_features, self.head_dim + 1)}

    def mix(self, x: Float[Tensor, "B T M"], state: State, form: str) -> tuple[Tensor, State]:
        q, k = (self.features(upcast(split_heads(p(x), self.n_heads))) for p in (self.q_proj, self.k_proj))
        v = F.pad(upcast(split_heads(self.v_proj(x), self.n_heads)), (0, 1), value=1.0)
        out, memory = linear_attention(q, k, v, None, state["memory"], form=form, chunk=self.chunk)
        return self.o_proj(merge_heads(normalised(out)).to(x.dtype)), {"memory": memory}

    @classmethod
    def tiny(cls) -> "LinearAttention":
        return cls(d_model=24, n_heads=3, head_dim=8)
