"""01.6: the mistakes that people make with RoPE and with the loop, when they prefill in chunks."""

import torch
from torch import Tensor

from kvlearn.attention import KVCache
from kvlearn.attention.core import attention, causal_mask
from kvlearn.attention.rope import Rope
from kvlearn.grading.units.full_attention.prefill import EXERCISE
from kvlearn.grading.units.full_attention.prefill_mistakes import chunks

__all__ = ["EXERCISE"]


def in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    rope: Rope,
    chunk: int,
    *,
    rotate: tuple[bool, bool, bool] = (True, True, False),
    asked_after: bool = False,
) -> list[Tensor]:
    """The right outputs of the chunks, but for which of q, k and v are rotated, and when positions are
    asked."""
    out = []
    for new in chunks(q, k, v, chunk):
        n = new[0].shape[2]
        positions = cache.positions(n)
        q_new, k_new, v_new = (rope(x, positions) if turn else x for x, turn in zip(new, rotate, strict=True))
        keys, values, _ = cache.append(k_new, v_new)
        if asked_after:
            q_new = rope(new[0], cache.positions(n))
        out.append(attention(q_new, keys, values, causal_mask(n, keys.shape[2])))
    return out


@EXERCISE.misconception("keys cached before RoPE")
def keys_not_rotated(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """The queries were rotated and the keys went into the cache as they were. A score depends on the
    distance of two tokens only if both are turned, each by its own position: rotate the chunk's keys
    before you append them."""
    return torch.cat(in_chunks(q, k, v, cache, rope, chunk, rotate=(True, False, False)), dim=2)


@EXERCISE.misconception("no RoPE")
def not_rotated(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """Neither queries nor keys were rotated, so the scores know nothing of the order of the tokens. Turn the
    chunk's q and k with `rope(x, positions)` before the append."""
    return torch.cat(in_chunks(q, k, v, cache, rope, chunk, rotate=(False, False, False)), dim=2)


@EXERCISE.misconception("queries not rotated")
def queries_not_rotated(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """The keys were rotated and the queries were not. A score depends on the distance of two tokens only if
    both are turned, each by its own position: rotate the chunk's q as well."""
    return torch.cat(in_chunks(q, k, v, cache, rope, chunk, rotate=(False, True, False)), dim=2)


@EXERCISE.misconception("values rotated too")
def values_rotated(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """RoPE was applied to v as well. Positions have a say in the scores, q with k, and nowhere else: the
    values are what is averaged, and go into the cache as they are."""
    return torch.cat(in_chunks(q, k, v, cache, rope, chunk, rotate=(True, True, True)), dim=2)


@EXERCISE.misconception("positions asked after the append")
def asked_too_late(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """cache.positions(n) says where the *next* n tokens will stand. After the append these are no longer the
    chunk's, so its queries are turned n positions too far. Ask before you append."""
    return torch.cat(in_chunks(q, k, v, cache, rope, chunk, asked_after=True), dim=2)


@EXERCISE.misconception("keys rotated twice")
def rotated_twice(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """The keys were rotated before the append, and all of them again when they came back. Every key is turned
    once, when it enters the cache: what append returns is ready for use."""
    out = []
    for q_new, k_new, v_new in chunks(q, k, v, chunk):
        n = q_new.shape[2]
        positions = cache.positions(n)
        keys, values, _ = cache.append(rope(k_new, positions), v_new)
        keys = rope(keys, torch.arange(keys.shape[2])[None])
        out.append(attention(rope(q_new, positions), keys, values, causal_mask(n, keys.shape[2])))
    return torch.cat(out, dim=2)


@EXERCISE.misconception("the cache emptied first")
def emptied(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """cache.reset() at the start throws away what the cache holds. The prompt may be the next turn of a chat:
    its tokens go on behind the old ones and attend to them."""
    cache.reset()
    return torch.cat(in_chunks(q, k, v, cache, rope, chunk), dim=2)


@EXERCISE.misconception("chunk taken for the number of chunks")
def number_of_chunks(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """`x.chunk(n)` cuts x into n pieces; `chunk` is the *size* of a piece. The outputs come out right either
    way, but the pieces grow with the prompt. `x.split(chunk, dim=2)` cuts by size."""
    return torch.cat(in_chunks(q, k, v, cache, rope, -(-q.shape[2] // chunk)), dim=2)


@EXERCISE.misconception("only the last chunk returned")
def last_chunk(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """The outputs of the earlier chunks were written over. Collect them all and join them along the tokens:
    `torch.cat(outputs, dim=2)`."""
    return in_chunks(q, k, v, cache, rope, chunk)[-1]
