"""``check``: runs an exercise's requirements on an answer, names known mistakes, and returns a score.

A mistake is named by running the known wrong answers on the same inputs: the one that gives the same wrong
values is it. Each is run only until it gives another value.
"""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvlearn.grading import records
from kvlearn.grading.calls import CallRecord, CallWrapper, Interrupted, NotWritten, Raised, quiet, shorten
from kvlearn.grading.catalogue import find_exercise, unit_of
from kvlearn.grading.context import (
    CheckContext,
    Contradicts,
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
NEVER: tuple[tuple[Any, ...], bool] = ((), False)

INTERRUPTED = "Stopped while your answer was running: is there a loop that does not end?"


@dataclass
class Outcome:
    """How a requirement came out. ``trace`` holds the observations of every round, ``seconds`` the processor
    time. ``contradicted``: the run ended early, since what was seen rules a candidate out."""

    status: str = "passed"
    expected: str = ""
    came: str = ""
    borrowed: str = ""
    trace: list[list[Observation]] = field(default_factory=list)
    contradicted: bool = False
    seconds: float = 0.0

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
    raises on account of an answer and prints nothing; output of the answer is discarded.
    In a learner's copy, in work/, the result is remembered (``records``).
    TypeError or ValueError only if there is no such exercise.
    """
    found = find_exercise(exercise)
    _checked[found.id] = (answers, False)  # stays so if the answer never ends
    score = judge(found, answers, notebook=notebook or {})
    _checked[found.id] = (answers, score.status == "passed")
    records.note(found, score, answers, lambda: unit_of(found.id))
    return score


def last_check(exercise_id: str) -> tuple[tuple[Any, ...], bool]:
    """The answers that ``check`` saw last, and whether they earned all points; a new pair by each check."""
    return _checked.get(exercise_id, NEVER)


def solved(exercise: Exercise, answers: tuple[Any, ...]) -> bool:
    """Do these answers earn all points? What ``check`` has found of the same objects is not run again."""
    known, passed = last_check(exercise.id)
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
    return score(points, status=status, message=message, rows=rows, mistakes=tuple(named))


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
    """The faults of the objects handed in, before any of them runs."""
    if len(answers) != len(exercise.answers):
        return f"Expected {len(exercise.answers)} answers, got {len(answers)}: write {exercise.call}."
    wrong = [(n, a) for n, a in zip(exercise.answers, answers, strict=True) if not callable(a)]
    wrong = [(name, answer) for name, answer in wrong if answer is not None and answer is not ...]
    return "; ".join(f"{n}: expected a function or a class, came {shorten(describe(a))}" for n, a in wrong)


def name_mistakes(exercise: Exercise, outcomes: list[Outcome], seed: int) -> list[Mistake]:
    if any(outcome.borrowed for outcome in outcomes):
        return []
    # Requirements that run other exercises' answers are left out: a mistake keeps its name whatever they are.
    own = {i: outcomes[i] for i, r in enumerate(exercise.requirements) if not r.reads_answers}
    if {outcome.status for outcome in own.values()} <= {"passed", "not attempted"}:  # nothing wrong was seen
        return []
    try:
        return [Mistake.one_of([(m.name, m.why) for m in alike]) for alike in diagnose(exercise, own, seed)]
    except Exception:  # a name is a help; the score does not depend on it
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


def message_of(status: str, outcomes: list[Outcome], rows: Sequence[Row], named: list[Mistake]) -> str:
    if status == "passed":
        return f"All {len(rows)} requirements hold."
    if status == "not attempted":
        return "Not attempted yet: the answer still raises NotImplementedError."
    borrowed = next((outcome.borrowed for outcome in outcomes if outcome.borrowed), "")
    if borrowed:
        return f"Your answer calls {borrowed}, which does the work that this exercise asks you to do."
    if named:
        return named[0].sentence
    failed = next((row for row in rows if row.status not in ("passed", "not attempted")), None)
    if failed is None:
        missing = next(row for row in rows if row.status == "not attempted")
        return f"All that ran is right. Still open: {missing.name}: {missing.came}."
    came = failed.came.split("\n")[0]
    if failed.status == "raised":
        return f"{failed.name}: your code raised {came}"
    return f"{failed.name}: expected {failed.expected.split('here: ')[-1]}; came {came}"


def run_checks(exercise: Exercise, answers: Sequence[Any], seed: int) -> list[Outcome]:
    """Every requirement of an exercise, each with draws of its own; one that is ``last`` may be left out."""
    outcomes: list[Outcome] = []
    for i, requirement in enumerate(exercise.requirements):
        if requirement.last and not all(outcome.passed for outcome in outcomes):
            outcomes.append(Outcome("not attempted", came="this runs when all requirements before it hold"))
        else:
            outcomes.append(run_requirement(exercise, requirement, answers, seed + i))
    return outcomes


def run_requirement(
    exercise: Exercise,
    requirement: Requirement,
    answers: Sequence[Any],
    seed: int,
    rounds: int | None = None,
    contradicts: Contradicts | None = None,
) -> Outcome:
    """All rounds of a requirement, or so many; they end early where the answer raises, and at the first
    observation that ``contradicts``."""
    outcome, start = Outcome(), time.process_time()
    for round in range(requirement.rounds if rounds is None else rounds):
        record = CallRecord(exercise.forbidden, exercise.may_use_kvlearn, ours=contradicts is not None)
        context = CheckContext(seed, round, record, requirement.rounds, contradicts)
        raised = run_round(requirement, context, answers, exercise.answers)
        outcome.trace.append(context.observations)
        if record.borrowed:
            outcome.borrowed = record.borrowed
            outcome.fail("failed", f"a call of {record.borrowed}, which does the work of this exercise")
        for observation in context.observations:
            if observation.difference is not None:
                outcome.fail("failed", *in_words(observation.difference, observation.call))
        outcome.contradicted = context.contradicted
        if raised is not None and not outcome.contradicted:
            outcome.fail(*raised)
        if contradicts and contradicts(round, len(context.observations), None):
            outcome.contradicted = True
        if raised is not None or outcome.contradicted:
            break
    outcome.seconds = time.process_time() - start
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


class Candidate:
    """A misconception that the answer may show. It runs on the answer's inputs, no further than needed."""

    def __init__(
        self, exercise: Exercise, misconception: Misconception, outcomes: Mapping[int, Outcome], seed: int
    ) -> None:
        self.exercise, self.misconception = exercise, misconception
        self.outcomes, self.seed = outcomes, seed
        self.runs: dict[int, Outcome] = {}  # the last one of each requirement

    def run(self, i: int, contradicts: Contradicts | None) -> Outcome:
        requirement, rounds = self.exercise.requirements[i], len(self.outcomes[i].trace)
        answers = self.misconception.answers
        self.runs[i] = run_requirement(
            self.exercise, requirement, answers, self.seed + i, rounds, contradicts
        )
        return self.runs[i]

    def agrees(self, i: int) -> bool:
        """It does in requirement i as the answer does: passes, or fails by the same values. The run ends at
        the first value that differs."""
        ours = self.outcomes[i]
        if ours.passed:
            return self.passes(i)
        theirs = self.runs.get(i) or self.run(i, partial(unlike, ours))
        if theirs.contradicted or theirs.passed or len(theirs.trace) != len(ours.trace):
            return False
        return ours.status != "raised" or theirs.status == "raised"

    def passes(self, i: int) -> bool:
        """It passes requirement i. The run ends at the first value that is wrong."""
        theirs = self.runs.get(i)
        if theirs is None or (theirs.passed and theirs.contradicted):
            theirs = self.run(i, is_wrong)
        return theirs.passed

    def raises(self, i: int) -> bool:
        """It raises in requirement i, and nothing before that is wrong."""
        return self.run(i, is_wrong).status == "raised"


def unlike(ours: Outcome, round: int, i: int, theirs: Observation | None) -> bool:
    """The i-th observation of a round is not the answer's, or ends the round where the answer's did not."""
    seen = ours.trace[round]
    if theirs is None:
        return i != len(seen)
    return i >= len(seen) or not same(seen[i].value, theirs.value)


def is_wrong(round: int, i: int, theirs: Observation | None) -> bool:
    return theirs is not None and theirs.difference is not None


def diagnose(exercise: Exercise, outcomes: Mapping[int, Outcome], seed: int) -> list[list[Misconception]]:
    """The misconceptions an answer shows, the one that explains most first; empty where none fits. Those that
    nothing tells apart are listed together. ``outcomes`` by the requirement's number.

    A misconception that agrees with the answer in all requirements is it; each of the others is out at its
    first contradiction. Where none agrees in all of them, several may explain a part each.
    """
    candidates = [Candidate(exercise, m, outcomes, seed) for m in exercise.misconceptions]
    failed = {i for i, outcome in outcomes.items() if not outcome.passed}
    wrong = {i: values for i in failed if (values := wrong_values(outcomes[i]))}
    # Requirements that contradict a candidate soonest come first: those that take little time, and those with
    # wrong values, of which the first may differ already, before those that a candidate need only pass.
    order = sorted(outcomes, key=lambda i: outcomes[i].seconds * (1 if i in wrong else 3))
    left = candidates
    for i in order:
        left = [candidate for candidate in left if candidate.agrees(i)]
    if left and telling(wrong, set(wrong), failed) and 2 * len(wrong) >= len(failed):
        return [[candidate.misconception for candidate in left]]
    fits = [(candidate.misconception, explained(candidate, outcomes, wrong)) for candidate in candidates]
    named: list[list[Misconception]] = []
    for rows, n_others in sorted(
        dict.fromkeys(fit for _, fit in fits), key=lambda fit: (-len(fit[0]), fit[1])
    ):
        if rows & failed:
            named.append([misconception for misconception, fit in fits if fit == (rows, n_others)])
            failed -= rows
    return named


def explained(
    candidate: Candidate, outcomes: Mapping[int, Outcome], wrong: dict[int, list[Any]]
) -> tuple[frozenset[int], int]:
    """The failed requirements that it explains, by giving the same *wrong* values, and how many others it
    fails; they may not be more than those.

    None at all where it fails one that the answer passes, or where the answer raises and it does not: then
    the answer is broken in another way. An exception is no value, since answers may raise alike for quite
    different reasons.
    """
    nothing: frozenset[int] = frozenset()
    rows = frozenset(i for i in wrong if candidate.agrees(i))
    failed = {i for i, outcome in outcomes.items() if not outcome.passed}
    if not rows or not telling(wrong, rows, failed):
        return nothing, 0
    n_others = 0
    for i, ours in outcomes.items():
        if i in rows:
            continue
        if ours.status == "raised" and not candidate.raises(i):
            return nothing, 0
        if not candidate.passes(i):
            if ours.passed:
                return nothing, 0
            n_others += 1
    return (rows, n_others) if n_others <= len(rows) else (nothing, 0)


def wrong_values(outcome: Outcome) -> list[Any]:
    return [seen.value for round in outcome.trace for seen in round if seen.difference]


def telling(wrong: dict[int, list[Any]], rows: Set[int], failed: Set[int]) -> bool:
    """The wrong values of these requirements tell something: they are not all the same number, or there is
    nothing else that the answer fails."""
    return rows == failed or any(not constant(value) for i in rows for value in wrong[i])


def constant(value: Any) -> bool:
    """All zeros, all NaN or the like: many wrong answers give that, so by itself it tells little."""
    if isinstance(value, Tensor):
        return same(value, value.flatten()[:1].expand(value.numel()).reshape(value.shape))
    return value == 0 or value is None
