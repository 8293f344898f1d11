"""One step of decode behind a long text: flat in its length where the cache stops growing."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kvlearn.attention import Cache
from kvlearn.attention.core import merge_heads, split_heads
from kvlearn.measure.results import Row
from kvlearn.measure.shared_bench.rows import agree, time_row
from kvlearn.measure.steps import next_token
from kvlearn.measure.timing import compare
from kvlearn.measure.window_bench import designs
from kvlearn.measure.window_bench.designs import DESIGNS, WITH_SINKS, Design, Layer, details
from kvlearn.measure.window_bench.reference import attend_in_layer

LENGTHS = (2048, 16384)  # full rings at both
ROUNDS = 31
FLAT = 1.1  # the longer text's step against the shorter's
Step = Callable[[], Tensor]
STEPS: dict[str, Design] = {"full": DESIGNS["full"], "window": DESIGNS["window"], **WITH_SINKS}


def step_rows(device: torch.device) -> Iterator[Row]:
    """The whole layer's step and its attention alone; the two lengths of one design by turns.

    Designs do not take turns: full attention reads so much that the next one's weights would leave the chip.
    """
    short, long = LENGTHS
    texts = {n: torch.randn(1, n, designs.D_MODEL, device=device) for n in LENGTHS}
    for name, design in STEPS.items():
        steps = {n: checked_steps(name, design, x) for n, x in texts.items()}
        for part in ("layer", "attention"):
            title = f"step, {part}, {name}"
            by_turns = compare({f"{n} tokens": steps[n][part] for n in LENGTHS}, rounds=ROUNDS)
            for n in LENGTHS:
                yield time_row(by_turns, title, f"{n} tokens", details("step_time", name, n, part=part))
            ratio = by_turns.ratio(f"{long} tokens", f"{short} tokens")
            found = details("step_growth", name, long, part=part, shorter=short)
            bar = None if name == "full" else FLAT
            yield Row(f"{title}: {long} / {short}", ratio.median, "x", bar, "<=", ratio, found)


def checked_steps(name: str, design: Design, x: Tensor) -> dict[str, Step]:
    """The last token of ``x`` behind all others, once it comes out as the equation says."""
    n = x.shape[1]
    layer = designs.new_layer(design, n, x.device)
    cache = layer.new_cache(batch=1, max_len=n)
    layer(x[:, :-1], cache)
    core = attention_alone(layer, x[:, -1:], cache)
    cache.length = n - 1
    step = next_token(layer, x[:, -1:], cache)
    expected = attend_in_layer(layer, x, design, [n - 1])
    through = partial(through_output, layer, core)
    agree({f"{name}, layer": step, f"{name}, attention": through}, expected)
    return {"layer": step, "attention": core}


def attention_alone(layer: Layer, x: Tensor, cache: Cache) -> Step:
    """What the last token's query does with what the cache holds."""
    kv = layer.project_kv(x, cache)
    q = layer.rope(split_heads(layer.q_proj(x), layer.n_heads), kv.positions)
    return partial(layer.attend, q, kv)


def through_output(layer: Layer, core: Step) -> Tensor:
    """The layer's output, from its attention."""
    return layer.o_proj(merge_heads(core()))
