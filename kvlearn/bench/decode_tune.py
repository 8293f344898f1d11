"""Tilings and splits of the decode kernel, tried on a GPU (``kvlearn.bench.decode.tilings``)."""

from functools import cache, partial

import torch

from kvlearn.bench.common import Part
from kvlearn.bench.decode import tiling_parts
from kvlearn.bench.decode.comparison import cuda_setup, unavailable
from kvlearn.bench.decode.sizes import SIZES, SMALL

SECONDS = 450.0  # for all parts, unless `--seconds` says less


def parts(device: torch.device, small: bool = False) -> list[Part]:
    """The parts of this benchmark; one that says so where there is no GPU."""
    if device.type != "cuda":
        return [Part("tilings", partial(iter, [unavailable("tilings", "no GPU: nothing to tune")]))]
    return tiling_parts(SMALL if small else SIZES, cache(lambda: cuda_setup(device)), SECONDS)
