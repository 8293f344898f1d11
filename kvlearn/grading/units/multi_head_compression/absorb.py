"""03.3: up-projections folded into query and output, held against the road that decompresses."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
    id="03.3",
    slug="absorb",
    title="Absorb the up-projections",
    answers=("absorb", "unabsorb"),
    hints=(
        "Write a score out: q · (W c) = Σ_d q[d] Σ_r W[d, r] c[r]. Add up over d *first*, and what is left "
        "is a product with c: Σ_r (Σ_d q[d] W[d, r]) c[r]. The inner sum is the absorbed query.",
        "In matrices: q · (W c) = (Wᵀ q) · c. A transpose, no inverse: nothing has to be undone, the "
        "product is only taken in another order.",
        "The values: Σ_s p_s (W_uv c_s) = W_uv (Σ_s p_s c_s). The weighted sum of latents, o, has R "
        "numbers, and W_uv[h] takes it up to D: here the matrix stands as it is, not transposed.",
        'Every head has its own matrix and meets no other: `torch.einsum("bhtd,hdr->bhtr", q, w_uk)` and '
        '`torch.einsum("bhtr,hdr->bhtd", o, w_uv)`. The letter h stands in both inputs and in the result.',
    ),
)

Draw = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def draw(t: Trial, dtype: torch.dtype = torch.float32) -> Draw:
    """q, the weights of some attention, latents, W_uk and W_uv; D = R in the first round, T = 1 in the
    second."""
    B, H, T = 2, t.pick(3, 5), (1 if t.round == 1 else t.pick(4, 6))
    D = t.pick(8, 12)
    R = D if t.round == 0 else t.pick(15, 20)
    S = T + t.pick(10, 14)
    weights = t.randn(B, H, T, S).softmax(-1)
    w_uk, w_uv = ((t.randn(H, D, R) / R**0.5).to(dtype) for _ in range(2))
    return t.randn(B, H, T, D, dtype=dtype), weights.to(dtype), t.randn(B, S, R, dtype=dtype), w_uk, w_uv


def per_head(c: Tensor, w: Tensor) -> Tensor:
    """Keys (or values) of all heads: (B, S, R) with (H, D, R) gives (B, H, S, D)."""
    return torch.stack([torch.einsum("bsr,dr->bsd", c, matrix) for matrix in w], dim=1)


def naive_scores(q: Tensor, c: Tensor, w_uk: Tensor) -> Tensor:
    return torch.einsum("bhtd,bhsd->bhts", q, per_head(c, w_uk))


def naive_output(weights: Tensor, c: Tensor, w_uv: Tensor) -> Tensor:
    return torch.einsum("bhts,bhsd->bhtd", weights, per_head(c, w_uv))


@EXERCISE.requirement(1, "absorb: shape and values")
def absorbed(t: Trial, absorb: Answer, unabsorb: Answer) -> None:
    """(B, H, T, D) becomes (B, H, T, R): number r is q · (column r of W_uk[h])"""
    q, _, _, w_uk, _ = draw(t)
    columns = [(q[..., None] * w_uk[None, :, None])[..., r].sum(-1) for r in range(w_uk.shape[-1])]
    t.close(absorb(q, w_uk), torch.stack(columns, dim=-1))


@EXERCISE.requirement(1, "absorb: the scores of the naive road")
def scores(t: Trial, absorb: Answer, unabsorb: Answer) -> None:
    """absorb(q) · c = q · (W_uk c) for every head and every latent c"""
    q, _, c, w_uk, _ = draw(t)
    got = absorb(q, w_uk)
    if t.shape(got, (*q.shape[:3], c.shape[-1])):
        t.close(torch.einsum("bhtr,bsr->bhts", got, c), naive_scores(q, c, w_uk), "scores:", tolerance=1e-3)


@EXERCISE.requirement(1, "unabsorb: shape and values")
def unabsorbed(t: Trial, absorb: Answer, unabsorb: Answer) -> None:
    """(B, H, T, R) becomes (B, H, T, D): W_uv[h] o for every head and query"""
    _, weights, c, _, w_uv = draw(t)
    o = torch.randn(*weights.shape[:3], c.shape[-1], generator=t.generator)
    rows = [(o[..., None, :] * w_uv[None, :, None])[..., d, :].sum(-1) for d in range(w_uv.shape[1])]
    t.close(unabsorb(o, w_uv), torch.stack(rows, dim=-1))


@EXERCISE.requirement(1, "unabsorb: the output of the naive road")
def output(t: Trial, absorb: Answer, unabsorb: Answer) -> None:
    """W_uv applied once to the weighted sum of latents gives the weighted sum of values"""
    _, weights, c, _, w_uv = draw(t)
    got = unabsorb(torch.einsum("bhts,bsr->bhtr", weights, c), w_uv)
    t.close(got, naive_output(weights, c, w_uv), tolerance=1e-3)


@EXERCISE.requirement(1, "bf16, and inputs left alone", rounds=2)
def half(t: Trial, absorb: Answer, unabsorb: Answer) -> None:
    """bf16 in, bf16 out, right within its precision; nothing handed in is changed"""
    q, weights, c, w_uk, w_uv = draw(t, torch.bfloat16)
    want = torch.einsum("bhtd,hdr->bhtr", q.float(), w_uk.float())
    t.close(absorb(q, w_uk), want.bfloat16(), "absorb:", tolerance=6e-2)
    o = torch.einsum("bhts,bsr->bhtr", weights, c)
    want = torch.einsum("bhtr,hdr->bhtd", o.float(), w_uv.float())
    t.close(unabsorb(o, w_uv), want.bfloat16(), "unabsorb:", tolerance=6e-2)
    t.unchanged()
