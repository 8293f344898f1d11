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


def test_a_step_is_its_matrices_its_attention_and_its_calls() -> None:
    machine = roofline.Machine(Roofline(peak=1e9, bandwidth=1e6), call=1e-3, rates={(4, 2, 64): 1e7})
    assert machine.step_seconds(2e6, 1e6, 1e3) == pytest.approx(2 + 1)
    assert machine.step_seconds(2e6, 1e6, 5e9) == pytest.approx(2 + 5)  # at the peak
    assert machine.step_seconds(2e6, 1e6, 5e9, heads=(4, 2, 64)) == pytest.approx(2 + 500)
    slower = roofline.Machine(machine.roofline, matrices=0.5)
    assert slower.step_seconds(2e6, 1e6, 1e3) == pytest.approx(4 + 1)
    assert machine.step_seconds(0, 0, 0, calls=7) == pytest.approx(7e-3)
    assert machine.step_seconds(2e6, 1e6, 0, bandwidth=2e6) == pytest.approx(1.5)


def test_the_rate_of_attention_counts_the_flops_of_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def best(fn: object, *_: object, **__: object) -> float:
        shapes.append(fn().shape)  # type: ignore[operator]
        return 2.0

    monkeypatch.setattr(roofline, "_best", best)
    # 2 KV heads of 16 numbers for keys and for values, 4 bytes each: 4 tokens in 1 KiB.
    assert roofline.attention_rate(3, 2, 16, nbytes=1024) == 4 * 2 * 3 * 4 * 16 / 2.0
    assert set(shapes) == {(1, 2, 3, 16)}


def test_the_bandwidth_of_a_matrix_counts_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_best", lambda fn, *_, **__: 2.0 if fn().shape == (1, 4) else 0.0)
    assert roofline.matrix_bandwidth(nbytes=4 * 4096 * 4) == 4 * 4096 * 4 / 2.0


def test_a_call_is_timed_by_the_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_best", lambda *_, **__: 5.0)
    assert roofline.call_seconds() == pytest.approx(5e-3)
