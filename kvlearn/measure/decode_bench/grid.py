"""The grid: four ways of sharing KV heads, batches 1 to 128, contexts 1k to 64k; the floor and torch's flash.

must: t ≤ bytes / (0.90 · BW_read) + 15 µs        goal: t ≤ bytes / (0.95 · BW_read) + 10 µs
"""

from collections.abc import Iterator, Mapping
from functools import partial

from kvlearn.measure.decode_bench.bench import Bench
from kvlearn.measure.decode_bench.cells import Cell, cell
from kvlearn.measure.decode_bench.contest import Entry, Outcome, compete, note, too_large
from kvlearn.measure.decode_bench.jobs import Job
from kvlearn.measure.decode_bench.own import OWN, own
from kvlearn.measure.decode_bench.rivals import sdpa_flash, sdpa_flash_expanded, stage
from kvlearn.measure.results import Row
from kvlearn.measure.units import GB, KIB

FORMS = ("MHA 32/32", "GQA 32/4", "GQA 64/8", "MQA 32/1")
BATCHES = (1, 8, 32, 128)
LENGTHS = (KIB, 4 * KIB, 16 * KIB, 64 * KIB)
LONGEST = LENGTHS[-1]
MUST, GOAL = (0.90, 15e-6), (0.95, 10e-6)
SDPA, EXPANDED, NO_SPLIT = "SDPA flash", "SDPA flash, heads repeated", "own, one split"
STAGE_CELLS = (
    ("MHA 32/32", 1, 64 * KIB),
    ("MHA 32/32", 32, 4 * KIB),
    ("GQA 32/4", 1, 64 * KIB),
    ("GQA 32/4", 32, 4 * KIB),
)


def bar(bench: Bench, measured: Cell, of: tuple[float, float]) -> float:
    """Seconds: ``of`` is the share of BW_read to be reached, and what a launch may cost."""
    share, fixed = of
    return measured.nbytes / (share * bench.read) + fixed


def own_row(bench: Bench, outcome: Outcome, title: str = OWN) -> Row:
    """The kernel's own time against the bar that it must pass, the goal beside it."""
    measured, seconds = outcome.entries[OWN].cell, outcome.comparison.time(OWN).median
    goal = bar(bench, measured, GOAL)
    return outcome.time_row(
        OWN,
        title,
        bar=bar(bench, measured, MUST),
        relation="<=",
        goal=goal,
        goal_met=seconds <= goal,
        floor=bench.floor(measured),
        share=measured.nbytes / seconds / bench.read,
    )


def grid_cells() -> list[Cell]:
    """All cells, the middle of the grid first: should the time run out, the corners go without."""
    cells = [cell(form, b, n) for form in FORMS for b in BATCHES for n in LENGTHS]
    return sorted(cells, key=lambda c: (c.stored > 4 * GB, FORMS.index(c.form) != 1, c.batch * c.length))


def grid_jobs(bench: Bench) -> Iterator[Job]:
    """A job a cell."""
    for measured in grid_cells():
        yield Job(measured.name, partial(grid_cell, bench, measured))


def grid_cell(bench: Bench, measured: Cell) -> Iterator[Row]:
    """Own and torch's flash; where heads share also v1, which does not; for one long row also one split."""
    if not bench.fits(measured):
        yield note(f"{measured.name}: {too_large(measured)}", **measured.details)
        return
    entries = {OWN: own(bench, measured), SDPA: Entry(measured, sdpa_flash)}
    if measured.n_heads != measured.n_kv_heads:
        entries["v1"] = Entry(measured, stage("v1"))
    if measured.batch == 1 and measured.length == LONGEST:
        entries[NO_SPLIT] = own(bench, measured, num_splits=1)
    outcome = compete(bench, entries)
    if SDPA in outcome.notes and measured.n_heads != measured.n_kv_heads:
        again = compete(bench, {OWN: entries[OWN], EXPANDED: Entry(measured, sdpa_flash_expanded)})
        yield from ratios(again, {EXPANDED: 1.0})
    yield from outcome.note_rows()
    if OWN not in outcome.calls:
        return
    yield own_row(bench, outcome)
    plain = bench.clock.plain(outcome.calls[OWN])
    details = {**measured.details, "what": "time", "stage": OWN, "how": "plain"}
    details["bandwidth"] = measured.nbytes / plain.median
    yield Row(f"{measured.name}: own, plain call", plain.median, "s", spread=plain, details=details)
    yield from ratios(outcome, {SDPA: 1.0, "v1": 2.0, NO_SPLIT: 2.0})


def ratios(outcome: Outcome, bars: Mapping[str, float | None]) -> Iterator[Row]:
    """The other libraries' times, the ratio of each to ours, and its bar."""
    for name, least in bars.items():
        if name in outcome.calls:
            yield outcome.time_row(name)
            if OWN in outcome.calls:
                yield outcome.ratio_row(name, OWN, bar=least)


def stage_jobs(bench: Bench) -> Iterator[Job]:
    """The six stages beside the kernel, in a few cells."""
    for form, batch, length in STAGE_CELLS:
        measured = cell(form, batch, length)
        yield Job(f"stages, {measured.name}", partial(stages, bench, measured))


def stages(bench: Bench, measured: Cell) -> Iterator[Row]:
    """v0 to v5 and the kernel by turns."""
    from kvlearn.kernels.stages import STAGES

    outcome = compete(
        bench, {OWN: own(bench, measured), **{name: Entry(measured, stage(name)) for name in STAGES}}
    )
    yield from outcome.note_rows()
    yield from ratios(outcome, dict.fromkeys(STAGES))
