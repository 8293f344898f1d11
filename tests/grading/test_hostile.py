"""Odd and dishonest hand-ins: what is read of them, what is said of them, and marks that were forged."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import small_unit as small
import torch
from test_commands import kvlearn, put, solutions

from kvlearn.grading import calls, find_exercise, judge, submission
from kvlearn.grading.calls import disguised
from kvlearn.grading.commands import grade
from kvlearn.grading.context import compare
from kvlearn.grading.grader import Grader
from kvlearn.grading.sandbox import Limits

__all__ = ["solutions"]  # the fixture
U = small.UNIT


def reasons(student: str = "eve") -> set[str]:
    """The report on a student's notebook, without a kernel."""
    graded, _ = grade([Path("all")], Grader())
    return {each.message for report in graded if report.student == student for each in report.exercises}


def test_what_is_no_regular_file_in_the_tree_is_refused_by_name_at_once(
    solutions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvlearn.grading.grader.Sandbox", None)
    begin = time.monotonic()
    ours = solutions / U / f"{U}.ipynb"
    file = Path("all/eve") / U / f"{U}.ipynb"
    file.parent.mkdir(parents=True)
    put("all/ada")
    server = socket.socket(socket.AF_UNIX)
    made = [
        (lambda: file.symlink_to(ours), f"a link (to {ours}): hand in the notebook itself"),
        (lambda: file.symlink_to(Path("all/ada", U, file.name).absolute()), "a link (to "),
        (lambda: file.symlink_to("/dev/zero"), "a link (to /dev/zero)"),
        (lambda: file.symlink_to("nowhere\x1b"), "a link (to nowhere?)"),
        (lambda: os.mkfifo(file), "a FIFO, not a regular file"),
        (lambda: server.bind(str(file)), "cannot be read: "),
        (
            lambda: file.write_text(" " * (submission.LARGEST + 1)),
            "32 MiB, more than the 32 MiB that are read",
        ),
    ]
    for make, reason in made:
        make()
        (said,) = reasons()
        assert said.startswith(reason), said
        assert reasons("ada") == {""}, "the others are graded"
        for named in (file, file.parent):  # as a shell's * names them
            graded, _ = grade([named], Grader())
            assert graded[0].exercises[0].message.startswith(reason)
        file.unlink()
    server.close()
    file.parent.rmdir()
    file.parent.symlink_to(ours.parent)
    graded, faults = grade([Path("all")], Grader())
    assert [report.student for report in graded] == ["ada"]
    assert faults == [f"all/eve/{U}: a link to a folder, not followed"]
    graded, _ = grade([file], Grader())
    assert "a link leads from here into solutions/" in graded[0].exercises[0].message
    result = kvlearn("grade", "/dev/zero", "--json")
    assert (result.exit_code, result.stderr) == (1, "kvlearn: /dev/zero: a device, not a regular file\n")
    assert time.monotonic() - begin < 20


def test_in_the_learners_own_work_links_are_followed(
    solutions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvlearn.grading.grader.Sandbox", None)
    monkeypatch.setenv("KVLEARN_WORK", str(Path("work").absolute()))
    put("elsewhere")
    Path("work/.kvlearn").mkdir(parents=True)
    Path("work", U).symlink_to(Path("elsewhere", U).absolute())
    graded, faults = grade([Path("work")], Grader())
    assert ([report.unit for report in graded], faults) == ([U], [])
    assert {each.status for each in graded[0].exercises} == {"not attempted"}


def test_utf_16_is_named(solutions: Path) -> None:
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        text = json.dumps(small.answered())
        mark = "" if encoding == "utf-16" else "\ufeff"
        put("all/eve").write_bytes(f"{mark}{text}".encode(encoding))
        (said,) = reasons()
        assert "the text is UTF-16; save it as UTF-8" in said


def test_an_answer_turned_into_markdown_is_said(solutions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlearn.grading.grader.Sandbox", None)
    notebook = small.answered(double="return x + x")
    small.at(notebook, "answer1")["cell_type"] = "markdown"
    put("all/eve", notebook)
    (report,), _ = grade([Path("all")], Grader())
    first, *others = report.exercises
    assert (first.score, first.status) == (0, "error")
    assert (
        first.message
        == "the answer is in a Markdown cell, which does not run: make it a code cell (Esc, then Y)"
    )
    assert {each.status for each in others} == {"not attempted"}


def bare(notebook: dict[str, Any]) -> dict[str, Any]:
    """The same as some converters leave it: no ids, no metadata."""
    cells = [{"cell_type": c["cell_type"], "source": c["source"]} for c in notebook["cells"]]
    title = {"cell_type": "markdown", "source": "# Homework"}
    return {"cells": [title, *cells], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}


def test_without_ids_and_metadata_checks_are_found_by_their_text(solutions: Path) -> None:
    notebook = bare(small.answered(double="return x + x", negate="return helper(x)"))
    cells = notebook["cells"]
    cells[2]["source"] += (
        "\n\nkvlearn.check('90.1', double)  # an answer that checks itself is still an answer"
    )
    cells.insert(6, {"cell_type": "code", "source": "def helper(x): return -x"})
    file = small.write(notebook, Path("all/eve/homework.ipynb"))
    assert submission.unit_of(file, solutions) == U
    tasks = {task.id: task for task in Grader(solutions=solutions).read(file, U)}
    assert [name for name, task in tasks.items() if task.untouched] == ["90.2", "90.4", "90.5"]
    assert "return x + x" in tasks["90.1"].pieces[0]
    assert [piece.split("(")[0] for piece in tasks["90.3"].pieces] == ["def helper", "def negate"]
    assert small.SETUP not in tasks["90.1"].pieces, "set-up cells are ours"
    assert not [task for task in tasks.values() if task.missing]


class Liar(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.tensor(True)


Same = type("Same", (), {"__eq__": lambda self, other: True, "__module__": "__main__", "__hash__": None})


def test_values_that_decide_themselves_what_they_equal_earn_nothing(
    solutions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar = torch.ones(3).as_subclass(Liar)
    for value in (liar, (1, liar), {"a": [liar]}, Same(), [Same()]):
        assert disguised(value)
    for value in (torch.ones(3), torch.nn.Parameter(torch.ones(3)), (1, "a"), torch.Size((2,)), None, print):
        assert not disguised(value)
    difference = compare(liar, torch.zeros(3))
    assert difference is not None
    assert difference.expected == "a plain torch.Tensor"
    score = judge(find_exercise("90.1"), [lambda x: (x * 7).as_subclass(Liar)])
    assert (score, score.status) == (0, "error")
    assert "a tensor class of its own: expected a plain torch.Tensor" in score.message


def test_the_units_own_reference_is_recognised_in_a_graders_kernel(
    solutions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "GRADING", True)
    exercise = find_exercise("90.1")
    cell: dict[str, Any] = {"ours": exercise.right[0]}
    exec(compile("def double(x): return ours(x)", "/tmp/ipykernel_1/2.py", "exec"), cell)
    for answer in (cell["double"], exercise.right[0]):
        score = judge(exercise, [answer])
        assert score == 0
        assert "calls double of the unit's own code, which does the work" in score.message
    wrong = judge(exercise, [lambda x: x * 3])
    assert [mistake.name for mistake in wrong.mistakes] == ["added once too often"], "our mistakes still run"
    assert judge(exercise, [lambda x: x * 2]).status == "passed"


READS = "!from pathlib import Path\nours = Path({file!r}).read_text()\ndef shift(x): return x + 1"
FORGED = """!import torch
class Mine(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return torch.zeros((), dtype=torch.bool)
def square(x): return x.as_subclass(Mine)"""


@pytest.mark.slow
def test_what_a_dishonest_answer_tries_is_said_and_costs_the_others_nothing(
    solutions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVLEARN_TEST_TOKEN", "hush")
    monkeypatch.setenv("CLASS_SECRET", "hush")
    tell = "import os; raise ValueError(str([v for v in os.environ.values() if v[:2] == 'hu']))"
    ours = "from kvlearn.grading import find_exercise; return find_exercise('90.1').right[0](x)"
    reads = READS.format(file=str(solutions / U / "checks.py"))
    notebook = small.answered(double=ours, negate=tell, halve="return x / 2", square=FORGED, shift=reads)
    file = put("all/eve", notebook)
    limits = Limits(seconds=120)  # others may use the machine
    (report,), faults = grade([file], Grader(limits=limits))
    assert not faults
    double, shift, negate, halve, square = report.exercises
    assert (double.score, "calls double of the unit's own code" in double.message) == (0, True), double
    assert (shift.score, shift.message) == (0, "the answer reads solutions/, where our own answers are")
    assert (negate.score, "[]" in negate.message) == (0, True), "no token reaches the report"
    assert "hush" not in repr(report)
    assert (halve.score, halve.status) == (3, "passed")
    assert (square.score, "a Mine, which is a tensor class" in square.message) == (0, True), square
