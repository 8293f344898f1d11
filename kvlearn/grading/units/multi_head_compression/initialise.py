"""03.5: compression initialised from activations, held against the best that any rank can do."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial

EXERCISE = Exercise(
    id="03.5",
    slug="svd",
    title="Initialise by the SVD of activations",
    answers=("svd_init",),
    hints=(
        "`torch.linalg.svd(A, full_matrices=False)` gives U, the singular values in falling order, and Vᵀ "
        "(it is returned transposed already), with A = U diag(s) Vᵀ. Which of the three speaks of columns, "
        "that is of numbers of a token, and not of single tokens?",
        "The rows of Vᵀ are directions in the space of a token's 2·H·D numbers, the most important first. "
        "The first R of them span the subspace in which A loses least.",
        "To encode is to measure a token along each of these directions: one row of `encode` for each. To "
        "decode is to walk as far along them again. They are orthonormal, so the way back is the "
        "transpose.",
        "`encode = Vh[:rank]` and `decode = encode.T`. No singular values: they say how far the tokens "
        "reach along a direction, and the latent measures that for each token anew.",
    ),
)

Pair = tuple[Tensor, Tensor]


def draw(t: Trial, few: bool = False, offset: float = 0.0) -> tuple[Tensor, int]:
    """Activations (tokens, 2·H·D) whose singular values fall slowly, and a rank."""
    width = 2 * t.pick(3, 5) * 4
    n_tokens = width - t.integer(5, 8) if few else width + t.integer(20, 40)
    left, right = (torch.linalg.qr(t.randn(n, n).double())[0] for n in (n_tokens, width))
    n = min(n_tokens, width)
    spectrum = torch.linspace(10.0, 1.0, n, dtype=torch.float64)
    keys_values = (left[:, :n] * spectrum) @ right[:n]
    return (keys_values + offset * right[-1]).float(), t.integer(4, 9)


def projected(keys_values: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank (Eckart and Young, 1936), in double precision."""
    U, s, Vh = torch.linalg.svd(keys_values.double(), full_matrices=False)
    return ((U[:, :rank] * s[:rank]) @ Vh[:rank]).float()


def pair(t: Trial, svd_init: Answer, keys_values: Tensor, rank: int) -> Pair:
    """encode and decode in their right shapes, or the end of this round."""
    encode, decode = t.pair(svd_init(keys_values, rank), "two tensors: encode, decode")
    width = keys_values.shape[1]
    fits = [t.shape(encode, (rank, width), "encode:"), t.shape(decode, (width, rank), "decode:")]
    if not all(fits):
        raise Stop
    return encode, decode


def reconstruction(
    t: Trial, svd_init: Answer, keys_values: Tensor, rank: int, of: Tensor | None = None
) -> Tensor:
    encode, decode = pair(t, svd_init, keys_values, rank)
    return (keys_values if of is None else of) @ encode.T @ decode.T


@EXERCISE.requirement(1, "the right subspace")
def subspace(t: Trial, svd_init: Answer) -> None:
    """encode (R, 2·H·D) and decode (2·H·D, R), whose rows and columns span the R directions in which the
    tokens reach furthest; in any basis, of any lengths"""
    keys_values, rank = draw(t)
    encode, decode = pair(t, svd_init, keys_values, rank)
    Vh = torch.linalg.svd(keys_values.double(), full_matrices=False)[2][:rank]
    for basis, what in ((encode.T, "encode:"), (decode, "decode:")):
        Q, _ = torch.linalg.qr(basis.double())
        t.close(Q @ Q.T, Vh.T @ Vh, f"{what} projection onto its directions", tolerance=3e-3)


@EXERCISE.requirement(2, "the best of this rank")
def best(t: Trial, svd_init: Answer) -> None:
    """‖A − A encodeᵀ decodeᵀ‖ as small as any matrices of rank R can make it, and so every token as the best
    approximation has it"""
    keys_values, rank = draw(t)
    got = reconstruction(t, svd_init, keys_values, rank)
    least = (keys_values - projected(keys_values, rank)).norm()
    error = (keys_values - got).norm() / least
    t.close(error, torch.tensor(1.0), "error / smallest error:", tolerance=2e-3)
    t.close(got, projected(keys_values, rank), "A encodeᵀ decodeᵀ:", tolerance=3e-3)


@EXERCISE.requirement(1, "tokens it has not seen", rounds=2)
def unseen(t: Trial, svd_init: Answer) -> None:
    """new tokens go through the same two matrices: they keep their part in the subspace and lose the rest"""
    keys_values, rank = draw(t)
    new = t.randn(t.integer(3, 5), keys_values.shape[1])
    Vh = torch.linalg.svd(keys_values.double(), full_matrices=False)[2][:rank]
    got = reconstruction(t, svd_init, keys_values, rank, new)
    t.close(got, (new.double() @ Vh.T @ Vh).float(), "new tokens:", tolerance=3e-3)


@EXERCISE.requirement(1, "a mean that is not zero, and fewer tokens than numbers")
def offset(t: Trial, svd_init: Answer) -> None:
    """no mean is subtracted: there is no bias that could add it again; tokens may be fewer than 2·H·D"""
    keys_values, rank = draw(t, few=t.round == 1, offset=2.0)
    got = reconstruction(t, svd_init, keys_values, rank)
    t.close(got, projected(keys_values, rank), "A encodeᵀ decodeᵀ:", tolerance=3e-3)


@EXERCISE.requirement(1, "full rank, and the input left alone", rounds=2)
def everything(t: Trial, svd_init: Answer) -> None:
    """with R = 2·H·D nothing is lost: A comes back; A itself is not changed"""
    keys_values, _ = draw(t)
    got = reconstruction(t, svd_init, keys_values, keys_values.shape[1])
    t.close(got, keys_values, "A encodeᵀ decodeᵀ:", tolerance=3e-3)
    t.unchanged()
