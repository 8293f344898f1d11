"""11.8: the mistakes that people make with the ticket, as short PyTorch emulations."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvlearn.grading.units.triton_decode.interpreter import done
from kvlearn.grading.units.triton_decode.kernels import BLOCK
from kvlearn.grading.units.triton_decode.splits_mistakes import cdiv, merge, parts_of
from kvlearn.grading.units.triton_decode.ticket import EXERCISE, READ_TICKET

__all__ = ["EXERCISE"]

# (ticket, live splits, n_splits, split) -> does this program merge?
Chosen = Callable[[int, int, int, int], bool]
Hold = Callable[[Tensor], Tensor]
Result = tuple[Tensor, Tensor]


def last(ticket: int, live: int, n_splits: int, split: int) -> bool:
    return ticket == live - 1


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    n_splits: int,
    first: int,
    tickets: Hold,
    chosen: Chosen = last,
    reset: int | None = 0,
    always: bool = False,
    shared: bool = False,
) -> Result:
    """One launch; ``reset`` is what the merging program leaves in the ticket, None: what is there
    (``always``: every program does); ``shared``: one counter for all rows. Parts that have not been
    stored when it merges are NaN."""
    parts, lse = parts_of(q, k, v, lengths, n_splits)
    held, out = tickets(q), torch.full_like(q, torch.nan)
    merges, stored = torch.zeros_like(held), torch.zeros(len(q), n_splits, dtype=torch.bool, device=q.device)
    for split in [(first + i) % n_splits for i in range(n_splits)]:
        for b, length in enumerate(lengths.tolist()):
            tiles = cdiv(length, BLOCK)
            live = cdiv(tiles, cdiv(tiles, n_splits))
            if split >= live:
                continue
            stored[b, split] = True
            counter = 0 if shared else b
            ticket = int(held[counter])
            held[counter] += 1
            if chosen(ticket, live, n_splits, split):
                merges[b] += 1
                there = stored[b, :live]
                seen = parts[b, :live].where(there[:, None], torch.nan)
                out[b] = merge(seen[None], lse[b, :live].where(there, torch.nan)[None])[0]
            if reset is not None and (always or chosen(ticket, live, n_splits, split)):
                held[counter] = reset
    return out, merges


@EXERCISE.misconception("the ticket is not reset")
def no_reset(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int, first: int, tickets: Hold
) -> Result:
    """The first call is right, and leaves its count behind: in the second nobody draws the last number, or
    the wrong program does. The program that merges stores 0, so the next step needs no kernel to clear
    it."""
    return launch(q, k, v, lengths, n_splits, first, tickets, reset=None)


@EXERCISE.misconception("the ticket is reset to 1")
def reset_to_one(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int, first: int, tickets: Hold
) -> Result:
    """The ticket is set back to 1, so in the next call the program before the last takes itself for the
    last, and merges a part that is not there yet. The first ticket of a call is 0."""
    return launch(q, k, v, lengths, n_splits, first, tickets, reset=1)


@EXERCISE.misconception("the ticket compared with n_splits")
def all_splits(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int, first: int, tickets: Hold
) -> Result:
    """The merge waits for n_splits programs, but splits without keys have left and draw no ticket. A short
    row beside a long one is then never merged. The last number is live_splits − 1."""
    return launch(q, k, v, lengths, n_splits, first, tickets, lambda ticket, live, n, split: ticket == n - 1)


@EXERCISE.misconception("nobody draws the last number")
def off_by_one(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int, first: int, tickets: Hold
) -> Result:
    """The ticket is compared with live_splits. `tl.atomic_add` returns the value from *before*, and counting
    begins at 0: of n programs the last draws n − 1, so nobody merges and the output stays as it was."""
    return launch(q, k, v, lengths, n_splits, first, tickets, lambda ticket, live, n, split: ticket == live)


@EXERCISE.misconception("merged before all parts are there")
def everyone(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int, first: int, tickets: Hold
) -> Result:
    """Every program merges: the ticket is not looked at, or compared with 0, which the first one draws
    (and, once it has put the ticket back to 0, the next one too). Most of them merge parts that are not
    there yet. The last to be ready must do it alone, the one that draws live_splits − 1."""
    return launch(q, k, v, lengths, n_splits, first, tickets, lambda ticket, live, n, split: True)


@EXERCISE.misconception("the last split merges, not the last to finish")
def last_by_number(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int, first: int, tickets: Hold
) -> Result:
    """The split with the highest number merges. Programs finish in any order, so the others need not be
    ready. Who is last is what the ticket tells."""
    return launch(
        q, k, v, lengths, n_splits, first, tickets, lambda ticket, live, n, split: split == live - 1
    )


@EXERCISE.misconception("the first split merges, not the last to finish")
def first_by_number(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int, first: int, tickets: Hold
) -> Result:
    """Split 0 merges. Programs finish in any order, so the others need not be ready. Who is last is what
    the ticket tells."""
    return launch(q, k, v, lengths, n_splits, first, tickets, lambda ticket, live, n, split: split == 0)


@EXERCISE.misconception("every program resets the ticket")
def everyone_resets(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int, first: int, tickets: Hold
) -> Result:
    """The ticket is set to 0 by every program, so each draws 0 again and nobody is the last (but where
    there is one split). Only the program that merges may put it back, after the merge."""
    return launch(q, k, v, lengths, n_splits, first, tickets, always=True)


@EXERCISE.misconception("one counter for all rows")
def shared_counter(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int, first: int, tickets: Hold
) -> Result:
    """All rows draw from the first counter, `TICKETS` without `row`. Their programs run side by side, and
    a row then takes the others' programs for its own. Each row has a counter: `TICKETS + row`."""
    return launch(q, k, v, lengths, n_splits, first, tickets, shared=True)


@EXERCISE.misconception("read, then written")
def not_atomic(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int, first: int, tickets: Hold
) -> Result:
    """The counter was read by `tl.load` and written by `tl.store`. Here programs run one after the other
    and it works. On a GPU two of them read the same number before either has written: then nobody is
    the last, or two are. `tl.atomic_add` reads and writes in one."""
    done.add(READ_TICKET)
    return launch(q, k, v, lengths, n_splits, first, tickets)
