"""``check``: runs an exercise on an answer and returns its score, whatever the answer does."""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from kvlearn.grading.catalogue import find_exercise
from kvlearn.grading.compare import describe
from kvlearn.grading.diagnose import diagnose
from kvlearn.grading.exercise import Exercise, Misconception
from kvlearn.grading.guard import Interrupted, shorten
from kvlearn.grading.quiet import quiet
from kvlearn.grading.rounds import Outcome, run_requirement
from kvlearn.grading.score import Mistake, Row, Score

INTERRUPTED = "Stopped while your answer was running: is there a loop that does not end?"


def check(exercise: str, *answers: Any) -> Score:
    """Grade an answer: ``check("01.3", split_heads, merge_heads)``.

    Draws fresh inputs each time. Returns the points as a number that shows a table in a notebook. It never
    raises on account of an answer and prints nothing; what the answer prints meanwhile is swallowed.
    TypeError or ValueError only if there is no such exercise.
    """
    return judge(find_exercise(exercise), answers)


def judge(exercise: Exercise, answers: Sequence[Any], seed: int | None = None) -> Score:
    """``check`` for an exercise at hand; ``seed`` repeats the draws of a run."""
    score = partial(Score, exercise=exercise.id, title=exercise.title, max_score=exercise.points)
    rows = tuple(Row(r.name, r.points, 0, "not attempted", r.expected, "–") for r in exercise.requirements)
    if all(answer is None or answer is ... for answer in answers):
        return score(0, status="not attempted", message="Not attempted yet: there is no answer.", rows=rows)
    complaint = misfit(exercise, answers)
    if complaint:
        return score(0, status="wrong", message=complaint, rows=rows)
    answers = [not_written if answer is None or answer is ... else answer for answer in answers]
    seed = secrets.randbits(48) if seed is None else seed
    try:
        with quiet(), one_thread():
            outcomes = [
                run_requirement(exercise, requirement, answers, seed + i)
                for i, requirement in enumerate(exercise.requirements)
            ]
            named = name_mistakes(exercise, outcomes, seed)
    except (KeyboardInterrupt, Interrupted):
        return score(0, status="error", message=INTERRUPTED, rows=rows)
    except Exception as error:
        message = f"The check itself broke on this answer ({type(error).__name__}: {shorten(str(error))})."
        return score(0, status="error", message=message, rows=rows)
    rows = tuple(row_of(r, o) for r, o in zip(exercise.requirements, outcomes, strict=True))
    points = sum(row.earned for row in rows)
    status = status_of(points, exercise.points, outcomes)
    message = message_of(status, outcomes, rows, named)
    mistakes = tuple(Mistake(m.name, m.why) for m in named)
    return score(points, status=status, message=message, rows=rows, mistakes=mistakes)


def not_written(*_: Any, **__: Any) -> None:
    """Stands in for an answer that is missing beside one that is there."""
    raise NotImplementedError


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and lose seconds to them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def misfit(exercise: Exercise, answers: Sequence[Any]) -> str:
    """What is wrong with the things handed in, before any of them runs."""
    if len(answers) != len(exercise.answers):
        return f"Expected {len(exercise.answers)} answers, got {len(answers)}: write {exercise.call}."
    wrong = [(n, a) for n, a in zip(exercise.answers, answers, strict=True) if not callable(a)]
    wrong = [(name, answer) for name, answer in wrong if answer is not None and answer is not ...]
    return "; ".join(f"{n}: expected a function or a class, came {shorten(describe(a))}" for n, a in wrong)


def name_mistakes(exercise: Exercise, outcomes: list[Outcome], seed: int) -> list[Misconception]:
    if all(outcome.passed for outcome in outcomes) or any(outcome.borrowed for outcome in outcomes):
        return []
    try:
        return diagnose(exercise, outcomes, seed)
    except Exception:  # a name is a help; the score stands without it
        return []


def row_of(requirement: Any, outcome: Outcome) -> Row:
    earned = requirement.points if outcome.passed else 0
    expected = "\n".join(filter(None, (requirement.expected, outcome.expected)))
    came = "as expected" if outcome.passed else outcome.came
    return Row(requirement.name, requirement.points, earned, outcome.status, expected, came)


def status_of(points: int, max_points: int, outcomes: list[Outcome]) -> str:
    failed = [outcome.status for outcome in outcomes if not outcome.passed]
    if not failed:
        return "passed"
    if points:
        return "partial"
    if set(failed) == {"not attempted"}:
        return "not attempted"
    return "error" if failed[0] == "raised" else "wrong"


def message_of(status: str, outcomes: list[Outcome], rows: Sequence[Row], named: list[Misconception]) -> str:
    if status == "passed":
        return f"All {len(rows)} requirements hold."
    if status == "not attempted":
        return "Not attempted yet: the answer still raises NotImplementedError."
    borrowed = next((outcome.borrowed for outcome in outcomes if outcome.borrowed), "")
    if borrowed:
        return f"Your answer calls {borrowed}, which does the work that this exercise asks you to do."
    if named:
        return " ".join(f"{mistake.name}: {mistake.why}" for mistake in named[:1])
    failed = next(row for row in rows if row.status != "passed")
    came = failed.came.split("\n")[0]
    if failed.status == "raised":
        return f"{failed.name}: your code raised {came}"
    return f"{failed.name}: expected {failed.expected.split('here: ')[-1]}; came {came}"
