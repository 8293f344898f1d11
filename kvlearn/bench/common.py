"""Tools that benchmarks share: parts within a time, rows kept as they are measured, comparisons, growth.

One timing protocol: implementations are compared in one process, interleaved, by the median of the ratios of
neighbouring runs (``kvlearn.measure.timing``), so that whatever slows the machine slows all. Before anything
is timed, its result is compared with the expected one (``agree``).
"""

import gc
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from statistics import linear_regression
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kvlearn import validate
from kvlearn.bench import BENCHMARKS
from kvlearn.measure import results
from kvlearn.measure.memory import peak_memory
from kvlearn.measure.results import Recorded, Row
from kvlearn.measure.table import Table
from kvlearn.measure.timing import Comparison, Quartiles

Calls = Mapping[str, Callable[[], Tensor]]


# Parts


@dataclass
class Limit:
    """Seconds that several parts may take together, and what they have taken."""

    seconds: float
    spent: float = 0.0


@dataclass(frozen=True)
class Part:
    """A part of a benchmark: what ``--only`` selects, and what a failure costs.

    It is begun only while ``needs`` seconds are left, and while the parts that share its ``limit`` have not
    used it up. ``details`` go into every row of it, those that say what is missing included.
    """

    name: str
    rows: Callable[[], Iterator[Row]]
    needs: float = 0.0
    limit: Limit | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Part ``index`` of ``count`` is about to begin, ``elapsed`` seconds after the first."""

    name: str
    index: int
    count: int
    elapsed: float
    left: float | None  # an estimate, once a part is finished

    def __str__(self) -> str:
        left = "" if self.left is None else f", about {self.left:.0f} s left"
        return f"part {self.index} of {self.count}: {self.name} ({self.elapsed:.0f} s elapsed{left})"


class RowRecorder(Protocol):
    """The interface for keeping rows."""

    def add(self, row: Row) -> None:
        """Keep one more row."""
        ...


@dataclass
class Recorder:
    """Keeps rows in FOLDER/NAME-MACHINE.json: the whole file is written again with every row.

    ``provenance`` is taken before the run. The file of an earlier run is replaced with the first row. The
    rows of ``pending`` stay in it until this run gives them again, or gives other rows of their part: a run
    that is cut loses none of them.
    """

    name: str
    command: str
    provenance: Mapping[str, Any]
    folder: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    path: Path | None = None
    pending: list[dict[str, Any]] = field(default_factory=list)

    def earlier(self) -> list[dict[str, Any]]:
        """Rows of the file that this run replaces, each with the provenance of its own run."""
        for recorded in results.load(self.name, self.folder):
            if recorded.provenance["machine"] == self.provenance["machine"]:
                return [{"provenance": recorded.provenance, **row} for row in recorded.rows]
        return []

    def add(self, row: Row) -> None:
        """Keep one more row."""
        new = row.as_dict()
        self.rows.append(new)
        if new in self.pending:
            self.pending.remove(new)
        elif not row.reason:
            self.pending = [old for old in self.pending if old.get("part") != new.get("part")]
        rows = self.rows + self.pending
        self.path = results.save(self.name, self.command, rows, self.provenance, self.folder)


def run(
    name: str,
    device: torch.device | str = "cpu",
    *,
    small: bool = False,
    only: str = "",
    seconds: float = 0,
    recorder: RowRecorder | None = None,
    progress: Callable[[Progress], object] | None = None,
) -> Iterator[Row]:
    """The rows of benchmark ``name`` as they are measured, each recorded before it is yielded.

    ``small`` takes sizes that need seconds in all, for tests. ``only`` selects the parts whose names contain
    it, ``seconds`` is the time after which no part is begun (0: the module's ``SECONDS``, or no end),
    ``progress`` is told of each part that begins. Raises ValueError for an unknown name or part.

    A module with a function ``others(known, device, small, selected)`` goes on where an earlier run ended:
    ``known`` are the recorded rows; ``others`` gives those to be kept as they are, ``parts`` takes ``known``
    and repeats what is finished.
    """
    validate.one_of("name", name, BENCHMARKS)
    torch.manual_seed(0)
    module, device = import_module(f"kvlearn.bench.{name}"), torch.device(device)
    resumed = recorder if isinstance(recorder, Recorder) and hasattr(module, "others") else None
    known = resumed.earlier() if resumed is not None else []
    parts = module.parts(device, small, known) if resumed is not None else module.parts(device, small)
    selected = [part for part in parts if only in part.name]
    if not selected:
        raise ValueError(f"only: expected part of {', '.join(part.name for part in parts)}; got {only!r}")
    if resumed is not None:
        kept = module.others(known, device, small, [part.name for part in selected])
        resumed.rows += kept
        resumed.pending = [row for row in known if row.get("what") != "missing" and row not in kept]
    for row in run_parts(selected, seconds or getattr(module, "SECONDS", 0), progress=progress):
        if recorder is not None:
            recorder.add(row)
        yield row


def run_parts(
    parts: Iterable[Part],
    seconds: float = 0,
    now: Callable[[], float] = time.monotonic,
    *,
    progress: Callable[[Progress], object] | None = None,
    release: Callable[[], object] | None = None,
) -> Iterator[Row]:
    """The rows of all parts in order. A part that has begun is finished.

    A part that raises, or is not reached in time, leaves a row that has a reason in place of a number. After
    each part ``release`` (by default ``release_memory``) hands back what it allocated.
    """
    parts = list(parts)
    start = now()
    end = start + seconds if seconds else math.inf
    for index, part in enumerate(parts):
        begun = now()
        reason = not_begun(part, begun, end, seconds)
        if reason:
            yield missing(part, reason)
            continue
        if progress is not None:
            elapsed = begun - start
            estimate = min(elapsed / index * (len(parts) - index), end - begun) if index else None
            progress(Progress(part.name, index + 1, len(parts), elapsed, estimate))
        try:
            for row in part.rows():
                yield replace(row, details={**row.details, **part.details}) if part.details else row
        except Exception as error:
            yield missing(part, in_short(error))
        try:
            (release or release_memory)()
        except Exception as error:  # a device that is lost says so at the next call, whichever it is
            yield missing(part, f"after it: {in_short(error)}")
        if part.limit is not None:
            part.limit.spent += now() - begun


def not_begun(part: Part, at: float, end: float, seconds: float) -> str:
    """Why a part is not begun at this time; empty where it is."""
    if end < math.inf and end - at <= part.needs:
        return f"not reached within {seconds:g} s"
    if part.limit is not None and part.limit.seconds - part.limit.spent <= part.needs:
        return f"not reached within the {part.limit.seconds:g} s of its group"
    return ""


def missing(part: Part, reason: str) -> Row:
    """A row that says why a part has no numbers, or no more."""
    details = {"what": "missing", "part": part.name, **part.details}
    return Row(part.name, math.nan, "x", details=details, missing=reason)


@contextmanager
def ended_by(seconds: float, on_end: Callable[[], object]) -> Iterator[None]:
    """End the process, exit status 124, if the block still runs after ``seconds``; 0 lets it run.

    A kernel that hangs cannot be interrupted from Python. ``on_end`` is called first, by another thread.
    """

    def end() -> None:
        try:
            on_end()
        finally:
            os._exit(124)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    if seconds:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def in_short(error: Exception) -> str:
    """The kind of an error and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def release_memory() -> None:
    """Hand back what a part allocated."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Comparisons


def agree(calls: Calls, expected: Tensor, *, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    """Raise AssertionError, which names the call, unless all calls give ``expected``.

    |result − expected| ≤ atol + rtol · |expected| for every element; NaN differs.
    """
    for name, call in calls.items():
        result = call()
        try:
            torch.testing.assert_close(result, expected.to(result.dtype), rtol=rtol, atol=atol)
        except AssertionError as error:
            raise AssertionError(f"{name}: expected the same output. {error}") from None


def time_row(
    compared: Comparison, title: str, name: str, details: Mapping[str, Any], bar: float | None = None
) -> Row:
    """Seconds per call of ``name``; ``bar`` is the most it may take."""
    took = compared.time(name)
    details = {"who": name, **details}
    return Row(f"{title}: {name}", took.median, "s", bar, "<=", took, details)


def ratio_row(
    compared: Comparison,
    title: str,
    name: str,
    base: str,
    details: Mapping[str, Any],
    bar: float | None = None,
    relation: Literal[">=", "<="] = ">=",
) -> Row:
    """How many times as long ``name`` takes as ``base``, round by round."""
    ratio = compared.ratio(name, base)
    details = {"who": name, "base": base, **details}
    return Row(f"{title}: {name} / {base}", ratio.median, "x", bar, relation, ratio, details)


# Growth with the length


@dataclass(frozen=True)
class Bars:
    """The most that the exponents of time and of memory may be; None: nothing to pass."""

    time: float | None = None
    memory: float | None = None


def label(name: str, n: int) -> str:
    """The name that a comparison gives to ``name`` at ``n`` tokens."""
    return f"{name}, {n} tokens"


def by_label(calls: Mapping[str, Mapping[int, Callable[[], Tensor]]]) -> dict[str, Callable[[], Tensor]]:
    """Calls by name and length as one mapping, for a comparison of all."""
    return {label(name, n): call for name, of in calls.items() for n, call in of.items()}


def growth_rows(
    part: str,
    calls: Mapping[str, Mapping[int, Callable[[], Tensor]]],
    compared: Comparison,
    device: torch.device,
    *,
    bars: Mapping[str, Bars],
    details: Callable[..., dict[str, Any]],
    least: int = 1,
) -> Iterator[Row]:
    """Time and extra memory of every name at every length, and how both grow from ``least`` tokens on.

    An exponent is the slope of log(time) over log(N), fitted round by round; memory is counted exactly and
    fitted once. ``details(what, name, length, **more)`` gives what a plot finds a row by.
    """
    for name, of in calls.items():
        bar, peaks = bars.get(name, Bars()), {n: peak_memory(call, device) for n, call in of.items()}
        for n in of:
            yield time_row(compared, part, label(name, n), details(f"{part}_time", name, n))
        for n, peak in peaks.items():
            found = details(f"{part}_memory", name, n)
            yield Row(f"{part}, extra memory: {label(name, n)}", peak, "B", details=found)
        times = {n: compared.rounds[label(name, n)] for n in of}
        n_rounds = len(next(iter(times.values())))
        slopes = [exponent({n: of_n[i] for n, of_n in times.items()}, least) for i in range(n_rounds)]
        spread, fitted = Quartiles.of(slopes), {"fitted": [n for n in of if n >= least]}
        found = details(f"{part}_time_exponent", name, max(of), **fitted)
        title = f"{part}, {name}: time as a power of N"
        yield Row(title, spread.median, "power", bar.time, "<=", spread, found)
        found = details(f"{part}_memory_exponent", name, max(of), **fitted)
        title = f"{part}, {name}: extra memory as a power of N"
        yield Row(title, exponent(peaks, least), "power", bar.memory, "<=", details=found)


def exponent(amounts: Mapping[int, float], least: int = 1) -> float:
    """p of the power of N that fits best, by least squares of logarithms, from ``least`` tokens on."""
    points = [(math.log(n), math.log(amount)) for n, amount in amounts.items() if n >= least]
    return linear_regression(*zip(*points, strict=True)).slope


# Recorded rows


def recorded_table(recorded: Recorded, *whats: str) -> Table:
    """Rows of a recorded benchmark for a notebook: all, or those with one of these ``what``.

    Rows that are missing are shown with their reason. The caption names the file. Raises ValueError where
    there is no such row.
    """
    lines = []
    for row in recorded.rows:
        if whats and row.get("what") not in (*whats, "missing"):
            continue
        case, bar, value, quartiles, verdict = Row.of(row).texts()
        lines.append({"": case, "bar": bar, "measured": value, "quartiles": quartiles, "bar met": verdict})
    if not lines:
        known = sorted({row.get("what", "") for row in recorded.rows})
        raise ValueError(f"whats: expected some of {known}, got {whats}")
    return Table(lines, f"{recorded.path.name}, {recorded.provenance['date'][:10]}")
