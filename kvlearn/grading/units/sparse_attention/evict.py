"""05.4: what must be kept at each step, held against asking every later query one by one."""

from typing import Any

import torch
from torch import Tensor

from kvlearn.grading.compare import compare
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
    id="05.4",
    slug="evict",
    title="Which tokens can be forgotten",
    answers=("tokens_to_keep", "n_slots"),
    hints=(
        "A token may go once its *last* reader has attended. What the step at t reads itself does not matter "
        "for that: ask for each token j whether any query t, t + 1, … N − 1 reads it.",
        "Column j of the mask lists the readers of token j. Whether one of them is at t or later: a running "
        "`any` from the bottom up, `mask.flip(0).cumsum(0).flip(0) > 0`.",
        "The row of a global token to come is full: it is the reader that keeps everything before it alive. "
        "And a token that does not exist yet is not kept: j ≤ t, `.tril()`.",
        "A cache needs as many slots as tokens are kept at the worst step, not at the last one: the largest "
        "row sum.",
    ),
)


def kept(mask: Tensor) -> Tensor:
    columns, n = mask.T.tolist(), len(mask)
    return torch.tensor([[j <= t and any(columns[j][t:]) for j in range(n)] for t in range(n)])


def window(n: int, size: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril().triu(1 - size)


def strided(n: int, stride: int) -> Tensor:
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    return window(n, 2) | ((j <= i) & ((i - j) % stride == 0))


def scattered(t: Trial, n: int) -> Tensor:
    """Few pairs, drawn; every token sees itself, but for one that nobody ever reads."""
    mask = (t.mask(n, n, share=0.15) | torch.eye(n, dtype=torch.bool)).tril()
    mask[:, t.integer(2, n - 3)] = False
    return mask


def not_itself(n: int) -> Tensor:
    """A token sees the one before it and the third before, and never itself."""
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    return (i - j == 3) | ((i - j == 1) & (j % 2 == 0))


def with_global(n: int, size: int, at: int) -> Tensor:
    """A window, and one token that sees all before it and that all see."""
    mask = window(n, size)
    mask[at, : at + 1] = True
    mask[at:, at] = True
    return mask


def drawn_global(t: Trial) -> Tensor:
    """The global token stands in the first half or at the end of it, far enough from both ends."""
    size = t.integer(2, 3)
    at = size + t.integer(4, 6)
    return with_global(at + size + t.integer(6, 9), size, at)


def same(t: Trial, got: Any, mask: Tensor, what: str) -> None:
    """Ones and zeros are as good as True and False."""
    want = kept(mask)
    if isinstance(got, Tensor) and got.shape == want.shape and not got.is_complex():
        got = got.bool()
    t.note(got, compare(got, want, what))


@EXERCISE.requirement(1, "a window")
def windows(t: Trial, tokens_to_keep: Answer, n_slots: Answer) -> None:
    """at step t the last W tokens, the token at t among them; nothing that is not there yet"""
    mask = window(t.integer(9, 14), t.integer(3, 5))
    same(t, tokens_to_keep(mask), mask, "[step, token]:")


@EXERCISE.requirement(1, "readers that come late, or never")
def late(t: Trial, tokens_to_keep: Answer, n_slots: Answer) -> None:
    """a token stays while some query at t or later reads it, however many steps between do not; one that
    nobody reads, not even itself, is not kept at all, and one that is read only later is kept from
    its own step on"""
    for mask, what in (
        (strided(t.integer(10, 14), t.integer(4, 5)), "strided, [step, token]:"),
        (scattered(t, t.integer(9, 12)), "drawn at random, [step, token]:"),
        (not_itself(t.integer(9, 12)), "not itself, but the third before, [step, token]:"),
    ):
        same(t, tokens_to_keep(mask), mask, what)


@EXERCISE.requirement(1, "a global reader to come")
def global_reader(t: Trial, tokens_to_keep: Answer, n_slots: Answer) -> None:
    """until the global token has attended everything stays; after it the window, and the global token
    itself"""
    mask = drawn_global(t)
    same(t, tokens_to_keep(mask), mask, "[step, token]:")


@EXERCISE.requirement(1, "slots of the cache")
def slots(t: Trial, tokens_to_keep: Answer, n_slots: Answer) -> None:
    """as many as tokens are kept at once, whatever the pattern"""
    n = t.integer(10, 14)
    for mask, what in (
        (window(n, t.integer(3, 5)), "a window:"),
        (scattered(t, n), "drawn at random:"),
        (strided(n, t.integer(4, 5)), "strided:"),
    ):
        t.number(n_slots(mask), int(kept(mask).sum(1).max()), what)


@EXERCISE.requirement(1, "slots at the worst step")
def peak(t: Trial, tokens_to_keep: Answer, n_slots: Answer) -> None:
    """the most that any step needs, though later steps need far fewer"""
    mask = drawn_global(t)
    t.number(n_slots(mask), int(kept(mask).sum(1).max()), "a window and one global token:")
