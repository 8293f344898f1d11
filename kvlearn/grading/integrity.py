"""Has an answer changed what checks rely on? Asked in the kernel, from outside, around every check.

It finds what changes by accident or by a simple trick (``torch.allclose = lambda *a, **k: True``). Whoever
changes something and puts it back before anybody looks is not found: answer and check share a process.
"""

import builtins
import json
import math
import random
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch

import kvlearn
from kvlearn.grading.catalogue import exercises

ASK = "__import__('kvlearn.grading.integrity', fromlist=['state']).state(get_ipython())"
OWN = (
    "name "  # before names that setup cells have bound: an answer may, others then get a kernel of their own
)


def state(shell: Any) -> str:
    """Identities of everything that checks rely on, as JSON: what changed is what has another value later."""
    found = {f"exercise {key}": str(_parts(exercise)) for key, exercise in exercises().items()}
    for module in _modules():
        for name, value in _callables(vars(module)):
            found[f"{module.__name__}.{name}"] = _identity(value)
            if isinstance(value, type) and value.__module__.startswith("kvlearn."):
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
    return json.dumps(found)


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Names of ``before`` that are different or gone."""
    if len(after) == 1:  # the kernel could not be asked any more
        return list(after)
    return [name for name, value in before.items() if after.get(name) != value]


def _modules() -> Iterator[ModuleType]:
    yield from (builtins, math, random, torch, torch.nn.functional, torch.testing)
    yield from [module for name, module in sys.modules.items() if f"{name}.".startswith("kvlearn.")]


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
    """The roads from a cell's value to its output, as far as IPython lets others meddle with them."""
    formatter = shell.display_formatter.mimebundle_formatter
    return {
        "IPython's displayhook": str(id(shell.displayhook)),
        "IPython's display_formatter": str((id(shell.display_formatter), id(formatter))),
        "IPython's formatter": str(
            (len(formatter.type_printers), len(formatter.deferred_printers))
        ),
        "IPython's transformers": str([len(shell.ast_transformers), len(shell.input_transformers_post)]),
        "IPython's events": str([len(shell.events.callbacks[e]) for e in ("pre_execute", "pre_run_cell")]),
    }
