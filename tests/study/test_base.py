"""The committed base model is what its card says."""

import json

import pytest

from kvlearn.model import card
from kvlearn.study import TrainConfig, base_model, corpus, evaluate
from kvlearn.study.base import MODEL, PATH, TRAINING
from kvlearn.study.text import CHECKSUM


def test_the_base_model_is_small_and_of_the_recorded_shape() -> None:
    assert PATH.stat().st_size <= 4_000_000
    assert base_model().config == MODEL


def test_its_card_says_how_it_came_to_be() -> None:
    said = card(PATH)
    assert said == json.loads(PATH.with_suffix(".json").read_text())
    assert TrainConfig(**said["training"]) == TRAINING
    assert said["tokens"] == TRAINING.steps * TRAINING.batch * TRAINING.length
    assert CHECKSUM in said["corpus"]
    assert said["provenance"]["dirty"] is False


def test_its_loss_on_text_it_never_saw_is_the_recorded_one() -> None:
    measured = evaluate(base_model(), corpus().valid, length=512, n_windows=48)
    assert measured.loss == pytest.approx(card(PATH)["valid_loss"], abs=3 * measured.error)
    assert measured.loss < 1.1  # nats per byte; knowing nothing is 5.5
