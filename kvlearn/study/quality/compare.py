"""Recorded rows compared: designs with full attention, seed by seed; what of the plan has not run yet."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from kvlearn import validate
from kvlearn.study.quality.plan import BUDGETS, Run, parts, tiers
from kvlearn.study.quality.statistics import (
    Difference,
    Summary,
    paired_difference,
    paired_values,
    pooled_spread,
    smallest_difference,
    summarise,
)

ENOUGH = 3  # seeds that the plan gives every design; a rate that has fewer has just begun
Row = Mapping[str, Any]
Value = Callable[[Row], float | None]
R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class Compared:
    """A design at its best learning rate, beside full attention.

    ``difference`` is estimated from this design's seeds alone, ``pooled`` with the spread of all designs.
    """

    design: str
    lr: float
    losses: dict[int, float | None]  # by seed; None is a run that diverged
    summary: Summary
    difference: Difference | None
    pooled: Difference | None
    rows: list[Row]


def one_per_run(rows: Iterable[R]) -> list[R]:
    """Of a run that several machines have recorded, the latest row: it must not count twice."""
    latest: dict[str, R] = {}
    for row in rows:
        known = latest.get(row["run"])
        if known is None or known["provenance"]["date"] <= row["provenance"]["date"]:
            latest[row["run"]] = row
    return list(latest.values())


def loss(row: Row) -> float | None:
    """The loss on held-out text, None of a run that diverged."""
    return row["loss"]


def far_loss(row: Row) -> float | None:
    """The loss on tokens that repeat something far above, where recall shows."""
    return None if row["loss"] is None else row["slices"]["far"]["loss"]


def final_runs(rows: Iterable[Row], budget: str = "cpu") -> dict[str, list[Row]]:
    """Of each design the language runs of the whole budget, at the learning rate that its short runs chose.

    The rate is the one with the lowest loss in a short run, among those with long runs of ``ENOUGH`` seeds,
    or of as many as any rate has.
    """
    validate.one_of("budget", budget, BUDGETS)
    mine = [row for row in rows if row["kind"] == "language" and row["budget"] == budget]
    whole = BUDGETS[budget].training.steps
    found: dict[str, list[Row]] = {}
    for design in dict.fromkeys(row["design"] for row in mine):
        own = [row for row in mine if row["design"] == design]
        final = [row for row in own if row["settings"]["training"]["steps"] == whole]
        short = {row["lr"]: row["loss"] for row in own if row["settings"]["training"]["steps"] < whole}
        seeds = Counter(row["lr"] for row in final)
        if seeds:
            rates = [lr for lr, n in seeds.items() if n >= min(ENOUGH, max(seeds.values()))]
            best = min(rates, key=lambda lr: float("inf") if short.get(lr) is None else short[lr])
            found[design] = sorted((row for row in final if row["lr"] == best), key=lambda row: row["seed"])
    return found


def compare(
    rows: Iterable[Row], budget: str = "cpu", *, baseline: str = "full", value: Value = loss
) -> list[Compared]:
    """Every design beside ``baseline``: differences of runs of the same seed; diverged runs are left out."""
    runs = final_runs(rows, budget)
    by_seed = {design: {row["seed"]: value(row) for row in own} for design, own in runs.items()}
    theirs = by_seed.get(baseline, {})
    pairs = {design: paired_values(ours, theirs) for design, ours in by_seed.items() if design != baseline}
    pool = pooled_spread(list(by_seed.values()))
    found = []
    for design, own in runs.items():
        values = pairs.get(design, [])
        found.append(
            Compared(
                design,
                own[0]["lr"],
                by_seed[design],
                summarise(list(by_seed[design].values())),
                paired_difference(values),
                None if pool is None else paired_difference(values, spread=pool[0], df=pool[1]),
                own,
            )
        )
    return found


def visible_difference(rows: Iterable[Row], budget: str = "cpu", n_seeds: int = 3) -> float | None:
    """The smallest difference that ``n_seeds`` seeds show, from the spread of full attention's runs alone."""
    full = next((item for item in compare(rows, budget) if item.design == "full"), None)
    if full is None or full.summary.spread is None:
        return None
    return smallest_difference(full.summary.spread, full.summary.n - 1, n_seeds)


def best_recall(rows: Iterable[Row], preset: str = "cpu") -> dict[tuple[str, str], list[Row]]:
    """The recall runs of each task and design, at the rate with the lowest loss on the first seed.

    Of one ``preset``: others have tasks of the same names, of other lengths.
    """
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["kind"] == "recall" and row["run"].startswith(f"recall-{preset}-"):
            cells.setdefault((row["task"], row["design"]), []).append(row)
    found = {}
    for cell, own in cells.items():
        first = min(row["seed"] for row in own)
        best = min(
            (row for row in own if row["seed"] == first),
            key=lambda row: float("inf") if row["loss"] is None else row["loss"],
        )
        found[cell] = sorted((row for row in own if row["lr"] == best["lr"]), key=lambda row: row["seed"])
    return found


@dataclass(frozen=True)
class Progress:
    """How many runs of a part have been recorded."""

    preset: str
    tier: str
    part: int
    title: str
    done: int
    total: int


def progress(rows: Sequence[Row], preset: str = "cpu") -> list[Progress]:
    """The recorded share of the plan, part by part; nothing is trained to find out."""
    names = {row["run"]: row for row in rows}
    return [
        Progress(
            preset,
            tier,
            part.number,
            part.title,
            sum(_is_done(run, names) for run in part.runs),
            len(part.runs),
        )
        for tier in tiers(preset)
        for part in parts(preset, tier)
    ]


def _is_done(run: Run, names: Mapping[str, Row]) -> bool:
    if run.lr is None:
        tried = [names.get(candidate.name) for candidate in run.candidates]
        done = [row for row in tried if row is not None]
        if len(done) < len(tried):
            return False
        best = min(done, key=lambda row: float("inf") if row["loss"] is None else row["loss"])
        run = replace(run, lr=best["lr"])
    return run.name in names
