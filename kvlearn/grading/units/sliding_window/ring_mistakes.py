"""04.2: the mistakes that people make with a ring: the slot of a token, the edge, the token in a slot."""

import torch
from torch import Tensor

from kvlearn.grading.units.sliding_window.given import held
from kvlearn.grading.units.sliding_window.ring import EXERCISE, written

__all__ = ["EXERCISE"]


def put(ring: Tensor, new: Tensor, slots: list[int]) -> Tensor:
    """Token after token into these slots; a slot that does not exist takes nothing."""
    ring = ring.clone()
    for i, slot in enumerate(slots):
        if 0 <= slot < ring.shape[2]:
            ring[:, :, slot] = new[:, :, i]
    return ring


def span(new: Tensor, start: int) -> range:
    return range(start, start + new.shape[2])


@EXERCISE.misconception("the pointer not wrapped", held_positions=held)
def unwrapped(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """Slot = position, without % W. Once the ring is full every further token falls off its end: a slice
    that reaches past the end is cut short without an error, and the ring keeps the *first* W tokens."""
    return put(ring, new, list(span(new, start)))


@EXERCISE.misconception("all that is past the end in the last slot", held_positions=held)
def clamped(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """Past the end, every token was written into the last slot (min(position, W − 1), or index −1). The other
    slots never change again, and the window shrinks to one token. The next slot after the last is slot 0."""
    return put(ring, new, [min(p, ring.shape[2] - 1) for p in span(new, start)])


@EXERCISE.misconception("only the chunk's start wrapped", held_positions=held)
def tail_dropped(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """The first slot is start % W, and the others follow it without wrapping, as a slice does: what reaches
    over the edge is lost. Every token has a slot of its own: `torch.arange(start, start + T) % W`."""
    return put(ring, new, [start % ring.shape[2] + i for i in range(new.shape[2])])


@EXERCISE.misconception("every chunk from slot 0", held_positions=held)
def from_zero(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """`start` was not looked at: each chunk begins at slot 0, so in decode all tokens go to the same slot.
    The slot follows from the token's position in the whole sequence."""
    return put(ring, new, [i % ring.shape[2] for i in range(new.shape[2])])


@EXERCISE.misconception("the pointer stands still within a chunk", held_positions=held)
def standing(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """All tokens of the chunk went to the slot of its first one, and only the last is left. One token at a
    time it is right, which hides it: token i of the chunk belongs to slot (start + i) % W."""
    return put(ring, new, [start % ring.shape[2]] * new.shape[2])


@EXERCISE.misconception("off by one: positions counted from 1", held_positions=held)
def from_one(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """Every token stands one slot too far: (position + 1) % W. `start` is the position of the chunk's first
    token, and positions count from 0."""
    return put(ring, new, [(p + 1) % ring.shape[2] for p in span(new, start)])


@EXERCISE.misconception("modulo W − 1", held_positions=held)
def one_slot_lost(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """position % (W − 1) never reaches the last slot, and turns round one token early. W slots have the
    numbers 0 … W − 1, which are the remainders of a division by W."""
    return put(ring, new, [p % (ring.shape[2] - 1) for p in span(new, start)])


@EXERCISE.misconception("the oldest shifted out in place of overwritten", held_positions=held)
def shifted(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """`torch.cat((ring, new))[-W:]` keeps the right tokens, but moves all of them at every step: a copy of
    the whole window to store one token, and no token stays in slot p % W. A ring writes only what is new."""
    return torch.cat((ring, new), dim=2)[:, :, -ring.shape[2] :]


@EXERCISE.misconception("a full ring takes nothing more", held_positions=held)
def full(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """Tokens were written only while the ring had empty slots, and a chunk that does not fit was refused as a
    whole. That is the cache of chapter 01. A ring is never full: the oldest token makes room."""
    fits = start + new.shape[2] <= ring.shape[2]
    return put(ring, new, list(span(new, start))) if fits else ring


@EXERCISE.misconception("the other slots cleared", held_positions=held)
def cleared(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """A new ring of zeros was made and only the chunk written into it. The tokens in the other slots are
    still in the window: start from the ring that was handed in."""
    return written(torch.zeros_like(ring), new, start)


@EXERCISE.misconception("of a long chunk the first W tokens kept", held_positions=held)
def first_kept(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """A chunk longer than the ring was cut to its *first* W tokens. What stays in a window is the end of the
    chunk, its last W."""
    return written(ring, new[:, :, : ring.shape[2]], start)


@EXERCISE.misconception("a long chunk's end in the slots of its beginning", held_positions=held)
def cut_but_not_moved(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """The last W tokens of a long chunk are right, but they were laid from start % W on, the slot of the
    chunk's first token. It is gone. The first that stays stands at start + T − W: that is its position, and
    decides its slot."""
    return written(ring, new[:, :, -ring.shape[2] :], start)


@EXERCISE.misconception("a long chunk laid from slot 0", held_positions=held)
def long_from_zero(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """When a chunk fills the whole ring, its last W tokens were copied in as they are, the first into slot 0.
    It looks tidy, but the next token goes to slot p % W, and there now lies one that is still in the window,
    not the oldest."""
    window = ring.shape[2]
    return new[:, :, -window:].clone() if new.shape[2] >= window else written(ring, new, start)


@EXERCISE.misconception("the edge crossed once only", held_positions=held)
def one_turn(ring: Tensor, new: Tensor, start: int) -> Tensor:
    """The chunk was cut in two at the edge, one slice up to it and one from slot 0 on. A chunk longer than
    the ring goes round more than once, and of its tokens the last W stay: drop the others first, then cut."""
    window = ring.shape[2]
    first = window - start % window
    slots = [start % window + i if i < first else i - first for i in range(new.shape[2])]
    return put(ring, new, slots)


def write_right(ring: Tensor, new: Tensor, start: int) -> Tensor:
    return written(ring, new, start)


@EXERCISE.misconception("empty slots said to hold their own number", write_ring=write_right)
def never_empty(n_tokens: int, window: int) -> list[int]:
    """Before the first lap is over, slot s was said to hold position s whether it has been written or not.
    Attention would then take what lies there for tokens. A slot s ≥ n holds nothing: −1."""
    return [s if s >= n_tokens else p for s, p in enumerate(held(n_tokens, window))]


@EXERCISE.misconception("empty slots said to hold position 0", write_ring=write_right)
def zero_for_empty(n_tokens: int, window: int) -> list[int]:
    """Empty slots say 0, and 0 is a position: that of the first token. So a mask made from positions lets
    them in. −1 is no position."""
    return [max(p, 0) for p in held(n_tokens, window)]


@EXERCISE.misconception("in the order of time", write_ring=write_right)
def sorted_by_time(n_tokens: int, window: int) -> list[int]:
    """These are the right positions, oldest first, but not in the order of the slots: after n tokens the
    oldest lies in slot n % W. Whoever takes slot s for the s-th oldest gives each key another's position."""
    kept = list(range(max(0, n_tokens - window), n_tokens))
    return kept + [-1] * (window - len(kept))


@EXERCISE.misconception("the slot's number for its position", write_ring=write_right)
def slot_numbers(n_tokens: int, window: int) -> list[int]:
    """The positions start over with every lap: a slot's number was given, 0 … W − 1. RoPE and the mask need
    where the token stands in the whole sequence."""
    return [s if s < n_tokens else -1 for s in range(window)]


@EXERCISE.misconception("one token ahead: n for n − 1", write_ring=write_right)
def one_ahead(n_tokens: int, window: int) -> list[int]:
    """n was taken for the newest position. After n tokens the newest stands at n − 1, and slot n % W still
    holds the oldest."""
    return held(n_tokens + 1, window)


@EXERCISE.misconception("one token behind", write_ring=write_right)
def one_behind(n_tokens: int, window: int) -> list[int]:
    """This is the ring before its last token was written. After n tokens, positions 0 … n − 1 have been
    written, n − 1 among them."""
    return held(max(n_tokens - 1, 0), window)


@EXERCISE.misconception("the present lap for all slots", write_ring=write_right)
def same_lap(n_tokens: int, window: int) -> list[int]:
    """(n // W) · W + s for every slot: the slots that this lap has not reached yet get positions of the
    future. They hold tokens of the lap before, W less."""
    lap = n_tokens // window * window
    return (
        [s if s < n_tokens else -1 for s in range(window)] if lap == 0 else [lap + s for s in range(window)]
    )


@EXERCISE.misconception("the slots of the lap before called empty", write_ring=write_right)
def lap_before_empty(n_tokens: int, window: int) -> list[int]:
    """Slots that the present lap has not reached yet were given −1. They are not empty: the tokens of the lap
    before are in them, and still in the window. Only in the first lap is there nothing before."""
    lap = (n_tokens - 1) // window * window
    return [lap + s if lap + s < n_tokens else -1 for s in range(window)]


@EXERCISE.misconception("a negative number that is not −1", write_ring=write_right)
def below_zero(n_tokens: int, window: int) -> list[int]:
    """Filled slots are right. For an empty one the formula goes on counting back, to a position before the
    first token, −2 or −5. That there is none is said by −1, and by nothing else: whatever is below 0 becomes
    −1."""
    return [s + window * ((n_tokens - 1 - s) // window) for s in range(window)]
