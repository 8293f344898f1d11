"""01.4: the mistakes that people make with RoPE."""

import torch
from torch import Tensor

from kvlearn.grading.units.full_attention.rope import EXERCISE

__all__ = ["EXERCISE"]


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


@EXERCISE.misconception("the first half overwritten before the second is computed")
def overwritten(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """The second half was computed from the first half *after* it had been turned. Both need the old values:
    take a and b apart first (as copies, or join the two results with `torch.cat`), then write."""
    angles = positions.float()[:, None] * frequencies(x, theta)
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    a = a * cos - b * sin
    return torch.cat((a, b * cos + a * sin), dim=-1).to(x.dtype)


@EXERCISE.misconception("positions counted from 1")
def one_further(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """Every token is turned by one position too many. The first stands at position 0 and is not turned at
    all. Scores hide it, since they depend on distances; a cache filled by other code would not fit."""
    return turn(x, positions + 1, frequencies(x, theta))


@EXERCISE.misconception("the exponent without its minus")
def growing(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """The frequencies are theta^(+2i/D), from 1 up to nearly theta, radians a token. They are to fall, so
    that the slow pairs can tell far positions apart: theta^(−2i/D)."""
    return turn(x, positions, frequencies(x, theta, factor=-2.0))


@EXERCISE.misconception("degrees")
def degrees(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """The angles were turned into degrees. m·ω is an angle in radians already, and radians are what torch's
    sin and cos take."""
    return turn(x, positions, frequencies(x, theta).rad2deg())


@EXERCISE.misconception("frequencies and angles in the dtype of x")
def all_low_precision(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """Frequencies and angles were computed in x's dtype. bf16 keeps 8 bits: position 1001 becomes 1000, and
    the product with a rounded frequency is off by radians. Compute all of it in fp32, and convert the
    result."""
    D = x.shape[-1]
    omega = theta ** (-torch.arange(0, D, 2).to(x.dtype) / D)
    angles = positions.to(x.dtype)[:, None] * omega
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
