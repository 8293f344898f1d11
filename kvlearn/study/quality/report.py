"""The tables that ``kvlearn study quality`` prints: the plan with its cost, and the results."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from kvlearn.study.curve import mean_and_error
from kvlearn.study.quality.compare import Row, best_recall, compare, far_loss, progress, visible_difference
from kvlearn.study.quality.plan import Part
from kvlearn.study.quality.statistics import CONFIDENCE, Difference, Summary, summarise


def plan_table(parts: Iterable[Part], seconds: Sequence[float | None], rows: Sequence[Row]) -> Table:
    """A line per part: its runs, how many are recorded, and the minutes that all of it takes."""
    table = _table(
        "The plan",
        "minutes: from working time per step; evaluation, and other work of the machine, come on top",
    )
    for column in ("tier", "part", "what", "runs", "recorded", "minutes"):
        table.add_column(column, justify="left" if column == "what" else "right")
    state: dict[Any, Any] = {}
    for part, its_seconds in zip(parts, seconds, strict=True):
        if part.preset not in state:
            state[part.preset] = {(item.tier, item.part): item for item in progress(rows, part.preset)}
        done = state[part.preset][part.tier, part.number].done
        table.add_row(
            part.tier,
            str(part.number),
            part.title,
            str(len(part.runs)),
            str(done),
            "–" if its_seconds is None else f"{its_seconds / 60:.0f}",
        )
    table.add_section()
    known = [its_seconds for its_seconds in seconds if its_seconds is not None]
    table.add_row("", "", "all", "", "", f"{sum(known) / 60:.0f}" if len(known) == len(seconds) else "–")
    return table


def language_table(rows: Sequence[Row], budget: str = "cpu") -> Table:
    """A line per design: loss, its distance from full attention with the interval, tie or not, and bytes."""
    visible = visible_difference(rows, budget)
    table = _table(
        "Language: loss on held-out text in nats per byte, mean ± spread over seeds",
        f"above full: paired by seed, {CONFIDENCE:.0%} interval with the spread pooled over the designs; "
        "far: on tokens that repeat something far above; stored: bytes of cache at the trained length"
        + ("" if visible is None else f"; three seeds show differences from {visible:.3f} on"),
    )
    for column in ("design", "rate", "seeds", "loss", "above full", "far, above full", "stored at L"):
        table.add_column(column, justify="left" if column == "design" else "right")
    far = {item.design: item for item in compare(rows, budget, value=far_loss)}
    for item in compare(rows, budget):
        summary = item.summary
        mean = "–" if summary.mean is None else f"{summary.mean:.4f}"
        spread = "" if summary.spread is None else f" ± {summary.spread:.4f}"
        stored = next((row["memory"][0]["stored"] for row in item.rows if "memory" in row), None)
        table.add_row(
            item.design,
            f"{item.lr:g}",
            seeds(summary),
            mean + spread,
            difference(item.pooled),
            difference(far[item.design].pooled),
            "–" if stored is None else f"{stored:,}",
        )
    return table


def difference(found: Difference | None) -> str:
    """ "+0.0120 [+0.0040, +0.0200]", and the word tie where the interval holds 0."""
    if found is None:
        return "–"
    interval = f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
    return f"{interval} tie" if found.tie else interval


def seeds(summary: Summary) -> str:
    """How many seeds a mean is of, and how many are in none because they diverged."""
    return f"{summary.n}" + (f", {summary.diverged} diverged" if summary.diverged else "")


def recall_table(rows: Sequence[Row], preset: str = "cpu") -> Table:
    """A line per task and design: accuracy at the trained length and beyond, and bytes of state."""
    table = _table("Recall: share of right answers, mean ± spread over seeds", None)
    cells = best_recall(rows, preset)
    for column in ("task", "design", "rate", "seeds", "accuracy", "longer texts", "state"):
        table.add_column(column, justify="left" if column in ("task", "design") else "right")
    for (task, design), own in cells.items():
        accuracies = summarise([row.get("accuracy") for row in own])
        longer: dict[int, list[float]] = {}
        for row in own:
            for beyond in row.get("longer", []):
                longer.setdefault(beyond["length"], []).append(beyond["accuracy"])
        table.add_row(
            task,
            design,
            f"{own[0]['lr']:g}",
            seeds(accuracies),
            "–"
            if accuracies.mean is None
            else f"{accuracies.mean:.3f}"
            + ("" if accuracies.spread is None else f" ± {accuracies.spread:.3f}"),
            ", ".join(f"{length}: {mean_and_error(values)[0]:.2f}" for length, values in longer.items()),
            f"{own[0]['state_bytes']:,} B",
        )
    return table


def conversion_table(rows: Sequence[Row]) -> Table:
    """A line per conversion, share and rate: the loss on each text above that of the base model."""
    table = _table(
        "Conversions: loss above the base model's in nats per byte, before and after more training",
        "mean ± spread over seeds, which draw the batches; a text other than sympy shows what was forgotten",
    )
    mine = [row for row in rows if row["kind"] == "conversion"]
    texts = list(mine[0]["base"]) if mine else []
    for column in (
        "run",
        "share",
        "rate",
        "seeds",
        *(f"{text} {when}" for text in texts for when in ("before", "after")),
    ):
        table.add_column(column, justify="left" if column == "run" else "right")
    groups: dict[tuple[str, float, float], list[Row]] = {}
    for row in mine:
        groups.setdefault((row["design"], row["share"], row["lr"]), []).append(row)
    for (design, share, lr), own in sorted(groups.items()):
        cells = []
        for text in texts:
            before = mean_and_error([row["before"][text]["loss"] - row["base"][text]["loss"] for row in own])[
                0
            ]
            after = summarise(
                [
                    None if row["diverged"] else row["after"][text]["loss"] - row["base"][text]["loss"]
                    for row in own
                ]
            )
            spread = "" if after.spread is None else f" ± {after.spread:.3f}"
            cells += [f"{before:+.3f}", "diverged" if after.mean is None else f"{after.mean:+.3f}{spread}"]
        finished = summarise([None if row["diverged"] else row["loss"] for row in own])
        table.add_row(design, f"{share:.0%}", f"{lr:g}", seeds(finished), *cells)
    return table


def speed_table(rows: Sequence[Row]) -> Table:
    """A line per design and number of threads: tokens per second of training, and times slower than full."""
    table = _table("Training speed", "the bar is a multiple of full attention's time per token")
    for column in ("design", "threads", "tokens/s", "times full", "bar", "verdict"):
        table.add_column(column, justify="left" if column == "design" else "right")
    for row in (row for row in rows if "times_full" in row):
        verdict = "pass" if row["times_full"] <= row["bar"] else "miss"
        table.add_row(
            row["design"],
            str(row["provenance"]["threads"]),
            f"{row['tokens_per_s']:,.0f}",
            f"{row['times_full']:.2f}",
            f"{row['bar']:g}",
            verdict,
        )
    return table


def _table(title: str, caption: str | None) -> Table:
    return Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=SIMPLE)
