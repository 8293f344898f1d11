"""The score: a number for nbgrader, a table for people."""

import json
import math
import re

import nbformat
import pytest

from kvlearn.grading import Row, Score, check, find_exercise, judge
from kvlearn.grading.score import MIME, STATUSES


def score(value: float, most: float = 5, **more: str) -> Score:
    rows = (Row("a <b>", 5, 0, "failed", "x & y", "<script>alert(1)</script>\nin f()"),)
    words = {"status": "wrong", "message": "<i>why</i>"} | more
    return Score(value, exercise="01.1", title="T", max_score=most, rows=rows, **words)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, 3), (5 + 1e-10, 5), (1e300, 5), (-1, 0), (-0.1, 0), (math.nan, 0), (math.inf, 0), (-math.inf, 0)],
)
def test_a_score_never_leaves_its_range(value: float, expected: float) -> None:
    assert float(score(value)) == expected


def test_the_plain_text_is_a_number_that_nbgrader_can_read() -> None:
    for value in (0, 3, 2.5):
        assert float(repr(score(value))) == value
        assert float(score(value)._repr_mimebundle_()["text/plain"]) == value
    assert repr(score(4.0)) == "4"


def test_the_mime_bundle_has_three_forms_and_the_json_is_json() -> None:
    bundle = score(3)._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", MIME}
    data = json.loads(json.dumps(bundle[MIME]))
    assert {"exercise", "score", "max_score", "status", "message", "requirements", "mistakes"} == set(data)
    assert (data["exercise"], data["score"], data["max_score"]) == ("01.1", 3.0, 5.0)
    assert set(data["requirements"][0]) == {"name", "points", "earned", "status", "expected", "came"}


def test_what_the_answer_gave_cannot_become_markup() -> None:
    html = score(0).to_html()
    assert "<script>" not in html
    assert "<i>" not in html
    assert "&lt;script&gt;" in html


def test_the_table_needs_nothing_that_the_sanitiser_removes() -> None:
    wrong = judge(find_exercise("01.1"), find_exercise("01.1").misconceptions[0].answers, 1)
    tags = set(re.findall(r"<(\w+)", wrong.to_html()))
    assert tags <= {"div", "b", "br", "code", "em", "meter", "table", "thead", "tbody", "tr", "th", "td"}
    assert not re.search(r" (id|data-\w+|on\w+)=", wrong.to_html())


def test_passed_and_failed_differ_by_word_and_sign_and_not_by_colour_alone() -> None:
    wrong = judge(find_exercise("01.2"), find_exercise("01.2").misconceptions[0].answers, 1)
    assert "✓&nbsp;passed" in wrong.to_html()
    assert "✗&nbsp;not&nbsp;yet" in wrong.to_html()
    assert "not attempted" in check("01.2").to_html()


def test_a_table_offers_a_hint_until_all_is_right() -> None:
    assert 'kvlearn.hint("01.1")' in score(3, status="partial").to_text()
    assert "hint" not in score(5, status="passed").to_text()


def test_every_status_can_be_drawn() -> None:
    for status in STATUSES:
        assert status in score(0, status=status).to_html()


@pytest.mark.parametrize(("value", "grade"), [(0, 0), (2, 2), (5, 5), (math.nan, 0), (7, 5)])
def test_nbgrader_reads_the_same_points(value: float, grade: float) -> None:
    utils = pytest.importorskip("nbgrader.utils")
    cell = nbformat.v4.new_code_cell("check", metadata={"nbgrader": {"grade": True, "points": 5}})
    data = score(value)._repr_mimebundle_()
    cell.outputs = [nbformat.v4.new_output("execute_result", data=data, execution_count=1)]
    assert utils.determine_grade(cell) == (grade, 5)
