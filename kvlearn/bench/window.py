"""Windows and patterns: how time and memory grow with the text, steps of decode, bytes stored and read.

All at one width. Before anything is timed, some queries (first, last, others between) are compared with the
equation in fp64 over all keys that each may see, as ``Design.visible`` writes it down once more. Steps where
a token selects by content what it reads are in ``sparse``.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from kvlearn.attention import KV, Cache, FullAttention, SparseAttention, WindowAttention, patterns
from kvlearn.attention.core import merge_heads, split_heads
from kvlearn.attention.patterns import Pattern, Random
from kvlearn.bench import sparse
from kvlearn.bench.common import Bars, Part, agree, by_label, growth_rows, label, ratio_row, time_row
from kvlearn.measure.memory import peak_memory
from kvlearn.measure.results import Row
from kvlearn.measure.steps import next_token
from kvlearn.measure.timing import Comparison, compare
from kvlearn.measure.units import GIB

SPEEDUP = 5.0  # a window's prefill against full attention's, at the longest
FLAT = 1.1  # the step behind the longer text against that behind the shorter, at most
LINEAR, ROOT = 1.15, 1.65  # the most that exponents of time and memory may be: of N, of N√N
ROUNDS, STEP_ROUNDS, LAYER_ROUNDS = 5, 31, 3
SAMPLES = 32  # queries between the first and the last that are compared

Layer = FullAttention | WindowAttention | SparseAttention
Core = Callable[[], Tensor]

GROWN = ("full", "window", "longformer", "bigbird", "strided", "fixed")  # over the length, in prefill
TRAINED = ("window",)
RINGS = ("window", "window, sinks", "window, sink logits")
STEPS = ("full", *RINGS)


@dataclass(frozen=True)
class Sizes:
    """The width and the designs' own numbers; lengths in tokens."""

    d_model: int = 256
    n_heads: int = 4
    window: int = 512
    n_sinks: int = 4
    n_global: int = 16
    block: int = 64  # BigBird's
    n_random: int = 3
    summary: int = 8  # of the fixed form of the Sparse Transformer
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    steps: tuple[int, int] = (2048, 16384)  # full rings at both
    bytes: tuple[int, ...] = (16384, 131072)
    prompt: int = 16384
    long_prompt: int = 32768
    most: int = GIB  # bytes of extra memory over the long prompt

    def details(self, what: str, name: str, length: int, **more: Any) -> dict[str, Any]:
        """To find a row again; ``what`` and ``name`` say which."""
        shape = {"d_model": self.d_model, "n_heads": self.n_heads, "window": self.window}
        place = {"what": what, "name": name, "family": FAMILIES.get(name, "sparse")}
        return {**place, **shape, "length": length, "batch": 1, **more}


SIZES = Sizes()
SMALL = Sizes(
    d_model=16,
    n_heads=2,
    window=8,
    n_sinks=2,
    n_global=3,
    block=4,
    summary=2,
    lengths=(16, 32, 64, 128),
    steps=(32, 64),
    bytes=(64, 81),
    prompt=40,
    long_prompt=48,
)


def parts(device: torch.device, small: bool = False) -> list[Part]:
    """The parts of this benchmark, on ``device``."""
    sizes = SMALL if small else SIZES
    return [
        Part("bytes", lambda: size_rows(sizes, device)),
        Part("step", lambda: step_rows(sizes, device)),
        *sparse.parts(device, small),
        Part("prefill", lambda: prefill_rows(sizes, device)),
        Part("train", lambda: train_rows(sizes, device)),
        Part("layer", lambda: layer_rows(sizes, device)),
        Part("long prompt", lambda: memory_rows(sizes, device)),
    ]


# Designs, and the equation that each must give

NO_BARS = Bars()
FAMILIES = {"full": "full"} | dict.fromkeys(RINGS, "sliding")  # of colours; the others are sparse


@dataclass(frozen=True)
class Design:
    """``layer(n)``: one for texts of n tokens. ``visible(n, t, s)``: whether t attends to each of the s ≤ t.

    ``bars``: the most that its exponents over the length may be.
    """

    layer: Callable[[int], Layer]
    visible: Callable[[int, int, Tensor], Tensor]
    bars: Bars = NO_BARS


def designs(sizes: Sizes) -> dict[str, Design]:
    """All designs, by name."""
    shape, w, summary = (sizes.d_model, sizes.n_heads), sizes.window, sizes.summary
    linear = Bars(LINEAR, LINEAR)

    def window(**options: Any) -> Callable[[int], Layer]:
        return lambda n: WindowAttention(*shape, window=w, **options)

    def with_sink_logits(n: int) -> Layer:
        layer = WindowAttention(*shape, window=w, sink_logits=True)
        nn.init.normal_(layer.sink_logits)  # type: ignore[arg-type]
        return layer

    def pattern(of: Callable[[int], Pattern]) -> Callable[[int], Layer]:
        return lambda n: SparseAttention(*shape, pattern=of(n))

    def in_window(n: int, t: int, s: Tensor) -> Tensor:
        return t - s < w

    def longformer(n: int, t: int, s: Tensor) -> Tensor:
        return (t - s < w) | (s < sizes.n_global) | torch.tensor(t < sizes.n_global)

    def bigbird(n: int, t: int, s: Tensor) -> Tensor:
        block, key_block = t // sizes.block, s // sizes.block
        rule = Random(sizes.n_random, sizes.block, skip_first=1, skip_last=1)
        drawn = torch.tensor(rule.draw(block), dtype=torch.int64)
        near = block - key_block < 2
        return near | (key_block == 0) | torch.tensor(block == 0) | torch.isin(key_block, drawn)

    return {
        "full": Design(lambda n: FullAttention(*shape), lambda n, t, s: s >= 0),
        "window": Design(window(), in_window, linear),
        "longformer": Design(pattern(lambda n: patterns.longformer(w, sizes.n_global)), longformer, linear),
        "bigbird": Design(pattern(lambda n: patterns.bigbird(sizes.block, sizes.n_random)), bigbird, linear),
        "strided": Design(
            pattern(lambda n: patterns.sparse_transformer(root(n))),
            lambda n, t, s: (t - s < root(n)) | ((t - s) % root(n) == 0),
            Bars(time=ROOT),
        ),
        "fixed": Design(
            pattern(lambda n: patterns.sparse_transformer_fixed(root(n), summary)),
            lambda n, t, s: (s // root(n) == t // root(n)) | (s % root(n) >= root(n) - summary),
            Bars(time=ROOT),
        ),
        "window, sinks": Design(
            window(n_sinks=sizes.n_sinks), lambda n, t, s: (t - s < w) | (s < sizes.n_sinks)
        ),
        "window, sink logits": Design(with_sink_logits, in_window),
    }


def root(n: int) -> int:
    """The stride, or block, of a Sparse Transformer: √n to the nearest."""
    return (isqrt(4 * n) + 1) // 2


def new_layer(design: Design, n: int, device: torch.device) -> Layer:
    """A design's layer for texts of ``n`` tokens."""
    with device:
        return design.layer(n).eval()


def some_queries(n: int) -> list[int]:
    """First and last, and others drawn between them."""
    between = range(1, n - 1)
    return sorted({0, n - 1, *random.Random(n).sample(between, min(SAMPLES, len(between)))})


def attend(
    q: Tensor, k: Tensor, v: Tensor, design: Design, at: list[int], sink_logits: Tensor | None = None
) -> Tensor:
    """The queries at the positions ``at`` alone, in fp64: (B, H, len(at), D) from all of q, k and v.

    softmax over [scores of the visible keys, the sink's logit], without the sink's weight.
    """
    n = k.shape[2]
    s = torch.arange(n)
    visible = torch.stack([(s <= t) & design.visible(n, t, s) for t in at]).to(k.device)
    scores = q[:, :, at].double() @ k.double().mT / k.shape[3] ** 0.5
    scores = scores.masked_fill(~visible, -torch.inf)
    if sink_logits is not None:
        sinks = sink_logits.double()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    return scores.softmax(-1)[..., :n] @ v.double()


def attend_in_layer(layer: Layer, x: Tensor, design: Design, at: list[int]) -> Tensor:
    """The same between the layer's own projections: its output at the positions ``at``."""
    k, v, positions = layer.project_kv(x)
    q = layer.rope(split_heads(layer.q_proj(x), layer.n_heads), positions)
    logits = getattr(layer, "sink_logits", None)
    assert logits is None or isinstance(logits, nn.Parameter)
    heads = attend(q, k, v, design, at, logits)
    return layer.o_proj(merge_heads(heads).to(x.dtype))


# Bytes


@torch.no_grad()
def size_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Bytes of one sequence in fp32, by formula: beside what is allocated and what the last token sees."""
    for n in sizes.bytes:
        s = torch.arange(n)
        for name, design in designs(sizes).items():
            layer = new_layer(design, n, torch.device("cpu"))
            allocated = layer.new_cache(batch=1, max_len=n, device=device).nbytes
            visible = int(design.visible(n, n - 1, s).sum())
            per_token = 2 * layer.n_kv_heads * layer.head_dim * torch.float32.itemsize
            stored, read = layer.cache_bytes(n), layer.read_bytes(n)
            amounts = {"stored": stored, "read": read, "dtype": "float32"}
            found, title = sizes.details("stored", name, n, **amounts), f"{n} tokens: {name}"
            yield Row(f"{title}, stored", allocated, "B", stored, "==", details=found)
            found = sizes.details("read", name, n, **amounts)
            yield Row(f"{title}, read by a step", read, "B", visible * per_token, "==", details=found)


# Steps of decode: flat in the length where the cache stops growing


@torch.no_grad()
def step_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The whole layer's step and its attention alone; the two lengths of one design interleaved.

    Designs are not interleaved: full attention reads so much that the next one's weights would leave the
    caches of the processor.
    """
    short, long = sizes.steps
    texts = {n: torch.randn(1, n, sizes.d_model, device=device) for n in sizes.steps}
    for name in STEPS:
        steps = {n: checked_steps(name, designs(sizes)[name], x) for n, x in texts.items()}
        for part in ("layer", "attention"):
            title = f"step, {part}, {name}"
            compared = compare({f"{n} tokens": steps[n][part] for n in sizes.steps}, rounds=STEP_ROUNDS)
            for n in sizes.steps:
                found = sizes.details("step_time", name, n, part=part)
                yield time_row(compared, title, f"{n} tokens", found)
            ratio = compared.ratio(f"{long} tokens", f"{short} tokens")
            found = sizes.details("step_growth", name, long, part=part, shorter=short)
            bar = None if name == "full" else FLAT
            yield Row(f"{title}: {long} / {short}", ratio.median, "x", bar, "<=", ratio, found)


def checked_steps(name: str, design: Design, x: Tensor) -> dict[str, Core]:
    """The last token of ``x`` behind all others, once it comes out as the equation says."""
    n = x.shape[1]
    layer = new_layer(design, n, x.device)
    cache = layer.new_cache(batch=1, max_len=n)
    layer(x[:, :-1], cache)
    core = attention_alone(layer, x[:, -1:], cache)
    cache.length = n - 1
    step = next_token(layer, x[:, -1:], cache)
    expected = attend_in_layer(layer, x, design, [n - 1])
    through = partial(through_output, layer, core)
    agree({f"{name}, layer": step, f"{name}, attention": through}, expected)
    return {"layer": step, "attention": core}


def attention_alone(layer: Layer, x: Tensor, cache: Cache) -> Core:
    """The attention of the last token's query over the contents of the cache."""
    kv = layer.project_kv(x, cache)
    q = layer.rope(split_heads(layer.q_proj(x), layer.n_heads), kv.positions)
    return partial(layer.attend, q, kv)


def through_output(layer: Layer, core: Core) -> Tensor:
    """The layer's output, from its attention."""
    return layer.o_proj(merge_heads(core()))


# Growth with the length: attention alone, without projections


@torch.no_grad()
def prefill_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Attention of a whole text, every design at every length interleaved."""
    calls: dict[str, dict[int, Core]] = {name: {} for name in GROWN}
    for n in sizes.lengths:
        given = draw(sizes, n, device)
        for name in GROWN:
            calls[name][n] = checked_core(name, designs(sizes)[name], *given)
    compared = compare(by_label(calls), rounds=ROUNDS)
    yield from growth_of("prefill", calls, compared, sizes, device)
    longest = sizes.lengths[-1]
    for name in GROWN[1:]:
        found = sizes.details("prefill_speedup", name, longest)
        bar = SPEEDUP if name == "window" else None
        yield ratio_row(compared, "prefill", label("full", longest), label(name, longest), found, bar=bar)


@torch.no_grad()
def train_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The same forward and backward, to the gradients of queries, keys and values."""
    calls: dict[str, dict[int, Core]] = {name: {} for name in TRAINED}
    for n in sizes.lengths:
        given = draw(sizes, n, device)
        for name in TRAINED:
            calls[name][n] = checked_train_step(name, designs(sizes)[name], *given)
    compared = compare(by_label(calls), rounds=ROUNDS)
    yield from growth_of("train", calls, compared, sizes, device)


def draw(sizes: Sizes, n: int, device: torch.device) -> Tensor:
    """Queries, keys and values of ``n`` tokens, in one tensor."""
    return torch.randn(3, 1, sizes.n_heads, n, sizes.d_model // sizes.n_heads, device=device)


def checked_core(name: str, design: Design, q: Tensor, k: Tensor, v: Tensor) -> Core:
    """A design's attention, once it has given what the equation gives."""
    n = q.shape[2]
    layer = new_layer(design, n, q.device)
    kv = KV(k, v, torch.arange(n, device=q.device)[None])

    def core() -> Tensor:
        return layer.attend(q, kv)

    at = some_queries(n)
    agree({name: lambda: core()[:, :, at]}, attend(q, k, v, design, at))
    return core


def checked_train_step(name: str, design: Design, q: Tensor, k: Tensor, v: Tensor) -> Core:
    """Forward and backward of a design, once some of its queries have sent back the right gradients."""
    n = q.shape[2]
    layer = new_layer(design, n, q.device)
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
    part: str, calls: dict[str, dict[int, Core]], compared: Comparison, sizes: Sizes, device: torch.device
) -> Iterator[Row]:
    """Time and extra memory at every length, and the exponents from four windows on.

    Below four windows most of a text is inside the window: those lengths are shown and not fitted.
    """
    bars = {name: design.bars for name, design in designs(sizes).items()}
    least = 4 * sizes.window
    yield from growth_rows(part, calls, compared, device, bars=bars, details=sizes.details, least=least)


# Whole layers over a long prompt, projections and RoPE included


@torch.no_grad()
def layer_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """A window's layer against full attention's."""
    n = sizes.prompt
    x = torch.randn(1, n, sizes.d_model, device=device)
    calls: dict[str, Core] = {}
    for name in ("full", "window"):
        design = designs(sizes)[name]
        layer = new_layer(design, n, device)
        calls[name] = partial(layer, x)
        check_layer(name, calls[name], layer, x, design)
    compared = compare(calls, rounds=LAYER_ROUNDS)
    title = f"layer {sizes.d_model}, prompt of {n}"
    for name in calls:
        yield time_row(compared, title, name, sizes.details("layer_time", name, n))
    yield ratio_row(compared, title, "full", "window", sizes.details("layer_speedup", "window", n))


@torch.no_grad()
def memory_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """A very long prompt through a window's layer: into its ring, whose own memory counts, and without."""
    n = sizes.long_prompt
    x = torch.randn(1, n, sizes.d_model, device=device)
    for name in RINGS:
        design = designs(sizes)[name]
        layer = new_layer(design, n, device)
        calls = {"without a cache": partial(layer, x), "into its ring": partial(into_cache, layer, x)}
        for how, call in calls.items():
            check_layer(f"{name}, {how}", call, layer, x, design)
            found = sizes.details("layer_memory", name, n, way=how)
            title = f"layer {sizes.d_model}, prompt of {n}, extra memory: {name}, {how}"
            yield Row(title, peak_memory(call, device), "B", sizes.most, "<=", details=found)


def into_cache(layer: Layer, x: Tensor) -> Tensor:
    """A prompt in one pass into a new cache."""
    return layer(x, layer.new_cache(batch=len(x), max_len=x.shape[1]))


def check_layer(name: str, call: Core, layer: Layer, x: Tensor, design: Design) -> None:
    """Raise AssertionError unless some tokens of a prompt come out as the equation says."""
    at = some_queries(x.shape[1])
    agree({name: lambda: call()[:, at]}, attend_in_layer(layer, x, design, at))
