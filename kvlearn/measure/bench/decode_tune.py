"""Tilings and splits of the decode kernel tried on a GPU, for kvlearn/kernels/tiling.py to be updated from.

The bar of each form: the present choice takes at most 1.03 times as long as the best that was found.
"""

from collections.abc import Iterator

import torch

from kvlearn.measure.decode_bench.bench import Bench, cuda_bench
from kvlearn.measure.decode_bench.ceilings import bandwidth
from kvlearn.measure.decode_bench.contest import note
from kvlearn.measure.decode_bench.jobs import Deadline, run_jobs
from kvlearn.measure.decode_bench.tune import tune_jobs
from kvlearn.measure.results import Row

SECONDS = 450.0  # of 8 minutes


@torch.no_grad()
def run(device: torch.device) -> Iterator[Row]:
    torch.manual_seed(0)
    if device.type != "cuda":
        yield note("no GPU: nothing to tune")
        return
    deadline = Deadline(SECONDS)
    yield from tune(cuda_bench(device), deadline)


def tune(bench: Bench, deadline: Deadline) -> Iterator[Row]:
    """Splits, then tilings, form by form."""
    yield from bandwidth(bench)
    bench.tidy()
    yield from run_jobs(tune_jobs(bench), deadline, bench.tidy, bench.failures)
