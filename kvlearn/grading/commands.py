"""What ``kvlearn grade`` does once its arguments are known."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvlearn.grading import report as reports
from kvlearn.grading.folders import solutions_root
from kvlearn.grading.grader import Grader, one_line
from kvlearn.grading.report import Report, Result
from kvlearn.grading.sandbox import Limits, NoKernel
from kvlearn.grading.submission import Submission, Unusable, find_all, notebooks, tasks_of


@dataclass(frozen=True)
class Request:
    """What the command line asked for: ``style`` "table", "json", "csv" or "html"; ``timeout`` in seconds."""

    paths: list[Path]
    style: str = "table"
    output: Path | None = None
    jobs: int = 2
    timeout: float = Limits.seconds

    def grader(self, done: Callable[[Result], None]) -> Grader:
        return Grader(limits=Limits(seconds=self.timeout), jobs=self.jobs, done=done)

    @property
    def refusal(self) -> str:
        """Why the report cannot or must not be written to ``output``, in a line; empty if it can be."""
        return "" if self.output is None else reports.refusal(self.output, self.paths)


def grade(paths: list[Path], grader: Grader) -> tuple[list[Report], list[str]]:
    """Reports on every notebook that ``paths`` mean, and a line for each that could not be graded.

    A damaged notebook whose unit is known by its name is reported too, with 0 for every exercise.
    """
    found, faults = find_all(paths, grader.solutions)

    async def run() -> list[Report]:
        kernels = asyncio.Semaphore(grader.jobs)
        reports = await asyncio.gather(*(_one(each, grader, kernels, faults) for each in found))
        this = asyncio.current_task()
        if this is not None and this.cancelling():  # Ctrl+C, lost where a wait ended at the same moment
            raise asyncio.CancelledError
        return reports

    return asyncio.run(run()), faults


async def _one(
    submission: Submission, grader: Grader, kernels: asyncio.Semaphore, faults: list[str]
) -> Report:
    try:
        return await grader.grade(submission, kernels)
    except Exception as error:  # whatever one notebook does to us, the others have their reports
        foreseen = isinstance(error, Unusable | NoKernel)
        reason = str(error) if foreseen else f"could not be graded ({one_line(repr(error))})"
        faults.append(f"{submission.shown}: {reason}")
        tasks, _ = tasks_of(submission.unit, grader.solutions)
        results = [Result(task.id, 0.0, task.points, "error", reason) for task in tasks]
        return Report(submission.student, submission.unit, results, submission.shown)


def handed_in_twice(reports: list[Report]) -> list[str]:
    """A line for each unit that somebody handed in more than once: every notebook has its report."""
    files: dict[tuple[str, str], list[str]] = {}
    for report in reports:
        files.setdefault((report.student, report.unit), []).append(report.file)
    return [
        f"{f'{student} · {unit}' if student else unit}: {len(names)} notebooks, each with its report: "
        + ", ".join(names)
        for (student, unit), names in files.items()
        if len(names) > 1
    ]


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[Result], None]]:
    """A bar on stderr that is told of every exercise graded; nothing where stderr is no terminal."""
    columns = (TextColumn("grading"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total or None)
        yield lambda result: bar.update(task, advance=1, description=f"{result.id} {result.status}")


def _count(paths: list[Path]) -> int:
    """How many exercises there are to grade."""
    solutions = solutions_root()
    found, _ = find_all(paths, solutions)
    return sum(len(tasks_of(each.unit, solutions)[0]) for each in found)


def show(graded: list[Report], style: str, output: Path | None) -> None:
    """Write the reports as ``style`` ("table", "json", "csv" or "html") to ``output`` or stdout."""
    text = {"json": reports.to_json, "csv": reports.to_csv, "html": reports.to_html}.get(style)
    if text is not None and output is None:
        sys.stdout.write(text(graded))
    elif text is not None and output is not None:
        output.write_text(text(graded), encoding="utf-8")
    elif output is not None:
        with output.open("w", encoding="utf-8") as file:
            _print_tables(graded, Console(file=file, width=120))
    else:
        _print_tables(graded, Console())


def _print_tables(graded: list[Report], console: Console) -> None:
    for report in graded:
        console.print(reports.to_table(report))


def grade_and_show(request: Request) -> bool:
    """Grade and write the report, on stderr a line for each notebook that cannot be graded. True if any."""
    with progress_bar(_count(request.paths)) as done:
        graded, faults = grade(request.paths, request.grader(done))
    try:
        show(graded, request.style, request.output)
    except OSError as error:
        if request.output is None:
            raise
        faults.append(f"{request.output}: {error.strerror}; the report goes to stdout")
        show(graded, request.style, None)
    for line in [*handed_in_twice(graded), *faults]:
        print(f"kvlearn: {line}", file=sys.stderr)
    return bool(faults)


def watch(request: Request, pause: float = 0.5) -> None:
    """Grade now and whenever one of the notebooks is saved, until Ctrl+C."""
    console = Console(stderr=True)
    seen: object = None
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            now = _stamps(request.paths)
            if now != seen:
                seen = now
                console.clear()
                grade_and_show(request)
                console.print("[dim]waiting for the next save; Ctrl+C ends[/dim]")
            time.sleep(pause)


def _stamps(paths: list[Path]) -> dict[Path, tuple[int, int]]:
    stamps = {}
    for path in paths:
        for file in notebooks(path)[0]:
            with contextlib.suppress(OSError):
                stat = file.stat()
                stamps[file] = (stat.st_mtime_ns, stat.st_size)
    return stamps
