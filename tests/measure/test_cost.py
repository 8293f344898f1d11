"""Users per device and dollars: the arithmetic by hand, and what the article's money rows come to."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlearn.measure import DEVICES, GB, GIB, MODELS, Device, Load, cost_table, costs, dollars_per_million
from kvlearn.measure.cost import (
    batch_step_seconds,
    devices_needed,
    measured_load,
    saved_per_year,
    sharded,
    users_per_device,
)

LOAD = Load(weights=10 * GB, stored=2 * GB, moved=GB, flops=1e9)
CARD = Device("a card", 32 * GB, 100 * GB, 1e12, "made up")


def test_users_share_what_the_weights_leave() -> None:
    assert users_per_device(LOAD, 32 * GB, reserve=0) == 11
    assert users_per_device(LOAD, 32 * GB, reserve=0.5) == 3
    assert users_per_device(LOAD, 9 * GB, reserve=0) == 0


def test_a_step_waits_for_memory_or_for_arithmetic() -> None:
    assert batch_step_seconds(LOAD, CARD, 4) == pytest.approx(14 / 100)
    busy = replace(LOAD, flops=1e12)
    assert batch_step_seconds(busy, CARD, 4) == pytest.approx(4)
    assert batch_step_seconds(LOAD, CARD, 4, efficiency=0.5) == pytest.approx(2 * 14 / 100)


def test_dollars_are_the_price_of_the_seconds_that_a_million_tokens_take() -> None:
    step = batch_step_seconds(LOAD, CARD, 4)
    assert dollars_per_million(LOAD, CARD, 3.6, users=4) == pytest.approx(0.001 * step / 4 * 1e6)
    half = dollars_per_million(LOAD, CARD, 3.6, users=4, busy=0.5)
    assert half == pytest.approx(2 * dollars_per_million(LOAD, CARD, 3.6, users=4))
    assert dollars_per_million(LOAD, replace(CARD, memory=GB), 3.6) == math.inf
    assert dollars_per_million(LOAD, CARD, 3.6) == dollars_per_million(LOAD, CARD, 3.6, users=9)


@given(st.sampled_from(sorted(DEVICES)), st.sampled_from([4096, 32_768, 131_072]), st.floats(1.01, 16))
def test_a_smaller_cache_never_costs_more_per_user_served_and_saves_at_most_its_ratio(
    device: str, length: int, by: float
) -> None:
    """For the same number of users: the weights are read all the same."""
    load = Load.of(MODELS["Llama 3.1 8B"], length)
    small = load.with_cache_divided(by)
    one, other = (dollars_per_million(x, DEVICES[device], 1.0, users=8) for x in (load, small))
    assert one / by <= other * (1 + 1e-9)
    assert other <= one


def test_eight_gib_per_user_at_32k_is_a_model_that_shares_its_heads_already() -> None:
    """Qwen3 32B has 8 KV heads for 64 query heads: 4x less once more is 2 GiB."""
    load = Load.of(MODELS["Qwen3 32B"], 32_768)
    assert load.stored == 8 * GIB
    assert load.with_cache_divided(4).stored == 2 * GIB


def test_a_quarter_of_the_cache_is_at_best_about_a_quarter_of_the_dollars() -> None:
    """From 2.00 to 0.30 is 6.7 times: more than four times as many users give, but for rounding."""
    device = DEVICES["A100 80 GB"]
    load = Load.of(MODELS["Llama 3.1 8B"], 32_768)
    ratio = dollars_per_million(load, device, 2.0) / dollars_per_million(
        load.with_cache_divided(4), device, 2.0
    )
    assert 3.5 < ratio < 4.5 < 2.00 / 0.30


def test_a_hundred_a100s_saved_by_three_quarters() -> None:
    """1 to 2 million dollars a year: at 1.52 to 3.04 dollars per hour, if three quarters go."""
    assert saved_per_year(100, 1.0, 0.75) == 100 * 8760 * 0.75
    assert 1e6 < saved_per_year(100, 2.0, 0.75) < 2e6
    load = Load.of(MODELS["Llama 3.1 8B"], 32_768)
    device = DEVICES["A100 80 GB"]
    users = 100 * users_per_device(load, device.memory)
    assert devices_needed(load, device, users) == 100
    assert devices_needed(load.with_cache_divided(4), device, users) == 25
    assert devices_needed(load, DEVICES["T4"], users) == math.inf


def test_several_devices_are_one_with_more_of_everything() -> None:
    two = sharded(CARD, 2)
    assert (two.name, two.memory, two.bandwidth, two.peak) == ("2 × a card", 64 * GB, 200 * GB, 2e12)
    assert sharded(CARD, 1) == CARD


def test_measured_bytes_take_the_place_of_formulas() -> None:
    model = MODELS["Llama 3.1 8B"]
    at = {"mechanism": "gqa", "model": "Llama 3.1 8B", "length": 32_768}
    one = 2 * 8 * 128 * 2 * 32_768
    rows = [
        {"what": "stored", "measured": one, **at},
        {"what": "read", "measured": one, "written": 0, "attention": 4 * 32 * 128 * 32_768, **at},
    ]
    assert measured_load(model, rows, "gqa", 32_768) == Load.of(model, 32_768)
    with pytest.raises(ValueError, match="bytes of 'gqa' stored and read at 4096"):
        measured_load(model, rows, "gqa", 4096)
    with pytest.raises(ValueError, match="got none"):
        measured_load(model, rows, "gqa", 32_768, of_model="another")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: users_per_device(LOAD, GB, reserve=1.0), "reserve: expected"),
        (lambda: batch_step_seconds(LOAD, CARD, 1, efficiency=0), "efficiency: expected"),
        (lambda: dollars_per_million(LOAD, CARD, 1.0, busy=1.5), "busy: expected"),
        (lambda: LOAD.with_cache_divided(0), "by: expected"),
        (lambda: cost_table(device="Z80"), "device: expected one of"),
    ],
)
def test_bad_parts_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_the_table_and_its_sliders(capsys: pytest.CaptureFixture[str]) -> None:
    rows = cost_table().rows
    assert [row["memory per user"] for row in rows] == ["4 GiB", "1 GiB"]
    assert cost_table(device="T4").rows[0]["dollars per million tokens"] == "does not fit"
    costs()
    assert "dollars per hour each" in capsys.readouterr().out
