"""What tests of benchmarks share: small sizes, and a clock whose hands they set."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import Tensor

from kvlearn.measure import Comparison


def small_and_timed(
    monkeypatch: pytest.MonkeyPatch, small: Mapping[Any, Mapping[str, Any]]
) -> dict[str, float]:
    """Small sizes, and a clock that shows what stands here under a contestant's name: else one second."""
    shown: dict[str, float] = {}

    def compare(fns: Mapping[str, Callable[[], Tensor]], *, rounds: int, **_: Any) -> Comparison:
        for fn in fns.values():
            fn()
        return Comparison({name: rounds * (shown.get(name, 1.0),) for name in fns})

    for module, values in small.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
        if hasattr(module, "compare"):
            monkeypatch.setattr(module, "compare", compare)
    return shown
