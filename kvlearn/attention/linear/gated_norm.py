"""What stands behind a recurrence that divides by no sum of weights: a norm of each head, and a gate."""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn.attention.core import upcast


class HeadNorm(nn.RMSNorm):
    """y = RMSNorm(head) ⊙ w, in fp32 at least, whatever the weights are in."""

    def __init__(self, head_dim: int, eps: float = 1e-6) -> None:
        super().__init__(head_dim, eps)

    def forward(self, heads: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T D"]:
        return F.rms_norm(upcast(heads), self.normalized_shape, upcast(self.weight), self.eps)


class GatedNorm(HeadNorm):
    """y = RMSNorm(head) ⊙ w ⊙ silu(gate), in fp32 at least; or with another ``activation`` of the gate.

    Without softmax nothing keeps the size of a head's output near that of a value; the norm does, and the
    gate, made from the token itself, lets a head be silent.
    Source: Sun et al., "Retentive Network" (2023), equation 8; with RMSNorm and per head as in Yang et al.,
    "Gated Linear Attention" (2024), section 4.4, and in Gated DeltaNet (2025).
    """

    def __init__(
        self, head_dim: int, eps: float = 1e-6, activation: Callable[[Tensor], Tensor] = F.silu
    ) -> None:
        super().__init__(head_dim, eps)
        self.activation = activation

    def forward(  # type: ignore[override]
        self, heads: Float[Tensor, "B H T D"], gate: Float[Tensor, "B H T D"]
    ) -> Float[Tensor, "B H T D"]:
        return super().forward(heads) * self.activation(upcast(gate))
