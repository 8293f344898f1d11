"""What ``kvlearn grade`` and ``kvlearn progress`` print, and what they say of notebooks they cannot grade."""

import csv
import io
import json
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import psutil
import pytest
import small_unit as small
from rich.console import Console
from typer.testing import CliRunner, Result

from kvlearn.cli import app
from kvlearn.grading import commands, progress, report
from kvlearn.grading.commands import find
from kvlearn.grading.report import Report

EVIL = "<script>alert(1)</script> & [bold]=1+1[/bold]"
REPORTS = [
    Report("ada", "01_x", [report.Result("01.1", 2.5, 4.0, "partial", EVIL)]),
    Report("=cmd()", "01_x", [report.Result("01.1", 0.0, 4.0, "error", "-1")]),
]


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


def test_json_has_the_agreed_form() -> None:
    exercise = {"id": "01.1", "score": 2.5, "max_score": 4.0, "status": "partial", "message": EVIL}
    first, _ = json.loads(report.to_json(REPORTS))
    assert first == {
        "student": "ada",
        "unit": "01_x",
        "score": 2.5,
        "max_score": 4.0,
        "exercises": [exercise],
    }


def test_csv_has_a_row_for_each_exercise_and_no_formulas() -> None:
    head, first, second = csv.reader(report.to_csv(REPORTS).splitlines())
    assert head == ["student", "unit", "exercise", "score", "max_score", "status", "message"]
    assert first == ["ada", "01_x", "01.1", "2.5", "4", "partial", EVIL]
    assert second[0], second[-1] == ("'=cmd()", "'-1")


def test_the_page_needs_nothing_else_and_runs_nothing() -> None:
    page = report.to_html(REPORTS)
    assert not re.search(r"(src|href)\s*=|@import|url\(", page)
    tags: list[str] = []
    texts: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)  # type: ignore[method-assign]
    parser.handle_data = texts.append  # type: ignore[method-assign]
    parser.feed(page)
    assert "script" not in tags
    assert EVIL in texts
    assert "2.5 of 4 points" in page


def test_the_table_shows_every_exercise_and_takes_no_markup_from_messages() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.to_table(REPORTS[0]))
    text = console.export_text()
    assert "ada · 01_x" in text
    assert "2.5 / 4" in text
    assert "[bold]=1+1[/bold]" in " ".join(text.split())


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
        (f"{small.UNIT}.ipynb", b"{\n  'cells': <<<<<<< HEAD", "not JSON"),
        (f"{small.UNIT}.ipynb", b"\xff\xfe\x00", "not JSON"),
        (f"{small.UNIT}.ipynb", b"", "not JSON"),
        (f"{small.UNIT}.ipynb", b"[" * 10**6, "not JSON"),
        (f"{small.UNIT}.ipynb", b"[1, 2]", "not a Jupyter notebook"),
        (f"{small.UNIT}.ipynb", b'{"worksheets": []}', "not a Jupyter notebook"),
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


def test_progress_is_solved_attempted_and_untouched() -> None:
    statuses = ["passed", "passed", "partial", "wrong", "error", "not attempted"]
    results = [report.Result(f"01.{i}", 1.0, 2.0, status, "") for i, status in enumerate(statuses, 1)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(progress.to_table({"03_multi_head_compression": Report("", "", results)}))
    assert re.search(r"03_multi_head_compression\W+2\W+3\W+1\W+6 / 12\W+━{10}", console.export_text())


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


@pytest.mark.slow
def test_ctrl_c_ends_grading_and_every_kernel(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import small_unit
from kvlearn.grading import runner
root = Path({str(tmp_path)!r})
solutions = small_unit.write_solutions(root / "solutions")
runner.solutions_root = lambda: solutions
loop = small_unit.answered(double="!open({str(tmp_path / "running")!r}, 'w')\\nwhile True: pass")
small_unit.write(loop, root / "90_small" / "90_small.ipynb")
from kvlearn.cli import app
app(["grade", str(root / "90_small")])
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "running").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    kernels = [p.pid for p in psutil.Process(process.pid).children(recursive=True)]
    assert kernels
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=20)
    assert process.returncode != 0
    assert b"Traceback" not in complaint
    assert not [pid for pid in kernels if psutil.pid_exists(pid)]
