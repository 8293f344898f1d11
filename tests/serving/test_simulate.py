"""The simulation: the recipe is repeatable, and its report is what the accounts say."""

import itertools

import pytest

from kvlearn.serving import Mix, simulate

MIX = Mix(n_tenants=3, n_public=2, system_prompt=64, question=12, answer=16, max_len=256)


def test_a_recipe_gives_the_same_requests_every_time() -> None:
    first, again = (list(MIX.requests(50)) for _ in range(2))
    assert first == again
    assert first != list(Mix(seed=1).requests(50))
    assert all(a[0] < b[0] for a, b in itertools.pairwise(first))
    assert all(len(prompt) > 0 and len(prompt) + len(answer) <= 256 for _, _, prompt, answer in first)
    assert {tenant for _, tenant, _, _ in first} == {0, 1, 2}


def test_isolation_costs_hits_and_memory() -> None:
    reports = {sharing: simulate(MIX, 300, 200, 8, sharing) for sharing in ("none", "all", "salts", "quotas")}
    assert reports["none"].hit_rate == 0
    assert reports["all"].hit_rate > reports["salts"].hit_rate > 0.3
    assert reports["none"].blocks == reports["none"].unshared
    assert reports["all"].blocks < reports["salts"].blocks < reports["none"].blocks
    assert reports["quotas"].waited > reports["salts"].waited


def test_waste_is_a_part_of_a_block_and_not_of_a_sequence() -> None:
    report = simulate(MIX, 300, 400, 8, "none")
    assert report.waste < 8 / 64
    assert report.waste_contiguous > 0.4
    assert simulate(MIX, 300, 400, 1, "none").waste == pytest.approx(0, abs=1e-9)


def test_requests_wait_for_blocks_and_none_is_lost() -> None:
    report = simulate(MIX, 300, 32, 8, "all")
    assert report.waited > 0.1
    assert report.peak <= 32
    assert report.requests == 300
    with pytest.raises(ValueError, match="n_blocks: expected at least 32, got 31"):
        simulate(MIX, 300, 31, 8)


def test_sizes_of_a_simulation_are_validated() -> None:
    for arguments, message in (
        ((0, 200), "n_requests: expected at least 1, got 0"),
        ((1, 200, 0), "page: expected at least 1, got 0"),
        ((1, 2, 8, "quotas"), "n_blocks // n_tenants: expected at least 32, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            simulate(MIX, *arguments)
