"""The benchmark of many users at a size where it takes no time."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from kvlearn.bench import common, serving
from kvlearn.measure import Comparison, results

SECONDS = {"continuous": 1.0, "static": 1.5, "one at a time": 1.9, "shared": 1.0, "not shared": 3.0}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything runs once; the clock shows ``SECONDS``."""

    def interleaved(clocks: Mapping[str, Callable[[], float]], rounds: int) -> Comparison:
        for clock in clocks.values():
            clock()
        return Comparison({name: rounds * (SECONDS[name],) for name in clocks})

    monkeypatch.setattr(serving, "interleaved", interleaved)


def run_small(only: str) -> dict[tuple[str, Any], dict[str, Any]]:
    rows = [row.as_dict() for row in common.run("serving", small=True, only=only)]
    assert all(row["what"] != "missing" for row in rows), rows
    return {(row["what"], row.get("who", row.get("sharing"))): row for row in rows}


def test_continuous_batching_has_its_bar_and_changes_no_text(timed: None) -> None:
    rows = run_small("batching")
    ratio = rows["batching_ratio", "one at a time"]
    assert (ratio["bar"], ratio["measured"], ratio["pass"]) == (2.0, 1.9, False)
    static = rows["batching_ratio", "static"]
    assert (static["bar"], static["measured"]) == (None, 1.5)
    assert (rows["same_text", None]["measured"], rows["same_text", None]["pass"]) == (1.0, True)
    tokens = rows["batching_time", "static"]["tokens"]
    assert rows["batching_rate", "static"]["measured"] == tokens / 1.5


def test_a_shared_system_prompt_needs_fewer_blocks(timed: None) -> None:
    rows = run_small("sharing")
    blocks = {who: rows["sharing_blocks", who]["measured"] for who in ("shared", "not shared")}
    assert blocks["shared"] < blocks["not shared"]
    assert rows["sharing_ratio", "not shared"]["measured"] == 3.0


def test_accounts_come_from_one_recipe_and_isolation_costs_hits() -> None:
    rows = run_small("accounts")
    rates = [rows["hit_rate", sharing]["measured"] for sharing in ("all", "salts", "none")]
    assert rates == sorted(rates, reverse=True)
    assert rates[2] == 0 < rates[1] < rates[0]
    assert rows["waste", "none"]["measured"] < 0.05 < rows["waste_contiguous", "none"]["measured"]
    assert rows["hit_rate", "all"]["mix"]["seed"] == 0


def test_blocks_have_their_bar() -> None:
    row = run_small("blocks")["block_time", None]
    assert (row["bar"], row["pass"], row["n_blocks"]) == (1.0, True, 1000)


def test_the_wait_for_the_first_token_begins_at_the_arrival() -> None:
    """One request per second and steps of at least no time: nobody waits for another at a low rate."""
    model, sizes = serving.base(torch.device("cpu")), serving.SMALL
    work = serving.work_of(sizes)
    waits = serving.poisson(serving.new_engine(model, sizes), work, 1e-3, 6)
    crowded = serving.poisson(serving.new_engine(model, sizes), work, 1e6, 6)
    assert len(waits) == len(crowded) == 6
    assert min(waits) > 0
    assert max(crowded) > min(waits)  # the sixth waits for a place


@pytest.mark.slow
@pytest.mark.parametrize("part", ["first token", "leak", "noise", "million"])
def test_the_other_parts_have_numbers(part: str) -> None:
    assert run_small(part)


def test_the_recorded_waits_are_shown_though_they_have_no_quartiles() -> None:
    (recorded, *_) = results.load("serving")
    table = common.recorded_table(recorded, "first_token")
    assert sum("first token at" in row[""] for row in table.rows) == 4
