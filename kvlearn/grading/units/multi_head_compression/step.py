"""03.4: one decode step in the latent space, held against decompressed keys and values."""

import torch
from torch import Tensor

from kvlearn.grading.compare import Difference
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial
from kvlearn.grading.watch import Made, new_tensors

EXERCISE = Exercise(
    id="03.4",
    slug="step",
    title="A decode step in the latent space",
    answers=("latent_step",),
    hints=(
        "Take the cache apart: `rows = cache[:, :length]`, `c = rows[..., :R]`, `k_rope = rows[..., R:]`, "
        "with R = `w_uk.shape[-1]`. Slices are views: nothing is copied.",
        'Fold W_uk into the query, as in 03.3: `torch.einsum("bhd,hdr->bhr", q, w_uk)`. Then the content '
        "scores of all heads are *one* product, (B, H, R) with (B, R, length): the heads are its rows.",
        "Scores = (absorbed query · c + q_rope · k_rope) / √(D + Dr), with D = `q.shape[-1]`: what a score "
        "means has not changed. Softmax over the tokens, the last dimension.",
        "The weighted sum is over latents, `weights @ c`, (B, H, R); the rotary numbers take no part. Only "
        'then go up, once for each head: `torch.einsum("bhr,hdr->bhd", o, w_uv)`.',
    ),
)

Inputs = tuple[Tensor, Tensor, Tensor, int, Tensor, Tensor]


def draw(
    t: Trial, length: int, max_len: int, behind: str = "zeros", dtype: torch.dtype = torch.float32
) -> Inputs:
    """q, q_rope, cache, length, W_uk, W_uv. D is odd and prime, so that no product of other sizes is taken
    for one with D."""
    B, H, D, R, Dr = 2, t.pick(3, 5), t.pick(11, 17), t.pick(20, 24), t.pick(4, 6)
    cache = t.randn(B, max_len, R + Dr)
    cache[:, length:] = 0.0 if behind == "zeros" else 2 * cache[:, length:]
    w_uk, w_uv = ((t.randn(H, D, R) / R**0.5).to(dtype) for _ in range(2))
    q, q_rope = t.randn(B, H, D, dtype=dtype), t.randn(B, H, Dr, dtype=dtype)
    return 2 * q, q_rope, cache.to(dtype), length, w_uk, w_uv


def reference(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    """Head by head, with keys [W_uk c ; k_rope] and values W_uv c, in double precision."""
    R, width = w_uk.shape[-1], q.shape[-1] + q_rope.shape[-1]
    rows = cache[:, :length].double()
    heads = []
    for h in range(q.shape[1]):
        keys = torch.cat((torch.einsum("bsr,dr->bsd", rows[..., :R], w_uk[h].double()), rows[..., R:]), -1)
        query = torch.cat((q[:, h], q_rope[:, h]), -1).double()
        weights = (torch.einsum("bd,bsd->bs", query, keys) / width**0.5).softmax(-1)
        values = torch.einsum("bsr,dr->bsd", rows[..., :R], w_uv[h].double())
        heads.append(torch.einsum("bs,bsd->bd", weights, values))
    return torch.stack(heads, dim=1).to(q.dtype)


@EXERCISE.requirement(1, "a single token in the cache")
def single(t: Trial, latent_step: Answer) -> None:
    """all the weight is on it, so the output of head h is W_uv[h] c, (B, H, D), whatever the scores"""
    inputs = draw(t, 1, t.integer(5, 9))
    t.close(latent_step(*inputs), reference(*inputs))


@EXERCISE.requirement(1, "a full cache")
def full(t: Trial, latent_step: Answer) -> None:
    """softmax((q · W_uk c + q_rope · k_rope) / √(D + Dr)) over all tokens, times W_uv c"""
    length = t.integer(7, 12)
    inputs = draw(t, length, length)
    t.close(latent_step(*inputs), reference(*inputs), tolerance=1e-3)


@EXERCISE.requirement(1, "slots behind the length")
def behind(t: Trial, latent_step: Answer) -> None:
    """the first `length` slots count and no other, whether the rest holds zeros or what an earlier sequence
    left"""
    length = t.integer(5, 9)
    for left in ("zeros", "old tokens"):
        inputs = draw(t, length, length + t.integer(3, 6), left)
        t.close(latent_step(*inputs), reference(*inputs), tolerance=1e-3)


@EXERCISE.requirement(1, "large scores, bf16, inputs left alone", rounds=2)
def hard(t: Trial, latent_step: Answer) -> None:
    """finite and right when scores reach ±1000; bf16 in, bf16 out; nothing handed in is changed"""
    length = t.integer(7, 12)
    q, q_rope, cache, _, w_uk, w_uv = draw(t, length, length)
    inputs = (300 * q, q_rope, cache, length, w_uk, w_uv)
    t.close(latent_step(*inputs), reference(*inputs), tolerance=5e-3)
    inputs = draw(t, length, length, dtype=torch.bfloat16)
    t.close(latent_step(*inputs), reference(*inputs), tolerance=8e-2)
    t.unchanged()


@EXERCISE.requirement(2, "never the keys or values of every head", rounds=1)
def small(t: Trial, latent_step: Answer) -> None:
    """right, and no tensor on the way that holds D numbers for each token, or the latents once for each
    head"""
    length = t.pick(29, 31, 37)
    inputs = draw(t, length, t.pick(41, 43))
    with new_tensors() as made:
        got = latent_step(*inputs)
    t.close(got, reference(*inputs), tolerance=1e-3)
    fault, largest = too_large(made, inputs)
    came = f"{fault}: a tensor of shape {largest.shape}" if largest else ""
    t.note(fault, Difference("", "nothing of that size", came) if largest else None)


def too_large(made: list[Made], inputs: Inputs) -> tuple[str, Made | None]:
    """What was built that should not be, by its size: the sizes that occur in it give it away."""
    _, q_rope, cache, length, w_uk, _ = inputs
    H, D, R = w_uk.shape
    for one in made:
        for S in (length, cache.shape[1]):
            if one.numel and one.numel % (S * D) == 0:
                return "keys or values were decompressed", one
            if one.numel and any(one.numel % (H * S * n) == 0 for n in (R, R + q_rope.shape[-1])):
                return "the latents were copied for every head", one
    return "", None
