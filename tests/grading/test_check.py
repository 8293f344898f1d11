"""``check`` on answers that are half right, odd or hostile: always a score, always a reason."""

import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from answers import right, stub
from torch import Tensor

import kvlearn
from kvlearn.attention import KVCache
from kvlearn.attention.core import attention
from kvlearn.grading import Score, check, find_exercise, judge
from kvlearn.grading.calls import differ

ATTEND = find_exercise("01.1")
MASK = find_exercise("01.2")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    answer: tuple[Tensor, Tensor] = right(ATTEND)[0](q, k, v, mask)
    return answer


def with_out(change: Callable[[Tensor], Tensor]) -> Any:
    """A right lse beside an output that was changed."""

    def attend_changed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, lse = attend(q, k, v, mask)
        return change(out), lse

    return attend_changed


def row(score: Score, name: str) -> Any:
    return next(row for row in score.rows if row.name == name)


def test_a_half_right_answer_earns_part_of_the_points() -> None:
    score = check("01.1", lambda q, k, v, mask=None: attend(q, k, v))
    assert score.status == "partial"
    assert 0 < score < ATTEND.points
    assert row(score, "out, without a mask").earned == 1
    assert row(score, "out, with a mask").earned == 0


def test_a_failure_shows_shapes_the_first_wrong_element_and_where_but_never_a_tensor() -> None:
    score = check("01.1", with_out(lambda out: out + 1))
    came = row(score, "out, without a mask").came
    assert "there; the largest difference is 1 at [" in came
    assert "in attend((" in came
    assert " at [0, 0, 0, 0]" in row(score, "out, without a mask").expected
    assert "tensor(" not in score.to_html()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (None, "None (is a return missing?)"),
        (np.zeros((2, 3)), "a numpy array"),
        ([1.0, 2.0], "a list of 2 (float, float)"),
        ((torch.zeros(1), torch.zeros(1)), "a tuple of 2 (Tensor, Tensor)"),
        ("text", "a str"),
        (torch.zeros(2, 3), "a tensor of shape (2, 3)"),
        (torch.zeros(2, 3, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, 3).to_sparse(), "shape (2, 3)"),
        (torch.empty(2, 3, device="meta"), "shape (2, 3)"),
        (object(), "a object"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_answer_of_the_wrong_type_is_described(output: Any, words: str) -> None:
    for exercise in ("01.1", "01.2", "01.4", "01.7", "01.8"):
        score = check(exercise, lambda *_, **__: output)
        assert score == 0
        assert score.status == "wrong"
    assert words in row(check("01.2", lambda *_: output), "a boolean mask, (B, 1, T, S)").came


@pytest.mark.parametrize("kind", ["complex", "sparse", "meta"])
def test_a_tensor_of_the_right_shape_and_an_odd_kind_is_wrong(kind: str) -> None:
    def odd(out: Tensor) -> Tensor:
        return {"complex": out.to(torch.complex64), "sparse": out.to_sparse(), "meta": out.to("meta")}[kind]

    score = check("01.1", with_out(odd))
    others = row(score, "the shapes").earned + row(score, "lse, without and with a mask").earned
    assert float(score) == others
    assert score.status in ("wrong", "partial")


def test_a_wrong_dtype_is_named() -> None:
    score = check("01.1", with_out(lambda out: out.float()))
    assert "dtype bfloat16" in row(score, "half precision in, sums in fp32").expected
    assert "dtype float32" in row(score, "half precision in, sums in fp32").came


def test_changing_an_input_in_place_is_found_and_costs_only_its_own_requirement() -> None:
    def in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
        out, lse = attend(q, k, v, mask)
        q.zero_()
        return out, lse

    score = check("01.1", in_place)
    assert float(score) == ATTEND.points - 1
    assert "an input changed in place" in score.message


def test_numbers_that_replace_nan_or_infinity_are_a_change() -> None:
    nan, inf = math.nan, math.inf
    kept = [torch.tensor([nan, 1.0]), torch.tensor([inf, -inf]), torch.tensor([3]), torch.tensor([True])]
    assert not any(differ(x, x.clone()) for x in kept)
    for was, now in [(nan, 0.0), (0.0, nan), (inf, torch.finfo(torch.float32).max), (inf, nan), (inf, -inf)]:
        assert differ(torch.tensor([was, 1.0]), torch.tensor([now, 1.0])), (was, now)


def test_an_exception_is_shown_with_the_learners_line_and_no_traceback() -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return q.no_such_method()

    score = check("01.1", broken)
    assert (float(score), score.status) == (0, "error")
    assert "AttributeError: 'Tensor' object has no attribute 'no_such_method'" in score.message
    assert "of your code: return q.no_such_method()" in score.message
    assert "Traceback" not in score.to_html()


@pytest.mark.parametrize(
    "error", [SystemExit(3), MemoryError(), RecursionError("deep"), GeneratorExit(), AssertionError("no")]
)
def test_no_exception_leaves_a_check(error: BaseException) -> None:
    def raising(*_: Any) -> None:
        raise error

    score = check("01.1", raising)
    assert (float(score), score.status) == (0, "error")
    assert type(error).__name__ in score.message


def test_an_exception_that_cannot_be_printed_is_survived() -> None:
    class Nasty(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    def raising(*_: Any) -> None:
        raise Nasty

    assert "Nasty" in check("01.1", raising).message


def test_an_interrupt_ends_the_whole_check_at_once() -> None:
    calls = []

    def endless(*_: Any) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    score = check("01.1", endless)
    assert (float(score), score.status, len(calls)) == (0, "error", 1)
    assert "loop that does not end" in score.message


def test_torchs_own_not_implemented_is_an_error_and_not_a_stub() -> None:
    def unsupported(*_: Any) -> None:
        torch.ops.aten.relu(torch.zeros(2, device="meta").to(torch.complex64).to("cpu"))
        raise NotImplementedError("relu: no kernel")

    assert check("01.1", unsupported).status == "error"
    assert check("01.1", stub).status == "not attempted"


def test_a_class_written_in_part_says_which_part_is_missing() -> None:
    class Part(right(find_exercise("01.5"))[0]):  # type: ignore[misc]
        def reset(self) -> None:
            raise NotImplementedError()

    score = check("01.5", Part)
    assert [each.name for each in score.rows if each.status != "passed"] == ["reset", "fork"]
    for name in ("reset", "fork"):
        assert "KVCache.reset is not written yet" in row(score, name).came


@pytest.mark.parametrize("answers", [(), (None,), (...,)])
def test_no_answer_at_all_is_not_attempted(answers: tuple[Any, ...]) -> None:
    assert check("01.1", *answers).status == "not attempted"


def test_answers_that_do_not_fit_the_check_are_told_how_to_call_it() -> None:
    assert 'kvlearn.check("01.3", split_qkv, merge_heads)' in check("01.3", attend).message
    assert "expected a function or a class, came a numpy array" in check("01.1", np.zeros(3)).message


@pytest.mark.parametrize("borrowed", [F.scaled_dot_product_attention, attention])
def test_the_ready_made_attention_is_recognised_and_earns_nothing(borrowed: Any) -> None:
    for answer in (borrowed, lambda q, k, v, mask=None: borrowed(q, k, v, mask)):
        score = check("01.1", answer)
        assert (float(score), score.status) == (0, "wrong")
        assert borrowed.__name__ in score.message


def test_a_class_of_kvlearns_is_recognised_though_it_is_called_differently() -> None:
    assert "kvlearn.attention.base.KVCache" in check("01.5", KVCache).message


def test_only_the_requirement_that_borrows_loses_its_points() -> None:
    def mixed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
        out, lse = attend(q, k, v, mask)
        return (F.scaled_dot_product_attention(q, k, v) if mask is None else out), lse

    score = check("01.1", mixed)
    assert float(score) == ATTEND.points - 3


@pytest.mark.filterwarnings("ignore:a warning")
def test_a_check_is_silent_whatever_the_answer_prints(capfd: pytest.CaptureFixture[str]) -> None:
    kept = sys.stderr
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("learner").addHandler(handler)

    def loud(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
        print("x" * 1_000_000)
        print("kept", file=kept)
        if sys.__stderr__ is not None:
            sys.__stderr__.write("buffered")
        warnings.warn("a warning", RuntimeWarning, stacklevel=1)
        logging.getLogger("learner").error("logged")
        os.write(2, b"straight to the descriptor")
        os.system("echo from a shell; echo from a shell >&2")
        return attend(q, k, v, mask)

    score = check("01.1", loud)
    print("afterwards", file=sys.stderr)
    logging.getLogger("learner").removeHandler(handler)
    out, err = capfd.readouterr()
    assert (float(score), out, err) == (ATTEND.points, "", "afterwards\n")
    assert sys.stderr is kept


def test_a_check_leaves_torch_as_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    check("01.1", attend)
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert sys.getprofile() is None


def test_two_mistakes_at_once_are_both_named() -> None:
    def both(split: Any = None) -> tuple[Any, Any]:
        def split_qkv(x: Tensor, n: int) -> Any:
            return x.view(x.shape[0], n, x.shape[1], 3, -1).unbind(dim=3)

        def merge_heads(x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], x.shape[2], -1)

        return split_qkv, merge_heads

    names = [mistake.name for mistake in check("01.3", *both()).mistakes]
    assert names == ["split by view alone", "merge without transposing back"]


def test_an_unknown_mistake_gets_no_name() -> None:
    score = check("01.1", with_out(lambda out: out * 1.5))
    assert score.mistakes == ()
    for constant, dtype in ((0, torch.bool), (0, torch.int8), (1, torch.int8), (0, torch.float32)):
        full = partial(torch.full, fill_value=constant, dtype=dtype)
        answer = partial(lambda T, S, padding, full: full((len(padding), 1, T, S)), full=full)
        assert check("01.2", answer).mistakes == ()


def test_an_answer_that_raises_like_a_misconception_is_not_taken_for_it() -> None:
    def missing(config: dict[str, Any], max_len: int, lengths: list[int]) -> Any:
        raise KeyError("num_key_value_heads")

    assert check("01.8", missing).mistakes == ()


def test_the_draws_of_a_check_are_fresh() -> None:
    seen = set()

    def spy(n_queries: int, n_keys: int, padding: Any) -> Tensor:
        seen.add((n_queries, n_keys))
        answer: Tensor = right(MASK)[0](n_queries, n_keys, padding)
        return answer

    for _ in range(5):
        check("01.2", spy)
    assert len(seen) > 15
    assert {(1, 1)} < seen


def test_the_same_seed_draws_the_same() -> None:
    wrong = MASK.misconceptions[0].answers
    assert judge(MASK, wrong, 7).to_json() == judge(MASK, wrong, 7).to_json()


def test_a_check_takes_far_less_than_two_seconds() -> None:
    start = time.process_time()  # others may use the machine
    for misconception in ATTEND.misconceptions[:3]:
        judge(ATTEND, misconception.answers)
    assert (time.process_time() - start) / 3 < 2


def test_an_unknown_exercise_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"exercise: expected one of '01.1', .*; got '1.3'"):
        kvlearn.check("1.3", attend)
    with pytest.raises(TypeError, match="exercise: expected str, got function"):
        kvlearn.check(attend, attend)
