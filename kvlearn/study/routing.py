"""Does learned routing pay? Small models from nothing, on equal budgets, that differ in who reads which pool.

All but the two bounds cache the same two KV heads: "gqa" assigns query heads to them by their place, "routed"
learns one assignment for all tokens, "token_routed" lets each token choose. "full" and "mqa" say how much
there is to win and to lose.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from kvlearn import validate
from kvlearn.attention import RoutedAttention
from kvlearn.model import Decoder, ModelConfig, Spec
from kvlearn.study.curve import mean_and_error, train_and_measure
from kvlearn.study.text import corpus
from kvlearn.study.training import TrainConfig

MODEL = ModelConfig(d_model=96, n_layers=2, n_heads=8)
TRAINING = TrainConfig(steps=300, batch=32, length=128, lr=3e-3, warmup=30)
KINDS: dict[str, Spec] = {
    "full": Spec("full"),
    "gqa": Spec("gqa", n_kv_heads=2),
    "routed": Spec("routed", n_kv_heads=2),
    "token_routed": Spec("token_routed", n_kv_heads=2),
    "mqa": Spec("gqa", n_kv_heads=1),
}
BASELINE = "gqa"


def study_routing(
    config: ModelConfig = MODEL,
    training: TrainConfig = TRAINING,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    text: UInt8[Tensor, "_"] | None = None,
    held_out: UInt8[Tensor, "_"] | None = None,
    n_windows: int = 256,
    folder: Path = Path("runs/routing"),
    progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """A row a kind and seed, for results/. A seed draws the weights and the batches; kinds share them.

    ``routes`` holds, of a routed model, the pool that each head of each layer came to read. The state of each
    run lies in ``folder``, so that a killed study goes on.
    """
    validate.instance("config", config, ModelConfig)
    validate.instance("training", training, TrainConfig)
    validate.instance("progress", progress, bool)
    text = corpus().train if text is None else text
    held_out = corpus().valid if held_out is None else held_out
    for seed in seeds:
        for kind, spec in KINDS.items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = Decoder(replace(config, layers=(spec,)))
            curve = train_and_measure(
                model,
                text,
                replace(training, seed=seed),
                held_out={"sympy": held_out},
                at=[training.steps // 2],
                n_windows=n_windows,
                checkpoint=folder / f"{kind}-{seed}.pt",
                progress=progress,
            )
            memory = model.table(1, dtype=torch.bfloat16)[-1]
            yield {
                "run": kind,
                "layers": [repr(spec) for spec in model.config.specs],
                "seed": seed,
                "training": asdict(replace(training, seed=seed)),
                "parameters": model.n_parameters,
                "bytes_stored_per_token": memory["stored"],
                "bytes_read_per_token": memory["read"],
                "routes": [mixer.pools for mixer in model.mixers if isinstance(mixer, RoutedAttention)],
                "seconds": sum(point.seconds for point in curve),
                "loss": curve[-1].loss("sympy"),
                "error": curve[-1].error("sympy"),
                "loss_half_way": curve[-2].loss("sympy"),
                "windows": n_windows,
            }


def compare(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Of each kind, with standard errors over the seeds: its loss, and how far that is above "gqa"'s.

    The difference is taken seed by seed: runs of one seed saw the same batches.
    """
    by_kind: dict[str, dict[int, float]] = {}
    for row in rows:
        by_kind.setdefault(row["run"], {})[row["seed"]] = row["loss"]
    return {
        kind: {
            "loss": mean_and_error(list(losses.values())),
            "above_gqa": mean_and_error([loss - by_kind[BASELINE][seed] for seed, loss in losses.items()]),
        }
        for kind, losses in by_kind.items()
    }
