"""Pictures of chapter 12: what is drawn is what was measured, and what is predicted."""

import math
from typing import Any

import pytest

from kvlearn import plots
from kvlearn.attention import REGISTRY
from kvlearn.measure import DEVICES, Work
from kvlearn.plots.measurements import LINES


def decode(mechanism: str, length: int, measured: float, predicted: float | None = None) -> dict[str, Any]:
    row = {"what": "decode_time", "mechanism": mechanism, "model": "m", "length": length, "unit": "s"}
    row |= {"measured": measured, "q1": 0.9 * measured, "q3": 1.2 * measured, "n": 5}
    return row if predicted is None else row | {"predicted": predicted}


ROWS = [decode(m, n, n * 1e-6 * k, n * 1e-6) for m, k in (("gqa", 1.1), ("mla", 2.0)) for n in (1024, 4096)]
EXPONENT = {"what": "decode_exponent", "mechanism": "gqa", "model": "m", "measured": 1.0, "error": 0.02}


def test_bytes_are_per_token_and_the_formula_is_beside_them() -> None:
    at = {"mechanism": "window", "model": "m", "length": 32_768}
    rows = [
        {"what": "stored", "measured": 65_536, "formula": 65_536, **at},
        {"what": "read", "measured": 131_072, "formula": 65_536, **at},
        {"what": "read", "measured": 1, "formula": 1, **at, "length": 1024},
    ]
    picture = plots.touched_bytes(rows)
    assert picture.data["bytes"] == {
        "window, m": {"stored": 2, "read": 4, "stored_formula": 2, "read_formula": 2}
    }
    assert "window, m 2 B stored, 4 B read" in picture.alt
    with pytest.raises(ValueError, match="rows with bytes at this length"):
        plots.touched_bytes(rows, length=4096)


def test_decode_times_have_a_panel_per_condition_and_leave_out_what_is_missing() -> None:
    missing = decode("mla", 16_384, 1.0) | {"measured": None}
    picture = plots.decode_times({"one thread": [*ROWS, EXPONENT, missing], "two": ROWS[:2]})
    series = picture.data["series"]
    assert list(series) == ["one thread", "two"]
    assert [point[0] for point in series["one thread"]["mla"]] == [1024, 4096]
    assert series["two"]["gqa"][0][1:] == pytest.approx(
        (1024 * 1.1e-6, 0.99 * 1024e-6, 1.32 * 1024e-6, 1024e-6)
    )
    labels = [text.get_text() for text in picture.figure.legends[0].get_texts()]
    assert labels == ["gqa: $N^{1.00 ± 0.02}$", "mla", "predicted"]
    assert "gqa from 1.13 ms at 1,024" in picture.alt


def test_predictions_within_the_band_are_counted_per_condition() -> None:
    picture = plots.predicted_and_measured({"here": ROWS, "there": ROWS[:2]})
    assert picture.data["within"] == {"here": 2, "there": 2}
    assert picture.data["errors"]["here"] == pytest.approx([0.1, 0.1, 1.0, 1.0])
    assert "here: 2 of 4 within 15%, from +10% to +100%" in picture.alt
    with pytest.raises(ValueError, match="markers"):
        plots.predicted_and_measured({str(i): ROWS for i in range(7)})


def test_more_mechanisms_than_colours_are_grey_and_counted_in_the_legend() -> None:
    """``kvlearn bench hardware`` records every mechanism of the registry."""
    rows = [decode(name, 1024, 1e-3, 1e-3) for name in (*REGISTRY, "gqa", "mla")]
    picture = plots.predicted_and_measured({"here": rows})
    labels = [text.get_text() for text in picture.figure.legends[0].get_texts()]
    assert labels[-2:] == [f"{len(REGISTRY) - len(LINES)} others", "here"]
    assert set(labels[:-2]) == set(LINES)


def test_rooflines_place_each_work_under_each_roof() -> None:
    device = DEVICES["H200"]
    picture = plots.rooflines([device], {"gqa": Work(4e9, 1e9), "mla": Work(1e12, 1e9)})
    assert picture.data["at"] == {"gqa": 4, "mla": 1000}
    assert picture.data["reached"]["H200"] == {"gqa": 4 * device.bandwidth, "mla": device.peak}
    assert "gqa at 4 FLOPs per byte: H200 19.2 TFLOP/s" in picture.alt


def test_what_pays_marks_cards_that_hold_nothing() -> None:
    found = {"one user": {"gqa": {"T4": math.nan, "H100": 1.5}, "window": {"T4": math.nan, "H100": 1.4}}}
    picture = plots.what_pays(found)
    (panel,) = picture.figure.axes
    assert [text.get_text() for text in panel.texts] == ["does not fit"]
    assert picture.data["speedups"] is found
    assert "one user, gqa: T4 nan, H100 1.50" in picture.alt


def test_a_line_of_dollars_ends_where_no_user_fits() -> None:
    picture = plots.dollars({"full": [(1024, 0.5), (2048, math.inf)], "gqa": [(1024, math.inf)]})
    assert picture.data["lines"] == {"full": [(1024, 0.5)], "gqa": []}
    assert "gqa: does not fit" in picture.alt


@pytest.mark.parametrize(
    "picture",
    [
        lambda: plots.decode_times({"one": [*ROWS, EXPONENT]}),
        lambda: plots.predicted_and_measured({"one": ROWS}),
        lambda: plots.rooflines(list(DEVICES.values())[:4], {"gqa": Work(4, 1), "mla": Work(200, 1)}),
        lambda: plots.what_pays({"one": {"gqa": {"T4": 1.2}}}),
        lambda: plots.dollars({"gqa": [(1024, 0.5), (2048, 1.0)]}),
    ],
)
def test_every_picture_can_be_drawn_and_has_words(picture: Any) -> None:
    drawn = picture()
    assert drawn.png()[:4] == b"\x89PNG"
    assert len(drawn.alt) > 40
