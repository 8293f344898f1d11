"""Names the mistake: runs the known wrong answers on the same inputs and looks which one gives the same."""

from typing import Any

from torch import Tensor

from kvlearn.grading.compare import same
from kvlearn.grading.exercise import Exercise, Misconception
from kvlearn.grading.rounds import Outcome, run_requirement


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
    rows, telling, n_failed = set(), False, 0
    for i, (requirement, ours) in enumerate(zip(exercise.requirements, outcomes, strict=True)):
        theirs = run_requirement(exercise, requirement, misconception.answers, seed + i, len(ours.trace))
        if (ours.passed and not theirs.passed) or (ours.status == "raised" != theirs.status):
            return set()
        n_failed += not theirs.passed
        wrong = shared_wrong_values(ours, theirs)
        if wrong:
            rows.add(i)
            telling = telling or not all(map(constant, wrong))
    every = rows == {i for i, outcome in enumerate(outcomes) if not outcome.passed}
    return rows if 2 * len(rows) >= n_failed and (telling or every) else set()


def shared_wrong_values(ours: Outcome, theirs: Outcome) -> list[Any]:
    """What both gave and is wrong, where both gave the same in every round; else nothing.

    An exception is no value: answers may raise alike for quite different reasons.
    """
    if [len(round) for round in ours.trace] != [len(round) for round in theirs.trace]:
        return []
    pairs = [pair for a, b in zip(ours.trace, theirs.trace, strict=True) for pair in zip(a, b, strict=True)]
    if not all(same(a.value, b.value) for a, b in pairs):
        return []
    return [a.value for a, b in pairs if a.difference and b.difference]


def constant(value: Any) -> bool:
    """All zeros, all NaN or the like: many wrong answers give that, so by itself it tells little."""
    if isinstance(value, Tensor):
        return same(value, value.flatten()[:1].expand(value.numel()).reshape(value.shape))
    return value == 0 or value is None
