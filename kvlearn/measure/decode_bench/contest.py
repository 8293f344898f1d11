"""One case, several implementations: each is checked against fp64, then all are timed interleaved."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvlearn.measure.decode_bench.bench import SHARE, Bench
from kvlearn.measure.decode_bench.cells import Cell
from kvlearn.measure.decode_bench.clocks import Measured, time_by_turns
from kvlearn.measure.decode_bench.exact import TOLERANCE, error
from kvlearn.measure.decode_bench.inputs import Inputs
from kvlearn.measure.decode_bench.rivals import Unable
from kvlearn.measure.results import Row
from kvlearn.measure.timing import Comparison
from kvlearn.measure.units import format_bytes_decimal

COLD = 5  # times the L2 that the inputs of one graph must exceed
MOST_COPIES = 640

Prepare = Callable[[Cell, Inputs], Callable[[], Tensor]]


@dataclass(frozen=True)
class Entry:
    """Who takes part: in which cell, and how a call is made of its inputs."""

    cell: Cell
    prepare: Prepare
    tolerance: float = TOLERANCE


@dataclass
class Outcome:
    """What came of it. ``notes``: who could not take part, and why; ``errors``: against fp64, by name."""

    entries: Mapping[str, Entry]
    comparison: Comparison
    copies: Mapping[str, int]
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    calls: dict[str, Callable[[], Tensor]] = field(default_factory=dict)

    def time_row(self, name: str, title: str = "", **extra: Any) -> Row:
        """Seconds a call in a CUDA graph with a cold L2; ``extra`` are a bar, or details."""
        cell, time = self.entries[name].cell, self.comparison.time(name)
        bar = {key: extra.pop(key) for key in ("bar", "relation") if key in extra}
        details = {
            **cell.details,
            "what": "time",
            "stage": name,
            "how": "graph",
            "bandwidth": cell.nbytes / time.median,
            "rate": cell.flops / time.median,
            "error": self.errors[name],
            "copies": self.copies[name],
            **extra,
        }
        return Row(f"{cell.name}: {title or name}", time.median, "s", spread=time, details=details, **bar)

    def ratio_row(self, name: str, base: str, *, of: str = "", **bar: Any) -> Row:
        """How many times as long ``name`` takes as ``base``, by turns; ``of`` which of them (``base``)."""
        cell, ratio = self.entries[of or base].cell, self.comparison.ratio(name, base)
        details = {**cell.details, "what": "ratio", "stage": base, "against": name}
        return Row(f"{cell.name}: {name} / {base}", ratio.median, "x", spread=ratio, details=details, **bar)

    def note_rows(self) -> Iterator[Row]:
        """Who did not take part in a cell, and why."""
        alike: dict[tuple[Cell, str], list[str]] = {}
        for name, why in self.notes.items():
            alike.setdefault((self.entries[name].cell, why), []).append(name)
        for (cell, why), names in alike.items():
            yield note(f"{cell.name}: {', '.join(names)}: {why}", **cell.details, names=names, why=why)


def compete(bench: Bench, entries: Mapping[str, Entry]) -> Outcome:
    """Checks and times the entries; those in the same cell get the very same inputs."""
    inputs: dict[Cell, list[Inputs]] = {}
    outcome = Outcome(entries, Comparison({}), {})
    measured: dict[str, Measured] = {}
    copies = {}
    for name, entry in entries.items():
        try:
            if entry.cell not in inputs:
                if not bench.fits(entry.cell):
                    raise Unable(too_large(entry.cell))
                count = bench.arena.copies(entry.cell, COLD * bench.l2, MOST_COPIES)
                inputs[entry.cell] = bench.arena.inputs(entry.cell, count)
            given = inputs[entry.cell]
            calls = [entry.prepare(entry.cell, x) for x in given]
            outcome.errors[name] = error(entry.cell, given[0], calls[0]())
            if not outcome.errors[name] <= entry.tolerance:
                raise ArithmeticError(
                    f"wrong by {outcome.errors[name]:.2g}, expected at most {entry.tolerance}"
                )
            copies[name], outcome.calls[name] = len(calls), calls[0]
            measured[name] = bench.clock.prepare(calls)
        except Unable as why:
            outcome.notes[name] = str(why)
        except Exception as problem:
            outcome.notes[name] = in_short(problem)
            bench.failures.append(f"{entry.cell.name}: {name}")
    outcome.copies = copies
    outcome.comparison = time_by_turns(measured) if measured else Comparison({})
    return outcome


def too_large(cell: Cell) -> str:
    """Why a cell is skipped."""
    return f"skipped, a cache of {format_bytes_decimal(cell.stored)} is above {SHARE:.0%} of the memory"


def note(text: str, **details: Any) -> Row:
    """Something that did not happen, as a row: nothing is silently missing."""
    return Row(text, 0, "measured", details={"what": "note", **details})


def in_short(problem: Exception) -> str:
    """The kind of an error and the first line that says something."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0][:160]}" if lines else type(problem).__name__
