"""The benchmark of blockwise layers and of the ring at a small size."""

from typing import Any

import psutil
import pytest
import torch

from kvlearn.bench import common, ring
from kvlearn.parallel import Layout, Plan, blockwise_layer

RANKS = [
    {
        "output differs by": 1e-7,
        "gradients differ by": 2e-5,
        "bytes sent forward": sent,
        "bytes sent backward": 3 * sent,
        "visible pairs": pairs,
    }
    for sent, pairs in ((1408, 600), (0, 346))
]


def rows(only: str) -> list[dict[str, Any]]:
    found = [row.as_dict() for row in common.run("ring", small=True, only=only)]
    assert all(row["what"] != "missing" for row in found), found
    return found


def test_the_plain_layer_is_the_layer() -> None:
    torch.manual_seed(0)
    layer = ring.new_layer(ring.SMALL)
    x, _ = ring.new_input(40, ring.SMALL)
    torch.testing.assert_close(ring.plain_layer(layer, x), layer(x, None, {}), rtol=0, atol=1e-5)


def test_plain_and_blockwise_are_compared_after_they_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, blockwise, ratio = rows("plain layer")
    assert [plain["who"], blockwise["who"]] == ["plain", "blockwise"]
    assert ratio["measured"] == plain["measured"] / blockwise["measured"] > 1.5
    monkeypatch.setattr(ring, "blockwise_layer", lambda layer, x, block: blockwise_layer(layer, x, block) + x)
    (missing,) = (row.as_dict() for row in common.run("ring", small=True, only="plain layer"))
    assert "blockwise: expected the same output" in missing["missing"]


def test_the_scores_are_what_the_plain_form_costs() -> None:
    plain = rows("plain layer")[0]["measured"]
    assert plain > 2 * ring.SMALL.n_heads * ring.SMALL.compared**2 * 4


@pytest.mark.slow
def test_memory_of_the_long_layer_is_that_of_a_process_and_has_a_bar() -> None:
    memory, seconds = rows("long layer")
    assert (memory["bar"], memory["relation"], memory["pass"]) == (1024**3, "<=", True)
    assert 0 < memory["measured"] < 500e6
    assert seconds["measured"] > 0


def test_the_highest_resident_memory_stays_when_memory_is_given_back() -> None:
    held = torch.ones(50_000_000)
    with_it = psutil.Process().memory_info().rss
    del held
    assert ring.highest_resident() >= with_it - 2**20  # the system counts pages of other threads a bit later
    assert ring.highest_resident() > psutil.Process().memory_info().rss + 100_000_000


def test_rows_of_a_ring_are_what_the_ranks_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "launch", lambda *_, **__: RANKS)
    found = rows("contiguous")
    of = {what: [row for row in found if row["what"] == what] for what in ("work", "busiest", "sent")}
    assert [row["pairs"] for row in of["work"]] == [600, 346]
    assert of["busiest"][0]["measured"] == 600 / 473
    assert of["busiest"][0]["pass"] is None
    plan = Plan(Layout(43, 2))
    block = 2 * 22 * 8 * 4
    assert [row["messages"] for row in of["sent"]] == [plan.n_sent(0), 2, 0, 1] == [1, 2, 0, 1]
    assert [row["bar"] for row in of["sent"]] == [block, 2 * block, 0, block]
    assert [row["pass"] for row in of["sent"]] == [True, False, True, False]
    differences = {row["what"]: row["pass"] for row in found if "difference" in row["what"]}
    assert differences == {"output_difference": True, "gradients_difference": False}
    balanced = [row for row in rows("striped") if row["what"] == "busiest"]
    assert [(row["bar"], row["pass"]) for row in balanced] == [(1.05, False)]


@pytest.mark.slow
@pytest.mark.xdist_group("parallel")
def test_a_ring_of_processes_meets_its_bars() -> None:
    found = rows("striped")
    assert [row["case"] for row in found if row["pass"] is False] == []
    assert sum(row["pairs"] for row in found if row["what"] == "work") == 43 * 44 // 2


def test_the_parts_are_an_order_each_and_two_layers() -> None:
    names = [part.name for part in ring.parts(torch.device("cpu"), small=True)]
    assert names == ["ring, contiguous", "ring, striped", "ring, zigzag", "plain layer", "long layer"]
