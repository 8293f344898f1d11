"""How far a learner has come: one line a unit of the course."""

import sys
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvlearn.grading.catalogue import solutions_root
from kvlearn.grading.catalogue import unit_names as units
from kvlearn.grading.commands import grade, progress_bar
from kvlearn.grading.report import Report
from kvlearn.grading.runner import Grader

WIDTH = 10  # of the bar: the table fits 80 columns


def exercises_root() -> Path:
    """``exercises`` in the working directory, else the one of the repository that kvlearn runs from."""
    here = Path("exercises")
    return here if here.is_dir() else solutions_root().parent / "exercises"


def survey(folder: Path, grader: Grader) -> tuple[dict[str, Report | None], list[str]]:
    """A report on every unit of the course (None where there is no FOLDER/UNIT/UNIT.ipynb), and the faults.

    Units in which nothing was touched cost no kernel.
    """
    known = units(grader.solutions)
    files = {unit: folder / unit / f"{unit}.ipynb" for unit in known}
    graded, faults = grade([file for file in files.values() if file.exists()], grader)
    by_unit = {report.unit: report for report in graded}
    return {unit: by_unit.get(unit) for unit in known}, faults


def show(folder: Path | None, jobs: int) -> bool:
    """Print the survey, on stderr a line for each notebook that cannot be graded. True if any."""
    folder = folder or exercises_root()
    if not folder.is_dir():
        print(f"kvlearn: {folder}: no such folder; say where the exercises are", file=sys.stderr)
        return True
    with progress_bar(0) as done:
        rows, faults = survey(folder, Grader(jobs=jobs, done=done))
    for fault in faults:
        print(f"kvlearn: {fault}", file=sys.stderr)
    Console().print(to_table(rows))
    return bool(faults)


def to_table(rows: dict[str, Report | None]) -> Table:
    """Exercises solved, attempted and untouched, and the points, as numbers and as a bar."""
    reports = [report for report in rows.values() if report is not None]
    points = f"{sum(r.score for r in reports):g} / {sum(r.max_score for r in reports):g}"
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), show_edge=False, show_footer=True)
    table.add_column("unit", footer="sum", no_wrap=True)
    for name in ("solved", "attempted", "untouched"):
        table.add_column(
            name, footer=str(sum(_counts(r)[name] for r in reports)), justify="right", no_wrap=True
        )
    table.add_column("points", footer=points, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for unit, report in rows.items():
        if report is None:
            table.add_row(unit, "", "", "", "", Text("no notebook here", style="dim"))
            continue
        filled = round(WIDTH * report.score / report.max_score) if report.max_score else 0
        bar = Text("━" * filled, style="green") + Text("━" * (WIDTH - filled), style="bright_black")
        numbers = map(str, _counts(report).values())
        table.add_row(unit, *numbers, f"{report.score:g} / {report.max_score:g}", bar)
    return table


def _counts(report: Report) -> dict[str, int]:
    statuses = [exercise.status for exercise in report.exercises]
    solved, untouched = statuses.count("passed"), statuses.count("not attempted")
    return {"solved": solved, "attempted": len(statuses) - solved - untouched, "untouched": untouched}
