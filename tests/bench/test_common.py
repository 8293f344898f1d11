"""Parts of a benchmark: what fails costs itself, what is not reached is named, comparisons are checked."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_tools import PROVENANCE

from kvlearn.bench import common, models
from kvlearn.bench.common import Limit, Part, Recorder, run_parts
from kvlearn.measure import results
from kvlearn.measure.results import Row


def ten(name: str) -> Iterator[Row]:
    yield Row(name, 10, "s")


def texts(rows: Iterator[Row]) -> list[str]:
    return [f"{row.case}: {row.reason}" if row.reason else row.case for row in rows]


def broken() -> Iterator[Row]:
    yield Row("first", 1, "s")
    raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")


def test_a_failing_part_costs_itself_and_is_named() -> None:
    parts = [Part("broken", broken), Part("whole", lambda: ten("whole"))]
    assert texts(run_parts(parts)) == [
        "first",
        "broken: RuntimeError: CUDA error: out of memory",
        "whole",
    ]


def test_a_device_that_is_lost_is_named_and_ends_nothing() -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rows = run_parts([Part(n, lambda: ten("x")) for n in "ab"], release=lost)
    after = "after it: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert texts(rows) == ["x", f"a: {after}", "x", f"b: {after}"]


def test_what_is_not_reached_in_time_is_named() -> None:
    clock = iter(range(0, 1000, 10))
    parts = [Part(n, lambda: ten("x"), needs=30) for n in "abcde"]
    rows = run_parts(parts, 75, lambda: next(clock))
    assert texts(rows) == ["x", "x", "x", "x", "e: not reached within 75 s"]


def test_parts_with_one_limit_share_it() -> None:
    now = 0.0

    def slow() -> Iterator[Row]:
        nonlocal now
        now += 8
        yield from ten("slow")

    limit = Limit(10)
    parts = [*(Part(n, slow, limit=limit) for n in "abc"), Part("d", lambda: ten("d"))]
    rows = list(run_parts(parts, now=lambda: now))
    assert texts(iter(rows)) == ["slow", "slow", "c: not reached within the 10 s of its group", "d"]
    late = Part("late", slow, needs=5, limit=Limit(20, spent=15))
    assert texts(run_parts([late])) == ["late: not reached within the 20 s of its group"]


def test_a_benchmark_can_go_on_where_an_earlier_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of other conditions are kept, finished parts give their rows again, with their provenance."""

    def parts(device: torch.device, small: bool, known: Any = ()) -> list[Part]:
        finished = [row["case"] for row in known]
        return [Part(n, partial(ten, f"{n}, again" if n in finished else n)) for n in "ab"]

    def others(known: Any, device: torch.device, small: bool, selected: list[str]) -> list[dict[str, Any]]:
        return [row for row in known if row["case"] not in selected]

    monkeypatch.setattr(models, "parts", parts)
    monkeypatch.setattr(models, "others", others, raising=False)

    def recorded(only: str) -> list[dict[str, Any]]:
        list(common.run("models", only=only, recorder=Recorder("models", "…", PROVENANCE, tmp_path)))
        (found,) = results.load("models", tmp_path)
        return found.rows

    assert [row["case"] for row in recorded("a")] == ["a"]
    rows = recorded("b")
    assert [row["case"] for row in rows] == ["a", "b"]
    assert [row.get("provenance") for row in rows] == [PROVENANCE, None]
    assert [row["case"] for row in recorded("")] == ["a, again", "b, again"]


def test_results_that_differ_are_not_timed() -> None:
    expected = torch.tensor([1.0, 2.0])
    common.agree({"same": lambda: expected + 1e-5}, expected)
    for wrong in (expected + 1e-2, torch.tensor([1.0, torch.nan])):
        with pytest.raises(AssertionError, match=r"(?s)^wrong: expected the same output.*not close"):
            common.agree({"wrong": lambda wrong=wrong: wrong}, expected)


def test_a_power_of_the_length_is_fitted_from_the_least_on() -> None:
    amounts = {16: 1e9, 32: 2 * 32**1.5, 64: 2 * 64**1.5, 128: 2 * 128**1.5}
    assert common.exponent(amounts, least=32) == pytest.approx(1.5)
