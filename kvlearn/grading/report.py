"""What came of grading: the JSON of DESIGN.md, a CSV for a spreadsheet, a page, a table for the terminal."""

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

COLOURS = {"passed": "green", "partial": "yellow", "not attempted": "dim", "wrong": "red", "error": "red"}


@dataclass(frozen=True)
class Result:
    """One exercise: ``status`` is "passed", "partial", "wrong", "error" or "not attempted"."""

    id: str
    score: float
    max_score: float
    status: str
    message: str


@dataclass(frozen=True)
class Report:
    """One notebook; ``student`` is empty outside a tree STUDENT/UNIT/UNIT.ipynb."""

    student: str
    unit: str
    exercises: list[Result] = field(default_factory=list)

    @property
    def score(self) -> float:
        return sum(exercise.score for exercise in self.exercises)

    @property
    def max_score(self) -> float:
        return sum(exercise.max_score for exercise in self.exercises)

    def to_dict(self) -> dict[str, Any]:
        head = {"student": self.student, "unit": self.unit, "score": self.score, "max_score": self.max_score}
        return {**head, "exercises": [asdict(exercise) for exercise in self.exercises]}


def to_json(reports: Iterable[Report]) -> str:
    return (
        json.dumps([report.to_dict() for report in reports], indent=2, ensure_ascii=False, allow_nan=False)
        + "\n"
    )


def to_csv(reports: Iterable[Report]) -> str:
    """One row an exercise. A cell that a spreadsheet would take for a formula gets an apostrophe."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["student", "unit", "exercise", "score", "max_score", "status", "message"])
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
            ]
            rows.writerow([f"'{cell}" if cell[:1] in ("=", "+", "-", "@") else cell for cell in cells])
    return text.getvalue()


def to_table(report: Report) -> Group:
    """The report as rich prints it."""
    table = Table(title=_title(report), title_justify="left", title_style="bold", show_footer=True)
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
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 2.5rem; }
th, td { text-align: left; padding: .35rem .7rem; border-bottom: 1px solid #8885; vertical-align: top; }
td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.s { white-space: nowrap; } td.m { overflow-wrap: anywhere; } meter { width: 12rem; }
"""
SIGNS = {"passed": "✔", "partial": "◐", "wrong": "✘", "error": "⚠", "not attempted": "–"}


def to_html(reports: Iterable[Report]) -> str:
    """A page that needs nothing else; readable in light and dark."""
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>kvlearn: scores</title><style>{STYLE}</style></head><body><h1>Scores</h1>",
    ]
    for report in reports:
        points = f"{report.score:g} of {report.max_score:g} points"
        parts += [
            f"<h2>{escape(_title(report))}</h2>",
            f'<p><meter max="{report.max_score:g}" value="{report.score:g}">{points}</meter> {points}</p>',
            "<table><thead><tr><th>exercise<th>points<th>status<th>message</tr></thead><tbody>",
        ]
        parts += [
            f'<tr><td>{escape(e.id)}<td class="n">{e.score:g} / {e.max_score:g}'
            f'<td class="s">{SIGNS.get(e.status, "")} {escape(e.status)}'
            f'<td class="m">{escape(e.message)}</tr>'
            for e in report.exercises
        ]
        parts.append("</tbody></table>")
    return "\n".join([*parts, "</body></html>\n"])
