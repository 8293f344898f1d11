"""Where there is no GPU: the PyTorch forms of the kernel, interleaved with torch's own attention."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from kvlearn.bench.decode.cases import Arena, Case
from kvlearn.bench.decode.comparison import (
    OWN,
    Compared,
    Implementation,
    Setup,
    compare_implementations,
    kernel_under_test,
)
from kvlearn.bench.decode.libraries import sdpa
from kvlearn.bench.decode.sizes import Sizes
from kvlearn.measure.results import Row
from kvlearn.measure.roofline import read_bandwidth
from kvlearn.measure.timers import WallTimer

FORMS = ("MHA 32/32", "GQA 32/4", "MQA 32/1")
SINKS = 4


def cpu_setup(nbytes: int) -> Setup:
    """The processor, with its bandwidth as the limit; no cache is larger than ``nbytes``."""
    device = torch.device("cpu")
    arena = Arena(nbytes // 4, device, torch.float32)
    setup = Setup(device, WallTimer(), arena, memory=nbytes * 2, l2=0, backend="torch")
    setup.read = read_bandwidth(device)
    return setup


def machine_rows(setup: Setup) -> Iterator[Row]:
    """Threads and bandwidth."""
    threads = torch.get_num_threads()
    yield Row("no GPU: PyTorch forms on this processor", threads, "threads", details={"what": "cpu"})
    yield Row("BW_read", setup.read, "B/s", details={"what": "bw_read"})


def plain(sizes: Sizes, form: str, batch: int, length: int) -> Case:
    """In fp32: many processors only emulate bf16."""
    return sizes.case(form, batch, length, kv_dtype=torch.float32)


def shared_rows(setup: Setup, sizes: Sizes, batch: int, length: int) -> Iterator[Row]:
    """The fewer KV heads, the fewer bytes: how much of that is seen."""
    implementations: dict[str, Implementation] = {}
    for form in FORMS:
        case = plain(sizes, form, batch, length)
        implementations[form] = kernel_under_test(setup, case)
        implementations[f"SDPA, {form}"] = Implementation(case, sdpa)
    compared = compare_implementations(setup, implementations)
    yield from compared.missing_rows()
    for form in FORMS:
        yield from times(compared, {form: OWN, f"SDPA, {form}": "SDPA"}, setup)
    for form in FORMS[1:]:
        yield from ratio(compared, FORMS[0], form)


def windowed_rows(setup: Setup, whole: Case, window: int) -> Iterator[Row]:
    """A window against the whole context."""
    implementations = {
        "full": kernel_under_test(setup, whole),
        "window": kernel_under_test(setup, replace(whole, window=window, n_sinks=SINKS)),
    }
    compared = compare_implementations(setup, implementations)
    yield from compared.missing_rows()
    yield from times(compared, {"window": OWN}, setup)
    yield from ratio(compared, "full", "window")


def latent_rows(setup: Setup, sizes: Sizes, batch: int, length: int) -> Iterator[Row]:
    """A latent that 16 heads share, against as many heads with keys and values of their own."""
    of = {"latent": "MLA 16", "MHA": "MHA 16"}
    implementations = {
        name: kernel_under_test(setup, plain(sizes, form, batch, length)) for name, form in of.items()
    }
    compared = compare_implementations(setup, implementations)
    yield from compared.missing_rows()
    yield from times(compared, {"latent": OWN, "MHA": OWN}, setup)
    yield from ratio(compared, "MHA", "latent")


def times(compared: Compared, titles: Mapping[str, str], setup: Setup) -> Iterator[Row]:
    """The times, each with its share of the bandwidth."""
    for name, title in titles.items():
        if name in compared.calls:
            nbytes, seconds = (
                compared.implementations[name].case.nbytes,
                compared.comparison.time(name).median,
            )
            share = nbytes / seconds / setup.read
            yield compared.time_row(name, title, stage=title, how="wall", share=share)


def ratio(compared: Compared, name: str, base: str) -> Iterator[Row]:
    """How many times as long ``name`` takes."""
    if name in compared.calls and base in compared.calls:
        yield compared.ratio_row(name, base)
