"""The pictures of "Your model": what each token costs in time, or how the models learned."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvlearn.plots.picture import COLOURS, MECHANISMS, OTHERS, Line, Picture, drawing, line_styles


def time_per_token(times: Mapping[str, Mapping[int, float]]) -> Picture:
    """Milliseconds of each decode step over the tokens so far; ``times`` are seconds, by name and length.

    The first step of each is its prompt, and left out. A name without steps is left out too.
    """
    curves = {
        name: (np.array(list(steps)[1:]), np.array(list(steps.values())[1:]) * 1e3)
        for name, steps in times.items()
        if len(steps) > 1
    }
    given = [MECHANISMS["full"], OTHERS[2], Line(COLOURS["memory"], ":", "D")]
    styles = line_styles(curves, fixed=dict(zip(times, given, strict=False)))
    with drawing(size=(7.5, 3.2)) as (figure, axes):
        for name, (lengths, ms) in curves.items():
            axes.plot(lengths, ms, label=name, **{**styles[name], "markevery": 6})
        axes.set_ylim(0)
        axes.set_xlabel("tokens so far")
        axes.set_ylabel("ms per token")
        if curves:
            axes.legend()
    medians = "; ".join(f"{name} {np.median(ms):.1f} ms" for name, (_, ms) in curves.items())
    alt = f"Time per token over the tokens so far. Medians: {medians or 'nothing was measured'}."
    return Picture(figure, alt, {"curves": curves})


def learning_curves(
    curves: Mapping[str, Mapping[int, float]],
    label: str,
    *,
    over: str = "steps of training",
    unit: str = "%",
) -> Picture:
    """A value over the progress of training, by name and point; ``label`` says of what, ``over`` of which.

    With ``unit`` "%" the values are shares, and the axis goes from 0 to 100%.
    """
    lines = {
        name: (np.array(list(points)), np.array(list(points.values())))
        for name, points in curves.items()
        if points
    }
    styles = line_styles(lines, fixed=dict(zip(curves, [OTHERS[1], OTHERS[2]], strict=False)))
    share = unit == "%"
    with drawing(size=(7.5, 3.2)) as (figure, axes):
        for name, (at, values) in lines.items():
            axes.plot(at, 100 * values if share else values, label=name, **{**styles[name], "markevery": 4})
        if share:
            axes.set_ylim(0, 103)
        axes.set_xlabel(over)
        axes.set_ylabel(f"{label}, {unit}")
        if lines:
            axes.legend()
    ends = "; ".join(
        f"{name} {values[-1]:.0%}" if share else f"{name} {values[-1]:.2f} {unit}"
        for name, (_, values) in lines.items()
    )
    title = f"{label[:1].upper()}{label[1:]} over the {over}."
    return Picture(figure, f"{title} At the end: {ends or 'nothing was trained'}.", {"curves": lines})


def largest_batches(curves: Mapping[str, Sequence[tuple[int, int, int]]]) -> Picture:
    """The largest batch over the context: a line of what was predicted, a marker for each measured one.

    ``curves`` by name: (context in tokens, predicted, measured); a batch of 0 is left out of the line.
    """
    lines = {name: np.array(points).T for name, points in curves.items()}
    styles = line_styles(lines, fixed=dict(zip(curves, [MECHANISMS["full"], OTHERS[2]], strict=False)))
    with drawing(size=(7.5, 3.2)) as (figure, axes):
        for name, (contexts, predicted, measured) in lines.items():
            style = styles[name]
            axes.plot(contexts, predicted, label=f"{name}: predicted", **{**style, "marker": ""})
            axes.plot(contexts, measured, label=f"{name}: measured", **{**style, "ls": ""})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("context, tokens")
        axes.set_ylabel("largest batch")
        axes.legend()
    ends = "; ".join(
        f"{name}: {measured[0]:,} at {contexts[0]:,} tokens, {measured[-1]:,} at {contexts[-1]:,}"
        for name, (contexts, _, measured) in lines.items()
    )
    return Picture(
        figure, f"The largest batch that fits, over the context. Measured: {ends}.", {"curves": lines}
    )


def bytes_against_loss(points: Sequence[Mapping[str, Any]]) -> Picture:
    """Loss over the bytes of cache per token, a marker and a name for each mechanism.

    A point has ``name``, ``bytes``, ``loss`` and its ``error`` (nats per byte), ``whose`` ("yours" or "ours")
    and ``front``: those that no other beats are joined by a line.
    """
    colours = {"yours": COLOURS["shared"], "ours": COLOURS["memory"]}
    labels = {"yours": "yours", "ours": "kvlearn's"}
    ordered = sorted(points, key=lambda each: (each["bytes"], each["loss"]))
    with drawing(size=(7.5, 4.2)) as (figure, axes):
        best = [each for each in ordered if each["front"]]
        axes.plot(
            [each["bytes"] for each in best],
            [each["loss"] for each in best],
            color=COLOURS["full"],
            ls="--",
            lw=1,
            label="not beaten by any",
        )
        for whose, marker in (("yours", "o"), ("ours", "s")):
            group = [each for each in ordered if each["whose"] == whose]
            if group:
                axes.errorbar(
                    [each["bytes"] for each in group],
                    [each["loss"] for each in group],
                    [each["error"] for each in group],
                    color=colours[whose],
                    ls="",
                    marker=marker,
                    mfc=colours[whose] if whose == "yours" else "none",
                    label=labels[whose],
                )
        for i, each in enumerate(ordered):
            axes.annotate(
                each["name"],
                (each["bytes"], each["loss"]),
                xytext=(0, (8, -15, 20, -27)[i % 4]),  # neighbours at different heights
                textcoords="offset points",
                ha="center",
                fontsize=8,
                parse_math=False,  # a name is text, whatever is in it
            )
        axes.set_xscale("log")
        axes.margins(0.12, 0.16)  # room for the names
        axes.set_xlabel("bytes of cache per token")
        axes.set_ylabel("loss, nats per byte")
        axes.legend()
    said = "; ".join(
        f"{each['name']} ({labels[each['whose']]}) {each['bytes']:,.0f} bytes, {each['loss']:.2f}"
        for each in ordered
    )
    alt = f"Loss in nats per byte over the bytes of cache per token. {said or 'Nothing was measured'}."
    return Picture(figure, alt, {"points": ordered})
