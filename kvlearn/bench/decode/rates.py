"""The limits of the device: bytes per second read only, FLOPs per second, and what a launch costs."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from kvlearn.bench.common import in_short
from kvlearn.bench.decode.comparison import Setup
from kvlearn.kernels.runtime import HAS_TRITON
from kvlearn.measure.results import Row
from kvlearn.measure.timers import time_interleaved
from kvlearn.measure.units import GIB


def bandwidth_rows(setup: Setup, nbytes: int) -> Iterator[Row]:
    """BW_read: the best of torch's sum and our own stream over ``nbytes``; sets ``setup.read``.

    RuntimeError where none could be measured: without it there is no bar.
    """
    buffer = torch.rand(nbytes // 4, device=setup.device)
    expected = buffer.sum(dtype=torch.float64)
    streams: dict[str, Callable[[], torch.Tensor]] = {"torch.sum": buffer.sum}
    if HAS_TRITON:
        from kvlearn.kernels.stream import TILINGS, read

        for block, warps in TILINGS:
            partial_sums = torch.empty(-(-buffer.numel() // block), device=setup.device)
            streams[f"stream {block}, {warps} warps"] = partial(read, buffer, partial_sums, block, warps)
    best, best_rate = "", 0.0
    for name, stream in streams.items():
        title = f"read {nbytes / GIB:.2g} GiB: {name}"
        details: dict[str, Any] = {"stage": name, "nbytes": nbytes}
        try:
            total = stream().sum(dtype=torch.float64)
            if not abs(total / expected - 1) < 1e-3:
                raise ArithmeticError(f"summed to {total.item():g} where the sum is {expected.item():g}")
            time = time_interleaved({name: setup.timer.prepare([stream])}).time(name)
        except Exception as problem:
            details["what"] = "missing"
            yield Row(title, float("nan"), "s", details=details, missing=in_short(problem))
            continue
        rate = nbytes / time.median
        if rate > best_rate:
            best_rate, best = rate, name
        yield Row(
            title, time.median, "s", spread=time, details=details | {"what": "stream", "bandwidth": rate}
        )
    if not best:
        raise RuntimeError("no stream could be measured, and without it there is no bar")
    setup.read = best_rate
    yield Row(f"BW_read, by {best}", best_rate, "B/s", details={"what": "bw_read", "stage": best})


def peak_rows(setup: Setup, n: int) -> Iterator[Row]:
    """F: FLOP/s of a bf16 product of n x n matrices of random numbers; sets ``setup.peak``."""
    a = torch.randn(n, n, device=setup.device).to(torch.bfloat16)
    time = time_interleaved({"product": setup.timer.prepare([partial(torch.mm, a, a)])}).time("product")
    setup.peak = 2 * n**3 / time.median
    yield Row(f"F: {n} x {n} matrices, bf16", setup.peak, "FLOP/s", details={"what": "peak"})


def launch_rows(setup: Setup) -> Iterator[Row]:
    """An empty kernel: called plainly, and within a CUDA graph."""
    from kvlearn.kernels.stream import nothing

    call = partial(nothing, torch.zeros(1, device=setup.device))
    call()
    host, plain = setup.timer.host(call), setup.timer.plain(call)
    graph = time_interleaved({"empty": setup.timer.prepare([call] * 500)}).time("empty")
    for title, what, time in (
        ("host, per call", "launch_host", host),
        ("between events", "launch_plain", plain),
        ("in a graph", "launch_graph", graph),
    ):
        yield Row(f"empty kernel: {title}", time.median, "s", spread=time, details={"what": what})
