"""Finds units and exercises: every module ``units/uNN.py`` offers a ``UNIT``."""

import pkgutil
import re
from functools import cache
from importlib import import_module

from kvlearn import expect
from kvlearn.grading import units as rooms
from kvlearn.grading.exercise import Exercise, Unit


@cache
def units() -> tuple[Unit, ...]:
    """All units of the course, in order."""
    names = sorted(m.name for m in pkgutil.iter_modules(rooms.__path__) if re.fullmatch(r"u\d\d", m.name))
    return tuple(import_module(f"{rooms.__name__}.{name}").UNIT for name in names)


@cache
def exercises() -> dict[str, Exercise]:
    """All exercises of the course by id, in order."""
    return {exercise.id: exercise for unit in units() for exercise in unit.exercises}


def find_exercise(exercise_id: str) -> Exercise:
    """The exercise with this id. TypeError if it is no string, ValueError if there is none."""
    expect.instance("exercise", exercise_id, str)
    return exercises()[expect.one_of("exercise", exercise_id.strip(), exercises())]


def unit_of(exercise: Exercise) -> Unit:
    """The unit an exercise belongs to."""
    return next(unit for unit in units() if exercise in unit.exercises)
