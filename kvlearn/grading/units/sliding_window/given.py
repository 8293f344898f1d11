"""What the exercises on the window stand on: the ring after so many tokens, attention token by token."""

from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.grading.compare import Difference, describe
from kvlearn.grading.trial import Stop, Trial

Rings = tuple[Tensor, Tensor]


def held(n_tokens: int, window: int) -> list[int]:
    """The position in each slot, found by writing one token after the other; -1 where a slot is empty."""
    slots, pointer = [-1] * window, 0
    for position in range(n_tokens):
        slots[pointer] = position
        pointer = 0 if pointer == window - 1 else pointer + 1
    return slots


def whole_numbers(got: Any) -> list[int] | None:
    """Of a list, tuple, range, array or tensor, or of a list of tensors of one number; None otherwise."""
    if isinstance(got, Tensor | np.ndarray):
        if got.ndim != 1:
            return None
        got = got.tolist()
    if not isinstance(got, list | tuple | range):
        return None
    numbers = [part.item() if isinstance(part, Tensor) and part.ndim == 0 else part for part in got]
    if not all(isinstance(i, Integral) and not isinstance(i, bool) for i in numbers):
        return None
    return [int(i) for i in numbers]


def ring_of(t: Trial, x: Tensor, window: int) -> Tensor:
    """The ring after the tokens of x (B, H, n, D); in empty slots lies what an earlier sequence left."""
    B, H, n, D = x.shape
    ring = t.randn(B, H, window, D, dtype=x.dtype)
    for slot, position in enumerate(held(n, window)):
        if position >= 0:
            ring[:, :, slot] = x[:, :, position]
    return ring


def windowed(q: Tensor, k: Tensor, v: Tensor, window: int, first: int = 0) -> Tensor:
    """Attention of q (B, H, T, D), which stand at ``first`` and after, one token at a time."""
    outs = []
    for i in range(q.shape[2]):
        seen = slice(max(0, first + i + 1 - window), first + i + 1)
        outs.append(F.scaled_dot_product_attention(q[:, :, i : i + 1], k[:, :, seen], v[:, :, seen]))
    return torch.cat(outs, dim=2)


def three(t: Trial, got: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What came back, taken apart into the output and two rings, or the end of this round."""
    if isinstance(got, tuple | list) and len(got) == 3 and all(isinstance(part, Tensor) for part in got):
        return got[0], got[1], got[2]
    t.note(got, Difference("", "three tensors, (out, ring_k, ring_v)", describe(got)))
    raise Stop


def same_rings(t: Trial, got: Rings, want: Rings, filled: Tensor) -> None:
    """Both rings hold the same in the slots where ``filled`` (B or 1, W) is True; what else lies there counts
    for nothing."""
    for name, ring, right in zip(("ring_k:", "ring_v:"), got, want, strict=True):
        if t.shape(ring, tuple(right.shape), name):
            blank = ~filled[:, None, :, None]
            t.close(ring.masked_fill(blank, 0), right.masked_fill(blank, 0), name)
