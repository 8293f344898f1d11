"""What tests of benchmarks share: times that the test sets in place of measured ones."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from kvlearn.measure import Comparison


def shown_times(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> dict[str, float]:
    """Every call of a comparison runs once and takes the seconds that stand here under its name: else 1."""
    shown: dict[str, float] = {}

    def compare(fns: Mapping[str, Callable[[], Tensor]], *, rounds: int, **_: Any) -> Comparison:
        for fn in fns.values():
            fn()
        return Comparison({name: rounds * (shown.get(name, 1.0),) for name in fns})

    for module in modules:
        monkeypatch.setattr(module, "compare", compare)
    return shown
