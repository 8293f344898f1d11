"""Grading: ``check``, ``hint`` and ``solution`` in the notebook, and what a unit's checks are written with."""

from kvlearn.grading.catalogue import exercises, find_exercise, units
from kvlearn.grading.compare import Difference, compare, describe, plain_number, same
from kvlearn.grading.exercise import Answer, Exercise, Misconception, Requirement, Unit
from kvlearn.grading.guard import Guarded, Raised, shorten
from kvlearn.grading.help import hint, solution
from kvlearn.grading.score import Row, Score
from kvlearn.grading.trial import CheckContext, Stop
from kvlearn.grading.verdict import check, judge
from kvlearn.grading.watch import Made, largest_new_tensor, new_tensors

__all__ = [
    "Answer",
    "CheckContext",
    "Difference",
    "Exercise",
    "Guarded",
    "Made",
    "Misconception",
    "Raised",
    "Requirement",
    "Row",
    "Score",
    "Stop",
    "Unit",
    "check",
    "compare",
    "describe",
    "exercises",
    "find_exercise",
    "hint",
    "judge",
    "largest_new_tensor",
    "new_tensors",
    "plain_number",
    "same",
    "shorten",
    "solution",
    "units",
]
