"""The doors of the stages: what every launcher checks before it launches."""

from torch import Tensor

from kvlearn import validate


def check(q: Tensor, k: Tensor, v: Tensor, length: int | None = None, least: int = 1) -> None:
    """q (B, H, D) and k, v (B, G, S, D), H a multiple of G, D contiguous; ``least`` ≤ length ≤ S.

    A launcher whose lengths stand in a tensor leaves ``length`` out: to look at them would wait for the GPU,
    so its kernel masks instead. Raises ValueError or TypeError that names the argument.
    """
    batch, _, head_dim = validate.tensor("q", q, ("batch", "heads", "head dim")).shape
    validate.tensor("k", k, (batch, "KV heads", "slots", head_dim), device=q.device)
    check_heads(q, k, v)
    if length is not None:
        validate.at_least("length", length, least)
        validate.at_most("length", length, k.shape[2], "the cache's slots")


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What holds for a paged cache too: k and v alike, whole groups of query heads, D contiguous."""
    validate.tensor("v", v, tuple(k.shape), dtype=k.dtype, device=q.device)
    validate.divides("KV heads", k.shape[1], "heads", q.shape[1])
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1:  # a stride in D would cost every load its 16 bytes
            raise ValueError(f"{name}: expected a contiguous last dimension, got stride {x.stride(-1)}")
