"""Bytes, rates and times as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlearn.measure import format_bytes, format_bytes_decimal, format_rate, format_seconds

BINARY = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}
DECIMAL = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (516_096, "504 KiB"),
        (516_096 * 32_768, "15.75 GiB"),
        (2**30 - 1, "1 GiB"),  # never 1024 MiB
        (-3 * 2**20, "-3 MiB"),
    ],
)
def test_powers_of_two_say_kib(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text


@pytest.mark.parametrize(("n_bytes", "text"), [(999, "999 B"), (1000, "1 kB"), (15.75 * 2**30, "16.91 GB")])
def test_powers_of_ten_say_kb(n_bytes: float, text: str) -> None:
    assert format_bytes_decimal(n_bytes) == text


@given(st.integers(0, 2**59))
def test_what_is_printed_is_within_half_a_percent(n_bytes: int) -> None:
    for text, units, base in (
        (format_bytes(n_bytes), BINARY, 1024),
        (format_bytes_decimal(n_bytes), DECIMAL, 1000),
    ):
        number, unit = text.split()
        assert float(number) * units[unit] == pytest.approx(n_bytes, rel=0.005)
        assert float(number) < base or unit.startswith("P")


def test_rates_and_times() -> None:
    assert format_rate(35.2e9) == "35.2 GB/s"
    assert format_rate(1.5e12, "FLOP") == "1.5 TFLOP/s"
    assert [format_seconds(s) for s in (2.0, 0.00124, 12.3456e-6, 5e-9, 0.9999)] == [
        "2 s",
        "1.24 ms",
        "12.3 µs",
        "5 ns",
        "1 s",
    ]
