"""Tilings and splits of the decode kernel tried on a GPU, for kvlearn/kernels/tiling.py to be updated from.

One number of a tiling is varied at a time, each from the best so far. The bar of each form: the present
choice takes at most 1.03 times as long as the best that was found.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace

from kvlearn.bench.common import release_memory
from kvlearn.bench.decode.cases import Case
from kvlearn.bench.decode.comparison import (
    Setup,
    compare_implementations,
    kernel_under_test,
    present_tiling,
)
from kvlearn.kernels.tiling import Tiling
from kvlearn.measure.results import Row

SECONDS_PER_FORM = 34.0
SLOWER = 1.03  # times the best that was found, at most


def split_rows(setup: Setup, case: Case, counts: Sequence[int]) -> Iterator[Row]:
    """Every count interleaved with the present choice."""
    implementations = {"present": kernel_under_test(setup, case)}
    implementations |= {str(count): kernel_under_test(setup, case, num_splits=count) for count in counts}
    compared = compare_implementations(setup, implementations)
    yield from compared.missing_rows()
    for name in compared.calls:
        yield compared.time_row(name, f"{name} splits", what="splits")
    tried = [name for name in compared.calls if name != "present"]
    if tried and "present" in compared.calls:
        best = min(tried, key=lambda name: compared.comparison.time(name).median)
        details = {**case.details, "what": "best_splits", "splits": int(best)}
        ratio = compared.comparison.ratio("present", best)
        title = f"{case.name}: present / {best} splits"
        yield Row(title, ratio.median, "x", bar=SLOWER, relation="<=", spread=ratio, details=details)


def tiling_rows(
    setup: Setup, case: Case, choices: Mapping[str, tuple[int, ...]], seconds: float = SECONDS_PER_FORM
) -> Iterator[Row]:
    """One number after the other, then the best once more, interleaved with the present choice."""
    end = time.monotonic() + seconds
    present = present_tiling(case, setup.arena.inputs(case)[0])
    times = {present: seconds_of(setup, case, present)}
    best, untried = present, 0
    for name, values in choices.items():
        for candidate in [replace(best, **{name: value}) for value in values]:
            if candidate in times:
                continue
            if time.monotonic() >= end:
                untried += 1
                continue
            times[candidate] = seconds_of(setup, case, candidate)
        best = min(times, key=lambda tiling: times[tiling])
    implementations = {
        "present": kernel_under_test(setup, case),
        "best": kernel_under_test(setup, case, tiling=best),
    }
    compared = compare_implementations(setup, implementations)
    yield from compared.missing_rows()
    details = {**case.details, "tried": len(times), "untried": untried}
    for name, tiling in (("present", present), ("best", best)):
        if name in compared.calls:
            yield compared.time_row(
                name, f"{name}: {short(tiling)}", what="tiling", **asdict(tiling), **details
            )
    if len(compared.calls) == len(implementations):
        ratio = compared.comparison.ratio("present", "best")
        title = f"{case.name}: present / best of {len(times)}, {untried} untried"
        details |= {"what": "best_tiling", **asdict(best), "times": ranked(times)}
        yield Row(title, ratio.median, "x", bar=SLOWER, relation="<=", spread=ratio, details=details)


def seconds_of(setup: Setup, case: Case, tiling: Tiling) -> float:
    """Checked as ever; infinity for a tiling that does not compile, does not fit or is wrong."""
    compared = compare_implementations(setup, {"tried": kernel_under_test(setup, case, tiling=tiling)})
    release_memory()
    return compared.comparison.time("tried").median if compared.calls else math.inf


def short(tiling: Tiling) -> str:
    """``16 x 64, 4 warps, 3 stages``."""
    return f"{tiling.block_h} x {tiling.block_n}, {tiling.num_warps} warps, {tiling.num_stages} stages"


def ranked(times: dict[Tiling, float]) -> list[dict[str, float | int | None]]:
    """All that were tried, the fastest first; null seconds for those that could not be."""
    return [
        {**asdict(tiling), "seconds": seconds if seconds < math.inf else None}
        for tiling, seconds in sorted(times.items(), key=lambda pair: pair[1])
    ]
