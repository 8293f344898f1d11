"""Units, found by path: a folder of solutions/ with NAME.ipynb, checks.py and mistakes.py is one.

Nothing in ``kvlearn`` knows a unit: who adds a folder has added a unit. Exercises, their hints and our
solutions are looked up by id.
"""

import os
import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from kvlearn.grading import records
from kvlearn.grading.calls import UNIT_FOLDERS, shorten
from kvlearn.grading.exercise import Exercise, Unit
from kvlearn.grading.folders import nbgrader_of, read_source, shows_only, solutions_root, unit_names

PACKAGE = "kvlearn_units"  # units are imported as kvlearn_units.u01_full_attention.checks

_shown: dict[str, int] = {}  # hints of each exercise


def read_solutions(exercises: tuple[Exercise, ...], folder: Path) -> None:
    """Give each exercise the source of its solution and of the set-up cells before it, from the notebook."""
    cells = [c for c in read_source(folder.name, folder.parent)["cells"] if c["cell_type"] == "code"]
    places = {nbgrader_of(cell).get("grade_id"): i for i, cell in enumerate(cells)}
    for exercise in exercises:
        answer = f"{exercise.grade_id}-answer"
        if answer not in places:
            raise LookupError(f"{folder.name}.ipynb: exercise {exercise.id} has no answer cell {answer!r}")
        lines = cells[places[answer]]["source"].split("\n")
        exercise.solution = "\n".join(
            x for x in lines if "BEGIN SOLUTION" not in x and "END SOLUTION" not in x
        )
        before = [
            (nbgrader_of(cell), cell["source"]) for cell in cells[: places[answer]] if not shows_only(cell)
        ]
        exercise.set_up = tuple(
            code for mark, code in before if not (mark.get("solution") or mark.get("grade"))
        )


@cache
def load(folder: Path) -> Unit:
    """The unit in this folder: its notebook's solutions, its checks, its mistakes.

    LookupError if the notebook has no answer cell for an exercise, ValueError if a mistake does not fit the
    solution; both say which.
    """
    name = f"{PACKAGE}.u{folder.name}"
    for stale in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
        del sys.modules[stale]
    for package, path in ((PACKAGE, []), (name, [str(folder)])):
        module = ModuleType(package)
        module.__path__ = path
        sys.modules.setdefault(package, module)
    UNIT_FOLDERS.add(os.path.join(folder, ""))
    exercises: tuple[Exercise, ...] = import_module(f"{name}.checks").EXERCISES
    read_solutions(exercises, folder)
    try:
        import_module(f"{name}.mistakes")
    except ValueError as error:
        raise ValueError(f"{folder.name}/mistakes.py: {error}") from error
    return Unit(folder.name, exercises, folder)


def load_named(name: str) -> Unit:
    """The unit of this name in ``solutions_root()``."""
    return load((solutions_root() / name).resolve())


def units() -> tuple[Unit, ...]:
    """All units of the course, in order."""
    return tuple(map(load_named, unit_names(solutions_root())))


def unit_of(exercise_id: str) -> Unit:
    """The unit of an exercise that exists."""
    number = exercise_id.split(".")[0]
    return next(load_named(u) for u in unit_names(solutions_root()) if u.split("_")[0] == number)


def exercises() -> dict[str, Exercise]:
    """All exercises of the course by id, in order."""
    return {exercise.id: exercise for unit in units() for exercise in unit.exercises}


def find_exercise(exercise_id: str) -> Exercise:
    """The exercise with this id; loads its unit only.

    TypeError if it is no string, ValueError if there is none, FileNotFoundError if there are no units at all.
    """
    if not isinstance(exercise_id, str):
        came = type(exercise_id).__name__
        raise TypeError(
            f'exercise: expected str, got {came}{_meant(str(exercise_id))} (write the id in quotes: "01.1")'
        )
    name = exercise_id.strip()
    for unit in unit_names(solutions_root()):
        if unit.split("_")[0] == name.split(".")[0]:
            for exercise in load_named(unit).exercises:
                if exercise.id == name:
                    return exercise
    if not exercises():
        raise FileNotFoundError(
            f"no units in {solutions_root()}: expected NAME/NAME.ipynb and NAME/checks.py"
        )
    raise ValueError(
        f"exercise: expected one of {', '.join(map(repr, exercises()))}; "
        f"got {shorten(repr(name), 40)}{_meant(name)}"
    )


def _meant(text: str) -> str:
    """The question whether "1.1" means "01.1", if there is such an exercise."""
    numbers = re.fullmatch(r"0*([0-9]{1,3})\.0*([0-9]{1,3})", text)
    name = f"{int(numbers[1]):02}.{int(numbers[2])}" if numbers else ""
    return f"; did you mean {name!r}?" if name in exercises() else ""


@dataclass(frozen=True)
class Hint:
    """One hint, ready to be shown."""

    exercise: str
    number: int
    total: int
    text: str

    @property
    def remaining(self) -> str:
        left = self.total - self.number
        earlier = f' kvlearn.hint("{self.exercise}", 1) shows the first one again.' if self.number > 1 else ""
        if left == 0:
            ours = f'kvlearn.solution("{self.exercise}", confirm=True) shows ours.'
            return f"This was the last hint. {ours}{earlier}"
        return f"{left} more: run kvlearn.hint again.{earlier}"

    def __repr__(self) -> str:
        return f"Hint {self.number} of {self.total} for {self.exercise}: {self.text}\n{self.remaining}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        head = f"**Hint {self.number} of {self.total} for {self.exercise}**"
        return {"text/plain": repr(self), "text/markdown": f"{head}\n\n{self.text}\n\n*{self.remaining}*"}


def hint(exercise: str, number: int | None = None) -> Hint:
    """The next hint for an exercise: ``hint("01.3")``; after the last one, the last again.

    In a learner's copy it goes on where an earlier kernel stopped. ``hint("01.3", 1)`` shows the first one
    again. TypeError or ValueError if there is no such exercise or hint.
    """
    found = find_exercise(exercise)
    total = len(found.hints)
    if number is None:
        before = max(_shown.get(found.id, 0), records.hints_shown(found.id, total))
        number = min(before + 1, total)
    elif isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= total:
        raise ValueError(f"number: expected 1 to {total}, got {shorten(repr(number), 40)}")
    _shown[found.id] = max(number, _shown.get(found.id, 0))
    records.hint_shown(found.id, number)
    return Hint(found.id, number, total, found.hints[number - 1])


@dataclass(frozen=True)
class Solution:
    """Our answer, or how to ask for it, ready to be shown."""

    exercise: str
    code: str

    def __repr__(self) -> str:
        if not self.code:
            return (
                f'To see our answer to {self.exercise}: kvlearn.solution("{self.exercise}", confirm=True)\n'
                f'A hint may be all you need: kvlearn.hint("{self.exercise}")'
            )
        return self.code

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        shown = f"```python\n{self.code}\n```" if self.code else repr(self).replace("\n", "  \n")
        return {"text/plain": repr(self), "text/markdown": shown}


def solution(exercise: str, confirm: bool = False) -> Solution:
    """Our answer to an exercise, with ``confirm=True``; without, how to ask for it.

    It is the source of the answer cell in solutions/, the one place where it is written. TypeError or
    ValueError if there is no such exercise.
    """
    found = find_exercise(exercise)
    return Solution(found.id, found.solution if confirm is True else "")
