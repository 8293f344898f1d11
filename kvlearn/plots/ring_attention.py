"""Pictures of chapter 08: who holds whose block when, and when a rank waits for a message."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from kvlearn import validate
from kvlearn.parallel import Plan
from kvlearn.parallel.simulate import LINKS, Link, Shape, hidden_from, simulate
from kvlearn.plots.picture import COLOURS, Picture, drawing, line_styles

WORK, SENT, EDGE = COLOURS["full"], COLOURS["sliding"], "#8a8a8a"
# A triangle that points down and to the right: to the next rank, in the next step.
ARROW: tuple[int, Literal[0], int] = (3, 0, -135)
MOST_COLOUR = 0.7  # of a cell in which all pairs are visible: black text stays readable
LENGTHS = [2**power for power in range(8, 21)]


def timetable(plans: Mapping[str, Plan]) -> Picture:
    """Whose block every rank holds in every step, how much work that is, and whether it is sent on.

    One panel per plan: ranks down, steps across, as ``plan.rows()`` says. A cell is the darker the more of
    its pairs are visible; an arrow at its corner means that the block goes to the next rank.
    """
    validate.positive("len(plans)", len(plans))
    rows = {name: plan.rows() for name, plan in plans.items()}
    world = max(plan.layout.world for plan in plans.values())
    size = (1.1 + 3.3 * len(plans), 0.62 * world + 1.7)
    with drawing(1, len(plans), size=size, squeeze=False) as (figure, axes):
        for panel, (name, plan) in zip(axes.flat, plans.items(), strict=True):
            for row in rows[name]:
                _cell(panel, row, row["pairs"] / plan.layout.per_rank**2)
            P = plan.layout.world
            panel.set(xlim=(-0.05, plan.n_steps + 0.02), ylim=(P, -0.05), title=name)
            panel.set_xticks(
                [s + 0.46 for s in range(plan.n_steps)], [f"step {s}" for s in range(plan.n_steps)]
            )
            panel.set_yticks([r + 0.42 for r in range(P)], [f"rank {r}" for r in range(P)])
            panel.tick_params(length=0, labelsize=8)
            panel.grid(False)
            panel.spines[:].set_visible(False)
        shades = {1.0: "all pairs visible", 0.5: "half of them"}
        if any(row["pairs"] == 0 for each in rows.values() for row in each):
            shades[0.0] = "none: no work"
        handles: list[Any] = [Patch(fc=_mixed(part), ec=EDGE, label=label) for part, label in shades.items()]
        handles.append(Line2D([], [], color=SENT, marker=ARROW, ls="", label="sent to the next rank"))
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    told = "; ".join(
        f"{name}: {plan.n_steps} steps, visible pairs of rank 0 to {plan.layout.world - 1} "
        f"{', '.join(f'{n:,}' for n in plan.work)}"
        for name, plan in plans.items()
    )
    alt = f"Which block of keys each rank holds in each step, with its visible pairs. {told}."
    return Picture(figure, alt, {"rows": rows, "work": {name: plan.work for name, plan in plans.items()}})


def _cell(axes: Axes, row: Mapping[str, Any], share: float) -> None:
    """One rank in one step; ``share`` of the pairs are visible."""
    x, y = row["step"], row["rank"]
    axes.add_patch(Rectangle((x, y), 0.92, 0.84, fc=_mixed(share), ec=EDGE, lw=0.8))
    style: dict[str, Any] = {"ha": "center", "va": "center", "color": "black"}
    axes.text(x + 0.46, y + 0.28, f"block {row['owner']}", fontsize=8, **style)
    axes.text(x + 0.46, y + 0.62, f"{row['pairs']:,}", fontsize=7, **style)
    if row["sends"]:
        axes.plot([x + 0.92], [y + 0.84], color=SENT, marker=ARROW, ms=8, ls="", clip_on=False)


def _mixed(share: float) -> tuple[float, ...]:
    """The colour of work mixed with white, opaque: the same in both themes."""
    share *= MOST_COLOUR
    return tuple(share * part + 1 - share for part in to_rgb(WORK))


def exposed_communication(
    shape: Shape,
    flop_rate: float,
    *,
    world: int = 8,
    lengths: Sequence[int] = LENGTHS,
    links: Sequence[Link] = LINKS,
) -> Picture:
    """The share of its time in which the busiest rank waits for a message, over the tokens per rank.

    From ``simulate``, in striped order, with a device of ``flop_rate`` FLOP/s. The dotted lines are at
    ``hidden_from``, where the formula says that moving takes as long as computing.
    """
    validate.positive("len(links)", len(links))
    exposed = {
        link.name: [(n, simulate(shape, world, n, flop_rate, link).exposed) for n in lengths]
        for link in links
    }
    limits = {link.name: hidden_from(shape, flop_rate, link) for link in links}
    with drawing(size=(7.5, 3.8)) as (figure, axes):
        for name, style in line_styles(exposed, family="full").items():
            axes.plot(*zip(*exposed[name], strict=True), lw=1.6, label=name, **style)
            axes.axvline(limits[name], color=style["color"], ls=":", lw=1.2)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(_tokens))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set(xlabel="tokens per device", ylabel="the busiest rank waits", ylim=(-0.03, 1.03))
        axes.legend()
    told = "; ".join(
        f"{name}: {points[0][1]:.0%} at {points[0][0]:,} and {points[-1][1]:.0%} at {points[-1][0]:,}, "
        f"formula {limits[name]:,.0f}"
        for name, points in exposed.items()
    )
    alt = f"The share of time that {world} devices in a ring wait, over the tokens per device. {told}."
    return Picture(figure, alt, {"exposed": exposed, "hidden_from": limits})


def _tokens(n: float, _: int) -> str:
    """A power of two as a reader says it."""
    return f"{n / 2**20:g}M" if n >= 2**20 else f"{n / 1024:g}K" if n >= 1024 else f"{n:g}"
