"""What a check returns: a number that nbgrader can add up, and a table that a learner can read."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

from kvlearn.grading import table

MIME = "application/vnd.kvlearn.score.v1+json"
STATUSES = ("not attempted", "error", "wrong", "partial", "passed")


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
    """A misconception that the answer was recognised as."""

    name: str
    why: str


class Score(float):
    """The points an answer earned, between 0 and ``max_score``, with the reasons.

    It is a plain number to whoever adds it up (nbgrader reads the plain text of a cell's result, and takes
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
        """What the command line reads: also carried as ``application/vnd.kvlearn.score.v1+json``."""
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
        return table.html(self)

    def to_text(self) -> str:
        """The table for a terminal."""
        return table.text(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"text/plain": repr(self), "text/html": self.to_html(), MIME: self.to_json()}
