"""Pictures of converting a trained model, chapters 02 and 03: the course of the loss, with error bars."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter, NullLocator

from kvlearn import validate
from kvlearn.plots.picture import COLOURS, MISTAKES, Line, Picture, drawing, line_styles

Points = Sequence[tuple[float, float, float]]  # (tokens or rank, loss, its standard error), in any order
CONTROL = Line(COLOURS["full"], "-", "d")


def conversion_curves(
    curves: Mapping[str, Mapping[str, Points]],
    *,
    control: str | None = None,
    base: Mapping[str, float] | None = None,
    family: str = "shared",
) -> Picture:
    """Loss over the tokens of uptraining after conversion, one panel a text, one curve an initialisation.

    ``curves``: text -> initialisation -> (tokens, loss, standard error). ``control`` names the curve of the
    model that was not converted and trained on as long; ``base`` is the loss before all of this, a text.
    """
    validate.positive("len(curves)", len(curves))
    losses = [loss for panel in curves.values() for points in panel.values() for _, loss, _ in points]
    losses += (base or {}).values()
    with drawing(1, len(curves), size=(3.9 * len(curves), 4.2), sharey=True, squeeze=False) as (figure, axes):
        for panel, (text, named) in zip(axes.flat, curves.items(), strict=True):
            draw_curves(panel, named, family=family, control=control, base=(base or {}).get(text))
            panel.set_title(text)
            panel.set_xlabel("tokens of uptraining")
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        _loss_axis(axes[0, 0], losses)
        figure.legend(*_legend(axes[0, 0]), loc="outside lower center", ncols=3)
    alt = "Loss over the tokens of uptraining, in nats per byte. " + "; ".join(
        f"{text}: {_ends(named, (base or {}).get(text))}" for text, named in curves.items()
    )
    return Picture(figure, f"{alt}.", {"curves": {text: dict(named) for text, named in curves.items()}})


def uptraining(
    rows: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    *,
    control: str = "full",
    texts: Sequence[str] = ("sympy", "prose"),
    family: str = "shared",
) -> Picture:
    """``conversion_curves`` of recorded runs: ``rows`` as ``kvlearn study convert`` keeps them.

    ``names`` says which runs to draw, and how to call them. The run ``control`` is drawn too, and gives the
    loss of the model before it was trained on.
    """
    labels = {**names, control: f"{control}, trained on"}
    for name in labels:
        validate.one_of("names", name, {row["run"] for row in rows})
    curves = {
        text: {
            label: [
                (row["tokens"], row["losses"][text]["loss"], row["losses"][text]["error"])
                for row in rows
                if row["run"] == run
            ]
            for run, label in labels.items()
        }
        for text in texts
    }
    base = {text: min(named[labels[control]])[1] for text, named in curves.items()}
    return conversion_curves(curves, control=labels[control], base=base, family=family)


def loss_over_rank(
    curves: Mapping[str, Points],
    *,
    base: float | None = None,
    family: str = "compressed",
    xlabel: str = "rank",
) -> Picture:
    """Loss right after conversion over the rank, or the bytes per token, one curve per initialisation.

    ``curves``: initialisation -> (rank, loss, standard error); ``base``: the loss of the model converted.
    """
    validate.positive("len(curves)", len(curves))
    losses = [loss for points in curves.values() for _, loss, _ in points]
    at = sorted({x for points in curves.values() for x, _, _ in points})
    with drawing(size=(7.5, 3.8)) as (figure, axes):
        draw_curves(axes, curves, family=family, base=base)
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [f"{x:g}" for x in at])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(f"{xlabel}, logarithmic")
        _loss_axis(axes, [*losses, *([] if base is None else [base])])
        figure.legend(*_legend(axes), loc="outside right center")
    alt = f"Loss in nats per byte over the {xlabel}, from {at[0]:g} to {at[-1]:g}. {_ends(curves, base)}."
    return Picture(figure, alt, {"curves": dict(curves), "base": base})


def draw_curves(
    axes: Axes,
    curves: Mapping[str, Points],
    *,
    family: str,
    control: str | None = None,
    base: float | None = None,
) -> None:
    """Curves with error bars, the first of them in the colour of ``family``.

    ``control`` is drawn as full attention, what is called random as a mistake, ``base`` as a dotted line.
    """
    validate.one_of("family", family, COLOURS)
    fixed = {name: MISTAKES[0] for name in curves if name.startswith("random")}
    if control is not None:
        fixed[control] = CONTROL
    for name, style in line_styles(curves, family=family, fixed=fixed).items():
        x, loss, error = zip(*sorted(curves[name]), strict=True)
        order = 2.5 if name == control else 2  # on top, with a thin marker: what it covers shows
        axes.errorbar(
            x, loss, error, label=name, elinewidth=1, capsize=3, lw=1.8, ms=5, zorder=order, **style
        )
    if base is not None:
        axes.axhline(base, color="#8a8a8a", lw=1.4, ls=":", label="base model")


def _legend(axes: Axes) -> tuple[list[Any], list[str]]:
    """Lines without their error bars; the base model at the end."""
    handles, labels = axes.get_legend_handles_labels()
    lines: dict[str, Any] = {
        label: handle[0] if isinstance(handle, tuple) else handle
        for handle, label in zip(handles, labels, strict=True)
    }
    names = sorted(lines, key=lambda name: name == "base model")
    return [lines[name] for name in names], names


def _loss_axis(axes: Axes, losses: Sequence[float]) -> None:
    """Nats per byte; logarithmic where the worst loss is three times the best."""
    axes.set_ylabel("loss, nats per byte")
    if max(losses) > 3 * min(losses) > 0:
        axes.set_yscale("log")
        ticks = [t for t in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12) if min(losses) <= t <= max(losses)]
        axes.set_yticks(ticks)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("loss, nats per byte, logarithmic")


def _ends(curves: Mapping[str, Points], base: float | None) -> str:
    """The loss at both ends of every curve, in words."""
    told = [f"{name} from {min(p)[1]:.2f} to {max(p)[1]:.2f}" for name, p in curves.items()]
    return ", ".join(told if base is None else [*told, f"base model {base:.2f}"])
