"""How far grading is, and how long it still takes: a bar in a terminal, elsewhere a line each minute."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvlearn.grading.report import Result

EVERY = 60.0  # seconds from one line to the next


class Counting:
    """Counts exercises; called with the result of each one that was run. ``total`` 0: nobody knows."""

    def __init__(self, total: int) -> None:
        self.total, self.n_run, self.n_skipped = total, 0, 0
        self.last = ""
        self._begin = time.monotonic()

    def __call__(self, result: Result) -> None:
        self.n_run += 1
        self.last = f"{result.id} {result.status}"

    def skip(self, results: list[Result]) -> None:
        """These needed no run, so they say nothing of how long the others take."""
        self.n_skipped += len(results)

    @property
    def n_done(self) -> int:
        return self.n_run + self.n_skipped

    @property
    def left(self) -> str:
        """The time that the rest takes at the mean pace so far, as "3:20 left"; empty where nothing tells."""
        rest = self.total - self.n_done
        if not self.n_run or rest <= 0:
            return ""
        seconds = round((time.monotonic() - self._begin) / self.n_run * rest)
        hours, minutes = divmod(seconds // 60, 60)
        return (
            f"{hours}:{minutes:02}:{seconds % 60:02} left" if hours else f"{minutes}:{seconds % 60:02} left"
        )

    def __str__(self) -> str:
        return ", ".join(filter(None, [f"{self.n_done} of {self.total} exercises graded", self.left]))


@contextmanager
def progress_bar(total: int) -> Iterator[Counting]:
    """A bar on stderr that is told of every exercise graded, or, where stderr is no terminal, a line each
    minute."""
    counting = Counting(total)
    console = Console(stderr=True)
    if not console.is_terminal:
        with _lines(counting):
            yield counting
        return
    columns = (TextColumn("grading"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=total or None)
        with _repeated(lambda: bar.update(task, completed=counting.n_done, description=_told(counting)), 0.2):
            yield counting


def _told(counting: Counting) -> str:
    return " · ".join(filter(None, [counting.last, counting.left]))


@contextmanager
def _lines(counting: Counting) -> Iterator[None]:
    with _repeated(lambda: print(f"kvlearn: {counting}", file=sys.stderr, flush=True), EVERY):
        yield


@contextmanager
def _repeated(act: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call ``act`` every so many seconds, also while a single exercise takes longer."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(seconds):
            with suppress(OSError, ValueError):  # the terminal was closed
                act()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
