"""A learner's copy of the small unit in work/: how tests solve it, and how the course changes under it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import small_unit as small
from typer.testing import CliRunner, Result

from kvlearn.cli import app

U = small.UNIT
FILE = Path(f"work/{U}/{U}.ipynb")
Notebook = dict[str, Any]


def kvlearn(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def read(file: Path = FILE) -> Notebook:
    return json.loads(file.read_text("utf-8"))


def sources(notebook: Notebook) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"]]


def source_of(cell_id: str, file: Path = FILE) -> str:
    return "".join(small.at(read(file), cell_id)["source"])


def solve(file: Path = FILE, **answers: str) -> None:
    """Write answers into a copy as a learner does: the bodies of functions."""
    notebook = read(file)
    for number, name in enumerate(small.NAMES, 1):
        if name in answers:
            small.at(notebook, f"answer{number}")["source"] = f"def {name}(x):\n    {answers[name]}"
    small.write(notebook, file)


def upstream(change: Callable[[Notebook], None], solutions: Path = Path("solutions")) -> None:
    """Change the unit's source notebook, as a new version of the course does."""
    file = solutions / U / f"{U}.ipynb"
    notebook = read(file)
    change(notebook)
    small.write(notebook, file)


def new_task(notebook: Notebook) -> None:
    """Exercise 90.1 gets a task cell, and another check cell."""
    task = {"cell_type": "markdown", "id": "task1", "metadata": {}, "source": "## 90.1 Double\n\nTwice x."}
    notebook["cells"].insert(1, task)
    check = small.at(notebook, "check1")
    check["source"] = f"{check['source']}  # twice"
    check["metadata"]["nbgrader"]["points"] = 4


def same_points(notebook: Notebook) -> None:
    small.at(notebook, "check1")["metadata"]["nbgrader"]["points"] = 3  # as checks.py has it


def new_stub(notebook: Notebook) -> None:
    cell = small.at(notebook, "answer1")
    cell["source"] = cell["source"].replace("def double(x):", 'def double(x):\n    """Twice x."""')
