"""Time: medians and quartiles by torch.utils.benchmark, and fair comparisons on noisy machines.

Machines share their cores, clocks move, caches warm up. So a time is a median with its quartiles, and two
things are compared interleaved, within one process, by the median of the ratios of neighbouring runs.
On CUDA the timer waits for the device before and after.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.timer import timer

from kvlearn import validate


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of ``n`` measured values."""

    median: float
    q1: float
    q3: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        """Of a sequence of at least one value; between two values the quartiles interpolate linearly."""
        if not validate.instance("values", values, (list, tuple)):
            raise ValueError("values: expected at least one number, got none")
        for value in values:
            validate.finite("values", value)
        q1, median, q3 = torch.tensor(values, dtype=torch.float64).quantile(
            torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        )
        return cls(float(median), float(q1), float(q3), len(values))

    def scaled(self, factor: float) -> "Quartiles":
        """All three times a positive factor: a ratio of times becomes a ratio of rates."""
        validate.above("factor", factor, 0)
        return Quartiles(self.median * factor, self.q1 * factor, self.q3 * factor, self.n)


@dataclass(frozen=True)
class Comparison:
    """Seconds per call, one value per round; all names were measured in every round."""

    rounds: Mapping[str, tuple[float, ...]]

    def time(self, name: str) -> Quartiles:
        """Seconds per call."""
        return Quartiles.of(self.rounds[validate.one_of("name", name, list(self.rounds))])

    def ratio(self, name: str, base: str) -> Quartiles:
        """How many times as long ``name`` takes as ``base``, round by round."""
        for given in (name, base):
            validate.one_of("name", given, list(self.rounds))
        return Quartiles.of([a / b for a, b in zip(self.rounds[name], self.rounds[base], strict=True)])


def measure_time(fn: Callable[[], object], *, min_run_time: float = 0.2) -> Quartiles:
    """Seconds that one call of ``fn`` takes, from blocks of calls that fill ``min_run_time`` seconds."""
    validate.function("fn", fn)
    validate.above("min_run_time", min_run_time, 0)
    # Timer would use one thread; a measurement uses what the program uses.
    clock = Timer(stmt="fn()", globals={"fn": fn}, num_threads=torch.get_num_threads())
    return Quartiles.of(clock.blocked_autorange(min_run_time=min_run_time).times)


def compare(
    fns: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 9,
    min_block_time: float = 0.01,
    calls: int | None = None,
) -> Comparison:
    """Times several functions, interleaved.

    In each round every function runs once, or as often as fills ``min_block_time`` seconds; with ``calls``
    all run that often, after one call to warm up, as functions need whose calls change what they work on.
    The order turns from round to round, so that none always runs behind the same other.
    """
    rounds = validate.positive("rounds", rounds)
    if not validate.instance("fns", fns, Mapping):
        raise ValueError("fns: expected at least one function, got none")
    for fn in fns.values():
        validate.function("fns", fn)
    if validate.finite("min_block_time", min_block_time) < 0:
        raise ValueError(f"min_block_time: expected at least 0, got {min_block_time}")
    if calls is not None:
        calls = validate.positive("calls", calls)
    times = {}
    for name, fn in fns.items():
        fn()  # warm up: the first call may compile, allocate and fill caches
        times[name] = calls or max(1, math.ceil(min_block_time / max(_seconds(fn, 1), 1e-9)))
    return interleaved({name: partial(_seconds, fns[name], times[name]) for name in fns}, rounds)


def interleaved(clocks: Mapping[str, Callable[[], float]], rounds: int) -> Comparison:
    """Reads every clock (seconds per call, measured anew) once per round; the order rotates."""
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    names = list(clocks)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(clocks[name]())
    return Comparison({name: tuple(values) for name, values in seconds.items()})


def _seconds(fn: Callable[[], object], calls: int) -> float:
    """Seconds per call. (Timer.timeit would call three times where one call is asked for.)"""
    start = timer()  # waits for the GPU where there is one
    for _ in range(calls):
        fn()
    return (timer() - start) / calls
