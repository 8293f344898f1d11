"""The study of recall: how many pairs a state of so many bytes gives back, by mechanism and size."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from kvlearn import validate
from kvlearn.extras import progress_bar
from kvlearn.model import Spec
from kvlearn.study.curve import mean_and_error
from kvlearn.study.recall import HEAD, LIVE, TRAINING, Recall, train
from kvlearn.study.training import TrainConfig

# By design: the same mechanism with smaller and larger keys, and so states. Mamba-2 has a convolution of its
# own besides, since it has no form without.
DESIGNS: dict[str, list[Spec]] = {
    "full": [LIVE["full"]],
    "short_conv": [LIVE["short_conv"]],
    "linear": [Spec("linear", key_dim=k, head_dim=HEAD) for k in (4, 8, 16, 32)],
    "linear, Taylor": [Spec("linear", features="taylor", key_dim=k, head_dim=HEAD) for k in (2, 4)],
    "delta": [Spec("delta", key_dim=k, head_dim=HEAD, conv=None) for k in (4, 8, 16)],
    "gated_delta": [Spec("gated_delta", key_dim=k, head_dim=HEAD, conv=None) for k in (4, 8, 16)],
    "mamba2": [Spec("mamba2", d_state=n, head_dim=HEAD) for n in (4, 16)],
}
TASKS = (Recall(8, 24), Recall(16, 48))
RATES = (5e-3, 1e-2)
# Longer than the live runs: decays need time to learn not to fade.
LONGER = replace(TRAINING, steps=1000, warmup=40)
ENOUGH = 0.999
SIZES = ("key_dim", "d_state")  # the options that say how large a state is


def study_recall(
    designs: Mapping[str, Sequence[Spec]] = DESIGNS,
    tasks: Sequence[Recall] = TASKS,
    training: TrainConfig = LONGER,
    *,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = (0, 1, 2),
    jobs: int = 1,
    progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """A row a task, mechanism, learning rate and seed, for results/.

    ``state_bytes`` is the cache of the mechanism at the length of the text, in fp32 and without that of the
    convolution before it, which all have. A run ends early where it answers ``ENOUGH`` of the questions.
    Runs are independent: ``jobs`` of them go on at a time, each in a process with one thread.
    """
    validate.instance("designs", designs, Mapping)
    validate.instance("training", training, TrainConfig)
    for task in validate.instance("tasks", tasks, (list, tuple)):
        validate.instance("tasks", task, Recall)
    for rate in validate.instance("rates", rates, (list, tuple)):
        validate.above("rates", rate, 0)
    for seed in validate.instance("seeds", seeds, (list, tuple, range)):
        validate.at_least("seeds", seed, 0)
    jobs = validate.positive("jobs", jobs)
    validate.instance("progress", progress, bool)
    work = [
        (task, design, spec, replace(training, lr=rate, seed=seed, length=task.length))
        for task in tasks
        for design, specs in designs.items()
        for spec in specs
        for rate in rates
        for seed in seeds
    ]
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        rows = map(_row, work) if jobs == 1 else pool.map(_row, work)  # in the order of ``work``
        yield from progress_bar(rows, desc="recall", unit="run", total=len(work), disable=not progress)


def _row(work: tuple[Recall, str, Spec, TrainConfig]) -> dict[str, Any]:
    """One run."""
    task, design, spec, config = work
    run = train(spec, task, config, until=ENOUGH, progress=False)
    sizes = [f"{name}={spec.options[name]}" for name in SIZES if name in spec.options]
    return {
        "run": ", ".join((design, *sizes)),
        "design": design,
        "layers": [repr(layer) for layer in run.model.config.specs],
        **asdict(task),
        "seed": config.seed,
        "training": asdict(config),
        "steps_taken": run.curve[-1].step,
        "parameters": run.model.n_parameters,
        "state_bytes": run.model.mixers[-1].cache_bytes(task.length),
        "accuracy": run.accuracy,
        "loss": run.loss,
        "seconds": run.seconds,
    }


class Cell(NamedTuple):
    """A mechanism on a task, at the learning rate that was best in the mean over the seeds."""

    design: str
    run: str
    n_pairs: int
    state_bytes: int
    lr: float
    accuracy: float
    error: float  # standard, over the seeds
    seconds: float  # of a run


def compare(rows: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The rows of ``study_recall``, each mechanism on each task at its best learning rate."""
    runs: dict[tuple[Any, ...], dict[float, list[Mapping[str, Any]]]] = {}
    for row in rows:
        key = row["design"], row["run"], row["n_pairs"], row["state_bytes"]
        runs.setdefault(key, {}).setdefault(row["training"]["lr"], []).append(row)
    cells = []
    for key, by_rate in runs.items():
        scores = {rate: mean_and_error([row["accuracy"] for row in alike]) for rate, alike in by_rate.items()}
        best = max(scores, key=lambda rate: scores[rate][0])
        seconds, _ = mean_and_error([row["seconds"] for alike in by_rate.values() for row in alike])
        cells.append(Cell(*key, best, *scores[best], seconds))
    return cells
