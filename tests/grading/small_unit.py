"""A unit of five short exercises in a folder, so that the grader's tests are about no unit of the course."""

import copy
import json
from pathlib import Path
from typing import Any

UNIT = "90_small"

SETUP = "import torch\n\nweights = torch.ones(3)"

CHECKS = '''from kvlearn.grading import Exercise


def declare(number, name, right):
    exercise = Exercise(f"90.{number}", name, name, answers=(name,), hints=("a", "b", "c"))

    @exercise.requirement(2, "a batch", rounds=1)
    def batch(t, answer):
        """the right numbers"""
        x = t.randn(2, 3)
        t.close(answer(x), right(x))

    @exercise.requirement(1, "an empty batch", rounds=1)
    def empty(t, answer):
        """nothing for nothing"""
        x = t.randn(0, 3)
        t.close(answer(x), right(x))

    return exercise


double = declare(1, "double", lambda x: x * 2)
shift = declare(2, "shift", lambda x: x + 1)
negate = declare(3, "negate", lambda x: x * -1)
halve = declare(4, "halve", lambda x: x / 2)
square = declare(5, "square", lambda x: x * x)

EXERCISES = (double, shift, negate, halve, square)
'''

MISTAKES = '''from .checks import double, shift

double.mistakes(
    r"""
    added once too often
        x + x → x + x + x
    Twice a number is the sum of two of it, not of three.
    """
)


@shift.misconception("shifted back")
def back(x):
    """The number before was given; asked for was the one after."""
    return x - 1
'''

RIGHT = {"double": "x + x", "shift": "1 + x", "negate": "-x", "halve": "x * 0.5", "square": "x**2"}
NAMES = tuple(RIGHT)


def cell(source: str, cell_id: str, nbgrader: dict[str, Any] | None = None) -> dict[str, Any]:
    metadata: dict[str, Any] = (
        {"nbgrader": {"schema_version": 3, "task": False} | nbgrader} if nbgrader else {}
    )
    made = {"cell_type": "code", "execution_count": None, "id": cell_id, "metadata": metadata}
    return made | {"outputs": [], "source": source}


def source_notebook() -> dict[str, Any]:
    locked = {"grade": False, "locked": True, "solution": False}
    cells = [cell(SETUP, "setup", {"grade_id": "u90-setup"} | locked)]
    for number, name in enumerate(NAMES, 1):
        body = f"    ### BEGIN SOLUTION\n    return {RIGHT[name]}\n    ### END SOLUTION"
        asked = {"grade_id": f"u90-{number}-{name}-answer", "grade": False, "locked": False, "solution": True}
        graded = {
            "grade_id": f"u90-{number}-{name}",
            "grade": True,
            "locked": True,
            "points": 3,
            "solution": False,
        }
        cells.append(cell(f"def {name}(x):\n{body}", f"answer{number}", asked))
        cells.append(
            cell(f'import kvlearn\n\nkvlearn.check("90.{number}", {name})', f"check{number}", graded)
        )
    return {"cells": cells, "metadata": {"kvlearn": {"unit": UNIT}}, "nbformat": 4, "nbformat_minor": 5}


def write_solutions(folder: Path) -> Path:
    """A solutions/ folder that holds this one unit."""
    write(source_notebook(), folder / UNIT / f"{UNIT}.ipynb")
    (folder / UNIT / "checks.py").write_text(CHECKS)
    (folder / UNIT / "mistakes.py").write_text(MISTAKES)
    return folder


def write(notebook: dict[str, Any], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(notebook, indent=1))
    return file


def answered(**answers: str) -> dict[str, Any]:
    """The released notebook with these answers: the body of a function, or a whole cell after an "!"."""
    notebook = copy.deepcopy(source_notebook())
    for number, name in enumerate(NAMES, 1):
        body = answers.get(name, "# YOUR CODE HERE\n    raise NotImplementedError()")
        whole = body.startswith("!")
        at(notebook, f"answer{number}")["source"] = body[1:] if whole else f"def {name}(x):\n    {body}"
    return notebook


def at(notebook: dict[str, Any], cell_id: str) -> dict[str, Any]:
    return next(cell for cell in notebook["cells"] if cell["id"] == cell_id)


ALL_RIGHT = {name: f"return {RIGHT[name]}" for name in NAMES}
