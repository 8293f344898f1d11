"""The table that ``kvlearn doctor`` prints."""

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvlearn.measure.doctor import Finding

MARKS = {"ok": "[green]✓[/]", "note": "[yellow]![/]", "wrong": "[bold red]✗[/]"}


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
        table.add_row(MARKS[finding.status], escape(finding.name), escape(finding.value))
    console.print(table)
    for finding in findings:
        if finding.advice:
            console.print(
                f"{MARKS[finding.status]} {escape(finding.name)}: {escape(finding.advice)}", soft_wrap=True
            )
    if all(finding.status == "ok" for finding in findings):
        console.print("[green]Everything that the course needs is here.[/]")
