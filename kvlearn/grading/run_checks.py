"""``check``: runs an exercise's requirements on an answer, names known mistakes, and returns a score.

A mistake is named by running the known wrong answers on the same inputs: the one that gives the same wrong
values is it.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvlearn.grading.calls import CallRecord, CallWrapper, Interrupted, NotWritten, Raised, quiet, shorten
from kvlearn.grading.catalogue import find_exercise
from kvlearn.grading.context import (
    CheckContext,
    Difference,
    Observation,
    Stop,
    describe,
    notebook_names,
    same,
)
from kvlearn.grading.exercise import Exercise, Misconception, Requirement
from kvlearn.grading.score import Mistake, Row, Score

# Of each exercise that was checked in this process: the answers, and whether they earned all points.
_checked: dict[str, tuple[tuple[Any, ...], bool]] = {}

INTERRUPTED = "Stopped while your answer was running: is there a loop that does not end?"


@dataclass
class Outcome:
    """How a requirement came out. ``trace`` holds the observations of every round."""

    status: str = "passed"
    expected: str = ""
    came: str = ""
    borrowed: str = ""
    trace: list[list[Observation]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.status == "passed"

    def fail(self, status: str, came: str, expected: str = "") -> None:
        """Note a failure; the first one is what the learner is told."""
        if self.passed:
            self.status, self.came, self.expected = status, came, expected


def check(exercise: str, *answers: Any, notebook: Mapping[str, Any] | None = None) -> Score:
    """Grade an answer: ``check("01.7", merge)``. "Your model" reads other answers: ``notebook=globals()``.

    Draws fresh inputs each time. Returns the points as a number that shows a table in a notebook. It never
    raises on account of an answer and prints nothing; what the answer prints meanwhile is swallowed.
    TypeError or ValueError only if there is no such exercise.
    """
    found = find_exercise(exercise)
    _checked[found.id] = (answers, False)  # stays so if the answer never ends
    score = judge(found, answers, notebook=notebook or {})
    _checked[found.id] = (answers, score.status == "passed")
    return score


def solved(exercise: Exercise, answers: tuple[Any, ...]) -> bool:
    """Do these answers earn all points? What ``check`` has found of the same objects is not run again."""
    known, passed = _checked.get(exercise.id, ((), False))
    if len(known) == len(answers) and all(a is b for a, b in zip(known, answers, strict=True)):
        return passed
    return judge(exercise, answers, name=False).status == "passed"


def judge(
    exercise: Exercise,
    answers: Sequence[Any],
    seed: int | None = None,
    *,
    notebook: Mapping[str, Any] | None = None,
    name: bool = True,
) -> Score:
    """``check`` for an exercise at hand; ``seed`` repeats the draws of a run.

    For an exercise that reads the answers to others, they are names of ``notebook``; without one, they are
    ours. ``name=False`` leaves mistakes without their names.
    """
    score = partial(Score, exercise=exercise.id, title=exercise.title, max_score=exercise.points)
    rows = tuple(Row(r.name, r.points, 0, "not attempted", r.expected, "–") for r in exercise.requirements)
    if all(answer is None or answer is ... for answer in answers):
        return score(0, status="not attempted", message="Not attempted yet: there is no answer.", rows=rows)
    complaint = misfit(exercise, answers)
    if complaint:
        return score(0, status="wrong", message=complaint, rows=rows)
    answers = [not_written if answer is None or answer is ... else answer for answer in answers]
    seed = secrets.randbits(48) if seed is None else seed
    before = notebook_names.set(notebook)
    try:
        with quiet(), one_thread():
            outcomes = run_checks(exercise, answers, seed)
            named = name_mistakes(exercise, outcomes, seed) if name else []
    except (KeyboardInterrupt, Interrupted):
        return score(0, status="error", message=INTERRUPTED, rows=rows)
    except Exception as error:
        message = f"The check itself broke on this answer ({type(error).__name__}: {shorten(str(error))})."
        return score(0, status="error", message=message, rows=rows)
    finally:
        notebook_names.reset(before)
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


def run_checks(exercise: Exercise, answers: Sequence[Any], seed: int) -> list[Outcome]:
    """Every requirement of an exercise, each with draws of its own."""
    return [
        run_requirement(exercise, requirement, answers, seed + i)
        for i, requirement in enumerate(exercise.requirements)
    ]


def run_requirement(
    exercise: Exercise,
    requirement: Requirement,
    answers: Sequence[Any],
    seed: int,
    like: Outcome | None = None,
) -> Outcome:
    """All rounds of a requirement; they end early where the answer raises.

    With ``like``, as many rounds as that outcome has; and they end as soon as it is clear that this one fails
    and is not like it.
    """
    outcome = Outcome()
    for round in range(requirement.rounds if like is None else len(like.trace)):
        record = CallRecord(exercise.forbidden, exercise.may_use_kvlearn)
        context = CheckContext(seed, round, record)
        raised = run_round(requirement, context, answers, exercise.answers)
        outcome.trace.append(context.observations)
        if record.borrowed:
            outcome.borrowed = record.borrowed
            outcome.fail("failed", f"a call of {record.borrowed}, which does the work of this exercise")
        for observation in context.observations:
            if observation.difference is not None:
                outcome.fail("failed", *in_words(observation.difference, observation.call))
        if raised is not None:
            outcome.fail(*raised)
            break
        if like is None or outcome.passed or like.status == "raised":
            continue
        if like.passed or not alike(like.trace[round], context.observations):
            break
    return outcome


def run_round(
    requirement: Requirement, context: CheckContext, answers: Sequence[Any], names: Sequence[str]
) -> tuple[str, str] | None:
    """One round. Returns how it broke off (status, what came), or None."""
    record = context.record
    wrapped = [CallWrapper(answer, name, record) for answer, name in zip(answers, names, strict=True)]
    try:
        requirement.script(context, *wrapped)
    except Stop:
        return None
    except NotWritten as missing:
        return "not attempted", str(missing) or f"{record.name} is not written yet (NotImplementedError)"
    except Raised as raised:
        return "raised", f"{raised.what}\nin {record.call}"
    except Exception as error:  # the script met something it could not work with
        return (
            "failed",
            f"{record.call} gave something unusable ({type(error).__name__}: {shorten(str(error))})",
        )
    return None


def in_words(difference: Difference, call: str) -> tuple[str, str]:
    part = f"{difference.what} " if difference.what else ""
    return f"{part}{difference.came}" + (f"\nin {call}" if call else ""), f"here: {part}{difference.expected}"


def diagnose(exercise: Exercise, outcomes: list[Outcome], seed: int) -> list[Misconception]:
    """The misconceptions an answer shows, the one that explains most first; empty where none fits.

    One fits if the answer fails every requirement that it fails, and gives the same *wrong* values as it for
    at least half of them. The rest of a wrong answer may be explained by a second.
    """
    failed = {i for i, outcome in enumerate(outcomes) if not outcome.passed}
    fits = [(m, explained(exercise, m, outcomes, seed)) for m in exercise.misconceptions]
    named: list[Misconception] = []
    for misconception, rows in sorted(fits, key=lambda fit: -len(fit[1])):
        if rows & failed:
            named.append(misconception)
            failed -= rows
    return named


def explained(
    exercise: Exercise, misconception: Misconception, outcomes: list[Outcome], seed: int
) -> set[int]:
    """The failed requirements it explains; none at all where it fails one that the answer passes, or where
    the answer raises and it does not: then the answer is broken in another way."""
    failed = {i for i, outcome in enumerate(outcomes) if not outcome.passed}
    rows: set[int] = set()
    telling, n_failed = False, 0
    for i in sorted(range(len(outcomes)), key=lambda i: i not in failed):
        if i not in failed and not rows:  # it explains nothing: what it does elsewhere is no matter
            return set()
        ours = outcomes[i]
        theirs = run_requirement(
            exercise, exercise.requirements[i], misconception.answers, seed + i, like=ours
        )
        if (ours.passed and not theirs.passed) or (ours.status == "raised" != theirs.status):
            return set()
        n_failed += not theirs.passed
        wrong = shared_wrong_values(ours, theirs)
        if wrong:
            rows.add(i)
            telling = telling or not all(map(constant, wrong))
    return rows if 2 * len(rows) >= n_failed and (telling or rows == failed) else set()


def shared_wrong_values(ours: Outcome, theirs: Outcome) -> list[Any]:
    """What both gave and is wrong, where both gave the same in every round; else nothing.

    An exception is no value: answers may raise alike for quite different reasons.
    """
    if len(ours.trace) != len(theirs.trace) or not all(map(alike, ours.trace, theirs.trace)):
        return []
    pairs = [pair for a, b in zip(ours.trace, theirs.trace, strict=True) for pair in zip(a, b, strict=True)]
    return [a.value for a, b in pairs if a.difference and b.difference]


def alike(ours: Sequence[Observation], theirs: Sequence[Observation]) -> bool:
    """Two rounds saw the same values."""
    return len(ours) == len(theirs) and all(same(a.value, b.value) for a, b in zip(ours, theirs, strict=True))


def constant(value: Any) -> bool:
    """All zeros, all NaN or the like: many wrong answers give that, so by itself it tells little."""
    if isinstance(value, Tensor):
        return same(value, value.flatten()[:1].expand(value.numel()).reshape(value.shape))
    return value == 0 or value is None
