"""04.3: the mistakes that people make with the ring once the chunk has attended."""

import torch
from torch import Tensor

from kvlearn.grading.units.sliding_window.prefill import EXERCISE
from kvlearn.grading.units.sliding_window.prefill_mistakes import Outs, attend, past, window_of, written_both
from kvlearn.grading.units.sliding_window.ring_mistakes import put

__all__ = ["EXERCISE"]


def output(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Tensor:
    """The right one."""
    return attend(q, k, v, ring_k, ring_v, start, window_of(ring_k.shape[2]))[0]


@EXERCISE.misconception("the ring not written")
def not_written(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The rings came back as they were, so the next step will not know of this chunk. After attending, its
    last W tokens go into their slots."""
    return output(q, k, v, ring_k, ring_v, start), ring_k, ring_v


@EXERCISE.misconception("of a long chunk the first W tokens kept")
def first_kept(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """Of a chunk longer than the ring its *first* W tokens were written. What stays in the window is its end,
    the last W."""
    window = ring_k.shape[2]
    rings = written_both(k[:, :, :window], v[:, :, :window], ring_k, ring_v, start)
    return output(q, k, v, ring_k, ring_v, start), *rings


@EXERCISE.misconception("a long chunk's end in the slots of its beginning")
def not_moved(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The last W tokens were written, but from start % W on, the slot of the chunk's first token. The first
    that stays stands at start + T − W, and that decides its slot."""
    window = ring_k.shape[2]
    rings = written_both(k[:, :, -window:], v[:, :, -window:], ring_k, ring_v, start)
    return output(q, k, v, ring_k, ring_v, start), *rings


@EXERCISE.misconception("the ring laid in the order of time")
def laid_in_order(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The last W keys of past and chunk were returned as they stood for attending, the oldest in slot 0. The
    next token goes to slot p % W, and there now lies one that is still in the window. Each token belongs in
    the slot of its position."""
    rings = []
    for ring, new in ((ring_k, k), (ring_v, v)):
        kept = torch.cat((past(ring, start), new), dim=2)[:, :, -ring.shape[2] :]
        laid = ring.clone()
        laid[:, :, : kept.shape[2]] = kept
        rings.append(laid)
    return output(q, k, v, ring_k, ring_v, start), rings[0], rings[1]


@EXERCISE.misconception("the chunk's tail not wrapped")
def tail_dropped(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The chunk was written as one slice from its first slot on, and what reaches over the edge is lost. Each
    token has a slot of its own, position % W, and that goes on at slot 0."""
    window = ring_k.shape[2]
    n = min(k.shape[2], window)
    first = (start + k.shape[2] - n) % window
    slots = [first + i for i in range(n)]
    rings = [put(ring, new[:, :, -n:], slots) for ring, new in ((ring_k, k), (ring_v, v))]
    return output(q, k, v, ring_k, ring_v, start), rings[0], rings[1]


@EXERCISE.misconception("every chunk from slot 0")
def from_zero(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The slots were counted from the chunk's own beginning, i % W, as if start were 0. A token's slot
    follows from its position in the whole sequence, (start + i) % W."""
    return output(q, k, v, ring_k, ring_v, start), *written_both(k, v, ring_k, ring_v, 0)


@EXERCISE.misconception("the values' ring not written")
def values_not_written(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The keys are in their ring and the values are not, so later tokens add up values of tokens that left
    long ago. Both rings are written alike."""
    new_k, _ = written_both(k, v, ring_k, ring_v, start)
    return output(q, k, v, ring_k, ring_v, start), new_k, ring_v


@EXERCISE.misconception("keys in the values' ring")
def keys_in_both(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The same ring came back twice, or the keys were written into both. Keys go into ring_k, values into
    ring_v."""
    new_k, _ = written_both(k, v, ring_k, ring_v, start)
    return output(q, k, v, ring_k, ring_v, start), new_k, new_k


@EXERCISE.misconception("the rings exchanged")
def exchanged(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """Both rings are right, and came back in the wrong order. Asked for is `(out, ring_k, ring_v)`, the keys
    before the values."""
    new_k, new_v = written_both(k, v, ring_k, ring_v, start)
    return output(q, k, v, ring_k, ring_v, start), new_v, new_k
