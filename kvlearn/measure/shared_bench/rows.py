"""What the parts of the benchmark have in common."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvlearn.measure.results import Row
from kvlearn.measure.timing import Comparison

Calls = Mapping[str, Callable[[], Tensor]]


def agree(calls: Calls, expected: Tensor) -> None:
    """Raise AssertionError, with the name, unless all calls give ``expected``."""
    for name, call in calls.items():
        result = call()
        try:
            torch.testing.assert_close(result, expected.to(result.dtype), rtol=1e-3, atol=1e-4)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def time_row(
    by_turns: Comparison, title: str, name: str, details: Mapping[str, Any], bar: float | None = None
) -> Row:
    """Seconds a call of ``name``, of which ``bar`` is the most."""
    time = by_turns.time(name)
    return Row(f"{title}: {name}", time.median, "s", bar, "<=", time, details)


def ratio_row(
    by_turns: Comparison,
    title: str,
    name: str,
    base: str,
    details: Mapping[str, Any],
    bar: float | None = None,
) -> Row:
    """How many times as long ``name`` takes as ``base``, round by round, of which ``bar`` is the least."""
    ratio = by_turns.ratio(name, base)
    return Row(f"{title}: {name} / {base}", ratio.median, "x", bar=bar, spread=ratio, details=details)
