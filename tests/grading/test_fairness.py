"""The cost of a mistake: the points of one requirement depend on that requirement alone."""

from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from answers import right
from torch import Tensor

from kvlearn.attention.core import attention
from kvlearn.grading import Score, check, find_exercise

pytestmark = pytest.mark.answers

MASK = find_exercise("01.2")


def row(score: Score, name: str) -> Any:
    return next(row for row in score.rows if row.name == name)


def test_an_answer_that_raises_elsewhere_is_not_named_by_its_values() -> None:
    def broadcast(q, k, v, cache, rope, chunk):  # type: ignore[no-untyped-def]
        outs = []
        for a in range(0, q.shape[2], chunk):
            new = slice(a, a + chunk)
            before = cache.positions(q[:, :, new].shape[2])
            keys, values, positions = cache.append(rope(k[:, :, new], before), v[:, :, new])
            mask = positions[None, :] <= before[:, None]  # of the new tokens only, and the wrong way round
            outs.append(attention(rope(q[:, :, new], before), keys, values, mask))
        return torch.cat(outs, dim=2)

    assert check("01.6", broadcast).mistakes == ()


def test_an_answer_that_raises_in_one_row_is_not_named_by_its_values_in_the_others() -> None:
    def no_scale(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
        if q.dtype != torch.float32:
            raise TypeError("fp32 only")
        answer = right(find_exercise("01.1"))[0](q * q.shape[-1] ** 0.5, k, v, mask)
        return answer

    assert check("01.1", no_scale).mistakes == ()


def test_half_an_answer_earns_its_half_where_the_other_is_missing() -> None:
    split_qkv, merge_heads = right(find_exercise("01.3"))
    score = check("01.3", None, merge_heads)
    assert (float(score), score.status) == (1, "partial")
    assert row(score, "merge: shape and values").earned == 1
    assert "split_qkv is not written yet" in row(score, "split: the shapes").came
    assert check("01.3", split_qkv, ...) == 4


def test_the_form_of_a_mask_costs_the_point_for_the_form_alone() -> None:
    def boolean(T: int, S: int, padding: Any) -> Tensor:
        answer: Tensor = right(MASK)[0](T, S, padding)
        return answer

    for form in (
        lambda mask: mask.float(),
        lambda mask: mask.int(),
        lambda mask: mask[:, 0],
        lambda mask: torch.zeros(mask.shape).masked_fill(~mask, -torch.inf),
    ):
        score = check("01.2", lambda T, S, padding, form=form: form(boolean(T, S, padding)))
        assert float(score) == MASK.points - 1
        assert row(score, "a boolean mask, (B, 1, T, S)").earned == 0


def test_rearranged_numbers_are_compared_exactly() -> None:
    split_qkv, merge_heads = right(find_exercise("01.3"))
    score = check("01.3", lambda x, n: [part * 1.00001 for part in split_qkv(x, n)], merge_heads)
    assert row(score, "split: the values").earned == 0


def size_with(**changes: Any) -> Any:
    """Our cache_size with some of its numbers put through a function."""

    (ours,) = right(find_exercise("01.8"))

    def cache_size(config: dict[str, Any], max_len: int, lengths: list[int]) -> dict[str, Any]:
        sizes = ours(config, max_len, lengths)
        return {key: changes.get(key, lambda number: number)(number) for key, number in sizes.items()}

    return cache_size


def test_a_number_of_any_type_is_a_number() -> None:
    assert check("01.8", size_with(read=np.int64, stored=torch.tensor, stored_gib=Fraction)) == 5
    score = check("01.8", size_with(read=str, stored=bool))
    assert [r.earned for r in score.rows] == [1, 1, 0, 0, 1]
    assert "read a str" in score.rows[3].came


def test_a_mistake_in_bytes_per_token_costs_no_more_than_its_own_rows() -> None:
    keys_only = size_with(
        **dict.fromkeys(("bytes_per_token", "stored", "read", "stored_gib"), lambda n: n / 2)
    )
    assert [r.earned for r in check("01.8", keys_only).rows] == [0, 0, 1, 1, 1]
    nothing = size_with(**dict.fromkeys(("bytes_per_token", "stored", "read", "stored_gib"), lambda n: 0))
    assert check("01.8", nothing) == 0


def test_a_value_error_although_the_tokens_fit_is_told_from_one_that_was_asked_for() -> None:
    class Stubborn(right(find_exercise("01.5"))[0]):  # type: ignore[misc]
        def append(self, k: Tensor, v: Tensor) -> Any:
            if k.shape[2] == 2:
                raise ValueError("no")
            return super().append(k, v)

    assert "a ValueError although the tokens fit" in row(check("01.5", Stubborn), "a full cache").came


def test_a_function_that_makes_a_cache_is_as_good_as_the_class() -> None:
    made = right(find_exercise("01.5"))[0]
    assert check("01.5", partial(made)) == find_exercise("01.5").points


def test_nothing_of_the_checks_own_leaks_into_what_came() -> None:
    class Answer:
        def __init__(self, *_: Any) -> None: ...

    score = check("01.2", Answer)
    assert "a Answer" in score.rows[0].came
    assert "Guarded" not in score.to_html()


def test_the_place_of_an_error_is_in_the_learners_code_and_not_in_a_frozen_module() -> None:
    frozen: dict[str, Any] = {}
    exec(compile("def join(*_): raise RecursionError", "<frozen posixpath>", "exec"), frozen)

    def endless(*args: Any) -> Any:
        return frozen["join"](*args)

    assert 'of your code: return frozen["join"](*args)' in check("01.1", endless).message
