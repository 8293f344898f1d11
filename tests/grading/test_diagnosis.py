"""How a mistake is named: each candidate runs no further than its first contradiction, and picks and names do
not depend on the draw."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlearn.grading import Answer, CheckContext, Exercise, Score, judge
from kvlearn.grading.calls import CallRecord

Function = Callable[[Tensor], Tensor]
ROUNDS, PER_ROUND = 3, 2


def doubling() -> Exercise:
    """Twice a positive number, and twice a negative one: two requirements with two calls a round each."""
    exercise = Exercise("99.1", "double", "Double", ("double",), hints=())

    def declare(name: str, sign: int) -> None:
        @exercise.requirement(1, name, rounds=ROUNDS)
        def script(t: CheckContext, double: Answer) -> None:
            """twice the number"""
            for _ in range(PER_ROUND):
                x = sign * (1 + t.randn(3).abs())
                t.close(double(x), 2 * x)

    declare("positive", 1)
    declare("negative", -1)
    return exercise


class Counted:
    """A function and how often it was called, by the sign of its argument."""

    def __init__(self, function: Function) -> None:
        self.function, self.calls = function, Counter[str]()

    def __call__(self, x: Tensor) -> Tensor:
        self.calls["+" if float(x.sum()) > 0 else "-"] += 1
        return self.function(x)


def known(exercise: Exercise, **functions: Function) -> dict[str, Counted]:
    """Adds these as misconceptions under their names, each with a reason."""
    counted = {}
    for name, function in functions.items():
        counted[name] = Counted(function)
        counted[name].__doc__ = f"Why not {name}."
        exercise.misconception(name)(counted[name])
    return counted


def names(score: Score) -> list[str]:
    return [mistake.name for mistake in score.mistakes]


def where(positive: Function, negative: Function) -> Function:
    return lambda x: torch.where(x > 0, positive(x), negative(x))


def test_a_candidate_is_called_no_more_once_it_gave_another_value() -> None:
    exercise = doubling()
    candidates = known(exercise, thrice=lambda x: 3 * x, squared=lambda x: x**2, tripled=lambda x: 3.0 * x)
    assert names(judge(exercise, [lambda x: x**2], 1)) == ["squared"]
    calls = {name: candidate.calls.total() for name, candidate in candidates.items()}
    assert calls == {"thrice": 1, "squared": 2 * ROUNDS * PER_ROUND, "tripled": 1}


def test_a_candidate_that_parts_in_a_later_comparison_or_round_stops_there() -> None:
    exercise = doubling()
    seen: list[int] = []

    def thrice_at_first(x: Tensor) -> Tensor:
        seen.append(1)
        return 3 * x if len(seen) < PER_ROUND + 2 else 4 * x

    known(exercise, late=thrice_at_first)
    assert names(judge(exercise, [lambda x: 3 * x], 1)) == []
    # In the first requirement until the second call of its second round, and once more for the other one,
    # which it might explain alone.
    assert len(seen) == PER_ROUND + 2 + 1


def test_a_candidate_that_fails_what_the_answer_passes_stops_at_its_first_failure() -> None:
    exercise = doubling()
    candidates = known(
        exercise,
        both=where(lambda x: 3 * x, lambda x: 3 * x),
        positive=where(lambda x: 3 * x, lambda x: 2 * x),
    )
    answer = where(lambda x: 3 * x, lambda x: 2 * x)
    assert names(judge(exercise, [answer], 1)) == ["positive"]
    assert candidates["both"].calls["-"] <= 1


def test_of_two_mistakes_each_is_named_for_its_part() -> None:
    exercise = doubling()
    known(
        exercise,
        up=where(lambda x: 3 * x, lambda x: 2 * x),
        down=where(lambda x: 2 * x, lambda x: 5 * x),
        other=where(lambda x: 3 * x, lambda x: 4 * x),
    )
    assert names(judge(exercise, [where(lambda x: 3 * x, lambda x: 5 * x)], 1)) == ["up", "down"]


def test_a_candidate_that_raises_where_the_answer_does_not_is_not_it() -> None:
    exercise = doubling()

    def raising(x: Tensor) -> Tensor:
        if float(x.sum()) < 0:
            raise ValueError("negative")
        return 3 * x

    known(exercise, raising=raising)
    assert names(judge(exercise, [raising], 1)) == ["raising"]
    assert names(judge(exercise, [lambda x: 3 * x], 1)) == ["raising"]  # one row of two
    assert names(judge(exercise, [where(lambda x: 3 * x, lambda x: 2 * x)], 1)) == []


def test_what_nothing_tells_apart_is_named_as_one_of_these() -> None:
    exercise = doubling()
    known(exercise, thrice=lambda x: 3 * x, squared=lambda x: x**2, tripled=lambda x: x + x + x)
    score = judge(exercise, [lambda x: 3 * x], 1)
    assert names(score) == ["one of these: thrice, or tripled"]
    why = "“thrice”: Why not thrice. “tripled”: Why not tripled."
    assert score.message == f"One of these: thrice, or tripled. {why}"
    assert score.to_json()["mistakes"] == [{"name": "one of these: thrice, or tripled", "why": why}]
    assert f"A known mistake, one of these: thrice, or tripled. {why}" in score.to_text()
    assert "<b>A known mistake, one of these: thrice, or tripled.</b>" in score.to_html()
    known(exercise, three=lambda x: 4 * x - x)
    assert names(judge(exercise, [lambda x: 3 * x], 1)) == ["one of these: thrice, tripled, or three"]
    alone = judge(exercise, [lambda x: x**2], 1)
    assert alone.message == "squared: Why not squared."
    assert "A known mistake: squared. Why not squared." in alone.to_text()


def picked(seed: int, rounds: int, *options: Any, per_round: int = 1) -> list[list[Any]]:
    """The pick of each round."""
    contexts = [CheckContext(seed, round, CallRecord({}, True), rounds) for round in range(rounds)]
    return [[t.pick(*options) for _ in range(per_round)] for t in contexts]


@pytest.mark.parametrize("per_round", [1, 2, 3])
@pytest.mark.parametrize("rounds", [2, 3, 4, 7])
@pytest.mark.parametrize("options", [(4,), ("a", "b"), (1, 2, 3), ([1], [2], [3], [4], [5])])
def test_every_option_is_picked_as_far_as_there_are_rounds(
    options: tuple[Any, ...], rounds: int, per_round: int
) -> None:
    for seed in range(20):
        rows = picked(seed, rounds, *options, per_round=per_round)
        everything = [repr(option) for row in rows for option in row]
        assert len(set(everything)) == min(len(options), rounds * per_round)
        if rounds >= len(options):  # then each of the picks by itself
            for column in zip(*rows, strict=True):
                assert len(set(map(repr, column))) == len(options)


def test_the_order_of_picks_is_drawn_and_repeats_with_the_seed() -> None:
    assert len({str(picked(seed, 3, 1, 2, 3)) for seed in range(60)}) == 6
    assert picked(5, 3, 1, 2, 3) == picked(5, 3, 1, 2, 3)
    pairs = {str([picked(seed, 2, 1, 2), picked(seed, 2, "a", "b")]) for seed in range(40)}
    assert len(pairs) == 4  # picks from different options do not go together
