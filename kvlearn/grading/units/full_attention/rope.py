"""01.4: rotary position embedding, held against complex multiplication in double precision."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
    id="01.4",
    slug="rope",
    title="Rotary position embedding",
    answers=("rotate",),
    hints=(
        "Take one pair alone: (a, b) turned by the angle φ is (a·cos φ − b·sin φ, b·cos φ + a·sin φ). "
        "Here a is x[..., i] and b is x[..., i + D/2].",
        "The angles of all positions and pairs are an outer product: `positions[:, None] * omega[None, "
        ":]`, shape (T, D/2), with omega = theta ** (−2i/D) for i = 0 … D/2 − 1. It broadcasts over "
        "batch and heads.",
        "Compute in fp32: `positions.float()` and `x.float()`, and turn back to x's dtype at the very "
        "end. bf16 has 8 bits of precision, and a position of 1000 needs 10 before any fraction of an "
        "angle.",
        "`a, b = x.float().chunk(2, dim=-1)`, then `torch.cat((a * cos − b * sin, b * cos + a * sin), "
        "dim=-1)`.",
    ),
)


def reference(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """Each pair as a complex number, multiplied by exp(i·m·ω)."""
    half = x.shape[-1] // 2
    omega = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones((), dtype=torch.float64), positions.double()[:, None] * omega)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def draw(t: Trial, dtype: torch.dtype = torch.float32) -> Tensor:
    B, H, T, _, D = t.sizes()
    return t.randn(B, H, T, D, dtype=dtype)


@EXERCISE.requirement(1, "position 0 turns nothing, and lengths stay")
def lengths(t: Trial, rotate: Answer) -> None:
    """x itself at position 0; at any position every pair keeps its length, so x's norm stays; x is
    unchanged"""
    x = draw(t)
    t.close(rotate(x, torch.zeros(x.shape[2], dtype=torch.int64)), x)
    got = rotate(x, torch.arange(x.shape[2]) + t.integer(3, 50))
    if t.shape(got, tuple(x.shape)):
        t.close(got.norm(dim=-1), x.norm(dim=-1), "norms")
    t.unchanged()


@EXERCISE.requirement(2, "the values from position 0")
def values(t: Trial, rotate: Answer) -> None:
    """x turned by m·theta^(−2i/D) in the pairs (i, i + D/2)"""
    x = draw(t)
    positions = torch.arange(x.shape[2])
    t.close(rotate(x, positions), reference(x, positions), tolerance=1e-3)


@EXERCISE.requirement(1, "decode and gaps: any positions")
def anywhere(t: Trial, rotate: Answer) -> None:
    """the same at positions that start late or leave gaps"""
    x = draw(t)
    positions = torch.tensor(sorted(t.random.sample(range(20, 2000), x.shape[2])))
    t.close(rotate(x, positions), reference(x, positions), tolerance=2e-3)


@EXERCISE.requirement(1, "bf16 and another theta")
def half(t: Trial, rotate: Answer) -> None:
    """bf16 out for bf16 in, right at positions of some thousands, with theta = 500000"""
    x = draw(t, torch.bfloat16)
    positions = torch.arange(x.shape[2]) + t.integer(1000, 4000)
    t.close(rotate(x, positions, 500_000.0), reference(x, positions, 500_000.0))
