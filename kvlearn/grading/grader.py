"""Grades a notebook: its answers, in the pristine notebook and a watched kernel, by the original checks.

One kernel runs the whole notebook. An exercise that takes it down, or changes what others rely on, costs the
others nothing: they go on in kernels of their own, each with the set-up, its own answer and its own check.
"""

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from kvlearn.grading import submission
from kvlearn.grading.folders import solutions_root
from kvlearn.grading.integrity import LEAVING, OWN, READING, SILENT, STATE, changed, relied_on, request
from kvlearn.grading.kept import Kept
from kvlearn.grading.report import Report, Result
from kvlearn.grading.sandbox import KernelLost, Limits, OverTime, Sandbox, TimedOut
from kvlearn.grading.score import MIME, STATUSES
from kvlearn.grading.submission import Submission, Task, Unusable

State = dict[str, str]


class Disturbed(Exception):
    """The kernel lives, but an answer changed in it what later exercises rely on."""


class Clock:
    """How long a notebook may still run: it counts while one of the notebook's kernels runs.

    Waiting for a kernel, which other notebooks have, costs nothing.
    """

    def __init__(self, total: float) -> None:
        self._left, self._running, self._since = total, 0, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        if not self._running:
            self._since = time.monotonic()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._left -= time.monotonic() - self._since

    def give(self, seconds: float) -> None:
        """Time that does not count, since a kernel waited for a processor."""
        self._left += seconds

    @property
    def end(self) -> float:
        """When time is up (of ``time.monotonic``), if a kernel runs from now on."""
        return self._left + (self._since if self._running else time.monotonic())


class Grader:
    """Grades notebooks with at most ``jobs`` kernels at a time. ``done`` is told of every exercise graded.

    ``known`` gives, for the exercises of a notebook, the results that need no run, by exercise. ``kept``
    holds the results of whole notebooks: one that is unchanged is not run again, and ``skipped`` is told its
    results.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        jobs: int = 2,
        solutions: Path | None = None,
        done: Callable[[Result], None] = lambda result: None,
        known: Callable[[str, list[Task]], dict[str, Result]] = lambda unit, tasks: {},
        kept: Kept | None = None,
        skipped: Callable[[list[Result]], None] = lambda results: None,
    ) -> None:
        self.limits = limits or Limits()
        self.jobs = jobs
        self.solutions = (solutions or solutions_root()).resolve()
        self.done = done
        self.known = known
        self.kept, self.skipped = kept, skipped

    def read(self, file: Path, unit: str) -> list[Task]:
        """The unit's exercises with a notebook's answers in them; or ``Unusable``."""
        tasks, places = submission.tasks_of(unit, self.solutions)
        submission.fill_in(tasks, places, submission.submitted(file, self.solutions))
        return tasks

    async def grade(self, submitted: Submission, kernels: asyncio.Semaphore) -> Report:
        """The report on a notebook; ``Unusable`` or ``NoKernel`` if there can be none."""
        unit = submitted.unit
        tasks = self.read(submitted.file, unit)
        key = self.kept.key(unit, self.solutions, tasks, self.limits) if self.kept else ""
        exercises = self.kept.get(key, tasks) if self.kept else None
        if exercises is not None:
            self.skipped(exercises)
        else:
            exercises = await self.run(submitted, tasks, kernels)
            if self.kept:
                self.kept.put(key, exercises)
        return Report(submitted.student, unit, exercises, submitted.shown)

    async def run(self, submitted: Submission, tasks: list[Task], kernels: asyncio.Semaphore) -> list[Result]:
        """The results of a notebook's exercises, in order."""
        unit = submitted.unit
        known = self.known(unit, tasks)
        results = {task.id: self._tell(_untouched(task)) for task in tasks if task.untouched}
        results |= {name: self._tell(result) for name, result in known.items() if name not in results}
        clock = Clock(self.limits.total)
        if any(task.id not in results and not (known and task.reads_answers) for task in tasks):
            async with kernels:
                with clock.running():
                    results |= await self._together(unit, tasks, clock, known)
        rest = [task for task in tasks if task.id not in results]
        for reads in (False, True):  # those that read the answers to others come when these are graded
            passed = (
                {result.id for result in results.values() if result.status == "passed"} if reads else set()
            )
            alone = await asyncio.gather(
                *(
                    self._alone(unit, tasks[: tasks.index(task) + 1], clock, kernels, passed)
                    for task in rest
                    if task.reads_answers is reads
                )
            )
            results |= {result.id: result for result in alone}
        return [results[task.id] for task in tasks]

    @asynccontextmanager
    async def _sandbox(self, clock: Clock) -> AsyncIterator[Sandbox]:
        async with Sandbox(self.limits, {"KVLEARN_SOLUTIONS": str(self.solutions)}) as box:
            try:
                yield box
            finally:
                clock.give(box.waited)

    async def _together(
        self, unit: str, tasks: list[Task], clock: Clock, known: dict[str, Result]
    ) -> dict[str, Result]:
        """All touched exercises in one kernel, as far as that goes.

        Those in ``known`` are left out, and then what reads the answers to others too: it comes alone.
        """
        results: dict[str, Result] = {}
        async with self._sandbox(clock) as box:
            baseline: State = {}
            for task in tasks:
                try:
                    baseline = await self._set_up(box, unit, task.setup, baseline, first=not results)
                    left_out = task.untouched or task.id in known or (task.reads_answers and bool(known))
                    if not left_out:
                        results[task.id] = self._tell(await self._attempt(box, unit, task, baseline, clock))
                except Disturbed as disturbed:
                    result = disturbed.args[0]
                    if result.status != "error" or not results:
                        results[task.id] = self._tell(result)
                    break
                except KernelLost as lost:
                    # Its own fault, surely, if it ran too long or none ran before it; else it is tried alone.
                    if isinstance(lost, OverTime) or not results:
                        results[task.id] = self._tell(_lost(task, lost, self.limits))
                    break
                except Unusable:
                    if not results:
                        raise
                    break
        return results

    async def _alone(
        self, unit: str, tasks: list[Task], clock: Clock, kernels: asyncio.Semaphore, passed: set[str]
    ) -> Result:
        """The last of ``tasks`` in a kernel that has seen the set-up of them all, and of the other answers
        only those to the exercises in ``passed``. If it ends that kernel, it is tried without them."""
        task, again = tasks[-1], False
        async with kernels:
            if clock.end <= time.monotonic():
                return self._tell(_zero(task, _no_time(self.limits)))
            with clock.running():
                async with self._sandbox(clock) as box:
                    try:
                        setup = [source for each in tasks for source in each.setup]
                        baseline = await self._set_up(box, unit, setup, {}, first=True)
                        for each in tasks[:-1]:
                            for source in each.pieces if each.id in passed else ():
                                await box.run(source, self.limits.seconds)
                        result = await self._attempt(box, unit, task, baseline, clock)
                    except Disturbed as disturbed:
                        result = disturbed.args[0]
                    except TimedOut:
                        result = _zero(task, _too_long(self.limits))
                    except KernelLost as lost:
                        result, again = _lost(task, lost, self.limits), bool(passed)
        if again:
            return await self._alone(unit, tasks, clock, kernels, set())
        return self._tell(result)

    async def _set_up(self, box: Sandbox, unit: str, cells: list[str], baseline: State, first: bool) -> State:
        """Run cells of ours; returns what checks and later exercises rely on from here on."""
        if baseline and not cells:
            return baseline
        for source in cells:
            for output in await box.run(source, self.limits.setup):
                if output["output_type"] == "error":
                    raise Unusable(f"the unit's own set-up failed: {output['ename']}: {output['evalue']}")
        now = await self._state(box, unit, self.limits.setup)
        if first:
            return now
        return {
            name: now.get(name, "") if name.startswith(OWN) else value for name, value in baseline.items()
        }

    async def _attempt(self, box: Sandbox, unit: str, task: Task, baseline: State, clock: Clock) -> Result:
        """The answer and its check. ``Disturbed`` carries the result if the kernel must not be used again."""
        rest = clock.end - time.monotonic() + box.waited
        end = box.now() + min(self.limits.seconds, rest)
        error = ""
        try:
            for source in task.pieces:
                error = _error(await box.run(source, _left(box, end))) or error
            touched = changed(baseline, await self._state(box, unit, self.limits.seconds))
            if LEAVING in touched:
                raise Disturbed(_zero(task, "the answer ends the kernel: leave out exit() and quit()"))
            outputs = await box.run(task.check, _left(box, end))
            touched += changed(baseline, await self._state(box, unit, self.limits.seconds))
        except TimedOut:
            return _zero(
                task, _too_long(self.limits) if self.limits.seconds < rest else _no_time(self.limits)
            )
        guilty = sorted(name for name in touched if relied_on(name, self.solutions / unit))
        if guilty:
            raise Disturbed(_zero(task, _accused(guilty)))
        result = _score(task, outputs, error)
        if touched:
            raise Disturbed(result)
        return result

    async def _state(self, box: Sandbox, unit: str, seconds: float) -> State:
        answer = await box.ask(request(unit), STATE, seconds)
        return answer if isinstance(answer, dict) else {SILENT: ""}

    def _tell(self, result: Result) -> Result:
        self.done(result)
        return result


def _left(box: Sandbox, end: float) -> float:
    left = end - box.now()
    if left <= 0:
        raise TimedOut
    return left


def _untouched(task: Task) -> Result:
    if task.turned:
        return _zero(task, _turned(task))
    message = "the answer cell is missing" if task.missing else ""
    return Result(task.id, 0.0, task.points, "not attempted", message)


def _accused(guilty: list[str]) -> str:
    if READING in guilty:
        return "the answer reads solutions/, where our own answers are"
    return f"the answer changes {guilty[0]}, which the checks rely on"


def _turned(task: Task) -> str:
    if not task.turned:
        return ""
    return f"the answer is in a {task.turned} cell, which does not run: make it a code cell (Esc, then Y)"


def _zero(task: Task, message: str) -> Result:
    return Result(task.id, 0.0, task.points, "error", message)


def _lost(task: Task, lost: KernelLost, limits: Limits) -> Result:
    return _zero(task, _too_long(limits) if isinstance(lost, OverTime) else str(lost))


def _too_long(limits: Limits) -> str:
    return f"it took longer than {limits.seconds:g} s"


def _no_time(limits: Limits) -> str:
    return f"not finished: the notebook as a whole took longer than {limits.total:g} s"


def _error(outputs: list[dict[str, Any]]) -> str:
    errors = [output for output in outputs if output["output_type"] == "error"]
    return one_line(f"{errors[-1].get('ename')}: {errors[-1].get('evalue')}") if errors else ""


def one_line(text: str) -> str:
    """Text of the learner's doing as one line of printable characters."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 400 else f"{text[:399]}…"


def _score(task: Task, outputs: list[dict[str, Any]], error: str) -> Result:
    """The points that the check's own result carries, if it is one and in order."""
    found = [output for output in outputs if MIME in output.get("data", {})]
    if not found:
        return _zero(task, _turned(task) or error or _error(outputs) or "the check gave no score")
    score = found[0]["data"][MIME]
    if len(found) > 1 or found[0]["output_type"] != "execute_result" or not isinstance(score, dict):
        return _zero(task, "the check's output holds a score that is not the check's")
    points: Any = score.get("score")
    status = score.get("status")
    in_order = (
        score.get("exercise") == task.id
        and score.get("max_score") == task.points
        and isinstance(points, int | float)
        and math.isfinite(points)
        and 0 <= points <= task.points
        and status in STATUSES
    )
    if not in_order:
        return _zero(task, "the check's score is not in order")
    return Result(task.id, float(points), task.points, str(status), one_line(str(score.get("message", ""))))
