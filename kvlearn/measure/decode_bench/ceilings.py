"""What the card can do: bytes per second read only, FLOPs per second, and what a launch costs."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from kvlearn.kernels.runtime import HAS_TRITON
from kvlearn.measure.decode_bench.bench import Bench
from kvlearn.measure.decode_bench.clocks import time_by_turns
from kvlearn.measure.decode_bench.contest import in_short, note
from kvlearn.measure.results import Row
from kvlearn.measure.units import GIB

STREAM = 2 * GIB  # bytes, and more than that brings nothing
PRODUCT = 8192  # rows and columns


def bandwidth(bench: Bench) -> Iterator[Row]:
    """BW_read: the best of torch's sum and our own stream; sets ``bench.read``."""
    nbytes = STREAM
    buffer = torch.rand(nbytes // 4, device=bench.device)
    truth = buffer.sum(dtype=torch.float64)
    streams: dict[str, Callable[[], torch.Tensor]] = {"torch.sum": buffer.sum}
    if HAS_TRITON:
        from kvlearn.kernels.stream import TILINGS, read

        for block, warps in TILINGS:
            partial_sums = torch.empty(-(-buffer.numel() // block), device=bench.device)
            streams[f"stream {block}, {warps} warps"] = partial(read, buffer, partial_sums, block, warps)
    best = ""
    for name, stream in streams.items():
        try:
            found = stream().sum(dtype=torch.float64)
            if not abs(found / truth - 1) < 1e-3:
                raise ArithmeticError(f"summed to {found.item():g} where the sum is {truth.item():g}")
            comparison = time_by_turns({name: bench.clock.prepare([stream])})
        except Exception as problem:
            bench.failures.append(f"bandwidth by {name}")
            yield note(f"bandwidth by {name}: {in_short(problem)}")
            continue
        time = comparison.time(name)
        rate = nbytes / time.median
        if rate > bench.read:
            bench.read, best = rate, name
        details = {"what": "stream", "stage": name, "nbytes": nbytes, "bandwidth": rate}
        yield Row(f"read {nbytes / GIB:.2g} GiB: {name}", time.median, "s", spread=time, details=details)
    if not bench.read:
        raise RuntimeError("no stream could be measured, and without it there is no bar")
    yield Row(f"BW_read, by {best}", bench.read, "B/s", details={"what": "bw_read", "stage": best})


def peak(bench: Bench) -> Iterator[Row]:
    """F: FLOP/s of a bf16 matrix product of random numbers; sets ``bench.peak``."""
    n = PRODUCT
    a = torch.randn(n, n, device=bench.device).to(torch.bfloat16)
    time = time_by_turns({"product": bench.clock.prepare([partial(torch.mm, a, a)])}).time("product")
    bench.peak = 2 * n**3 / time.median
    yield Row(f"F: {n} x {n} matrices, bf16", bench.peak, "FLOP/s", details={"what": "peak"})


def launch_cost(bench: Bench) -> Iterator[Row]:
    """An empty kernel: called plainly, and within a CUDA graph."""
    from kvlearn.kernels.stream import nothing

    call = partial(nothing, torch.zeros(1, device=bench.device))
    call()
    host = bench.clock.host(call)
    yield Row("empty kernel: host, a call", host.median, "s", spread=host, details={"what": "launch_host"})
    plain = bench.clock.plain(call)
    yield Row(
        "empty kernel: between events", plain.median, "s", spread=plain, details={"what": "launch_plain"}
    )
    graph = time_by_turns({"empty": bench.clock.prepare([call] * 500)}).time("empty")
    yield Row("empty kernel: in a graph", graph.median, "s", spread=graph, details={"what": "launch_graph"})
