"""Whole layers over a long prompt, projections and RoPE included: time, and memory by way of the cache."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kvlearn.measure.memory import peak_memory
from kvlearn.measure.results import Row
from kvlearn.measure.shared_bench.rows import agree, ratio_row, time_row
from kvlearn.measure.timing import compare
from kvlearn.measure.units import GIB
from kvlearn.measure.window_bench import designs
from kvlearn.measure.window_bench.designs import DESIGNS, WITH_SINKS, Design, Layer, details
from kvlearn.measure.window_bench.reference import attend_in_layer, some_queries

LENGTH, LONG = 16384, 32768
ROUNDS = 3
MOST = GIB  # of extra memory, over the long prompt


def layer_rows(device: torch.device) -> Iterator[Row]:
    """A window's layer against full attention's."""
    x = torch.randn(1, LENGTH, designs.D_MODEL, device=device)
    calls: dict[str, Callable[[], Tensor]] = {}
    for name in ("full", "window"):
        layer = designs.new_layer(DESIGNS[name], LENGTH, device)
        calls[name] = partial(layer, x)
        check(name, calls[name], layer, x, DESIGNS[name])
    by_turns = compare(calls, rounds=ROUNDS)
    title = f"layer {designs.D_MODEL}, prompt of {LENGTH}"
    for name in calls:
        yield time_row(by_turns, title, name, details("layer_time", name, LENGTH))
    yield ratio_row(by_turns, title, "full", "window", details("layer_speedup", "window", LENGTH))


def memory_rows(device: torch.device) -> Iterator[Row]:
    """A very long prompt through a window's layer: into its ring, whose own memory counts, and without."""
    x = torch.randn(1, LONG, designs.D_MODEL, device=device)
    for name, design in {"window": DESIGNS["window"], **WITH_SINKS}.items():
        layer = designs.new_layer(design, LONG, device)
        ways = {"without a cache": partial(layer, x), "into its ring": partial(into_cache, layer, x)}
        for way, call in ways.items():
            check(f"{name}, {way}", call, layer, x, design)
            found = details("layer_memory", name, LONG, way=way)
            title = f"layer {designs.D_MODEL}, prompt of {LONG}, extra memory: {name}, {way}"
            yield Row(title, peak_memory(call, device), "B", MOST, "<=", details=found)


def into_cache(layer: Layer, x: Tensor) -> Tensor:
    """A prompt in one pass into a new cache."""
    return layer(x, layer.new_cache(batch=len(x), max_len=x.shape[1]))


def check(name: str, call: Callable[[], Tensor], layer: Layer, x: Tensor, design: Design) -> None:
    """Raises AssertionError unless some tokens of a prompt come out as the equation says."""
    at = some_queries(x.shape[1])
    agree({name: lambda: call()[:, at]}, attend_in_layer(layer, x, design, at))
