"""The command ``kvlearn``: a thin door to the rooms that do the work.

Every command imports what it needs when it runs, so that ``kvlearn bench`` works where JupyterLab and its
friends are not installed.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="kvlearn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The command line of the course: look at this machine, grade exercises, measure, train.",
)


STUDIES = {
    "base": "train the base model that is committed with the course",
    "speed": "tokens/s of training",
    "convert": "the base model with other mechanisms, before and after 5% more training",
    "routing": "whether learning which pool a head reads pays, from nothing",
    "window_quality": "the base model with windows and sparse patterns, before and after 5% more training",
    "sinks": "what a window loses with the first token, where heads have made it their sink",
    "recall": "how many pairs of key and value a state of so many bytes gives back",
    "quality": "every mechanism trained on one budget: what compression costs (the plan: --list)",
}
RECORDED = ("convert", "routing", "window_quality", "sinks", "recall")


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="; ".join(f"{name}: {what}" for name, what in STUDIES.items()))],
    record: Annotated[bool, typer.Option("--record", help=f"keep the rows of {', '.join(RECORDED)}")] = False,
    preset: Annotated[str, typer.Option(help="of quality: minutes, cpu or gpu")] = "cpu",
    tier: Annotated[str, typer.Option(help="of quality: one tier of the preset, else all in turn")] = "",
    part: Annotated[int, typer.Option(help="of quality: one part of the tier, else all in turn")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="of quality: threads of torch; 0 leaves them")] = 0,
    seconds: Annotated[
        float, typer.Option(min=0, help="of quality: stop cleanly after so long; 0: never")
    ] = 0,
    list_them: Annotated[
        bool, typer.Option("--list", help="of quality: the plan and its cost; runs nothing")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="of quality: time each design and record its tokens/s")
    ] = False,
) -> None:
    """Train and evaluate; a run that was killed goes on where it stood (its state is in runs/).

    quality records each run when it is finished, and never repeats one that is recorded.
    """
    if name == "quality":
        from kvlearn.study.quality import command

        what = "list" if list_them else "calibrate" if calibrate else "run"
        try:
            command.study(what, preset, tier or None, part or None, threads=threads, seconds=seconds)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        return
    if tier or part or threads or seconds or list_them or calibrate or preset != "cpu":
        raise typer.BadParameter("these options belong to the study quality", param_hint="OPTIONS")
    if name not in STUDIES:
        raise typer.BadParameter(f"expected one of {', '.join(STUDIES)}; got {name!r}", param_hint="NAME")
    if record and name not in RECORDED:
        raise typer.BadParameter(f"only {', '.join(RECORDED)} have rows to keep", param_hint="--record")
    if name in RECORDED:
        _compare(name, record)
        return
    from kvlearn.study import SPEED_BAR, train_base, training_speed

    if name == "speed":
        rate = training_speed()
        verdict = "pass" if rate >= SPEED_BAR else "miss"
        typer.echo(f"{rate:,.0f} tokens/s; the bar is {SPEED_BAR:,} on 2 otherwise idle cores: {verdict}")
    else:
        for key, value in train_base().items():
            typer.echo(f"{key:16} {value}")


def _compare(name: str, record: bool) -> None:
    """Run a study of several models, show its table, and keep its rows if asked to."""
    from rich.console import Console

    from kvlearn.measure import results
    from kvlearn.measure.provenance import collect_provenance
    from kvlearn.study import (
        MASK_RUNS,
        RUNS,
        report,
        study_conversions,
        study_recall,
        study_routing,
        study_sinks,
    )

    if name == "routing":
        rows = list(study_routing())
        table = report.routing_table(rows)
    elif name == "sinks":
        rows = list(study_sinks())
        table = report.sinks_table(rows)
    elif name == "recall":
        rows = list(study_recall(jobs=os.cpu_count() or 1))
        table = report.recall_table(rows)
    else:
        runs = {"convert": RUNS, "window_quality": MASK_RUNS}[name]
        conversions = study_conversions(runs=runs, folder=Path("runs") / name)
        rows = [row for run in conversions for row in run]
        table = report.conversion_table(rows)
    report.show(table, Console())
    if record:
        path = results.save(name, f"kvlearn study {name} --record", rows, collect_provenance())
        typer.echo(f"recorded in {path.parent.name}/{path.name}")


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="a benchmark, or: all; without it, the list")] = "",
    record: Annotated[bool, typer.Option("--record", help="keep the rows in results/")] = False,
    out: Annotated[Path | None, typer.Option(help="keep the rows in this folder instead")] = None,
    only: Annotated[str, typer.Option(help="the parts whose names contain this")] = "",
    seconds: Annotated[float, typer.Option(min=0, help="begin no part after so long; 0: no limit")] = 0,
    small: Annotated[bool, typer.Option("--small", help="sizes that take seconds, to try it out")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda; cuda where there is one unless told")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="rows as JSON, one per line, for programs")] = False,
) -> None:
    """Measure this machine: bar, measured, pass or miss. A missed bar is a finding, not a failure."""
    from kvlearn.bench import command

    try:
        written = command.bench(command.Request(name, device, only, seconds, small, record, out, as_json))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if "decode" in written:
        _draw_decode(written["decode"])


def _draw_decode(path: Path) -> None:
    """The achieved bandwidth beside the rows that were recorded; nothing where no GPU was measured."""
    from kvlearn.bench.decode import bandwidth_points
    from kvlearn.measure import results

    arguments = bandwidth_points(results.read(path).rows)
    if arguments is not None:
        from kvlearn import plots

        path.with_suffix(".png").write_bytes(plots.achieved_bandwidth(**arguments).png())
        typer.echo(f"drawn in {path.parent.name}/{path.stem}.png", err=True)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Look at this machine: versions, memory, bandwidth, GPU, and what of the course will run how."""
    import json
    from dataclasses import asdict

    from rich.console import Console

    from kvlearn.measure.doctor import examine
    from kvlearn.measure.report import print_findings

    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1, ensure_ascii=False))
    else:
        print_findings(findings, Console())
    if any(finding.status == "wrong" for finding in findings):
        raise typer.Exit(1)


@app.command()
def grade(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH…", help="a notebook, or a folder: every notebook below it is graded"),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="a list of reports, for programs")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="one row per exercise, for a spreadsheet")] = False,
    as_html: Annotated[bool, typer.Option("--html", help="a page that needs nothing else")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="a file to write to")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="again whenever the notebook is saved")] = False,
    jobs: Annotated[int, typer.Option("-j", min=1, help="kernels at a time")] = 2,
    timeout: Annotated[float, typer.Option(min=1, help="seconds for one exercise")] = 60,
) -> None:
    """Run the answers in a notebook afresh and print their score. The notebook itself stays as it is."""
    _need_jupyter()
    from kvlearn.grading import commands

    styles = [style for style, asked in (("json", as_json), ("csv", as_csv), ("html", as_html)) if asked]
    if len(styles) > 1:
        raise typer.BadParameter("expected at most one of --json, --csv and --html")
    request = commands.Request(paths, styles[0] if styles else "table", output, jobs, timeout)
    if request.refusal:
        typer.echo(f"kvlearn: {request.refusal}", err=True)
        raise typer.Exit(2)
    if watch:
        commands.watch(request)
    elif commands.grade_and_show(request):
        raise typer.Exit(1)


@app.command()
def progress(
    path: Annotated[Path | None, typer.Argument(help="the folder of the exercises")] = None,
    jobs: Annotated[int, typer.Option("-j", min=1, help="kernels at a time")] = 2,
) -> None:
    """Show the whole course: what is solved, attempted and untouched, and the points."""
    _need_jupyter()
    from kvlearn.grading import commands

    if commands.progress(path, jobs):
        raise typer.Exit(1)


def _need_jupyter() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("nbclient", "nbformat", "ipykernel") if find_spec(name) is None]
    if missing:
        typer.echo(f"grading needs {', '.join(missing)}: pip install 'kvlearn[lab]'", err=True)
        raise typer.Exit(1)
