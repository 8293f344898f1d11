""" "Your model": whose each part is, what it earns, what is shown, and that other answers cannot harm it."""

import ast
import json
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import earned, right, stub

import kvlearn
from kvlearn import workbench
from kvlearn.grading import check, commands, exercises, find_exercise
from kvlearn.grading.catalogue import nbgrader_of, read_source, solutions_root
from kvlearn.grading.grader import Grader
from kvlearn.grading.mistakes import compiled
from kvlearn.grading.release import stub as released

pytestmark = pytest.mark.answers

MODELS = [exercise for exercise in exercises().values() if exercise.wiring]
MODEL = find_exercise("01.9")
PARTS = MODEL.wiring.parts
UNIT = "01_full_attention"


@pytest.fixture(autouse=True, scope="module")
def checked() -> None:
    """The answers to the other exercises, checked once as in a notebook."""
    for source in dict.fromkeys(source for source, _ in PARTS.values()):
        assert check(source, *right(find_exercise(source))).status == "passed"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def notebook(**changes: Any) -> dict[str, Any]:
    """The names of a solved notebook of unit 01, and these in place of some."""
    names: dict[str, Any] = {}
    for source in {source for source, _ in PARTS.values()} | {MODEL.id}:
        exercise = find_exercise(source)
        names |= dict(zip(exercise.answers, right(exercise), strict=True))
    return names | changes


def points(**changes: Any) -> list[float]:
    names = notebook(**changes)
    return earned(check("01.9", names["attention"], names["generate"], notebook=names))


@pytest.mark.parametrize("exercise", MODELS, ids=lambda exercise: exercise.id)
def test_every_part_is_an_answer_that_some_exercise_of_the_unit_asks_for(exercise: Any) -> None:
    for name, (source, library) in exercise.wiring.parts.items():
        assert name in find_exercise(source).answers
        assert callable(library)
        assert source.split(".")[0] == exercise.id.split(".")[0]
    assert "attention" in exercise.answers or not isinstance(exercise.wiring, workbench.Wiring)


def test_a_solved_notebook_earns_all_points_and_one_without_parts_those_for_its_own_functions() -> None:
    assert points() == [1] * 8
    assert points(**dict.fromkeys(PARTS)) == [1, 1, 1, 1, 1, 0, 0, 0]
    attention, generate = right(MODEL)
    assert check("01.9", attention, generate) == 5, "no notebook is no reason to count ours as theirs"


@pytest.mark.parametrize(
    ("part", "lost"), [("causal_mask", [5, 7]), ("KVCache", [6, 7]), ("chunked_prefill", [7])]
)
def test_a_part_that_is_not_written_costs_the_points_of_its_own(part: str, lost: list[int]) -> None:
    got = points(**{part: stub})
    assert [i for i, each in enumerate(got) if not each] == lost


def test_a_part_that_fails_its_own_check_is_the_librarys_and_the_row_says_so() -> None:
    right_rotate = notebook()["rotate"]
    names = notebook(rotate=lambda x, positions, theta=10000.0: right_rotate(x, positions + 1, theta))
    score = check("01.9", names["attention"], names["generate"], notebook=names)
    assert earned(score) == [1, 1, 1, 1, 1, 1, 0, 0]
    assert score.rows[6].status == "not attempted"
    assert "kvlearn's rotate in place of yours: 01.4 does not have all" in score.rows[6].came
    chosen = {part.name: part for part in workbench.choose(MODEL, names)}
    assert chosen["rotate"].chosen is PARTS["rotate"][1]
    assert chosen["attend"].chosen is names["attend"]


def test_a_part_that_passes_its_check_and_fails_in_the_model_loses_its_points() -> None:
    class Forgetful(notebook()["KVCache"]):  # type: ignore[misc]
        def append(self, k: Any, v: Any) -> Any:
            keys, values = super().append(k, v)
            return (keys.roll(1, dims=2), values) if keys.shape[2] > 16 else (keys, values)

    assert points(KVCache=Forgetful) == [1, 1, 1, 1, 1, 1, 0, 0]


def test_wrong_functions_of_its_own_are_named_whatever_the_parts_are() -> None:
    mistake = next(m for m in MODEL.misconceptions if m.name == "positions start at 0 in each call")
    attention, generate = mistake.answers
    score = check("01.9", attention, generate, notebook=notebook(**dict.fromkeys(PARTS)))
    assert [each.name for each in score.mistakes] == [mistake.name]
    assert earned(score) == [1, 0, 1, 1, 1, 0, 0, 0]


def test_an_answer_whose_check_was_stopped_is_not_run_again() -> None:
    runs = []

    def endless(*_: Any) -> None:
        runs.append(1)
        raise KeyboardInterrupt

    assert check("01.4", endless).status == "error"
    assert points(rotate=endless) == [1, 1, 1, 1, 1, 1, 0, 0]
    assert len(runs) == 1
    assert check("01.4", *right(find_exercise("01.4"))) == find_exercise("01.4").points


def test_the_library_parts_in_the_model_are_kvlearns_decoder() -> None:
    tokens = workbench.encode(workbench.TEXT[:40])
    model = workbench.Model(MODEL.wiring, right(MODEL)[0], workbench.library(MODEL.wiring))
    torch.testing.assert_close(model(tokens), workbench.base_model()(tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prompt", workbench.PROMPTS)
def test_the_most_likely_token_is_never_a_close_call(prompt: str) -> None:
    """Identical tokens are asked for: another order of operations shall not be able to change one."""
    tokens = workbench.encode(prompt[-40:])
    text = workbench.base_model().generate(tokens, 6)
    best = workbench.base_model()(text)[0, tokens.shape[1] - 1 : -1].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 0.01


def test_the_code_shown_is_the_code_run() -> None:
    shown = workbench.code("01.9").source
    assert len(shown.splitlines()) < 80
    checks = sys.modules[MODEL.wiring.weights.__module__]
    files = [ast.parse(Path(str(module.__file__)).read_text("utf-8")) for module in (workbench, checks)]
    kept = {ast.dump(node) for file in files for node in file.body}
    assert [ast.dump(node) in kept for node in ast.parse(shown).body] == [True] * 4

    space = {**vars(workbench), **vars(checks)}
    exec(compiled(shown, "<shown>"), space)
    wiring = workbench.Wiring(PARTS, space["weights"], space["new_cache"])
    tokens = workbench.encode(workbench.TEXT[:20])
    logits = [
        model(wiring, right(MODEL)[0], workbench.library(wiring))(tokens)
        for model in (space["Model"], workbench.Model)
    ]
    torch.testing.assert_close(*logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match="Your model"):
        workbench.code("01.8")


def test_the_table_says_whose_is_whose_and_the_picture_shows_what_was_measured() -> None:
    names = notebook(rotate=stub)
    shown = workbench.compare("01.9", names, n_new=8)
    whose = {part.name: part.is_theirs for part, _ in shown.parts}
    assert whose.pop("rotate") is False
    assert set(whose.values()) == {True}
    assert {works for part, works in shown.parts if part.is_theirs} == {"yes"}

    rows = {what: (ours, theirs) for what, ours, theirs in shown.rows}
    same = [row for what, row in rows.items() if what.startswith("identical tokens")]
    assert len(same) == 4
    assert set(same) == {("yes", "yes")}
    for what, (ours, theirs) in rows.items():
        if what.startswith(("text", "bytes")):
            assert ours == theirs, what

    n_prompt = len(workbench.PROMPTS[0])
    curves = shown.picture.data["curves"]
    lengths, ms = curves["your parts"]
    assert list(lengths) == list(range(n_prompt + 1, n_prompt + 8))
    assert list(ms) == [1e3 * shown.times["your parts"][n] for n in lengths]
    html = shown._repr_mimebundle_()["text/html"]
    assert "01.4 does not have all its points yet" in html
    assert "Medians: " in html


def test_bytes_are_those_that_the_learners_cache_holds_and_hands_out() -> None:
    class Wide(notebook()["KVCache"]):  # type: ignore[misc]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.spare = torch.zeros(1000)

    shown = workbench.compare("01.9", notebook(KVCache=Wide), n_new=3)
    ours, theirs = next(row[1:] for row in shown.rows if row[0].startswith("bytes stored"))
    assert int(theirs.replace(",", "")) == int(ours.replace(",", "")) + 4 * 4000


def test_an_empty_notebook_is_compared_too() -> None:
    shown = workbench.compare("01.9", {}, n_new=2)
    assert not any(part.is_theirs for part, _ in shown.parts)
    assert shown.rows[0][1] == shown.rows[0][2]


def test_the_broken_cache_of_01_5_is_right_until_a_chunk_has_another_size() -> None:
    broken = {}
    for cell in read_source(UNIT, solutions_root())["cells"]:
        if cell["id"] == "u01-5-cache-given":
            exec(cell["source"], {"torch": torch}, broken)
    wanted = workbench.losses("01.9", chunk=96)
    losses = workbench.losses("01.9", chunk=96, KVCache=broken["BrokenCache"])
    torch.testing.assert_close(losses[:288], wanted[:288])
    assert losses[288:].mean() > wanted[288:].mean() + 0.5
    one_chunk = workbench.losses("01.9", chunk=999)
    torch.testing.assert_close(wanted, one_chunk, rtol=1e-3, atol=1e-3)


def graded(tmp_path: Path, open_ones: tuple[str, ...], **answers: str) -> dict[str, Any]:
    """The results of kvlearn grade for our solution with these answers in place of some, by exercise.

    Exercises in ``open_ones`` are not attempted: that saves their kernels.
    """
    book = read_source(UNIT, solutions_root())
    stubs = {find_exercise(exercise).grade_id for exercise in open_ones}
    for cell in book["cells"]:
        name = str(nbgrader_of(cell).get("grade_id")).removesuffix("-answer")
        if nbgrader_of(cell).get("solution") and name in answers.keys() | stubs:
            cell["source"] = answers[name] if name in answers else released(cell)
    file = tmp_path / f"{UNIT}.ipynb"
    file.write_text(json.dumps(book))
    (report,), faults = commands.grade([file], Grader())
    assert not faults
    results = {result.id: result for result in report.exercises}
    assert {results.pop(exercise).status for exercise in open_ones} == {"not attempted"}
    return results


@pytest.mark.slow
def test_an_earlier_answer_that_ends_the_process_is_the_librarys_part(tmp_path: Path) -> None:
    ends = {"u01-4-rope": "import os\ndef rotate(*_): os._exit(1)\n"}
    results = graded(tmp_path, ("01.6", "01.7", "01.8"), **ends)
    assert results["01.4"].status == "error"
    assert results["01.9"].score == 6
    others = [result for name, result in results.items() if name not in ("01.4", "01.9")]
    assert {result.status for result in others} == {"passed"}


@pytest.mark.slow
def test_a_part_that_ends_the_process_in_the_model_alone_costs_the_points_of_the_parts(
    tmp_path: Path,
) -> None:
    merge = "import os\ndef merge(x): os._exit(1) if x.shape[1:] == (8, 4, 16) else 0; return x"
    right_heads = find_exercise("01.3").solution
    wrapped = f"{right_heads}\nkept = merge_heads\n{merge}\ndef merge_heads(x): return kept(merge(x))\n"
    results = graded(tmp_path, ("01.7", "01.8"), **{"u01-3-heads": wrapped})
    assert results["01.3"].status == "passed"
    assert results["01.9"].score == 5


@pytest.mark.slow
def test_a_model_that_ends_the_process_costs_its_own_points_only(tmp_path: Path) -> None:
    ends = "import os\ndef attention(*_): os._exit(1)\ndef generate(*_): os._exit(1)\n"
    results = graded(tmp_path, ("01.7", "01.8"), **{"u01-9-model": ends})
    assert results.pop("01.9").score == 0
    assert {result.status for result in results.values()} == {"passed"}


def test_the_front_of_the_package_has_the_workbench() -> None:
    assert kvlearn.workbench is workbench


def test_the_librarys_models_are_trained_once() -> None:
    """No answer changes them: a comparison that is run again takes the time of the learner's model alone."""
    trained: list[int] = []

    def train(answers: Any, parts: Any) -> workbench.Trained:
        trained.append(answers["width"])
        return workbench.Trained({"width": str(answers["width"])}, {})

    training = workbench.Training({}, (), train, {"narrow": {"width": 1}})
    for _ in range(2):
        runs = training.library_runs({"width": 4})
        assert {name: run.numbers["width"] for name, run in runs.items()} == {"kvlearn's": "4", "narrow": "1"}
    assert trained == [4, 1]


# The parts of a model, and the bytes of its cache


@dataclass(slots=True)
class Slotted:
    kept: Any


class Cyclic:
    def __init__(self, kept: Any) -> None:
        self.kept, self.itself = kept, [self]


@pytest.mark.parametrize("holder", [list, deque, Slotted, Cyclic, lambda kept: {"kept": kept}])
def test_every_tensor_of_a_cache_is_found(holder: Any) -> None:
    found = list(workbench.tensors_in([holder([torch.zeros(3), torch.zeros(4)])]))
    assert [each.numel() for each in found] == [3, 4]


def test_a_watched_cache_is_of_the_class_of_the_cache() -> None:
    assert isinstance(workbench.Watched(Cyclic([])), Cyclic)


def test_a_part_is_theirs_as_soon_as_its_check_passes() -> None:
    """The learner mends a helper that the part calls: the part is the same object."""
    model, source = find_exercise("01.9"), find_exercise("01.4")
    right = source.right[0]
    shift = [1]

    def rotate(x: Any, positions: Any, theta: float = 10000.0) -> Any:
        return right(x, positions + shift[0], theta)

    def whose() -> bool:
        parts = workbench.choose(model, {"rotate": rotate})
        return next(part.is_theirs for part in parts if part.name == "rotate")

    assert not whose()
    shift[0] = 0
    assert check("01.4", rotate).status == "passed"
    assert whose()


def test_a_part_that_the_model_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"replaced: expected one of 'attend', .*; got 'KVCach'"):
        workbench.losses("01.9", 96, KVCach=Cyclic)
