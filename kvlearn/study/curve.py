"""A run with its loss measured on the way, on several texts, so that runs can be compared."""

import hashlib
import math
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from kvlearn import validate
from kvlearn.model import Decoder
from kvlearn.study.evaluation import evaluate
from kvlearn.study.text import check_text
from kvlearn.study.training import TrainConfig, train


@dataclass(frozen=True)
class Point:
    """The loss after ``step`` steps, in nats per byte: of each text, that of each window.

    ``seconds`` is what the training steps since the point before took, without measuring.
    """

    step: int
    tokens: int
    seconds: float
    windows: Mapping[str, list[float]]

    def loss(self, text: str) -> float:
        """The mean over the windows of ``text``."""
        return mean_and_error(self.windows[text])[0]

    def error(self, text: str) -> float:
        """The standard error of ``loss``: how much other windows would have changed it."""
        return mean_and_error(self.windows[text])[1]

    def excess(self, other: "Point", text: str) -> tuple[float, float]:
        """How much more is lost here than at ``other``, and the standard error of that.

        The difference is taken window by window, so that what makes some windows hard for both cancels.
        """
        pairs = zip(self.windows[text], other.windows[text], strict=True)
        return mean_and_error([ours - theirs for ours, theirs in pairs])


def mean_and_error(values: Collection[float]) -> tuple[float, float]:
    """The mean, and its standard error: the standard deviation over √n (0 where there is but one value)."""
    n = validate.positive("len(values)", len(validate.instance("values", values, Collection)))
    mean = math.fsum(values) / n
    return mean, (math.fsum((value - mean) ** 2 for value in values) / max(n - 1, 1) / n) ** 0.5


def train_and_measure(
    model: Decoder,
    text: UInt8[Tensor, "_"],
    config: TrainConfig,
    *,
    held_out: Mapping[str, UInt8[Tensor, "_"]],
    at: Collection[int],
    n_windows: int = 64,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> list[Point]:
    """Train ``model`` in place; its loss on ``held_out`` before, after the steps in ``at``, and at the end.

    The windows that measure are as long as those that train. With ``checkpoint`` a killed run goes on, and
    gives the same curve: the measurements are kept there too. A checkpoint of a run that began with other
    weights or measured otherwise is refused.
    """
    validate.instance("model", model, Decoder)
    validate.instance("config", config, TrainConfig)
    for each in validate.instance("held_out", held_out, Mapping).values():
        check_text("held_out", each, config.length)
    n_windows = validate.positive("n_windows", n_windows)
    wanted = {
        validate.at_least("at", step, 0) for step in validate.instance("at", at, (list, tuple, set, range))
    }
    wanted.add(config.steps)
    clock = time.perf_counter()

    def measure(step: int) -> dict[str, Any] | None:
        nonlocal clock
        if step not in wanted:
            return None
        seconds = time.perf_counter() - clock
        losses = {
            name: evaluate(model, part, length=config.length, n_windows=n_windows).by_window.tolist()
            for name, part in held_out.items()
        }
        clock = time.perf_counter()
        return {"seconds": seconds, "windows": losses}

    model.eval()
    origin = fingerprint(model, held_out, (sorted(wanted), n_windows))
    wanted.add(0)
    before = measure(0)
    assert before is not None
    measured = {0: {**before, "seconds": 0.0}}
    for line in train(
        model,
        text,
        config,
        checkpoint=checkpoint,
        every=config.steps,
        at_step=measure,
        origin=origin,
        progress=progress,
    ):
        if "measured" in line:
            measured[line["step"] + 1] = line["measured"]
    tokens = config.batch * config.length
    return [Point(step, step * tokens, **what) for step, what in measured.items()]


def fingerprint(model: Decoder, held_out: Mapping[str, Tensor], settings: Any) -> str:
    """A hash of the model's shape and weights, of texts and of settings."""
    digest = hashlib.sha256(repr((model.config.to_dict(), list(held_out), settings)).encode())
    with torch.no_grad():
        for tensor in [*model.state_dict().values(), *held_out.values()]:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
