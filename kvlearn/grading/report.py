"""Reports of grading: JSON for programs, a CSV for a spreadsheet, a page, tables for the terminal."""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvlearn import html
from kvlearn.grading.score import STATUSES
from kvlearn.grading.submission import notebooks

BAR = 8  # characters of a unit's bar: the table fits 80 columns
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # what a cell begins with that spreadsheets may calculate
COLOURS = {"passed": "green", "partial": "yellow", "not attempted": "dim", "wrong": "red", "error": "red"}


@dataclass(frozen=True)
class Result:
    """One exercise: ``status`` is "passed", "partial", "wrong", "error" or "not attempted"."""

    id: str
    score: float
    max_score: float
    status: str
    message: str

    def is_of(self, exercise: str, points: float) -> bool:
        """Is this a result of that exercise, in order? It may come from a file or a process of others."""
        score: Any = self.score
        number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        named = (self.id, self.max_score) == (exercise, points) and self.status in STATUSES
        return number and named and 0 <= score <= points and isinstance(self.message, str)


@dataclass(frozen=True)
class Report:
    """One notebook, ``file``; ``student`` is empty where nothing says whose it is."""

    student: str
    unit: str
    exercises: list[Result] = field(default_factory=list)
    file: str = ""

    @property
    def score(self) -> float:
        return sum(exercise.score for exercise in self.exercises)

    @property
    def max_score(self) -> float:
        return sum(exercise.max_score for exercise in self.exercises)

    def to_dict(self) -> dict[str, Any]:
        head = {"student": self.student, "unit": self.unit, "file": self.file}
        points = {"score": self.score, "max_score": self.max_score}
        return {**head, **points, "exercises": [asdict(exercise) for exercise in self.exercises]}


def refusal(output: Path, paths: Iterable[Path]) -> str:
    """Why a report must not or cannot be written to ``output``, in a line; empty if it can be. ``paths`` are
    those of the notebooks that it is about."""
    folder = output.absolute().parent
    if output.is_dir():
        return f"{output}: is a folder; give the report a file name"
    if output.suffix == ".ipynb" or _same(output, paths):
        return f"{output}: is a notebook, and a report would replace it; give the report another name"
    if not folder.is_dir():
        return f"{output}: no such folder as {folder}"
    if not os.access(output if output.exists() else folder, os.W_OK):
        return f"{output}: cannot be written"
    return ""


def _same(output: Path, paths: Iterable[Path]) -> bool:
    """Is ``output``, perhaps by another name, one of the notebooks to be graded?"""
    with suppress(OSError):
        return any(output.samefile(file) for path in paths for file in notebooks(path)[0])
    return False


def to_json(reports: Iterable[Report]) -> str:
    return (
        json.dumps([report.to_dict() for report in reports], indent=2, ensure_ascii=False, allow_nan=False)
        + "\n"
    )


def to_csv(reports: Iterable[Report]) -> str:
    """One row per exercise. A cell that a spreadsheet would take for a formula gets an apostrophe."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["student", "unit", "exercise", "score", "max_score", "status", "message", "file"])
    for report in reports:
        for e in report.exercises:
            cells = [
                report.student,
                report.unit,
                e.id,
                f"{e.score:g}",
                f"{e.max_score:g}",
                e.status,
                e.message,
                report.file,
            ]
            rows.writerow(map(_cell, cells))
    return text.getvalue()


def to_gradebook(reports: Iterable[Report], kind: str) -> str:
    """One row per student, one column per unit with the sum of its points, as gradebooks import them.

    ``kind`` "canvas": the columns that Canvas asks for, and its row of possible points; it finds the student
    by ``SIS Login ID``. "moodle": ``username`` and the units. Both are the name that the submission has.
    Of several notebooks of a unit the best counts; a unit that was not handed in is empty.
    """
    best: dict[str, dict[str, float]] = {}
    possible: dict[str, float] = {}
    for report in reports:
        own = best.setdefault(report.student, {})
        own[report.unit] = max(report.score, own.get(report.unit, 0.0))
        possible[report.unit] = max(report.max_score, possible.get(report.unit, 0.0))
    units = sorted(possible)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    if kind == "canvas":
        rows.writerow(["Student", "ID", "SIS User ID", "SIS Login ID", "Section", *units])
        rows.writerow(["    Points Possible", "", "", "", "", *(f"{possible[unit]:g}" for unit in units)])
    else:
        rows.writerow(["username", *units])
    for student in sorted(best):
        name = _cell(student)
        head = [name, "", "", name, ""] if kind == "canvas" else [name]
        points = (best[student].get(unit) for unit in units)
        rows.writerow([*head, *("" if each is None else f"{each:g}" for each in points)])
    return text.getvalue()


def _cell(text: str) -> str:
    """A cell that is no formula, and whose line breaks are those that csv puts into quotes."""
    return ("'" if text.startswith(FORMULA) else "") + text.replace("\r", "\n")


def to_table(report: Report) -> Group:
    """The report as rich prints it."""
    title = Text(_title(report), style="bold")
    if report.file:
        title += Text(f"  {report.file}", style="dim")
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("exercise", footer="sum", no_wrap=True)
    table.add_column(
        "points", footer=f"{report.score:g} / {report.max_score:g}", justify="right", no_wrap=True
    )
    table.add_column("status", no_wrap=True)
    table.add_column("message", overflow="fold")
    for e in report.exercises:
        status = Text(e.status, style=COLOURS.get(e.status, ""))
        table.add_row(e.id, f"{e.score:g} / {e.max_score:g}", status, Text(e.message))
    return Group(table)


def _title(report: Report) -> str:
    return f"{report.student} · {report.unit}" if report.student else report.unit


STYLE = """
:root { color-scheme: light dark; font: 16px/1.45 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; } h2 { margin-bottom: 0; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 2.5rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #8885; vertical-align: top; } meter { width: 12rem; }
"""
SIGNS = {"passed": "✔", "partial": "◐", "wrong": "✘", "error": "⚠", "not attempted": "–"}
COLUMNS = {
    "exercise": "text-align: left",
    "points": "text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums",
    "status": "text-align: left; white-space: nowrap",
    "message": "text-align: left; overflow-wrap: anywhere",
}


def to_html(reports: Iterable[Report]) -> str:
    """A page that needs nothing else; readable in light and dark."""
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>kvlearn: scores</title><style>{STYLE}</style></head><body><h1>Scores</h1>",
    ]
    for report in reports:
        points = f"{report.score:g} of {report.max_score:g} points"
        rows = [
            (e.id, f"{e.score:g} / {e.max_score:g}", f"{SIGNS.get(e.status, '')} {e.status}", e.message)
            for e in report.exercises
        ]
        parts += [
            f"<h2>{escape(_title(report))}</h2><small>{escape(report.file)}</small>",
            f'<p><meter max="{report.max_score:g}" value="{report.score:g}">{points}</meter> {points}</p>',
            html.table(list(COLUMNS), rows, styles=list(COLUMNS.values())),
        ]
    return "\n".join([*parts, "</body></html>\n"])


def to_progress(reports: Mapping[str, Report | None], hints: Mapping[str, int] | None = None) -> Table:
    """One line per unit: exercises solved, attempted and untouched, points (also as a bar), hints shown."""
    hints = hints or {}
    known = [report for report in reports.values() if report is not None]
    points = f"{sum(r.score for r in known):g} / {sum(r.max_score for r in known):g}"
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), show_edge=False, show_footer=True)
    table.add_column("unit", footer="sum", no_wrap=True)
    for name, head in (("solved", "solved"), ("attempted", "attempted"), ("untouched", "open")):
        total = sum(_counts(report)[name] for report in known)
        table.add_column(head, footer=str(total), justify="right", no_wrap=True)
    table.add_column("points", footer=points, justify="right", no_wrap=True)
    table.add_column("hints", footer=str(sum(hints.values()) or ""), justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for unit, report in reports.items():
        if report is None:
            table.add_row(unit, "", "", "", "", "", Text("no notebook here", style="dim"))
            continue
        filled = round(BAR * report.score / report.max_score) if report.max_score else 0
        bar = Text("━" * filled, style="green") + Text("━" * (BAR - filled), style="bright_black")
        numbers = map(str, _counts(report).values())
        shown = str(hints.get(unit) or "")
        table.add_row(unit, *numbers, f"{report.score:g} / {report.max_score:g}", shown, bar)
    return table


def _counts(report: Report) -> dict[str, int]:
    statuses = [exercise.status for exercise in report.exercises]
    solved, untouched = statuses.count("passed"), statuses.count("not attempted")
    return {"solved": solved, "attempted": len(statuses) - solved - untouched, "untouched": untouched}
