"""The picture of chapter 03: a token's keys and values squeezed to R numbers, and the two paths of decode."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from kvlearn import validate
from kvlearn.plots.picture import COLOURS, Picture, drawing

KEYS, VALUES = to_rgba(COLOURS["full"], 0.9), to_rgba(COLOURS["full"], 0.5)
LATENT, ROTARY = to_rgba(COLOURS["compressed"], 0.9), to_rgba(COLOURS["shared"], 0.9)
SCORES = to_rgba(COLOURS["memory"], 0.9)
TITLE: dict[str, Any] = {"fontsize": 11, "weight": "bold"}


def squeeze(
    n_heads: int = 8, head_dim: int = 16, rank: int = 32, rope_dim: int = 8, *, n_tokens: int = 8192
) -> Picture:
    """A token's keys and values squeezed to R numbers and a rotary key; the two paths of decode from there.

    Above, a cell is a number, of the same size on both sides; below, a block of S tokens is as wide as it has
    numbers per token. ``n_tokens`` is S, the tokens in the cache.
    """
    for name, value in {"n_heads": n_heads, "head_dim": head_dim, "rank": rank, "n_tokens": n_tokens}.items():
        validate.positive(name, value)
    validate.at_most("rank", rank, n_heads * head_dim, "n_heads · head_dim, half of what is squeezed")
    validate.at_least("rope_dim", rope_dim, 0)
    validate.at_most("rope_dim", rope_dim, head_dim, "head_dim")
    validate.at_least(
        "n_tokens", n_tokens, rank + rope_dim
    )  # else the folded query is larger than the scores
    full, cached = 2 * n_heads * head_dim, rank + rope_dim
    largest = {"naive": n_tokens * full, "absorbed": n_tokens * n_heads}
    with drawing(size=(7.8, 5.5)) as (figure, axes):
        axes.set(xlim=(0, 100), ylim=(0.6, 71), xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        _draw_squeeze(axes, n_heads, head_dim, rank, rope_dim)
        _draw_naive_path(axes, 27.5, n_heads, head_dim, rank, rope_dim, n_tokens)
        _draw_absorbed_path(axes, 5.0, n_heads, head_dim, rank, rope_dim, n_tokens)
    alt = (
        f"Above: {full:,} numbers of a token, keys and values of {n_heads} heads, are squeezed to a latent "
        f"of {rank} and a rotary key of {rope_dim}; only these {cached} are cached. Below, two paths of "
        f"decode over {n_tokens:,} cached tokens. Naive: the cache is decompressed to all heads, "
        f"{largest['naive']:,} numbers, then attended. Absorbed: the query is folded down to the latent, "
        f"attends there and the result is folded up; the largest intermediate is {largest['absorbed']:,} "
        "scores."
    )
    return Picture(figure, alt, {"full": full, "cached": cached, "largest": largest})


def _draw_squeeze(axes: Axes, n_heads: int, head_dim: int, rank: int, rope_dim: int) -> None:
    """The upper third: (H, D) cells of keys and of values, an arrow, and as many cells as are cached."""
    full, cached = 2 * n_heads * head_dim, rank + rope_dim
    cell = (22 / head_dim, 14 / n_heads)
    axes.text(0, 69, f"A token's {full:,} numbers, squeezed to {cached:,}", **TITLE)
    for x, name, colour in ((1, "keys", KEYS), (25, "values", VALUES)):
        _cells(axes, (x, 63.5), cell, n_heads * head_dim, head_dim, colour)
        axes.text(x, 64.5, name, fontsize=9)
    axes.text(1, 46.9, f"H = {n_heads} heads, D = {head_dim} numbers to each", fontsize=9)
    _arrow(axes, 48.5, 61.5, 56.5, "squeeze", f"{full / cached:.3g}x fewer")
    n_rows = -(-rank // head_dim) + -(-rope_dim // head_dim)
    top = min(56.5 + n_rows * cell[1] / 2 + 0.6, 63.5)
    low = _cells(axes, (64, top), cell, rank, head_dim, LATENT)
    axes.text(88.6, (top + low) / 2, "latent", fontsize=9, va="center")
    if rope_dim:
        low = _cells(axes, (64, min(low - 1.2, (top + low) / 2 - 2)), cell, rope_dim, head_dim, ROTARY)
        axes.text(88.6, low + cell[1] / 2, "rotary key", fontsize=9, va="center")
    frame = (62.6, low - 1.4), 24.8, top - low + 2.8
    axes.add_patch(Rectangle(*frame, fc="none", ec="#8a8a8a", ls="--", lw=1.2))
    sizes = f"R = {rank}, Dr = {rope_dim}" if rope_dim else f"R = {rank}"
    axes.text(62.6, top + 2.4, f"the cache, for all heads: {sizes}", fontsize=9)


def _draw_naive_path(
    axes: Axes, y: float, n_heads: int, head_dim: int, rank: int, rope_dim: int, n_tokens: int
) -> None:
    """Cache, keys and values of all heads, scores, output."""
    full = 2 * n_heads * head_dim
    unit, start, end = _draw_ends(axes, y, n_heads, head_dim, rank, rope_dim, n_tokens)
    axes.text(0, y + 13.6, "Naive path: decompress every token, then attend", **TITLE)
    lines = "#8a8a8a" if n_heads <= 16 else "none"
    for i in range(2 * n_heads):
        strip = (34 + i * head_dim * unit, y), head_dim * unit, 11
        axes.add_patch(Rectangle(*strip, fc=KEYS if i < n_heads else VALUES, ec=lines, lw=0.5))
    text = f"keys and values of all heads\nlargest: S·H·2D = {n_tokens * full:,}"
    axes.text(34, y - 1, text, va="top", fontsize=8)
    _arrow(axes, start, 33, y + 5.5, "$W_{uk}, W_{uv}$", "decompress")
    _arrow(axes, 35 + full * unit, 79, y + 5.5, "$q\\,K^T$", f"q: H·D = {full // 2:,}")
    axes.text(80, y - 1, f"scores\nH·S = {n_tokens * n_heads:,}", va="top", fontsize=8)
    _arrow(axes, end, 99.5, y + 5.5, "softmax · V", f"out: H·D = {full // 2:,}")


def _draw_absorbed_path(
    axes: Axes, y: float, n_heads: int, head_dim: int, rank: int, rope_dim: int, n_tokens: int
) -> None:
    """Cache, scores, output: the query goes to the latent, and what it finds there comes back."""
    _, start, end = _draw_ends(axes, y, n_heads, head_dim, rank, rope_dim, n_tokens)
    title = "Absorbed path: fold the query down, attend in the latent, fold up"
    axes.text(0, y + 13.6, title, **TITLE)
    width = "R + Dr" if rope_dim else "R"
    words = f"the query folded down: H·({width}) = {n_heads * (rank + rope_dim):,}; no token is decompressed"
    _arrow(axes, start, 79, y + 5.5, "$(W_{uk}^T\\,q)\\;c^T$", words)
    text = f"scores, the largest\nH·S = {n_tokens * n_heads:,}"
    axes.text(80, y - 1, text, va="top", fontsize=8)
    sizes = f"H·R = {n_heads * rank:,}\nto H·D = {n_heads * head_dim:,}"
    _arrow(axes, end, 99.5, y + 5.5, "$W_{uv}$ (softmax · c)", sizes)


def _draw_ends(
    axes: Axes, y: float, n_heads: int, head_dim: int, rank: int, rope_dim: int, n_tokens: int
) -> tuple[float, float, float]:
    """The parts of both paths: the cache at the left, the scores at the right.

    Returns the width of one number per token, where the cache ends and where the scores end.
    """
    full, cached = 2 * n_heads * head_dim, rank + rope_dim
    unit = min(32 / full, 14 / cached)
    axes.text(2.8, y + 5.5, f"S = {n_tokens:,}", rotation=90, ha="right", va="center", fontsize=8)
    for x, width, colour in ((4, rank, LATENT), (4 + rank * unit, rope_dim, ROTARY), (80, n_heads, SCORES)):
        axes.add_patch(Rectangle((x, y), max(width * unit, 0.3 * bool(width)), 11, color=colour, lw=0))
    numbers = f"R + Dr = {cached}" if rope_dim else f"R = {rank}"
    axes.text(4, y - 1, f"the cache\nS x ({numbers})", va="top", fontsize=8)
    return unit, 5 + cached * unit, 81 + n_heads * unit


def _cells(
    axes: Axes, corner: tuple[float, float], cell: tuple[float, float], n: int, columns: int, colour: Any
) -> float:
    """n cells in rows of ``columns``, from the upper left corner down; returns where the lowest row ends."""
    x, y = corner
    for first in range(0, n, columns):
        width = min(columns, n - first) * cell[0]
        y -= cell[1]
        axes.add_patch(Rectangle((x, y), width, cell[1], fc=colour, lw=0))
    if min(cell) > 0.6:
        for i in range(n):
            at = (x + i % columns * cell[0], corner[1] - (i // columns + 1) * cell[1])
            axes.add_patch(Rectangle(at, *cell, fc="none", ec="#8a8a8a", lw=0.5))
    return y


def _arrow(axes: Axes, left: float, right: float, y: float, above: str, below: str) -> None:
    """An arrow to the right, with words above and below it."""
    style = {"arrowstyle": "-|>", "color": "#8a8a8a", "lw": 1.6}
    axes.annotate("", (right, y), (left, y), arrowprops=style)
    axes.text((left + right) / 2, y + 1, above, ha="center", va="bottom", fontsize=9)
    axes.text((left + right) / 2, y - 1, below, ha="center", va="top", fontsize=8)
