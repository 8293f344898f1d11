"""Where there is no GPU: the PyTorch forms of the kernel, by turns with torch's own attention."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch

from kvlearn.measure.decode_bench.bench import Bench
from kvlearn.measure.decode_bench.cells import Cell, cell, tokens
from kvlearn.measure.decode_bench.clocks import WallClock
from kvlearn.measure.decode_bench.contest import Entry, Outcome, compete
from kvlearn.measure.decode_bench.inputs import Arena
from kvlearn.measure.decode_bench.jobs import Deadline, Job, run_jobs
from kvlearn.measure.decode_bench.own import OWN, own
from kvlearn.measure.decode_bench.rivals import sdpa
from kvlearn.measure.results import Row
from kvlearn.measure.roofline import read_bandwidth
from kvlearn.measure.units import KIB, MIB

FORMS = ("MHA 32/32", "GQA 32/4", "MQA 32/1")
SIZES = ((1, 4 * KIB), (4, 2 * KIB))
LONG = (1, 8 * KIB)
SECONDS = 45.0
WINDOW, SINKS = KIB, 4
ROOM = 512 * MIB  # bytes of cache; none is larger


def cpu_bench() -> Bench:
    """A bench of the processor, with its bandwidth as the ceiling."""
    device = torch.device("cpu")
    arena = Arena(ROOM // 4, device, torch.float32)
    bench = Bench(device, WallClock(), arena, memory=ROOM * 2, l2=0, backend="torch")
    bench.read = read_bandwidth(device)
    return bench


def cpu_part(bench: Bench, deadline: Deadline) -> Iterator[Row]:
    """Full, windowed and latent; grouped heads against as many KV heads; torch's attention beside each."""
    threads = torch.get_num_threads()
    yield Row("no GPU: PyTorch forms on this processor", threads, "threads", details={"what": "cpu"})
    yield Row("BW_read", bench.read, "B/s", details={"what": "bw_read"})
    batch, length = LONG
    jobs = [
        Job("window", partial(windowed, bench, plain("GQA 32/4", batch, length)), needs=5),
        Job("latent", partial(latent, bench, batch, length), needs=5),
        *(Job(f"heads, {b} x {tokens(n)}", partial(shared_heads, bench, b, n), needs=10) for b, n in SIZES),
    ]
    yield from run_jobs(jobs, deadline, bench.tidy, bench.failures)


def plain(form: str, batch: int, length: int) -> Cell:
    """In fp32: many processors only emulate bf16."""
    return cell(form, batch, length, kv_dtype=torch.float32)


def shared_heads(bench: Bench, batch: int, length: int) -> Iterator[Row]:
    """The fewer KV heads, the fewer bytes: how much of that is seen."""
    entries: dict[str, Entry] = {}
    for form in FORMS:
        measured = plain(form, batch, length)
        entries[form] = own(bench, measured)
        entries[f"SDPA, {form}"] = Entry(measured, sdpa)
    outcome = compete(bench, entries)
    yield from outcome.note_rows()
    for form in FORMS:
        yield from timed(outcome, {form: OWN, f"SDPA, {form}": "SDPA"}, bench)
    for form in FORMS[1:]:
        yield from against(outcome, FORMS[0], form)


def windowed(bench: Bench, whole: Cell) -> Iterator[Row]:
    """A window against the whole context."""
    entries = {"full": own(bench, whole), "window": own(bench, replace(whole, window=WINDOW, n_sinks=SINKS))}
    outcome = compete(bench, entries)
    yield from outcome.note_rows()
    yield from timed(outcome, {"window": OWN}, bench)
    yield from against(outcome, "full", "window")


def latent(bench: Bench, batch: int, length: int) -> Iterator[Row]:
    """A latent that 16 heads share, against as many heads with keys and values of their own."""
    of = {"latent": "MLA 16", "MHA": "MHA 16"}
    entries = {name: own(bench, plain(form, batch, length)) for name, form in of.items()}
    outcome = compete(bench, entries)
    yield from outcome.note_rows()
    yield from timed(outcome, {"latent": OWN, "MHA": OWN}, bench)
    yield from against(outcome, "MHA", "latent")


def timed(outcome: Outcome, titles: Mapping[str, str], bench: Bench) -> Iterator[Row]:
    """The times, each with its share of the bandwidth."""
    for name, title in titles.items():
        if name in outcome.calls:
            share = outcome.entries[name].cell.nbytes / outcome.comparison.time(name).median / bench.read
            yield outcome.time_row(name, title, stage=title, how="wall", share=share)


def against(outcome: Outcome, name: str, base: str) -> Iterator[Row]:
    """How many times as long ``name`` takes."""
    if name in outcome.calls and base in outcome.calls:
        yield outcome.ratio_row(name, base)
