"""The grid: ways of sharing KV heads, batches, contexts; the kernel beside its bar, SDPA, and its own stages.

must: t ≤ bytes / (0.90 · BW_read) + 15 µs        goal: t ≤ bytes / (0.95 · BW_read) + 10 µs
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvlearn.bench.decode.cases import Case
from kvlearn.bench.decode.comparison import (
    OWN,
    Compared,
    Implementation,
    Setup,
    compare_implementations,
    kernel_under_test,
    too_large,
    unavailable,
)
from kvlearn.bench.decode.libraries import FLEX, sdpa_flash, sdpa_flash_expanded, stage
from kvlearn.bench.decode.sizes import Sizes
from kvlearn.measure.results import Row
from kvlearn.measure.timing import Quartiles
from kvlearn.measure.units import GB

FORMS = ("MHA 32/32", "GQA 32/4", "GQA 64/8", "MQA 32/1")
MUST, GOAL = (0.90, 15e-6), (0.95, 10e-6)
SDPA, EXPANDED, NO_SPLIT = "SDPA flash", "SDPA flash, heads repeated", "own, one split"
SERIES = (OWN, SDPA, EXPANDED, FLEX, "v1")  # of the figure


def bar(setup: Setup, case: Case, of: tuple[float, float]) -> float:
    """Seconds: ``of`` is the share of BW_read to be reached, and what a launch may cost."""
    share, fixed = of
    return case.nbytes / (share * setup.read) + fixed


def own_row(setup: Setup, compared: Compared) -> Row:
    """The kernel's own time against the bar that it must pass, the goal beside it."""
    case, seconds = compared.implementations[OWN].case, compared.comparison.time(OWN).median
    goal = bar(setup, case, GOAL)
    return compared.time_row(
        OWN,
        bar=bar(setup, case, MUST),
        relation="<=",
        goal=goal,
        goal_met=seconds <= goal,
        floor=setup.floor(case),
        share=case.nbytes / seconds / setup.read,
    )


def grid_cases(sizes: Sizes) -> list[Case]:
    """All cases, the middle of the grid first: should the time run out, the corners go without."""
    cases = [sizes.case(form, b, n) for form in FORMS for b in sizes.batches for n in sizes.lengths]
    return sorted(cases, key=lambda c: (c.stored > 4 * GB, FORMS.index(c.form) != 1, c.batch * c.length))


def grid_rows(setup: Setup, case: Case, longest: int) -> Iterator[Row]:
    """Own and torch's flash; where heads share also v1, which does not; for one ``longest`` row one split."""
    if not setup.fits(case):
        yield unavailable(case.name, too_large(case), **case.details)
        return
    implementations = {OWN: kernel_under_test(setup, case), SDPA: Implementation(case, sdpa_flash)}
    if case.n_heads != case.n_kv_heads:
        implementations["v1"] = Implementation(case, stage("v1"))
    if case.batch == 1 and case.length == longest:
        implementations[NO_SPLIT] = kernel_under_test(setup, case, num_splits=1)
    compared = compare_implementations(setup, implementations)
    if SDPA not in compared.calls and case.n_heads != case.n_kv_heads:
        repeated = {OWN: implementations[OWN], EXPANDED: Implementation(case, sdpa_flash_expanded)}
        yield from baseline_rows(compare_implementations(setup, repeated), {EXPANDED: 1.0})
    yield from compared.missing_rows()
    if OWN not in compared.calls:
        return
    yield own_row(setup, compared)
    plain = setup.timer.plain(compared.calls[OWN])
    details = {**case.details, "what": "time", "stage": OWN, "how": "plain"}
    details["bandwidth"] = case.nbytes / plain.median
    yield Row(f"{case.name}: own, plain call", plain.median, "s", spread=plain, details=details)
    yield from baseline_rows(compared, {SDPA: 1.0, "v1": 2.0, NO_SPLIT: 2.0})


def baseline_rows(compared: Compared, bars: Mapping[str, float | None]) -> Iterator[Row]:
    """The time of each baseline, its ratio to ours, and the least that the ratio must be."""
    for name, least in bars.items():
        if name in compared.calls:
            yield compared.time_row(name)
            if OWN in compared.calls:
                yield compared.ratio_row(name, OWN, bar=least)


def stage_rows(setup: Setup, case: Case) -> Iterator[Row]:
    """The teaching stages v0 to v5 and the kernel, interleaved."""
    from kvlearn.kernels.stages import STAGES

    stages = {name: Implementation(case, stage(name)) for name in STAGES}
    compared = compare_implementations(setup, {OWN: kernel_under_test(setup, case), **stages})
    yield from compared.missing_rows()
    yield from baseline_rows(compared, dict.fromkeys(STAGES))


def bandwidth_points(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The arguments of ``kvlearn.plots.achieved_bandwidth``; None for a run without a GPU.

    Whole bf16 caches of keys and values only, timed in CUDA graphs; windows, pages, latents and bytes have
    bars of their own.
    """
    ceiling = [row["measured"] for row in rows if row.get("what") == "bw_read"]
    launch = [row["measured"] for row in rows if row.get("what") == "launch_graph"]
    timed = [
        row
        for row in rows
        if row.get("what") == "time"
        and row["measured"] is not None
        and row["how"] == "graph"
        and row["kv_dtype"] == "bf16"
        and not (row["page"] or row["window"] or row["rope_dim"] or row["others"])
    ]
    # A case that was measured in several comparisons counts once, the first time.
    points = {
        (row["stage"], row["form"], row["batch"], row["length"]): (
            row["stage"],
            row["nbytes"],
            Quartiles(row["measured"], row["q1"], row["q3"], row["n"]),
        )
        for row in reversed(timed)
        if row["stage"] in SERIES
    }
    if not ceiling or not points:
        return None
    return {
        "points": sorted(points.values(), key=lambda point: (SERIES.index(point[0]), point[1])),
        "bandwidth": ceiling[0],
        "t_fixed": launch[0] if launch else 0.0,
        "bar": MUST,
    }
