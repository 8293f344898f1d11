"""Windows and patterns: how time and memory grow with the text, steps of decode, bytes stored and read."""

from collections.abc import Iterator

import torch

from kvlearn.measure.results import Row
from kvlearn.measure.window_bench import chosen, layers, scaling, sizes, steps


@torch.no_grad()
def run(device: torch.device) -> Iterator[Row]:
    torch.manual_seed(0)
    yield from sizes.size_rows(device)
    yield from steps.step_rows(device)
    yield from chosen.step_rows(device)
    yield from scaling.prefill_rows(device)
    yield from scaling.train_rows(device)
    yield from layers.layer_rows(device)
    yield from layers.memory_rows(device)
