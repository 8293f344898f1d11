"""The timetable of rings that we do not have."""

import pytest

from kvlearn.parallel import Layout, Plan
from kvlearn.parallel.layout import ORDERS
from kvlearn.parallel.simulate import (
    LINKS,
    Link,
    Shape,
    hidden_from,
    measured_flop_rate,
    ring_bytes,
    simulate,
    step_pairs,
    ulysses_bytes,
)

SHAPE = Shape(n_heads=32, n_kv_heads=8, head_dim=128)


@pytest.mark.parametrize("order", ORDERS)
def test_pairs_in_closed_form_are_the_plans(order: str) -> None:
    plan = Plan(Layout(48, 4, order))  # type: ignore[arg-type]
    for rank in range(4):
        for step in range(4):
            pairs = step_pairs(order, 4, 12, step, rank)  # type: ignore[arg-type]
            assert pairs == plan.pairs[rank][plan.owner(rank, step)]


def test_moving_is_hidden_from_the_predicted_length_on() -> None:
    link = Link("no latency", 50e9, 0.0, "made up")
    tokens = hidden_from(SHAPE, 400e12, link)
    assert tokens == pytest.approx(8 / 32 * 2 * 400e12 / 50e9)
    enough = simulate(SHAPE, 16, int(2 * tokens), 400e12, link)
    short = simulate(SHAPE, 16, int(tokens / 2), 400e12, link)
    assert enough.exposed < 0.01
    assert short.exposed == pytest.approx(0.5, abs=0.05)
    assert short.total == pytest.approx(short.moving, rel=0.1)


def test_without_a_link_to_wait_for_the_time_is_that_of_the_busiest_rank() -> None:
    link = Link("infinite", 1e30, 0.0, "made up")
    for order in ORDERS:
        table = simulate(SHAPE, 8, 1024, 1e12, link, order)
        plan = Plan(Layout(8 * 1024, 8, order))
        assert table.computing == pytest.approx(SHAPE.flops(max(plan.work)) / 1e12)
        assert table.total >= table.computing * (1 - 1e-9)
    striped, contiguous = (simulate(SHAPE, 8, 1024, 1e12, link, o).total for o in ("striped", "contiguous"))
    assert contiguous > 1.8 * striped


def test_bytes_of_ring_and_ulysses() -> None:
    assert ring_bytes(SHAPE, 4, 1000) == 3 * 2 * 8 * 1000 * 128 * 2
    assert ulysses_bytes(SHAPE, 4, 1000) == 1000 * 128 * (2 * 32 + 2 * 8) * 2 * 3 // 4
    with pytest.raises(ValueError, match="world"):
        ulysses_bytes(SHAPE, 16, 1000)


def test_links_name_their_sources_and_this_machine_is_measured() -> None:
    assert all(link.source and link.bandwidth > 1e9 for link in LINKS)
    assert measured_flop_rate(block=64, repeats=1) > 1e6
