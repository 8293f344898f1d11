"""How far a reader must go: the files, functions and lines that a mechanism runs, measured by running it.

    python -m tests.course.hops [NAME ...]

A cached prefill and one decode step of the registered mechanism's tiny layer are traced. Argument checks are
not counted: neither kvlearn/validate.py nor functions named ``check…``. The last column is the length of the
class chain from ``Mechanism`` to the mechanism.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import kvlearn
from kvlearn.attention import REGISTRY, Mechanism

PACKAGE = Path(kvlearn.__file__).parent / "attention"
# DESIGN.md, "A mechanism file": the files that a reader opens, base, core and rope included.
BARS = {"gqa": 4, "window": 4, "mla": 4, "mamba": 4, "delta": 5, "gated_delta": 5, "kda": 5, "nsa": 5}


@dataclass
class Hops:
    """The code that ran: files, functions as (file, name), and lines as (file, number)."""

    files: set[str] = field(default_factory=set)
    functions: set[tuple[str, str]] = field(default_factory=set)
    lines: set[tuple[str, int]] = field(default_factory=set)


def trace(name: str) -> Hops:
    """A cached prefill of nine tokens and one step of the mechanism called ``name``."""
    layer, hops = REGISTRY[name].tiny().eval(), Hops()
    x = torch.randn(2, 10, layer.d_model)
    cache = layer.new_cache(batch=2, max_len=10)

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        if path.parent != PACKAGE or frame.f_code.co_name.lstrip("_").startswith("check"):
            return None
        if event == "line":
            hops.lines.add((path.name, frame.f_lineno))
        hops.files.add(path.name)
        hops.functions.add((path.name, frame.f_code.co_qualname))
        return on_line

    with torch.no_grad():
        sys.settrace(on_line)
        try:
            layer(x[:, :9], cache)
            layer(x[:, 9:], cache)
        finally:
            sys.settrace(None)
    return hops


def chain(name: str) -> list[str]:
    """The classes from ``Mechanism`` to the mechanism."""
    return [kind.__name__ for kind in reversed(REGISTRY[name].__mro__) if issubclass(kind, Mechanism)]


def main(names: list[str]) -> None:
    print(
        f"{'mechanism':16} {'files':>5} {'bar':>4} {'functions':>10} {'lines':>6} {'chain':>6}  which files"
    )
    for name in names:
        hops = trace(name)
        row = f"{len(hops.files):5} {BARS.get(name, '–'):>4} {len(hops.functions):10} {len(hops.lines):6}"
        print(f"{name:16} {row} {len(chain(name)):6}  {', '.join(sorted(hops.files))}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(BARS))
