"""Scaled dot-product attention: the equation, masks, the fast form by SDPA, and attention to some keys.

Letters, here and in every file of kvlearn:

    B   sequences in a batch     H  query heads           D   numbers of a head: head dim
    T   new tokens               G  KV heads              Dv  numbers of a value, D unless given
    S   tokens in the cache      W  tokens of a window    Dr  numbers of the key that carries positions
    M   numbers of a vector      C  tokens of a chunk     R   numbers of a latent: its rank
    N   tokens of a text         L  layers of a model     n   any number

The letters of a product or a sum are written together: HD is H · D numbers, and RDr is R + Dr.

A mask is boolean and True means *may attend*. A query that may attend to nothing gets 0, never NaN.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvlearn import validate
from kvlearn.attention.base import KV


def attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S Dv"],
    mask: Bool[Tensor, "..."] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H T Dv"]:
    """softmax(q kᵀ · scale) v, as on paper: the reference for all faster forms.

    Computed in fp32 at least, returned in q's dtype. ``mask`` broadcasts to (B, H, T, S); ``scale`` is 1/√D
    unless given. Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1.
    """
    return attend_partial(q, k, v, mask, scale).out.to(q.dtype)


def causal_mask(n_queries: int, n_keys: int, device: torch.device | str | None = None) -> Bool[Tensor, "T S"]:
    """The mask of ``n_queries`` tokens that are the *last* of ``n_keys``: aligned bottom-right.

    Query t has position n_keys - n_queries + t and attends to the keys up to and including its own.
    Raises ValueError for more queries than keys.
    """
    validate.at_most("n_queries", n_queries, n_keys, "n_keys: each query has a key of its own")
    positions = torch.arange(n_keys - n_queries, n_keys, device=device)
    return positions[:, None] >= torch.arange(n_keys, device=device)


def causal_mask_at(positions: Int[Tensor, "#B T"], n_keys: int) -> Bool[Tensor, "#B 1 T {n_keys}"]:
    """The causal mask of queries at any ``positions``, over keys at positions 0…n_keys - 1.

    Rows may differ in their positions. Slots past a row's own length are hidden by the same comparison,
    because their index is larger than every position of that row.
    """
    return (positions[:, :, None] >= torch.arange(n_keys, device=positions.device)).unsqueeze(1)


def causal_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    positions: Int[Tensor, "#B T"],
    scale: float | None = None,
) -> Float[Tensor, "B H T Dv"]:
    """Causal attention of queries at ``positions`` over keys 0…S-1, by PyTorch's SDPA.

    Where all rows have the same positions, those must be the last T of S. Two cases then need no mask: one
    new token, to which every key is visible, and a sequence from its start, for which SDPA stores none.
    """
    S = k.shape[2]
    together = len(positions) == 1
    mask = None if together and q.shape[2] in (1, S) else causal_mask_at(positions, S)
    return grouped_attention(q, k, v, mask, scale, is_causal=mask is None and q.shape[2] > 1)


def grouped_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    mask: Bool[Tensor, "#B 1 #T S"] | None = None,
    scale: float | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "B H T Dv"]:
    """PyTorch's SDPA of H query heads over G KV heads: H/G neighbouring query heads read one KV head.

    Keys and values are not copied for them: for one new token the heads of a pool are the rows of one query
    matrix, so that each key is read once; for more tokens the pools are a batch, expanded to their heads. G
    must divide H.
    """
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    parts = _parts(B * G, H // G, q.device) if T == 1 else H // G
    if parts == 1:
        q = q.reshape(B, G, -1, D)
    else:
        q = q.reshape(B * G, parts, -1, D)
        k, v = (x.reshape(B * G, 1, S, x.shape[3]).expand(-1, parts, -1, -1) for x in (k, v))
        mask = mask if mask is None or len(mask) == 1 else mask.repeat_interleave(G, 0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
    return out.reshape(B, H, T, -1)


def _parts(pools: int, heads: int, device: torch.device) -> int:
    """The number of query matrices for the ``heads`` of each pool in a step.

    One, except on a CPU with more threads than pools. There SDPA gives each thread a matrix; with a single
    matrix all threads would share every small product, and wait for each other every time. (One in a compiled
    graph too: the number of threads is not part of it.)
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return 1
    wanted = min(-(-torch.get_num_threads() // pools), heads)
    return next(parts for parts in range(wanted, heads + 1) if heads % parts == 0)


class Partial(NamedTuple):
    """Attention over some of the keys: the normalised output, and its log-sum-exp.

    ``lse`` is log Σ exp(score) over those keys. By it two partial results merge to attention over all their
    keys. No keys give out = 0 and lse = -inf.
    """

    out: Float[Tensor, "B H T Dv"]
    lse: Float[Tensor, "B H T"]


def attend_partial(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S Dv"],
    mask: Bool[Tensor, "..."] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Partial:
    """Attention over these keys alone, in fp32 at least, with the log-sum-exp that ``merge`` needs.

    ``softcap`` keeps the scores between -softcap and softcap: softcap · tanh(score / softcap).
    Source: Gemma Team, "Gemma 2" (2024), section 2, "Logit soft-capping".
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = upcast(q), upcast(k), upcast(v)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    weights = torch.exp(scores - finite(lse)[..., None])
    return Partial(weights @ v, lse)


def grouped_partial(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    mask: Bool[Tensor, "#B 1 #T S"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Partial:
    """``attend_partial`` of H query heads over G KV heads: the heads of a pool are the rows of one matrix."""
    B, H, T, _ = q.shape
    n = H // k.shape[1]
    rows = None if mask is None else mask.expand(-1, -1, T, -1).repeat(1, 1, n, 1)
    out, lse = attend_partial(q.reshape(B, -1, n * T, q.shape[3]), k, v, rows, scale, softcap)
    return Partial(out.reshape(B, H, T, -1), lse.reshape(B, H, T))


def merge(a: Partial, b: Partial) -> Partial:
    """Two partial results over disjoint keys, as one: exp(its lse - the common lse) weights each output.

    lse = log(exp(lse_a) + exp(lse_b)), taken relative to the larger of the two so that nothing overflows.
    Source: Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018), section 3.1; the form
    with outputs is Dao et al., "FlashAttention" (2022), section 3.1.
    """
    lse = torch.logaddexp(a.lse, b.lse)
    weight_a, weight_b = (torch.exp(part.lse - finite(lse))[..., None] for part in (a, b))
    return Partial(weight_a * a.out + weight_b * b.out, lse)


def merge_all(parts: Iterable[Partial]) -> Partial:
    """``merge`` over any number of partial results, in any order."""
    return reduce(merge, parts)


def blockwise_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S Dv"],
    mask: Bool[Tensor, "... T S"],
    block: int,
    scale: float | None = None,
) -> Float[Tensor, "B H T Dv"]:
    """The same as ``attention``, holding only ``block`` columns of scores at a time (online softmax)."""
    blocks = (slice(start, start + block) for start in range(0, k.shape[2], block))
    parts = (attend_partial(q, k[:, :, b], v[:, :, b], mask[..., b], scale) for b in blocks)
    return merge_all(parts).out.to(q.dtype)


def with_sinks(part: Partial, sink_logits: Float[Tensor, "H"]) -> Float[Tensor, "B H T Dv"]:
    """The output where each head's softmax has one more logit, which has no value.

        softmax over [scores, s], without the last weight:   out · e^lse / (e^lse + e^s) = out · σ(lse - s)

    A head can so give no weight to any token. Source: OpenAI, "gpt-oss" (2025), section 2.2;
    Miller, "Attention Is Off By One" (2023), is the case s = 0.
    """
    return part.out * torch.sigmoid(part.lse - upcast(sink_logits)[:, None])[..., None]


# A block of queries over some keys: q (B, H, C, D), keys and values (B, G, n, D), mask (1, 1, C, n) or None
# for all -> (B, H, C, D).
AttendMasked = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@runtime_checkable
class MaskRule(Protocol):
    """Which keys a query attends to, by their positions; used only for keys at or before the query."""

    def visible(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Whether the query at each position attends to the key at each, for keys at or before it."""

    def visible_keys(self, first: int, last: int) -> Int[Tensor, "n"]:
        """The positions that at least one of the queries first … last attends to, in order."""


def rule_mask(
    rule: MaskRule, queries: Int[Tensor, "*#B T"], keys: Int[Tensor, "*#B S"]
) -> Bool[Tensor, "*#B T S"]:
    """True where the rule lets a query attend: to no later key, and to no empty slot (position -1)."""
    i, j = queries[..., :, None], keys[..., None, :]
    return (j >= 0) & (j <= i) & rule.visible(i, j)


def attend_blockwise(
    q: Float[Tensor, "B H T D"],
    kv: KV,
    rule: MaskRule,
    block: int,
    attend: AttendMasked = grouped_attention,
) -> Float[Tensor, "B H T _"]:
    """Attention of ``block`` queries at a time over the keys that are visible to at least one of them.

    No other key is computed: time O(T · keys of a block), and no T x S matrix. Keys are in the order of their
    positions, empty slots first; for a single query in any order. A query without visible keys gets 0. Rows
    of a batch that differ in their positions are computed one by one.

    While ``torch.compile`` traces, no position can be read. All keys are then computed for all queries at
    once, and the mask selects: one graph, the same numbers, and a T x S mask.
    """
    positions, key_positions = kv.positions, kv.key_positions
    if has_no_values(positions):
        return attend(q, kv.k, kv.v, rule_mask(rule, positions, key_positions)[:, None])
    if max(len(positions), len(key_positions)) > 1:
        each = (q, kv.k, kv.v, positions.expand(len(q), -1), key_positions.expand(len(q), -1))
        rows = zip(*(x.split(1) for x in each), strict=True)
        return torch.cat([attend_blockwise(row, KV(*its), rule, block, attend) for row, *its in rows])
    if q.shape[2] == 1:
        at = _as_slice(rule_mask(rule, positions[0], key_positions[0])[0].nonzero()[:, 0])
        return attend(q, kv.k[:, :, at], kv.v[:, :, at], None)
    blocks, slots = positions[0].split(block), key_positions[0].contiguous()
    wanted = (rule.visible_keys(int(now[0]), int(now[-1])).to(slots.device) for now in blocks)
    selections = [_as_slice(torch.searchsorted(slots, keys)) for keys in wanted]
    outs = [
        attend(part, k, v, rule_mask(rule, now, slots[at])[None, None])
        for part, now, at, k, v in zip(
            q.split(block, dim=2),
            blocks,
            selections,
            gathered(kv.k, selections),
            gathered(kv.v, selections),
            strict=True,
        )
    ]
    return torch.cat(outs, dim=2)


def gathered(
    x: Float[Tensor, "B G S D"], selections: list[slice | Tensor]
) -> Iterable[Float[Tensor, "B G _ D"]]:
    """``x`` at each of ``selections``: one after the other, or all at once where a gradient is needed."""
    if torch.is_grad_enabled() and x.requires_grad:
        return GatheredSlices.apply(x, selections)
    return (x[:, :, at] for at in selections)


class GatheredSlices(torch.autograd.Function):
    """Several selections from one tensor, whose gradients are added into one tensor of its length.

    Indexed one by one, each would have a gradient of that length, nearly all zeros: O(T²) bytes to add up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, selections: list[slice | Tensor]) -> tuple[Tensor, ...]:
        ctx.selections, ctx.shape = selections, x.shape
        return tuple(x[:, :, at] for at in selections)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].new_zeros(ctx.shape)
        for at, grad in zip(ctx.selections, grads, strict=True):
            total[:, :, at] += grad
        return total, None


def _as_slice(indices: Int[Tensor, "n"]) -> slice | Int[Tensor, "n"]:
    """The same indices, as a slice if they are consecutive, which gives a view and not a copy."""
    n = len(indices)
    if n and int(indices[-1] - indices[0]) == n - 1 and bool((indices.diff() == 1).all()):
        return slice(int(indices[0]), int(indices[0]) + n)
    return indices


TILE = 64  # queries whose scores exist at the same time, where a query selects blocks of keys


def top_blocks(
    scores: Float[Tensor, "B H T n"], allowed: Bool[Tensor, "#B #H #T n"], n_blocks: int
) -> Bool[Tensor, "B H T n"]:
    """True at the ``n_blocks`` of highest score among those allowed; at all of these, if they are fewer.

    Of equal scores the earlier block is selected.
    """
    order = scores.masked_fill(~allowed, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    top = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :n_blocks], True)
    return top & allowed


def attend_to_blocks(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    positions: Int[Tensor, "#B T"],
    selected: Bool[Tensor, "B HG T n"],
    block: int,
) -> Float[Tensor, "B H T D"]:
    """softmax(q kᵀ / √D) v of each query over the blocks selected for it, up to its own position.

    ``selected`` is per query head, or per KV head and so for all its query heads. A KV head reads each block
    that any of its queries here has selected, once, and no other key or value. Every query must have selected
    its own block. (While ``torch.compile`` traces, the selection cannot be read: it then reads all blocks,
    and the mask selects.)
    """
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    rows = selected.unflatten(1, (G, -1)).expand(-1, -1, H // G, -1, -1).flatten(2, 3)  # (B, G, H/G · T, N)
    union = rows.any(2)
    n_read = union.shape[-1] if has_no_values(union) else int(union.sum(-1).max())
    blocks = union.sort(dim=-1, descending=True, stable=True).indices[..., :n_read]
    live = union.gather(-1, blocks)  # the unions of some KV heads are smaller
    blocks = torch.where(live, blocks, blocks[..., :1])  # padding: a block that is read anyway
    slots = (blocks[..., None] * block + torch.arange(block, device=q.device)).flatten(2)
    at = slots.clamp_max(S - 1)[..., None].expand(-1, -1, -1, D)  # the last block may be half-filled
    visible = rows.gather(-1, blocks[:, :, None].expand(-1, -1, rows.shape[2], -1)) & live[:, :, None]
    # SDPA would make 0 and -inf of a boolean mask, key by key; per block that takes less time.
    bias = torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, -torch.inf)
    bias = bias.repeat_interleave(block, dim=-1).unflatten(2, (-1, T))
    later = slots[:, :, None, None] > positions[:, None, None, :, None]
    mask = bias.masked_fill_(later, -torch.inf).flatten(2, 3)
    keys, values = (x.gather(2, at).to(q.dtype) for x in (k, v))
    out = F.scaled_dot_product_attention(q.reshape(B, G, -1, D), keys, values, attn_mask=mask)
    return out.reshape(B, H, T, D)


def by_tiles(
    attend: Callable[..., Tensor],
    q: Float[Tensor, "B H T D"],
    positions: Int[Tensor, "#B T"],
    *past: Tensor,
) -> Float[Tensor, "... T D"]:
    """``attend(q, positions, *past)`` for ``TILE`` queries at a time, and the outputs concatenated.

    In training too scores exist for one tile only, where ``attend`` has its attention ``recomputed``.
    """
    starts = range(0, q.shape[2], TILE)
    tiles = [attend(q[:, :, a : a + TILE], positions[:, a : a + TILE], *past) for a in starts]
    return torch.cat(tiles, dim=-2)


def recomputed(attend: Callable[..., Any]) -> Callable[..., Any]:
    """``attend``; in training its scores are not kept but computed again for the gradient.

    Not for what has no gradient: a selection of blocks would be made twice.
    """
    if not torch.is_grad_enabled():
        return attend
    return partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)


class Constants:
    """Numbers that a layer computes with and does not learn: as Python's, and as a fp64 tensor on any device.

    Not a buffer. So neither the default dtype nor a cast of the model rounds them; and a layer that is built
    on the device "meta" and then gets its weights, by whatever way, has them too.
    """

    def __init__(self, numbers: Sequence[float]) -> None:
        self.numbers = tuple(numbers)
        self.tensors: dict[torch.device, Tensor] = {}
        self.on(torch.device("cpu"))

    def on(self, device: torch.device) -> Float[Tensor, "n"]:
        """The numbers on ``device``, in fp64 where it has that (Apple's GPUs do not); copied there once."""
        if device not in self.tensors:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self.tensors[device] = torch.tensor(self.numbers, dtype=dtype, device=device)
        return self.tensors[device]

    def __reduce__(self) -> tuple[Any, ...]:
        return Constants, (self.numbers,)  # copied and pickled without its tensors


def has_no_values(x: Tensor) -> bool:
    """Whether the values of ``x`` cannot be read: ``torch.compile`` traces, or it is on the device "meta"."""
    return torch.compiler.is_compiling() or x.is_meta


def upcast(x: Tensor) -> Tensor:
    """To fp32, unless it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm_naive(x: Float[Tensor, "... M"], norm: nn.RMSNorm) -> Float[Tensor, "... M"]:
    """x / √(mean(x²) + eps) · w in fp32 at least, written out for ``naive`` forms."""
    assert norm.eps is not None
    return x / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * upcast(norm.weight)


def finite(lse: Tensor) -> Tensor:
    """-inf replaced by the lowest finite number, so that exp(-inf - lse) is 0 where it would be NaN."""
    return lse.clamp_min(torch.finfo(lse.dtype).min)


def split_heads(x: Float[Tensor, "B T HD"], n_heads: int) -> Float[Tensor, "B H T D"]:
    """The last dimension cut into heads, heads in front of time."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B T HD"]:
    """The inverse of ``split_heads``."""
    return x.transpose(1, 2).flatten(-2)
