"""01.6: prefill in chunks through a cache, held against one pass over the whole prompt."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.attention import KVCache
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
        "size of this chunk, gives a (1, n). Rotate the chunk's q and k with them.",
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
    came = f"an append of {largest} tokens" if largest else "nothing was appended to the cache"
    tokens = f"{chunk} tokens" if chunk > 1 else "1 token"
    t.true(0 < largest <= chunk, f"appends of at most {tokens}", came)


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
