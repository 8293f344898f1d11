"""Compares what came with what was expected, and says the difference in words a learner can use."""

from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Wide enough for any sound order of operations, computed in the dtype itself; narrow beside any mistake.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


class Difference(NamedTuple):
    """What was expected and what came; ``what`` names the part, where an answer has several."""

    what: str
    expected: str
    came: str


def compare(got: Any, want: Tensor, what: str = "", tolerance: float | None = None) -> Difference | None:
    """None where ``got`` is as good as ``want``. Never shows a whole tensor."""
    if not isinstance(got, Tensor):
        return Difference(what, f"a tensor of shape {tuple(want.shape)}", describe(got))
    if got.shape != want.shape:
        return Difference(what, f"shape {tuple(want.shape)}", f"shape {tuple(got.shape)}")
    if got.dtype != want.dtype:
        return Difference(what, f"dtype {dtype_name(want)}", f"dtype {dtype_name(got)}")
    return compare_values(got.detach(), want, what, tolerance)


def compare_values(got: Tensor, want: Tensor, what: str, tolerance: float | None) -> Difference | None:
    wrong = ~near(got, want, tolerance)
    n_wrong = int(wrong.sum())
    if n_wrong == 0:
        return None
    first = tuple(int(i) for i in wrong.nonzero()[0])
    at = f"at {list(first)}" if first else ""
    expected = f"{number(want[first])} {at}".strip()
    came = f"{number(got[first])} there" if first else number(got)
    share = f"{n_wrong} of {wrong.numel()} elements differ"
    if not got.dtype.is_floating_point:
        return Difference(what, expected, f"{came}; {share}")
    n_nan = int((got.isnan() & ~want.isnan()).sum())
    if n_nan:
        return Difference(what, expected, f"{came}; {n_nan} of {wrong.numel()} elements are NaN")
    gap = (got.double() - want.double()).abs().nan_to_num(torch.inf) * wrong
    worst = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    largest = f"the largest difference is {float(gap[worst]):.3g}" + (f" at {list(worst)}" if worst else "")
    return Difference(what, expected, f"{came}; {largest}; {share}")


def near(got: Tensor, want: Tensor, tolerance: float | None = None) -> Tensor:
    """Elementwise: equal within the tolerance of ``want``'s dtype (for integers and booleans: equal)."""
    if not (got.dtype.is_floating_point and want.dtype.is_floating_point):
        return got == want
    wide = TOLERANCE.get(want.dtype, 1e-4) if tolerance is None else tolerance
    return torch.isclose(got.double(), want.double(), rtol=wide, atol=wide)


def same(a: Any, b: Any) -> bool:
    """Two answers gave the same: tensors within tolerance, NaN where the other has NaN, whatever the
    dtype."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.shape == b.shape and a.dtype.is_floating_point == b.dtype.is_floating_point
        if not alike or a.is_complex() or b.is_complex():
            return False
        wide = max(TOLERANCE.get(t.dtype, 1e-4) for t in (a, b))
        return bool(torch.allclose(a.double(), b.double(), rtol=wide, atol=wide, equal_nan=True))
    return type(a) is type(b) and bool(a == b)


def describe(value: Any) -> str:
    """A value of any type in a few words."""
    if value is None:
        return "None (is a return missing?)"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {dtype_name(value)}"
    plain = plain_number(value)
    if plain is not None:
        return f"{plain:,}"
    if isinstance(value, bool):
        return str(value)
    kind = type(value)
    name = "numpy array" if kind.__module__ == "numpy" and kind.__name__ == "ndarray" else kind.__name__
    if isinstance(value, tuple | list):
        return f"a {name} of {len(value)} ({', '.join(type(part).__name__ for part in value[:4])})"
    return f"a {name}"


def plain_number(value: Any) -> int | float | None:
    """numpy's numbers, fractions and tensors of one number as Python's own; None for anything else."""
    if isinstance(value, Tensor) and value.ndim == 0 and value.dtype != torch.bool:
        value = value.detach().item() if value.device.type != "meta" else None
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def number(element: Tensor) -> str:
    value = element.item()
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
