"""What is measured, at one shape unless a part says otherwise: the mechanisms that keep a state."""

from collections.abc import Callable
from typing import Any

import torch

from kvlearn.attention import REGISTRY, Mechanism

D_MODEL, N_HEADS = 256, 4


def state_names() -> list[str]:
    """All registered mechanisms with a state, by name."""
    return [name for name, kind in REGISTRY.items() if kind.forms]


def new_layer(
    name: str, device: torch.device, d_model: int | None = None, n_heads: int | None = None
) -> Mechanism:
    """A layer, its options at their defaults."""
    kind: Callable[..., Mechanism] = REGISTRY[name]
    with device:
        return kind(d_model or D_MODEL, n_heads or N_HEADS).eval()


def details(what: str, name: str, length: int, **more: Any) -> dict[str, Any]:
    """To find a row again; ``what`` and ``name`` say which."""
    family = "full" if name == "full" else "linear"
    sizes = {"d_model": D_MODEL, "n_heads": N_HEADS, "length": length, "batch": 1}
    return {"what": what, "name": name, "family": family, **sizes, **more}
