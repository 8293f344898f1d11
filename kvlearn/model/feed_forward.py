"""The gated feed-forward network of a layer."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# "gelu_tanh" is 0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))), Gemma's approximation of GELU.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class SwiGLU(nn.Module):
    """down(act(gate(x)) · up(x)), with SiLU as ``activation`` unless another is named: "gelu" makes it GeGLU.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020), equations 5 and 6.
    """

    def __init__(self, d_model: int, d_ff: int, activation: str = "silu", bias: bool = False) -> None:
        super().__init__()
        self.activation = activation
        self.act = ACTIVATIONS[activation]
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
