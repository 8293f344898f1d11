"""04.3: the mistakes that people make when a chunk goes over the edge: what is seen, and by which token."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvlearn.grading.units.sliding_window.prefill import EXERCISE
from kvlearn.grading.units.sliding_window.ring import written

__all__ = ["EXERCISE"]

Outs = tuple[Tensor, Tensor, Tensor]
See = Callable[[Tensor, Tensor], Tensor]


def written_both(k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> tuple[Tensor, Tensor]:
    return written(ring_k, k, start), written(ring_v, v, start)


def past(ring: Tensor, start: int) -> Tensor:
    """What the ring holds, in the order of time."""
    window = ring.shape[2]
    return ring[:, :, torch.arange(max(0, start - window), start) % window]


def positions(T: int, start: int, window: int) -> tuple[Tensor, Tensor]:
    """Of the queries, (T, 1), and of the keys in ring and chunk."""
    return torch.arange(start, start + T)[:, None], torch.arange(max(0, start - window), start + T)


def attend(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int, see: See, **other: Tensor
) -> Outs:
    """The right answer but for ``see``: query positions (T, 1) and key positions to the mask. ``other`` keys
    and values may stand for the ring's in the order of time."""
    keys = torch.cat((other.get("past_k", past(ring_k, start)), k), dim=2)
    values = torch.cat((other.get("past_v", past(ring_v, start)), v), dim=2)
    mask = see(*positions(q.shape[2], start, ring_k.shape[2]))
    out = scaled_dot_product_attention(q, keys, values, mask).nan_to_num()
    return out, *written_both(k, v, ring_k, ring_v, start)


def window_of(window: int) -> See:
    return lambda queries, keys: (keys <= queries) & (keys > queries - window)


@EXERCISE.misconception("trimmed to W keys before attending")
def trimmed(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """Past and chunk were cut to the last W keys (or the chunk was written into the ring) before the chunk
    attended. Those are the keys of the *last* token; the ones before it look further back, and the first of a
    long chunk find nothing. For one token it is right, so decode hides it. Attend first, then drop."""
    _, keys = positions(q.shape[2], start, ring_k.shape[2])
    kept = keys >= start + q.shape[2] - ring_k.shape[2]
    return attend(q, k, v, ring_k, ring_v, start, lambda a, b: (b <= a) & kept)


@EXERCISE.misconception("the ring read in the order of its slots")
def storage_order(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The ring's slots were put before the chunk as they lie, and the mask took them for the order of time.
    After start tokens the oldest lies in slot start % W, so the mask hides the wrong ones. Either bring them
    into order (`torch.arange(start - W, start) % W`), or make the mask from the position in each slot."""
    n = min(start, ring_k.shape[2])
    see = window_of(ring_k.shape[2])
    return attend(q, k, v, ring_k, ring_v, start, see, past_k=ring_k[:, :, :n], past_v=ring_v[:, :, :n])


@EXERCISE.misconception("values in another order than the keys")
def values_unsorted(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The keys were brought into the order of time and the values left in that of the slots, so that a key's
    weight falls on another token's value. Whatever is done to one must be done to the other."""
    n = min(start, ring_k.shape[2])
    see = window_of(ring_k.shape[2])
    return attend(q, k, v, ring_k, ring_v, start, see, past_v=ring_v[:, :, :n])


@EXERCISE.misconception("no window: everything held may be seen")
def causal(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The mask is causal and nothing more. The later tokens of a chunk then see more than W: the whole ring
    and the chunk up to themselves. For one token behind a full ring it is off by one key, the oldest."""
    return attend(q, k, v, ring_k, ring_v, start, lambda a, b: b <= a)


@EXERCISE.misconception("a window over the ring, none within the chunk")
def free_chunk(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The window hides old tokens of the ring, but within the chunk every token sees all before it. As long
    as T ≤ W that is the same; in a longer chunk the window ends inside it."""
    window = ring_k.shape[2]
    return attend(q, k, v, ring_k, ring_v, start, lambda a, b: (b <= a) & ((b > a - window) | (b >= start)))


@EXERCISE.misconception("the whole ring for every token of the chunk")
def whole_ring(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The window holds within the chunk, but the ring's tokens may be seen by all of it. Each token of the
    chunk pushes the oldest one out of its window: the first sees W − 1 of the ring, the next W − 2."""
    window = ring_k.shape[2]
    return attend(q, k, v, ring_k, ring_v, start, lambda a, b: (b <= a) & ((b > a - window) | (b < start)))


@EXERCISE.misconception("one key too many: W + 1")
def too_many(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """Each token sees W keys and itself besides: position ≥ own − W where > is meant. W counts the token
    itself. The ring holds W tokens *before* the chunk, and the oldest of them is in no window any more."""
    return attend(q, k, v, ring_k, ring_v, start, window_of(ring_k.shape[2] + 1))


@EXERCISE.misconception("one key too few: W − 1")
def too_few(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The window ends one key early. W counts the token itself, so it sees W − 1 others: position > own −
    W."""
    return attend(q, k, v, ring_k, ring_v, start, window_of(ring_k.shape[2] - 1))


@EXERCISE.misconception("the past not seen")
def no_past(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The chunk attended to itself alone. That is right for the first chunk; behind a past each token still
    sees those of the ring that are in its window."""
    window = ring_k.shape[2]
    return attend(q, k, v, ring_k, ring_v, start, lambda a, b: (b <= a) & (b > a - window) & (b >= start))


@EXERCISE.misconception("the future visible")
def future(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The window's far edge is there, the causal one is not: each token sees the later ones of its chunk.
    With one token there are none, so decode is right."""
    window = ring_k.shape[2]
    return attend(q, k, v, ring_k, ring_v, start, lambda a, b: b > a - window)


@EXERCISE.misconception("the mask aligned top-left")
def top_left(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The chunk's first query was put at the place of the oldest key (SDPA's is_causal=True does so too), and
    it sees that one and no other. The queries are the last T of the keys' positions."""
    first, window = max(0, start - ring_k.shape[2]), ring_k.shape[2]
    return attend(q, k, v, ring_k, ring_v, start, lambda a, b: window_of(window)(a - start + first, b))


@EXERCISE.misconception("is_causal=True over ring and chunk")
def by_is_causal(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """SDPA's is_causal=True takes the T queries for the *first* positions of the keys: query i sees the keys
    0 … i, which are slots of the ring. Here they are the last, and there is a window too: a mask of one's
    own is needed, from positions."""
    keys, values = torch.cat((ring_k, k), 2), torch.cat((ring_v, v), 2)
    out = scaled_dot_product_attention(q, keys, values, is_causal=True)
    return out, *written_both(k, v, ring_k, ring_v, start)


@EXERCISE.misconception("empty slots attended")
def empty_slots(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """Before W tokens have come, some slots hold nothing, and whatever lies there (zeros, or an earlier
    sequence) was taken for keys. A zero key is no empty key: its score is 0 and its weight is not. Only
    positions max(0, start − W) … start − 1 are in the ring."""
    window, T = ring_k.shape[2], q.shape[2]
    order = torch.arange(start - window, start) % window
    keys, values = torch.cat((ring_k[:, :, order], k), 2), torch.cat((ring_v[:, :, order], v), 2)
    mask = window_of(window)(torch.arange(start, start + T)[:, None], torch.arange(start - window, start + T))
    out = scaled_dot_product_attention(q, keys, values, mask)
    return out, *written_both(k, v, ring_k, ring_v, start)


@EXERCISE.misconception("keys used as values")
def keys_as_values(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """What was added up are the keys. They say how well a token fits; the output is a sum of values, those of
    the ring and of the chunk."""
    out, _, _ = attend(q, k, k, ring_k, ring_k, start, window_of(ring_k.shape[2]))
    return out, *written_both(k, v, ring_k, ring_v, start)


@EXERCISE.misconception("no scale")
def no_scale(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The scores were not divided by √D, so the softmax is too sharp. The window changes nothing in the
    equation of attention: softmax(q kᵀ / √D) v."""
    return attend(q * q.shape[-1] ** 0.5, k, v, ring_k, ring_v, start, window_of(ring_k.shape[2]))


@EXERCISE.misconception("the chunk written first, then put behind the ring once more")
def written_and_joined(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Outs:
    """The chunk went into the ring, and ring and chunk were joined to attend. What it wrote over is gone, and
    in its place stand its own tokens, taken for older ones: they are seen twice. Attend to the ring as it was
    *before* the chunk."""
    new_k, new_v = written_both(k, v, ring_k, ring_v, start)
    out, _, _ = attend(q, k, v, new_k, new_v, start, window_of(ring_k.shape[2]))
    return out, new_k, new_v
