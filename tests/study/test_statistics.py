"""Intervals against tables and simulation; what a run that diverged may not do to a mean."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvlearn.study.quality import (
    bootstrap_difference,
    paired_difference,
    paired_values,
    pooled_spread,
    smallest_difference,
    summarise,
)
from kvlearn.study.quality.statistics import student_cdf, student_quantile


@pytest.mark.parametrize(
    ("p", "df", "t"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 4, 2.77645), (0.975, 14, 2.14479), (0.95, 9, 1.83311)],
)
def test_quantiles_of_student_are_those_of_printed_tables(p: float, df: int, t: float) -> None:
    assert student_quantile(p, df) == pytest.approx(t, abs=1e-4)
    assert student_quantile(1 - p, df) == pytest.approx(-t, abs=1e-4)
    assert student_cdf(t, df) == pytest.approx(p, abs=1e-6)
    assert student_cdf(0.0, df) == 0.5


def test_a_paired_difference_is_the_mean_and_t_standard_errors() -> None:
    found = paired_difference([1.0, 2.0, 3.0])
    assert found is not None
    assert (found.n, found.mean) == (3, pytest.approx(2.0))
    assert (
        found.high - found.mean == found.mean - found.low == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
    )
    assert found.tie  # the interval reaches below 0
    sure = paired_difference([1.9, 2.0, 2.1])
    assert sure is not None
    assert not sure.tie
    assert paired_difference([1.0]) is None  # one pair says nothing about the spread


def test_a_run_that_diverged_is_counted_and_in_no_mean() -> None:
    found = summarise([1.0, None, 3.0])
    assert (found.n, found.mean, found.diverged) == (2, 2.0, 1)
    assert found.spread == pytest.approx(math.sqrt(2))
    assert summarise([None]).mean is None
    assert paired_values({0: 1.5, 1: None, 2: 2.0}, {0: 1.0, 1: 1.0, 2: 1.0, 3: 9.0}) == [0.5, 1.0]


def test_the_pooled_spread_is_that_of_a_paired_difference() -> None:
    ours, baseline = {0: 1.0, 1: 2.0, 2: 4.0}, {0: 0.0, 1: 0.0, 2: 0.5, 3: 9.0}
    pooled = pooled_spread([ours, baseline])
    assert pooled == (pytest.approx(np.std([1.0, 2.0, 3.5], ddof=1)), 2)
    # By hand: rests of ±1/3 and ±2/3 about the means of three designs and two seeds, df = 6 - 3 - 2 + 1.
    assert pooled_spread([{0: 0.0, 1: 1.0}, {0: 5.0, 1: 6.0}, {0: 1.0, 1: 0.0}]) == (
        pytest.approx(math.sqrt(2 * (4 * (1 / 3) ** 2 + 2 * (2 / 3) ** 2) / 2)),
        2,
    )
    assert pooled_spread([{0: 1.0, 1: None}, {0: 2.0}]) is None
    assert pooled_spread([{0: None}, {}]) is None


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(0.3, 1.0, (2000, 3))
    found = [paired_difference(row) for row in draws.tolist()]
    held = sum(item is not None and item.low <= 0.3 <= item.high for item in found) / len(found)
    assert held == pytest.approx(0.95, abs=0.015)


def test_pooled_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Seven designs and the baseline, three seeds each: the baseline's runs are in every difference."""
    held = []
    for runs in np.random.default_rng(3).normal(0.0, 1.0, (1000, 8, 3)):
        baseline, *others = ({seed: float(loss) for seed, loss in enumerate(own)} for own in runs)
        pooled = pooled_spread([baseline, *others])
        assert pooled is not None
        for own in others:
            found = paired_difference(paired_values(own, baseline), spread=pooled[0], df=pooled[1])
            held.append(found is not None and found.tie)
    assert np.mean(held) == pytest.approx(0.95, abs=0.01)


def test_the_bootstrap_agrees_with_t_where_pairs_are_many() -> None:
    values = np.random.default_rng(1).normal(0.1, 1.0, 400).tolist()
    ours, theirs = bootstrap_difference(values), paired_difference(values)
    assert theirs is not None
    assert ours.mean == pytest.approx(theirs.mean)
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)
    for few in ([], [0.1]):
        with pytest.raises(
            ValueError, match=f"values: expected at least two paired differences, got {len(few)}"
        ):
            bootstrap_difference(few)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: summarise([1.0, math.nan]), "losses: expected a finite number, got nan"),
        (lambda: student_cdf(math.nan, 3), "t: expected a finite number, got nan"),
        (lambda: student_cdf(1.0, 0), "df: expected at least 1, got 0"),
        (lambda: student_quantile(1.0, 3), "p: expected a probability between 0 and 1, got 1.0"),
        (lambda: student_quantile(0.5, 1.5), r"df: expected an integer, got float \(1.5\)"),  # type: ignore[arg-type]
        (lambda: paired_values({0: 1.0}, {0: math.inf}), "theirs: expected a finite number, got inf"),
        (lambda: paired_difference([1.0, math.nan]), "values: expected a finite number, got nan"),
        (lambda: paired_difference([1.0, 2.0], confidence=1.0), "confidence: expected a probability"),
        (lambda: paired_difference([1.0], spread=-1.0, df=2), "spread: expected at least 0, got -1.0"),
        (lambda: pooled_spread([{0: 1.0, 1: math.nan}]), "losses: expected a finite number, got nan"),
        (lambda: bootstrap_difference([1.0, math.nan]), "values: expected a finite number, got nan"),
        (lambda: bootstrap_difference([1.0, 2.0], n_draws=0), "n_draws: expected at least 1, got 0"),
        (lambda: bootstrap_difference([1.0, 2.0], confidence=0.0), "confidence: expected a probability"),
        (lambda: smallest_difference(1.0, 4, 0), "n: expected at least 1, got 0"),
        (lambda: smallest_difference(1.0, 4, 3, power=1.0), "power: expected a probability"),
    ],
)
def test_numbers_that_no_statistic_has_are_refused_by_name(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()


def test_the_smallest_visible_difference_is_seen_four_times_in_five() -> None:
    n, generator = 5, np.random.default_rng(2)
    size = smallest_difference(1.0, n - 1, n)
    assert smallest_difference(1.0, n - 1, 4 * n) == pytest.approx(size / 2)
    ours, theirs = generator.normal(size, 1.0, (2000, n)), generator.normal(0.0, 1.0, (2000, n))
    found = [paired_difference(row) for row in (ours - theirs).tolist()]
    seen = sum(item is not None and not item.tie for item in found) / len(found)
    assert seen == pytest.approx(0.8, abs=0.06)
