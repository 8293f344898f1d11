"""Pictures of chapter 05: patterns as grids, how long each token is needed, and what content selects."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from kvlearn import validate
from kvlearn.attention import Pattern, parse
from kvlearn.attention.patterns import Strided, live_tokens, n_slots, primitives
from kvlearn.plots.picture import COLOURS, PALETTE, Picture, drawing

SPARSE = COLOURS["sparse"]


def gallery(
    patterns: Mapping[str, Pattern | str],
    *,
    n_tokens: int = 64,
    block: int = 8,
    columns: int = 3,
    families: Mapping[str, str] | None = None,
) -> Picture:
    """Each pattern as a grid, one row per query: the pairs it sees, and in pale what is computed besides.

    Queries are computed ``block`` at a time over all columns that one of them needs. Beneath: the tokens that
    a cache must have room for, and those that the last step reads. ``families``: by name, the mechanism or
    family whose colour it takes; unless given, that of its own name, or of "sparse".
    """
    parsed = {name: parse(pattern) for name, pattern in patterns.items()}
    data: dict[str, Any] = {}
    for name, pattern in parsed.items():
        sees = pattern.mask(n_tokens)
        computed = _computed(pattern, n_tokens, block)
        data[name] = {
            "sees": sees,
            "computed": computed,
            "stored": n_slots(pattern, n_tokens),
            "read": int(sees[-1].sum()),
        }
    columns = min(columns, validate.positive("len(patterns)", len(patterns)))
    rows = -(-len(patterns) // columns)
    with drawing(rows, columns, size=(2.75 * columns, 3.25 * rows), squeeze=False) as (figure, axes):
        for panel in axes.flat[len(patterns) :]:
            panel.set_visible(False)
        for panel, (name, found) in zip(axes.flat, data.items(), strict=False):
            colour = _colour(name, families)
            _grid(panel, found["computed"].int() + found["sees"].int(), colour)
            panel.set_title(name)
            panel.set_xlabel(f"stored {found['stored']}, read {found['read']} of {n_tokens}")
    listed = "; ".join(
        f"{name}, {parsed[name]}: {int(found['sees'].sum())} pairs seen, {int(found['computed'].sum())} "
        f"computed, {found['stored']} tokens stored, {found['read']} read by the last"
        for name, found in data.items()
    )
    alt = f"Patterns over {n_tokens} tokens, one row per query, computed {block} queries at a time. {listed}."
    return Picture(figure, alt, data)


def _colour(name: str, families: Mapping[str, str] | None) -> str:
    own = name.lower() if name.lower() in PALETTE else "sparse"
    return PALETTE[validate.one_of("families", (families or {}).get(name, own), PALETTE)]


def _computed(pattern: Pattern, n_tokens: int, block: int) -> torch.Tensor:
    """The pairs whose scores are computed, masked out or not: see ``attend_pattern``."""
    computed = torch.zeros(n_tokens, n_tokens, dtype=torch.bool)
    for word in primitives(pattern):
        if isinstance(word, Strided):  # done by classes, of which a grid of this size shows the pairs alone
            computed |= word.mask(n_tokens)
            continue
        for first in range(0, n_tokens, block):
            last = min(first + block, n_tokens) - 1
            computed[first : last + 1, word.visible_keys(first, last)] = True
    return computed


def _grid(panel: Axes, levels: torch.Tensor, colour: str) -> None:
    """0: nothing, 1: pale, 2: full colour."""
    shades = ListedColormap(["#8a8a8a18", f"{colour}4d", colour])
    panel.pcolormesh(levels.numpy(), cmap=shades, vmin=0, vmax=2, rasterized=True)
    panel.set(xticks=[], yticks=[], aspect="equal")
    panel.invert_yaxis()
    panel.grid(False)
    panel.spines[:].set_visible(False)


def lifetimes(
    patterns: Mapping[str, Pattern | str],
    *,
    n_tokens: int = 96,
    columns: int = 3,
    families: Mapping[str, str] | None = None,
) -> Picture:
    """How long each token is needed: a line per token, from when it is written to its last reader.

    A column holds what the cache must hold at that moment; the dashed one is the fullest. ``families`` as in
    ``gallery``.
    """
    parsed = {name: parse(pattern) for name, pattern in patterns.items()}
    data: dict[str, Any] = {}
    columns = min(columns, validate.positive("len(patterns)", len(patterns)))
    rows = -(-len(patterns) // columns)
    with drawing(rows, columns, size=(2.75 * columns, 3.4 * rows), squeeze=False) as (figure, axes):
        for panel in axes.flat[len(patterns) :]:
            panel.set_visible(False)
        for panel, (name, pattern) in zip(axes.flat, parsed.items(), strict=False):
            last, live = pattern.last_readers(n_tokens), live_tokens(pattern, n_tokens)
            born, colour = torch.arange(n_tokens), _colour(name, families)
            panel.hlines(born, born, torch.maximum(last, born) + 1, color=colour, lw=150 / n_tokens)
            panel.plot(born, born, color="#8a8a8a", lw=1)
            panel.axvline(int(live.argmax()) + 0.5, color="#8a8a8a", lw=1.2, ls="--")
            panel.set_title(name)
            panel.set(xlim=(0, n_tokens), ylim=(n_tokens, 0), aspect="equal")
            panel.set_xlabel(f"time\nat most {int(live.max())} of {n_tokens} kept")
            panel.grid(False)
            panel.set_xticks([0, n_tokens])
            panel.set_yticks([])
            data[name] = {"last_readers": last, "live": live, "slots": n_slots(pattern, n_tokens)}
        for panel in axes[:, 0]:
            panel.set_ylabel("token")
    listed = "; ".join(f"{name}: at most {found['slots']}" for name, found in data.items())
    alt = (
        f"For each of {n_tokens} tokens the time from its writing to its last reader. Kept at once: {listed}."
    )
    return Picture(figure, alt, data)


def selections(chosen: Mapping[str, np.ndarray | torch.Tensor], *, title: str = "") -> Picture:
    """Which keys the queries of one head selected by content: one grid per mechanism, one row per query."""
    grids = {name: torch.as_tensor(grid) for name, grid in chosen.items()}
    validate.positive("len(chosen)", len(grids))
    figure: Figure
    with drawing(1, len(grids), size=(2.75 * len(grids), 3.6), squeeze=False) as (figure, axes):
        for panel, (name, grid) in zip(axes[0], grids.items(), strict=True):
            _grid(panel, 2 * grid.int(), SPARSE)
            panel.set_title(name)
            panel.set_xlabel(f"the last query reads {int(grid[-1].sum())} of {grid.shape[1]}")
        axes[0, 0].set_ylabel("query")
        if title:
            figure.suptitle(title, fontsize=10, color="#808080")
    listed = "; ".join(
        f"{name}: {int(grid.sum())} of {int(np.tri(*grid.shape).sum())} pairs, "
        f"{int(grid[-1].sum())} by the last"
        for name, grid in grids.items()
    )
    alt = f"Keys that each query selected by content. {title or 'By panel'}: {listed}."
    return Picture(figure, alt, dict(grids))
