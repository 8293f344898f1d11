"""04.7: the mistakes that people make in a decode step over a ring: what is written, what is hidden."""

import torch
from torch import Tensor

from kvlearn.grading.units.sliding_window.step import EXERCISE

__all__ = ["EXERCISE"]

Outs = tuple[Tensor, Tensor, Tensor]
Slopes = Tensor | None


def write(ring: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """The ring with each row's new token in its slot; a slot that does not exist takes nothing."""
    ring = ring.clone()
    for row, slot in enumerate(slots.tolist()):
        if slot < ring.shape[2]:
            ring[row, :, slot] = new[row]
    return ring


def ages(lengths: Tensor, window: int) -> Tensor:
    """How many tokens ago what a slot holds was written, (B, W), the new token's being 0."""
    return (lengths[:, None] - torch.arange(window)) % window


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    see: Tensor | None,
    slopes: Slopes,
    distance: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Over slots, of which (B, W) ``see`` may be seen."""
    scores = torch.einsum("bhd,bhsd->bhs", q, keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if slopes is not None:
        scores = scores - slopes[None, :, None] * distance[:, None]
    if see is not None:
        scores = scores.masked_fill(~see[:, None], -torch.inf)
    return torch.einsum("bhs,bhsd->bhd", scores.softmax(-1).nan_to_num(), values)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rings: tuple[Tensor, Tensor],
    lengths: Tensor,
    slopes: Slopes,
    see: Tensor | None = None,
    distance: Tensor | None = None,
    slots: Tensor | None = None,
    scale: float | None = None,
) -> Outs:
    """The right answer, but for what is given: which slots are seen, how far they are, which are written."""
    window = rings[0].shape[2]
    slots = lengths % window if slots is None else slots
    ring_k, ring_v = write(rings[0], k, slots), write(rings[1], v, slots)
    see = filled(lengths, window) if see is None else see
    distance = ages(lengths, window) if distance is None else distance
    return attend(q, ring_k, ring_v, see, slopes, distance, scale), ring_k, ring_v


def filled(lengths: Tensor, window: int) -> Tensor:
    """The slots that hold a token once the new one is written, (B, W)."""
    return torch.arange(window) <= lengths[:, None]


@EXERCISE.misconception("attended before it was written")
def before_writing(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """The ring was read as it stood before this step: the new token does not see itself, and sees one that
    has just left its window. The very first token sees nothing. Write first, then attend."""
    window = ring_k.shape[2]
    see = torch.arange(window) < lengths[:, None]
    distance = (lengths[:, None] - 1 - torch.arange(window)) % window + 1
    out = attend(q, ring_k, ring_v, see, slopes, distance)
    return out, *step(q, k, v, (ring_k, ring_v), lengths, slopes)[1:]


@EXERCISE.misconception("W old tokens and the new one: W + 1")
def one_too_many(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """The new token was put beside the whole ring, and so the oldest, which it is about to write over, was
    seen once more: W + 1 keys. W counts the token itself. Until the ring is full there is no difference."""
    window = ring_k.shape[2]
    keys, values = (torch.cat((ring, x[:, :, None]), 2) for ring, x in ((ring_k, k), (ring_v, v)))
    slots = torch.arange(window + 1)
    see = (slots < lengths[:, None]) | (slots == window)
    distance = torch.cat(
        ((lengths[:, None] - 1 - slots[:-1]) % window + 1, torch.zeros_like(lengths[:, None])), 1
    )
    out = attend(q, keys, values, see, slopes, distance)
    return out, *step(q, k, v, (ring_k, ring_v), lengths, slopes)[1:]


@EXERCISE.misconception("empty slots attended")
def empty_slots(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """All W slots were attended to, whatever they hold. Before a row has W tokens, some hold what an earlier
    sequence left. Slot s is filled where s ≤ length."""
    everything = torch.ones(len(q), ring_k.shape[2], dtype=torch.bool)
    return step(q, k, v, (ring_k, ring_v), lengths, slopes, see=everything)


@EXERCISE.misconception("empty slots set to zero, not hidden")
def zeroed(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """Keys and values of empty slots were set to 0. A key of zeros has the score 0, and exp(0) = 1 takes a
    share of the weight. A slot is hidden by a *score* of −∞."""
    _, new_k, new_v = step(q, k, v, (ring_k, ring_v), lengths, slopes)
    see = filled(lengths, ring_k.shape[2])[:, None, :, None]
    everything, distance = torch.ones_like(see[:, 0, :, 0]), ages(lengths, ring_k.shape[2])
    out = attend(q, new_k * see, new_v * see, everything, slopes, distance)
    return out, new_k, new_v


@EXERCISE.misconception("scores of empty slots set to zero")
def zero_scores(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """The scores of empty slots were multiplied by 0 (or the mask was added as ones and zeros). exp(0) is 1:
    an empty slot then has a weight like any other, and its leftover value is mixed in. Hidden means −∞."""
    _, new_k, new_v = step(q, k, v, (ring_k, ring_v), lengths, slopes)
    see = filled(lengths, ring_k.shape[2])
    distance = ages(lengths, ring_k.shape[2]) * see
    out = attend(q, new_k * see[:, None, :, None], new_v, None, slopes, distance)
    return out, new_k, new_v


@EXERCISE.misconception("masked after the softmax")
def masked_after(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """The weights of empty slots were set to 0 after the softmax had already given them their share: what is
    left adds up to less than 1. Hide the scores, with −∞, before the softmax."""
    _, new_k, new_v = step(q, k, v, (ring_k, ring_v), lengths, slopes)
    see = filled(lengths, ring_k.shape[2])[:, None, :, None]
    out = attend(q, new_k, new_v * see, None, slopes, ages(lengths, ring_k.shape[2]))
    return out, new_k, new_v


@EXERCISE.misconception("the new token hidden until the ring is full")
def new_hidden(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """`s < length` hides slot `length`, where the new token has just been written. After this step a row
    holds length + 1 tokens: s ≤ length. In a full ring nothing is hidden, which conceals it."""
    see = torch.arange(ring_k.shape[2]) < lengths[:, None]
    return step(q, k, v, (ring_k, ring_v), lengths, slopes, see=see)


@EXERCISE.misconception("one empty slot seen")
def one_empty(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """`s <= length + 1` lets in the slot behind the new token, which is empty until the next step. With
    `length` tokens before it the new one lies in slot `length`: s ≤ length."""
    see = torch.arange(ring_k.shape[2]) <= lengths[:, None] + 1
    return step(q, k, v, (ring_k, ring_v), lengths, slopes, see=see)


@EXERCISE.misconception("the slots behind the pointer hidden")
def behind_pointer(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """Slots with a larger number than the new token's were hidden, as if they were the future. In a ring that
    has turned, they hold the *older* tokens of the lap before. Compare positions, not slot numbers: once
    W tokens have come, every slot may be seen."""
    window = ring_k.shape[2]
    see = torch.arange(window) <= (lengths % window)[:, None]
    return step(q, k, v, (ring_k, ring_v), lengths, slopes, see=see)


@EXERCISE.misconception("no scale")
def no_scale(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """The scores were not divided by √D, so the softmax is too sharp. The ring changes nothing in the
    equation of attention: softmax(q kᵀ / √D) v."""
    return step(q, k, v, (ring_k, ring_v), lengths, slopes, scale=1.0)


@EXERCISE.misconception("keys used as values")
def keys_as_values(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, lengths: Tensor, slopes: Slopes = None
) -> Outs:
    """What was added up are the keys. They say how well a token fits; the output is a sum of values."""
    _, new_k, new_v = step(q, k, v, (ring_k, ring_v), lengths, slopes)
    out, _, _ = step(q, k, k, (ring_k, ring_k), lengths, slopes)
    return out, new_k, new_v
