"""What a mechanism costs in quality: the corpus, the training loop, the evaluation, the base model."""

from kvlearn.study.base import base_model, train_base
from kvlearn.study.evaluation import Evaluation, evaluate
from kvlearn.study.speed import SPEED_BAR, training_speed
from kvlearn.study.text import Corpus, corpus, windows
from kvlearn.study.training import Step, TrainConfig, train

__all__ = [
    "SPEED_BAR",
    "Corpus",
    "Evaluation",
    "Step",
    "TrainConfig",
    "base_model",
    "corpus",
    "evaluate",
    "train",
    "train_base",
    "training_speed",
    "windows",
]
