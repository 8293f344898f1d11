"""Every exercise of every unit: the right answer, the stub, and each known mistake."""

import ast
import json
import linecache
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from answers import right, stub
from IPython.core.formatters import DisplayFormatter

from kvlearn.grading import Exercise, Misconception, Score, exercises, judge, run_checks, units
from kvlearn.grading.catalogue import read_source
from kvlearn.grading.context import Contradicts
from kvlearn.grading.exercise import Requirement
from kvlearn.grading.release import stub as released
from kvlearn.grading.run_checks import Outcome

pytestmark = pytest.mark.answers

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
# Our trainings for "Your model" are kept in the process: one worker has all tests of such an exercise.
EXERCISES = [
    pytest.param(
        exercise,
        id=exercise.id,
        marks=[pytest.mark.slow, pytest.mark.xdist_group(exercise.id)] if exercise.wiring else [],
    )
    for exercise in exercises().values()
]
NOTEBOOKS = [
    pytest.param(
        unit,
        id=unit.name,
        marks=[pytest.mark.xdist_group(exercise.id) for exercise in unit.exercises if exercise.wiring],
    )
    for unit in units()
]


@pytest.mark.parametrize("exercise", EXERCISES)
def test_our_solution_earns_full_marks_and_shows_the_same_table_on_every_draw(exercise: Exercise) -> None:
    """Each by itself: ours runs behind the set-up cells alone, so no exercise needs an earlier answer.

    The table is that of another draw, which the notebook keeps; with HYPOTHESIS_PROFILE=thorough of 24.
    """
    kept = kept_table(exercise)
    for seed in range(24 if THOROUGH else 1):
        score = judge(exercise, right(exercise), seed * 1000)
        assert (float(score), score.status) == (exercise.points, "passed"), score.to_text()
        shown = score._repr_mimebundle_()
        assert shown == kept, "run the unit's notebook again, or the table shows something that was drawn"


def kept_table(exercise: Exercise) -> dict[str, Any]:
    """The output of our solution's check in the notebook that git keeps."""
    (unit,) = (unit for unit in units() if exercise in unit.exercises)
    notebook = json.loads((unit.folder / f"{unit.name}.ipynb").read_text("utf-8"))
    (cell,) = (
        cell
        for cell in notebook["cells"]
        if cell["metadata"].get("nbgrader", {}).get("grade_id") == exercise.grade_id
    )
    (output,) = cell["outputs"]
    data = output["data"].items()
    return {kind: "".join(content) if isinstance(content, list) else content for kind, content in data}


@pytest.mark.parametrize("exercise", EXERCISES)
def test_the_stub_earns_nothing_and_is_called_not_attempted(exercise: Exercise) -> None:
    score = judge(exercise, [stub] * len(exercise.answers))
    assert (float(score), score.status) == (0, "not attempted")
    assert {row.status for row in score.rows} == {"not attempted"}


def ended_early(whole: Outcome, rounds: int, contradicts: Contradicts) -> Outcome:
    """The outcome of the run if it had ended at the first observation that contradicts."""
    outcome = Outcome()
    for round, seen in enumerate(whole.trace[:rounds]):
        outcome.trace.append([])
        for i, observation in enumerate(seen):
            outcome.trace[-1].append(observation)
            if observation.difference is not None:
                outcome.fail("failed", "")
            if contradicts(round, i, observation):
                outcome.contradicted = True
                return outcome
        if round == len(whole.trace) - 1 and not whole.passed:
            outcome.fail(whole.status, "")
        if contradicts(round, len(seen), None):
            outcome.contradicted = True
            return outcome
    return outcome


@pytest.fixture
def known_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A diagnosis runs all mistakes of an exercise; over all answers of this file each is run once.

    A run that ends at the first value that contradicts the answer is read from the one to its end. Where the
    candidate is the answer itself, its wrong values are computed again: they must come twice alike.
    """
    run, whole = run_checks.run_requirement, dict[Any, Outcome]()
    judged: list[tuple[int, ...]] = [()]  # the answer that is judged

    def run_once(
        exercise: Exercise,
        requirement: Requirement,
        answers: Sequence[Any],
        seed: int,
        rounds: int | None = None,
        contradicts: Contradicts | None = None,
    ) -> Outcome:
        which = tuple(map(id, answers))
        if contradicts is None:
            judged[0] = which
        elif which == judged[0] and contradicts is not run_checks.is_wrong:
            return run(exercise, requirement, answers, seed, rounds, contradicts)
        key = requirement.name, which, seed
        if key not in whole:
            whole[key] = run(exercise, requirement, answers, seed)
        return whole[key] if contradicts is None else ended_early(whole[key], rounds or 0, contradicts)

    if not THOROUGH:
        monkeypatch.setattr(run_checks, "run_requirement", run_once)


def complaint(exercise: Exercise, misconception: Misconception) -> str:
    """The faults of the judgement on a known mistake; empty if there are none."""
    scores = [judge(exercise, misconception.answers, seed * 1000) for seed in range(8 if THOROUGH else 1)]
    if len({tuple(row.earned for row in score.rows) for score in scores}) > 1:
        return f"loses other points on another draw: {[[row.earned for row in s.rows] for s in scores]}"
    for score in scores:
        named = [mistake.name for mistake in score.mistakes]
        if float(score) >= exercise.points or score.status not in ("wrong", "partial"):
            return f"is {score.status} with {float(score):g} points"
        if named != [misconception.name] or misconception.why not in score.message:
            return f"is named {named}:\n{score.to_text()}"
        if misconception.name not in score.to_html() and "&" not in score.to_html():
            return "is not named in HTML"
    return ""


@pytest.mark.slow
@pytest.mark.usefixtures("known_runs")
@pytest.mark.parametrize("exercise", EXERCISES)
def test_every_misconception_loses_the_same_points_on_every_draw_and_is_named_as_itself(
    exercise: Exercise,
) -> None:
    """On one draw of each; on eight, in runs of their own, with HYPOTHESIS_PROFILE=thorough."""
    found = {each.name: complaint(exercise, each) for each in exercise.misconceptions}
    assert not any(found.values()), "\n".join(f"{name!r} {what}" for name, what in found.items() if what)


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
    """The outputs of a notebook's cells, run one after the other in one namespace."""
    namespace: dict[str, Any] = {}
    for i, source in enumerate(sources):
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        name = f"<cell {i} of {hash(source)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(tree, name, "exec"), namespace)
        if isinstance(last, ast.Expr):
            yield eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("unit", NOTEBOOKS)
def test_the_notebook_runs_unsolved_and_earns_nothing(unit, capfd: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    """The whole of it, shown as IPython shows it; a line on stderr would cost points in nbgrader."""
    cells = [c for c in read_source(unit.name, unit.folder.parent)["cells"] if c["cell_type"] == "code"]
    show, shown = DisplayFormatter(), []
    for result in results([released(cell) for cell in cells]):
        assert show.format(result)[0]["text/plain"]
        shown.append(result)
    assert capfd.readouterr().err == ""
    scores = [result for result in shown if isinstance(result, Score)]
    assert [score.exercise for score in scores] == [exercise.id for exercise in unit.exercises]
    assert {(float(score), score.status) for score in scores} == {(0, "not attempted")}
