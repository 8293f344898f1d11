"""01.6: the mistakes that people make with chunks: the past, the mask, the positions."""

import torch
from torch import Tensor

from kvlearn.attention import KVCache
from kvlearn.attention.core import attention, causal_mask
from kvlearn.attention.rope import Rope
from kvlearn.grading.units.full_attention.prefill import EXERCISE

__all__ = ["EXERCISE"]


def chunks(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(x.split(chunk, dim=2) for x in (q, k, v)), strict=True))


@EXERCISE.misconception("each chunk sees itself only")
def no_past(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """The chunk attends to its own keys and not to those in the cache. What was prefilled before is
    written and never read, so a long prompt is understood chunk by chunk. Attend to what append
    returns: all keys so far."""
    out = []
    for q_new, k_new, v_new in chunks(q, k, v, chunk):
        n = q_new.shape[2]
        positions = cache.positions(n)
        k_new = rope(k_new, positions)
        cache.append(k_new, v_new)
        out.append(attention(rope(q_new, positions), k_new, v_new, causal_mask(n, n)))
    return torch.cat(out, dim=2)


@EXERCISE.misconception("positions restarted in every chunk")
def restarted(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """RoPE counts from 0 again in each chunk, so tokens of different chunks seem to stand at the same
    place. The first chunk is right, which hides it. Count from the cache's length on:
    cache.positions(n)."""
    out = []
    for q_new, k_new, v_new in chunks(q, k, v, chunk):
        n = q_new.shape[2]
        positions = torch.arange(n)[None]
        keys, values, _ = cache.append(rope(k_new, positions), v_new)
        out.append(attention(rope(q_new, positions), keys, values, causal_mask(n, keys.shape[2])))
    return torch.cat(out, dim=2)


@EXERCISE.misconception("attending before writing")
def attend_first(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """The chunk attends to what stood in the cache before it and is written afterwards. So no token sees
    itself or its neighbours in the chunk, and the first chunk sees nothing at all. Append first, then
    attend."""
    out = []
    for q_new, k_new, v_new in chunks(q, k, v, chunk):
        positions = cache.positions(q_new.shape[2])
        keys, values = cache.k[:, :, : cache.length], cache.v[:, :, : cache.length]
        out.append(attention(rope(q_new, positions), keys, values))
        cache.append(rope(k_new, positions), v_new)
    return torch.cat(out, dim=2)


@EXERCISE.misconception("the mask aligned top-left")
def top_left(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """The chunk's queries are taken for the *first* of the S positions (so does SDPA's is_causal=True).
    From the second chunk on they see only the start of the prompt. The queries are the last n of S:
    causal_mask(n, S)."""
    out = []
    for q_new, k_new, v_new in chunks(q, k, v, chunk):
        n = q_new.shape[2]
        positions = cache.positions(n)
        keys, values, _ = cache.append(rope(k_new, positions), v_new)
        mask = torch.ones(n, keys.shape[2], dtype=torch.bool).tril()
        out.append(attention(rope(q_new, positions), keys, values, mask))
    return torch.cat(out, dim=2)


@EXERCISE.misconception("no mask within the chunk")
def unmasked(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """Every query sees the whole chunk, later tokens too. With one token at a time there is no future to hide
    and no mask is needed; with more the mask must hide the rest of the chunk."""
    out = []
    for q_new, k_new, v_new in chunks(q, k, v, chunk):
        positions = cache.positions(q_new.shape[2])
        keys, values, _ = cache.append(rope(k_new, positions), v_new)
        out.append(attention(rope(q_new, positions), keys, values))
    return torch.cat(out, dim=2)


@EXERCISE.misconception("the rest of the prompt is dropped")
def dropped_rest(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """Only whole chunks are processed: T // chunk of them. The tokens left over at the end are missing,
    and they are the ones that the answer follows. The last chunk may be shorter."""
    out = []
    whole = max(q.shape[2] // chunk, 1)
    for q_new, k_new, v_new in chunks(q, k, v, chunk)[:whole]:
        n = q_new.shape[2]
        positions = cache.positions(n)
        keys, values, _ = cache.append(rope(k_new, positions), v_new)
        out.append(attention(rope(q_new, positions), keys, values, causal_mask(n, keys.shape[2])))
    return torch.cat(out, dim=2)


@EXERCISE.misconception("the whole prompt at once")
def at_once(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """The outputs are right, but the prompt went through in one piece, with T × S scores in memory at a time.
    Chunks are there to bound that: chunk × S. Loop over range(0, T, chunk)."""
    positions = cache.positions(q.shape[2])
    keys, values, _ = cache.append(rope(k, positions), v)
    return attention(rope(q, positions), keys, values, causal_mask(q.shape[2], keys.shape[2]))


@EXERCISE.misconception("what the cache holds already is not counted")
def from_zero(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """Positions are counted from the start of this prompt. It may continue what is in the cache (the next
    turn of a chat): then its first token stands at cache.length, as cache.positions(n) says."""
    out = []
    start = 0
    for q_new, k_new, v_new in chunks(q, k, v, chunk):
        n = q_new.shape[2]
        positions = torch.arange(start, start + n)[None]
        keys, values, _ = cache.append(rope(k_new, positions), v_new)
        out.append(attention(rope(q_new, positions), keys, values, causal_mask(n, keys.shape[2])))
        start += n
    return torch.cat(out, dim=2)
