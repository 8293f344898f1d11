"""A class is graded: nothing finished is lost, nothing unchanged runs again, nothing stays behind."""

import asyncio
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import patience
import psutil
import pytest
import small_unit as small
from typer.testing import CliRunner, Result

from kvlearn.cli import app
from kvlearn.grading import commands, container, counting, kept
from kvlearn.grading import report as reports
from kvlearn.grading.counting import Counting, progress_bar
from kvlearn.grading.grader import Clock, Grader
from kvlearn.grading.kept import Kept
from kvlearn.grading.report import Report
from kvlearn.grading.report import Result as Graded
from kvlearn.grading.sandbox import Limits, ProcessTree, Sandbox, allowed
from kvlearn.grading.submission import readable

U = small.UNIT
HERE = str(Path(__file__).parent)


@pytest.fixture
def solutions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course of the small unit alone, in which the commands are run from ``tmp_path``."""
    folder = small.write_solutions(tmp_path / "solutions")
    monkeypatch.setenv("KVLEARN_SOLUTIONS", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def put(student: str, **answers: str) -> Path:
    return small.write(small.answered(**answers), Path("all") / student / U / f"{U}.ipynb")


def kvlearn(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


class Runs:
    """In place of the kernels: every answer that was touched passes, and who was run is noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.students: list[str] = []
        self.stops: dict[str, signal.Signals] = {}  # what signal comes while whose notebook runs

        async def run(grader: Grader, submitted: Any, tasks: Any, kernels: Any) -> list[Graded]:
            self.students.append(submitted.student)
            if submitted.student in self.stops:
                signal.raise_signal(self.stops[submitted.student])
                await asyncio.sleep(30)
            results = [
                Graded(task.id, 0.0, task.points, "not attempted", "")
                if task.untouched
                else Graded(task.id, task.points, task.points, "passed", "")
                for task in tasks
            ]
            for result in results:
                grader.done(result)
            return results

        monkeypatch.setattr(Grader, "run", run)

    def take(self) -> list[str]:
        found, self.students = sorted(self.students), []
        return found


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


def scores(file: str) -> dict[str, float]:
    rows = list(csv.DictReader(Path(file).read_text().splitlines()))
    students = dict.fromkeys(row["student"] for row in rows)
    return {name: sum(float(row["score"]) for row in rows if row["student"] == name) for name in students}


def test_a_run_that_was_interrupted_goes_on_and_what_is_unchanged_does_not_run(
    solutions: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for student in ("ada", "bob", "eve"):
        put(student, double=f"return x + x  # {student}")
    command = ("grade", "all", "--csv", "-o", "grades.csv", "-j", "1")
    # Ctrl+C, kill, a closed terminal
    for stops_at, number, run in (
        ("bob", signal.SIGINT, ["ada", "bob"]),
        ("eve", signal.SIGTERM, ["bob", "eve"]),
        ("eve", signal.SIGHUP, ["eve"]),
    ):
        runs.stops = {stops_at: number}
        result = kvlearn(*command)
        assert result.exit_code == 128 + number
        finished = ["ada"] if stops_at == "bob" else ["ada", "bob"]
        assert scores("grades.csv") == dict.fromkeys(finished, 3), "what was finished is in the report"
        said = f"interrupted: {len(finished)} of 3 notebooks are in the report; the same command goes on"
        assert said in result.stderr
        assert runs.take() == run
    runs.stops = {}
    result = kvlearn(*command)
    assert (result.exit_code, runs.take()) == (0, ["eve"])
    assert "2 notebooks are as they were" in result.stderr
    assert scores("grades.csv") == {"ada": 3, "bob": 3, "eve": 3}

    file = Path(f"all/ada/{U}/{U}.ipynb")
    notebook = json.loads(file.read_text())
    notebook["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "run again"}]
    small.write(notebook, file)
    kvlearn(*command)
    assert runs.take() == [], "outputs are no answer"
    put("ada", double="return 2 * x")
    kvlearn(*command)
    assert runs.take() == ["ada"]
    kvlearn(*command, "--timeout", "30")
    assert runs.take() == ["ada", "bob", "eve"], "another limit may give another result"
    kvlearn(*command, "--again")
    assert runs.take() == ["ada", "bob", "eve"]
    checks = solutions / U / "checks.py"
    checks.write_text(checks.read_text() + "\n# changed\n")
    kept.unit_version.cache_clear()
    kvlearn(*command)
    assert runs.take() == ["ada", "bob", "eve"], "the unit's checks have changed"
    monkeypatch.setattr(kept, "version", lambda: "another kvlearn")
    kvlearn(*command)
    assert runs.take() == ["ada", "bob", "eve"], "kvlearn has changed"
    for file in Path("grades.csv.kept").iterdir():
        file.write_text("[" * 10**5)
    assert kvlearn(*command).exit_code == 0
    assert runs.take() == ["ada", "bob", "eve"], "what was damaged is made again"


def test_parts_of_an_array_job_share_a_folder_and_none_is_run_twice(solutions: Path, runs: Runs) -> None:
    for i in range(5):
        put(f"s{i}", double=f"return x + x  # {i}")
    for k, students in enumerate((["s0", "s3"], ["s1", "s4"], ["s2"]), 1):
        assert kvlearn("grade", "all", "--part", f"{k}/3", "--keep", "kept").exit_code == 0
        assert runs.take() == students
    result = kvlearn("grade", "all", "--keep", "kept", "--csv", "-o", "grades.csv")
    assert (result.exit_code, runs.take()) == (0, [])
    assert scores("grades.csv") == {f"s{i}": 3 for i in range(5)}
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0"):
        assert kvlearn("grade", "all", "--part", wrong).exit_code == 2
    Path("file").touch()
    result = kvlearn("grade", "all", "--keep", "file")
    assert result.exit_code == 2
    assert result.stderr == "kvlearn: file: File exists\n"


def test_a_full_disk_costs_only_the_next_run_its_time(
    solutions: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    put("ada", double="return x + x")
    monkeypatch.setattr("kvlearn.grading.records.write", full)
    result = kvlearn("grade", "all", "--keep", "kept", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)[0]["score"] == 3
    assert result.stderr == "kvlearn: kept: No space left on device; results are not kept\n"


def test_kept_results_are_read_as_something_that_others_may_have_written(tmp_path: Path) -> None:
    task: Any = type("Task", (), {"id": "90.1", "points": 3.0})()
    good = {"id": "90.1", "score": 2.0, "max_score": 3.0, "status": "partial", "message": ""}
    wrong = [{"score": 4.0}, {"score": "3"}, {"score": True}, {"max_score": 9.0}, {"status": "great"}]
    wrong += [{"id": "90.2"}, {"score": float("nan")}, {"message": 3}, {"more": 1}]
    for change in ({}, *wrong):
        (tmp_path / "a.json").write_text(json.dumps({"results": [good | change]}))
        found = Kept(tmp_path).get("a", [task])
        assert (found is not None) == (not change), change


def test_watching_runs_only_the_notebook_that_was_saved(
    solutions: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("ada", double="return x + x")
    put("bob", double="return x * 2")
    saves = iter([lambda: put("bob", double="return 2 * x")])
    seen = []

    def save(pause: float) -> None:
        seen.append(runs.take())
        next(saves, lambda: signal.raise_signal(signal.SIGINT))()

    monkeypatch.setattr(time, "sleep", save)
    assert kvlearn("grade", "all", "--watch").exit_code == 0
    assert seen == [["ada", "bob"], ["bob"]]


def test_only_as_many_notebooks_are_read_at_a_time_as_there_are_jobs(
    solutions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_now = most = 0

    async def run(grader: Grader, submitted: Any, tasks: Any, kernels: Any) -> list[Graded]:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        await asyncio.sleep(0)
        open_now -= 1
        return [Graded(task.id, 0.0, task.points, "wrong", submitted.student) for task in tasks]

    monkeypatch.setattr(Grader, "run", run)
    for i in range(9):
        put(f"s{i}")
    graded, _ = commands.grade([Path("all")], Grader(jobs=3))
    assert [report.student for report in graded] == [f"s{i}" for i in range(9)], "in the order of the paths"
    assert {report.student: report.exercises[0].message for report in graded} == {
        f"s{i}": f"s{i}" for i in range(9)
    }
    assert most == 3


def test_a_line_each_interval_says_how_long_it_still_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "EVERY", 0.02)
    with progress_bar(60) as done:
        done.skip([Graded("90.1", 3, 3, "passed", "")] * 30)
        for _ in range(10):
            done(Graded("90.2", 3, 3, "passed", ""))
        done._begin -= 100
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert "kvlearn: 40 of 60 exercises graded, 3:20 left" in lines
    counted = Counting(1000)
    assert counted.left == "", "nothing has run that tells"
    counted(Graded("90.1", 3, 3, "passed", ""))
    counted._begin -= 10
    assert counted.left.startswith("2:46:3")


def test_names_of_folders_reach_no_terminal_as_commands(solutions: Path, runs: Runs) -> None:
    evil = "a\x1b[31m\x9b2J[bold]b\tc\r\n\u202e"
    put(evil)
    Path("all", evil, "note.ipynb").write_text("{")
    for style in ("--json", "--csv", "--html", ""):
        result = kvlearn("grade", "all", *filter(None, [style]))
        text = result.stdout + result.stderr
        assert not [c for c in text if not c.isprintable() and c != "\n"], style
        assert "[bold]b" in text, "markup is shown as it is"
    assert readable("A\u0308sa نیما\u200c१") == "A\u0308sa نیما\u200c१", "names of the world stay"


def test_a_cell_that_a_spreadsheet_would_calculate_has_an_apostrophe() -> None:
    for first in "=+-@\t\r\n":
        told = Report("", U, [Graded("90.1", 0.0, 3.0, "error", f"{first}cmd()")])
        (row,) = csv.DictReader(io.StringIO(reports.to_csv([told]), newline=""))
        assert row["message"].startswith("'"), repr(first)


def test_a_terminal_of_ascii_ends_neither_grade_nor_progress(solutions: Path, runs: Runs) -> None:
    put("Åsa·✔", double="return x + x")
    for style in ([], ["--json"], ["--csv"], ["--html"]):
        result = CliRunner(charset="ascii").invoke(app, ["grade", "all", *style])
        assert (result.exit_code, result.exception) == (0, None), style
        if style == ["--json"]:
            assert json.loads(result.stdout)[0]["student"] == "Åsa·✔", "JSON has escapes for it"
        if style == ["--html"]:
            assert "&#197;sa" in result.stdout
    for more in ([], ["--json"]):
        result = CliRunner(charset="ascii").invoke(app, ["progress", "all", *more])
        assert (result.exit_code, result.exception) == (0, None), more


def test_the_kernels_clock_stops_while_it_waits_for_a_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tree = ProcessTree(os.getpid(), "")
    monkeypatch.setattr(tree.root, "children", lambda: [psutil.Process()])
    if Path("/proc/self/schedstat").exists():
        assert 0 <= tree.waited() < 3600
    box = Sandbox(Limits())
    before = box.now()
    box.waited += 50
    assert box.now() < before - 49
    clock = Clock(10)
    clock.give(5)
    assert clock.end - time.monotonic() == pytest.approx(15, abs=1)


def test_of_the_environment_answers_see_where_things_are_and_no_tokens() -> None:
    kept_ones = {"PATH": "/bin", "HOME": "/", "LC_ALL": "C", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    kept_ones |= {"KVLEARN_SOLUTIONS": "/s", "CUDA_VISIBLE_DEVICES": "0"}
    secret = {"GITHUB_TOKEN": "t", "AWS_SECRET_ACCESS_KEY": "s", "HF_TOKEN": "h", "PYTHONSTARTUP": "f"}
    secret |= {"CANVAS_API_KEY": "k", "KVLEARN_TOKEN": "k", "SSH_AUTH_SOCK": "s", "DATABASE_URL": "d"}
    assert allowed(kept_ones | secret) == kept_ones


ENGINE = """#!{python}
import json, pathlib, sys
line = sys.argv[1:]
log = pathlib.Path({log!r})
log.write_text(log.read_text() + json.dumps(line) + "\\n" if log.exists() else json.dumps(line) + "\\n")
folder = next(each.split(":")[0] for each in line if each.endswith(":/submission:ro"))
notebook = json.loads(next(pathlib.Path(folder).iterdir()).read_text())
said = "\\n".join("".join(cell["source"]) for cell in notebook["cells"])
points = 3.0 if "x + x" in said else 99.0
result = dict(score=points, max_score=3.0, status="passed", message="")
exercises = [dict(id=f"90.{{i}}", **result) for i in range(1, 6)]
print(json.dumps([dict(exercises=exercises)]))
print("a line on stderr", file=sys.stderr)
"""


def test_in_a_container_there_is_no_network_and_nothing_to_write_to(
    solutions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("ada", double="return x + x")
    put("eve", double="return 'forged'")
    monkeypatch.setenv("PATH", str(Path("nowhere").absolute()))
    result = kvlearn("grade", "all", "--container", "course")
    assert (result.exit_code, result.stderr) == (
        2,
        "kvlearn: --container needs podman or docker, and neither is installed here\n",
    )
    binary = Path("bin/podman")
    binary.parent.mkdir()
    binary.write_text(ENGINE.format(python=sys.executable, log=str(Path("log").absolute())))
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(binary.parent.absolute()))
    result = kvlearn("grade", "all", "--container", "course", "--json", "-j", "1", "--timeout", "7")
    ada, eve = json.loads(result.stdout)
    assert ada["score"] == 15
    assert {(e["score"], e["status"]) for e in eve["exercises"]} == {(0, "error")}, (
        "99 of 3 points is no score"
    )
    assert "the container gave no report in order: a line on stderr" in result.stderr
    lines = [json.loads(line) for line in Path("log").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        text = " ".join(line)
        wanted = ["run --rm", "--network none", "--read-only", "--cap-drop ALL", "no-new-privileges"]
        wanted += ["--memory 4294967296", "--pids-limit 256", "--cpus 1", "--pull never", "--timeout 7"]
        wanted += [f"{solutions}:/solutions:ro", "course kvlearn grade /submission/90_small.ipynb --json"]
        assert not [each for each in wanted if each not in text], text
        volumes = [line[i + 1] for i, each in enumerate(line) if each == "--volume"]
        assert all(each.endswith(":ro") for each in volumes)
        assert "--user 0" not in text
    assert container.engine() == str(binary.absolute())


STUBBORN = (
    "!open('{marker}', 'w')\nimport signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nsum(iter(int, 1))"
)


def wait_for(happened: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(happened())


@pytest.mark.slow
def test_a_grader_that_is_killed_leaves_no_kernel_and_what_was_finished(solutions: Path) -> None:
    """The answer holds Python's lock in a loop, so that ipykernel cannot see by itself that it is alone."""
    put("ada")
    put("bob", double=STUBBORN.format(marker=Path("running").absolute()))
    Path("tmp").mkdir()
    command = [sys.executable, "-m", "kvlearn", "grade", "all", "--csv", "-o", "grades.csv"]
    environment = os.environ | {"TMPDIR": str(Path("tmp").absolute())}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        assert wait_for(Path("running").exists, 240)
        kernels = psutil.Process(process.pid).children(recursive=True)
        assert len(kernels) >= 2
    finally:
        process.kill()
        process.wait()
    assert wait_for(lambda: not [p for p in kernels if p.is_running()], 20)
    assert wait_for(lambda: not list(Path("tmp").glob("kvlearn-*")), 20), "and no folder"
    assert len(list(Path("grades.csv.kept").iterdir())) == 1


MIXED = {
    "half": {
        "double": "return x * 2 if len(x) else None",
        "shift": "return x - 1",
        "negate": "!def negate(x:",
        "halve": "return x / 2",
        "square": "!import time; time.sleep(300)",  # too long, and takes no processor
    },
    "exits": {"shift": "import os; os._exit(3)", "square": "return x * x"},
    "untouched": {},
}


@pytest.mark.slow
def test_a_class_of_mixed_quality_has_the_same_grades_whatever_runs_beside_it(
    solutions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, with one kernel and with three; nothing is left behind, and nothing runs a third time."""
    for student, answers in MIXED.items():
        put(student, **answers)
    small.write({"cells": [1]}, Path(f"all/damaged/{U}/{U}.ipynb"))
    limits, store, before = patience.limits(2), Kept(), psutil.Process().children(recursive=True)
    graded = [commands.grade([Path("all")], Grader(limits=limits, jobs=3))[0]]
    graded.append(commands.grade([Path("all")], Grader(limits=limits, jobs=1, kept=store))[0])
    tables = [
        {r.student: [(e.score, e.status, e.message) for e in r.exercises] for r in some} for some in graded
    ]
    assert tables[0] == tables[1]
    points = {report.student: report.score for report in graded[0]}
    assert points == {"half": 6, "exits": 3, "untouched": 0, "damaged": 0}
    assert set(psutil.Process().children(recursive=True)) <= set(before)
    monkeypatch.setattr("kvlearn.grading.grader.Sandbox", None)
    again, _ = commands.grade([Path("all")], Grader(limits=limits, kept=store))
    assert again == graded[1]
