"""Peak memory of a call: the bytes it allocates beyond those allocated before.

On the CPU every allocation of torch's allocator is recorded by the profiler, in order, and summed: exact and
the same on every run. It sees tensors and what an operator allocates inside itself (the scratch of
scaled_dot_product_attention too). It does not see memory that comes from elsewhere: numpy, Python objects,
and the work space that a matrix library takes from the system for itself. Memory that the call frees but that
was allocated before the call does not count against the peak.

On CUDA it is the allocator's own peak (``torch.cuda.max_memory_allocated``), in the allocator's block sizes.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from kvlearn import validate

# The profiler reads this when it first starts; below it, torch 2.13 writes a line to stderr at every start.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def peak_memory(fn: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes that ``fn()`` has allocated on ``device`` at any one moment; its result counts."""
    validate.function("fn", fn)
    device = validate.device("device", device)
    if device.type == "cuda":
        return _peak_cuda(fn, device)
    if device.type != "cpu":
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        result = fn()
    del result  # alive until here, so that it counts
    alive: dict[int, int] = {}  # address -> bytes
    running = peak = 0
    for address, n_bytes in _allocations(recorded):
        if n_bytes > 0:
            alive[address] = n_bytes
            running += n_bytes
            peak = max(peak, running)
        else:  # an unknown address was allocated before the call
            running -= alive.pop(address, 0)
    return peak


def _allocations(recorded: profile) -> list[tuple[int, int]]:
    """Address and bytes of every allocation (positive) and free (negative), in order."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    memory.sort(key=lambda e: e["ts"])  # a stable sort: events of the same moment keep their order
    return [(e["args"]["Addr"], e["args"]["Bytes"]) for e in memory]


def _peak_cuda(fn: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = fn()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before
