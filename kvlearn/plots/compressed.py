"""Pictures of chapter 03: where the two roads of decode cross, what is low-rank, what RoPE breaks."""

from collections.abc import Collection, Mapping, Sequence
from itertools import cycle
from math import isfinite
from typing import Any

import numpy as np
from matplotlib.ticker import NullLocator, PercentFormatter

from kvlearn import validate
from kvlearn.measure import Quartiles, format_seconds
from kvlearn.plots.picture import COLOURS, Picture, drawing

ROADS = {"naive": (COLOURS["memory"], "s--"), "absorbed": (COLOURS["compressed"], "o-")}


def roads(
    T: Sequence[int],
    flops: Mapping[str, Sequence[float]],
    times: Mapping[str, Sequence[Quartiles]] | None = None,
    *,
    crossover: float | None = None,
    title: str = "",
) -> Picture:
    """FLOPs of the naive and the absorbed road over the new tokens of a call, and times measured beside them.

    Keys of ``flops`` and ``times`` are "naive" and "absorbed"; a list of times may be shorter than ``T``.
    ``crossover``: where the lines meet on paper; None or infinity where they do not.
    """
    for name in (*flops, *(times or {})):
        validate.one_of("road", name, ROADS)
    with drawing(1, 2 if times else 1, size=(7.8, 3.7), squeeze=False) as (figure, grid):
        panels = grid[0]
        for name, counts in flops.items():
            colour, style = ROADS[name]
            panels[0].plot(T, np.asarray(counts) / 1e9, style, color=colour, label=name)
        for name, measured in (times or {}).items():
            colour, style = ROADS[name]
            median, q1, q3 = (
                np.array([getattr(q, at) * 1e3 for q in measured]) for at in ("median", "q1", "q3")
            )
            bars = [median - q1, q3 - median]
            at, look = T[: len(median)], {"fmt": style, "color": colour, "capsize": 3, "elinewidth": 1}
            panels[1].errorbar(at, median, bars, label=name, **look)
        if crossover is not None and min(T) <= crossover <= max(T):
            panels[0].axvline(crossover, color="#8a8a8a", lw=1, ls=":")
            left = crossover > min(T) ** 0.3 * max(T) ** 0.7  # of the line, where the right has no room
            place = {
                "transform": panels[0].get_xaxis_transform(),
                "fontsize": 9,
                "ha": "right" if left else "left",
            }
            words = f"crossover:\n{crossover:.3g} tokens"
            panels[0].text(crossover * (0.92 if left else 1.09), 0.03, words, **place)
        labels = ("GFLOP", "ms, median and quartiles")
        for panel, label in zip(panels, labels, strict=False):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(T, [f"{n:,}" if len(T) < 9 or i % 2 == 0 else "" for i, n in enumerate(T)])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.set_xlabel("new tokens a call")
            panel.set_ylabel(label)
            panel.yaxis.set_major_formatter("{x:g}")
        panels[0].legend(loc="upper left")
        for panel, name in zip(panels, ("On paper", "Measured"), strict=False):
            panel.set_title(name)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color="#808080")
    listed = "; ".join(
        f"{name} {n[0] / 1e9:.3g} GFLOP at {T[0]}, {n[-1] / 1e9:.3g} at {T[-1]}" for name, n in flops.items()
    )
    measured_ = "; ".join(
        f"{name} {format_seconds(m[0].median)} at {T[0]}, {format_seconds(m[-1].median)} at {T[len(m) - 1]}"
        for name, m in (times or {}).items()
    )
    meet = f" The lines meet at {crossover:.3g} tokens." if crossover and isfinite(crossover) else ""
    alt = f"{title or 'Two roads of latent attention'}, over new tokens a call: {listed}.{meet}"
    data = {"T": list(T), "flops": dict(flops), "times": dict(times or {}), "crossover": crossover}
    return Picture(figure, f"{alt} Measured: {measured_}." if times else alt, data)


def spectrum(
    energies: Mapping[str, Any], *, share: float = 0.9, wrong: Collection[str] = ("keys after RoPE",)
) -> Picture:
    """Share of the energy that the best rank-r approximation keeps, over r: Σ_{i ≤ r} σ_i² / Σ σ_i².

    ``energies``: name -> squared singular values, largest first. A dot stands where a curve reaches
    ``share``; names in ``wrong`` are drawn as mistakes. Source: Eckart & Young (1936).
    """
    validate.positive("len(energies)", len(energies))
    curves = {}
    for name, given in energies.items():
        values = np.asarray(given, dtype=float)
        if (
            values.ndim != 1
            or len(values) == 0
            or (np.diff(values) > 1e-6 * values[0]).any()
            or values[0] <= 0
        ):
            raise ValueError(
                f"energies[{name!r}]: expected squared singular values, largest first, above 0; "
                f"got shape {values.shape}" + (" in another order" if values.ndim == 1 else "")
            )
        curves[name] = np.cumsum(values) / values.sum()
    ranks = {name: int((curve < share - 1e-12).sum()) + 1 for name, curve in curves.items()}
    palette = cycle(
        COLOURS[family] for family in ("compressed", "full", "shared", "memory", "sparse", "linear")
    )
    with drawing(size=(7.5, 3.8)) as (figure, axes):
        axes.axhline(share, color="#8a8a8a", lw=1, ls=":")
        for (name, curve), line in zip(curves.items(), cycle(("-", "-.", (0, (5, 1)), "-")), strict=False):
            colour, style = (COLOURS["mistake"], "--") if name in wrong else (next(palette), line)
            label = f"{name}: {ranks[name]} of {len(curve)}"
            axes.plot(np.arange(1, len(curve) + 1), curve, ls=style, color=colour, label=label)
            axes.plot(ranks[name], curve[ranks[name] - 1], "o", color=colour)
        axes.set(
            ylim=(0, 1.04),
            xlim=(0, None),
            xlabel="rank: numbers kept a token",
            ylabel="share of the energy kept",
        )
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(loc="lower right", title=f"rank that keeps {share:.0%}", title_fontsize=9)
    listed = "; ".join(f"{name} {ranks[name]} of {len(curve)}" for name, curve in curves.items())
    alt = f"Share of the energy kept over the rank. Rank that keeps {share:.0%}: {listed}."
    return Picture(figure, alt, {"shares": curves, "ranks": ranks})


def rope_on_latent(
    scores: Mapping[str, Any],
    *,
    shifts: Sequence[int] | None = None,
    wrong: Collection[str] = ("RoPE on the latent",),
) -> Picture:
    """The score of one query and one key while both positions move together: flat where only distance counts.

    ``scores``: name -> a score for each of ``shifts``, by default 0, 1, 2 …; names in ``wrong`` are mistakes.
    """
    validate.positive("len(scores)", len(scores))
    curves = {name: np.asarray(values, dtype=float) for name, values in scores.items()}
    spread = {name: float(np.ptp(curve)) for name, curve in curves.items()}
    palette = cycle(COLOURS[family] for family in ("compressed", "full", "shared", "memory"))
    with drawing(size=(7.5, 3.4)) as (figure, axes):
        for (name, curve), style in zip(curves.items(), cycle(("-", "-.", (0, (1, 1)))), strict=False):
            colour, line = (COLOURS["mistake"], "--") if name in wrong else (next(palette), style)
            at = np.arange(len(curve)) if shifts is None else np.asarray(shifts)
            axes.plot(at, curve, ls=line, color=colour, label=f"{name}: moves by {spread[name]:.2g}")
        axes.set_xlabel("shift of both positions, in tokens: their distance stays")
        axes.set_ylabel("score")
        figure.legend(loc="outside lower center", ncols=2 if len(curves) == 4 else 1)
    listed = "; ".join(f"{name} {moved:.2g}" for name, moved in spread.items())
    alt = (
        "Score of one query and one key over a shift of both positions; it should be flat, since their "
        f"distance stays. Difference between the largest and the smallest: {listed}."
    )
    return Picture(figure, alt, {"scores": curves, "spread": spread})
