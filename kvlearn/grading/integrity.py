"""Has an answer changed what checks rely on? Asked in the kernel, from outside, around every check.

It finds what changes by accident or by a simple trick (``torch.allclose = lambda *a, **k: True``). A
change that is undone before the kernel is asked is not found: answer and check share a process.

What checks do not call may change (``torch.set_default_dtype``, ``rich.pretty.install()``): the answer keeps
its points, and the exercises after it get kernels of their own.
"""

import ast
import builtins
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import kvlearn
from kvlearn.grading.catalogue import PACKAGE, load, load_named
from kvlearn.grading.score import Score

STATE = "application/vnd.kvlearn.state+json"  # no formatter of the learner's is between this and the grader
SILENT = "how IPython answers"  # the only name where the kernel could not be asked
LEAVING = "whether IPython goes on"
OWN = "name "  # before names that set-up cells have bound, and what else is the learner's to change
DISPLAY = ("__repr__", "__str__", "__format__", "__dir__")
OURS = ("kvlearn.", f"{PACKAGE}.")
LIBRARIES = (builtins, math, random, torch, torch.nn.functional, torch.testing)
WRAPPED = ("torch.manual_seed",)  # torch itself does, at the first use of torch.compile
NOT_IN_KERNELS = (
    *("commands", "course", "grader", "launcher", "merging", "overview"),
    *("records", "release", "report", "sandbox", "submission", "work"),
)


class State:
    """What was found, in a form that reaches the grader however values are displayed here."""

    def __init__(self, found: dict[str, str]) -> None:
        self.found = found

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"text/plain": "", STATE: self.found}


def request(unit: str) -> str:
    """The expression that asks a kernel for its ``state``."""
    return f"__import__('kvlearn.grading.integrity', fromlist=['state']).state(get_ipython(), {unit!r})"


def state(shell: Any, unit: str) -> State:
    """Identities of everything an answer might change: what changed is what has another value later."""
    found = {"where exercises are found": str(os.environ.get("KVLEARN_SOLUTIONS"))}
    with suppress(Exception):  # nothing is where they are found
        found |= {f"exercise {each.id}": str(_parts(each)) for each in load_named(unit).exercises}
    for module in _modules():
        for name, value in _callables(vars(module)):
            found[f"{module.__name__}.{name}"] = _identity(value)
            if isinstance(value, type) and value.__module__.startswith(OURS):
                inner = _callables(vars(value))
                found |= {f"{module.__name__}.{name}.{part}": _identity(what) for part, what in inner}
    for kind in reversed(torch.Tensor.__mro__[:-1]):
        found |= {f"torch.Tensor.{name}": _identity(value) for name, value in _callables(vars(kind))}
    found["kvlearn.check"] = _identity(kvlearn.check)  # not in vars(kvlearn): made when it is asked for
    found |= _shell(shell)
    for name, value in dict(shell.user_ns).items():
        if name not in ("In", "Out") and not name.startswith("_"):
            found[OWN + name] = _own(value)
    found[f"{OWN}torch's defaults"] = f"{torch.get_default_dtype()} {torch.is_grad_enabled()}"
    found[f"{OWN}IPython's callbacks"] = str([len(known) for known in shell.events.callbacks.values()])
    return State(found)


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Names of ``before`` that are different or gone."""
    if SILENT in after:
        return [SILENT]
    return [name for name, value in before.items() if after.get(name) != value]


def relied_on(name: str, folder: Path) -> bool:
    """Could a change of ``name`` change a score in the unit in this folder?"""
    module, _, last = name.rpartition(".")
    if name in WRAPPED:
        return False
    if module == "torch.Tensor":
        operator = last.startswith("__") and last not in DISPLAY
        return operator or f".{last}" in _called(folder)
    if module in [library.__name__ for library in LIBRARIES]:
        return name in _called(folder)
    return not name.startswith(OWN)


@cache
def _called(folder: Path) -> frozenset[str]:
    """What checks, references and misconceptions call: functions by full name, methods as ".name"."""
    home = Path(kvlearn.__file__).parent
    engine = [file for file in home.glob("grading/*.py") if file.stem not in NOT_IN_KERNELS]
    given = [file for room in ("attention", "model", "teaching") for file in home.glob(f"{room}/*.py")]
    given.append(home / "workbench.py")
    files = [*engine, *given, *folder.glob("*.py")]
    edited = [each.source for exercise in load(folder).exercises for each in exercise.misconceptions]
    found = {"torch.Tensor"}
    for source in [*(file.read_text("utf-8") for file in files), *edited]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Name):
                found.add(f"builtins.{node.id}")
            elif isinstance(node, ast.ImportFrom):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Attribute):
                module = ast.unparse(node.value)
                module = "torch.nn.functional" if module == "F" else module
                found |= {f".{node.attr}", f"{module}.{node.attr}"}
    return frozenset(found)


def _modules() -> Iterator[ModuleType]:
    yield from LIBRARIES
    yield from [module for name, module in sys.modules.items() if f"{name}.".startswith(OURS)]


def _callables(names: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in dict(names).items():
        if callable(value) or isinstance(value, property | classmethod | staticmethod):
            yield name, value


def _identity(value: Any) -> str:
    return f"{id(value)} {id(getattr(value, '__code__', None))}"


def _parts(exercise: Any) -> list[Any]:
    return [
        *((id(r.script), id(r.script.__code__), r.points, r.rounds) for r in exercise.requirements),
        len(exercise.misconceptions),
        len(exercise.forbidden),
    ]


def _own(value: Any) -> str:
    content: Any = value._version if isinstance(value, torch.Tensor) else ""
    if type(value) in (list, dict, set):
        content = hash(repr(value)[:10_000])
    return f"{id(value)} {content}"


def _shell(shell: Any) -> dict[str, str]:
    """What leads from a cell's value to its output, as far as IPython lets others meddle with it."""
    display = shell.display_formatter
    formatters = (display.mimebundle_formatter, display.ipython_display_formatter)
    return {
        LEAVING: str(shell.exit_now),
        "IPython's displayhook": str(id(shell.displayhook)),
        "IPython's display_formatter": str([id(display), *map(id, formatters)]),
        "IPython's formatters of scores": str([_for_scores(each) for each in formatters]),
        "IPython's transformers": str([len(shell.ast_transformers), len(shell.input_transformers_post)]),
    }


def _for_scores(formatter: Any) -> tuple[bool, int]:
    try:
        return formatter.enabled, id(formatter.lookup_by_type(Score))
    except KeyError:
        return formatter.enabled, 0
