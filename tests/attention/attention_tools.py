"""Tools of the attention tests: random tensors, closeness, and the allocations of operators."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """To ``tolerance``; of the largest number, where that is above 1."""
    atol = tolerance * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got, expected, atol=atol, rtol=tolerance)


def redraw(layer: Any, seed: int = 0) -> Any:
    """``layer`` with all its weights drawn anew, vectors too, so large that nothing is nearly uniform."""
    generator = torch.Generator().manual_seed(seed)
    for weight in layer.parameters():
        spread = 1.5 * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.5
        weight.data = torch.randn(weight.shape, generator=generator) * spread + (weight.dim() == 1)
    return layer.eval()


class Allocated(TorchDispatchMode):
    """The numbers in the largest new storage of an operator, and the operator's name."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.kept: list[Tensor] = []  # alive, so that no address is used twice
        self.largest, self.by = 0, ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.known.add(x.untyped_storage().data_ptr())
                self.kept.append(x)
                numbers = x.untyped_storage().nbytes() // x.element_size()
                if numbers > self.largest:
                    self.largest, self.by = numbers, str(func)
        return out
