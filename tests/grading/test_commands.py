"""What ``kvlearn grade`` and ``kvlearn progress`` print, and what they say of notebooks they cannot grade."""

import asyncio
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import small_unit as small
from typer.testing import CliRunner, Result

from kvlearn.cli import app
from kvlearn.grading import commands
from kvlearn.grading.commands import find
from kvlearn.grading.report import Report
from kvlearn.grading.runner import Grader


@pytest.fixture
def solutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course of the small unit alone, in which the commands are run from ``tmp_path``."""
    folder = small.write_solutions(tmp_path / "solutions")
    for module in ("runner", "progress"):
        monkeypatch.setattr(f"kvlearn.grading.{module}.solutions_root", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


def put(path: str, notebook: dict[str, Any] | None = None) -> Path:
    return small.write(notebook or small.answered(), Path(path) / small.UNIT / f"{small.UNIT}.ipynb")


def kvlearn(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_what_a_path_means(solutions: Path) -> None:
    ada, bob = put("submitted/ada"), put("submitted/bob")
    own = put("exercises")
    small.write({}, Path("submitted/bob/scratch.ipynb"))
    small.write({}, Path(f"submitted/ada/.ipynb_checkpoints/{small.UNIT}/{small.UNIT}.ipynb"))
    assert [(f.file.resolve(), f.student) for f in find(Path("submitted"))] == [
        (ada.resolve(), "ada"),
        (bob.resolve(), "bob"),
    ]
    for path in (ada, ada.parent, ada.parent.parent):
        assert [f.student for f in find(path)] == ["ada"]
    for path in (own, own.parent, own.parent.parent):
        assert [(f.file.resolve(), f.student) for f in find(path)] == [(own.resolve(), "")]


def test_a_notebook_with_another_name_is_taken_for_the_units(solutions: Path) -> None:
    file = put("exercises")
    file.rename(file.with_name("my copy.ipynb"))
    (graded,) = json.loads(kvlearn("grade", "exercises/90_small", "--json").stdout)
    assert graded["unit"] == small.UNIT


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (f"{small.UNIT}.ipynb", b"{\n<<<<<<< HEAD\n 'cells':", "merge conflict markers"),
        (f"{small.UNIT}.ipynb", b"{\n  'cells': ", "not JSON"),
        (f"{small.UNIT}.ipynb", b"\xff\xfe\x00", "not JSON"),
        (f"{small.UNIT}.ipynb", b" \n", "the file is empty"),
        (f"{small.UNIT}.ipynb", b"[" * 10**6, "not JSON"),
        (f"{small.UNIT}.ipynb", b"[1, 2]", "not a Jupyter notebook"),
        (
            f"{small.UNIT}.ipynb",
            b'{"worksheets": [], "nbformat": 3}',
            "a notebook of format 3: open it in JupyterLab",
        ),
        (f"{small.UNIT}.ipynb", b'{"cells": 3}', "not a Jupyter notebook"),
        (f"{small.UNIT}.ipynb", b'{"cells": [], "metadata": {}}', "none of its cells"),
        ("holiday.ipynb", b'{"cells": [], "metadata": {"kvlearn": 1}}', "not a unit of kvlearn"),
        ("missing.ipynb", None, "no such file"),
        ("folder/notes.txt", b"hello", "no notebook in it"),
    ],
)
def test_what_cannot_be_graded_is_said_in_a_line_and_the_others_are_graded(
    solutions: Path, name: str, content: bytes | None, complaint: str
) -> None:
    good, bad = put("submitted/ada"), Path(name)
    if content is not None:
        bad.parent.mkdir(exist_ok=True)
        bad.write_bytes(content)
    asked = bad.parent if name.startswith("folder") else bad
    result = kvlearn("grade", str(asked), str(good), "--json")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"kvlearn: {asked}: ")
    assert complaint in line
    graded = {each["student"]: each for each in json.loads(result.stdout)}
    assert graded["ada"]["max_score"] == 15
    if name.startswith(small.UNIT):
        assert [(e["score"], e["status"]) for e in graded[""]["exercises"]] == 5 * [(0, "error")]
    else:
        assert list(graded) == ["ada"]


def test_a_score_of_nothing_is_a_success_of_the_grader(solutions: Path) -> None:
    put("exercises")
    result = kvlearn("grade", "exercises")
    assert result.exit_code == 0
    assert "0 / 15" in result.stdout
    assert not result.stderr


def test_a_report_can_go_to_a_file(solutions: Path) -> None:
    put("exercises")
    result = kvlearn("grade", "exercises", "--html", "-o", "report.html")
    assert (result.exit_code, result.stdout) == (0, "")
    assert Path("report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.fixture
def no_grading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(commands, "grade")


@pytest.mark.parametrize("option", [[], ["--json"], ["--watch"]])
@pytest.mark.parametrize("output", [f"exercises/{small.UNIT}/{small.UNIT}.ipynb", "new.ipynb", "link"])
def test_a_report_never_replaces_a_notebook(
    solutions: Path, no_grading: None, output: str, option: list[str]
) -> None:
    file = put("exercises")
    before = file.read_bytes()
    Path("link").hardlink_to(file)
    result = kvlearn("grade", "exercises", *option, "-o", output)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"kvlearn: {output}: is a notebook, and a report would replace it")
    assert file.read_bytes() == before
    assert not Path("new.ipynb").exists()


@pytest.mark.parametrize(
    ("output", "complaint"),
    [("nowhere/report.json", "no such folder"), (".", "is a folder"), ("locked", "cannot be written")],
)
def test_where_no_report_can_go_nothing_is_graded(
    solutions: Path, no_grading: None, monkeypatch: pytest.MonkeyPatch, output: str, complaint: str
) -> None:
    put("exercises")
    Path("locked").touch()  # root, too, is refused it
    access = os.access
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK and access(path, mode))
    result = kvlearn("grade", "exercises", "--json", "-o", output)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"kvlearn: {output}: ")
    assert complaint in line


def test_a_report_that_cannot_be_written_in_the_end_goes_to_stdout(
    solutions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    put("exercises")
    monkeypatch.setattr(Path, "write_text", full)
    result = kvlearn("grade", "exercises", "--json", "-o", "report.json")
    assert result.exit_code == 1
    assert result.stderr == "kvlearn: report.json: No space left on device; the report goes to stdout\n"
    assert json.loads(result.stdout)[0]["max_score"] == 15


def test_what_no_one_foresaw_in_one_notebook_leaves_the_others_their_reports(
    solutions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for student in ("ada", "bob"):
        put(f"submitted/{student}")
    grade = Grader.grade

    async def stumble(self: Grader, file: Path, student: str, kernels: asyncio.Semaphore) -> Report:
        if student == "ada":
            raise UnicodeError("\ud800\nsurrogates not allowed")
        return await grade(self, file, student, kernels)

    monkeypatch.setattr(Grader, "grade", stumble)
    result = kvlearn("grade", "submitted", "--json")
    assert result.exit_code == 1
    assert "could not be graded (UnicodeError" in result.stderr
    ada, bob = json.loads(result.stdout)
    assert {(e["score"], e["status"]) for e in ada["exercises"]} == {(0, "error")}
    assert {e["status"] for e in bob["exercises"]} == {"not attempted"}


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_a_student_whose_folder_is_no_utf_8_has_a_report(solutions: Path) -> None:
    put(os.fsdecode(b"submitted/\xe9va"))
    (graded,) = json.loads(kvlearn("grade", "submitted", "--json").stdout)
    assert graded["student"] == "?va"


def test_only_one_form_of_report_at_a_time(solutions: Path) -> None:
    result = kvlearn("grade", "exercises", "--json", "--csv")
    assert result.exit_code == 2
    assert "at most one of" in result.stderr


def test_progress_counts_units_that_are_untouched_without_a_kernel(
    solutions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvlearn.grading.runner.Sandbox", None)
    small.write(small.source_notebook(), solutions / "91_next" / "91_next.ipynb")
    put("exercises")
    result = kvlearn("progress")
    assert result.exit_code == 0
    assert re.search(r"90_small\W+0\W+0\W+5\W+0 / 15", result.stdout)
    assert re.search(r"91_next.*no notebook here", result.stdout)


def test_progress_says_where_it_looked_in_vain(solutions: Path) -> None:
    result = kvlearn("progress", "nowhere")
    assert result.exit_code == 1
    assert result.stderr == "kvlearn: nowhere: no such folder; say where the exercises are\n"


def test_watching_grades_again_when_the_notebook_is_saved(
    solutions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = put("exercises")
    graded: list[int] = []

    def grade(request: commands.Request) -> bool:
        graded.append(file.stat().st_size)
        return False

    def save_twice_then_stop(pause: float) -> None:
        if len(graded) == 3:
            raise KeyboardInterrupt
        file.write_text(file.read_text() + "\n")

    monkeypatch.setattr(commands, "grade_and_show", grade)
    monkeypatch.setattr(time, "sleep", save_twice_then_stop)
    assert kvlearn("grade", "exercises", "--watch").exit_code == 0
    assert len(set(graded)) == 3
