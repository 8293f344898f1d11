"""Grading: ``check``, ``hint`` and ``solution`` in the notebook; the exercises themselves in ``units/``."""

from kvlearn.grading.catalogue import exercises, find_exercise, units
from kvlearn.grading.exercise import Exercise, Misconception, Requirement, Unit
from kvlearn.grading.hints import hint
from kvlearn.grading.score import Row, Score
from kvlearn.grading.solutions import solution
from kvlearn.grading.trial import Trial
from kvlearn.grading.verdict import check, judge

__all__ = [
    "Exercise",
    "Misconception",
    "Requirement",
    "Row",
    "Score",
    "Trial",
    "Unit",
    "check",
    "exercises",
    "find_exercise",
    "hint",
    "judge",
    "solution",
    "units",
]
