"""Rotary position embedding (RoPE): queries and keys rotated by an angle that grows with their position.

A pair of coordinates (x_i, x_{i+D/2}) is rotated by the angle m·ω_i at position m, so that a score depends on
the distance of two tokens alone: ⟨R_m q, R_n k⟩ = ⟨q, R_{n-m} k⟩.

Pairs are *half-split*, as in Llama: coordinate i goes with i + D/2. The paper pairs neighbours (2i, 2i+1);
that is the same up to an order of the coordinates, and checkpoints that use it are permuted when loaded.

Source: Su et al., "RoFormer" (2021), equations 14, 15 and 34.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.core import Constants


@dataclass(frozen=True)
class LinearScaling:
    """All angles divided by ``factor``. Source: Chen et al., "Position Interpolation" (2023), equation 4."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)


@dataclass(frozen=True)
class Llama3Scaling:
    """Slow angles divided by ``factor``, fast ones kept, those between blended. Source: Llama 3.1 (2024)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        low = validate.above("low_freq_factor", self.low_freq_factor, 0)
        validate.above("high_freq_factor", self.high_freq_factor, low)
        validate.fields_at_least(self, original_max_len=1)


@dataclass(frozen=True)
class YarnScaling:
    """Blended by dimension, with sharper scores. Source: Peng et al., "YaRN" (2023), sections 3.2 and 3.4.

    As in the authors' code the blend is linear in the dimension's index, between the dimensions that make
    ``beta_fast`` and ``beta_slow`` turns, rounded outwards if ``truncate``. ``attention_factor`` multiplies
    queries and keys; None means 0.1·ln(factor) + 1.
    """

    factor: float
    original_max_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        validate.fields_at_least(self, original_max_len=1)
        validate.instance("truncate", self.truncate, bool)
        for name in ("beta_fast", "beta_slow"):
            validate.above(name, getattr(self, name), 0)
        if self.attention_factor is not None:
            validate.above("attention_factor", self.attention_factor, 0)


@dataclass(frozen=True)
class DynamicScaling:
    """A base that grows with the length, so that slow angles stay within those of training (dynamic NTK).

        theta' = theta · (factor · L / original_max_len - (factor - 1))^(D / (D - 2)),   L > original_max_len

    L is the number of tokens up to the last one of a call, and theta' holds for all tokens of that call;
    keys in the cache keep the angles that they got. So a text fed whole and fed in chunks differ past
    ``original_max_len``. transformers does the same. Raises ValueError for a ``factor`` below 1.
    Source: Peng et al., "YaRN" (2023), section 3.3 and appendix A.1.
    """

    factor: float
    original_max_len: int

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        validate.fields_at_least(self, original_max_len=1)


@dataclass(frozen=True)
class LongRopeScaling:
    """Each angle divided by a factor of its own, one set of factors for short texts and one for long ones.

    A call with a token past ``original_max_len`` divides the angles of all its tokens by ``long_factor``,
    other calls by ``short_factor``; keys in the cache keep the angles that they got, as in transformers
    (``generate`` recomputes the cache where a text becomes long, as they do). ``attention_factor``
    multiplies queries and keys. Source: Ding et al., "LongRoPE" (2024), section 3.
    """

    short_factor: Sequence[float]
    long_factor: Sequence[float]
    original_max_len: int
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("short_factor", "long_factor"):  # lists, as read from JSON, become tuples
            factors = validate.instance(name, getattr(self, name), Sequence)
            object.__setattr__(self, name, tuple(validate.above(name, each, 0) for each in factors))
        validate.fields_at_least(self, original_max_len=1)
        validate.above("attention_factor", self.attention_factor, 0)


Scaling = LinearScaling | Llama3Scaling | YarnScaling | DynamicScaling | LongRopeScaling


def _check_factor(factor: float) -> None:
    if validate.finite("factor", factor) < 1:
        raise ValueError(f"factor: expected a number of at least 1, got {factor}")


@dataclass(frozen=True)
class RopeConfig:
    """The base of the angles, and their scaling for contexts longer than those of training."""

    theta: float = 10_000.0
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        validate.finite("theta", self.theta)
        validate.instance("scaling", self.scaling, (*get_args(Scaling), type(None)))

    @property
    def depends_on_length(self) -> bool:
        """Whether angles depend on how many tokens there are."""
        return isinstance(self.scaling, DynamicScaling | LongRopeScaling)


def angular_frequencies(
    head_dim: int, config: RopeConfig, length: int | Int[Tensor, ""] = 1
) -> tuple[Float[Tensor, "half_D"], float]:
    """ω_i = theta^(-2i/D) in radians per token, scaled, in fp64; and the factor on queries and keys.

    ``length`` is the number of tokens up to the last one, for the scalings that depend on it. In fp32 an
    angle m·ω would be wrong by 0.2 at position 4M: its error grows with m.
    """
    device = length.device if isinstance(length, Tensor) else torch.device("cpu")
    pairs = torch.arange(head_dim // 2, dtype=torch.float64, device=device)
    exponents = 2 * pairs / head_dim
    omega = config.theta**-exponents
    match config.scaling:
        case None:
            return omega, 1.0
        case LinearScaling(factor):
            return omega / factor, 1.0
        case Llama3Scaling(factor, low, high, original):
            turns = original * omega / (2 * math.pi)  # full turns within the original context
            keep = ((turns - low) / (high - low)).clamp(0, 1)
            return keep * omega + (1 - keep) * omega / factor, 1.0
        case YarnScaling(factor, original, fast, slow, attention_factor, truncate):

            def dimension(turns: float) -> float:
                """The dimension that makes ``turns`` full turns within the original context."""
                return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

            first, last = dimension(fast), dimension(slow)
            if truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, head_dim - 1)
            width = last - first or 1e-3  # negative if ``beta_fast`` is the smaller
            ramp = (pairs - first) / width
            keep = 1 - ramp.clamp(0, 1)
            sharper = 0.1 * math.log(factor) + 1 if attention_factor is None else attention_factor
            return keep * omega + (1 - keep) * omega / factor, sharper
        case DynamicScaling(factor, original):
            longest = torch.as_tensor(length, device=device).clamp_min(original).double()
            stretch = (factor * longest / original - (factor - 1)) ** (head_dim / (head_dim - 2))
            return (config.theta * stretch) ** -exponents, 1.0
        case LongRopeScaling(short, long, original, factor):
            divisors = torch.tensor((short, long), dtype=torch.float64, device=device)
            is_long = torch.as_tensor(length, device=device) > original
            return omega / torch.where(is_long, divisors[1], divisors[0]), factor
        case other:
            raise TypeError(f"config.scaling: expected one of rope.py's scalings, got {type(other).__name__}")


class Rope(nn.Module):
    """Rotates the heads of queries or keys by their positions; with a ``config`` of None it rotates nothing.

    Raises ValueError for an odd ``head_dim`` or a ``theta`` that is not above 1.
    """

    def __init__(self, head_dim: int, config: RopeConfig | None) -> None:
        super().__init__()
        self.head_dim, self.config = head_dim, config
        if config is None:
            return
        validate.instance("rope", config, RopeConfig)
        if validate.positive("head_dim", head_dim) % 2:
            raise ValueError(f"head_dim: expected an even number for RoPE, got {head_dim}")
        validate.above("rope.theta", config.theta, 1)
        if isinstance(config.scaling, DynamicScaling) and head_dim == 2:
            raise ValueError("head_dim: expected at least 4 for DynamicScaling, got 2")
        if isinstance(config.scaling, LongRopeScaling):
            for name in ("short_factor", "long_factor"):
                if (n := len(getattr(config.scaling, name))) != head_dim // 2:
                    raise ValueError(
                        f"rope.scaling.{name}: expected {head_dim // 2} numbers, one per pair, got {n}"
                    )
        omega, self.factor = angular_frequencies(head_dim, config)
        self.omega = Constants(omega.tolist())

    def forward(
        self, x: Float[Tensor, "B H T D"], positions: Int[Tensor, "#B T"]
    ) -> Float[Tensor, "B H T D"]:
        """(a, b) -> (a cos mω - b sin mω, b cos mω + a sin mω) on the two halves a, b of every head.

        Angles in fp64, so that they are right to 1e-8 at position 4M; the rest in fp32 at least.
        """
        if self.config is None:
            return x
        wide, omega = torch.promote_types(x.dtype, torch.float32), self.omega.on(x.device)
        if self.config.depends_on_length:
            omega = angular_frequencies(self.head_dim, self.config, positions.max() + 1)[0]
        angles = positions[:, None, :, None] * omega  # (#B, 1, T, D/2)
        cos, sin = angles.cos().to(wide), angles.sin().to(wide)
        if self.factor != 1:
            cos, sin = cos * self.factor, sin * self.factor
        a, b = x.to(wide).chunk(2, dim=-1)
        a, b = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
        return torch.cat((a, b), dim=-1).to(x.dtype)


def rotate_naive(
    x: Float[Tensor, "B T H D"], config: RopeConfig | None, positions: Sequence[int] | None = None
) -> Float[Tensor, "B T H D"]:
    """Every head of every token rotated pair by pair: the independent form that ``naive`` uses.

        (a, b) -> (a cos mω_i - b sin mω_i,  a sin mω_i + b cos mω_i),   a = x_i, b = x_{i + D/2}

    ``positions`` are 0, 1, … T - 1 unless given; a negative one rotates back.
    """
    if config is None:
        return x
    half, at = x.shape[-1] // 2, range(x.shape[1]) if positions is None else positions
    if config.scaling is None:
        omega, factor = [config.theta ** (-i / half) for i in range(half)], 1.0
    else:
        scaled, factor = angular_frequencies(2 * half, config, max(at) + 1)
        omega = scaled.tolist()
    rotated = torch.empty_like(x)
    for t, m in enumerate(at):
        for i in range(half):
            a, b = x[:, t, :, i], x[:, t, :, i + half]
            cos, sin = math.cos(m * omega[i]) * factor, math.sin(m * omega[i]) * factor
            rotated[:, t, :, i], rotated[:, t, :, i + half] = a * cos - b * sin, a * sin + b * cos
    return rotated
