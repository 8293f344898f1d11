"""Runs the parts of a benchmark one after the other, within a time: what fails costs itself, and is named."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from kvlearn.measure.decode_bench.contest import in_short, note
from kvlearn.measure.results import Row

BEFORE_THE_END = 25.0  # seconds that a part may need once it is begun, unless it says otherwise

SLACK = 30.0  # by which the last part may outlast the deadline


@dataclass
class Budget:
    """Seconds that several jobs may take together, and what they have taken."""

    seconds: float
    spent: float = 0.0


@dataclass(frozen=True)
class Job:
    """A part: its name, what yields its rows, and the seconds that must be left for it to be begun."""

    name: str
    rows: Callable[[], Iterator[Row]]
    needs: float = BEFORE_THE_END
    budget: Budget = field(default_factory=lambda: Budget(float("inf")))


@dataclass
class Deadline:
    """``seconds`` from now on."""

    seconds: float
    now: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.now()

    @property
    def spent(self) -> float:
        """Seconds since it was made."""
        return self.now() - self.start

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.seconds - self.spent


def run_jobs(
    jobs: Iterable[Job], deadline: Deadline, tidy: Callable[[], None], failures: list[str]
) -> Iterator[Row]:
    """The rows of all jobs in order; then what was not reached, what failed, and the time it took.

    What failed is in ``failures``; jobs add to it, and a job that raises is added here.
    """
    missed = []
    for job in jobs:
        if deadline.left < job.needs or job.budget.spent >= job.budget.seconds:
            missed.append(job.name)
            continue
        begun = deadline.spent
        try:
            yield from job.rows()
        except Exception as problem:
            failures.append(job.name)
            yield note(f"{job.name}: {in_short(problem)}")
        try:
            tidy()
        except Exception as problem:  # a device that is lost says so at the next call, whichever it is
            failures.append(f"after {job.name}")
            yield note(f"after {job.name}: {in_short(problem)}")
        job.budget.spent += deadline.spent - begun
    yield summary("not reached in time", missed)
    yield summary("failed", failures)
    details = {"what": "duration"}
    yield Row("duration", deadline.spent, "s", bar=deadline.seconds + SLACK, relation="<=", details=details)


def summary(title: str, names: list[str]) -> Row:
    """How many, by name; none is what there should be."""
    named = f"{title}: {'; '.join(names)}" if names else title
    details = {"what": title, "names": list(names)}
    return Row(named, len(names), "parts", bar=0, relation="==", details=details)
