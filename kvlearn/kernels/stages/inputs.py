"""Argument checks of the stages' launchers."""

from torch import Tensor

from kvlearn import validate


def check(q: Tensor, k: Tensor, v: Tensor, length: int | None = None, least: int = 1) -> None:
    """q (B, H, D) and k, v (B, G, S, D), H a multiple of G, D contiguous; ``least`` ≤ length ≤ S.

    A launcher whose lengths are a tensor omits ``length``: reading them would synchronise with the GPU, so
    its kernel masks instead. Raises ValueError or TypeError that names the argument.
    """
    batch, _, head_dim = validate.tensor("q", q, ("batch", "heads", "head dim")).shape
    validate.tensor("k", k, (batch, "KV heads", "slots", head_dim), device=q.device)
    check_heads(q, k, v)
    if length is not None:
        validate.at_least("length", length, least)
        validate.at_most("length", length, k.shape[2], "the cache's slots")


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """The checks for paged caches too: k and v of one shape, whole groups of query heads, D contiguous."""
    validate.tensor("v", v, tuple(k.shape), dtype=k.dtype, device=q.device)
    validate.divides("KV heads", k.shape[1], "heads", q.shape[1])
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1:  # with a stride in D no load can take 16 bytes at once
            raise ValueError(f"{name}: expected a contiguous last dimension, got stride {x.stride(-1)}")
