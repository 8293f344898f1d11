"""``kvlearn progress --html``: a page of what is solved; and answers that serve in another unit."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import small_unit as small
from copies import FILE, U, kvlearn, read, solve

import kvlearn as front
from kvlearn.grading import NotWritten, certificate, keep_points, records, solved_answers
from kvlearn.grading.folders import MARK
from kvlearn.grading.overview import Line, Progress, UnitLine
from kvlearn.grading.records import Record

WORK = Path("work")
HOSTILE = '<script>alert("x")</script> & $x^$'


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course of the small unit with its copy made; commands run from ``tmp_path``."""
    monkeypatch.setenv("KVLEARN_SOLUTIONS", str(small.write_solutions(tmp_path / "solutions")))
    monkeypatch.setenv("KVLEARN_WORK", str(tmp_path / "work"))
    monkeypatch.chdir(tmp_path)
    assert kvlearn("start").exit_code == 0
    return tmp_path


def point(name: str = "full", **changes: Any) -> dict[str, Any]:
    numbers = {"bytes": 4096.0, "loss": 1.2, "error": 0.02}
    return {"name": name, "whose": "yours", "front": True} | numbers | changes


def solved(*exercises: str) -> None:
    """Record these exercises as passed. There is no notebook any more that could say otherwise."""
    FILE.unlink(missing_ok=True)
    for name in exercises:
        passed = Record("", "", 3, 3, "passed")
        records.update(WORK, lambda content: records.put(content, name, passed, latest=True))  # noqa: B023


class Page(HTMLParser):
    """The elements of a page, by name, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_says_what_is_solved_and_needs_nothing_else(course: Path) -> None:
    solved("90.1", "90.3")
    result = kvlearn("progress", "--html", "mine.html")
    assert result.exit_code == 0
    assert "wrote mine.html" in result.stderr
    page = Page(Path("mine.html").read_text("utf-8"))
    assert "6 of 15 points in 2 of 5 exercises solved" in page.text
    assert page.text.count("✓ passed") == 2
    assert page.links == []
    assert "script" not in page.tags
    assert "supervised" in page.text


def test_a_page_of_one_unit_and_json_go_together(course: Path) -> None:
    result = kvlearn("progress", U, "--json", "--html", "mine.html")
    assert json.loads(result.stdout)["units"][0]["unit"] == U
    assert U in Path("mine.html").read_text("utf-8")


@pytest.mark.parametrize("name", ["work", "nosuch/mine.html", f"work/{U}/{U}.ipynb"])
def test_a_page_replaces_no_notebook_and_needs_its_folder(course: Path, name: str) -> None:
    before = FILE.read_bytes()
    result = kvlearn("progress", "--html", name)
    assert result.exit_code == 2
    assert name in result.stderr
    assert FILE.read_bytes() == before


def test_a_page_that_cannot_be_written_is_said_and_progress_is_shown(
    course: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    result = kvlearn("progress", "--html", "mine.html")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert U in result.stdout


def test_the_picture_is_there_once_its_exercise_is_solved(
    course: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FILE.parent)
    keep_points("90.3", [point(), point("window", bytes=512.0, whose="ours")])
    monkeypatch.chdir(course)
    board = certificate.read_points(WORK)
    assert board is not None
    kvlearn("progress", "--html", "mine.html")
    assert "img" not in Page(Path("mine.html").read_text("utf-8")).tags
    solved("90.3")
    kvlearn("progress", "--html", "mine.html")
    page = Page(Path("mine.html").read_text("utf-8"))
    assert [link.split(",")[0] for link in page.links] == ["data:image/png;base64"]
    assert "My model: bytes against loss (90.3)" in page.text
    assert "window" in page.text


def test_hostile_names_are_text() -> None:
    line = Line(HOSTILE, HOSTILE, 1, 3, "passed")
    progress = Progress((UnitLine(HOSTILE, (line,)),))
    board = certificate.Board(HOSTILE, [point(HOSTILE), point("$\\frac{", bytes=9.0)])
    page = Page(certificate.page(progress, board, HOSTILE))
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 5


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"schema": 2, "exercise": "90.3", "points": []}',
        '{"schema": 1, "exercise": "90.3", "points": []}',
        '{"schema": 1, "exercise": "90.3", "points": 7}',
        '{"schema": 1, "exercise": "90.3", "points": [7]}',
        json.dumps({"schema": 1, "exercise": "90.3", "points": [point(bytes=0)]}),
        json.dumps({"schema": 1, "exercise": "90.3", "points": [point(loss=float("nan"))]}),
        json.dumps({"schema": 1, "exercise": "90.3", "points": [point(error=-1)]}),
        json.dumps({"schema": 1, "exercise": "90.3", "points": [point(bytes="many")]}),
    ],
)
def test_a_board_that_makes_no_sense_is_none(tmp_path: Path, content: str) -> None:
    file = certificate.file_of(tmp_path)
    file.parent.mkdir()
    file.write_text(content)
    assert certificate.read_points(tmp_path) is None


# Answers that serve in another unit


@pytest.fixture
def in_copy(course: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As a kernel of the learner's copy, in which 90.1 and 90.2 are solved and checked."""
    solve(double="return x + x", shift="return x - 1")
    assert kvlearn("progress").exit_code == 0
    monkeypatch.chdir(FILE.parent)
    return course


@pytest.mark.slow
def test_a_solved_answer_serves_elsewhere_as_long_as_it_is_unchanged(
    in_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert solved_answers("90.5", "90.1")["double"](4) == 8
    with pytest.raises(NotWritten, match=r"90\.2 does not have all its points yet"):
        solved_answers("90.5", "90.2")
    monkeypatch.setenv(MARK, "1")
    with pytest.raises(NotWritten, match="not your copy"):
        solved_answers("90.5", "90.1")
    monkeypatch.delenv(MARK)
    file = in_copy / FILE
    solve(file, double="return 2 * x")
    with pytest.raises(NotWritten, match=r"90\.1 changed since its last check: kvlearn progress"):
        solved_answers("90.5", "90.1")
    file.write_text("{")
    with pytest.raises(NotWritten, match="damaged"):
        solved_answers("90.5", "90.1")
    file.unlink()
    with pytest.raises(NotWritten, match=f"there is no {U} in work/ yet"):
        solved_answers("90.5", "90.1")


@pytest.mark.slow
def test_an_answer_that_needs_another_cell_is_not_taken(in_copy: Path) -> None:
    file = in_copy / FILE
    assert front.check("90.1", lambda x: x + x).status == "passed"
    notebook = read(file)
    small.at(notebook, "answer1")["source"] = "print('noise')\ndouble = helper"
    small.write(notebook, file)
    tasks, places = records.submission.tasks_of(U, records.solutions_root())
    records.submission.fill_in(tasks, places, notebook)
    checks = records.checks_of(U, records.solutions_root())
    now = Record(records.answer_of(tasks, tasks[0]), checks, 3, 3, "passed")
    records.update(in_copy / WORK, lambda content: records.put(content, "90.1", now, latest=True))
    with pytest.raises(NotWritten, match="does not run on its own \\(NameError: name 'helper'"):
        solved_answers("90.5", "90.1")
