"""Unit 01: requirements and hints of the exercises on full attention."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn import workbench
from kvlearn.attention import KVCache, core
from kvlearn.attention.rope import Rope, RopeConfig
from kvlearn.grading import (
    Answer,
    CallWrapper,
    CheckContext,
    Difference,
    Exercise,
    Raised,
    Stop,
    compare,
    describe,
    new_tensors,
    plain_number,
)

# The results of 01.1 and 01.7, which merge with others

Part = tuple[Tensor, Tensor]


def part(t: CheckContext, got: object) -> Part:
    """The pair (out, lse), if the answer gave one."""
    out, lse = t.pair(got, "a pair (out, lse)")
    if out.ndim == 3 and lse.ndim == 4:
        expected = "(out, lse) of shapes (B, H, T, D) and (B, H, T)"
        t.note(out, Difference("", expected, f"{tuple(out.shape)} and {tuple(lse.shape)}: swapped?"))
        raise Stop
    return out, lse


def same_part(t: CheckContext, got: object, want: Part, tolerance: float | None = None) -> None:
    out, lse = part(t, got)
    t.close(out, want[0], "out:", tolerance)
    t.close(lse, want[1], "lse:", tolerance)


# 01.1: attention with a mask, and its log-sum-exp, compared with PyTorch's own in higher precision

SOFTMAX = (torch.softmax, Tensor.softmax, torch.special.softmax)
LOG_SOFTMAX = (torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax)
LOGSUMEXP = (torch.logsumexp, Tensor.logsumexp, torch.special.logsumexp)

attend = Exercise(
    id="01.1",
    slug="attend",
    title="Attention with a mask and its log-sum-exp",
    answers=("attend",),
    forbidden={
        F.scaled_dot_product_attention: "torch's scaled_dot_product_attention",
        **dict.fromkeys(SOFTMAX, "torch's softmax"),
        **dict.fromkeys(LOG_SOFTMAX, "torch's log_softmax"),
        **dict.fromkeys(LOGSUMEXP, "torch's logsumexp"),
    },
    hints=(
        "What is exp(1000) in fp32, and what is exp(1000 − 1000)? Which number may you subtract from all "
        "scores of a query without changing its weights, and what must be added to the lse for it?",
        "In words: convert q, k and v to fp32; scores; −∞ where the mask is False; the largest score of "
        "each query; weights = exp(score − largest); total = the sum of the weights. Both results come "
        "from these: out needs weights and total, lse needs total and largest.",
        "`scores.masked_fill(~mask, -torch.inf)` before the exponential: exp(−∞) is 0, so a hidden key is "
        "neither in the output nor in the total. `scores.amax(dim=-1, keepdim=True)` is the largest score.",
        "A query without keys has the largest score −∞, and −∞ − (−∞) is NaN. Replace it: "
        "`largest.masked_fill(largest == -torch.inf, 0.0)`. Then its weights and its total are 0, "
        "log(0) = −∞ is the lse asked for, and only 0 / 0 in the output is left to avoid.",
        "out = weights @ v / total, with total 1 where it is 0, in the dtype of q at the end; lse = "
        "largest + log(total), without the last dimension.",
    ),
)


def attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Part:
    """SDPA in fp32, and the log-sum-exp in double precision; without keys 0 and −∞."""
    out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    scores = q.double() @ k.double().transpose(-2, -1) / q.shape[-1] ** 0.5
    if mask is not None:
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
        scores = scores.masked_fill(~mask, -torch.inf)
    return out.to(q.dtype), scores.logsumexp(-1).float()


def attend_draw(t: CheckContext, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, S, D = t.sizes()
    return (
        t.randn(B, H, T, D, dtype=dtype),
        t.randn(B, H, S, D, dtype=dtype),
        t.randn(B, H, S, D, dtype=dtype),
    )


@attend.requirement(1, "the shapes")
def shapes(t: CheckContext, attend: Answer) -> None:
    """out (B, H, T, D) and lse (B, H, T), also when there are more keys than queries"""
    q, k, v = attend_draw(t)
    out, lse = part(t, attend(q, k, v))
    t.shape(out, tuple(q.shape), "out:")
    t.shape(lse, tuple(q.shape[:3]), "lse:")


@attend.requirement(1, "out, without a mask")
def attend_values(t: CheckContext, attend: Answer) -> None:
    """softmax(q kᵀ / √D) v in fp32"""
    q, k, v = attend_draw(t)
    t.close(part(t, attend(q, k, v))[0], attend_reference(q, k, v)[0], "out:")


@attend.requirement(1, "out, with a mask")
def masked(t: CheckContext, attend: Answer) -> None:
    """the same over the keys where the mask is True; masks of shape (T, S) and (B, 1, T, S)"""
    q, k, v = attend_draw(t)
    B, _, T, _ = q.shape
    for shape in ((T, k.shape[2]), (B, 1, T, k.shape[2])):
        mask = t.mask(*shape)
        t.close(part(t, attend(q, k, v, mask))[0], attend_reference(q, k, v, mask)[0], "out:")


@attend.requirement(1, "lse, without and with a mask")
def attend_lse(t: CheckContext, attend: Answer) -> None:
    """log Σ exp(score) over the keys that the query may attend to"""
    q, k, v = attend_draw(t)
    for mask in (None, t.mask(q.shape[2], k.shape[2])):
        t.close(part(t, attend(q, k, v, mask))[1], attend_reference(q, k, v, mask)[1], "lse:")


@attend.requirement(1, "a query without keys")
def empty_rows(t: CheckContext, attend: Answer) -> None:
    """out 0 and lse −∞ for a query that may attend to nothing, and the other queries as before"""
    q, k, v = attend_draw(t)
    mask = t.mask(q.shape[0], 1, q.shape[2], k.shape[2])
    mask[t.integer(0, q.shape[0] - 1), :, t.integer(0, q.shape[2] - 1)] = False
    same_part(t, attend(q, k, v, mask), attend_reference(q, k, v, mask))


@attend.requirement(1, "half precision in, sums in fp32")
def attend_half(t: CheckContext, attend: Answer) -> None:
    """for bf16 and fp16 out in the same dtype, right within its precision, and lse in fp32, right to 0.001"""
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = attend_draw(t, dtype)
        q = q * 4
        mask = t.mask(q.shape[2], k.shape[2])
        out, lse = part(t, attend(q, k, v, mask))
        want = attend_reference(q, k, v, mask)
        t.close(out, want[0], "out:")
        if t.true(lse.dtype == torch.float32, "lse in float32", f"lse in {lse.dtype}"):
            t.close(lse, want[1], "lse:", tolerance=1e-3)


@attend.requirement(1, "large scores, and inputs left alone")
def attend_large(t: CheckContext, attend: Answer) -> None:
    """finite and right when scores reach ±1000; q, k, v and the mask unchanged afterwards"""
    q, k, v = attend_draw(t)
    q = q * 300
    # All scores of the first query are about −700: a hidden key with the score 0 would take all the weight.
    q[:, :, 0], k[..., 0] = q[:, :, 0] / 3, q.shape[-1] ** 0.5
    q[:, :, 0, 0] = -700.0
    mask = t.mask(q.shape[2], k.shape[2])
    same_part(t, attend(q, k, v, mask), attend_reference(q, k, v, mask), tolerance=1e-3)
    t.unchanged()


# 01.2: the causal mask of rows that are padded on the left, compared with a loop over positions

mask = Exercise(
    id="01.2",
    slug="mask",
    title="A causal mask for rows padded on the left",
    answers=("causal_mask",),
    hints=(
        "Number the S positions of one row from 0. At which of them are the T queries, at which the "
        "padding, and which keys are left for the query at position p?",
        "Two conditions, and a key must meet both: one says that it is not later than the query, the other "
        "that it is not padding. Which of the two differs from row to row of the batch?",
        "Query t is at position S − T + t. In the row with n padding tokens the first key that anybody "
        "may see is at position n. A query that is padding needs no case of its own: which keys meet "
        "both conditions for it?",
        "Let broadcasting make the four dimensions: key positions (S,), query positions (T, 1), and "
        "`torch.as_tensor(padding)[:, None, None, None]` (B, 1, 1, 1).",
    ),
)


def mask_reference(n_queries: int, n_keys: int, padding: list[int]) -> Tensor:
    """One pair at a time."""
    start = n_keys - n_queries
    rows = [
        [[[n <= key <= start + query for key in range(n_keys)] for query in range(n_queries)]]
        for n in padding
    ]
    return torch.tensor(rows)


def hides_the_rest(
    t: CheckContext, causal_mask: Answer, n_queries: int, n_keys: int, padding: list[int]
) -> None:
    """The right pairs are marked, be the mask of ones and zeros, of 0 and −∞, or with dimensions of size 1
    missing or added: those cost the point for the form and no other."""
    B, T, S = len(padding), n_queries, n_keys
    got = mask = causal_mask(T, S, rows_padded(t, padding))
    if isinstance(mask, Tensor) and not mask.is_complex():
        if mask.numel() == B * T * S:
            mask = mask.reshape(B, 1, T, S)
        elif mask.numel() == T * S:  # one mask for all rows
            mask = mask.reshape(T, S).expand(B, 1, T, S)
        additive = mask.dtype.is_floating_point and not (mask > 0).any()
        mask = mask == 0 if additive else mask.bool()
    t.note(got, compare(mask, mask_reference(T, S, padding)))


def rows_padded(t: CheckContext, padding: list[int]) -> list[int] | Tensor:
    """As a tensor in the second round."""
    return torch.tensor(padding) if t.round == 1 else padding


def chunk_sizes(t: CheckContext) -> tuple[int, int]:
    """1 < T < S, with room for padding before the queries."""
    T = t.integer(3, 6)
    return T, T + t.integer(3, 9)


@mask.requirement(1, "a boolean mask, (B, 1, T, S)")
def form(t: CheckContext, causal_mask: Answer) -> None:
    """dtype bool and four dimensions: the rows of the batch, 1 for all heads, the queries, the keys"""
    T, S = chunk_sizes(t)
    padding = t.random.sample(range(S - T + 1), t.pick(2, 3))
    t.form(causal_mask(T, S, rows_padded(t, padding)), (len(padding), 1, T, S), torch.bool)


@mask.requirement(1, "no padding")
def no_padding(t: CheckContext, causal_mask: Answer) -> None:
    """True up to each query's own position: the T queries are the last of the S positions, for a whole
    prompt (T = S), a chunk (1 < T < S) and one token (T = 1, and the very first one, S = 1)"""
    padding = [0] * t.pick(2, 3)
    n = t.integer(4, 9)
    for T, S in ((n, n), chunk_sizes(t), (1, n), (1, 1)):
        hides_the_rest(t, causal_mask, T, S, padding)


@mask.requirement(1, "a chunk behind a padded prompt, 1 < T < S")
def chunk(t: CheckContext, causal_mask: Answer) -> None:
    """the same, and False for the padding keys of each row"""
    T, S = chunk_sizes(t)
    hides_the_rest(t, causal_mask, T, S, t.random.sample(range(S - T + 1), 3))


@mask.requirement(1, "one token in decode, T = 1")
def decode(t: CheckContext, causal_mask: Answer) -> None:
    """the newest token sees its row's S keys but for the padding"""
    S = t.integer(5, 12)
    hides_the_rest(t, causal_mask, 1, S, t.random.sample(range(S), 3))


@mask.requirement(1, "a whole padded prompt, T = S")
def padded_prompt(t: CheckContext, causal_mask: Answer) -> None:
    """a query that is itself padding sees nothing; one row is padding from end to end"""
    n = t.integer(5, 9)
    hides_the_rest(t, causal_mask, n, n, [*t.random.sample(range(1, n), 2), n])


# 01.3: split a fused projection into heads and merge heads, compared with a loop over heads

heads = Exercise(
    id="01.3",
    slug="heads",
    title="Split a fused projection, merge the heads",
    answers=("split_qkv", "merge_heads"),
    hints=(
        "Write down which columns of x belong to q of head 0, k of head 0, v of head 0, q of head 1. How "
        "many columns does one head have, and in which order would you name the three sizes that the last "
        "dimension is cut into?",
        "In words: cut the last dimension in three without moving a number; move the dimensions into the "
        "order asked for without copying; take q, k and v apart along the one that has size 3.",
        "`view` keeps the order of the numbers, and so does `reshape` where it copies nothing; `transpose`, "
        "`permute` and `movedim` change the order of dimensions and copy nothing either; `unbind` and "
        "indexing give views. `contiguous`, `stack`, `cat` and `clone` copy.",
        "(B, T, 3·H·D) → (B, T, H, 3, D): of these, dimension 3 is unbound, and then T and H change places.",
        "Merging undoes the steps in reverse: heads behind the tokens, then the last two dimensions as one. "
        "A transposed tensor is not contiguous, so use `reshape` or `flatten`, not `view`.",
    ),
)


def split_reference(x: Tensor, n_heads: int) -> list[Tensor]:
    """q, k and v, one head at a time: its columns."""
    D = x.shape[-1] // (3 * n_heads)
    runs = x.split(D, dim=-1)
    return [torch.stack(runs[which::3], dim=1) for which in range(3)]


def heads_merge(x: Tensor) -> Tensor:
    """The heads of each token side by side."""
    return torch.cat([x[:, h] for h in range(x.shape[1])], dim=-1)


def split_draw(t: CheckContext, *, one_token: bool = True) -> tuple[Tensor, int, tuple[int, ...]]:
    """A fused projection, in bf16 in the third round, the number of heads, and the shape of q.

    T = 1 in the second round, unless ``one_token`` is false.
    """
    B, H, T, _, D = t.sizes()
    T = T if one_token else t.integer(3, 6)
    dtype = torch.bfloat16 if t.round == 2 else torch.float32
    return t.randn(B, T, 3 * H * D, dtype=dtype), H, (B, H, T, D)


def three(t: CheckContext, got: object) -> list[Tensor]:
    """q, k and v, in a tuple, a list or one tensor."""
    parts = list(got) if isinstance(got, tuple | list) or (isinstance(got, Tensor) and got.ndim == 5) else []
    if len(parts) == 3 and all(isinstance(one, Tensor) for one in parts):
        return parts
    t.note(got, Difference("", "three tensors (q, k, v)", describe(got)))
    raise Stop


@heads.requirement(1, "split: the shapes")
def split_shapes(t: CheckContext, split_qkv: Answer, merge_heads: Answer) -> None:
    """(B, T, 3·H·D) becomes three of (B, H, T, D)"""
    x, n_heads, shape = split_draw(t)
    for name, got in zip("qkv", three(t, split_qkv(x, n_heads)), strict=True):
        t.shape(got, shape, f"{name}:")


@heads.requirement(2, "split: the values")
def split_values(t: CheckContext, split_qkv: Answer, merge_heads: Answer) -> None:
    """of the columns h·3D to (h+1)·3D − 1 of every token, head h's q, k and v have D each; any dtype"""
    x, n_heads, _ = split_draw(t)
    parts = three(t, split_qkv(x, n_heads))
    for name, got, want in zip("qkv", parts, split_reference(x, n_heads), strict=True):
        t.close(got, want, f"{name}:", tolerance=0.0)


@heads.requirement(1, "split: views, no copy")
def split_views(t: CheckContext, split_qkv: Answer, merge_heads: Answer) -> None:
    """q, k and v lie in the memory of x: no new tensor is made"""
    x, n_heads, shape = split_draw(t, one_token=False)  # of one token some copies are views
    with new_tensors() as made:
        got = split_qkv(x, n_heads)
    for one in three(t, got):
        t.shape(one, shape)
    # The wrapper around the answer copies x and compares the copy: those have x's shape.
    copies = [one for one in made if one.shape != tuple(x.shape) and one.numel >= math.prod(shape)]
    came = f"a copy of shape {copies[0].shape}, made by {copies[0].op}" if copies else ""
    t.note(bool(copies), Difference("", "views of x, no copy", came) if copies else None)


@heads.requirement(1, "merge: shape and values")
def merge_values(t: CheckContext, split_qkv: Answer, merge_heads: Answer) -> None:
    """(B, H, T, D) becomes (B, T, H·D), the heads of a token side by side; any dtype"""
    B, H, T, _, D = t.sizes()
    x = t.randn(B, H, T, D, dtype=torch.bfloat16 if t.round == 2 else torch.float32)
    t.close(merge_heads(x), heads_merge(x), tolerance=0.0)


# 01.4: rotary position embedding, compared with complex multiplication in double precision

rope = Exercise(
    id="01.4",
    slug="rope",
    title="Rotary position embedding",
    answers=("rotate",),
    hints=(
        "Which two numbers of x form pair i? How far does a token at position 0 turn, and how does the angle "
        "of one pair grow from each position to the next?",
        "In words: one frequency for each pair; angles = position times frequency, a table of T rows and D/2 "
        "columns, in fp32; cos and sin of it; the two halves of x; each pair turned; both halves joined, in "
        "the dtype of x.",
        "The angles are an outer product: `positions.float()[:, None] * omega`, shape (T, D/2), with omega = "
        "theta ** (−2i/D) for i = 0 … D/2 − 1. It broadcasts over batch and heads.",
        "bf16 has 8 bits of precision, and a position of 1000 needs 10 before any fraction of an angle: "
        "convert to fp32 before the first product, and back to the dtype of x at the very end.",
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


@rope.requirement(1, "half precision and another theta")
def rope_half(t: CheckContext, rotate: Answer) -> None:
    """bf16 and fp16 in, the same dtype out, angles in fp32: right at positions of some thousands, with
    theta = 500000"""
    x = rope_draw(t, torch.float16 if t.round == 2 else torch.bfloat16)
    positions = torch.arange(x.shape[2]) + t.integer(1000, 4000)
    t.close(rotate(x, positions, 500_000.0), rope_reference(x, positions, 500_000.0))


# 01.5: the preallocated KV cache, compared with a list of all that was written

cache = Exercise(
    id="01.5",
    slug="cache",
    title="Mend this cache, then give it undo and fork",
    answers=("KVCache",),
    hints=(
        "Which chunks does the picture show as right, and what is different about the first one that is not? "
        "Feed a `BrokenCache` three tokens and then one, and look at what comes back.",
        "Follow `start` by hand for chunks of 3, 3 and 1 tokens: in which slot does each begin, and in which "
        "should it? T new tokens belong behind the old ones, in the slots length … length + T − 1.",
        "With the length kept as an integer, `undo(n)` is one subtraction, after a comparison that may "
        "raise. What is in the slots behind the length does not matter: the next append writes over it.",
        "`fork` makes a new cache of the same sizes, copies the tokens that are there into its memory, and "
        "sets its length. `copy.copy(self)` is not enough: both would write into the same tensors.",
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
    """the keys and values just written, no empty slots behind them, in the cache's dtype whatever comes in"""
    dtype = (torch.float32, torch.bfloat16, torch.float16)[t.round]
    new, (B, H, D) = cache_draw(t, t.integer(3, 6))
    cache = KVCache(B, H, t.integer(8, 12), D, dtype)
    cache_same_as(t, cache.append(*new[0]), [(new[0][0].to(dtype), new[0][1].to(dtype))])


@cache.requirement(2, "chunks of any sizes, and single tokens")
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
    same_memory(t, kept)
    room = sum(
        {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in kept[0]}.values()
    )
    t.true(room >= 2 * B * H * 12 * D * 4, "memory for max_len tokens at once", "memory for fewer tokens")


def same_memory(t: CheckContext, kept: list[tuple[Tensor, Tensor]]) -> None:
    """The keys of all pairs are in one memory, and so are the values."""
    for part in (0, 1):
        places = {pair[part].untyped_storage().data_ptr() for pair in kept}
        t.true(len(places) == 1, "a view of the same memory each time", "new memory at each append")


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


@cache.requirement(1, "undo")
def undo(t: CheckContext, KVCache: Answer) -> None:
    """the last n tokens are forgotten, part of a chunk or several chunks; what follows goes in their place,
    in the same memory, and there is room for max_len tokens as before"""
    new, (B, H, D) = cache_draw(t, t.integer(5, 7), 2, 3, 1, 12)
    cache = KVCache(B, H, 13, D, torch.float32)
    kept = [cache.append(*new[0]), cache.append(*new[1])]
    n = (1, 3, 0)[t.round]  # part of the last chunk; all of it and one more; nothing
    there = new[0][0].shape[2] + 2 - n
    left = tuple(torch.cat(parts, dim=2)[:, :, :there] for parts in zip(*new[:2], strict=True))
    undone(t, cache, n, there + n)
    kept.append(cache.append(*new[2]))
    cache_same_as(t, kept[-1], [(left[0], left[1]), new[2]])
    undone(t, cache, there + 3, there + 3)
    kept.append(cache.append(*new[3]))
    cache_same_as(t, kept[-1], [new[3]])
    same_memory(t, [t.pair(pair, "append returns (keys, values)") for pair in kept])
    fits(t, cache, [new[3], new[4]], "13 of 13 slots used, after an undo of all tokens")


def undone(t: CheckContext, cache: Any, n: int, length: int) -> None:
    """An undo that is to be taken; the end of this round if it is refused."""
    try:
        cache.undo(n)
    except Raised as raised:
        if not isinstance(raised.error, ValueError):
            raise
        came = f"a ValueError at undo({n}) of {length} tokens"
        t.note(f"refused: undo {'of all' if n == length else ''}", Difference("", "n tokens fewer", came))
        raise Stop from None


@cache.requirement(1, "undo of more tokens than there are")
def undo_refused(t: CheckContext, KVCache: Answer) -> None:
    """ValueError, and the cache is as it was; n may be as large as the number of tokens"""
    new, (B, H, D) = cache_draw(t, t.integer(3, 5), 2, 1)
    cache = KVCache(B, H, 12, D, torch.float32)
    cache.append(*new[0])
    cache.append(*new[1])
    more = new[0][0].shape[2] + 2 + (1, 2, 9)[t.round]
    if t.raises(ValueError, lambda: cache.undo(more), "when more tokens are to go than there are"):
        cache_same_as(t, cache.append(*new[2]), new)


@cache.requirement(2, "fork")
def fork(t: CheckContext, KVCache: Answer) -> None:
    """a cache with the same tokens, dtype and room; whatever is done to one of the two, the other keeps its
    own"""
    dtype = (torch.float32, torch.bfloat16, torch.float32)[t.round]
    new, (B, H, D) = cache_draw(t, t.integer(3, 5), 2, 2, 1, 3, dtype=dtype)
    max_len = new[0][0].shape[2] + 6
    cache = KVCache(B, H, max_len, D, dtype)
    cache.append(*new[0])
    first, second = cache, CallWrapper(cache.fork(), "KVCache", t.record)
    if t.round == 2:  # the original must be as independent as the fork
        first, second = second, first
    fits(t, first, [new[0], new[1]], "two tokens into one of the two")
    fits(t, second, [new[0], new[2]], "two tokens into the other")
    fits(t, first, [new[0], new[1], new[3]], "one token more")
    fits(t, second, [new[0], new[2], new[3]], "one token more")
    fits(t, second, [new[0], new[2], new[3], new[4]], "as many as max_len")
    first.reset()
    t.raises(ValueError, lambda: second.append(*new[3]), "when the fork is full")


# 01.6: prefill in chunks through a cache, compared with one pass over the whole prompt

prefill = Exercise(
    id="01.6",
    slug="prefill",
    title="Prefill in chunks",
    answers=("chunked_prefill",),
    may_use_kvlearn=True,
    hints=(
        "The second chunk of the example: which positions do its tokens have, which keys do they meet, and "
        "what must have happened to these keys before?",
        "For each chunk: its q, k and v; its positions; rotate; append; mask; attend; keep the output. At "
        "the end join the outputs along the tokens. Two of these steps must not change places: which?",
        "Ask the cache for the positions *before* you write: `positions = cache.positions(n)`, n the "
        "size of this chunk, gives a (1, n). Rotate the chunk's q and k with them.",
        "Write first, then attend: a token attends to itself and to its neighbours in the chunk, so its "
        "own key must be in the cache. `keys, values, _ = cache.append(k, v)` gives everything so far.",
        "The chunk's n queries are the last of S = keys.shape[2] positions: `core.attention(q, keys, values, "
        "core.causal_mask(n, S))`.",
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
    in_chunks(t, cache, chunk, T)


def in_chunks(t: CheckContext, cache: WatchedCache, chunk: int, *prompts: int) -> None:
    """Each append brought one chunk."""
    want = [min(chunk, T - start) for T in prompts for start in range(0, T, chunk)]
    came = f"appends of {cache.appended} tokens" if cache.appended else "nothing was appended to the cache"
    t.true(cache.appended == want, f"appends of {want} tokens", came)


@prefill.requirement(1, "the whole prompt as one chunk", rounds=2)
def one_chunk(t: CheckContext, chunked_prefill: Answer) -> None:
    """causal attention with RoPE over the prompt, (B, H, T, D)"""
    T = t.integer(4, 9)
    same_as_one_pass(t, chunked_prefill, T, T + t.integer(0, 3))


@prefill.requirement(2, "equal chunks", rounds=2)
def equal_chunks(t: CheckContext, chunked_prefill: Answer) -> None:
    """the same outputs as in one pass, when the chunks divide the prompt; one chunk in each append"""
    chunk = t.integer(3, 5)
    same_as_one_pass(t, chunked_prefill, chunk * t.pick(2, chunk + 1), chunk)  # never chunk chunks


@prefill.requirement(1, "a shorter last chunk", rounds=2)
def ragged(t: CheckContext, chunked_prefill: Answer) -> None:
    """the same when a rest is left over"""
    chunk = t.integer(3, 5)
    whole = 3 if chunk == 3 else 2  # never chunk chunks, the rest included
    same_as_one_pass(t, chunked_prefill, chunk * whole + t.integer(1, chunk - 1), chunk)


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
    in_chunks(t, cache, chunk, first, second)
    t.unchanged()


# 01.7: one prompt for many answers, merged by log-sum-exp, compared with attention over all keys at once

merge = Exercise(
    id="01.7",
    slug="merge",
    title="One shared prompt, many answers",
    answers=("attend_shared",),
    hints=(
        "A query meets two sets of keys: those of the prompt, and those of its own row. Each gives a mean of "
        "values. How much should each mean count, if one set has 1 key and the other has 3, all with the "
        "score 0? And if the single key has the score log 3?",
        "In words: all rows' queries as N = B·T queries of one sequence; the prompt's (out, lse) for them; "
        "back to rows; (out, lse) over the written keys of each row; merge the two results.",
        "prompt wants the heads first: (B, H, T, D) → (H, B, T, D) → (H, B·T, D). Dimensions change places "
        "by `transpose` only; undo both steps in reverse, for out and for lse.",
        "A mean was divided by exp(lse), the sum of its exponentials. So it counts exp(lse), and both "
        "together divide by exp(lse_a) + exp(lse_b), whose logarithm `torch.logaddexp` gives without "
        "overflow.",
        "Take only differences into exp: lse_a − lse is never positive, so its exponential is at most 1. "
        "With both sets empty it is −∞ − (−∞) = NaN: subtract any finite number there instead, "
        "`lse.masked_fill(lse == -torch.inf, 0.0)`.",
    ),
)


class SharedPrompt:
    """Attention over a prompt's keys and values, (H, P, D), which are stored once.

    Queries (H, N, D) in; out (H, N, D) and lse (H, N) come back. ValueError for another shape.
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v
        self.n_calls = 0

    def __call__(self, queries: Tensor) -> Part:
        H, _, D = self.k.shape
        shape = tuple(queries.shape)
        if len(shape) != 3 or (shape[0], shape[2]) != (H, D):
            raise ValueError(f"queries: expected shape (H, N, D) with H = {H} and D = {D}, got {shape}")
        self.n_calls += 1
        return exact(queries, self.k, self.v)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Part:
    """Attention in double precision, and the log-sum-exp of its scores; without keys 0 and −∞."""
    scores = q.double() @ k.double().transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.double()).float(), scores.logsumexp(-1).float()


def shared_draw(
    t: CheckContext,
    *,
    prompt: bool = True,
    full: bool = False,
    empty_row: bool = False,
    shift: float = 0.0,
    turns: bool = False,
) -> tuple[tuple[Tensor, SharedPrompt, Tensor, Tensor, Tensor], Part]:
    """Arguments of attend_shared, and the expected result.

    ``full`` rows have no empty slot, and ``empty_row`` gives one row the length 0. ``shift`` is added to all
    scores, in every second head with the other sign if ``turns``.
    """
    B, H, T, _, D = t.sizes()
    P, S = (t.integer(4, 9) if prompt else 0), t.integer(5, 9)
    lengths = [S] * B if full else t.random.sample(range(1, S + 1), B)
    if empty_row:
        lengths[t.integer(0, B - 1)] = 0
    q = t.randn(B, H, T, D)
    prompt_k, prompt_v = t.randn(H, P, D), t.randn(H, P, D)
    k, v = t.randn(B, H, S, D), t.randn(B, H, S, D)
    if shift:
        signs = torch.tensor([(-1.0) ** (h * turns) for h in range(H)])
        q[..., 0] = D**0.5
        prompt_k[..., 0] = shift * signs[:, None]
        k[..., 0] = shift * signs[:, None]
    rows = [
        exact(q[b], torch.cat((prompt_k, k[b, :, :n]), dim=1), torch.cat((prompt_v, v[b, :, :n]), dim=1))
        for b, n in enumerate(lengths)
    ]
    want = torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows])
    return (q, SharedPrompt(prompt_k, prompt_v), k, v, torch.tensor(lengths)), want


@merge.requirement(2, "a prompt and own keys")
def shared_values(t: CheckContext, attend_shared: Answer) -> None:
    """out (B, H, T, D) and lse (B, H, T) as if each row's keys came after the prompt's; q, k, v and lengths
    unchanged"""
    given, want = shared_draw(t)
    same_part(t, attend_shared(*given), want)
    t.unchanged()


@merge.requirement(1, "the prompt read once")
def read_once(t: CheckContext, attend_shared: Answer) -> None:
    """one call of prompt, for the queries of all rows; every slot of k and v is written here"""
    given, want = shared_draw(t, full=True)
    same_part(t, attend_shared(*given), want)
    n_calls = given[1].n_calls
    t.true(n_calls == 1, "one call of prompt", f"{n_calls} calls")


@merge.requirement(1, "large scores")
def merge_large(t: CheckContext, attend_shared: Answer) -> None:
    """finite and right with scores about +200 (exp overflows) and −200 (every exp is 0), and with both in
    different heads"""
    for shift, turns in ((200.0, False), (-200.0, False), (200.0, True)):
        given, want = shared_draw(t, shift=shift, turns=turns)
        same_part(t, attend_shared(*given), want, tolerance=1e-3)


@merge.requirement(1, "no own keys, or no prompt")
def one_empty(t: CheckContext, attend_shared: Answer) -> None:
    """a row of length 0 gives the prompt's result, a prompt without tokens each row's own"""
    for given, want in (shared_draw(t, empty_row=True), shared_draw(t, prompt=False)):
        same_part(t, attend_shared(*given), want)


@merge.requirement(1, "neither")
def both_empty(t: CheckContext, attend_shared: Answer) -> None:
    """out 0 and lse −∞, not NaN, for a row of length 0 when the prompt has no tokens; the other rows as
    ever"""
    given, want = shared_draw(t, prompt=False, empty_row=True)
    same_part(t, attend_shared(*given), want)


# 01.8: bytes of the cache of a real model, compared with the models' published shapes and a bare count

size = Exercise(
    id="01.8",
    slug="size",
    title="The cache of a real model, in bytes",
    answers=("cache_size",),
    hints=(
        "A token has passed through the whole model: in how many places did it leave something, what was "
        "left in each, and how many bytes does one number take?",
        "For one token, by loops: for each layer, for each *KV* head, a key and a value, each of head_dim "
        "numbers. Which of these sizes may be missing from the config, and what then?",
        "Stored: how many slots does the batch reserve? Read: how many of them hold a token? Both are that "
        "number times bytes_per_token.",
        "bfloat16 and float16 take 2 bytes, float32 takes 4, the float8 formats take 1: `getattr(torch, "
        'name).itemsize` knows. `config.get("num_key_value_heads", config["num_attention_heads"])` serves '
        "models old and new. 1 GiB is 2**30 bytes; 1 GB is 10**9.",
        "bytes_per_token = 2 · layers · KV heads · head_dim · bytes per number; stored counts max_len tokens "
        "for each of len(lengths) sequences, read counts sum(lengths).",
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


# 01.9: the answers in a trained model, compared with kvlearn's decoder


@dataclass
class Layer:
    """Inputs of the attention of one layer of the base model."""

    qkv: Tensor  # (3·H·D, M): for each head its D rows for q, its D for k, its D for v
    out: Tensor  # (M, H·D)
    n_heads: int
    theta: float


def weights(mixer: Any) -> Layer:
    """The base model has q, k and v apart: fused here, head by head."""
    H, D = mixer.n_heads, mixer.head_dim
    each = [proj.weight.view(H, 1, D, -1) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
    return Layer(torch.cat(each, dim=1).flatten(0, 2), mixer.o_proj.weight, H, mixer.rope.config.theta)


def new_cache(parts: Any, layer: Layer, max_len: int) -> Any:
    """An empty cache of one layer."""
    return parts.KVCache(1, layer.n_heads, max_len, layer.out.shape[1] // layer.n_heads, torch.float32)


class Tail:
    """A KVCache as ``chunked_prefill`` expects it: it says at which positions the next tokens are."""

    def __init__(self, cache: Any, start: int) -> None:
        self.cache, self.length = cache, start

    def positions(self, n: int) -> Tensor:
        return torch.arange(self.length, self.length + n)[None]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        positions = self.positions(k.shape[2])
        self.length += k.shape[2]
        keys, values = self.cache.append(k, v)
        return keys, values, positions


def by_chunked_prefill(attention: Answer, chunk: int = 16) -> Answer:
    """``attention``, but a prompt goes through the layer by ``chunked_prefill``."""

    def layer_attention(x: Tensor, layer: Layer, cache: Any, start: int, parts: Any) -> Tensor:
        if cache is None or x.shape[1] == 1:
            return attention(x, layer, cache, start, parts)

        def rope(x: Tensor, positions: Tensor) -> Tensor:
            return parts.rotate(x, positions[0], layer.theta)

        q, k, v = parts.split_qkv(x @ layer.qkv.T, layer.n_heads)
        out = parts.chunked_prefill(q, k, v, Tail(cache, start), rope, chunk)
        return parts.merge_heads(out) @ layer.out.T

    return layer_attention


def library_mask(n_queries: int, n_keys: int, padding: Any) -> Tensor:
    keys = torch.arange(n_keys) >= torch.as_tensor(padding)[:, None, None, None]
    return core.causal_mask(n_queries, n_keys) & keys


def library_split(x: Tensor, n_heads: int) -> list[Tensor]:
    return [part.transpose(1, 2) for part in x.unflatten(-1, (n_heads, 3, -1)).unbind(-2)]


def library_rotate(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    return Rope(x.shape[-1], RopeConfig(theta))(x, positions[None])


class LibraryCache(KVCache):
    def __init__(self, B: int, H: int, max_len: int, D: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(B, H, max_len, D, dtype, torch.device("cpu"))

    def append(self, k: Tensor, v: Tensor) -> Any:
        return tuple(super().append(k, v))[:2]


def library_prefill(q: Tensor, k: Tensor, v: Tensor, cache: Any, rope: Answer, chunk: int) -> Tensor:
    outputs = []
    for new in zip(*(each.split(chunk, dim=2) for each in (q, k, v)), strict=True):
        positions = cache.positions(new[0].shape[2])
        keys, values, _ = cache.append(rope(new[1], positions), new[2])
        outputs.append(core.causal_attention(rope(new[0], positions), keys, values, positions))
    return torch.cat(outputs, dim=2)


WIRING = workbench.Wiring(
    parts={
        "attend": ("01.1", core.attend_partial),
        "causal_mask": ("01.2", library_mask),
        "split_qkv": ("01.3", library_split),
        "merge_heads": ("01.3", core.merge_heads),
        "rotate": ("01.4", library_rotate),
        "KVCache": ("01.5", LibraryCache),
        "chunked_prefill": ("01.6", library_prefill),
    },
    weights=weights,
    new_cache=new_cache,
    variants={"the prompt by chunked_prefill": by_chunked_prefill},
)

model = Exercise(
    id="01.9",
    slug="model",
    title="Your model",
    answers=("attention", "generate"),
    may_use_kvlearn=True,
    wiring=WIRING,
    hints=(
        "Write down the shapes from x (1, T, M) to the result (1, T, M) and name the part that takes each to "
        "the next. At which positions are the T tokens, and how many keys do they meet?",
        "The tokens are at positions start … start + T − 1. Queries and keys are rotated there, once, before "
        "the keys go into the cache. What the cache returns decides how wide the mask is.",
        "`generate` has two loops. Both call the model with new tokens only and advance `start` by as many. "
        "After the prompt, the logits of its last token, `logits[:, -1:]`, choose the first new one.",
        "`attention` in order: split_qkv(x @ layer.qkv.T, layer.n_heads), rotate q and k, cache.append, "
        "causal_mask(T, S, [0]), attend, merge_heads, and at the end `@ layer.out.T`. Without a cache the "
        "keys and values are those of this call, and S = T.",
        "`generate` in order: reset every cache; start = 0; for each piece of `tokens.split(chunk, dim=1)` "
        "call the model, then add the piece's size to start. Then n_new times: take the most likely token "
        "and append it to `tokens`; but for the last, call the model with it alone and add 1 to start.",
    ),
)


def base_logits(tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return workbench.base_model()(tokens)


@lru_cache
def continued(prompt: str, n_new: int) -> Tensor:
    """The text with ``n_new`` tokens that kvlearn's decoder appends, (1, T + n_new)."""
    return workbench.base_model().generate(workbench.encode(prompt), n_new)


def drawn_text(t: CheckContext, length: int) -> Tensor:
    """Bytes that a text may hold, as tokens (1, length); no two alike, so that no confusion goes unseen."""
    return torch.tensor([t.random.sample(range(33, 127), length)])


def prompt_and_text(t: CheckContext, n_new: int) -> tuple[Tensor, Tensor]:
    """A prompt, and it with ``n_new`` tokens that kvlearn's decoder appends."""
    prompt = workbench.PROMPTS[t.round][-40:]
    return workbench.encode(prompt), continued(prompt, n_new).clone()


def same_tokens(t: CheckContext, got: Any, want: Tensor, n_prompt: int) -> bool:
    """The tokens of the text, (1, prompt + new)."""
    if not isinstance(got, Tensor) or got.shape != want.shape:
        return t.close(got, want, "tokens")
    wrong = (got != want)[0].nonzero()
    if not len(wrong):
        return t.note(got, None)
    text, come = (workbench.decode(each[:, n_prompt:]) for each in (want, got))
    return t.note(got, Difference("", f"the text {text!r}", f"{come!r}"))


@model.requirement(1, "attention, without a cache")
def no_cache(t: CheckContext, attention: Answer, generate: Answer) -> None:
    """the logits of kvlearn's decoder for a whole text, and our solution's output for a layer with another
    theta; x is not changed"""
    tokens = drawn_text(t, t.integer(9, 14))
    parts = workbench.library(WIRING)
    yours = workbench.Model(WIRING, attention, parts)
    t.close(yours(tokens), base_logits(tokens), "logits", tolerance=1e-3)
    layer = replace(yours.layers[t.round], theta=t.pick(100.0, 1e5, 5e5))
    x = t.randn(1, 12, layer.out.shape[0])
    want = model.right[0](x, layer, None, 0, parts)
    t.close(attention(x, layer, None, 0, parts), want, "one layer:", tolerance=1e-3)
    t.unchanged()


@model.requirement(1, "attention, with a cache")
def with_cache(t: CheckContext, attention: Answer, generate: Answer) -> None:
    """the same when the text comes in pieces: a chunk, a shorter one, single tokens"""
    pieces = (t.integer(4, 6), 3, 1, 1)
    tokens = drawn_text(t, sum(pieces))
    yours = workbench.Model(WIRING, attention, workbench.library(WIRING))
    caches, start, want = yours.new_caches(sum(pieces)), 0, base_logits(tokens)
    for piece in tokens.split(pieces, dim=1):
        end = start + piece.shape[1]
        t.close(yours(piece, caches, start), want[:, start:end], "logits", tolerance=1e-3)
        start = end


def our_model() -> workbench.Model:
    return workbench.Model(WIRING, model.right[0], workbench.library(WIRING))


@model.requirement(1, "generate, the prompt at once", rounds=2)
def at_once(t: CheckContext, attention: Answer, generate: Answer) -> None:
    """the prompt and n_new more tokens, each the most likely one: those of kvlearn's decoder"""
    prompt, want = prompt_and_text(t, 4)
    ours = our_model()
    caches = ours.new_caches(want.shape[1])
    same_tokens(t, generate(ours, caches, prompt, 4, want.shape[1]), want, prompt.shape[1])


@model.requirement(1, "generate, the prompt in chunks; a second text", rounds=2)
def chunks_and_second_text(t: CheckContext, attention: Answer, generate: Answer) -> None:
    """identical tokens with the prompt in chunks, the last one shorter, in caches that hold an earlier
    text"""
    prompt, want = prompt_and_text(t, 4)
    # None of these divides the prompt, and with each of them wrong positions change the text.
    chunk = t.random.choice(((9, 11, 14, 15), (9, 12, 17, 18))[t.round])
    ours = our_model()
    caches = ours.new_caches(4 * want.shape[1])  # a text that is not forgotten shall fit as well
    generate(ours, caches, workbench.encode(workbench.TEXT[60:130]), 1, 70)
    same_tokens(t, generate(ours, caches, prompt, 4, chunk), want, prompt.shape[1])


@model.requirement(1, "generate, the work of each step", rounds=2)
def work(t: CheckContext, attention: Answer, generate: Answer) -> None:
    """the prompt goes through the model in chunks of at most `chunk` tokens, then one token per step, each at
    its position"""
    prompt, chunk, n_new = drawn_text(t, 23), (10, 23)[t.round], 5
    ours = our_model()
    generate(ours, ours.new_caches(23 + n_new), prompt, n_new, chunk)
    came = [(start, n) for start, n, _ in ours.steps]
    chunks = [(start, min(chunk, 23 - start)) for start in range(0, 23, chunk)]
    want = chunks + [(23 + i, 1) for i in range(n_new)]
    t.true(came in (want, want[:-1]), f"calls (start, tokens) {want[:-1]}", f"calls {came[:9]}")


def writes_the_same(t: CheckContext, attention: Answer, generate: Answer, parts: Any, chunk: int) -> None:
    """Identical tokens with these parts, with and without a cache. The logits of a few tokens come first: a
    mistake is seen in them at once."""
    yours = workbench.Model(WIRING, attention, parts)
    few, caches = drawn_text(t, 6), yours.new_caches(6)
    logits = [yours(piece, caches, start) for start, piece in ((0, few[:, :4]), (4, few[:, 4:]))]
    if not t.close(torch.cat(logits, dim=1), base_logits(few), "logits", tolerance=1e-3):
        raise Stop
    prompt, want = prompt_and_text(t, 4)
    got = generate(yours, yours.new_caches(want.shape[1]), prompt, 4, chunk)
    if not same_tokens(t, got, want, prompt.shape[1]):
        raise Stop
    same_tokens(t, workbench.without_cache(yours, prompt, 1), want[:, :-3], prompt.shape[1])


@model.requirement(1, "your attend, causal_mask, split_qkv and merge_heads", rounds=1, reads_answers=True)
def with_attend(t: CheckContext, attention: Answer, generate: Answer) -> None:
    """01.1, 01.2 and 01.3 are solved, and the model with them writes identical tokens"""
    parts = workbench.theirs(model, t.notebook, "attend", "causal_mask", "split_qkv", "merge_heads")
    writes_the_same(t, attention, generate, parts, 99)


@model.requirement(1, "your rotate and KVCache", rounds=1, reads_answers=True)
def with_rotate_and_cache(t: CheckContext, attention: Answer, generate: Answer) -> None:
    """01.4 and 01.5 are solved, and the model with them writes identical tokens, the prompt in chunks"""
    writes_the_same(t, attention, generate, workbench.theirs(model, t.notebook, "rotate", "KVCache"), 16)


@model.requirement(1, "all your parts together", rounds=1, reads_answers=True)
def together(t: CheckContext, attention: Answer, generate: Answer) -> None:
    """identical tokens with every part yours, the prompt in chunks; and by your chunked_prefill (01.6)"""
    parts = workbench.theirs(model, t.notebook, *WIRING.parts)
    writes_the_same(t, attention, generate, parts, 16)
    prompt, want = prompt_and_text(t, 3)
    long = workbench.Model(WIRING, by_chunked_prefill(attention), parts)
    got = generate(long, long.new_caches(want.shape[1]), prompt, 3, want.shape[1])
    same_tokens(t, got, want, prompt.shape[1])


EXERCISES = (attend, mask, heads, rope, cache, prefill, merge, size, model)
