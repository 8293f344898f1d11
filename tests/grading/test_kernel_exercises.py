"""Unit 11: what a learner is told whose kernel goes wrong, and where there is no Triton at all."""

import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import full_marks, names, unit_module
from patience import limits

from kvlearn.grading import Score, check, find_exercise
from kvlearn.grading.catalogue import nbgrader_of, solutions_root
from kvlearn.grading.commands import grade
from kvlearn.grading.grader import Grader
from kvlearn.grading.mistakes import compiled, run
from kvlearn.grading.release import stub as released

pytestmark = pytest.mark.answers

UNIT = "11_triton_decode"
NOTEBOOK = solutions_root() / UNIT / f"{UNIT}.ipynb"

CHECKS = unit_module(UNIT, "checks")

pytest.importorskip("triton", reason="Triton exists for Linux only")


def changed(exercise: str, was: str, now: str) -> str:
    """Our answer with one thing changed."""
    code = find_exercise(exercise).solution
    assert was in code
    return code.replace(was, now)


def checked(exercise: str, code: str) -> Score:
    found = find_exercise(exercise)
    learners = {"__name__": "__main__"}
    answers = run(compiled(code, f"<answer {hash(code)}>"), found.set_up, learners, found.answers)
    return check(exercise, *answers)


def test_a_stray_pointer_is_an_error_that_names_tensor_and_line() -> None:
    score = checked(
        "11.4", changed("11.4", "tl.load(Q + at_heads, mask=here, other=0.0)", "tl.load(Q + at_heads)")
    )
    assert "IndexError: tl.load reads" in score.message
    assert "behind the end of Q: mask what is out of range" in score.message
    assert "of your code: q = tl.load(Q + at_heads)" in score.message


def test_a_stray_store_changes_nothing_and_is_named() -> None:
    score = checked(
        "11.8", changed("11.8", "tl.store(TICKETS + row, 0)", "tl.store(TICKETS + row + 1000, 0)")
    )
    assert "tl.store writes 999 elements behind the end of TICKETS" in score.to_text()


def test_an_error_in_a_kernel_is_shown_as_itself_with_its_line() -> None:
    score = checked(
        "11.2", changed("11.2", "weights = tl.exp2(scores - new)", "weights = tl.exp3(scores - new)")
    )
    assert score.status == "error"
    assert "AttributeError: module 'triton.language' has no attribute 'exp3'" in score.message
    assert "of your code: weights = tl.exp3(scores - new)" in score.message
    assert "InterpreterError" not in score.to_text()


def test_a_wrong_grid_is_an_error_of_the_launch() -> None:
    score = checked("11.2", changed("11.2", "online_kernel[(B,)]", "online_kernel[(B + 1,)]"))
    assert "IndexError" in score.message
    assert checked("11.2", changed("11.2", "online_kernel[(B,)]", "online_kernel[B]")).status == "error"


def test_a_counter_that_is_read_and_then_written_is_told_apart_from_an_atomic_one() -> None:
    atomic = 'ticket = tl.atomic_add(TICKETS + row, 1, sem="acq_rel")'
    twice = "ticket = tl.load(TICKETS + row)\n        tl.store(TICKETS + row, ticket + 1)"
    score = checked("11.8", changed("11.8", atomic, twice))
    assert [mistake.name for mistake in score.mistakes] == ["read, then written"]


@pytest.mark.parametrize(
    ("exercise", "first"),
    [("11.2", "    B, D = q.shape\n"), ("11.5", "    return launch_split(")],
)
def test_a_kernel_of_kvlearn_or_a_ready_made_softmax_earns_nothing(exercise: str, first: str) -> None:
    code = changed(exercise, first, f"    torch.softmax(q, -1)\n{first}")
    score = checked(exercise, code)
    assert float(score) == 0
    assert "torch.softmax" in score.message


def rows_in_torch(q: Any, k: Any, v: Any, lengths: Any) -> Any:
    """Right, and no kernel."""
    scores = torch.einsum("bd,bsd->bs", q, k) * q.shape[1] ** -0.5
    scores = scores.masked_fill(torch.arange(k.shape[1]) >= lengths[:, None], -torch.inf)
    weights = (scores - scores.amax(1, keepdim=True).nan_to_num(neginf=0.0)).exp()
    out = torch.einsum("bs,bsd->bd", weights, v.nan_to_num())
    return out / weights.sum(1, keepdim=True).clamp(min=1e-30)


def in_torch(exercise: str) -> Callable[..., Any]:
    """The exercise's right result, of an answer that launches no kernel."""
    mistakes = unit_module(UNIT, "mistakes")
    answers: dict[str, Callable[..., Any]] = {
        "11.2": lambda q, k, v: rows_in_torch(q, k, v, torch.full((len(q),), k.shape[1])),
        "11.3": rows_in_torch,
        "11.4": mistakes.grouped,
        "11.5": lambda *inputs: mistakes.split_by(*inputs, mistakes.right_bounds),
        "11.6": CHECKS.in_a_row,
        "11.8": mistakes.launch,
    }
    return answers[exercise]


@pytest.mark.parametrize("exercise", ["11.2", "11.3", "11.4", "11.5", "11.6", "11.8"])
def test_an_answer_that_launches_no_kernel_earns_nothing_and_is_told_so(
    exercise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = in_torch(exercise)

    def learners(*inputs: Any) -> Any:
        return answer(*inputs)

    score = check(exercise, learners)
    assert float(score) == 0
    assert not score.mistakes
    assert "no kernel was launched: this exercise asks for a Triton kernel" in score.message
    # Where kernels are not watched, compiled ones on a GPU for example, nobody can tell, and it would pass.
    monkeypatch.setattr(CHECKS, "watching", [])
    assert check(exercise, learners).status == "passed"


WIDENED = "mask=live, other=0).to(tl.int64)"
FIRST = "((page * G + g) * PAGE + n % PAGE) * D"


def place(first: str, load: str = "mask=live, other=0)") -> str:
    """Our answer to 11.6 with another count of a key's place in the pool."""
    return changed("11.6", WIDENED, load).replace(FIRST, first)


@pytest.mark.parametrize(
    ("code", "mistake"),
    [
        (place(FIRST), "a block number of 32 bits"),
        (place(f"({FIRST}).to(tl.int64)"), "a block number of 32 bits"),
        (
            place("((page * G + g) * PAGE + n % PAGE).to(tl.int64) * D"),
            "widened before the last product alone",
        ),
        (place("((page * G).to(tl.int64) + g) * PAGE * D + n % PAGE * D"), "widened after the first product"),
    ],
)
def test_a_product_of_32_bits_is_found_wherever_it_is(code: str, mistake: str) -> None:
    score = checked("11.6", code)
    assert [row.earned for row in score.rows] == [1, 1, 1, 1, 1, 0]
    assert names(score) == [mistake]


@pytest.mark.parametrize(
    "code",
    [
        place("page * (G * PAGE * D) + g * PAGE * D + (n % PAGE) * D", WIDENED),
        place("(tl.cast(page, tl.int64) * (G * PAGE) + g * PAGE + n % PAGE) * D"),
        place("page * tl.full([1], G * PAGE * D, tl.int64) + (g * PAGE + n - n // PAGE * PAGE) * D"),
    ],
)
def test_a_block_number_may_be_widened_in_any_way(code: str) -> None:
    found = find_exercise("11.6")
    learners = {"__name__": "__main__"}
    assert full_marks(
        "11.6", *run(compiled(code, f"<answer {hash(code)}>"), found.set_up, learners, found.answers)
    )


def test_a_tensor_is_found_further_on_and_nowhere_else() -> None:
    from kvlearn.teaching.interpreter import tl, triton
    from kvlearn.teaching.watch import far

    @triton.jit
    def read(X, AT, OUT):  # type: ignore[no-untyped-def]
        n = tl.arange(0, 4)
        tl.store(OUT + n, tl.load(X + tl.load(AT + n)))

    x, out = torch.arange(6.0).view(2, 3), torch.zeros(4)
    with far((2, 3), 3 * 2**30):
        read[(1,)](x, torch.tensor([0, 1, 5, 6]) + 3 * 2**30, out)
    assert out[:3].tolist() == [0, 1, 5]
    assert out[3].isnan()
    with far((2, 3), 3 * 2**30):
        read[(1,)](x, torch.tensor([0, 1, 2, -1]), out)
    assert out.isnan().all()
    read[(1,)](x, torch.tensor([5, 4, 3, 2]), out)
    assert out.tolist() == [5, 4, 3, 2]


def test_the_number_of_splits_may_be_found_in_any_way() -> None:
    def by_halving_the_tiles(lengths, n_heads, n_kv_heads, block, multiprocessors, resident):  # type: ignore[no-untyped-def]
        """The fewest splits for each number of tiles in one program."""
        tiles = (max(lengths) + block - 1) // block
        best = (10**9, 0)
        for longest in range(1, tiles + 1):
            splits = math.ceil(tiles / longest)
            programs = len(lengths) * n_kv_heads * splits
            waves = math.ceil(programs / (multiprocessors * resident))
            best = min(best, (waves * (math.ceil(tiles / splits) + 1), splits))
        return best[1]

    def by_tensor(lengths, n_heads, n_kv_heads, block, multiprocessors, resident):  # type: ignore[no-untyped-def]
        tiles = math.ceil(max(lengths) / block)
        splits = torch.arange(1, tiles + 1)
        waves = -(-len(lengths) * n_kv_heads * splits // (multiprocessors * resident))
        time = waves * (1 - (-tiles // splits))
        return splits[time == time.min()][0]

    def by_loop(lengths, n_heads, n_kv_heads, block, multiprocessors, resident):  # type: ignore[no-untyped-def]
        tiles, fewest, least = -(-max(lengths) // block), 1, math.inf
        for splits in range(1, tiles + 1):
            waves, rest = divmod(len(lengths) * n_kv_heads * splits, multiprocessors * resident)
            time = (waves + (rest > 0)) * (-(-tiles // splits) + 1)
            if time < least:
                fewest, least = splits, time
        return fewest

    for choose_splits in (by_halving_the_tiles, by_tensor, by_loop):
        assert full_marks("11.7", choose_splits)


def test_the_function_that_is_the_answer_itself_earns_nothing() -> None:
    code = find_exercise("11.2").solution
    lines = code[code.index("        scores = scores * ") : code.index("    tl.store(OUT")]
    scaled = "        m, total, acc = online(m, total, acc, scores * (scale * LOG2E), v)\n"
    score = checked("11.2", changed("11.2", lines, scaled))
    assert float(score) == 0
    assert "Your answer calls online, which does the work that this exercise asks you to do" in score.message

    code = find_exercise("11.5").solution
    lines = code[code.index("    lse = tl.load(LSE") : code.index("    tl.store(OUT")]
    merged = "    out = merge_parts(PARTS, LSE, row * n_splits, n_splits, D, SPLITS)\n"
    score = checked("11.5", changed("11.5", lines, merged))
    assert float(score) == 0
    assert "Your answer calls merge_parts, which does the work" in score.message


def test_without_triton_the_notebook_runs_and_says_what_is_missing() -> None:
    """As on macOS: imports work, exercises without kernels count, the others say why they do not."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    program = f"""
        import ast, json, sys
        sys.modules["triton"] = None
        from kvlearn.grading import Score
        names = {{}}
        for source in {["".join(cell["source"]) for cell in cells]!r}:
            tree = ast.parse(source)
            last = tree.body.pop()
            if not isinstance(last, ast.Expr):
                exec(source, names)
                continue
            exec(compile(tree, "<cell>", "exec"), names)
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
            if isinstance(value, Score):
                print(json.dumps([value.exercise, value.status, value.message]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    scores = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, status, _ in scores if status == "passed"] == ["11.1", "11.7"]
    others = [message for name, _, message in scores if name not in ("11.1", "11.7")]
    assert len(others) == 6
    assert all("needs Triton, of which the course pins the Linux package" in message for message in others)


@pytest.mark.slow
def test_a_kernel_that_never_ends_or_kills_the_process_costs_only_its_own_points(tmp_path: Path) -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    answers = {nbgrader_of(c)["grade_id"]: c for c in notebook["cells"] if nbgrader_of(c).get("solution")}
    for cell in list(answers.values())[4:]:  # four are enough
        cell["source"] = released({**cell, "source": "".join(cell["source"])})
    # Asleep: a loop that computes takes a processor for as long as the limit is.
    loop = "    import time\n\n    while True:\n        time.sleep(1)\n    tl.store(OUT"
    endless = changed("11.2", "    tl.store(OUT", loop)
    # Past our watch: an address that the interpreter is made to read by itself.
    crash = changed(
        "11.3", "    B, D = q.shape\n", "    import ctypes\n\n    ctypes.string_at(8)\n    B, D = q.shape\n"
    )
    answers["u11-2-online-answer"]["source"] = endless
    answers["u11-3-tail-answer"]["source"] = crash
    file = tmp_path / f"{UNIT}.ipynb"
    file.write_text(json.dumps(notebook))
    (report,), _ = grade([file], Grader(limits=limits(6)))
    one, two, three, four, *others = report.exercises
    assert (two.score, two.status, three.score, three.status) == (0, "error", 0, "error")
    assert "longer than" in two.message
    assert "SIGSEGV" in three.message
    assert one.status == four.status == "passed"
    assert {result.status for result in others} == {"not attempted"}
