"""The result of a check: a number that nbgrader can add up, and a table that a learner can read.

The table survives JupyterLab's sanitiser: inline styles and class names only, colours translucent over the
page's own, so that it reads in light and dark and in a notebook that is not trusted.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, Self

from kvlearn import html

MIME = "application/vnd.kvlearn.score.v1+json"
STATUSES = ("not attempted", "error", "wrong", "partial", "passed")

GREEN, RED, AMBER, GREY = "34, 160, 90", "214, 69, 65", "222, 150, 20", "128, 128, 128"
TINT = {"passed": GREEN, "partial": AMBER, "wrong": RED, "error": RED, "not attempted": GREY}
SIGN = {"passed": "✓ passed", "failed": "✗ not yet", "raised": "✗ raised", "not attempted": "– not attempted"}
CELL = "text-align: left; vertical-align: top; padding: 4px 10px"
ONE_OF = "one of these:"
COLUMNS = ("requirement", "points", "result", "expected", "came")


@dataclass(frozen=True)
class Row:
    """One requirement as it came out."""

    name: str
    points: int
    earned: int
    status: str  # "passed", "failed", "raised" or "not attempted"
    expected: str
    came: str


@dataclass(frozen=True)
class Mistake:
    """A misconception that the answer was recognised as, or several that nothing tells apart."""

    name: str
    why: str

    @classmethod
    def one_of(cls, known: Sequence[tuple[str, str]]) -> Self:
        """From the names and reasons of misconceptions that gave the same as the answer."""
        if len(known) == 1:
            return cls(*known[0])
        *first, last = (name for name, _ in known)
        why = " ".join(f"“{name}”: {why}" for name, why in known)
        return cls(f"{ONE_OF} {', '.join(first)}, or {last}", why)

    @property
    def heading(self) -> str:
        """Of the box above the table."""
        several = self.name.startswith(ONE_OF)
        return f"A known mistake{', ' if several else ': '}{self.name}."

    @property
    def sentence(self) -> str:
        """Name and reason on a line of their own."""
        if self.name.startswith(ONE_OF):
            return f"{self.name[:1].upper()}{self.name[1:]}. {self.why}"
        return f"{self.name}: {self.why}"


class Score(float):
    """The points an answer earned, between 0 and ``max_score``, with the reasons.

    It is a plain number for code that adds it up (nbgrader reads the plain text of a cell's result, and takes
    NaN, a negative number or none at all for full marks: hence the clamp). In a notebook it shows a table.
    """

    exercise: str
    title: str
    max_score: float
    status: str
    message: str
    rows: tuple[Row, ...]
    mistakes: tuple[Mistake, ...]

    def __new__(
        cls,
        value: float,
        *,
        exercise: str,
        title: str,
        max_score: float,
        status: str,
        message: str,
        rows: tuple[Row, ...] = (),
        mistakes: tuple[Mistake, ...] = (),
    ) -> Self:
        score = super().__new__(cls, min(max(value, 0.0), max_score) if math.isfinite(value) else 0.0)
        score.exercise, score.title, score.max_score = exercise, title, max_score
        score.status, score.message, score.rows, score.mistakes = status, message, rows, mistakes
        return score

    def __repr__(self) -> str:
        return f"{float(self):g}"

    def to_json(self) -> dict[str, Any]:
        """The form that the command line reads: also carried as ``application/vnd.kvlearn.score.v1+json``."""
        return {
            "exercise": self.exercise,
            "score": float(self),
            "max_score": float(self.max_score),
            "status": self.status,
            "message": self.message,
            "mistakes": [asdict(mistake) for mistake in self.mistakes],
            "requirements": [asdict(row) for row in self.rows],
        }

    def to_html(self) -> str:
        """The table for a notebook."""
        tint = TINT[self.status]
        boxes = "".join(
            _box(AMBER, f"<b>{escape(mistake.heading)}</b><br>{_prose(mistake.why)}")
            for mistake in self.mistakes
        )
        if not boxes and self.status != "passed":
            boxes = _box(tint, escape(self.message))
        rows = html.table(COLUMNS, map(_cells, self.rows), styles=[CELL] * 5, style="margin: 6px 0")
        return (
            f'<div class="kvlearn-score" style="border-left: 4px solid rgb({tint}); padding: 2px 0 2px 12px">'
            f'<div style="margin: 4px 0"><b>{escape(self.exercise)} · {escape(self.title)}</b> &nbsp; '
            f'<meter min="0" max="{self.max_score:g}" value="{float(self):g}"></meter> &nbsp; '
            f"<b>{float(self):g} of {self.max_score:g} points · {self.status}</b></div>"
            f'{boxes}{rows}<div style="margin: 4px 0">{self._closing("code")}</div></div>'
        )

    def to_text(self) -> str:
        """The table for a terminal."""
        out = [f"{self.exercise} · {self.title}: {float(self):g} of {self.max_score:g}, {self.status}"]
        out += [f"  {mistake.heading} {mistake.why}" for mistake in self.mistakes]
        if not self.mistakes and self.status != "passed":
            out.append(f"  {self.message}")
        for row in self.rows:
            out.append(f"  {SIGN[row.status]:<16} {row.earned}/{row.points}  {row.name}")
            if row.status not in ("passed", "not attempted"):
                for head, words in (("expected", row.expected), ("came", row.came)):
                    lines = zip((head, ""), words.split("\n"), strict=False)
                    out += [f"{'':24}{name:<10}{line}" for name, line in lines]
        return "\n".join([*out, f"  {self._closing()}"])

    def _closing(self, tag: str = "") -> str:
        if self.status == "passed":
            return "Every requirement holds."
        call = f'kvlearn.hint("{self.exercise}")'
        call = f"<{tag}>{escape(call)}</{tag}>" if tag else call
        return f"Stuck? {call} gives a hint, the smallest first."

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"text/plain": repr(self), "text/html": self.to_html(), MIME: self.to_json()}


def _cells(row: Row) -> list[str | html.Cell]:
    tint = GREEN if row.status == "passed" else GREY if row.status == "not attempted" else RED
    sign = SIGN[row.status].replace(" ", "&nbsp;")
    return [
        row.name,
        html.Cell(f"{row.earned}&#8239;/&#8239;{row.points}"),
        html.Cell(f"<b>{sign}</b>", f"background-color: rgba({tint}, 0.2)"),
        html.Cell(escape(row.expected).replace("\n", "<br>")),
        html.Cell(escape(row.came).replace("\n", "<br>")),
    ]


def _prose(words: str) -> str:
    """The text with `so` as code, and *so* in italics."""
    words = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(words))
    return re.sub(r"(?<![\w*])\*(\w[^*<]*)\*", r"<em>\1</em>", words)


def _box(tint: str, content: str) -> str:
    return (
        f'<div style="margin: 6px 0; padding: 6px 10px; border-radius: 4px; max-width: 900px; '
        f'background-color: rgba({tint}, 0.16)">{content}</div>'
    )
