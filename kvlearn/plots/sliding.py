"""Pictures of chapter 04: the ring buffer frame by frame, and the tokens it can depend on."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from kvlearn import validate
from kvlearn.attention import RingCache
from kvlearn.plots.picture import COLOURS, MECHANISMS, Picture, drawing, line_styles

SLIDING, SINKS, FULL = COLOURS["sliding"], COLOURS["shared"], COLOURS["full"]


def ring(window: int, *, n_sinks: int = 0, n_tokens: int = 10) -> Picture:
    """The slots of a ring buffer after each token: which position every slot holds, and which was written.

    The picture shows the contents of a ``RingCache``, read after each append.
    """
    frames = _frames(window, n_sinks, n_tokens)
    n_slots = len(frames[0])
    with drawing(size=(0.62 * n_slots + 3.6, 0.36 * n_tokens + 1.1)) as (figure, axes):
        for t, held in enumerate(frames):
            written, before = held.index(t), frames[t - 1][held.index(t)] if t else -1
            for slot, position in enumerate(held):
                colour = SINKS if slot < n_sinks else SLIDING
                fill = "none" if position < 0 else colour if slot == written else _pale(colour)
                axes.add_patch(Rectangle((slot, t), 0.94, 0.84, fc=fill, ec="#8a8a8a", lw=0.8))
                if position >= 0:  # on a ground that is the same in both themes
                    style = {"color": "black", "weight": "bold" if slot == written else "normal"}
                    axes.text(slot + 0.47, t + 0.44, position, ha="center", va="center", fontsize=9, **style)
            axes.text(-0.2, t + 0.44, f"token {t}", ha="right", va="center", fontsize=9)
            if before >= 0:
                axes.text(n_slots + 0.2, t + 0.44, f"in the place of {before}", va="center", fontsize=9)
        axes.set(xlim=(-1.9, n_slots + 3.2), ylim=(n_tokens, -0.9), xticks=[], yticks=[])
        for slot in range(n_slots):
            axes.text(slot + 0.47, -0.15, f"{slot}", ha="center", va="bottom", fontsize=8)
        axes.text(-0.2, -0.15, "slot", ha="right", va="bottom", fontsize=8)
        axes.grid(False)
        axes.spines[:].set_visible(False)
    kept = f", of which the first {n_sinks} keep the first tokens" if n_sinks else ""
    alt = (
        f"A ring buffer of {n_slots} slots{kept}, after each of {n_tokens} tokens. From token "
        f"{window + n_sinks} on each takes the place of the oldest. At the end the slots hold positions "
        f"{', '.join(map(str, frames[-1]))}."
    )
    return Picture(figure, alt, {"frames": frames})


def _pale(colour: str) -> tuple[float, ...]:
    """Mixed with white, and opaque."""
    return tuple(0.4 * part + 0.6 for part in to_rgb(colour))


def _frames(window: int, n_sinks: int, n_tokens: int) -> list[list[int]]:
    """Which position every slot holds, after each token."""
    cache = RingCache(1, 1, n_tokens, 1, window, n_sinks, torch.float32, torch.device("cpu"))
    token, frames = torch.zeros(1, 1, 1, 1), []
    for _ in range(validate.positive("n_tokens", n_tokens)):
        cache.append(token, token)
        frames.append(cache.slot_positions[0].tolist())
    return frames


def cone(windows: Sequence[int | None], *, n_tokens: int = 24, n_sinks: int = 0) -> Picture:
    """The tokens that the last token depends on, layer by layer: the first layer at the bottom.

    ``windows`` holds the window of each layer, None for one that sees everything. A node is what a layer
    knows of a token; it is coloured where what the last token says can depend on it.
    """
    seen = _heard(windows, n_tokens, n_sinks)
    n_layers = len(windows)
    with drawing(size=(8.2, 0.62 * n_layers + 1.3)) as (figure, axes):
        for layer, window in enumerate(windows, start=1):
            colour = FULL if window is None else SLIDING
            for query in seen[layer]:
                for key in _sees(query, window, n_sinks):
                    axes.plot([key, query], [layer - 1, layer], color=colour, lw=0.8, alpha=0.35, zorder=1)
        for level in range(n_layers + 1):
            colour = FULL if windows[max(level - 1, 0)] is None else SLIDING
            for token in range(n_tokens):
                heard = token in seen[level]
                style = {"color": colour} if heard else {"mfc": "none", "mec": "#8a8a8a", "alpha": 0.6}
                axes.plot(token, level, "o", ms=6, zorder=2, **style)
            count = f"{len(seen[level])} token{'s' if len(seen[level]) > 1 else ''}"
            axes.text(n_tokens - 0.2, level, count, va="center", fontsize=9)
        labels = ["full" if w is None else f"window {w}" for w in windows]
        axes.set_yticks(
            range(n_layers + 1), ["tokens", *(f"layer {i}: {w}" for i, w in enumerate(labels, start=1))]
        )
        axes.set(xlim=(-0.8, n_tokens + 2.6), ylim=(-0.5, n_layers + 0.5), xticks=range(0, n_tokens, 4))
        axes.set_xlabel("position")
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
    reach = [len(level) for level in seen]
    alt = (
        f"What the last of {n_tokens} tokens depends on, through layers with windows "
        f"{', '.join('all' if w is None else str(w) for w in windows)}: at the top 1 token, and down the "
        f"layers {', '.join(map(str, reversed(reach[:-1])))}."
    )
    return Picture(figure, alt, {"seen": seen, "reach": reach})


def _sees(query: int, window: int | None, n_sinks: int) -> list[int]:
    start = 0 if window is None else max(query - window + 1, 0)
    return [*range(min(n_sinks, start)), *range(start, query + 1)]


def _heard(windows: Sequence[int | None], n_tokens: int, n_sinks: int) -> list[list[int]]:
    """Level by level from the input up: the positions that the last token's output can depend on."""
    validate.positive("len(windows)", len(windows))
    levels = [[validate.positive("n_tokens", n_tokens) - 1]]
    for window in reversed(windows):
        levels.append(sorted({key for query in levels[-1] for key in _sees(query, window, n_sinks)}))
    return levels[::-1]


NOISE = 1e-14  # what rounding leaves of a difference of distributions, in fp64


def influence(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], *, reaches: Mapping[str, int] | None = None
) -> Picture:
    """How much a prediction changes when a token so far back is another one, and the reach on paper.

    ``curves``: by model, distances and the change at each; ``reaches``: by model, the largest distance that
    its windows let through.
    """
    reaches = reaches or {}
    windows = [name for name in curves if name in reaches]
    styles = line_styles(curves, fixed=dict.fromkeys(windows[:1], MECHANISMS["window"]))
    with drawing() as (figure, axes):
        for name, (distances, changes) in curves.items():
            shown = [change if change > NOISE else np.nan for change in changes]
            axes.plot(distances, shown, ms=5, label=name, **styles[name])
            if name in reaches:
                axes.axvline(reaches[name], color=styles[name]["color"], lw=1.2, ls="--")
                text = f"the most that can\nreach: {reaches[name]} "
                axes.text(
                    reaches[name], 0.97, text, transform=axes.get_xaxis_transform(), ha="right", va="top"
                )
        axes.set_yscale("log")
        axes.set_xlim(0)
        axes.set_xlabel("distance, tokens")
        axes.set_ylabel("change of the prediction, nats")
        axes.legend(loc="lower left")
    listed = "; ".join(
        f"{name} from {max(changes):.2g} nats down to {changes[-1]:.2g} at distance {distances[-1]}"
        + (f", the reach on paper being {reaches[name]}" if name in reaches else "")
        for name, (distances, changes) in curves.items()
    )
    alt = f"How much a prediction changes with a token so far back: {listed}."
    return Picture(figure, alt, {"curves": dict(curves), "reaches": dict(reaches)})


def beyond_the_window(rows: Sequence[Mapping[str, Any]], *, window: int, width: int = 16) -> Picture:
    """Loss over the position, one panel per model, one line per variant: rows of ``kvlearn study sinks``.

    Each point is the mean over ``width`` positions.
    """
    models = list(dict.fromkeys(row["run"] for row in rows))
    validate.positive("len(rows)", len(rows))
    data: dict[str, Any] = {model: {} for model in models}
    styles = line_styles((row["variant"] for row in rows), family="shared")  # the colour of sinks
    with drawing(1, len(models), size=(4.2 * len(models), 3.6), sharey=True, squeeze=False) as (figure, axes):
        for panel, model in zip(axes[0], models, strict=True):
            for row in (row for row in rows if row["run"] == model):
                losses = np.array(row["by_position"])
                means = losses[: len(losses) // width * width].reshape(-1, width).mean(1)
                style = {**styles[row["variant"]], "mfc": "none", "ms": 5, "lw": 1.8}
                at = (np.arange(len(means)) + 0.5) * width
                panel.plot(at, means, label=row["variant"], **style)
                data[model][row["variant"]] = means
            panel.axvline(window, color="#8a8a8a", lw=1, ls=":")
            text = " the first token leaves"
            panel.text(window, 0.98, text, transform=panel.get_xaxis_transform(), va="top", fontsize=8)
            panel.set_title(f"{model}\n{row['first_token_weight']:.1%} on the first token")
            panel.set_xlabel("position")
        axes[0, 0].set_ylabel("loss, nats per byte")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    listed = "; ".join(
        f"{model}: " + ", ".join(f"{variant} {means[-1]:.2f}" for variant, means in variants.items())
        for model, variants in data.items()
    )
    alt = f"Loss over the position with windows of {window}. At the end, in nats per byte, {listed}."
    return Picture(figure, alt, data)
