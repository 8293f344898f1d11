"""The training loop: AdamW, a cosine schedule, and checkpoints that make a killed run as good as a whole."""

import hashlib
import io
import math
import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.extras import progress_bar
from kvlearn.files import replacing
from kvlearn.model import Decoder
from kvlearn.study.text import check_seed, check_text, step_seed, windows


@dataclass(frozen=True)
class TrainConfig:
    """How long, on how much, how fast. A step sees batch · length tokens."""

    steps: int
    batch: int = 16
    length: int = 256
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        validate.fields_at_least(self, steps=1, batch=1, length=1, warmup=0)
        object.__setattr__(self, "seed", check_seed(self.seed))
        for name in ("lr", "clip"):
            object.__setattr__(self, name, validate.above(name, getattr(self, name), 0))
        object.__setattr__(self, "weight_decay", validate.at_least_zero("weight_decay", self.weight_decay))

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth. Loshchilov & Hutter, "SGDR" (2016), eq. 5."""
        step = validate.at_least("step", step, 0)
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


class Step(TypedDict):
    """One line of a run's history; the loss is in nats per byte, ``measured`` what ``at_step`` gave."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    measured: NotRequired[Any]


class TrainingStopped(Exception):
    """``stop`` ended a run before its last step; ``history`` holds the steps that were done."""

    def __init__(self, history: list[Step]) -> None:
        super().__init__(f"stopped after {len(history)} steps")
        self.history = history


class TrainingDiverged(FloatingPointError):
    """A loss or gradient was not finite; ``history`` holds the steps before it."""

    def __init__(self, message: str, history: list[Step]) -> None:
        super().__init__(message)
        self.history = history


def train(
    model: Decoder,
    text: UInt8[Tensor, "N"],
    config: TrainConfig,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    at_step: Callable[[int], Any] | None = None,
    stop: Callable[[int], bool] | None = None,
    origin: str | None = None,
    progress: bool = True,
) -> list[Step]:
    """Train ``model`` in place on random windows of ``text``; returns the history, a ``Step`` a step.

    With ``checkpoint``, the state is written there every ``every`` steps, whole or not at all (OSError says
    why not), and its checksums are verified when it is read. A later call with the same model, text and
    configuration goes on from it. On the same machine, with as many threads, the losses are those of an
    uninterrupted run. ``origin`` says what else makes a run this one: the weights that it starts from, say.

    ``at_step(n)`` is called when n steps are done, with the model in evaluation mode. Its result, if not
    None, is kept in the history and written at once; plain numbers, strings, lists and dicts.

    ``stop(n)`` is asked when n steps are done. Where it is true before the last step, the checkpoint is
    written and TrainingStopped raised: a later call goes on from there.

    Raises TrainingDiverged (a FloatingPointError) at the first loss or gradient that is not finite, before it
    reaches a weight or the checkpoint; ValueError where the checkpoint is damaged or belongs to another run.
    """
    validate.instance("model", model, nn.Module)
    check_text("text", text, validate.instance("config", config, TrainConfig).length)
    validate.instance("checkpoint", checkpoint, (str, os.PathLike, type(None)))
    every = validate.positive("every", every)
    for name, asked in (("at_step", at_step), ("stop", stop)):
        if asked is not None:
            validate.function(name, asked)
    validate.instance("origin", origin, (str, type(None)))
    validate.instance("progress", progress, bool)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), betas=(0.9, 0.95), fused=True)
    history: list[Step] = []
    if checkpoint is not None and Path(checkpoint).exists():
        history = _resume(Path(checkpoint), model, optimizer, _identity(model, text, config, origin))
    tokens_per_step, started, first = config.batch * config.length, time.perf_counter(), len(history)
    model.train()
    with progress_bar(
        total=config.steps, initial=first, desc="train", unit="step", disable=not progress
    ) as bar:
        for step in range(first, config.steps):
            try:
                line = _step(model, optimizer, text, config, step)
            except FloatingPointError as error:
                raise TrainingDiverged(str(error), history) from None
            history.append(line)
            if at_step is not None:
                model.eval()
                if (measured := at_step(step + 1)) is not None:
                    line["measured"] = measured
                model.train()
            rate = tokens_per_step * (step + 1 - first) / (time.perf_counter() - started)
            bar.set_postfix(loss=f"{line['loss']:.3f}", tokens_per_s=f"{rate:,.0f}", refresh=False)
            bar.update()
            is_last = step + 1 == config.steps
            stopping = stop is not None and stop(step + 1) and not is_last
            due = (step + 1) % every == 0 or is_last or stopping or "measured" in line
            if checkpoint is not None and due:
                _write(Path(checkpoint), model, optimizer, _identity(model, text, config, origin), history)
            if stopping:
                raise TrainingStopped(history)
    model.eval()
    return history


def _step(
    model: Decoder, optimizer: torch.optim.Optimizer, text: Tensor, config: TrainConfig, step: int
) -> Step:
    """One step of AdamW on one batch."""
    lr = config.lr_at(step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    batch = windows(text, config.batch, config.length, seed=config.seed, step=step)
    batch = batch.to(model.embed.weight.device)
    tokens, targets = batch[:, :-1], batch[:, 1:]
    with torch.random.fork_rng(devices=[]):  # what a layer draws is a function of seed and step too
        torch.manual_seed(step_seed(config.seed, step))
        loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    line = Step(step=step, loss=loss.item(), lr=lr, grad_norm=grad_norm.item())
    if not (math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])):
        raise FloatingPointError(f"training diverged: {line}; a lower lr or a longer warmup may help")
    optimizer.step()
    return line


def parameter_groups(model: Decoder, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, but for a mechanism's ``no_weight_decay``; gains and other vectors do not."""
    spared = {
        id(p)
        for mixer in model.mixers
        for name, p in mixer.named_parameters()
        if name.startswith(mixer.no_weight_decay)
    }
    decayed = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in spared]
    others = [p for p in model.parameters() if p.dim() < 2 or id(p) in spared]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _identity(model: Decoder, text: Tensor, config: TrainConfig, origin: str | None) -> dict[str, Any]:
    """The settings that identify a run."""
    return {
        **({} if origin is None else {"origin": origin}),
        **model.config.to_dict(),
        **asdict(config),
        "dtype": str(model.embed.weight.dtype),
        "text": hashlib.sha256(text.numpy().tobytes()).hexdigest(),
    }


def _write(
    path: Path,
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    history: list[Step],
) -> None:
    state = {"weights": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
    content = io.BytesIO()  # torch.save hides why a file cannot be written
    torch.save({**state, "identity": identity}, content)
    with replacing("checkpoint", path) as partial:
        partial.write_bytes(content.getbuffer())


def _resume(
    path: Path, model: Decoder, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
) -> list[Step]:
    state = _read(path, model.embed.weight.device)
    for name, value in identity.items():
        if (theirs := state["identity"].get(name)) != value:
            raise ValueError(
                f"checkpoint: {path} is of another run: its {name} is {theirs!r}, "
                f"this run's {value!r}; delete it or choose another path"
            )
    try:
        model.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"checkpoint: {path} does not fit this model: {error}") from error
    return state["history"]


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    """The state in a checkpoint, whose records have checksums (CRC-32): torch.save writes a zip archive."""
    wanted = {"identity": dict, "weights": dict, "optimizer": dict, "history": list}
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        state = torch.load(path, map_location=device, weights_only=True)
        for part, kind in wanted.items():
            if not isinstance(state, dict) or not isinstance(state.get(part), kind):
                raise ValueError(
                    f"expected a dictionary with {', '.join(wanted)}, got {type(state).__name__}"
                )
    except OSError as error:
        reason = error.strerror or error
        raise OSError(error.errno, f"checkpoint: could not read {path}: {reason}") from error
    except Exception as error:  # damaged bytes raise nearly anything
        raise ValueError(f"checkpoint: {path} is damaged, or no checkpoint: {error}") from error
    return state
