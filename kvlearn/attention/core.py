"""Scaled dot-product attention: the equation, the causal mask, the fast road, and the form in pieces.

Letters, here and in every file of kvlearn:

    B  batch              H  query heads        D  head dim
    T  new tokens         G  KV heads           R  latent rank
    S  tokens in cache    W  window             C  chunk

A mask is boolean and True means *may attend*. A query that may attend to nothing gets 0, never NaN.
"""

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvlearn import validate


def attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S Dv"],
    mask: Bool[Tensor, "..."] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H T Dv"]:
    """softmax(q kᵀ · scale) v, as it is written on paper: the reference for everything faster.

    Computed in fp32 at least, returned in q's dtype. ``mask`` broadcasts to (B, H, T, S); ``scale`` is 1/√D
    unless given. Source: Vaswani et al., "Attention Is All You Need" (2017), equation 1.
    """
    return attend_partial(q, k, v, mask, scale).out.to(q.dtype)


def causal_mask(n_queries: int, n_keys: int, device: torch.device | str | None = None) -> Bool[Tensor, "T S"]:
    """The mask of ``n_queries`` tokens that are the *last* of ``n_keys``: aligned bottom-right.

    Query t stands at position n_keys - n_queries + t and sees the keys up to and including its own.
    Raises ValueError for more queries than keys.
    """
    validate.at_most("n_queries", n_queries, n_keys, "n_keys: each query has a key of its own")
    positions = torch.arange(n_keys - n_queries, n_keys, device=device)
    return positions[:, None] >= torch.arange(n_keys, device=device)


def visible(positions: Int[Tensor, "#B T"], n_keys: int) -> Bool[Tensor, "#B 1 T {n_keys}"]:
    """The causal mask of queries at any ``positions``, over keys that lie in the order of their positions.

    Rows may stand at different positions. Slots past a row's own length are hidden by the same comparison,
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
    """The fast road: causal attention of queries at ``positions`` over keys 0…S-1, by PyTorch's SDPA.

    Where all rows stand at the same positions, those must be the last T of S. Two cases then need no mask:
    one new token, which sees everything, and a sequence from its start, for which SDPA builds none itself.
    """
    S = k.shape[2]
    together = len(positions) == 1
    mask = None if together and q.shape[2] in (1, S) else visible(positions, S)
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

    Keys and values are not copied for them: a step turns the heads of a pool into the rows of one matrix of
    queries, so that each key is fetched once; a longer pass makes a batch of the pools and shows each to all
    its heads. G must divide H.
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
    """Into how many matrices a step cuts the ``heads`` of each pool.

    One, but on a processor with more threads than pools. There SDPA gives a matrix to a thread; of a lone one
    it would do each little product by all threads, which wait for each other every time.
    """
    if device.type != "cpu":
        return 1
    wanted = min(-(-torch.get_num_threads() // pools), heads)
    return next(parts for parts in range(wanted, heads + 1) if heads % parts == 0)


class Partial(NamedTuple):
    """Attention over some of the keys: the normalised output, and the log of what normalised it.

    ``lse`` is log Σ exp(score) over those keys. It is all that is needed to merge two partial results as if
    their keys had been seen together. No keys give out = 0 and lse = -inf.
    """

    out: Float[Tensor, "B H T Dv"]
    lse: Float[Tensor, "B H T"]


def attend_partial(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S Dv"],
    mask: Bool[Tensor, "..."] | None = None,
    scale: float | None = None,
) -> Partial:
    """Attention over these keys alone, in fp32 at least, with the log-sum-exp that ``merge`` needs."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = upcast(q), upcast(k), upcast(v)
    scores = q @ k.transpose(-1, -2) * scale
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
) -> Partial:
    """``attend_partial`` of H query heads over G KV heads: the heads of a pool are the rows of one matrix."""
    B, H, T, _ = q.shape
    n = H // k.shape[1]
    rows = None if mask is None else mask.expand(-1, -1, T, -1).repeat(1, 1, n, 1)
    out, lse = attend_partial(q.reshape(B, -1, n * T, q.shape[3]), k, v, rows, scale)
    return Partial(out.reshape(B, H, T, -1), lse.reshape(B, H, T))


def merge(a: Partial, b: Partial) -> Partial:
    """Two partial results over disjoint keys, as one: each output weighs exp(its lse - the common lse).

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
    """The output where each head's softmax has one more logit, which nothing of value belongs to.

        softmax over [scores, s], without the last weight:   out · e^lse / (e^lse + e^s) = out · σ(lse - s)

    A head that finds nothing can so put its weight nowhere. Source: OpenAI, "gpt-oss" (2025), section 2.2;
    Miller, "Attention Is Off By One" (2023), is the case s = 0.
    """
    return part.out * torch.sigmoid(part.lse - upcast(sink_logits)[:, None])[..., None]


def upcast(x: Tensor) -> Tensor:
    """To fp32, where it is less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def finite(lse: Tensor) -> Tensor:
    """-inf replaced by the lowest finite number, so that exp(-inf - lse) is 0 where it would be NaN."""
    return lse.clamp_min(torch.finfo(lse.dtype).min)


def split_heads(x: Float[Tensor, "B T HD"], n_heads: int) -> Float[Tensor, "B H T D"]:
    """The last dimension cut into heads, heads in front of time."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B T HD"]:
    """The inverse of ``split_heads``."""
    return x.transpose(1, 2).flatten(-2)
