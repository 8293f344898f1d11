"""The work of ``kvlearn grade`` once its arguments are known."""

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from kvlearn.grading import report as reports
from kvlearn.grading.container import ENGINES, ContainerGrader, engine
from kvlearn.grading.counting import progress_bar
from kvlearn.grading.folders import solutions_root
from kvlearn.grading.grader import Grader, one_line
from kvlearn.grading.kept import Kept
from kvlearn.grading.report import Report, Result
from kvlearn.grading.sandbox import Limits, NoKernel
from kvlearn.grading.submission import Submission, Unusable, find_all, notebooks, tasks_of


@dataclass(frozen=True)
class Request:
    """The request of the command line; ``timeout`` in seconds.

    ``style``: "table", "json", "csv", "html", or "canvas" or "moodle" for their gradebooks.
    ``part`` (k, n): only every n-th notebook, from the k-th on. ``container``: the image to grade in, if any.
    """

    paths: list[Path]
    style: str = "table"
    output: Path | None = None
    jobs: int = 2
    timeout: float = Limits.seconds
    kept: Kept | None = None
    part: tuple[int, int] = (1, 1)
    container: str = ""

    def keeping(self, folder: Path | None, *, again: bool = False) -> "Request":
        """The same with results kept in a folder, if one is given. OSError if there can be none."""
        return self if folder is None else replace(self, kept=Kept(folder, again=again))

    def find(self) -> tuple[list[Submission], list[str]]:
        """The notebooks that are asked for, in a fixed order, and a line for each that is none."""
        found, faults = find_all(self.paths, solutions_root())
        k, n = self.part
        return found[k - 1 :: n], faults if k == 1 else []

    def grader(
        self, done: Callable[[Result], None], skipped: Callable[[list[Result]], None] = lambda results: None
    ) -> Grader:
        options: dict[str, Any] = {
            "limits": Limits(seconds=self.timeout),
            "jobs": self.jobs,
            "kept": self.kept,
        }
        if self.container:
            return ContainerGrader(self.container, done=done, skipped=skipped, **options)
        return Grader(done=done, skipped=skipped, **options)

    @property
    def refusal(self) -> str:
        """Why the report cannot or must not be written to ``output``, or nothing can be graded as asked, in a
        line; else empty."""
        if self.container and not engine():
            return f"--container needs {' or '.join(ENGINES)}, and neither is installed here"
        return "" if self.output is None else reports.refusal(self.output, self.paths)


class Interrupted(KeyboardInterrupt):
    """A signal, ``number``, ended grading; ``reports`` are those of the notebooks that were finished."""

    def __init__(self, number: int, reports: list[Report], n_asked: int) -> None:
        super().__init__()
        self.number, self.reports, self.n_asked = number, reports, n_asked


def grade(paths: list[Path], grader: Grader) -> tuple[list[Report], list[str]]:
    """Reports on every notebook that ``paths`` mean, and a line for each that could not be graded.

    A damaged notebook whose unit is known by its name is reported too, with 0 for every exercise.
    """
    return grade_found(*find_all(paths, grader.solutions), grader)


def grade_found(found: list[Submission], faults: list[str], grader: Grader) -> tuple[list[Report], list[str]]:
    """``grade`` for notebooks that were found; ``Interrupted`` carries what was finished before a signal.

    A notebook is read when its turn comes: the memory of a run does not grow with their number.
    """
    finished: dict[int, Report] = {}
    number: int = signal.SIGINT

    async def run() -> None:
        kernels = asyncio.Semaphore(grader.jobs)
        waiting = iter(enumerate(found))

        async def work() -> None:
            for i, each in waiting:
                finished[i] = await _one(each, grader, kernels, faults)

        this = asyncio.current_task()
        assert this is not None

        def stop(by: int) -> None:
            nonlocal number
            number = by
            this.cancel()

        loop = asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal sends SIGHUP; nohup ignores it
            if signal.getsignal(each) != signal.SIG_IGN:
                with contextlib.suppress(RuntimeError, ValueError):  # not the main thread
                    loop.add_signal_handler(each, stop, each)
        await asyncio.gather(*(work() for _ in range(grader.jobs)))
        if this.cancelling():  # a signal, lost where a wait ended at the same moment
            raise asyncio.CancelledError

    try:
        asyncio.run(run())
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise Interrupted(number, [finished[i] for i in sorted(finished)], len(found)) from None
    return [finished[i] for i in sorted(finished)], faults


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


def show(graded: list[Report], style: str, output: Path | None) -> None:
    """Write the reports as ``style``, that of a Request, to ``output`` or stdout."""
    writers: dict[str, Callable[[Iterable[Report]], str]] = {
        "json": reports.to_json,
        "csv": reports.to_csv,
        "html": reports.to_html,
        "canvas": partial(reports.to_gradebook, kind="canvas"),
        "moodle": partial(reports.to_gradebook, kind="moodle"),
    }
    text = writers.get(style)
    if text is not None and output is None:
        sys.stdout.write(fitting(text(graded), style, sys.stdout))
    elif text is not None and output is not None:
        output.write_text(text(graded), encoding="utf-8")
    elif output is not None:
        with output.open("w", encoding="utf-8") as file:
            _print_tables(graded, Console(file=file, width=120))
    else:
        _print_tables(graded, Console())


def fitting(text: str, style: str, stream: TextIO) -> str:
    """A report in characters that ``stream`` can write: in JSON and HTML others become escapes, else "?"."""
    encoding = stream.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeError:
        if style == "json":
            return json.dumps(json.loads(text), indent=2) + "\n"
        errors = "xmlcharrefreplace" if style == "html" else "replace"
        return text.encode(encoding, errors).decode(encoding)
    return text


def _print_tables(graded: list[Report], console: Console) -> None:
    for report in graded:
        console.print(reports.to_table(report))


def grade_and_show(request: Request) -> bool:
    """Grade and write the report, on stderr a line for each notebook that cannot be graded. True if any.

    ``Interrupted`` after a signal, when the report on what was finished is written.
    """
    found, faults = request.find()
    stopped: Interrupted | None = None
    try:
        with progress_bar(_count(found)) as counting:
            graded, faults = grade_found(found, faults, request.grader(counting, counting.skip))
    except Interrupted as interrupted:
        graded, stopped = interrupted.reports, interrupted
        if not graded:
            raise
    try:
        show(graded, request.style, request.output)
    except OSError as error:
        if request.output is None:
            raise
        faults.append(f"{request.output}: {error.strerror}; the report goes to stdout")
        show(graded, request.style, None)
    for line in [*handed_in_twice(graded), *faults, *_of_kept(request.kept)]:
        print(f"kvlearn: {line}", file=sys.stderr)
    if stopped is not None:
        rest = f"{len(graded)} of {stopped.n_asked} notebooks are in the report"
        folder = request.kept.folder if request.kept else None
        more = (
            f"the same command goes on from there ({folder})" if folder else "--keep FOLDER would go on there"
        )
        print(f"kvlearn: interrupted: {rest}; {more}", file=sys.stderr)
        raise stopped
    return bool(faults)


def _of_kept(kept: Kept | None) -> list[str]:
    lines = []
    if kept is not None and kept.folder is not None and kept.n_unchanged:
        n = kept.n_unchanged
        unchanged = "1 notebook is as it was" if n == 1 else f"{n} notebooks are as they were"
        lines.append(f"{unchanged}: results from {kept.folder} (--again)")
    if kept is not None and kept.fault:
        lines.append(kept.fault)
    return lines


def _count(found: list[Submission]) -> int:
    """How many exercises there are to grade."""
    solutions = solutions_root()
    return sum(len(tasks_of(each.unit, solutions)[0]) for each in found)


def watch(request: Request, pause: float = 0.5) -> None:
    """Grade now and whenever one of the notebooks is saved, until Ctrl+C: each time what has changed."""
    console = Console(stderr=True)
    request = replace(request, kept=request.kept or Kept())
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
