"""States in place of caches: how time and memory grow, steps, bytes, and 100,000 tokens of decode."""

from collections.abc import Iterator

import torch

from kvlearn.measure.linear_bench import endurance, layers, peers, scaling, sizes, steps
from kvlearn.measure.results import Row


@torch.no_grad()
def run(device: torch.device) -> Iterator[Row]:
    torch.manual_seed(0)
    yield from sizes.size_rows(device)
    yield from steps.step_rows(device)
    yield from scaling.prefill_rows(device)
    yield from layers.layer_rows(device)
    yield from layers.train_rows(device)
    yield from peers.peer_rows(device)
    yield from endurance.long_rows(device)
