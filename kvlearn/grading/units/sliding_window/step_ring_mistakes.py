"""04.7: the mistakes that people make with the slot of a row's new token, and with distances in a ring."""

import torch
from torch import Tensor

from kvlearn.grading.units.sliding_window.step import EXERCISE
from kvlearn.grading.units.sliding_window.step_mistakes import (
    Outs,
    Slopes,
    ages,
    attend,
    filled,
    step,
    write,
)

__all__ = ["EXERCISE"]


@EXERCISE.misconception("the pointer not wrapped")
def unwrapped(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """The slot was taken to be `length`, without % W, and a full ring took nothing any more: the new token is
    lost, and the oldest one stays for ever."""
    return step(q, k, v, (ring_k, ring_v), lengths, slopes, slots=lengths)


@EXERCISE.misconception("past the end, always the last slot")
def last_slot(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """In a full ring every new token was written into slot W − 1: it replaces the newest but one, not the
    oldest. The next slot after the last is slot 0, length % W."""
    slots = lengths.clamp_max(ring_k.shape[2] - 1)
    return step(q, k, v, (ring_k, ring_v), lengths, slopes, slots=slots)


@EXERCISE.misconception("off by one: the slot of the next token")
def next_slot(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """The token was written to (length + 1) % W. With `length` tokens before it the new one stands at
    position `length`, since positions count from 0. In a full ring it replaces the oldest but one, and an
    empty slot is taken for filled before."""
    slots = (lengths + 1) % ring_k.shape[2]
    return step(q, k, v, (ring_k, ring_v), lengths, slopes, slots=slots)


@EXERCISE.misconception("off by one: lengths taken to count the new token")
def counted(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """The new token was put at position length − 1, where the token before it stands, and wrote over that
    one. `lengths` says how many tokens a row has seen *before* this one: it stands at position `length`."""
    return step(q, k, v, (ring_k, ring_v), lengths - 1, slopes)


@EXERCISE.misconception("off by one: counted on before the step")
def counted_twice(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """The lengths were raised by one and the new token put at length + 1: a slot too far, with an empty one
    left out before it. It stands at position `length`; only afterwards has the row seen length + 1 tokens."""
    return step(q, k, v, (ring_k, ring_v), lengths + 1, slopes)


@EXERCISE.misconception("one length for all rows")
def longest(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """The longest row's length was used for all. The shorter ones write to a slot that is not theirs, and see
    slots that they have not filled."""
    return step(q, k, v, (ring_k, ring_v), lengths.max().expand_as(lengths), slopes)


@EXERCISE.misconception("the first row's length for all")
def first_row(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """lengths[0] was used for every row. Rows of a batch are different sequences: each has its own slot to
    write to and its own number of filled slots."""
    return step(q, k, v, (ring_k, ring_v), lengths[:1].expand_as(lengths), slopes)


@EXERCISE.misconception("one slot for all rows")
def same_slot(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """All rows wrote to the longest row's slot, though each hides its own empty slots. The slot, too, is a
    matter of the row: `ring[rows, :, lengths % W] = new`."""
    slots = (lengths.max() % ring_k.shape[2]).expand_as(lengths)
    return step(q, k, v, (ring_k, ring_v), lengths, slopes, slots=slots)


@EXERCISE.misconception("every row's token in every row's slot")
def all_slots(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """`ring[:, :, lengths % W] = new[:, :, None]` writes each row's token into the slots of *all* rows, over
    tokens that are still in the window. One slot a row takes a row index too: `ring[rows, :, slots] =
    new`."""
    rings = [ring_k, ring_v]
    for slot in lengths % ring_k.shape[2]:
        rings = [write(ring, new, slot.expand_as(lengths)) for ring, new in zip(rings, (k, v), strict=True)]
    see, distance = filled(lengths, ring_k.shape[2]), ages(lengths, ring_k.shape[2])
    return attend(q, rings[0], rings[1], see, slopes, distance), rings[0], rings[1]


@EXERCISE.misconception("the ring shifted")
def shifted(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """Every token was moved down by a slot and the new one put last. For a full ring the output is right, but
    the whole window was copied, the tokens are no longer in the slots of their positions, and in a ring that
    is not full yet they are pushed out of the slots that count as filled."""
    rings = [torch.cat((ring[:, :, 1:], x[:, :, None]), 2) for ring, x in ((ring_k, k), (ring_v, v))]
    see, distance = filled(lengths, ring_k.shape[2]), ages(lengths, ring_k.shape[2])
    return attend(q, rings[0], rings[1], see, slopes, distance), rings[0], rings[1]


@EXERCISE.misconception("the rings not written")
def not_written(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """The rings came back as they were, so the next step will not find this token. Return those into which it
    was written."""
    return step(q, k, v, (ring_k, ring_v), lengths, slopes)[0], ring_k, ring_v


@EXERCISE.misconception("the values' ring not written")
def values_not_written(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """The new key is in its ring and the new value is not: the weight of the new token falls on the value of
    the one that has left. Both rings are written alike."""
    new_k = step(q, k, v, (ring_k, ring_v), lengths, slopes)[1]
    see, distance = filled(lengths, ring_k.shape[2]), ages(lengths, ring_k.shape[2])
    return attend(q, new_k, ring_v, see, slopes, distance), new_k, ring_v


@EXERCISE.misconception("the penalty left out")
def no_penalty(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """`slopes` was not looked at. Where they are given, every score loses slope · distance before the
    softmax."""
    return step(q, k, v, (ring_k, ring_v), lengths, None)


@EXERCISE.misconception("distances in the order of the slots")
def storage_order(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """The ring was read as if it lay in the order of time, slot s holding position s or the s-th oldest.
    Scores that depend on the distance then get another token's. In the first lap it is right; later the
    newest lies in slot length % W, and ages grow from there backwards, round the edge: (length − s) % W."""
    distance = lengths[:, None] - torch.arange(ring_k.shape[2])
    return step(q, k, v, (ring_k, ring_v), lengths, slopes, distance=distance)


@EXERCISE.misconception("the distance between slots, not round the edge")
def straight(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """|slot − the new token's slot|: on one side of the pointer that is the age, on the other it is not. What
    lies just behind the pointer is not new but the oldest of all. Ages run one way, round the edge:
    (length − s) % W."""
    window = ring_k.shape[2]
    distance = ((lengths % window)[:, None] - torch.arange(window)).abs()
    return step(q, k, v, (ring_k, ring_v), lengths, slopes, distance=distance)


@EXERCISE.misconception("a reward for distance")
def reward(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """slope · distance was added, so the oldest tokens win. It is taken away: score − slope · distance."""
    return step(q, k, v, (ring_k, ring_v), lengths, None if slopes is None else -slopes)


@EXERCISE.misconception("the penalty scaled too")
def scaled_penalty(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """The penalty was taken off before the division by √D, which makes it √D times weaker. Scores are scaled
    first: q kᵀ / √D − slope · distance."""
    return step(q, k, v, (ring_k, ring_v), lengths, None if slopes is None else slopes * q.shape[-1] ** -0.5)


@EXERCISE.misconception("the first head's slope for all")
def one_slope(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """Every head got slope 0's. There are H slopes, one a head; over scores of (B, H, W) they need the shape
    (1, H, 1)."""
    return step(q, k, v, (ring_k, ring_v), lengths, None if slopes is None else slopes[:1].expand_as(slopes))


@EXERCISE.misconception("ages that run the wrong way round")
def other_way(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """(s − length) % W counts from the new token *forwards*, where the oldest lie. The token one slot back is
    one step old: (length − s) % W."""
    distance = (torch.arange(ring_k.shape[2]) - lengths[:, None]) % ring_k.shape[2]
    return step(q, k, v, (ring_k, ring_v), lengths, slopes, distance=distance)
