"""Means, spreads and paired differences of runs that differ in their seed, with confidence intervals.

A run is identified by its design and seed. Runs of one seed see the same batches, so a design is compared
with full attention seed by seed. A run that diverged has no loss: it is counted, and left out of every mean.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from kvlearn import validate

CONFIDENCE = 0.95


def _numbers(name: str, values: Sequence[float]) -> Sequence[float]:
    """Finite numbers: one that is not would be in every mean without a word."""
    for value in validate.instance(name, values, (list, tuple, np.ndarray)):
        validate.finite(name, value)
    return values


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation (spread, n - 1) over ``n`` seeds; ``diverged`` runs are in neither."""

    n: int
    mean: float | None
    spread: float | None
    diverged: int

    @property
    def error(self) -> float | None:
        """The standard error of the mean."""
        return None if self.spread is None else self.spread / math.sqrt(self.n)


@dataclass(frozen=True)
class Difference:
    """A paired difference: its mean over ``n`` pairs and the interval that holds the true one."""

    n: int
    mean: float
    low: float
    high: float

    @property
    def tie(self) -> bool:
        """Whether the interval holds 0: the runs cannot tell the two apart."""
        return self.low <= 0 <= self.high


def summarise(losses: Sequence[float | None]) -> Summary:
    """``losses`` over the seeds; None is a run that diverged. With one seed there is no spread."""
    validate.instance("losses", losses, Sequence)
    finite = [validate.finite("losses", loss) for loss in losses if loss is not None]
    mean = math.fsum(finite) / len(finite) if finite else None
    spread = float(np.std(finite, ddof=1)) if len(finite) > 1 else None
    return Summary(len(finite), mean, spread, len(losses) - len(finite))


def student_cdf(t: float, df: int) -> float:
    """P(T ≤ t) of Student's t with ``df`` degrees of freedom, a finite sum.

    Source: Abramowitz & Stegun, "Handbook of Mathematical Functions" (1964), 26.7.3 and 26.7.4.
    """
    t, df = validate.finite("t", t), validate.positive("df", df)
    theta = math.atan(abs(t) / math.sqrt(df))
    cosine, sine = math.cos(theta), math.sin(theta)
    if df % 2:
        term, total = cosine, 0.0
        for k in range(1, df - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        inside = 2 / math.pi * (theta + sine * total)
    else:
        term, total = 1.0, 0.0
        for k in range(0, df, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        inside = sine * total
    return (1 + math.copysign(inside, t)) / 2


def student_quantile(p: float, df: int) -> float:
    """The t with P(T ≤ t) = ``p``, by bisection."""
    return _quantile(_probability("p", p), validate.positive("df", df))


def _probability(name: str, value: float) -> float:
    if not 0 < validate.finite(name, value) < 1:
        raise ValueError(f"{name}: expected a probability between 0 and 1, got {value}")
    return float(value)


@cache
def _quantile(p: float, df: int) -> float:
    if p < 0.5:
        return -_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while high < 2.0**1000 and student_cdf(high, df) < p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def paired_values(ours: Mapping[int, float | None], theirs: Mapping[int, float | None]) -> list[float]:
    """ours - theirs for each seed of which both finished."""
    for name, losses in (("ours", ours), ("theirs", theirs)):
        for loss in validate.instance(name, losses, Mapping).values():
            if loss is not None:
                validate.finite(name, loss)
    pairs = ((ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys()))
    return [a - b for a, b in pairs if a is not None and b is not None]


def paired_difference(
    values: Sequence[float],
    *,
    spread: float | None = None,
    df: int | None = None,
    confidence: float = CONFIDENCE,
) -> Difference | None:
    """Mean of paired differences ± t · s / √n; None where there is nothing to estimate s from.

    s is the standard deviation of ``values``, with n - 1 degrees of freedom, unless ``spread`` and ``df``
    give one that was estimated from more runs (``pooled_spread``).
    """
    n = len(_numbers("values", values))
    _probability("confidence", confidence)
    spread = None if spread is None else validate.at_least_zero("spread", spread)
    df = None if df is None else validate.positive("df", df)
    if spread is None:
        if n < 2:
            return None
        spread, df = float(np.std(values, ddof=1)), n - 1
    if n < 1 or df is None:
        return None
    mean = math.fsum(values) / n
    half = student_quantile((1 + confidence) / 2, df) * spread / math.sqrt(n)
    return Difference(n, mean, mean - half, mean + half)


def pooled_spread(losses: Sequence[Mapping[int, float | None]]) -> tuple[float, int] | None:
    """The standard deviation of a paired difference, from all designs' runs, and its degrees of freedom.

        loss = mean of the design + effect of the seed + rest,   s = √(2 · Σ rest² / df)

    ``losses`` of each design by seed, the baseline's too: it is in every difference, so differences of one
    seed are not independent, and their own spread would have fewer degrees of freedom than it seems.
    It assumes that all designs scatter alike, and then says more than three seeds of one design can.
    Source: Scheffé, "The Analysis of Variance" (1959), chapter 4, the two-way layout.
    """
    runs = []
    for design, own in enumerate(validate.instance("losses", losses, Sequence)):
        for seed, loss in validate.instance("losses", own, Mapping).items():
            if loss is not None:
                runs.append((design, seed, validate.finite("losses", loss)))
    seeds = sorted({seed for _, seed, _ in runs})
    if not seeds:
        return None
    effects = np.zeros((len(runs), len(losses) + len(seeds)))
    for effect, (design, seed, _) in zip(effects, runs, strict=True):
        effect[[design, len(losses) + seeds.index(seed)]] = 1
    values = np.array([loss for _, _, loss in runs])
    fitted, _, rank, _ = np.linalg.lstsq(effects, values, rcond=None)
    df = len(runs) - int(rank)
    if not df:
        return None
    rest = values - effects @ fitted
    return math.sqrt(2 * float(rest @ rest) / df), df


def bootstrap_difference(
    values: Sequence[float], *, n_draws: int = 10_000, seed: int = 0, confidence: float = CONFIDENCE
) -> Difference:
    """Paired bootstrap: the interval between percentiles of the mean over pairs drawn with replacement.

    For many pairs, such as the losses of the same windows under two models. With the three seeds of a study
    it is too narrow: use ``paired_difference``.
    Source: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3.
    """
    if len(_numbers("values", values)) < 2:  # one alone, drawn again and again, would seem certain
        raise ValueError(f"values: expected at least two paired differences, got {len(values)}")
    n_draws, seed = validate.positive("n_draws", n_draws), validate.at_least("seed", seed, 0)
    _probability("confidence", confidence)
    data = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(data), size=(n_draws, len(data)))
    low, high = np.quantile(data[draws].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Difference(len(data), float(data.mean()), float(low), float(high))


def smallest_difference(
    spread: float, df: int, n: int, *, confidence: float = CONFIDENCE, power: float = 0.8
) -> float:
    """The difference between two designs of ``n`` seeds each that a study finds with probability ``power``.

        (t_{(1+confidence)/2} + t_power) · s · √(2 / n),   both t with df degrees of freedom

    ``spread`` s is that of one design's runs, estimated with ``df`` degrees of freedom. The two designs' runs
    are taken as independent: where runs of one seed are alike, the study sees smaller ones.
    """
    spread, n = validate.at_least_zero("spread", spread), validate.positive("n", n)
    _probability("confidence", confidence)
    _probability("power", power)
    quantiles = student_quantile((1 + confidence) / 2, df) + student_quantile(power, df)
    return quantiles * math.sqrt(2 / n) * spread
