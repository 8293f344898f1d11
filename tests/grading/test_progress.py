"""Progress that persists: what checks record and where, hints that go on, and what is run again."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import small_unit as small
from copies import FILE, U, kvlearn, new_stub, new_task, read, solve, upstream
from nbclient import NotebookClient

import kvlearn as front
from kvlearn.grading import catalogue, commands, folders, overview, records
from kvlearn.grading.folders import MARK
from kvlearn.grading.records import Record

WORK = Path("work")


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course of the small unit with its copy made; commands run from ``tmp_path``."""
    monkeypatch.setenv("KVLEARN_SOLUTIONS", str(small.write_solutions(tmp_path / "solutions")))
    monkeypatch.delenv("KVLEARN_WORK")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalogue, "_shown", {})
    assert kvlearn("start").exit_code == 0
    return tmp_path


@pytest.fixture
def in_copy(course: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(course / FILE.parent)
    return course


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlearn.grading.grader.Sandbox", None)


def double(x: Any) -> Any:
    return x + x


def results(work: Path = WORK) -> dict[str, tuple[float, str]]:
    return {name: (r.score, r.status) for name, r in records.read(work).results.items()}


def run_in_kernel(file: Path) -> list[str]:
    """Run a notebook as JupyterLab does, from its own folder; what its last cell shows, in lines."""
    notebook = nbformat.read(file, as_version=4)
    environment = os.environ | {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(file.parent)}})
    with client.setup_kernel(env=environment):
        for i, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":
                client.execute_cell(cell, i)
    return notebook.cells[-1].outputs[0]["data"]["text/plain"].splitlines()


def test_a_check_in_a_copy_is_remembered(in_copy: Path) -> None:
    front.check("90.1", double)
    front.check("90.2", double)
    assert results(in_copy / WORK) == {"90.1": (3, "passed"), "90.2": (1, "partial")}
    assert front.check("90.1", None).status == "not attempted"
    assert results(in_copy / WORK)["90.1"] == (0, "not attempted")


@pytest.mark.parametrize("where", ["solutions/90_small", ".", "work", "exercises/90_small", "work/kept"])
def test_a_check_anywhere_else_is_not_remembered(
    course: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (course / where).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(course / where)
    front.check("90.1", double)
    front.hint("90.1")
    assert not records.file_of(course / WORK).exists()


def test_a_graders_kernel_is_not_remembered_wherever_it_runs(
    in_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, "1")
    front.check("90.1", double)
    assert not records.file_of(in_copy / WORK).exists()


def test_no_test_knows_a_learners_work() -> None:
    assert folders.work_root() == Path(os.devnull)


def test_a_result_that_cannot_be_written_is_still_shown(
    in_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "write", full)
    assert front.check("90.1", double).status == "passed"
    assert front.hint("90.1").number == 1


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"[]", b'{"schema": 99}', b'{"schema": 1, "results": 3}', b"\xff"]
)
def test_a_damaged_file_is_set_aside_and_recording_goes_on(in_copy: Path, damaged: bytes) -> None:
    file = records.file_of(in_copy / WORK)
    file.write_bytes(damaged)
    assert records.read(in_copy / WORK).results == {}
    front.check("90.1", double)
    assert results(in_copy / WORK) == {"90.1": (3, "passed")}
    if b'"schema": 1' not in damaged:
        assert file.with_name("progress-damaged.json").read_bytes() == damaged


def test_entries_that_make_no_sense_are_left_out(course: Path) -> None:
    good = {"answer": "a", "checks": "b", "score": 1, "max_score": 3, "status": "partial"}
    content = {
        "schema": 1,
        "results": {"90.1": good, "90.2": 7, "90.3": {"score": "x"}, "90.4": good | {"score": None}},
        "hints": {"90.1": 2, "90.2": "two", "90.3": -1},
    }
    records.file_of(WORK).write_text(json.dumps(content))
    known = records.read(WORK)
    assert list(known.results) == ["90.1"]
    assert known.hints == {"90.1": 2}
    assert kvlearn("progress", "--json").exit_code == 0


# Without torch, which no record needs.
MANY = """
import sys
from pathlib import Path
from kvlearn.grading import records
work, number = Path(sys.argv[1]), sys.argv[2]
for i in range(20):
    record = records.Record("a", "b", float(i), 20.0, "partial")
    records.update(work, lambda content: records.put(content, f"{number}.{i}", record, latest=True))
"""


def test_several_kernels_record_at_once_and_nothing_is_lost(course: Path) -> None:
    kernels = [subprocess.Popen([sys.executable, "-c", MANY, course / WORK, str(n)]) for n in range(3)]
    assert [kernel.wait() for kernel in kernels] == [0, 0, 0]
    assert len(records.read(WORK).results) == 60
    assert not [file for file in (WORK / ".kvlearn").iterdir() if file.name.startswith(".")]


def test_hints_go_on_in_a_new_kernel_and_end_at_the_solution(
    in_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert front.hint("90.1").text == "a"
    monkeypatch.setattr(catalogue, "_shown", {})  # a new kernel
    assert front.hint("90.1").text == "b"
    monkeypatch.setattr(catalogue, "_shown", {})
    last = front.hint("90.1")
    assert last.text == "c"
    assert 'kvlearn.solution("90.1", confirm=True)' in repr(last)
    monkeypatch.setattr(catalogue, "_shown", {})
    assert front.hint("90.1") == last
    assert front.hint("90.1", 1).text == "a"
    assert records.read(in_copy / WORK).hints == {"90.1": 3}
    assert front.hint("90.2").number == 1


@pytest.mark.parametrize("number", [0, 4, -1, "1", True, 1.0])
def test_a_hint_that_there_is_not_is_refused(course: Path, number: Any) -> None:
    with pytest.raises(ValueError, match="number: expected 1 to 3, got"):
        front.hint("90.1", number)


def test_progress_shows_points_hints_and_what_is_next(in_copy: Path) -> None:
    front.check("90.1", double)
    front.check("90.2", double)
    front.hint("90.2")
    shown = repr(front.progress("90"))
    assert re.search(r"✓ +90\.1 +3 / 3 +passed", shown)
    assert re.search(r"◐ +90\.2 +1 / 3 +1 +partial", shown)
    assert "4 of 15 points. Next: 90.2." in shown
    course = repr(front.progress())
    assert re.search(r"90_small +1 +1 +3 +4 / 15 +1", course)
    assert "Next: 90.2, in work/90_small." in course
    html = front.progress("90")._repr_mimebundle_()["text/html"]
    assert html.count("<tr>") == 6
    assert "<script" not in html


def test_next_is_in_the_unit_that_was_worked_on_last(course: Path) -> None:
    small.write(small.source_notebook(), Path("solutions/89_before/89_before.ipynb"))
    notebook = json.loads(Path("solutions/89_before/89_before.ipynb").read_text().replace("90.", "89."))
    small.write(notebook, Path("solutions/89_before/89_before.ipynb"))
    assert front.progress().next is not None
    assert front.progress().next.id == "89.1"
    passed = Record("", "", 3, 3, "passed")
    records.update(WORK, lambda content: records.put(content, "90.1", passed, latest=True))
    assert front.progress().next.id == "90.2"
    for name in ("90.2", "90.3", "90.4", "90.5"):
        records.update(WORK, lambda c: records.put(c, name, passed, latest=True))  # noqa: B023
    assert front.progress().next.id == "89.1", "the unit is done; what comes after the last is the first"


def test_when_all_is_solved_nothing_is_next(course: Path) -> None:
    passed = Record("", "", 3, 3, "passed")
    for number in range(1, 6):
        records.update(WORK, lambda c: records.put(c, f"90.{number}", passed, latest=True))  # noqa: B023
    assert "Every exercise of the course is solved" in repr(front.progress())


def test_a_teachers_source_shows_nobodys_progress(in_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs in git must not depend on who ran the notebook."""
    before = "".join(overview.progress("90").to_html())
    monkeypatch.chdir(in_copy / "solutions" / U)
    empty = repr(front.progress("90"))
    monkeypatch.chdir(in_copy / FILE.parent)
    front.check("90.1", double)
    assert overview.progress("90").to_html() != before
    monkeypatch.chdir(in_copy / "solutions" / U)
    assert repr(front.progress("90")) == empty
    assert "0 of 15 points" in empty
    monkeypatch.setenv("KVLEARN_WORK", os.devnull)
    assert repr(front.progress("90")) == empty


def test_the_copy_that_git_watches_says_where_to_work(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = course / "exercises" / U
    there.mkdir(parents=True)
    monkeypatch.chdir(there)
    shown = repr(front.progress("90"))
    assert "run kvlearn start in a terminal, then work in work/90_small" in shown


def test_a_unit_that_there_is_not_is_named(course: Path) -> None:
    with pytest.raises(ValueError, match="expected one of 90_small; got 'nosuch'"):
        front.progress("nosuch")


@pytest.mark.slow
def test_what_a_kernel_checked_is_not_run_again_until_it_changes(course: Path) -> None:
    solve(double="return x + x", shift="return x - 1")
    notebook = read()
    notebook["cells"].append(small.cell('import kvlearn\n\nkvlearn.progress("90")', "show"))
    small.write(notebook, FILE)
    shown = run_in_kernel(FILE.absolute())
    assert "4 of 15 points. Next: 90.2." in shown
    assert results() | {"90.1": (3, "passed"), "90.2": (1, "partial")} == results()

    asked: list[str] = []
    real = commands.grade

    def spy(paths: list[Path], grader: Any) -> Any:
        known = grader.known

        def note(unit: str, tasks: list[Any]) -> Any:
            same = known(unit, tasks)
            asked.extend(t.id for t in tasks if t.id not in same and not t.untouched)
            return same

        grader.known = note
        return real(paths, grader)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "grade", spy)
        first = kvlearn("progress", "--json")
        assert asked == [], "a kernel's own results need no run"
        solve(shift="return x + 1")
        second = kvlearn("progress", "--json")
        assert asked == ["90.2"]
        third = kvlearn("progress", "--json")
        assert asked == ["90.2"], "its result was recorded"
    assert json.loads(first.stdout)["units"][0]["score"] == 4
    assert json.loads(second.stdout) == json.loads(third.stdout)
    assert json.loads(third.stdout)["units"][0]["score"] == 6
    assert json.loads(third.stdout)["next"] == "90.3"


def record_all(**answers: str) -> None:
    """Write answers and grade them by ``kvlearn progress``."""
    solve(**answers)
    assert kvlearn("progress").exit_code == 0


@pytest.mark.slow
def test_a_change_of_the_checks_runs_the_answers_again(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_all(double="return x + x")
    before = records.read(WORK).results["90.1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvlearn.grading.grader.Sandbox", None)
        assert kvlearn("progress").exit_code == 0
    checks = Path(f"solutions/{U}/checks.py")
    checks.write_text(checks.read_text().replace("lambda x: x * 2", "lambda x: x * 3"))
    records.checks_of.cache_clear()
    assert kvlearn("progress").exit_code == 0
    after = records.read(WORK).results["90.1"]
    assert (before.score, after.score) == (3, 1), "it ran again, by the new checks"
    assert after.answer == before.answer
    assert after.checks != before.checks


@pytest.mark.slow
def test_an_answer_reset_by_hand_is_open_again_and_an_error_is_run_again(
    course: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_all(double="return x + x", shift="raise SystemExit")
    assert records.read(WORK).results["90.2"].answer == "", "it may have been the machine's fault"
    kvlearn("reset", "90.1")
    assert "90.1" not in records.read(WORK).results
    kvlearn("reset", "90.2")
    monkeypatch.setattr("kvlearn.grading.grader.Sandbox", None)
    assert re.search(r"90_small\W+0\W+0\W+5\W+0 / 15", kvlearn("progress").stdout)


def test_a_damaged_notebook_keeps_its_recorded_points(course: Path, no_kernel: None) -> None:
    passed = Record("", "", 3, 3, "passed")
    records.update(WORK, lambda content: records.put(content, "90.1", passed, latest=True))
    FILE.write_text("{")
    result = kvlearn("progress", "--json")
    assert result.exit_code == 1
    assert "damaged, not JSON" in result.stderr
    assert json.loads(result.stdout)["units"][0]["score"] == 3


def test_progress_in_a_folder_without_records_writes_none(course: Path, no_kernel: None) -> None:
    small.write(small.answered(), Path(f"elsewhere/{U}/{U}.ipynb"))
    assert kvlearn("progress", "elsewhere").exit_code == 0
    assert not Path("elsewhere/.kvlearn").exists()


def test_the_source_of_an_answer_is_the_cell_that_defined_it_last() -> None:
    cells = [
        "def f(x):\n    return 1",
        "f = 3",
        "%%time\nf",
        "g = f(1)\nf.x = 1",
        "def g():\n    f = 2",
        "class h: ...",
    ]
    assert records.defining(cells, ("f",)) == ["f = 3"]
    assert records.defining(cells, ("h", "f")) == ["f = 3", "class h: ..."]
    assert records.defining(cells, ("g",)) == [cells[4]]
    assert records.defining(cells, ("missing",)) == []


def test_blank_cells_and_blank_ends_do_not_change_an_answer() -> None:
    assert records.digest(["def f(): ...\n\n", "  "]) == records.digest(["def f(): ..."])
    assert records.digest(["a", "b"]) != records.digest(["b", "a"]) != records.digest(["ab"])


def test_update_and_reset_leave_results_and_hints(course: Path, in_copy: Path) -> None:
    front.check("90.1", double)
    front.hint("90.1")
    os.chdir(course)
    upstream(new_task)
    upstream(new_stub)
    assert kvlearn("start").exit_code == 0
    assert results() == {"90.1": (3, "passed")}
    assert records.read(WORK).hints == {"90.1": 1}
