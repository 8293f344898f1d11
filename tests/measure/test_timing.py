"""Medians, quartiles and interleaved comparisons; nothing here depends on how fast the machine is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlearn.measure import Comparison, Quartiles, compare, measure_time


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=30))
def test_quartiles_are_those_of_numpy(values: list[float]) -> None:
    found = Quartiles.of(values)
    assert (found.q1, found.median, found.q3) == pytest.approx(np.percentile(values, [25, 50, 75]))
    assert found.n == len(values)


def test_functions_take_turns_and_the_order_rotates() -> None:
    calls: list[str] = []
    compare({n: lambda n=n: calls.append(n) for n in "abc"}, rounds=4, min_block_time=0)  # type: ignore[misc]
    warm_up, rounds = calls[:-12], calls[-12:]
    assert set(warm_up) == set("abc")
    assert "".join(rounds) == "abcbcacababc"


def test_a_ratio_is_taken_round_by_round() -> None:
    # The machine slows down threefold in the last two rounds: the ratio does not notice.
    slowing = Comparison({"a": (1.0, 1.0, 3.0, 3.0), "b": (2.0, 2.0, 6.0, 6.0)})
    assert slowing.ratio("b", "a") == Quartiles(2.0, 2.0, 2.0, 4)
    assert slowing.time("a").median == 2.0


def test_a_measured_time_lies_between_its_quartiles() -> None:
    time = measure_time(lambda: sum(range(100)), min_run_time=0.01)
    assert 0 < time.q1 <= time.median <= time.q3
    assert time.n >= 1


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="fns: expected at least one"):
        compare({})
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        compare({"a": int}, rounds=0)
    with pytest.raises(ValueError, match="name: expected one of 'a'; got 'b'"):
        Comparison({"a": (1.0,)}).ratio("a", "b")
    with pytest.raises(ValueError, match="values: expected at least one"):
        Quartiles.of([])
