"""03.4: the mistakes that people make on the way from the scores to the output."""

import torch
from torch import Tensor

from kvlearn.grading.units.multi_head_compression.step_mistakes import (
    EXERCISE,
    decode_over,
    parts,
    read,
    scale,
    scores,
)

__all__ = ["EXERCISE"]


def right_weights(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor) -> Tensor:
    c, k_rope = parts(cache, length, w_uk)
    return (scores(q, q_rope, c, k_rope, w_uk) * scale(q, q_rope)).softmax(-1)


@EXERCISE.misconception("the value takes the rotary columns")
def rope_in_value(
    q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor
) -> Tensor:
    """The weighted sum ran over whole rows, R + Dr numbers, and then the *last* R of them went up, so that
    the rotary key was read as content. k_rope serves the scores alone: the values come from c, the first
    R."""
    o = right_weights(q, q_rope, cache, length, w_uk) @ cache[:, :length]
    return torch.einsum("bhr,hdr->bhd", o[..., -w_uk.shape[-1] :], w_uv)


@EXERCISE.misconception("W_uk and W_uv exchanged")
def exchanged(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """The query met W_uv and the output W_uk. Their shapes are alike, so nothing complains. Scores are made
    with *keys*, W_uk c; what is read out are *values*, W_uv c."""
    return decode_over(q, q_rope, cache, length, w_uv, w_uk)


@EXERCISE.misconception("keys read out in place of values")
def keys_read(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """The output went up through W_uk: that is a weighted sum of *keys*. Scores use W_uk, values use W_uv."""
    return decode_over(q, q_rope, cache, length, w_uk, w_uk)


@EXERCISE.misconception("the output left in the latent space")
def not_taken_up(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """The result has R numbers a head: it is the weighted sum of latents. W_uv[h] still has to take it up to
    the D numbers of a head, once, at the end."""
    c, _ = parts(cache, length, w_uk)
    return right_weights(q, q_rope, cache, length, w_uk) @ c


@EXERCISE.misconception("the first head's values for all")
def first_head(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """All heads went up through W_uv[0]. The latent is shared; the way up is each head's own, W_uv[h]."""
    c, _ = parts(cache, length, w_uk)
    return right_weights(q, q_rope, cache, length, w_uk) @ c @ w_uv[0].T


@EXERCISE.misconception("one set of weights for all heads")
def shared_weights(
    q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor
) -> Tensor:
    """The scores were averaged over the heads, since the cache has none. The cached rows are shared, and
    every head still asks its own question: (B, H, length) scores, a softmax for each head."""
    c, k_rope = parts(cache, length, w_uk)
    shared = (scores(q, q_rope, c, k_rope, w_uk) * scale(q, q_rope)).mean(1, keepdim=True)
    return read(shared.softmax(-1).expand(-1, q.shape[1], -1), c, w_uv)


@EXERCISE.misconception("exp without subtracting the maximum")
def no_maximum(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """The softmax was written out as exp(score) / Σ exp(score). exp(89) is infinite in fp32, and then ∞/∞ is
    NaN. Subtract each row's maximum first, which changes nothing else; `softmax` does it for you."""
    c, k_rope = parts(cache, length, w_uk)
    weights = (scores(q, q_rope, c, k_rope, w_uk) * scale(q, q_rope)).exp()
    return read(weights / weights.sum(-1, keepdim=True), c, w_uv)


@EXERCISE.misconception("content and position weighed apart")
def two_softmaxes(
    q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor
) -> Tensor:
    """Content and position each had a softmax of their own, and the weights were averaged. The two are added
    as *scores*: a key then must fit in both, and one softmax follows."""
    c, k_rope = parts(cache, length, w_uk)
    zero = torch.zeros_like
    weights = [
        (scores(content, position, c, k_rope, w_uk) * scale(q, q_rope)).softmax(-1)
        for content, position in ((q, zero(q_rope)), (zero(q), q_rope))
    ]
    return read((weights[0] + weights[1]) / 2, c, w_uv)
