"""Running the plan: one run at a time, resumable, each finished run a row of results/quality-MACHINE.json.

A run that was killed goes on from its checkpoint in runs/quality. One that is finished is found in results/,
of whichever machine, and not repeated: if its sources have the hash of ours, or if its first recorded losses
come out again.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import kvlearn
from kvlearn.files import read_json, replacing
from kvlearn.measure import collect_provenance, results
from kvlearn.measure.provenance import cpu_model
from kvlearn.model import Decoder
from kvlearn.study import recall
from kvlearn.study.base import base_model
from kvlearn.study.conversion import RUNS as CONVERSIONS
from kvlearn.study.conversion import prepare_conversion
from kvlearn.study.curve import mean_and_error
from kvlearn.study.evaluation import spread_windows, token_losses
from kvlearn.study.other_text import other_texts
from kvlearn.study.quality.compare import one_per_run
from kvlearn.study.quality.evaluate import TrainingText, evaluate_language, memory
from kvlearn.study.quality.plan import (
    BAR,
    BUDGETS,
    LONGER,
    SLOW,
    SLOW_BAR,
    ConversionRun,
    LanguageRun,
    Part,
    RecallRun,
    Run,
    parts,
    tiers,
)
from kvlearn.study.tasks import longer
from kvlearn.study.text import Corpus, corpus
from kvlearn.study.training import TrainConfig, TrainingDiverged, TrainingStopped, train

NAME, COMMAND = "quality", "kvlearn study quality"
SOURCES = ("attention", "model", "study")  # the folders of the package that the numbers depend on
REPRODUCED_STEPS, TOLERANCE = 20, 1e-3  # nats
CHECKPOINT_EVERY = 100  # steps
CONVERSION_WINDOWS = 64


class OutOfTime(Exception):
    """The session's seconds are over; finished work is kept."""


def source_hash() -> str:
    """SHA-256 over the sources and the base model's weights that a row depends on, 16 digits."""
    root, total = Path(kvlearn.__file__).parent, hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".safetensors"):
                total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


@dataclass
class Session:
    """Where a study reads and writes, on what it runs, and until when."""

    runs: Path = Path("runs/quality")
    results: Path | None = None  # the repository's unless given
    device: torch.device | str = "cpu"
    deadline: float | None = None  # of time.monotonic()
    progress: bool = False
    text: Corpus = field(default_factory=corpus)
    sources: str = field(default_factory=source_hash)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Values that every row of this session gets; the bandwidth is measured once."""
        return {**collect_provenance(self.device), "cpu": cpu_model(), "sources": self.sources}

    @property
    def machine(self) -> str:
        """This machine's name, the same to the end: its number of cores may change while a study runs."""
        name: str = self.provenance["machine"]
        return name

    @cached_property
    def trained_on(self) -> TrainingText:
        return TrainingText(self.text.train)

    @cached_property
    def other_texts(self) -> dict[str, torch.Tensor]:
        return other_texts()

    @cached_property
    def base_losses(self) -> dict[str, dict[str, float]]:
        """Of the base model, which all conversions start from."""
        return self.losses(base_model().to(self.device))

    def losses(self, model: Decoder) -> dict[str, dict[str, float]]:
        """Loss and standard error of ``model`` on the corpus, held out, and on text of another kind."""
        found = {}
        for name, text in {"sympy": self.text.valid, **self.other_texts}.items():
            windows = self.trained_on.without_copies(spread_windows(text, 512, CONVERSION_WINDOWS))
            loss, error = mean_and_error(token_losses(model, windows).mean(1).tolist())
            found[name] = {"loss": loss, "error": error}
        return found

    def rows(self) -> list[dict[str, Any]]:
        """All recorded runs, of every machine: of one run those of several sources."""
        return everything(self.results)

    def checkpoint(self, run: Run) -> Path:
        """The file of a run's state; other sources have another."""
        return self.runs / f"{run.name}-{self.sources[:8]}.pt"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while the file of results is read and written again: parts may run side by side."""
        import fcntl

        self.runs.mkdir(parents=True, exist_ok=True)
        with (self.runs / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def record(self, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Add ``rows`` to this machine's file, in place of older ones of the same names."""
        with self.lock():
            names = {row["run"] for row in rows}
            ours = [
                row
                for file in results.load(NAME, self.results)
                if file.provenance["machine"] == self.machine
                for row in file.rows
                if row["run"] not in names
            ]
            return results.save(NAME, COMMAND, [*ours, *rows], self.provenance, self.results)


def working_time(device: torch.device | str) -> float:
    """A clock in seconds: of one thread on a CPU, its processor time, whatever else the machine does."""
    one_thread = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if one_thread else time.perf_counter()


class Clock:
    """``stop`` for ``train``: notes the time of each step; ends a run at the deadline or after n steps."""

    def __init__(
        self, device: torch.device | str = "cpu", deadline: float | None = None, steps: int | None = None
    ) -> None:
        self.device, self.deadline, self.steps = device, deadline, steps
        self.times = [working_time(device)]

    def __call__(self, done: int) -> bool:
        self.times.append(working_time(self.device))
        over = self.deadline is not None and time.monotonic() >= self.deadline
        return over or (self.steps is not None and done >= self.steps)

    @property
    def seconds_per_step(self) -> float | None:
        """The median: a pause, or another process, does not change it."""
        took = [b - a for a, b in pairwise(self.times)]
        took = sorted(took[1:] or took)  # the first has the set-up in it
        return took[len(took) // 2] if took else None


def plain(value: Any) -> Any:
    """As it comes back from JSON; NaN and infinity, which results/ does not hold, are None."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def find(run: Run, rows: Sequence[dict[str, Any]], session: Session) -> dict[str, Any] | None:
    """The row of a finished ``run`` that is valid for our sources, None where it has yet to run."""
    settings = plain(run.settings())
    alike = [row for row in rows if row["run"] == run.name and row["settings"] == settings]
    for row in alike:
        if row["provenance"]["sources"] == session.sources:
            return row
    return next((row for row in alike if reproduces(run, row, session)), None)


def reproduces(run: Run, row: Mapping[str, Any], session: Session) -> bool:
    """Whether our sources give the row's first losses again, to ``TOLERANCE``; asked once per row."""
    path = session.runs / "reproduced.json"
    known: dict[str, bool] = read_json(f"runs: {path}", path) if path.exists() else {}
    key = f"{run.name} {row['provenance']['sources']} {session.sources}"
    if key not in known:
        known[key] = close(first_losses(run, session), row["first_losses"])
        write_json(path, known)
    return known[key]


def close(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Equal to ``TOLERANCE`` and as many; none are no evidence."""
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) > 0 and all(abs(a - b) <= TOLERANCE for a, b in pairs)


def write_json(path: Path, content: Any) -> None:
    """All or nothing."""
    with replacing("runs", path) as partial:
        partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def resolve(run: Run, rows: Sequence[dict[str, Any]], session: Session) -> Run:
    """``run`` with a learning rate: its own, or that of its candidate with the lowest loss.

    A candidate that diverged is the worst. Raises ValueError where a candidate has not run yet.
    """
    if run.lr is not None:
        return run
    losses = {}
    for candidate in run.candidates:
        row = find(candidate, rows, session)
        if row is None:
            raise ValueError(
                f"{run.design}: expected a finished run {candidate.name}, which is in an earlier part"
            )
        losses[candidate.lr] = math.inf if row["loss"] is None else row["loss"]
    return replace(run, lr=min(losses, key=lambda lr: losses[lr]))


def execute(run: Run, session: Session) -> dict[str, Any]:
    """Train and evaluate ``run``, from its checkpoint if there is one; its row.

    Raises OutOfTime at the session's deadline, with the checkpoint written.
    """
    if isinstance(run, LanguageRun):
        found = _language(run, session)
    elif isinstance(run, RecallRun):
        found = _recall(run, session)
    else:
        found = _conversion(run, session)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return plain(
        {
            "run": run.name,
            "kind": type(run).__name__.removesuffix("Run").lower(),
            "design": run.design,
            "cost_key": run.cost_key,
            "lr": run.lr,
            "seed": run.seed,
            "settings": run.settings(),
            **found,
            "provenance": {**session.provenance, "date": now},
        }
    )


def new_language_model(run: LanguageRun, session: Session) -> Decoder:
    """The model with the weights that its seed draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return Decoder(run.model).to(session.device)


def converted(run: ConversionRun, session: Session) -> tuple[Decoder, TrainConfig]:
    """The base model converted, and how it is trained on."""
    layers, init = CONVERSIONS[run.conversion]
    model, config, _ = prepare_conversion(
        base_model(), layers, init, session.text.train, share=run.share, lr=run.lr, seed=run.seed
    )
    return model.to(session.device), config


def first_losses(run: Run, session: Session, steps: int = REPRODUCED_STEPS) -> list[float]:
    """The losses of the first ``steps`` steps, trained afresh; of a recall run, one: their mean.

    Fewer where the run diverges before.
    """
    if isinstance(run, RecallRun):
        found = recall.train(
            run.mixer,
            run.task,
            run.training,
            n_mixers=run.n_mixers,
            every=steps,
            until=-1.0,
            device=session.device,
            progress=False,
        )
        return [found.curve[0].loss]
    try:
        history, _, _ = _train(run, replace(session, deadline=None), steps=steps)
    except TrainingDiverged as error:
        history = error.history
    return [line["loss"] for line in history[:steps]]


def step_seconds(run: Run, session: Session, steps: int = 6) -> float:
    """Seconds of working time per step of ``run``, measured over a few."""
    if isinstance(run, RecallRun):
        started = working_time(session.device)
        recall.train(
            run.mixer,
            run.task,
            replace(run.training, steps=steps),
            n_mixers=run.n_mixers,
            n_texts=1,
            device=session.device,
            progress=False,
        )
        return (working_time(session.device) - started) / steps
    slow = replace(run, lr=1e-3)  # no rate to be measured may diverge
    seconds = _train(slow, replace(session, deadline=None), steps=steps)[1]
    assert seconds is not None
    return seconds


Trained = tuple[list[Any], float | None, Decoder]


def _train(run: LanguageRun | ConversionRun, session: Session, steps: int | None = None) -> Trained:
    """The history, the seconds per step, and the model; ``steps`` only, without a checkpoint, if given.

    Raises TrainingDiverged, and OutOfTime at the deadline.
    """
    if isinstance(run, LanguageRun):
        model, config = new_language_model(run, session), run.training
    else:
        model, config = converted(run, session)
    clock = Clock(session.device, session.deadline, steps)
    try:
        history = train(
            model,
            session.text.train,
            config,
            checkpoint=session.checkpoint(run) if steps is None else None,
            every=CHECKPOINT_EVERY,
            stop=clock,
            progress=session.progress and steps is None,
        )
    except TrainingStopped as stopped:
        if steps is None:
            raise OutOfTime(
                f"{run.name}: stopped after {len(stopped.history)} of {config.steps} steps"
            ) from None
        history = stopped.history
    return history, clock.seconds_per_step, model


def blew_up(losses: Sequence[float], steps: int = 20, margin: float = 1.0) -> bool:
    """Whether the mean loss of the last ``steps`` is ``margin`` nats above the lowest mean of as many."""
    means = [
        sum(losses[i : i + steps]) / steps for i in range(len(losses) % steps, len(losses) - steps + 1, steps)
    ]
    return bool(means) and means[-1] > min(means) + margin


def training_record(history: Sequence[Mapping[str, Any]], points: int = 25) -> dict[str, Any]:
    """The course of a run: its first losses, and its curve as means of equally many steps."""
    losses = [line["loss"] for line in history]
    size = max(-(-len(losses) // points), 1)
    parts = [losses[i : i + size] for i in range(0, len(losses), size)]
    return {
        "steps": len(losses),
        "first_losses": losses[:REPRODUCED_STEPS],
        "curve": [round(sum(part) / len(part), 4) for part in parts],
    }


def _language(run: LanguageRun, session: Session) -> dict[str, Any]:
    budget = BUDGETS[run.budget]
    about: dict[str, Any] = {
        "budget": run.budget,
        "layers": [repr(spec) for spec in run.model.specs],
        "d_ff": run.model.d_ff,
        "tokens": run.steps * budget.training.batch * budget.training.length,
    }
    try:
        history, seconds, model = _train(run, session)
    except TrainingDiverged as error:
        return {**about, **training_record(error.history), "diverged": str(error), "loss": None}
    tokens_per_step = budget.training.batch * budget.training.length
    about |= {
        **training_record(history),
        "parameters": model.n_parameters,
        "memory": memory(model, budget.training.length),
        "seconds_per_step": seconds,
        "tokens_per_s": None if seconds is None else tokens_per_step / seconds,
    }
    if blew_up([line["loss"] for line in history]):
        return {**about, "diverged": "the training loss rose by more than 1 nat", "loss": None}
    length = budget.training.length
    found = evaluate_language(
        model,
        session.text.valid,
        session.trained_on,
        length=length,
        n_windows=budget.n_windows,
        far=length // 4,
        longer=LONGER,
    )
    if not math.isfinite(found["loss"]):
        return {**about, "diverged": "the loss on held-out text is not finite", "loss": None}
    return {**about, "diverged": None, **found}


def _recall(run: RecallRun, session: Session) -> dict[str, Any]:
    started = working_time(session.device)
    found = recall.train(
        run.mixer,
        run.task,
        run.training,
        n_mixers=run.n_mixers,
        until=0.999,
        device=session.device,
        progress=session.progress,
    )
    about: dict[str, Any] = {
        "task": run.task_name,
        "parameters": found.model.n_parameters,
        "first_losses": [found.curve[0].loss],
        "steps": found.curve[-1].step,
        "seconds_per_step": (working_time(session.device) - started) / found.curve[-1].step,
        "state_bytes": sum(mixer.cache_bytes(run.task.length) for mixer in found.model.mixers[1:]),
    }
    if not math.isfinite(found.loss):
        finite = [loss for loss in about["first_losses"] if math.isfinite(loss)]
        return {**about, "first_losses": finite, "diverged": "the loss is not finite", "loss": None}
    beyond = []
    for factor in LONGER:
        task: Any = longer(run.task, factor)  # type: ignore[type-var]
        beyond.append(
            {
                "length": task.length,
                "accuracy": recall.score(found.model, task)[1],
                "state_bytes": sum(mixer.cache_bytes(task.length) for mixer in found.model.mixers[1:]),
            }
        )
    return {
        **about,
        "diverged": None,
        "loss": found.loss,
        "accuracy": found.accuracy,
        "longer": beyond,
    }


def _conversion(run: ConversionRun, session: Session) -> dict[str, Any]:
    before = session.losses(converted(run, session)[0])
    about: dict[str, Any] = {
        "share": run.share,
        "layers": run.settings()["layers"],
        "base": session.base_losses,
        "before": before,
        "windows": CONVERSION_WINDOWS,
    }
    try:
        history, seconds, model = _train(run, session)
    except TrainingDiverged as error:
        return {**about, **training_record(error.history), "diverged": str(error), "loss": None}
    after = session.losses(model)
    about |= {
        **training_record(history),
        "parameters": model.n_parameters,
        "memory": memory(model, 512),
        "seconds_per_step": seconds,
    }
    if blew_up([line["loss"] for line in history]):
        return {**about, "diverged": "the training loss rose by more than 1 nat", "loss": None}
    if not all(math.isfinite(found["loss"]) for found in after.values()):
        return {**about, "diverged": "the loss on held-out text is not finite", "loss": None}
    return {**about, "diverged": None, "loss": after["sympy"]["loss"], "after": after}


class Costs:
    """Seconds per step by ``cost_key``: measured here, or recorded, else measured in a few steps and kept."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.path = session.runs / f"seconds-{session.machine}-{torch.get_num_threads()}-threads.json"
        self.known = self._recorded()
        if self.path.exists():
            self.known |= read_json(f"runs: {self.path}", self.path)

    def _recorded(self) -> dict[str, float]:
        """Of rows in results/: by this machine with as many threads, else with others, else elsewhere."""
        found: list[tuple[bool, bool, str, float]] = []
        for file in results.load(NAME, self.session.results):
            for row in file.rows:
                seconds, where = row.get("seconds_per_step"), row["provenance"]
                if seconds is not None:
                    here = where["machine"] == self.session.machine
                    same = where["threads"] == torch.get_num_threads()
                    found.append((here, here and same, row["cost_key"], seconds))
        return {key: seconds for _, _, key, seconds in sorted(found, key=lambda item: item[:2])}

    def __call__(self, run: Run) -> float:
        """The seconds that ``run`` takes, without its evaluation."""
        if run.cost_key not in self.known:
            with_rate: Run = run if run.lr is not None else run.candidates[0]
            self.keep(run.cost_key, step_seconds(with_rate, self.session))
        return run.n_steps * self.known[run.cost_key]

    def keep(self, key: str, seconds: float | None) -> None:
        """Take over what was measured."""
        if seconds is not None:
            self.known[key] = seconds
            write_json(self.path, self.known)


def run_part(
    part: Part,
    session: Session,
    *,
    record: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """The rows of ``part``, found or run; each is recorded as soon as it is finished.

    Under torchrun, each process takes every WORLD_SIZE-th run (untried). Raises OutOfTime at the session's
    deadline: a run that trains on text is then kept as a checkpoint; one of recall, which takes a minute or
    so, is not begun where less time is left.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    runs, costs = part.runs[rank::world], Costs(session)
    rows = session.rows() if record else []
    spent, expected = 0.0, 0.0
    _ = session.provenance  # of the commit whose sources are loaded
    for i, run in enumerate(runs):
        if record and world > 1:
            rows = session.rows()
        resolved = resolve(run, rows, session)
        row = find(resolved, rows, session) if record else None
        if row is not None:
            say(f"{i + 1}/{len(runs)} {resolved.name}: recorded before, {describe(row)}")
            yield row
            continue
        estimate = costs(resolved)
        left = math.inf if session.deadline is None else session.deadline - time.monotonic()
        if left <= 0 or (isinstance(resolved, RecallRun) and left < estimate):
            raise OutOfTime(f"{resolved.name}: not begun, it takes about {estimate:.0f} s")
        started = time.monotonic()
        row = execute(resolved, session)
        took = time.monotonic() - started
        spent, expected = spent + took, expected + estimate
        costs.keep(resolved.cost_key, row.get("seconds_per_step"))
        rows.append(row)
        if record:
            session.record([row])
        # A machine that does other work too, and the evaluation, make runs longer than their working time.
        remaining = sum(costs(later) for later in runs[i + 1 :]) * spent / expected
        say(
            f"{i + 1}/{len(runs)} {resolved.name}: {describe(row)}; {took:.0f} s, "
            f"about {remaining / 60:.0f} min left in this part"
        )
        yield row


def describe(row: Mapping[str, Any]) -> str:
    """The result of a run in a few words."""
    if row["diverged"]:
        return f"diverged ({row['diverged']})"
    return f"accuracy {row['accuracy']:.3f}" if "accuracy" in row else f"loss {row['loss']:.4f}"


def recorded(folder: Path | None = None) -> list[dict[str, Any]]:
    """The rows of the study, of every machine, one per run."""
    return one_per_run(everything(folder))


def everything(folder: Path | None = None) -> list[dict[str, Any]]:
    """All rows of the study, without those that measure speed."""
    rows = [row for found in results.load(NAME, folder) for row in found.rows]
    return [row for row in rows if row["kind"] != "speed"]


def calibrate(preset: str, session: Session, *, steps: int = 20) -> Iterator[dict[str, Any]]:
    """The time of a step of each run of ``preset``, one row per run, for results/.

    A language design is timed right after full attention and has ``tokens_per_s`` and ``times_full``, full
    attention's time per token in these: a machine whose speed changes meanwhile treats both alike.
    """
    costs, threads = Costs(session), torch.get_num_threads()
    runs = {run.cost_key: run for tier in tiers(preset) for part in parts(preset, tier) for run in part.runs}
    language_first = sorted(runs.items(), key=lambda item: not isinstance(item[1], LanguageRun))
    for key, run in language_first:
        row: dict[str, Any] = {
            "run": f"speed-{key}-{threads}-threads",
            "kind": "speed",
            "design": run.design,
            "cost_key": key,
            "provenance": session.provenance,
        }
        if isinstance(run, LanguageRun):
            full = step_seconds(replace(run, design="full"), session, max(steps // 2, 1))
            seconds = full if run.design == "full" else step_seconds(run, session, steps)
            config = BUDGETS[run.budget].training
            row |= {
                "budget": run.budget,
                "tokens_per_s": config.batch * config.length / seconds,
                "times_full": seconds / full,
                "bar": SLOW_BAR if run.design in SLOW else BAR,
            }
        else:
            seconds = step_seconds(run if run.lr is not None else run.candidates[0], session)
        costs.keep(key, seconds)
        yield {**row, "seconds_per_step": seconds}
