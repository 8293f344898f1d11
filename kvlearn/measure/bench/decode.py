"""One decode step of attention on a GPU: the Triton kernel against the floor, torch, and its own stages.

Bandwidth and launch cost come first, and every result is checked against fp64 before it is timed. Without a
GPU the PyTorch forms are measured on the processor, in under a minute.
"""

from collections.abc import Iterator

import torch

from kvlearn.measure.decode_bench import cpu
from kvlearn.measure.decode_bench.bench import Bench, cuda_bench
from kvlearn.measure.decode_bench.ceilings import bandwidth, launch_cost, peak
from kvlearn.measure.decode_bench.grid import grid_jobs, stage_jobs
from kvlearn.measure.decode_bench.jobs import Deadline, Job, run_jobs
from kvlearn.measure.decode_bench.others import flex_jobs, library_jobs
from kvlearn.measure.decode_bench.special import special_jobs
from kvlearn.measure.results import Row

SECONDS = 510.0  # of the 9 minutes; what is left is for importing, recording and drawing


@torch.no_grad()
def run(device: torch.device) -> Iterator[Row]:
    torch.manual_seed(0)
    if device.type != "cuda":
        deadline = Deadline(cpu.SECONDS)
        yield from cpu.cpu_part(cpu.cpu_bench(), deadline)
    else:
        deadline = Deadline(SECONDS)
        yield from gpu_part(cuda_bench(device), deadline)


def gpu_part(bench: Bench, deadline: Deadline) -> Iterator[Row]:
    """Everything, the essential first."""
    yield from bandwidth(bench)
    bench.tidy()
    jobs = [
        Job("peak of a matrix product", lambda: peak(bench)),
        Job("cost of a launch", lambda: launch_cost(bench)),
        *grid_jobs(bench),
        *special_jobs(bench),
        *stage_jobs(bench),
        *flex_jobs(bench),
        *library_jobs(bench),
    ]
    rows: list[Row] = []
    for row in run_jobs(jobs, deadline, bench.tidy, bench.failures):
        rows.append(row)
        yield row
    yield from verdicts(rows)


def verdicts(rows: list[Row]) -> Iterator[Row]:
    """How many bars were met, and how many goals."""
    barred = [row for row in rows if row.passed is not None]
    met = sum(row.passed is True for row in barred)
    yield Row("bars met", met, f"of {len(barred)}", bar=len(barred), details={"what": "bars_met"})
    goals = [row.details["goal_met"] for row in rows if "goal_met" in row.details]
    yield Row("goals reached", sum(goals), f"of {len(goals)}", details={"what": "goals_met"})
