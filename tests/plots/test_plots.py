"""Figures are drawn from data, and the data are right."""

import numpy as np
import pytest

from kvlearn import plots
from kvlearn.measure import MODELS, Quartiles, Roofline, Work, cache_bytes, read_bytes, weights_bytes

GIB = 1024**3
SOME = Quartiles(0.002, 0.001, 0.003, 5)

PICTURES = {
    "cache_growth": lambda: plots.cache_growth(MODELS["Llama 3.1 8B"]),
    "bytes_per_token": lambda: plots.bytes_per_token(list(MODELS.values())),
    "cache_saves": lambda: plots.cache_saves(5),
    "loss_curve": lambda: plots.loss_curve([5.0, 4.0, 3.5, 3.2], uniform=5.5),
    "step_times": lambda: plots.step_times([64, 128], {"with a cache": [SOME, SOME]}),
    "on_the_roofline": lambda: plots.on_the_roofline(
        Roofline(1e11, 2e10), {"prefill": (Work(1e9, 1e7), SOME), "decode": (Work(1e6, 2e6), SOME)}
    ),
    "loss_by_position": lambda: plots.loss_by_position(
        {"right": np.ones(64), "wrong": 2 * np.ones(64)}, chunk=32
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_a_png_with_words_for_who_cannot_see_it(name: str) -> None:
    picture = PICTURES[name]()
    data, metadata = picture._repr_mimebundle_()
    assert data["image/png"].startswith(b"\x89PNG")
    assert data["text/plain"] == metadata["image/png"]["alt"] == picture.alt
    assert len(picture.alt) > 60
    assert picture.data
    assert len(data["image/png"]) < 100_000


def test_every_picture_of_the_course_is_tested_here() -> None:
    assert {name for name in plots.__all__ if name[0].islower()} == set(PICTURES)


def test_the_same_picture_twice_is_the_same_file() -> None:
    assert plots.cache_saves(5).png() == plots.cache_saves(5).png()


def test_the_ground_is_transparent_for_either_theme() -> None:
    from io import BytesIO

    from matplotlib.image import imread

    pixels = imread(BytesIO(plots.cache_saves(5).png()))
    assert pixels[0, 0, 3] == 0


def test_the_cache_saves_all_but_the_last_row() -> None:
    assert plots.cache_saves(12).data["scores"] == {"without": 78, "with": 12}


def test_the_growth_of_the_cache_is_the_formulas() -> None:
    model = MODELS["Llama 3.1 8B"]
    data = plots.cache_growth(model, batch=16, card_bytes=80e9).data
    longest = data["longest"]
    assert data["weights"] == weights_bytes(model) / GIB
    assert data["cache"][-1] == cache_bytes(model, 65_536, batch=16) / GIB
    assert weights_bytes(model) + cache_bytes(model, longest, batch=16) <= 80e9
    assert weights_bytes(model) + cache_bytes(model, int(longest * 1.05), batch=16) > 80e9


def test_the_bars_are_sorted_and_stored_is_not_read() -> None:
    data = plots.bytes_per_token(list(MODELS.values()), length=32_768).data
    assert data["stored"] == sorted(data["stored"], reverse=True)
    at = data["models"].index("Gemma 4 E2B")
    assert data["read"][at] == read_bytes(MODELS["Gemma 4 E2B"], 32_768) / GIB > data["stored"][at]


def test_the_roofline_shows_what_was_achieved() -> None:
    achieved = PICTURES["on_the_roofline"]().data["achieved"]
    assert achieved == {"prefill": pytest.approx(1e9 / 0.002), "decode": pytest.approx(1e6 / 0.002)}
