"""Associative recall as capacity of the state: how many pairs does so small a memory give back?

A text names pairs of a key and its value; then keys again, at random places, which ask for their values:

    k₁ v₁ k₂ v₂ … k_P v_P  · · k₂ · k_P · · k₁ ·        · is filler; the answers v₂, v_P, v₁ are not shown

Keys, values and their pairing are drawn anew for every text, so weights cannot know them: every answer has
gone through the cache. Two layers and no SwiGLU: a short convolution, which puts a key and its value into
one token, then the mechanism. All have the same convolution; with nothing behind it, it is the control.

Letters beside those of core.py: P pairs of a text.
Source: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (2023): MQAR,
multi-query associative recall; here with a small vocabulary and queries that are spread evenly.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.extras import progress_bar
from kvlearn.model import Decoder, ModelConfig, Spec
from kvlearn.study.training import TrainConfig


class Texts(NamedTuple):
    """Texts, the places in them where a key asks, and the values that are to be answered there."""

    tokens: Int[Tensor, "B T"]
    asked: Int[Tensor, "B P"]
    answers: Int[Tensor, "B P"]


@runtime_checkable
class Task(Protocol):
    """The interface that ``train`` needs of a task; more tasks are in tasks.py."""

    @property
    def length(self) -> int:
        """Tokens of a text."""

    @property
    def vocab_size(self) -> int:
        """Tokens are 0 to ``vocab_size`` - 1."""

    def texts(self, batch: int, generator: torch.Generator) -> Texts:
        """``batch`` new texts."""


@dataclass(frozen=True)
class Recall:
    """The task: texts of ``length`` tokens with ``n_pairs`` pairs, each asked for once.

    Token 0 is filler, then come ``n_keys`` keys and ``n_values`` values. In a text no key and no value occurs
    in two pairs, so a guess among its values is right once in n_pairs, and a blind one once in n_values.
    """

    n_pairs: int = 16
    length: int = 48
    n_keys: int = 32
    n_values: int = 32

    def __post_init__(self) -> None:
        validate.fields_at_least(self, n_pairs=1, n_keys=1, n_values=1)
        for name in ("n_keys", "n_values"):
            if getattr(self, name) < self.n_pairs:
                raise ValueError(
                    f"{name}: expected at least n_pairs={self.n_pairs}, got {getattr(self, name)}"
                )
        validate.fields_at_least(self, length=3 * self.n_pairs)

    @property
    def vocab_size(self) -> int:
        return 1 + self.n_keys + self.n_values

    def texts(self, batch: int, generator: torch.Generator) -> Texts:
        """``batch`` new texts."""
        batch = check_draw(batch, generator)
        keys, values, places = (
            torch.rand(batch, n, generator=generator).topk(self.n_pairs).indices
            for n in (self.n_keys, self.n_values, self.length - 2 * self.n_pairs)
        )
        keys, values, asked = keys + 1, values + 1 + self.n_keys, places + 2 * self.n_pairs
        tokens = torch.zeros(batch, self.length, dtype=torch.long)
        tokens[:, : 2 * self.n_pairs] = torch.stack((keys, values), dim=-1).flatten(1)
        # topk gives its places in a random order, so keys are asked in one too.
        return Texts(tokens.scatter(1, asked, keys), asked, values)


def check_draw(batch: int, generator: torch.Generator) -> int:
    """Check what a task's ``texts`` is given; returns ``batch``."""
    validate.instance("generator", generator, torch.Generator)
    return validate.positive("batch", batch)


class Point(NamedTuple):
    """The mean over the steps since the point before, of texts that were new to the model."""

    step: int
    loss: float
    accuracy: float


class Run(NamedTuple):
    """A trained model; its way there; loss and accuracy on the same texts as every other run's."""

    model: Decoder
    curve: list[Point]
    loss: float
    accuracy: float
    seconds: float


HEAD = 32  # numbers of a value, in every design
LIVE: dict[str, Spec] = {
    "full": Spec("full", head_dim=HEAD),
    "linear": Spec("linear", key_dim=8, head_dim=HEAD),
    "delta": Spec("delta", key_dim=8, head_dim=HEAD, conv=None),
    "short_conv": Spec("short_conv"),
}
# Chapter 07: four mechanisms behind one convolution, the full layer second in the mixes. A state of 4 x 33
# numbers has room for half of the 8 pairs, and a window of 8 in four layers reaches 28 tokens back.
_LINEAR, _WINDOW = Spec("linear", key_dim=4, head_dim=HEAD), Spec("window", window=8, head_dim=HEAD)
STACKS: dict[str, list[Spec]] = {
    "full": 4 * [LIVE["full"]],
    "window": 4 * [_WINDOW],
    "linear": 4 * [_LINEAR],
    "3 linear : 1 full": [_LINEAR, LIVE["full"], _LINEAR, _LINEAR],
    "3 window : 1 full": [_WINDOW, LIVE["full"], _WINDOW, _WINDOW],
    "short_conv": 4 * [LIVE["short_conv"]],
}
STACK_TASK = Recall(n_pairs=8, length=64, n_keys=16, n_values=16)
HELD_OUT = 2**31  # a seed that no training takes
TRAINING = TrainConfig(steps=360, batch=64, lr=1e-2, warmup=20, weight_decay=0.0)
STACK_TRAINING = TrainConfig(steps=240, batch=32, lr=1e-2, warmup=20, weight_decay=0.0)


Mixer = str | Spec | Sequence[str | Spec]


def new_model(mixer: Mixer, task: Task, d_model: int = 64, *, n_mixers: int | None = None) -> Decoder:
    """A short convolution, then ``mixer``, without positions; with "short_conv" for mixer, the control.

    Several mixers are as many layers, or a pattern repeated to ``n_mixers``; what n layers add to the
    residual stream starts n^-1/2 as large.
    Weights start larger than a language model's: with those of 0.02, nothing moves for hundreds of steps.
    The output matrix is the embedding: where both are learned, guessing among a text's values lasts long.
    """
    validate.instance("task", task, Task)
    validate.instance("mixer", mixer, (str, Spec, list, tuple))
    pattern = [mixer] if isinstance(mixer, str | Spec) else list(mixer)
    validate.positive("len(mixer)", len(pattern))
    n_mixers = len(pattern) if n_mixers is None else validate.positive("n_mixers", n_mixers)
    mixers = [pattern[i % len(pattern)] for i in range(n_mixers)]
    model = Decoder(
        ModelConfig(
            vocab_size=task.vocab_size,
            d_model=d_model,
            n_layers=1 + n_mixers,
            n_heads=1,
            d_ff=0,
            layers=("short_conv", *mixers),
            rope=None,
        )
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("o_proj.weight") and not name.startswith("blocks.0."):
                weight.mul_(n_mixers**-0.5)
    for layer in model.mixers:
        layer.initialise()
    return model


def train(
    mixer: Mixer,
    task: Task = Recall(),
    training: TrainConfig = TRAINING,
    *,
    n_mixers: int | None = None,
    every: int = 20,
    until: float | None = None,
    n_texts: int = 512,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Run:
    """Train ``new_model(mixer, task)``. The seed draws weights and texts; mixers share the texts.

    Of ``training`` the length is not used: it is the task's. With ``until`` the run ends as soon as that
    share of the answers was right over ``every`` steps.
    """
    validate.instance("training", training, TrainConfig)
    every, n_texts = validate.positive("every", every), validate.positive("n_texts", n_texts)
    if until is not None:
        validate.finite("until", until)
    device = validate.device("device", device)
    validate.instance("progress", progress, bool)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = new_model(mixer, task, n_mixers=n_mixers).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), weight_decay=training.weight_decay, betas=(0.9, 0.95), fused=True
    )
    generator = torch.Generator().manual_seed(training.seed)
    curve, since, started = list[Point](), list[tuple[float, float]](), time.perf_counter()
    name = ", ".join(spec.name for spec in model.config.specs[1:])
    for step in progress_bar(range(training.steps), desc=name, unit="step", disable=not progress):
        for group in optimizer.param_groups:
            group["lr"] = training.lr_at(step)
        loss, accuracy = answer(model, task.texts(training.batch, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        since.append((loss.item(), accuracy.item()))
        if (step + 1) % every == 0 or step + 1 == training.steps:
            curve.append(Point(step + 1, *(sum(column) / len(since) for column in zip(*since, strict=True))))
            since = []
            if until is not None and curve[-1].accuracy >= until:
                break
    seconds = time.perf_counter() - started
    return Run(model, curve, *score(model, task, n_texts), seconds)


@torch.no_grad()
def score(model: Decoder, task: Task, n_texts: int = 512) -> tuple[float, float]:
    """Loss and accuracy on ``n_texts`` texts that no training saw and that all models share."""
    validate.instance("model", model, nn.Module)
    n_texts = validate.positive("n_texts", n_texts)
    texts = validate.instance("task", task, Task).texts(n_texts, torch.Generator().manual_seed(HELD_OUT))
    loss, accuracy = answer(model.eval(), texts)
    return loss.item(), accuracy.item()


def answer(model: Decoder, texts: Texts) -> tuple[Tensor, Tensor]:
    """Loss in nats an answer, and the share of answers that are right."""
    texts = Texts(*(part.to(model.embed.weight.device) for part in texts))
    hidden = model.hidden(texts.tokens)
    logits = model.logits(hidden.gather(1, texts.asked[..., None].expand(-1, -1, hidden.shape[-1])))
    loss = F.cross_entropy(logits.flatten(0, 1), texts.answers.flatten())
    return loss, (logits.argmax(-1) == texts.answers).float().mean()
