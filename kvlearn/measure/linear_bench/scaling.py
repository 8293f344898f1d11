"""How time and memory of the mixing cores grow with the length, from 1K to 16K tokens, and the exponents.

Every core at every length takes its turn in every round, so that whatever slows the machine meets all of them
alike. All lengths are fitted: a core over a state is linear from its second chunk on.
"""

from collections.abc import Iterator

import torch

from kvlearn.measure.linear_bench.cores import CORES, checked_core
from kvlearn.measure.linear_bench.designs import details
from kvlearn.measure.results import Row
from kvlearn.measure.shared_bench.growth import Bars, by_label, growth_rows, label
from kvlearn.measure.shared_bench.rows import ratio_row
from kvlearn.measure.timing import compare

LENGTHS = (1024, 2048, 4096, 8192, 16384)
AT = 8192  # where they are compared with full attention
ROUNDS = 5
SPEEDUP = 3.0
HELD = ("linear", "gated_delta")  # to the bars
GROWTH = Bars(time=1.15, memory=1.15)


def prefill_rows(device: torch.device) -> Iterator[Row]:
    """A whole text through each core; SDPA, causal, for full attention."""
    calls = {name: {n: checked_core(name, n, device) for n in LENGTHS} for name in CORES}
    by_turns = compare(by_label(calls), rounds=ROUNDS)
    bars = dict.fromkeys(HELD, GROWTH)
    yield from growth_rows("prefill", calls, by_turns, device, bars=bars, details=details)
    for name in list(CORES)[1:]:
        bar = SPEEDUP if name in HELD else None
        found = details("prefill_speedup", name, AT)
        yield ratio_row(by_turns, "prefill", label("full", AT), label(name, AT), found, bar=bar)
