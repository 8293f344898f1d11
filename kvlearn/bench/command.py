"""``kvlearn bench``: checks of its arguments, its tables, and the rows that are kept.

Names and options are checked before torch is imported, so that a typing mistake is reported at once.
"""

import json
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvlearn.bench import BENCHMARKS, BY_NAME_ONLY, RESUMED

GRACE = 30  # seconds after `--seconds` at which a part that still runs is ended with the process

if TYPE_CHECKING:
    from rich.console import Console

    from kvlearn.bench.common import Progress, Recorder, RowRecorder
    from kvlearn.bench.gpu import GpuRecorder
    from kvlearn.measure.results import Row


@dataclass(frozen=True)
class Request:
    """The request of the command line; a ``name`` that is empty asks for the list.

    ``device`` "" is the GPU where there is one. ``out`` is the folder of the rows, in place of results/.
    """

    name: str = ""
    device: str = ""
    only: str = ""
    seconds: float = 0.0
    small: bool = False
    record: bool = False
    out: Path | None = None
    as_json: bool = False

    @property
    def names(self) -> list[str]:
        """The benchmarks to run, in order."""
        if self.name == "all":
            return [name for name in BENCHMARKS if name not in BY_NAME_ONLY]
        return [self.name]

    def command(self, name: str) -> str:
        """The command that repeats the run of one benchmark, without the place where its rows are kept."""
        given: dict[str, Any] = {"--only": self.only, "--seconds": self.seconds, "--small": self.small}
        options = [
            flag if value is True else f"{flag} {shlex.quote(f'{value:g}' if flag == '--seconds' else value)}"
            for flag, value in (given | {"--device": self.device}).items()
            if value
        ]
        return " ".join([f"kvlearn bench {name} --record", *options])

    def check(self) -> None:
        """Raise ValueError that names the argument and what was expected."""
        if self.name != "all" and self.name not in BENCHMARKS:
            raise ValueError(f"NAME: expected one of {', '.join([*BENCHMARKS, 'all'])}; got {self.name!r}")
        if self.device not in ("", "cpu", "cuda"):
            raise ValueError(f"--device: expected cpu, or cuda where there is one; got {self.device!r}")
        partly = self.small or (self.only and self.name not in RESUMED)
        if self.record and self.out is None and partly:
            part = "--small" if self.small else "--only"
            raise ValueError(
                f"--record: expected --out FOLDER with {part}: a part must not replace a whole run"
            )
        if self.device == "cuda" and default_device() != "cuda":
            raise ValueError("--device: expected cpu, or cuda where there is one; got 'cuda'")


def default_device() -> str:
    """Where a benchmark runs unless told otherwise."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def bench(request: Request) -> dict[str, Path]:
    """Run what was asked for, and return the files of results that were written, by benchmark.

    ValueError for a wrong request; a missed bar is a finding, not a failure.
    """
    if not request.name:
        print_list(request.as_json)
        return {}
    request.check()
    from rich.console import Console

    device = request.device or default_device()
    # Beside JSON on stdout, everything else goes to stderr.
    console = Console(stderr=request.as_json)
    if request.as_json:
        print("[", end="", flush=True)
    separator, written = "\n", {}
    for name in request.names:
        recorder = new_recorder(request, name, device)
        rows = measured_rows(request, name, device, recorder, console)
        if request.as_json:
            for row in rows:
                line = json.dumps({"benchmark": name, **row.as_dict()}, ensure_ascii=False)
                print(f"{separator}{line}", end="", flush=True)
                separator = ",\n"
        else:
            summarise(show_rows(f"{name}: {BENCHMARKS[name]}", rows, device, console), console)
        if recorder is not None and recorder.path is not None:
            written[name] = recorder.path
            console.print(f"recorded in {recorder.path.parent.name}/{recorder.path.name}", soft_wrap=True)
    if request.as_json:
        print("\n]", flush=True)
    return written


def print_list(as_json: bool) -> None:
    """The benchmarks, with a line on each."""
    if as_json:
        print(json.dumps(BENCHMARKS, indent=1, ensure_ascii=False))
        return
    for name, about in BENCHMARKS.items():
        print(f"{name:12} {about}")
    print("\nkvlearn bench NAME measures one, kvlearn bench all measures all but " + ", ".join(BY_NAME_ONLY))


def new_recorder(request: Request, name: str, device: str) -> "Recorder | GpuRecorder | None":
    """The object that keeps the rows of a run; its provenance is taken now. None if nothing is kept."""
    if not request.record and request.out is None:
        return None
    from kvlearn.bench.common import Recorder
    from kvlearn.measure.provenance import collect_provenance

    if name == "gpu":
        from kvlearn.bench.gpu import GpuRecorder

        return GpuRecorder(request.command(name), collect_provenance(device), request.out)
    return Recorder(name, request.command(name), collect_provenance(device), request.out)


def measured_rows(
    request: Request, name: str, device: str, recorder: "RowRecorder | None", console: "Console"
) -> "Iterator[Row]":
    """The rows of one benchmark as they are measured; the console tells which part is next."""
    from kvlearn.bench import common

    part, seconds = common.Part(name, lambda: iter(())), request.seconds
    if name == "gpu" and not seconds:
        from kvlearn.bench.gpu import SECONDS as seconds

    def tell(progress: "Progress") -> None:
        nonlocal part
        part = common.Part(progress.name, part.rows)
        console.print(f"  {progress}", style="dim", highlight=False, markup=False, soft_wrap=True)

    def on_end() -> None:
        row = common.missing(part, f"still running {GRACE} s after the end of {seconds:g} s: ended")
        console.print(f"{row.case}: {row.reason}", style="red", markup=False, soft_wrap=True)
        if recorder is not None:
            recorder.add(row)

    with common.ended_by(seconds + GRACE if seconds else 0, on_end):
        yield from common.run(
            name,
            device,
            small=request.small,
            only=request.only,
            seconds=seconds,
            recorder=recorder,
            progress=tell,
        )


def show_rows(title: str, measured: "Iterable[Row]", device: str, console: "Console") -> "list[Row]":
    """Show each row as it is measured, and return them all.

    A log must hold what was measured even when the run is cut short; a terminal gets a table that grows.
    """
    from rich.box import SIMPLE
    from rich.live import Live
    from rich.table import Table

    from kvlearn.measure.provenance import machine

    rows = []
    caption = f"measured on {machine(device)}"
    if not console.is_terminal:
        console.print(f"{title}\n{caption}", highlight=False, soft_wrap=True)
        for row in measured:
            case, bar, value, quartiles, verdict = row.texts()
            line = f"{case:64} {bar:>15} {value:>12} {quartiles:>23}  {verdict}"
            console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)
            rows.append(row)
        return rows
    table = Table(
        "case", title=title, caption=caption, title_justify="left", box=SIMPLE, caption_justify="left"
    )
    for column in ("bar", "measured", "quartiles"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    with Live(table, console=console, refresh_per_second=2):
        for row in measured:
            *texts, verdict = row.texts()
            table.add_row(*texts, f"[{'green' if row.passed else 'red'}]{verdict}[/]")
            rows.append(row)
    return rows


def summarise(rows: "list[Row]", console: "Console") -> None:
    """How many bars were met, and what has no number."""
    barred = [row for row in rows if row.passed is not None]
    if barred:
        met = sum(row.passed is True for row in barred)
        console.print(f"bars met: {met} of {len(barred)}", highlight=False)
    for row in rows:
        if row.reason:
            text = f"missing: {row.case}: {row.reason}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
