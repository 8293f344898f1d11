"""How time and memory grow with the length: rows at every length, and the exponents that fit them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import log
from statistics import linear_regression
from typing import Any

import torch
from torch import Tensor

from kvlearn.measure.memory import peak_memory
from kvlearn.measure.results import Row
from kvlearn.measure.shared_bench.rows import time_row
from kvlearn.measure.timing import Comparison, Quartiles

Core = Callable[[], Tensor]


@dataclass(frozen=True)
class Bars:
    """The most that the exponents of time and of memory may be; None: nothing to pass."""

    time: float | None = None
    memory: float | None = None


def label(name: str, n: int) -> str:
    """What a comparison calls ``name`` at ``n`` tokens."""
    return f"{name}, {n} tokens"


def by_label(calls: Mapping[str, Mapping[int, Core]]) -> dict[str, Core]:
    """All calls in one, for a comparison by turns."""
    return {label(name, n): call for name, of in calls.items() for n, call in of.items()}


def growth_rows(
    part: str,
    calls: Mapping[str, Mapping[int, Core]],
    by_turns: Comparison,
    device: torch.device,
    *,
    bars: Mapping[str, Bars],
    details: Callable[..., dict[str, Any]],
    least: int = 1,
) -> Iterator[Row]:
    """Time and extra memory of every name at every length, and how both grow from ``least`` tokens on.

    ``details(what, name, length, **more)`` gives what a plot finds a row by.
    """
    for name, of in calls.items():
        bar, peaks = bars.get(name, Bars()), {n: peak_memory(call, device) for n, call in of.items()}
        for n in of:
            yield time_row(by_turns, part, label(name, n), details(f"{part}_time", name, n))
        for n, peak in peaks.items():
            found = details(f"{part}_memory", name, n)
            yield Row(f"{part}, extra memory: {label(name, n)}", peak, "B", details=found)
        times = {n: by_turns.rounds[label(name, n)] for n in of}
        turns = range(len(next(iter(times.values()))))
        rounds = [exponent({n: of_n[turn] for n, of_n in times.items()}, least) for turn in turns]
        spread, fitted = Quartiles.of(rounds), {"fitted": [n for n in of if n >= least]}
        found = details(f"{part}_time_exponent", name, max(of), **fitted)
        title = f"{part}, {name}: time as a power of N"
        yield Row(title, spread.median, "power", bar.time, "<=", spread, found)
        found = details(f"{part}_memory_exponent", name, max(of), **fitted)
        title = f"{part}, {name}: extra memory as a power of N"
        yield Row(title, exponent(peaks, least), "power", bar.memory, "<=", details=found)


def exponent(amounts: Mapping[int, float], least: int = 1) -> float:
    """p of the power of N that fits best, by least squares of logarithms, from ``least`` tokens on."""
    points = [(log(n), log(amount)) for n, amount in amounts.items() if n >= least]
    return linear_regression(*zip(*points, strict=True)).slope
