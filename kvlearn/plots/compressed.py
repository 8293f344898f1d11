"""Pictures of chapter 03: where the two paths of decode cross, what is low-rank, what RoPE breaks."""

from collections.abc import Collection, Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
from matplotlib.ticker import NullLocator, PercentFormatter

from kvlearn import validate
from kvlearn.measure import Quartiles, format_seconds
from kvlearn.plots.picture import COLOURS, MISTAKES, Line, Picture, drawing, line_styles

PATHS = {"naive": Line(COLOURS["memory"], "--", "s"), "absorbed": Line(COLOURS["compressed"], "-", "o")}


def path_flops(
    T: Sequence[int],
    flops: Mapping[str, Sequence[float]],
    times: Mapping[str, Sequence[Quartiles]] | None = None,
    *,
    crossover: float | None = None,
    title: str = "",
) -> Picture:
    """FLOPs of the naive and the absorbed path over the new tokens of a call, and times measured beside them.

    Keys of ``flops`` and ``times`` are "naive" and "absorbed"; a list of times may be shorter than ``T``.
    ``crossover``: where the lines meet on paper; None or infinity where they do not.
    """
    for name in (*flops, *(times or {})):
        validate.one_of("path", name, PATHS)
    with drawing(1, 2 if times else 1, size=(7.8, 3.7), squeeze=False) as (figure, grid):
        panels = grid[0]
        for name, counts in flops.items():
            panels[0].plot(T, np.asarray(counts) / 1e9, label=name, **PATHS[name].style())
        for name, measured in (times or {}).items():
            median, q1, q3 = (
                np.array([getattr(q, at) * 1e3 for q in measured]) for at in ("median", "q1", "q3")
            )
            bars = [median - q1, q3 - median]
            look = {**PATHS[name].style(), "capsize": 3, "elinewidth": 1}
            panels[1].errorbar(T[: len(median)], median, bars, label=name, **look)
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
            panel.set_xlabel("new tokens per call")
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
    alt = f"{title or 'Two paths of latent attention'}, over new tokens per call: {listed}.{meet}"
    data = {"T": list(T), "flops": dict(flops), "times": dict(times or {}), "crossover": crossover}
    return Picture(figure, f"{alt} Measured: {measured_}." if times else alt, data)


def spectrum(
    energies: Mapping[str, Mapping[str, Any]],
    *,
    share: float = 0.9,
    largest: int | None = None,
    wrong: Collection[str] = ("keys after RoPE",),
) -> Picture:
    """Share of the energy that the best rank-r approximation keeps, over r: Σ_{i ≤ r} σ_i² / Σ σ_i².

    ``energies``: panel -> name -> squared singular values, largest first, the same names in every panel. A
    marker shows where a curve reaches ``share``; names in ``wrong`` are drawn as mistakes. The axis ends at
    ``largest``, the largest rank that the tables can have, by default the longest list. Source: Eckart &
    Young (1936).
    """
    validate.positive("len(energies)", len(energies))
    curves = {
        panel: {name: _shares(f"energies[{panel!r}][{name!r}]", values) for name, values in named.items()}
        for panel, named in energies.items()
    }
    ranks = {
        panel: {name: int((curve < share - 1e-12).sum()) + 1 for name, curve in named.items()}
        for panel, named in curves.items()
    }
    names = list(dict.fromkeys(name for named in curves.values() for name in named))
    end = largest or max(len(curve) for named in curves.values() for curve in named.values())
    styles = line_styles(
        names, family="compressed", fixed=dict.fromkeys([n for n in names if n in wrong], MISTAKES[0])
    )
    with drawing(1, len(curves), size=(3.9 * len(curves), 4.3), sharey=True, squeeze=False) as (figure, axes):
        for panel, (title, named) in zip(axes[0], curves.items(), strict=True):
            panel.axhline(share, color="#8a8a8a", lw=1, ls=":")
            for name, curve in named.items():
                at, rank = np.arange(1, len(curve) + 1), ranks[title][name]
                panel.plot(at, curve, label=f"{name}: {rank}", markevery=[rank - 1], **styles[name])
            panel.set(title=title, xlim=(0, end), ylim=(0, 1.04), xlabel="rank: numbers kept per token")
            panel.yaxis.set_major_formatter(PercentFormatter(1))
            panel.legend(loc="lower right", title=f"rank that keeps {share:.0%}", title_fontsize=9)
        axes[0, 0].set_ylabel("share of the energy kept")
    listed = "; ".join(
        f"{panel}: " + ", ".join(f"{name} {rank}" for name, rank in named.items())
        for panel, named in ranks.items()
    )
    alt = f"Share of the energy kept over the rank, up to {end}. Rank that keeps {share:.0%}: {listed}."
    return Picture(figure, alt, {"shares": curves, "ranks": ranks, "largest": end})


def _shares(name: str, given: Any) -> np.ndarray:
    """The running sum of the energies, as a share of all."""
    values = np.asarray(given, dtype=float)
    if values.ndim != 1 or len(values) == 0 or (np.diff(values) > 1e-6 * values[0]).any() or values[0] <= 0:
        raise ValueError(
            f"{name}: expected squared singular values, largest first, above 0; "
            f"got shape {values.shape}" + (" in another order" if values.ndim == 1 else "")
        )
    return np.cumsum(values) / values.sum()


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
    fixed = dict.fromkeys([name for name in curves if name in wrong], MISTAKES[0])
    styles = line_styles(curves, family="compressed", fixed=fixed)
    with drawing(size=(7.5, 3.4)) as (figure, axes):
        for name, curve in curves.items():
            at = np.arange(len(curve)) if shifts is None else np.asarray(shifts)
            label = f"{name}: moves by {spread[name]:.2g}"
            axes.plot(at, curve, label=label, markevery=max(len(curve) // 10, 1), **styles[name])
        axes.set_xlabel("shift of both positions, in tokens: their distance stays")
        axes.set_ylabel("score")
        figure.legend(loc="outside lower center", ncols=2 if len(curves) == 4 else 1)
    listed = "; ".join(f"{name} {moved:.2g}" for name, moved in spread.items())
    alt = (
        "Score of one query and one key over a shift of both positions; it should be flat, since their "
        f"distance stays. Difference between the largest and the smallest: {listed}."
    )
    return Picture(figure, alt, {"scores": curves, "spread": spread})
