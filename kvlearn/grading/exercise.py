"""The parts of an exercise. A unit's ``checks.py`` declares it and its requirements:

    merge = Exercise("99.7", "merge", "Merge two partial results", answers=("merge",), hints=(...))

    @merge.requirement(2, "two ordinary parts")
    def ordinary(t: CheckContext, merge: Answer) -> None:
        '''out and lse as if all keys had been seen together'''     <- the column "expected"
        ...
        t.close(merge(a, b), want)

Its ``mistakes.py`` holds the wrong answers that people really give: ``merge.mistakes(table)`` as edits of our
solution, or code of its own:

    @merge.misconception("weighted by lse, not by exp(lse)")
    def linear_weights(a, b):
        '''Why this is a mistake, in one paragraph.'''               <- told to the learner who makes it
        ...

A requirement draws its inputs from the context, runs the learner's answer and compares with a reference that
is independent of our solution.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from kvlearn.grading import mistakes

Answer = Callable[..., Any]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Requirement:
    """One thing that an answer must do, and the points it earns.

    ``reads_answers``: it runs the answers to other exercises too, so what it sees names no mistake of this
    one. ``last``: it costs so much that it runs only where all requirements before it hold.
    """

    name: str
    points: int
    expected: str
    script: Callable[..., None]
    rounds: int
    reads_answers: bool = False
    last: bool = False


@dataclass(frozen=True)
class Misconception:
    """A known wrong answer: its name, why it is wrong, and how to make its code.

    ``source`` is that of a mistake written as an edit, else empty.
    """

    name: str
    why: str
    make: Callable[[], tuple[Any, ...]]
    source: str = ""

    @cached_property
    def answers(self) -> tuple[Any, ...]:
        """The code, one object for each answer asked for."""
        return self.make()


@dataclass
class Exercise:
    """One exercise: ``answers`` names what the check is handed, in order.

    ``forbidden`` are functions that do the exercise's work (``{function: how to call it by name}``; a method
    of tensors as ``Tensor.softmax``); calling one earns nothing for the requirement at hand. kvlearn's own
    modules are always forbidden unless ``may_use_kvlearn``.

    ``wiring`` (a ``kvlearn.workbench.Wiring``) belongs to "Your model" alone: this exercise reads the answers
    to others in its notebook.
    """

    id: str
    slug: str
    title: str
    answers: tuple[str, ...]
    hints: tuple[str, ...]
    forbidden: dict[Callable[..., Any], str] = field(default_factory=dict)
    may_use_kvlearn: bool = False
    wiring: Any = None
    requirements: list[Requirement] = field(default_factory=list)
    misconceptions: list[Misconception] = field(default_factory=list)
    # From the unit's notebook, when the unit is loaded:
    solution: str = ""  # the right answer's source
    set_up: tuple[str, ...] = ()  # the cells before it that learners are given

    @property
    def points(self) -> int:
        return sum(requirement.points for requirement in self.requirements)

    @property
    def grade_id(self) -> str:
        """Of the check cell, for nbgrader; the answer cell's ends in ``-answer``."""
        return f"u{self.id.replace('.', '-')}-{self.slug}"

    @property
    def reads_answers(self) -> bool:
        """Does the check look at the answers to other exercises of the notebook?"""
        return self.wiring is not None

    @property
    def call(self) -> str:
        """How the check of this exercise is written in the notebook."""
        notebook = ["notebook=globals()"] if self.reads_answers else []
        return f'kvlearn.check("{self.id}", {", ".join([*self.answers, *notebook])})'

    @property
    def metadata(self) -> dict[str, Any]:
        """Of its check cell, under ``kvlearn``."""
        return {"exercise": self.id} | ({"reads_answers": True} if self.reads_answers else {})

    @cached_property
    def right(self) -> tuple[Any, ...]:
        """Our own answers, as objects."""
        code = mistakes.compiled(self.solution, f"<solution {self.id}>")
        return mistakes.run(code, self.set_up, {}, self.answers)

    def requirement(
        self, points: int, name: str, *, rounds: int = 3, reads_answers: bool = False, last: bool = False
    ) -> Callable[[F], F]:
        """Decorator: the function draws inputs ``rounds`` times; its docstring says what is expected."""

        def add(script: F) -> F:
            expected = paragraph(script)
            self.requirements.append(Requirement(name, points, expected, script, rounds, reads_answers, last))
            return script

        return add

    def misconception(self, name: str, **others: Any) -> Callable[[F], F]:
        """Decorator: the wrong function or class; its docstring says why it is wrong.

        ``others`` are right answers to compare it with where the exercise asks for more than one.
        """

        def add(wrong: F) -> F:
            answers = tuple(others.get(answer, wrong) for answer in self.answers)
            self.misconceptions.append(Misconception(name, paragraph(wrong), lambda: answers))
            return wrong

        return add

    def mistakes(self, table: str, **names: Any) -> None:
        """Misconceptions from a table of edits of the solution (its form: ``kvlearn.grading.mistakes``).

        ``names`` are what their code uses beside what the notebook's set-up cells define. ValueError if a row
        does not fit.
        """
        for row in mistakes.parse(table):
            try:
                source = mistakes.wrong_source(self.solution, row)
                code = mistakes.compiled(source, f"<{self.id}: {row.name}>")
            except (ValueError, SyntaxError) as error:
                raise ValueError(f"{self.id}, {row.name!r}: {error}") from error
            make = partial(mistakes.run, code, self.set_up, names, self.answers)
            self.misconceptions.append(Misconception(row.name, row.why, make, source))


@dataclass(frozen=True)
class Unit:
    """The exercises of one notebook: ``name`` is its folder and file, as ``01_full_attention``."""

    name: str
    exercises: tuple[Exercise, ...]
    folder: Path = Path()

    @property
    def points(self) -> int:
        return sum(exercise.points for exercise in self.exercises)


def paragraph(documented: Any) -> str:
    """A docstring on one line."""
    return " ".join((inspect.getdoc(documented) or "").split())
