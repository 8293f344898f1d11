"""02.3: a trained projection's heads averaged into pools, held against a loop over pools in fp64."""

import torch
from torch import Tensor

from kvlearn.grading.compare import describe
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
    id="02.3",
    slug="pool",
    title="Pool a trained model's heads",
    answers=("pool_heads",),
    hints=(
        "D = weight.shape[0] // n_heads. The rows of head h are h·D to (h+1)·D − 1: nn.Linear keeps its "
        "weight as (outputs, inputs), and the outputs come head by head.",
        "Give the heads a dimension of their own: `weight.view(n_heads, D, -1)`. Then row d of one head "
        "stands beside row d of the next, and those are what is averaged.",
        "R = n_heads // n_kv_heads neighbours make a pool: `weight.view(n_kv_heads, R, D, -1)`, pools in "
        "front. Average over the R.",
        "`.mean(dim=1)` gives (G, D, M); `.flatten(0, 1)` makes a weight of it again. Check `n_heads % "
        "n_kv_heads` first, and raise ValueError where it is not 0.",
    ),
)


def reference(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """Pool by pool, row by row."""
    D, R = len(weight) // n_heads, n_heads // n_kv_heads
    rows = [
        torch.stack([weight[h * D + d].double() for h in range(pool * R, (pool + 1) * R)]).mean(0)
        for pool in range(n_kv_heads)
        for d in range(D)
    ]
    return torch.stack(rows).to(weight.dtype)


def draw(t: Trial, n_heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(H·D, M), M a multiple of H, so that a confusion of rows and columns goes through and can be named."""
    return t.randn(n_heads * t.pick(5, 7), n_heads * t.pick(4, 9), dtype=dtype)


def ratio(t: Trial) -> tuple[int, int]:
    """H and G; no two of H, G and H/G are equal, and none is 1."""
    return t.pick(
        *(((6, 2), (6, 3), (12, 4)), ((10, 2), (15, 5), (8, 2)), ((12, 3), (10, 5), (14, 2)))[t.round]
    )


@EXERCISE.requirement(1, "the form")
def form(t: Trial, pool_heads: Answer) -> None:
    """a weight for G heads, (G·D, M), in the dtype of the one that was given"""
    H, G = ratio(t)
    weight = draw(t, H, t.pick(torch.float32, torch.bfloat16))
    t.form(pool_heads(weight, H, G), (len(weight) // H * G, weight.shape[1]), weight.dtype)


@EXERCISE.requirement(2, "the values")
def values(t: Trial, pool_heads: Answer) -> None:
    """head g of the result is the mean of the heads g·R … (g+1)·R − 1, R = H/G"""
    H, G = ratio(t)
    weight = draw(t, H)
    t.close(pool_heads(weight, H, G), reference(weight, H, G))


@EXERCISE.requirement(1, "the limits, and the weight left alone")
def limits(t: Trial, pool_heads: Answer) -> None:
    """G = H gives the weight as it is, G = 1 the mean of all heads; the trained weight is unchanged"""
    H = t.pick(3, 5, 6)
    weight = draw(t, H)
    for G in (H, 1):
        t.close(pool_heads(weight, H, G), reference(weight, H, G))
    t.unchanged()


@EXERCISE.requirement(1, "heads that do not divide")
def indivisible(t: Trial, pool_heads: Answer) -> None:
    """ValueError where n_kv_heads does not divide n_heads; the answer works where it does"""
    H, G = t.pick((6, 4), (7, 2), (10, 3), (4, 8))
    weight = draw(t, H)
    one = pool_heads(weight, H, 1)  # to be told from an answer that raises, or returns nothing, always
    if t.true(isinstance(one, Tensor), f"a tensor for {H} heads and 1 pool", describe(one)):
        t.raises(ValueError, lambda: pool_heads(weight, H, G), f"for {H} heads and {G} pools")
