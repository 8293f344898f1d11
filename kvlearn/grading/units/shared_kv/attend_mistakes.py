"""02.1: the mistakes that people make with grouped heads: which pool, which rows, what is copied."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvlearn.grading.units.shared_kv.attend import EXERCISE

__all__ = ["EXERCISE"]

Mask = Tensor | None


def weigh(scores: Tensor, mask: Mask, dim: int = -1) -> Tensor:
    """Weights from scores (B, G, R, T, S)."""
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(-3), -torch.inf)
    return scores.softmax(dim)


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None = None, dim: int = -1) -> Tensor:
    """The right answer, but for the scale or the softmax's dimension."""
    B, H, T, D = q.shape
    q = q.reshape(B, k.shape[1], -1, T, D)
    scores = torch.einsum("bgrtd,bgsd->bgrts", q, k) * (D**-0.5 if scale is None else scale)
    return torch.einsum("bgrts,bgsd->bgrtd", weigh(scores, mask, dim), v).reshape(B, H, T, D)


def widened(q: Tensor, k: Tensor, v: Tensor, mask: Mask, widen: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Attention with K and V that were widened to H heads beforehand."""
    size = q.shape[1] // k.shape[1]
    k, v = widen(k, size), widen(v, size)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v


@EXERCISE.misconception("K and V repeated for every query head")
def repeated(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """repeat_interleave (or an index, or a stack) writes the keys and values of a pool down H/G times, at
    every step, so the step moves even more bytes than without sharing: the small cache is read, and a large
    one written and read again. Bring the queries to their pool by a reshape, and leave K and V alone."""
    return widened(q, k, v, mask, lambda x, size: x.repeat_interleave(size, dim=1))


@EXERCISE.misconception("repeat in place of repeat_interleave")
def tiled(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """`repeat` lays the pools out as 0, 1, 2, 0, 1, 2, so query head h gets pool h % G. A pool belongs to
    neighbours: heads 0 and 1 to pool 0, 2 and 3 to pool 1. A trained model gives nonsense in the other order,
    and with one pool, or one for each head, nothing shows. And K and V are copied besides."""
    return widened(q, k, v, mask, lambda x, size: x.repeat(1, size, 1, 1))


@EXERCISE.misconception("every G-th head in one pool")
def strided(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """The heads were cut as (R, G) and not as (G, R), so query head h reads pool h % G. A pool belongs to
    neighbouring heads, h // (H/G): reshape to (B, G, R, T, D), the pools in front."""
    H, R = q.shape[1], q.shape[1] // k.shape[1]
    order = torch.arange(H).view(R, -1).T.flatten()
    return grouped(q[:, order], k, v, mask)[:, order.argsort()]


@EXERCISE.misconception("an expanded view made into a copy")
def expanded(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """`expand` itself costs nothing: it is a view that shows each key R times. But `reshape` (or flatten, or
    contiguous) cannot merge such a dimension without writing everything down, so K and V are copied for all
    H heads after all. Reshape the queries, not the keys."""
    return widened(q, k, v, mask, lambda x, size: x[:, :, None].expand(-1, -1, size, -1, -1).flatten(1, 2))


@EXERCISE.misconception("a copy made by @, which broadcasts")
def broadcast(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """Nobody wrote a copy, but `@` makes one: it turns all dimensions in front
    into one batch, and for that it writes K and V down for each of the H heads. Fold the heads of a pool
    into the rows, (B, G, R·T, D) @ (B, G, D, S), or let `torch.einsum("bgrtd,bgsd->bgrts", q, k)` do it:
    there k has no dimension for the heads of a pool."""
    B, H, T, D = q.shape
    scores = q.reshape(B, k.shape[1], -1, T, D) @ k[:, :, None].transpose(-2, -1) * D**-0.5
    return (weigh(scores, mask) @ v[:, :, None]).reshape(B, H, T, D)


@EXERCISE.misconception("all products written down before they are added")
def products(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """`(q * k).sum(-1)` over broadcast dimensions makes a tensor with every single product, H·T·S·D numbers:
    larger than a copy of K. A matrix product (or einsum) adds the products up as it makes them."""
    B, H, T, D = q.shape
    q = q.reshape(B, k.shape[1], -1, T, 1, D)
    scores = (q * k[:, :, None, None]).sum(-1) * D**-0.5
    return (weigh(scores, mask)[..., None] * v[:, :, None, None]).sum(-2).reshape(B, H, T, D)


@EXERCISE.misconception("folded one way, unfolded the other")
def misfolded(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """The rows of a pool were put in the order (T, R), all heads of a token side by side, and the result was
    read in the order (R, T), so outputs land at other heads and tokens. With one query, or one head in a
    pool, there is nothing to mix up, and it looks right. Undo a reshape by its own inverse."""
    B, H, T, D = q.shape
    mixed = q.reshape(B, k.shape[1], -1, T, D).transpose(2, 3)
    scores = torch.einsum("bgtrd,bgsd->bgrts", mixed, k) * D**-0.5
    out = torch.einsum("bgrts,bgsd->bgtrd", weigh(scores, mask), v)
    return out.reshape(B, H, T, D)


@EXERCISE.misconception("the mask's rows in another order than the queries")
def misfolded_mask(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """The R·T queries of a pool stand head by head: all T tokens of the first head, then of the second. The
    mask was stretched with repeat_interleave, row 0 R times, then row 1; `repeat` fits, or cut the scores
    into (R, T, S) and let the mask broadcast. With one query it cannot be seen."""
    if mask is None:
        return grouped(q, k, v, None)
    B, H, T, D = q.shape
    R = H // k.shape[1]
    scores = q.reshape(B, k.shape[1], R * T, D) @ k.transpose(-2, -1) * D**-0.5
    weights = scores.masked_fill(~mask.repeat_interleave(R, dim=-2), -torch.inf).softmax(-1)
    return (weights @ v).reshape(B, H, T, D)


@EXERCISE.misconception("the masks of the batch laid over the pools")
def mask_over_pools(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """The scores have five dimensions, (B, G, R, T, S), and a mask of (B, 1, T, S) was laid over them as it
    is. Dimensions are matched from the right, so its B meets G: pool 0 gets the mask of sequence 0, and
    where B and G differ it raises. It lacks a dimension for R: `mask.unsqueeze(-3)`."""
    if mask is not None and mask.ndim == 4:
        mask = mask.transpose(0, 1).expand(len(q), -1, -1, -1)[:, :, None]
        B, H, T, D = q.shape
        q = q.reshape(B, k.shape[1], -1, T, D)
        scores = torch.einsum("bgrtd,bgsd->bgrts", q, k) * D**-0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return torch.einsum("bgrts,bgsd->bgrtd", weights, v).reshape(B, H, T, D)
    return grouped(q, k, v, mask)


@EXERCISE.misconception("masked after the softmax")
def masked_after_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """The weights were set to 0 after the softmax had already given hidden keys their share. What is left
    adds up to less than 1, so every output shrinks. Mask the scores with −∞ before the softmax."""
    B, H, T, D = q.shape
    q = q.reshape(B, k.shape[1], -1, T, D)
    weights = (torch.einsum("bgrtd,bgsd->bgrts", q, k) * D**-0.5).softmax(-1)
    if mask is not None:
        weights = weights.masked_fill(~mask.unsqueeze(-3), 0.0)
    return torch.einsum("bgrts,bgsd->bgrtd", weights, v).reshape(B, H, T, D)


@EXERCISE.misconception("softmax over the heads of a pool")
def softmax_over_pool(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """The softmax runs over the heads that share a pool. They share what is read, not the attention: every
    query head still divides its own weight 1 among the keys, the last dimension."""
    return grouped(q, k, v, mask, dim=2).nan_to_num()


@EXERCISE.misconception("one query for the whole pool")
def one_query(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """The queries of a pool were averaged, so its heads all give the same output. Sharing is about what is
    *stored*: the keys and values. Every query head stays itself, and asks the shared keys its own
    question."""
    B, H, T, D = q.shape
    pooled = q.reshape(B, k.shape[1], -1, T, D)
    return grouped(pooled.mean(2, keepdim=True).expand_as(pooled).reshape(B, H, T, D), k, v, mask)


@EXERCISE.misconception("every head reads the first pool")
def first_pool(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """All query heads read KV head 0. That is right where there is just one (MQA); with G of them, head h
    reads pool h // (H/G)."""
    return grouped(q, k[:, :1], v[:, :1], mask)


@EXERCISE.misconception("no scale")
def no_scale(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """The scores go into the softmax as they are. A score is still a sum of D products, so the factor 1/√D
    belongs to it, shared keys or not."""
    return grouped(q, k, v, mask, scale=1.0)


@EXERCISE.misconception("scaled by the width of the pool")
def scaled_by_group(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """The scores are divided by √(R·D), the width of all heads of a pool. A score is a sum over the D numbers
    of *one* query head with one key; how many heads read that key does not change it."""
    return grouped(q, k, v, mask, scale=(q.shape[1] // k.shape[1] * q.shape[-1]) ** -0.5)


@EXERCISE.misconception("scaled by d_model")
def scaled_by_d_model(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """The scores are divided by √(H·D), the width of the whole model. A score is a sum over the D numbers of
    one head, so its spread is √D, and 1/√D brings it back to 1."""
    return grouped(q, k, v, mask, scale=(q.shape[1] * q.shape[-1]) ** -0.5)


@EXERCISE.misconception("the mask has no effect")
def unmasked(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """The result is the one without a mask. Is it used, and is its effect kept? `masked_fill` returns a new
    tensor: `scores = scores.masked_fill(…)`."""
    return grouped(q, k, v, None)


@EXERCISE.misconception("the mask inverted")
def inverted(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """True means *may attend*; here the keys marked True are the ones that were hidden. Fill where the mask
    is False: `masked_fill(~mask, -torch.inf)`."""
    return grouped(q, k, v, None if mask is None else ~mask)


@EXERCISE.misconception("the result in fp32")
def in_fp32(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """The values are right, but the result comes in fp32 whatever the queries' dtype is. Computing in fp32 is
    sound; give the result back in the dtype of q, which the next layer's weights validate."""
    return grouped(q.float(), k.float(), v.float(), mask)
