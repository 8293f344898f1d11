"""One step of decode behind a short and a very long text: a state reads the same, whatever it has seen."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvlearn.measure.linear_bench import designs
from kvlearn.measure.linear_bench.designs import details, state_names
from kvlearn.measure.results import Row
from kvlearn.measure.shared_bench.rows import time_row
from kvlearn.measure.steps import last_token
from kvlearn.measure.timing import compare
from kvlearn.measure.window_bench.chosen import checked_step

LENGTHS = (1024, 65536)
CHUNK = 4096  # tokens a pass, to prefill
ROUNDS = 301  # of one step each: on a busy machine a longer block meets more of what else runs
FLAT = 1.1  # the longer text's step against the shorter's


def step_rows(device: torch.device) -> Iterator[Row]:
    """The whole layer's step behind all of a text; the two lengths of one mechanism by turns.

    States have really seen the text. Full attention's cache is filled with random numbers, which it reads in
    the same time.
    """
    short, long = LENGTHS
    x = torch.randn(1, long, designs.D_MODEL, device=device)
    for name in ("full", *state_names()):
        layer = designs.new_layer(name, device)
        steps: dict[str, Callable[[], Tensor]] = {}
        for n in LENGTHS:
            if name == "full":
                steps[f"{n} tokens"] = last_token(layer, 1, n)
            else:
                steps[f"{n} tokens"] = checked_step(name, layer, x[:, :n], chunk=CHUNK, room=ROUNDS + 2)
        by_turns = compare(steps, rounds=ROUNDS, min_block_time=0)
        title = f"step, {name}"
        for n in LENGTHS:
            yield time_row(by_turns, title, f"{n} tokens", details("step_time", name, n))
        ratio = by_turns.ratio(f"{long} tokens", f"{short} tokens")
        bar = None if name == "full" else FLAT
        found = details("step_growth", name, long, shorter=short)
        yield Row(f"{title}: {long} / {short}", ratio.median, "x", bar, "<=", ratio, found)
