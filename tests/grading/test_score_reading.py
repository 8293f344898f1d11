"""The grader takes a score from a check's output only if it is the check's own and in order."""

from typing import Any

import pytest

from kvlearn.grading.grader import _score
from kvlearn.grading.report import Result
from kvlearn.grading.sandbox import MIME
from kvlearn.grading.submission import Task

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
