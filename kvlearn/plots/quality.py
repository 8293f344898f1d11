"""Pictures of chapter 10: what compression costs in quality, from the rows of ``kvlearn study quality``.

Each draws the rows that there are, and names the designs that have not run. Runs that diverged are in no
mean; the design that they belong to says how many. Without any row, the picture says "not yet run".
"""

import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from kvlearn import validate
from kvlearn.measure.units import format_bytes
from kvlearn.plots.losses import conversion_curves
from kvlearn.plots.picture import COLOURS, MECHANISMS, Line, Picture, drawing, line_styles
from kvlearn.study.base import TRAINING
from kvlearn.study.quality import (
    BUDGETS,
    Compared,
    best_recall,
    compare,
    final_runs,
    paired_values,
    summarise,
    visible_difference,
)
from kvlearn.study.quality.plan import CONVERTED, RECALL_DESIGNS, TASKS, unallocated

Row = Mapping[str, Any]
TRAINED_ON = "sympy"  # the text of the corpus, of those on which conversions are evaluated

# A design has the colour of its family, and the family one marker, so that no colour is needed. Where a
# figure tells the designs of a family apart, the first has the colour.
FAMILIES = {
    "full": ("full",),
    "shared": ("gqa-4x", "gqa-2x", "gqa-8x", "cross-layer"),
    "compressed": ("mhc-4x", "mhc-8x", "mhc-transformer-4x", "mhc-transformer-8x", "mla-4x"),
    "sliding": ("window", "window-no-sinks"),
    "sparse": ("bigbird", "longformer", "moba", "nsa"),
    "linear": ("gated-delta", "mamba2", "linear", "kda", "mamba", "rwkv7"),
    "hybrid": ("hybrid", "hybrid-window-mhc", "hybrid-conv"),
}
FAMILY = {design: family for family, designs in FAMILIES.items() for design in designs}
MARKERS = dict(zip(FAMILIES, "os^DvP*", strict=True))
FAMILY_NAMES = {
    "full": "full attention",
    "shared": "shared heads or layers",
    "compressed": "latents",
    "sliding": "window",
    "sparse": "sparse",
    "linear": "a state",
    "hybrid": "hybrid",
}
# Of recall. A window and the gated delta rule have one colour elsewhere in the course; here they meet, and
# the second takes that of the delta rule. The window and linear attention have one marker elsewhere.
RECALL_LINES = {
    "full": MECHANISMS["full"],
    "short-conv": MECHANISMS["short_conv"],
    "window": MECHANISMS["window"],
    "linear": Line(COLOURS["linear"], "-.", "^"),
    "gated-delta": Line(COLOURS["shared"], ":", "D"),
    "mamba2": MECHANISMS["mamba2"],
    "hybrid-linear": Line(COLOURS["hybrid"], "-", "P"),
}


class Claim(NamedTuple):
    """The article's numbers for a method: the share of the cache that it saves, and how much worse it gets.

    Ranges, as shares of 1. ``of`` is what gets worse, as far as the article says it; a loss in percent is
    read here as a rise of the perplexity per byte.
    """

    name: str
    saved: tuple[float, float]
    worse: tuple[float, float]
    of: str


CLAIMS = (
    Claim("KV sharing, 4x", (0.75, 0.75), (0.0, 0.005), "not said"),
    Claim("MHC, 8x", (0.875, 0.875), (0.01, 0.02), "perplexity, long context"),
    Claim("window, 8K tokens", (0.5, 0.5), (0.02, 0.03), "long-range tasks"),
    Claim("sparse", (0.6, 0.8), (0.01, 0.03), "not said"),
    Claim("Mamba, RWKV", (0.9, 1.0), (0.03, 0.05), "retrieval"),
)


class Point(NamedTuple):
    """A design's loss above full attention's: its mean over pairs of runs, the interval, and its bytes."""

    stored: int
    mean: float
    low: float | None  # None where one run of each does not give an interval
    high: float | None
    diverged: int

    @property
    def tie(self) -> bool:
        """Whether the interval holds 0, or there is none."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


@cache
def stored_bytes(budget: str) -> dict[str, int]:
    """Bytes of cache of each design at the trained length, 16 bit, whether or not it has been trained."""
    plan = BUDGETS[validate.one_of("budget", budget, BUDGETS)]
    length = plan.training.length
    return {
        name: unallocated(plan.shape(name)).table(length, dtype=torch.bfloat16)[-1]["stored"]
        for name in plan.designs
    }


def above_full(rows: Iterable[Row], budget: str = "cpu", **options: Any) -> dict[str, Point]:
    """Every trained design but full attention, beside it; ``options`` are those of ``compare``."""
    items = {item.design: item for item in compare(rows, budget, **options)}
    full, stored = items.pop("full", None), stored_bytes(budget)
    points = {}
    for design, item in items.items():
        pairs = paired_values(item.losses, full.losses) if full else []
        if pairs:
            low, high = (item.pooled.low, item.pooled.high) if item.pooled else (None, None)
            mean = math.fsum(pairs) / len(pairs)
            points[design] = Point(stored[design], mean, low, high, item.summary.diverged)
    return points


def loss_over_bytes(rows: Iterable[Row], *, budget: str = "cpu", claims: Sequence[Claim] = CLAIMS) -> Picture:
    """Loss above full attention's over the bytes that the cache stores: every design of the study.

    Bars are paired 95% intervals with the pooled spread; a hollow marker is a tie. Designs that store the
    same are drawn side by side in a grey band. Diamonds are what the article claims, as perplexity per byte.
    """
    rows = list(rows)
    points, stored = above_full(rows, budget), stored_bytes(budget)
    visible = visible_difference(rows, budget)
    share = {name: size / stored["full"] for name, size in stored.items()}
    claimed = {f"article: {claim.name}": claim for claim in claims}
    # Of a range, the least that is saved.
    left = {name: 1 - claim.saved[0] for name, claim in claimed.items()}
    places = {name: math.log2(at) for name, at in (left | share).items()}
    at = dict(zip(places, apart(list(places.values()), 0.105), strict=True))
    lost = [item.design for item in compare(rows, budget) if item.summary.mean is None]
    failed = [name for name in lost if name != "full"]
    pending = [name for name in stored if name not in points and name not in ("full", *failed)]
    marks = {name: name + (f", {p.diverged} diverged" if p.diverged else "") for name, p in points.items()}
    with drawing(size=(10.4, 5.6)) as (figure, axes):
        _equal_cache(axes, [group for group in equal_cache(budget) if len(group) > 2], at)
        axes.axhline(0, color=COLOURS["full"], lw=1.4)
        if visible is not None:
            axes.axhspan(-visible, visible, color=COLOURS["full"], alpha=0.1, lw=0)
        for name, claim in claimed.items():
            low, high = (math.log1p(worse) for worse in claim.worse)
            _labelled(axes, at[name], (low + high) / 2, low, high, name, COLOURS["memory"], "d", hollow=True)
        _labelled(axes, at["full"], 0, 0, 0, "full", COLOURS["full"], "o", hollow=False)
        for name, point in points.items():
            colour, marker = COLOURS[FAMILY[name]], MARKERS[FAMILY[name]]
            _labelled(axes, at[name], *point[1:4], marks[name], colour, marker, hollow=point.tie)
        tops = [(math.log1p(claim.worse[1]), name) for name, claim in claimed.items()]
        tops += [(p.mean if p.high is None else p.high, marks[name]) for name, p in points.items()]
        lows = [0.0, -(visible or 0.0), *(p.mean if p.low is None else p.low for p in points.values())]
        waiting = {name: name for name in pending} | {name: f"{name}, diverged" for name in failed}
        axes.set_ylim(_limits([*tops, (visible or 0.0, "")], min(lows), list(waiting.values())))
        for name, mark in waiting.items():
            _waiting(axes, at[name], mark)
        axes.set_xticks(range(-4, 1), ["1/16", "1/8", "1/4", "1/2", "1"])
        axes.set_xlabel(
            f"cache stored at {BUDGETS[budget].training.length} tokens, as a share of full attention's, "
            "logarithmic"
        )
        axes.set_ylabel("loss above full attention, nats per byte")
        _percent_axis(axes)
        figure.legend(handles=_families(points, bool(pending)), loc="outside lower center", ncols=5)
    told = "; ".join(f"{name} {_said(point)}" for name, point in points.items()) or "no design"
    alt = (
        f"Loss above full attention over bytes of cache stored, nats per byte: {told}. "
        f"Not yet run: {', '.join(pending) or 'none'}. "
        + (f"Diverged in all runs: {', '.join(failed)}. " if failed else "")
        + " ".join(
            f"The article's {claim.name}: {claim.worse[0]:.1%} to {claim.worse[1]:.1%} at "
            f"{left[name]:.1%} of the cache."
            for name, claim in claimed.items()
        )
    )
    data = {"points": points, "pending": pending, "failed": failed, "claims": claimed}
    return Picture(figure, alt, data | {"visible": visible, "at": at})


def apart(places: Sequence[float], gap: float) -> list[float]:
    """``places`` moved as little as possible, in the sum of squares, so that neighbours are ``gap`` apart.

    The k-th smallest minus k gaps has to be monotone: isotonic regression, by pooling adjacent violators.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    blocks: list[tuple[float, int]] = []  # mean and size
    for k, i in enumerate(order):
        mean, size = places[i] - k * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, n = blocks.pop()
            mean, size = (mean * size + before * n) / (size + n), size + n
        blocks.append((mean, size))
    moved = [mean for mean, size in blocks for _ in range(size)]
    found = [0.0] * len(places)
    for k, i in enumerate(order):
        found[i] = moved[k] + k * gap
    return found


@cache
def equal_cache(budget: str) -> list[list[str]]:
    """Groups of designs whose caches store the same at the trained length, to 5%."""
    return BUDGETS[budget].equal_cache()


def _equal_cache(axes: Axes, groups: Sequence[Sequence[str]], at: Mapping[str, float]) -> None:
    """A grey band for each group of designs whose caches store the same."""
    top = axes.get_xaxis_transform()
    for group in groups:
        left, right = min(at[name] for name in group), max(at[name] for name in group)
        axes.axvspan(left - 0.05, right + 0.05, color=COLOURS["memory"], alpha=0.1, lw=0)
        axes.text((left + right) / 2, 1.0, "equal bytes", fontsize=8, ha="center", va="bottom", transform=top)


def _labelled(
    axes: Axes,
    x: float,
    y: float,
    low: float | None,
    high: float | None,
    name: str,
    colour: str,
    marker: str,
    *,
    hollow: bool,
) -> None:
    """A point with its interval, and its name upright above."""
    bars = None if low is None or high is None else [[y - low], [high - y]]
    fill = "none" if hollow else colour
    axes.errorbar(
        x, y, bars, color=colour, marker=marker, mfc=fill, ms=6, ls="none", elinewidth=1.2, capsize=2.5
    )
    top = y if high is None else high
    axes.annotate(
        name,
        (x, top),
        (0, 6),
        textcoords="offset points",
        rotation=90,
        ha="center",
        va="bottom",
        fontsize=7.5,
        color=colour,
    )


def _waiting(axes: Axes, x: float, name: str) -> None:
    """A design without a loss, because it has not run or diverged: its bytes are known."""
    bottom = axes.get_xaxis_transform()
    axes.plot(x, 0.02, "|", color=COLOURS["memory"], transform=bottom, ms=7)
    axes.text(
        x, 0.045, name, rotation=90, ha="center", va="bottom", fontsize=7, color="#8a8a8a", transform=bottom
    )


def _limits(tops: Sequence[tuple[float, str]], lowest: float, waiting: Sequence[str]) -> tuple[float, float]:
    """Of the axis of losses, with room for upright names: above each of ``tops``, and those that wait."""
    letter = 0.0128  # of the height of the axes
    below = 0.07 + letter * max((len(name) for name in waiting), default=0)
    low, high = lowest, max(y for y, _ in tops)
    for _ in range(60):  # both depend on the height: the fixed point is reached fast
        low = lowest - below * (high - low)
        high = low + max((y - low) / (1 - 0.03 - letter * len(name)) for y, name in tops)
    return low, high


def _percent_axis(axes: Axes) -> None:
    """The same axis as the change of the perplexity per byte, in percent."""
    other = axes.secondary_yaxis(
        "right", functions=(lambda y: 100 * np.expm1(y), lambda p: np.log1p(np.maximum(p, -99) / 100))
    )
    other.set_ylabel("change of perplexity per byte, %")


def _families(points: Mapping[str, Point], pending: bool) -> list[Line2D]:
    seen = {"full", *(FAMILY[name] for name in points)}
    handles = [
        _handle(COLOURS[family], MARKERS[family], FAMILY_NAMES[family])
        for family in FAMILIES
        if family in seen
    ]
    handles.append(_handle(COLOURS["memory"], "d", "the article's claim", hollow=True))
    if any(point.tie for point in points.values()):
        handles.append(_handle("#808080", "s", "hollow: a tie", hollow=True))
    if pending:
        handles.append(_handle(COLOURS["memory"], "|", "not yet run"))
    return handles


def _handle(colour: str, marker: str, label: str, *, hollow: bool = False) -> Line2D:
    fill = "none" if hollow else colour
    return Line2D([], [], color=colour, marker=marker, mfc=fill, ls="none", label=label)


def _said(point: Point) -> str:
    tie = ", a tie" if point.tie and point.low is not None else ""
    interval = ", one run" if point.low is None else f" [{point.low:+.3f}, {point.high:+.3f}]"
    diverged = f", {point.diverged} runs diverged" if point.diverged else ""
    return f"{point.mean:+.3f}{interval} at {format_bytes(point.stored)}{tie}{diverged}"


def pareto_front(points: Mapping[str, tuple[float, float]], tolerance: float = 0.05) -> list[str]:
    """Names of the (bytes, loss) that no other beats: with a lower loss at no more bytes, to ``tolerance``.

    Of equal losses the fewest bytes count. From the fewest bytes to the most. Designs that were sized to
    store the same differ by a percent or so; without the tolerance the smallest would always be on the front.
    """
    front = [
        name
        for name, (size, loss) in points.items()
        if not any(
            (y < loss and x <= (1 + tolerance) * size) or (y == loss and x < size) for x, y in points.values()
        )
    ]
    return sorted(front, key=lambda name: points[name])


def pareto(rows: Iterable[Row], *, budget: str = "cpu", lengths: Sequence[int] | None = None) -> Picture:
    """Mean loss ± standard error over bytes stored, with the Pareto front, a panel per context length.

    The loss is that of the trained length in every panel. Baselines: full attention (as many parameters, all
    bytes) with the smallest visible difference around it, GQA with fewer heads (as many bytes, by the
    simplest means), and dotted lines where several designs store the same.
    """
    rows = list(rows)
    items = {item.design: item for item in compare(rows, budget)}
    items = {name: item for name, item in items.items() if item.summary.mean is not None}
    if not items:
        return not_yet("no language run of the whole budget", f"--preset {budget} --tier A")
    trained = BUDGETS[budget].training.length
    lengths = (trained, 32_768) if lengths is None else lengths
    visible = visible_difference(rows, budget)
    fronts, drawn, kinds = {}, {}, Counter(FAMILY[name] for name in items)
    size = (5.2 * len(lengths), 4.6)
    with drawing(1, len(lengths), size=size, sharey=True, squeeze=False) as (figure, panels):
        for axes, length in zip(panels[0], lengths, strict=True):
            points = {
                name: (_stored_at(item, length), item.summary.mean or 0.0) for name, item in items.items()
            }
            drawn[length], front = points, pareto_front(points)
            fronts[length] = front
            _baselines(axes, points, visible)
            steps = [points[name] for name in front]
            end = (max(size for size, _ in points.values()) * 1.3, steps[-1][1])
            axes.step(*zip(*steps, end, strict=True), where="post", color="#808080", lw=1.2, label="front")
            for name, (x, y) in points.items():
                family = FAMILY[name]
                style = {"color": COLOURS[family], "marker": MARKERS[family], "ms": 6, "ls": "none"}
                axes.errorbar(x, y, items[name].summary.error, elinewidth=1.2, capsize=2.5, **style)
                if name in front or kinds[family] > 1:  # the legend names the others
                    place = (4, -11) if name in front else (7, -3)
                    axes.annotate(name, (x, y), place, textcoords="offset points", fontsize=8)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_bytes(round(x))))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.margins(x=0.16)
            axes.set_xlabel(f"stored at {length:,} tokens, logarithmic")
        panels[0, 0].set_ylabel("loss, nats per byte")
        families = [family for family in FAMILIES if any(FAMILY[name] == family for name in items)]
        handles = [_handle(COLOURS[f], MARKERS[f], FAMILY_NAMES[f]) for f in families]
        handles.append(Line2D([], [], color="#808080", lw=1.2, label="Pareto front"))
        if len([name for name in items if name == "full" or name.startswith("gqa")]) > 1:
            handles.append(Line2D([], [], color=COLOURS["shared"], ls="--", lw=1, label="fewer KV heads"))
        figure.legend(handles=handles, loc="outside lower center", ncols=5)
    told = ". ".join(
        f"At {length:,} tokens the front is "
        + ", ".join(
            f"{name} ({format_bytes(drawn[length][name][0])}, {drawn[length][name][1]:.3f})" for name in front
        )
        for length, front in fronts.items()
    )
    alt = f"Loss over bytes of cache stored, designs: {len(items)}, trained at {trained} tokens. {told}."
    return Picture(figure, alt, {"fronts": fronts, "points": drawn, "visible": visible})


def _stored_at(item: Compared, length: int) -> int:
    memory = {
        line["length"]: line["stored"] for row in item.rows if "memory" in row for line in row["memory"]
    }
    return memory[validate.one_of("lengths", length, memory)]


def _baselines(axes: Axes, points: Mapping[str, tuple[float, float]], visible: float | None) -> None:
    if "full" in points:
        loss = points["full"][1]
        axes.axhline(loss, color=COLOURS["full"], lw=1)
        axes.text(0.01, loss, "full attention", fontsize=8, va="bottom", transform=axes.get_yaxis_transform())
        if visible is not None:
            axes.axhspan(loss - visible, loss + visible, color=COLOURS["full"], alpha=0.1, lw=0)
    heads = sorted(point for name, point in points.items() if name == "full" or name.startswith("gqa"))
    if len(heads) > 1:
        axes.plot(*zip(*heads, strict=True), color=COLOURS["shared"], ls="--", lw=1)
    groups: list[list[float]] = []
    for size in sorted(size for size, _ in points.values()):
        if groups and size <= 1.05 * groups[-1][0]:
            groups[-1].append(size)
        else:
            groups.append([size])
    for group in groups:
        if len(group) > 1:
            axes.axvline(group[len(group) // 2], color="#8a8a8a", lw=0.8, ls=":")


def above_by_position(rows: Iterable[Row], *, budget: str = "cpu", length: int | None = None) -> Picture:
    """Loss above full attention's by position in the context, a panel per family; bars are paired intervals.

    ``length`` is that of the contexts, the trained one unless given: longer ones are in the rows too.
    """
    rows = [*rows]
    trained = BUDGETS[budget].training.length
    length = trained if length is None else length
    runs = final_runs(rows, budget).values()
    complete = [row for own in runs for row in own if row["loss"] is not None]
    if not complete:
        return not_yet("no language run of the whole budget", f"--preset {budget} --tier A")
    buckets = [(bucket["from"], bucket["to"]) for bucket in _buckets(complete[0], length)]
    curves: dict[str, list[Point]] = {}
    for i in range(len(buckets)):
        for design, point in above_full(
            rows, budget, value=lambda row, i=i: _bucket_loss(row, length, i)
        ).items():
            curves.setdefault(design, []).append(point)
    if not curves:
        return not_yet("no design beside full attention", f"--preset {budget} --tier A")
    families = [family for family in FAMILIES if family != "full"]
    with drawing(2, 3, size=(10.4, 5.6), sharey=True, sharex=True) as (figure, panels):
        for axes, family in zip(panels.flat, families, strict=True):
            own = [name for name in FAMILIES[family] if name in curves]
            axes.axhline(0, color=COLOURS["full"], lw=1.2)
            styles = line_styles(
                FAMILIES[family], family=family, fixed={"gated-delta": MECHANISMS["gated_delta"]}
            )
            for name in own:
                y = [point.mean for point in curves[name]]
                bars = [
                    [0.0 if p.low is None else p.mean - p.low for p in curves[name]],
                    [0.0 if p.high is None else p.high - p.mean for p in curves[name]],
                ]
                axes.errorbar(
                    range(len(y)),
                    y,
                    bars,
                    label=name,
                    lw=1.6,
                    ms=4.5,
                    elinewidth=1,
                    capsize=2,
                    **styles[name],
                )
            waiting = [name for name in FAMILIES[family] if name not in curves]
            axes.set_title(FAMILY_NAMES[family])
            if waiting:
                text = f"not yet run: {len(waiting)}" if own else "not yet run"
                axes.set_title(text, loc="right", fontsize=8, fontweight="normal")
            if own:
                axes.legend(*_unique([axes]), fontsize=7, loc="upper left", ncols=2, handlelength=2.2)
        low, high = panels[0, 0].get_ylim()
        panels[0, 0].set_ylim(low, high + 0.35 * (high - low))  # the legends are above the curves
        for axes in panels[1]:
            labels = [f"{a}–{b - 1}" for a, b in buckets]
            axes.set_xticks(range(len(buckets)), labels, rotation=45, ha="right", fontsize=7)
            axes.set_xlabel("position in the context")
        for axes in panels[:, 0]:
            axes.set_ylabel("above full, nats per byte")
    told = "; ".join(
        f"{name} from {points[0].mean:+.3f} to {points[-1].mean:+.3f}" for name, points in curves.items()
    )
    alt = f"Loss above full attention by position in contexts of {length} tokens, nats per byte: {told}."
    return Picture(figure, alt, {"buckets": buckets, "curves": curves})


def _buckets(row: Row, length: int) -> list[dict[str, Any]]:
    if length == row["settings"]["training"]["length"]:
        return row["by_position"]
    longer = {line["length"]: line["by_position"] for line in row["longer"]}
    return longer[validate.one_of("length", length, longer)]


def _bucket_loss(row: Row, length: int, i: int) -> float | None:
    return None if row["loss"] is None else _buckets(row, length)[i]["loss"]


def mechanism(design: str) -> str:
    """A design of the recall runs without the size of its state: "linear-8" is "linear"."""
    stem, _, size = design.rpartition("-")
    return stem if size.isdigit() else design


def recall_over_bytes(rows: Iterable[Row], *, preset: str = "cpu") -> Picture:
    """Right answers over the bytes of the cache or state, a panel per task; one line per mechanism.

    Each at its best rate, mean ± standard error over the seeds; where a mechanism comes in two sizes a line
    joins them. The control, a short convolution alone, has no memory to speak of: it is a level. Markers of
    the same bytes are drawn side by side.
    """
    found = best_recall(rows, preset)
    tasks = [task for task in TASKS[preset] if any(name == task for name, _ in found)]
    if not tasks:
        return not_yet("no recall run", f"--preset {preset} --tier B")
    cells = {cell: _share(own) for cell, own in found.items()}
    shown = list(dict.fromkeys(mechanism(d) for d in RECALL_DESIGNS if any(d == name for _, name in cells)))
    styles = line_styles(shown, fixed=RECALL_LINES)
    across, down = min(len(tasks), 3), -(-len(tasks) // 3)
    size = (3.3 * across + (2.2 if down == 1 else 0.4), 3.0 * down + 0.7)
    with drawing(down, across, size=size, sharey=True, squeeze=False) as (figure, panels):
        for axes in panels.flat[len(tasks) :]:
            axes.set_visible(False)
        for axes, task in zip(panels.flat, tasks, strict=False):
            own = {design: cell for (name, design), cell in cells.items() if name == task}
            finished = {design: cell for design, cell in own.items() if cell[1] is not None}
            at = _side_by_side({d: cell[0] for d, cell in finished.items() if d != "short-conv"})
            for name in shown:
                points = sorted((*cell[:3], d) for d, cell in finished.items() if mechanism(d) == name)
                if not points:
                    continue
                _, y, error, designs = zip(*points, strict=True)
                if name == "short-conv":
                    level = {"color": styles[name]["color"], "ls": styles[name]["ls"]}
                    axes.axhline(y[0], lw=1.4, label=name, **level)
                else:
                    x = [at[design] for design in designs]
                    axes.errorbar(
                        x, y, error, label=name, lw=1.6, ms=6, elinewidth=1, capsize=2.5, **styles[name]
                    )
            _bytes_axis(axes, [cell[0] for d, cell in own.items() if d != "short-conv"] or [1024])
            axes.set_title(task)
            _note_missing(axes, preset, task, RECALL_DESIGNS, own, sum(cell[3] for cell in own.values()))
        for axes in panels[:, 0]:
            _share_axis(axes)
        _legend(figure, panels.flat, beside=down == 1)
    told = "; ".join(
        f"{task}: " + ", ".join(f"{d} {_cell_said(cell)}" for (t, d), cell in cells.items() if t == task)
        for task in tasks
    )
    waiting = [task for task in TASKS[preset] if task not in tasks]
    alt = (
        f"Right answers over bytes of cache or state. {told}. Not yet run: {', '.join(waiting) or 'no task'}."
    )
    return Picture(figure, alt, {"cells": cells, "waiting": waiting})


def recall_over_length(rows: Iterable[Row], *, preset: str = "cpu", designs: Sequence[str] = ()) -> Picture:
    """Right answers in texts of 1, 2 and 4 times the trained length, a panel per task.

    ``designs`` are those to draw: unless given, of each mechanism the one with the most bytes. Markers at the
    same length are drawn side by side, since several designs may answer all or nothing.
    """
    found = best_recall(rows, preset)
    tasks = [task for task in TASKS[preset] if any(name == task for name, _ in found)]
    if not tasks:
        return not_yet("no recall run", f"--preset {preset} --tier B")
    largest = {mechanism(design): design for design in RECALL_DESIGNS if any(d == design for _, d in found)}
    wanted = list(designs) or list(largest.values())
    for name in wanted:
        validate.one_of("designs", name, RECALL_DESIGNS)
    styles = line_styles([mechanism(name) for name in wanted], fixed=RECALL_LINES)
    curves: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    across, down = min(len(tasks), 3), -(-len(tasks) // 3)
    size = (3.3 * across + (2.2 if down == 1 else 0.4), 3.0 * down + 0.7)
    with drawing(down, across, size=size, sharey=True, squeeze=False) as (figure, panels):
        for axes in panels.flat[len(tasks) :]:
            axes.set_visible(False)
        for axes, task in zip(panels.flat, tasks, strict=False):
            finished = {
                name: [row for row in found.get((task, name), []) if row["loss"] is not None]
                for name in wanted
            }
            drawn = [name for name in wanted if finished[name]]
            for k, name in enumerate(drawn):
                points = _lengths(finished[name])
                curves.setdefault(task, {})[name] = points
                lengths, y, error = zip(*points, strict=True)
                x = [length * 2 ** (0.07 * (k - (len(drawn) - 1) / 2)) for length in lengths]
                style = styles[mechanism(name)]
                axes.errorbar(x, y, error, label=name, lw=1.6, ms=5, elinewidth=1, capsize=2.5, **style)
            ticks = {point[0] for line in curves.get(task, {}).values() for point in line}
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("tokens of the text; trained on the fewest")
            axes.set_title(task)
            recorded = [name for name in wanted if (task, name) in found]
            _note_missing(axes, preset, task, wanted, recorded)
        for axes in panels[:, 0]:
            _share_axis(axes)
        _legend(figure, panels.flat, beside=down == 1)
    told = "; ".join(
        f"{task}: " + ", ".join(f"{name} {line[0][1]:.0%} to {line[-1][1]:.0%}" for name, line in own.items())
        for task, own in curves.items()
    )
    waiting = [task for task in TASKS[preset] if task not in tasks]
    alt = (
        f"Right answers from the trained length to longer texts. {told}. "
        f"Not yet run: {', '.join(waiting) or 'no task'}."
    )
    return Picture(figure, alt, {"curves": curves, "waiting": waiting})


def _planned(preset: str, task: str, design: str) -> bool:
    """Whether the plan has this design on this task: a pattern needs as many layers as the task gives."""
    if preset == "minutes":
        return False
    return len(RECALL_DESIGNS[design]) <= TASKS[preset][task][1]


def _share(rows: Sequence[Row]) -> tuple[int, float | None, float, int]:
    """Bytes, mean share of right answers, its standard error (0 of one seed), and runs that diverged.

    The mean is None where all runs diverged.
    """
    found = summarise([None if row["loss"] is None else row["accuracy"] for row in rows])
    return rows[0]["state_bytes"], found.mean, found.error or 0.0, found.diverged


def _cell_said(cell: tuple[int, float | None, float, int]) -> str:
    size, share, _, diverged = cell
    told = "no answer" if share is None else f"{share:.0%}"
    return f"{told} with {format_bytes(size)}" + (f", {diverged} diverged" if diverged else "")


def _side_by_side(sizes: Mapping[str, int]) -> dict[str, float]:
    """``sizes`` moved as little as possible, so that on a logarithmic axis no marker covers another."""
    places = [math.log2(size) for size in sizes.values()]
    gap = 0.035 * (max(places, default=0) - min(places, default=0) + 1.4)
    return dict(zip(sizes, (2**place for place in apart(places, gap)), strict=True))


def _note_missing(
    axes: Axes, preset: str, task: str, wanted: Iterable[str], own: Container[str], diverged: int = 0
) -> None:
    """Beside the title: how many designs have not run, and how many runs diverged."""
    missing = [name for name in wanted if name not in own and _planned(preset, task, name)]
    notes = [f"not yet run: {len(missing)}"] if missing else []
    notes += [f"diverged: {diverged}"] if diverged else []
    if notes:
        axes.set_title(", ".join(notes), loc="right", fontsize=8, fontweight="normal")


def _lengths(runs: Sequence[Row]) -> list[tuple[int, float, float]]:
    """Tokens, mean accuracy and standard error at the trained length and beyond."""
    by_length: dict[int, list[float | None]] = {}
    for row in runs:
        by_length.setdefault(row["settings"]["task"][1]["length"], []).append(row["accuracy"])
        for line in row["longer"]:
            by_length.setdefault(line["length"], []).append(line["accuracy"])
    found = {length: summarise(values) for length, values in sorted(by_length.items())}
    return [(length, own.mean or 0.0, own.error or 0.0) for length, own in found.items()]


def _share_axis(axes: Axes) -> None:
    axes.set_ylim(-0.03, 1.06)
    axes.set_ylabel("right answers")
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _bytes_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    ticks = [2**i for i in range(6, 26) if min(sizes) / 1.5 <= 2**i <= max(sizes) * 1.5]
    axes.set_xticks(ticks[:: max(-(-len(ticks) // 5), 1)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_bytes(round(x))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(sizes) / 1.6, max(sizes) * 1.6)
    axes.set_xlabel("cache or state, logarithmic")


def _legend(figure: Figure, panels: Iterable[Axes], *, beside: bool) -> None:
    """One for all panels: beside a single row of them, below more."""
    handles, labels = _unique(panels)
    if beside:
        figure.legend(handles, labels, loc="outside right center")
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=4)


def _unique(panels: Iterable[Axes]) -> tuple[list[Any], list[str]]:
    """Each label of any panel once, a line without its error bars."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle[0] if isinstance(handle, tuple) else handle)
    return list(found.values()), list(found)


def converted(rows: Iterable[Row]) -> Picture:
    """Loss of converted models over the tokens of more training: one panel per text, the base model dotted.

    Each point is the rate with the lower mean loss on the corpus, mean ± standard error over seeds; the
    first point of a line is the model as converted. ``full`` is trained on without a conversion. The first
    panel is the text that is trained on.
    """
    mine = [row for row in rows if row["kind"] == "conversion"]
    if not mine:
        return not_yet("no conversion", "--tier C")
    texts = sorted(mine[0]["base"], key=lambda text: text != TRAINED_ON)
    curves: dict[str, dict[str, list[tuple[float, float, float]]]] = {text: {} for text in texts}
    chosen: dict[str, dict[float, float]] = {}
    diverged = sum(row["loss"] is None for row in mine)
    for design in dict.fromkeys(row["design"] for row in mine):
        own = [row for row in mine if row["design"] == design]
        best = {
            share: found for share in sorted({row["share"] for row in own}) if (found := _best(own, share))
        }
        chosen[design] = {share: runs[0]["lr"] for share, runs in best.items()}
        label = f"{design}, trained on" if design == "full" else design
        for text in texts:
            # Rates and shares start from the same converted model: one value per seed.
            starts = {row["seed"]: row["before"][text]["loss"] for row in own}
            before = summarise(list(starts.values()))
            points = [(0.0, before.mean or 0.0, before.error or 0.0)]
            for runs in best.values():
                after = summarise([row["after"][text]["loss"] for row in runs])
                tokens = runs[0]["steps"] * _tokens_per_step()
                points.append((tokens, after.mean or 0.0, after.error or 0.0))
            curves[text][label] = points
    base = {text: mine[0]["base"][text]["loss"] for text in texts}
    control = "full, trained on" if "full" in chosen else None
    picture = conversion_curves(curves, control=control, base=base)
    waiting = [name for name in CONVERTED if name not in chosen]
    if waiting:
        picture.figure.axes[-1].set_title(
            f"not yet run: {len(waiting)}", loc="right", fontsize=8, fontweight="normal"
        )
    told = f" Not yet run: {', '.join(waiting) or 'none'}." + (
        f" {diverged} runs diverged." if diverged else ""
    )
    data = {**picture.data, "rates": chosen, "diverged": diverged, "waiting": waiting}
    return Picture(picture.figure, picture.alt + told, data)


def _best(rows: Sequence[Row], share: float) -> list[Row]:
    """The finished runs of ``share`` at the rate with the lower mean loss."""
    rates: dict[float, list[Row]] = {}
    for row in rows:
        if row["share"] == share and row["loss"] is not None:
            rates.setdefault(row["lr"], []).append(row)
    return min(rates.values(), key=lambda own: sum(row["loss"] for row in own) / len(own), default=[])


def _tokens_per_step() -> int:
    return TRAINING.batch * TRAINING.length


def not_yet(what: str, options: str) -> Picture:
    """A picture that says what is missing, and the command that runs it."""
    text = f"not yet run: {what} is recorded\nkvlearn study quality {options}"
    with drawing(size=(7.5, 1.0)) as (figure, axes):
        axes.axis("off")
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=11, transform=axes.transAxes)
    return Picture(figure, text.replace("\n", "; "), {"pending": what})
