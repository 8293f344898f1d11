"""What a cache can be besides long: windowed, paged, latent, quantised, ragged; each with its bar."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from kvlearn.kernels.tiling import LATENT_TILINGS
from kvlearn.measure.decode_bench.bench import Bench
from kvlearn.measure.decode_bench.cells import Cell, cell, tokens
from kvlearn.measure.decode_bench.contest import Entry, compete
from kvlearn.measure.decode_bench.exact import error
from kvlearn.measure.decode_bench.grid import own_row, ratios
from kvlearn.measure.decode_bench.inputs import quantised as quantise
from kvlearn.measure.decode_bench.jobs import Job
from kvlearn.measure.decode_bench.own import OWN, own
from kvlearn.measure.decode_bench.rivals import sdpa_masked, stage
from kvlearn.measure.results import Row
from kvlearn.measure.units import KIB

WINDOW, SINKS = 4 * KIB, 4
WINDOWED = (("GQA 32/4", 32, 64 * KIB), ("MHA 32/32", 8, 64 * KIB), ("GQA 32/4", 32, 16 * KIB))
PAGED = (
    ("GQA 32/4", 32, 4 * KIB),
    ("GQA 64/8", 8, 16 * KIB),
    ("MHA 32/32", 8, 16 * KIB),
    ("GQA 32/4", 1, 64 * KIB),
)
PAGES = {64: 1.05, 16: 1.10}
RAGGED = (("GQA 32/4", 32, 64 * KIB, KIB), ("GQA 64/8", 128, 64 * KIB, KIB))
QUANTISED = (("GQA 64/8", 32, 16 * KIB), ("MHA 32/32", 8, 16 * KIB))  # 1 GB each in a byte a number
QUANTISED_TOLERANCE = 1e-2  # of the kernel, against fp64 on the very numbers it reads
FEW_HEADS = ((32, 16 * KIB), (64, 16 * KIB), (128, 16 * KIB))
MANY_HEADS = ((64, 8 * KIB), (64, 16 * KIB), (64, 32 * KIB))


def special_jobs(bench: Bench) -> Iterator[Job]:
    """All of them."""
    for form, batch, length in WINDOWED:
        measured = cell(form, batch, length, window=WINDOW, n_sinks=SINKS)
        yield Job(measured.name, partial(windowed, bench, measured))
    for form, batch, length in PAGED:
        measured = cell(form, batch, length)
        yield Job(f"paged, {measured.name}", partial(paged, bench, measured))
    for batch, length in FEW_HEADS:
        measured = cell("MLA 16", batch, length)
        yield Job(measured.name, partial(latent_few_heads, bench, measured))
    for batch, length in MANY_HEADS:
        measured = cell("MLA 128", batch, length)
        yield Job(measured.name, partial(latent_many_heads, bench, measured))
    for form, batch, length in QUANTISED:
        measured = cell(form, batch, length)
        yield Job(f"fp8 and int8, {measured.name}", partial(quantised, bench, measured))
    for form, batch, length, others in RAGGED:
        measured = cell(form, batch, length, others=others)
        yield Job(measured.name, partial(ragged, bench, measured))


def windowed(bench: Bench, measured: Cell) -> Iterator[Row]:
    """A window with sinks against the same kernel on a cache of just that length, and against a mask."""
    whole = replace(measured, length=measured.window or measured.length, window=None, n_sinks=0)
    short = f"own at {tokens(whole.length)}"
    entries = {OWN: own(bench, measured), short: own(bench, whole)}
    masked = "SDPA with a mask"
    if measured.n_heads == measured.n_kv_heads:  # repeated heads would be no fair rival
        entries[masked] = Entry(measured, sdpa_masked)
    outcome = compete(bench, entries)
    yield from outcome.note_rows()
    if OWN in outcome.calls:
        yield own_row(bench, outcome)
        if short in outcome.calls:
            yield outcome.ratio_row(OWN, short, of=OWN, bar=1.15, relation="<=")
    yield from ratios(outcome, {masked: 10.0})


def paged(bench: Bench, contiguous: Cell) -> Iterator[Row]:
    """Pages of 64 and 16, scattered at random, by turns with the same cache in one piece."""
    entries = {"contiguous": own(bench, contiguous)}
    for page in PAGES:
        entries[f"pages of {page}"] = own(bench, replace(contiguous, page=page))
    outcome = compete(bench, entries)
    yield from outcome.note_rows()
    for page, most in PAGES.items():
        name = f"pages of {page}"
        if name in outcome.calls:
            yield outcome.time_row(name, "own")
            if "contiguous" in outcome.calls:
                yield outcome.ratio_row(name, "contiguous", of=name, bar=most, relation="<=")


def latent_few_heads(bench: Bench, measured: Cell) -> Iterator[Row]:
    """16 heads on one latent: memory decides, so bytes per second."""
    outcome = compete(bench, {OWN: own(bench, measured)})
    yield from outcome.note_rows()
    if OWN in outcome.calls:
        yield own_row(bench, outcome)
        share = measured.nbytes / outcome.comparison.time(OWN).median / bench.read
        details = {**measured.details, "what": "share", "stage": OWN}
        yield Row(f"{measured.name}: share of BW_read", share, "x", bar=0.75, details=details)


def latent_many_heads(bench: Bench, measured: Cell) -> Iterator[Row]:
    """128 heads on one latent: arithmetic decides, so FLOPs per second; beside it the tile of 16 heads."""
    small = "own, BLOCK_H=16"
    outcome = compete(bench, {OWN: own(bench, measured), small: narrow(bench, measured)})
    yield from outcome.note_rows()
    if OWN not in outcome.calls:
        return
    yield outcome.time_row(OWN)
    rate = outcome.comparison.time(OWN)
    details = {**measured.details, "what": "rate", "stage": OWN, "goal": 350e12}
    flops = measured.flops / rate.median
    title = f"{measured.name}: FLOPs per second"
    yield Row(title, flops, "FLOP/s", bar=250e12, details={**details, "goal_met": flops >= 350e12})
    yield from ratios(outcome, {small: 1.6})


def narrow(bench: Bench, measured: Cell) -> Entry:
    """The latent kernel with 16 heads a tile, so that the cache is read once for each 16 of them."""
    return own(bench, measured, tiling=next(t for t in LATENT_TILINGS if t.block_h == 16))


def quantised(bench: Bench, measured: Cell) -> Iterator[Row]:
    """A byte a number against two, and what the bytes saved cost in exactness."""
    entries = {"bf16": own(bench, measured)}
    kinds = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
    for name, dtype in kinds.items():
        entries[name] = own(bench, replace(measured, kv_dtype=dtype), QUANTISED_TOLERANCE)
    outcome = compete(bench, entries)
    yield from outcome.note_rows()
    for name in kinds:
        if name not in outcome.calls:
            continue
        yield outcome.time_row(name, "own")
        if "bf16" in outcome.calls:
            yield outcome.ratio_row("bf16", name, bar=1.3)
        yield lost(bench, entries[name], measured)


def lost(bench: Bench, entry: Entry, measured: Cell) -> Row:
    """The error against fp64 on the bf16 cache, largest over the heads."""
    whole = bench.arena.inputs(measured)[0]
    x = quantise(whole, entry.cell.kv_dtype)
    relative = error(entry.cell, x, entry.prepare(entry.cell, x)(), truth=whole)
    details = {**entry.cell.details, "what": "error", "stage": OWN}
    return Row(f"{entry.cell.name}: error against the bf16 cache", relative, "x", details=details)


def ragged(bench: Bench, measured: Cell) -> Iterator[Row]:
    """One very long row beside short ones: the same bar as for the grid, on the bytes that are live."""
    entries = {OWN: own(bench, measured)}
    entries |= {name: Entry(measured, stage(name)) for name in ("v4", "v5")}
    outcome = compete(bench, entries)
    yield from outcome.note_rows()
    if OWN in outcome.calls:
        yield own_row(bench, outcome)
    yield from ratios(outcome, {"v4": None, "v5": None})
