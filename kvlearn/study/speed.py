"""How fast this machine trains: the training loop itself, on the base model's shape."""

import time

import torch

from kvlearn.model import Decoder
from kvlearn.study.base import MODEL
from kvlearn.study.text import corpus
from kvlearn.study.training import TrainConfig, train

SPEED_BAR = 12_000  # tokens/s on 2 otherwise idle cores
SHAPE = {"batch": 16, "length": 256}


def training_speed(steps: int = 30) -> float:
    """Tokens per second over ``steps`` steps of 16 x 256 tokens, after a few to warm up."""
    text = corpus().train
    torch.manual_seed(0)
    model = Decoder(MODEL)
    train(model, text, TrainConfig(steps=3, **SHAPE), progress=False)
    started = time.perf_counter()
    train(model, text, TrainConfig(steps=steps, **SHAPE), progress=False)
    return steps * SHAPE["batch"] * SHAPE["length"] / (time.perf_counter() - started)
