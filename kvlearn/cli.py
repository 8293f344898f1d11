"""The command ``kvlearn``.

Every command imports what it needs when it runs: ``kvlearn bench`` works where JupyterLab is not installed,
and what is asked for wrongly is refused before torch is imported.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from kvlearn.grading.work import Outcome

EXIT_CODES = (
    "Exit codes: 0, it was done (a low score or a missed bar is a result); 1, something of it could not be "
    "done, stderr says what; 2, the command was written wrongly; 130, ended with Ctrl+C."
)

app = typer.Typer(
    name="kvlearn",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The command line of the course: start, grade exercises, see progress, measure this machine, train.",
    epilog=EXIT_CODES,
)


def _version(asked: bool) -> None:
    if asked:
        import kvlearn

        typer.echo(f"kvlearn {kvlearn.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="the version, and nothing else"),
    ] = False,
) -> None:
    """Options that come before a command."""
    import sys

    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # where names and signs have no character, "?" is better than an end
        if not (stream.encoding or "").lower().startswith("utf") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _fail(reason: object, code: int = 1) -> NoReturn:
    typer.echo(f"kvlearn: {reason}", err=True)
    raise typer.Exit(code)


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))


def _units(incomplete: str) -> list[str]:
    """For the shell: the units' names."""
    from kvlearn.grading.folders import solutions_root, unit_names

    return [name for name in unit_names(solutions_root()) if name.startswith(incomplete)]


def _exercises(incomplete: str) -> list[str]:
    """For the shell: the exercises' ids."""
    from kvlearn.grading.folders import solutions_root, titles

    solutions = solutions_root()
    return [
        name
        for unit in _units(incomplete[:2])
        for name in titles(unit, solutions)
        if name.startswith(incomplete)
    ]


def _studies(incomplete: str) -> list[str]:
    return [name for name in STUDIES if name.startswith(incomplete)]


@app.command()
def start(
    units: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="UNIT", help="names or numbers; all of them unless told", autocompletion=_units
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="what became of each unit, for programs")] = False,
) -> None:
    """Copy the exercises to work/, where you solve them, and bring what is new in the course into the copies.

    Where kvlearn is an installed wheel, the chapters are copied to notebooks/ beside work/ as well.

    Nothing that you wrote is lost: answers stay as they are, and before a notebook is changed, a copy of it
    goes to work/kept.
    """
    from kvlearn.grading import work
    from kvlearn.grading.folders import chapters_root, solutions_root, unit_named, unit_names, work_root

    solutions, chapters = solutions_root(), chapters_root()
    try:
        chosen = [unit_named(name, solutions) for name in units or unit_names(solutions)]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="UNIT") from None
    try:
        outcomes = work.start(list(dict.fromkeys(chosen)), work_root())
        copied = (
            work.copy_chapters(chapters, work_root().parent / "notebooks", work_root()) if chapters else []
        )
    except OSError as error:
        _fail(work.reason(error))
    _show_outcomes(outcomes, as_json)
    for line in copied:
        typer.echo(line, err=as_json)
    failed = [outcome for outcome in outcomes if outcome.what == "failed"]
    for outcome in failed:
        typer.echo(f"kvlearn: {outcome.unit}: {'; '.join(outcome.lines)}", err=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def reset(
    exercise: Annotated[str, typer.Argument(help="as 01.3", autocompletion=_exercises)],
    as_json: Annotated[bool, typer.Option("--json", help="what became of the unit, for programs")] = False,
) -> None:
    """Give one exercise in work/ back as it was given. Your notebook as it was goes to work/kept."""
    from kvlearn.grading import work
    from kvlearn.grading.folders import solutions_root, titles, unit_named, work_root
    from kvlearn.grading.submission import Unusable, tasks_of

    solutions = solutions_root()
    try:
        unit = unit_named(exercise.split(".")[0], solutions)
        known = [task.id for task in tasks_of(unit, solutions)[0]]
    except ValueError:
        unit, known = "", [name for each in _units("") for name in titles(each, solutions)]
    if exercise not in known:
        expected = f"expected one of {', '.join(known)}; got {exercise!r}"
        raise typer.BadParameter(expected, param_hint="EXERCISE")
    try:
        outcome = work.reset(exercise, unit, work_root())
    except (OSError, Unusable) as error:
        _fail(work.reason(error))
    _show_outcomes([outcome], as_json)


def _show_outcomes(outcomes: "list[Outcome]", as_json: bool) -> None:
    from kvlearn.grading import work

    if as_json:
        _print_json([outcome.to_json() for outcome in outcomes])
        return
    for line in work.tell(outcomes):
        typer.echo(line)


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
PRESETS = ("minutes", "cpu", "gpu")  # of the study quality


@app.command()
def study(
    name: Annotated[
        str, typer.Argument(help="a study; without one, they are listed", autocompletion=_studies)
    ] = "",
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
    as_json: Annotated[
        bool, typer.Option("--json", help="the list, or the study's rows, for programs")
    ] = False,
) -> None:
    """Train and evaluate; a run that was killed continues where it stopped (its state is in runs/).

    quality records each run when it is finished, and never repeats one that is recorded.
    """
    if name and name not in STUDIES:
        raise typer.BadParameter(f"expected one of {', '.join(STUDIES)}; got {name!r}", param_hint="NAME")
    if preset not in PRESETS:
        raise typer.BadParameter(
            f"expected one of {', '.join(PRESETS)}; got {preset!r}", param_hint="--preset"
        )
    if as_json and name == "quality":
        raise typer.BadParameter("quality keeps its rows in results/, as JSON", param_hint="--json")
    if name == "quality":
        from kvlearn.study.quality import command

        what = "list" if list_them else "calibrate" if calibrate else "run"
        try:
            command.study(what, preset, tier or None, part or None, threads=threads, seconds=seconds)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        return
    if tier or part or threads or seconds or (list_them and name) or calibrate or preset != "cpu":
        raise typer.BadParameter("these options belong to the study quality", param_hint="OPTIONS")
    if record and name not in RECORDED:
        raise typer.BadParameter(f"only {', '.join(RECORDED)} have rows to keep", param_hint="--record")
    if not name:
        _list_studies(as_json)
        return
    if name in RECORDED:
        _compare(name, record, as_json)
        return
    from kvlearn.study import SPEED_BAR, train_base, training_speed

    if name == "speed":
        rate = training_speed()
        verdict = "pass" if rate >= SPEED_BAR else "miss"
        if as_json:
            _print_json({"tokens_per_second": rate, "bar": SPEED_BAR, "verdict": verdict})
            return
        typer.echo(f"{rate:,.0f} tokens/s; the bar is {SPEED_BAR:,} on 2 otherwise idle cores: {verdict}")
    else:
        trained = train_base()
        if as_json:
            _print_json(trained)
            return
        for key, value in trained.items():
            typer.echo(f"{key:16} {value}")


def _list_studies(as_json: bool) -> None:
    if as_json:
        _print_json([{"name": name, "about": about} for name, about in STUDIES.items()])
        return
    for name, about in STUDIES.items():
        typer.echo(f"{name:14} {about}")


def _compare(name: str, record: bool, as_json: bool) -> None:
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
    if as_json:
        _print_json(rows)
    else:
        report.show(table, Console())
    if record:
        path = results.save(name, f"kvlearn study {name} --record", rows, collect_provenance())
        typer.echo(f"recorded in {path.parent.name}/{path.name}", err=as_json)


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
        list[Path] | None,
        typer.Argument(
            metavar="PATH",
            help="a notebook, a folder (every notebook below it is graded), or a unit's name or number in "
            "work/; all of work/ unless told, or exercises/ where there is none",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="a list of reports, for programs")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="one row per exercise, for a spreadsheet")] = False,
    as_html: Annotated[bool, typer.Option("--html", help="a page that needs nothing else")] = False,
    gradebook: Annotated[
        str,
        typer.Option(
            metavar="canvas|moodle", help="a CSV for that gradebook: one row per student, units as columns"
        ),
    ] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="a file to write to")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="again whenever a notebook is saved")] = False,
    jobs: Annotated[int, typer.Option("-j", min=1, help="kernels at a time")] = 2,
    timeout: Annotated[float, typer.Option(min=1, help="seconds for one exercise")] = 60,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="keep each notebook's results there as they come, and run no notebook again that is as it "
            "was; with -o and several notebooks it is FILE.kept unless told",
        ),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="run them all; replace what was kept")] = False,
    part: Annotated[
        str, typer.Option(metavar="K/N", help="only the K-th of N parts of the notebooks, for a cluster")
    ] = "1/1",
    container: Annotated[
        str,
        typer.Option(
            metavar="IMAGE",
            help="each notebook in a container of this image (podman or docker): no network, read-only",
        ),
    ] = "",
) -> None:
    """Run the answers in a notebook afresh and print their score. The notebook itself stays as it is."""
    styles = [style for style, asked in (("json", as_json), ("csv", as_csv), ("html", as_html)) if asked]
    if gradebook:
        if gradebook not in ("canvas", "moodle"):
            raise typer.BadParameter(f"--gradebook: expected canvas or moodle, got {gradebook!r}")
        styles.append(gradebook)
    if len(styles) > 1:
        raise typer.BadParameter("expected at most one of --json, --csv, --html and --gradebook")
    k, n = _part(part)
    _need_jupyter()
    from kvlearn.grading.course import chosen
    from kvlearn.grading.folders import solutions_root
    from kvlearn.grading.submission import find_all

    asked = chosen(paths or [])
    found, faults = find_all(asked, solutions_root())
    if not found:  # said before torch is imported
        for fault in faults:
            typer.echo(f"kvlearn: {fault}", err=True)
        if as_json:
            typer.echo("[]")
        raise typer.Exit(1)
    from kvlearn.grading import commands

    style = styles[0] if styles else "table"
    request = commands.Request(asked, style, output, jobs, timeout, None, (k, n), container)
    if request.refusal:
        _fail(request.refusal, 2)
    if keep is None and output is not None and len(found) > 1 and (output.is_file() or not output.exists()):
        keep = output.with_name(f"{output.name}.kept")
    try:
        request = request.keeping(keep, again=again)
    except OSError as error:
        _fail(f"{keep}: {error.strerror or error}", 2)
    try:
        if watch:
            commands.watch(request)
        elif commands.grade_and_show(request):
            raise typer.Exit(1)
    except commands.Interrupted as interrupted:
        raise typer.Exit(128 + interrupted.number) from None


def _part(text: str) -> tuple[int, int]:
    """K and N of "K/N"."""
    first, _, last = text.partition("/")
    if first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last):
        return int(first), int(last)
    raise typer.BadParameter(f"expected K/N with 1 ≤ K ≤ N; got {text!r}", param_hint="--part")


@app.command()
def progress(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="a unit's name or number, for its exercises one by one, or a folder of exercises; all of "
            "work/ unless told, or of exercises/",
            autocompletion=_units,
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("-j", min=1, help="kernels at a time")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="every exercise, for programs")] = False,
    as_html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="write a page of it too, for others to see")
    ] = None,
) -> None:
    """Show the whole course: exercises solved, attempted and untouched, points, hints used and the next step.

    Only answers that changed since their last check are run.
    """
    _need_jupyter()
    from kvlearn.grading import course
    from kvlearn.grading.report import refusal

    if as_html is not None and (reason := refusal(as_html, [])):
        _fail(reason, 2)
    if course.survey(path, jobs, as_json=as_json, as_html=as_html):
        raise typer.Exit(1)


def _need_jupyter() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("nbclient", "nbformat", "ipykernel") if find_spec(name) is None]
    if missing:
        typer.echo(f"grading needs {', '.join(missing)}: pip install 'kvlearn[lab]'", err=True)
        raise typer.Exit(1)


for _command in app.registered_commands:
    _command.epilog = _command.epilog or EXIT_CODES
