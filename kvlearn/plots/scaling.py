"""How time and memory grow with the text: chapters 04 and 05's plot of the exponents."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from kvlearn import validate
from kvlearn.measure import format_bytes, format_seconds
from kvlearn.plots.picture import Picture, drawing, line_styles

QUANTITIES = {"time": format_seconds, "memory": format_bytes}


def scaling(
    rows: Sequence[Mapping[str, Any]], *, part: str = "prefill", names: Iterable[str] | None = None
) -> Picture:
    """Time and extra memory over the length, both axes logarithmic, so that a power of N is a straight line.

    ``rows`` as ``kvlearn bench window`` or ``linear`` records them: of ``part`` ("prefill", "train"), all
    designs or those in ``names``. Error bars are quartiles over the rounds; the legend gives the exponents
    that were fitted.
    """
    end = "_time_exponent"
    validate.one_of("part", part, [w.removesuffix(end) for row in rows if (w := row["what"]).endswith(end)])
    found = [row for row in rows if row["what"].startswith(f"{part}_")]
    known = list(dict.fromkeys(row["name"] for row in found if row["what"] == f"{part}_time"))
    wanted = known if names is None else [validate.one_of("names", name, known) for name in names]
    validate.positive("len(names)", len(wanted))
    lines = {name: _line([row for row in found if row["name"] == name], part) for name in wanted}
    with drawing(1, 2, size=(8.6, 4.4)) as (figure, axes):
        styles = line_styles(lines)
        for panel, quantity in zip(axes, QUANTITIES, strict=True):
            for name, line in lines.items():
                _draw(panel, line[quantity], **styles[name])
            _axes(panel, quantity, [line[quantity] for line in lines.values()])
        handles = [Line2D([], [], lw=1.8, label=_label(name, lines[name]), **styles[name]) for name in lines]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    told = "; ".join(
        f"{name} from {format_seconds(line['time'][0][1])} and {format_bytes(line['memory'][0][1])} to "
        f"{format_seconds(line['time'][-1][1])} and {format_bytes(line['memory'][-1][1])}, {_powers(line)}"
        for name, line in lines.items()
    )
    lengths = sorted({n for line in lines.values() for n, *_ in line["time"]})
    alt = f"Time and extra memory of {part} from {lengths[0]:,} to {lengths[-1]:,} tokens: {told}."
    return Picture(figure, alt, {"lines": lines})


def _line(rows: Sequence[Mapping[str, Any]], part: str) -> dict[str, Any]:
    """Points (length, median, first and third quartile) of time and memory, and both exponents."""
    line: dict[str, Any] = {}
    for quantity in QUANTITIES:
        line[quantity] = sorted(
            (row["length"], m := row["measured"], row.get("q1", m), row.get("q3", m))
            for row in rows
            if row["what"] == f"{part}_{quantity}"
        )
        (fit,) = (row for row in rows if row["what"] == f"{part}_{quantity}_exponent")
        line[f"{quantity}_exponent"] = fit["measured"]
        if "q1" in fit:
            line[f"{quantity}_spread"] = (fit["q1"], fit["q3"])
    return line


def _draw(panel: Axes, points: Sequence[tuple[float, float, float, float]], **style: Any) -> None:
    """A line with its quartiles."""
    n, middle, low, high = zip(*points, strict=True)
    below = [m - q for m, q in zip(middle, low, strict=True)]
    above = [q - m for m, q in zip(middle, high, strict=True)]
    panel.errorbar(n, middle, (below, above), lw=1.8, ms=5, elinewidth=1, capsize=3, **style)


def _axes(panel: Axes, quantity: str, lines: Sequence[Sequence[tuple[float, ...]]]) -> None:
    """Lengths and bytes in powers of two, time in powers of ten."""
    lengths = sorted({n for points in lines for n, *_ in points})
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [f"{n / 1024:g}K" if n >= 1024 else f"{n:g}" for n in lengths])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("tokens, logarithmic")
    base = 2 if quantity == "memory" else 10
    panel.set_yscale("log", base=base)
    panel.yaxis.set_major_locator(LogLocator(base=4 if quantity == "memory" else 10))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: QUANTITIES[quantity](y)))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_title("time" if quantity == "time" else "extra memory")


def _label(name: str, line: Mapping[str, Any]) -> str:
    """A line of the legend."""
    time, memory = (f"$N^{{{line[f'{quantity}_exponent']:.2f}}}$" for quantity in QUANTITIES)
    return f"{name}: time {time}, memory {memory}"


def _powers(line: Mapping[str, Any]) -> str:
    """The exponents, in words."""
    return f"time ∝ N^{line['time_exponent']:.2f}, memory ∝ N^{line['memory_exponent']:.2f}"
