"""The pictures of chapter 08 show what the plans and the simulation say."""

import pytest
from matplotlib.patches import Rectangle

from kvlearn import plots
from kvlearn.parallel import Layout, Plan, Rule
from kvlearn.parallel.simulate import LINKS, Link, Shape, hidden_from, simulate
from kvlearn.plots.ring_attention import MOST_COLOUR

PLANS = {order: Plan(Layout(16, 4, order)) for order in ("contiguous", "striped")}
SHAPE = Shape(n_heads=8, n_kv_heads=2, head_dim=16)


def test_a_cell_per_row_of_the_plan_with_its_block_and_its_pairs() -> None:
    picture = plots.timetable(PLANS)
    for panel, (name, plan) in zip(picture.figure.axes, PLANS.items(), strict=True):
        rows = plan.rows()
        assert picture.data["rows"][name] == rows
        cells = [patch for patch in panel.patches if isinstance(patch, Rectangle)]
        assert [cell.get_xy() for cell in cells] == [(row["step"], row["rank"]) for row in rows]
        texts = [text.get_text() for text in panel.texts]
        assert texts == [t for row in rows for t in (f"block {row['owner']}", f"{row['pairs']:,}")]


def test_a_cell_is_the_darker_the_more_pairs_are_visible() -> None:
    cells = plots.timetable(PLANS).figure.axes[0].patches
    shares = [row["pairs"] / 16 for row in PLANS["contiguous"].rows()]
    reds = [cell.get_facecolor()[0] for cell in cells]  # the colour of work has no red
    assert reds == pytest.approx([1 - MOST_COLOUR * share for share in shares])
    assert set(shares) == {10 / 16, 1}  # the diagonal block, and all earlier ones


def test_an_arrow_where_a_block_is_sent_on_and_nowhere_else() -> None:
    plan = Plan(Layout(16, 4), Rule(window=5))
    (panel,) = plots.timetable({"window": plan}).figure.axes
    arrows = [(round(line.get_xdata()[0] - 0.92), round(line.get_ydata()[0] - 0.84)) for line in panel.lines]
    assert arrows == [(row["step"], row["rank"]) for row in plan.rows() if row["sends"]]
    assert len(arrows) == 3


def test_the_alt_text_says_the_work_of_every_rank() -> None:
    picture = plots.timetable(PLANS)
    assert "contiguous: 4 steps, visible pairs of rank 0 to 3 10, 26, 42, 58" in picture.alt
    assert picture.data["work"]["striped"] == [28, 32, 36, 40]


def test_the_lines_are_the_simulation_and_the_dots_the_formula() -> None:
    lengths = (64, 4096)
    picture = plots.exposed_communication(SHAPE, 1e12, world=3, lengths=lengths)
    curves, dotted = picture.figure.axes[0].lines[::2], picture.figure.axes[0].lines[1::2]
    for link, curve, limit in zip(LINKS, curves, dotted, strict=True):
        expected = [simulate(SHAPE, 3, n, 1e12, link).exposed for n in lengths]
        assert list(curve.get_ydata()) == expected
        assert [share for _, share in picture.data["exposed"][link.name]] == expected
        assert limit.get_xdata()[0] == hidden_from(SHAPE, 1e12, link)


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match=r"len\(plans\)"):
        plots.timetable({})
    with pytest.raises(ValueError, match=r"len\(links\)"):
        plots.exposed_communication(SHAPE, 1e12, links=list[Link]())
