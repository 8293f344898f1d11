"""The step dt of state space models, and of delta rules that fade as they do: softplus of a projection."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def step_biases(n: int) -> Float[Tensor, "{n}"]:
    """Biases of the projection, for steps that begin between 0.001 and 0.1, log-uniformly.

    So that at first a token moves each clock by a thousandth to a tenth. Source: the code published with
    Mamba (2023); section 3.6 of the paper has the step itself uniform.
    """
    dt = torch.empty(n).uniform_(math.log(0.001), math.log(0.1)).exp()
    return dt + torch.log(-torch.expm1(-dt))  # log(e^dt - 1), the inverse of softplus
