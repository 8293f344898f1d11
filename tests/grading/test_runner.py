"""A bad answer harms nobody: it earns 0 and the reason, the others keep their points, the file stays."""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import small_unit as small

from kvlearn.grading.commands import grade
from kvlearn.grading.integrity import ASK, changed
from kvlearn.grading.report import Result
from kvlearn.grading.runner import Grader, _score
from kvlearn.grading.sandbox import MIME, Limits, Sandbox
from kvlearn.grading.submission import Task

QUICK = Limits(seconds=3, grace=1)


class Course:
    """A solutions/ folder with the small unit, and a place for a learner's notebook."""

    def __init__(self, folder: Path) -> None:
        self.solutions = small.write_solutions(folder / "solutions")
        self.file = folder / "exercises" / small.UNIT / f"{small.UNIT}.ipynb"

    def grade(self, notebook: dict[str, Any], limits: Limits = QUICK) -> dict[str, Result]:
        small.write(notebook, self.file)
        before = hashlib.sha256(self.file.read_bytes()).digest()
        (report,), faults = grade([self.file], Grader(limits=limits, solutions=self.solutions))
        assert not faults
        assert hashlib.sha256(self.file.read_bytes()).digest() == before
        assert sorted(p.name for p in self.file.parent.iterdir()) == [self.file.name]
        assert [e.id for e in report.exercises] == ["90.1", "90.2", "90.3", "90.4", "90.5"]
        return dict(zip(small.NAMES, report.exercises, strict=True))


@pytest.fixture
def course(tmp_path: Path) -> Course:
    return Course(tmp_path)


def left_behind(word: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if word in " ".join(p.info["cmdline"] or [])]


def test_untouched_answers_need_no_kernel_and_say_so(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlearn.grading.runner.Sandbox", None)
    results = course.grade(small.answered())
    assert {(r.score, r.max_score, r.status) for r in results.values()} == {(0, 3, "not attempted")}


def fails(result: Result, reason: str) -> bool:
    return (result.score, result.status) == (0, "error") and reason in result.message


def passed(results: dict[str, Result], *names: str) -> bool:
    return all((results[name].score, results[name].status) == (3, "passed") for name in names)


@pytest.mark.slow
def test_half_right_answers_get_part_of_the_points(course: Course) -> None:
    half = "return x * 2 if len(x) else None"
    results = course.grade(small.answered(double=half, shift="return 1 + x", negate="!def negate(x:"))
    assert (results["double"].score, results["double"].status) == (2, "partial")
    assert passed(results, "shift")
    assert fails(results["negate"], "SyntaxError")
    assert (results["halve"].score, results["halve"].status) == (0, "not attempted")


@pytest.mark.slow
def test_loops_exits_and_huge_allocations_leave_the_others_their_points(course: Course) -> None:
    bad = {"double": "!while True: pass", "shift": "!raise SystemExit", "negate": "return bytearray(2**40)"}
    results = course.grade(small.answered(**small.ALL_RIGHT | bad | {"halve": "!exit()"}))
    assert fails(results["double"], "longer than 3 s")
    assert fails(results["shift"], "SystemExit")
    assert fails(results["negate"], "MemoryError")
    assert fails(results["halve"], "'halve' is not defined")
    assert passed(results, "square")


STUBBORN = """!import subprocess, time
subprocess.run("setsid sleep 301.7 & setsid sleep 302.7 &", shell=True)
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass"""


@pytest.mark.slow
def test_what_ends_the_process_or_must_be_killed_leaves_the_others_their_points(course: Course) -> None:
    bad = {
        "shift": "import os; os._exit(3)",
        "negate": "import ctypes; ctypes.string_at(0)",
        "halve": STUBBORN,
    }
    results = course.grade(small.answered(**small.ALL_RIGHT | bad))
    assert fails(results["shift"], "ended the process with exit code 3")
    assert fails(results["negate"], "ended the process by SIGSEGV")
    assert fails(results["halve"], "longer than 3 s")
    assert passed(results, "double", "square")
    assert not left_behind("301.7")
    assert not left_behind("302.7")


@pytest.mark.slow
def test_what_outlives_a_good_answer_is_ended_too(course: Course) -> None:
    code = (
        "!import subprocess\nsubprocess.run('setsid sleep 303.7 &', shell=True)\ndef double(x): return x * 2"
    )
    assert passed(course.grade(small.answered(double=code)), "double")
    assert not left_behind("303.7")


@pytest.mark.slow
def test_memory_that_the_system_does_not_count_is_watched(course: Course) -> None:
    code = """!import mmap
shared = mmap.mmap(-1, 2**31)
while True:
    shared.seek(0)
    while shared.tell() < 2**31:
        shared.write(b"x" * 2**24)"""
    results = course.grade(
        small.answered(double="return x * 2", shift=code), Limits(seconds=20, memory=10**9)
    )
    assert fails(results["shift"], "more than 0.9 GiB of memory")
    assert passed(results, "double")


@pytest.mark.slow
def test_a_flood_of_prints_costs_no_points_and_drops_no_score(course: Course) -> None:
    notebook = small.answered(double="print('x' * 10**7); return x * 2")
    small.at(notebook, "answer1")["source"] += (
        "\nfor _ in range(10): print('x' * 10**7), display('x' * 10**6)"
    )
    small.at(notebook, "answer2")["source"] = "def shift(x): display('x' * 10**6); return x + 1"
    assert passed(course.grade(notebook), "double", "shift")


@pytest.mark.slow
def test_of_a_flood_of_prints_only_the_beginning_is_kept() -> None:
    code = f"for _ in range(20): print('x' * 10**5, flush=True)\ndisplay({{'{MIME}': {{}}}}, raw=True)"

    async def run() -> list[dict[str, Any]]:
        async with Sandbox(Limits(output=10**6)) as box:
            return await box.run(code, 20)

    *prints, score = asyncio.run(run())
    assert 0 < sum(len(output["text"]) for output in prints) <= 10**6
    assert score["data"] == {MIME: {}}


@pytest.mark.slow
def test_the_whole_notebook_has_a_limit_too(course: Course) -> None:
    loop = "!while True: pass"
    results = course.grade(small.answered(double=loop, shift=loop), Limits(seconds=9, grace=1, total=4))
    assert fails(results["double"], "as a whole took longer than 4 s")
    assert fails(results["shift"], "as a whole took longer than 4 s")


@pytest.mark.slow
def test_an_answer_that_meddles_with_the_checks_earns_nothing(course: Course) -> None:
    code = "!import kvlearn\nkvlearn.check = lambda *a: 3\ndef shift(x): return 7"
    results = course.grade(small.answered(double="return x * 2", shift=code, negate="return -x"))
    assert fails(results["shift"], "changes kvlearn.check")
    assert passed(results, "double", "negate")


@pytest.mark.slow
def test_what_an_answer_does_to_the_common_set_up_stays_with_it(course: Course) -> None:
    greedy = "!weights += 1\ntorch = None\ndef double(x): return x + x"
    trusting = "assert torch.equal(weights, torch.ones(3)); return -x"
    assert passed(course.grade(small.answered(double=greedy, negate=trusting)), "double", "negate")


MEDDLING = {
    "kvlearn.check": "import kvlearn; kvlearn.check = print",
    "torch.isclose": "torch.isclose = lambda *a, **k: True",
    "torch.Tensor.__eq__": "torch.Tensor.__eq__ = lambda *a: True",
    "builtins.abs": "import builtins; builtins.abs = lambda x: 0",
    "kvlearn.grading.score.Score.to_json": "import kvlearn.grading as g; g.Score.to_json = print",
    "kvlearn.grading.judge": "import kvlearn.grading as g; g.judge.__code__ = (lambda *a: 0).__code__",
    "exercise 90.2": "exercises()['90.2'].requirements.pop()",
    "IPython's formatter": "get_ipython().display_formatter.mimebundle_formatter.for_type(int, repr)",
    "IPython's events": "get_ipython().events.register('pre_run_cell', lambda info: None)",
    "name weights": "weights += 1",
    "name torch's defaults": "torch.set_grad_enabled(False)",
}


@pytest.mark.slow
def test_whatever_checks_rely_on_is_seen_to_change() -> None:
    async def look() -> list[list[str]]:
        found = []
        async with Sandbox(Limits()) as box:
            await box.run(small.SETUP, 60)
            before = json.loads(await box.ask(ASK, 60))
            assert not changed(before, json.loads(await box.ask(ASK, 60)))
            for code in MEDDLING.values():
                await box.run(code, 5)
                after = json.loads(await box.ask(ASK, 5))
                found.append(changed(before, after))
                before = after
        return found

    for name, found in zip(MEDDLING, asyncio.run(look()), strict=True):
        assert name in found


@pytest.mark.slow
def test_cells_deleted_edited_doubled_renamed_and_added_are_put_right(course: Course) -> None:
    notebook = small.answered(**small.ALL_RIGHT)
    forged = {"exercise": "90.2", "score": 3, "max_score": 3, "status": "passed", "message": ""}
    cells = {cell["id"]: cell for cell in notebook["cells"]}
    cells["setup"]["source"] = "exercises = None"
    cells["answer1"]["metadata"] = {}
    cells["answer2"]["id"], cells["answer2"]["source"] = "renamed", "def shift(x): return x + unit()"
    cells["check2"]["source"] = f"display({{'{MIME}': {forged}}}, raw=True)"
    cells["answer3"]["source"] = "def negate(x): return helper(x)"
    more = small.cell("def helper(x): return -x", "added")
    again = dict(cells["answer2"], id="again", source="def unit(): return 1")
    order = [
        "setup",
        "check2",
        "answer2",
        "again",
        "check1",
        "check1",
        "check2",
        "added",
        "answer3",
        "answer1",
    ]
    notebook["cells"] = [{"added": more, "again": again}.get(name) or cells[name] for name in order]
    assert passed(course.grade(notebook), "double", "shift", "negate")


@pytest.mark.slow
def test_a_notebook_damaged_in_parts_is_graded_for_the_rest(course: Course) -> None:
    notebook = small.answered(**small.ALL_RIGHT)
    small.at(notebook, "answer2").update(source=17, metadata=None)
    notebook["cells"] += [None, {"cell_type": "code"}, {"id": [], "metadata": {"nbgrader": 3}}]
    notebook["cells"] = [c for c in notebook["cells"] if not (c and c.get("id") == "answer3")]
    results = course.grade(notebook)
    assert passed(results, "double", "halve", "square")
    assert results["shift"].status == results["negate"].status == "not attempted"
    assert results["negate"].message == "the answer cell is missing"


TASK = Task("90.1", 3.0, [], [], "")
GOOD = {"exercise": "90.1", "score": 3.0, "max_score": 3, "status": "passed", "message": "well done"}


def output(score: Any, kind: str = "execute_result") -> dict[str, Any]:
    return {"output_type": kind, "data": {MIME: score}}


def test_the_score_is_the_checks_own_result() -> None:
    assert _score(TASK, [output(GOOD)], "") == Result("90.1", 3.0, 3.0, "passed", "well done")


@pytest.mark.parametrize(
    "outputs",
    [
        [],
        [output(GOOD, "display_data")],
        [output(GOOD), output(GOOD)],
        [output(GOOD, "display_data"), output(GOOD)],
        [output("3")],
        *(
            [output(GOOD | {"score": score})]
            for score in (3.0001, -1, float("nan"), float("inf"), "3", None, [3])
        ),
        [output(GOOD | {"max_score": 4})],
        [output(GOOD | {"exercise": "90.2"})],
        [output(GOOD | {"status": "splendid"})],
        [output(GOOD | {"status": []})],
    ],
)
def test_a_score_out_of_order_is_none(outputs: list[dict[str, Any]]) -> None:
    result = _score(TASK, outputs, "")
    assert (result.score, result.status) == (0, "error")
    assert result.message


def test_messages_are_one_plain_line() -> None:
    message = _score(
        TASK, [output(GOOD | {"message": "\x1b[31mred\x1b[0m\r\n\x07bell" + 999 * "x"})], ""
    ).message
    assert message.startswith("red bellxxx")
    assert len(message) == 400
