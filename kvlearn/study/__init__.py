"""The cost of a mechanism in quality: the corpus, the training loop, the evaluation, the base model."""

from kvlearn.study.base import base_model, train_base
from kvlearn.study.capacity import study_recall
from kvlearn.study.conversion import MASK_RUNS, RUNS, Conversion, convert_and_uptrain, study_conversions
from kvlearn.study.curve import Point, train_and_measure
from kvlearn.study.evaluation import Evaluation, evaluate
from kvlearn.study.long_context import evaluate_folder
from kvlearn.study.other_text import other_texts
from kvlearn.study.routing import study_routing
from kvlearn.study.sinks import study_sinks
from kvlearn.study.speed import SPEED_BAR, training_speed
from kvlearn.study.text import Corpus, corpus, windows
from kvlearn.study.training import Step, TrainConfig, train

__all__ = [
    "MASK_RUNS",
    "RUNS",
    "SPEED_BAR",
    "Conversion",
    "Corpus",
    "Evaluation",
    "Point",
    "Step",
    "TrainConfig",
    "base_model",
    "convert_and_uptrain",
    "corpus",
    "evaluate",
    "evaluate_folder",
    "other_texts",
    "study_conversions",
    "study_recall",
    "study_routing",
    "study_sinks",
    "train",
    "train_and_measure",
    "train_base",
    "training_speed",
    "windows",
]
