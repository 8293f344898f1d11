"""Adding a unit means adding a folder: it is found, checked, graded, released."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_unit as small
from typer.testing import CliRunner

import kvlearn
from kvlearn.cli import app
from kvlearn.grading import exercises, units
from kvlearn.grading.catalogue import load, solutions_root
from kvlearn.grading.release import release

OURS = solutions_root()


@pytest.fixture
def solutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the course's first unit with a new folder beside it."""
    name = "01_full_attention"
    shutil.copytree(OURS / name, tmp_path / "solutions" / name)
    monkeypatch.setenv("KVLEARN_SOLUTIONS", str(tmp_path / "solutions"))
    return small.write_solutions(tmp_path / "solutions")


def test_its_exercises_are_found_beside_the_others(solutions: Path) -> None:
    assert [unit.name for unit in units()] == ["01_full_attention", small.UNIT]
    assert list(exercises())[-6:] == ["01.9", "90.1", "90.2", "90.3", "90.4", "90.5"]
    assert load(solutions / small.UNIT).points == 15


def test_its_answers_are_checked_with_hints_mistakes_and_solution(solutions: Path) -> None:
    assert kvlearn.check("90.1", lambda x: x * 2) == 3
    wrong = kvlearn.check("90.1", lambda x: x * 3)
    assert [mistake.name for mistake in wrong.mistakes] == ["added once too often"]
    assert kvlearn.hint("90.1").text == "a"
    assert kvlearn.solution("90.1", confirm=True).code == "def double(x):\n    return x + x"


@pytest.mark.slow
def test_its_notebook_is_graded_whole(solutions: Path, tmp_path: Path) -> None:
    file = small.write(small.answered(double="return 2 * x", shift="return x - 1"), tmp_path / "ada.ipynb")
    (report,) = json.loads(CliRunner().invoke(app, ["grade", str(file), "--json"]).stdout)
    double, shift, *rest = report["exercises"]
    assert (double["score"], double["status"]) == (3, "passed")
    assert shift["message"].startswith("shifted back: ")
    assert {each["status"] for each in rest} == {"not attempted"}


def test_its_notebook_is_released_without_what_lies_beside(solutions: Path, tmp_path: Path) -> None:
    pytest.importorskip("nbgrader", reason="generation needs the extra kvlearn[teach]")
    written, _ = release(solutions, tmp_path / "exercises")
    assert {file.name for file in written} == {"01_full_attention.ipynb", f"{small.UNIT}.ipynb"}
    assert {file.name for file in (tmp_path / "exercises" / small.UNIT).iterdir()} == {f"{small.UNIT}.ipynb"}


@pytest.mark.slow
def test_an_installed_package_finds_its_units_within_itself(tmp_path: Path) -> None:
    """Laid out as the wheel is."""
    package = tmp_path / "kvlearn"
    shutil.copytree(Path(kvlearn.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(OURS, package / "_solutions", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    code = """
import kvlearn
from kvlearn.grading import find_exercise, judge
assert kvlearn.__file__.startswith(__import__("sys").argv[1])
for name in ("01.1", "06.2"):
    exercise = find_exercise(name)
    mistake = exercise.misconceptions[0]
    assert [each.name for each in judge(exercise, mistake.answers, 0).mistakes] == [mistake.name]
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    environment.pop("KVLEARN_SOLUTIONS", None)
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
