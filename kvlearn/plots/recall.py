"""Pictures of associative recall, chapters 06 and 07: learned live, and over the size of the state."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from kvlearn import validate
from kvlearn.measure import format_bytes
from kvlearn.plots.picture import Picture, drawing, line_styles
from kvlearn.study.capacity import Cell, compare
from kvlearn.study.recall import Run

# The designs without a state whose size differs: the upper and the lower bound.
NAMES = {"full": "full attention", "short_conv": "short convolution alone"}


def recall_curves(runs: Mapping[str, Run], *, family: str | None = None) -> Picture:
    """The share of right answers over the steps of training, one line per run of ``recall.train``.

    ``family``: whose colour the first run has that is not named after a mechanism.
    """
    validate.positive("len(runs)", len(runs))
    curves = {name: [(point.step, point.accuracy) for point in run.curve] for name, run in runs.items()}
    with drawing(size=(7.5, 3.8)) as (figure, axes):
        for name, style in line_styles(runs, family=family).items():
            share = f"{NAMES.get(name, name)}: {runs[name].accuracy:.0%}"
            axes.plot(*zip(*curves[name], strict=True), ms=4.5, lw=1.8, label=share, **style)
        _share_axis(axes)
        axes.set_xlabel("training steps")
        figure.legend(loc="outside right center", title="at the end", alignment="left")
    told = ", ".join(
        f"{NAMES.get(name, name)} {run.accuracy:.0%} after {run.curve[-1].step} steps in {run.seconds:.0f} s"
        for name, run in runs.items()
    )
    alt = f"The share of right answers in associative recall over the steps of training. At the end: {told}."
    return Picture(figure, alt, {"curves": curves, "accuracy": {n: run.accuracy for n, run in runs.items()}})


def recall_over_state(rows: Sequence[Mapping[str, Any]], *, designs: Iterable[str] | None = None) -> Picture:
    """The share of right answers over the size of the state: rows of ``kvlearn study recall``.

    One panel per number of pairs, one line per design: the same mechanism with smaller and larger states,
    each at its best learning rate, with standard errors over the seeds. Full attention is the upper bound;
    the lower one is the convolution before every mechanism, alone. ``designs`` names those to
    draw, all unless given.
    """
    cells = compare(rows)
    known = list(dict.fromkeys(cell.design for cell in cells if cell.design not in NAMES))
    wanted = known if designs is None else [validate.one_of("designs", name, known) for name in designs]
    styles = line_styles([*NAMES, *wanted])
    pairs = sorted({cell.n_pairs for cell in cells})
    validate.positive("len(designs)", len(wanted))
    size = 3.6 * len(pairs) + 2.2, 3.8
    with drawing(1, len(pairs), size=size, sharey=True, squeeze=False) as (figure, axes):
        for panel, n in zip(axes[0], pairs, strict=True):
            here = [cell for cell in cells if cell.n_pairs == n]
            for name, label in NAMES.items():
                for cell in (cell for cell in here if cell.design == name):
                    level = {"color": styles[name]["color"], "ls": styles[name]["ls"], "lw": 1.8}
                    panel.axhline(cell.accuracy, label=label, **level)
            for name in wanted:
                points = sorted(_point(cell) for cell in here if cell.design == name)
                at, share, error = zip(*points, strict=True)
                panel.errorbar(
                    at, share, error, label=name, lw=1.8, ms=5, elinewidth=1, capsize=3, **styles[name]
                )
            _state_axis(panel, [cell.state_bytes for cell in here if cell.design in wanted])
            full = [format_bytes(cell.state_bytes) for cell in here if cell.design == "full"]
            panel.set_title(f"{n} pairs" + "".join(f"\nfull attention keeps {size}" for size in full))
        _share_axis(axes[0, 0])
        figure.legend(*_legend(axes[0, 0]), loc="outside right center")
    data = {n: {c.run: (c.design, *_point(c)) for c in cells if c.n_pairs == n} for n in pairs}
    told = "; ".join(f"of {n} pairs {_told([c for c in cells if c.n_pairs == n], wanted)}" for n in pairs)
    alt = f"The share of right answers in associative recall over the bytes of the state: {told}."
    return Picture(figure, alt, {"cells": data})


def _point(cell: Cell) -> tuple[int, float, float]:
    return cell.state_bytes, cell.accuracy, cell.error


def _share_axis(axes: Axes) -> None:
    axes.set_ylim(-0.03, 1.05)
    axes.set_ylabel("right answers")
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _state_axis(axes: Axes, sizes: Sequence[int]) -> None:
    """Bytes in powers of two."""
    axes.set_xscale("log", base=2)
    ticks = [2**i for i in range(6, 24) if min(sizes) / 1.5 <= 2**i <= max(sizes) * 1.5]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_bytes(x)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("state, logarithmic")


def _legend(axes: Axes) -> tuple[list[Any], list[str]]:
    """Lines without their error bars."""
    handles, labels = axes.get_legend_handles_labels()
    return [handle[0] if isinstance(handle, tuple) else handle for handle in handles], labels


def _told(cells: Sequence[Cell], designs: Sequence[str]) -> str:
    """Both ends of every line."""
    parts = [f"{NAMES[c.design]} {c.accuracy:.0%}" for c in cells if c.design in NAMES]
    for name in designs:
        ends = sorted(_point(cell) for cell in cells if cell.design == name)
        first, last = (f"{share:.0%} with {format_bytes(size)}" for size, share, _ in (ends[0], ends[-1]))
        parts.append(f"{name} {first}" if len(ends) == 1 else f"{name} {first} to {last}")
    return ", ".join(parts)
