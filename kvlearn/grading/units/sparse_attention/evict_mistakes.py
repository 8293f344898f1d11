"""05.4: the mistakes that people make about what may be forgotten, token by token."""

import torch
from torch import Tensor

from kvlearn.grading.units.sparse_attention.evict import EXERCISE, kept

__all__ = ["EXERCISE"]


def peak(mask: Tensor) -> int:
    return int(kept(mask).sum(1).max())


def until(mask: Tensor, last: Tensor) -> Tensor:
    """Each token from its own step to the step ``last`` (N,) of it."""
    t, j = torch.arange(len(mask))[:, None], torch.arange(len(mask))[None]
    return (j <= t) & (t <= last[None])


def last_reader(mask: Tensor) -> Tensor:
    """Of each token; -1 where there is none."""
    rows = torch.arange(len(mask))[:, None]
    return torch.where(mask, rows, -1).amax(0)


@EXERCISE.misconception("kept is what the step reads", n_slots=peak)
def what_is_read(mask: Tensor) -> Tensor:
    """The mask itself came back: each step keeps what it reads. But what this step does not read a later one
    may, and a token that was let go cannot be fetched back. Reading few does not mean storing few: ask for
    the readers that are still to come."""
    return mask


@EXERCISE.misconception("nothing is ever forgotten", n_slots=peak)
def everything(mask: Tensor) -> Tensor:
    """All tokens so far are kept. That is always safe, and what a full cache does. A token whose last reader
    has attended can go."""
    return torch.ones_like(mask).tril()


@EXERCISE.misconception("as many tokens as a step reads, the newest", n_slots=peak)
def newest(mask: Tensor) -> Tensor:
    """The newest tokens were kept, as many as the widest step reads: a window, whatever the pattern. A
    strided or a global reader asks for older ones, and they are gone then."""
    size = int(mask.sum(1).max())
    return torch.ones_like(mask).tril().triu(1 - size)


@EXERCISE.misconception("everything within the longest reach", n_slots=peak)
def within_reach(mask: Tensor) -> Tensor:
    """Each token was kept as long as the farthest look back anywhere in the pattern. That is safe, but one
    far pair then keeps all tokens so long. Each token has a last reader of its own."""
    i, j = mask.nonzero(as_tuple=True)
    return until(mask, torch.arange(len(mask)) + (i - j).max())


@EXERCISE.misconception("the next step alone looked at", n_slots=peak)
def next_step(mask: Tensor) -> Tensor:
    """A token was let go if neither this step nor the next one reads it. Its reader may come later still:
    look at all that follow."""
    following = torch.zeros_like(mask)
    following[:-1] = mask[1:]
    return (mask | following).tril()


@EXERCISE.misconception("let go at the first step that does not read it", n_slots=peak)
def first_gap(mask: Tensor) -> Tensor:
    """A token was dropped as soon as one step went by without it. A strided reader comes back after a pause.
    Not the first step without it counts, but the last one with it."""
    idle = ~mask & torch.ones_like(mask).tril()
    return torch.ones_like(mask).tril() & (idle.cumsum(0) == 0)


@EXERCISE.misconception("let go after its first reader", n_slots=peak)
def first_reader(mask: Tensor) -> Tensor:
    """A token was kept until the first later token had read it. Others may follow: the *last* reader
    counts."""
    others = mask.tril(-1)
    first = torch.where(others.any(0), others.long().argmax(0), last_reader(mask))
    return until(mask, first)


@EXERCISE.misconception("readers gone by in place of readers to come", n_slots=peak)
def looked_back(mask: Tensor) -> Tensor:
    """A token was kept once somebody has read it, at t or before. What has been read already is no reason to
    keep it; what *will* be is. The running `any` goes from the bottom up."""
    return mask.cumsum(0) > 0


@EXERCISE.misconception("dropped before its last reader attends", n_slots=peak)
def too_early(mask: Tensor) -> Tensor:
    """Only readers after t were counted, so a token is gone at the very step that reads it last. It must be
    there while that step attends: readers at t *or* later."""
    return until(mask, last_reader(mask) - 1)


@EXERCISE.misconception("kept one step too long", n_slots=peak)
def too_late(mask: Tensor) -> Tensor:
    """A token stays one step beyond its last reader. Its slot could have gone to the new token of that step
    already: that makes a window of W take W + 1 slots."""
    last = last_reader(mask)
    return until(mask, torch.where(last >= 0, last + 1, last))


@EXERCISE.misconception("tokens kept that are not there yet", n_slots=peak)
def before_birth(mask: Tensor) -> Tensor:
    """Tokens after t were counted, since somebody will read them. They have not come yet and take no slot:
    j ≤ t."""
    return mask.flip(0).cumsum(0).flip(0) > 0


@EXERCISE.misconception("rows and columns exchanged", n_slots=peak)
def transposed(mask: Tensor) -> Tensor:
    """The result has a row for each token and a column for each step. Asked for is a row for each *step*: who
    is in the cache while token t attends."""
    return kept(mask).T


@EXERCISE.misconception("the token of the step itself left out", n_slots=peak)
def without_itself(mask: Tensor) -> Tensor:
    """Only older tokens were counted. The new token's key and value are in the cache when it attends (it
    reads itself), so it takes a slot as well."""
    return kept(mask).tril(-1)


@EXERCISE.misconception("a slot for tokens that nobody reads", n_slots=peak)
def own_always(mask: Tensor) -> Tensor:
    """The new token was kept in any case. One that nobody reads, not even itself, need never be written: no
    reader, no slot."""
    return kept(mask) | torch.eye(len(mask), dtype=torch.bool)


@EXERCISE.misconception("the global reader to come forgotten", n_slots=peak)
def no_global_reader(mask: Tensor) -> Tensor:
    """Tokens were dropped by the window, though a global token is still to come. It sees *everything* before
    it, so until it has attended nothing may go. That others see it is only half of being global."""
    full = mask.sum(1) == torch.arange(1, len(mask) + 1)
    local = mask.clone()
    local[full] = False
    seen = local | (mask & torch.eye(len(mask), dtype=torch.bool))
    return kept(seen)


@EXERCISE.misconception("the global token dropped with the window", n_slots=peak)
def global_dropped(mask: Tensor) -> Tensor:
    """After the global token has attended, it was let go like any other when the window had passed. All later
    tokens read it: a column that is full to the bottom stays to the end."""
    n = len(mask)
    seen = mask.clone()
    for at in range(1, n - 1):
        row, column = mask[at, : at + 1].all(), mask[at:, at].all()
        if row and column and at + 3 < n and not mask[at + 3 :, at + 1].all():
            seen[at + 3 :, at] = False
    return kept(seen)


@EXERCISE.misconception("how many, not which", n_slots=peak)
def numbers(mask: Tensor) -> Tensor:
    """The number of tokens kept at each step came back. Asked for is which: a row of N booleans for each
    step. (The numbers are what n_slots needs.)"""
    return kept(mask).sum(1)


@EXERCISE.misconception("kept from its first reader on", n_slots=peak)
def from_first(mask: Tensor) -> Tensor:
    """A token was kept between its first reader and its last. If it does not read itself, that leaves out the
    steps before the first reader, and what is not kept then cannot be read later: a token comes once. It is
    kept from its own step on."""
    return kept(mask) & (mask.int().cumsum(0) > 0)
