"""A figure of the course: the drawing, the words for who cannot see it, and the data it was drawn from."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("kvlearn.mplstyle")

# Okabe & Ito's palette, which colour-blind readers can tell apart; one colour a family of mechanisms, from
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
    "mistake": "#B2182B",  # not theirs; always dashed or dotted
}


@dataclass(frozen=True)
class Picture:
    """What a notebook cell shows. ``data`` holds what was drawn, for a test to hold against the truth."""

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
