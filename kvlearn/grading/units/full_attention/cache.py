"""01.5: the preallocated KV cache, held against a list of all that was written."""

from typing import Any

import torch
from torch import Tensor

from kvlearn.grading.compare import Difference
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.guard import Raised
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
    id="01.5",
    slug="cache",
    title="A KV cache that never copies",
    answers=("KVCache",),
    hints=(
        "Two buffers of shape (batch, n_heads, max_len, head_dim) and one integer, the length: that is all.",
        "T new tokens go to the slots length … length + T − 1 of dimension 2, and the length grows by T "
        "= `k.shape[2]`, not by 1.",
        "Return `self.k[:, :, : self.length]`: slicing makes a view, which costs nothing. `torch.cat` "
        "or `.clone()` would copy the whole past at every step.",
        "Check `length + T > max_len` *before* you write, and raise ValueError: a slice that reaches "
        "past the end is cut short without an error, and a single token would vanish in silence.",
    ),
)

KV = tuple[Tensor, Tensor]


def draw(t: Trial, *lengths: int, dtype: torch.dtype = torch.float32) -> tuple[list[KV], tuple[int, ...]]:
    """New keys and values for these numbers of tokens, and (batch, heads, head dim)."""
    B, H, _, _, D = t.sizes()
    return [(t.randn(B, H, T, D, dtype=dtype), t.randn(B, H, T, D, dtype=dtype)) for T in lengths], (B, H, D)


def same_as(t: Trial, got: object, written: list[KV]) -> None:
    """The answer's keys and values are all that was written, in order."""
    keys, values = t.pair(got, "append returns (keys, values)")
    t.close(keys, torch.cat([k for k, _ in written], dim=2), "keys:")
    t.close(values, torch.cat([v for _, v in written], dim=2), "values:")


@EXERCISE.requirement(1, "the first append")
def first(t: Trial, KVCache: Answer) -> None:
    """the keys and values just written, no empty slots behind them, in the cache's dtype"""
    dtype = t.pick(torch.float32, torch.bfloat16)
    new, (B, H, D) = draw(t, t.integer(3, 6), dtype=dtype)
    cache = KVCache(B, H, t.integer(8, 12), D, dtype)
    same_as(t, cache.append(*new[0]), new)


@EXERCISE.requirement(2, "prefill, chunks and single tokens")
def growing(t: Trial, KVCache: Answer) -> None:
    """after each append all keys and values so far, in order; two caches at a time do not mix"""
    new, (B, H, D) = draw(t, t.integer(3, 5), 1, 1, t.integer(2, 4), 1)
    cache, other = (KVCache(B, H, 16, D, torch.float32) for _ in range(2))
    for i, (k, v) in enumerate(new):
        same_as(t, cache.append(k, v), new[: i + 1])
        if i == 1:
            same_as(t, other.append(v, k), [(v, k)])


@EXERCISE.requirement(1, "memory allocated once")
def allocated_once(t: Trial, KVCache: Answer) -> None:
    """every append returns views of the same memory, which has room for max_len tokens from the start"""
    new, (B, H, D) = draw(t, t.integer(2, 4), 1, 2)
    cache = KVCache(B, H, 12, D, torch.float32)
    kept = [t.pair(cache.append(k, v), "append returns (keys, values)") for k, v in new]
    for part in (0, 1):
        places = {pair[part].untyped_storage().data_ptr() for pair in kept}
        t.true(len(places) == 1, "a view of the same memory each time", "new memory at each append")
    room = kept[0][0].untyped_storage().nbytes()
    t.true(room >= B * H * 12 * D * 4, "memory for max_len tokens at once", "memory for fewer tokens")


@EXERCISE.requirement(1, "a full cache")
def full(t: Trial, KVCache: Answer) -> None:
    """room for exactly max_len tokens; then ValueError, for one token and for several, and nothing is lost"""
    new, (B, H, D) = draw(t, t.integer(3, 6), 2, 1, 3)
    max_len = new[0][0].shape[2] + 2
    cache = KVCache(B, H, max_len, D, torch.float32)
    cache.append(*new[0])
    if fits(t, cache, new[:2], f"{max_len} of {max_len} slots used, all appends in order"):
        t.raises(ValueError, lambda: cache.append(*new[2]), "when one token meets a full cache")
    cache = KVCache(B, H, max_len, D, torch.float32)
    cache.append(*new[0])
    if t.raises(ValueError, lambda: cache.append(*new[3]), "when three tokens meet two free slots"):
        fits(t, cache, new[:2], "two tokens for two free slots, after an append that was refused")


def fits(t: Trial, cache: Any, written: list[KV], when: str) -> bool:
    """The last of ``written`` is taken, and all of it comes back."""
    try:
        got = cache.append(*written[-1])
    except Raised as raised:
        if not isinstance(raised.error, ValueError):
            raise
        came = f"a ValueError although the tokens fit: {when}"
        return t.note(f"refused: {when}", Difference("", "all tokens so far", came))
    same_as(t, got, written)
    return True


@EXERCISE.requirement(1, "reset")
def reset(t: Trial, KVCache: Answer) -> None:
    """an empty cache: the next append starts over at slot 0"""
    new, (B, H, D) = draw(t, t.integer(3, 6), 2, 1)
    cache = KVCache(B, H, 9, D, torch.float32)
    cache.append(*new[0])
    cache.reset()
    same_as(t, cache.append(*new[1]), new[1:2])
    same_as(t, cache.append(*new[2]), new[1:])
