"""Rules for the exercises of every unit, as a learner meets them: in a notebook, run in a kernel."""

import json
import os
import re
import subprocess
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import kvlearn
from kvlearn.grading import commands, exercises, grader
from kvlearn.grading import units as declared_units
from kvlearn.grading.catalogue import nbgrader_of, unit_names
from kvlearn.grading.grader import Grader
from kvlearn.grading.release import generate
from kvlearn.grading.report import Report
from kvlearn.grading.sandbox import MIME, Limits, Sandbox

ROOT = Path(__file__).resolve().parents[2]
SOLUTIONS = ROOT / "solutions"
UNITS = unit_names(SOLUTIONS)
Notebook = dict[str, Any]

# The tests of a unit run in one worker, which generates its exercises once.
every_unit = pytest.mark.parametrize(
    "unit", [pytest.param(unit, marks=pytest.mark.xdist_group(unit)) for unit in UNITS]
)
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
GENEROUS = Limits(seconds=900, setup=900, total=7200)  # others may use the machine


def source(unit: str) -> Notebook:
    return json.loads((SOLUTIONS / unit / f"{unit}.ipynb").read_text("utf-8"))


@cache
def released(unit: str) -> dict[str, bytes]:
    pytest.importorskip("nbgrader", reason="generation needs the extra kvlearn[teach]")
    return generate(unit, SOLUTIONS)


def marked(notebook: Notebook, key: str) -> list[Notebook]:
    return [cell for cell in notebook["cells"] if nbgrader_of(cell).get(key)]


def grade(file: Path) -> Report:
    (report,), faults = commands.grade([file], Grader(solutions=SOLUTIONS, limits=GENEROUS))
    assert not faults
    return report


def score_in(outputs: list[dict[str, Any]]) -> dict[str, Any]:
    (score,) = (output["data"][MIME] for output in outputs if MIME in output.get("data", {}))
    return score


def test_every_declared_unit_has_its_notebook_and_the_other_way_round() -> None:
    assert [unit.name for unit in declared_units()] == UNITS


@every_unit
def test_cells_are_marked_as_nbgrader_and_our_grader_need_them(unit: str) -> None:
    notebook = source(unit)
    asked = [exercise for exercise in exercises().values() if exercise.id.startswith(f"{unit[:2]}.")]
    assert notebook["metadata"]["kvlearn"] == {"unit": unit}

    marks = [nbgrader_of(cell) for cell in notebook["cells"] if nbgrader_of(cell)]
    keys = {"schema_version", "grade_id", "grade", "solution", "locked", "task"}
    assert all(set(mark) - {"points"} == keys and mark["schema_version"] == 3 for mark in marks)
    assert all(re.fullmatch(r"[a-zA-Z0-9_\-]+", mark["grade_id"]) for mark in marks)
    names = [name for cell in notebook["cells"] for name in (nbgrader_of(cell).get("grade_id"), cell["id"])]
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert len({mark["grade_id"] for mark in marks}) == len(marks), names

    checks = marked(notebook, "grade")
    assert [nbgrader_of(check)["points"] for check in checks] == [exercise.points for exercise in asked]
    assert [nbgrader_of(check)["grade_id"] for check in checks] == [exercise.grade_id for exercise in asked]
    assert [check["metadata"]["kvlearn"] for check in checks] == [e.metadata for e in asked]
    for check, exercise in zip(checks, asked, strict=True):
        assert "".join(check["source"]).split("\n") == ["import kvlearn", "", exercise.call]
        assert nbgrader_of(check)["locked"]
        assert not nbgrader_of(check)["solution"]
    for answer in marked(notebook, "solution"):
        assert not nbgrader_of(answer)["locked"]
        assert "".join(answer["source"]).count("### BEGIN SOLUTION") >= 1


@every_unit
def test_the_committed_exercises_are_what_generation_gives(unit: str) -> None:
    """A learner's solved copy in the work tree does not count: git's HEAD does."""

    def git(*command: str) -> bytes | None:
        try:
            done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, check=False)
        except OSError:
            return None
        return done.stdout if done.returncode == 0 else None

    listed = git("ls-tree", "-r", "-z", "--name-only", "HEAD", f"exercises/{unit}/")
    if listed:
        names = [name for name in listed.decode().split("\0") if name]
        files = {name.removeprefix(f"exercises/{unit}/"): git("show", f"HEAD:{name}") for name in names}
    else:
        warnings.warn(
            f"exercises/{unit} is not in git's HEAD: its files in the work tree are held instead",
            stacklevel=1,
        )
        folder = ROOT / "exercises" / unit
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert files == released(unit), "run make exercises and commit what it writes"


@every_unit
def test_a_unit_ends_in_its_progress_which_shows_nobodys_in_git(
    unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, cell, closing = source(unit)["cells"]
    assert closing["cell_type"] == "markdown"
    assert "".join(cell["source"]) == f'import kvlearn\n\nkvlearn.progress("{unit[:2]}")'
    assert cell["metadata"]["kvlearn"] == {"shows_only": True}
    assert (cell["id"], nbgrader_of(cell)["grade_id"]) == 2 * (f"u{unit[:2]}-progress",)
    monkeypatch.chdir(SOLUTIONS / unit)
    (output,) = cell["outputs"]
    data = {kind: "".join(content) for kind, content in output["data"].items()}
    assert data == kvlearn.progress(unit)._repr_mimebundle_()
    assert " 0 / " in data["text/plain"]
    assert not re.search(r"[1-9]\d* / ", data["text/plain"]), "somebody's points are in git"


def test_the_first_notebook_shows_the_progress_of_the_course_and_nobodys_in_git() -> None:
    cells = json.loads((ROOT / "notebooks/00_start_here.ipynb").read_text("utf-8"))["cells"]
    (cell,) = [c for c in cells if "kvlearn.progress()" in "".join(c["source"])]
    assert cell["metadata"]["tags"] == ["nbval-ignore-output"], "it changes with every unit and every answer"
    text = "".join(cell["outputs"][0]["data"]["text/plain"])
    assert "\n0 of " in text
    assert not re.search(r"[1-9]\d* / ", text), "somebody's points are in git"


@every_unit
def test_the_unsolved_notebook_is_graded_as_not_attempted(unit: str, tmp_path: Path) -> None:
    file = tmp_path / f"{unit}.ipynb"
    file.write_bytes(released(unit)[file.name])
    report = grade(file)
    assert {(result.score, result.status) for result in report.exercises} == {(0, "not attempted")}
    assert report.max_score == sum(nbgrader_of(c)["points"] for c in marked(source(unit), "grade"))


@every_unit
def test_the_outputs_kept_with_the_solution_show_full_marks(unit: str) -> None:
    for check in marked(source(unit), "grade"):
        score = score_in(check["outputs"])
        assert score["score"] == score["max_score"] == nbgrader_of(check)["points"]
        assert score["status"] == "passed"


@pytest.mark.slow
@every_unit
def test_the_solution_is_graded_with_full_marks_in_one_kernel(
    unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = []
    real: Callable[..., Sandbox] = grader.Sandbox
    monkeypatch.setattr(grader, "Sandbox", lambda *given: kernels.append(real(*given)) or kernels[-1])
    report = grade(SOLUTIONS / unit)
    assert {result.status for result in report.exercises} == {"passed"}
    assert report.score == report.max_score > 0
    assert len(kernels) == 1, "our own solution was taken for one that disturbs others"


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS if THOROUGH else UNITS[:1])
def test_a_bad_answer_costs_only_its_own_points(unit: str, tmp_path: Path) -> None:
    """tests/grading has answers as bad as can be: test_grader.py, and test_kernel_exercises.py in Triton."""
    notebook = source(unit)
    answers = marked(notebook, "solution")
    answers[0]["source"] = "import sys\nsys.exit('the first answer gives up')"
    answers[-1]["source"] = "this is no Python"
    file = tmp_path / f"{unit}.ipynb"
    file.write_text(json.dumps(notebook))
    first, *others, last = grade(file).exercises
    assert (first.score, first.status, last.score, last.status) == (0, "error", 0, "error")
    assert "SystemExit" in first.message
    assert "SyntaxError" in last.message
    assert {result.status for result in others} == {"passed"}
