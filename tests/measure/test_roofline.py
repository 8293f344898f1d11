"""The roofline's shape; the measurements themselves only have to be numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlearn.measure import Roofline, Work, roofline
from kvlearn.measure.roofline import read_stream, square_product

positive = st.floats(1e-3, 1e15)


@given(positive, positive, positive)
def test_attainable_is_under_both_roofs_and_meets_them_at_the_knee(
    peak: float, bandwidth: float, intensity: float
) -> None:
    roof = Roofline(peak, bandwidth)
    assert roof.attainable(intensity) == min(peak, intensity * bandwidth)
    assert roof.attainable(roof.knee) == pytest.approx(peak)


@given(positive, positive, positive, positive)
def test_no_work_is_faster_than_its_floor(peak: float, bandwidth: float, flops: float, nbytes: float) -> None:
    roof, work = Roofline(peak, bandwidth), Work(flops, nbytes)
    assert roof.floor(work) == pytest.approx(flops / roof.attainable(work.intensity))


def test_the_stream_reads_what_it_says() -> None:
    stream, n_bytes = read_stream()
    assert stream() == n_bytes / 4  # ones, summed
    assert n_bytes >= 2**20


def test_the_product_multiplies_what_it_says() -> None:
    product, flops = square_product(8, dtype=torch.float64)
    assert flops == 1024
    assert product().shape == (8, 8)  # type: ignore[attr-defined]


def test_a_measurement_is_made_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = roofline.read_bandwidth()
    monkeypatch.setattr(roofline, "_best", lambda *_, **__: pytest.fail("measured again"))
    assert roofline.read_bandwidth("cpu") == measured > 0
