"""Has an answer changed what checks rely on? Asked in the kernel, from outside, around every check.

It finds what changes by accident or by a simple trick (``torch.allclose = lambda *a, **k: True``). A
change that is undone before the kernel is asked is not found: answer and check share a process. Beside
functions and classes, constants are watched (what a module of ours binds to a name in capitals), what leads
from a cell's text to its output, and which files of solutions/ an answer opens.

What checks do not call may change (``torch.set_default_dtype``, ``rich.pretty.install()``): the answer keeps
its points, and the exercises after it get kernels of their own.
"""

import ast
import builtins
import inspect
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch

import kvlearn
from kvlearn.grading.calls import GRADING, HOME, is_learners, is_units
from kvlearn.grading.catalogue import PACKAGE, load, load_named
from kvlearn.grading.folders import solutions_root
from kvlearn.grading.score import Score

STATE = "application/vnd.kvlearn.state+json"  # no formatter of the learner's is between this and the grader
SILENT = "how IPython answers"  # the only name where the kernel could not be asked
LEAVING = "whether IPython goes on"
READING = "files of solutions/"
OWN = "name "  # before names that set-up cells have bound, and what else is the learner's to change
DISPLAY = ("__repr__", "__str__", "__format__", "__dir__")
OURS = ("kvlearn.", f"{PACKAGE}.")
LIBRARIES = (builtins, math, random, torch, torch.nn.functional, torch.testing)
WRAPPED = ("torch.manual_seed",)  # torch itself does, at the first use of torch.compile
NOT_IN_KERNELS = (
    *("commands", "container", "counting", "course", "grader", "kept", "launcher", "merging"),
    *("overview", "records", "release", "report", "sandbox", "submission", "work"),
)
CONSTANTS = tuple(f"kvlearn.{name}" for name in ("grading", "attention", "model", "teaching", "workbench"))
RELOADING = os.path.join("IPython", "extensions", "autoreload.py")  # looks into every module's file
STARTING = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}  # events with a command line

_opened: list[str] = []  # files of solutions/ that a learner's line has opened


class State:
    """The findings, in a form that reaches the grader however values are displayed here."""

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
        if module.__name__.startswith((*CONSTANTS, f"{PACKAGE}.")):
            for name, value in dict(vars(module)).items():
                if name.isupper():
                    found |= _constant(f"{module.__name__}.{name}", value)
    for kind in reversed(torch.Tensor.__mro__[:-1]):
        found |= {f"torch.Tensor.{name}": _identity(value) for name, value in _callables(vars(kind))}
    found["kvlearn.check"] = _identity(kvlearn.check)  # not in vars(kvlearn): made when it is asked for
    found["torch's modes"] = f"{torch._C._len_torch_function_stack()} {torch._C._len_torch_dispatch_stack()}"
    found[READING] = str(len(_opened))
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
    """The callees of checks, references and misconceptions: functions by full name, methods as ".name"."""
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
    parts = [id(value), id(getattr(value, "__code__", None))]
    if inspect.isfunction(value):
        parts += [id(value.__defaults__), id(value.__kwdefaults__)]
        with suppress(ValueError):  # a cell that is still empty
            parts += [id(cell.cell_contents) for cell in value.__closure__ or ()]
    return " ".join(map(str, parts))


def _constant(name: str, value: Any) -> dict[str, str]:
    """A constant's entries, each under a name of its own: that a registry grows changes none of them."""
    if isinstance(value, dict):
        return {f"{name}[{_content(key)}]": _content(each) for key, each in value.items()}
    if isinstance(value, set):
        return {f"{name}[{_content(each)}]": "" for each in value}
    if isinstance(value, list):
        return {f"{name}[{i}]": _content(each) for i, each in enumerate(value)}
    return {name: _content(value)}


def _content(value: Any, depth: int = 3) -> str:
    """A value that names itself by its content as far as it is plain data, else by its identity."""
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype):
        return repr(value)
    if type(value) in (tuple, list) and depth:
        return f"({', '.join(_content(each, depth - 1) for each in value)})"
    if type(value) is dict and depth:
        pairs = [f"{_content(k, depth - 1)}: {_content(each, depth - 1)}" for k, each in value.items()]
        return f"{{{', '.join(pairs)}}}"
    version = value._version if isinstance(value, torch.Tensor) else ""
    return f"{id(value)} {version}"


def _parts(exercise: Any) -> list[Any]:
    return [
        *((_identity(r.script), r.points, r.rounds) for r in exercise.requirements),
        len(exercise.misconceptions),
        [id(function) for function in exercise.forbidden],
        exercise.may_use_kvlearn,
    ]


def _note_opening(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: has a learner's line opened a file of solutions/, or named one to another program?"""
    if event != "open" and event not in STARTING:
        return
    try:
        if event == "open":
            path = os.path.realpath(os.fsdecode(arguments[0]))
            named = path.startswith(_solutions)
        else:
            path = repr(arguments)
            named = _solutions.rstrip(os.sep) in path
        if named and _learners_line():
            _opened.append(path)
    except Exception:  # a descriptor instead of a path, or a name that is none
        return


def _learners_line() -> bool:
    """Is the innermost line that is no library's a learner's, rather than one of ours?"""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and (file.startswith(HOME) or is_units(file) or file.endswith(RELOADING)):
            return False
        if file != __file__ and is_learners(file):
            return True
        frame = frame.f_back
    return False


_solutions = os.path.join(os.path.realpath(solutions_root()), "")
if GRADING:  # it cannot be removed
    sys.addaudithook(_note_opening)


def _own(value: Any) -> str:
    content: Any = value._version if isinstance(value, torch.Tensor) else ""
    if type(value) in (list, dict, set):
        content = hash(repr(value)[:10_000])
    return f"{id(value)} {content}"


def _shell(shell: Any) -> dict[str, str]:
    """The steps from a cell's value to its output that IPython lets other code change."""
    display = shell.display_formatter
    inputs = shell.input_transformer_manager
    steps = (inputs.cleanup_transforms, inputs.line_transforms, inputs.token_transformers)
    around = [
        shell,
        getattr(shell, "kernel", None),
        shell.displayhook,
        shell.display_pub,
        shell.compile,
        inputs,
    ]
    around.append(getattr(around[1], "session", None))
    formatters = (display.mimebundle_formatter, display.ipython_display_formatter)
    return {
        LEAVING: str(shell.exit_now),
        "IPython's displayhook": str(id(shell.displayhook)),
        "IPython's display_formatter": str([id(display), *map(id, formatters)]),
        "IPython's formatters of scores": str([_for_scores(each) for each in formatters]),
        "IPython's transformers": str(
            [len(shell.ast_transformers), len(shell.input_transformers_post), id(inputs)]
            + [[id(step) for step in some] for some in steps]
        ),
        **{name: value for each in around if each is not None for name, value in _methods(each).items()},
    }


def _methods(thing: Any) -> dict[str, str]:
    """The methods of an object of Jupyter's, whether its classes have them or it has them alone."""
    names: dict[str, Any] = {}
    for kind in reversed(type(thing).__mro__):
        if kind.__module__.split(".")[0] in ("IPython", "ipykernel", "jupyter_client"):
            names |= {name: value for name, value in vars(kind).items() if inspect.isfunction(value)}
    names |= {name: value for name, value in vars(thing).items() if name in names}
    return {f"{type(thing).__name__}.{name}": _identity(value) for name, value in names.items()}


def _for_scores(formatter: Any) -> tuple[bool, int]:
    try:
        return formatter.enabled, id(formatter.lookup_by_type(Score))
    except KeyError:
        return formatter.enabled, 0
