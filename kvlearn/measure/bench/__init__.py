"""``kvlearn bench NAME``: every benchmark here is a module of this package with a function ``run(device)``.

It yields rows, each a measured number and, where there is one, its bar. New benchmarks go to kvlearn/bench.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import torch

from kvlearn import validate
from kvlearn.measure.results import Recorded
from kvlearn.measure.table import Table
from kvlearn.measure.timing import Quartiles
from kvlearn.measure.units import format_bytes, format_rate, format_seconds

BENCHMARKS = {
    "full": "full attention: what the cache saves, and how close decode and prefill come to the roofline",
    "shared": "shared and compressed heads: bytes stored and read, decode by both paths, converting a model",
    "window": "windows and patterns: how time and memory grow with the text, steps of decode, bytes",
    "linear": "states in place of caches: exponents, steps, bytes, 100K tokens of decode, others' Mamba",
    "decode": "the decode kernel against the floor, torch and its own stages; its PyTorch form on a CPU",
    "decode_tune": "tilings and splits of the decode kernel: the best beside the present (needs a GPU)",
}


@dataclass(frozen=True)
class Row:
    """One measured number in SI units (s, B, B/s, FLOP/s, FLOP/B, tokens/s; x for a ratio), and its bar.

    ``bar`` None: measured for the record, nothing to pass. ``spread``: the quartiles behind a median.
    ``details``: what a plot needs to find the row again (length, batch, …). ``missing``: why there is no
    number; a row that measured NaN or infinity has none either.
    """

    case: str
    measured: float
    unit: str
    bar: float | None = None
    relation: Literal[">=", "<=", "=="] = ">="
    spread: Quartiles | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    missing: str = ""

    @property
    def reason(self) -> str:
        """Why there is no number; empty where there is one."""
        return self.missing or ("" if math.isfinite(self.measured) else f"measured {self.measured}")

    @property
    def passed(self) -> bool | None:
        """Whether the bar is met; None where there is no bar, or no number."""
        if self.bar is None or self.reason:
            return None
        return {
            ">=": self.measured >= self.bar,
            "<=": self.measured <= self.bar,
            "==": self.measured == self.bar,
        }[self.relation]

    def as_dict(self) -> dict[str, Any]:
        """As results/ keeps it."""
        row: dict[str, Any] = {
            "case": self.case,
            "measured": None if self.reason else self.measured,
            "unit": self.unit,
            "bar": self.bar,
            "relation": None if self.bar is None else self.relation,
            "pass": self.passed,
            **self.details,
        }
        if self.reason:
            return row | {"missing": self.reason}
        if self.spread is not None:
            row |= {"q1": self.spread.q1, "q3": self.spread.q3, "n": self.spread.n}
        return row

    def texts(self) -> tuple[str, str, str, str, str]:
        """Case, bar, measured, quartiles and verdict, for a table."""
        sign = {">=": "≥", "<=": "≤", "==": "="}[self.relation]
        bar = "" if self.bar is None else f"{sign} {format_quantity(self.bar, self.unit)}"
        if self.reason:
            return self.case, bar, "missing", "", self.reason
        quartiles = (self.spread.q1, self.spread.q3) if self.spread is not None else ()
        spread = " – ".join(format_quantity(q, self.unit) for q in quartiles)
        verdict = {None: "", True: "pass", False: "miss"}[self.passed]
        return self.case, bar, format_quantity(self.measured, self.unit), spread, verdict


def run_benchmark(name: str, device: torch.device | str | None = None) -> Iterator[Row]:
    """The rows of benchmark ``name``, as they are measured; on the GPU where there is one, unless told."""
    validate.one_of("name", name, list(BENCHMARKS))
    yield from import_module(f"{__name__}.{name}").run(torch.device(device or default_device()))


def default_device() -> str:
    """Where a benchmark runs unless told otherwise."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def recorded_table(recorded: Recorded, *whats: str) -> Table:
    """The rows of a recorded benchmark, or those with one of these ``what`` only, for a notebook.

    ValueError where there is no such row.
    """
    lines = []
    for row in recorded.rows:
        if whats and row.get("what") not in whats:
            continue
        spread = Quartiles(row["measured"], row["q1"], row["q3"], row["n"]) if "n" in row else None
        fields = {name: row[name] for name in ("case", "measured", "unit", "bar")}
        case, bar, measured, quartiles, verdict = Row(
            **fields, relation=row["relation"] or ">=", spread=spread
        ).texts()
        lines.append({"": case, "bar": bar, "measured": measured, "quartiles": quartiles, "bar met": verdict})
    if not lines:
        known = sorted({row.get("what", "") for row in recorded.rows})
        raise ValueError(f"whats: expected some of {known}, got {whats}")
    return Table(lines, f"{recorded.path.name}, {recorded.provenance['date'][:10]}")


def format_quantity(value: float, unit: str) -> str:
    """A number with its unit, as a reader wants to see it."""
    if unit == "s":
        return format_seconds(value)
    if unit == "B":
        return format_bytes(value)
    if unit.endswith("/s") and unit != "tokens/s":
        return format_rate(value, unit.removesuffix("/s"))
    return f"{value:,.3g} {unit}" if abs(value) < 1000 else f"{value:,.0f} {unit}"
