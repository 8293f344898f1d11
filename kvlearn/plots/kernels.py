"""Pictures of chapter 11: who reads which bytes, how splits fill a GPU, and what bandwidth was achieved."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, NullFormatter

from kvlearn import validate
from kvlearn.kernels.trace import Trace
from kvlearn.measure import Quartiles
from kvlearn.plots.picture import COLOURS, Picture, drawing, line_styles

ONCE, TWICE, MERGES = COLOURS["full"], COLOURS["sliding"], COLOURS["compressed"]


def access_pattern(traces: Mapping[str, Trace], *, columns: int = 3) -> Picture:
    """Which program reads which keys, one panel per trace, and how many bytes that is for each byte needed.

    A trace holds the reads of ``k`` and ``v``, (1, G, S, D); programs are in the order in which they ran.
    Where it holds ``part`` too, or another launch follows, the programs that merge are marked.
    """
    validate.positive("len(traces)", len(traces))
    rows = -(-len(traces) // columns)
    data = {}
    with drawing(rows, columns, size=(3.1 * columns, 2.75 * rows), squeeze=False) as (figure, axes):
        for panel in axes.flat[len(traces) :]:
            panel.set_visible(False)
        for panel, (name, trace) in zip(axes.flat, traces.items(), strict=False):
            k, v = trace["k"], trace["v"]
            _, n_kv_heads, n_slots, _ = k.counts.shape[1:]
            often = k.counts[:, 0].max(-1).reshape(len(k.counts), -1)  # (programs, G · S)
            merging = np.arange(len(often)) >= np.prod(trace.grids[0])
            if "part" in trace:
                merging[trace["part"].programs] = True
            floor = k.unique_bytes + v.unique_bytes
            times = (k.nbytes + v.nbytes) / floor
            data[name] = {"often": often, "merging": merging, "times_the_floor": times}

            colours = np.zeros((*often.shape, 4))
            colours[often == 1] = to_rgba(ONCE, 0.9)
            colours[often > 1] = to_rgba(TWICE, 0.95)
            panel.imshow(
                colours, extent=(0, often.shape[1], len(often), 0), aspect="auto", interpolation="none"
            )
            panel.hlines(np.arange(len(often) + 1), 0, often.shape[1], color="#b4b4b4", lw=0.8, alpha=0.7)
            panel.vlines(np.arange(n_kv_heads + 1) * n_slots, 0, len(often), color="#8a8a8a", lw=1.2)
            for row in map(float, merging.nonzero()[0]):
                size = (often.shape[1] * 0.06, 1)
                panel.add_patch(
                    Rectangle((often.shape[1] * 1.015, row), *size, color=MERGES, alpha=0.9, lw=0)
                )
            panel.set(xlim=(-1, often.shape[1] * 1.08), ylim=(len(often) + 0.02, -0.02), yticks=[])
            panel.set_xticks(
                (np.arange(n_kv_heads) + 0.5) * n_slots, [f"KV head {g}" for g in range(n_kv_heads)]
            )
            panel.tick_params(length=0)
            panel.spines[:].set_visible(False)
            panel.grid(False)
            panel.set_title(name)
            panel.set_ylabel("programs", fontsize=9)
            launches = f"{len(trace.grids)} launch{'es' if len(trace.grids) > 1 else ''}"
            panel.set_xlabel(f"{times:.3g} x the floor of {_bytes(floor)}\n{len(often)} programs, {launches}")
        handles = [
            Patch(color=ONCE, label="key read once"),
            Patch(color=TWICE, label="read twice"),
            Patch(color=MERGES, label="merges partials"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    listed = "; ".join(
        f"{name}: {len(panel['often'])} programs read {panel['times_the_floor']:.3g} times the bytes needed"
        + (f", {panel['merging'].sum()} of them merge" if panel["merging"].any() else "")
        for name, panel in data.items()
    )
    alt = (
        f"Programs down, positions of the keys across, a cell coloured where a program reads a key. {listed}."
    )
    return Picture(figure, alt, data)


def achieved_bandwidth(
    points: Sequence[tuple[str, float, Quartiles]],
    *,
    bandwidth: float,
    t_fixed: float,
    bar: tuple[float, float] | None = None,
) -> Picture:
    """Bytes per second over the bytes that a step must read, under what this memory allows.

    ``points``: (series, bytes, seconds), the most important series first. The floor's curve is
    bytes / (bytes / bandwidth + t_fixed); ``bar`` = (share, seconds) adds that of share · bandwidth.
    """
    validate.positive("len(points)", len(points))
    nbytes = np.array([n for _, n, _ in points], dtype=float)
    reach = np.geomspace(nbytes.min() / 1.6, nbytes.max() * 1.6, 200)
    curves = {f"floor: {t_fixed * 1e6:.3g} µs + bytes / bandwidth": reach / (reach / bandwidth + t_fixed)}
    if bar is not None:
        share, seconds = bar
        label = f"bar: {seconds * 1e6:.3g} µs + bytes / {share:.2g} bandwidth"
        curves[label] = reach / (reach / bandwidth / share + seconds)
    series = list(dict.fromkeys(name for name, _, _ in points))
    styles = line_styles(series, family="full")
    with drawing(size=(7.8, 4.6)) as (figure, axes):
        axes.axhline(bandwidth / 1e12, color="#8a8a8a", lw=1.2)
        label = f" read bandwidth: {bandwidth / 1e12:.2f} TB/s"
        axes.text(reach[0], bandwidth / 1e12, label, va="bottom", fontsize=9)
        for (label, curve), style in zip(curves.items(), ("--", ":"), strict=False):
            axes.plot(reach, curve / 1e12, style, color="#8a8a8a", lw=1.4, label=label)
        for name in reversed(series):  # the first drawn last, on top
            mine = [(n, time) for label, n, time in points if label == name]
            rate = np.array([n / time.median for n, time in mine]) / 1e12
            low = rate - np.array([n / time.q3 for n, time in mine]) / 1e12
            high = np.array([n / time.q1 for n, time in mine]) / 1e12 - rate
            axes.errorbar(
                [n for n, _ in mine],
                rate,
                [low, high],
                ms=7 if name == series[0] else 5,
                alpha=0.9,
                elinewidth=1,
                capsize=2,
                label=name,
                **{**styles[name], "ls": "none"},
            )
        axes.set_xscale("log")
        axes.set_xlim(reach[0], reach[-1])
        axes.set_ylim(0, bandwidth / 1e12 * 1.12)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _bytes(n)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("bytes that the step must move")
        axes.set_ylabel("achieved, TB/s")
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: [*series, *curves].index(labels[i]))
        figure.legend(
            [handles[i] for i in order], [labels[i] for i in order], loc="outside lower center", ncols=3
        )
    best = {name: max(n / time.median for label, n, time in points if label == name) for name in series}
    listed = "; ".join(f"{name} up to {rate / 1e12:.2f} TB/s" for name, rate in best.items())
    alt = (
        f"Achieved bandwidth over the bytes of a decode step, {_bytes(nbytes.min())} to "
        f"{_bytes(nbytes.max())}. The memory reads {bandwidth / 1e12:.2f} TB/s. {listed}."
    )
    return Picture(figure, alt, {"best": best, "curves": curves, "reach": reach})


def splits(
    n_splits: Sequence[int] = (1, 8, 11),
    *,
    n_kv_heads: int = 2,
    n_tiles: int = 88,
    multiprocessors: int = 16,
    overhead: float = 1.0,
) -> Picture:
    """A timetable: which multiprocessor works on which KV head, for each number of splits of the context.

    A model, not a measurement: a multiprocessor takes one program at a time and a time of 1 for a tile;
    ``overhead`` is what a program costs beside its tiles.
    """
    palette = [COLOURS[c] for c in ("full", "shared", "compressed", "sparse")]
    ends = {}
    with drawing(1, len(n_splits), size=(3.1 * len(n_splits), 3.4), sharey=True, squeeze=False) as (
        figure,
        axes,
    ):
        for panel, pieces in zip(axes.flat, n_splits, strict=True):
            free = np.zeros(multiprocessors)
            for program in range(n_kv_heads * pieces):
                head, piece = program % n_kv_heads, program // n_kv_heads
                per_split = -(-n_tiles // pieces)
                tiles = max(0, min(n_tiles, (piece + 1) * per_split) - piece * per_split)
                at = int(free.argmin())
                panel.barh(
                    at,
                    tiles + overhead,
                    left=free[at],
                    height=0.8,
                    color=palette[head % len(palette)],
                    edgecolor="#8a8a8a",
                    lw=0.5,
                )
                free[at] += tiles + overhead
            ends[pieces] = float(free.max())
            panel.axvline(ends[pieces], color="#8a8a8a", ls=":", lw=1.2)
            panel.set_title(f"{_splits(pieces)}: {n_kv_heads * pieces} programs")
            panel.set_xlabel(f"time, in tiles: done at {ends[pieces]:.0f}")
            panel.set(ylim=(multiprocessors - 0.4, -0.6), yticks=[])
            panel.grid(False, axis="y")
        for panel in axes.flat:
            panel.set_xlim(0, max(ends.values()) * 1.04)
        axes[0, 0].set_ylabel(f"{multiprocessors} multiprocessors")
        handles = [Patch(color=palette[g % len(palette)], label=f"KV head {g}") for g in range(n_kv_heads)]
        figure.legend(handles=handles, loc="outside lower center", ncols=n_kv_heads)
    listed = "; ".join(f"{_splits(pieces)}, done at {end:.0f}" for pieces, end in ends.items())
    alt = (
        f"A timetable of {multiprocessors} multiprocessors for {n_kv_heads} KV heads of {n_tiles} tiles: "
        f"{listed}. With one split most multiprocessors are idle; a program too many starts a second wave."
    )
    return Picture(figure, alt, {"ends": ends})


def _splits(n: int) -> str:
    """1 -> '1 split'."""
    return f"{n} split{'' if n == 1 else 's'}"


def _bytes(n: float) -> str:
    """1500000 -> '1.5 MB'."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.3g} B"
