"""What is measured, all at one shape: the layers, and who sees whom in each, written down once more."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from kvlearn.attention import FullAttention, SparseAttention, WindowAttention, patterns
from kvlearn.attention.patterns import Pattern, Random

D_MODEL, N_HEADS = 256, 4
WINDOW, N_SINKS, N_GLOBAL = 512, 4, 16
BLOCK, N_RANDOM = 64, 3  # BigBird
SUMMARY = 8  # the fixed form of the Sparse Transformer

Layer = FullAttention | WindowAttention | SparseAttention


@dataclass(frozen=True)
class Design:
    """``layer(n)``: one for texts of n tokens. ``visible(n, t, s)``: whether t attends to each of the s ≤ t.

    ``time`` and ``memory``: the most that their exponents over the length may be.
    """

    family: str  # of colours
    layer: Callable[[int], Layer]
    visible: Callable[[int, int, Tensor], Tensor]
    time: float | None = None
    memory: float | None = None


def root(n: int) -> int:
    """The stride, or block, of a Sparse Transformer: √n to the nearest."""
    return (isqrt(4 * n) + 1) // 2


def full(n: int) -> Layer:
    return FullAttention(D_MODEL, N_HEADS)


def window(**options: Any) -> Callable[[int], Layer]:
    return lambda n: WindowAttention(D_MODEL, N_HEADS, window=WINDOW, **options)


def with_sinks(n: int) -> Layer:
    return window(n_sinks=N_SINKS)(n)


def with_sink_logits(n: int) -> Layer:
    layer = window(sink_logits=True)(n)
    nn.init.normal_(layer.sink_logits)  # type: ignore[arg-type]
    return layer


def sparse(pattern: Callable[[int], Pattern]) -> Callable[[int], Layer]:
    return lambda n: SparseAttention(D_MODEL, N_HEADS, pattern=pattern(n))


def visible_to_bigbird(n: int, t: int, s: Tensor) -> Tensor:
    mine, its = t // BLOCK, s // BLOCK
    drawn = torch.tensor(Random(N_RANDOM, BLOCK, skip_first=1, skip_last=1).draw(mine), dtype=torch.int64)
    return (mine - its < 2) | (its == 0) | (mine == 0) | torch.isin(its, drawn)


DESIGNS: dict[str, Design] = {
    "full": Design("full", full, lambda n, t, s: s >= 0),
    "window": Design("sliding", window(), lambda n, t, s: t - s < WINDOW, 1.15, 1.15),
    "longformer": Design(
        "sparse",
        sparse(lambda n: patterns.longformer(WINDOW, N_GLOBAL)),
        lambda n, t, s: (t - s < WINDOW) | (s < N_GLOBAL) | (t < N_GLOBAL),
        *(1.15, 1.15),
    ),
    "bigbird": Design(
        "sparse", sparse(lambda n: patterns.bigbird(BLOCK, N_RANDOM)), visible_to_bigbird, 1.15, 1.15
    ),
    "strided": Design(
        "sparse",
        sparse(lambda n: patterns.sparse_transformer(root(n))),
        lambda n, t, s: (t - s < root(n)) | ((t - s) % root(n) == 0),
        1.65,
    ),
    "fixed": Design(
        "sparse",
        sparse(lambda n: patterns.sparse_transformer_fixed(root(n), SUMMARY)),
        lambda n, t, s: (s // root(n) == t // root(n)) | (s % root(n) >= root(n) - SUMMARY),
        1.65,
    ),
}
WITH_SINKS: dict[str, Design] = {
    "window, sinks": Design("sliding", with_sinks, lambda n, t, s: (t - s < WINDOW) | (s < N_SINKS)),
    "window, sink logits": Design("sliding", with_sink_logits, DESIGNS["window"].visible),
}


def new_layer(design: Design, n: int, device: torch.device) -> Layer:
    """A design's layer for texts of ``n`` tokens."""
    with device:
        return design.layer(n).eval()


def details(what: str, name: str, length: int, **more: Any) -> dict[str, Any]:
    """To find a row again; ``what`` and ``name`` say which."""
    design = {**DESIGNS, **WITH_SINKS}.get(name)
    sizes = {"d_model": D_MODEL, "n_heads": N_HEADS, "window": WINDOW, "length": length, "batch": 1}
    return {"what": what, "name": name, "family": design.family if design else "sparse", **sizes, **more}
