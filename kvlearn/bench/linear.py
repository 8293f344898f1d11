"""Temporary: one part."""

import torch

from kvlearn.bench.common import Part
from kvlearn.measure.bench import linear as old


def parts(device: torch.device, small: bool = False) -> list[Part]:
    return [Part("all", lambda: old.run(device))]
