"""Argument checks for all of kvlearn, kept apart from the mathematics.

Each function returns the value it was given, or raises an error with the argument's name, its value and the
expected one: ``ValueError`` for a wrong value, ``TypeError`` for a wrong type.
"""

import math
import operator
from collections.abc import Collection
from contextlib import suppress
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def positive(name: str, value: Any) -> int:
    """An integer of at least 1."""
    return at_least(name, value, 1)


def at_least(name: str, value: Any, least: int) -> int:
    """An integer of at least ``least``."""
    if not isinstance(value, int | Tensor) and hasattr(value, "__index__"):
        with suppress(TypeError):  # of an array with several numbers
            value = operator.index(value)  # numpy's integers become Python's
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__} ({value!r})")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return value


def fields_at_least(of: Any, prefix: str = "", /, **least: int) -> None:
    """Fields of a dataclass that are integers of at least so much; numpy's become Python's there."""
    for name, bound in least.items():
        object.__setattr__(of, name, at_least(prefix + name, getattr(of, name), bound))


def at_most(name: str, value: int, most: int, because: str) -> int:
    """An integer of at most ``most``; ``because`` says where the limit comes from."""
    if value > most:
        raise ValueError(f"{name}: expected at most {most} ({because}), got {value}")
    return value


def divides(name: str, value: int, whole_name: str, whole: int) -> int:
    """A positive integer that divides ``whole``."""
    value = positive(name, value)
    if whole % value:
        raise ValueError(f"{name}: expected a divisor of {whole_name}={whole}, got {value}")
    return value


def finite(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} ({value!r})")
    try:
        number = float(value)
    except OverflowError:  # of an integer that no float holds
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return number


def at_least_zero(name: str, value: Any) -> float:
    """A finite number that is not negative."""
    if finite(name, value) < 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")
    return float(value)


def in_fp32(name: str, value: Any) -> float:
    """A finite number that fp32 can hold: 0, or 1.2e-38 to 3.4e38 without its sign."""
    range_ = torch.finfo(torch.float32)
    if finite(name, value) and not range_.tiny <= abs(value) <= range_.max:
        raise ValueError(f"{name}: expected a number that fp32 can hold, got {value}")
    return float(value)


def above(name: str, value: Any, bound: float) -> float:
    """A finite number above ``bound``."""
    if finite(name, value) <= bound:
        raise ValueError(f"{name}: expected a number above {bound}, got {value}")
    return float(value)


def one_of(name: str, value: Any, options: Collection[Any]) -> Any:
    """One of ``options``."""
    try:
        known = value in options
    except (RuntimeError, TypeError, ValueError):  # a list has no hash, an array no truth
        known = False
    if not known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}; got {value!r}")
    return value


def instance(name: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    """An instance of ``kind``."""
    if not isinstance(value, kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}")
    return value


def function(name: str, value: Any) -> Any:
    """An object that can be called."""
    if not callable(value):
        raise TypeError(f"{name}: expected a function, got {type(value).__name__}")
    return value


def tensor(
    name: str,
    value: Any,
    shape: tuple[int | str, ...],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """A tensor of this shape, dtype and device.

    A string in ``shape`` names a dimension that may have any size: ``("batch", "time", 64)``.
    """
    checked: Tensor = instance(name, value, Tensor)
    if value.shape != shape and (
        value.dim() != len(shape)
        or any(isinstance(want, int) and want != got for want, got in zip(shape, value.shape, strict=True))
    ):
        raise ValueError(f"{name}: expected shape ({', '.join(map(str, shape))}), got {tuple(value.shape)}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {value.dtype}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    return checked


def integers(name: str, value: Tensor) -> Tensor:
    """A tensor of integers: not floating-point or complex numbers, and not a mask."""
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {value.dtype}")
    return value


def floating(name: str, dtype: Any) -> torch.dtype:
    """A floating-point dtype."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype, got {type(dtype).__name__} ({dtype!r})")
    if not dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point type, got {dtype}")
    return dtype


def device(name: str, value: Any) -> torch.device:
    """A device, or what ``torch.device`` reads as one: "cpu", "cuda:0"."""
    try:
        return torch.device(value)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name}: expected a device such as 'cpu' or 'cuda:0', got {value!r}") from error


def may_read(x: Tensor) -> bool:
    """Whether a check may look at the values of ``x``: not on a GPU, where it would wait for the results of
    all earlier operators, and not while ``torch.compile`` traces, when there are none yet."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
