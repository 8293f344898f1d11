"""11.8: split and merge in one launch, held against attention over all keys at once, call after call."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial
from kvlearn.grading.units.triton_decode.interpreter import done
from kvlearn.grading.units.triton_decode.kernels import BLOCK, READY_MADE, attend_rows, run

EXERCISE = Exercise(
    id="11.8",
    slug="ticket",
    title="Merge in the same launch, by ticket",
    answers=("one_launch",),
    forbidden=READY_MADE,
    hints=(
        "Each program that has stored its part draws a ticket: `tl.atomic_add(TICKETS + row, 1)` adds 1 and "
        "returns what was there *before*, so the programs of a row draw 0, 1, 2, …",
        "The one that draws the last number knows that all other parts are there. With n programs the last "
        "number is n − 1.",
        "Only splits that have keys draw: the others have left already. So the last number is "
        "`live_splits - 1`, not `n_splits - 1`.",
        "`if ticket == live_splits - 1:` merge, and leave the place as you found it: "
        "`tl.store(TICKETS + row, 0)`. The next decode step uses the same memory.",
    ),
)

READ_TICKET = ("tl.load reads", "TICKETS")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, int]


def draw(t: Trial, lengths: list[int], n_splits: int) -> Inputs:
    B, D, S = len(lengths), t.pick(8, 32), 4 * BLOCK
    rows = torch.tensor(lengths, dtype=torch.int32)
    return t.randn(B, D), t.randn(B, S, D), t.randn(B, S, D), rows, n_splits


class Tickets:
    """The counters of a workspace, which calls leave to each other. (A check hands out copies of tensors,
    so a function that holds them is handed out instead.)"""

    def __init__(self, batch: int) -> None:
        self.tensor = torch.zeros(batch, dtype=torch.int32)

    def __call__(self, like: Tensor) -> Tensor:
        self.tensor = self.tensor.to(like.device)
        return self.tensor


def same(t: Trial, one_launch: Answer, inputs: Inputs, tickets: Tickets, first: int) -> None:
    out, merges = t.pair(run(one_launch, *inputs, first, tickets), "a pair (out, merges)")
    t.close(out, attend_rows(*inputs[:4]), "out:")
    t.true(bool((merges == 1).all()), "one merge in each row", f"merges: {merges.tolist()}")
    read = READ_TICKET in done
    t.true(not read, "tickets drawn by one atomic operation", "tickets read by tl.load")


@EXERCISE.requirement(1, "one call", rounds=3)
def one_call(t: Trial, one_launch: Answer) -> None:
    """attention over all keys, (B, D), where every split has keys, in whichever order they run; one merge a
    row"""
    n_splits = (2, 3, 1)[t.round]
    inputs = draw(t, [n_splits * BLOCK - t.integer(0, 9)] * 2, n_splits)
    same(t, one_launch, inputs, Tickets(2), (1, t.pick(1, 2), 0)[t.round])


@EXERCISE.requirement(1, "splits without keys", rounds=2)
def empty_splits(t: Trial, one_launch: Answer) -> None:
    """the same where short rows have fewer live splits than n_splits"""
    inputs = draw(t, [t.integer(1, BLOCK), t.integer(2 * BLOCK + 1, 3 * BLOCK)], 4)
    same(t, one_launch, inputs, Tickets(2), (0, 2)[t.round])


@EXERCISE.requirement(2, "call after call", rounds=1)
def again(t: Trial, one_launch: Answer) -> None:
    """a second and a third call with the same tickets, other inputs and other lengths: right each time,
    and the tickets are 0 afterwards"""
    tickets = Tickets(2)
    for first, lengths in enumerate(([2 * BLOCK, 3 * BLOCK - 5], [BLOCK + 3, BLOCK - 1], [9, 2 * BLOCK + 2])):
        same(t, one_launch, draw(t, lengths, 3), tickets, first)
    t.true(not tickets.tensor.any(), "tickets that are 0 again", f"tickets {tickets.tensor.tolist()}")
