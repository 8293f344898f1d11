"""03.4: the mistakes that people make in a latent decode step."""

import torch
from torch import Tensor

from kvlearn.grading.units.multi_head_compression.step import EXERCISE

__all__ = ["EXERCISE"]


def parts(cache: Tensor, length: int, w_uk: Tensor) -> tuple[Tensor, Tensor]:
    """The latents and rotary keys of the tokens that are there."""
    return cache[:, :length, : w_uk.shape[-1]], cache[:, :length, w_uk.shape[-1] :]


def scores(q: Tensor, q_rope: Tensor, c: Tensor, k_rope: Tensor, w_uk: Tensor) -> Tensor:
    """Right, before the scale: (B, H, S)."""
    absorbed = torch.einsum("bhd,hdr->bhr", q, w_uk)
    return absorbed @ c.transpose(1, 2) + q_rope @ k_rope.transpose(1, 2)


def scale(q: Tensor, q_rope: Tensor) -> float:
    return float((q.shape[-1] + q_rope.shape[-1]) ** -0.5)


def read(weights: Tensor, c: Tensor, w_uv: Tensor) -> Tensor:
    return torch.einsum("bhr,hdr->bhd", weights @ c, w_uv)


@EXERCISE.misconception("everything decompressed")
def decompressed(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """The output is right, but keys and values of all heads were built from the latents of all tokens: H·S·D
    numbers each, at every step. That is the memory and the work which the latent was to save. Fold W_uk into
    the query, which is one token, and W_uv into the result."""
    c, k_rope = parts(cache, length, w_uk)
    k, v = (torch.einsum("bsr,hdr->bhsd", c, w) for w in (w_uk, w_uv))
    content = torch.einsum("bhd,bhsd->bhs", q, k)
    weights = ((content + q_rope @ k_rope.transpose(1, 2)) * scale(q, q_rope)).softmax(-1)
    return torch.einsum("bhs,bhsd->bhd", weights, v)


@EXERCISE.misconception("the latents copied for every head")
def copied(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """The output is right, but the latents were copied once for each head, H·S·R numbers. `expand` makes no
    copy, yet `@` does: where it broadcasts (B, H, 1, R) with (B, 1, R, S), it first writes all heads' copies
    to memory. Let the heads be the *rows* of one product instead: (B, H, R) @ (B, R, S)."""
    c, k_rope = (part[:, None] for part in parts(cache, length, w_uk))
    absorbed = torch.einsum("bhd,hdr->bhr", q, w_uk)[:, :, None]
    content = absorbed @ c.transpose(-2, -1)
    weights = ((content + q_rope[:, :, None] @ k_rope.transpose(-2, -1)) * scale(q, q_rope)).softmax(-1)
    return torch.einsum("bhr,hdr->bhd", (weights @ c)[:, :, 0], w_uv)


@EXERCISE.misconception("scaled by √(R + Dr)")
def scaled_by_row(
    q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor
) -> Tensor:
    """The scale counts the R + Dr numbers of a cached row. The absorbed product is the *same score* as q · k,
    a sum over D numbers, only computed in another order; so the scale stays √(D + Dr)."""
    c, k_rope = parts(cache, length, w_uk)
    return read((scores(q, q_rope, c, k_rope, w_uk) * cache.shape[-1] ** -0.5).softmax(-1), c, w_uv)


@EXERCISE.misconception("scaled by √D")
def scaled_by_head_dim(
    q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor
) -> Tensor:
    """The scale is 1/√D, as in plain attention. A score is a sum over D content and Dr rotary products: its
    spread is √(D + Dr)."""
    c, k_rope = parts(cache, length, w_uk)
    return read((scores(q, q_rope, c, k_rope, w_uk) * q.shape[-1] ** -0.5).softmax(-1), c, w_uv)


@EXERCISE.misconception("scaled by √R")
def scaled_by_rank(
    q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor
) -> Tensor:
    """The scale counts the R numbers of the latent. The absorbed product is the *same score* as q · k, a sum
    over D numbers, only computed in another order; with the rotary numbers its scale is √(D + Dr)."""
    c, k_rope = parts(cache, length, w_uk)
    return read((scores(q, q_rope, c, k_rope, w_uk) * w_uk.shape[-1] ** -0.5).softmax(-1), c, w_uv)


@EXERCISE.misconception("each part scaled by its own width")
def own_widths(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """Content was divided by √D and position by √Dr. Dr is small, so the position weighs far too much. They
    are one product of D + Dr numbers, cut in two: one scale for the sum, √(D + Dr)."""
    c, k_rope = parts(cache, length, w_uk)
    q, q_rope = q * q.shape[-1] ** -0.5, q_rope * q_rope.shape[-1] ** -0.5
    return read(scores(q, q_rope, c, k_rope, w_uk).softmax(-1), c, w_uv)


@EXERCISE.misconception("no scale")
def unscaled(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """The scores go into the softmax as they are. They are sums of D + Dr products: without the factor
    1/√(D + Dr) the softmax is too sharp."""
    c, k_rope = parts(cache, length, w_uk)
    return read(scores(q, q_rope, c, k_rope, w_uk).softmax(-1), c, w_uv)


@EXERCISE.misconception("empty slots have their say")
def whole_cache(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """All slots of the cache were attended to. A slot behind `length` that holds zeros has the score 0, and
    exp(0) = 1 is a weight like any other; what an earlier sequence left there has any score at all. Take
    `cache[:, :length]` first."""
    return decode_over(q, q_rope, cache, cache.shape[1], w_uk, w_uv)


@EXERCISE.misconception("the newest token left out")
def one_short(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """The last of the `length` tokens was not attended to. It is the token that is being decoded: its row is
    in the cache already, and a token attends to itself. `cache[:, :length]` ends before slot `length`."""
    return decode_over(q, q_rope, cache, length - 1, w_uk, w_uv)


@EXERCISE.misconception("one slot too many")
def one_long(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """Slot number `length` was attended to as well. Counted from 0 the tokens are in the slots 0 … length −
    1, the new one among them: `cache[:, :length]`."""
    return decode_over(q, q_rope, cache, length + 1, w_uk, w_uv)


def decode_over(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    c, k_rope = parts(cache, length, w_uk)
    weights = (scores(q, q_rope, c, k_rope, w_uk) * scale(q, q_rope)).softmax(-1)
    return read(weights, c, w_uv)


@EXERCISE.misconception("empty slots masked after the softmax")
def masked_late(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """The weights of empty slots were set to 0 when the softmax had already given them a share. What is left
    adds up to less than 1. Cut the cache off at `length`, or set the scores to −∞ before the softmax."""
    c, k_rope = parts(cache, cache.shape[1], w_uk)
    weights = (scores(q, q_rope, c, k_rope, w_uk) * scale(q, q_rope)).softmax(-1)
    return read(weights[..., :length], c[:, :length], w_uv)


@EXERCISE.misconception("scores of empty slots set to 0")
def masked_with_zero(
    q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor
) -> Tensor:
    """The scores were multiplied by a mask of ones and zeros. A score of 0 is a score like any other, and
    exp(0) = 1 is a weight. Cut the cache off at `length`, or set these scores to −∞."""
    c, k_rope = parts(cache, cache.shape[1], w_uk)
    there = torch.arange(cache.shape[1]) < length
    return read((scores(q, q_rope, c, k_rope, w_uk) * scale(q, q_rope) * there).softmax(-1), c, w_uv)


@EXERCISE.misconception("softmax over the heads")
def over_heads(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """The softmax runs over the heads, dimension 1. Every head divides its own attention among the tokens:
    the weights add up to 1 along the last dimension."""
    c, k_rope = parts(cache, length, w_uk)
    return read((scores(q, q_rope, c, k_rope, w_uk) * scale(q, q_rope)).softmax(1), c, w_uv)


@EXERCISE.misconception("the position left out")
def content_only(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """The scores are those of the content alone. Add q_rope · k_rope: the last Dr numbers of every cached row
    are the token's rotary key, rotated when it was written."""
    c, k_rope = parts(cache, length, w_uk)
    return read((scores(q, 0 * q_rope, c, k_rope, w_uk) * scale(q, q_rope)).softmax(-1), c, w_uv)


@EXERCISE.misconception("rotary numbers looked for in front")
def rope_first(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """The first Dr numbers of a row were taken for the rotary key and the rest for the latent. A row is
    [c ; k_rope]: the R numbers of the latent first."""
    Dr = q_rope.shape[-1]
    return decode_over(q, q_rope, torch.cat((cache[..., Dr:], cache[..., :Dr]), -1), length, w_uk, w_uv)
