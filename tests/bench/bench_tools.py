"""Tools that tests of benchmarks share: a provenance, and times that the test sets."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from kvlearn.measure import Comparison

PROVENANCE = {
    "date": "2026-01-01T00:00:00+00:00",
    "commit": None,
    "dirty": None,
    "machine": "a-machine",
    "cores": 2,
    "memory": 1,
    "read_bandwidth_measured": 1,
    "gpu": None,
    "versions": {},
}


def shown_times(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> dict[str, float]:
    """Every call of a comparison runs once and takes the seconds given here under its name: else 1."""
    shown: dict[str, float] = {}

    def compare(fns: Mapping[str, Callable[[], Tensor]], *, rounds: int, **_: Any) -> Comparison:
        for fn in fns.values():
            fn()
        return Comparison({name: rounds * (shown.get(name, 1.0),) for name in fns})

    for module in modules:
        monkeypatch.setattr(module, "compare", compare)
    return shown
