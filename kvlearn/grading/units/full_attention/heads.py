"""01.3: cut the model's width into heads and put it together again, held against a loop over heads."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
    id="01.3",
    slug="heads",
    title="Split into heads, merge back",
    answers=("split_heads", "merge_heads"),
    hints=(
        "A head is a run of D neighbouring columns: head h holds the columns h·D to (h+1)·D − 1.",
        "Two steps: cut the last dimension in two, (B, T, H·D) → (B, T, H, D), then swap time and heads.",
        "`view` and `reshape` keep the order of the numbers; only `transpose`, `permute` or `movedim` "
        "change it, and (B, T, H, D) → (B, H, T, D) needs that.",
        "Merging undoes the steps in reverse: transpose first, then join the last two dimensions. A "
        "transposed tensor is not contiguous, so use `reshape` or `flatten`, not `view`.",
    ),
)


def split(x: Tensor, n_heads: int) -> Tensor:
    """One head at a time: its columns."""
    D = x.shape[-1] // n_heads
    return torch.stack([x[:, :, h * D : (h + 1) * D] for h in range(n_heads)], dim=1)


def merge(x: Tensor) -> Tensor:
    """The heads of each token side by side."""
    return torch.cat([x[:, h] for h in range(x.shape[1])], dim=-1)


@EXERCISE.requirement(1, "split: the shape")
def split_shape(t: Trial, split_heads: Answer, merge_heads: Answer) -> None:
    """(B, T, H·D) becomes (B, H, T, D)"""
    B, H, T, _, D = t.sizes()
    t.shape(split_heads(t.randn(B, T, H * D), H), (B, H, T, D))


@EXERCISE.requirement(1, "split: the values")
def split_values(t: Trial, split_heads: Answer, merge_heads: Answer) -> None:
    """head h holds columns h·D to (h+1)·D − 1 of every token"""
    B, H, T, _, D = t.sizes()
    x = t.randn(B, T, H * D)
    t.close(split_heads(x, H), split(x, H), tolerance=0.0)


@EXERCISE.requirement(1, "merge: shape and values")
def merge_values(t: Trial, split_heads: Answer, merge_heads: Answer) -> None:
    """(B, H, T, D) becomes (B, T, H·D), the heads of a token side by side"""
    B, H, T, _, D = t.sizes()
    x = t.randn(B, H, T, D)
    t.close(merge_heads(x), merge(x), tolerance=0.0)


@EXERCISE.requirement(1, "there and back, any dtype")
def round_trip(t: Trial, split_heads: Answer, merge_heads: Answer) -> None:
    """merging what was split gives back the very same tensor, in bf16 too, with right heads in between"""
    B, H, T, _, D = t.sizes()
    x = t.randn(B, T, H * D, dtype=torch.bfloat16)
    heads = split_heads(x, H)
    t.close(heads, split(x, H), tolerance=0.0)
    t.close(merge_heads(heads), x, tolerance=0.0)
    t.unchanged()


def right_split(x: Tensor, n_heads: int) -> Tensor:
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def right_merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(-2)


@EXERCISE.misconception("split by view alone", merge_heads=right_merge)
def view_alone(x: Tensor, n_heads: int) -> Tensor:
    """The shape is right and the content is not: `view(B, H, T, D)` reads the numbers in memory order, in
    which the columns of one token lie side by side. So a "head" here is a piece of several tokens. Cut
    the columns first, (B, T, H, D), then transpose."""
    B, T, width = x.shape
    return x.reshape(B, n_heads, T, width // n_heads)


@EXERCISE.misconception("heads interleaved", merge_heads=right_merge)
def interleaved(x: Tensor, n_heads: int) -> Tensor:
    """The last dimension was cut as (D, H), so head h took every H-th column. The projections' columns
    come head by head: cut as (H, D). A model trained the one way gives nonsense the other way."""
    B, T, width = x.shape
    return x.reshape(B, T, width // n_heads, n_heads).permute(0, 3, 1, 2)


@EXERCISE.misconception("split without moving the heads in front", merge_heads=right_merge)
def not_transposed(x: Tensor, n_heads: int) -> Tensor:
    """This gives (B, T, H, D). Attention multiplies the last two dimensions, so with time in front of the
    heads the heads of one token would attend to each other. Swap dimensions 1 and 2."""
    return x.unflatten(-1, (n_heads, -1))


@EXERCISE.misconception("merge without transposing back", split_heads=right_split)
def merge_by_view(x: Tensor) -> Tensor:
    """The shape is right and the content is not: `reshape(B, T, H·D)` straight from (B, H, T, D) fills a
    token's row with several tokens of the same head. Transpose back to (B, T, H, D) first."""
    B, H, T, D = x.shape
    return x.reshape(B, T, H * D)


@EXERCISE.misconception("merge interleaves the heads", split_heads=right_split)
def merge_interleaved(x: Tensor) -> Tensor:
    """The numbers of the heads come in turns: first of head 0, first of head 1, … The output projection
    expects head 0 whole, then head 1 whole: keep D last when you join the two dimensions."""
    return x.permute(0, 2, 3, 1).flatten(-2)
