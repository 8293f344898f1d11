"""exercises/ is made from solutions/ by nbgrader, and never over somebody's work."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import small_unit as small

from kvlearn.grading.catalogue import read_source, solutions_root, unit_names
from kvlearn.grading.release import committed, generate, release, stub

pytest.importorskip("nbgrader", reason="generation needs the extra kvlearn[teach]")

UNITS = unit_names(solutions_root())


@pytest.fixture
def solutions(tmp_path: Path) -> Path:
    return small.write_solutions(tmp_path / "solutions")


def released(solutions: Path, unit: str) -> dict[str, Any]:
    return json.loads(generate(unit, solutions)[f"{unit}.ipynb"])


def sources(notebook: dict[str, Any]) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"]]


def awkward() -> dict[str, Any]:
    """Every kind of region that nbgrader clears."""
    notebook = small.source_notebook()
    asked = {"grade": False, "locked": False, "solution": True}
    two = """class A:
    # BEGIN SOLUTION
    x = 1
    # END SOLUTION

\t### BEGIN SOLUTION ###
\t### END SOLUTION
y"""
    notebook["cells"] += [
        small.cell(two, "two", {"grade_id": "two"} | asked),
        small.cell("wiped = 1", "whole", {"grade_id": "whole"} | asked),
        small.cell("kept = 1", "plain"),
        {"cell_type": "markdown", "id": "text", "metadata": {}, "source": "Not a *solution*.\n"},
    ]
    return notebook


def test_the_pristine_form_is_what_nbgrader_releases(solutions: Path) -> None:
    small.write(awkward(), solutions / small.UNIT / f"{small.UNIT}.ipynb")
    cells = read_source(small.UNIT, solutions)["cells"]
    assert [stub(cell) for cell in cells] == sources(released(solutions, small.UNIT))


@pytest.mark.parametrize("unit", UNITS)
def test_the_pristine_form_of_every_unit_is_what_nbgrader_releases(unit: str) -> None:
    cells = read_source(unit, solutions_root())["cells"]
    assert [stub(cell) for cell in cells] == sources(released(solutions_root(), unit))


def test_what_is_released_depends_on_nothing_but_the_source(solutions: Path) -> None:
    first = generate(small.UNIT, solutions)
    notebook = small.source_notebook()
    notebook["metadata"] |= {
        "kernelspec": {"name": "mine", "display_name": "My Python", "language": "python"},
        "language_info": {"name": "python", "version": "3.99.1"},
        "widgets": {"application/vnd.jupyter.widget-state+json": {"state": {}}},
    }
    for number, cell in enumerate(notebook["cells"]):
        cell["metadata"]["execution"] = {"iopub.status.busy": "2025-01-01T00:00:00Z"}
        cell["execution_count"] = number
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["x"]}]
    small.write(notebook, solutions / small.UNIT / f"{small.UNIT}.ipynb")
    assert generate(small.UNIT, solutions) == first


def test_no_solution_is_released(solutions: Path) -> None:
    text = generate(small.UNIT, solutions)[f"{small.UNIT}.ipynb"].decode()
    assert all(f"return {right}" not in text for right in small.RIGHT.values())
    assert text.count("raise NotImplementedError()") == len(small.NAMES)


def test_the_notebook_alone_is_released_and_no_check_or_mistake(tmp_path: Path, solutions: Path) -> None:
    assert {file.name for file in (solutions / small.UNIT).iterdir()} > {"checks.py", "mistakes.py"}
    assert list(generate(small.UNIT, solutions)) == [f"{small.UNIT}.ipynb"]
    release(solutions, tmp_path / "exercises")
    released = [file for file in (tmp_path / "exercises").rglob("*") if file.is_file()]
    assert [file.name for file in released] == [f"{small.UNIT}.ipynb"]


def git(folder: Path, *command: str) -> None:
    safe = [
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "core.hooksPath=/dev/null",
        "-c",
        "commit.gpgsign=false",
    ]
    subprocess.run(["git", *safe, *command], cwd=folder, check=True, capture_output=True)


def test_a_learners_work_is_left_alone_and_named(tmp_path: Path, solutions: Path) -> None:
    exercises = tmp_path / "exercises"
    file = exercises / small.UNIT / f"{small.UNIT}.ipynb"
    assert release(solutions, exercises) == ([file], [])
    assert release(solutions, exercises) == ([], [])

    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    assert committed(file) == file.read_bytes()

    notebook = small.source_notebook()
    small.at(notebook, "answer1")["source"] = "### BEGIN SOLUTION\n### END SOLUTION\nnew_stub = 1"
    small.write(notebook, solutions / small.UNIT / f"{small.UNIT}.ipynb")
    solved = file.read_bytes().replace(b"raise NotImplementedError()", b"return 2 * x")
    file.write_bytes(solved)
    assert release(solutions, exercises) == ([], [file])
    assert file.read_bytes() == solved

    git(tmp_path, "checkout", str(file))
    assert release(solutions, exercises) == ([file], [])
    assert b"new_stub" in file.read_bytes()


def test_without_git_a_file_that_differs_is_left_alone(tmp_path: Path, solutions: Path) -> None:
    file = small.write({"mine": 1}, tmp_path / "exercises" / small.UNIT / f"{small.UNIT}.ipynb")
    assert committed(file) is None
    assert release(solutions, tmp_path / "exercises") == ([], [file])
    assert json.loads(file.read_text()) == {"mine": 1}
