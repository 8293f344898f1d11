"""Argument checks for all of kvlearn, kept apart from the mathematics.

Each function returns the value it was given, or raises an error with the argument's name, its value and the
expected one: ``ValueError`` for a wrong value, ``TypeError`` for a wrong type.
"""

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor


def positive(name: str, value: Any) -> int:
    """An integer of at least 1."""
    return at_least(name, value, 1)


def at_least(name: str, value: Any, least: int) -> int:
    """An integer of at least ``least``."""
    if not isinstance(value, int) and hasattr(value, "__index__"):
        value = operator.index(value)  # numpy's integers become Python's
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__} ({value!r})")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return value


def at_most(name: str, value: int, most: int, because: str) -> int:
    """An integer of at most ``most``; ``because`` says where the limit comes from."""
    if value > most:
        raise ValueError(f"{name}: expected at most {most} ({because}), got {value}")
    return value


def divides(name: str, value: int, whole_name: str, whole: int) -> int:
    """A positive integer that divides ``whole``."""
    if whole % positive(name, value):
        raise ValueError(f"{name}: expected a divisor of {whole_name}={whole}, got {value}")
    return value


def one_of(name: str, value: Any, options: Collection[Any]) -> Any:
    """One of ``options``."""
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}; got {value!r}")
    return value


def instance(name: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    """An instance of ``kind``."""
    if not isinstance(value, kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise TypeError(f"{name}: expected {wanted}, got {type(value).__name__}")
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
    instance(name, value, Tensor)
    if value.shape != shape and (
        value.dim() != len(shape)
        or any(isinstance(want, int) and want != got for want, got in zip(shape, value.shape, strict=True))
    ):
        raise ValueError(f"{name}: expected shape ({', '.join(map(str, shape))}), got {tuple(value.shape)}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {value.dtype}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    return value


def floating(name: str, dtype: torch.dtype) -> torch.dtype:
    """A floating-point dtype."""
    if not dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point type, got {dtype}")
    return dtype
