"""Rooflines: how fast this machine reads and multiplies, and what that allows a computation at best.

    attainable FLOP/s = min(peak, intensity · bandwidth),   intensity = FLOPs / bytes moved

Left of the knee (peak / bandwidth) a computation waits for memory, right of it for arithmetic.
Source: Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model" (2009).
"""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import psutil
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from kvlearn import validate
from kvlearn.measure.units import GIB, MIB
from kvlearn.measure.work import Work


@dataclass(frozen=True)
class Roofline:
    """``peak`` in FLOP/s and ``bandwidth`` in bytes/s, both measured, for one device and dtype."""

    peak: float
    bandwidth: float
    name: str = ""

    def __post_init__(self) -> None:
        validate.instance("name", self.name, str)
        for name in ("peak", "bandwidth"):
            validate.above(name, getattr(self, name), 0)

    @property
    def knee(self) -> float:
        """FLOPs per byte at which memory and arithmetic take equally long."""
        return self.peak / self.bandwidth

    def attainable(self, intensity: float) -> float:
        """The most FLOP/s at so many FLOPs per byte."""
        if validate.finite("intensity", intensity) < 0:
            raise ValueError(f"intensity: expected at least 0, got {intensity}")
        return min(self.peak, intensity * self.bandwidth)

    def floor(self, work: Work) -> float:
        """The least seconds that the work can take: all bytes moved, all FLOPs done, at the same time."""
        validate.instance("work", work, Work)
        return max(work.flops / self.peak, work.nbytes / self.bandwidth)


@dataclass(frozen=True)
class Machine:
    """The inputs of a prediction: a roofline, and the results of ``call_seconds`` and ``attention_rate``.

    ``matrices`` is the part of the bandwidth that a product of a matrix and one row reaches. ``rates`` is
    keyed by (query rows per KV head, KV heads, width of a head).
    """

    roofline: Roofline
    call: float = 0.0
    matrices: float = 1.0
    rates: Mapping[tuple[int, int, int], float] = field(default_factory=dict)

    def step_seconds(
        self,
        weights: float,
        cache: float,
        flops: float,
        calls: int = 0,
        heads: tuple[int, int, int] | None = None,
        bandwidth: float | None = None,
    ) -> float:
        """Seconds of a decode step of one layer: its matrices, then its cache, then the calls.

            weights / (matrices · bandwidth) + max(cache / bandwidth, flops / rate) + calls · call

        ``weights`` and ``cache``: bytes moved. ``flops``: those of the attention, without its projections,
        which for one sequence wait for their weights. ``heads``: the key of ``rates``; without it, or where
        it was not measured, the rate is the peak. ``bandwidth``: bytes/s of a stream that was measured beside
        the step, on a machine that others use too; else the roofline's.
        """
        bandwidth = self.roofline.bandwidth if bandwidth is None else bandwidth
        rate = self.rates.get(heads or (0, 0, 0), self.roofline.peak)
        rows = weights / (self.matrices * bandwidth)
        return rows + max(cache / bandwidth, flops / rate) + calls * self.call


def measure_roofline(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Roofline:
    """This machine's roofline, measured once per process with all of torch's threads, in about a second."""
    device = torch.device(device)
    label = f"{device.type}, {str(dtype).removeprefix('torch.')}"
    return Roofline(matmul_peak(device, dtype), read_bandwidth(device), label)


def read_bandwidth(device: torch.device | str = "cpu") -> float:
    """Bytes/s of a read-only stream: the best of several sums over a buffer far larger than any cache."""
    return _read_bandwidth(torch.device(device), torch.get_num_threads())


def matmul_peak(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a square matrix product, the best of several at two sizes.

    A dtype that the machine only emulates is measured as it is (fp16 on most CPUs: a thousandth).
    """
    return _matmul_peak(torch.device(device), dtype, torch.get_num_threads())


def call_seconds(device: torch.device | str = "cpu") -> float:
    """Seconds of a call that computes next to nothing: the median of runs of a thousand small additions."""
    device = torch.device(device)
    x = torch.zeros(64, device=device)

    def thousand() -> None:
        for _ in range(1000):
            torch.add(x, x)

    with torch.inference_mode():
        return sorted(_best(thousand, device, runs=1) for _ in range(5))[2] / 1000


def matrix_bandwidth(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, nbytes: int = 128 * MIB
) -> float:
    """Bytes/s of a product of a matrix of ``nbytes`` and one row: the median of five."""
    device, width = torch.device(device), 4096
    matrix = torch.randn(max(1, nbytes // (width * dtype.itemsize)), width, device=device).to(dtype)
    x = torch.randn(1, width, device=device).to(dtype)
    with torch.inference_mode():
        runs = [_best(lambda: linear(x, matrix), device, runs=1) for _ in range(5)]
    return matrix.nbytes / sorted(runs)[2]


def attention_rate(
    rows: int,
    n_kv_heads: int,
    head_dim: int = 128,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    nbytes: int = 64 * MIB,
) -> float:
    """FLOP/s of ``scaled_dot_product_attention`` with ``rows`` queries for each of ``n_kv_heads`` KV heads.

    Keys and values have heads of ``head_dim`` and ``nbytes`` together. Few rows wait for the keys and values,
    or for products that are too narrow for the machine; many reach the peak of its matrix products.
    """
    device = torch.device(device)
    tokens = max(1, nbytes // (2 * n_kv_heads * head_dim * dtype.itemsize))
    q = torch.randn(1, n_kv_heads, rows, head_dim, device=device).to(dtype)
    k, v = torch.randn(2, 1, n_kv_heads, tokens, head_dim, device=device).to(dtype)
    with torch.inference_mode():
        runs = [_best(lambda: scaled_dot_product_attention(q, k, v), device, runs=1) for _ in range(5)]
    return 4 * n_kv_heads * rows * tokens * head_dim / sorted(runs)[2]


def read_stream(device: torch.device | str = "cpu") -> tuple[Callable[[], object], int]:
    """A function that reads a buffer far larger than any cache once, and how many bytes those are."""
    device = torch.device(device)
    if device.type == "cuda":
        size = min(2 * GIB, torch.cuda.mem_get_info(device)[0] // 4)
    else:
        size = min(512 * MIB, psutil.virtual_memory().available // 4)
    buffer = torch.ones(size // 4, device=device)
    return buffer.sum, buffer.nbytes


def square_product(
    n: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Callable[[], object], int]:
    """A function that multiplies two n x n matrices, and its 2 · n³ FLOPs."""
    a = torch.randn(n, n, device=device).to(dtype)
    return functools.partial(torch.mm, a, a), 2 * n**3


# The number of threads is a key of the caches: other threads, other numbers.
@functools.cache
def _read_bandwidth(device: torch.device, threads: int) -> float:
    stream, n_bytes = read_stream(device)
    return n_bytes / _best(stream, device, runs=7)


@functools.cache
def _matmul_peak(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    best = 0.0
    for n in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        product, flops = square_product(n, device, dtype)
        seconds = _best(product, device, runs=5)
        best = max(best, flops / seconds)
        if seconds > 0.5:  # emulated: the larger product would take minutes and say the same
            break
    return best


def _best(fn: Callable[[], object], device: torch.device, runs: int) -> float:
    """The shortest of several runs; stops early where a run takes over half a second."""
    best = float("inf")
    for _ in range(runs + 1):  # the first warms up, and counts only if it is the only one
        start = time.perf_counter()
        fn()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        if best > 0.5:
            break
    return best
