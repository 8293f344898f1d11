"""The table of mistakes: rows, edits of the solution, and what is said of one that does not fit."""

from pathlib import Path

import pytest
import small_unit as small

from kvlearn.grading import Exercise, find_exercise, judge
from kvlearn.grading.catalogue import load

RIGHT = '''def scale(x, factor=2):
    """x times factor."""
    if factor == 1:
        return x
    y = x * factor
    return y
'''


def exercise(
    table: str, right: str = RIGHT, answers: tuple[str, ...] = ("scale",), **names: object
) -> Exercise:
    given = ("import math",)
    made = Exercise("99.1", "scale", "scale", answers, hints=(), solution=right, set_up=given)
    made.mistakes(table, **names)
    return made


def sources(table: str) -> list[str]:
    return [mistake.source for mistake in exercise(table).misconceptions]


def test_a_row_is_a_name_an_edit_and_a_reason() -> None:
    made = exercise(
        """
        twice as much
            x * factor → 2 * x * factor
        Two sentences
        over two lines.

        nothing at all
            x * factor →  0.0 # zero
            return y → return x * y
        Why.
        """
    )
    twice, nothing = made.misconceptions
    assert (twice.name, twice.why) == ("twice as much", "Two sentences over two lines.")
    assert twice.source == RIGHT.replace("x * factor", "2 * x * factor")
    assert twice.answers[0](3) == 12
    assert nothing.answers[0](3) == 0


def test_an_edit_may_span_lines_on_both_sides_and_is_as_deep_as_what_it_replaces() -> None:
    (longer,) = sources(
        """
        lines
            return x → if x > 0:
                    return x
                return -x
            y = x * factor
            return y
                → z = x + factor
                  if z:
                      return z
        Why.
        """
    )
    assert longer == RIGHT.replace(
        "        return x\n    y = x * factor\n    return y\n",
        "        if x > 0:\n            return x\n        return -x\n"
        "    z = x + factor\n    if z:\n        return z\n",
    )


def test_nothing_after_the_arrow_deletes() -> None:
    assert sources("gone\n    * factor →\nWhy.") == [RIGHT.replace("* factor", "")]


def test_code_without_an_arrow_is_the_body_or_takes_the_place_of_what_it_defines() -> None:
    made = exercise(
        """
        another body
            y = helper(x)

            return y + math.inf
        Why.

        another function
            def scale(x, factor=2):
                return x
        Why.
        """,
        helper=lambda x: x,
    )
    body, function = (mistake.answers[0] for mistake in made.misconceptions)
    assert (body(1), function(1)) == (float("inf"), 1)


def test_of_several_functions_the_others_stay_right() -> None:
    two = RIGHT + "\n\ndef half(x):\n    return x / 2\n"
    made = exercise("third\n    def half(x):\n        return x / 3\nWhy.", two, ("scale", "half"))
    scale, half = made.misconceptions[0].answers
    assert (scale(3), half(3)) == (6, 1)


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("x → z", "'x': expected once in the right answer, found 4 times"),
        ("sum(x) → z", r"'sum\(x\)': expected once in the right answer, found 0 times"),
        ("x * factor → z\n    x * factor → z", r"'x \* factor': expected once .* found 0 times"),
        ("return y → return (", "never closed"),
        ("def other(x):\n        return x\n    → z", "expected 'old → new'"),
        ("→ z", "expected 'old → new'"),
    ],
)
def test_an_edit_that_does_not_fit_is_named_with_its_row(code: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=rf"^99\.1, 'a row': .*{complaint}"):
        exercise(f"a row\n    {code}\nWhy.")


@pytest.mark.parametrize("table", ["a row\n    x * factor → z", "a row\nWhy.", "    x → z\nWhy.", "a\n\nb"])
def test_a_row_that_lacks_a_part_is_refused(table: str) -> None:
    with pytest.raises(ValueError, match="expected a name, then indented code, then why it is wrong"):
        exercise(table)


def test_a_unit_with_a_row_that_does_not_fit_is_not_loaded(tmp_path: Path) -> None:
    solutions = small.write_solutions(tmp_path)
    mistakes = solutions / small.UNIT / "mistakes.py"
    mistakes.write_text(mistakes.read_text().replace("x + x →", "y + y →"))
    with pytest.raises(ValueError, match=r"^90_small/mistakes.py: 90.1, 'added once too often': 'y \+ y'"):
        load(solutions / small.UNIT)


def test_a_table_and_functions_are_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVLEARN_SOLUTIONS", str(small.write_solutions(tmp_path)))
    for name, mistake in (("90.1", "added once too often"), ("90.2", "shifted back")):
        (known,) = find_exercise(name).misconceptions
        assert [each.name for each in judge(find_exercise(name), known.answers).mistakes] == [mistake]
