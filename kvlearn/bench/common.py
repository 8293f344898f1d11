"""What benchmarks share: parts within a time, rows that are kept as they are measured, ratios, their table.

Two implementations are compared in one process, by turns, by the median of the ratios of neighbouring runs
(``kvlearn.measure.timing``): other programs then slow both.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kvlearn import validate
from kvlearn.bench import BENCHMARKS
from kvlearn.measure import results
from kvlearn.measure.bench import Row
from kvlearn.measure.results import Recorded
from kvlearn.measure.table import Table
from kvlearn.measure.timing import Comparison, Quartiles

Calls = Mapping[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Part:
    """A part of a benchmark: what ``--only`` selects, and what a failure costs."""

    name: str
    rows: Callable[[], Iterator[Row]]


@dataclass
class Recorder:
    """Keeps rows in FOLDER/NAME-MACHINE.json: the whole file is written again with every row.

    ``provenance`` is taken before the run. The file of an earlier run is replaced with the first row.
    """

    name: str
    command: str
    provenance: Mapping[str, Any]
    folder: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    path: Path | None = None

    def earlier(self) -> list[dict[str, Any]]:
        """Rows of the file that this run replaces, each with the provenance of its own run."""
        for recorded in results.load(self.name, self.folder):
            if recorded.provenance["machine"] == self.provenance["machine"]:
                return [{"provenance": recorded.provenance, **row} for row in recorded.rows]
        return []

    def add(self, row: Row) -> None:
        """Keep one more row."""
        self.rows.append(row.as_dict())
        self.path = results.save(self.name, self.command, self.rows, self.provenance, self.folder)


def run(
    name: str,
    device: torch.device | str = "cpu",
    *,
    small: bool = False,
    only: str = "",
    seconds: float = 0,
    recorder: Recorder | None = None,
) -> Iterator[Row]:
    """The rows of benchmark ``name`` as they are measured, each recorded before it is yielded.

    ``small`` takes sizes that need seconds in all, for tests. ``only`` selects the parts whose names contain
    it, ``seconds`` is the time after which no part is begun (0: the module's ``SECONDS``, or no end). Raises
    ValueError for an unknown name or part.

    A module with a function ``others(known, device, small, chosen)`` goes on where an earlier run ended:
    ``known`` are the recorded rows; ``others`` gives those to be kept as they are, ``parts`` takes ``known``
    and repeats what is finished.
    """
    validate.one_of("name", name, BENCHMARKS)
    module, device = import_module(f"kvlearn.bench.{name}"), torch.device(device)
    resumes = recorder is not None and hasattr(module, "others")  # it goes on where an earlier run ended
    known = recorder.earlier() if recorder is not None and resumes else []
    parts = module.parts(device, small, known) if resumes else module.parts(device, small)
    seconds = seconds or getattr(module, "SECONDS", 0)
    chosen = [part for part in parts if only in part.name]
    if not chosen:
        raise ValueError(f"only: expected part of {', '.join(part.name for part in parts)}; got {only!r}")
    if recorder is not None and resumes:
        recorder.rows += module.others(known, device, small, [part.name for part in chosen])
    for row in run_parts(chosen, seconds):
        if recorder is not None:
            recorder.add(row)
        yield row


def run_parts(
    parts: Iterable[Part], seconds: float = 0, now: Callable[[], float] = time.monotonic
) -> Iterator[Row]:
    """The rows of all parts in order. A part that has begun is finished.

    A part that raises, or is not reached in time, leaves a row that has a reason in place of a number.
    """
    end = now() + seconds if seconds else math.inf
    for part in parts:
        if now() >= end:
            yield missing(part.name, f"not reached within {seconds:g} s")
            continue
        try:
            yield from part.rows()
        except Exception as error:
            yield missing(part.name, f"{type(error).__name__}: {error}".split("\n")[0])


def missing(part: str, reason: str) -> Row:
    """A row that says why a part has no numbers, or no more."""
    return Row(part, math.nan, "x", details={"what": "missing", "part": part}, missing=reason)


def agree(calls: Calls, expected: Tensor) -> None:
    """Raise AssertionError that names a call whose result differs by 1e-4 of the largest ``expected``."""
    for name, call in calls.items():
        difference = float((call() - expected).abs().max() / expected.abs().max())
        if not difference <= 1e-4:  # NaN differs too
            raise AssertionError(
                f"{name}: expected the same output, got one that differs by {difference:.1e}"
            )


def time_row(
    compared: Comparison, title: str, name: str, details: Mapping[str, Any], bar: float | None = None
) -> Row:
    """Seconds per call of ``name``; ``bar`` is the most it may take."""
    took = compared.time(name)
    details = {**details, "who": name}
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
    details = {**details, "who": name, "base": base}
    return Row(f"{title}: {name} / {base}", ratio.median, "x", bar, relation, ratio, details)


def recorded_table(recorded: Recorded, *whats: str) -> Table:
    """Rows of a recorded benchmark with one of these ``what``, for a notebook, and those that are missing.

    Its caption names the file. Raises ValueError where there is no such row.
    """
    lines = []
    for row in recorded.rows:
        if row.get("what") not in (*whats, "missing"):
            continue
        spread = Quartiles(row["measured"], row["q1"], row["q3"], row["n"]) if "n" in row else None
        measured = math.nan if row["measured"] is None else row["measured"]
        case, bar, value, quartiles, verdict = Row(
            row["case"],
            measured,
            row["unit"],
            row["bar"],
            row["relation"] or ">=",
            spread,
            missing=row.get("missing", ""),
        ).texts()
        lines.append({"": case, "bar": bar, "measured": value, "quartiles": quartiles, "bar met": verdict})
    if not lines:
        known = sorted({row.get("what", "") for row in recorded.rows})
        raise ValueError(f"whats: expected some of {known}, got {whats}")
    return Table(lines, f"{recorded.path.name}, {recorded.provenance['date'][:10]}")
