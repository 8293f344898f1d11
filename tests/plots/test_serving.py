"""The pictures of chapter 09 draw what the pool, the simulation and the attacks say."""

from dataclasses import asdict
from typing import Any

import pytest
from matplotlib.patches import Rectangle

from kvlearn import plots
from kvlearn.plots.serving import FREE, BlockState, Kind, block_states, wilson
from kvlearn.serving import Attack, BlockPool, Mix, Noise, Tenant, simulate


def attack_row(channel: str, salted: bool, fields: float, trials: int = 20) -> dict[str, Any]:
    """As ``kvlearn bench serving`` keeps it."""
    found = Attack(trials, fields, fields**3, 0.1, 33, 0.5)
    return {"what": "leak_fields", "measured": fields, "channel": channel, "salted": salted, **asdict(found)}


def noise_row(epsilon: float, probes: int, success: float, saved: float = 0.002) -> dict[str, Any]:
    """As ``kvlearn bench serving`` keeps it."""
    found = Noise(success, 0.1, 3.9 * saved / epsilon, saved)
    return {"what": "noise_success", "epsilon": epsilon, "probes": probes, **asdict(found)}


ATTACKS = [
    attack_row(*attacked)
    for attacked in (
        ("hits", False, 1.0),
        ("hits", True, 0.1),
        ("time", False, 0.8),
        ("time", True, 0.05),
    )
]
DELAYS = [
    noise_row(epsilon, probes, min(1.0, 0.1 * epsilon * probes + 0.1))
    for epsilon in (10.0, 1.0, 0.1)
    for probes in (1, 10, 100)
]


def use(pool: BlockPool, tenant: str, tokens: list[int]) -> Any:
    """A request of ``tenant`` whose ``tokens`` are all computed."""
    table = pool.open(tenant)
    found = pool.match(table, tokens)
    pool.reserve(table, len(tokens) - found)
    pool.commit(table, tokens[found:])
    return table


def panel(picture: plots.Picture) -> Any:
    return picture.figure.axes[0]


def cells(picture: plots.Picture) -> list[Any]:
    return [patch for patch in panel(picture).patches if isinstance(patch, Rectangle)]


def legend(picture: plots.Picture) -> list[str]:
    (box,) = picture.figure.legends
    return [text.get_text() for text in box.get_texts()]


# The pool


def test_states_follow_a_block_from_free_to_private_shared_cached_and_another_owner() -> None:
    pool = BlockPool(3, 2, (Tenant("ann"), Tenant("bob")))
    assert block_states(pool) == 3 * [FREE]
    first = use(pool, "ann", [1, 2, 3])
    assert block_states(pool) == 2 * [BlockState("private", "ann")] + [FREE]
    second = use(pool, "bob", [1, 2, 4])
    shared = BlockState("shared", "ann")
    assert block_states(pool) == [shared, BlockState("private", "ann"), BlockState("private", "bob")]
    pool.close(first)
    assert block_states(pool) == [BlockState("private", "ann"), FREE, BlockState("private", "bob")]
    pool.close(second)
    assert block_states(pool) == [BlockState("cached", "ann"), FREE, FREE]
    use(pool, "bob", [5, 6, 7, 8, 9])
    assert block_states(pool) == 3 * [BlockState("private", "bob")]


def test_equal_states_in_neighbouring_steps_are_one_stretch() -> None:
    mine, cached = BlockState("private", "ann"), BlockState("cached", "ann")
    picture = plots.block_pool([[mine, FREE], [mine, FREE], [cached, mine]])
    found = [
        tuple(map(round, (cell.get_x(), cell.get_width(), cell.get_y() + cell.get_height() / 2)))
        for cell in cells(picture)
    ]
    assert found == [(0, 2, 0), (2, 1, 0), (2, 1, 1)]


def test_kinds_differ_in_height_or_fill_and_tenants_in_colour_and_hatch() -> None:
    kinds: list[Kind] = ["shared", "private", "cached"]
    frame = [BlockState(kind, name) for kind in kinds for name in ("ann", "bob")]
    drawn = cells(plots.block_pool([frame]))
    looks = {(cell.get_height(), cell.get_facecolor()[3] > 0, cell.get_hatch()) for cell in drawn}
    assert len(looks) == len(frame)
    assert len({cell.get_facecolor() for cell in drawn[:2]}) == 2


def test_counts_are_those_of_the_frames_and_the_alt_text_says_them() -> None:
    mine = BlockState("private", "ann")
    picture = plots.block_pool([[mine, mine, FREE], [mine, FREE, FREE]])
    assert picture.data["counts"] == {mine: [2, 1], FREE: [1, 2]}
    assert "private, ann: at most 2, 1 at the end" in picture.alt
    assert "free: at most 2, 2 at the end" in picture.alt


def test_the_legend_names_what_is_drawn_and_no_more() -> None:
    mine = BlockState("private", "ann")
    assert legend(plots.block_pool([[mine]])) == ["ann", "narrow: in one table"]
    assert legend(plots.block_pool([[mine, BlockState("cached", "bob"), FREE]])) == [
        *("ann", "bob", "narrow: in one table", "outline: cached, in no table", "nothing: free")
    ]


def test_frames_of_different_pools_are_refused() -> None:
    with pytest.raises(ValueError, match=r"frames: expected 1 blocks in each, got \[1, 2\]"):
        plots.block_pool([[FREE], [FREE, FREE]])
    with pytest.raises(ValueError, match=r"len\(frames\): expected at least 1"):
        plots.block_pool([])
    many = [BlockState("private", str(i)) for i in range(5)]
    with pytest.raises(ValueError, match="tenants: expected at most 4"):
        plots.block_pool([many])


# Waste


def test_waste_is_that_of_the_simulation_and_grows_with_the_blocks() -> None:
    reports = {page: simulate(Mix(), 60, 2**16 // page, page=page, sharing="none") for page in (64, 4, 16)}
    picture = plots.waste(reports)
    assert picture.data["waste"] == {page: reports[page].waste for page in (4, 16, 64)}
    assert picture.data["contiguous"] == reports[4].waste_contiguous
    shares = list(picture.data["waste"].values())
    assert shares == sorted(shares)
    dashed, line = panel(picture).lines
    assert list(line.get_ydata()) == shares
    assert set(dashed.get_ydata()) == {reports[4].waste_contiguous}
    assert f"{reports[16].waste:.1%} with blocks of 16" in picture.alt


# The leak


def test_bars_are_the_recovered_fields_and_the_line_is_chance() -> None:
    picture = plots.leak(ATTACKS)
    assert {key: bar[0] for key, bar in picture.data["bars"].items()} == {
        ("hits", False): 1.0,
        ("hits", True): 0.1,
        ("time", False): 0.8,
        ("time", True): 0.05,
    }
    assert [bar.get_height() for bar in cells(picture)] == [1.0, 0.1, 0.8, 0.05]
    (chance,) = [line for line in panel(picture).lines if line.get_linestyle() == "--"]
    assert set(chance.get_ydata()) == {0.1}
    assert "by time, no salt: 80%" in picture.alt
    assert legend(picture) == ["no salt", "a salt for each tenant"]


def test_one_attack_is_a_picture_too_and_other_rows_are_passed_over() -> None:
    other = {"what": "block_time", "measured": 0.1}
    picture = plots.leak([other, ATTACKS[1]])
    assert legend(picture) == ["a salt for each tenant"]
    with pytest.raises(ValueError, match="rows of attacks: expected at least 1"):
        plots.leak([other])


def test_wilsons_interval_solves_its_equation_and_stays_within_0_and_1() -> None:
    for share, n in ((0.0, 20), (1.0, 20), (0.35, 20), (0.1, 7)):
        low, high = wilson(share, n)
        assert 0 <= low <= share <= high <= 1
        for p in (low, high):
            if 0 < p < 1:
                assert (share - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n)
    assert wilson(0.5, 40)[1] < wilson(0.5, 20)[1]


# Noise


def test_curves_are_success_over_the_delay_in_units_of_what_a_hit_saves() -> None:
    picture = plots.noise_and_leak(DELAYS)
    curves = picture.data["curves"]
    assert list(curves) == [1, 10, 100]
    assert [epsilon for *_, epsilon in curves[1]] == [10.0, 1.0, 0.1]
    assert [delay for delay, *_ in curves[1]] == pytest.approx([0.39, 3.9, 39])
    assert [share for _, share, _ in curves[100]] == [1.0, 1.0, 1.0]
    assert legend(picture) == ["1 answer", "10 answers", "100 answers"]
    assert "1 answer: 100% at 0.4 (ε = 10), 20% at 3.9 (ε = 1)" in picture.alt


def test_no_two_lines_of_noise_have_a_colour_or_a_marker_in_common() -> None:
    rows = [noise_row(1.0, probes, 0.5) for probes in (1, 2, 5, 10, 100)]
    lines = [line for line in panel(plots.noise_and_leak(rows)).lines if line.get_marker() != "None"]
    assert len(lines) == 5
    assert len({line.get_color() for line in lines}) == len({line.get_marker() for line in lines}) == 5


def test_noise_of_a_hit_that_saves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="saved: expected hits that are faster"):
        plots.noise_and_leak([noise_row(1.0, 1, 0.1, saved=0.0)])
    with pytest.raises(ValueError, match="rows of noise: expected at least 1"):
        plots.noise_and_leak(ATTACKS)


@pytest.mark.parametrize(
    "draw",
    [lambda: plots.leak(ATTACKS), lambda: plots.noise_and_leak(DELAYS)],
    ids=["leak", "noise_and_leak"],
)
def test_the_ground_is_transparent_and_the_same_data_give_the_same_file(draw: Any) -> None:
    from io import BytesIO

    from matplotlib.image import imread

    png = draw().png()
    assert png == draw().png()
    assert imread(BytesIO(png))[0, 0, 3] == 0
