"""Pictures of chapter 09: who has which block, what blocks waste, what a shared cache tells, and noise."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from kvlearn import validate
from kvlearn.plots.picture import COLOURS, Line, Picture, drawing, line_styles
from kvlearn.serving import BlockPool, Report

Row = Mapping[str, Any]
Kind = Literal["shared", "private", "cached", "free"]

# A tenant has a colour and a hatch, so that no colour is needed to tell tenants apart.
TENANT_STYLES = (
    (COLOURS["full"], ""),
    (COLOURS["shared"], "////"),
    (COLOURS["compressed"], "...."),
    (COLOURS["sparse"], "xxxx"),
)
KIND_HEIGHTS = {"shared": 0.9, "private": 0.5, "cached": 0.5}  # of a row; a cached block is an outline
KIND_LABELS = {
    "shared": "wide: in several tables",
    "private": "narrow: in one table",
    "cached": "outline: cached, in no table",
}
PROBES = (  # the lines of one answer, of more, and of most
    Line(COLOURS["full"], "-", "o"),
    Line(COLOURS["shared"], "-.", "^"),
    Line(COLOURS["sliding"], "--", "s"),
)
Z = 1.959964  # of a 95% interval


class BlockState(NamedTuple):
    """The use of a block, and the tenant that it counts against; a free block is nobody's."""

    kind: Kind
    tenant: str | None


FREE = BlockState("free", None)


def block_states(pool: BlockPool) -> list[BlockState]:
    """Every block of ``pool`` as it is now: in several tables, in one, cached and in none, or free."""
    states = []
    for references, owner, entry in zip(pool.references, pool.owners, pool.entries, strict=True):
        if references:
            states.append(BlockState("shared" if references > 1 else "private", owner))
        else:
            states.append(FREE if entry is None else BlockState("cached", owner))
    return states


def block_pool(frames: Sequence[Sequence[BlockState]], *, title: str = "") -> Picture:
    """One row per block, one column per element of ``frames``: each is ``block_states`` after one step.

    The colour is that of the tenant that computed the block. ``data["counts"]`` has the blocks of each kind
    and tenant, frame by frame.
    """
    validate.positive("len(frames)", len(frames))
    n_blocks = validate.positive("blocks", len(frames[0]))
    if any(len(frame) != n_blocks for frame in frames):
        raise ValueError(f"frames: expected {n_blocks} blocks in each, got {[len(f) for f in frames]}")
    found = dict.fromkeys(state for frame in frames for state in frame)
    tenants = sorted({state.tenant for state in found if state.tenant is not None})
    validate.at_most("tenants", len(tenants), len(TENANT_STYLES), "the hatches there are")
    styles = dict(zip(tenants, TENANT_STYLES, strict=False))
    size = (min(0.22 * len(frames) + 2.4, 10.4), 0.17 * n_blocks + 1.3)
    with drawing(size=size) as (figure, axes):
        for block in range(n_blocks):
            for start, stop, state in _runs([frame[block] for frame in frames]):
                if state.tenant is not None:
                    axes.add_patch(_cell(state.kind, *styles[state.tenant], start, stop, block))
        axes.set(xlim=(0, len(frames)), ylim=(n_blocks - 0.4, -0.6))
        axes.set_xlabel("steps of the engine")
        axes.set_ylabel("block")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(title)
        axes.grid(False)
        handles = [Patch(fc=c, ec="white", lw=0, hatch=h, label=name) for name, (c, h) in styles.items()]
        for kind, label in KIND_LABELS.items():
            if any(state.kind == kind for state in found):
                fill = "none" if kind == "cached" else COLOURS["memory"]
                handles.append(Patch(fc=fill, ec=COLOURS["memory"], label=label))
        if FREE in found:
            handles.append(Patch(fc="none", ec="none", label="nothing: free"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    counts = {state: [list(frame).count(state) for frame in frames] for state in found}
    told = "; ".join(
        f"{state.kind}{f', {state.tenant}' if state.tenant else ''}: at most {max(numbers)}, "
        f"{numbers[-1]} at the end"
        for state, numbers in counts.items()
    )
    alt = f"The {n_blocks} blocks of a pool over {len(frames)} steps, a row for each block. Blocks {told}."
    return Picture(figure, alt, {"frames": [list(frame) for frame in frames], "counts": counts})


def _runs(states: Sequence[BlockState]) -> Iterator[tuple[int, int, BlockState]]:
    """Start, stop and state of stretches of equal states."""
    start = 0
    for state, same in groupby(states):
        stop = start + len(list(same))
        yield start, stop, state
        start = stop


def _cell(kind: Kind, colour: str, hatch: str, start: int, stop: int, block: int) -> Rectangle:
    """A stretch of time of one block."""
    height = KIND_HEIGHTS[kind]
    box = ((start + 0.04, block - height / 2), stop - start - 0.08, height)
    if kind == "cached":
        return Rectangle(*box, fc="none", ec=colour, lw=1.2, hatch=hatch)
    return Rectangle(*box, fc=colour, ec="white", lw=0, hatch=hatch)


def waste(reports: Mapping[int, Report]) -> Picture:
    """The share of the reserved places that is empty, over the tokens in a block; dashed, contiguous caches.

    ``reports``: what ``simulate`` says of one mix of requests, by the page size of the pool.
    """
    validate.positive("len(reports)", len(reports))
    pages = sorted(reports)
    empty = {page: reports[page].waste for page in pages}
    contiguous = reports[pages[0]].waste_contiguous
    with drawing(size=(7.5, 3.4)) as (figure, axes):
        axes.axhline(contiguous, color=COLOURS["mistake"], ls="--", lw=1.6)
        _above(axes, 0.02, contiguous, f"a contiguous cache of the longest length for each: {contiguous:.1%}")
        axes.plot(pages, list(empty.values()), "-o", color=COLOURS["full"])
        for page, share in empty.items():
            axes.annotate(f"{share:.1%}", (page, share), (0, 7), textcoords="offset points", ha="center")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(pages))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, 1.25 * max(contiguous, *empty.values()))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("tokens in a block, logarithmic")
        axes.set_ylabel("empty places")
    told = ", ".join(f"{share:.1%} with blocks of {page}" for page, share in empty.items())
    alt = (
        f"The share of the reserved cache that is empty, {reports[pages[0]].requests:,} requests: {told}; "
        f"{contiguous:.1%} where each request has a contiguous cache of the longest length."
    )
    return Picture(figure, alt, {"waste": empty, "contiguous": contiguous})


def leak(rows: Sequence[Row]) -> Picture:
    """Secret fields that the attacker recovered, without and with a salt, and chance.

    ``rows`` have "channel", "salted" and the numbers of an ``Attack``, as ``kvlearn bench serving`` records
    them in its rows of the leak. Bars are 95% intervals (Wilson, 1927) that count every trial once, since
    the fields of one trial depend on each other.
    """
    found = {(row["channel"], bool(row["salted"])): row for row in rows if "salted" in row}
    validate.positive("rows of attacks", len(found))
    channels = list(dict.fromkeys(channel for channel, _ in found))
    chance = next(iter(found.values()))["chance"]
    bars = {key: (row["fields"], *wilson(row["fields"], row["trials"])) for key, row in found.items()}
    styles: dict[bool, dict[str, Any]] = {
        False: {"fc": COLOURS["sliding"], "label": "no salt"},
        True: {"fc": COLOURS["compressed"], "hatch": "////", "label": "a salt for each tenant"},
    }
    with drawing(size=(7.0, 3.4)) as (figure, axes):
        for (channel, salted), (share, low, high) in bars.items():
            x = channels.index(channel) + (0.2 if salted else -0.2)
            axes.add_patch(Rectangle((x - 0.17, 0), 0.34, share, ec="white", lw=0, **styles[salted]))
            error = [[share - low], [high - share]]
            axes.errorbar(x, share, error, color="#8a8a8a", capsize=4, elinewidth=1.4, marker="")
            axes.text(x, high + 0.02, f"{share:.0%}", ha="center", va="bottom")
        axes.axhline(chance, color=COLOURS["memory"], ls="--", lw=1.4)
        axes.text(len(channels) - 0.22, chance + 0.01, "chance", ha="right", va="bottom")
        axes.set(xlim=(-0.55, len(channels) - 0.2), ylim=(0, 1.15))
        axes.set_xticks(range(len(channels)), [f"by {channel}" for channel in channels])
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylabel("fields recovered")
        axes.tick_params(axis="x", length=0)
        axes.grid(axis="x", visible=False)
        drawn = sorted({salted for _, salted in bars})
        handles = [Patch(ec="white", lw=0, **styles[salted]) for salted in drawn]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    told = "; ".join(
        f"by {channel}, {'salted' if salted else 'no salt'}: {share:.0%} [{low:.0%}, {high:.0%}]"
        for (channel, salted), (share, low, high) in bars.items()
    )
    alt = f"Secret fields that another tenant recovered from the prefix cache. {told}. Chance: {chance:.0%}."
    return Picture(figure, alt, {"bars": bars, "chance": chance})


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95% interval of a probability, of ``n`` independent trials with the mean ``share``.

    (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n). Source: Wilson, "Probable Inference, the Law of
    Succession, and Statistical Inference" (1927).
    """
    validate.positive("n", n)
    centre, scale = share + Z**2 / (2 * n), 1 + Z**2 / n
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)


def noise_and_leak(rows: Sequence[Row]) -> Picture:
    """Fields that the attack by time still recovers over the mean delay that hides them, and chance.

    ``rows`` have "epsilon" (of one answer), "probes" (answers for each guess) and the numbers of a ``Noise``,
    as ``kvlearn bench serving`` records them. Delays are in units of what a hit saves: to the right of 1, a
    hit with its delay takes longer than a miss without. Raises ValueError where a hit saves nothing.
    """
    found = {(row["probes"], row["epsilon"]): row for row in rows if "probes" in row}
    validate.positive("rows of noise", len(found))
    if any(row["saved"] <= 0 for row in found.values()):
        raise ValueError("saved: expected hits that are faster than misses, got no difference")
    chance = next(iter(found.values()))["chance"]
    curves: dict[int, list[tuple[float, float, float]]] = {}
    for (probes, epsilon), row in sorted(found.items(), key=lambda item: (item[0][0], -item[0][1])):
        curves.setdefault(probes, []).append((row["delay"] / row["saved"], row["success"], epsilon))
    labels = {probes: f"{probes} answer{'s' if probes > 1 else ''}" for probes in curves}
    styles = line_styles(labels.values(), fixed=dict(zip(labels.values(), PROBES, strict=False)))
    with drawing(size=(7.5, 3.8)) as (figure, axes):
        axes.axvline(1, color=COLOURS["memory"], lw=1)
        axes.axhline(chance, color=COLOURS["memory"], ls="--", lw=1.4)
        for probes, points in curves.items():
            delays, shares, _ = zip(*points, strict=True)
            axes.plot(delays, shares, label=labels[probes], lw=1.8, **styles[labels[probes]])
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        for delay, epsilon in dict.fromkeys((x, e) for line in curves.values() for x, _, e in line):
            axes.text(delay, 1.07, f"ε = {epsilon:g}", ha="center", fontsize=8)
        axes.text(1, 0.02, " what a hit saves", fontsize=8)
        _above(axes, 0.01, chance, "chance")
        axes.set_ylim(0, 1.16)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylabel("fields recovered")
        axes.set_xlabel("mean delay / what a hit saves, logarithmic")
        figure.legend(loc="outside right center")
    told = "; ".join(
        f"{labels[probes]}: "
        + ", ".join(f"{share:.0%} at {delay:.1f} (ε = {epsilon:g})" for delay, share, epsilon in points)
        for probes, points in curves.items()
    )
    alt = (
        "Fields recovered by time in spite of random delays, over the mean delay in units of what a hit "
        f"saves. {told}. Chance: {chance:.0%}."
    )
    return Picture(figure, alt, {"curves": curves, "chance": chance})


def _above(axes: Axes, left: float, y: float, text: str) -> None:
    """Words on a horizontal line; ``left`` is a share of the width."""
    across = axes.get_yaxis_transform()
    axes.annotate(text, (left, y), (0, 3), textcoords="offset points", fontsize=8, xycoords=across)
