"""01.5: the mistakes that people make with a cache."""

import torch
from torch import Tensor

from kvlearn.grading.units.full_attention.cache import EXERCISE, KV

__all__ = ["EXERCISE"]


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
    """The length stays: the next prompt is written behind the old one, at wrong positions, and the old slots
    are attended to. Setting the length to 0 is all it takes."""

    def reset(self) -> None:
        pass


@EXERCISE.misconception("no check for a full cache")
class Unchecked(Right):
    """Nothing compares length + T with max_len. For several tokens torch complains about shapes, somewhere
    far from the cause; for a single one it does not even do that: a slice past the end is empty, and
    one token written to it vanishes in silence. Raise ValueError before writing."""

    def check(self, T: int) -> None:
        pass


@EXERCISE.misconception("a full cache one token too early")
class OneTooEarly(Right):
    """An append that fills the cache exactly is refused: the comparison is >= where it should be >. After the
    append the length may be equal to max_len."""

    def check(self, T: int) -> None:
        if self.length + T >= self.max_len:
            raise ValueError("the cache is full")


@EXERCISE.misconception("a refused append leaves its mark")
class AdvancedFirst(Right):
    """The length (or the content) had grown already when ValueError was raised, so the cache takes itself for
    full although the tokens never came in. Compare first, then write and advance."""

    def check(self, T: int) -> None:
        self.length += T
        if self.length > self.max_len:
            raise ValueError("the cache is full")
        self.length -= T


@EXERCISE.misconception("only the new tokens are returned")
class NewOnly(Right):
    """The tokens are written in their places, but what comes back are the ones just written. The new queries
    are to attend to the past too: return everything up to the length, `self.k[:, :, : self.length]`."""

    def append(self, k: Tensor, v: Tensor) -> KV:
        keys, values = super().append(k, v)
        return keys[:, :, -k.shape[2] :], values[:, :, -k.shape[2] :]


@EXERCISE.misconception("reset clears the content and keeps the pointer")
class OnlyCleared(Right):
    """The memory is filled with zeros but the length stays, so the next prompt is written behind slots of
    zeros, which are attended to. Setting the length to 0 is all it takes; what is old is written over."""

    def reset(self) -> None:
        self.k.zero_()
        self.v.zero_()


@EXERCISE.misconception("keys and values in one buffer")
class OneBuffer(Right):
    """Both names mean the same tensor (`self.k = self.v = …`), so the values are written over the keys and
    both come back equal. They are two projections of a token: two buffers."""

    def write(self, k: Tensor, v: Tensor) -> None:
        super().write(k, v)
        self.k, self.v = self.v, self.v


@EXERCISE.misconception("one state for all caches")
class Shared(Right):
    """Buffers and length belong to the class, so a second cache takes the place of the first. A model has a
    cache for each of its layers: keep the state on `self`, in `__init__`."""

    def __init__(
        self, batch: int, n_heads: int, max_len: int, head_dim: int, dtype: torch.dtype = torch.float32
    ):
        keys = torch.zeros(batch, n_heads, max_len, head_dim, dtype=dtype)
        Shared.k, Shared.v = keys, torch.zeros_like(keys)
        Shared.max_len, Shared.length = max_len, 0

    def advance(self, T: int) -> None:
        Shared.length = self.length + T

    def reset(self) -> None:
        Shared.length = 0
