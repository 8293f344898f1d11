"""How far a learner has come: a table for the notebook and the terminal, from what checks have recorded."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from kvlearn import html
from kvlearn.grading import records, submission
from kvlearn.grading.folders import (
    exercises_root,
    solutions_root,
    titles,
    unit_named,
    unit_names,
    work_root,
)
from kvlearn.grading.records import Records
from kvlearn.grading.score import CELL, GREEN, GREY, TINT

SIGNS = {"passed": "✓", "partial": "◐", "wrong": "✗", "error": "✗", "not attempted": "–"}
BEGIN = "Checks are recorded in your copies in work/: run kvlearn start in a terminal to make them."
IN_GIT = "This copy belongs to git, which updates it: run kvlearn start in a terminal, then work in {}."


@dataclass(frozen=True)
class Line:
    """One exercise: its last ``status`` and ``score``, and how many ``hints`` were shown."""

    id: str
    title: str
    score: float
    max_score: float
    status: str = "not attempted"
    message: str = ""
    hints: int = 0


@dataclass(frozen=True)
class UnitLine:
    """One unit and its exercises."""

    unit: str
    exercises: tuple[Line, ...]

    @property
    def score(self) -> float:
        return sum(line.score for line in self.exercises)

    @property
    def max_score(self) -> float:
        return sum(line.max_score for line in self.exercises)

    @property
    def hints(self) -> int:
        return sum(line.hints for line in self.exercises)

    def counts(self) -> dict[str, int]:
        """How many exercises are solved, attempted and untouched."""
        statuses = [line.status for line in self.exercises]
        solved, untouched = statuses.count("passed"), statuses.count("not attempted")
        return {"solved": solved, "attempted": len(statuses) - solved - untouched, "untouched": untouched}


@dataclass(frozen=True)
class Progress:
    """The course, or one ``unit`` of it; ``latest`` is the exercise that was checked last."""

    units: tuple[UnitLine, ...]
    unit: str = ""
    latest: str = ""
    note: str = ""

    @property
    def next(self) -> Line | None:
        """The first unsolved exercise of the unit at hand, else of the units after it, else of all."""
        number = (self.unit or self.latest)[:2]
        at = next((i for i, each in enumerate(self.units) if each.unit[:2] == number), 0)
        ordered = [*self.units[at:], *self.units[:at]]
        return next((line for each in ordered for line in each.exercises if line.status != "passed"), None)

    @property
    def shown(self) -> list[UnitLine]:
        return [each for each in self.units if self.unit in ("", each.unit)]

    @property
    def closing(self) -> str:
        """The next step, in a sentence."""
        following = self.next
        if following is None:
            return "Next: nothing is left. Every exercise of the course is solved."
        unit = next(each.unit for each in self.units if following in each.exercises)
        where = "" if unit == self.unit else f", in work/{unit}"
        return f"Next: {following.id} {following.title}".rstrip() + f"{where}."

    def to_json(self) -> dict[str, Any]:
        units = [
            {"unit": each.unit, "score": each.score, "max_score": each.max_score, "hints": each.hints}
            | each.counts()
            | {"exercises": [asdict(line) for line in each.exercises]}
            for each in self.shown
        ]
        return {"units": units, "next": self.next.id if self.next else None}

    def _columns(self) -> list[str]:
        if self.unit:
            return ["", "exercise", "points", "hints", "status"]
        return ["unit", "solved", "attempted", "untouched", "points", "hints"]

    def _rows(self) -> list[list[str]]:
        if self.unit:
            return [
                [
                    SIGNS.get(line.status, ""),
                    f"{line.id} {line.title}",
                    f"{line.score:g} / {line.max_score:g}",
                    str(line.hints or ""),
                    line.status,
                ]
                for each in self.shown
                for line in each.exercises
            ]
        return [
            [
                each.unit,
                *map(str, each.counts().values()),
                f"{each.score:g} / {each.max_score:g}",
                str(each.hints or ""),
            ]
            for each in self.shown
        ]

    def _sums(self) -> str:
        score, most = (sum(getattr(each, name) for each in self.shown) for name in ("score", "max_score"))
        return f"{score:g} of {most:g} points"

    def __repr__(self) -> str:
        rows = [self._columns(), *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        closing = [f"{self._sums()}. {self.closing}", *filter(None, [self.note])]
        return "\n".join(line.rstrip() for line in [*lines, *closing])

    def to_html(self) -> str:
        """The table for a notebook: it reads in light and dark, and where the notebook is not trusted."""
        tints = (
            [TINT[line.status] for each in self.shown for line in each.exercises]
            if self.unit
            else [GREEN if each.counts()["solved"] == len(each.exercises) else GREY for each in self.shown]
        )
        rows: list[list[str | html.Cell]] = []
        for row, tint in zip(self._rows(), tints, strict=True):
            colour = html.Cell(escape(row[-1 if self.unit else 0]), f"background-color: rgba({tint}, 0.2)")
            rows.append([*row[:-1], colour] if self.unit else [colour, *row[1:]])
        table = html.table(self._columns(), rows, styles=[CELL] * len(self._columns()), style="margin: 6px 0")
        note = f"<br>{escape(self.note)}" if self.note else ""
        return (
            f'<div class="kvlearn-progress">{table}<div style="margin: 4px 0"><b>{self._sums()}.</b> '
            f"{escape(self.closing)}{note}</div></div>"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"text/plain": repr(self), "text/html": self.to_html()}


def progress(unit: str | None = None) -> Progress:
    """How far you have come: ``kvlearn.progress()`` for the course, ``kvlearn.progress("01")`` for a unit.

    A table of points, hints used and status as the checks in your copies in work/ recorded them, and what is
    next. ValueError if there is no such unit.
    """
    solutions = solutions_root()
    chosen = unit_named(unit, solutions) if unit is not None else ""
    work = work_root()
    started = records.file_of(work).parent.is_dir()
    note = "" if started else BEGIN
    known = records.read(work) if started else Records({}, {})
    with suppress(OSError):
        here = Path.cwd().resolve()
        if here.is_relative_to(solutions.resolve()):  # a teacher's source, whose outputs git keeps
            known, note = Records({}, {}), BEGIN
        elif chosen and here.parent == exercises_root().resolve():
            note = IN_GIT.format(f"work/{chosen}")
    return overview(known, chosen, note)


def overview(
    known: Records, unit: str = "", note: str = "", found: Mapping[str, Any] | None = None
) -> Progress:
    """Progress from records; ``found`` has results that are newer, by exercise."""
    solutions = solutions_root()
    lines = []
    for name in unit_names(solutions):
        tasks, _ = submission.tasks_of(name, solutions)
        given = titles(name, solutions)
        exercises = []
        for task in tasks:
            result: Any = (found or {}).get(task.id) or known.results.get(task.id)
            hints = known.hints.get(task.id, 0)
            score, status, message = 0.0, "not attempted", ""
            if result is not None and result.status in SIGNS:
                score, status, message = min(result.score, task.points), result.status, result.message
            title = given.get(task.id, "")
            exercises.append(Line(task.id, title, score, task.points, status, message, hints))
        lines.append(UnitLine(name, tuple(exercises)))
    return Progress(tuple(lines), unit, next(reversed(list(known.results)), ""), note)
