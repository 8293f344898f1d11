"""Recorded measurements: results/NAME-MACHINE.json, the only place that numbers in the course come from.

    {"schema": 1, "command": "kvlearn bench full --record", "provenance": {...}, "rows": [{...}, ...]}

One file per machine for timings. Rows of quality may come from several machines; each then carries its own
``"provenance"``. ``Row`` is a measured number with its bar; ``load`` reads files as they are, ``comparable``
leaves out, by name, what must not be compared.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import kvlearn
from kvlearn.files import read_json, replacing
from kvlearn.measure.provenance import checkout, collect_provenance
from kvlearn.measure.timing import Quartiles
from kvlearn.measure.units import format_bytes, format_rate, format_seconds

SCHEMA = 1
# The type of each key that a provenance must have; more keys are allowed.
PROVENANCE: dict[str, tuple[type, ...]] = {
    "date": (str,),
    "commit": (str, type(None)),
    "dirty": (bool, type(None)),
    "machine": (str,),
    "cores": (int,),
    "memory": (int,),
    "read_bandwidth_measured": (int, float),
    "gpu": (dict, type(None)),
    "versions": (dict,),
}


@dataclass(frozen=True)
class Row:
    """One measured number in SI units (s, B, B/s, FLOP/s, FLOP/B, tokens/s; x for a ratio), and its bar.

    ``bar`` None: measured for the record, nothing to pass. ``spread``: the quartiles behind a median.
    ``details``: the keys by which a plot finds the row again (length, batch, …). ``missing``: why there is no
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

    @classmethod
    def of(cls, recorded: Mapping[str, Any]) -> "Row":
        """A row that ``as_dict`` has written, with everything in it."""
        fixed = {"case", "measured", "unit", "bar", "relation", "pass", "missing"}
        spread = None
        if "q1" in recorded:
            spread = Quartiles(recorded["measured"], recorded["q1"], recorded["q3"], recorded["n"])
            fixed |= {"q1", "q3", "n"}
        return cls(
            recorded["case"],
            math.nan if recorded["measured"] is None else recorded["measured"],
            recorded["unit"],
            recorded["bar"],
            recorded["relation"] or ">=",
            spread,
            {key: value for key, value in recorded.items() if key not in fixed},
            recorded.get("missing", ""),
        )

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


def format_quantity(value: float, unit: str) -> str:
    """A number with its unit, as a reader wants to see it."""
    if unit == "s":
        return format_seconds(value)
    if unit == "B":
        return format_bytes(value)
    if unit.endswith("/s") and unit != "tokens/s":
        return format_rate(value, unit.removesuffix("/s"))
    return f"{value:,.3g} {unit}" if abs(value) < 1000 else f"{value:,.0f} {unit}"


@dataclass(frozen=True)
class Recorded:
    """One file of results: who measured what, and the rows."""

    path: Path
    command: str
    provenance: dict[str, Any]
    rows: list[dict[str, Any]]


def save(
    name: str,
    command: str,
    rows: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> Path:
    """Write ``rows`` to FOLDER/NAME-MACHINE.json, all or nothing, and return the path.

    ``command`` is what repeats the measurement; ``provenance`` is ``collect_provenance(device)``, by default
    of the CPU. The folder is the repository's results/, or ./results where there is no repository.
    ValueError names the key that is missing or wrong; NaN and infinity are refused.
    """
    if not re.fullmatch(r"[a-z0-9]+([_-][a-z0-9]+)*", name):
        raise ValueError(f"name: expected lower-case words like 'full' or 'base-model', got {name!r}")
    provenance = dict(provenance) if provenance is not None else collect_provenance()
    content = {"schema": SCHEMA, "command": command, "provenance": provenance, "rows": list(rows)}
    path = Path(f"{name}.json")
    validate(content, path)
    try:
        text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"rows: expected numbers, strings, lists and dicts that JSON can hold: {error}"
        ) from None
    folder = folder or results_folders()[0]
    path = folder / f"{name}-{provenance['machine']}.json"
    with replacing("folder", path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


def load(name: str, folder: Path | None = None) -> list[Recorded]:
    """All recorded runs of ``name``, one per machine, sorted by machine; an empty list where there is none.

    Looks into the repository's results/, or into those that came with an installed wheel. ValueError
    names the file that does not hold what it should.
    """
    found: dict[str, Recorded] = {}
    for place in [folder] if folder is not None else results_folders():
        for path in sorted(place.glob(f"{name}-*.json")):
            recorded = read(path)
            # A longer name may begin like this one: full-… and full-model-….
            if path.name == f"{name}-{recorded.provenance['machine']}.json":
                found.setdefault(path.name, recorded)
    return [found[key] for key in sorted(found)]


@dataclass(frozen=True)
class Comparable:
    """Runs whose rows may be compared, and what was left out: a file, or "FILE: CASE", and why."""

    recorded: list[Recorded]
    left_out: dict[str, str]

    def __str__(self) -> str:
        files = ", ".join(run.path.name for run in self.recorded) or "no file"
        return "\n".join([files, *(f"left out: {name}: {why}" for name, why in self.left_out.items())])


def comparable(name: str, folder: Path | None = None) -> Comparable:
    """The recorded runs of ``name`` that may be compared, one per machine, with the rows that have a number.

    Left out, each with its reason: files that are damaged or of another schema, runs from a dirty tree, trial
    runs at small sizes; of the others, rows without a number, rows of another machine than their file's, and
    rows from a dirty tree (by their own provenance where they have one). Nothing is averaged.
    """
    found: dict[str, Recorded] = {}
    left_out: dict[str, str] = {}
    for place in [folder] if folder is not None else results_folders():
        for path in sorted(place.glob(f"{name}-*.json")):
            if path.name in found or path.name in left_out:
                continue  # the first place comes first
            try:
                run = read(path)
            except ValueError as error:
                left_out[path.name] = str(error).removeprefix(f"{path.name}: ")
                continue
            if path.name != f"{name}-{run.provenance['machine']}.json":
                continue  # of a longer name that begins alike
            why = unfit(run)
            if why:
                left_out[path.name] = why
                continue
            rows = []
            for row in run.rows:
                why = unfit_row(row, run)
                if why:
                    left_out[f"{path.name}: {row.get('case', row)}"] = why
                else:
                    rows.append(row)
            found[path.name] = replace(run, rows=rows)
    return Comparable([found[key] for key in sorted(found)], left_out)


def unfit(run: Recorded) -> str:
    """Why a whole run must not be compared; empty where it may.

    Rows that carry their own provenance are judged by that: others, recorded later, may be from a dirty tree.
    """
    if run.provenance["dirty"] and not any("provenance" in row for row in run.rows):
        return "measured from a dirty tree"
    if "--small" in run.command.split():
        return "a trial run at small sizes"
    return "" if run.rows else "no row"


def unfit_row(row: Mapping[str, Any], run: Recorded) -> str:
    """Why a row must not be compared with those of other runs; empty where it may."""
    own = row.get("provenance", run.provenance)
    if own["machine"] != run.provenance["machine"]:
        return f"measured on {own['machine']}"
    if own["dirty"]:
        return "measured from a dirty tree"
    if "measured" in row and row["measured"] is None:
        return str(row.get("missing") or "no number")
    return ""


def read(path: Path) -> Recorded:
    """One file of results, checked; ValueError names the file and what is wrong with it."""
    content = read_json(path.name, path)
    validate(content, path)
    machine = content["provenance"]["machine"]
    if not path.stem.endswith(f"-{machine}"):
        raise ValueError(f"{path.name}: expected NAME-{machine}.json, after the machine in its provenance")
    return Recorded(path, content["command"], content["provenance"], content["rows"])


def validate(content: Any, path: Path) -> None:
    """Check the content of a results file; ValueError names ``path`` and the key."""
    _keys(content, {"schema": (int,), "command": (str,), "provenance": (dict,), "rows": (list,)}, path.name)
    if content["schema"] != SCHEMA:
        raise ValueError(f"{path.name}: schema: expected {SCHEMA}, got {content['schema']}")
    _keys(content["provenance"], PROVENANCE, f"{path.name}: provenance")
    machine = content["provenance"]["machine"]
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", machine):
        raise ValueError(f"{path.name}: provenance: machine: expected a slug, got {machine!r}")
    for index, row in enumerate(content["rows"]):
        if not isinstance(row, Mapping):
            raise ValueError(f"{path.name}: rows[{index}]: expected a dict, got {type(row).__name__}")
        if "provenance" in row:
            _keys(row["provenance"], PROVENANCE, f"{path.name}: rows[{index}]: provenance")


def _keys(content: Any, wanted: Mapping[str, tuple[type, ...]], where: str) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected a dict, got {type(content).__name__}")
    for key, kinds in wanted.items():
        if key not in content:
            raise ValueError(
                f"{where}: expected a key {key!r}, got {', '.join(map(repr, content)) or 'none'}"
            )
        value = content[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{where}: {key}: expected {expected}, got {value!r}")


def results_folders() -> list[Path]:
    """Where results lie, the place to write to first: the checkout's; else ./results and the wheel's."""
    root = checkout()
    if root is not None:
        return [root / "results"]
    return [Path.cwd() / "results", Path(kvlearn.__file__).parent / "_results"]
