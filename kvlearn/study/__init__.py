"""What a mechanism costs in quality: the corpus, the training loop, the evaluation, the base model."""

from kvlearn.study.base import base_model, train_base
from kvlearn.study.corpus import Corpus, corpus, windows
from kvlearn.study.evaluate import Evaluation, evaluate
from kvlearn.study.train import Step, TrainConfig, train

__all__ = [
    "Corpus",
    "Evaluation",
    "Step",
    "TrainConfig",
    "base_model",
    "corpus",
    "evaluate",
    "train",
    "train_base",
    "windows",
]
