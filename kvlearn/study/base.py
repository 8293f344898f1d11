"""The base model of the course: small, trained on the corpus with full attention, committed with the code.

What later chapters convert to fewer heads, to a latent or to a window, and probe for what was lost.
``kvlearn study base`` trains it again from nothing, or continues where a killed run stopped.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kvlearn.measure import collect_provenance
from kvlearn.model import Decoder, ModelConfig, load, save
from kvlearn.study.evaluation import evaluate
from kvlearn.study.text import CHECKSUM, SYMPY_VERSION, corpus
from kvlearn.study.training import TrainConfig, train

PATH = Path(__file__).parents[1] / "model" / "base.safetensors"
MODEL = ModelConfig(d_model=128, n_layers=4, n_heads=8, d_ff=384)
TRAINING = TrainConfig(steps=3000, batch=16, length=512, lr=3e-3, warmup=200, seed=0)


def base_model() -> Decoder:
    """The committed base model, in evaluation mode."""
    return load(PATH)


def train_base(out: Path = PATH, run: Path = Path("runs/base.pt"), progress: bool = True) -> dict[str, Any]:
    """Train the base model, going on from ``run`` if it exists; write it and its card to ``out``."""
    text = corpus()
    torch.manual_seed(TRAINING.seed)
    model = Decoder(MODEL)
    history = train(model, text.train, TRAINING, checkpoint=run, progress=progress)
    valid, test = (
        evaluate(model, part, length=TRAINING.length, n_windows=256) for part in (text.valid, text.test)
    )
    card = {
        "command": "kvlearn study base",
        "corpus": f"sympy {SYMPY_VERSION} source, SHA-256 {CHECKSUM}",
        "tokens": TRAINING.steps * TRAINING.batch * TRAINING.length,
        "parameters": model.n_parameters,
        "training": asdict(TRAINING),
        "last_train_loss": sum(line["loss"] for line in history[-100:]) / len(history[-100:]),
        "valid_loss": valid.loss,
        "test_loss": test.loss,
        "loss_unit": "nats per byte, windows of 512",
        "provenance": collect_provenance(),
    }
    save(model, out, card)
    out.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
    return card
