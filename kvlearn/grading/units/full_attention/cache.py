"""01.5: the preallocated KV cache, held against a list of all that was written."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
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
    """after each append all keys and values so far, in order"""
    new, (B, H, D) = draw(t, t.integer(3, 5), 1, 1, t.integer(2, 4), 1)
    cache = KVCache(B, H, 16, D)
    for i, (k, v) in enumerate(new):
        same_as(t, cache.append(k, v), new[: i + 1])


@EXERCISE.requirement(1, "memory allocated once")
def allocated_once(t: Trial, KVCache: Answer) -> None:
    """every append returns views of the same memory, which has room for max_len tokens from the start"""
    new, (B, H, D) = draw(t, t.integer(2, 4), 1, 2)
    cache = KVCache(B, H, 12, D)
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
    cache = KVCache(B, H, max_len, D)
    cache.append(*new[0])
    t.raises(ValueError, lambda: cache.append(*new[3]), "when three tokens meet two free slots")
    same_as(t, cache.append(*new[1]), new[:2])
    t.raises(ValueError, lambda: cache.append(*new[2]), "when one token meets a full cache")


@EXERCISE.requirement(1, "reset")
def reset(t: Trial, KVCache: Answer) -> None:
    """an empty cache: the next append starts over at slot 0"""
    new, (B, H, D) = draw(t, t.integer(3, 6), 2, 1)
    cache = KVCache(B, H, 9, D)
    cache.append(*new[0])
    cache.reset()
    same_as(t, cache.append(*new[1]), new[1:2])
    same_as(t, cache.append(*new[2]), new[1:])


class Right:
    """The right cache; each wrong one below changes one thing in it."""

    def __init__(
        self, batch: int, n_heads: int, max_len: int, head_dim: int, dtype: torch.dtype = torch.float32
    ):
        self.k = torch.zeros(batch, n_heads, max_len, head_dim, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.max_len, self.length = max_len, 0

    def append(self, k: Tensor, v: Tensor) -> KV:
        self.check(k.shape[2])
        self.write(k, v)
        self.advance(k.shape[2])
        return self.read()

    def check(self, T: int) -> None:
        if self.length + T > self.max_len:
            raise ValueError(f"the cache is full: {self.length} + {T} > {self.max_len}")

    def write(self, k: Tensor, v: Tensor) -> None:
        slots = slice(self.length, self.length + k.shape[2])
        self.k[:, :, slots], self.v[:, :, slots] = k, v

    def advance(self, T: int) -> None:
        self.length += T

    def read(self) -> KV:
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    def reset(self) -> None:
        self.length = 0


@EXERCISE.misconception("the pointer is not advanced")
class NotAdvanced(Right):
    """The length stays where it was, so every append writes over the one before. In decode the model then
    sees its newest token and nothing else."""

    def append(self, k: Tensor, v: Tensor) -> KV:
        self.check(k.shape[2])
        self.write(k, v)
        return self.k[:, :, : self.length + k.shape[2]], self.v[:, :, : self.length + k.shape[2]]


@EXERCISE.misconception("the pointer is advanced by one, whatever T is")
class AdvancedByOne(Right):
    """The length grows by 1 for T tokens. That is right in decode and wrong in prefill: all but the first of
    the prompt's tokens are lost or written over. Advance by k.shape[2]."""

    def advance(self, T: int) -> None:
        self.length += 1


@EXERCISE.misconception("a new tensor at every step: torch.cat, or a copy of the buffer")
class Concatenated(Right):
    """The values are right and the cost is not: each step allocates new memory and copies the whole past,
    so generating N tokens moves N² of them, and at the moment of copying the cache exists twice.
    Allocate max_len slots once, write into them, and return a slice, which is a view."""

    def read(self) -> KV:
        k, v = super().read()
        return k.clone(), v.clone()


@EXERCISE.misconception("the whole buffer is returned")
class WholeBuffer(Right):
    """All max_len slots come back, the unwritten ones too. Zeros are no neutral keys: they score 0, and the
    softmax gives them weight. Return the slots up to the length."""

    def read(self) -> KV:
        return self.k, self.v


@EXERCISE.misconception("reset leaves the pointer where it was")
class NotReset(Right):
    """The content is cleared, or nothing at all, but the length stays: the next prompt is written behind
    the old one, at wrong positions, and the old slots are attended to. Setting the length to 0 is all
    it takes."""

    def reset(self) -> None:
        self.k.zero_()
        self.v.zero_()


@EXERCISE.misconception("no check for a full cache")
class Unchecked(Right):
    """Nothing compares length + T with max_len. For several tokens torch complains about shapes, somewhere
    far from the cause; for a single one it does not even do that: a slice past the end is empty, and
    one token written to it vanishes in silence. Raise ValueError before writing."""

    def check(self, T: int) -> None:
        pass
