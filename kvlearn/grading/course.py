"""The learner's whole course on the command line: which folder is meant, and ``kvlearn progress``.

Nothing here imports torch before an answer has to run.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from kvlearn.grading import records, submission
from kvlearn.grading.folders import (
    STATE,
    exercises_root,
    solutions_root,
    unit_named,
    unit_names,
    work_root,
)
from kvlearn.grading.overview import Progress, overview
from kvlearn.grading.records import Record, Records
from kvlearn.grading.report import Report, Result, to_progress
from kvlearn.grading.submission import Task, Unusable
from kvlearn.grading.work import find_copy, shown


def say(line: str) -> None:
    print(f"kvlearn: {line}", file=sys.stderr)


def default_folder() -> Path:
    """work/ if there is one, else exercises/, which is said on stderr."""
    work = work_root()
    if work.is_dir():
        return Path(shown(work))
    folder = exercises_root()
    say(f"{shown(folder)}: there is no work/ yet (kvlearn start makes your copies)")
    return folder


def chosen(paths: Sequence[Path]) -> list[Path]:
    """The paths that ``kvlearn grade`` was given; a unit's name or number means the learner's copy, and no
    path at all means all of them."""
    if not paths:
        return [default_folder()]
    found = []
    for path in paths:
        if not path.exists() and len(path.parts) == 1:
            with suppress(ValueError):
                unit = unit_named(str(path), solutions_root())
                path = default_folder() / unit
        found.append(path)
    return found


def meant(path: Path | None) -> tuple[Path, str]:
    """The folder of exercises that ``kvlearn progress`` was given, and the unit, "" for all of them.

    A unit is given by its name or number, which mean the learner's copy, or by its folder.
    """
    solutions = solutions_root()
    if path is None:
        return default_folder(), ""
    if path.is_dir() and path.name in unit_names(solutions):
        return path.parent, path.name
    if not path.exists() and len(path.parts) == 1:
        with suppress(ValueError):
            unit = unit_named(str(path), solutions)
            return default_folder(), unit
    return path, ""


def survey(path: Path | None, jobs: int, *, as_json: bool = False, as_html: Path | None = None) -> bool:
    """Print how far a learner has come, one line per unit or, of a single unit, one per exercise; on stderr a
    line for each notebook that cannot be graded. True if any. ``path`` as ``meant`` takes it. ``as_html`` is
    a file for the page of it; True as well if it cannot be written.

    An answer runs only if it changed since its last result, or its checks did; the new results are recorded
    where the folder is one that ``kvlearn start`` made.
    """
    folder, unit = meant(path)
    if not folder.is_dir():
        say(f"{folder}: no such folder, and no unit of this name")
        return True
    session = Session(folder, unit)
    if unit and not session.files:
        say(f"{folder / unit}: no notebook of this unit (kvlearn start makes your copies)")
        return True
    faults = session.run(jobs)
    session.save()
    for fault in faults:
        say(fault)
    known = records.read(folder) if session.records else session.known
    progress = overview(known, unit, found=session.results)
    written = as_html is None or write_page(as_html, progress, folder)
    if as_json:
        print(
            json.dumps(
                progress.to_json(), indent=2, ensure_ascii="utf" not in (sys.stdout.encoding or "").lower()
            )
        )
        return bool(faults) or not written
    console = Console()
    if unit:
        console.print(repr(progress), highlight=False, markup=False, soft_wrap=True)
        return bool(faults) or not written
    reports: dict[str, Report | None] = dict.fromkeys(unit_names(session.solutions))
    for line in progress.units:
        if line.unit in session.files:
            results = [Result(e.id, e.score, e.max_score, e.status, e.message) for e in line.exercises]
            reports[line.unit] = Report("", line.unit, results)
    console.print(to_progress(reports, {line.unit: line.hints for line in progress.units}))
    console.print(f"\n{progress.closing}", highlight=False, markup=False)
    return bool(faults) or not written


def write_page(file: Path, progress: Progress, folder: Path) -> bool:
    """Write the page of a learner's progress, with the picture that is kept in ``folder``; False if it cannot
    be written. Either is said on stderr."""
    from kvlearn.grading import certificate

    try:
        file.write_text(certificate.page(progress, certificate.read_points(folder)), encoding="utf-8")
    except OSError as error:
        say(f"{file}: {error.strerror or error}")
        return False
    say(f"wrote {file}")
    return True


class Session:
    """One run of ``kvlearn progress`` over the notebooks of a folder, all units or one."""

    def __init__(self, folder: Path, unit: str = "") -> None:
        self.folder = folder
        self.solutions = solutions_root().resolve()
        self.records = (folder / STATE).is_dir()
        self.known = records.read(folder) if self.records else Records({}, {})
        names = [unit] if unit else unit_names(self.solutions)
        found = {name: find_copy(name, folder) for name in names}
        self.files = {name: file for name, file in found.items() if file is not None}
        self.results: dict[str, Result] = {}
        self.answers: dict[str, tuple[str, str]] = {}  # the hashes of the answer and of the checks

    def unchanged(self, unit: str, tasks: list[Task]) -> dict[str, Result]:
        """Recorded results of the answers as they are now; notes the hashes of all."""
        checks = records.checks_of(unit, self.solutions)
        same = {}
        for task in tasks:
            answer = records.answer_of(tasks, task)
            self.answers[task.id] = (answer, checks)
            record = self.known.results.get(task.id)
            if record is not None and (record.answer, record.checks) == (answer, checks):
                same[task.id] = Result(task.id, record.score, task.points, record.status, record.message)
        return same

    def run(self, jobs: int) -> list[str]:
        """Grade what changed; returns a line for each notebook that cannot be graded."""
        changed = []
        waiting = 0
        for unit, file in self.files.items():
            try:
                tasks, places = submission.tasks_of(unit, self.solutions)
                submission.fill_in(tasks, places, submission.load(file))
            except Unusable:
                changed.append(file)  # the grader says why
                continue
            same = self.unchanged(unit, tasks)
            for task in tasks:
                if task.untouched:
                    self.results[task.id] = Result(task.id, 0.0, task.points, "not attempted", "")
                elif task.id in same:
                    self.results[task.id] = same[task.id]
            new = [task for task in tasks if task.id not in self.results]
            waiting += len(new)
            changed += [file] if new else []
        if not changed:
            return []
        from kvlearn.grading import commands
        from kvlearn.grading.counting import progress_bar
        from kvlearn.grading.grader import Grader

        with progress_bar(waiting) as done:

            def told(result: Result) -> None:
                if result.id not in self.results:
                    done(result)
                self.results[result.id] = result

            _, faults = commands.grade(changed, Grader(jobs=jobs, done=told, known=self.unchanged))
        return faults

    def save(self) -> None:
        """Record the new results. A folder that cannot be written costs only the next run its time."""
        new = {}
        for name, result in self.results.items():
            before = self.known.results.get(name)
            if name not in self.answers or (before is None and result.status == "not attempted"):
                continue
            answer, checks = self.answers[name]
            if result.status == "error":  # on a busy machine it may be a time limit: it runs again next time
                answer = ""
            points = (result.score, result.max_score)
            record = Record(answer, checks, *points, result.status, result.message)
            if record != before:
                new[name] = record
        if not (self.records and new):
            return

        def change(content: dict[str, Any]) -> None:
            for name, record in new.items():
                records.put(content, name, record, latest=False)

        try:
            records.update(self.folder, change)
        except OSError as error:
            say(f"{records.file_of(self.folder)}: cannot record the results ({error.strerror or error})")
