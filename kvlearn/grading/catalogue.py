"""Finds units and exercises: every module ``units/uNN.py`` offers a ``UNIT``."""

import pkgutil
import re
from functools import cache
from importlib import import_module

from kvlearn.grading import units as rooms
from kvlearn.grading.exercise import Exercise, Unit
from kvlearn.grading.guard import shorten


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
    if not isinstance(exercise_id, str):
        came = type(exercise_id).__name__
        raise TypeError(
            f'exercise: expected str, got {came}{_meant(str(exercise_id))} (write the id in quotes: "01.1")'
        )
    name = exercise_id.strip()
    if name not in exercises():
        raise ValueError(
            f"exercise: expected one of {', '.join(map(repr, exercises()))}; "
            f"got {shorten(repr(name), 40)}{_meant(name)}"
        )
    return exercises()[name]


def _meant(text: str) -> str:
    """The question whether "1.1" means "01.1", if there is such an exercise."""
    numbers = re.fullmatch(r"0*([0-9]{1,3})\.0*([0-9]{1,3})", text)
    name = f"{int(numbers[1]):02}.{int(numbers[2])}" if numbers else ""
    return f"; did you mean {name!r}?" if name in exercises() else ""


def unit_of(exercise: Exercise) -> Unit:
    """The unit an exercise belongs to."""
    return next(unit for unit in units() if exercise in unit.exercises)
