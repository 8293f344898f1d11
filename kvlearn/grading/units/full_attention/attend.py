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
