"""04.2: the ring buffer, held against a pointer that goes from slot to slot."""

from typing import Any

import torch
from torch import Tensor

from kvlearn.grading.compare import describe
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial
from kvlearn.grading.units.sliding_window.given import held, whole_numbers

EXERCISE = Exercise(
    id="04.2",
    slug="ring",
    title="A ring of W slots",
    answers=("write_ring", "held_positions"),
    hints=(
        "Take one token at a time on paper, with W = 3: positions 0, 1, 2 fill the slots, 3 goes to slot 0 "
        "again. Only the position decides: slot = position % W.",
        "`slots = torch.arange(start, start + T) % window` gives every new token its slot, and `ring[:, :, "
        "slots] = new` writes them all, across the edge too.",
        "A chunk longer than W has several tokens for one slot, and which of them an indexed write leaves "
        "there is not defined. Only its last W tokens can stay: drop the others before you write, and let "
        "`start` move on by as many.",
        "held_positions: the newest position is n − 1. Slot s holds the newest position p ≤ n − 1 with p % "
        "W = s, which lies (n − 1 − s) % W tokens back. If that is below 0, the slot is empty.",
    ),
)


def written(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """The ring after these tokens, one at a time."""
    ring, pointer = ring.clone(), 0
    for position in range(start + new.shape[2]):
        if position >= start:
            ring[:, :, pointer] = new[:, :, position - start]
        pointer = 0 if pointer == ring.shape[2] - 1 else pointer + 1
    return ring


def same_ring(t: Trial, write_ring: Answer, window: int, start: int, *chunks: int) -> None:
    """The ring after each of these chunks, as it goes on from what came back before."""
    B, H, D = t.pick(2, 3), t.pick(5, 7), 16
    ring, got = t.randn(B, H, window, D), None
    for T in chunks:
        new = t.randn(B, H, T, D)
        got = write_ring(ring if got is None else got, new, start)
        ring = written(ring, new, start)
        start += T
        if not t.close(got, ring) and (not isinstance(got, Tensor) or got.shape != ring.shape):
            raise Stop


def same_positions(t: Trial, held_positions: Answer, n_tokens: int, window: int) -> None:
    """Whole numbers, one a slot."""
    got: Any = held_positions(n_tokens, window)
    numbers = whole_numbers(got)
    if numbers is None:
        t.true(False, "whole numbers, one a slot", describe(got))
        raise Stop
    want = torch.tensor(held(n_tokens, window))
    t.close(torch.tensor(numbers, dtype=torch.int64), want, f"after {n_tokens} tokens:")


@EXERCISE.requirement(1, "write_ring: before the ring is full")
def filling(t: Trial, write_ring: Answer, held_positions: Answer) -> None:
    """token p in slot p, also for a chunk that continues others; the other slots stay as they are"""
    window = t.integer(6, 9)
    first = t.integer(2, 3)
    same_ring(t, write_ring, window, 0, first, 1, t.integer(1, window - first - 2))


@EXERCISE.requirement(1, "write_ring: one token at a time, lap after lap")
def single(t: Trial, write_ring: Answer, held_positions: Answer) -> None:
    """token p in slot p % W, over the token that was there"""
    window = t.integer(4, 7)
    start = window * t.integer(2, 5) - 2
    same_ring(t, write_ring, window, start, 1, 1, 1, 1)


@EXERCISE.requirement(1, "write_ring: a chunk across the edge")
def across(t: Trial, write_ring: Answer, held_positions: Answer) -> None:
    """T ≤ W tokens of which the first stand before the edge and the rest behind it; also exactly W"""
    window = t.integer(6, 9)
    T = t.integer(4, window - 1)
    n_laps = 1 if t.round == 0 else t.integer(2, 3)
    same_ring(t, write_ring, window, window * n_laps - t.integer(2, T - 1), T)
    same_ring(t, write_ring, window, window * t.integer(1, 3) + t.integer(2, window - 2), window)


@EXERCISE.requirement(1, "write_ring: a chunk longer than W")
def long(t: Trial, write_ring: Answer, held_positions: Answer) -> None:
    """the last W tokens, each in its own slot, as if they had come one at a time"""
    window = t.integer(4, 6)
    start = window * t.integer(0, 3) + t.integer(1, window - 1)
    rest = t.integer(1, window - 1)
    T = window * t.integer(1, 3) + rest
    # The slot of the first token that stays is no slot of the chunk's first one, nor slot 0.
    if (start + T) % window == 0:
        start += 1 if (start + 1) % window else 2
    same_ring(t, write_ring, window, start, T)


@EXERCISE.requirement(1, "held_positions: before the ring is full")
def empty(t: Trial, write_ring: Answer, held_positions: Answer) -> None:
    """slot s holds position s, the rest −1; all are −1 after 0 tokens, and none after W"""
    window = t.integer(5, 8)
    for n in (0, t.integer(2, window - 2), window):
        same_positions(t, held_positions, n, window)


@EXERCISE.requirement(1, "held_positions: after many laps")
def laps(t: Trial, write_ring: Answer, held_positions: Answer) -> None:
    """the newest position p ≤ n − 1 with p % W = s, in the order of the slots"""
    window = t.integer(5, 8)
    for n in (window + 1, window * t.integer(2, 9) + t.integer(2, window - 2), window * t.integer(3, 9)):
        same_positions(t, held_positions, n, window)
