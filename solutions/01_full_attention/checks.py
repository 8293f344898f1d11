"""Unit 01: requirements and hints of the exercises on full attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.attention import KVCache
from kvlearn.attention.rope import Rope, RopeConfig
from kvlearn.grading import (
    Answer,
    CheckContext,
    Difference,
    Exercise,
    Raised,
    Stop,
    compare,
    describe,
    plain_number,
)

# 01.1: scaled dot-product attention with a mask, compared with PyTorch's own

attend = Exercise(
    id="01.1",
    slug="attend",
    title="Scaled dot-product attention with a mask",
    answers=("attend",),
    forbidden={F.scaled_dot_product_attention: "torch's scaled_dot_product_attention"},
    hints=(
        "Three lines: scores, weights, output. `q @ k.transpose(-2, -1)` gives every query's score with "
        "every key: shape (B, H, T, S).",
        "The scale is 1 / √D, where D is the size of *one head*: `q.shape[-1]`. The softmax runs over "
        "the keys, the last dimension of the scores.",
        "The mask goes in *before* the softmax: `scores.masked_fill(~mask, -torch.inf)`. exp(−∞) is 0, "
        "so the weights that are left still add up to 1.",
        "A row of scores that is −∞ everywhere gives 0 / 0 = NaN. After the softmax, set the weights of "
        "masked pairs to 0: `weights.masked_fill(~mask, 0.0)`. Only the NaN rows change.",
    ),
)


def attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """SDPA in fp32; a query that may attend to nothing gets 0."""
    out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    if mask is not None:
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out.to(q.dtype)


def attend_draw(t: CheckContext, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, S, D = t.sizes()
    return (
        t.randn(B, H, T, D, dtype=dtype),
        t.randn(B, H, S, D, dtype=dtype),
        t.randn(B, H, S, D, dtype=dtype),
    )


@attend.requirement(1, "the shape")
def shape(t: CheckContext, attend: Answer) -> None:
    """one output for each query, (B, H, T, D), also when there are more keys than queries"""
    q, k, v = attend_draw(t)
    t.shape(attend(q, k, v), tuple(q.shape))


@attend.requirement(1, "the values, without a mask")
def attend_values(t: CheckContext, attend: Answer) -> None:
    """softmax(q kᵀ / √D) v in fp32"""
    q, k, v = attend_draw(t)
    t.close(attend(q, k, v), attend_reference(q, k, v))


@attend.requirement(1, "the values, with a mask")
def masked(t: CheckContext, attend: Answer) -> None:
    """the same over the keys where the mask is True; masks of shape (T, S) and (B, 1, T, S)"""
    q, k, v = attend_draw(t)
    B, _, T, _ = q.shape
    for shape in ((T, k.shape[2]), (B, 1, T, k.shape[2])):
        mask = t.mask(*shape)
        t.close(attend(q, k, v, mask), attend_reference(q, k, v, mask))


@attend.requirement(1, "a row with every key masked")
def empty_rows(t: CheckContext, attend: Answer) -> None:
    """0 for a query that may attend to nothing, and the other rows as before"""
    q, k, v = attend_draw(t)
    mask = t.mask(q.shape[0], 1, q.shape[2], k.shape[2])
    mask[t.integer(0, q.shape[0] - 1), :, t.integer(0, q.shape[2] - 1)] = False
    t.close(attend(q, k, v, mask), attend_reference(q, k, v, mask))


@attend.requirement(1, "half precision")
def attend_half(t: CheckContext, attend: Answer) -> None:
    """bf16 and fp16 in, the same dtype out, right within its precision"""
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = attend_draw(t, dtype)
        mask = t.mask(q.shape[2], k.shape[2])
        t.close(attend(q, k, v, mask), attend_reference(q, k, v, mask))


@attend.requirement(1, "large scores, and inputs left alone")
def attend_large(t: CheckContext, attend: Answer) -> None:
    """finite and right when scores reach ±1000; q, k, v and the mask unchanged afterwards"""
    q, k, v = attend_draw(t)
    q = q * 300
    mask = t.mask(q.shape[2], k.shape[2])
    t.close(attend(q, k, v, mask), attend_reference(q, k, v, mask), tolerance=1e-3)
    t.unchanged()


# 01.2: the causal mask of queries that are the last of the keys, compared with a loop over positions

mask = Exercise(
    id="01.2",
    slug="mask",
    title="The causal mask when keys outnumber queries",
    answers=("causal_mask",),
    hints=(
        "Write down the position of every query first. With S keys the last query stands at position S "
        "− 1; where does the first of T queries stand?",
        "Query t stands at position S − T + t and may see every key whose position is at most that.",
        "Compare a column of query positions with a row of key positions: `a[:, None] >= b[None, :]` "
        "gives (T, S).",
    ),
)


def mask_reference(n_queries: int, n_keys: int) -> Tensor:
    """One pair at a time."""
    start = n_keys - n_queries
    rows = [[key <= start + query for key in range(n_keys)] for query in range(n_queries)]
    return torch.tensor(rows)


def hides_the_future(t: CheckContext, got: object, T: int, S: int) -> None:
    """The right pairs are marked, be the mask of ones and zeros, of 0 and −∞, or with dimensions of size 1 in
    front: those cost the point for the form and no other."""
    mask = got
    if isinstance(mask, Tensor) and not mask.is_complex() and mask.numel() == T * S:
        mask = mask.squeeze(tuple(range(mask.ndim - 2))) if mask.ndim > 2 else mask
        additive = mask.dtype.is_floating_point and not (mask > 0).any()
        mask = mask == 0 if additive else mask.bool()
    t.note(got, compare(mask, mask_reference(T, S)))


@mask.requirement(1, "a boolean mask, (T, S)")
def form(t: CheckContext, causal_mask: Answer) -> None:
    """dtype bool and two dimensions, a row for each query and a column for each key"""
    T = t.integer(3, 6)
    S = T + t.integer(3, 9)
    t.form(causal_mask(T, S), (T, S), torch.bool)


@mask.requirement(1, "a whole prompt, T = S")
def square(t: CheckContext, causal_mask: Answer) -> None:
    """True on the diagonal and below it"""
    n = t.integer(4, 9)
    hides_the_future(t, causal_mask(n, n), n, n)


@mask.requirement(1, "a chunk behind a cache, 1 < T < S")
def chunk(t: CheckContext, causal_mask: Answer) -> None:
    """True up to each query's own position: the T queries are the last of the S positions"""
    T = t.integer(3, 6)
    S = T + t.integer(3, 9)
    hides_the_future(t, causal_mask(T, S), T, S)


@mask.requirement(1, "one token in decode, T = 1")
def decode(t: CheckContext, causal_mask: Answer) -> None:
    """True everywhere: the newest token sees all S; also the very first one, S = 1"""
    S = t.integer(4, 12)
    hides_the_future(t, causal_mask(1, S), 1, S)
    hides_the_future(t, causal_mask(1, 1), 1, 1)


# 01.3: cut the model's width into heads and put it together again, compared with a loop over heads

heads = Exercise(
    id="01.3",
    slug="heads",
    title="Split into heads, merge back",
    answers=("split_heads", "merge_heads"),
    hints=(
        "A head is a run of D neighbouring columns: head h holds the columns h·D to (h+1)·D − 1.",
        "Two steps: cut the last dimension in two, (B, T, H·D) → (B, T, H, D), then swap time and heads.",
        "`view` and `reshape` keep the order of the numbers; only `transpose`, `permute` or `movedim` "
        "change it, and (B, T, H, D) → (B, H, T, D) needs that.",
        "Merging undoes the steps in reverse: transpose first, then join the last two dimensions. A "
        "transposed tensor is not contiguous, so use `reshape` or `flatten`, not `view`.",
    ),
)


def split(x: Tensor, n_heads: int) -> Tensor:
    """One head at a time: its columns."""
    D = x.shape[-1] // n_heads
    return torch.stack([x[:, :, h * D : (h + 1) * D] for h in range(n_heads)], dim=1)


def heads_merge(x: Tensor) -> Tensor:
    """The heads of each token side by side."""
    return torch.cat([x[:, h] for h in range(x.shape[1])], dim=-1)


@heads.requirement(1, "split: the shape")
def split_shape(t: CheckContext, split_heads: Answer, merge_heads: Answer) -> None:
    """(B, T, H·D) becomes (B, H, T, D)"""
    B, H, T, _, D = t.sizes()
    t.shape(split_heads(t.randn(B, T, H * D), H), (B, H, T, D))


@heads.requirement(1, "split: the values")
def split_values(t: CheckContext, split_heads: Answer, merge_heads: Answer) -> None:
    """head h holds columns h·D to (h+1)·D − 1 of every token"""
    B, H, T, _, D = t.sizes()
    x = t.randn(B, T, H * D)
    t.close(split_heads(x, H), split(x, H), tolerance=0.0)


@heads.requirement(1, "merge: shape and values")
def merge_values(t: CheckContext, split_heads: Answer, merge_heads: Answer) -> None:
    """(B, H, T, D) becomes (B, T, H·D), the heads of a token side by side"""
    B, H, T, _, D = t.sizes()
    x = t.randn(B, H, T, D)
    t.close(merge_heads(x), heads_merge(x), tolerance=0.0)


@heads.requirement(1, "there and back, any dtype")
def round_trip(t: CheckContext, split_heads: Answer, merge_heads: Answer) -> None:
    """merging what was split gives back the very same tensor, in bf16 too, with right heads in between"""
    B, H, T, _, D = t.sizes()
    x = t.randn(B, T, H * D, dtype=torch.bfloat16)
    heads = split_heads(x, H)
    t.close(heads, split(x, H), tolerance=0.0)
    t.close(merge_heads(heads), x, tolerance=0.0)
    t.unchanged()


# 01.4: rotary position embedding, compared with complex multiplication in double precision

rope = Exercise(
    id="01.4",
    slug="rope",
    title="Rotary position embedding",
    answers=("rotate",),
    hints=(
        "Take one pair alone: (a, b) turned by the angle φ is (a·cos φ − b·sin φ, b·cos φ + a·sin φ). "
        "Here a is x[..., i] and b is x[..., i + D/2].",
        "The angles of all positions and pairs are an outer product: `positions[:, None] * omega[None, "
        ":]`, shape (T, D/2), with omega = theta ** (−2i/D) for i = 0 … D/2 − 1. It broadcasts over "
        "batch and heads.",
        "Compute in fp32: `positions.float()` and `x.float()`, and turn back to x's dtype at the very "
        "end. bf16 has 8 bits of precision, and a position of 1000 needs 10 before any fraction of an "
        "angle.",
        "`a, b = x.float().chunk(2, dim=-1)`, then `torch.cat((a * cos − b * sin, b * cos + a * sin), "
        "dim=-1)`.",
    ),
)


def rope_reference(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """Each pair as a complex number, multiplied by exp(i·m·ω)."""
    half = x.shape[-1] // 2
    omega = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones((), dtype=torch.float64), positions.double()[:, None] * omega)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def rope_draw(t: CheckContext, dtype: torch.dtype = torch.float32) -> Tensor:
    B, H, T, _, D = t.sizes()
    return t.randn(B, H, T, D, dtype=dtype)


@rope.requirement(1, "position 0 turns nothing, and lengths stay")
def lengths(t: CheckContext, rotate: Answer) -> None:
    """x itself at position 0; at any position every pair keeps its length, so x's norm stays; x is
    unchanged"""
    x = rope_draw(t)
    t.close(rotate(x, torch.zeros(x.shape[2], dtype=torch.int64)), x)
    got = rotate(x, torch.arange(x.shape[2]) + t.integer(3, 50))
    if t.shape(got, tuple(x.shape)):
        t.close(got.norm(dim=-1), x.norm(dim=-1), "norms")
    t.unchanged()


@rope.requirement(2, "the values from position 0")
def rope_values(t: CheckContext, rotate: Answer) -> None:
    """x turned by m·theta^(−2i/D) in the pairs (i, i + D/2)"""
    x = rope_draw(t)
    positions = torch.arange(x.shape[2])
    t.close(rotate(x, positions), rope_reference(x, positions), tolerance=1e-3)


@rope.requirement(1, "decode and gaps: any positions")
def anywhere(t: CheckContext, rotate: Answer) -> None:
    """the same at positions that start late or leave gaps"""
    x = rope_draw(t)
    positions = torch.tensor(sorted(t.random.sample(range(20, 2000), x.shape[2])))
    t.close(rotate(x, positions), rope_reference(x, positions), tolerance=2e-3)


@rope.requirement(1, "bf16 and another theta")
def rope_half(t: CheckContext, rotate: Answer) -> None:
    """bf16 out for bf16 in, right at positions of some thousands, with theta = 500000"""
    x = rope_draw(t, torch.bfloat16)
    positions = torch.arange(x.shape[2]) + t.integer(1000, 4000)
    t.close(rotate(x, positions, 500_000.0), rope_reference(x, positions, 500_000.0))


# 01.5: the preallocated KV cache, compared with a list of all that was written

cache = Exercise(
    id="01.5",
    slug="cache",
    title="A KV cache that never copies",
    answers=("KVCache",),
    hints=(
        "Two buffers of shape (batch, n_heads, max_len, head_dim) and one integer, the length: that is all.",
        "T new tokens go to the slots length … length + T − 1 of dimension 2, and the length grows by T "
        "= `k.shape[2]`, not by 1.",
        "Return `self.k[:, :, : self.length]`: slicing makes a view, which costs nothing. `torch.cat` "
        "or `.clone()` would copy the whole past at every step.",
        "Check `length + T > max_len` *before* you write, and raise ValueError: a slice that reaches "
        "past the end is cut short without an error, and a single token would vanish in silence.",
    ),
)

KV = tuple[Tensor, Tensor]


def cache_draw(
    t: CheckContext, *lengths: int, dtype: torch.dtype = torch.float32
) -> tuple[list[KV], tuple[int, ...]]:
    """New keys and values for these numbers of tokens, and (batch, heads, head dim)."""
    B, H, _, _, D = t.sizes()
    return [(t.randn(B, H, T, D, dtype=dtype), t.randn(B, H, T, D, dtype=dtype)) for T in lengths], (B, H, D)


def cache_same_as(t: CheckContext, got: object, written: list[KV]) -> None:
    """The answer's keys and values are all that was written, in order."""
    keys, values = t.pair(got, "append returns (keys, values)")
    t.close(keys, torch.cat([k for k, _ in written], dim=2), "keys:")
    t.close(values, torch.cat([v for _, v in written], dim=2), "values:")


@cache.requirement(1, "the first append")
def first(t: CheckContext, KVCache: Answer) -> None:
    """the keys and values just written, no empty slots behind them, in the cache's dtype"""
    dtype = t.pick(torch.float32, torch.bfloat16)
    new, (B, H, D) = cache_draw(t, t.integer(3, 6), dtype=dtype)
    cache = KVCache(B, H, t.integer(8, 12), D, dtype)
    cache_same_as(t, cache.append(*new[0]), new)


@cache.requirement(2, "prefill, chunks and single tokens")
def growing(t: CheckContext, KVCache: Answer) -> None:
    """after each append all keys and values so far, in order; two caches at a time do not mix"""
    new, (B, H, D) = cache_draw(t, t.integer(3, 5), 1, 1, t.integer(2, 4), 1)
    cache, other = (KVCache(B, H, 16, D, torch.float32) for _ in range(2))
    for i, (k, v) in enumerate(new):
        cache_same_as(t, cache.append(k, v), new[: i + 1])
        if i == 1:
            cache_same_as(t, other.append(v, k), [(v, k)])


@cache.requirement(1, "memory allocated once")
def allocated_once(t: CheckContext, KVCache: Answer) -> None:
    """every append returns views of the same memory, which has room for max_len tokens from the start"""
    new, (B, H, D) = cache_draw(t, t.integer(2, 4), 1, 2)
    cache = KVCache(B, H, 12, D, torch.float32)
    kept = [t.pair(cache.append(k, v), "append returns (keys, values)") for k, v in new]
    for part in (0, 1):
        places = {pair[part].untyped_storage().data_ptr() for pair in kept}
        t.true(len(places) == 1, "a view of the same memory each time", "new memory at each append")
    room = kept[0][0].untyped_storage().nbytes()
    t.true(room >= B * H * 12 * D * 4, "memory for max_len tokens at once", "memory for fewer tokens")


@cache.requirement(1, "a full cache")
def full(t: CheckContext, KVCache: Answer) -> None:
    """room for exactly max_len tokens; then ValueError, for one token and for several, and nothing is lost"""
    new, (B, H, D) = cache_draw(t, t.integer(3, 6), 2, 1, 3)
    max_len = new[0][0].shape[2] + 2
    cache = KVCache(B, H, max_len, D, torch.float32)
    cache.append(*new[0])
    if fits(t, cache, new[:2], f"{max_len} of {max_len} slots used, all appends in order"):
        t.raises(ValueError, lambda: cache.append(*new[2]), "when one token meets a full cache")
    cache = KVCache(B, H, max_len, D, torch.float32)
    cache.append(*new[0])
    if t.raises(ValueError, lambda: cache.append(*new[3]), "when three tokens meet two free slots"):
        fits(t, cache, new[:2], "two tokens for two free slots, after an append that was refused")


def fits(t: CheckContext, cache: Any, written: list[KV], when: str) -> bool:
    """The last of ``written`` is taken, and all of it comes back."""
    try:
        got = cache.append(*written[-1])
    except Raised as raised:
        if not isinstance(raised.error, ValueError):
            raise
        came = f"a ValueError although the tokens fit: {when}"
        return t.note(f"refused: {when}", Difference("", "all tokens so far", came))
    cache_same_as(t, got, written)
    return True


@cache.requirement(1, "reset")
def reset(t: CheckContext, KVCache: Answer) -> None:
    """an empty cache: the next append starts over at slot 0"""
    new, (B, H, D) = cache_draw(t, t.integer(3, 6), 2, 1)
    cache = KVCache(B, H, 9, D, torch.float32)
    cache.append(*new[0])
    cache.reset()
    cache_same_as(t, cache.append(*new[1]), new[1:2])
    cache_same_as(t, cache.append(*new[2]), new[1:])


# 01.6: prefill in chunks through a cache, compared with one pass over the whole prompt

prefill = Exercise(
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


def prefill_draw(t: CheckContext, T: int) -> tuple[QKV, Rope]:
    B, H, _, _, D = t.sizes()
    q, k, v = (t.randn(B, H, T, D) for _ in range(3))
    return (q, k, v), Rope(D, RopeConfig())


def one_pass(q: Tensor, k: Tensor, v: Tensor, rope: Rope) -> Tensor:
    positions = torch.arange(q.shape[2])[None]
    return F.scaled_dot_product_attention(rope(q, positions), rope(k, positions), v, is_causal=True)


def same_as_one_pass(t: CheckContext, chunked_prefill: Answer, T: int, chunk: int) -> None:
    (q, k, v), rope = prefill_draw(t, T)
    cache = WatchedCache(q, T)
    t.close(chunked_prefill(q, k, v, cache, rope, chunk), one_pass(q, k, v, rope), tolerance=1e-3)
    in_chunks(t, cache, chunk)


def in_chunks(t: CheckContext, cache: WatchedCache, chunk: int) -> None:
    """No append brought more than a chunk."""
    largest = max(cache.appended, default=0)
    came = f"an append of {largest} tokens" if largest else "nothing was appended to the cache"
    tokens = f"{chunk} tokens" if chunk > 1 else "1 token"
    t.true(0 < largest <= chunk, f"appends of at most {tokens}", came)


@prefill.requirement(1, "the whole prompt as one chunk", rounds=2)
def one_chunk(t: CheckContext, chunked_prefill: Answer) -> None:
    """causal attention with RoPE over the prompt, (B, H, T, D)"""
    T = t.integer(4, 9)
    same_as_one_pass(t, chunked_prefill, T, T + t.integer(0, 3))


@prefill.requirement(2, "equal chunks", rounds=2)
def equal_chunks(t: CheckContext, chunked_prefill: Answer) -> None:
    """the same outputs as in one pass, when the chunks divide the prompt; one chunk in each append"""
    chunk = t.integer(3, 5)
    same_as_one_pass(t, chunked_prefill, chunk * t.integer(2, 4), chunk)


@prefill.requirement(1, "a shorter last chunk", rounds=2)
def ragged(t: CheckContext, chunked_prefill: Answer) -> None:
    """the same when a rest is left over"""
    chunk = t.integer(3, 5)
    same_as_one_pass(t, chunked_prefill, chunk * t.integer(2, 3) + t.integer(1, chunk - 1), chunk)


@prefill.requirement(1, "one token at a time", rounds=2)
def single_tokens(t: CheckContext, chunked_prefill: Answer) -> None:
    """the same with chunk = 1: prefill by decoding"""
    same_as_one_pass(t, chunked_prefill, t.integer(4, 7), 1)


@prefill.requirement(1, "continuing what is in the cache", rounds=2)
def continuing(t: CheckContext, chunked_prefill: Answer) -> None:
    """a second prompt goes on behind what the cache holds; q, k and v unchanged"""
    chunk = t.integer(2, 3)
    first, second = chunk * 2 + 1, chunk * 2
    (q, k, v), rope = prefill_draw(t, first + second)
    cache = WatchedCache(q, first + second)
    parts = [
        chunked_prefill(q[:, :, part], k[:, :, part], v[:, :, part], cache, rope, chunk)
        for part in (slice(0, first), slice(first, None))
    ]
    for got, want in zip(parts, one_pass(q, k, v, rope).split((first, second), dim=2), strict=True):
        t.close(got, want, tolerance=1e-3)
    in_chunks(t, cache, chunk)
    t.unchanged()


# 01.7: merging partial attention by log-sum-exp, compared with attention over all keys at once

Part = tuple[Tensor, Tensor]

merge = Exercise(
    id="01.7",
    slug="merge",
    title="Merge two partial results (online softmax)",
    answers=("merge",),
    hints=(
        "out_a was divided by exp(lse_a), the sum of its exponentials. To combine, undo that: each part "
        "weighs exp(lse), and the common divisor is exp(lse_a) + exp(lse_b).",
        "So lse = log(exp(lse_a) + exp(lse_b)), which is `torch.logaddexp(lse_a, lse_b)`, and out = "
        "exp(lse_a − lse)·out_a + exp(lse_b − lse)·out_b. Weights are (B, H, T): add a dimension with "
        "`[..., None]`.",
        "exp(100) overflows in fp32. Take only differences into exp: lse_a − lse is never positive, so "
        "its exponential is at most 1.",
        "With both parts empty, lse − lse is −∞ − (−∞) = NaN. Replace −∞ by any finite number in what "
        "you subtract: `lse.masked_fill(lse == -torch.inf, 0.0)`. exp(−∞ − 0) is 0, as it should be.",
    ),
)


def merge_attend(q: Tensor, k: Tensor, v: Tensor) -> Part:
    """Attention over these keys in double precision, and the log-sum-exp of its scores."""
    scores = q.double() @ k.double().transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.double()).float(), scores.logsumexp(-1).float()


def merge_draw(t: CheckContext, *n_keys: int) -> tuple[list[Part], Part]:
    """Partial results over these numbers of keys, and the result over all of them together."""
    B, H, T, _, D = t.sizes()
    q, k, v = t.randn(B, H, T, D), t.randn(B, H, sum(n_keys), D), t.randn(B, H, sum(n_keys), D)
    parts = [merge_attend(q, *kv) for kv in zip(k.split(n_keys, dim=2), v.split(n_keys, dim=2), strict=True)]
    return parts, merge_attend(q, k, v)


def part(t: CheckContext, got: object) -> Part:
    """What merge returned, if it has a place for both."""
    out, lse = t.pair(got, "a pair (out, lse)")
    if out.ndim == 3 and lse.ndim == 4:
        expected = "(out, lse) of shapes (B, H, T, D) and (B, H, T)"
        t.note(out, Difference("", expected, f"{tuple(out.shape)} and {tuple(lse.shape)}: swapped?"))
        raise Stop
    return out, lse


def merge_same_as(t: CheckContext, got: object, want: Part, tolerance: float | None = None) -> Part:
    out, lse = part(t, got)
    t.close(out, want[0], "out:", tolerance)
    t.close(lse, want[1], "lse:", tolerance)
    return out, lse


def empty(part: Part) -> Part:
    """What attention over no keys gives, in the shape of ``part``."""
    return torch.zeros_like(part[0]), torch.full_like(part[1], -torch.inf)


@merge.requirement(2, "two ordinary parts")
def ordinary(t: CheckContext, merge: Answer) -> None:
    """out (B, H, T, D) and lse (B, H, T) as if all keys had been seen together"""
    (a, b), whole = merge_draw(t, t.integer(2, 9), t.integer(2, 9))
    merge_same_as(t, merge(*a, *b), whole)


@merge.requirement(1, "large scores")
def merge_large(t: CheckContext, merge: Answer) -> None:
    """finite and right with log-sum-exps of +200 (exp overflows) and of −200 (every exp is 0), and with
    both in different rows"""
    (a, b), whole = merge_draw(t, t.integer(2, 9), t.integer(2, 9))
    signs = torch.where(t.mask(*whole[1].shape, share=0.5), 1.0, -1.0)
    for shift in (200.0 * torch.ones(()), -200.0 * torch.ones(()), 200.0 * signs):
        got = merge(a[0], a[1] + shift, b[0], b[1] + shift)
        merge_same_as(t, got, (whole[0], whole[1] + shift), tolerance=1e-3)


@merge.requirement(1, "one part empty")
def one_empty(t: CheckContext, merge: Answer) -> None:
    """an empty part (out 0, lse −∞) contributes nothing, whichever side it stands on"""
    (a,), _ = merge_draw(t, t.integer(2, 9))
    merge_same_as(t, merge(*a, *empty(a)), a)
    merge_same_as(t, merge(*empty(a), *a), a)


@merge.requirement(1, "both parts empty")
def both_empty(t: CheckContext, merge: Answer) -> None:
    """out 0 and lse −∞, not NaN, for the rows in which both are empty; the other rows as ever"""
    (a, b), (out, lse) = merge_draw(t, t.integer(2, 9), t.integer(2, 9))
    rows = t.mask(*lse.shape) if lse.shape[2] > 1 else torch.ones(lse.shape, dtype=torch.bool)
    for part_out, part_lse in (a, b, (out, lse)):
        part_out[rows], part_lse[rows] = 0.0, -torch.inf
    merge_same_as(t, merge(*a, *b), (out, lse))


@merge.requirement(1, "three parts in any order")
def three(t: CheckContext, merge: Answer) -> None:
    """merging goes on with what merging gave, in whichever order; the inputs stay unchanged"""
    parts, whole = merge_draw(t, t.integer(1, 6), t.integer(2, 9), t.integer(1, 6))
    t.random.shuffle(parts)
    first = part(t, merge(*parts[0], *parts[1]))
    merge_same_as(t, merge(*parts[2], *first), whole)
    t.unchanged()


# 01.8: bytes of the cache of a real model, compared with the models' published shapes and a bare count

size = Exercise(
    id="01.8",
    slug="size",
    title="The cache of a real model, in bytes",
    answers=("cache_size",),
    hints=(
        "Count what one token leaves behind: in every layer, for every *KV* head, one key and one value "
        "of head_dim numbers, each of so many bytes.",
        "bytes_per_token = 2 · layers · KV heads · head_dim · bytes a number. bfloat16 and float16 take "
        "2 bytes, float32 takes 4, the float8 formats take 1: `getattr(torch, name).itemsize` knows.",
        "Stored is what the cache allocates: max_len tokens for each of len(lengths) sequences. Read is "
        "what one decode step touches: the tokens that are there, sum(lengths).",
        '1 GiB is 2**30 bytes; 1 GB is 10**9. `config.get("num_key_value_heads", '
        'config["num_attention_heads"])` serves models old and new.',
    ),
)

Config = dict[str, Any]
BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1, "float16": 2}

# From the models' config.json.
MULTI_HEAD: list[Config] = [
    {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32},
    {"num_hidden_layers": 40, "hidden_size": 5120, "num_attention_heads": 40},
    {"num_hidden_layers": 32, "hidden_size": 2560, "num_attention_heads": 32},
]
GROUPED: list[Config] = [
    {"num_hidden_layers": 126, "hidden_size": 16384, "num_attention_heads": 128, "num_key_value_heads": 8},
    {"num_hidden_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8},
    {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8},
    {
        "num_hidden_layers": 34,
        "hidden_size": 2560,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
    },
]


def count(config: Config) -> int:
    """Bytes that one token leaves behind, layer by layer and head by head."""
    heads: int = config["num_attention_heads"]
    kv_heads: int = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    total = 0
    for _layer in range(config["num_hidden_layers"]):
        for _head in range(kv_heads):
            key = value = head_dim * BYTES[config["torch_dtype"]]
            total += key + value
    return total


def size_draw(t: CheckContext, models: list[Config]) -> tuple[Config, int, list[int]]:
    """A model, a context length and the lengths of a batch, as the answer gets them."""
    config = {**models[t.round % len(models)], "torch_dtype": list(BYTES)[t.round]}
    max_len = t.pick(2048, 8192, 32768, 131072)
    return config, max_len, [t.integer(1, max_len) for _ in range(t.integer(3, 7))]


def plain(t: CheckContext) -> tuple[Config, int, list[int]]:
    """The same with nothing to look up twice: bf16, and every field given."""
    config, max_len, lengths = size_draw(t, MULTI_HEAD)
    heads = config["num_attention_heads"]
    given = {"num_key_value_heads": heads, "head_dim": config["hidden_size"] // heads}
    return {**config, **given, "torch_dtype": "bfloat16"}, max_len, lengths


def per_token(config: Config, got: Any) -> float:
    """The answer's own bytes per token: a mistake in them, told above, shall not cost the other points
    too."""
    own = plain_number(got.get("bytes_per_token")) if isinstance(got, dict) else None
    return own if own is not None and own > 0 else count(config)


def field(t: CheckContext, got: Any, name: str) -> Any:
    if not isinstance(got, dict) or name not in got:
        t.true(
            False,
            f"a dict with the key {name!r}",
            f"keys {list(got)[:6]}" if isinstance(got, dict) else describe(got),
        )
        raise Stop
    return got[name]


@size.requirement(1, "bytes per token, multi-head attention")
def multi_head(t: CheckContext, cache_size: Answer) -> None:
    """keys and values of all layers and heads, at the dtype's bytes; models like Llama 2 and Pythia"""
    config, max_len, lengths = size_draw(t, MULTI_HEAD)
    t.number(
        field(t, cache_size(config, max_len, lengths), "bytes_per_token"), count(config), "bytes_per_token"
    )


@size.requirement(1, "bytes per token, grouped heads", rounds=4)
def grouped(t: CheckContext, cache_size: Answer) -> None:
    """the same where num_key_value_heads is smaller, or head_dim is given: Llama 3.1 405B and its like"""
    config, max_len, lengths = size_draw(t, GROUPED)
    t.number(
        field(t, cache_size(config, max_len, lengths), "bytes_per_token"), count(config), "bytes_per_token"
    )


@size.requirement(1, "stored")
def stored(t: CheckContext, cache_size: Answer) -> None:
    """bytes_per_token for max_len tokens in every sequence of the batch"""
    config, max_len, lengths = plain(t)
    got = cache_size(config, max_len, lengths)
    t.number(field(t, got, "stored"), per_token(config, got) * max_len * len(lengths), "stored")


@size.requirement(1, "read by one decode step")
def read(t: CheckContext, cache_size: Answer) -> None:
    """bytes_per_token for the tokens that are in the cache, sequence by sequence"""
    config, max_len, lengths = plain(t)
    got = cache_size(config, max_len, lengths)
    t.number(field(t, got, "read"), per_token(config, got) * sum(lengths), "read")


@size.requirement(1, "stored, in GiB")
def gib(t: CheckContext, cache_size: Answer) -> None:
    """stored in units of 2³⁰ bytes"""
    config, max_len, lengths = plain(t)
    got = cache_size(config, max_len, lengths)
    want = per_token(config, got) * max_len * len(lengths) / 2**30
    t.number(field(t, got, "stored_gib"), want, "stored_gib")


EXERCISES = (attend, mask, heads, rope, cache, prefill, merge, size)
