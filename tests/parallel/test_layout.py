"""Who holds which tokens, and which blocks travel how far."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlearn.parallel import Layout, Plan, Rule
from kvlearn.parallel.layout import ORDERS

layouts = st.builds(Layout, st.integers(1, 60), st.integers(1, 6), st.sampled_from(ORDERS))
rules = st.one_of(st.builds(Rule), st.just(Rule(causal=False)), st.builds(Rule, window=st.integers(1, 70)))


@settings(deadline=None)
@given(layouts)
def test_every_token_has_one_slot_and_shards_come_together_again(layout: Layout) -> None:
    positions = [layout.positions(rank) for rank in range(layout.world)]
    assert sorted(int(p) for p in torch.cat(positions) if p >= 0) == list(range(layout.n_tokens))
    assert all(len(p) == layout.per_rank for p in positions)
    x = torch.randn(2, layout.n_tokens, 3)
    parts = [layout.shard(x, rank) for rank in range(layout.world)]
    torch.testing.assert_close(layout.unshard(parts), x, rtol=0, atol=0)
    for part, at in zip(parts, positions, strict=True):
        assert not part[:, at < 0].any()


def test_orders_by_hand() -> None:
    assert Layout(8, 2).positions(1).tolist() == [4, 5, 6, 7]
    assert Layout(8, 2, "striped").positions(1).tolist() == [1, 3, 5, 7]
    assert Layout(8, 2, "zigzag").positions(0).tolist() == [0, 1, 6, 7]
    assert Layout(8, 2, "zigzag").positions(1).tolist() == [2, 3, 4, 5]
    assert Layout(7, 2, "striped").positions(1).tolist() == [1, 3, 5, -1]


@settings(deadline=None)
@given(layouts, rules)
def test_pairs_and_ways_follow_from_the_definition(layout: Layout, rule: Rule) -> None:
    plan, P = Plan(layout, rule), layout.world
    at = [[int(p) for p in layout.positions(rank) if p >= 0] for rank in range(P)]

    def sees(i: int, j: int) -> bool:
        return not rule.causal or (j <= i and (rule.window is None or i - j < rule.window))

    pairs = [[sum(sees(i, j) for i in at[r] for j in at[o]) for o in range(P)] for r in range(P)]
    assert plan.pairs == pairs
    for rank in range(P):
        for owner in range(P):
            step = (rank - owner) % P
            if pairs[rank][owner]:
                assert plan.holds(rank, step)
            if step and plan.holds(rank, step):  # it came, because this rank or one further along needs it
                further = [(owner + s) % P for s in range(step, P)]
                assert any(pairs[r][owner] for r in further)
                assert plan.sends((rank - 1) % P, step - 1)
                assert plan.receives(rank, step - 1)
    assert sum(plan.n_sent(rank) for rank in range(P)) == sum(plan.hops)
    assert sum(plan.n_returned(rank) for rank in range(P)) == sum(hops > 0 for hops in plan.hops)


def test_striped_and_zigzag_balance_the_work_of_contiguous() -> None:
    work = {order: Plan(Layout(1024, 8, order)).work for order in ORDERS}
    assert max(work["contiguous"]) > 14 * min(work["contiguous"])
    for order in ("striped", "zigzag"):
        assert max(work[order]) < 1.02 * min(work[order])
    assert len({sum(each) for each in work.values()}) == 1


def test_a_window_needs_only_neighbours_in_contiguous_order() -> None:
    assert Plan(Layout(64, 8), Rule(window=9)).hops == [1] * 7 + [0]
    assert Plan(Layout(64, 8), Rule(window=10)).hops == [2] * 6 + [1, 0]
    assert Plan(Layout(64, 8)).hops == [7, 6, 5, 4, 3, 2, 1, 0]
    assert Plan(Layout(64, 8, "striped"), Rule(window=9)).hops == [7] * 8


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Layout(0, 2), "n_tokens"),
        (lambda: Layout(4, 0), "world"),
        (lambda: Layout(4, 2, "spiral"), "order"),  # type: ignore[arg-type]
        (lambda: Layout(4, 2).positions(2), "rank"),
        (lambda: Layout(4, 2).shard(torch.zeros(1, 5), 0), "x"),
        (lambda: Layout(4, 2).unshard([torch.zeros(1, 2)]), "parts"),
        (lambda: Layout(4, 2).unshard([torch.zeros(1, 2), torch.zeros(1, 3)]), "parts: .* of rank 1"),
        (lambda: Rule(window=0), "window"),
        (lambda: Rule(causal=False, window=3), "window"),
    ],
)
def test_bad_input_is_named(make, names: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=names):
        make()
