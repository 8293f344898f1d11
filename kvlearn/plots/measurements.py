"""Pictures of chapter 12: bytes, times and predictions of real shapes, and what pays on which device."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from kvlearn import validate
from kvlearn.measure import Device, Work, format_bytes, format_rate, format_seconds
from kvlearn.plots.picture import COLOURS, VIOLET, Line, Picture, drawing, line_styles

Row = Mapping[str, Any]

# The mechanisms that this chapter compares, each in its family's colour; of two recurrences one is violet.
LINES = {
    "full": Line(COLOURS["full"], "-", "o"),
    "gqa": Line(COLOURS["shared"], "-.", "^"),
    "window": Line(COLOURS["sliding"], "--", "s"),
    "mla": Line(COLOURS["compressed"], (4, 3), "P"),
    "dsa": Line(COLOURS["sparse"], ":", "D"),
    "mamba": Line(COLOURS["linear"], (6, 1, 1, 1), "v"),
    "gated_delta": Line(VIOLET, (2, 2), "X"),
}
CONDITIONS = ("o", "s", "^", "D", "v", "P")  # a marker for each machine and number of threads
WITHIN = 0.15  # the goal of a prediction


def touched_bytes(rows: Sequence[Row], *, length: int = 32_768) -> Picture:
    """Bytes that one layer stores and that one step reads, per token of the context, by mechanism.

    ``rows`` as ``kvlearn bench hardware`` records them, of one condition. A tick is the formula on paper.
    """
    found = {what: _at(rows, what, length) for what in ("stored", "read")}
    names = sorted(found["stored"], key=lambda name: -found["stored"][name]["measured"])
    names = [name for name in names if name in found["read"]]
    validate.positive("rows with bytes at this length", len(names))
    data = {
        name: {what: found[what][name]["measured"] / length for what in found}
        | {f"{what}_formula": found[what][name]["formula"] / length for what in found}
        for name in names
    }
    with drawing(size=(8.6, 0.27 * len(names) + 1.1)) as (figure, axes):
        for y, name in enumerate(names):
            one = data[name]
            axes.plot([one["stored"], one["read"]], [y, y], color=COLOURS["memory"], lw=1, alpha=0.6)
            axes.plot(one["stored"], y, "o", mfc="none", mec=COLOURS["full"], ms=8)
            axes.plot(one["read"], y, "o", color=COLOURS["sliding"], ms=4.5)
            axes.plot(one["read_formula"], y, "|", color=COLOURS["memory"], ms=13)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log", base=4)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_bytes(x)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(f"per token of a context of {length // 1024}K, one layer, 16-bit, logarithmic")
        handles = [
            Line2D(
                [], [], ls="", marker="o", mfc="none", mec=COLOURS["full"], ms=8, label="stored: allocated"
            ),
            Line2D(
                [], [], ls="", marker="o", color=COLOURS["sliding"], ms=4.5, label="read by a step: touched"
            ),
            Line2D([], [], ls="", marker="|", color=COLOURS["memory"], ms=13, label="read: the formula"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    told = "; ".join(
        f"{name} {format_bytes(round(one['stored'], 1))} stored, {format_bytes(round(one['read'], 1))} read"
        for name, one in data.items()
    )
    alt = f"Bytes of one layer per token of a context of {length:,} tokens, measured: {told}."
    return Picture(figure, alt, {"bytes": data})


def decode_times(conditions: Mapping[str, Sequence[Row]]) -> Picture:
    """Seconds of one step over the context, a panel per condition; thin lines are the predictions.

    ``conditions``: rows of decode by the name of machine and condition; a row may have a key "predicted".
    Error bars are quartiles, the legend has the exponents that were fitted on the first condition that has
    them.
    """
    validate.positive("len(conditions)", len(conditions))
    series = {name: _series(rows) for name, rows in conditions.items()}
    mechanisms = list(dict.fromkeys(m for lines in series.values() for m in lines))
    styles = line_styles(mechanisms, fixed=LINES)
    exponents = _exponents(conditions)
    width = min(max(3.1 * len(series) + 1.6, 7.5), 11.0)
    with drawing(1, len(series), size=(width, 4.3), sharey=True, squeeze=False) as (figure, axes):
        for panel, (name, lines) in zip(axes.flat, series.items(), strict=True):
            for mechanism, points in lines.items():
                n, t, low, high, foreseen = zip(*points, strict=True)
                below = [a - b for a, b in zip(t, low, strict=True)]
                above = [b - a for a, b in zip(t, high, strict=True)]
                panel.errorbar(
                    n, t, (below, above), lw=1.6, ms=5, elinewidth=1, capsize=2, **styles[mechanism]
                )
                if None not in foreseen:
                    panel.plot(n, foreseen, color=styles[mechanism]["color"], lw=0.8, ls="-", alpha=0.8)
            _lengths(panel, sorted({point[0] for points in lines.values() for point in points}))
            _seconds(panel)
            panel.set_title(name, fontsize=9)
        axes[0, 0].set_ylabel("one step of one layer, logarithmic")
        handles = [
            Line2D([], [], lw=1.6, label=f"{m}{exponents.get(m, '')}", **styles[m]) for m in mechanisms
        ]
        handles.append(Line2D([], [], color=COLOURS["memory"], lw=0.9, label="predicted"))
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    told = "; ".join(
        f"{name}: "
        + ", ".join(
            f"{m} from {format_seconds(p[0][1])} at {p[0][0]:,} to {format_seconds(p[-1][1])} at {p[-1][0]:,}"
            for m, p in lines.items()
        )
        for name, lines in series.items()
    )
    return Picture(figure, f"Time of one decode step over the context. {told}.", {"series": series})


def predicted_and_measured(conditions: Mapping[str, Sequence[Row]]) -> Picture:
    """Every measured step over its prediction, with a band of 15% to both sides of equality.

    Each row has "measured" and "predicted" seconds. Colours are mechanisms, markers are conditions. Of more
    mechanisms than there are colours, those without a line of their own are grey.
    """
    validate.at_most("len(conditions)", len(conditions), len(CONDITIONS), "the markers there are")
    points = [
        (condition, row["mechanism"], row["predicted"], row["measured"])
        for condition, rows in conditions.items()
        for row in rows
    ]
    validate.positive("rows", len(points))
    errors = {c: [t / p - 1 for name, _, p, t in points if name == c] for c in conditions}
    within = {c: sum(abs(e) <= WITHIN for e in found) for c, found in errors.items()}
    mechanisms = list(dict.fromkeys(m for _, m, *_ in points))
    colours = _colours(mechanisms)
    others = [m for m in mechanisms if m not in colours]
    low = min(min(p, t) for *_, p, t in points) / 1.5
    high = max(max(p, t) for *_, p, t in points) * 1.5
    with drawing(size=(6.6, 5.2)) as (figure, axes):
        line = [low, high]
        axes.fill_between(
            line,
            [x * (1 - WITHIN) for x in line],
            [x * (1 + WITHIN) for x in line],
            color="#8a8a8a",
            alpha=0.2,
        )
        axes.plot(line, line, color=COLOURS["memory"], lw=1)
        for marker, condition in zip(CONDITIONS, conditions, strict=False):
            for mechanism in [*others, *colours]:  # grey ones first, below the others
                chosen = [(p, t) for c, m, p, t in points if (c, m) == (condition, mechanism)]
                colour = colours.get(mechanism, COLOURS["memory"])
                axes.plot(
                    *zip(*chosen, strict=True), marker, color=colour, ms=5, mfc="none"
                ) if chosen else None
        axes.set(xscale="log", yscale="log", xlim=line, ylim=line)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda t, _: format_seconds(t)))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("predicted: bytes, FLOPs and calls")
        axes.set_ylabel("measured")
        labels = dict(colours)
        if others:
            labels[f"{len(others)} others"] = COLOURS["memory"]
        handles = [Line2D([], [], ls="", marker="o", color=c, label=name) for name, c in labels.items()]
        handles += [
            Line2D([], [], ls="", marker=mark, color=COLOURS["memory"], mfc="none", label=condition)
            for mark, condition in zip(CONDITIONS, conditions, strict=False)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    told = "; ".join(
        f"{c}: {within[c]} of {len(errors[c])} within {WITHIN:.0%}, from {min(errors[c]):+.0%} to "
        f"{max(errors[c]):+.0%}"
        for c in conditions
    )
    alt = f"Measured over predicted time of a step, with a band of {WITHIN:.0%} around equality. {told}."
    return Picture(figure, alt, {"errors": errors, "within": within})


def rooflines(devices: Sequence[Device], works: Mapping[str, Work]) -> Picture:
    """Rooflines of several devices, and where decode steps lie on the axis of FLOPs per byte."""
    validate.positive("len(devices)", len(devices))
    at = {name: work.intensity for name, work in works.items()}
    styles = line_styles([d.name for d in devices])
    marks = line_styles(at, fixed=LINES)
    low = min([0.25, *(x / 2 for x in at.values())])
    high = max([1024.0, *(2 * d.roofline.knee for d in devices), *(2 * x for x in at.values())])
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    reached = {d.name: {name: d.roofline.attainable(x) for name, x in at.items()} for d in devices}
    with drawing(size=(8.2, 4.8)) as (figure, axes):
        for device in devices:
            style = {**styles[device.name], "marker": ""}
            axes.plot(xs, [device.roofline.attainable(x) for x in xs], label=device.name, lw=1.8, **style)
        for name, x in at.items():
            axes.axvline(x, color=marks[name]["color"], lw=0.8, alpha=0.7)
            ys = [device.roofline.attainable(x) for device in devices]
            style = {key: marks[name][key] for key in ("color", "marker", "mfc")}
            axes.plot(len(ys) * [x], ys, ls="", ms=6, label=f"{name}: {x:.3g}", **style)
        axes.set(xscale="log", yscale="log", xlim=(low, high))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: format_rate(y, "FLOP")))
        axes.set_xlabel("FLOPs per byte moved, logarithmic")
        axes.set_ylabel("attainable, logarithmic")
        figure.legend(loc="outside right upper", fontsize=8)
    told = "; ".join(
        f"{name} at {x:.3g} FLOPs per byte: "
        + ", ".join(f"{d.name} {format_rate(reached[d.name][name], 'FLOP')}" for d in devices)
        for name, x in at.items()
    )
    return Picture(figure, f"Rooflines of {len(devices)} devices. {told}.", {"at": at, "reached": reached})


def what_pays(speedups: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Picture:
    """How many times as many tokens per second a change gives on each device: a panel per way of serving.

    ``speedups[panel][change][device]``; NaN where the model does not fit.
    """
    validate.positive("len(speedups)", len(speedups))
    devices = list(dict.fromkeys(d for panel in speedups.values() for one in panel.values() for d in one))
    changes = list(dict.fromkeys(change for panel in speedups.values() for change in panel))
    styles = line_styles(changes, fixed=LINES)
    size = (8.8, 0.36 * len(devices) + 1.7)
    with drawing(1, len(speedups), size=size, sharey=True, squeeze=False) as (figure, axes):
        for panel, (name, found) in zip(axes.flat, speedups.items(), strict=True):
            panel.axvline(1, color=COLOURS["memory"], lw=1)
            for i, change in enumerate(found):
                at = [y + 0.16 * (i - (len(found) - 1) / 2) for y in range(len(devices))]
                xs = [found[change].get(device, math.nan) for device in devices]
                style = {key: styles[change][key] for key in ("color", "marker", "mfc")}
                panel.plot(xs, at, ls="", ms=6, **style)
            for y, device in enumerate(devices):
                if all(not math.isfinite(one.get(device, math.nan)) for one in found.values()):
                    panel.text(1.02, y, "does not fit", va="center", fontsize=8)
            panel.set_title(name, fontsize=9)
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
            panel.xaxis.set_minor_locator(NullLocator())
            finite = [x for one in found.values() for x in one.values() if math.isfinite(x)]
            panel.set_xlim(min([1.0, *finite]) / 1.06, max([1.5, *finite]) * 1.12)
            steps = (1, 1.25, 1.5, 2) if max([1.0, *finite]) < 3 else (1, 2, 4, 8, 16, 32)
            panel.set_xticks([x for x in steps if x <= panel.get_xlim()[1]])
            panel.set_xlabel("tokens per second, times as many")
        axes[0, 0].set_yticks(range(len(devices)), devices)
        axes[0, 0].invert_yaxis()
        handles = [
            Line2D([], [], ls="", label=c, **{k: styles[c][k] for k in ("color", "marker", "mfc")})
            for c in changes
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(changes), fontsize=8)
    told = "; ".join(
        f"{panel}, {change}: " + ", ".join(f"{device} {x:.2f}" for device, x in one.items())
        for panel, found in speedups.items()
        for change, one in found.items()
    )
    return Picture(figure, f"Times as many tokens per second by device. {told}.", {"speedups": speedups})


def dollars(lines: Mapping[str, Sequence[tuple[int, float]]], *, title: str = "") -> Picture:
    """Dollars per million tokens over the context; a line ends where no user fits any more."""
    validate.positive("len(lines)", len(lines))
    styles = line_styles(lines, fixed=LINES)
    shown = {name: [(n, d) for n, d in points if math.isfinite(d)] for name, points in lines.items()}
    with drawing(size=(7.6, 4.2)) as (figure, axes):
        for name, points in shown.items():
            if points:
                axes.plot(*zip(*points, strict=True), lw=1.8, ms=5, label=name, **styles[name])
        _lengths(axes, sorted({n for points in lines.values() for n, _ in points}))
        axes.set_yscale("log", base=10)
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} $"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("per million tokens, logarithmic")
        axes.set_title(title, fontsize=9)
        axes.legend()
    told = "; ".join(
        f"{name}: " + (", ".join(f"{d:.3g} dollars at {n:,}" for n, d in points) or "does not fit")
        for name, points in shown.items()
    )
    return Picture(figure, f"Dollars per million output tokens over the context. {told}.", {"lines": shown})


def _colours(mechanisms: Sequence[str]) -> dict[str, str]:
    """A colour for each; where there are not so many, for those of ``LINES`` alone."""
    try:
        styles = line_styles(mechanisms, fixed=LINES)
    except ValueError:
        styles = line_styles([m for m in mechanisms if m in LINES], fixed=LINES)
    return {mechanism: style["color"] for mechanism, style in styles.items()}


def _at(rows: Sequence[Row], what: str, length: int) -> dict[str, Row]:
    return {
        f"{row['mechanism']}, {row['model']}": row
        for row in rows
        if row["what"] == what and row.get("length") == length and row["measured"] is not None
    }


def _series(rows: Sequence[Row]) -> dict[str, list[tuple[Any, ...]]]:
    """Points (length, median, first and third quartile, prediction or None) of each mechanism."""
    lines: dict[str, list[tuple[Any, ...]]] = {}
    for row in rows:
        if row["what"] == "decode_time" and row["measured"] is not None:
            m = row["measured"]
            point = (row["length"], m, row.get("q1", m), row.get("q3", m), row.get("predicted"))
            lines.setdefault(row["mechanism"], []).append(point)
    return {name: sorted(points) for name, points in lines.items()}


def _exponents(conditions: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """Of each mechanism in the first condition that has its exponent, as a piece of the legend."""
    found: dict[str, str] = {}
    for rows in conditions.values():
        for row in rows:
            if row["what"] == "decode_exponent" and row["measured"] is not None:
                text = f": $N^{{{row['measured']:.2f} ± {row['error']:.2f}}}$"
                found.setdefault(row["mechanism"], text)
    return found


def _lengths(panel: Axes, lengths: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [f"{n / 1024:g}K" if n >= 1024 else f"{n}" for n in lengths], fontsize=8)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("tokens in the cache")


def _seconds(panel: Axes) -> None:
    panel.set_yscale("log", base=10)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: format_seconds(y)))
    panel.yaxis.set_minor_formatter(NullFormatter())
