"""01.6: prefill in chunks through a cache, held against one pass over the whole prompt."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.attention.core import attention, causal_mask
from kvlearn.attention.full import KVCache
from kvlearn.attention.rope import Rope, RopeConfig
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
    id="01.6",
    slug="prefill",
    title="Prefill in chunks",
    answers=("chunked_prefill",),
    may_use_kvlearn=True,
    hints=(
        "One loop over `range(0, T, chunk)`; q[:, :, start : start + chunk] is the chunk, and the last "
        "one may be shorter all by itself. Collect the outputs and `torch.cat` them along dimension 2.",
        "Ask the cache for the positions *before* you write: `positions = cache.positions(n)`, n the "
        "size of this chunk. Rotate the chunk's q and k with them.",
        "Write first, then attend: a token attends to itself and to its neighbours in the chunk, so its "
        "own key must be in the cache. `keys, values, _ = cache.append(k, v)` gives everything so far.",
        "The chunk's n queries are the last of S = keys.shape[2] positions: `attention(q, keys, values, "
        "causal_mask(n, S))`.",
    ),
)

QKV = tuple[Tensor, Tensor, Tensor]


class WatchedCache(KVCache):
    """A cache that remembers how many tokens each append brought."""

    def __init__(self, q: Tensor, max_len: int) -> None:
        B, H, _, D = q.shape
        super().__init__(B, H, max_len, D, q.dtype, q.device)
        self.appended: list[int] = []

    def append(self, k: Tensor, v: Tensor):  # type: ignore[no-untyped-def]
        self.appended.append(k.shape[2])
        return super().append(k, v)


def draw(t: Trial, T: int) -> tuple[QKV, Rope]:
    B, H, _, _, D = t.sizes()
    q, k, v = (t.randn(B, H, T, D) for _ in range(3))
    return (q, k, v), Rope(D, RopeConfig())


def one_pass(q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
    positions = torch.arange(q.shape[2])[None]
    return F.scaled_dot_product_attention(rope(q, positions), rope(k, positions), v, is_causal=True)


def same_as_one_pass(t: Trial, chunked_prefill: Answer, T: int, chunk: int) -> None:
    (q, k, v), rope = draw(t, T)
    cache = WatchedCache(q, T)
    t.close(chunked_prefill(q, k, v, cache, rope, chunk), one_pass(q, k, v, rope), tolerance=1e-3)
    in_chunks(t, cache, chunk)


def in_chunks(t: Trial, cache: WatchedCache, chunk: int) -> None:
    """No append brought more than a chunk."""
    largest = max(cache.appended, default=0)
    t.true(0 < largest <= chunk, f"appends of at most {chunk} tokens", f"an append of {largest} tokens")


@EXERCISE.requirement(1, "the whole prompt as one chunk", rounds=2)
def one_chunk(t: Trial, chunked_prefill: Answer) -> None:
    """causal attention with RoPE over the prompt, (B, H, T, D)"""
    T = t.integer(4, 9)
    same_as_one_pass(t, chunked_prefill, T, T + t.integer(0, 3))


@EXERCISE.requirement(2, "equal chunks", rounds=2)
def equal_chunks(t: Trial, chunked_prefill: Answer) -> None:
    """the same outputs as in one pass, when the chunks divide the prompt; one chunk in each append"""
    chunk = t.integer(3, 5)
    same_as_one_pass(t, chunked_prefill, chunk * t.integer(2, 4), chunk)


@EXERCISE.requirement(1, "a shorter last chunk", rounds=2)
def ragged(t: Trial, chunked_prefill: Answer) -> None:
    """the same when a rest is left over"""
    chunk = t.integer(3, 5)
    same_as_one_pass(t, chunked_prefill, chunk * t.integer(2, 3) + t.integer(1, chunk - 1), chunk)


@EXERCISE.requirement(1, "one token at a time", rounds=2)
def single_tokens(t: Trial, chunked_prefill: Answer) -> None:
    """the same with chunk = 1: prefill by decoding"""
    same_as_one_pass(t, chunked_prefill, t.integer(4, 7), 1)


@EXERCISE.requirement(1, "continuing what is in the cache", rounds=2)
def continuing(t: Trial, chunked_prefill: Answer) -> None:
    """a second prompt goes on behind what the cache holds; q, k and v unchanged"""
    chunk = t.integer(2, 3)
    first, second = chunk * 2 + 1, chunk * 2
    (q, k, v), rope = draw(t, first + second)
    cache = WatchedCache(q, first + second)
    parts = [
        chunked_prefill(q[:, :, part], k[:, :, part], v[:, :, part], cache, rope, chunk)
        for part in (slice(0, first), slice(first, None))
    ]
    for got, want in zip(parts, one_pass(q, k, v, rope).split((first, second), dim=2), strict=True):
        t.close(got, want, tolerance=1e-3)
    in_chunks(t, cache, chunk)
    t.unchanged()


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


@EXERCISE.misconception("keys cached before RoPE")
def keys_not_rotated(q: Tensor, k: Tensor, v: Tensor, cache: KVCache, rope: Rope, chunk: int) -> Tensor:
    """The queries were rotated and the keys went into the cache as they were. A score depends on the
    distance of two tokens only if both are turned, each by its own position: rotate the chunk's keys
    before you append them."""
    out = []
    for q_new, k_new, v_new in chunks(q, k, v, chunk):
        n = q_new.shape[2]
        positions = cache.positions(n)
        keys, values, _ = cache.append(k_new, v_new)
        out.append(attention(rope(q_new, positions), keys, values, causal_mask(n, keys.shape[2])))
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
