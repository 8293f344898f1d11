"""A learner's solved answers, taken from their copies in work/, to serve in another unit."""

from collections.abc import Sequence
from typing import Any

from kvlearn.grading import records, submission
from kvlearn.grading.calls import NotWritten, quiet, shorten
from kvlearn.grading.catalogue import unit_of
from kvlearn.grading.folders import own_copy, solutions_root
from kvlearn.grading.mistakes import compiled
from kvlearn.grading.submission import Task, Unusable
from kvlearn.grading.work import find_copy


def solved_answers(here: str, exercise: str) -> dict[str, Any]:
    """The names that the learner's copy defines for ``exercise``, which earned all its points as it is.

    Names of the cells given before it are among them and, where its check reads the answers before it, theirs
    too. Nothing is checked again: the answer must be the one that its last check has seen.

    ``here`` is the exercise that asks. Only a kernel in the learner's copy of its unit is told; a grader's
    kernel never is, so no score depends on what is in work/. Raises NotWritten with the reason, a line.
    """
    work = own_copy(here)
    if work is None:
        raise NotWritten("this is not your copy in work/")
    unit, solutions = unit_of(exercise).name, solutions_root()
    file = find_copy(unit, work)
    if file is None:
        raise NotWritten(f"there is no {unit} in work/ yet")
    tasks, places = submission.tasks_of(unit, solutions)
    try:
        submission.fill_in(tasks, places, submission.load(file))
    except Unusable as error:
        raise NotWritten(f"{unit}: {error}") from None
    task = next(each for each in tasks if each.id == exercise)
    record = records.read(work).results.get(exercise)
    if record is None or record.status != "passed":
        raise NotWritten(f"{exercise} does not have all its points yet")
    if (record.answer, record.checks) != (records.answer_of(tasks, task), records.checks_of(unit, solutions)):
        raise NotWritten(f"{exercise} changed since its last check: kvlearn progress checks it again")
    return _run(tasks[: tasks.index(task) + 1], task)


def _run(tasks: Sequence[Task], last: Task) -> dict[str, Any]:
    """The names that the cells of these tasks define: those of the last task and those that it needs."""
    space: dict[str, Any] = {"__name__": f"collected {last.id}"}
    with quiet():
        for task in tasks:
            cells = [*task.setup, *(task.pieces if task is last or last.reads_answers else ())]
            for i, cell in enumerate(cells):
                try:
                    exec(compiled(cell, f"<{task.id}, cell {i}>"), space)
                except (Exception, SystemExit) as error:
                    # An earlier answer may be broken, if this one does not need it.
                    if task is last or i < len(task.setup):
                        reason = f"{type(error).__name__}: {shorten(str(error))}"
                        raise NotWritten(f"{last.id} does not run on its own ({reason})") from None
    return space
