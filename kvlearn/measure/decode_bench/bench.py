"""The place where a benchmark runs: the device with its clock, its numbers, and the rates measured on it."""

import gc
from dataclasses import dataclass, field

import torch

from kvlearn.measure.decode_bench.cells import Cell
from kvlearn.measure.decode_bench.clocks import Clock, CudaClock
from kvlearn.measure.decode_bench.inputs import Arena, numbers
from kvlearn.measure.units import GIB, MIB

SHARE = 0.6  # of the card's memory: larger cells are skipped and named
SPARE = 12 * GIB  # for exact results, graphs and what the others allocate


@dataclass
class Bench:
    """``memory`` and ``l2`` in bytes; ``backend`` as ``decode_attention`` takes it.

    ``read``, ``peak``: bytes/s and FLOP/s, measured before all else (0 until then).
    """

    device: torch.device
    clock: Clock
    arena: Arena
    memory: int
    l2: int
    backend: str = "triton"
    read: float = 0.0
    peak: float = 0.0
    failures: list[str] = field(default_factory=list)

    def fits(self, cell: Cell) -> bool:
        """Whether the cell's cache stays within its share of the memory."""
        return cell.stored <= SHARE * self.memory and numbers(cell) <= self.arena.buffer.numel()

    def floor(self, cell: Cell) -> float:
        """Seconds below which no kernel comes, launch aside: max(bytes / bandwidth, FLOPs / peak)."""
        return max(cell.nbytes / self.read, cell.flops / self.peak if self.peak else 0.0)

    def tidy(self) -> None:
        """Hands back what a cell allocated."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def cuda_bench(device: torch.device) -> Bench:
    """A bench on this GPU; takes 60 % of its memory at once, so that no cell waits for an allocation."""
    properties = torch.cuda.get_device_properties(device)
    l2 = int(properties.L2_cache_size) or 64 * MIB
    free, _ = torch.cuda.mem_get_info(device)
    room = int(min(SHARE * properties.total_memory, max(free - SPARE, free // 2)))
    clock = CudaClock(device, l2)
    return Bench(device, clock, Arena(room // 256 * 128, device), properties.total_memory, l2)
