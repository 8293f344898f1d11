"""01.1: scaled dot-product attention with a mask, held against PyTorch's own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
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


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """SDPA in fp32; a query that may attend to nothing gets 0."""
    out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    if mask is not None:
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out.to(q.dtype)


def draw(t: Trial, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, S, D = t.sizes()
    return (
        t.randn(B, H, T, D, dtype=dtype),
        t.randn(B, H, S, D, dtype=dtype),
        t.randn(B, H, S, D, dtype=dtype),
    )


@EXERCISE.requirement(1, "the shape")
def shape(t: Trial, attend: Answer) -> None:
    """one output for each query, (B, H, T, D), also when there are more keys than queries"""
    q, k, v = draw(t)
    t.shape(attend(q, k, v), tuple(q.shape))


@EXERCISE.requirement(1, "the values, without a mask")
def values(t: Trial, attend: Answer) -> None:
    """softmax(q kᵀ / √D) v in fp32"""
    q, k, v = draw(t)
    t.close(attend(q, k, v), reference(q, k, v))


@EXERCISE.requirement(1, "the values, with a mask")
def masked(t: Trial, attend: Answer) -> None:
    """the same over the keys where the mask is True; masks of shape (T, S) and (B, 1, T, S)"""
    q, k, v = draw(t)
    B, _, T, _ = q.shape
    for shape in ((T, k.shape[2]), (B, 1, T, k.shape[2])):
        mask = t.mask(*shape)
        t.close(attend(q, k, v, mask), reference(q, k, v, mask))


@EXERCISE.requirement(1, "a row with every key masked")
def empty_rows(t: Trial, attend: Answer) -> None:
    """0 for a query that may attend to nothing, and the other rows as before"""
    q, k, v = draw(t)
    mask = t.mask(q.shape[0], 1, q.shape[2], k.shape[2])
    mask[t.integer(0, q.shape[0] - 1), :, t.integer(0, q.shape[2] - 1)] = False
    t.close(attend(q, k, v, mask), reference(q, k, v, mask))


@EXERCISE.requirement(1, "half precision")
def half(t: Trial, attend: Answer) -> None:
    """bf16 and fp16 in, the same dtype out, right within its precision"""
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = draw(t, dtype)
        mask = t.mask(q.shape[2], k.shape[2])
        t.close(attend(q, k, v, mask), reference(q, k, v, mask))


@EXERCISE.requirement(1, "large scores, and inputs left alone")
def large(t: Trial, attend: Answer) -> None:
    """finite and right when scores reach ±1000; q, k, v and the mask unchanged afterwards"""
    q, k, v = draw(t)
    q = q * 300
    mask = t.mask(q.shape[2], k.shape[2])
    t.close(attend(q, k, v, mask), reference(q, k, v, mask), tolerance=1e-3)
    t.unchanged()


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
