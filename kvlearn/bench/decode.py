"""Temporary: one part."""

import torch

from kvlearn.bench.common import Part
from kvlearn.measure.bench import decode as old
from kvlearn.measure.decode_bench.figure import bandwidth_points

__all__ = ["bandwidth_points"]


def parts(device: torch.device, small: bool = False) -> list[Part]:
    return [Part("all", lambda: old.run(device))]
