"""``kvlearn start`` and ``kvlearn reset``: copies that updates never meet, and that lose nothing."""

import copy
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import small_unit as small
from copies import (
    FILE,
    Notebook,
    U,
    kvlearn,
    new_stub,
    new_task,
    read,
    same_points,
    solve,
    source_of,
    sources,
    upstream,
)

from kvlearn.grading import merging, records, work
from kvlearn.grading.commands import grade
from kvlearn.grading.grader import Grader

SOLVED = {"double": "return x + x  # mine", "shift": "return x + 1"}


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small unit's solutions alone, as a wheel carries them; commands run from ``tmp_path``."""
    monkeypatch.setenv("KVLEARN_SOLUTIONS", str(small.write_solutions(tmp_path / "solutions")))
    monkeypatch.delenv("KVLEARN_WORK")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def kept() -> list[Path]:
    return sorted(Path("work/kept").glob("*.ipynb"))


def test_start_copies_what_learners_are_given_and_says_so(course: Path) -> None:
    result = kvlearn("start")
    assert (result.exit_code, result.stdout) == (0, f"{U}: copied to {FILE}\n")
    text = FILE.read_text()
    assert "BEGIN SOLUTION" not in text
    assert text.count("raise NotImplementedError()") == 5
    again = kvlearn("start")
    assert (again.exit_code, again.stdout) == (0, f"{U}: up to date\n")
    assert FILE.read_text() == text
    assert not kept()


@pytest.mark.parametrize("name", [U, "90", "small", f"exercises/{U}"])
def test_a_unit_has_a_name_a_number_and_a_topic(course: Path, name: str) -> None:
    assert kvlearn("start", name).exit_code == 0
    assert FILE.exists()


def test_a_copy_made_from_the_source_alone_is_what_nbgrader_releases(course: Path) -> None:
    pytest.importorskip("nbgrader", reason="generation needs the extra kvlearn[teach]")
    from kvlearn.grading.release import generate

    released = json.loads(generate(U, course / "solutions")[f"{U}.ipynb"])
    for cell in released["cells"]:
        for extra in ("checksum", "cell_type"):
            cell["metadata"].get("nbgrader", {}).pop(extra, None)
    assert work.derived(U) == released


def test_programs_get_what_became_of_each_unit(course: Path) -> None:
    (copied,) = json.loads(kvlearn("start", "--json").stdout)
    assert copied == {"unit": U, "what": "copied", "lines": [], "file": str(course / FILE), "kept": None}
    solve(**SOLVED)
    (restored,) = json.loads(kvlearn("reset", "90.1", "--json").stdout)
    assert restored["what"] == "reset"
    assert Path(restored["kept"]).is_file()


def test_an_existing_file_is_never_replaced_by_a_copy(course: Path) -> None:
    FILE.parent.mkdir(parents=True)
    mine = small.answered(**SOLVED)
    mine["cells"].append(small.cell("notes = 'mine'", "notes"))
    small.write(mine, FILE)
    before = read()
    assert kvlearn("start").exit_code == 0
    assert sources(read()) == sources(before)


def test_a_file_that_appears_at_the_last_moment_is_not_replaced(course: Path) -> None:
    FILE.parent.mkdir(parents=True)
    FILE.write_text("mine")
    with pytest.raises(FileExistsError):
        work._create(FILE, b"ours")
    assert FILE.read_text() == "mine"
    assert os.listdir(FILE.parent) == [FILE.name]


def test_answers_written_in_exercises_come_along_and_stay_there(course: Path) -> None:
    there = small.write(small.answered(**SOLVED), Path(f"exercises/{U}/{U}.ipynb"))
    before = there.read_bytes()
    result = kvlearn("start")
    assert f"with the answers that you wrote in exercises/{U}/{U}.ipynb" in result.stdout
    assert "# mine" in source_of("answer1")
    assert there.read_bytes() == before
    assert "not begun" not in kvlearn("start").stdout


def test_what_is_new_comes_in_and_the_answers_stay(course: Path) -> None:
    kvlearn("start")
    solve(**SOLVED)
    upstream(new_task)
    result = kvlearn("start")
    assert result.exit_code == 0
    assert f"{U}: brought up to date in {FILE}" in result.stdout
    assert "90.1: new task, check" in result.stdout
    assert "your answers are kept" in result.stdout
    assert source_of("task1").startswith("## 90.1 Double")
    assert source_of("check1").endswith("# twice")
    assert small.at(read(), "check1")["metadata"]["nbgrader"]["points"] == 4
    assert "# mine" in source_of("answer1")
    assert [cell["id"] for cell in read()["cells"]][:4] == ["setup", "task1", "answer1", "check1"]
    (backup,) = kept()
    assert "# mine" in source_of("answer1", backup)
    assert kvlearn("start").stdout == f"{U}: up to date\n"


def test_a_unit_that_was_not_begun_is_replaced_without_a_copy(course: Path) -> None:
    kvlearn("start")
    upstream(new_stub)
    assert "you had not begun this unit" in kvlearn("start").stdout
    assert "Twice x." in source_of("answer1")
    assert not kept()


def test_an_answer_whose_stub_is_new_stays_and_the_learner_is_told(course: Path) -> None:
    kvlearn("start")
    solve(**SOLVED)
    upstream(new_stub)
    result = kvlearn("start")
    assert "90.1: the given lines of the answer are new; yours is kept as it is" in result.stdout
    assert source_of("answer1") == "def double(x):\n    return x + x  # mine"
    assert kvlearn("start").stdout == f"{U}: up to date\n", "it is said once"


def test_cells_that_the_learner_added_deleted_split_and_moved_survive(course: Path) -> None:
    kvlearn("start")
    solve(**SOLVED)
    notebook = read()
    cells = notebook["cells"]
    del cells[next(i for i, cell in enumerate(cells) if cell["id"] == "check2")]
    here = next(i for i, cell in enumerate(cells) if cell["id"] == "answer1")
    second_half = copy.deepcopy(cells[here]) | {"id": "half", "source": "helper = 1"}  # JupyterLab's split
    cells[here + 1 : here + 1] = [second_half, small.cell("double(1)", "try-it")]
    cells.append(cells.pop(next(i for i, cell in enumerate(cells) if cell["id"] == "setup")))
    small.write(notebook, FILE)
    upstream(new_task)
    result = kvlearn("start")
    assert "cells that you moved are in the unit's order again" in result.stdout
    ids = [cell["id"] for cell in read()["cells"]]
    assert ids[:6] == ["setup", "task1", "answer1", "half", "try-it", "check1"]
    assert "check2" not in ids
    assert len(set(ids)) == len(ids)


def test_an_exercise_that_is_no_longer_in_the_unit_leaves_the_answer(course: Path) -> None:
    kvlearn("start")
    solve(**SOLVED)

    def without_the_first(notebook: Notebook) -> None:
        notebook["cells"] = [c for c in notebook["cells"] if c["id"] not in ("answer1", "check1")]

    upstream(without_the_first)
    assert "a cell that you changed is no longer in the unit; it stays as your own" in kvlearn("start").stdout
    assert "def double(x):\n    return x + x  # mine" in sources(read())


def test_without_the_base_answers_stay_and_the_rest_is_renewed(course: Path) -> None:
    kvlearn("start")
    solve(**SOLVED)
    Path(f"work/.kvlearn/base/{U}.ipynb").unlink()
    upstream(new_task)
    upstream(new_stub)
    assert kvlearn("start").exit_code == 0
    assert "# mine" in source_of("answer1")
    assert source_of("check1").endswith("# twice")
    assert len(kept()) == 1


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"cells": [', "damaged, not JSON"),
        (b"", "the file is empty"),
        (b"{\n<<<<<<< mine\n", "merge conflict markers"),
        (b"[]", "not a Jupyter notebook"),
    ],
)
@pytest.mark.parametrize("newer", [False, True])
def test_a_half_written_file_is_left_alone_and_named(
    course: Path, content: bytes, complaint: str, newer: bool
) -> None:
    kvlearn("start")
    FILE.write_bytes(content)
    if newer:
        upstream(new_task)
    result = kvlearn("start")
    assert result.exit_code == 1
    assert complaint in result.stderr
    assert FILE.read_bytes() == content
    assert kvlearn("reset", "90.1").exit_code == 1
    assert FILE.read_bytes() == content


def test_a_renamed_notebook_is_found_and_updated(course: Path) -> None:
    kvlearn("start")
    solve(**SOLVED)
    renamed = FILE.rename(FILE.with_name("my answers.ipynb"))
    upstream(new_task)
    assert kvlearn("start").exit_code == 0
    assert not FILE.exists()
    assert "# mine" in source_of("answer1", renamed)
    assert source_of("check1", renamed).endswith("# twice")


def test_a_copy_beside_the_notebook_stays_as_it_is(course: Path) -> None:
    kvlearn("start")
    beside = FILE.with_name(f"{U}-Copy1.ipynb")
    shutil.copy(FILE, beside)
    before = beside.read_bytes()
    upstream(new_task)
    kvlearn("start")
    assert beside.read_bytes() == before


def test_where_nothing_can_be_written_nothing_is_lost(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kvlearn("start")
    solve(**SOLVED)
    before = FILE.read_bytes()
    upstream(new_task)
    access = os.access  # root, too, is refused it
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK and access(path, mode))
    result = kvlearn("start")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
    assert FILE.read_bytes() == before
    monkeypatch.undo()


def test_a_full_disk_leaves_the_notebook_whole(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kvlearn("start")
    solve(**SOLVED)
    before = FILE.read_bytes()
    upstream(new_task)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = kvlearn("start")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert FILE.read_bytes() == before
    assert not [file for file in FILE.parent.iterdir() if file.name.startswith(".")]


def test_a_file_in_the_place_of_work_is_named(course: Path) -> None:
    Path("work").write_text("not a folder")
    result = kvlearn("start")
    assert result.exit_code == 1
    assert result.stderr.startswith("kvlearn: ")
    assert Path("work").read_text() == "not a folder"


def test_one_unit_that_fails_stops_no_other(course: Path) -> None:
    small.write(small.source_notebook(), Path("solutions/91_next/91_next.ipynb"))
    Path("work").mkdir()
    Path(f"work/{U}").write_text("a file where the folder should be")
    result = kvlearn("start")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"kvlearn: {U}: ")
    assert Path("work/91_next/91_next.ipynb").exists()


def test_a_notebook_that_is_saved_at_the_same_moment_is_not_overwritten(
    course: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kvlearn("start")
    solve(**SOLVED)
    upstream(new_task)
    keep = work.keep

    def save_meanwhile(*given: Any) -> Path:
        solve(double="return 2 * x  # newer")
        return keep(*given)

    monkeypatch.setattr(work, "keep", save_meanwhile)
    result = kvlearn("start")
    assert result.exit_code == 1
    assert "it was saved meanwhile" in result.stderr
    assert "# newer" in source_of("answer1")
    monkeypatch.undo()


def test_a_link_still_leads_to_the_notebook(course: Path) -> None:
    kvlearn("start")
    solve(**SOLVED)
    elsewhere = FILE.rename(Path("elsewhere.ipynb"))
    FILE.symlink_to(elsewhere.absolute())
    upstream(new_task)
    kvlearn("start")
    assert FILE.is_symlink()
    assert source_of("check1", elsewhere).endswith("# twice")


@pytest.mark.slow
def test_two_runs_at_once_make_one_copy_and_one_update(course: Path) -> None:
    def twice() -> list[subprocess.CompletedProcess[str]]:
        command = [sys.executable, "-m", "kvlearn", "start"]
        done: list[subprocess.CompletedProcess[str]] = []
        runs = [
            threading.Thread(
                target=lambda: done.append(
                    subprocess.run(command, cwd=course, capture_output=True, text=True, check=False)
                )
            )
            for _ in range(3)
        ]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        return done

    first = twice()
    assert [run.returncode for run in first] == [0, 0, 0], first
    assert sorted("copied" in run.stdout for run in first) == [False, False, True]
    solve(**SOLVED)
    upstream(new_task)
    second = twice()
    assert sorted("brought up to date" in run.stdout for run in second) == [False, False, True]
    assert "# mine" in source_of("answer1")
    assert len(kept()) == 1


def test_reset_gives_one_exercise_back_and_keeps_what_was_there(course: Path) -> None:
    kvlearn("start")
    solve(**SOLVED)
    before = read()
    result = kvlearn("reset", "90.1")
    assert result.exit_code == 0
    (backup,) = kept()
    assert str(backup) in result.stdout
    assert read(backup) == before
    assert "raise NotImplementedError()" in source_of("answer1")
    assert source_of("answer2") == "def shift(x):\n    return x + 1"
    again = kvlearn("reset", "90.1")
    assert "nothing to reset" in again.stdout
    assert len(kept()) == 1


def test_reset_puts_deleted_cells_back_and_leaves_added_ones(course: Path) -> None:
    kvlearn("start")
    notebook = read()
    notebook["cells"] = [c for c in notebook["cells"] if c["id"] not in ("answer2", "check2")]
    notebook["cells"].insert(1, small.cell("mine = 1", "mine"))
    small.write(notebook, FILE)
    kvlearn("reset", "90.2")
    ids = [cell["id"] for cell in read()["cells"]]
    assert ids[:6] == ["setup", "mine", "answer1", "check1", "answer2", "check2"]


def test_reset_brings_in_what_is_new(course: Path) -> None:
    kvlearn("start")
    solve(**SOLVED)
    upstream(new_stub)
    result = kvlearn("reset", "90.1")
    assert result.exit_code == 0
    assert "Twice x." in source_of("answer1")
    assert "NotImplementedError" in source_of("answer1")
    assert all("# mine" in source_of("answer1", file) for file in kept())


@pytest.mark.parametrize("wrong", ["90.9", "90", "7.1", "nosuch"])
def test_reset_of_what_is_no_exercise_is_refused(course: Path, wrong: str) -> None:
    result = kvlearn("reset", wrong)
    assert result.exit_code == 2
    assert repr(wrong) in result.stderr


def test_reset_before_start_says_what_to_do(course: Path) -> None:
    result = kvlearn("reset", "90.1")
    assert result.exit_code == 1
    assert "kvlearn start makes it" in result.stderr


def test_kept_copies_are_not_graded(course: Path) -> None:
    kvlearn("start")
    solve(**SOLVED)
    kvlearn("reset", "90.2")
    (report,), faults = grade([Path("work")], Grader(solutions=course / "solutions", jobs=1))
    assert not faults
    assert report.file == str(FILE)
    assert [each.status for each in report.exercises][:2] == ["passed", "not attempted"]


def test_merging_keeps_every_line_that_a_learner_wrote() -> None:
    """In the merged notebook, or, where a cell was not theirs to change, in the copy that a clash demands."""
    base, new = small.answered(), small.answered()
    new_task(new)
    new["cells"].pop()  # the last check is gone
    mine = small.answered(**SOLVED)
    mine["cells"][0]["source"] = "import numpy"
    mine["cells"][-1]["source"] = "print('my own check')"
    mine["cells"].insert(3, small.cell("scratch", "scratch"))
    mine["cells"].append("no cell at all")
    before = copy.deepcopy(mine)
    merged = merging.merge(base, mine, new)
    assert mine == before
    assert merged.own
    assert merged.clashes
    after = sources(merged.notebook)
    for cell in before["cells"][:-1]:
        if cell not in base["cells"]:
            assert cell["source"] in after


def git(folder: Path, *command: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    done = subprocess.run(
        ["git", *identity, *command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def publish(folder: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """Generate exercises/ of a course and commit everything."""
    monkeypatch.setenv("KVLEARN_SOLUTIONS", str(folder / "solutions"))
    file = folder / "exercises" / U / f"{U}.ipynb"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(work.to_bytes(work.derived(U)))
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", message)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_a_solved_tree_survives_a_pull_that_changes_the_same_exercise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream_folder, clone = tmp_path / "upstream", tmp_path / "clone"
    small.write_solutions(upstream_folder / "solutions")
    (upstream_folder / ".gitignore").write_text("/work\n__pycache__/\n")
    (upstream_folder / "pyproject.toml").write_text("[project]\n")
    git(tmp_path, "init", "-q", "upstream")
    publish(upstream_folder, monkeypatch, "the course")
    git(tmp_path, "clone", "-q", "upstream", "clone")

    monkeypatch.setenv("KVLEARN_SOLUTIONS", str(clone / "solutions"))
    monkeypatch.delenv("KVLEARN_WORK")
    monkeypatch.chdir(clone)
    assert kvlearn("start").exit_code == 0
    solve(**small.ALL_RIGHT)
    assert git(clone, "status", "--porcelain") == ""

    upstream(new_task, upstream_folder / "solutions")
    upstream(same_points, upstream_folder / "solutions")
    publish(upstream_folder, monkeypatch, "another exercise 90.1")
    git(clone, "pull", "-q")
    monkeypatch.setenv("KVLEARN_SOLUTIONS", str(clone / "solutions"))
    result = kvlearn("start")
    assert result.exit_code == 0
    assert "90.1: new task, check" in result.stdout
    assert git(clone, "status", "--porcelain") == ""
    graded = json.loads(kvlearn("grade", "--json").stdout)
    assert [e["status"] for e in graded[0]["exercises"]] == 5 * ["passed"]
    assert records.read(clone / "work").results == {}, "grading records nothing"


def test_an_installed_wheel_makes_copies_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel carries solutions/ inside the package, and no exercises/."""
    package = Path(records.__file__).parents[1]
    installed = tmp_path / "site" / "kvlearn"
    shutil.copytree(package / "grading", installed / "grading")
    for name in ("__init__.py", "__main__.py", "cli.py", "html.py"):
        shutil.copy(package / name, installed)
    small.write_solutions(installed / "_solutions")
    monkeypatch.delenv("KVLEARN_WORK")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    mine = tmp_path / "mine"
    mine.mkdir()

    def run(where: Path, *arguments: str) -> str:
        command = [sys.executable, "-m", "kvlearn", *arguments]
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(mine, "start") == f"{U}: copied to {FILE}\n"
    solve(mine / FILE, **SOLVED)
    below = mine / FILE.parent
    assert "up to date" in run(below, "start"), "it is found from a folder below"
    assert not (below / "work").exists()
    assert "90.1" not in run(mine, "reset", "90.3")
    assert "# mine" in source_of("answer1", mine / FILE)


def test_chapters_of_a_wheel_are_copied_and_brought_up_to_date(tmp_path: Path) -> None:
    source, target, own = tmp_path / "wheel", tmp_path / "notebooks", tmp_path / "work"
    (source / "pictures").mkdir(parents=True)
    (own / ".kvlearn").mkdir(parents=True)
    for name in ("00_a.ipynb", "01_b.ipynb", "pictures/p.png"):
        (source / name).write_text(f"{name} of version 1")
    assert work.copy_chapters(source, target, own) == [f"chapters in {target}: 3 copied"]
    assert (target / "pictures" / "p.png").read_text() == "pictures/p.png of version 1"
    assert work.copy_chapters(source, target, own) == []

    (target / "01_b.ipynb").write_text("with a note of mine")
    assert work.copy_chapters(source, target, own) == []  # nothing newer: it stays
    assert (target / "01_b.ipynb").read_text() == "with a note of mine"
    for name in ("00_a.ipynb", "01_b.ipynb"):
        (source / name).write_text(f"{name} of version 2")
    first, second = work.copy_chapters(source, target, own)
    assert first == f"chapters in {target}: 2 brought up to date"
    assert "01_b.ipynb: a newer one; yours as it was" in second
    (kept,) = (own / "kept").iterdir()
    assert kept.read_text() == "with a note of mine"
    assert (target / "01_b.ipynb").read_text() == "01_b.ipynb of version 2"
    assert work.copy_chapters(source, target, own) == []
