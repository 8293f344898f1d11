"""All that a GPU is wanted for, by one command that ends by itself.

    kvlearn bench gpu --seconds 500 --out DIR

In this order, each within its own time: correctness of the kernels on the device, tilings and splits, the
decode grid with its bars, the rows of ``kvlearn bench hardware``. Every row names its benchmark and goes to
that benchmark's file; rows and a summary are written as they come, so a run that is cut keeps what it had.

Without a GPU there is one row that says so; ``--small`` tries the whole run in Triton's interpreter.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from kvlearn.bench import correctness, hardware
from kvlearn.bench.common import Limit, Part, Recorder
from kvlearn.bench.decode import gpu_parts, tiling_parts
from kvlearn.bench.decode.cases import Arena
from kvlearn.bench.decode.comparison import Setup, cuda_setup, unavailable
from kvlearn.bench.decode.sizes import SIZES, SMALL
from kvlearn.measure.results import Row, format_quantity
from kvlearn.measure.timers import Prepared, WallTimer

SECONDS = 500.0  # of all parts, unless `--seconds` says less
CORRECT_SECONDS, TILING_SECONDS, DECODE_SECONDS = 60.0, 120.0, 220.0  # the rest is for the hardware rows
PER_FORM = 10.0  # seconds of tilings per form of the kernel
HARDWARE_NEEDS = 20.0  # seconds that must be left for a part of the hardware rows to be begun
MOST_CHARACTERS = 10_000  # of the summary


def parts(device: torch.device, small: bool = False) -> list[Part]:
    """All parts in order."""
    if device.type != "cuda" and not small:
        reason = "no GPU: nothing measured (--small tries the run in the interpreter)"
        return [Part("GPU", partial(iter, [unavailable("GPU", reason)]))]
    sizes = SMALL if small else SIZES
    new_setup = cache(partial(cuda_setup, device) if device.type == "cuda" else interpreter_setup)
    decode = gpu_parts(sizes, new_setup, DECODE_SECONDS, libraries_too=False)
    return [
        *of("gpu", correctness.parts(device, small, Limit(CORRECT_SECONDS))),
        *of("decode_tune", tiling_parts(sizes, new_setup, TILING_SECONDS, PER_FORM)),
        *of("decode", decode),
        *of("hardware", hardware_parts(device, small)),
    ]


def of(benchmark: str, made: Iterable[Part]) -> list[Part]:
    """The parts with the benchmark's name in their own and in every row."""
    return [
        replace(part, name=f"{benchmark}: {part.name}", details={**part.details, "benchmark": benchmark})
        for part in made
    ]


def hardware_parts(device: torch.device, small: bool) -> list[Part]:
    """The parts of ``kvlearn bench hardware``."""
    made = hardware.parts(device, small)
    return made if small else [replace(part, needs=HARDWARE_NEEDS) for part in made]


# A trial run without a GPU


class FirstCallTimer(WallTimer):
    """Times the first of the calls only: in the interpreter each takes milliseconds."""

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> Prepared:
        """The first call alone."""
        return super().prepare(calls[:1])


def interpreter_setup() -> Setup:
    """The processor in place of a GPU: kernels run in the interpreter, and their times mean nothing."""
    device = torch.device("cpu")
    return Setup(device, FirstCallTimer(), Arena(2**17, device), memory=2**20, l2=100)


# Rows and files that are kept


@dataclass
class GpuRecorder:
    """One file per benchmark in FOLDER, and the summary beside them, written again with every row."""

    command: str
    provenance: Mapping[str, Any]
    folder: Path | None = None
    recorders: dict[str, Recorder] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    path: Path | None = None  # of the rows of this benchmark itself, once there is one

    def add(self, row: Row) -> None:
        """Keep one more row."""
        name = row.details.get("benchmark", "gpu")
        if name not in self.recorders:
            self.recorders[name] = Recorder(name, self.command, self.provenance, self.folder)
        self.recorders[name].add(row)
        self.rows.append(row)
        written = self.recorders[name].path
        assert written is not None
        self.path = written if name == "gpu" or self.path is None else self.path
        text = summary(self.rows, self.provenance)
        written.with_name(f"gpu-{self.provenance['machine']}.txt").write_text(text, encoding="utf-8")


def summary(rows: Sequence[Row], provenance: Mapping[str, Any], most: int = MOST_CHARACTERS) -> str:
    """The result of a run, at most ``most`` characters, the most important first.

    Failed checks of correctness, counts per benchmark, missed bars, the best tilings and splits, times of the
    kernel, and what is missing with its reason.
    """
    versions = provenance["versions"]
    lines = [
        f"{provenance['machine']}, {provenance['date']}, commit {provenance['commit']}"
        f"{' (dirty)' if provenance['dirty'] else ''}, torch {versions.get('torch')}, "
        f"Triton {versions.get('triton')}",
    ]
    checks = [row for row in rows if row.details.get("what") == "correct"]
    wrong = [row for row in checks if not row.passed]
    lines.append(f"correct: {len(checks) - len(wrong)} of {len(checks)}")
    lines += [f"  WRONG {line(row)}" for row in wrong]
    for benchmark in dict.fromkeys(str(row.details.get("benchmark", "gpu")) for row in rows):
        lines.append(counts(benchmark, [r for r in rows if r.details.get("benchmark", "gpu") == benchmark]))
    rates = ("bw_read", "peak", "launch_graph", "launch_host")
    lines += [line(row) for row in rows if row.details.get("what") in rates]
    lines += section("missed", [row for row in rows if row.passed is False and row not in wrong])
    best = ("best_splits", "best_tiling")
    lines += section("tilings", [row for row in rows if row.details.get("what") in best])
    lines += section("missing", [row for row in rows if row.reason and row.details["what"] != "unavailable"])
    own = [row for row in rows if row.details.get("stage") == "own" and row.details.get("how") == "graph"]
    lines += section("own", own)
    lines += section("ratios", [row for row in rows if row.details.get("what") == "ratio"])
    lines += section("unavailable", [row for row in rows if row.details.get("what") == "unavailable"])
    return shortened(lines, most)


def counts(benchmark: str, rows: Sequence[Row]) -> str:
    """One line per benchmark."""
    barred = [row for row in rows if row.passed is not None]
    goals = [row for row in rows if "goal_met" in row.details]
    met = sum(row.passed is True for row in barred)
    reached = sum(bool(row.details["goal_met"]) for row in goals)
    absent = sum(bool(row.reason) for row in rows)
    return (
        f"{benchmark}: {len(rows)} rows, bars met {met} of {len(barred)}, "
        f"goals reached {reached} of {len(goals)}, missing {absent}"
    )


def section(title: str, rows: Sequence[Row]) -> list[str]:
    """A heading and a line per row; nothing where there is none."""
    return [f"{title}:", *(f"  {line(row)}" for row in rows)] if rows else []


def line(row: Row) -> str:
    """A row in short: ``GQA 32/4, 8 x 4k: own 20 µs (≤ 25 µs, 0.93 of BW_read)``."""
    case, bar, measured, _, _ = row.texts()
    if row.reason:
        return f"{case}: {row.reason}"
    share = row.details.get("share")
    of_bandwidth = "" if share is None else f"{share:.2f} of BW_read"
    tiling = [f"{key} {row.details[key]}" for key in ("block_h", "block_n", "num_warps", "num_stages")
              if key in row.details and row.details.get("what") == "best_tiling"]  # fmt: skip
    spread = "" if row.spread is None else f"q3 {format_quantity(row.spread.q3, row.unit)}"
    more = ", ".join(text for text in (bar, spread, of_bandwidth, *tiling) if text)
    return f"{case} {measured}" + (f" ({more})" if more else "")


def shortened(lines: Sequence[str], most: int) -> str:
    """As many of the first lines as fit, and how many do not."""
    kept: list[str] = []
    length = 0
    for index, text in enumerate(lines):
        rest = f"… {len(lines) - index} more lines\n"
        if length + len(text) + 1 + len(rest) > most and index < len(lines):
            return "".join(kept) + rest
        kept.append(f"{text}\n")
        length += len(text) + 1
    return "".join(kept)
