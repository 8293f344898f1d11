"""Every exercise of every unit: the right answer, the stub, and each known mistake."""

import ast
import linecache
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from answers import right, stub

from kvlearn.grading import Exercise, Misconception, Score, exercises, judge, units
from kvlearn.grading.catalogue import read_source
from kvlearn.grading.release import stub as released

# Draws of each mistake; the catalogue is long.
SEEDS = range(5 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 1)
EXERCISES = [pytest.param(exercise, id=exercise.id) for exercise in exercises().values()]
MISCONCEPTIONS = [
    pytest.param(exercise, misconception, id=f"{exercise.id} {misconception.name}")
    for exercise in exercises().values()
    for misconception in exercise.misconceptions
]


@pytest.mark.parametrize("exercise", EXERCISES)
def test_our_solution_earns_full_marks_on_every_draw(exercise: Exercise) -> None:
    for seed in range(12):
        score = judge(exercise, right(exercise), seed * 1000)
        assert (float(score), score.status) == (exercise.points, "passed"), score.to_text()


@pytest.mark.parametrize("exercise", EXERCISES)
def test_the_stub_earns_nothing_and_is_called_not_attempted(exercise: Exercise) -> None:
    score = judge(exercise, [stub] * len(exercise.answers))
    assert (float(score), score.status) == (0, "not attempted")
    assert {row.status for row in score.rows} == {"not attempted"}


@pytest.mark.parametrize(("exercise", "misconception"), MISCONCEPTIONS)
def test_every_misconception_loses_points_and_is_named_as_itself(
    exercise: Exercise, misconception: Misconception
) -> None:
    for seed in SEEDS:
        score = judge(exercise, misconception.answers, seed * 1000)
        assert float(score) < exercise.points
        assert score.status in ("wrong", "partial")
        assert [mistake.name for mistake in score.mistakes] == [misconception.name], score.to_text()
        assert misconception.why in score.message
        assert misconception.name in score.to_html() or "&" in score.to_html()


@pytest.mark.parametrize("exercise", EXERCISES)
def test_a_passing_table_shows_nothing_that_was_drawn(exercise: Exercise) -> None:
    first, second = (judge(exercise, right(exercise), seed) for seed in (1, 2))
    assert first._repr_mimebundle_() == second._repr_mimebundle_()


@pytest.mark.parametrize("exercise", EXERCISES)
def test_exercises_are_complete(exercise: Exercise) -> None:
    assert len(exercise.hints) >= 3
    assert len(exercise.misconceptions) >= 3
    assert len(exercise.requirements) >= 3
    assert all(requirement.expected for requirement in exercise.requirements)
    assert all(len(misconception.why) > 60 for misconception in exercise.misconceptions)
    names = [misconception.name for misconception in exercise.misconceptions]
    assert len(set(names)) == len(names)
    assert re.fullmatch(r"[a-zA-Z0-9_\-]+", exercise.grade_id)


@pytest.mark.parametrize("unit", units(), ids=lambda unit: unit.name)
def test_the_source_notebook_and_the_unit_agree(unit) -> None:  # type: ignore[no-untyped-def]
    notebook = read_source(unit.name, unit.folder.parent)
    assert notebook["metadata"]["kvlearn"] == {"unit": unit.name}
    marks = {c["metadata"].get("nbgrader", {}).get("grade_id"): c for c in notebook["cells"]}
    for exercise in unit.exercises:
        check, answer = marks[exercise.grade_id], marks[f"{exercise.grade_id}-answer"]
        assert check["metadata"]["nbgrader"]["points"] == exercise.points
        assert check["metadata"]["nbgrader"]["grade"] is check["metadata"]["nbgrader"]["locked"] is True
        assert answer["metadata"]["nbgrader"]["solution"] is True
        assert check["metadata"]["kvlearn"] == exercise.metadata
        assert answer["metadata"]["kvlearn"] == {"exercise": exercise.id}
        assert exercise.call in "".join(check["source"])


def results(sources: list[str]) -> Iterator[Any]:
    """What the cells of a notebook show, run one after the other in one namespace."""
    namespace: dict[str, Any] = {}
    for i, source in enumerate(sources):
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        name = f"<cell {i} of {hash(source)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(tree, name, "exec"), namespace)
        if isinstance(last, ast.Expr):
            yield eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)


@pytest.mark.parametrize("unit", units(), ids=lambda unit: unit.name)
def test_the_notebook_earns_all_points_and_unsolved_it_runs_and_earns_none(unit) -> None:  # type: ignore[no-untyped-def]
    cells = read_source(unit.name, unit.folder.parent)["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    solved = [r for r in results([cell["source"] for cell in cells]) if isinstance(r, Score)]
    assert [score.exercise for score in solved] == [exercise.id for exercise in unit.exercises]
    assert sum(solved) == unit.points
    unsolved = [r for r in results([released(cell) for cell in cells]) if isinstance(r, Score)]
    assert [(float(score), score.status) for score in unsolved] == [(0, "not attempted")] * len(
        unit.exercises
    )
