"""01.1: the mistakes that people make with attention."""

import torch
from torch import Tensor

from kvlearn.grading.units.full_attention.attend import EXERCISE

__all__ = ["EXERCISE"]


def attend_with(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    fill: float = -torch.inf,
    dim: int = -1,
) -> Tensor:
    scores = q @ k.transpose(-2, -1) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, fill)
    weights = scores.softmax(dim)
    return (weights if mask is None else weights.masked_fill(~mask, 0.0)) @ v


@EXERCISE.misconception("scaled by d_model")
def scaled_by_d_model(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The scores are divided by √(H·D), the width of the whole model, but a score is a sum over the D
    numbers of one head. Its spread is √D, so √D brings it back to 1; the larger divisor makes every
    softmax too flat."""
    return attend_with(q, k, v, mask, (q.shape[1] * q.shape[-1]) ** -0.5)


@EXERCISE.misconception("no scale")
def no_scale(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The scores go into the softmax as they are. A sum of D products has a spread of √D: without the factor
    1/√D the softmax is too sharp, nearly one-hot for large heads, and its gradients vanish."""
    return attend_with(q, k, v, mask, 1.0)


@EXERCISE.misconception("divided by D, not by √D")
def scaled_by_head_dim(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The scores are divided by D. Variances add up, so the sum of D products has variance D and spread √D:
    the square root belongs to the formula."""
    return attend_with(q, k, v, mask, 1 / q.shape[-1])


@EXERCISE.misconception("softmax over the queries")
def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The softmax runs over dimension −2, the queries. Each query divides its own attention among the
    keys, so it is the row of scores, dimension −1, that must add up to 1. (With one query every weight
    becomes 1.)"""
    return attend_with(q, k, v, mask, q.shape[-1] ** -0.5, dim=-2)


@EXERCISE.misconception("a fully masked row gives NaN")
def nan_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """A row of scores that is −∞ everywhere makes the softmax compute 0 / 0. Such rows are real: padding,
    or a block of keys that lies wholly in the future. One NaN there spreads through every later layer."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


@EXERCISE.misconception("a very negative number in place of −∞")
def very_negative(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Masked scores are set to a very negative number. No NaN comes up, but in a row where *every* key is
    masked all scores are equal again, and the softmax hands out the mean of keys that must not be seen."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


@EXERCISE.misconception("−1e9 in place of −∞")
def minus_1e9(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Masked scores are set to −1e9. In a row where *every* key is masked all scores are equal again, and the
    softmax hands out the mean of keys that must not be seen. And fp16 ends at 65504: there it raises."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores if mask is None else scores.masked_fill(~mask, -1e9)).softmax(-1) @ v


@EXERCISE.misconception("the mask inverted")
def inverted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """True means *may attend*, as in torch's scaled_dot_product_attention; here the keys marked True are the
    ones that were hidden. (nn.MultiheadAttention and key_padding_mask use the opposite sense: read twice.)"""
    return attend_with(q, k, v, None if mask is None else ~mask, q.shape[-1] ** -0.5)


@EXERCISE.misconception("masked after the softmax")
def masked_after_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The weights were set to 0 after the softmax had already given hidden keys their share. What is left
    adds up to less than 1, so every output shrinks. Mask the scores with −∞ before the softmax."""
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights if mask is None else weights.masked_fill(~mask, 0.0)) @ v


@EXERCISE.misconception("the mask has no effect")
def unmasked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The result is the one without a mask. Is it used, and is its effect kept? `masked_fill` returns a new
    tensor and leaves its own alone: `scores = scores.masked_fill(…)`, or `masked_fill_`."""
    return attend_with(q, k, v, None, q.shape[-1] ** -0.5)


@EXERCISE.misconception("masked scores set to 0")
def filled_with_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Hidden pairs have the score 0 (or 1e-9, or the product of score and mask). That is a score like any
    other, and exp(0) = 1 is a weight. Only −∞ becomes the weight 0."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores if mask is None else scores.masked_fill(~mask, 0.0)).softmax(-1) @ v


@EXERCISE.misconception("the boolean mask added to the scores")
def added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """True counts as 1 in a sum, so keys that may be seen gain 1 and hidden ones stay. A mask to add holds 0
    and −∞; with a boolean one use `masked_fill(~mask, -torch.inf)`."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores if mask is None else scores + mask).softmax(-1) @ v


@EXERCISE.misconception("always causal")
def always_causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Later keys are hidden though nobody asked for it. Which pairs may attend is what the mask says, and
    without a mask it is all of them; one-way attention is a matter of the caller's mask."""
    T, S = q.shape[2], k.shape[2]
    causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return attend_with(q, k, v, causal if mask is None else mask & causal, q.shape[-1] ** -0.5)


@EXERCISE.misconception("scaled by √T")
def scaled_by_length(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The scores are divided by the root of dimension 2, the number of queries. A score is a sum over the D
    numbers of a head, whatever the length of the prompt: √D, `q.shape[-1]`."""
    return attend_with(q, k, v, mask, q.shape[2] ** -0.5)


@EXERCISE.misconception("exp without subtracting the maximum")
def no_maximum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The softmax was written out as exp(score) / Σ exp(score). exp(89) is infinite in fp32, and then ∞/∞
    is NaN. Subtract each row's maximum first, which changes nothing else; `softmax` does it for you."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.exp()
    return (weights / weights.sum(-1, keepdim=True)).nan_to_num() @ v
