"""Grading: ``check``, ``hint`` and ``solution`` in the notebook, and what a unit's checks are made of.

A unit is a folder of solutions/ (``catalogue`` finds it): its notebook, ``checks.py`` (each ``Exercise`` with
its requirements) and ``mistakes.py`` (known wrong answers). ``run_checks`` grades one answer, ``grader`` a
notebook, ``commands`` what ``kvlearn grade`` is given; ``release`` makes exercises/ from solutions/.
"""

from kvlearn.grading.calls import (
    CallWrapper,
    Made,
    NotWritten,
    Raised,
    largest_new_tensor,
    new_tensors,
    shorten,
    undefined_writes,
)
from kvlearn.grading.catalogue import exercises, find_exercise, hint, solution, units
from kvlearn.grading.context import CheckContext, Difference, Stop, compare, describe, plain_number, same
from kvlearn.grading.exercise import Answer, Exercise, Misconception, Requirement, Unit
from kvlearn.grading.run_checks import check, judge, one_thread, solved
from kvlearn.grading.score import Row, Score

__all__ = [
    "Answer",
    "CallWrapper",
    "CheckContext",
    "Difference",
    "Exercise",
    "Made",
    "Misconception",
    "NotWritten",
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
    "one_thread",
    "plain_number",
    "same",
    "shorten",
    "solution",
    "solved",
    "undefined_writes",
    "units",
]
