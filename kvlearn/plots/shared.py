"""Pictures of chapter 02: query heads wired to their pools; bytes stored and bytes read."""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, log2
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MultipleLocator, NullLocator
from torch import Tensor

from kvlearn import validate
from kvlearn.measure import format_bytes
from kvlearn.plots.picture import COLOURS, PALETTE, Picture, drawing

Route = Sequence[int]  # which pool each query head reads


def pools(
    designs: Mapping[str, Route | Sequence[Route]], *, head_dim: int = 128, columns: int = 3
) -> Picture:
    """Query heads wired to the KV heads they read, one panel per design.

    A design is a route, the pool of each query head, or two routes: those of two layers, of which the second
    reads the keys and values of the first. Under each are the numbers stored and read for every token in
    the cache, a layer.
    """
    columns = min(columns, validate.positive("len(designs)", len(designs)))
    rows = -(-len(designs) // columns)
    data: dict[str, Any] = {}
    size = (max(2.6 * columns, 4.0), 2.3 * rows + (0.4 if columns > 2 else 0.6))
    with drawing(rows, columns, size=size, squeeze=False) as (figure, axes):
        for panel in axes.flat[len(designs) :]:
            panel.set_visible(False)
        for panel, (name, given) in zip(axes.flat, designs.items(), strict=False):
            routes = _routes(name, given)
            n_kv_heads = max(map(max, routes)) + 1
            _draw_pools(panel, routes, n_kv_heads)
            data[name] = {
                "wires": [(i, h, g) for i, route in enumerate(routes) for h, g in enumerate(route)],
                "stored": 2 * n_kv_heads * head_dim // len(routes),
                "read": 2 * n_kv_heads * head_dim,
            }
            panel.set_title(name)
            panel.set_xlabel(f"stored {data[name]['stored']:,}, read {data[name]['read']:,}")
        handles = [
            Patch(color=COLOURS["full"], label="keys and values of one query head"),
            Patch(color=COLOURS["shared"], label="of several, or of several layers"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2 if columns > 2 else 1)
        figure.supylabel(f"numbers per token and layer, D = {head_dim}", fontsize=9, color="#808080")
    listed = "; ".join(
        f"{name}: {_pools_in_words(given['wires'])}, {given['stored']:,} numbers stored, "
        f"{given['read']:,} read"
        for name, given in data.items()
    )
    alt = f"Query heads wired to the KV heads they read, with numbers per token and layer. {listed}."
    return Picture(figure, alt, data)


def _routes(name: str, given: Route | Sequence[Route]) -> list[list[int]]:
    """A design as one route or two; ValueError for anything else."""
    each: list[Any] = given.tolist() if isinstance(given, Tensor) else list(given)
    routes = [list(route) for route in (each if each and np.ndim(each[0]) else [each])]
    if not all(routes):
        raise ValueError(f"designs[{name!r}]: expected a pool for each query head, got none")
    if len(routes) > 2:
        raise ValueError(f"designs[{name!r}]: expected the routes of one layer or two, got {len(routes)}")
    return [[validate.at_least(f"designs[{name!r}]", pool, 0) for pool in route] for route in routes]


def _draw_pools(panel: Axes, routes: list[list[int]], n_kv_heads: int) -> None:
    """Query heads of the first layer above the KV heads, those of a second below, and the wires between."""
    n_heads = len(routes[0])
    at = (np.arange(n_kv_heads) + 0.5) * n_heads / n_kv_heads - 0.5
    wires = [pool for route in routes for pool in route]
    colour = COLOURS["full" if len(set(wires)) == len(wires) else "shared"]
    width = min(0.82, 0.1 * n_heads)
    for route, y, edge, side in zip(routes, (1.0, -1.0), (0.24, -0.24), ("bottom", "top"), strict=False):
        for h, g in enumerate(route):
            panel.plot([h, at[g]], [y, edge], color=colour, lw=1.5, alpha=0.85, zorder=1)
        panel.plot(
            range(len(route)), [y] * len(route), "o", color="#8a8a8a", ms=min(8, 90 / n_heads), zorder=2
        )
        text = "query heads" if len(routes) == 1 else f"query heads of {'a layer' if y > 0 else 'the next'}"
        panel.text(-0.35, 1.17 * y, text, va=side, fontsize=8)
    for x in at:
        for letter, y in (("K", 0.0), ("V", -0.24)):
            box = Rectangle((x - width / 2, y), width, 0.24, fc=colour, ec="#8a8a8a", lw=0.6, zorder=3)
            panel.add_patch(box)
            ink = "white" if colour == COLOURS["full"] else "black"  # its ground is the same in both themes
            if n_heads <= 16:
                panel.text(x, y + 0.115, letter, color=ink, ha="center", va="center", fontsize=7, zorder=4)
    lowest = -0.34 if len(routes) == 1 else -1.5
    panel.set(xlim=(-0.6, n_heads - 0.4), ylim=(lowest, 1.45), xticks=[], yticks=[])
    panel.grid(False)
    panel.spines[:].set_visible(False)


def _pools_in_words(wires: Iterable[tuple[int, int, int]]) -> str:
    """How many query heads read each KV head, with the number of layers where there are two."""
    wires = list(wires)
    sizes = np.bincount([g for _, _, g in wires])
    n_layers = len({layer for layer, _, _ in wires})
    heads = f"{len(sizes)} KV head{'s' if len(sizes) > 1 else ''}"
    each = f"{sizes[0]} each" if len(set(sizes)) == 1 else f"{', '.join(map(str, sizes))}"
    return f"{heads} read by {each}" + (f" in {n_layers} layers" if n_layers > 1 else "")


def stored_and_read(rows: Sequence[Mapping[str, Any]], *, title: str = "") -> Picture:
    """Bytes that each design stores, and bytes that one step reads: two bars per design.

    A row has ``name``, ``stored`` and ``read``, as the last of a decoder's table, and may have a ``family``:
    a family or mechanism of PALETTE, "shared" unless given. The axis is logarithmic where amounts lie more
    than 32x apart.
    """
    validate.positive("len(rows)", len(rows))
    amounts = [row[column] for row in rows for column in ("stored", "read")]
    positive = [amount for amount in amounts if amount > 0]
    if not positive:
        raise ValueError("rows: expected an amount above 0, got none")
    log = max(positive) / min(positive) > 32
    start = min(positive) / 4 if log else 0
    with drawing(size=(7.8, 0.5 * len(rows) + 1.1)) as (figure, axes):
        for y, row in enumerate(rows):
            colour = PALETTE[validate.one_of("family", _family(row), PALETTE)]
            for column, place in (("stored", -0.18), ("read", 0.18)):
                hatched = {"fc": "none", "ec": colour, "hatch": "////"}
                style = {"color": colour} if column == "stored" else hatched
                amount = row[column]
                axes.barh(y + place, max(amount - start, 0), left=start, height=0.34, lw=1, **style)
                text = f" {format_bytes(amount)}" if amount else " 0"
                axes.text(max(amount, start), y + place, text, va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        if log:
            axes.set_xscale("log", base=2)
            axes.set_xlim(start, 4 * max(positive))
        else:
            axes.set_xlim(0, 1.18 * max(positive))
            axes.xaxis.set_major_locator(MultipleLocator(2.0 ** (ceil(log2(max(positive))) - 2)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: format_bytes(n)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(False, axis="y")
        axes.set_xlabel("logarithmic" if log else "")
        if title:
            axes.set_title(title)
        handles = [
            Patch(color="#8a8a8a", label="stored"),
            Patch(fc="none", ec="#8a8a8a", hatch="////", label="read by one step"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    listed = "; ".join(
        f"{row['name']} {format_bytes(row['stored'])} stored, {format_bytes(row['read'])} read"
        for row in rows
    )
    alt = f"{title or 'Cache stored and cache read by one step'}: {listed}."
    columns = {name: [row[name] for row in rows] for name in ("name", "stored", "read")}
    return Picture(figure, alt, {**columns, "logarithmic": log})


def _family(row: Mapping[str, Any]) -> str:
    """The family whose colour a row takes."""
    return str(row.get("family", row["name"] if row["name"] in PALETTE else "shared"))
