"""Grading: ``check``, ``hint`` and ``solution`` in the notebook, and what a unit's checks are made of.

A unit is a folder of solutions/ (``folders`` and ``catalogue`` find it): its notebook, ``checks.py`` (each
``Exercise`` with its requirements) and ``mistakes.py`` (known wrong answers). ``run_checks`` grades one
answer, ``grader`` a notebook, ``commands`` what ``kvlearn grade`` is given; ``release`` makes exercises/ from
solutions/; ``work`` makes and updates a learner's copies, ``records`` remembers their results, ``overview``
shows them.

The names below are imported at their first use, so that the command line answers before torch is there.
"""

from importlib import import_module
from typing import Any

_FRONT = {
    "calls": "CallWrapper Made NotWritten Raised largest_new_tensor new_tensors place_of shorten "
    "undefined_writes",
    "catalogue": "exercises find_exercise hint solution units",
    "certificate": "keep_points",
    "collect": "solved_answers",
    "context": "CheckContext Difference Stop compare describe plain_number same",
    "exercise": "Answer Exercise Misconception Requirement Unit",
    "overview": "progress",
    "run_checks": "check judge one_thread solved",
    "score": "Row Score",
}
_MODULES = {name: module for module, names in _FRONT.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'kvlearn.grading' has no attribute {name!r}")
    for each, module in _MODULES.items():
        globals()[each] = getattr(import_module(f"kvlearn.grading.{module}"), each)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
