"""Looks for a better tiling of each form of the kernel: one number at a time, each from the best so far."""

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial

import torch

from kvlearn.kernels.tiling import Tiling
from kvlearn.measure.decode_bench.bench import Bench
from kvlearn.measure.decode_bench.cells import Cell, cell
from kvlearn.measure.decode_bench.contest import compete
from kvlearn.measure.decode_bench.jobs import Deadline, Job
from kvlearn.measure.decode_bench.own import own, present_tiling
from kvlearn.measure.results import Row
from kvlearn.measure.units import KIB

SECONDS_A_FORM = 34.0
CHOICES = {
    "block_n": (16, 32, 64, 128),
    "num_stages": (2, 3, 4, 5, 6),
    "num_warps": (2, 4, 8),
    "block_h": (16, 32, 64),
}
SPLITS = (1, 2, 4, 8, 16, 32, 64, 128)

# A large cell for the tiling, and those whose splits are looked at.
FORMS: tuple[Cell, ...] = (
    cell("GQA 32/4", 32, 16 * KIB),
    cell("MHA 32/32", 8, 16 * KIB),
    cell("MQA 32/1", 128, 16 * KIB),
    cell("MLA 128", 64, 8 * KIB),
    cell("MLA 16", 64, 8 * KIB),
    cell("GQA 32/4", 32, 16 * KIB, page=64),
    cell("GQA 32/4", 32, 16 * KIB, page=16),
    cell("GQA 64/8", 32, 16 * KIB, kv_dtype=torch.float8_e4m3fn),
    cell("GQA 64/8", 32, 16 * KIB, kv_dtype=torch.int8),
    replace(cell("GQA 32/4", 32, 16 * KIB, head_dim=64), form="GQA 32/4, D=64"),
    replace(cell("GQA 32/4", 16, 16 * KIB, head_dim=256), form="GQA 32/4, D=256"),
)
SPLIT_CELLS: tuple[Cell, ...] = (
    cell("GQA 32/4", 1, 64 * KIB),
    cell("GQA 32/4", 1, 4 * KIB),
    cell("GQA 64/8", 8, 16 * KIB),
    cell("MQA 32/1", 8, 16 * KIB),
    cell("MHA 32/32", 1, 64 * KIB),
    cell("MLA 16", 1, 64 * KIB),
)


def tune_jobs(bench: Bench) -> Iterator[Job]:
    """The splits first, which cost no compiling; then a job a form."""
    for measured in SPLIT_CELLS:
        yield Job(f"splits, {measured.name}", partial(best_splits, bench, measured), needs=15)
    for measured in FORMS:
        yield Job(f"tiling, {measured.name}", partial(best_tiling, bench, measured), needs=SECONDS_A_FORM)


def best_splits(bench: Bench, measured: Cell) -> Iterator[Row]:
    """Every count by turns with the present choice."""
    entries = {"present": own(bench, measured)}
    entries |= {str(count): own(bench, measured, num_splits=count) for count in SPLITS}
    outcome = compete(bench, entries)
    yield from outcome.note_rows()
    for name in outcome.calls:
        yield outcome.time_row(name, f"{name} splits", what="splits")
    tried = [name for name in outcome.calls if name != "present"]
    if tried and "present" in outcome.calls:
        best = min(tried, key=lambda name: outcome.comparison.time(name).median)
        details = {**measured.details, "what": "best_splits", "splits": int(best)}
        ratio = outcome.comparison.ratio("present", best)
        title = f"{measured.name}: present / {best} splits"
        yield Row(title, ratio.median, "x", bar=1.03, relation="<=", spread=ratio, details=details)


def best_tiling(bench: Bench, measured: Cell, seconds: float = SECONDS_A_FORM) -> Iterator[Row]:
    """One number after the other, then the best once more by turns with the present choice."""
    deadline = Deadline(seconds)
    present = present_tiling(measured, bench.arena.inputs(measured)[0])
    times = {present: once(bench, measured, present)}
    best, untried = present, 0
    for name, choices in CHOICES.items():
        for candidate in [replace(best, **{name: choice}) for choice in choices]:
            if candidate in times:
                continue
            if deadline.left <= 0:
                untried += 1
                continue
            times[candidate] = once(bench, measured, candidate)
        best = min(times, key=lambda tiling: times[tiling])
    entries = {"present": own(bench, measured), "best": own(bench, measured, tiling=best)}
    outcome = compete(bench, entries)
    yield from outcome.note_rows()
    details = {**measured.details, "tried": len(times), "untried": untried}
    for name, tiling in (("present", present), ("best", best)):
        if name in outcome.calls:
            yield outcome.time_row(
                name, f"{name}: {short(tiling)}", what="tiling", **asdict(tiling), **details
            )
    if len(outcome.calls) == len(entries):
        ratio = outcome.comparison.ratio("present", "best")
        title = f"{measured.name}: present / best of {len(times)}, {untried} untried"
        details |= {"what": "best_tiling", **asdict(best), "times": ranked(times)}
        yield Row(title, ratio.median, "x", bar=1.03, relation="<=", spread=ratio, details=details)


def once(bench: Bench, measured: Cell, tiling: Tiling) -> float:
    """Seconds, checked as ever; infinity for a tiling that does not compile, does not fit or is wrong."""
    failures = len(bench.failures)
    outcome = compete(bench, {"tried": own(bench, measured, tiling=tiling)})
    del bench.failures[failures:]  # to be no good is no failure here
    bench.tidy()
    return outcome.comparison.time("tried").median if outcome.calls else math.inf


def short(tiling: Tiling) -> str:
    """``16 x 64, 4 warps, 3 stages``."""
    return f"{tiling.block_h} x {tiling.block_n}, {tiling.num_warps} warps, {tiling.num_stages} stages"


def ranked(times: dict[Tiling, float]) -> list[dict[str, float | int | None]]:
    """All that were tried, the fastest first; null seconds for those that could not be."""
    return [
        {**asdict(tiling), "seconds": seconds if seconds < math.inf else None}
        for tiling, seconds in sorted(times.items(), key=lambda pair: pair[1])
    ]
