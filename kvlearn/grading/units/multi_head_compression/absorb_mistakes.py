"""03.3: the mistakes that people make when they absorb a projection."""

import torch
from torch import Tensor

from kvlearn.grading.units.multi_head_compression.absorb import EXERCISE

__all__ = ["EXERCISE"]


def right_in(q: Tensor, w_uk: Tensor) -> Tensor:
    return q @ w_uk


def right_out(o: Tensor, w_uv: Tensor) -> Tensor:
    return o @ w_uv.transpose(-2, -1)


@EXERCISE.misconception("absorbed on the wrong side", unabsorb=right_out)
def key_matrix_transposed(q: Tensor, w_uk: Tensor) -> Tensor:
    """The query was multiplied with W_uk the way the latent is, W_uk q. But q · (W c) = (Wᵀ q) · c: the
    matrix changes sides as its transpose. As a row that is `q @ w_uk[h]`. (Where D = R both run, and this one
    is wrong; else the shapes do not fit.)"""
    return q @ w_uk.transpose(-2, -1)


@EXERCISE.misconception("W_uk reshaped to fit", unabsorb=right_out)
def key_matrix_reshaped(q: Tensor, w_uk: Tensor) -> Tensor:
    """`w_uk.reshape(H, R, D)` has the shape of a transpose and not its content: reshape reads the numbers in
    the order of memory and cuts the rows elsewhere. `transpose(-2, -1)` swaps rows and columns, and here none
    is needed: `q @ w_uk[h]` is (T, D) @ (D, R)."""
    H, D, R = w_uk.shape
    return q @ w_uk.reshape(H, R, D).transpose(-2, -1)


@EXERCISE.misconception("the pseudo-inverse in place of the transpose", unabsorb=right_out)
def key_matrix_inverted(q: Tensor, w_uk: Tensor) -> Tensor:
    """The query was taken down by the pseudo-inverse of W_uk, as if the up-projection had to be undone.
    Nothing is undone: q · (W c) = (Wᵀ q) · c holds for any W. The two agree only where the columns of W are
    orthonormal."""
    return q @ torch.linalg.pinv(w_uk.float()).transpose(-2, -1).to(q.dtype)


@EXERCISE.misconception("the first head's matrix for all", unabsorb=right_out)
def first_head(q: Tensor, w_uk: Tensor) -> Tensor:
    """Every head's query was multiplied with W_uk[0]. The latent is shared by the heads; the way up is not:
    head h reads it through its own W_uk[h]."""
    return q @ w_uk[0]


@EXERCISE.misconception("the heads' matrices added up", unabsorb=right_out)
def matrices_summed(q: Tensor, w_uk: Tensor) -> Tensor:
    """W_uk was summed over its heads before it met the query. In einsum that happens when the head has
    another letter in the second input, as in "bhtd,gdr->bhtr": a letter that is missing in the result is
    added up. Write h in both."""
    return torch.einsum("bhtd,gdr->bhtr", q, w_uk)


@EXERCISE.misconception("one absorbed query for all heads", unabsorb=right_out)
def heads_summed(q: Tensor, w_uk: Tensor) -> Tensor:
    """The absorbed queries of all heads were added up to one, (B, T, R). The latent has no heads, but the
    queries have: each head keeps its own scores, so the result is (B, H, T, R)."""
    return torch.einsum("bhtd,hdr->btr", q, w_uk)


@EXERCISE.misconception("the scale put in, by R", unabsorb=right_out)
def scaled_by_rank(q: Tensor, w_uk: Tensor) -> Tensor:
    """The absorbed query was divided by √R, since it now has R numbers. The score is the same number as
    before, q · k, a sum over the D numbers of a head, only computed in another order. So its scale stays too,
    and `absorb` itself puts none in."""
    return q @ w_uk / w_uk.shape[-1] ** 0.5


@EXERCISE.misconception("the scale put in, by D", unabsorb=right_out)
def scaled_by_head_dim(q: Tensor, w_uk: Tensor) -> Tensor:
    """The absorbed query was divided by √D. The scale belongs to the scores, content and position together,
    and there it is 1/√(D + Dr). `absorb` only folds W_uk in."""
    return q @ w_uk / w_uk.shape[1] ** 0.5


@EXERCISE.misconception("time and heads mixed up", unabsorb=right_out)
def reshaped_heads(q: Tensor, w_uk: Tensor) -> Tensor:
    """All heads were joined by `reshape` to (B, T, H·D) before the product, straight from (B, H, T, D). That
    reads in the order of memory, so a row holds several tokens of one head. The product needs no joining:
    heads are a batch dimension, `q @ w_uk`."""
    B, H, T, D = q.shape
    rows = q.reshape(B, T, H, D).transpose(1, 2)
    return rows @ w_uk


@EXERCISE.misconception("W_uv on the wrong side", absorb=right_in)
def value_matrix_transposed(o: Tensor, w_uv: Tensor) -> Tensor:
    """The output was multiplied as `o @ w_uv`, like the query. But the values' matrix stands where it stood,
    W_uv o, which is `o @ w_uv[h].T` for a row: it takes R numbers up to D, while W_uk's transpose takes D
    down to R. (Where D = R both run, and this one is wrong.)"""
    return o @ w_uv


@EXERCISE.misconception("W_uv reshaped to fit", absorb=right_in)
def value_matrix_reshaped(o: Tensor, w_uv: Tensor) -> Tensor:
    """`w_uv.reshape(H, R, D)` makes the shapes fit and scrambles the numbers: reshape keeps their order in
    memory. To swap rows and columns use `w_uv.transpose(-2, -1)`."""
    H, D, R = w_uv.shape
    return o @ w_uv.reshape(H, R, D)


@EXERCISE.misconception("the pseudo-inverse on the way up", absorb=right_in)
def value_matrix_inverted(o: Tensor, w_uv: Tensor) -> Tensor:
    """The latent sum was taken up by a pseudo-inverse. W_uv *is* the way up: the weighted sum of the values
    W_uv c is W_uv times the weighted sum of the latents."""
    return o @ torch.linalg.pinv(w_uv.float()).to(o.dtype)


@EXERCISE.misconception("the first head's values for all", absorb=right_in)
def first_head_out(o: Tensor, w_uv: Tensor) -> Tensor:
    """Every head went up through W_uv[0]. The latent is shared by the heads; the way up is not: head h uses
    its own W_uv[h]."""
    return o @ w_uv[0].T


@EXERCISE.misconception("the heads' value matrices added up", absorb=right_in)
def value_matrices_summed(o: Tensor, w_uv: Tensor) -> Tensor:
    """W_uv was summed over its heads before it met the output: in einsum, the head had another letter in the
    second input, and a letter that is missing in the result is added up. Write h in both."""
    return torch.einsum("bhtr,gdr->bhtd", o, w_uv)


@EXERCISE.misconception("the heads merged", absorb=right_in)
def merged(o: Tensor, w_uv: Tensor) -> Tensor:
    """The heads were joined to (B, T, H·D). That is the next step of the layer, before its output projection;
    `unabsorb` returns them apart, (B, H, T, D)."""
    return right_out(o, w_uv).transpose(1, 2).flatten(-2)
