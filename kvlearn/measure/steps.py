"""Steps of decode that can be repeated, for timing."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvlearn.attention import Cache, Mechanism


def next_token(layer: Mechanism, x: Tensor, cache: Cache) -> Callable[[], Tensor]:
    """A step that can be repeated: the cache is put back to where it was before ``x``."""
    length = cache.length

    def step() -> Tensor:
        cache.length = length
        return layer(x, cache)

    return step


def filled_cache(layer: Mechanism, batch: int, length: int) -> Cache:
    """A cache for ``length`` tokens, full of random numbers, with room for the last token."""
    cache = layer.new_cache(batch=batch, max_len=length)
    for buffer in cache.tensors():
        buffer.normal_()
    cache.length = length - 1
    return cache


def last_token(layer: Mechanism, batch: int, length: int) -> Callable[[], Tensor]:
    """The step that completes a cache of ``length`` random tokens."""
    x = torch.randn(batch, 1, layer.d_model, device=layer.dtype_and_device()[1])
    return next_token(layer, x, filled_cache(layer, batch, length))
