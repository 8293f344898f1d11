"""11.5: the mistakes that people make when they merge the parts, as short PyTorch emulations."""

import torch
from torch import Tensor

from kvlearn.grading.units.triton_decode.kernels import LOG2E
from kvlearn.grading.units.triton_decode.splits_mistakes import EXERCISE, Pair, merge, parts_of

__all__ = ["EXERCISE"]


@EXERCISE.misconception("the plain mean of the parts")
def mean(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """Every part has the weight 1/splits, the empty ones too. A part weighs what its keys weigh together,
    2^lse: that is what the lse is stored for."""
    parts, lse = parts_of(q, k, v, lengths, n_splits)
    return parts.mean(1), lse


@EXERCISE.misconception("the parts added up")
def added(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """The parts are added as they are. Each is a mean over its own keys already; the mean over all of them
    lies in between, with weights that add up to 1."""
    parts, lse = parts_of(q, k, v, lengths, n_splits)
    return parts.sum(1), lse


@EXERCISE.misconception("not divided by the sum of the weights")
def not_normalised(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """The parts are weighted by exp2(lse − top) and added, but those weights add up to more than 1. Divide by
    their sum: it is the softmax's denominator over all keys."""
    parts, lse = parts_of(q, k, v, lengths, n_splits)
    weights = torch.exp2(lse - lse.amax(1, keepdim=True).nan_to_num(neginf=0.0))
    return torch.einsum("bn,bnd->bd", weights, parts), lse


@EXERCISE.misconception("weighted by lse, not by 2^lse")
def by_lse(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """The weights are the log-sum-exps themselves. They are logarithms, may be negative, and of an empty
    split are −∞ (which gives NaN): the parts weigh 2^lse."""
    parts, lse = parts_of(q, k, v, lengths, n_splits)
    total = lse.sum(1, keepdim=True)
    return torch.einsum("bn,bnd->bd", lse, parts) / torch.where(total == 0, 1.0, total), lse


@EXERCISE.misconception("no maximum in the merge")
def no_maximum(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """exp2 is taken of the log-sum-exps themselves: infinite above 128, 0 below −150, and then ∞/∞ or nothing
    at all is left. Subtract the largest of them first: only differences matter."""
    parts, lse = parts_of(q, k, v, lengths, n_splits)
    weights = torch.exp2(lse)
    total = weights.sum(1, keepdim=True)
    return torch.einsum("bn,bnd->bd", weights, parts) / torch.where(total == 0, 1.0, total), lse


@EXERCISE.misconception("no maximum in the merge, and 0 / 0")
def no_maximum_unguarded(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """exp2 is taken of the log-sum-exps themselves: infinite above 128, 0 below −150, and then ∞/∞ or 0/0 is
    NaN. Subtract the largest of them first. A row of length 0 divides 0 by 0 as well: divide by 1 there."""
    parts, lse = parts_of(q, k, v, lengths, n_splits)
    weights = torch.exp2(lse)
    return torch.einsum("bn,bnd->bd", weights, parts) / weights.sum(1, keepdim=True), lse


@EXERCISE.misconception("−∞ − (−∞) = NaN")
def nan_when_empty(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """In a row of length 0 every part has the lse −∞, so their maximum is −∞ too, and −∞ − (−∞) is NaN (or
    the weights are all 0, and 0 / 0 is). A slot of the batch that waits for its next request is such a
    row."""
    parts, lse = parts_of(q, k, v, lengths, n_splits)
    return merge(parts, lse, guard=False), lse


@EXERCISE.misconception("e in place of 2")
def natural(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """The lse of the parts is a logarithm to base 2, and exp was taken of it. The weights are
    `tl.exp2(lse - top)`: what was counted in base 2 is merged in base 2."""
    parts, lse = parts_of(q, k, v, lengths, n_splits)
    return merge(parts, lse * LOG2E), lse


@EXERCISE.misconception("padding weighs as a split")
def padding(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """The number of splits was rounded up to a power of two, and the lse of what is only padding was
    loaded as 0, not as −∞: 2^0 is a weight. `tl.load(…, mask=s < n_splits, other=float("-inf"))`."""
    parts, lse = parts_of(q, k, v, lengths, n_splits)
    wide = (1 << (n_splits - 1).bit_length()) - n_splits
    return merge(
        torch.nn.functional.pad(parts, (0, 0, 0, wide)), torch.nn.functional.pad(lse, (0, wide))
    ), lse


@EXERCISE.misconception("only the strongest part")
def strongest(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """The part with the largest lse was taken for the whole. The others have weights too, exp2(lse − top),
    and for parts with as many keys they are not small."""
    parts, lse = parts_of(q, k, v, lengths, n_splits)
    return parts[torch.arange(len(q), device=q.device), lse.argmax(1)], lse


@EXERCISE.misconception("every row weighs by the first row's lse")
def first_rows_lse(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int) -> Pair:
    """The lse was loaded without the row, so all rows weigh their parts as the first one does. Row b's splits
    begin at b · n_splits."""
    parts, lse = parts_of(q, k, v, lengths, n_splits)
    return merge(parts, lse[:1].expand(len(q), -1)), lse
