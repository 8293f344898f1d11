"""Converting a trained model and mending it: the recipe, in one call; and the study of what it costs.

    result = convert_and_uptrain(base_model(), ["gqa"], "mean", checkpoint="runs/gqa.pt")

Source: Ainslie et al., "GQA" (2023), sections 2.1 and 3.3: 5% of the original training is enough for most.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from kvlearn import validate
from kvlearn.model import Decoder, Spec, card, convert
from kvlearn.study.base import PATH, base_model
from kvlearn.study.curve import Point, train_and_measure
from kvlearn.study.other_text import other_texts
from kvlearn.study.text import check_seed, corpus, windows
from kvlearn.study.training import TrainConfig

Layers = Sequence[str | Spec]
# The base model caches 256 numbers per token and layer: gqa-1 and the latents keep 32 of them, gqa-2 64.
RUNS: dict[str, tuple[Layers, str]] = {
    "full": (["full"], "first"),  # the control: nothing is converted, and training goes on as for the others
    "gqa-2-mean": ([Spec("gqa", n_kv_heads=2)], "mean"),
    "gqa-2-first": ([Spec("gqa", n_kv_heads=2)], "first"),
    "gqa-2-random": ([Spec("gqa", n_kv_heads=2)], "random"),
    "gqa-1-mean": ([Spec("gqa", n_kv_heads=1)], "mean"),
    "routed-2-mean": ([Spec("routed", n_kv_heads=2)], "mean"),
    "pairs-first": (["full", Spec("full", reads=-1)], "first"),
    "pairs-mean": (["full", Spec("full", reads=-1)], "mean"),
    "mhc-32-activations": ([Spec("mhc", rank=32, rope_dim=0)], "activations"),
    "mhc-32-weights": ([Spec("mhc", rank=32, rope_dim=0)], "weights"),
    "mhc-32-random": ([Spec("mhc", rank=32, rope_dim=0)], "random"),
    "mhc-transformer-32-activations": ([Spec("mhc_transformer", rank=32, rope_dim=0)], "activations"),
    "mhc-20-12-activations": ([Spec("mhc", rank=20, rope_dim=12)], "activations"),
}


# The base model with masks that show fewer tokens than the 512 that it is trained and measured on.
MASK_RUNS: dict[str, tuple[Layers, str]] = {
    "full": (["full"], "first"),
    "window-32": ([Spec("window", window=32)], "first"),
    "window-128": ([Spec("window", window=128)], "first"),
    "window-32-sinks": ([Spec("window", window=32, n_sinks=4)], "first"),
    "window-32-sink-logits": ([Spec("window", window=32, sink_logits=True)], "first"),
    "3-window-32-1-full": ([*3 * [Spec("window", window=32)], "full"], "first"),
    "longformer": ([Spec("sparse", pattern="local(32) | global(4)")], "first"),
    "fixed": ([Spec("sparse", pattern="fixed(16, summary=2)")], "first"),
    "strided": ([Spec("sparse", pattern="local(16) | strided(16)")], "first"),
    "bigbird": (
        [Spec("sparse", pattern="local(32, block=16) | global(4) | random(2, block=16, skip_last=1)")],
        "first",
    ),
}


class Conversion(NamedTuple):
    """The converted and trained model; its loss from before the first step to the last; how it was made."""

    model: Decoder
    curve: list[Point]
    seconds: float  # of the conversion alone
    training: TrainConfig


def convert_and_uptrain(
    base: Decoder,
    layers: Layers,
    init: str,
    *,
    text: UInt8[Tensor, "_"] | None = None,
    held_out: Mapping[str, UInt8[Tensor, "_"]] | None = None,
    share: float = 0.05,
    seen: int | None = None,
    batch: int = 16,
    length: int = 512,
    lr: float = 1e-3,
    n_windows: int = 64,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Conversion:
    """``convert``, then train on ``share`` of the tokens that ``base`` was trained on, ``seen``.

    By default ``seen`` is what the committed base model saw, ``text`` the corpus, in other windows than the
    base model's, and ``held_out`` both more of the corpus ("sympy") and text of another kind ("networkx",
    "prose"), on which shows what was forgotten. With ``checkpoint`` a killed run continues where it stopped.

    Raises ValueError for a ``share`` that is not above 0 or is less than one step, and what ``convert`` does.
    """
    text = corpus().train if text is None else text
    held_out = {"sympy": corpus().valid, **other_texts()} if held_out is None else held_out
    model, config, seconds = prepare_conversion(
        base, layers, init, text, share=share, seen=seen, batch=batch, length=length, lr=lr, seed=seed
    )
    steps = config.steps
    at = {max(round(steps * part / 30), 1) for part in (1, 2, 5, 10, 15, 20, 25)}
    curve = train_and_measure(
        model,
        text,
        config,
        held_out=held_out,
        at=at,
        n_windows=n_windows,
        checkpoint=checkpoint,
        progress=progress,
    )
    return Conversion(model, curve, seconds, config)


def prepare_conversion(
    base: Decoder,
    layers: Layers,
    init: str,
    text: UInt8[Tensor, "_"],
    *,
    share: float,
    seen: int | None = None,
    batch: int = 16,
    length: int = 512,
    lr: float = 1e-3,
    seed: int = 0,
) -> tuple[Decoder, TrainConfig, float]:
    """The converted model, how it is to be trained on, and the seconds that converting took.

    Arguments and errors are those of ``convert_and_uptrain``.
    """
    validate.instance("base", base, Decoder)
    batch, length = validate.positive("batch", batch), validate.positive("length", length)
    seed = check_seed(seed)
    validate.finite("share", share)
    seen = card(PATH)["tokens"] if seen is None else validate.positive("seen", seen)
    steps = round(share * seen / (batch * length))
    if steps < 1:
        raise ValueError(
            f"share: expected at least a step of {batch} x {length} tokens, got {share} of {seen} tokens"
        )
    config = TrainConfig(steps, batch, length, lr=lr, warmup=steps // 15, seed=seed + 1)
    started = time.perf_counter()
    tokens = windows(text, 16, length, seed=config.seed, step=0)[:, :-1].to(base.embed.weight.device)
    model = convert(base, layers, init=init, tokens=tokens, seed=seed)
    return model, config, time.perf_counter() - started


def study_conversions(
    base: Decoder | None = None,
    runs: Mapping[str, tuple[Layers, str]] = RUNS,
    *,
    folder: Path = Path("runs/convert"),
    seed: int = 0,
    **options: Any,
) -> Iterator[list[dict[str, Any]]]:
    """All ``runs``, the control first: one row per point of each curve, for results/.

    The state of each run lies in ``folder``, so that a killed study goes on. ``options`` are those of
    ``convert_and_uptrain``. ``excess`` is the loss beyond that of the control at the same step: what
    converting costs, apart from what training on does anyhow.
    """
    base = base_model() if base is None else base
    control: list[Point] = []
    for name, (layers, init) in runs.items():
        result = convert_and_uptrain(
            base, layers, init, seed=seed, checkpoint=folder / f"{name}-{seed}.pt", **options
        )
        control = control or result.curve
        memory = result.model.table(1, dtype=torch.bfloat16)[-1]
        at_length = result.model.table(result.training.length, dtype=torch.bfloat16)[-1]
        yield [
            {
                "run": name,
                "layers": [repr(spec) for spec in result.model.config.specs],
                "init": init,
                "seed": seed,
                "training": asdict(result.training),
                "parameters": result.model.n_parameters,
                "bytes_stored_per_token": memory["stored"],
                "bytes_read_per_token": memory["read"],
                "bytes_stored_at_length": at_length["stored"],
                "bytes_read_at_length": at_length["read"],
                "conversion_seconds": result.seconds,
                **describe(point, beside),
            }
            for point, beside in zip(result.curve, control, strict=True)
        ]


def describe(point: Point, control: Point) -> dict[str, Any]:
    """A point of a curve beside the control's, as numbers for results/."""
    losses = {}
    for text, values in point.windows.items():
        excess, excess_error = point.excess(control, text)
        losses[text] = {
            "loss": point.loss(text),
            "error": point.error(text),
            "excess": excess,
            "excess_error": excess_error,
            "windows": len(values),
        }
    return {"step": point.step, "tokens": point.tokens, "seconds": point.seconds, "losses": losses}
