"""Ring attention on more devices than we have: a timetable from measured computing and assumed links.

A block goes to the next device while the device computes with it. That is free as long as computing takes
longer: with C tokens per device, H query heads over G KV heads, F FLOP/s and a link of W bytes/s,

    computing  2 · C² · H · D / F      moving  2 · C · G · D · b / W      hidden from  C = (G/H) · b · F / W

tokens per device on, where b is bytes per number and half of the pairs are visible (striped or zig-zag).
Source: Liu, Zaharia & Abbeel, "Ring Attention" (2023), section 3, where it is c ≥ F / B.
"""

import time
from dataclasses import dataclass

import torch

from kvlearn import validate
from kvlearn.parallel.blockwise import Attended, Rule
from kvlearn.parallel.layout import ORDERS, Order


@dataclass(frozen=True)
class Shape:
    """One layer's attention: heads, KV heads, numbers per head, bytes per number, rows of the batch."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    itemsize: int = 2
    batch: int = 1

    def block_bytes(self, tokens: int) -> int:
        """Bytes of one message: keys and values of ``tokens`` tokens."""
        return 2 * self.batch * self.n_kv_heads * tokens * self.head_dim * self.itemsize

    def flops(self, pairs: float) -> float:
        """Forward: a product with the key and one with the value, 2 FLOPs per number, in every query head."""
        return 4 * self.batch * self.n_heads * self.head_dim * pairs


@dataclass(frozen=True)
class Link:
    """The connection of two devices: bytes/s in one direction, and seconds before the first byte."""

    name: str
    bandwidth: float
    latency: float
    source: str


LINKS = (
    Link("NVLink 4", 450e9, 2e-6, "NVIDIA H100 data sheet: 900 GB/s, both directions together"),
    Link("InfiniBand NDR", 50e9, 5e-6, "400 Gb/s per port; the latency is assumed"),
    Link("Ethernet 100 Gb/s", 12.5e9, 20e-6, "IEEE 802.3; the latency is assumed"),
)


def hidden_from(shape: Shape, flop_rate: float, link: Link) -> float:
    """The tokens per device from which moving takes no longer than computing, latency apart."""
    return shape.n_kv_heads / shape.n_heads * shape.itemsize * flop_rate / link.bandwidth


def step_pairs(order: Order, world: int, per_rank: int, step: int, rank: int) -> float:
    """Visible pairs of ``rank`` in ``step``, causal and without padding: ``Plan.pairs`` in closed form."""
    validate.one_of("order", order, ORDERS)
    C, owner = per_rank, (rank - step) % world
    if order == "striped":
        return C * (C + 1) / 2 if owner <= rank else C * (C - 1) / 2
    if owner == rank:
        return C * (C + 1) / 2
    if order == "contiguous":
        return C * C if owner < rank else 0
    return C * C / 2  # zigzag: the pairs of two chunks out of four, whole


@dataclass(frozen=True)
class Timetable:
    """Seconds of one forward pass of one layer over the ring."""

    total: float
    computing: float  # of the rank that computes longest
    moving: float  # all blocks of one rank, one after the other

    @property
    def exposed(self) -> float:
        """The part of ``total`` in which the busiest rank waits."""
        return 1 - self.computing / self.total


def simulate(
    shape: Shape, world: int, per_rank: int, flop_rate: float, link: Link, order: Order = "striped"
) -> Timetable:
    """Every rank begins a step when it is done with the last and its block is there; links carry one block.

    ``flop_rate`` is the FLOP/s that a device reaches in attention. Causal; every block goes all the way.
    """
    moving = shape.block_bytes(per_rank) / link.bandwidth + link.latency
    done = torch.zeros(world, dtype=torch.float64)  # the end of the last step, per rank
    here = torch.zeros(world, dtype=torch.float64)  # when the block of this step is at each rank
    free = torch.zeros(world, dtype=torch.float64)  # when the link from each rank is free
    busy = torch.zeros(world, dtype=torch.float64)
    for step in range(world):
        pairs = [step_pairs(order, world, per_rank, step, rank) for rank in range(world)]
        seconds = torch.tensor([shape.flops(n) / flop_rate for n in pairs], dtype=torch.float64)
        begin = torch.maximum(done, here)
        done, busy = begin + seconds, busy + seconds
        free = torch.maximum(here, free) + moving
        here = free.roll(1)
    return Timetable(float(done.max()), float(busy.max()), moving * (world - 1))


def ring_bytes(shape: Shape, world: int, per_rank: int) -> int:
    """Bytes that a rank sends in one forward pass when every block goes all the way."""
    return (world - 1) * shape.block_bytes(per_rank)


def ulysses_bytes(shape: Shape, world: int, per_rank: int) -> int:
    """The same for DeepSpeed-Ulysses: queries, keys and values to the rank of their head, and outputs back.

    Every rank keeps 1/P of what it has and sends the rest. P must divide the KV heads.
    Source: Jacobs et al., "DeepSpeed Ulysses" (2023), section 3.2.
    """
    validate.divides("world", world, "n_kv_heads", shape.n_kv_heads)
    numbers = shape.batch * per_rank * shape.head_dim * (2 * shape.n_heads + 2 * shape.n_kv_heads)
    return numbers * shape.itemsize * (world - 1) // world


def measured_flop_rate(head_dim: int = 64, n_heads: int = 4, block: int = 512, repeats: int = 5) -> float:
    """FLOP/s of this machine's blockwise attention, forward: the median of ``repeats`` blocks."""
    q, k, v = torch.randn(3, 1, n_heads, block, head_dim)
    at, took = torch.arange(block), []
    for _ in range(repeats + 1):
        attended, begin = Attended(q, head_dim**-0.5, block), time.perf_counter()
        attended.add(k, v, at, at, Rule(causal=False))
        took.append(time.perf_counter() - begin)
    return 4 * n_heads * head_dim * block**2 / sorted(took[1:])[repeats // 2]
