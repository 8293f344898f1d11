"""The loss of a window without the first token, where heads have made that token their sink.

Large models grow such sinks by themselves (Xiao et al., 2023); the base model has grown none, its heads give
the first token next to nothing. So a sink is trained into it: a loss asks every head to give most of its
weight to the first token, which is always the same. Then the model gets windows, with and without that token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from kvlearn import validate
from kvlearn.attention import GroupedQueryAttention
from kvlearn.attention.core import causal_mask, split_heads
from kvlearn.extras import progress_bar
from kvlearn.model import Decoder, Spec
from kvlearn.study.base import base_model
from kvlearn.study.curve import mean_and_error
from kvlearn.study.text import SEPARATOR, check_text, corpus, windows
from kvlearn.study.training import TrainConfig, parameter_groups

TRAINING = TrainConfig(steps=300, batch=16, length=256, lr=1e-3, warmup=30)
FIRST = SEPARATOR[0]  # the token that is first in every text here
SHARE, STRENGTH = 0.9, 0.3  # of a head's weight that the sink should get; of that loss beside the text's
SINK_WINDOW = 32
VARIANTS: dict[str, Spec] = {
    "full": Spec("full"),
    "window": Spec("window", window=SINK_WINDOW),
    "window, 1 sink kept": Spec("window", window=SINK_WINDOW, n_sinks=1),
    "window, 4 sinks kept": Spec("window", window=SINK_WINDOW, n_sinks=4),
}


def study_sinks(
    base: Decoder | None = None,
    training: TrainConfig = TRAINING,
    *,
    text: UInt8[Tensor, "_"] | None = None,
    held_out: UInt8[Tensor, "_"] | None = None,
    n_windows: int = 64,
    progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """One row per model (as trained, with a sink planted) and variant, for results/.

    ``by_position``: the loss at each position of a text of ``training.length`` tokens, in nats per byte.
    ``first_token_weight``: of full attention, the mean weight that heads give the first token.
    """
    base = base_model() if base is None else base
    text = corpus().train if text is None else text
    held_out = corpus().valid if held_out is None else held_out
    n_windows = validate.positive("n_windows", n_windows)
    validate.instance("progress", progress, bool)
    check_text("held_out", held_out, validate.instance("training", training, TrainConfig).length)
    starts = torch.linspace(0, len(held_out) - training.length - 1, n_windows, dtype=torch.float64).long()
    tokens = with_first(held_out[starts[:, None] + torch.arange(training.length + 1)].long())
    for name, model in {
        "as trained": base,
        "sink planted": plant_sink(base, text, training, progress),
    }.items():
        weight = log_weight_of_first(model, tokens[:, :-1]).exp().mean().item()
        for variant, spec in VARIANTS.items():
            losses = _losses(model, spec, tokens)
            loss, error = mean_and_error(losses.mean(1).tolist())
            yield {
                "run": name,
                "variant": variant,
                "layers": [repr(spec)] * model.config.n_layers,
                "training": asdict(training),
                "seed": training.seed,
                "share": SHARE,
                "first_token_weight": weight,
                "loss": loss,
                "error": error,
                "windows": n_windows,
                "by_position": [round(x, 4) for x in losses.mean(0).tolist()],
            }


def with_first(tokens: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """The text behind the token that is always first."""
    return torch.cat((torch.full_like(tokens[:, :1], FIRST), tokens[:, 1:]), dim=1)


def plant_sink(
    base: Decoder, text: UInt8[Tensor, "_"], config: TrainConfig, progress: bool = True
) -> Decoder:
    """A copy of ``base``, trained on until its heads give the first token most of their weight."""
    model = Decoder(base.config).train()
    model.load_state_dict(base.state_dict())
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), betas=(0.9, 0.95), fused=True)
    for step in progress_bar(range(config.steps), desc="plant a sink", unit="step", disable=not progress):
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(step)
        tokens = with_first(windows(text, config.batch, config.length, seed=config.seed, step=step))
        with _inputs(model) as inputs:
            loss = F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])
        missing = F.relu(torch.tensor(SHARE).log() - _log_weights(inputs)).mean()
        optimizer.zero_grad()
        (loss + STRENGTH * missing).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def log_weight_of_first(model: Decoder, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "L B H T"]:
    """The log of the weight that each query of each head gives the first token."""
    with _inputs(model) as inputs:
        model.hidden(tokens)
    return _log_weights(inputs)


@contextmanager
def _inputs(model: Decoder) -> Iterator[list[tuple[GroupedQueryAttention, Tensor]]]:
    """Collects what each layer's attention is given."""
    inputs: list[tuple[GroupedQueryAttention, Tensor]] = []
    hooks = [
        m.register_forward_pre_hook(lambda layer, args: inputs.append((layer, args[0]))) for m in model.mixers
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _log_weights(inputs: list[tuple[GroupedQueryAttention, Tensor]]) -> Float[Tensor, "L B H T"]:
    logs = []
    for layer, x in inputs:
        k, _, positions = layer.project_kv(x)
        q = layer.rope(split_heads(layer.q_proj(x), layer.n_heads), positions)
        scores = q @ k.mT * layer.head_dim**-0.5
        scores = scores.masked_fill(~causal_mask(x.shape[1], x.shape[1]), -torch.inf)
        logs.append(scores[..., 0] - scores.logsumexp(-1))
    return torch.stack(logs)


@torch.no_grad()
def _losses(model: Decoder, spec: Spec, tokens: Int[Tensor, "B _"]) -> Float[Tensor, "B T"]:
    """Of the model with ``spec`` in every layer, token by token."""
    variant = Decoder(replace(model.config, layers=(spec,))).eval()
    variant.load_state_dict(model.state_dict())
    parts = tokens.split(16)
    return torch.cat(
        [F.cross_entropy(variant(p[:, :-1]).transpose(1, 2), p[:, 1:], reduction="none") for p in parts]
    )
