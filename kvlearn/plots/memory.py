"""Pictures of chapter 00: the size of a cache."""

from collections.abc import Sequence

import numpy as np

from kvlearn.measure import GB, GIB, ModelShape, cache_bytes, read_bytes, weights_bytes
from kvlearn.plots.picture import COLOURS, Picture, drawing


def cache_growth(
    model: ModelShape, *, batch: int = 16, card_bytes: float = 80 * GB, longest_shown: int = 65_536
) -> Picture:
    """Weights and cache over the context, beside the memory of the card that must hold both."""
    contexts = np.linspace(1, longest_shown, 400).astype(int)
    weights = weights_bytes(model) / GIB
    cache = np.array([cache_bytes(model, int(n), batch=batch) for n in contexts]) / GIB
    card = card_bytes / GIB
    fits = contexts[weights + cache <= card]
    longest = int(fits[-1]) if len(fits) else 0
    with drawing() as (figure, axes):
        axes.fill_between(contexts, 0, weights, color=COLOURS["memory"], alpha=0.35, lw=0)
        axes.fill_between(contexts, weights, weights + cache, color=COLOURS["full"], alpha=0.35, lw=0)
        axes.plot(contexts, weights + cache, color=COLOURS["full"])
        axes.axhline(card, color=COLOURS["mistake"], ls="--", lw=1.6)
        top = max(1.6 * card, 1.15 * weights)
        axes.set_ylim(0, min(top, 1.05 * (weights + cache[-1])) if cache[-1] > card else top)
        axes.set_xlim(0, contexts[-1])
        ticks = np.linspace(0, longest_shown, 9)
        axes.set_xticks(ticks, [f"{n / 1024:g}K" for n in ticks])
        axes.set_xlabel("tokens of context")
        axes.set_ylabel("GiB")
        axes.set_title(f"{model.name}, {batch} users, 16-bit cache")
        axes.text(contexts[8], weights / 2, "weights", va="center")
        axes.text(contexts[8], card * 1.03, f"memory of the card ({card_bytes / GB:.0f} GB)", va="bottom")
        if 0 < longest < contexts[-1]:
            axes.plot([longest], [card], "o", color=COLOURS["full"])
            axes.annotate(
                f"full at {longest / 1024:.0f}K tokens",
                (longest, card),
                xytext=(14, -34),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "#8a8a8a"},
            )
        axes.text(contexts[-1] * 0.94, (weights + card) / 2, "cache", ha="right", va="center", weight="bold")
    alt = (
        f"Memory over context for {model.name} with {batch} users: the weights stay at {weights:.0f} GiB, "
        f"the cache grows in proportion to the context, and together they fill a card of "
        f"{card_bytes / GB:.0f} GB at about {longest / 1024:.0f}K tokens."
    )
    return Picture(
        figure, alt, {"contexts": contexts, "weights": weights, "cache": cache, "longest": longest}
    )


def bytes_per_token(models: Sequence[ModelShape], *, length: int = 32_768) -> Picture:
    """Bytes that one sequence of ``length`` tokens stores, and bytes that one step reads, model by model."""
    models = sorted(models, key=lambda m: cache_bytes(m, length), reverse=True)
    stored = [cache_bytes(m, length) / GIB for m in models]
    read = [read_bytes(m, length) / GIB for m in models]
    at = np.arange(len(models))
    with drawing(size=(7.5, 0.36 * len(models) + 1.2)) as (figure, axes):
        axes.plot(stored, at, "o", color=COLOURS["full"], ms=9, label="stored")
        axes.plot(read, at, "|", color=COLOURS["mistake"], ms=16, mew=2.5, label="read by one step")
        for y, (value, touched) in enumerate(zip(stored, read, strict=True)):
            text = f"{value:.2f}" if value == touched else f"{value:.2f} stored, {touched:.2f} read"
            axes.text(1.25 * max(value, touched), y, text, va="center", fontsize=8)
        axes.set_yticks(at, [m.name.replace(" as the article", ",\nas the article") for m in models])
        axes.invert_yaxis()
        axes.set_xscale("log", base=4)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(min(stored) / 2, 2.5 * max(stored))
        axes.set_xlabel(f"GiB for one sequence of {length // 1024}K tokens, 16-bit, logarithmic")
        axes.legend(loc="lower right")
    listed = "; ".join(
        f"{m.name} {s:.2f} stored, {r:.2f} read" for m, s, r in zip(models, stored, read, strict=True)
    )
    alt = f"Dots for the cache of one sequence of {length // 1024}K tokens, in GiB: {listed}."
    return Picture(figure, alt, {"models": [m.name for m in models], "stored": stored, "read": read})
