"""Timers for short calls: CUDA graphs with a cold L2, and the wall clock where there is no GPU.

A CUDA graph holds calls on ever other inputs, several times as many bytes as the L2 holds, so that each call
finds its own thrown out; a replay's time over its calls is one value. A plain call is timed as
``triton.testing.do_bench`` does it: the L2 is written over, then an event, the call, an event.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from kvlearn.measure.timing import Comparison, Quartiles, interleaved
from kvlearn.measure.units import MIB

Call = Callable[[], Any]

REPLAY = 3e-3  # seconds that one replay should last: beside them the graph's own launch is nothing
MOST_CALLS = 1024  # in one graph
BUDGET = 0.15  # seconds per implementation
FEWEST, MOST = 5, 25  # rounds


class Prepared(Protocol):
    """One implementation, ready to be timed: ``calls`` calls per measurement."""

    calls: int

    def seconds(self) -> float:
        """Seconds per call, measured once more."""
        ...


class Timer(Protocol):
    """Measures seconds per call; a test brings its own."""

    def prepare(self, calls: Sequence[Call]) -> Prepared:
        """Calls that do the same work on different inputs, to be timed. Raises what a call raises."""
        ...

    def plain(self, call: Call) -> Quartiles:
        """Seconds of a single call that finds a cold cache."""
        ...

    def host(self, call: Call) -> Quartiles:
        """Seconds until a call returns, whether or not the device has finished."""
        ...


def time_interleaved(prepared: Mapping[str, Prepared]) -> Comparison:
    """Seconds per call of each, interleaved, as many rounds as ``BUDGET`` allows."""
    round_seconds = sum(one.seconds() * one.calls for one in prepared.values())
    allowed = int(BUDGET * len(prepared) / max(round_seconds, 1e-9))
    return interleaved({name: one.seconds for name, one in prepared.items()}, min(max(allowed, FEWEST), MOST))


class WallCalls:
    """All calls once, timed by the wall clock."""

    def __init__(self, functions: Sequence[Call]) -> None:
        self.functions, self.calls = functions, len(functions)
        functions[0]()

    def seconds(self) -> float:
        """Seconds per call."""
        start = time.perf_counter()
        for function in self.functions:
            function()
        return (time.perf_counter() - start) / self.calls


class WallTimer:
    """For a CPU, where every call waits for its result."""

    def prepare(self, calls: Sequence[Call]) -> Prepared:
        """The calls follow each other."""
        return WallCalls(calls)

    def plain(self, call: Call) -> Quartiles:
        """A few calls."""
        wall = WallCalls([call])
        return Quartiles.of([wall.seconds() for _ in range(FEWEST)])

    def host(self, call: Call) -> Quartiles:
        """The same: a call returns when it is done."""
        return self.plain(call)


class Replay:
    """A captured graph, timed by the device."""

    def __init__(self, graph: torch.cuda.CUDAGraph, calls: int) -> None:
        self.graph, self.calls = graph, calls
        graph.replay()  # the first sends the graph to the device

    def seconds(self) -> float:
        """Seconds per call."""
        return elapsed(self.graph.replay) / self.calls


class CudaTimer:
    """For a GPU: CUDA graphs replayed between two events."""

    def __init__(self, device: torch.device, l2: int) -> None:
        self.stream = torch.cuda.Stream(device)
        self.trash = torch.empty(max(512 * MIB, 4 * l2), dtype=torch.int8, device=device)

    def prepare(self, calls: Sequence[Call]) -> Prepared:
        """Captures the calls, so many times over that a replay is long enough to be timed."""
        self._warm_up(calls)
        once = self._capture(calls)
        # Whole turns only: every input as often as any other, and in the same order.
        turns = math.ceil(REPLAY / max(once.seconds() * len(calls), 1e-7))
        turns = max(1, min(turns, MOST_CALLS // len(calls)))
        return once if turns == 1 else self._capture(list(calls) * turns)

    def plain(self, call: Call) -> Quartiles:
        """Thirteen calls, each behind a written-over L2; the first three warm up."""
        seconds = [elapsed(call, first=self.trash.zero_) for _ in range(13)]
        return Quartiles.of(seconds[3:])

    def host(self, call: Call) -> Quartiles:
        """Fifty calls in a row, few enough for the device's queue."""
        seconds = []
        for _ in range(60):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return Quartiles.of(seconds[10:])

    def _warm_up(self, calls: Sequence[Call]) -> None:
        """Nothing may be compiled, loaded or allocated for the first time while a graph is captured."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for call in calls:
                call()
        self.stream.synchronize()

    def _capture(self, calls: Sequence[Call]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # The outer context puts the stream back where a capture fails; torch.cuda.graph alone would not.
        with torch.cuda.stream(self.stream), torch.cuda.graph(graph, stream=self.stream):
            for call in calls:
                call()
        torch.cuda.synchronize()
        return Replay(graph, len(calls))


def elapsed(call: Call, first: Call | None = None) -> float:
    """Seconds of a call between two events on the current stream; ``first`` is queued ahead of them.

    While the device is busy with ``first``, the host is already queueing the call: its own time stays out.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if first is not None:
        first()
    start.record()
    call()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds * 1e-3
