"""``hint``: the next of an exercise's hints, the smallest first. ``solution``: our answer."""

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


@dataclass(frozen=True)
class Solution:
    """Our answer, or how to ask for it, ready to be shown."""

    exercise: str
    code: str

    def __repr__(self) -> str:
        if not self.code:
            return (
                f'To see our answer to {self.exercise}: kvlearn.solution("{self.exercise}", confirm=True)\n'
                f'A hint may be all you need: kvlearn.hint("{self.exercise}")'
            )
        return self.code

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        shown = f"```python\n{self.code}\n```" if self.code else repr(self).replace("\n", "  \n")
        return {"text/plain": repr(self), "text/markdown": shown}


def solution(exercise: str, confirm: bool = False) -> Solution:
    """Our answer to an exercise, with ``confirm=True``; without, how to ask for it.

    It is the source of the answer cell in solutions/, the one place where it is written. TypeError or
    ValueError if there is no such exercise.
    """
    found = find_exercise(exercise)
    return Solution(found.id, found.solution if confirm is True else "")
