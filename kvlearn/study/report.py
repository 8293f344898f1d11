"""The tables that ``kvlearn study`` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from kvlearn.study import capacity
from kvlearn.study.routing import compare

STORED, READ = "bytes_stored_per_token", "bytes_read_per_token"


def conversion_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line a run: loss on the corpus before and after, how far above the control on each text, the cost."""
    texts = list(rows[0]["losses"])
    columns = [f"{texts[0]} before", "after", *(f"above full: {text}" for text in texts)]
    table = _table(
        "Converted, then trained on: loss in nats per byte on held-out text, ± standard error over windows",
        ["run", *columns, "stored", "read", "seconds"],
    )
    for name in dict.fromkeys(row["run"] for row in rows):
        curve = [row for row in rows if row["run"] == name]
        first, last = curve[0], curve[-1]
        table.add_row(
            name,
            *(f"{row['losses'][texts[0]]['loss']:.3f}" for row in (first, last)),
            *(
                _with_error(last["losses"][text]["excess"], last["losses"][text]["excess_error"])
                for text in texts
            ),
            f"{last[STORED]} B",
            f"{last[READ]} B",
            f"{sum(row['seconds'] for row in curve):.0f}",
        )
    return table


def routing_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line a kind: its loss, and how far that is above grouped attention's, with errors over the seeds."""
    n_seeds = len({row["seed"] for row in rows})
    table = _table(
        f"Trained from nothing: nats per byte on held-out text, ± standard error over {n_seeds} seeds",
        ["run", "loss", "above gqa", "stored", "read", "seconds a run"],
    )
    for kind, numbers in compare(rows).items():
        runs = [row for row in rows if row["run"] == kind]
        table.add_row(
            kind,
            _with_error(*numbers["loss"]),
            _with_error(*numbers["above_gqa"]),
            f"{runs[0][STORED]} B",
            f"{runs[0][READ]} B",
            f"{sum(row['seconds'] for row in runs) / len(runs):.0f}",
        )
    return table


def sinks_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line a model and variant: its loss, and that of the positions far behind the first window."""
    table = _table(
        "A window on a model with and without a sink: loss in nats per byte, ± standard error over windows",
        ["run", "weight on the first token", "variant", "loss", "last quarter"],
    )
    for row in rows:
        quarter = row["by_position"][-len(row["by_position"]) // 4 :]
        table.add_row(
            row["run"],
            f"{row['first_token_weight']:.1%}",
            row["variant"],
            _with_error(row["loss"], row["error"]),
            f"{sum(quarter) / len(quarter):.3f}",
        )
    return table


def recall_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line a mechanism and task: the share of right answers at its best learning rate."""
    n_seeds = len({row["seed"] for row in rows})
    table = _table(
        f"Recall: share of right answers at the best learning rate, ± standard error over {n_seeds} seeds",
        ["run", "pairs", "state", "accuracy", "learning rate", "seconds a run"],
    )
    for cell in capacity.compare(rows):
        table.add_row(
            cell.run,
            f"{cell.n_pairs}",
            f"{cell.state_bytes} B",
            _with_error(cell.accuracy, cell.error),
            f"{cell.lr:g}",
            f"{cell.seconds:.1f}",
        )
    return table


def show(table: Table, console: Console) -> None:
    """Print ``table`` whole: in a narrow terminal its lines are wrapped, and no number is cut off."""
    unlimited = console.options.update(max_width=10_000)
    console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    console.print(table, soft_wrap=True)


def _table(title: str, columns: Sequence[str]) -> Table:
    caption = (
        "stored and read: bytes of cache a token, all layers, 16-bit numbers" if "read" in columns else None
    )
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=SIMPLE)
    for column in columns:
        table.add_column(column, justify="left" if column == "run" else "right")
    return table


def _with_error(value: float, error: float) -> str:
    return f"{value:.3f} ± {error:.3f}"
