"""Unit 04: requirements and hints of the exercises on the sliding window."""

from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.grading import (
    Answer,
    CheckContext,
    Difference,
    Exercise,
    Stop,
    compare,
    describe,
    undefined_writes,
)

Rings = tuple[Tensor, Tensor]


def held(n_tokens: int, window: int) -> list[int]:
    """The position in each slot, found by writing one token after the other; -1 where a slot is empty."""
    slots, pointer = [-1] * window, 0
    for position in range(n_tokens):
        slots[pointer] = position
        pointer = 0 if pointer == window - 1 else pointer + 1
    return slots


def whole_numbers(got: Any) -> list[int] | None:
    """Of a list, tuple, range, array or tensor, or of a list of tensors of one number; None otherwise."""
    if isinstance(got, Tensor | np.ndarray):
        if got.ndim != 1:
            return None
        got = got.tolist()
    if not isinstance(got, list | tuple | range):
        return None
    numbers = [part.item() if isinstance(part, Tensor) and part.ndim == 0 else part for part in got]
    if not all(isinstance(i, Integral) and not isinstance(i, bool) for i in numbers):
        return None
    return [int(i) for i in numbers]


def ring_of(t: CheckContext, x: Tensor, window: int) -> Tensor:
    """The ring after the tokens of x (B, H, n, D); in empty slots lies what an earlier sequence left."""
    B, H, n, D = x.shape
    ring = t.randn(B, H, window, D, dtype=x.dtype)
    for slot, position in enumerate(held(n, window)):
        if position >= 0:
            ring[:, :, slot] = x[:, :, position]
    return ring


def windowed(q: Tensor, k: Tensor, v: Tensor, window: int, first: int = 0) -> Tensor:
    """Attention of q (B, H, T, D), which are at ``first`` and after, one token at a time."""
    outs = []
    for i in range(q.shape[2]):
        seen = slice(max(0, first + i + 1 - window), first + i + 1)
        outs.append(F.scaled_dot_product_attention(q[:, :, i : i + 1], k[:, :, seen], v[:, :, seen]))
    return torch.cat(outs, dim=2)


def three(t: CheckContext, got: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The returned value, split into the output and two rings, or the end of this round."""
    if isinstance(got, tuple | list) and len(got) == 3 and all(isinstance(part, Tensor) for part in got):
        return got[0], got[1], got[2]
    t.note(got, Difference("", "three tensors, (out, ring_k, ring_v)", describe(got)))
    raise Stop


def same_rings(t: CheckContext, got: Rings, want: Rings, filled: Tensor) -> None:
    """Both rings hold the same in the slots where ``filled`` (B or 1, W) is True; what else lies there counts
    for nothing."""
    for name, ring, right in zip(("ring_k:", "ring_v:"), got, want, strict=True):
        if t.shape(ring, tuple(right.shape), name):
            blank = ~filled[:, None, :, None]
            t.close(ring.masked_fill(blank, 0), right.masked_fill(blank, 0), name)


def defined(t: CheckContext, found: list[str]) -> None:
    """No indexed write gave one slot to several tokens: which of them stays there is not defined."""
    if found:
        came = f"{found[0]} writes several tokens to one slot at once, and which of them stays is not defined"
        t.note("a slot written twice", Difference("", "one token for each slot in an indexed write", came))


# 04.1: the mask of a window behind a cache, compared with a loop over pairs of positions

mask = Exercise(
    id="04.1",
    slug="mask",
    title="The mask of a sliding window",
    answers=("window_mask",),
    hints=(
        "Two conditions for each pair: the key is not in the future, and it is not too far back. Write down "
        "the positions first: keys are at 0 … S − 1, queries at S − T … S − 1.",
        "The distance of a pair is query position − key position. Itself is at distance 0, so a window of "
        "W tokens that counts the token itself reaches to distance W − 1.",
        "`distance = queries[:, None] - keys[None, :]` is (T, S); the mask is `(distance >= 0) & (distance "
        "< window)`. W larger than S and T = 1 need no case of their own.",
    ),
)


def mask_reference(n_queries: int, n_keys: int, window: int) -> Tensor:
    """For each query the keys it sees, counted back from itself."""
    mask = torch.zeros(n_queries, n_keys, dtype=torch.bool)
    for row in range(n_queries):
        key = n_keys - n_queries + row
        for _ in range(window):
            if key >= 0:
                mask[row, key] = True
            key -= 1
    return mask


def mask_same(t: CheckContext, got: object, T: int, S: int, window: int) -> None:
    """The right pairs are marked, be the mask of ones and zeros, of 0 and −∞, of numpy, or with dimensions of
    size 1 in front: those cost the point for the form and no other."""
    mask = torch.as_tensor(got) if isinstance(got, np.ndarray) else got
    if isinstance(mask, Tensor) and not mask.is_complex() and mask.numel() == T * S:
        mask = mask.squeeze(tuple(range(mask.ndim - 2))) if mask.ndim > 2 else mask
        additive = mask.dtype.is_floating_point and not (mask > 0).any()
        mask = mask == 0 if additive else mask.bool()
    t.note(mask, compare(mask, mask_reference(T, S, window)))


@mask.requirement(1, "a boolean mask, (T, S)")
def mask_form(t: CheckContext, window_mask: Answer) -> None:
    """dtype bool and two dimensions, a row for each query and a column for each key"""
    T = t.integer(3, 6)
    S = T + t.integer(3, 9)
    t.form(window_mask(T, S, t.integer(2, 5)), (T, S), torch.bool)


@mask.requirement(1, "a whole prompt, T = S")
def square(t: CheckContext, window_mask: Answer) -> None:
    """each token sees the last W up to itself, the first ones fewer: a band below the diagonal"""
    window = t.integer(3, 5)
    n = window + t.integer(3, 6)
    mask_same(t, window_mask(n, n, window), n, n, window)


@mask.requirement(1, "a chunk behind a cache, 1 < T < S")
def mask_chunk(t: CheckContext, window_mask: Answer) -> None:
    """the same band, T rows that are the last of the S positions"""
    T, window = t.integer(3, 6), t.integer(3, 5)
    S = T + window + t.integer(1, 4)
    mask_same(t, window_mask(T, S, window), T, S, window)


@mask.requirement(1, "one token in decode, T = 1")
def decode(t: CheckContext, window_mask: Answer) -> None:
    """the newest token sees the last W keys, all of them while there are fewer than W, itself at S = 1"""
    window = t.integer(3, 5)
    # The first S is no multiple of W: at the end of a block of W the block is the window.
    for S in (window + t.integer(1, window - 1), window - 1, 1):
        mask_same(t, window_mask(1, S, window), 1, S, window)


@mask.requirement(1, "the narrowest window and the widest")
def mask_limits(t: CheckContext, window_mask: Answer) -> None:
    """W = 1: each token sees itself alone; W = S and W > S: the causal mask"""
    T = t.integer(3, 6)
    S = T + t.integer(3, 6)
    for window in (1, S, S + t.integer(2, 5)):
        mask_same(t, window_mask(T, S, window), T, S, window)


# 04.2: the ring buffer, compared with a pointer that goes from slot to slot

ring = Exercise(
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


def same_ring(t: CheckContext, write_ring: Answer, window: int, start: int, *chunks: int) -> None:
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


def ring_same_positions(t: CheckContext, held_positions: Answer, n_tokens: int, window: int) -> None:
    """Whole numbers, one per slot."""
    got: Any = held_positions(n_tokens, window)
    numbers = whole_numbers(got)
    if numbers is None:
        t.true(False, "whole numbers, one per slot", describe(got))
        raise Stop
    want = torch.tensor(held(n_tokens, window))
    t.close(torch.tensor(numbers, dtype=torch.int64), want, f"after {n_tokens} tokens:")


@ring.requirement(1, "write_ring: before the ring is full")
def ring_filling(t: CheckContext, write_ring: Answer, held_positions: Answer) -> None:
    """token p in slot p, also for a chunk that continues others; the other slots stay as they are"""
    window = t.integer(6, 9)
    first = t.integer(2, 3)
    same_ring(t, write_ring, window, 0, first, 1, t.integer(1, window - first - 2))


@ring.requirement(1, "write_ring: one token at a time, lap after lap")
def single(t: CheckContext, write_ring: Answer, held_positions: Answer) -> None:
    """token p in slot p % W, over the token that was there"""
    window = t.integer(4, 7)
    start = window * t.integer(2, 5) - 2
    same_ring(t, write_ring, window, start, 1, 1, 1, 1)


@ring.requirement(1, "write_ring: a chunk across the edge")
def across(t: CheckContext, write_ring: Answer, held_positions: Answer) -> None:
    """T ≤ W tokens of which the first are before the edge and the rest behind it; also exactly W"""
    window = t.integer(6, 9)
    T = t.integer(4, window - 1)
    n_laps = 1 if t.round == 0 else t.integer(2, 3)
    same_ring(t, write_ring, window, window * n_laps - t.integer(2, T - 1), T)
    same_ring(t, write_ring, window, window * t.integer(1, 3) + t.integer(2, window - 2), window)


@ring.requirement(1, "write_ring: a chunk longer than W")
def long(t: CheckContext, write_ring: Answer, held_positions: Answer) -> None:
    """the last W tokens, each in its own slot, as if they had come one at a time; an indexed write names no
    slot twice"""
    window = t.integer(4, 6)
    start = window * t.integer(0, 3) + t.integer(1, window - 1)
    rest = t.integer(1, window - 1)
    T = window * t.integer(1, 3) + rest
    # The slot of the first token that stays is no slot of the chunk's first one, nor slot 0.
    if (start + T) % window == 0:
        start += 1 if (start + 1) % window else 2
    with undefined_writes() as found:
        same_ring(t, write_ring, window, start, T)
    defined(t, found)


@ring.requirement(1, "held_positions: before the ring is full")
def empty(t: CheckContext, write_ring: Answer, held_positions: Answer) -> None:
    """slot s holds position s, the rest −1; all are −1 after 0 tokens, and none after W"""
    window = t.integer(5, 8)
    for n in (0, t.integer(2, window - 2), window):
        ring_same_positions(t, held_positions, n, window)


@ring.requirement(1, "held_positions: after many laps")
def laps(t: CheckContext, write_ring: Answer, held_positions: Answer) -> None:
    """the newest position p ≤ n − 1 with p % W = s, in the order of the slots"""
    window = t.integer(5, 8)
    for n in (window + 1, window * t.integer(2, 9) + t.integer(2, window - 2), window * t.integer(3, 9)):
        ring_same_positions(t, held_positions, n, window)


# 04.3: a chunk that goes over the edge of the window, compared with attention token by token

prefill = Exercise(
    id="04.3",
    slug="prefill",
    title="Prefill over the edge of the window",
    answers=("window_prefill",),
    hints=(
        "Attend first, write afterwards. The chunk's first token still needs keys that its last token will "
        "write over, so nothing may be dropped before all have attended.",
        "Which tokens are in the ring? The positions max(0, start − W) … start − 1. Position p lies in slot "
        "p % W, so `ring_k[:, :, torch.arange(max(0, start - W), start) % W]` brings them into the order of "
        "time, and leaves the empty slots out.",
        "Put the chunk behind them: keys at positions max(0, start − W) … start + T − 1, in order. Key and "
        "query positions give the mask of 04.1, (T, number of keys).",
        "Afterwards only the chunk's last min(T, W) tokens go into the ring, each to its own slot: those at "
        "positions `torch.arange(start + T - n, start + T)` with n = min(T, W), at `% W`.",
    ),
)


class Sequence:
    """Tokens of which the first ``start`` are past and the rest is the chunk."""

    def __init__(self, t: CheckContext, start: int, T: int, window: int) -> None:
        B, H, D = t.pick(2, 3), t.pick(5, 7), 16
        self.t, self.start, self.window, self.n = t, start, window, start + T
        self.q, self.k, self.v = (t.randn(B, H, self.n, D) for _ in range(3))
        self.rings = [ring_of(t, x[:, :, :start], window) for x in (self.k, self.v)]

    def run(self, window_prefill: Answer) -> tuple[Tensor, Tensor, Tensor]:
        new = (x[:, :, self.start :] for x in (self.q, self.k, self.v))
        return three(self.t, window_prefill(*new, *self.rings, self.start))

    def compare_out(self, window_prefill: Answer) -> None:
        out, _, _ = self.run(window_prefill)
        want = windowed(self.q[:, :, self.start :], self.k, self.v, self.window, self.start)
        self.t.close(out, want, "out:", tolerance=1e-3)

    def compare_rings(self, window_prefill: Answer) -> None:
        with undefined_writes() as found:
            _, *rings = self.run(window_prefill)
        defined(self.t, found)
        filled = torch.tensor(held(self.n, self.window))[None] >= 0
        want = [ring_of(self.t, x, self.window) for x in (self.k, self.v)]
        same_rings(self.t, (rings[0], rings[1]), (want[0], want[1]), filled)


@prefill.requirement(1, "a short prompt, T ≤ W")
def prefill_short(t: CheckContext, window_prefill: Answer) -> None:
    """out of an empty ring: each token sees itself and all before it; what lies in empty slots counts for
    nothing"""
    window = t.integer(5, 8)
    Sequence(t, 0, window if t.round == 0 else t.integer(2, window - 1), window).compare_out(window_prefill)


@prefill.requirement(1, "a prompt longer than the window")
def long_prompt(t: CheckContext, window_prefill: Answer) -> None:
    """out of an empty ring, T > W: each token sees its own last W, the early ones too"""
    window = t.integer(4, 6)
    Sequence(t, 0, window + t.integer(3, 9), window).compare_out(window_prefill)


@prefill.requirement(1, "a chunk behind a past, T ≤ W")
def prefill_chunk(t: CheckContext, window_prefill: Answer) -> None:
    """out behind a ring that has turned, and behind one that is not full yet; also for a single token"""
    window = t.integer(5, 8)
    T = 1 if t.round == 1 else t.integer(3, window)
    for start in (window * t.integer(1, 3) + t.integer(2, window - 2), t.integer(2, window - 2)):
        Sequence(t, start, T, window).compare_out(window_prefill)


@prefill.requirement(2, "a chunk longer than the window, behind a past")
def long_chunk(t: CheckContext, window_prefill: Answer) -> None:
    """out for T > W: the first tokens see the ring, the last ones see the chunk alone"""
    window = t.integer(4, 6)
    start = window * t.integer(1, 3) + t.integer(2, window - 2)
    Sequence(t, start, window + t.integer(2, 7), window).compare_out(window_prefill)


@prefill.requirement(1, "the ring afterwards")
def prefill_ring(t: CheckContext, window_prefill: Answer) -> None:
    """the last W tokens of all, keys and values, each in slot p % W; after short and long chunks; an indexed
    write names no slot twice"""
    window = t.integer(5, 7)
    start = window * t.integer(1, 3) + t.integer(2, window - 2)
    rest = t.pick(*(n for n in range(1, window) if (start + n) % window))
    for before, T in (
        (0, t.integer(2, window - 1)),
        (start, t.integer(3, window - 1)),
        (start, window + rest),
    ):
        Sequence(t, before, T, window).compare_rings(window_prefill)


# 04.4: kept first tokens, compared with a loop over positions; the learned sink, against one key more

sinks = Exercise(
    id="04.4",
    slug="sinks",
    title="Sinks: tokens that stay, and a logit that takes",
    answers=("seen", "sink_softmax"),
    hints=(
        "seen: there are two reasons to be seen, being among the first n_sinks or being among the last W. Go "
        "through the positions 0 … position and keep each that has one of the two: none is listed twice.",
        "sink_softmax: think of one more key, the same for every query of a head, whose score is the head's "
        "logit and whose value is 0. It takes a share of the weight and adds nothing.",
        "So put the logit beside the scores as one more column, `sink_logits.view(1, H, 1, 1).expand(B, H, "
        "T, 1)`, take the softmax over S + 1 numbers, and return all columns but that one. Don't normalise "
        "again.",
        "torch's softmax subtracts the largest number before exp. By hand: m is the largest of the scores "
        "*and the logit*; weights = exp(scores − m) / (exp(scores − m).sum() + exp(logit − m)).",
    ),
)


def positions_seen(position: int, window: int, n_sinks: int) -> list[int]:
    """One after the other, with the two reasons."""
    return [p for p in range(position + 1) if p < n_sinks or position - p < window]


def sinks_same_positions(t: CheckContext, seen: Answer, position: int, window: int, n_sinks: int) -> None:
    """Whole numbers, ascending."""
    got: Any = seen(position, window, n_sinks)
    numbers = whole_numbers(got)
    if numbers is None:
        t.true(False, "a list of positions, ascending", describe(got))
        raise Stop
    want = torch.tensor(positions_seen(position, window, n_sinks))
    what = f"from position {position}, W = {window}, {n_sinks} sinks:"
    t.close(torch.tensor(numbers, dtype=torch.int64), want, what)


def weights(scores: Tensor, sinks: Tensor) -> Tensor:
    """In double precision: the share of each key, where one more key has the logit for its score."""
    column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
    return (
        (scores.double() - torch.cat((scores.double(), column), -1).logsumexp(-1, keepdim=True)).exp().float()
    )


def sinks_draw(t: CheckContext, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scores (B, H, T, S), some of them hidden, and a logit for each head."""
    B, H, T, S, _ = t.sizes()
    scores = spread * t.randn(B, H, T, S)
    return scores.masked_fill(~t.mask(T, S), -torch.inf), spread * (t.randn(H) + 0.5)


@sinks.requirement(1, "seen: far behind the sinks")
def far(t: CheckContext, seen: Answer, sink_softmax: Answer) -> None:
    """the first n_sinks positions, a gap, and the last W: n_sinks + W positions"""
    n_sinks, window = t.integer(2, 4), t.integer(5, 8)
    sinks_same_positions(t, seen, n_sinks + window + t.integer(3, 30), window, n_sinks)
    sinks_same_positions(t, seen, 1_000 + t.integer(0, 99), window, n_sinks)


@sinks.requirement(1, "seen: the window still over the sinks")
def near(t: CheckContext, seen: Answer, sink_softmax: Answer) -> None:
    """every position so far, once: a sink inside the window is not counted twice"""
    n_sinks, window = t.integer(3, 5), t.integer(7, 10)
    sinks_same_positions(t, seen, window + t.integer(0, n_sinks - 2), window, n_sinks)
    sinks_same_positions(t, seen, t.integer(n_sinks, window - 2), window, n_sinks)


@sinks.requirement(1, "seen: the first tokens, and no sinks")
def sinks_limits(t: CheckContext, seen: Answer, sink_softmax: Answer) -> None:
    """nothing behind the token itself, be it a sink; with n_sinks = 0 the window of 04.1"""
    n_sinks, window = t.integer(3, 5), t.integer(6, 9)
    sinks_same_positions(t, seen, t.integer(0, n_sinks - 2), window, n_sinks)
    sinks_same_positions(t, seen, window + t.integer(3, 20), window, 0)


@sinks.requirement(1, "sink_softmax: a logit for each head")
def ordinary(t: CheckContext, seen: Answer, sink_softmax: Answer) -> None:
    """exp(score) / (Σ exp(score) + exp(logit)), (B, H, T, S): the weights add up to less than 1"""
    scores, sinks = sinks_draw(t)
    t.close(sink_softmax(scores, sinks), weights(scores, sinks))
    t.unchanged()


@sinks.requirement(1, "sink_softmax: large scores and large logits")
def large(t: CheckContext, seen: Answer, sink_softmax: Answer) -> None:
    """the same around +300 and around −300, where exp overflows or gives 0, in scores and logits alike; also
    with heads and rows that far apart in one tensor"""
    scores, sinks = sinks_draw(t)
    for shift in (300.0, -300.0):
        t.close(sink_softmax(scores + shift, sinks + shift), weights(scores, sinks), tolerance=1e-3)
    # A head at +300 and the next at −300, and within a head rows that far from others.
    apart = 300.0 * (1 - 2 * (torch.arange(len(sinks)) % 2))
    scores, sinks = scores + apart[:, None, None], sinks + apart
    t.close(sink_softmax(scores, sinks), weights(scores, sinks), "heads far apart:", tolerance=1e-3)
    scores, sinks = torch.cat((scores, scores - 300.0), dim=2), sinks - 300.0
    t.close(sink_softmax(scores, sinks), weights(scores, sinks), "rows far apart:", tolerance=1e-3)


@sinks.requirement(1, "sink_softmax: a row with every key hidden")
def hidden(t: CheckContext, seen: Answer, sink_softmax: Answer) -> None:
    """weights of 0, not NaN: all of it goes to the sink; the other rows as ever"""
    scores, sinks = sinks_draw(t)
    scores[t.pick(0, 1), t.pick(0, 1, 2), 0] = -torch.inf
    t.close(sink_softmax(scores, sinks), weights(scores, sinks))


# 04.5: which tokens can have an influence, compared with a walk from layer to layer

field = Exercise(
    id="04.5",
    slug="field",
    title="How far back a stack of windows reaches",
    answers=("reach", "layers_needed"),
    hints=(
        "Walk down from the top. The token at t reads, in the last layer, positions t − W + 1 … t. Each of "
        "those has read W − 1 further back in the layer below. So every layer adds W − 1, not W.",
        "The first position is t − Σ(W − 1), cut off at 0. One full layer anywhere reaches everything: what "
        "is read through it comes from all positions up to the reader's own.",
        "A sink is seen from everywhere behind it, in every layer. But what the sink itself has seen lies at "
        "or before it, so sinks add the first n_sinks positions and nothing of the gap.",
        "layers_needed is the division that is rounded up: the least L with L · (W − 1) ≥ distance, `-(-"
        "distance // (window - 1))`. With W = 1 no number of layers is enough, but for distance 0.",
    ),
)


Windows = list[int | None]


def reachable(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """Down from the top, layer by layer: all that any of the positions so far reads."""
    reached = {position}
    for window in reversed(windows):
        below = set()
        for reader in reached:
            for p in range(reader + 1):
                if window is None or reader - p < window or p < n_sinks:
                    below.add(p)
        reached = below
    return sorted(reached)


def least_layers(distance: int, window: int) -> int | None:
    """Layers are added until it is reached."""
    if distance and window == 1:
        return None
    layers, far = 0, 0
    while far < distance:
        layers, far = layers + 1, far + window - 1
    return layers


def same_reach(t: CheckContext, got: Any, want: list[int]) -> None:
    """Whole numbers, ascending."""
    numbers = whole_numbers(got)
    if numbers is None:
        t.true(False, "a list of positions, ascending", describe(got))
        raise Stop
    t.close(torch.tensor(numbers, dtype=torch.int64), torch.tensor(want), "the positions:")


@field.requirement(1, "reach: equal windows")
def equal(t: CheckContext, reach: Answer, layers_needed: Answer) -> None:
    """L layers of window W: L·(W − 1) + 1 positions, the last of them the token itself"""
    n_layers, window = t.integer(3, 5), t.integer(3, 6)
    position = n_layers * window + window**2 + t.integer(5, 20)
    windows: Windows = [window] * n_layers
    same_reach(t, reach(position, windows), reachable(position, windows))


@field.requirement(1, "reach: other windows, and near the start")
def mixed(t: CheckContext, reach: Answer, layers_needed: Answer) -> None:
    """windows that differ from layer to layer add up; nothing lies before position 0; W = 1 adds nothing"""
    windows: Windows = [t.integer(2, 5), t.integer(6, 9), 1, t.integer(3, 4)]
    t.random.shuffle(windows)
    for position in (sum(w or 0 for w in windows) + t.integer(10, 90), t.integer(2, 5)):
        same_reach(t, reach(position, windows), reachable(position, windows))


@field.requirement(1, "reach: windows and full layers")
def field_full(t: CheckContext, reach: Answer, layers_needed: Answer) -> None:
    """one full layer (None), wherever it is, and every position up to the token's own is reached"""
    window = t.integer(3, 5)
    n_layers = t.integer(4, 6)
    middle = t.integer(1, n_layers - 2)
    for place in (n_layers - 1, 0, middle):
        windows: Windows = [window] * n_layers
        windows[place] = None
        position = n_layers * window + t.integer(5, 30)
        same_reach(t, reach(position, windows), reachable(position, windows))


@field.requirement(1, "reach: with sinks")
def field_sinks(t: CheckContext, reach: Answer, layers_needed: Answer) -> None:
    """the first n_sinks positions and the stack's own reach, the gap between them stays; nothing after the
    token"""
    n_layers, window, n_sinks = t.integer(3, 4), t.integer(3, 5), t.integer(2, 4)
    windows: Windows = [window] * n_layers
    for position in (n_layers * (window + n_sinks) + n_sinks + t.integer(9, 30), t.integer(0, n_sinks - 2)):
        same_reach(t, reach(position, windows, n_sinks), reachable(position, windows, n_sinks))


@field.requirement(1, "layers_needed")
def needed(t: CheckContext, reach: Answer, layers_needed: Answer) -> None:
    """the least number of layers of window W that carry something over the distance; an exact multiple of W −
    1 needs no layer more"""
    window = t.integer(4, 64)
    layers = t.integer(3, window - 1 if window < 9 else 9)
    for distance in (layers * (window - 1), layers * (window - 1) + 1, (layers + 1) * (window - 1) - 1):
        t.number(layers_needed(distance, window), least_layers(distance, window) or 0, f"over {distance}:")
    t.number(layers_needed(131_071, 4096), 33, "over 131,071 by windows of 4096:")


@field.requirement(1, "the limits")
def field_limits(t: CheckContext, reach: Answer, layers_needed: Answer) -> None:
    """no layer, or W = 1 in all: the token itself alone; sinks are seen through a layer, so without one they
    are not reached; distance 0 needs no layer, and with W = 1 any other is never reached: None"""
    position = t.integer(3, 30)
    for windows in ([], [1] * t.integer(2, 4)):
        same_reach(t, reach(position, windows), [position])
    same_reach(t, reach(position, [], 2), [position])
    same_reach(t, reach(position, [1], 2), [0, 1, position])
    for window in (t.integer(2, 9), 1):
        t.number(layers_needed(0, window), 0, f"over 0 by windows of {window}:")
    got = layers_needed(position, 1)
    t.true(got is None, f"None over {position} by windows of 1", "None" if got is None else describe(got))


# 04.6: the bytes of models with windows, compared with three real models and a count layer by layer

cache_bytes = Exercise(
    id="04.6",
    slug="bytes",
    title="Stored and read: three models with windows",
    answers=("window_bytes",),
    hints=(
        "Go layer by layer and ask for a number of tokens. A layer with a window has W slots at most: it "
        "stores min(max_len, W) tokens, and a step reads min(length, W). A full layer stores max_len and "
        "reads length.",
        "A token leaves 2 · KV heads · head_dim numbers of 2 bytes in a layer, for each row of the batch. "
        "Query heads do not count, and hidden_size is only needed where there is no head_dim.",
        "Which layer is which? `layer_types` says it; without it all layers have the window; and where "
        "`sliding_window` is None no layer has one, whatever else is written.",
        "`saving` compares stored with the same sum where every layer stores max_len: 1 − stored / full. A "
        "GiB is 2³⁰ bytes.",
    ),
)


Config = dict[str, Any]
Sizes = dict[str, float]
WINDOW, FULL = "sliding_attention", "full_attention"


def model_config(
    layers: int, width: int, heads: int, kv_heads: int, window: int | None, **more: Any
) -> Config:
    shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return {**shape, "num_key_value_heads": kv_heads, "sliding_window": window, **more}


def pattern(layers: int, every: int) -> list[str]:
    """Every so many layers one that is full."""
    return [FULL if (i + 1) % every == 0 else WINDOW for i in range(layers)]


# From the models' config.json and the sources named in kvlearn/measure/models.py.
MISTRAL = model_config(32, 4096, 32, 8, 4096)


GEMMA_3 = model_config(62, 5376, 32, 16, 1024, head_dim=128, layer_types=pattern(62, 6))
GPT_OSS = model_config(36, 2880, 64, 8, 128, head_dim=64, layer_types=pattern(36, 2))


def tokens_kept(config: Config, n_tokens: int) -> list[int]:
    """In each layer, when so many tokens have come."""
    kept = []
    for i in range(config["num_hidden_layers"]):
        local = config.get("layer_types", [WINDOW] * (i + 1))[i] == WINDOW
        window = config["sliding_window"] if local else None
        kept.append(n_tokens if window is None or window > n_tokens else window)
    return kept


def token_bytes(config: Config, batch: int) -> int:
    """Bytes of a token in one layer, in every row of the batch."""
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    key = value = config["num_key_value_heads"] * head_dim * 2
    return batch * (key + value)


def cache_bytes_sizes(config: Config, stored: list[int], read: list[int], max_len: int, batch: int) -> Sizes:
    """The four numbers from the tokens that each layer stores and reads."""
    one = token_bytes(config, batch)
    everything = one * max_len * config["num_hidden_layers"]
    return {
        "stored": one * sum(stored),
        "read": one * sum(read),
        "stored_gib": one * sum(stored) / 2**30,
        "saving": 1 - one * sum(stored) / everything,
    }


def cache_bytes_count(config: Config, max_len: int, length: int, batch: int = 1) -> Sizes:
    return cache_bytes_sizes(
        config, tokens_kept(config, max_len), tokens_kept(config, length), max_len, batch
    )


def cache_bytes_same(
    t: CheckContext, window_bytes: Answer, config: Config, max_len: int, length: int, *names: str
) -> None:
    batch = t.pick(3, 4, 6)
    got, want = (
        window_bytes(config, max_len, length, batch),
        cache_bytes_count(config, max_len, length, batch),
    )
    for name in names:
        if not isinstance(got, dict) or name not in got:
            came = f"keys {list(got)[:6]}" if isinstance(got, dict) else describe(got)
            t.true(False, f"a dict with the key {name!r}", came)
            raise Stop
        if name == "saving":
            close_to(t, got[name], want[name])
        else:
            t.number(got[name], want[name], name)


def close_to(t: CheckContext, got: Any, want: float) -> None:
    """A share, which may be 0, to nine digits after the point."""
    try:
        share = round(float(got), 9) + 0.0
    except (TypeError, ValueError):
        t.true(False, f"saving {want:.4f}", describe(got))
        raise Stop from None
    if abs(share - want) <= 2e-9:
        share = want
    t.number(share, want, "saving")


def local_and_global(t: CheckContext, round: int) -> Config:
    """Gemma 3 27B, gpt-oss-120b, or their like with layers that do not fall into whole periods."""
    if round < 2:
        return (GEMMA_3, GPT_OSS)[round]
    every = t.integer(3, 5)
    layers = every * t.integer(4, 8) + t.integer(1, every - 1)
    heads, kv_heads, head_dim = 24, t.pick(2, 4, 8), t.pick(96, 160)
    more = {"head_dim": head_dim, "layer_types": pattern(layers, every)}
    return model_config(layers, heads * 64, heads, kv_heads, t.pick(256, 512, 2048), **more)


@cache_bytes.requirement(1, "a window in every layer: Mistral 7B v0.1")
def windows(t: CheckContext, window_bytes: Answer) -> None:
    """stored: min(max_len, W) tokens in each layer; no layer_types means that all have the window; without
    head_dim it is hidden_size / num_attention_heads"""
    heads, kv_heads = t.pick((24, 8), (40, 10), (56, 7))
    drawn = model_config(t.integer(20, 60), heads * t.pick(64, 96), heads, kv_heads, t.pick(1024, 2048))
    cache_bytes_same(
        t,
        window_bytes,
        MISTRAL if t.round == 0 else drawn,
        t.pick(8192, 12_288),
        t.integer(5000, 8000),
        "stored",
    )


@cache_bytes.requirement(1, "local and global layers, stored: Gemma 3 27B, gpt-oss-120b")
def stored(t: CheckContext, window_bytes: Answer) -> None:
    """min(max_len, W) tokens in the sliding_attention layers, max_len in the others"""
    length = t.integer(3000, 30_000)
    cache_bytes_same(t, window_bytes, local_and_global(t, t.round), t.pick(32_768, 131_072), length, "stored")


@cache_bytes.requirement(1, "local and global layers, read by a step")
def read(t: CheckContext, window_bytes: Answer) -> None:
    """min(length, W) tokens in the sliding_attention layers, length in the others: what is there, not what
    there is room for"""
    length = t.integer(3000, 30_000)
    cache_bytes_same(t, window_bytes, local_and_global(t, t.round), t.pick(32_768, 131_072), length, "read")


@cache_bytes.requirement(1, "fewer tokens than the window")
def cache_bytes_short(t: CheckContext, window_bytes: Answer) -> None:
    """stored for max_len < W, and read for length < W: no layer keeps more tokens than there are"""
    config = local_and_global(t, t.pick(0, 1, 2))
    window = config["sliding_window"]
    cache_bytes_same(
        t, window_bytes, config, window - t.integer(20, 60), window // 4 + t.integer(0, 20), "stored", "read"
    )
    cache_bytes_same(t, window_bytes, config, 8 * window, window // 2 - t.integer(1, 20), "read")


@cache_bytes.requirement(1, "in GiB")
def gib(t: CheckContext, window_bytes: Answer) -> None:
    """stored_gib: what is stored in units of 2³⁰ bytes"""
    cache_bytes_same(
        t,
        window_bytes,
        local_and_global(t, t.round),
        t.pick(16_384, 65_536),
        t.integer(3000, 8000),
        "stored_gib",
    )


@cache_bytes.requirement(1, "the share saved")
def saving(t: CheckContext, window_bytes: Answer) -> None:
    """1 − stored / (the same, were every layer full): 0.5 for Mistral v0.1 at 8192, and 0 while the context
    is not longer than the window"""
    config = MISTRAL if t.round == 0 else local_and_global(t, 2 - t.round)
    cache_bytes_same(
        t, window_bytes, config, 8192 if t.round == 0 else 65_536, t.integer(3000, 8000), "saving"
    )
    window = config["sliding_window"]
    cache_bytes_same(t, window_bytes, config, window - t.integer(0, 20), window // 2, "saving")


@cache_bytes.requirement(1, "a window that was dropped: Mistral 7B v0.2")
def dropped(t: CheckContext, window_bytes: Answer) -> None:
    """sliding_window None: all layers are full, whatever layer_types says; stored and read grow with the
    context"""
    config = {**MISTRAL, "sliding_window": None, "num_hidden_layers": t.integer(20, 60)}
    if t.round == 1:
        config = {**GEMMA_3, "sliding_window": None}
    cache_bytes_same(t, window_bytes, config, 32_768, t.integer(5000, 30_000), "stored", "read")


# 04.7: one decode step over rings of rows that differ in length, compared with attention in order of time

step = Exercise(
    id="04.7",
    slug="step",
    title="A decode step over the ring",
    answers=("ring_step",),
    hints=(
        "Write first, then attend: the new token sees itself, and it lies where the token was that has just "
        "left the window. Row b writes to slot lengths[b] % W.",
        "`rows = torch.arange(B); ring_k[rows, :, lengths % W] = k` writes one token for each row, each to "
        "a slot of its own.",
        "After writing, row b holds min(lengths[b] + 1, W) tokens, and until the ring is full these are its "
        "first slots: slot s is filled where s ≤ lengths[b]. Hide the others with −∞, not with zeros.",
        "Without a penalty the order does not matter: a softmax and a sum take the slots as they lie. With "
        "slopes, the token in slot s is (lengths[b] − s) % W tokens old; for a slot that is filled that is "
        "true in every lap.",
    ),
)


class Rows:
    """Rows of a batch that have seen ``lengths`` tokens each, and the one that comes now."""

    def __init__(self, t: CheckContext, window: int, *lengths: int, penalty: bool = False) -> None:
        H, D = t.pick(5, 6, 7), 16
        self.t, self.window, self.lengths = t, window, torch.tensor(lengths)
        self.q, self.k, self.v = (
            [t.randn(1, H, n + 1, D) for n in lengths] for _ in range(3)
        )  # a row's tokens, the new one last
        self.slopes = torch.rand(H, generator=t.generator) * 0.4 + 0.2 if penalty else None
        self.rings = [
            torch.cat([ring_of(t, x[:, :, :-1], window) for x in rows]) for rows in (self.k, self.v)
        ]

    def run(self, ring_step: Answer) -> tuple[Tensor, Tensor, Tensor]:
        new = (torch.cat([x[:, :, -1] for x in rows]) for rows in (self.q, self.k, self.v))
        given = (*new, *self.rings, self.lengths)
        return three(self.t, ring_step(*given) if self.slopes is None else ring_step(*given, self.slopes))

    def want(self) -> Tensor:
        """Row by row, over the last W tokens, the oldest first."""
        outs = []
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            k, v = k[:, :, -self.window :].double(), v[:, :, -self.window :].double()
            scores = (q[:, :, -1:].double() @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
            if self.slopes is not None:
                ages = torch.arange(k.shape[2]).flip(0)
                scores = scores - self.slopes[None, :, None, None] * ages
            outs.append((scores.softmax(-1) @ v)[:, :, 0].float())
        return torch.cat(outs)

    def compare_out(self, ring_step: Answer) -> None:
        self.t.close(self.run(ring_step)[0], self.want(), "out:", tolerance=1e-3)

    def compare_rings(self, ring_step: Answer) -> None:
        _, ring_k, ring_v = self.run(ring_step)
        filled = torch.tensor([held(int(n) + 1, self.window) for n in self.lengths]) >= 0
        want = [torch.cat([ring_of(self.t, x, self.window) for x in rows]) for rows in (self.k, self.v)]
        same_rings(self.t, (ring_k, ring_v), (want[0], want[1]), filled)


def lap(t: CheckContext, window: int) -> int:
    """So many tokens that the next one goes into the midst of a full ring."""
    return window * t.integer(1, 4) + t.integer(2, window - 3)


@step.requirement(1, "a full ring")
def step_full(t: CheckContext, ring_step: Answer) -> None:
    """softmax(q kᵀ / √D) v over the last W tokens, the new one among them: it takes the oldest one's slot"""
    window = t.integer(6, 9)
    n = lap(t, window)
    Rows(t, window, n, n, n).compare_out(ring_step)


@step.requirement(1, "a ring that is not full yet")
def step_filling(t: CheckContext, ring_step: Answer) -> None:
    """over the tokens so far and the new one; what lies in empty slots counts for nothing; also for the very
    first token, and for the one that fills the last slot"""
    window = t.integer(6, 9)
    for n in (t.integer(2, window - 3), 0, window - 1):
        Rows(t, window, n, n).compare_out(ring_step)


@step.requirement(2, "rows of different length")
def different(t: CheckContext, ring_step: Answer) -> None:
    """each row with its own slot and its own filled slots, full rings beside some that are not"""
    window = t.integer(6, 9)
    first = lap(t, window)
    lengths = [first, t.integer(2, window - 3), first + window + 1, 0]
    t.random.shuffle(lengths)
    Rows(t, window, *lengths).compare_out(ring_step)


@step.requirement(1, "the rings afterwards")
def rings(t: CheckContext, ring_step: Answer) -> None:
    """key and value of the new token in slot length % W of their row, all other tokens where they were"""
    window = t.integer(6, 9)
    first = lap(t, window)
    Rows(t, window, first, t.integer(2, window - 3), first + window + 1).compare_rings(ring_step)


@step.requirement(1, "a penalty for distance")
def penalty(t: CheckContext, ring_step: Answer) -> None:
    """score − slope · distance, the distance in tokens and not in slots"""
    window = t.integer(6, 9)
    Rows(t, window, lap(t, window), t.integer(2, window - 3), penalty=True).compare_out(ring_step)


EXERCISES = (mask, ring, prefill, sinks, field, cache_bytes, step)
