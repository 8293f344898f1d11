"""What each design stores and reads: by formula, beside what is allocated and what the last token sees."""

from collections.abc import Iterator

import torch

from kvlearn.measure.results import Row
from kvlearn.measure.window_bench import designs
from kvlearn.measure.window_bench.designs import DESIGNS, WITH_SINKS, details

LENGTHS = (16384, 131072)


def size_rows(device: torch.device) -> Iterator[Row]:
    """Bytes of one sequence, in fp32."""
    for n in LENGTHS:
        s = torch.arange(n)
        for name, design in {**DESIGNS, **WITH_SINKS}.items():
            layer = designs.new_layer(design, n, torch.device("cpu"))
            allocated = layer.new_cache(batch=1, max_len=n, device=device).nbytes
            seen = int(design.visible(n, n - 1, s).sum())
            a_token = 2 * layer.n_kv_heads * layer.head_dim * torch.float32.itemsize
            stored, read = layer.cache_bytes(n), layer.read_bytes(n)
            sizes = {"stored": stored, "read": read, "dtype": "float32"}
            found, title = details("stored", name, n, **sizes), f"{n} tokens: {name}"
            yield Row(f"{title}, stored", allocated, "B", stored, "==", details=found)
            found = details("read", name, n, **sizes)
            yield Row(f"{title}, read by a step", read, "B", seen * a_token, "==", details=found)
