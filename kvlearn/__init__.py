"""kvlearn: making the KV cache of language models small, one mechanism at a time.

``kvlearn.check``, ``hint``, ``solution`` and ``progress`` serve the exercises; the mechanisms live in
``kvlearn.attention``, the language model that takes any of them in ``kvlearn.model``.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "check": "kvlearn.grading",
    "hint": "kvlearn.grading",
    "progress": "kvlearn.grading",
    "solution": "kvlearn.grading",
    "from_transformers": "kvlearn.model",
}
_MODULES = ("attention", "grading", "measure", "model", "plots", "study", "workbench")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _MODULES:
        return import_module(f"kvlearn.{name}")
    raise AttributeError(f"module 'kvlearn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_MODULES])
