"""Others' kernels: FlexAttention's decode path; FlashInfer's and vLLM's where they are installed."""

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

from kvlearn.measure.decode_bench.bench import Bench
from kvlearn.measure.decode_bench.cells import cell
from kvlearn.measure.decode_bench.contest import Entry, compete, note
from kvlearn.measure.decode_bench.grid import FORMS, ratios
from kvlearn.measure.decode_bench.jobs import Budget, Job
from kvlearn.measure.decode_bench.own import OWN, own
from kvlearn.measure.decode_bench.rivals import Flex, Rival, flashinfer, vllm_triton
from kvlearn.measure.results import Row
from kvlearn.measure.units import KIB

FLEX = "FlexAttention"
FLEX_CELLS = ((8, 16 * KIB), (1, 64 * KIB), (32, 4 * KIB))
FLEX_SECONDS = 120.0  # each shape is compiled anew
LIBRARIES = {"FlashInfer": ("flashinfer", flashinfer), "vLLM's Triton kernel": ("vllm", vllm_triton)}
LIBRARY_CELLS = (
    ("GQA 32/4", 32, 4 * KIB),
    ("GQA 64/8", 8, 16 * KIB),
    ("MHA 32/32", 8, 4 * KIB),
    ("GQA 32/4", 1, 64 * KIB),
)


def flex_jobs(bench: Bench) -> Iterator[Job]:
    """A few cells, as many as its seconds allow."""
    flex, budget = Flex(), Budget(FLEX_SECONDS)
    for batch, length in FLEX_CELLS:
        for form in FORMS:
            measured = cell(form, batch, length)
            run = partial(against, bench, {FLEX: Entry(measured, flex)}, {FLEX: 1.1})
            yield Job(f"{FLEX}, {measured.name}", run, needs=60, budget=budget)


def library_jobs(bench: Bench) -> Iterator[Job]:
    """Paged caches, pages of 16; one line for what is not installed."""
    there: dict[str, Rival] = {}
    for name, (package, rival) in LIBRARIES.items():
        if find_spec(package) is None:
            yield Job(name, partial(iter, [note(f"{name}: not installed, not measured", stage=name)]))
        else:
            there[name] = rival
    for form, batch, length in LIBRARY_CELLS if there else ():
        measured = cell(form, batch, length, page=16)
        entries = {name: Entry(measured, rival) for name, rival in there.items()}
        run = partial(against, bench, entries, dict.fromkeys(entries))
        yield Job(f"other libraries, {measured.name}", run, needs=150)


def against(bench: Bench, entries: dict[str, Entry], bars: dict[str, float | None]) -> Iterator[Row]:
    """The kernel and others in one cell."""
    (measured,) = {entry.cell for entry in entries.values()}
    outcome = compete(bench, {OWN: own(bench, measured), **entries})
    yield from outcome.note_rows()
    yield from ratios(outcome, bars)
