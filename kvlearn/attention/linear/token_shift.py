"""RWKV's token shift: what a layer works on is a mixture of a token and the one right before it."""

import torch
from jaxtyping import Float
from torch import Tensor


def token_before(x: Float[Tensor, "B T M"], last: Float[Tensor, "B M"]) -> Float[Tensor, "B T M"]:
    """For every token of ``x`` the one before it; ``last`` stands before the first."""
    return torch.cat((last[:, None].to(x.dtype), x[:, :-1]), dim=1)


def rising(channels: int, power: float) -> Float[Tensor, "M"]:
    """(i / channels)^power, from 0 to nearly 1: with it channels start, and then learn, to differ."""
    return (torch.arange(channels) / channels) ** power
