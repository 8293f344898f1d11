"""Pictures of chapter 07: the layers of real models as stripes, and where a hybrid fits."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator

from kvlearn import validate
from kvlearn.measure.budget import stack
from kvlearn.measure.cache_size import LayerShape, ModelShape, cache_bytes, read_bytes
from kvlearn.measure.units import format_bytes
from kvlearn.plots.picture import COLOURS, Picture, drawing

# Each kind of layer: its family's colour, and the height of its stripe, so that no colour is needed to tell
# them apart.
KIND_STYLES = {
    "full": (COLOURS["full"], 0.86),
    "latent": (COLOURS["compressed"], 0.66),
    "indexed": (COLOURS["sparse"], 0.52),
    "window": (COLOURS["sliding"], 0.38),
    "state": (COLOURS["linear"], 0.2),
}
LABELS = {
    "full": "all tokens: keys and values",
    "latent": "all tokens: one latent",
    "indexed": "latents, some read",
    "window": "the last tokens",
    "state": "a state",
}


def layer_stripes(models: Sequence[ModelShape], *, length: int = 131_072) -> Picture:
    """The layers of each model, first to last, as stripes; beside them bytes stored and read at ``length``.

    Bytes are per token of the context, so that they compare: full attention's are the same at every length.
    An outline is a layer that stores nothing and reads an earlier one's cache; a layer with a state and
    attention has both stripes, one in the other.
    """
    validate.positive("len(models)", len(models))
    stored = {model.name: cache_bytes(model, length) / length for model in models}
    read = {model.name: read_bytes(model, length) / length for model in models}
    kinds = {model.name: [model.layer(i).kind for i in range(model.n_layers)] for model in models}
    seen = {part for row in kinds.values() for kind in row for part in kind.split(" + ")}
    size = (10.4, 0.42 * len(models) + 1.2)
    with drawing(1, 2, size=size, sharey=True, width_ratios=(2.1, 1)) as (figure, (stripes, bars)):
        for row, model in enumerate(models):
            width = 1 / model.n_layers
            for i in range(model.n_layers):
                _stripe(stripes, model.layer(i), i * width, row, width)
            bars.barh(row - 0.17, stored[model.name], 0.3, color="none", ec=COLOURS["memory"], lw=1.2)
            bars.barh(row + 0.17, read[model.name], 0.3, color=COLOURS["memory"])
            for value, at in ((stored, -0.17), (read, 0.17)):
                text = f" {format_bytes(round(value[model.name]))}"
                bars.text(value[model.name], row + at, text, va="center", fontsize=7)
        stripes.set(xlim=(-0.005, 1.005), ylim=(len(models) - 0.45, -0.55), xticks=[])
        stripes.set_yticks(range(len(models)), [f"{m.name}, {m.n_layers} layers" for m in models])
        stripes.set_xlabel("first layer to last", loc="left")
        bars.set_xscale("log", base=2)
        low, high = min([*stored.values(), *read.values()]), max(stored.values())
        bars.set_xlim(low / 2, high * 6)
        bars.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_bytes(round(x))))
        bars.set_xticks([2**n for n in range(0, 30, 4) if low / 2 <= 2**n <= high * 2])
        bars.xaxis.set_minor_locator(NullLocator())
        bars.set_xlabel(f"per token, at {length // 1024}K tokens", loc="left")
        for panel in (stripes, bars):
            panel.tick_params(axis="y", length=0)
            panel.grid(False)
            panel.spines[:].set_visible(False)
        handles = [Patch(color=KIND_STYLES[kind][0], label=LABELS[kind]) for kind in LABELS if kind in seen]
        if any(model.layer(i).shared for model in models for i in range(model.n_layers)):
            handles.append(Patch(fc="none", ec=COLOURS["memory"], label="outline: reads an earlier layer's"))
        handles.append(Patch(fc="none", ec=COLOURS["memory"], label="stored"))
        handles.append(Patch(color=COLOURS["memory"], label="read by a step"))
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    told = "; ".join(
        f"{model.name}: {stack(model)}, {format_bytes(round(stored[model.name]))} stored and "
        f"{format_bytes(round(read[model.name]))} read"
        for model in models
    )
    alt = f"The layers of {len(models)} models as stripes, and bytes per token at {length:,} tokens. {told}."
    return Picture(figure, alt, {"kinds": kinds, "stored": stored, "read": read})


def _stripe(axes: Axes, layer: LayerShape, left: float, row: int, width: float) -> None:
    """One layer; both stripes where it has two mechanisms, the lower one in front."""
    parts = sorted(layer.kind.split(" + "), key=lambda kind: -KIND_STYLES[kind][1])
    for part in parts:
        colour, height = KIND_STYLES[part]
        style: dict[str, Any] = {"fc": "none" if layer.shared else colour, "ec": colour, "lw": 0.8}
        box = (left + 0.1 * width, row - height / 2)
        axes.add_patch(Rectangle(box, 0.8 * width, height, **style))
