"""What a state takes: bytes allocated for a short and for a very long text, beside full attention's."""

from collections.abc import Iterator

import torch

from kvlearn.measure.linear_bench import designs
from kvlearn.measure.linear_bench.designs import details, state_names
from kvlearn.measure.results import Row

LENGTHS = (1024, 1_000_000)


def size_rows(device: torch.device) -> Iterator[Row]:
    """Bytes of one sequence, in fp32. Full attention's are by formula: a million tokens may not fit.

    ``tokens``: the length at which full attention's cache is as large.
    """
    short, long = LENGTHS
    full = designs.new_layer("full", torch.device("cpu"))
    for n in LENGTHS:
        found = details("stored", "full", n, dtype="float32")
        yield Row(f"{n} tokens: full, stored by formula", full.cache_bytes(n), "B", details=found)
    for name in state_names():
        layer = designs.new_layer(name, torch.device("cpu"))
        allocated = {n: layer.new_cache(batch=1, max_len=n, device=device).nbytes for n in LENGTHS}
        for n in LENGTHS:
            tokens = allocated[n] / full.cache_bytes(1)
            found = details("stored", name, n, dtype="float32", tokens=tokens)
            title = f"{n} tokens: {name}, stored"
            yield Row(title, allocated[n], "B", layer.cache_bytes(n), "==", details=found)
        found = details("stored_growth", name, long, shorter=short)
        title = f"stored, {name}: {long} / {short} tokens"
        yield Row(title, allocated[long] / allocated[short], "x", 1, "==", details=found)
