"""The resources of each compiled kernel: registers, stack, shared memory, width of loads. No GPU needed.

``python -m kvlearn.kernels.compiled`` prints the table, `report` returns its rows. The numbers hold for
the installed Triton: another version may allocate other registers.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kvlearn import validate
from kvlearn.kernels.runtime import HAS_TRITON

CARDS = {80: "A100", 90: "H100, H200", 100: "B200"}
# A multiprocessor's shared memory in bytes; the system takes 1 KiB per program. All GPUs share the rest.
SHARED_OF_CARD = {80: 167_936, 90: 233_472, 100: 233_472}
REGISTERS, WARPS, PROGRAMS = 65_536, 64, 32


@dataclass(frozen=True)
class Compiled:
    """One kernel of one form, compiled for compute capability ``target`` (90 for sm_90)."""

    form: str
    group: str  # "stage", "decode", or "broken" (by a mistake)
    target: int
    kernel: str = ""
    num_warps: int = 0
    registers: int = 0  # per thread; 255 at most
    stack: int = 0  # bytes per thread that did not fit into the registers
    shared: int = 0  # bytes per program
    loads: dict[int, int] = field(
        default_factory=dict
    )  # of the cache: bytes that a thread loads at once -> instructions
    copies: dict[int, int] = field(default_factory=dict)  # the asynchronous ones among them (cp.async)
    products: dict[str, int] = field(default_factory=dict)  # tensor core instructions by name
    problem: str = ""  # why the kernel does not compile; the fields above are then empty

    @property
    def programs(self) -> int:
        """Programs that fit on one multiprocessor at a time, so that some load while others compute."""
        registers = -(-self.registers * 32 // 256) * 256 * self.num_warps  # allocated to warps by 256
        shared = SHARED_OF_CARD[self.target] // (self.shared + 1024)
        return min(PROGRAMS, WARPS // self.num_warps, REGISTERS // registers, shared)


@functools.cache
def report(targets: tuple[int, ...] = tuple(CARDS), only: str = "") -> tuple[Compiled, ...]:
    """Compile every form whose group or name contains ``only``, in one process for each target.

    Takes 30 s per target on one core when Triton's cache is empty, 3 s afterwards.
    Raises ValueError for a card that is not in `CARDS`, RuntimeError without Triton or if a process
    fails.
    """
    for target in targets:
        validate.one_of("target", target, CARDS)
    if not HAS_TRITON:
        raise RuntimeError("compiled: needs Triton: pip install 'kvlearn[kernels]', on Linux")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return tuple(row for rows in pool.map(lambda target: _compile(target, only), targets) for row in rows)


def _compile(target: int, only: str) -> list[Compiled]:
    # Triton decides at import whether it compiles or interprets, and this process may have decided otherwise.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "kvlearn.kernels.forms", str(target), only]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr[-4000:]}")
    return [_row(values) for values in json.loads(done.stdout)]


def _row(values: dict[str, Any]) -> Compiled:
    for name in ("loads", "copies"):  # JSON's keys are strings
        values[name] = {int(width): count for width, count in values[name].items()}
    return Compiled(**values)


COLUMNS = (" warps", "regs", "stack", "  KiB", "fit", "16 B", "less", "async")


def table(rows: Sequence[Compiled], target: int) -> Table:
    """The rows of one target as a table; `LEGEND` explains the columns."""
    drawn = Table(
        title=f"sm_{target} ({CARDS[target]})",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=0,
    )
    drawn.add_column("form", no_wrap=True)
    for name in COLUMNS:
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_column("products", min_width=11)
    before = None
    for row in rows:
        if row.target != target:
            continue
        if before and before.group != row.group:
            drawn.add_section()
        again = before is not None and before.form == row.form
        form = f" then {row.kernel.removesuffix('_kernel')}" if again else row.form
        before = row
        if row.problem:
            drawn.add_row(form, *[""] * len(COLUMNS), f"[dim]{row.problem}[/dim]")
            continue
        narrow = sum(count for width, count in row.loads.items() if width < 16)
        drawn.add_row(
            form,
            str(row.num_warps),
            str(row.registers),
            f"[bold red]{row.stack}[/bold red]" if row.stack else "0",
            f"{row.shared / 1024:.1f}",
            str(row.programs),
            str(row.loads.get(16, 0)),
            f"[bold red]{narrow}[/bold red]" if narrow else "0",
            str(sum(row.copies.values())),
            ", ".join(f"{count} {name}" for name, count in sorted(row.products.items())) or "-",
        )
    return drawn


LEGEND = """\
warps    per program, of 32 threads each
regs     registers per thread, 255 at most; numbers that do not fit are kept in memory
stack    bytes per thread kept in memory; 0 is right
KiB, fit shared memory per program, and programs per multiprocessor
16 B     instructions that load 16 bytes of the cache per thread
less     instructions that load fewer bytes; 0 is right
async    instructions of both kinds that run ahead of the arithmetic (cp.async)
products on tensor cores. mma: of one warp, 16 rows; wgmma (from Hopper on) and tcgen05
         (Blackwell): of four warps, 64 rows or more"""


def main(
    target: Annotated[list[int] | None, typer.Option(help="Compute capability: 80, 90 or 100.")] = None,
    only: Annotated[str, typer.Option(help="Forms whose group or name contains this.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Compile every kernel without a GPU and print its resources."""
    targets = tuple(target or CARDS)
    try:
        rows = report(targets, only)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except RuntimeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    console = Console()
    for number in targets:
        console.print(table(rows, number))
    console.print(LEGEND, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
