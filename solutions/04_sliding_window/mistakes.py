"""Unit 04: known mistakes of the exercises on the sliding window."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .checks import (
    FULL,
    WINDOW,
    Config,
    Sizes,
    Windows,
    cache_bytes,
    cache_bytes_count,
    cache_bytes_sizes,
    field,
    held,
    least_layers,
    mask,
    positions_seen,
    prefill,
    reachable,
    ring,
    sinks,
    step,
    tokens_kept,
    weights,
    written,
)

# 04.1: The mask of a sliding window


def distance(n_queries: int, n_keys: int, first: int | None = None) -> Tensor:
    """Query position minus key position, (T, S); the first query at S − T unless told otherwise."""
    first = n_keys - n_queries if first is None else first
    return first + torch.arange(n_queries)[:, None] - torch.arange(n_keys)


def band(n_queries: int, n_keys: int, window: int) -> Tensor:
    """The right mask."""
    d = distance(n_queries, n_keys)
    return (d >= 0) & (d < window)


@mask.misconception("aligned top-left")
def top_left(n_queries: int, n_keys: int, window: int) -> Tensor:
    """The first query was put at position 0. But the queries are the *last* T of S positions: behind a cache,
    this one sees only the oldest keys. It is right for T = S alone."""
    d = distance(n_queries, n_keys, first=0)
    return (d >= 0) & (d < window)


mask.mistakes(
    r"""
    one key too few: W − 1
        return band(n_queries, n_keys, window - 1)
    The window ends one key early. Distances 0 … W − 1 are W tokens, the token itself among them: the
    comparison is `distance < window`, not `distance < window - 1`. With W = 1 nothing at all is seen.

    one key too many: W + 1
        return band(n_queries, n_keys, window + 1)
    `distance <= window` lets in the distances 0 … W, which are W + 1 tokens: the window was put *beside* the
    token. Here W counts the token itself, as in Mistral's and Gemma's configs, and a ring of W slots would
    already have lost that last one.

    W tokens before it, and not itself
        return band(n_queries, n_keys, window + 1) & (distance(n_queries, n_keys) > 0)
    Distances 1 … W: the window stands before the token. But a token attends to itself too, and counts among
    the W; the first token of a prompt would have nothing to attend to.

    a token cannot see itself
        return band(n_queries, n_keys, window) & (distance(n_queries, n_keys) > 0)
    The far edge is right, the near one is strict: distance > 0 where distance ≥ 0 is meant. A token attends
    to itself too, and with W = 1 to nothing else.

    the far edge aligned top-left
        d = distance(n_queries, n_keys)
        return (d >= 0) & (distance(n_queries, n_keys, first=0) < window)
    The near edge takes the cache into account, the far edge does not: with `tril(S - T).triu(1 - W)` the
    second diagonal was left where it is for T = S. Both move by S − T, or the window grows with the cache.

    no window: the causal mask
        return distance(n_queries, n_keys) >= 0
    Each token sees everything before it. That is the causal mask of chapter 01; the window adds a second
    condition, which takes away what is W or more tokens back.

    the future visible
        return distance(n_queries, n_keys) < window
    The window's far edge is there and the causal one is missing: distance < W holds for every later key, too,
    whose distance is negative. Both conditions are needed, distance ≥ 0 and distance < W.

    a window to both sides
        return distance(n_queries, n_keys).abs() < window
    `abs(distance) < window` looks as far ahead as back. Encoders do that, Longformer's among them; a decoder
    that does sees the tokens it is to predict.

    half the window to either side
        return distance(n_queries, n_keys).abs() <= window // 2
    The window was centred, ⌊W/2⌋ keys to either side, as in an encoder. In a decoder all W tokens lie behind:
    the token itself and the W − 1 before it.

    half the window behind, nothing ahead
        return band(n_queries, n_keys, window // 2 + 1)
    The window was taken for the width of both sides, and the half that lies ahead was cut away. In a
    decoder's config W counts tokens behind, itself included: the whole W of them.

    blocks in place of a window
        d = distance(n_queries, n_keys)
        queries = torch.arange(n_keys - n_queries, n_keys)[:, None]
        return (d >= 0) & (queries // window == torch.arange(n_keys) // window)
    The positions were cut into blocks of W, and a token sees only its own block: the first of a block sees
    nothing but itself. (Llama 4 does that in its local layers and calls it chunked attention.) A sliding
    window moves along with every token.

    the last W keys for every query
        return (distance(n_queries, n_keys) >= 0) & (torch.arange(n_keys) >= n_keys - window)
    Everything but the last W of the S keys was hidden from all queries: the window of the newest token, for
    all of them. Each query has a window of its own that ends at itself, so the earlier ones of a chunk see
    further back. This is a prompt trimmed before attending, as a mask.

    the first query's far edge for all
        first = n_keys - n_queries
        return (distance(n_queries, n_keys) >= 0) & (torch.arange(n_keys) > first - window)
    All queries were given the far edge of the first one, so the window grows along the chunk. With one query
    there is no difference. The edge moves on by a key with every query.

    True where a key is hidden
        return ~band(n_queries, n_keys, window)
    True means *may attend* here, and what is to be hidden was marked. Turn it round with `~`.

    a mask to add: 0 and −∞
        hidden = ~band(n_queries, n_keys, window)
        return torch.zeros(n_queries, n_keys).masked_fill(hidden, -torch.inf)
    This is the other kind of mask, numbers that are added to the scores. It is right in itself, but here the
    mask is boolean, True = *may attend*: smaller, and the same for scores of every dtype.

    the mask of all S positions, not of the last T
        return band(n_keys, n_keys, window)
    This has a row for each of the S positions. Only the T new tokens ask: of this mask the last T rows are
    wanted, `[-n_queries:]`.

    rows for keys, columns for queries
        return band(n_queries, n_keys, window).T
    The dimensions are swapped: (S, T). A score stands in the row of its query and the column of its key, so
    the queries' positions get the new dimension behind them, `queries[:, None]`, and the keys' in front.

    decode as an exception, chunks aligned top-left
        return band(1, n_keys, window) if n_queries == 1 else top_left(n_queries, n_keys, window)
    T = 1 got a branch of its own and the rest is aligned top-left, as if the first query stood at position 0.
    With S − T tokens before the first query, one rule serves a prompt, a chunk and a single token.

    the near edge aligned top-left
        d = distance(n_queries, n_keys)
        return (distance(n_queries, n_keys, first=0) >= 0) & (d < window)
    The far edge takes the cache into account, the near one does not: `tril()` was left as it is for T = S,
    and behind a cache the two edges cross, so that some queries see nothing. Both move by S − T.

    a slice that begins below 0
        mask = torch.zeros(n_queries, n_keys, dtype=torch.bool)
        for row in range(n_queries):
            p = n_keys - n_queries + row
            mask[row, p - window + 1 : p + 1] = True
        return mask
    `mask[i, p - W + 1 : p + 1] = True` is right as long as p − W + 1 is not negative. Near the start it is,
    and Python counts a negative index from the *end*: the slice is empty, and the first tokens see nothing,
    not even themselves. Begin at `max(0, p - W + 1)`.
    """,
    band=band,
    distance=distance,
    top_left=top_left,
)


# 04.2: A ring of W slots


def put(ring: Tensor, new: Tensor, slots: list[int]) -> Tensor:
    """Token after token into these slots; a slot that does not exist takes nothing."""
    ring = ring.clone()
    for i, slot in enumerate(slots):
        if 0 <= slot < ring.shape[2]:
            ring[:, :, slot] = new[:, :, i]
    return ring


def span(new: Tensor, start: int) -> range:
    return range(start, start + new.shape[2])


ring.mistakes(
    r"""
    the pointer not wrapped
        def write_ring(ring, new, start):
            return put(ring, new, list(span(new, start)))
    Slot = position, without % W. Once the ring is full every further token falls off its end: a slice that
    reaches past the end is cut short without an error, and the ring keeps the *first* W tokens.

    all that is past the end in the last slot
        def write_ring(ring, new, start):
            return put(ring, new, [min(p, ring.shape[2] - 1) for p in span(new, start)])
    Past the end, every token was written into the last slot (min(position, W − 1), or index −1). The other
    slots never change again, and the window shrinks to one token. The next slot after the last is slot 0.

    only the chunk's start wrapped
        def write_ring(ring, new, start):
            return put(ring, new, [start % ring.shape[2] + i for i in range(new.shape[2])])
    The first slot is start % W, and the others follow it without wrapping, as a slice does: what reaches over
    the edge is lost. Every token has a slot of its own: `torch.arange(start, start + T) % W`.

    every chunk from slot 0
        def write_ring(ring, new, start):
            return put(ring, new, [i % ring.shape[2] for i in range(new.shape[2])])
    `start` was not looked at: each chunk begins at slot 0, so in decode all tokens go to the same slot. The
    slot follows from the token's position in the whole sequence.

    the pointer stands still within a chunk
        def write_ring(ring, new, start):
            return put(ring, new, [start % ring.shape[2]] * new.shape[2])
    All tokens of the chunk went to the slot of its first one, and only the last is left. One token at a time
    it is right, which hides it: token i of the chunk belongs to slot (start + i) % W.

    off by one: positions counted from 1
        def write_ring(ring, new, start):
            return put(ring, new, [(p + 1) % ring.shape[2] for p in span(new, start)])
    Every token stands one slot too far: (position + 1) % W. `start` is the position of the chunk's first
    token, and positions count from 0.

    modulo W − 1
        def write_ring(ring, new, start):
            return put(ring, new, [p % (ring.shape[2] - 1) for p in span(new, start)])
    position % (W − 1) never reaches the last slot, and turns round one token early. W slots have the numbers
    0 … W − 1, which are the remainders of a division by W.

    the oldest shifted out in place of overwritten
        def write_ring(ring, new, start):
            return torch.cat((ring, new), dim=2)[:, :, -ring.shape[2] :]
    `torch.cat((ring, new))[-W:]` keeps the right tokens, but moves all of them at every step: a copy of the
    whole window to store one token, and no token stays in slot p % W. A ring writes only what is new.

    a full ring takes nothing more
        def write_ring(ring, new, start):
            fits = start + new.shape[2] <= ring.shape[2]
            return put(ring, new, list(span(new, start))) if fits else ring
    Tokens were written only while the ring had empty slots, and a chunk that does not fit was refused as a
    whole. That is the cache of chapter 01. A ring is never full: the oldest token makes room.

    the other slots cleared
        def write_ring(ring, new, start):
            return written(torch.zeros_like(ring), new, start)
    A new ring of zeros was made and only the chunk written into it. The tokens in the other slots are still
    in the window: start from the ring that was handed in.

    of a long chunk the first W tokens kept
        def write_ring(ring, new, start):
            return written(ring, new[:, :, : ring.shape[2]], start)
    A chunk longer than the ring was cut to its *first* W tokens. What stays in a window is the end of the
    chunk, its last W.

    a long chunk's end in the slots of its beginning
        def write_ring(ring, new, start):
            return written(ring, new[:, :, -ring.shape[2] :], start)
    The last W tokens of a long chunk are right, but they were laid from start % W on, the slot of the chunk's
    first token. It is gone. The first that stays stands at start + T − W: that is its position, and decides
    its slot.

    a long chunk laid from slot 0
        def write_ring(ring, new, start):
            window = ring.shape[2]
            return new[:, :, -window:].clone() if new.shape[2] >= window else written(ring, new, start)
    When a chunk fills the whole ring, its last W tokens were copied in as they are, the first into slot 0. It
    looks tidy, but the next token goes to slot p % W, and there now lies one that is still in the window, not
    the oldest.

    the edge crossed once only
        def write_ring(ring, new, start):
            window = ring.shape[2]
            first = window - start % window
            slots = [start % window + i if i < first else i - first for i in range(new.shape[2])]
            return put(ring, new, slots)
    The chunk was cut in two at the edge, one slice up to it and one from slot 0 on. A chunk longer than the
    ring goes round more than once, and of its tokens the last W stay: drop the others first, then cut.

    empty slots said to hold their own number
        def held_positions(n_tokens, window):
            return [s if s >= n_tokens else p for s, p in enumerate(held(n_tokens, window))]
    Before the first lap is over, slot s was said to hold position s whether it has been written or not.
    Attention would then take what lies there for tokens. A slot s ≥ n holds nothing: −1.

    empty slots said to hold position 0
        def held_positions(n_tokens, window):
            return [max(p, 0) for p in held(n_tokens, window)]
    Empty slots say 0, and 0 is a position: that of the first token. So a mask made from positions lets them
    in. −1 is no position.

    in the order of time
        def held_positions(n_tokens, window):
            kept = list(range(max(0, n_tokens - window), n_tokens))
            return kept + [-1] * (window - len(kept))
    These are the right positions, oldest first, but not in the order of the slots: after n tokens the oldest
    lies in slot n % W. To take slot s for the s-th oldest gives each key another's position.

    the slot's number for its position
        def held_positions(n_tokens, window):
            return [s if s < n_tokens else -1 for s in range(window)]
    The positions start over with every lap: a slot's number was given, 0 … W − 1. RoPE and the mask need
    where the token stands in the whole sequence.

    one token ahead: n for n − 1
        def held_positions(n_tokens, window):
            return held(n_tokens + 1, window)
    n was taken for the newest position. After n tokens the newest stands at n − 1, and slot n % W still holds
    the oldest.

    one token behind
        def held_positions(n_tokens, window):
            return held(max(n_tokens - 1, 0), window)
    This is the ring before its last token was written. After n tokens, positions 0 … n − 1 have been written,
    n − 1 among them.

    the present lap for all slots
        def held_positions(n_tokens, window):
            lap = n_tokens // window * window
            return (
                [s if s < n_tokens else -1 for s in range(window)]
                if lap == 0
                else [lap + s for s in range(window)]
            )
    (n // W) · W + s for every slot: the slots that this lap has not reached yet get positions of the future.
    They hold tokens of the lap before, W less.

    the slots of the lap before called empty
        def held_positions(n_tokens, window):
            lap = (n_tokens - 1) // window * window
            return [lap + s if lap + s < n_tokens else -1 for s in range(window)]
    Slots that the present lap has not reached yet were given −1. They are not empty: the tokens of the lap
    before are in them, and still in the window. Only in the first lap is there nothing before.

    a negative number that is not −1
        def held_positions(n_tokens, window):
            return [s + window * ((n_tokens - 1 - s) // window) for s in range(window)]
    Filled slots are right. For an empty one the formula goes on counting back, to a position before the first
    token, −2 or −5. That there is none is said by −1, and by nothing else: whatever is below 0 becomes −1.
    """,
    held=held,
    put=put,
    span=span,
    written=written,
)


# 04.3: Prefill over the edge of the window


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


def prefill_attend(
    q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int, see: See, **other: Tensor
) -> Outs:
    """The right answer but for ``see``: query positions (T, 1) and key positions to the mask. ``other`` keys
    and values may stand for the ring's in the order of time."""
    keys = torch.cat((other.get("past_k", past(ring_k, start)), k), dim=2)
    values = torch.cat((other.get("past_v", past(ring_v, start)), v), dim=2)
    mask = see(*positions(q.shape[2], start, ring_k.shape[2]))
    out = scaled_dot_product_attention(q, keys, values, mask).nan_to_num()
    return out, *written_both(k, v, ring_k, ring_v, start)


def prefill_window_of(window: int) -> See:
    return lambda queries, keys: (keys <= queries) & (keys > queries - window)


def output(q: Tensor, k: Tensor, v: Tensor, ring_k: Tensor, ring_v: Tensor, start: int) -> Tensor:
    """The right one."""
    return prefill_attend(q, k, v, ring_k, ring_v, start, prefill_window_of(ring_k.shape[2]))[0]


prefill.mistakes(
    r"""
    trimmed to W keys before attending
        _, keys = positions(q.shape[2], start, ring_k.shape[2])
        kept = keys >= start + q.shape[2] - ring_k.shape[2]
        return prefill_attend(q, k, v, ring_k, ring_v, start, lambda a, b: (b <= a) & kept)
    Past and chunk were cut to the last W keys (or the chunk was written into the ring) before the chunk
    attended. Those are the keys of the *last* token; the ones before it look further back, and the first of a
    long chunk find nothing. For one token it is right, so decode hides it. Attend first, then drop.

    the ring read in the order of its slots
        n = min(start, ring_k.shape[2])
        see = prefill_window_of(ring_k.shape[2])
        return prefill_attend(
            q, k, v, ring_k, ring_v, start, see, past_k=ring_k[:, :, :n], past_v=ring_v[:, :, :n]
        )
    The ring's slots were put before the chunk as they lie, and the mask took them for the order of time.
    After start tokens the oldest lies in slot start % W, so the mask hides the wrong ones. Either bring them
    into order (`torch.arange(start - W, start) % W`), or make the mask from the position in each slot.

    values in another order than the keys
        n = min(start, ring_k.shape[2])
        see = prefill_window_of(ring_k.shape[2])
        return prefill_attend(q, k, v, ring_k, ring_v, start, see, past_v=ring_v[:, :, :n])
    The keys were brought into the order of time and the values left in that of the slots, so that a key's
    weight falls on another token's value. Whatever is done to one must be done to the other.

    no window: everything held may be seen
        return prefill_attend(q, k, v, ring_k, ring_v, start, lambda a, b: b <= a)
    The mask is causal and nothing more. The later tokens of a chunk then see more than W: the whole ring and
    the chunk up to themselves. For one token behind a full ring it is off by one key, the oldest.

    a window over the ring, none within the chunk
        window = ring_k.shape[2]
        return prefill_attend(
            q, k, v, ring_k, ring_v, start, lambda a, b: (b <= a) & ((b > a - window) | (b >= start))
        )
    The window hides old tokens of the ring, but within the chunk every token sees all before it. As long as T
    ≤ W that is the same; in a longer chunk the window ends inside it.

    the whole ring for every token of the chunk
        window = ring_k.shape[2]
        return prefill_attend(
            q, k, v, ring_k, ring_v, start, lambda a, b: (b <= a) & ((b > a - window) | (b < start))
        )
    The window holds within the chunk, but the ring's tokens may be seen by all of it. Each token of the chunk
    pushes the oldest one out of its window: the first sees W − 1 of the ring, the next W − 2.

    one key too many: W + 1
        return prefill_attend(q, k, v, ring_k, ring_v, start, prefill_window_of(ring_k.shape[2] + 1))
    Each token sees W keys and itself besides: position ≥ own − W where > is meant. W counts the token itself.
    The ring holds W tokens *before* the chunk, and the oldest of them is in no window any more.

    one key too few: W − 1
        return prefill_attend(q, k, v, ring_k, ring_v, start, prefill_window_of(ring_k.shape[2] - 1))
    The window ends one key early. W counts the token itself, so it sees W − 1 others: position > own − W.

    the past not seen
        window = ring_k.shape[2]
        return prefill_attend(
            q, k, v, ring_k, ring_v, start, lambda a, b: (b <= a) & (b > a - window) & (b >= start)
        )
    The chunk attended to itself alone. That is right for the first chunk; behind a past each token still sees
    those of the ring that are in its window.

    the future visible
        window = ring_k.shape[2]
        return prefill_attend(q, k, v, ring_k, ring_v, start, lambda a, b: b > a - window)
    The window's far edge is there, the causal one is not: each token sees the later ones of its chunk. With
    one token there are none, so decode is right.

    the mask aligned top-left
        first, window = max(0, start - ring_k.shape[2]), ring_k.shape[2]
        return prefill_attend(
            q, k, v, ring_k, ring_v, start, lambda a, b: prefill_window_of(window)(a - start + first, b)
        )
    The chunk's first query was put at the place of the oldest key (SDPA's is_causal=True does so too), and it
    sees that one and no other. The queries are the last T of the keys' positions.

    is_causal=True over ring and chunk
        keys, values = torch.cat((ring_k, k), 2), torch.cat((ring_v, v), 2)
        out = scaled_dot_product_attention(q, keys, values, is_causal=True)
        return out, *written_both(k, v, ring_k, ring_v, start)
    SDPA's is_causal=True takes the T queries for the *first* positions of the keys: query i sees the keys 0 …
    i, which are slots of the ring. Here they are the last, and there is a window too: a mask of one's own is
    needed, from positions.

    empty slots attended
        window, T = ring_k.shape[2], q.shape[2]
        order = torch.arange(start - window, start) % window
        keys, values = torch.cat((ring_k[:, :, order], k), 2), torch.cat((ring_v[:, :, order], v), 2)
        mask = prefill_window_of(window)(
            torch.arange(start, start + T)[:, None], torch.arange(start - window, start + T)
        )
        out = scaled_dot_product_attention(q, keys, values, mask)
        return out, *written_both(k, v, ring_k, ring_v, start)
    Before W tokens have come, some slots hold nothing, and whatever lies there (zeros, or an earlier
    sequence) was taken for keys. A zero key is no empty key: its score is 0 and its weight is not. Only
    positions max(0, start − W) … start − 1 are in the ring.

    keys used as values
        out, _, _ = prefill_attend(q, k, k, ring_k, ring_k, start, prefill_window_of(ring_k.shape[2]))
        return out, *written_both(k, v, ring_k, ring_v, start)
    What was added up are the keys. They say how well a token fits; the output is a sum of values, those of
    the ring and of the chunk.

    no scale
        return prefill_attend(
            q * q.shape[-1] ** 0.5, k, v, ring_k, ring_v, start, prefill_window_of(ring_k.shape[2])
        )
    The scores were not divided by √D, so the softmax is too sharp. The window changes nothing in the equation
    of attention: softmax(q kᵀ / √D) v.

    the chunk written first, then put behind the ring once more
        new_k, new_v = written_both(k, v, ring_k, ring_v, start)
        out, _, _ = prefill_attend(q, k, v, new_k, new_v, start, prefill_window_of(ring_k.shape[2]))
        return out, new_k, new_v
    The chunk went into the ring, and ring and chunk were joined to attend. What it wrote over is gone, and in
    its place stand its own tokens, taken for older ones: they are seen twice. Attend to the ring as it was
    *before* the chunk.

    the ring not written
        return output(q, k, v, ring_k, ring_v, start), ring_k, ring_v
    The rings came back as they were, so the next step will not know of this chunk. After attending, its last
    W tokens go into their slots.

    of a long chunk the first W tokens kept
        window = ring_k.shape[2]
        rings = written_both(k[:, :, :window], v[:, :, :window], ring_k, ring_v, start)
        return output(q, k, v, ring_k, ring_v, start), *rings
    Of a chunk longer than the ring its *first* W tokens were written. What stays in the window is its end,
    the last W.

    a long chunk's end in the slots of its beginning
        window = ring_k.shape[2]
        rings = written_both(k[:, :, -window:], v[:, :, -window:], ring_k, ring_v, start)
        return output(q, k, v, ring_k, ring_v, start), *rings
    The last W tokens were written, but from start % W on, the slot of the chunk's first token. The first that
    stays stands at start + T − W, and that decides its slot.

    the ring laid in the order of time
        rings = []
        for ring, new in ((ring_k, k), (ring_v, v)):
            kept = torch.cat((past(ring, start), new), dim=2)[:, :, -ring.shape[2] :]
            laid = ring.clone()
            laid[:, :, : kept.shape[2]] = kept
            rings.append(laid)
        return output(q, k, v, ring_k, ring_v, start), rings[0], rings[1]
    The last W keys of past and chunk were returned as they stood for attending, the oldest in slot 0. The
    next token goes to slot p % W, and there now lies one that is still in the window. Each token belongs in
    the slot of its position.

    the chunk's tail not wrapped
        window = ring_k.shape[2]
        n = min(k.shape[2], window)
        first = (start + k.shape[2] - n) % window
        slots = [first + i for i in range(n)]
        rings = [put(ring, new[:, :, -n:], slots) for ring, new in ((ring_k, k), (ring_v, v))]
        return output(q, k, v, ring_k, ring_v, start), rings[0], rings[1]
    The chunk was written as one slice from its first slot on, and what reaches over the edge is lost. Each
    token has a slot of its own, position % W, and that goes on at slot 0.

    every chunk from slot 0
        return output(q, k, v, ring_k, ring_v, start), *written_both(k, v, ring_k, ring_v, 0)
    The slots were counted from the chunk's own beginning, i % W, as if start were 0. A token's slot follows
    from its position in the whole sequence, (start + i) % W.

    the values' ring not written
        new_k, _ = written_both(k, v, ring_k, ring_v, start)
        return output(q, k, v, ring_k, ring_v, start), new_k, ring_v
    The keys are in their ring and the values are not, so later tokens add up values of tokens that left long
    ago. Both rings are written alike.

    keys in the values' ring
        new_k, _ = written_both(k, v, ring_k, ring_v, start)
        return output(q, k, v, ring_k, ring_v, start), new_k, new_k
    The same ring came back twice, or the keys were written into both. Keys go into ring_k, values into
    ring_v.

    the rings exchanged
        new_k, new_v = written_both(k, v, ring_k, ring_v, start)
        return output(q, k, v, ring_k, ring_v, start), new_v, new_k
    Both rings are right, and came back in the wrong order. Asked for is `(out, ring_k, ring_v)`, the keys
    before the values.
    """,
    output=output,
    past=past,
    positions=positions,
    prefill_attend=prefill_attend,
    prefill_window_of=prefill_window_of,
    put=put,
    scaled_dot_product_attention=scaled_dot_product_attention,
    written_both=written_both,
)


# 04.4: Sinks: tokens that stay, and a logit that takes


def sinks_window_of(position: int, window: int) -> list[int]:
    return list(range(max(0, position + 1 - window), position + 1))


def column(scores: Tensor, sinks: Tensor) -> Tensor:
    """The logits as one more key, (B, H, T, 1)."""
    return sinks[None, :, None, None].expand(*scores.shape[:3], 1)


def with_column(scores: Tensor, sinks: Tensor) -> Tensor:
    """The softmax over S + 1 numbers, the sink last."""
    return torch.cat((scores, column(scores, sinks)), dim=-1).softmax(-1)


sinks.mistakes(
    r"""
    the sinks counted inside the window
        def seen(position, window, n_sinks):
            return positions_seen(position, max(window - n_sinks, 1), n_sinks)
    The sinks were taken out of the W, which leaves W − n_sinks recent tokens. Here they come on top: W recent
    tokens, and n_sinks first ones besides. (StreamingLLM's "4 + 1020" is n_sinks = 4 and W = 1020 in these
    letters.)

    a sink inside the window counted twice
        def seen(position, window, n_sinks):
            return [*range(min(n_sinks, position + 1)), *sinks_window_of(position, window)]
    The sinks and the window were listed one after the other, and while the window still reaches over the
    first tokens these stand there twice. In a softmax they would get twice their weight. A position has two
    reasons to be seen, and is seen once.

    no sinks
        def seen(position, window, n_sinks):
            return sinks_window_of(position, window)
    The window alone. As soon as the first tokens leave it, the heads that had put their surplus weight on
    them have nowhere to put it: StreamingLLM's finding is that perplexity breaks down just then.

    a longer window in place of sinks
        def seen(position, window, n_sinks):
            return sinks_window_of(position, window + n_sinks)
    These are the last W + n_sinks tokens. As many as there should be, but all of them move along: sinks are
    the first tokens of the *sequence* and stay for good.

    one sink only
        def seen(position, window, n_sinks):
            return positions_seen(position, window, min(n_sinks, 1))
    Position 0 alone was kept. n_sinks says how many of the first tokens stay; one would do only for a model
    that was trained with a token made for it.

    one sink too many
        def seen(position, window, n_sinks):
            return positions_seen(position, window, n_sinks + 1)
    `p <= n_sinks` lets in n_sinks + 1 tokens, since positions count from 0: the sinks are 0 … n_sinks − 1.

    one key too few: W − 1
        def seen(position, window, n_sinks):
            return positions_seen(position, window - 1, n_sinks)
    The window ends one token early. W counts the token itself: positions position − W + 1 … position.

    one key too many: W + 1
        def seen(position, window, n_sinks):
            return positions_seen(position, window + 1, n_sinks)
    The window begins at position − W, which makes W + 1 tokens with the token itself. It begins at position −
    W + 1.

    the token itself left out
        def seen(position, window, n_sinks):
            return [p for p in positions_seen(position, window, n_sinks) if p < position]
    A `range` ends before its second number, and so these positions end before the token itself. It has
    written its key before it attends: `range(…, position + 1)`.

    sinks that do not exist yet
        def seen(position, window, n_sinks):
            return sorted({*range(n_sinks), *sinks_window_of(position, window)})
    The first n_sinks positions were listed even where the token stands before some of them: it sees its own
    future. What is seen ends at the token itself, be it a sink or not.

    places in the cache in place of positions
        def seen(position, window, n_sinks):
            return list(range(len(positions_seen(position, window, n_sinks))))
    These are 0, 1, 2 … without the gap: how the kept tokens lie in the cache. StreamingLLM does turn its keys
    by such numbers; asked for is where the tokens stand in the sequence, and the gap is real.

    the gap and not the tokens
        def seen(position, window, n_sinks):
            return [p for p in range(position + 1) if p >= n_sinks and position - p >= window]
    These are the positions that are *not* seen: neither sinks nor in the window. Turn the condition round.

    positions below 0
        def seen(position, window, n_sinks):
            first = range(min(n_sinks, position + 1))
            return sorted({*first, *range(position - window + 1, position + 1)})
    While fewer than W tokens have come, position − W + 1 is negative, and the list begins before the first
    token. There is nothing: `max(0, position - W + 1)`.

    the window listed before the sinks
        def seen(position, window, n_sinks):
            recent = sinks_window_of(position, window)
            return recent + [p for p in range(min(n_sinks, position + 1)) if p not in recent]
    The right positions, and not in the order asked for: ascending, so the sinks stand in front of the window.

    the newest first
        def seen(position, window, n_sinks):
            return positions_seen(position, window, n_sinks)[::-1]
    The right positions, counted back from the token. Asked for is the other order, ascending.

    the sink does nothing
        def sink_softmax(scores, sink_logits):
            return scores.softmax(-1)
    This is the ordinary softmax, its weights add up to 1. Perhaps the logit was added to every score, which a
    softmax does not notice, or the column was dropped and the rest normalised again, which undoes it. The
    logit belongs into the denominator and nowhere else.

    the sink's own column returned too
        def sink_softmax(scores, sink_logits):
            return with_column(scores, sink_logits)
    The weights have S + 1 columns. The sink has no key and no value: its share is what goes missing, so its
    column is left out of what is returned.

    the wrong column dropped
        def sink_softmax(scores, sink_logits):
            return torch.cat((column(scores, sink_logits), scores), dim=-1).softmax(-1)[..., :-1]
    The logit was put at one end of the scores and a column dropped at the other: the sink's share stands
    where a token's weight should be, and every weight belongs to its neighbour. Drop the column that you
    added.

    the sink added after the softmax
        def sink_softmax(scores, sink_logits):
            return scores.softmax(-1) / (1 + sink_logits.exp()[None, :, None, None])
    The softmax was finished, and then its weights were divided by 1 + exp(logit). So the sink takes the same
    share of every row, whatever the scores are. It has to compete with the scores: exp(logit) stands beside Σ
    exp(score), in one denominator.

    the sink in the numerator
        def sink_softmax(scores, sink_logits):
            largest = torch.maximum(scores.amax(-1, keepdim=True), column(scores, sink_logits))
            sink = (column(scores, sink_logits) - largest).exp()
            exp = (scores - largest).exp()
            return (exp + sink) / (exp.sum(-1, keepdim=True) + sink)
    exp(logit) was added to each exp(score) as well. A key's weight then never falls to 0, hidden keys are
    seen too. The sink belongs into the denominator alone.

    no maximum subtracted
        def sink_softmax(scores, sink_logits):
            exp = scores.exp()
            return exp / (exp.sum(-1, keepdim=True) + column(scores, sink_logits).exp())
    exp was taken of the numbers as they are. exp(89) is infinite in fp32, and ∞ / ∞ is NaN; exp(−104) is 0,
    and 0 / 0 is NaN. Subtract the largest of scores and logit from all of them first: nothing else changes.

    the maximum taken without the logit
        def sink_softmax(scores, sink_logits):
            largest = scores.amax(-1, keepdim=True)
            exp = (scores - largest).exp()
            return exp / (exp.sum(-1, keepdim=True) + (column(scores, sink_logits) - largest).exp())
    The largest *score* was subtracted from all. Where every key is hidden it is −∞, and −∞ − (−∞) is NaN; and
    a logit far above the scores would overflow. The logit is one of the numbers: take it into the maximum.

    the maximum subtracted from the scores, not from the logit
        def sink_softmax(scores, sink_logits):
            exp = (scores - scores.amax(-1, keepdim=True).clamp_min(-1e30)).exp()
            return exp / (exp.sum(-1, keepdim=True) + column(scores, sink_logits).exp())
    The scores were lowered by their maximum and the logit was not. The two no longer stand on the same
    ground: the sink weighs exp(maximum) times too much. What is subtracted from one is subtracted from all.

    the logit itself, not its exp
        def sink_softmax(scores, sink_logits):
            largest = scores.amax(-1, keepdim=True).clamp_min(-1e30)
            exp = (scores - largest).exp()
            return exp / (exp.sum(-1, keepdim=True) + column(scores, sink_logits))
    The logit was added to the denominator as it is. It is a score, and a score enters as exp(score); as it is
    it may even be negative.

    the same sink for every head: a 1 in the denominator
        def sink_softmax(scores, sink_logits):
            return weights(scores, torch.zeros_like(sink_logits))
    A 1 was added to the denominator, which is a logit of 0 for all ("softmax plus one"). Here each head has
    learned a logit of its own: exp(logit) in place of the 1.

    the first head's logit for all
        def sink_softmax(scores, sink_logits):
            return weights(scores, sink_logits[:1].expand_as(sink_logits))
    Every head got the logit of head 0. There are H logits, one a head; to lay them over (B, H, T, S) they
    need the shape (1, H, 1, 1).

    all heads' logits in every denominator
        def sink_softmax(scores, sink_logits):
            return weights(scores, sink_logits.logsumexp(0).expand_as(sink_logits))
    All H logits were put beside the scores of every head, as H more keys. A head has one sink, its own.

    the softmax over the queries
        def sink_softmax(scores, sink_logits):
            return weights(scores.transpose(-2, -1), sink_logits).transpose(-2, -1)
    The weights were divided among the queries, dimension −2. Each query divides its own weight among the keys
    and the sink: dimension −1.

    one maximum for the whole tensor
        def sink_softmax(scores, sink_logits):
            largest = torch.maximum(scores.max(), sink_logits.max())
            exp = (scores - largest).exp()
            return exp / (exp.sum(-1, keepdim=True) + (column(scores, sink_logits) - largest).exp())
    The largest of *all* scores and logits was subtracted. A row that lies far below it becomes exp(−600) = 0
    in every place, its sink too, and 0 / 0 is NaN. Each row has its own denominator, and takes its own
    maximum: over its keys and its head's logit, `amax(-1, keepdim=True)`.
    """,
    column=column,
    positions_seen=positions_seen,
    sinks_window_of=sinks_window_of,
    weights=weights,
    with_column=with_column,
)


# 04.5: How far back a stack of windows reaches


def reached(position: int, windows: Windows, n_sinks: int, back: int) -> list[int]:
    """The right list, but for how far ``back`` windows alone reach."""
    back = position if None in windows else back
    sinks = min(n_sinks, position + 1) if windows else 0
    return sorted({*range(sinks), *range(max(0, position - back), position + 1)})


def steps(windows: Windows) -> list[int]:
    return [window - 1 for window in windows if window is not None]


field.mistakes(
    r"""
    each layer reaches W further: L·W
        def reach(position, windows, n_sinks=0):
            return reached(position, windows, n_sinks, sum(steps(windows)) + len(steps(windows)))
    Every layer was said to reach W tokens further back. The window counts the token itself, so it reaches W −
    1 back, and L layers L·(W − 1). Mistral's "about 131K" for 32 layers of 4096 is this rounding up: it is
    131,041 tokens, the token itself included.

    L·W tokens in all
        def reach(position, windows, n_sinks=0):
            return reached(position, windows, n_sinks, max(sum(steps(windows)) + len(steps(windows)) - 1, 0))
    L·W tokens were counted, the token itself among them. It is in the window of every layer, but it is the
    same token: L·(W − 1) others, and itself once.

    the first one left out
        def reach(position, windows, n_sinks=0):
            return reached(position, windows, n_sinks, max(sum(steps(windows)) - 1, 0))
    The farthest position is missing: the list begins one too late. At distance Σ(W − 1) a token is still
    reached; with the token itself these are Σ(W − 1) + 1 positions.

    one layer's window only
        def reach(position, windows, n_sinks=0):
            return reached(position, windows, n_sinks, steps(windows)[-1] if steps(windows) else 0)
    This is what the token reads in one layer. What it reads there has itself read others, in the layer below:
    the windows add up over the layers.

    the widest window only
        def reach(position, windows, n_sinks=0):
            return reached(position, windows, n_sinks, max(steps(windows), default=0))
    The largest window of all layers was taken. It is one step of the way; the other layers go on from where
    it arrives, so the windows add up.

    W − 1 halved: the middle of the window
        def reach(position, windows, n_sinks=0):
            return reached(position, windows, n_sinks, sum(step // 2 for step in steps(windows)))
    Half of each window was counted, as for a window that is centred on its token. A decoder's window lies
    behind the token as a whole.

    positions before 0
        def reach(position, windows, n_sinks=0):
            back = position if None in windows else sum(steps(windows))
            sinks = range(min(n_sinks, position + 1)) if windows else range(0)
            return sorted({*sinks, *range(position - back, position + 1)})
    The list goes below position 0, where there is nothing. Near the start a token reaches all there is:
    `max(0, …)`.

    the token itself left out
        def reach(position, windows, n_sinks=0):
            return reachable(position, windows, n_sinks)[:-1]
    A `range` ends before its second number, and so the token itself is missing. Nothing has more influence on
    it: even without any layer it is there.

    full layers not counted
        def reach(position, windows, n_sinks=0):
            return reachable(position, [window for window in windows if window is not None], n_sinks)
    The layers without a window were left out of the sum, as if they reached nothing. None means no window:
    such a layer reads everything up to the token.

    only a full layer at the top counts
        def reach(position, windows, n_sinks=0):
            return reachable(
                position, [w for i, w in enumerate(windows) if w or i == len(windows) - 1], n_sinks
            )
    A full layer was taken to help only if it is the last one. Further down it has collected everything for
    the tokens that the layers above it read, so the top token gets it all the same.

    only a full layer at the bottom counts
        def reach(position, windows, n_sinks=0):
            return reachable(position, [w for i, w in enumerate(windows) if w or i == 0], n_sinks)
    A full layer was taken to help only if it is the first one. Higher up it reads positions that no window
    would reach, each of which knows itself at least.

    a full layer reaches everything, the future too
        def reach(position, windows, n_sinks=0):
            ahead = windows.count(None) and len(windows)
            return [*reachable(position, windows, n_sinks), *range(position + 1, position + 1 + ahead)]
    With a full layer the list ran past the token itself. Full attention is causal as well: a token reads up
    to itself, in every layer.

    sinks not counted
        def reach(position, windows, n_sinks=0):
            return reachable(position, windows)
    n_sinks was not looked at. The first n_sinks tokens are read from every position, however far it is.

    sinks fill the gap
        def reach(position, windows, n_sinks=0):
            return list(range(position + 1)) if n_sinks and windows else reachable(position, windows)
    With sinks everything was said to be reached. The sinks themselves are; but a sink has seen only what lies
    before it, so nothing of the gap comes through it. That is why sinks keep perplexity low and help no model
    to recall what left the window.

    sinks make every window longer
        def reach(position, windows, n_sinks=0):
            return reachable(position, [w and w + n_sinks for w in windows])
    n_sinks was added to the windows. Sinks are more keys, but always the same ones at the very beginning:
    they do not move along, and the windows reach as far as before.

    new sinks in every layer
        def reach(position, windows, n_sinks=0):
            return reachable(position, windows, n_sinks * len(windows))
    L·n_sinks first positions. Every layer keeps the *same* first tokens, so they do not add up as windows do.

    sinks after the token
        def reach(position, windows, n_sinks=0):
            return sorted({*(range(n_sinks) if windows else ()), *reachable(position, windows)})
    All n_sinks first positions were listed for a token that stands before some of them. What can have an
    influence on a token ends at the token.

    each layer carries W
        def layers_needed(distance, window):
            return None if window == 1 and distance else math.ceil(distance / window)
    The distance was divided by W. The token itself is one of the W, so a layer carries W − 1 further: over
    131,071 tokens 32 layers of 4096 seem to be enough, and it takes 33.

    rounded down
        def layers_needed(distance, window):
            return least_layers(distance, window) if window == 1 else distance // (window - 1)
    So many layers stop short of it: the division was rounded down. A rest, however small, needs one layer
    more.

    one layer more even without a rest
        def layers_needed(distance, window):
            return None if window == 1 and distance else distance // max(window - 1, 1) + 1
    `distance // (W − 1) + 1` adds a layer where the division comes out even, and one for distance 0. (So does
    counting distance + 1 tokens.) Round up: `-(-distance // (W - 1))`.

    windows that multiply
        def layers_needed(distance, window):
            if window == 1:
                return least_layers(distance, window)
            layers = 0
            while window**layers - 1 < distance:
                layers += 1
            return layers
    The reach was taken to multiply from layer to layer, W, W², W³ … It does so in dilated convolutions, whose
    steps grow. Windows of equal width add up.

    W = 1 reaches further
        def layers_needed(distance, window):
            return least_layers(distance, max(window, 2))
    With W = 1 a number came back. Such a window holds the token itself and nothing else, in every layer, so
    nothing ever arrives from elsewhere: None.

    not rounded to whole layers
        def layers_needed(distance, window):
            return least_layers(distance, window) if window == 1 else distance / (window - 1)
    The quotient came back as it is, 5.1 layers or so. There is no tenth of a layer: round up to a whole
    number.

    one layer even for distance 0
        def layers_needed(distance, window):
            return None if window == 1 and distance else max(1, least_layers(distance, window) or 0)
    At least one layer was asked for. Over distance 0 there is nothing to carry: a token has an influence on
    itself without any.

    W = 1: None for distance 0 too
        def layers_needed(distance, window):
            return None if window == 1 else least_layers(distance, window)
    With W = 1 None was returned whatever the distance. A window of one does hold the token itself, so
    distance 0 needs no layer here either: ask for the distance first.

    the newest first
        def reach(position, windows, n_sinks=0):
            return reachable(position, windows, n_sinks)[::-1]
    The right positions, counted back from the token. Asked for is the other order, ascending.
    """,
    least_layers=least_layers,
    math=math,
    reachable=reachable,
    reached=reached,
    steps=steps,
)


# 04.6: Stored and read: three models with windows


def with_window(config: Config, change: int) -> Config:
    window = config["sliding_window"]
    return {**config, "sliding_window": None if window is None else window + change}


def always_window(config: Config, n_tokens: int) -> list[int]:
    """The window's whole width in the local layers, however few tokens there are."""
    huge = tokens_kept(config, 2**40)
    return [n_tokens if kept == 2**40 else kept for kept in huge]


def times(counted: Sizes, factor: float) -> Sizes:
    """All bytes so many times; the share saved stays."""
    return {name: size if name == "saving" else number(size, factor) for name, size in counted.items()}


def number(size: float, factor: float) -> float:
    return int(size * factor) if isinstance(size, int) else size * factor


cache_bytes.mistakes(
    r"""
    read counted with all tokens, not min(length, W)
        every = [length] * config["num_hidden_layers"]
        return cache_bytes_sizes(config, tokens_kept(config, max_len), every, max_len, batch)
    Every layer was said to read `length` tokens. A layer with a window has no more than W of them, and reads
    no more: min(length, W).

    stored counted with all tokens, not min(max_len, W)
        every = [max_len] * config["num_hidden_layers"]
        return cache_bytes_sizes(config, every, tokens_kept(config, length), max_len, batch)
    Every layer was given room for max_len tokens. That is what a window costs which is only a mask: what it
    hides is still stored. With a ring a local layer needs W slots and no more.

    the windows not looked at
        return cache_bytes_count({**config, "sliding_window": None}, max_len, length, batch)
    All layers were counted as full ones. Those with a window store and read W tokens at most, and that is
    what the window is for.

    W tokens even where there are fewer
        stored, read = (always_window(config, n) for n in (max_len, length))
        return cache_bytes_sizes(config, stored, read, max_len, batch)
    W tokens were counted in the local layers even for a shorter context. As long as it is shorter than the
    window, such a layer stores and reads what a full one would: min(…, W).

    W tokens read before there are so many
        kept = tokens_kept(config, max_len)
        read = [min(slots, max(length, config["sliding_window"] or 0)) for slots in kept]
        return cache_bytes_sizes(config, kept, read, max_len, batch)
    The ring was read as a whole, all min(max_len, W) slots of it. While only `length` tokens have come, the
    rest is empty and need not be fetched.

    read taken for what there is room for
        kept = tokens_kept(config, max_len)
        return cache_bytes_sizes(config, kept, kept, max_len, batch)
    Read was set to stored. What is stored is room for max_len tokens, reserved at the start; a step fetches
    the tokens that are there, `length` of them.

    stored taken for what is there now
        kept = tokens_kept(config, length)
        return {
            **cache_bytes_sizes(config, kept, kept, max_len, batch),
            "saving": cache_bytes_count(config, length, length, batch)["saving"],
        }
    Stored was counted for `length` tokens. The cache is allocated once, for max_len of them.

    W − 1 tokens in the ring
        return cache_bytes_count(with_window(config, -1), max_len, length, batch)
    The local layers were given W − 1 slots. transformers keeps so many *between* steps, and adds the new
    token to them; a ring writes the new token first and holds all W that it may see.

    W + 1 tokens in the ring
        return cache_bytes_count(with_window(config, 1), max_len, length, batch)
    The local layers were given W + 1 slots, W old ones and the new one. W counts the token itself.

    a window in every layer
        return cache_bytes_count(
            {**config, "layer_types": [WINDOW] * config["num_hidden_layers"]}, max_len, length, batch
        )
    layer_types was not looked at: the global layers were counted as if they had the window too. It is they
    that grow with the context, and soon they hold nearly all of the cache.

    local and global the wrong way round
        if "layer_types" not in config:
            return cache_bytes_count(config, max_len, length, batch)
        types = [WINDOW if kind == FULL else FULL for kind in config["layer_types"]]
        return cache_bytes_count({**config, "layer_types": types}, max_len, length, batch)
    The full_attention layers were given the window, and the sliding_attention layers everything.

    no layer_types taken for no window
        full = [FULL] * config["num_hidden_layers"]
        return cache_bytes_count({"layer_types": full, **config}, max_len, length, batch)
    A config without layer_types was counted as if all its layers were full. Mistral 7B v0.1 has none because
    all its layers are alike: sliding_window holds for each of them.

    query heads in place of KV heads
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim", config["hidden_size"] // heads)
        return cache_bytes_count(
            {**config, "num_key_value_heads": heads, "head_dim": head_dim}, max_len, length, batch
        )
    num_attention_heads counts the queries, which are used and forgotten. What stays are the keys and values
    of num_key_value_heads. (The share saved comes out right: there the heads cancel.)

    head_dim not looked up
        without = {key: value for key, value in config.items() if key != "head_dim"}
        return cache_bytes_count(without, max_len, length, batch)
    The head dim was taken as hidden_size / num_attention_heads. A config may choose it freely and say so in
    head_dim: gpt-oss has 64 where the division gives 45, Gemma 3 27B 128 in place of 168.

    half of it: keys only, or numbers for bytes
        return times(cache_bytes_count(config, max_len, length, batch), 0.5)
    Every size is half of what it should be. Either the values are missing (a token leaves a key *and* a
    value), or numbers were counted where each takes 2 bytes.

    a quarter of it: keys only, and numbers for bytes
        return times(cache_bytes_count(config, max_len, length, batch), 0.25)
    Every size is a quarter. Two factors of 2 are missing: a token leaves a key and a value, and each number
    takes 2 bytes.

    four bytes a number
        return times(cache_bytes_count(config, max_len, length, batch), 2)
    Every size is twice too large: numbers of 4 bytes, as fp32 takes. The cache is kept in 16 bits here.

    one row of the batch
        return cache_bytes_count(config, max_len, length, 1)
    The batch is missing. Every row is a sequence of its own, with a cache of its own.

    one layer
        return cache_bytes_count({**config, "num_hidden_layers": 1}, max_len, length, batch)
    The layers are missing: this is what the first one stores and reads. Add up over all of them.

    GB for GiB
        counted = cache_bytes_count(config, max_len, length, batch)
        return {**counted, "stored_gib": counted["stored"] / 1e9}
    The bytes were divided by 10⁹, which gives GB. A GiB is 2³⁰ = 1,073,741,824 bytes, 7% more: a card of 80
    GB holds 74.5 GiB.

    the share that is left, not the share saved
        counted = cache_bytes_count(config, max_len, length, batch)
        return {**counted, "saving": 1 - counted["saving"]}
    stored / full is what is left. Saved is the rest: 1 − stored / full.

    the saving in percent
        counted = cache_bytes_count(config, max_len, length, batch)
        return {**counted, "saving": 100 * counted["saving"]}
    The saving was multiplied by 100. Asked for is the share itself, between 0 and 1.

    the saving in what is read
        return {
            **cache_bytes_count(config, max_len, length, batch),
            "saving": cache_bytes_count(config, length, length, batch)["saving"],
        }
    This is the share that a step saves when it reads, at `length` tokens. Asked for is the share of the
    memory: stored, at max_len.

    read without the new token
        return {
            **cache_bytes_count(config, max_len, length, batch),
            "read": cache_bytes_count(config, max_len, length - 1, batch)["read"],
        }
    length − 1 tokens were read. `length` counts the new one, which is written before the step attends and
    read like the others.

    hidden_size divided by the KV heads
        head_dim = config.get("head_dim", config["hidden_size"] // config["num_key_value_heads"])
        return cache_bytes_count({**config, "head_dim": head_dim}, max_len, length, batch)
    Without head_dim, hidden_size was divided by num_key_value_heads. The width is cut into one piece for each
    *query* head, num_attention_heads; a KV head is as wide as one of those, there are only fewer.
    """,
    always_window=always_window,
    cache_bytes_count=cache_bytes_count,
    cache_bytes_sizes=cache_bytes_sizes,
    FULL=FULL,
    times=times,
    tokens_kept=tokens_kept,
    WINDOW=WINDOW,
    with_window=with_window,
)


# 04.7: A decode step over the ring


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


def step_attend(
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


def step_step(
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
    return step_attend(q, ring_k, ring_v, see, slopes, distance, scale), ring_k, ring_v


def filled(lengths: Tensor, window: int) -> Tensor:
    """The slots that hold a token once the new one is written, (B, W)."""
    return torch.arange(window) <= lengths[:, None]


step.mistakes(
    r"""
    attended before it was written
        window = ring_k.shape[2]
        see = torch.arange(window) < lengths[:, None]
        distance = (lengths[:, None] - 1 - torch.arange(window)) % window + 1
        out = step_attend(q, ring_k, ring_v, see, slopes, distance)
        return out, *step_step(q, k, v, (ring_k, ring_v), lengths, slopes)[1:]
    The ring was read as it stood before this step: the new token does not see itself, and sees one that has
    just left its window. The very first token sees nothing. Write first, then attend.

    W old tokens and the new one: W + 1
        window = ring_k.shape[2]
        keys, values = (torch.cat((ring, x[:, :, None]), 2) for ring, x in ((ring_k, k), (ring_v, v)))
        slots = torch.arange(window + 1)
        see = (slots < lengths[:, None]) | (slots == window)
        distance = torch.cat(
            ((lengths[:, None] - 1 - slots[:-1]) % window + 1, torch.zeros_like(lengths[:, None])), 1
        )
        out = step_attend(q, keys, values, see, slopes, distance)
        return out, *step_step(q, k, v, (ring_k, ring_v), lengths, slopes)[1:]
    The new token was put beside the whole ring, and so the oldest, which it is about to write over, was seen
    once more: W + 1 keys. W counts the token itself. Until the ring is full there is no difference.

    empty slots attended
        everything = torch.ones(len(q), ring_k.shape[2], dtype=torch.bool)
        return step_step(q, k, v, (ring_k, ring_v), lengths, slopes, see=everything)
    All W slots were attended to, whatever they hold. Before a row has W tokens, some hold what an earlier
    sequence left. Slot s is filled where s ≤ length.

    empty slots set to zero, not hidden
        _, new_k, new_v = step_step(q, k, v, (ring_k, ring_v), lengths, slopes)
        see = filled(lengths, ring_k.shape[2])[:, None, :, None]
        everything, distance = torch.ones_like(see[:, 0, :, 0]), ages(lengths, ring_k.shape[2])
        out = step_attend(q, new_k * see, new_v * see, everything, slopes, distance)
        return out, new_k, new_v
    Keys and values of empty slots were set to 0. A key of zeros has the score 0, and exp(0) = 1 takes a share
    of the weight. A slot is hidden by a *score* of −∞.

    scores of empty slots set to zero
        _, new_k, new_v = step_step(q, k, v, (ring_k, ring_v), lengths, slopes)
        see = filled(lengths, ring_k.shape[2])
        distance = ages(lengths, ring_k.shape[2]) * see
        out = step_attend(q, new_k * see[:, None, :, None], new_v, None, slopes, distance)
        return out, new_k, new_v
    The scores of empty slots were multiplied by 0 (or the mask was added as ones and zeros). exp(0) is 1: an
    empty slot then has a weight like any other, and its leftover value is mixed in. Hidden means −∞.

    masked after the softmax
        _, new_k, new_v = step_step(q, k, v, (ring_k, ring_v), lengths, slopes)
        see = filled(lengths, ring_k.shape[2])[:, None, :, None]
        out = step_attend(q, new_k, new_v * see, None, slopes, ages(lengths, ring_k.shape[2]))
        return out, new_k, new_v
    The weights of empty slots were set to 0 after the softmax had already given them their share: what is
    left adds up to less than 1. Hide the scores, with −∞, before the softmax.

    the new token hidden until the ring is full
        see = torch.arange(ring_k.shape[2]) < lengths[:, None]
        return step_step(q, k, v, (ring_k, ring_v), lengths, slopes, see=see)
    `s < length` hides slot `length`, where the new token has just been written. After this step a row holds
    length + 1 tokens: s ≤ length. In a full ring nothing is hidden, which conceals it.

    one empty slot seen
        see = torch.arange(ring_k.shape[2]) <= lengths[:, None] + 1
        return step_step(q, k, v, (ring_k, ring_v), lengths, slopes, see=see)
    `s <= length + 1` lets in the slot behind the new token, which is empty until the next step. With `length`
    tokens before it the new one lies in slot `length`: s ≤ length.

    the slots behind the pointer hidden
        window = ring_k.shape[2]
        see = torch.arange(window) <= (lengths % window)[:, None]
        return step_step(q, k, v, (ring_k, ring_v), lengths, slopes, see=see)
    Slots with a larger number than the new token's were hidden, as if they were the future. In a ring that
    has turned, they hold the *older* tokens of the lap before. Compare positions, not slot numbers: once W
    tokens have come, every slot may be seen.

    no scale
        return step_step(q, k, v, (ring_k, ring_v), lengths, slopes, scale=1.0)
    The scores were not divided by √D, so the softmax is too sharp. The ring changes nothing in the equation
    of attention: softmax(q kᵀ / √D) v.

    keys used as values
        _, new_k, new_v = step_step(q, k, v, (ring_k, ring_v), lengths, slopes)
        out, _, _ = step_step(q, k, k, (ring_k, ring_k), lengths, slopes)
        return out, new_k, new_v
    What was added up are the keys. They say how well a token fits; the output is a sum of values.

    the pointer not wrapped
        return step_step(q, k, v, (ring_k, ring_v), lengths, slopes, slots=lengths)
    The slot was taken to be `length`, without % W, and a full ring took nothing any more: the new token is
    lost, and the oldest one stays for ever.

    past the end, always the last slot
        slots = lengths.clamp_max(ring_k.shape[2] - 1)
        return step_step(q, k, v, (ring_k, ring_v), lengths, slopes, slots=slots)
    In a full ring every new token was written into slot W − 1: it replaces the newest but one, not the
    oldest. The next slot after the last is slot 0, length % W.

    off by one: the slot of the next token
        slots = (lengths + 1) % ring_k.shape[2]
        return step_step(q, k, v, (ring_k, ring_v), lengths, slopes, slots=slots)
    The token was written to (length + 1) % W. With `length` tokens before it the new one stands at position
    `length`, since positions count from 0. In a full ring it replaces the oldest but one, and an empty slot
    is taken for filled before.

    off by one: lengths taken to count the new token
        return step_step(q, k, v, (ring_k, ring_v), lengths - 1, slopes)
    The new token was put at position length − 1, where the token before it stands, and wrote over that one.
    `lengths` says how many tokens a row has seen *before* this one: it stands at position `length`.

    off by one: counted on before the step
        return step_step(q, k, v, (ring_k, ring_v), lengths + 1, slopes)
    The lengths were raised by one and the new token put at length + 1: a slot too far, with an empty one left
    out before it. It stands at position `length`; only afterwards has the row seen length + 1 tokens.

    one length for all rows
        return step_step(q, k, v, (ring_k, ring_v), lengths.max().expand_as(lengths), slopes)
    The longest row's length was used for all. The shorter ones write to a slot that is not theirs, and see
    slots that they have not filled.

    the first row's length for all
        return step_step(q, k, v, (ring_k, ring_v), lengths[:1].expand_as(lengths), slopes)
    lengths[0] was used for every row. Rows of a batch are different sequences: each has its own slot to write
    to and its own number of filled slots.

    one slot for all rows
        slots = (lengths.max() % ring_k.shape[2]).expand_as(lengths)
        return step_step(q, k, v, (ring_k, ring_v), lengths, slopes, slots=slots)
    All rows wrote to the longest row's slot, though each hides its own empty slots. The slot, too, is a
    matter of the row: `ring[rows, :, lengths % W] = new`.

    every row's token in every row's slot
        rings = [ring_k, ring_v]
        for slot in lengths % ring_k.shape[2]:
            rings = [
                write(ring, new, slot.expand_as(lengths)) for ring, new in zip(rings, (k, v), strict=True)
            ]
        see, distance = filled(lengths, ring_k.shape[2]), ages(lengths, ring_k.shape[2])
        return step_attend(q, rings[0], rings[1], see, slopes, distance), rings[0], rings[1]
    `ring[:, :, lengths % W] = new[:, :, None]` writes each row's token into the slots of *all* rows, over
    tokens that are still in the window. One slot a row takes a row index too: `ring[rows, :, slots] = new`.

    the ring shifted
        rings = [torch.cat((ring[:, :, 1:], x[:, :, None]), 2) for ring, x in ((ring_k, k), (ring_v, v))]
        see, distance = filled(lengths, ring_k.shape[2]), ages(lengths, ring_k.shape[2])
        return step_attend(q, rings[0], rings[1], see, slopes, distance), rings[0], rings[1]
    Every token was moved down by a slot and the new one put last. For a full ring the output is right, but
    the whole window was copied, the tokens are no longer in the slots of their positions, and in a ring that
    is not full yet they are pushed out of the slots that count as filled.

    the rings not written
        return step_step(q, k, v, (ring_k, ring_v), lengths, slopes)[0], ring_k, ring_v
    The rings came back as they were, so the next step will not find this token. Return those into which it
    was written.

    the values' ring not written
        new_k = step_step(q, k, v, (ring_k, ring_v), lengths, slopes)[1]
        see, distance = filled(lengths, ring_k.shape[2]), ages(lengths, ring_k.shape[2])
        return step_attend(q, new_k, ring_v, see, slopes, distance), new_k, ring_v
    The new key is in its ring and the new value is not: the weight of the new token falls on the value of the
    one that has left. Both rings are written alike.

    the penalty left out
        return step_step(q, k, v, (ring_k, ring_v), lengths, None)
    `slopes` was not looked at. Where they are given, every score loses slope · distance before the softmax.

    distances in the order of the slots
        distance = lengths[:, None] - torch.arange(ring_k.shape[2])
        return step_step(q, k, v, (ring_k, ring_v), lengths, slopes, distance=distance)
    The ring was read as if it lay in the order of time, slot s holding position s or the s-th oldest. Scores
    that depend on the distance then get another token's. In the first lap it is right; later the newest lies
    in slot length % W, and ages grow from there backwards, round the edge: (length − s) % W.

    the distance between slots, not round the edge
        window = ring_k.shape[2]
        distance = ((lengths % window)[:, None] - torch.arange(window)).abs()
        return step_step(q, k, v, (ring_k, ring_v), lengths, slopes, distance=distance)
    |slot − the new token's slot|: on one side of the pointer that is the age, on the other it is not. What
    lies just behind the pointer is not new but the oldest of all. Ages run one way, round the edge: (length −
    s) % W.

    a reward for distance
        return step_step(q, k, v, (ring_k, ring_v), lengths, None if slopes is None else -slopes)
    slope · distance was added, so the oldest tokens win. It is taken away: score − slope · distance.

    the penalty scaled too
        return step_step(
            q, k, v, (ring_k, ring_v), lengths, None if slopes is None else slopes * q.shape[-1] ** -0.5
        )
    The penalty was taken off before the division by √D, which makes it √D times weaker. Scores are scaled
    first: q kᵀ / √D − slope · distance.

    the first head's slope for all
        return step_step(
            q, k, v, (ring_k, ring_v), lengths, None if slopes is None else slopes[:1].expand_as(slopes)
        )
    Every head got slope 0's. There are H slopes, one a head; over scores of (B, H, W) they need the shape (1,
    H, 1).

    ages that run the wrong way round
        distance = (torch.arange(ring_k.shape[2]) - lengths[:, None]) % ring_k.shape[2]
        return step_step(q, k, v, (ring_k, ring_v), lengths, slopes, distance=distance)
    (s − length) % W counts from the new token *forwards*, where the oldest lie. The token one slot back is
    one step old: (length − s) % W.
    """,
    ages=ages,
    filled=filled,
    step_attend=step_attend,
    step_step=step_step,
    write=write,
)
