"""What stands behind a recurrence that divides by no sum of weights: a norm of each head, and a gate."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn.attention.core import upcast


class GatedNorm(nn.Module):
    """y = RMSNorm(head) ⊙ w ⊙ silu(gate), in fp32 at least.

    Without softmax nothing keeps the size of a head's output near that of a value; the norm does, and the
    gate, made from the token itself, lets a head be silent.
    Source: Sun et al., "Retentive Network" (2023), equation 8; with RMSNorm and per head as in Yang et al.,
    "Gated Linear Attention" (2024), section 4.4, and in Gated DeltaNet (2025).
    """

    def __init__(self, head_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))
        self.eps = eps

    def forward(
        self, heads: Float[Tensor, "B H T D"], gate: Float[Tensor, "B H T D"]
    ) -> Float[Tensor, "B H T D"]:
        normed = F.rms_norm(upcast(heads), self.weight.shape, upcast(self.weight), self.eps)
        return normed * F.silu(upcast(gate))
