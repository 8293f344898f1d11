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
    positions = torch.arange(x.shape[2] + 1)[-x.shape[2] :]
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


def turn(x: Tensor, positions: Tensor, omega: Tensor) -> Tensor:
    angles = positions.float()[:, None] * omega
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def frequencies(x: Tensor, theta: float, factor: float = 2.0) -> Tensor:
    return theta ** (-factor * torch.arange(x.shape[-1] // 2) / x.shape[-1])


@EXERCISE.misconception("positions restarted at 0")
def restarted(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """The positions handed in are not used: the tokens are counted from 0 again. In prefill nobody
    notices; in decode every new token believes that it is the first one, and all distances to the
    cached keys are wrong."""
    return turn(x, torch.arange(x.shape[2]) + 0 * positions, frequencies(x, theta))


@EXERCISE.misconception("neighbouring pairs (2i, 2i+1)")
def interleaved(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """The paper pairs neighbours; Llama and this course pair i with i + D/2. Both are sound, since they
    differ by an order of the columns only, but weights trained with the one are useless with the other."""
    paired = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    a, b = turn(paired, positions, frequencies(x, theta)).chunk(2, dim=-1)
    return torch.stack((a, b), dim=-1).flatten(-2)


@EXERCISE.misconception("turned the other way")
def other_way(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """The sign of the sine is the other way round: (a cos + b sin, b cos − a sin) turns backwards. Scores
    depend on distances alone and come out the same, so only a comparison with trained weights shows it."""
    return turn(x, -positions, frequencies(x, theta))


@EXERCISE.misconception("no minus in the rotation")
def no_minus(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """Both halves got a plus: (a cos + b sin, b cos + a sin). That is no rotation: lengths change with the
    position. Exactly one of the two sines carries a minus."""
    angles = positions.float()[:, None] * frequencies(x, theta)
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos + b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


@EXERCISE.misconception("the exponent without its 2")
def half_exponent(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """The frequencies are theta^(−i/D) for i = 0 … D/2 − 1. The exponent is −2i/D, so that they reach from 1
    nearly to 1/theta; without the 2 the slowest stops at 1/√theta, and far positions look alike."""
    return turn(x, positions, frequencies(x, theta, factor=1.0))


@EXERCISE.misconception("angles in the dtype of x")
def low_precision(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """The angles were computed in x's dtype. bf16 knows whole numbers up to 256 only, so position 1001
    becomes 1000 and the angle is off by a radian. Compute angles, sine and cosine in fp32, and convert
    the result."""
    angles = positions.to(x.dtype)[:, None] * frequencies(x, theta).to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@EXERCISE.misconception("angles of neighbours in half-split pairs")
def mixed(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """The pairs are (i, i + D/2), but the angles were laid out for neighbours, (0, 0, 1, 1, …), as
    `repeat_interleave` gives them. So the two numbers of a pair are turned by different angles. For
    this pairing the angles come twice in a row: `torch.cat((angles, angles), dim=-1)`."""
    angles = (positions.float()[:, None] * frequencies(x, theta)).repeat_interleave(2, dim=-1)
    a, b = x.float().chunk(2, dim=-1)
    return (x.float() * angles.cos() + torch.cat((-b, a), dim=-1) * angles.sin()).to(x.dtype)


@EXERCISE.misconception("theta ignored")
def fixed_theta(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """The base is 10000 whatever is handed in. Models for long contexts use a larger one (Llama 3:
    500000), so that the slow pairs have not come full circle at the end of it."""
    return turn(x, positions, frequencies(x, 10_000.0) + 0 * theta)
