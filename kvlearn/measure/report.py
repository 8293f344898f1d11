"""The tables that ``kvlearn bench`` and ``kvlearn doctor`` print."""

from collections.abc import Iterable

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table

from kvlearn.measure.bench import BENCHMARKS, Row, run_benchmark
from kvlearn.measure.doctor import Finding
from kvlearn.measure.provenance import machine

MARKS = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "wrong": "[bold red]✗[/]"}


def run_and_print(name: str, device: torch.device | str, console: Console) -> list[Row]:
    """Runs a benchmark, shows each row as it is measured, and returns them all."""
    return print_rows(f"{name}: {BENCHMARKS[name]}", run_benchmark(name, device), device, console)


def print_rows(
    title: str, measured_rows: Iterable[Row], device: torch.device | str, console: Console
) -> list[Row]:
    """Shows each row as it is measured, and returns them all."""
    table = Table(
        "case",
        title=title,
        caption=f"measured on {machine(device)}",
        title_justify="left",
        box=SIMPLE,
        caption_justify="left",
    )
    for column in ("bar", "measured", "quartiles"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    rows = []
    if not console.is_terminal:  # a log must hold what was measured even when the run is cut short
        console.print(f"{table.title}\n{table.caption}", highlight=False, soft_wrap=True)
        for row in measured_rows:
            case, bar, measured, quartiles, verdict = row.texts()
            line = f"{case:64} {bar:>15} {measured:>12} {quartiles:>23}  {verdict}"
            console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)
            rows.append(row)
        return rows
    with Live(table, console=console, refresh_per_second=2):
        for row in measured_rows:
            *texts, verdict = row.texts()
            table.add_row(*texts, f"[{'green' if row.passed else 'red'}]{verdict}[/]")
            rows.append(row)
    return rows


def print_findings(findings: Iterable[Finding], console: Console) -> None:
    """The doctor's report, and at its end a line for everything that needs doing."""
    findings = list(findings)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            table.add_row("", f"[bold]{section}[/]", "")
        table.add_row(MARKS[finding.status], finding.name, finding.value)
    console.print(table)
    for finding in findings:
        if finding.advice:
            console.print(f"{MARKS[finding.status]} {finding.name}: {finding.advice}", soft_wrap=True)
    if all(finding.status == "ok" for finding in findings):
        console.print("[green]Everything that the course needs is here.[/]")
