"""One round of one requirement: draws fresh inputs, compares, and remembers all that was seen."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlearn.grading.compare import Difference, compare, describe, dtype_name, plain_number
from kvlearn.grading.guard import Raised, Record, shorten


class Sizes(NamedTuple):
    """Batch, heads, new tokens, tokens in all, head dim: T ≤ S, heads no power of two."""

    B: int
    H: int
    T: int
    S: int
    D: int


@dataclass(frozen=True)
class Observation:
    """Something the answer gave, and how it differs from what was expected, if it does."""

    value: Any
    difference: Difference | None
    call: str  # the last call of the answer before it


class Stop(Exception):
    """Nothing more can be learnt from this round; what is wrong has been noted."""


class CheckContext:
    """Draws and comparisons for one round; the same seed draws the same again.

    A comparison that fails does not end the round: the more is seen of a wrong answer, the surer its mistake
    can be named.
    """

    def __init__(self, seed: int, round: int, record: Record) -> None:
        self.round, self.record = round, record
        self.observations: list[Observation] = []
        self.random = random.Random(f"{seed}/{round}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))

    def sizes(self) -> Sizes:
        """Fresh sizes, no two of them equal, so that no confusion of dimensions goes unseen.

        T = 1 in the second round; more keys than queries in every round.
        """
        while True:
            T = 1 if self.round == 1 else self.integer(3, 6)
            B, H, D = self.pick(2, 3), self.pick(3, 5, 6, 7), self.pick(16, 20, 24)
            sizes = Sizes(B, H, T, T + self.integer(3, 7), D)
            if len(set(sizes)) == len(sizes):
                return sizes

    def integer(self, least: int, most: int) -> int:
        """An integer, both ends included."""
        return self.random.randint(least, most)

    def pick(self, *options: Any) -> Any:
        return self.random.choice(options)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype)

    def mask(self, *shape: int, share: float = 0.6) -> Tensor:
        """A boolean mask, True with probability ``share`` and at least once in every row, never
        everywhere."""
        mask = torch.rand(*shape, generator=self.generator) < share
        mask[..., 0], mask[..., -1] = True, False
        return mask.gather(-1, torch.rand(*shape, generator=self.generator).argsort(-1))

    def close(self, got: Any, want: Tensor, what: str = "", tolerance: float | None = None) -> bool:
        """``got`` has the shape, dtype and values of ``want``, within the tolerance of its dtype."""
        return self.note(got, compare(got, want, what, tolerance))

    def shape(self, got: Any, shape: tuple[int, ...], what: str = "") -> bool:
        """``got`` is a tensor of this shape, whatever it holds."""
        if isinstance(got, Tensor) and tuple(got.shape) == shape:
            return True
        return self.note(got, Difference(what, f"shape {shape}", describe(got)))

    def form(self, got: Any, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """``got`` is a tensor of this shape and dtype, whatever it holds."""
        if not self.shape(got, shape):
            return False
        want = dtype_name(torch.empty(0, dtype=dtype))
        good = got.dtype == dtype
        return self.note(got, None if good else Difference("", f"dtype {want}", f"dtype {dtype_name(got)}"))

    def number(self, got: Any, want: float, what: str) -> bool:
        """``got`` is this number, of whichever type: exactly for an integer, to nine digits otherwise."""
        plain = plain_number(got)
        if plain is None:
            return self.note(got, Difference(what, f"{want:,}", describe(got)))
        good = plain == want if isinstance(want, int) else abs(plain - want) <= 1e-9 * abs(want)
        return self.note(plain, None if good else Difference(what, f"{want:,}", describe(plain)))

    def true(self, good: bool, expected: str, came: str) -> bool:
        """A fact about the answer that holds or does not."""
        return self.note(came if not good else True, None if good else Difference("", expected, came))

    def raises(self, kind: type[Exception], call: Callable[[], Any], when: str) -> bool:
        """``call`` raises this kind of error."""
        try:
            call()
            raised, came = "nothing", "nothing was raised"
        except Raised as error:
            raised, came = type(error.error).__name__, error.what
            if isinstance(error.error, kind):
                return self.note(True, None)
        return self.note(raised, Difference("", f"a {kind.__name__} {when}", came))

    def unchanged(self) -> bool:
        """No call so far has changed a tensor it was handed."""
        return self.true(not self.record.changed, "inputs as they were before", "an input changed in place")

    def pair(self, got: Any, what: str) -> tuple[Tensor, Tensor]:
        """``got`` taken apart into two tensors, or the end of this round."""
        if isinstance(got, tuple | list) and len(got) == 2 and all(isinstance(part, Tensor) for part in got):
            return got[0], got[1]
        self.note(got, Difference("", what, describe(got)))
        raise Stop

    def note(self, value: Any, difference: Difference | None) -> bool:
        if isinstance(value, Tensor):
            value = value.detach().clone()
        elif not isinstance(value, bool | int | float | str):
            value = shorten(describe(value))
        self.observations.append(Observation(value, difference, self.record.call))
        return difference is None


Trial = CheckContext
