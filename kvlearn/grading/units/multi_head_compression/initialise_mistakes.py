"""03.5: the mistakes that people make with the SVD."""

import torch
from torch import Tensor

from kvlearn.grading.units.multi_head_compression.initialise import EXERCISE, Pair

__all__ = ["EXERCISE"]


def svd(keys_values: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    U, s, Vh = torch.linalg.svd(keys_values, full_matrices=False)
    return U[:, :rank], s[:rank], Vh[:rank]


@EXERCISE.misconception("left singular vectors")
def left(keys_values: Tensor, rank: int) -> Pair:
    """The columns of U were taken. U has a row for each *token* of A: it says how these tokens combine, and
    has nothing to offer to the next one. The directions in a token's 2·H·D numbers are the rows of Vᵀ."""
    U, _, _ = svd(keys_values, rank)
    return U.T, U


@EXERCISE.misconception("the columns of Vᵀ")
def columns(keys_values: Tensor, rank: int) -> Pair:
    """`Vh[:, :rank]` takes columns. torch returns V *transposed* already (the h in Vh): the right singular
    vectors are its rows, `Vh[:rank]`. Both are orthonormal and of the right shape, so only the error shows
    it."""
    _, _, Vh = torch.linalg.svd(keys_values, full_matrices=True)
    return Vh[:, :rank].T, Vh[:, :rank]


@EXERCISE.misconception("the least important directions")
def smallest(keys_values: Tensor, rank: int) -> Pair:
    """These are the directions with the *smallest* singular values: the worst choice there is. torch's `svd`
    has the largest first, its `eigh` the largest last."""
    _, _, Vh = torch.linalg.svd(keys_values, full_matrices=True)
    Vh = Vh[: min(keys_values.shape)]
    return Vh[-rank:], Vh[-rank:].T


@EXERCISE.misconception("singular values on both sides")
def both_sides(keys_values: Tensor, rank: int) -> Pair:
    """Encode and decode were both multiplied by the singular values, so each direction comes back s² times
    too long. A = U diag(s) Vᵀ already holds s; its tokens, measured along V, are U diag(s)."""
    _, s, Vh = svd(keys_values, rank)
    return s[:, None] * Vh, Vh.T * s


@EXERCISE.misconception("the singular values multiplied in")
def balanced(keys_values: Tensor, rank: int) -> Pair:
    """Each direction comes back s times too long: the singular values are in decode (or in encode), or √s in
    each. That is the recipe to cut a *weight* in two, W ≈ (U√s)(√s Vᵀ). Here A is not a weight but the data
    that flow through, and A encodeᵀ = U diag(s) holds s already: decode · encode must be V Vᵀ."""
    _, s, Vh = svd(keys_values, rank)
    return s[:, None].sqrt() * Vh, Vh.T * s.sqrt()


@EXERCISE.misconception("divided by the singular values on one side")
def whitened(keys_values: Tensor, rank: int) -> Pair:
    """Encode divides by the singular values, so that all latent numbers spread alike, but decode does not
    multiply them in again. Whitening is allowed as long as the way up undoes it: decode = V diag(s)."""
    _, s, Vh = svd(keys_values, rank)
    return Vh / s[:, None], Vh.T


@EXERCISE.misconception("divided by the singular values on both sides")
def divided_twice(keys_values: Tensor, rank: int) -> Pair:
    """Encode and decode both divide by the singular values, so each direction comes back s² times too short.
    The directions are of length 1; encode = Vᵀ and decode = V need no correction."""
    _, s, Vh = svd(keys_values, rank)
    return Vh / s[:, None], Vh.T / s


@EXERCISE.misconception("the mean subtracted")
def centred(keys_values: Tensor, rank: int) -> Pair:
    """The mean token was subtracted before the SVD, as in PCA. PCA adds it again at the end; encode and
    decode are plain matrices without a bias, so what is lost with the mean stays lost. Take the SVD of A as
    it is."""
    _, _, Vh = svd(keys_values - keys_values.mean(0), rank)
    if rank > len(Vh):
        Vh = torch.linalg.svd(keys_values - keys_values.mean(0))[2][:rank]
    return Vh, Vh.T


@EXERCISE.misconception("every number scaled to the same spread")
def standardised(keys_values: Tensor, rank: int) -> Pair:
    """The columns of A were divided by their length or standard deviation before the SVD. Then a number that
    hardly varies weighs as much as one that varies a lot, and the error of A itself is no longer the
    smallest."""
    _, _, Vh = svd(keys_values / keys_values.norm(dim=0), rank)
    return Vh, Vh.T


@EXERCISE.misconception("every token scaled to length 1")
def normalised_tokens(keys_values: Tensor, rank: int) -> Pair:
    """The tokens were normalised before the SVD. The best directions for normalised tokens are others: large
    tokens then count no more than small ones, and ‖A − A encodeᵀ decodeᵀ‖ is not the smallest."""
    _, _, Vh = svd(keys_values / keys_values.norm(dim=1, keepdim=True), rank)
    return Vh, Vh.T


@EXERCISE.misconception("the first R numbers")
def first_columns(keys_values: Tensor, rank: int) -> Pair:
    """Encode keeps the first R numbers of a token and drops the rest: part of the first head's keys, and no
    value at all. A direction may mix all numbers, and the SVD finds the best R of them."""
    keep = torch.eye(keys_values.shape[1])[:rank]
    return keep, keep.T


@EXERCISE.misconception("the directions of the first R tokens")
def first_tokens(keys_values: Tensor, rank: int) -> Pair:
    """The R directions span the first R tokens of A, as a QR of Aᵀ gives them. These tokens come back whole,
    and all others pay for it. The SVD weighs all tokens."""
    Q, _ = torch.linalg.qr(keys_values[:rank].T)
    return Q.T, Q


@EXERCISE.misconception("keys and values compressed apart")
def apart(keys_values: Tensor, rank: int) -> Pair:
    """Keys and values had an SVD each and R/2 numbers each. One SVD over both gives each what it needs, and
    keeps what they have in common only once: that is why the latent is *joint*."""
    width = keys_values.shape[1] // 2
    n_keys = rank // 2
    _, _, keys = torch.linalg.svd(keys_values[:, :width])
    _, _, values = torch.linalg.svd(keys_values[:, width:])
    encode = torch.block_diag(keys[:n_keys], values[: rank - n_keys])
    return encode, encode.T


@EXERCISE.misconception("encode and decode exchanged")
def exchanged(keys_values: Tensor, rank: int) -> Pair:
    """Encode is (2·H·D, R) and decode (R, 2·H·D). As weights they are kept as (out, in): encode takes a token
    down to R numbers, so it is (R, 2·H·D)."""
    _, _, Vh = svd(keys_values, rank)
    return Vh.T, Vh


@EXERCISE.misconception("the tokens' latents, not the way to them")
def latents_returned(keys_values: Tensor, rank: int) -> Pair:
    """These are U diag(s) and Vᵀ: A itself cut in two. U diag(s) has a row for each *token*: it is what comes
    out when these tokens are encoded. Asked for are the two matrices that serve any token: encode = Vᵀ,
    decode = V."""
    U, s, Vh = svd(keys_values, rank)
    return U * s, Vh
