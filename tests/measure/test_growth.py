"""Exponents of growth, and their errors."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlearn.measure import fit_exponent

LENGTHS = (1024, 2048, 4096, 8192)


@given(st.floats(-2, 3), st.floats(1e-6, 1e6))
def test_a_power_law_is_found_without_an_error(power: float, factor: float) -> None:
    fit = fit_exponent(LENGTHS, [factor * n**power for n in LENGTHS])
    assert fit.value == pytest.approx(power, abs=1e-9)
    assert fit.error < 1e-6
    assert (fit.first, fit.last) == (1024, 8192)


def test_a_bent_curve_has_an_error_that_says_so() -> None:
    """A fixed cost beside a linear one is no power law: the residuals show it."""
    bent = fit_exponent(LENGTHS, [2000 + n for n in LENGTHS])
    assert 0.3 < bent.value < 0.9
    assert bent.error > 0.05


def test_noisy_points_that_lie_on_a_line_by_chance_keep_their_error() -> None:
    values = [float(n) for n in LENGTHS]
    noise = fit_exponent(LENGTHS, values, [0.1 * v for v in values])
    x = [math.log(n) for n in LENGTHS]
    mean = sum(x) / 4
    expected = 0.1 / math.sqrt(sum((a - mean) ** 2 for a in x))
    assert noise.value == pytest.approx(1)
    assert noise.error == pytest.approx(expected)
    assert str(noise) == f"1.00 ± {expected:.2f}"


def test_a_short_range_has_the_larger_error() -> None:
    far, near = (1024, 8192, 65_536), (1024, 1280, 1536)
    errors = [fit_exponent(ns, [float(n) for n in ns], [0.05 * n for n in ns]).error for ns in (far, near)]
    assert errors[1] > 5 * errors[0]


@pytest.mark.parametrize(
    ("lengths", "values", "message"),
    [
        ((1, 2), (1.0, 2.0), r"len\(lengths\)"),
        ((1, 2, 3), (1.0, 2.0), "values: expected 3"),
        ((1, 2, 3), (1.0, 0.0, 2.0), "values: expected positive"),
        ((2, 2, 2), (1.0, 2.0, 3.0), "lengths: expected different"),
    ],
)
def test_what_cannot_be_fitted_is_named(
    lengths: tuple[int, ...], values: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit_exponent(lengths, values)
