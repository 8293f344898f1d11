"""Output of ``kvlearn grade`` and ``kvlearn progress``, also for notebooks they cannot grade."""

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
from kvlearn.grading.grader import Grader
from kvlearn.grading.report import Report
from kvlearn.grading.report import Result as Graded
from kvlearn.grading.submission import Submission, find


@pytest.fixture
def solutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course of the small unit alone, in which the commands are run from ``tmp_path``."""
    folder = small.write_solutions(tmp_path / "solutions")
    monkeypatch.setenv("KVLEARN_SOLUTIONS", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def put(path: str, notebook: dict[str, Any] | None = None) -> Path:
    return small.write(notebook or small.answered(), Path(path) / small.UNIT / f"{small.UNIT}.ipynb")


def kvlearn(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def found(path: str, solutions: Path) -> list[tuple[str, str]]:
    submissions, faults = find(Path(path), solutions)
    assert not faults
    assert {each.unit for each in submissions} == {small.UNIT}
    return [(str(each.file), each.student) for each in submissions]


def test_what_a_path_means(solutions: Path) -> None:
    ada, bob, own = put("submitted/ada"), put("submitted/bob"), put("exercises")
    small.write({}, Path(f"submitted/ada/.ipynb_checkpoints/{small.UNIT}/{small.UNIT}.ipynb"))
    small.write({}, Path(f"submitted/ada/{small.UNIT}/.ipynb_checkpoints/{small.UNIT}-checkpoint.ipynb"))
    assert found("submitted", solutions) == [(str(ada), "ada"), (str(bob), "bob")]
    for path in (ada, ada.parent, ada.parent.parent):
        assert found(str(path), solutions) == [(str(ada), "ada")]
    for path in (own, own.parent, own.parent.parent):
        assert found(str(path), solutions) == [(str(own), "")]


U = small.UNIT
LAYOUTS = {
    f"all/alice/{U}/{U}.ipynb": "alice",
    f"all/bob/{U}/{U}-Copy1.ipynb": "bob",
    f"all/carol/{U}.ipynb": "carol",
    f"all/dave/{U}/{U} (1).ipynb": "dave",
    f"all/eve/submission/{U}.ipynb": "eve",
    f"all/frank/Submission (2)/{U}/{U}_final.ipynb": "frank",
    f"all/grace/work/{U}/answers.ipynb": "grace",
    f"all/Heidi Lamarr_123_assignsubmission_file_/Copy of {U}.ipynb": "Heidi Lamarr",
    f"all/s1234567/{U}.ipynb": "s1234567",
    f"flat/ivan_{U}.ipynb": "ivan",
    f"flat/judy-{U}-Copy1.ipynb": "judy",
    f"flat/{U}_7654321.ipynb": "7654321",
    f"flat/kaplanaylin_LATE_4711_815_{U}-1.ipynb": "kaplanaylin",
    f"course/submitted/leo/{U}/{U}.ipynb": "leo",
    f"course/submitted/mia/{U}/attempt-2/{U}.ipynb": "mia",
}


def test_every_notebook_of_a_class_has_its_student_in_whatever_layout(solutions: Path) -> None:
    for file in LAYOUTS:
        small.write(small.answered(), Path(file))
    for tree in ("all", "flat", "course"):
        here = {file: student for file, student in LAYOUTS.items() if file.startswith(f"{tree}/")}
        assert dict(found(tree, solutions)) == here
        assert dict(found(str(Path(tree).absolute()), solutions)) == {
            str(Path(file).absolute()): student for file, student in here.items()
        }
    for file, student in LAYOUTS.items():  # as a shell's * names them
        folder = "" if file.startswith("flat/") else Path(file).parts[1]
        path = file if not folder else str(Path(*Path(file).parts[:2]))
        if folder != "submitted":
            assert dict(found(path, solutions)) == {file: student}


def test_links_to_folders_and_folders_that_cannot_be_read_are_named(
    solutions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("elsewhere")
    put("all/ada")
    Path("all/ada/linked").symlink_to(Path("elsewhere").absolute())
    Path("all/ada/round").symlink_to(Path("all").absolute())
    Path("all/bob").mkdir()
    scan = os.scandir

    def locked(path: str) -> Any:
        if str(path).endswith("bob"):  # root, too, is refused it
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    submissions, faults = find(Path("all"), solutions)
    assert [str(each.file) for each in submissions] == [f"all/ada/{U}/{U}.ipynb"]
    links = [f"all/ada/{name}: a link to a folder, not followed" for name in ("linked", "round")]
    assert sorted(faults) == [*links, "all/bob: Permission denied"]


def test_the_unit_is_known_by_metadata_or_cells_where_the_name_does_not_say_it(solutions: Path) -> None:
    nameless = small.answered()
    small.write(nameless, Path("all/ada/homework.ipynb"))
    small.write({**nameless, "metadata": {}}, Path("all/bob/homework.ipynb"))
    assert dict(found("all", solutions)) == {"all/ada/homework.ipynb": "ada", "all/bob/homework.ipynb": "bob"}


def test_what_is_no_units_is_named_and_the_rest_is_graded(solutions: Path) -> None:
    put("all/ada")
    small.write({"cells": [], "metadata": {}}, Path(f"all/ada/{U}/scratch.ipynb"))
    Path("all/bob").mkdir()
    Path(f"all/bob/{U}-Copy1.ipynb").write_text("{")
    result = kvlearn("grade", "all", "--json")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"kvlearn: all/ada/{U}/scratch.ipynb: not a unit of kvlearn; the units are {U}",
        "kvlearn: all/bob/90_small-Copy1.ipynb: damaged, not JSON: "
        "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ]
    ada, bob = json.loads(result.stdout)
    assert (ada["student"], ada["file"]) == ("ada", f"all/ada/{U}/{U}.ipynb")
    assert (bob["student"], bob["file"]) == ("bob", f"all/bob/{U}-Copy1.ipynb")
    assert {(e["score"], e["status"]) for e in bob["exercises"]} == {(0, "error")}


def test_a_unit_handed_in_twice_is_graded_twice_and_said_so(solutions: Path) -> None:
    first = put("all/ada")
    copy = small.write(small.answered(), first.with_name(f"{U}-Copy1.ipynb"))
    result = kvlearn("grade", "all", str(copy), "--csv")
    assert result.exit_code == 0
    assert result.stderr == f"kvlearn: ada · {U}: 2 notebooks, each with its report: {copy}, {first}\n"
    assert [row.rsplit(",", 1)[1] for row in result.stdout.splitlines()[1:]] == 5 * [str(copy)] + 5 * [
        str(first)
    ]


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

    async def stumble(self: Grader, submitted: Submission, kernels: asyncio.Semaphore) -> Report:
        if submitted.student == "ada":
            raise UnicodeError("\ud800\nsurrogates not allowed")
        return await grade(self, submitted, kernels)

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
    monkeypatch.setattr("kvlearn.grading.grader.Sandbox", None)
    small.write(small.source_notebook(), solutions / "91_next" / "91_next.ipynb")
    put("exercises")
    result = kvlearn("progress")
    assert result.exit_code == 0
    assert re.search(r"90_small\W+0\W+0\W+5\W+0 / 15", result.stdout)
    assert re.search(r"91_next.*no notebook here", result.stdout)


def test_progress_says_where_it_looked_in_vain(solutions: Path) -> None:
    result = kvlearn("progress", "nowhere")
    assert result.exit_code == 1
    assert result.stderr == "kvlearn: nowhere: no such folder, and no unit of this name\n"


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


@pytest.fixture
def started(solutions: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("KVLEARN_WORK")
    assert kvlearn("start").exit_code == 0
    return Path(f"work/{U}/{U}.ipynb")


def files_in(report: Result) -> list[str]:
    return [each["file"] for each in json.loads(report.stdout)]


@pytest.mark.parametrize("asked", [[], [U], ["90"], ["small"], ["work"]])
def test_a_units_name_or_nothing_means_the_learners_copy(started: Path, asked: list[str]) -> None:
    put("exercises")
    result = kvlearn("grade", *asked, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert files_in(result) == [str(started)]


def test_without_copies_the_exercises_are_meant_and_that_is_said(solutions: Path) -> None:
    file = put("exercises")
    for command in (["grade", "--json"], ["grade", "90", "--json"], ["progress", "--json"]):
        result = kvlearn(*command)
        assert result.exit_code == 0
        assert (
            result.stderr == "kvlearn: exercises: there is no work/ yet (kvlearn start makes your copies)\n"
        )
        if command[0] == "grade":
            assert files_in(result) == [str(file)]


def test_a_path_that_exists_is_never_taken_for_a_units_name(started: Path) -> None:
    file = small.write(small.answered(), Path("90/mine.ipynb"))
    assert files_in(kvlearn("grade", "90", "--json")) == [str(file)]


def test_progress_for_programs_has_every_exercise(started: Path) -> None:
    told = json.loads(kvlearn("progress", "--json").stdout)
    (unit,) = told["units"]
    assert told["next"] == "90.1"
    assert (unit["unit"], unit["score"], unit["max_score"], unit["untouched"]) == (U, 0, 15, 5)
    assert [each["id"] for each in unit["exercises"]] == [f"90.{n}" for n in range(1, 6)]


@pytest.mark.parametrize("asked", ["90", "small", U, f"work/{U}"])
def test_progress_of_one_unit_lists_its_exercises(started: Path, asked: str) -> None:
    result = kvlearn("progress", asked)
    assert (result.exit_code, result.stderr) == (0, "")
    _, *lines, closing = result.stdout.splitlines()
    assert [line.split()[1] for line in lines] == [f"90.{n}" for n in range(1, 6)]
    assert closing.startswith("0 of 15 points. Next: 90.1")
    (unit,) = json.loads(kvlearn("progress", asked, "--json").stdout)["units"]
    assert unit["unit"] == U


def test_progress_of_a_unit_without_a_copy_says_what_to_do(started: Path) -> None:
    started.unlink()
    result = kvlearn("progress", "90")
    assert result.exit_code == 1
    assert result.stderr == f"kvlearn: work/{U}: no notebook of this unit (kvlearn start makes your copies)\n"


@pytest.mark.slow
def test_results_that_are_known_are_not_run_and_the_others_are(solutions: Path) -> None:
    """A kernel that ends, and an answer beside a known one, change nothing in what is known."""
    answers = small.ALL_RIGHT | {"negate": "import os; os._exit(1)"}
    del answers["halve"]
    file = put("exercises", small.answered(**answers))
    known = {"90.1": Graded("90.1", 1, 3, "partial", "from before")}
    grader = Grader(solutions=solutions, known=lambda unit, tasks: known)
    (report,), faults = commands.grade([file], grader)
    assert not faults
    assert report.exercises[0] == known["90.1"]
    assert [e.status for e in report.exercises[1:]] == ["passed", "error", "not attempted", "passed"]
