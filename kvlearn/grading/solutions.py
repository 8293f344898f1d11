"""``solution``: our answer to an exercise, read from the one place where it is written."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvlearn.grading.catalogue import find_exercise, unit_of
from kvlearn.grading.exercise import Exercise
from kvlearn.grading.release import solutions_root


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

    TypeError or ValueError if there is no such exercise, FileNotFoundError if its notebook is not installed.
    """
    found = find_exercise(exercise)
    return Solution(found.id, solution_code(found) if confirm is True else "")


def solution_code(exercise: Exercise) -> str:
    """The source of the answer cell in solutions/, without its markers."""
    notebook = json.loads(solution_notebook(exercise).read_text(encoding="utf-8"))
    wanted = f"{exercise.grade_id}-answer"
    for cell in notebook["cells"]:
        if cell["metadata"].get("nbgrader", {}).get("grade_id") == wanted:
            lines = "".join(cell["source"]).splitlines()
            return "\n".join(
                line for line in lines if "BEGIN SOLUTION" not in line and "END SOLUTION" not in line
            )
    raise LookupError(
        f"exercise {exercise.id}: no answer cell {wanted!r} in {solution_notebook(exercise).name}"
    )


def solution_notebook(exercise: Exercise) -> Path:
    """The notebook that holds our answers to an exercise's unit."""
    name = unit_of(exercise).name
    path = solutions_root() / name / f"{name}.ipynb"
    if not path.is_file():
        raise FileNotFoundError(f"the solutions of {name}: expected at {path}")
    return path
