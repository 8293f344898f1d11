"""Attention and feed-forward one block at a time: exact, without a matrix of all scores.

Blockwise attention goes through the keys a block at a time and merges what it has seen by log-sum-exp. For
the gradient the weights of a block are computed again from the scores and the log-sum-exp of each query, so
that nothing of size T x S is kept. The Blockwise Parallel Transformer also computes the feed-forward for
each block of queries as soon as its attention is known; its hidden numbers exist for one block only.

Ring attention (ring.py) is the same computation, where the blocks of keys come from other devices.

Sources: Liu & Abbeel, "Blockwise Parallel Transformer for Large Context Models" (2023); the gradient is
Dao et al., "FlashAttention" (2022), algorithm 4.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from kvlearn import validate
from kvlearn.attention.core import Partial, finite, grouped_partial, merge, merge_heads, split_heads, upcast
from kvlearn.attention.full import GroupedQueryAttention
from kvlearn.model.decoder import Block

PADDING = -1  # the position of a slot that holds no token


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees, by their positions; a slot of position -1 is padding, seen by none.

    ``causal``: the keys up to its own position; ``window``: of these the last ``window``, its own included.
    Without ``causal`` a query sees all. Raises ValueError for a window that is not causal.
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        validate.instance("causal", self.causal, bool)
        if self.window is not None:
            validate.fields_at_least(self, window=1)
            if not self.causal:
                raise ValueError("window: expected a causal rule, got causal=False")

    def visible(
        self, queries: Int[Tensor, "T"], keys: Int[Tensor, "S"], lengths: Int[Tensor, "B"] | None = None
    ) -> Bool[Tensor, "#B 1 T S"]:
        """True where a query sees a key; ``lengths``, the tokens of each row of the batch, hide the rest."""
        i, j = queries[:, None], keys[None]
        mask = (i > PADDING) & (j > PADDING)
        if self.causal:
            mask = mask & (j <= i)
        if self.window is not None:
            mask = mask & (j > i - self.window)
        if lengths is None:
            return mask[None, None]
        ends = lengths[:, None, None, None]
        return mask & (i < ends) & (j < ends)

    def n_pairs(self, queries: Int[Tensor, "T"], keys: Int[Tensor, "S"]) -> int:
        """How many pairs of a query and a key that it sees: the work. Positions are in order, but padding."""
        queries, keys = queries[queries > PADDING].contiguous(), keys[keys > PADDING].contiguous()
        if not self.causal:
            return len(queries) * len(keys)
        ends = torch.searchsorted(keys, queries, right=True)
        if self.window is None:
            return int(ends.sum())
        return int((ends - torch.searchsorted(keys, queries - self.window, right=True)).sum())


@dataclass(frozen=True)
class Tile:
    """A block of queries and a block of keys of which at least one pair is visible."""

    rows: slice
    columns: slice
    mask: Bool[Tensor, "#B 1 T S"] | None  # None: every pair is visible


def tiles(
    queries: Int[Tensor, "T"],
    keys: Int[Tensor, "S"],
    rule: Rule,
    block: int,
    lengths: Int[Tensor, "B"] | None = None,
) -> Iterator[Tile]:
    """The tiles of ``block`` queries and keys that have work, in order of queries, then keys."""
    for a in range(0, len(queries), block):
        for b in range(0, len(keys), block):
            rows, columns = slice(a, a + block), slice(b, b + block)
            pairs = rule.n_pairs(queries[rows], keys[columns])
            if pairs:
                every = lengths is None and pairs == len(queries[rows]) * len(keys[columns])
                mask = None if every else rule.visible(queries[rows], keys[columns], lengths)
                yield Tile(rows, columns, mask)


class Attended:
    """Attention to the keys met so far, of all local queries; ``add`` meets more of them, in any order.

    ``out`` (B, H, T, D) is normalised, ``lse`` (B, H, T); both in fp32 at least, written in place.
    """

    def __init__(self, q: Float[Tensor, "B H T D"], scale: float, block: int) -> None:
        self.q, self.scale, self.block = q, scale, block
        self.out = wide_zeros(q)
        self.lse = torch.full(q.shape[:3], -torch.inf, dtype=self.out.dtype, device=q.device)

    def add(
        self,
        k: Float[Tensor, "B G S D"],
        v: Float[Tensor, "B G S D"],
        queries: Int[Tensor, "T"],
        keys: Int[Tensor, "S"],
        rule: Rule,
        lengths: Int[Tensor, "B"] | None = None,
    ) -> None:
        """Attend to these keys too, a tile at a time."""
        for tile in tiles(queries, keys, rule, self.block, lengths):
            r, c = tile.rows, tile.columns
            new = grouped_partial(self.q[:, :, r], k[:, :, c], v[:, :, c], tile.mask, self.scale)
            merged = merge(Partial(self.out[:, :, r], self.lse[:, :, r]), new)
            self.out[:, :, r], self.lse[:, :, r] = merged


class Gradients:
    """The gradient of attention for the queries here; ``add`` gives that of the keys and values it is shown.

    With P = exp(scores - lse), the weights, and Δ = Σ_d dO ⊙ O, one number per query:

        dV = Pᵀ dO        dS = P ⊙ (dO Vᵀ - Δ) · scale        dQ = dS K        dK = dSᵀ Q

    Source: Dao et al., "FlashAttention" (2022), algorithm 4.
    """

    def __init__(
        self,
        q: Float[Tensor, "B H T D"],
        out: Float[Tensor, "B H T D"],
        lse: Float[Tensor, "B H T"],
        d_out: Float[Tensor, "B H T D"],
        scale: float,
        block: int,
    ) -> None:
        self.q, self.lse, self.d_out, self.scale, self.block = q, finite(lse), upcast(d_out), scale, block
        self.delta = (self.d_out * out).sum(-1)
        self.d_q = wide_zeros(q)

    def add(
        self,
        k: Float[Tensor, "B G S D"],
        v: Float[Tensor, "B G S D"],
        queries: Int[Tensor, "T"],
        keys: Int[Tensor, "S"],
        rule: Rule,
        lengths: Int[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "2 B G S D"]:
        """The gradients of these keys and of their values by the queries here."""
        G = k.shape[1]
        d_kv = torch.zeros(2, *k.shape, dtype=self.d_q.dtype, device=k.device)
        for tile in tiles(queries, keys, rule, self.block, lengths):
            r, c = tile.rows, tile.columns
            q, d_out = (pool_rows(upcast(x[:, :, r]), G) for x in (self.q, self.d_out))  # (B, G, nT, D)
            lse, delta = (pool_rows(x[:, :, r, None], G) for x in (self.lse, self.delta))
            keys_c, values = upcast(k[:, :, c]), upcast(v[:, :, c])
            weights = torch.exp(q @ keys_c.transpose(-1, -2) * self.scale - lse)
            if tile.mask is not None:
                mask = tile.mask.repeat(1, 1, self.q.shape[1] // G, 1)
                weights = weights.masked_fill(~mask, 0.0)
            d_scores = weights * (d_out @ values.transpose(-1, -2) - delta) * self.scale
            d_kv[0, :, :, c] += d_scores.transpose(-1, -2) @ q
            d_kv[1, :, :, c] += weights.transpose(-1, -2) @ d_out
            self.d_q[:, :, r] += (d_scores @ keys_c).reshape(self.d_q[:, :, r].shape)
        return d_kv


def wide_zeros(x: Tensor) -> Tensor:
    """Zeros of the shape of ``x`` in fp32 at least, for a sum over many blocks."""
    return torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))


def pool_rows(x: Float[Tensor, "B H T D"], n_kv_heads: int) -> Float[Tensor, "B G nT D"]:
    """The query heads of each KV head as the rows of one matrix."""
    return x.reshape(len(x), n_kv_heads, -1, x.shape[-1])


class _Blockwise(torch.autograd.Function):
    """``blockwise_attention`` with a gradient that keeps the outputs and one number per query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
        queries, keys, rule, scale, block, lengths = options
        attended = Attended(q, scale, block)
        attended.add(k, v, queries, keys, rule, lengths)
        ctx.save_for_backward(q, k, v, attended.out, attended.lse)
        ctx.options = options
        return attended.out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_outs: Tensor) -> tuple[Any, ...]:
        queries, keys, rule, scale, block, lengths = ctx.options
        q, k, v, out, lse = ctx.saved_tensors
        gradients = Gradients(q, out, lse, d_outs[0], scale, block)
        d_k, d_v = gradients.add(k, v, queries, keys, rule, lengths)
        return gradients.d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), *len(ctx.options) * [None]


def blockwise_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    rule: Rule | None = None,
    *,
    queries: Int[Tensor, "T"] | None = None,
    lengths: Int[Tensor, "B"] | None = None,
    scale: float | None = None,
    block: int = 512,
) -> Float[Tensor, "B H T D"]:
    """softmax(q kᵀ · scale) v over the keys that ``rule`` shows, a tile of ``block`` x ``block`` at a time.

    Keys are at positions 0 … S - 1, ``queries`` are the positions of the queries (the last T of S unless
    given; -1 is padding). ``lengths`` are the tokens of each row of the batch; the slots after them are
    padding. The content of padding, NaN too, has no effect, and its gradient is 0. H query heads read G KV
    heads; a query that sees no key gets 0. Memory beside inputs and outputs: O(block²), in the gradient too
    (with padding a copy of the inputs more). Raises ValueError that names the argument.
    """
    check_heads(q, k, v)
    S, T = k.shape[2], q.shape[2]
    if queries is None:
        queries = torch.arange(
            S - validate.at_most("q.shape[2] (time)", T, S, "the keys"), S, device=q.device
        )
    validate.integers("queries", validate.tensor("queries", queries, (T,)))
    if lengths is not None:
        validate.integers("lengths", validate.tensor("lengths", lengths, (len(q),)))
    validate.instance("rule", rule, (Rule, type(None)))
    scale = q.shape[-1] ** -0.5 if scale is None else validate.in_fp32("scale", scale)
    keys = torch.arange(S, device=k.device)
    no_query, no_key = padding_at(queries, lengths), padding_at(keys, lengths)
    q, k, v = without(q, no_query), without(k, no_key), without(v, no_key)
    options = queries, keys, rule or Rule(), scale, validate.positive("block", block), lengths
    out: Tensor = _Blockwise.apply(q, k, v, *options)
    return without(out, no_query)


def padding_at(
    positions: Int[Tensor, "T"], lengths: Int[Tensor, "B"] | None = None
) -> Bool[Tensor, "#B 1 T 1"] | None:
    """True in slots that hold no token of their row; None where every slot holds one."""
    empty = (positions == PADDING)[None]
    if lengths is not None:
        empty = empty | (positions >= lengths[:, None])
    return empty[:, None, :, None] if bool(empty.any()) else None


def without(
    x: Float[Tensor, "B H T D"], padding: Bool[Tensor, "#B 1 T 1"] | None
) -> Float[Tensor, "B H T D"]:
    """``x`` with 0 in its padding, and in the padding of its gradient: a weight of 0 times NaN is NaN."""
    return x if padding is None else x.masked_fill(padding, 0.0)


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError for keys and values that do not fit the queries."""
    validate.tensor("q", q, ("batch", "heads", "time", "head_dim"))
    validate.tensor("k", k, (len(q), "KV heads", "tokens", q.shape[3]), dtype=q.dtype, device=q.device)
    validate.tensor("v", v, tuple(k.shape), dtype=q.dtype, device=q.device)
    validate.divides("k.shape[1] (KV heads)", k.shape[1], "q.shape[1] (heads)", q.shape[1])


def blockwise_layer(layer: Block, x: Float[Tensor, "B T M"], block: int = 512) -> Float[Tensor, "B T M"]:
    """A layer of the decoder on ``x``, attention *and* feed-forward a block of queries at a time.

        x_b = x_b + attention(norm(x_b), keys of all x),    x_b = x_b + mlp(norm(x_b))

    The same numbers and gradients as ``layer(x, None, {})``. Keys and values of all tokens are kept; queries,
    scores and the hidden numbers of the feed-forward exist for one block, and are computed again for the
    gradient; gradients are summed in fp32 at least. A mixture of experts leaves the ``balance_loss`` of one
    block only. Raises TypeError for a layer whose mechanism is not ``full`` or ``gqa`` with its own keys.
    Source: Liu & Abbeel, "Blockwise Parallel Transformer for Large Context Models" (2023), section 3.
    """
    mixer = layer.mixer
    if not isinstance(mixer, GroupedQueryAttention) or mixer.reader:
        raise TypeError(f"layer: expected full or gqa with keys of its own, got {mixer.label}")
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    out: Tensor = _BlockwiseLayer.apply(layer, validate.positive("block", block), x, *weights)
    return out


class _BlockwiseLayer(torch.autograd.Function):
    """``blockwise_layer`` with one buffer per gradient, to which every block adds its part."""

    @staticmethod
    def forward(ctx: Any, layer: Block, block: int, x: Tensor, *weights: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        pieces = [project(layer, x[:, b], at[b]) for b in slices(x.shape[1], block)]
        k, v = (torch.cat(each, dim=2) for each in zip(*pieces, strict=True))
        y = torch.empty_like(x)
        for b in slices(x.shape[1], block):
            y[:, b] = finish(layer, x[:, b], at[b], k[:, :, : b.stop], v[:, :, : b.stop], block)
        ctx.layer, ctx.block = layer, block
        ctx.save_for_backward(x, k, v, *weights)
        return y

    @staticmethod
    @once_differentiable
    @torch.enable_grad()
    def backward(ctx: Any, *d_ys: Tensor) -> tuple[Any, ...]:
        layer, block, (d_y,) = ctx.layer, ctx.block, d_ys
        x, k, v, *weights = ctx.saved_tensors
        at = torch.arange(x.shape[1], device=x.device)
        d_x, d_k, d_v = (wide_zeros(z) for z in (x, k, v))
        d_weights = [wide_zeros(weight) for weight in weights]

        def add(
            outputs: Sequence[Tensor], d_outputs: Sequence[Tensor], to: Sequence[tuple[Tensor, Tensor]]
        ) -> None:
            grads = torch.autograd.grad(outputs, [of for of, _ in to] + weights, d_outputs, allow_unused=True)
            for buffer, grad in zip([into for _, into in to] + d_weights, grads, strict=True):
                if grad is not None:
                    buffer += grad

        for b in slices(x.shape[1], block):
            seen = slice(b.stop)  # the keys that these queries may see
            part, keys, values = (
                z.detach().requires_grad_() for z in (x[:, b], k[:, :, seen], v[:, :, seen])
            )
            y = finish(layer, part, at[b], keys, values, block)
            to = [(part, d_x[:, b]), (keys, d_k[:, :, seen]), (values, d_v[:, :, seen])]
            add([y], [d_y[:, b]], to)
        for b in slices(x.shape[1], block):
            part = x[:, b].detach().requires_grad_()
            d_kv = [z[:, :, b].to(k.dtype) for z in (d_k, d_v)]
            add(project(layer, part, at[b]), d_kv, [(part, d_x[:, b])])
        return None, None, *(d.to(z.dtype) for d, z in zip((d_x, *d_weights), (x, *weights), strict=True))


def project(
    layer: Block, x: Float[Tensor, "B T M"], at: Int[Tensor, "T"]
) -> tuple[Float[Tensor, "B G T D"], Float[Tensor, "B G T D"]]:
    """Keys and values of the tokens ``x`` at positions ``at``."""
    mixer: Any = layer.mixer
    mixed = layer.mixer_norm(x)
    k = mixer.rope(split_heads(mixer.k_proj(mixed), mixer.n_kv_heads), at[None])
    return k, split_heads(mixer.v_proj(mixed), mixer.n_kv_heads)


def finish(
    layer: Block,
    x: Float[Tensor, "B T M"],
    at: Int[Tensor, "T"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    block: int,
) -> Float[Tensor, "B T M"]:
    """All of a layer but keys and values, for the tokens ``x`` at positions ``at``."""
    mixer: Any = layer.mixer
    q = mixer.rope(split_heads(mixer.q_proj(layer.mixer_norm(x)), mixer.n_heads), at[None])
    heads = blockwise_attention(q, k, v, queries=at, block=block)
    x = x + layer.mixer_post_norm(mixer.o_proj(merge_heads(heads)))
    return x if layer.mlp is None else x + layer.mlp_post_norm(layer.mlp(layer.mlp_norm(x)))


def slices(length: int, block: int) -> list[slice]:
    """``length`` cut into pieces of ``block``, the last one shorter."""
    return [slice(a, min(a + block, length)) for a in range(0, length, block)]
