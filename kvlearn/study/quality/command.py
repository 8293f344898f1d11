"""The command ``kvlearn study quality``: list the plan with its cost, time designs, or run parts of it."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kvlearn.study import report as tables
from kvlearn.study.quality import report
from kvlearn.study.quality.plan import Part, parts, tiers
from kvlearn.study.quality.run import Costs, OutOfTime, Session, calibrate, recorded, run_part


def study(
    what: str,
    preset: str = "cpu",
    tier: str | None = None,
    part: int | None = None,
    *,
    threads: int = 0,
    seconds: float = 0.0,
) -> None:
    """``what`` is list, calibrate or run: a part, a tier or all of ``preset``; 0 ``seconds`` are no limit.

    Raises ValueError for a preset, tier or part that the plan does not have, and for gpu without a GPU.
    """
    chosen = [
        found
        for name in ([tier] if tier else tiers(preset))
        for found in parts(preset, name)
        if part in (None, found.number)
    ]
    if not chosen:
        raise ValueError(f"part: expected one that --list shows, got {part}")
    if threads:
        torch.set_num_threads(threads)
    on_gpu = preset == "gpu" and torch.cuda.is_available()
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    elif preset == "gpu" and what != "list":
        raise ValueError("preset: expected a CUDA device for gpu, got none")
    session = Session(
        device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu else "cpu",
        deadline=time.monotonic() + seconds if seconds else None,
        progress=sys.stderr.isatty(),
    )
    if what == "list":
        costs = Costs(session)
        known = on_gpu or preset != "gpu"
        totals = [sum(map(costs, found.runs)) if known else None for found in chosen]
        tables.show(report.plan_table(chosen, totals, recorded()), Console())
        if preset == "gpu":
            say("gpu: untried, torchrun too; --seconds 540 ends a call in 9 minutes, and the next goes on")
    elif what == "calibrate":
        rows = []
        for row in calibrate(preset, session):
            session.record([row])
            rows.append(row)
        tables.show(report.speed_table(rows), Console())
    else:
        run(chosen, session, record=preset != "minutes")


def say(line: str) -> None:
    """Print at once, also into a file."""
    print(line, flush=True)


def run(chosen: Sequence[Part], session: Session, *, record: bool) -> None:
    """Run parts until they or the session's seconds end, then show the tables of all that is recorded."""
    rows: list[dict[str, Any]] = []
    try:
        for found in chosen:
            say(f"{found.preset} {found.tier}{found.number}: {found.title}, {len(found.runs)} runs")
            rows += run_part(found, session, record=record, say=say)
    except OutOfTime as reason:
        say(f"the time is over: {reason}; the same command goes on from here")
    budget = "gpu" if chosen[0].preset == "gpu" else "cpu"
    shown: dict[str, Callable[[Sequence[dict[str, Any]]], Table]] = {
        "language": lambda own: report.language_table(own, budget),
        "recall": lambda own: report.recall_table(own, chosen[0].preset),
        "conversion": report.conversion_table,
    }
    everything = recorded() if record else rows
    for kind, table in shown.items():
        own = [row for row in everything if row["kind"] == kind]
        if own:
            tables.show(table(own), Console())
