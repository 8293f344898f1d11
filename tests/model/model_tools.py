"""Small decoders whose next token is not a toss-up, and a prompt for them."""

from typing import Any

import torch
from torch import Tensor

from kvlearn.model import Decoder, ModelConfig


def decoder(layers: Any, **fields: Any) -> Decoder:
    """Four layers, with weights so large that the next token is not a toss-up."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 24, "n_layers": 4, "n_heads": 3, "d_ff": 32}
    model = Decoder(ModelConfig(**{**sizes, "layers": layers, **fields})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight += 0.3 * torch.randn_like(weight)
    return model


def prompt() -> Tensor:
    return torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
