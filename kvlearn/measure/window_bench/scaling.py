"""How time and memory of attention grow with the length: measured from 1K to 16K tokens, and the exponents.

Every design at every length takes its turn in every round, so that whatever slows the machine meets all of
them alike. An exponent is the slope of log(time) over log(N), fitted round by round; memory is counted
exactly and fitted once. Below four windows most of a text is inside the window: those lengths are shown
and not fitted.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvlearn.attention import KV
from kvlearn.measure.results import Row
from kvlearn.measure.shared_bench.growth import Bars, Core, by_label, growth_rows, label
from kvlearn.measure.shared_bench.rows import agree, ratio_row
from kvlearn.measure.timing import Comparison, compare
from kvlearn.measure.window_bench import designs
from kvlearn.measure.window_bench.designs import DESIGNS, Design, details
from kvlearn.measure.window_bench.reference import attend, some_queries

LENGTHS = (1024, 2048, 4096, 8192, 16384)
ROUNDS = 5
SPEEDUP = 5.0  # a window against full attention, at the longest
TRAINED = ("window",)


def prefill_rows(device: torch.device) -> Iterator[Row]:
    """Attention of a whole text, without projections."""
    calls: dict[str, dict[int, Core]] = {name: {} for name in DESIGNS}
    for n in LENGTHS:
        given = draw(n, device)
        for name, design in DESIGNS.items():
            calls[name][n] = checked_core(name, design, *given)
    by_turns = compare(by_label(calls), rounds=ROUNDS)
    yield from growth_of("prefill", calls, by_turns, device)
    longest = LENGTHS[-1]
    for name in list(DESIGNS)[1:]:
        found = details("prefill_speedup", name, longest)
        bar = SPEEDUP if name == "window" else None
        yield ratio_row(by_turns, "prefill", label("full", longest), label(name, longest), found, bar=bar)


def train_rows(device: torch.device) -> Iterator[Row]:
    """The same forward and backward, to the gradients of queries, keys and values."""
    calls: dict[str, dict[int, Core]] = {name: {} for name in TRAINED}
    for n in LENGTHS:
        given = draw(n, device)
        for name in TRAINED:
            calls[name][n] = checked_train_step(name, DESIGNS[name], *given)
    by_turns = compare(by_label(calls), rounds=ROUNDS)
    yield from growth_of("train", calls, by_turns, device)


def draw(n: int, device: torch.device) -> Tensor:
    """Queries, keys and values of ``n`` tokens, in one tensor."""
    head_dim = designs.D_MODEL // designs.N_HEADS
    return torch.randn(3, 1, designs.N_HEADS, n, head_dim, device=device)


def checked_core(name: str, design: Design, q: Tensor, k: Tensor, v: Tensor) -> Core:
    """A design's attention, once it has given what the equation gives."""
    n = q.shape[2]
    layer = designs.new_layer(design, n, q.device)
    kv = KV(k, v, torch.arange(n, device=q.device)[None])

    def core() -> Tensor:
        return layer.attend(q, kv)

    at = some_queries(n)
    agree({name: lambda: core()[:, :, at]}, attend(q, k, v, design, at))
    return core


def checked_train_step(name: str, design: Design, q: Tensor, k: Tensor, v: Tensor) -> Core:
    """Forward and backward of a design, once some of its queries have sent back the right gradients."""
    n = q.shape[2]
    layer = designs.new_layer(design, n, q.device)
    positions = torch.arange(n, device=q.device)[None]
    upstream = torch.randn_like(v)

    def step(upstream: Tensor = upstream) -> Tensor:
        with torch.enable_grad():
            q_, k_, v_ = leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = layer.attend(q_, KV(k_, v_, positions))
            return torch.stack(torch.autograd.grad(out, leaves, upstream))

    at = some_queries(n)
    here = torch.zeros_like(upstream)
    here[:, :, at] = upstream[:, :, at]
    with torch.enable_grad():
        q_, k_, v_ = leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
        out = attend(q_, k_, v_, design, at)
        expected = torch.autograd.grad(out, leaves, upstream[:, :, at].double())
    agree({name: lambda: step(here)}, torch.stack(expected))
    return step


def growth_of(
    part: str, calls: dict[str, dict[int, Core]], by_turns: Comparison, device: torch.device
) -> Iterator[Row]:
    """Time and extra memory at every length, and the exponents from four windows on."""
    bars = {name: Bars(design.time, design.memory) for name, design in DESIGNS.items()}
    least = 4 * designs.WINDOW
    yield from growth_rows(part, calls, by_turns, device, bars=bars, details=details, least=least)
