"""Many devices: the memory of a blockwise layer, and what each rank of a ring of processes does and sends.

All of it runs on CPUs. Memory at the longest length is that of a process of its own, as the system counts it:
the profiler behind ``peak_memory`` would keep a record of each of millions of allocations. Wall time of a
ring is not measured, because its processes share the cores of one machine; work and bytes are counted.
"""

import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from kvlearn.attention.core import attention, causal_mask, merge_heads, split_heads
from kvlearn.bench.common import Part, agree
from kvlearn.measure.memory import peak_memory
from kvlearn.measure.results import Row
from kvlearn.measure.units import GIB
from kvlearn.model import Decoder, ModelConfig
from kvlearn.model.decoder import Block
from kvlearn.parallel import Layout, Plan, blockwise_layer, launch
from kvlearn.parallel.blockwise import project
from kvlearn.parallel.demo import compare
from kvlearn.parallel.layout import ORDERS
from kvlearn.parallel.simulate import Shape

MEMORY_BAR = GIB  # extra memory of the longest sequence, forward and backward, at most
DIFFERENCE_BAR = 1e-5  # between the ring and one device, at most
BALANCE_BAR = 1.05  # the work of the busiest rank over the mean, in an order made for balance, at most

Layer = Callable[[Block, Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """The layer, the lengths at which its memory is measured, and the ring."""

    d_model: int = 256
    n_heads: int = 4
    d_ff: int = 1024
    block: int = 512
    compared: int = 4096  # tokens at which the plain form is compared
    long: int = 65_536
    world: int = 4
    tokens: int = 1001  # in the ring; the ranks do not divide them
    n_query_heads: int = 8  # of the ring, over its KV heads
    n_kv_heads: int = 2
    head_dim: int = 32

    @property
    def shape(self) -> Shape:
        """Attention in the ring, in fp32."""
        return Shape(self.n_query_heads, self.n_kv_heads, self.head_dim, itemsize=4)


SIZES = Sizes()
SMALL = Sizes(
    d_model=32,
    d_ff=128,
    block=32,
    compared=128,
    long=256,
    world=2,
    tokens=43,
    n_query_heads=2,
    n_kv_heads=1,
    head_dim=8,
)


def parts(device: torch.device, small: bool = False) -> list[Part]:
    """The parts of this benchmark; ``device`` changes nothing."""
    sizes = SMALL if small else SIZES
    rings = [Part(f"ring, {order}", partial(ring_rows, order, sizes)) for order in ORDERS]
    return [
        *rings,
        Part("plain layer", lambda: plain_rows(sizes)),
        Part("long layer", lambda: long_rows(sizes)),
    ]


# Memory of one layer


def new_layer(sizes: Sizes) -> Block:
    """One layer with full attention and a feed-forward."""
    config = ModelConfig(1, sizes.d_model, 1, sizes.n_heads, d_ff=sizes.d_ff)
    layer = Decoder(config).blocks[0]
    assert isinstance(layer, Block)
    return layer


def plain_layer(layer: Block, x: Tensor) -> Tensor:
    """The same layer with the scores of all queries and keys, and all hidden numbers, at the same time."""
    mixer: Any = layer.mixer
    T = x.shape[1]
    at = torch.arange(T)
    q = mixer.rope(split_heads(mixer.q_proj(layer.mixer_norm(x)), mixer.n_heads), at[None])
    heads = attention(q, *project(layer, x, at), causal_mask(T, T))
    x = x + layer.mixer_post_norm(mixer.o_proj(merge_heads(heads)))
    assert layer.mlp is not None
    return x + layer.mlp_post_norm(layer.mlp(layer.mlp_norm(x)))


def forward_and_backward(compute: Layer, layer: Block, x: Tensor, d_y: Tensor) -> Tensor:
    """The output; the gradients are left in ``x`` and in the weights."""
    y = compute(layer, x)
    y.backward(d_y)
    return y.detach()


def new_input(n_tokens: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """The input of a layer, and the gradient of its output."""
    x, d_y = (torch.randn(1, n_tokens, sizes.d_model) for _ in range(2))
    return x.requires_grad_(), d_y


def plain_rows(sizes: Sizes) -> Iterator[Row]:
    """Extra memory of both forms at a length at which the plain one fits; they give the same first."""
    layer, n = new_layer(sizes), sizes.compared
    forms: dict[str, Layer] = {
        "plain": plain_layer,
        "blockwise": partial(blockwise_layer, block=sizes.block),
    }
    x, d_y = new_input(n, sizes)
    results = {}
    for name, form in forms.items():
        layer.zero_grad()
        x.grad = None
        y = forward_and_backward(form, layer, x, d_y)
        results[name] = [y, x.grad, *(weight.grad for weight in layer.parameters())]
    for got, expected in zip(results["blockwise"], results["plain"], strict=True):
        assert got is not None
        assert expected is not None
        agree(
            {"blockwise": partial(torch.Tensor.detach, got)},
            expected,
            atol=1e-4 * float(expected.abs().max()),
        )
    del results, got, expected, y
    peaks = {}
    for name, form in forms.items():  # the gradients are there: what is measured adds to them
        peaks[name] = peak_memory(partial(forward_and_backward, form, layer, x, d_y))
        details = {"what": "layer_memory", "who": name, "length": n, "counted": "allocator"}
        yield Row(f"layer, {n} tokens: {name}, extra memory", peaks[name], "B", details=details)
    details = {"what": "layer_memory_ratio", "who": "plain", "base": "blockwise", "length": n}
    ratio = peaks["plain"] / peaks["blockwise"]
    yield Row(f"layer, {n} tokens: extra memory, plain / blockwise", ratio, "x", details=details)


def long_rows(sizes: Sizes) -> Iterator[Row]:
    """Extra resident memory of a blockwise layer, forward and backward, at a length that needs it."""
    n = sizes.long
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        peak, seconds = pool.submit(resident_peak, sizes, torch.get_num_threads()).result()
    details = {"who": "blockwise", "length": n, "counted": "resident"}
    title = f"layer, {n} tokens: blockwise"
    bar = MEMORY_BAR
    yield Row(f"{title}, extra memory", peak, "B", bar, "<=", details={"what": "layer_memory", **details})
    yield Row(f"{title}, forward and backward", seconds, "s", details={"what": "layer_time", **details})


def resident_peak(sizes: Sizes, n_threads: int) -> tuple[int, float]:
    """Bytes by which the resident memory of this process rises at most, and seconds.

    Input, weights and their gradients are there before; the output and the gradient of the input count. An
    upper bound where this process once had more than it has when the measurement begins.
    """
    torch.manual_seed(0)
    torch.set_num_threads(n_threads)
    layer = new_layer(sizes)
    compute = partial(blockwise_layer, block=sizes.block)
    forward_and_backward(compute, layer, *new_input(2 * sizes.block, sizes))  # what happens once happens here
    x, d_y = new_input(sizes.long, sizes)
    before, begin = psutil.Process().memory_info().rss, time.perf_counter()
    forward_and_backward(compute, layer, x, d_y)
    return highest_resident() - before, time.perf_counter() - begin


def highest_resident() -> int:
    """Most bytes that this process has had in memory so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; its ru_maxrss is at least that of the parent process
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


# A ring of processes


def ring_rows(order: str, sizes: Sizes) -> Iterator[Row]:
    """The difference from one device, the work of every rank, and the bytes it sends, with the formula."""
    shape, n = sizes.shape, sizes.tokens
    heads = (shape.n_heads, shape.n_kv_heads, shape.head_dim)
    ranks = launch(compare, sizes.world, n, *heads, order, None, seconds=120.0)
    details = {"order": order, "world": sizes.world, "length": n}
    for what, column in (("output", "output differs by"), ("gradients", "gradients differ by")):
        differs = max(rank[column] for rank in ranks)
        found = {"what": f"{what}_difference", **details}
        title = f"{order}, {sizes.world} ranks: {what}, largest difference"
        yield Row(title, differs, "of 1", DIFFERENCE_BAR, "<=", details=found)

    work = [rank["visible pairs"] for rank in ranks]
    mean = sum(work) / len(work)
    for rank, pairs in enumerate(work):
        found = {"what": "work", "rank": rank, "pairs": pairs, **details}
        yield Row(f"{order}, rank {rank}: work over the mean", pairs / mean, "x", details=found)
    bar = None if order == "contiguous" else BALANCE_BAR
    found = {"what": "busiest", "pairs": work, **details}
    yield Row(
        f"{order}: work of the busiest rank over the mean", max(work) / mean, "x", bar, "<=", details=found
    )

    plan = Plan(Layout(n, sizes.world, order))  # type: ignore[arg-type]
    block = shape.block_bytes(plan.layout.per_rank)
    for rank, sent in enumerate(ranks):
        messages = {
            "forward": plan.n_sent(rank),
            "backward": 2 * plan.n_sent(rank) + plan.n_returned(rank),  # fp32 gradients are as large
        }
        for way, count in messages.items():
            found = {"what": "sent", "way": way, "rank": rank, "messages": count, **details}
            title = f"{order}, rank {rank}: sent {way}"
            yield Row(title, sent[f"bytes sent {way}"], "B", count * block, "==", details=found)
