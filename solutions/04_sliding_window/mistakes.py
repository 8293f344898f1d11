"""Unit 04: known mistakes of the exercises on the sliding window."""

from torch import Tensor

from .checks import cache_bytes, field, mask, prefill, ring, sinks, step

# 04.1: The mask of a sliding window


mask.mistakes(
    r"""
    one key too few: W − 1
        distance < window → distance < window - 1
    The window ends one key early. Distances 0 … W − 1 are W tokens, the token itself among them: the
    comparison is `distance < window`, not `distance < window - 1`. With W = 1 nothing at all is seen.

    one key too many: W + 1
        distance < window → distance <= window
    `distance <= window` lets in the distances 0 … W, which are W + 1 tokens: the window was put *beside* the
    token. Here W counts the token itself, as in Mistral's and Gemma's configs, and a ring of W slots would
    already have lost that last one.

    W tokens before it, and not itself
        (distance >= 0) & (distance < window) → (distance > 0) & (distance <= window)
    Distances 1 … W: the window is before the token. But a token attends to itself too, and counts among
    the W; the first token of a prompt would have nothing to attend to.

    a token cannot see itself
        distance >= 0 → distance > 0
    The far edge is right, the near one is strict: distance > 0 where distance ≥ 0 is meant. A token attends
    to itself too, and with W = 1 to nothing else.

    aligned top-left
        torch.arange(n_keys - n_queries, n_keys) → torch.arange(n_queries)
    The first query was put at position 0. But the queries are the *last* T of S positions: behind a cache,
    this one sees only the oldest keys. It is right for T = S alone.

    the far edge aligned top-left
        distance < window → distance - (n_keys - n_queries) < window
    The near edge takes the cache into account, the far edge does not: with `tril(S - T).triu(1 - W)` the
    second diagonal was left where it is for T = S. Both move by S − T, or the window grows with the cache.

    no window: the causal mask
        (distance >= 0) & (distance < window) → distance >= 0
    Each token sees everything before it. That is the causal mask of chapter 01; the window adds a second
    condition, which takes away what is W or more tokens back.

    the future visible
        (distance >= 0) & (distance < window) → distance < window
    The window's far edge is there and the causal one is missing: distance < W holds for every later key, too,
    whose distance is negative. Both conditions are needed, distance ≥ 0 and distance < W.

    a window to both sides
        (distance >= 0) & (distance < window) → distance.abs() < window
    `abs(distance) < window` looks as far ahead as back. Encoders do that, Longformer's among them; a decoder
    that does sees the tokens it is to predict.

    half the window to either side
        (distance >= 0) & (distance < window) → distance.abs() <= window // 2
    The window was centred, ⌊W/2⌋ keys to either side, as in an encoder. In a decoder all W tokens lie behind:
    the token itself and the W − 1 before it.

    half the window behind, nothing ahead
        distance < window → distance < window // 2 + 1
    The window was taken for the width of both sides, and the half that lies ahead was cut away. In a
    decoder's config W counts tokens behind, itself included: the whole W of them.

    blocks in place of a window
        (distance < window) → (queries[:, None] // window == torch.arange(n_keys) // window)
    The positions were cut into blocks of W, and a token sees only its own block: the first of a block sees
    nothing but itself. (Llama 4 does that in its local layers and calls it chunked attention.) A sliding
    window moves along with every token.

    the last W keys for every query
        (distance < window) → (torch.arange(n_keys) >= n_keys - window)
    Everything but the last W of the S keys was hidden from all queries: the window of the newest token, for
    all of them. Each query has a window of its own that ends at itself, so the earlier ones of a chunk see
    further back. This is a prompt trimmed before attending, as a mask.

    the first query's far edge for all
        (distance < window) → (torch.arange(n_keys) > n_keys - n_queries - window)
    All queries were given the far edge of the first one, so the window grows along the chunk. With one query
    there is no difference. The edge moves on by a key with every query.

    True where a key is hidden
        (distance >= 0) & (distance < window) → (distance < 0) | (distance >= window)
    True means *may attend* here, and what is to be hidden was marked. Turn it round with `~`.

    a mask to add: 0 and −∞
        (distance >= 0) & (distance < window) → torch.log((distance >= 0) & (distance < window))
    This is the other kind of mask, numbers that are added to the scores. It is right in itself, but here the
    mask is boolean, True = *may attend*: smaller, and the same for scores of every dtype.

    the mask of all S positions, not of the last T
        torch.arange(n_keys - n_queries, n_keys) → torch.arange(n_keys)
    This has a row for each of the S positions. Only the T new tokens ask: of this mask the last T rows are
    wanted, `[-n_queries:]`.

    rows for keys, columns for queries
        queries[:, None] - torch.arange(n_keys) → queries - torch.arange(n_keys)[:, None]
    The dimensions are swapped: (S, T). A score is in the row of its query and the column of its key, so
    the queries' positions get the new dimension behind them, `queries[:, None]`, and the keys' in front.

    decode as an exception, chunks aligned top-left
        torch.arange(n_keys - n_queries, n_keys)
            → torch.arange(n_keys - 1, n_keys) if n_queries == 1 else torch.arange(n_queries)
    T = 1 got a branch of its own and the rest is aligned top-left, as if the first query were at position 0.
    With S − T tokens before the first query, one rule serves a prompt, a chunk and a single token.

    the near edge aligned top-left
        distance >= 0 → distance - (n_keys - n_queries) >= 0
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
        torch.arange(end - n, end) % window → torch.arange(start, end)
        ring[:, :, slots] = new[:, :, -n:] → ring[:, :, slots[slots < window]] = new[:, :, slots < window]
    Slot = position, without % W. Once the ring is full every further token falls off its end: a slice that
    reaches past the end is cut short without an error, and the ring keeps the *first* W tokens.

    all that is past the end in the last slot
        def write_ring(ring, new, start):
            return put(ring, new, [min(p, ring.shape[2] - 1) for p in span(new, start)])
    Past the end, every token was written into the last slot (min(position, W − 1), or index −1). The other
    slots never change again, and the window shrinks to one token. The next slot after the last is slot 0.

    only the chunk's start wrapped
        torch.arange(end - n, end) % window → start % window + torch.arange(new.shape[2])
        ring[:, :, slots] = new[:, :, -n:] → ring[:, :, slots[slots < window]] = new[:, :, slots < window]
    The first slot is start % W, and the others follow it without wrapping, as a slice does: what reaches over
    the edge is lost. Every token has a slot of its own: `torch.arange(start, start + T) % W`.

    every chunk from slot 0
        torch.arange(end - n, end) → torch.arange(end - n - start, end - start)
    `start` was not looked at: each chunk begins at slot 0, so in decode all tokens go to the same slot. The
    slot follows from the token's position in the whole sequence.

    the pointer does not advance within a chunk
        torch.arange(end - n, end) % window → start % window
        new[:, :, -n:] → new[:, :, -1]
    All tokens of the chunk went to the slot of its first one, and only the last is left. One token at a time
    it is right, which hides it: token i of the chunk belongs to slot (start + i) % W.

    off by one: positions counted from 1
        torch.arange(end - n, end) → torch.arange(end - n + 1, end + 1)
    Every token is one slot too far: (position + 1) % W. `start` is the position of the chunk's first
    token, and positions count from 0.

    modulo W − 1
        min(new.shape[2], window) → min(new.shape[2], window - 1)
        torch.arange(end - n, end) % window → torch.arange(end - n, end) % (window - 1)
    position % (W − 1) never reaches the last slot, and turns round one token early. W slots have the numbers
    0 … W − 1, which are the remainders of a division by W.

    the oldest shifted out in place of overwritten
        def write_ring(ring, new, start):
            return torch.cat((ring, new), dim=2)[:, :, -ring.shape[2] :]
    `torch.cat((ring, new))[-W:]` keeps the right tokens, but moves all of them at every step: a copy of the
    whole window to store one token, and no token stays in slot p % W. A ring writes only what is new.

    a full ring takes nothing more
        ring = ring.clone() → if end > window:
                return ring
            ring = ring.clone()
    Tokens were written only while the ring had empty slots, and a chunk that does not fit was refused as a
    whole. That is the cache of chapter 01. A ring is never full: the oldest token makes room.

    the other slots cleared
        ring.clone() → torch.zeros_like(ring)
    A new ring of zeros was made and only the chunk written into it. The tokens in the other slots are still
    in the window: start from the ring that was handed in.

    of a long chunk the first W tokens kept
        window, end = → new = new[:, :, : ring.shape[2]]
            window, end =
    A chunk longer than the ring was cut to its *first* W tokens. What stays in a window is the end of the
    chunk, its last W.

    a long chunk's end in the slots of its beginning
        window, end = → new = new[:, :, -ring.shape[2] :]
            window, end =
    The last W tokens of a long chunk are right, but they were laid from start % W on, the slot of the chunk's
    first token. It is gone. The first that stays is at start + T − W: that is its position, and decides
    its slot.

    a long chunk laid from slot 0
        torch.arange(end - n, end) % window
            → torch.arange(end - n, end) % window if n < window else torch.arange(window)
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

    all tokens of a long chunk written at once
        torch.arange(end - n, end) % window → torch.arange(start, end) % window
        new[:, :, -n:] → new
    The values came out right, by luck: `ring[:, :, slots] = new` names slots more than once in a chunk longer
    than W, and torch does not define which of several tokens stays; on a GPU it is any of them. Only the last
    W tokens can stay: drop the others before you write.

    empty slots said to hold their own number
        return (newest - back).clamp(min=-1) → slots = torch.arange(window)
            return torch.where(slots < n_tokens, newest - back, slots)
    Before the first lap is over, slot s was said to hold position s whether it has been written or not.
    Attention would then take what lies there for tokens. A slot s ≥ n holds nothing: −1.

    empty slots said to hold position 0
        clamp(min=-1) → clamp(min=0)
    Empty slots say 0, and 0 is a position: that of the first token. So a mask made from positions lets them
    in. −1 is no position.

    in the order of time
        def held_positions(n_tokens, window):
            kept = list(range(max(0, n_tokens - window), n_tokens))
            return kept + [-1] * (window - len(kept))
    These are the right positions, oldest first, but not in the order of the slots: after n tokens the oldest
    lies in slot n % W. To take slot s for the s-th oldest gives each key another's position.

    the slot's number for its position
        return (newest - back).clamp(min=-1) → slots = torch.arange(window)
            return torch.where(slots < n_tokens, slots, -1)
    The positions start over with every lap: a slot's number was given, 0 … W − 1. RoPE and the mask need
    where the token is in the whole sequence.

    one token ahead: n for n − 1
        newest = n_tokens - 1 → newest = n_tokens
    n was taken for the newest position. After n tokens the newest is at n − 1, and slot n % W still holds
    the oldest.

    one token behind
        newest = n_tokens - 1 → newest = max(n_tokens - 1, 0) - 1
    This is the ring before its last token was written. After n tokens, positions 0 … n − 1 have been written,
    n − 1 among them.

    the present lap for all slots
        return (newest - back).clamp(min=-1) → lap, slots = n_tokens // window * window, torch.arange(window)
            return lap + slots if lap else torch.where(slots < n_tokens, slots, -1)
    (n // W) · W + s for every slot: the slots that this lap has not reached yet get positions of the future.
    They hold tokens of the lap before, W less.

    the slots of the lap before called empty
        return (newest - back).clamp(min=-1) → lap = newest // window * window + torch.arange(window)
            return torch.where(lap < n_tokens, lap, -1)
    Slots that the present lap has not reached yet were given −1. They are not empty: the tokens of the lap
    before are in them, and still in the window. Only in the first lap is there nothing before.

    a negative number that is not −1
        (newest - back).clamp(min=-1) → newest - back
    Filled slots are right. For an empty one the formula goes on counting back, to a position before the first
    token, −2 or −5. That there is none is said by −1, and by nothing else: whatever is below 0 becomes −1.
    """,
    put=put,
    span=span,
)


# 04.3: Prefill over the edge of the window


prefill.mistakes(
    r"""
    trimmed to W keys before attending
        (distance < window) → (torch.cat((past, new)) >= start + T - window)
    Past and chunk were cut to the last W keys (or the chunk was written into the ring) before the chunk
    attended. Those are the keys of the *last* token; the ones before it look further back, and the first of a
    long chunk find nothing. For one token it is right, so decode hides it. Attend first, then drop.

    the ring read in the order of its slots
        ring_k[:, :, past % window] → ring_k[:, :, : len(past)]
        ring_v[:, :, past % window] → ring_v[:, :, : len(past)]
    The ring's slots were put before the chunk as they lie, and the mask took them for the order of time.
    After start tokens the oldest lies in slot start % W, so the mask hides the wrong ones. Either bring them
    into order (`torch.arange(start - W, start) % W`), or make the mask from the position in each slot.

    values in another order than the keys
        ring_v[:, :, past % window] → ring_v[:, :, : len(past)]
    The keys were brought into the order of time and the values left in that of the slots, so that a key's
    weight falls on another token's value. Whatever is done to one must be done to the other.

    no window: everything held may be seen
        (distance >= 0) & (distance < window) → distance >= 0
    The mask is causal and nothing more. The later tokens of a chunk then see more than W: the whole ring and
    the chunk up to themselves. For one token behind a full ring it is off by one key, the oldest.

    a window over the ring, none within the chunk
        (distance < window) → ((distance < window) | (torch.cat((past, new)) >= start))
    The window hides old tokens of the ring, but within the chunk every token sees all before it. As long as T
    ≤ W that is the same; in a longer chunk the window ends inside it.

    the whole ring for every token of the chunk
        (distance < window) → ((distance < window) | (torch.cat((past, new)) < start))
    The window holds within the chunk, but the ring's tokens may be seen by all of it. Each token of the chunk
    pushes the oldest one out of its window: the first sees W − 1 of the ring, the next W − 2.

    one key too many: W + 1
        distance < window → distance <= window
    Each token sees W keys and itself besides: position ≥ own − W where > is meant. W counts the token itself.
    The ring holds W tokens *before* the chunk, and the oldest of them is in no window any more.

    one key too few: W − 1
        distance < window → distance < window - 1
    The window ends one key early. W counts the token itself, so it sees W − 1 others: position > own − W.

    the past not seen
        (distance < window) → (distance < window) & (torch.cat((past, new)) >= start)
    The chunk attended to itself alone. That is right for the first chunk; behind a past each token still sees
    those of the ring that are in its window.

    the future visible
        (distance >= 0) & (distance < window) → distance < window
    The window's far edge is there, the causal one is not: each token sees the later ones of its chunk. With
    one token there are none, so decode is right.

    the mask aligned top-left
        distance = new[:, None] → distance = new[:, None] - start + max(0, start - window)
    The chunk's first query was put at the place of the oldest key (SDPA's is_causal=True does so too), and it
    sees that one and no other. The queries are the last T of the keys' positions.

    is_causal=True over ring and chunk
        ring_k[:, :, past % window] → ring_k
        ring_v[:, :, past % window] → ring_v
        attn_mask=(distance >= 0) & (distance < window) → is_causal=True
    SDPA's is_causal=True takes the T queries for the *first* positions of the keys: query i sees the keys 0 …
    i, which are slots of the ring. Here they are the last, and there is a window too: a mask of one's own is
    needed, from positions.

    empty slots attended
        max(0, start - window) → start - window
    Before W tokens have come, some slots hold nothing, and whatever lies there (zeros, or an earlier
    sequence) was taken for keys. A zero key is no empty key: its score is 0 and its weight is not. Only
    positions max(0, start − W) … start − 1 are in the ring.

    keys used as values
        (ring_v[:, :, past % window], v) → (ring_k[:, :, past % window], k)
    What was added up are the keys. They say how well a token fits; the output is a sum of values, those of
    the ring and of the chunk.

    no scale
        (distance < window)) → (distance < window), scale=1.0)
    The scores were not divided by √D, so the softmax is too sharp. The window changes nothing in the equation
    of attention: softmax(q kᵀ / √D) v.

    the chunk written first, then put behind the ring once more
        keys = → slots = new[-window:] % window
            ring_k[:, :, slots], ring_v[:, :, slots] = k[:, :, -window:], v[:, :, -window:]
            keys =
    The chunk went into the ring, and ring and chunk were joined to attend. What it wrote over is gone, and in
    its place are its own tokens, taken for older ones: they are seen twice. Attend to the ring as it was
    *before* the chunk.

    the ring not written
        ring_k[:, :, slots] = k[:, :, -window:] →
        ring_v[:, :, slots] = v[:, :, -window:] →
    The rings came back as they were, so the next step will not know of this chunk. After attending, its last
    W tokens go into their slots.

    of a long chunk the first W tokens kept
        new[-window:] → new[:window]
        k[:, :, -window:] → k[:, :, :window]
        v[:, :, -window:] → v[:, :, :window]
    Of a chunk longer than the ring its *first* W tokens were written. What stays in the window is its end,
    the last W.

    a long chunk's end in the slots of its beginning
        new[-window:] → new[:window]
    The last W tokens were written, but from start % W on, the slot of the chunk's first token. The first that
    stays is at start + T − W, and that decides its slot.

    the ring laid in the order of time
        slots = new[-window:] % window → n = min(keys.shape[2], window)
        ring_k[:, :, slots] = k[:, :, -window:] → ring_k[:, :, :n] = keys[:, :, -n:]
        ring_v[:, :, slots] = v[:, :, -window:] → ring_v[:, :, :n] = values[:, :, -n:]
    The last W keys of past and chunk were returned as they stood for attending, the oldest in slot 0. The
    next token goes to slot p % W, and there now lies one that is still in the window. Each token belongs in
    the slot of its position.

    the chunk's tail not wrapped
        slots = new[-window:] % window → slots = new[-window:][0] % window + torch.arange(min(T, window))
            fits = slots < window
        ring_k[:, :, slots] = k[:, :, -window:] → ring_k[:, :, slots[fits]] = k[:, :, -window:][:, :, fits]
        ring_v[:, :, slots] = v[:, :, -window:] → ring_v[:, :, slots[fits]] = v[:, :, -window:][:, :, fits]
    The chunk was written as one slice from its first slot on, and what reaches over the edge is lost. Each
    token has a slot of its own, position % W, and that goes on at slot 0.

    every chunk from slot 0
        new[-window:] % window → (new[-window:] - start) % window
    The slots were counted from the chunk's own beginning, i % W, as if start were 0. A token's slot follows
    from its position in the whole sequence, (start + i) % W.

    the values' ring not written
        ring_v[:, :, slots] = v[:, :, -window:] →
    The keys are in their ring and the values are not, so later tokens add up values of tokens that left long
    ago. Both rings are written alike.

    keys in the values' ring
        return out, ring_k, ring_v → return out, ring_k, ring_k
    The same ring came back twice, or the keys were written into both. Keys go into ring_k, values into
    ring_v.

    the rings exchanged
        return out, ring_k, ring_v → return out, ring_v, ring_k
    Both rings are right, and came back in the wrong order. Asked for is `(out, ring_k, ring_v)`, the keys
    before the values.

    all tokens of a long chunk written at once
        new[-window:] % window → new % window
        k[:, :, -window:] → k
        v[:, :, -window:] → v
    The rings came out right, by luck: `ring_k[:, :, slots] = k` names slots more than once in a chunk longer
    than W, and torch does not define which of several tokens stays; on a GPU it is any of them. Write the
    chunk's last min(T, W) tokens alone.
    """,
)


# 04.4: Sinks: tokens that stay, and a logit that takes


sinks.mistakes(
    r"""
    the sinks counted inside the window
        position - window → position - max(window - n_sinks, 1)
    The sinks were taken out of the W, which leaves W − n_sinks recent tokens. Here they come on top: W recent
    tokens, and n_sinks first ones besides. (StreamingLLM's "4 + 1020" is n_sinks = 4 and W = 1020 in these
    letters.)

    a sink inside the window counted twice
        [p for p in range(position + 1) if p < n_sinks or p > position - window]
            → [*range(min(n_sinks, position + 1)), *range(max(0, position + 1 - window), position + 1)]
    The sinks and the window were listed one after the other, and while the window still reaches over the
    first tokens these are there twice. In a softmax they would get twice their weight. A position has two
    reasons to be seen, and is seen once.

    no sinks
        p < n_sinks or p → p
    The window alone. As soon as the first tokens leave it, the heads that had put their surplus weight on
    them have nowhere to put it: StreamingLLM's finding is that perplexity breaks down just then.

    a longer window in place of sinks
        p < n_sinks or p > position - window → p > position - window - n_sinks
    These are the last W + n_sinks tokens. As many as there should be, but all of them move along: sinks are
    the first tokens of the *sequence* and stay for good.

    one sink only
        p < n_sinks → p < min(n_sinks, 1)
    Position 0 alone was kept. n_sinks says how many of the first tokens stay; one would do only for a model
    that was trained with a token made for it.

    one sink too many
        p < n_sinks → p <= n_sinks
    `p <= n_sinks` lets in n_sinks + 1 tokens, since positions count from 0: the sinks are 0 … n_sinks − 1.

    one key too few: W − 1
        position - window → position - window + 1
    The window ends one token early. W counts the token itself: positions position − W + 1 … position.

    one key too many: W + 1
        p > position → p >= position
    The window begins at position − W, which makes W + 1 tokens with the token itself. It begins at position −
    W + 1.

    the token itself left out
        range(position + 1) → range(position)
    A `range` ends before its second number, and so these positions end before the token itself. It has
    written its key before it attends: `range(…, position + 1)`.

    sinks that do not exist yet
        range(position + 1) → range(max(position + 1, n_sinks))
        p > position - window → position - window < p <= position
    The first n_sinks positions were listed even where the token is before some of them: it sees its own
    future. What is seen ends at the token itself, be it a sink or not.

    places in the cache in place of positions
        [p for p in → [i for i, p in enumerate(p for p in
        position - window] → position - window)]
    These are 0, 1, 2 … without the gap: how the kept tokens lie in the cache. StreamingLLM does turn its keys
    by such numbers; asked for is where the tokens are in the sequence, and the gap is real.

    the gap and not the tokens
        p < n_sinks or p > position - window → p >= n_sinks and p <= position - window
    These are the positions that are *not* seen: neither sinks nor in the window. Turn the condition round.

    positions below 0
        range(position + 1) → range(min(0, position - window + 1), position + 1)
    While fewer than W tokens have come, position − W + 1 is negative, and the list begins before the first
    token. There is nothing: `max(0, position - W + 1)`.

    the window listed before the sinks
        [p for → sorted([p for
        position - window] → position - window], key=lambda p: p <= position - window)
    The right positions, and not in the order asked for: ascending, so the sinks are in front of the window.

    the newest first
        position - window] → position - window][::-1]
    The right positions, counted back from the token. Asked for is the other order, ascending.

    the sink does nothing
        torch.cat((scores, sinks), dim=-1) → scores
    This is the ordinary softmax, its weights add up to 1. Perhaps the logit was added to every score, which a
    softmax does not notice, or the column was dropped and the rest normalised again, which undoes it. The
    logit belongs into the denominator and nowhere else.

    the sink's own column returned too
        [..., :S] →
    The weights have S + 1 columns. The sink has no key and no value: its share is what goes missing, so its
    column is left out of what is returned.

    the wrong column dropped
        (scores, sinks) → (sinks, scores)
    The logit was put at one end of the scores and a column dropped at the other: the sink's share is
    where a token's weight should be, and every weight belongs to its neighbour. Drop the column that you
    added.

    the sink added after the softmax
        torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :S]
            → scores.softmax(dim=-1) / (1 + sinks.exp())
    The softmax was finished, and then its weights were divided by 1 + exp(logit). So the sink takes the same
    share of every row, whatever the scores are. It has to compete with the scores: exp(logit) is added to Σ
    exp(score), in one denominator.

    the sink in the numerator
        return torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :S]
            → largest = torch.maximum(scores.amax(-1, keepdim=True), sinks)
            exp, sink = (scores - largest).exp(), (sinks - largest).exp()
            return (exp + sink) / (exp.sum(-1, keepdim=True) + sink)
    exp(logit) was added to each exp(score) as well. A key's weight then never falls to 0, hidden keys are
    seen too. The sink belongs into the denominator alone.

    no maximum subtracted
        return torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :S] → exp = scores.exp()
            return exp / (exp.sum(-1, keepdim=True) + sinks.exp())
    exp was taken of the numbers as they are. exp(89) is infinite in fp32, and ∞ / ∞ is NaN; exp(−104) is 0,
    and 0 / 0 is NaN. Subtract the largest of scores and logit from all of them first: nothing else changes.

    the maximum taken without the logit
        return torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :S]
            → largest = scores.amax(-1, keepdim=True)
            exp = (scores - largest).exp()
            return exp / (exp.sum(-1, keepdim=True) + (sinks - largest).exp())
    The largest *score* was subtracted from all. Where every key is hidden it is −∞, and −∞ − (−∞) is NaN; and
    a logit far above the scores would overflow. The logit is one of the numbers: take it into the maximum.

    the maximum subtracted from the scores, not from the logit
        return torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :S]
            → exp = (scores - scores.amax(-1, keepdim=True).clamp_min(-1e30)).exp()
            return exp / (exp.sum(-1, keepdim=True) + sinks.exp())
    The scores were lowered by their maximum and the logit was not. The two no longer have the same
    scale: the sink weighs exp(maximum) times too much. What is subtracted from one is subtracted from all.

    the logit itself, not its exp
        return torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :S]
            → exp = (scores - scores.amax(-1, keepdim=True).clamp_min(-1e30)).exp()
            return exp / (exp.sum(-1, keepdim=True) + sinks)
    The logit was added to the denominator as it is. It is a score, and a score enters as exp(score); as it is
    it may even be negative.

    the same sink for every head: a 1 in the denominator
        sink_logits.view(1, H, 1, 1) → torch.zeros(1, H, 1, 1)
    A 1 was added to the denominator, which is a logit of 0 for all ("softmax plus one"). Here each head has
    learned a logit of its own: exp(logit) in place of the 1.

    the first head's logit for all
        sink_logits.view(1, H, 1, 1) → sink_logits[:1].view(1, 1, 1, 1)
    Every head got the logit of head 0. There are H logits, one per head; to lay them over (B, H, T, S) they
    need the shape (1, H, 1, 1).

    all heads' logits in every denominator
        sink_logits.view(1, H, 1, 1) → sink_logits.logsumexp(0).view(1, 1, 1, 1)
    All H logits were put beside the scores of every head, as H more keys. A head has one sink, its own.

    the softmax over the queries
        expand(B, H, T, 1) → expand(B, H, 1, S)
        dim=-1).softmax(dim=-1)[..., :S] → dim=-2).softmax(dim=-2)[..., :T, :]
    The weights were divided among the queries, dimension −2. Each query divides its own weight among the keys
    and the sink: dimension −1.

    one maximum for the whole tensor
        return torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :S]
            → largest = torch.maximum(scores.max(), sink_logits.max())
            exp = (scores - largest).exp()
            return exp / (exp.sum(-1, keepdim=True) + (sinks - largest).exp())
    The largest of *all* scores and logits was subtracted. A row that lies far below it becomes exp(−600) = 0
    in every place, its sink too, and 0 / 0 is NaN. Each row has its own denominator, and takes its own
    maximum: over its keys and its head's logit, `amax(-1, keepdim=True)`.
    """,
)


# 04.5: How far back a stack of windows reaches


field.mistakes(
    r"""
    each layer reaches W further: L·W
        sum(window - 1 for window in windows) → sum(windows)
    Every layer was said to reach W tokens further back. The window counts the token itself, so it reaches W −
    1 back, and L layers L·(W − 1). Mistral's "about 131K" for 32 layers of 4096 is this rounding up: it is
    131,041 tokens, the token itself included.

    L·W tokens in all
        sum(window - 1 for window in windows) → sum(windows) - 1
    L·W tokens were counted, the token itself among them. It is in the window of every layer, but it is the
    same token: L·(W − 1) others, and itself once.

    the first one left out
        sum(window - 1 for window in windows) → max(sum(window - 1 for window in windows) - 1, 0)
    The farthest position is missing: the list begins one too late. At distance Σ(W − 1) a token is still
    reached; with the token itself these are Σ(W − 1) + 1 positions.

    one layer's window only
        sum(window - 1 for window in windows) → windows[-1] - 1
    This is what the token reads in one layer. What it reads there has itself read others, in the layer below:
    the windows add up over the layers.

    the widest window only
        sum(window - 1 for window in windows) → max(windows) - 1
    The largest window of all layers was taken. It is one step of the way; the other layers go on from where
    it arrives, so the windows add up.

    W − 1 halved: the middle of the window
        sum(window - 1 for window in windows) → sum((window - 1) // 2 for window in windows)
    Half of each window was counted, as for a window that is centred on its token. A decoder's window lies
    behind the token as a whole.

    positions before 0
        max(0, position - back) → position - back
    The list goes below position 0, where there is nothing. Near the start a token reaches all there is:
    `max(0, …)`.

    the token itself left out
        return [position] → return []
        range(first, position + 1) → range(first, position)
    A `range` ends before its second number, and so the token itself is missing. Nothing has more influence on
    it: even without any layer it is there.

    full layers not counted
        if not windows: → windows = [window for window in windows if window is not None]
            if not windows:
    The layers without a window were left out of the sum, as if they reached nothing. None means no window:
    such a layer reads everything up to the token.

    only a full layer at the top counts
        if not windows: → windows = [w for i, w in enumerate(windows) if w or i == len(windows) - 1]
            if not windows:
    A full layer was taken to help only if it is the last one. Further down it has collected everything for
    the tokens that the layers above it read, so the top token gets it all the same.

    only a full layer at the bottom counts
        if not windows: → windows = [w for i, w in enumerate(windows) if w or i == 0]
            if not windows:
    A full layer was taken to help only if it is the first one. Higher up it reads positions that no window
    would reach, each of which knows itself at least.

    a full layer reaches everything, the future too
        range(first, position + 1) → range(first, position + 1 + (len(windows) if None in windows else 0))
    With a full layer the list ran past the token itself. Full attention is causal as well: a token reads up
    to itself, in every layer.

    sinks not counted
        [*sinks, *range → [*range
    n_sinks was not looked at. The first n_sinks tokens are read from every position, however far it is.

    sinks seen without a layer
        if not windows: → if not windows and not n_sinks:
    The sinks were listed for a stack of no layers. It is a layer that sees the first n_sinks positions; with
    none, the output at a position is its input: the list holds that position alone.

    sinks fill the gap
        first = max → first = 0 if n_sinks else max
    With sinks everything was said to be reached. The sinks themselves are; but a sink has seen only what lies
    before it, so nothing of the gap comes through it. That is why sinks keep perplexity low and help no model
    to recall what left the window.

    sinks make every window longer
        sum(window - 1 for → sum(window + n_sinks - 1 for
        [*sinks, *range → [*range
    n_sinks was added to the windows. Sinks are more keys, but always the same ones at the very beginning:
    they do not move along, and the windows reach as far as before.

    new sinks in every layer
        min(n_sinks, first) → min(n_sinks * len(windows), first)
    L·n_sinks first positions. Every layer keeps the *same* first tokens, so they do not add up as windows do.

    sinks after the token
        [*sinks, *range(first, position + 1)] → sorted({*range(n_sinks), *range(first, position + 1)})
    All n_sinks first positions were listed for a token that is before some of them. What can have an
    influence on a token ends at the token.

    each layer carries W
        distance // (window - 1) → distance // window
    The distance was divided by W. The token itself is one of the W, so a layer carries W − 1 further: over
    131,071 tokens 32 layers of 4096 seem to be enough, and it takes 33.

    rounded down
        -(-distance // (window - 1)) → distance // (window - 1)
    So many layers stop short of it: the division was rounded down. A rest, however small, needs one layer
    more.

    one layer more even without a rest
        return 0 → return 1
        -(-distance // (window - 1)) → distance // (window - 1) + 1
    `distance // (W − 1) + 1` adds a layer where the division comes out even, and one for distance 0. (So does
    counting distance + 1 tokens.) Round up: `-(-distance // (W - 1))`.

    windows that multiply
        return -(-distance // (window - 1)) if window > 1 else None → layers = 0
            while window > 1 and window**layers - 1 < distance:
                layers += 1
            return layers or None
    The reach was taken to multiply from layer to layer, W, W², W³ … It does so in dilated convolutions, whose
    steps grow. Windows of equal width add up.

    W = 1 reaches further
        return -( → window = max(window, 2)
            return -(
    With W = 1 a number came back. Such a window holds the token itself and nothing else, in every layer, so
    nothing ever arrives from elsewhere: None.

    not rounded to whole layers
        return 0 → return 0.0
        -(-distance // (window - 1)) → distance / (window - 1)
    The quotient came back as it is, 5.1 layers or so. There is no tenth of a layer: round up to a whole
    number.

    one layer even for distance 0
        return 0 → return 1
    At least one layer was asked for. Over distance 0 there is nothing to carry: a token has an influence on
    itself without any.

    W = 1: None for distance 0 too
        if distance == 0: → if distance == 0 and window > 1:
    With W = 1 None was returned whatever the distance. A window of one does hold the token itself, so
    distance 0 needs no layer here either: ask for the distance first.

    the newest first
        range(first, position + 1)] → range(first, position + 1)][::-1]
    The right positions, counted back from the token. Asked for is the other order, ascending.
    """,
)


# 04.6: Stored and read: three models with windows


cache_bytes.mistakes(
    r"""
    read counted with all tokens, not min(length, W)
        tokens(length) → n_layers * length
    Every layer was said to read `length` tokens. A layer with a window has no more than W of them, and reads
    no more: min(length, W).

    stored counted with all tokens, not min(max_len, W)
        stored = tokens(max_len) → stored = n_layers * max_len
        1 - tokens(max_len) / (n_layers * max_len) → 0
    Every layer was given room for max_len tokens. That is what a window costs which is only a mask: what it
    hides is still stored. With a ring a local layer needs W slots and no more.

    the windows not looked at
        config["sliding_window"] → None
    All layers were counted as full ones. Those with a window store and read W tokens at most, and that is
    what the window is for.

    W tokens even where there are fewer
        min(n, window) → window
    W tokens were counted in the local layers even for a shorter context. As long as it is shorter than the
    window, such a layer stores and reads what a full one would: min(…, W).

    W tokens read before there are so many
        tokens(length) → tokens(max(length, min(max_len, window or 0)))
    The ring was read as a whole, all min(max_len, W) slots of it. While only `length` tokens have come, the
    rest is empty and need not be fetched.

    read taken for what there is room for
        tokens(length) * token → stored
    Read was set to stored. What is stored is room for max_len tokens, reserved at the start; a step fetches
    the tokens that are there, `length` of them.

    stored taken for what is there now
        n_layers, window = → max_len = length
            n_layers, window =
    Stored was counted for `length` tokens. The cache is allocated once, for max_len of them.

    W − 1 tokens in the ring
        n_local = → window = window and window - 1
            n_local =
    The local layers were given W − 1 slots. transformers keeps so many *between* steps, and adds the new
    token to them; a ring writes the new token first and holds all W that it may see.

    W + 1 tokens in the ring
        n_local = → window = window and window + 1
            n_local =
    The local layers were given W + 1 slots, W old ones and the new one. W counts the token itself.

    a window in every layer
        config.get("layer_types", ["sliding_attention"] * n_layers) → ["sliding_attention"] * n_layers
    layer_types was not looked at: the global layers were counted as if they had the window too. It is they
    that grow with the context, and soon they hold nearly all of the cache.

    local and global the wrong way round
        ["sliding_attention"] * n_layers → ["full_attention"] * n_layers
        types.count("sliding_attention") → types.count("full_attention")
    The full_attention layers were given the window, and the sliding_attention layers everything.

    no layer_types taken for no window
        ["sliding_attention"] * n_layers → ["full_attention"] * n_layers
    A config without layer_types was counted as if all its layers were full. Mistral 7B v0.1 has none because
    all its layers are alike: sliding_window holds for each of them.

    query heads in place of KV heads
        config["num_key_value_heads"] → config["num_attention_heads"]
    num_attention_heads counts the queries, which are used and forgotten. What stays are the keys and values
    of num_key_value_heads. (The share saved comes out right: there the heads cancel.)

    head_dim not looked up
        config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
            → config["hidden_size"] // config["num_attention_heads"]
    The head dim was taken as hidden_size / num_attention_heads. A config may choose it freely and say so in
    head_dim: gpt-oss has 64 where the division gives 45, Gemma 3 27B 128 in place of 168.

    half of it: keys only, or numbers for bytes
        batch * 2 * → batch *
    Every size is half of what it should be. Either the values are missing (a token leaves a key *and* a
    value), or numbers were counted where each takes 2 bytes.

    a quarter of it: keys only, and numbers for bytes
        batch * 2 * → batch *
        head_dim * 2 → head_dim
    Every size is a quarter. Two factors of 2 are missing: a token leaves a key and a value, and each number
    takes 2 bytes.

    four bytes per number
        head_dim * 2 → head_dim * 4
    Every size is twice too large: numbers of 4 bytes, as fp32 takes. The cache is kept in 16 bits here.

    one row of the batch
        token = batch * 2 → token = 2
    The batch is missing. Every row is a sequence of its own, with a cache of its own.

    one layer
        config["num_hidden_layers"] → 1
        ["sliding_attention"] * n_layers) → ["sliding_attention"])[:1]
    The layers are missing: this is what the first one stores and reads. Add up over all of them.

    GB for GiB
        2**30 → 1e9
    The bytes were divided by 10⁹, which gives GB. A GiB is 2³⁰ = 1,073,741,824 bytes, 7% more: a card of 80
    GB holds 74.5 GiB.

    the share that is left, not the share saved
        1 - tokens(max_len) → tokens(max_len)
    stored / full is what is left. Saved is the rest: 1 − stored / full.

    the saving in percent
        1 - tokens(max_len) → 100 - 100 * tokens(max_len)
    The saving was multiplied by 100. Asked for is the share itself, between 0 and 1.

    the saving in what is read
        1 - tokens(max_len) / (n_layers * max_len) → 1 - tokens(length) / (n_layers * length)
    This is the share that a step saves when it reads, at `length` tokens. Asked for is the share of the
    memory: stored, at max_len.

    read without the new token
        tokens(length) → tokens(length - 1)
    length − 1 tokens were read. `length` counts the new one, which is written before the step attends and
    read like the others.

    hidden_size divided by the KV heads
        // config["num_attention_heads"] → // config["num_key_value_heads"]
    Without head_dim, hidden_size was divided by num_key_value_heads. The width is cut into one piece for each
    *query* head, num_attention_heads; a KV head is as wide as one of those, there are only fewer.

    no window taken for a window of 0
        n_local = 0 if window is None else types.count → n_local = types.count
        (n_local * min(n, window) if n_local else 0) → n_local * min(n, window or 0)
    Where sliding_window is None the layers were counted with a window of no tokens, so they store and read
    nothing. None means that no layer has a window: they all keep everything.
    """,
)


# 04.7: A decode step over the ring


step.mistakes(
    r"""
    attended before it was written
        ring_k[rows, :, lengths % window] = k →
        ring_v[rows, :, lengths % window] = v →
        (lengths[:, None] - slots) % window → (lengths[:, None] - 1 - slots) % window + 1
        slots > lengths → slots >= lengths
        return torch.einsum("bhs,bhsd->bhd", weights, ring_v)
            → out = torch.einsum("bhs,bhsd->bhd", weights.nan_to_num(), ring_v)
            ring_k[rows, :, lengths % window] = k
            ring_v[rows, :, lengths % window] = v
            return out
    The ring was read as it was before this step: the new token does not see itself, and sees one that has
    just left its window. The very first token sees nothing. Write first, then attend.

    attended before it was written, with the mask of afterwards
        ring_k[rows, :, lengths % window] = k →
        ring_v[rows, :, lengths % window] = v →
        return torch.einsum("bhs,bhsd->bhd", weights, ring_v)
            → out = torch.einsum("bhs,bhsd->bhd", weights, ring_v)
            ring_k[rows, :, lengths % window] = k
            ring_v[rows, :, lengths % window] = v
            return out
    The ring was read before the new token was in it, and its slot was taken to be filled: what was read
    there is the token that has just left the window, or a leftover. Write first, then attend.

    attended before it was written, and 0 / 0 for the first token
        ring_k[rows, :, lengths % window] = k →
        ring_v[rows, :, lengths % window] = v →
        slots > lengths → slots >= lengths
        return torch.einsum("bhs,bhsd->bhd", weights, ring_v)
            → out = torch.einsum("bhs,bhsd->bhd", weights, ring_v)
            ring_k[rows, :, lengths % window] = k
            ring_v[rows, :, lengths % window] = v
            return out
    The ring was read as it was before this step: the new token does not see itself, and sees one that has
    just left its window; for the very first token every slot is hidden, and the output is NaN. Write first,
    then attend: then at least one slot is filled.

    W old tokens and the new one: W + 1
        rows, slots =
            → keys, values = torch.cat((ring_k, k[:, :, None]), 2), torch.cat((ring_v, v[:, :, None]), 2)
            rows, slots =
        q, ring_k) → q, keys)
        (lengths[:, None] - slots) % window → F.pad((lengths[:, None] - 1 - slots) % window + 1, (0, 1))
        slots > lengths[:, None] → F.pad(slots >= lengths[:, None], (0, 1))
        weights, ring_v) → weights, values)
    The new token was put beside the whole ring, and so the oldest, which it is about to write over, was seen
    once more: W + 1 keys. W counts the token itself. Until the ring is full there is no difference.

    empty slots attended
        scores.masked_fill(empty[:, None], -torch.inf) → scores
    All W slots were attended to, whatever they hold. Before a row has W tokens, some hold what an earlier
    sequence left. Slot s is filled where s ≤ length.

    empty slots set to zero, not hidden
        scores = torch.einsum → filled = (slots <= lengths[:, None])[:, None, :, None]
            scores = torch.einsum
        q, ring_k) → q, ring_k * filled)
        scores.masked_fill(empty[:, None], -torch.inf) → scores
        weights, ring_v) → weights, ring_v * filled)
    Keys and values of empty slots were set to 0. A key of zeros has the score 0, and exp(0) = 1 takes a share
    of the weight. A slot is hidden by a *score* of −∞.

    scores of empty slots set to zero
        -torch.inf → 0.0
    The scores of empty slots were multiplied by 0 (or the mask was added as ones and zeros). exp(0) is 1: an
    empty slot then has a weight like any other, and its leftover value is mixed in. Hidden means −∞.

    masked after the softmax
        scores.masked_fill(empty[:, None], -torch.inf).softmax(dim=-1)
            → scores.softmax(dim=-1).masked_fill(empty[:, None], 0.0)
    The weights of empty slots were set to 0 after the softmax had already given them their share: what is
    left adds up to less than 1. Hide the scores, with −∞, before the softmax.

    the new token hidden until the ring is full
        slots > lengths → slots >= lengths
        softmax(dim=-1) → softmax(dim=-1).nan_to_num()
    `s < length` hides slot `length`, where the new token has just been written. After this step a row holds
    length + 1 tokens: s ≤ length. In a full ring nothing is hidden, which conceals it.

    one empty slot seen
        slots > lengths[:, None] → slots > lengths[:, None] + 1
    `s <= length + 1` lets in the slot behind the new token, which is empty until the next step. With `length`
    tokens before it the new one lies in slot `length`: s ≤ length.

    the slots behind the pointer hidden
        slots > lengths[:, None] → slots > (lengths % window)[:, None]
    Slots with a larger number than the new token's were hidden, as if they were the future. In a ring that
    has turned, they hold the *older* tokens of the lap before. Compare positions, not slot numbers: once W
    tokens have come, every slot may be seen.

    no scale
        ring_k) * D**-0.5 → ring_k)
    The scores were not divided by √D, so the softmax is too sharp. The ring changes nothing in the equation
    of attention: softmax(q kᵀ / √D) v.

    keys used as values
        weights, ring_v) → weights, ring_k)
    What was added up are the keys. They say how well a token fits; the output is a sum of values.

    the pointer not wrapped
        rows, slots = → fits = lengths < window
            rows, slots =
        ring_k[rows, :, lengths % window] = k → ring_k[rows[fits], :, lengths[fits]] = k[fits]
        ring_v[rows, :, lengths % window] = v → ring_v[rows[fits], :, lengths[fits]] = v[fits]
    The slot was taken to be `length`, without % W, and a full ring took nothing any more: the new token is
    lost, and the oldest one stays for ever.

    past the end, always the last slot
        ring_k[rows, :, lengths % window] → ring_k[rows, :, lengths.clamp_max(window - 1)]
        ring_v[rows, :, lengths % window] → ring_v[rows, :, lengths.clamp_max(window - 1)]
    In a full ring every new token was written into slot W − 1: it replaces the newest but one, not the
    oldest. The next slot after the last is slot 0, length % W.

    off by one: the slot of the next token
        ring_k[rows, :, lengths % window] → ring_k[rows, :, (lengths + 1) % window]
        ring_v[rows, :, lengths % window] → ring_v[rows, :, (lengths + 1) % window]
    The token was written to (length + 1) % W. With `length` tokens before it the new one is at position
    `length`, since positions count from 0. In a full ring it replaces the oldest but one, and an empty slot
    is taken for filled before.

    off by one: lengths taken to count the new token
        B, H, D = → lengths = lengths - 1
            B, H, D =
        softmax(dim=-1) → softmax(dim=-1).nan_to_num()
    The new token was put at position length − 1, where the token before it is, and wrote over that one.
    `lengths` says how many tokens the row has seen *before* this one: it is at position `length`.

    off by one: counted on before the step
        B, H, D = → lengths = lengths + 1
            B, H, D =
    The lengths were raised by one and the new token put at length + 1: a slot too far, with an empty one left
    out before it. It is at position `length`; only afterwards has the row seen length + 1 tokens.

    one length for all rows
        B, H, D = → lengths = lengths.max().expand_as(lengths)
            B, H, D =
    The longest row's length was used for all. The shorter ones write to a slot that is not theirs, and see
    slots that they have not filled.

    the first row's length for all
        B, H, D = → lengths = lengths[:1].expand_as(lengths)
            B, H, D =
    lengths[0] was used for every row. Rows of a batch are different sequences: each has its own slot to write
    to and its own number of filled slots.

    one slot for all rows
        ring_k[rows, :, lengths % window] → ring_k[rows, :, lengths.max() % window]
        ring_v[rows, :, lengths % window] → ring_v[rows, :, lengths.max() % window]
    All rows wrote to the longest row's slot, though each hides its own empty slots. The slot, too, is a
    matter of the row: `ring[rows, :, lengths % W] = new`.

    every row's token in every row's slot
        ring_k[rows, :, lengths % window] = k → ring_k[:, :, lengths % window] = k[:, :, None]
        ring_v[rows, :, lengths % window] = v → ring_v[:, :, lengths % window] = v[:, :, None]
    `ring[:, :, lengths % W] = new[:, :, None]` writes each row's token into the slots of *all* rows, over
    tokens that are still in the window. One slot a row takes a row index too: `ring[rows, :, slots] = new`.

    the ring shifted
        ring_k[rows, :, lengths % window] = k → ring_k = torch.cat((ring_k[:, :, 1:], k[:, :, None]), dim=2)
        ring_v[rows, :, lengths % window] = v → ring_v = torch.cat((ring_v[:, :, 1:], v[:, :, None]), dim=2)
    Every token was moved down by a slot and the new one put last. For a full ring the output is right, but
    the whole window was copied, the tokens are no longer in the slots of their positions, and in a ring that
    is not full yet they are pushed out of the slots that count as filled.

    the rings not written
        B, H, D = → before = ring_k.clone(), ring_v.clone()
            B, H, D =
        ring_v), ring_k, ring_v → ring_v), *before
    The rings came back as they were, so the next step will not find this token. Return those into which it
    was written.

    the values' ring not written
        ring_v[rows, :, lengths % window] = v →
    The new key is in its ring and the new value is not: the weight of the new token falls on the value of the
    one that has left. Both rings are written alike.

    the penalty left out
        scores - slopes.view(1, H, 1) * distance[:, None] → scores
    `slopes` was not looked at. Where they are given, every score loses slope · distance before the softmax.

    distances in the order of the slots
        (lengths[:, None] - slots) % window → lengths[:, None] - slots
    The ring was read as if it lay in the order of time, slot s holding position s or the s-th oldest. Scores
    that depend on the distance then get another token's. In the first lap it is right; later the newest lies
    in slot length % W, and ages grow from there backwards, round the edge: (length − s) % W.

    the distance between slots, not round the edge
        (lengths[:, None] - slots) % window → ((lengths % window)[:, None] - slots).abs()
    |slot − the new token's slot|: on one side of the pointer that is the age, on the other it is not. What
    lies just behind the pointer is not new but the oldest of all. Ages run one way, round the edge: (length −
    s) % W.

    a reward for distance
        scores - slopes → scores + slopes
    slope · distance was added, so the oldest tokens win. It is taken away: score − slope · distance.

    the penalty scaled too
        slopes.view(1, H, 1) → slopes.view(1, H, 1) * D**-0.5
    The penalty was taken off before the division by √D, which makes it √D times weaker. Scores are scaled
    first: q kᵀ / √D − slope · distance.

    the first head's slope for all
        slopes.view(1, H, 1) → slopes[:1].view(1, 1, 1)
    Every head got slope 0's. There are H slopes, one per head; over scores of (B, H, W) they need the shape
    (1, H, 1).

    ages that run the wrong way round
        lengths[:, None] - slots → slots - lengths[:, None]
    (s − length) % W counts from the new token *forwards*, where the oldest lie. The token one slot back is
    one step old: (length − s) % W.
    """,
)
