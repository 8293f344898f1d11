"""Layers that read the keys and values of other layers, as a stack with arrows."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from matplotlib.colors import to_rgba
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from matplotlib.path import Path

from kvlearn import validate
from kvlearn.measure import format_bytes
from kvlearn.plots.picture import COLOURS, Picture, drawing


def across_layers(
    owners: Sequence[int],
    kinds: Sequence[str] | None = None,
    *,
    stored: Sequence[float] | None = None,
    title: str = "",
) -> Picture:
    """The layers as a stack of stripes, an arrow from each reader to the layer it reads, bytes stored beside.

    ``owners`` and ``kinds`` as in a ModelConfig: whose keys and values a layer reads, and its mechanism.
    Without ``stored``, the bytes per layer, the picture counts layers that store.
    """
    n_layers = validate.positive("len(owners)", len(owners))
    kinds = ["keys and values"] * n_layers if kinds is None else list(kinds)
    for i, owner in enumerate(owners):
        validate.at_least(f"owners[{i}]", owner, 0)
        validate.at_most(f"owners[{i}]", owner, i, "the layer itself or an earlier one")
    amounts = [float(owner == i) for i, owner in enumerate(owners)] if stored is None else list(stored)
    for name, values in (("kinds", kinds), ("stored", amounts)):
        if len(values) != n_layers:
            raise ValueError(f"{name}: expected one for each of {n_layers} layers, got {len(values)}")
    arrows = [(i, owner) for i, owner in enumerate(owners) if owner != i]
    total = sum(amounts)
    whole = format_bytes(total) if stored is not None else f"K and V of {total:g} layers"
    colours = _kind_colours(kinds)
    height = min(0.3, 5.2 / n_layers)  # inches a layer
    with drawing(1, 2, size=(7.8, 1.1 + height * n_layers), sharey=True, width_ratios=(1, 1.2)) as (
        figure,
        (stack, bars),
    ):
        for i, (owner, kind) in enumerate(zip(owners, kinds, strict=True)):
            fill = to_rgba(colours[kind], 0.9 if owner == i else 0.0)
            stack.add_patch(Rectangle((0, i - 0.38), 1, 0.76, fc=fill, ec=colours[kind], lw=1.1))
            bars.barh(i, amounts[i], height=0.76, color=colours[kind], alpha=0.9)
            amount = "0" if owner != i else format_bytes(amounts[i]) if stored is not None else "1"
            size = 8 if height > 0.2 else 7
            bars.text(amounts[i] + 0.01 * max(amounts), i, amount, va="center", fontsize=size)
        for reader, owner in arrows:
            out = _bulge(reader - owner, height)
            curve = Path([(-0.02, reader), (out, reader), (out, owner), (-0.02, owner)], [1, 4, 4, 4])
            style: dict[str, Any] = {
                "arrowstyle": "-|>",
                "mutation_scale": 8,
                "color": colours[kinds[reader]],
                "lw": 1,
            }
            stack.add_patch(FancyArrowPatch(path=curve, **style))
        reach = max((reader - owner for reader, owner in arrows), default=0)
        stack.set(xlim=(0.8 * _bulge(reach, height), 1.02), ylim=(n_layers - 0.4, -0.6), xticks=[])
        stack.set_yticks(range(0, n_layers, 1 if height > 0.15 else 5))
        stack.tick_params(length=0)
        stack.set_ylabel("layer")
        bars.tick_params(axis="y", length=0, labelleft=False)
        bars.set(xlim=(0, 1.25 * max(amounts)), xticks=[])
        bars.set_xlabel(f"stored: {whole} in all", loc="left")
        for panel in (stack, bars):
            panel.grid(False)
            panel.spines[:].set_visible(False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color="#808080")
        handles = [Patch(color=colour, label=f"{kind}, its own K and V") for kind, colour in colours.items()]
        handles.append(Patch(fc="none", ec="#8a8a8a", label="none: reads where the arrow points"))
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    listed = "; ".join(
        f"layer {source} is read by {_runs(reader for reader, owner in arrows if owner == source)}"
        for source in sorted({owner for _, owner in arrows})
    )
    alt = (
        f"{title or 'A stack of layers'}: {n_layers} layers, {n_layers - len(arrows)} with keys and values "
        f"of their own, {len(arrows)} that read another's. {listed or 'No layer reads another'}. "
        f"Stored: {whole}."
    )
    return Picture(figure, alt, {"arrows": arrows, "stored": amounts, "total": total})


def _bulge(layers: int, height: float) -> float:
    """How far left an arrow over so many layers bends, with a height in inches a layer."""
    return -0.25 - 0.95 * min(1, layers * height / 3)


def _kind_colours(kinds: Iterable[str]) -> dict[str, str]:
    """A colour for each kind of layer: its family's where the name says it, else those of this chapter."""
    families = {"full": "full", "window": "sliding", "mhc": "compressed", "mla": "compressed"}
    rest = iter(("shared", "linear", "sparse", "hybrid", "memory"))
    return {
        kind: COLOURS[families[kind] if kind in families else next(rest, "memory")]
        for kind in dict.fromkeys(kinds)
    }


def _runs(layers: Iterable[int]) -> str:
    """[15, 16, 17, 20] -> '15 to 17, 20'."""
    steps = groupby(enumerate(sorted(layers)), lambda pair: pair[1] - pair[0])
    runs = [[layer for _, layer in run] for _, run in steps]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
