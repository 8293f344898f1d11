"""Unit 03: right answers in other styles, what a decode step may build, and the parts that are given."""

import bisect
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from answers import unit_module
from einops import rearrange
from torch import Tensor

from kvlearn.attention.rope import Rope, RopeConfig
from kvlearn.grading import Score, check, new_tensors

pytestmark = pytest.mark.answers

rope = unit_module("03_multi_head_compression", "checks").rope


def decompress_by_einops(c: Tensor, w_up: Tensor, n_heads: int) -> Any:
    return list(rearrange(c @ w_up.T, "b t (two h d) -> two b h t d", two=2, h=n_heads))


def joined_scores(q, q_rope, k, k_rope, positions, rope):  # type: ignore[no-untyped-def]
    shared = rope(k_rope.unsqueeze(1).repeat(1, q.shape[1], 1, 1), positions)
    queries = torch.cat((q, rope(q_rope, positions[:, -q.shape[2] :])), -1)
    return torch.einsum("bhtd,bhsd->bhts", queries / math.sqrt(queries.shape[-1]), torch.cat((k, shared), -1))


def step_by_sdpa(q, q_rope, cache, length, w_uk, w_uv):  # type: ignore[no-untyped-def]
    """The heads as the queries of one head."""
    rows, R = cache[:, None, :length], w_uk.shape[-1]
    queries = torch.cat(((q[:, :, None] @ w_uk)[:, :, 0], q_rope), -1)[:, None]
    scale = (q.shape[-1] + q_rope.shape[-1]) ** -0.5
    o = F.scaled_dot_product_attention(queries, rows, rows[..., :R], scale=scale)[:, 0]
    return torch.stack([o[:, h] @ matrix.T for h, matrix in enumerate(w_uv)], dim=1)


def step_by_mask_and_loops(q, q_rope, cache, length, w_uk, w_uv):  # type: ignore[no-untyped-def]
    """Each sequence and head by itself, over all slots, with the empty ones masked."""
    R, out = w_uk.shape[-1], torch.empty_like(q)
    hidden = torch.arange(cache.shape[1]) >= length
    for b, rows in enumerate(cache):
        for h in range(q.shape[1]):
            scores = rows[:, :R] @ (w_uk[h].T @ q[b, h]) + rows[:, R:] @ q_rope[b, h]
            weights = (scores / (q.shape[-1] + q_rope.shape[-1]) ** 0.5).masked_fill(hidden, -torch.inf)
            out[b, h] = w_uv[h] @ (weights.softmax(0) @ rows[:, :R])
    return out


def init_by_eigh(keys_values: Tensor, rank: int) -> Any:
    vectors = torch.linalg.eigh(keys_values.T @ keys_values).eigenvectors[:, -rank:]
    return vectors.T, vectors


def init_in_another_basis(keys_values: Tensor, rank: int) -> Any:
    _, s, Vh = torch.linalg.svd(keys_values, full_matrices=False)
    return Vh[:rank] / s[:rank, None], Vh[:rank].T * s[:rank]


def naive_or_absorbed_by_trying(H: int, D: int, R: int, Dr: int, S: int, T: int) -> dict[str, Any]:
    def naive(T: int) -> float:
        return 4.0 * S * R * H * D + 2.0 * T * S * H * (2 * D + Dr)

    def absorbed(T: int) -> float:
        return 4.0 * T * H * D * R + 2.0 * T * S * H * (2 * R + Dr)

    largest: int | None = next((n for n in range(3000) if absorbed(n + 1) >= naive(n + 1)), None)
    return {"naive": naive(T), "absorbed": absorbed(T), "largest_T": largest}


def naive_or_absorbed_by_the_crossing(H: int, D: int, R: int, Dr: int, S: int, T: int) -> dict[str, Any]:
    heads = 2 * H * S
    once, more = heads * 2 * R * D, 4 * H * D * R + 2 * heads * (R - D)
    largest = math.ceil(Fraction(once, more)) - 1 if more > 0 else None
    naive = once + T * heads * (D + Dr + D)
    return {"naive": naive, "absorbed": naive - once + T * more, "largest_T": largest}


def naive_or_absorbed_by_bisection(H: int, D: int, R: int, Dr: int, S: int, T: int) -> dict[str, Any]:
    def naive(T: int) -> int:
        return sum((4 * S * R * D, 2 * T * S * (D + Dr), 2 * T * S * D)) * H

    def absorbed(T: int) -> int:
        return sum((2 * T * D * R, 2 * T * S * (R + Dr), 2 * T * S * R, 2 * T * R * D)) * H

    first = bisect.bisect_left(range(1, 10**9), 0, key=lambda T: absorbed(T) - naive(T))
    largest = None if first == 10**9 - 1 else first
    return {"largest_T": largest, "absorbed": absorbed(T), "naive": naive(T)}


@pytest.mark.parametrize(
    ("exercise", "answers"),
    [
        ("03.1", (F.linear, decompress_by_einops)),
        ("03.2", (joined_scores,)),
        ("03.3", (torch.matmul, lambda o, w_uv: (w_uv[None, :, None] @ o[..., None])[..., 0])),
        ("03.4", (step_by_sdpa,)),
        ("03.4", (step_by_mask_and_loops,)),
        ("03.5", (init_by_eigh,)),
        ("03.5", (init_in_another_basis,)),
        ("03.6", (naive_or_absorbed_by_trying,)),
        ("03.6", (naive_or_absorbed_by_the_crossing,)),
        ("03.6", (naive_or_absorbed_by_bisection,)),
    ],
)
def test_a_right_answer_in_another_style_earns_full_marks(exercise: str, answers: tuple[Any, ...]) -> None:
    for _ in range(3):
        score = check(exercise, *answers)
        assert score.status == "passed", score.to_text()


def size_row(score: Score) -> Any:
    return score.rows[-1]


def test_keys_made_for_one_head_at_a_time_are_seen_as_well() -> None:
    def step(q, q_rope, cache, length, w_uk, w_uv):  # type: ignore[no-untyped-def]
        R, outs = w_uk.shape[-1], []
        c, k_rope = cache[:, :length, :R], cache[:, :length, R:]
        for h in range(q.shape[1]):
            scores = torch.einsum("bd,bsd->bs", q[:, h], c @ w_uk[h].T)
            scores = scores + torch.einsum("bd,bsd->bs", q_rope[:, h], k_rope)
            weights = (scores / (q.shape[-1] + q_rope.shape[-1]) ** 0.5).softmax(-1)
            outs.append(torch.einsum("bs,bsd->bd", weights, c @ w_uv[h].T))
        return torch.stack(outs, dim=1)

    score = check("03.4", step)
    assert [row.earned for row in score.rows] == [1, 1, 1, 1, 0]
    assert "keys or values were decompressed: a tensor of shape" in size_row(score).came
    assert [mistake.name for mistake in score.mistakes] == ["everything decompressed"]


def test_a_step_that_copies_the_latents_is_told_so() -> None:
    def step(q, q_rope, cache, length, w_uk, w_uv):  # type: ignore[no-untyped-def]
        rows, R = cache[:, None, :length].repeat(1, q.shape[1], 1, 1), w_uk.shape[-1]
        queries = torch.cat((torch.einsum("bhd,hdr->bhr", q, w_uk), q_rope), -1)
        scores = torch.einsum("bhr,bhsr->bhs", queries, rows) / (q.shape[-1] + q_rope.shape[-1]) ** 0.5
        o = torch.einsum("bhs,bhsr->bhr", scores.softmax(-1), rows[..., :R])
        return torch.einsum("bhr,hdr->bhd", o, w_uv)

    score = check("03.4", step)
    assert [row.earned for row in score.rows] == [1, 1, 1, 1, 0]
    assert [mistake.name for mistake in score.mistakes] == ["the latents copied for every head"]


def test_nothing_returned_or_zeros_earn_nothing() -> None:
    assert check("03.4", lambda q, *_: torch.zeros_like(q)) == 0
    assert check("03.2", lambda q, q_rope, k, *_: 0 * q @ k.mT) == 0
    assert check("03.5", lambda A, rank: (A.new_zeros(rank, A.shape[1]), A.new_zeros(A.shape[1], rank))) == 0


def test_the_given_rope_is_the_courses_rope() -> None:
    x, positions = torch.randn(2, 3, 5, 8), torch.tensor([[0, 1, 5, 9, 300], [4, 5, 6, 7, 8]])
    torch.testing.assert_close(rope(x, positions), Rope(8, RopeConfig())(x, positions))


def test_the_given_rope_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \(B, heads, n, Dr\)"):
        rope(torch.ones(2, 5, 8), torch.arange(5)[None])
    with pytest.raises(ValueError, match=r"positions: expected shape \(1, 5\) or \(2, 5\), got \(1, 9\)"):
        rope(torch.ones(2, 1, 5, 8), torch.arange(9)[None])


def test_the_watch_counts_copies_and_no_views() -> None:
    c, q = torch.randn(2, 30, 8), torch.randn(2, 3, 1, 8)
    with new_tensors() as made:
        c[:, None, :20].expand(2, 3, 20, 8).transpose(-2, -1)
    assert made == []
    with new_tensors() as made:
        q @ c[:, None, :20].transpose(-2, -1)
    assert (2, 3, 8, 20) in [one.shape for one in made]
    with new_tensors() as made:
        c.split(10, dim=1)
        torch.broadcast_tensors(c, c[:1])
        torch._foreach_mul_([c, q], 2.0)
    assert made == []
    with new_tensors() as made:
        c.sort()
        torch.cat((c, c))
    assert [(one.shape, one.op) for one in made] == [
        ((2, 30, 8), "sort"),
        ((2, 30, 8), "sort"),
        ((4, 30, 8), "cat"),
    ]
