"""A figure of the course: the drawing, the words for who cannot see it, and the data it was drawn from."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("kvlearn.mplstyle")

# Okabe & Ito's palette, which colour-blind readers can tell apart; one colour per family of mechanisms, from
# chapter 01 to 13.
COLOURS = {
    "full": "#0072B2",
    "shared": "#E69F00",
    "compressed": "#009E73",
    "sliding": "#D55E00",
    "sparse": "#CC79A7",
    "linear": "#56B4E9",
    "hybrid": "#A0A000",  # their yellow, darkened: it must read on white
    "memory": "#8A8A8A",  # weights, and whatever has no mechanism
    "mistake": "#C2283A",  # not theirs; always dashed or dotted
}
VIOLET = "#8F6FD1"  # not theirs either: a colour more for lines


class Line(NamedTuple):
    """A line of a figure: no two of one figure have the colour or the marker in common."""

    colour: str
    dashes: str | tuple[float, ...]
    marker: str

    def style(self) -> dict[str, Any]:
        """Keyword arguments of matplotlib's ``plot`` and ``errorbar``."""
        dashes = self.dashes if isinstance(self.dashes, str) else (0, self.dashes)
        fill = self.colour if self.marker in "o^vPX" else "none"
        return {"color": self.colour, "ls": dashes, "marker": self.marker, "mfc": fill}


# Mechanisms that a figure draws as lines, from chapter 01 to 13. There are more of them than colours to tell
# apart: mechanisms of different chapters may share a colour, those that a figure compares may not.
MECHANISMS = {
    "full": Line(COLOURS["full"], "-", "o"),
    "window": Line(COLOURS["sliding"], "--", "s"),
    "longformer": Line(COLOURS["sparse"], "-.", "^"),
    "bigbird": Line(VIOLET, ":", "D"),
    "strided": Line(COLOURS["hybrid"], (6, 1, 1, 1, 1, 1), "v"),
    "fixed": Line(COLOURS["linear"], (4, 3), "P"),
    "linear": Line(COLOURS["linear"], "--", "s"),
    "linear, Taylor": Line(COLOURS["compressed"], (4, 3), "P"),
    "delta": Line(COLOURS["shared"], "-.", "^"),
    "gated_delta": Line(COLOURS["sliding"], ":", "D"),
    "gla": Line(COLOURS["hybrid"], (6, 1, 1, 1, 1, 1), "v"),
    "mamba": Line(COLOURS["compressed"], (4, 3), "X"),
    "mamba2": Line(COLOURS["sparse"], (8, 2), "*"),
    "rwkv4": Line(VIOLET, (2, 2), "p"),
    "short_conv": Line(COLOURS["memory"], ":", "X"),
}

PALETTE = {**{name: line.colour for name, line in MECHANISMS.items()}, **COLOURS}
"""By name: the colour of a mechanism, or of a family of them where a figure shows no single one."""

# Of a mechanism that is built wrongly, one line for each mistake; red is the first.
MISTAKES = (
    Line(COLOURS["mistake"], "--", "X"),
    Line(COLOURS["shared"], ":", "s"),
    Line(VIOLET, "-.", "D"),
    Line(COLOURS["memory"], (4, 3), "^"),
)

# For whatever else a figure compares (ways to begin, variants), in this order.
OTHERS = (
    Line(COLOURS["sparse"], "--", "s"),
    Line(COLOURS["linear"], "-.", "^"),
    Line(COLOURS["shared"], ":", "D"),
    Line(VIOLET, (6, 1, 1, 1, 1, 1), "v"),
    Line(COLOURS["compressed"], (4, 3), "P"),
    Line(COLOURS["hybrid"], (8, 2), "*"),
    Line(COLOURS["sliding"], (2, 2), "p"),
    Line(COLOURS["memory"], (1, 1), "h"),
)


def line_styles(
    names: Iterable[str], *, family: str | None = None, fixed: Mapping[str, Line] | None = None
) -> dict[str, dict[str, Any]]:
    """How matplotlib draws the line of each name, so that no two have their colour or marker in common.

    A mechanism has its own line of ``MECHANISMS`` in every figure, a name in ``fixed`` the one given there.
    Other names get what is free: the first of them the colour of ``family``, the rest ``OTHERS``. Raises
    ValueError for more names than there are lines to tell apart.
    """
    own = {**MECHANISMS, **(fixed or {})}
    wanted = list(dict.fromkeys(names))
    chosen = {name: own[name] for name in wanted if name in own}
    colour = None if family is None else COLOURS[family]
    free = sorted(OTHERS, key=lambda line: line.colour != colour)
    if colour is not None:
        free.insert(0, Line(colour, "-", "o"))
    for name in wanted:
        if name not in chosen:
            chosen[name] = _first_free(free, chosen.values())
    return {name: chosen[name].style() for name in wanted}


def _first_free(lines: Iterable[Line], taken: Iterable[Line]) -> Line:
    """The first line whose colour and marker nobody has."""
    colours, markers = {line.colour for line in taken}, {line.marker for line in taken}
    for line in lines:
        if line.colour not in colours and line.marker not in markers:
            return line
    raise ValueError(f"names: expected at most {len(colours)} in one figure, got more")


@dataclass(frozen=True)
class Picture:
    """A figure as a notebook cell shows it. ``data`` holds the values drawn, for a test to compare."""

    figure: Figure
    alt: str
    data: dict[str, Any] = field(default_factory=dict)

    def png(self) -> bytes:
        """The drawing as PNG, with a transparent ground."""
        buffer = BytesIO()
        # Without the version in it, the same drawing gives the same bytes.
        self.figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        width = round(self.figure.get_figwidth() * self.figure.dpi)
        picture: dict[str, Any] = {"image/png": self.png(), "text/plain": self.alt}
        return picture, {"image/png": {"alt": self.alt, "width": width}}


@contextmanager
def drawing(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (7.5, 3.8), **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """A figure and its axes in the course's style; no pyplot, so nothing is shown twice or left open."""
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=size)
        yield figure, figure.subplots(rows, columns, **options)
