"""Features of a cache beside its length: windowed, paged, latent, quantised, ragged; each with its bar."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from kvlearn.bench.decode.cases import Case, error, quantised, tokens
from kvlearn.bench.decode.comparison import (
    OWN,
    Implementation,
    Setup,
    compare_implementations,
    kernel_under_test,
)
from kvlearn.bench.decode.grid import baseline_rows, own_row
from kvlearn.bench.decode.libraries import sdpa_masked, stage
from kvlearn.kernels.tiling import LATENT_TILINGS
from kvlearn.measure.results import Row

PAGES = {64: 1.05, 16: 1.10}  # tokens of a page: most times as long as contiguous
WINDOW_BAR, MASKED_BAR = 1.15, 10.0  # of the short cache's time at most; of the masked SDPA's at least
QUANTISED_BAR = 1.3  # times as fast as bf16, at least
QUANTISED_TOLERANCE = 1e-2  # of the kernel, against fp64 on the very numbers it reads
LATENT_SHARE, LATENT_RATE, LATENT_GOAL = 0.75, 250e12, 350e12  # of BW_read; FLOP/s
NARROW_BAR = 1.6  # times as fast as with tiles of 16 heads, at least


def windowed_rows(setup: Setup, case: Case) -> Iterator[Row]:
    """A window with sinks against the same kernel on a cache of just that length, and against a mask."""
    whole = replace(case, length=case.window or case.length, window=None, n_sinks=0)
    short = f"own at {tokens(whole.length)}"
    implementations = {OWN: kernel_under_test(setup, case), short: kernel_under_test(setup, whole)}
    masked = "SDPA with a mask"
    if case.n_heads == case.n_kv_heads:  # repeated heads would be no fair baseline
        implementations[masked] = Implementation(case, sdpa_masked)
    compared = compare_implementations(setup, implementations)
    yield from compared.missing_rows()
    if OWN in compared.calls:
        yield own_row(setup, compared)
        if short in compared.calls:
            yield compared.ratio_row(OWN, short, of=OWN, bar=WINDOW_BAR, relation="<=")
    yield from baseline_rows(compared, {masked: MASKED_BAR})


def paged_rows(setup: Setup, contiguous: Case) -> Iterator[Row]:
    """Pages of 64 and 16, scattered at random, interleaved with the same cache in one piece."""
    implementations = {"contiguous": kernel_under_test(setup, contiguous)}
    for page in PAGES:
        implementations[f"pages of {page}"] = kernel_under_test(setup, replace(contiguous, page=page))
    compared = compare_implementations(setup, implementations)
    yield from compared.missing_rows()
    for page, most in PAGES.items():
        name = f"pages of {page}"
        if name in compared.calls:
            yield compared.time_row(name, "own")
            if "contiguous" in compared.calls:
                yield compared.ratio_row(name, "contiguous", of=name, bar=most, relation="<=")


def latent_few_heads_rows(setup: Setup, case: Case) -> Iterator[Row]:
    """16 heads on one latent: memory decides, so bytes per second."""
    compared = compare_implementations(setup, {OWN: kernel_under_test(setup, case)})
    yield from compared.missing_rows()
    if OWN in compared.calls:
        yield own_row(setup, compared)
        share = case.nbytes / compared.comparison.time(OWN).median / setup.read
        details = {**case.details, "what": "share", "stage": OWN}
        yield Row(f"{case.name}: share of BW_read", share, "x", bar=LATENT_SHARE, details=details)


def latent_many_heads_rows(setup: Setup, case: Case) -> Iterator[Row]:
    """128 heads on one latent: arithmetic decides, so FLOPs per second; beside it the tile of 16 heads."""
    small = "own, BLOCK_H=16"
    compared = compare_implementations(
        setup, {OWN: kernel_under_test(setup, case), small: narrow(setup, case)}
    )
    yield from compared.missing_rows()
    if OWN not in compared.calls:
        return
    yield compared.time_row(OWN)
    rate = compared.comparison.time(OWN)
    details = {**case.details, "what": "rate", "stage": OWN, "goal": LATENT_GOAL}
    flops = case.flops / rate.median
    title = f"{case.name}: FLOPs per second"
    yield Row(title, flops, "FLOP/s", bar=LATENT_RATE, details={**details, "goal_met": flops >= LATENT_GOAL})
    yield from baseline_rows(compared, {small: NARROW_BAR})


def narrow(setup: Setup, case: Case) -> Implementation:
    """The latent kernel with tiles of 16 heads, so that the cache is read once for each 16 of them."""
    return kernel_under_test(setup, case, tiling=next(t for t in LATENT_TILINGS if t.block_h == 16))


def quantised_rows(setup: Setup, case: Case) -> Iterator[Row]:
    """One byte per number against two, and the error that comes with it."""
    implementations = {"bf16": kernel_under_test(setup, case)}
    kinds = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
    for name, dtype in kinds.items():
        implementations[name] = kernel_under_test(setup, replace(case, kv_dtype=dtype), QUANTISED_TOLERANCE)
    compared = compare_implementations(setup, implementations)
    yield from compared.missing_rows()
    for name in kinds:
        if name not in compared.calls:
            continue
        yield compared.time_row(name, "own")
        if "bf16" in compared.calls:
            yield compared.ratio_row("bf16", name, bar=QUANTISED_BAR)
        yield error_row(setup, implementations[name], case)


def error_row(setup: Setup, implementation: Implementation, case: Case) -> Row:
    """The error against fp64 on the bf16 cache, largest over the heads."""
    whole = setup.arena.inputs(case)[0]
    x = quantised(whole, implementation.case.kv_dtype)
    relative = error(implementation.case, x, implementation.prepare(implementation.case, x)(), truth=whole)
    details = {**implementation.case.details, "what": "error", "stage": OWN}
    return Row(f"{implementation.case.name}: error against the bf16 cache", relative, "x", details=details)


def ragged_rows(setup: Setup, case: Case) -> Iterator[Row]:
    """One very long row beside short ones: the same bar as for the grid, on the bytes that are live."""
    implementations = {OWN: kernel_under_test(setup, case)}
    implementations |= {name: Implementation(case, stage(name)) for name in ("v4", "v5")}
    compared = compare_implementations(setup, implementations)
    yield from compared.missing_rows()
    if OWN in compared.calls:
        yield own_row(setup, compared)
    yield from baseline_rows(compared, {"v4": None, "v5": None})
