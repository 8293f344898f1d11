"""05.1: the two patterns of the Sparse Transformer as masks, held against counting back from each query."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvlearn.grading.compare import compare
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
    id="05.1",
    slug="classic",
    title="Two classic patterns as masks",
    answers=("strided_mask", "fixed_mask"),
    hints=(
        "Write each pattern as a condition on one pair, query i and key j, and j ≤ i first of all. Then let "
        "`i = torch.arange(n)[:, None]` and `j = torch.arange(n)[None, :]` do all pairs at once.",
        "Strided: the distance i − j is all that counts. It is smaller than the stride, *or* a multiple of "
        "it. Counted from the query: for i = 7 and stride 3 the keys 7, 4, 1 and not 6, 3, 0.",
        "Fixed: here the positions count, not the distance. The same block is `i // block == j // block`. A "
        "summary token is one of the last of its block, `j % block >= block - summary`.",
        "`(j <= i) & ((i - j < stride) | ((i - j) % stride == 0))`, and the same with the two conditions of "
        "the fixed pattern. The last block may be half-filled; neither formula needs a case for that.",
    ),
)


def strided(n_tokens: int, stride: int) -> Tensor:
    """One token after the other back from each query, then one stride after the other."""
    rows = []
    for i in range(n_tokens):
        seen = {*range(max(0, i - stride + 1), i + 1), *range(i, -1, -stride)}
        rows.append([j in seen for j in range(n_tokens)])
    return torch.tensor(rows)


def fixed(n_tokens: int, block: int, summary: int) -> Tensor:
    """Block by block from the start of the text."""
    rows = []
    for start in range(0, n_tokens, block):
        summaries = {j for end in range(block, start + 1, block) for j in range(end - summary, end)}
        queries = range(start, min(start + block, n_tokens))
        rows += [[j in summaries or start <= j <= i for j in range(n_tokens)] for i in queries]
    return torch.tensor(rows)


def pairs(got: Any, n: int) -> Any:
    """The mask as it is meant: ones and zeros, 0 and −∞, or numpy's, cost the point for the form and no
    other."""
    got = torch.as_tensor(got) if isinstance(got, np.ndarray) else got
    if not isinstance(got, Tensor) or got.is_complex() or got.numel() != n * n:
        return got
    got = got.detach().reshape(n, n)
    return got == 0 if got.dtype.is_floating_point and not (got > 0).any() else got.bool()


def same(t: Trial, got: Any, want: Tensor, area: Tensor, what: str) -> None:
    """The right pairs are marked within ``area``; of the others nothing is asked here."""
    got = pairs(got, len(want))
    if isinstance(got, Tensor) and got.shape == want.shape:
        got = torch.where(area, got, want)
    t.note(got, compare(got, want, what))


def positions(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n)[:, None], torch.arange(n)[None]


def strided_sizes(t: Trial) -> tuple[int, int]:
    """Tokens and stride; a stride of 1 or a text shorter than the stride comes in the last round."""
    stride = t.integer(3, 5)
    return 3 * stride + t.integer(1, stride + 2), stride


def fixed_sizes(t: Trial) -> tuple[int, int, int]:
    """Tokens, block, summary; the last block is half-filled from the second round on."""
    block = t.integer(5, 7)
    half = t.integer(1, block - 1) if t.round else 0
    return 3 * block + half, block, t.integer(2, block - 3)


@EXERCISE.requirement(1, "boolean masks, (N, N)")
def form(t: Trial, strided_mask: Answer, fixed_mask: Answer) -> None:
    """dtype bool and two dimensions, a row for each query and a column for each key"""
    n = t.integer(9, 14)
    t.form(strided_mask(n, 3), (n, n), torch.bool)
    t.form(fixed_mask(n, 4, 2), (n, n), torch.bool)


@EXERCISE.requirement(1, "itself, and nobody later")
def causal(t: Trial, strided_mask: Answer, fixed_mask: Answer) -> None:
    """on the diagonal True, above it False, in both masks"""
    for name, mask, right, sizes in (
        ("strided, [query, key]:", strided_mask, strided, strided_sizes(t)),
        ("fixed, [query, key]:", fixed_mask, fixed, fixed_sizes(t)),
    ):
        want = right(*sizes)
        same(t, mask(*sizes), want, torch.ones_like(want).triu(), name)


@EXERCISE.requirement(1, "strided: the last tokens")
def near(t: Trial, strided_mask: Answer, fixed_mask: Answer) -> None:
    """the `stride` tokens up to the query's own, whatever their position"""
    n, stride = strided_sizes(t)
    i, j = positions(n)
    same(t, strided_mask(n, stride), strided(n, stride), (i > j) & (i - j < stride), "strided, [query, key]:")


@EXERCISE.requirement(1, "strided: every stride-th before")
def far(t: Trial, strided_mask: Answer, fixed_mask: Answer) -> None:
    """stride, 2 · stride, 3 · stride … tokens back from the query, and none between; stride 1 is the causal
    mask, and so is a stride longer than the text"""
    n, stride = strided_sizes(t)
    i, j = positions(n)
    same(t, strided_mask(n, stride), strided(n, stride), i - j >= stride, "strided, [query, key]:")
    for stride in (1, n + 2):
        same(t, strided_mask(n, stride), strided(n, stride), i > j, "strided, [query, key]:")


@EXERCISE.requirement(1, "fixed: the query's own block")
def own(t: Trial, strided_mask: Answer, fixed_mask: Answer) -> None:
    """all tokens of the block that the query stands in, up to itself"""
    n, block, summary = fixed_sizes(t)
    i, j = positions(n)
    own_block = (i > j) & (i // block == j // block)
    same(t, fixed_mask(n, block, summary), fixed(n, block, summary), own_block, "fixed, [query, key]:")


@EXERCISE.requirement(1, "fixed: the summaries of the blocks before")
def summaries(t: Trial, strided_mask: Answer, fixed_mask: Answer) -> None:
    """the last `summary` tokens of every earlier block, and no others of it; summary = block is the causal
    mask"""
    n, block, summary = fixed_sizes(t)
    i, j = positions(n)
    earlier = i // block > j // block
    same(t, fixed_mask(n, block, summary), fixed(n, block, summary), earlier, "fixed, [query, key]:")
    same(t, fixed_mask(n, block, block), fixed(n, block, block), i > j, "fixed, [query, key]:")
