"""04.1: the mask of a window behind a cache, held against a loop over pairs of positions."""

import numpy as np
import torch
from torch import Tensor

from kvlearn.grading.compare import compare
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
    id="04.1",
    slug="mask",
    title="The mask of a sliding window",
    answers=("window_mask",),
    hints=(
        "Two conditions for each pair: the key is not in the future, and it is not too far back. Write down "
        "the positions first: keys stand at 0 … S − 1, queries at S − T … S − 1.",
        "The distance of a pair is query position − key position. Itself is at distance 0, so a window of "
        "W tokens that counts the token itself reaches to distance W − 1.",
        "`distance = queries[:, None] - keys[None, :]` is (T, S); the mask is `(distance >= 0) & (distance "
        "< window)`. W larger than S and T = 1 need no case of their own.",
    ),
)


def reference(n_queries: int, n_keys: int, window: int) -> Tensor:
    """For each query the keys it sees, counted back from itself."""
    mask = torch.zeros(n_queries, n_keys, dtype=torch.bool)
    for row in range(n_queries):
        key = n_keys - n_queries + row
        for _ in range(window):
            if key >= 0:
                mask[row, key] = True
            key -= 1
    return mask


def same(t: Trial, got: object, T: int, S: int, window: int) -> None:
    """The right pairs are marked, be the mask of ones and zeros, of 0 and −∞, of numpy, or with dimensions of
    size 1 in front: those cost the point for the form and no other."""
    mask = torch.as_tensor(got) if isinstance(got, np.ndarray) else got
    if isinstance(mask, Tensor) and not mask.is_complex() and mask.numel() == T * S:
        mask = mask.squeeze(tuple(range(mask.ndim - 2))) if mask.ndim > 2 else mask
        additive = mask.dtype.is_floating_point and not (mask > 0).any()
        mask = mask == 0 if additive else mask.bool()
    t.note(mask, compare(mask, reference(T, S, window)))


@EXERCISE.requirement(1, "a boolean mask, (T, S)")
def form(t: Trial, window_mask: Answer) -> None:
    """dtype bool and two dimensions, a row for each query and a column for each key"""
    T = t.integer(3, 6)
    S = T + t.integer(3, 9)
    t.form(window_mask(T, S, t.integer(2, 5)), (T, S), torch.bool)


@EXERCISE.requirement(1, "a whole prompt, T = S")
def square(t: Trial, window_mask: Answer) -> None:
    """each token sees the last W up to itself, the first ones fewer: a band below the diagonal"""
    window = t.integer(3, 5)
    n = window + t.integer(3, 6)
    same(t, window_mask(n, n, window), n, n, window)


@EXERCISE.requirement(1, "a chunk behind a cache, 1 < T < S")
def chunk(t: Trial, window_mask: Answer) -> None:
    """the same band, T rows that are the last of the S positions"""
    T, window = t.integer(3, 6), t.integer(3, 5)
    S = T + window + t.integer(1, 4)
    same(t, window_mask(T, S, window), T, S, window)


@EXERCISE.requirement(1, "one token in decode, T = 1")
def decode(t: Trial, window_mask: Answer) -> None:
    """the newest token sees the last W keys, all of them while there are fewer than W, itself at S = 1"""
    window = t.integer(3, 5)
    for S in (window + t.integer(3, 6), window - 1, 1):
        same(t, window_mask(1, S, window), 1, S, window)


@EXERCISE.requirement(1, "the narrowest window and the widest")
def limits(t: Trial, window_mask: Answer) -> None:
    """W = 1: each token sees itself alone; W = S and W > S: the causal mask"""
    T = t.integer(3, 6)
    S = T + t.integer(3, 6)
    for window in (1, S, S + t.integer(2, 5)):
        same(t, window_mask(T, S, window), T, S, window)
