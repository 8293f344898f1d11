"""``hint``: the next of an exercise's hints, the smallest first."""

from dataclasses import dataclass
from typing import Any

from kvlearn.grading.catalogue import find_exercise

_shown: dict[str, int] = {}


@dataclass(frozen=True)
class Hint:
    """One hint, ready to be shown."""

    exercise: str
    number: int
    total: int
    text: str

    @property
    def remaining(self) -> str:
        left = self.total - self.number
        if left == 0:
            return f'This was the last hint. kvlearn.solution("{self.exercise}", confirm=True) shows ours.'
        return f"{left} more: run kvlearn.hint again."

    def __repr__(self) -> str:
        return f"Hint {self.number} of {self.total} for {self.exercise}: {self.text}\n{self.remaining}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        head = f"**Hint {self.number} of {self.total} for {self.exercise}**"
        return {"text/plain": repr(self), "text/markdown": f"{head}\n\n{self.text}\n\n*{self.remaining}*"}


def hint(exercise: str) -> Hint:
    """The next hint for an exercise: ``hint("01.3")``. After the last one, the last again.

    TypeError or ValueError if there is no such exercise.
    """
    found = find_exercise(exercise)
    number = min(_shown.get(found.id, 0) + 1, len(found.hints))
    _shown[found.id] = number
    return Hint(found.id, number, len(found.hints), found.hints[number - 1])
