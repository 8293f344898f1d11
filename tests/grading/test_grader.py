"""A bad answer harms nobody: it earns 0 and the reason, the others keep their points, the file stays."""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import patience
import psutil
import pytest
import small_unit as small
from test_integrity import INNOCENT

from kvlearn.grading import grader
from kvlearn.grading.commands import grade
from kvlearn.grading.grader import Clock, Grader
from kvlearn.grading.report import Report, Result
from kvlearn.grading.sandbox import MIME, Limits, Sandbox
from kvlearn.grading.submission import Submission

# In the names of what this process starts: other runs of these tests may go on beside it.
HERE = os.getpid()


class Course:
    """A solutions/ folder with the small unit, and a place for a learner's notebook."""

    def __init__(self, folder: Path) -> None:
        self.solutions = small.write_solutions(folder / "solutions")
        self.file = folder / "exercises" / small.UNIT / f"{small.UNIT}.ipynb"

    def grade(self, notebook: dict[str, Any], limits: Limits | None = None) -> dict[str, Result]:
        small.write(notebook, self.file)
        before = hashlib.sha256(self.file.read_bytes()).digest()
        (report,), faults = grade(
            [self.file], Grader(limits=limits or patience.limits(2), solutions=self.solutions)
        )
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
    monkeypatch.setattr(grader, "Sandbox", None)
    results = course.grade(small.answered())
    assert {(r.score, r.max_score, r.status) for r in results.values()} == {(0, 3, "not attempted")}


def fails(result: Result, reason: str) -> bool:
    return (result.score, result.status) == (0, "error") and reason in result.message


def passed(results: dict[str, Result], *names: str) -> bool:
    return all((results[name].score, results[name].status) == (3, "passed") for name in names)


DETACHING = f"""!import subprocess
subprocess.run('setsid sleep 303.{HERE} &', shell=True)
def square(x): return x * x"""


FLOOD = """!for _ in range(10): print('x' * 10**7), display('x' * 10**6)
def shift(x):  # \ud800 is half a character, which no message to a kernel can hold
    print('x' * 10**7), display('x' * 10**6)
    return 1 + x"""


@pytest.mark.slow
def test_half_right_answers_get_part_of_the_points_and_a_flood_of_prints_costs_none(course: Course) -> None:
    half = "return x * 2 if len(x) else None"
    notebook = small.answered(double=half, shift=FLOOD, negate="!def negate(x:", square=DETACHING)
    results = course.grade(notebook, Limits())
    assert (results["double"].score, results["double"].status) == (2, "partial")
    assert passed(results, "shift", "square")
    assert fails(results["negate"], "SyntaxError")
    assert (results["halve"].score, results["halve"].status) == (0, "not attempted")
    assert not left_behind(f"303.{HERE}"), "what outlives a good answer must be ended too"


@pytest.mark.slow
def test_loops_exits_and_huge_allocations_leave_the_others_their_points(course: Course) -> None:
    bad = {"double": "!while True: pass", "shift": "!raise SystemExit", "negate": "return bytearray(2**40)"}
    results = course.grade(small.answered(**small.ALL_RIGHT | bad | {"halve": "!exit()"}))
    assert fails(results["double"], "longer than ")
    assert fails(results["shift"], "SystemExit")
    assert fails(results["negate"], "MemoryError")
    assert fails(results["halve"], "exit")
    assert passed(results, "square")


PARRICIDE = f"import os; assert os.getppid() != {os.getpid()}; os.kill(os.getppid(), signal); return x * 2"
STUBBORN = f"""!import subprocess, time
subprocess.run("setsid sleep 301.{HERE} & setsid sleep 302.{HERE} &", shell=True)
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
        "double": PARRICIDE.replace("signal", "15"),
        "square": PARRICIDE.replace("signal", "9"),
    }
    results = course.grade(small.answered(**small.ALL_RIGHT | bad))
    assert fails(results["shift"], "ended the process with exit code 3")
    assert fails(results["negate"], "ended the process by SIGSEGV")
    assert fails(results["halve"], "longer than ")
    assert fails(results["square"], "ended the process by SIGKILL")
    assert passed(results, "double")
    assert not left_behind(f"301.{HERE}")
    assert not left_behind(f"302.{HERE}")


@pytest.mark.slow
def test_memory_that_the_system_does_not_count_is_watched(course: Course) -> None:
    code = """!import mmap
shared = mmap.mmap(-1, 2**31)
while True:
    shared.seek(0)
    while shared.tell() < 2**31:
        shared.write(b"x" * 2**24)"""
    results = course.grade(
        small.answered(double=code, shift="return x + 1"), Limits(seconds=120, memory=10**9)
    )
    assert fails(results["double"], "more than 0.9 GiB of memory")
    assert passed(results, "shift")


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
    wait = "!import time; time.sleep(300)"  # as long as a loop, and takes no processor
    results = course.grade(small.answered(double=wait, shift=wait), Limits(seconds=9, grace=1, total=3))
    assert fails(results["double"], "as a whole took longer than 3 s")
    assert fails(results["shift"], "as a whole took longer than 3 s")


class Queue(asyncio.Semaphore):
    """Kernels that one waits hours for."""

    def __init__(self) -> None:
        super().__init__(1)
        self.waited = 0.0

    async def acquire(self) -> Any:
        taken = await super().acquire()
        self.waited += 10_000
        return taken


@pytest.mark.slow
def test_waiting_for_a_kernel_costs_a_notebook_none_of_its_time(
    course: Course, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one kernel as well as in one for each exercise, after an answer that ends the first."""
    queue = Queue()
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + queue.waited)
    monkeypatch.setattr(grader, "time", clock)
    ends = {"double": "!import os; os._exit(3)", "shift": "return x + 1", "square": "return x * x"}
    small.write(small.answered(**ends), course.file)

    async def run() -> Report:
        submitted = Submission(course.file, small.UNIT)
        return await Grader(solutions=course.solutions, limits=Limits(total=120)).grade(submitted, queue)

    results = dict(zip(small.NAMES, asyncio.run(run()).exercises, strict=True))
    assert fails(results["double"], "exit code 3")
    assert passed(results, "shift", "square")
    assert queue.waited >= 30_000


def test_the_clock_counts_while_a_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(monotonic=lambda: now.time, time=100.0)
    monkeypatch.setattr(grader, "time", now)
    clock = Clock(10)
    now.time = 200.0
    assert clock.end == 210
    with clock.running():
        now.time = 203.0
        with clock.running():  # a second kernel at the same time
            now.time = 204.0
            assert clock.end == 210
    now.time = 300.0
    assert clock.end == 306


@pytest.mark.slow
def test_an_answer_that_meddles_with_the_checks_earns_nothing(course: Course) -> None:
    code = "!import kvlearn\nkvlearn.check = lambda *a: 3\ndef double(x): return 7"
    results = course.grade(small.answered(double=code, shift="return x + 1"))
    assert fails(results["double"], "changes kvlearn.check")
    assert passed(results, "shift")


@pytest.mark.slow
def test_what_an_answer_does_to_the_common_set_up_stays_with_it(course: Course) -> None:
    greedy = "\n".join(["!weights += 1", *INNOCENT, "torch = None", "def double(x): return x + x"])
    trusting = "assert torch.equal(weights, torch.ones(3)) and weights.dtype == torch.float32; return -x"
    assert passed(course.grade(small.answered(double=greedy, negate=trusting), Limits()), "double", "negate")


@pytest.mark.slow
def test_cells_deleted_edited_doubled_renamed_added_and_damaged_are_put_right(course: Course) -> None:
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
    cells["answer4"].update(source=17, metadata=None)
    notebook["cells"] += [cells["answer4"], None, {"cell_type": "code"}]
    notebook["cells"] += [{"id": [], "metadata": {"nbgrader": 3}}]
    results = course.grade(notebook)
    assert passed(results, "double", "shift", "negate")
    assert results["halve"].status == results["square"].status == "not attempted"
    assert results["square"].message == "the answer cell is missing"


@pytest.mark.slow
def test_ctrl_c_ends_grading_and_every_kernel(tmp_path: Path) -> None:
    script = f"""
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import small_unit
import os
root = Path({str(tmp_path)!r})
os.environ["KVLEARN_SOLUTIONS"] = str(small_unit.write_solutions(root / "solutions"))
loop = small_unit.answered(double="!open({str(tmp_path / "running")!r}, 'w')\\nwhile True: pass")
small_unit.write(loop, root / "90_small" / "90_small.ipynb")
from kvlearn.cli import app
app(["grade", str(root / "90_small")])
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (tmp_path / "running").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    kernels = [p.pid for p in psutil.Process(process.pid).children(recursive=True)]
    assert kernels
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=600)
    assert process.returncode != 0
    assert b"Traceback" not in complaint
    assert not [pid for pid in kernels if psutil.pid_exists(pid)]
