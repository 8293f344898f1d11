"""How a quantity grows with the length of the text: the exponent of a power law, with its error.

    y = c · N^p    ⟺    log y = log c + p · log N

p is the slope of a straight line through the logarithms. Its error has two causes, and both count: the points
do not lie on a line (the law is another one, or the range is too short), and each point is noisy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvlearn import validate


@dataclass(frozen=True)
class Exponent:
    """The exponent ``value`` ± ``error`` (one standard error), fitted from ``first`` to ``last`` tokens."""

    value: float
    error: float
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f}"


def fit_exponent(
    lengths: Sequence[int], values: Sequence[float], errors: Sequence[float] | None = None
) -> Exponent:
    """The least-squares slope of log(values) over log(lengths), from at least three points.

    ``errors`` are one standard deviation of each value. The error is the larger of what the residuals say,
    √(Σ r² / (n - 2) / Σ (x - x̄)²), and of what ``errors`` say, √(Σ ((x - x̄) e / y)²) / Σ (x - x̄)². Raises
    ValueError for fewer than three points, values that are not positive, and lengths that are all the same.
    """
    for name, given in (("lengths", lengths), ("values", values), ("errors", errors)):
        if given is not None or name != "errors":
            for number in validate.instance(name, given, Sequence):
                validate.finite(name, number)
    validate.at_least("len(lengths)", len(lengths), 3)
    if len(values) != len(lengths):
        raise ValueError(f"values: expected {len(lengths)}, as many as lengths, got {len(values)}")
    for name, given in (("lengths", lengths), ("values", values)):
        if min(given) <= 0:
            raise ValueError(f"{name}: expected positive numbers, got {min(given)}")
    x, y = [math.log(n) for n in lengths], [math.log(v) for v in values]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - middle_x) ** 2 for a in x)
    if spread == 0:
        raise ValueError(f"lengths: expected different ones, got {lengths[0]} only")
    slope = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / spread
    residuals = sum((b - middle_y - slope * (a - middle_x)) ** 2 for a, b in zip(x, y, strict=True))
    error = math.sqrt(residuals / (len(x) - 2) / spread)
    if errors is not None:
        if len(errors) != len(values) or min(errors) < 0:
            raise ValueError(f"errors: expected {len(values)} numbers of at least 0, got {list(errors)}")
        relative = [e / v for e, v in zip(errors, values, strict=True)]
        noise = math.sqrt(sum(((a - middle_x) * e) ** 2 for a, e in zip(x, relative, strict=True))) / spread
        error = max(error, noise)
    return Exponent(slope, error, min(lengths), max(lengths))
