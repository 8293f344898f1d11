"""The forms of a report: for programs, for a spreadsheet, as a page, for the terminal."""

import csv
import io
import json
import re
from html.parser import HTMLParser

from rich.console import Console

from kvlearn.grading import report
from kvlearn.grading.report import Report

EVIL = "<script>alert(1)</script> & [bold]=1+1[/bold]"
REPORTS = [
    Report("ada", "01_x", [report.Result("01.1", 2.5, 4.0, "partial", EVIL)], "a/<b>.ipynb"),
    Report("=cmd()", "01_x", [report.Result("01.1", 0.0, 4.0, "error", "-1")], "=b.ipynb"),
]


def test_json_has_the_agreed_form() -> None:
    exercise = {"id": "01.1", "score": 2.5, "max_score": 4.0, "status": "partial", "message": EVIL}
    first, _ = json.loads(report.to_json(REPORTS))
    assert first == {
        "student": "ada",
        "unit": "01_x",
        "file": "a/<b>.ipynb",
        "score": 2.5,
        "max_score": 4.0,
        "exercises": [exercise],
    }


def test_csv_has_a_row_for_each_exercise_and_no_formulas() -> None:
    head, first, second = csv.reader(report.to_csv(REPORTS).splitlines())
    assert head == ["student", "unit", "exercise", "score", "max_score", "status", "message", "file"]
    assert first == ["ada", "01_x", "01.1", "2.5", "4", "partial", EVIL, "a/<b>.ipynb"]
    assert (second[0], *second[-2:]) == ("'=cmd()", "'-1", "'=b.ipynb")


def test_gradebooks_get_a_row_per_student_and_a_column_per_unit() -> None:
    better = Report("ada", "01_x", [report.Result("01.1", 3.0, 4.0, "partial", "")], "b.ipynb")
    other = Report("ada", "02_y", [report.Result("02.1", 5.0, 5.0, "passed", "")], "c.ipynb")
    given = [*REPORTS, better, other]
    head, possible, formula, ada = csv.reader(report.to_gradebook(given, "canvas").splitlines())
    assert head == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "01_x", "02_y"]
    assert possible == ["    Points Possible", "", "", "", "", "4", "5"]
    assert ada == ["ada", "", "", "ada", "", "3", "5"]
    assert formula == ["'=cmd()", "", "", "'=cmd()", "", "0", ""]
    moodle = list(csv.reader(report.to_gradebook(given, "moodle").splitlines()))
    assert moodle == [["username", "01_x", "02_y"], ["'=cmd()", "0", ""], ["ada", "3", "5"]]


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
    assert "a/<b>.ipynb" in texts
    assert "2.5 of 4 points" in page


def test_the_table_shows_every_exercise_and_takes_no_markup_from_messages() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.to_table(REPORTS[0]))
    text = console.export_text()
    assert "ada · 01_x" in text
    assert "a/<b>.ipynb" in text
    assert "2.5 / 4" in text
    assert "[bold]=1+1[/bold]" in " ".join(text.split())


def test_progress_is_solved_attempted_and_untouched() -> None:
    statuses = ["passed", "passed", "partial", "wrong", "error", "not attempted"]
    results = [report.Result(f"01.{i}", 1.0, 2.0, status, "") for i, status in enumerate(statuses, 1)]
    console = Console(width=80, record=True, file=io.StringIO())
    reports = {"03_multi_head_compression": Report("", "", results)}
    console.print(report.to_progress(reports, {"03_multi_head_compression": 17}))
    assert re.search(r"03_multi_head_compression\W+2\W+3\W+1\W+6 / 12\W+17\W+━{8}", console.export_text())
