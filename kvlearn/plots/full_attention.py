"""Pictures of chapter 01: what attends to what, what the cache saves, and where the time goes."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.ticker import NullFormatter

from kvlearn.measure import Quartiles, Roofline, Work
from kvlearn.plots.picture import COLOURS, MECHANISMS, MISTAKES, Line, Picture, drawing, line_styles


def cache_saves(n_tokens: int = 12) -> Picture:
    """The scores that the last step computes without a cache and with one, and what the cache must hold."""
    row, column = np.indices((n_tokens, n_tokens))
    visible, last = column <= row, row == n_tokens - 1
    computed = {"without": visible, "with": visible & last}
    counts = {name: int(cells.sum()) for name, cells in computed.items()}
    with drawing(1, 2, size=(7.8, 4.1)) as (figure, axes):
        for panel, (name, cells) in zip(axes, computed.items(), strict=True):
            colours = np.zeros((n_tokens, n_tokens, 4))
            colours[visible] = to_rgba(COLOURS["memory"], 0.16)
            colours[cells] = to_rgba(COLOURS["full"], 0.35)
            colours[cells & last] = to_rgba(COLOURS["full"], 0.95)
            panel.imshow(colours, extent=(0, n_tokens, n_tokens, 0))
            panel.set_title(f"{name.capitalize()} a cache: {counts[name]} scores")
            edges = np.arange(n_tokens + 1)
            panel.hlines(edges, 0, n_tokens, color="#8a8a8a", lw=0.5, alpha=0.4)
            panel.vlines(edges, 0, n_tokens, color="#8a8a8a", lw=0.5, alpha=0.4)
            panel.set(xticks=[], yticks=[], xlim=(0, n_tokens + 0.1), ylim=(n_tokens + 2.7, -0.1))
            panel.spines[:].set_visible(False)
        axes[0].set_ylabel("queries: one row per token", y=0.6)
        axes[0].text(0, n_tokens + 1.0, "keys: one column per token", fontsize=10)
        axes[0].text(0, n_tokens + 2.5, "no cache: K and V are computed again too", fontsize=9)
        axes[0].text(n_tokens * 0.97, 1.4, "the future:\nmasked", ha="right", va="center", fontsize=9)
        axes[1].text(0.4, n_tokens * 0.62, "computed in\nearlier steps,\nnot needed again", fontsize=9)
        slots = np.tile(to_rgba(COLOURS["full"], 0.5), (1, n_tokens, 1))
        slots[0, -1] = to_rgba(COLOURS["full"], 0.95)
        axes[1].imshow(slots, extent=(0, n_tokens, n_tokens + 1.6, n_tokens + 0.6))
        axes[1].vlines(edges, n_tokens + 0.6, n_tokens + 1.6, color="#8a8a8a", lw=0.5)
        axes[1].text(0, n_tokens + 2.5, "the cache: 1 slot of K and V written, all read", fontsize=9)
    alt = (
        f"Two triangular grids of attention scores at step {n_tokens}. Without a cache the whole triangle "
        f"of {counts['without']} scores is computed; with a cache only its last row of {counts['with']}. "
        f"Below the second grid are {n_tokens} slots of keys and values: one is written in this step, all "
        "of them are read."
    )
    return Picture(figure, alt, {"scores": counts})


def loss_curve(losses: Sequence[float], *, uniform: float) -> Picture:
    """Training loss over steps, with a running mean, from the loss of knowing nothing."""
    losses_ = np.asarray(losses)
    window = max(len(losses_) // 20, 1)
    mean = np.convolve(losses_, np.ones(window) / window, mode="valid")
    with drawing(size=(7.5, 3.2)) as (figure, axes):
        axes.plot(losses_, color=COLOURS["full"], alpha=0.5, lw=0.8)
        axes.plot(np.arange(window - 1, len(losses_)), mean, color=COLOURS["full"])
        axes.axhline(uniform, color="#8a8a8a", lw=1, ls=":")
        axes.text(len(losses_), uniform, f"knows nothing: {uniform:.2f}", ha="right", va="bottom", fontsize=9)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per byte")
        axes.set_ylim(0, uniform * 1.1)
    alt = (
        f"Training loss over {len(losses_)} steps: it falls from {losses_[0]:.2f} to about {mean[-1]:.2f} "
        "nats per byte, fast at first."
    )
    return Picture(figure, alt, {"losses": losses_, "mean": mean})


def step_times(lengths: Sequence[int], times: Mapping[str, Sequence[Quartiles]]) -> Picture:
    """Time of one more token over the length so far, without a cache and with one; bars are quartiles.

    A list of times may be shorter than ``lengths``: what takes too long is not measured.
    """
    without = Line(COLOURS["memory"], "--", "s")
    styles = line_styles(times, fixed={"with a cache": MECHANISMS["full"], "without a cache": without})
    with drawing() as (figure, axes):
        for name, values in times.items():
            median = np.array([q.median for q in values]) * 1e3
            low = median - np.array([q.q1 for q in values]) * 1e3
            high = np.array([q.q3 for q in values]) * 1e3 - median
            axes.errorbar(
                lengths[: len(values)],
                median,
                [low, high],
                capsize=3,
                label=name,
                **styles[name],
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
        axes.set_xlabel("tokens so far")
        axes.set_ylabel("ms for the next token")
        axes.legend()
        axes.set_title("The price of the next token, on this machine")
    ends = "; ".join(
        f"{name} {values[0].median * 1e3:.1f} ms at {lengths[0]} and {values[-1].median * 1e3:.1f} ms at "
        f"{lengths[len(values) - 1]}"
        for name, values in times.items()
    )
    alt = f"Time of the next token over the tokens so far: {ends}."
    return Picture(figure, alt, {"lengths": list(lengths), "times": dict(times)})


def on_the_roofline(roofline: Roofline, points: Mapping[str, tuple[Work, Quartiles]]) -> Picture:
    """Measured work under the roof of this machine: FLOP/s over FLOPs per byte."""
    intensities = np.array([work.intensity for work, _ in points.values()])
    achieved = {name: work.flops / time.median for name, (work, time) in points.items()}
    reach = np.geomspace(min(0.2, intensities.min() / 2), max(4 * roofline.knee, intensities.max() * 2), 200)
    roof = [roofline.attainable(float(i)) / 1e9 for i in reach]
    with drawing(size=(7.5, 4.2)) as (figure, axes):
        axes.plot(reach, roof, color="#8a8a8a")
        axes.axvline(roofline.knee, color="#8a8a8a", lw=1, ls=":")
        axes.text(
            roofline.knee * 1.08, min(roof) * 1.3, f"knee: {roofline.knee:.0f} FLOP per byte", fontsize=9
        )
        axes.text(roofline.knee * 0.92, roof[-1] * 1.12, "bound by memory", ha="right", fontsize=9)
        axes.text(roofline.knee * 1.08, roof[-1] * 1.12, "bound by arithmetic", fontsize=9)
        for name, style in line_styles(points, family="full").items():
            point = {**style, "ls": "none", "ms": 9}
            axes.plot(points[name][0].intensity, achieved[name] / 1e9, label=name, **point)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("FLOPs per byte moved")
        axes.set_ylabel("GFLOP/s")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.legend(loc="lower right")
        axes.set_title("Prefill and decode under this machine's roof")
    listed = "; ".join(
        f"{name}: {work.intensity:.1f} FLOPs per byte, {achieved[name] / 1e9:.1f} GFLOP/s"
        for name, (work, _) in points.items()
    )
    alt = (
        f"Roofline of this machine: {roofline.bandwidth / 1e9:.1f} GB/s up to the knee at "
        f"{roofline.knee:.0f} FLOPs per byte, then {roofline.peak / 1e9:.0f} GFLOP/s. {listed}."
    )
    return Picture(figure, alt, {"achieved": achieved, "knee": roofline.knee})


def loss_by_position(curves: Mapping[str, np.ndarray], *, chunk: int, width: int = 16) -> Picture:
    """Loss over the position in the context, for the right model and for broken ones fed in chunks.

    Each point is the mean over ``width`` positions of one chunk.
    """
    with drawing() as (figure, axes):
        length = min(len(losses) for losses in curves.values())
        for edge in range(chunk, length, chunk):
            axes.axvline(edge, color="#8a8a8a", lw=1, ls=":")
        above = axes.get_xaxis_transform()  # above the axes, where no curve can be
        axes.text(chunk, 1.01, "second chunk", fontsize=9, va="bottom", transform=above)
        at = np.arange(width / 2, length - length % width, width)
        wrong = (name for name in curves if name != "right")
        styles = line_styles(
            curves, fixed={"right": MECHANISMS["full"], **dict(zip(wrong, MISTAKES, strict=False))}
        )
        ends = {}
        for name in reversed(list(curves)):  # the first drawn last, on top
            means = curves[name][: len(at) * width].reshape(len(at), width).mean(1)
            axes.plot(at, means, label=name, **styles[name])
            ends[name] = means[-1]
        axes.set_ylim(0)
        for name, y in zip(ends, spread(list(ends.values()), 0.06 * axes.get_ylim()[1]), strict=True):
            axes.text(at[-1] + width / 2, y, name, color=styles[name]["color"], va="center", fontsize=9)
        axes.set_xlim(0, length * 1.28)
        axes.set_xticks(range(0, length + 1, chunk))
        axes.set_xlabel("position in the context")
        axes.set_ylabel("loss, nats per byte")
    listed = "; ".join(f"{name} {losses.mean():.2f}" for name, losses in curves.items())
    first = "; ".join(f"{name} {losses[:chunk].mean():.2f}" for name, losses in curves.items())
    alt = (
        f"Loss over the position in the context, in chunks of {chunk}. Means in nats per byte: {listed}. "
        f"In the first chunk alone: {first}."
    )
    return Picture(figure, alt, {"curves": dict(curves)})


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places, moved up as little as it takes to be ``gap`` apart: for labels at the ends of curves."""
    moved, below = list(places), -np.inf
    for i in sorted(range(len(places)), key=lambda i: places[i]):
        moved[i] = below = max(places[i], below + gap)
    return moved
