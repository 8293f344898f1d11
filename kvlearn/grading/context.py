"""The context of a requirement: fresh inputs to draw, comparisons, and a record of all that was seen.

A comparison says the difference in words a learner can use, and never shows a whole tensor.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlearn.grading.calls import PLAIN, CallRecord, Raised, shorten

# Wide enough for any sound order of operations, computed in the dtype itself; narrow beside any mistake.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


# The notebook's names, while an exercise is checked that reads the answers to others; None: all are ours.
notebook_names: ContextVar[Mapping[str, Any] | None] = ContextVar("notebook_names", default=None)


class Difference(NamedTuple):
    """The expected and the actual value; ``what`` names the part, where an answer has several."""

    what: str
    expected: str
    came: str


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


Contradicts = Callable[[int, int, Observation | None], bool]
"""Whether a candidate in a diagnosis is ruled out by the i-th observation of a round (round, i, observation);
asked again at the end of the round, with None, where i is the number of observations."""


class Stop(Exception):
    """Nothing more can be learnt from this round; the faults have been noted."""


class Contradiction(Stop):
    """A candidate in a diagnosis gave a value that the answer did not give."""


class CheckContext:
    """One round of the ``rounds`` of a requirement: draws inputs, compares, and remembers what was seen.

    The same seed draws the same again.

    A comparison that fails does not end the round: the more is seen of a wrong answer, the surer its mistake
    can be named. In a diagnosis the first comparison that ``contradicts`` ends the round.
    """

    def __init__(
        self,
        seed: int,
        round: int,
        record: CallRecord,
        rounds: int = 1,
        contradicts: Contradicts | None = None,
    ) -> None:
        self.seed, self.round, self.rounds, self.record = seed, round, rounds, record
        self.contradicts, self.contradicted = contradicts, False
        self.observations: list[Observation] = []
        self.picks: Counter[str] = Counter()  # of this round, by what there was to pick from
        self.random = random.Random(f"{seed}/{round}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))

    @property
    def notebook(self) -> Mapping[str, Any] | None:
        """The names of the learner's notebook, for an exercise that reads the answers to others.

        None where there is no notebook and our solutions take the place of those answers.
        """
        return notebook_names.get()

    def sizes(self) -> Sizes:
        """Fresh sizes, no two of them equal, so that no confusion of dimensions goes unseen.

        T = 1 in the second round; more keys than queries in every round.
        """
        while True:
            T = 1 if self.round == 1 else self.integer(3, 6)
            B, H, D = map(self.random.choice, ((2, 3), (3, 5, 6, 7), (16, 20, 24)))
            sizes = Sizes(B, H, T, T + self.integer(3, 7), D)
            if len(set(sizes)) == len(sizes):
                return sizes

    def integer(self, least: int, most: int) -> int:
        """An integer, both ends included."""
        return self.random.randint(least, most)

    def pick(self, *options: Any) -> Any:
        """One of the options; over the rounds of a requirement each of them, in an order that is drawn.

        So what a score depends on does not depend on the draw. Where there are fewer rounds than options, the
        picks that a round makes from the same options share them: none comes twice before each came once.
        """
        key, n = repr(options), len(options)
        whole = -(-self.rounds // n) * n if self.rounds >= n else self.rounds
        block, place = divmod(self.picks[key] * whole + self.round, n)
        self.picks[key] += 1
        return random.Random(f"{self.seed}/{key}/{block}").sample(options, n)[place]

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

    def parts(self, got: Any, n: int, form: str) -> list[Any]:
        """The parts of an answer that returns ``n`` of them, ``form`` in words; or the end of this round."""
        if isinstance(got, tuple | list) and len(got) == n:
            return list(got)
        self.note(got, Difference("", form, describe(got)))
        raise Stop

    def text(self, got: Any, want: Any, what: str) -> bool:
        """``got`` is this name, or None."""
        return self.note(
            repr(got)[:80], None if got == want else Difference(what, repr(want), repr(got)[:80])
        )

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
        observation = Observation(value, difference, self.record.call)
        self.observations.append(observation)
        if self.contradicts and self.contradicts(self.round, len(self.observations) - 1, observation):
            self.contradicted = True
            raise Contradiction
        return difference is None


def compare(got: Any, want: Tensor, what: str = "", tolerance: float | None = None) -> Difference | None:
    """None where ``got`` is as good as ``want``. Never shows a whole tensor."""
    if not isinstance(got, Tensor):
        return Difference(what, f"a tensor of shape {tuple(want.shape)}", describe(got))
    if type(got) not in PLAIN:  # it would answer by itself to what is asked below
        return Difference(what, "a plain torch.Tensor", f"a {type(got).__name__}")
    if got.shape != want.shape:
        return Difference(what, f"shape {tuple(want.shape)}", f"shape {tuple(got.shape)}")
    if got.dtype != want.dtype:
        return Difference(what, f"dtype {dtype_name(want)}", f"dtype {dtype_name(got)}")
    return compare_values(got.detach(), want, what, tolerance)


def compare_values(got: Tensor, want: Tensor, what: str, tolerance: float | None) -> Difference | None:
    wrong = ~near(got, want, tolerance)
    n_wrong = int(wrong.sum())
    if n_wrong == 0:
        return None
    first = tuple(int(i) for i in wrong.nonzero()[0])
    at = f"at {list(first)}" if first else ""
    expected = f"{number(want[first])} {at}".strip()
    came = f"{number(got[first])} there" if first else number(got)
    share = f"{n_wrong} of {wrong.numel()} elements differ"
    if not got.dtype.is_floating_point:
        return Difference(what, expected, f"{came}; {share}")
    n_nan = int((got.isnan() & ~want.isnan()).sum())
    if n_nan:
        return Difference(what, expected, f"{came}; {n_nan} of {wrong.numel()} elements are NaN")
    gap = (got.double() - want.double()).abs().masked_fill(~wrong, 0.0)
    gap = gap.nan_to_num(torch.inf, posinf=torch.inf)
    worst = tuple(int(i) for i in (gap == gap.max()).nonzero()[0])  # unravel_index takes 0.3 s to import
    largest = f"the largest difference is {float(gap[worst]):.3g}" + (f" at {list(worst)}" if worst else "")
    return Difference(what, expected, f"{came}; {largest}; {share}")


def near(got: Tensor, want: Tensor, tolerance: float | None = None) -> Tensor:
    """Elementwise: equal within the tolerance of ``want``'s dtype (for integers and booleans: equal)."""
    if not (got.dtype.is_floating_point and want.dtype.is_floating_point):
        return got == want
    wide = TOLERANCE.get(want.dtype, 1e-4) if tolerance is None else tolerance
    return torch.isclose(got.double(), want.double(), rtol=wide, atol=wide)


def same(a: Any, b: Any) -> bool:
    """Two answers gave the same: tensors within tolerance, NaN where the other has NaN, whatever the
    dtype."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.shape == b.shape and a.dtype.is_floating_point == b.dtype.is_floating_point
        if not alike or a.is_complex() or b.is_complex():
            return False
        wide = max(TOLERANCE.get(t.dtype, 1e-4) for t in (a, b))
        return bool(torch.allclose(a.double(), b.double(), rtol=wide, atol=wide, equal_nan=True))
    return type(a) is type(b) and bool(a == b)


def describe(value: Any) -> str:
    """A value of any type in a few words."""
    if value is None:
        return "None (is a return missing?)"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {dtype_name(value)}"
    plain = plain_number(value)
    if plain is not None:
        return f"{plain:,}"
    if isinstance(value, bool):
        return str(value)
    kind = type(value)
    name = "numpy array" if kind.__module__ == "numpy" and kind.__name__ == "ndarray" else kind.__name__
    if isinstance(value, tuple | list):
        return f"a {name} of {len(value)} ({', '.join(type(part).__name__ for part in value[:4])})"
    return f"a {name}"


def plain_number(value: Any) -> int | float | None:
    """numpy's numbers, fractions and tensors of one number as Python's own; None for anything else."""
    if isinstance(value, Tensor) and value.ndim == 0 and value.dtype != torch.bool:
        value = value.detach().item() if value.device.type != "meta" else None
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def number(element: Tensor) -> str:
    value = element.item()
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
