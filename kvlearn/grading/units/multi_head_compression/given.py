"""What the set-up cell of unit 03 gives: RoPE as a function, for any even number of coordinates."""

import torch
from torch import Tensor


def rope(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """x (B, heads, n, Dr) with every token's pairs (i, i + Dr/2) turned to its position, as in 01.4.

    ``positions`` holds integers, (1, n) or (B, n). Computed in fp32, returned in x's dtype. ValueError where
    the shapes do not fit.
    """
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(
            f"x: expected shape (B, heads, n, Dr) with Dr even, got {tuple(x.shape)} (one head for all is "
            "heads = 1)"
        )
    if positions.ndim != 2 or positions.shape[0] not in (1, x.shape[0]) or positions.shape[1] != x.shape[2]:
        raise ValueError(
            f"positions: expected shape (1, {x.shape[2]}) or ({x.shape[0]}, {x.shape[2]}), "
            f"got {tuple(positions.shape)}"
        )
    half = x.shape[-1] // 2
    omega = theta ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angles = positions[:, None, :, None] * omega  # (B, 1, n, half)
    a, b = x.float().split(half, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
