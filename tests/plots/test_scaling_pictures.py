"""The picture of the exponents shows the rows: points, quartiles, and the powers that were fitted."""

from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from kvlearn import plots
from kvlearn.plots.picture import MECHANISMS

LENGTHS = (1024, 2048, 4096)
DESIGNS = {
    "full": ("full", 2.0),
    "window": ("sliding", 1.0),
    "strided": ("sparse", 1.5),
    "fixed": ("sparse", 1.4),
}


def rows(part: str = "prefill") -> list[dict[str, Any]]:
    made = []
    for name, (family, power) in DESIGNS.items():
        common = {"name": name, "family": family}
        for n in reversed(LENGTHS):
            time = (n / 1024) ** power * 1e-3
            spread = {"q1": 0.9 * time, "q3": 1.2 * time, "n": 5}
            made += [
                {**common, "what": f"{part}_time", "length": n, "measured": time, **spread},
                {**common, "what": f"{part}_memory", "length": n, "measured": 1024 * n},
            ]
        spread = {"q1": power - 0.1, "q3": power + 0.1, "n": 5}
        made += [
            {**common, "what": f"{part}_time_exponent", "length": 4096, "measured": power, **spread},
            {**common, "what": f"{part}_memory_exponent", "length": 4096, "measured": 1.0},
        ]
    return [*made, {"what": "stored", "name": "full", "family": "full", "length": 1024, "measured": 1}]


def test_the_lines_are_the_rows_in_the_order_of_length() -> None:
    picture = plots.scaling(rows())
    assert picture.data["lines"]["full"]["time"] == [
        (n, pytest.approx(t), pytest.approx(0.9 * t), pytest.approx(1.2 * t))
        for n, t in zip(LENGTHS, (1e-3, 4e-3, 16e-3), strict=True)
    ]
    assert picture.data["lines"]["window"]["memory"] == [(n, 1024 * n, 1024 * n, 1024 * n) for n in LENGTHS]
    assert picture.data["lines"]["strided"]["time_spread"] == (1.4, 1.6)
    time, memory = picture.figure.axes
    for panel, quantity in ((time, "time"), (memory, "memory")):
        for name, container in zip(DESIGNS, panel.containers, strict=True):
            points = picture.data["lines"][name][quantity]
            np.testing.assert_allclose(container[0].get_xydata(), [(n, middle) for n, middle, *_ in points])


def test_error_bars_go_from_quartile_to_quartile() -> None:
    time, memory = plots.scaling(rows()).figure.axes
    (bars,) = time.containers[0][2]
    ends = [sorted(segment[:, 1]) for segment in bars.get_segments()]
    np.testing.assert_allclose(ends, [(0.9 * t, 1.2 * t) for t in (1e-3, 4e-3, 16e-3)])
    assert time.get_xscale() == time.get_yscale() == memory.get_xscale() == memory.get_yscale() == "log"


def test_the_legend_gives_both_exponents() -> None:
    (legend,) = plots.scaling(rows()).figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[0] == "full: time $N^{2.00}$, memory $N^{1.00}$"
    assert texts[2] == "strided: time $N^{1.50}$, memory $N^{1.00}$"


def test_no_two_designs_look_alike_and_each_has_its_own_line() -> None:
    panel = plots.scaling(rows()).figure.axes[0]
    drawn = {
        name: (to_hex(line.get_color()).upper(), line.get_marker())
        for name, (line, *_) in zip(DESIGNS, panel.containers, strict=True)
    }
    assert drawn == {name: (MECHANISMS[name].colour.upper(), MECHANISMS[name].marker) for name in DESIGNS}


def test_the_words_are_drawn_from_the_rows() -> None:
    alt = plots.scaling(rows(), names=["full"]).alt
    assert alt == (
        "Time and extra memory of prefill from 1,024 to 4,096 tokens: full from 1 ms and 1 MiB to 16 ms and "
        "4 MiB, time ∝ N^2.00, memory ∝ N^1.00."
    )


def test_a_part_and_designs_are_chosen_by_name() -> None:
    both = [*rows(), *(row for row in rows("train") if row["name"] == "window")]
    assert list(plots.scaling(both, part="train").data["lines"]) == ["window"]
    assert list(plots.scaling(both, names=["fixed", "full"]).data["lines"]) == ["fixed", "full"]
    for wrong in ({"part": "decode"}, {"names": ["mamba"]}, {"part": "train", "names": ["full"]}):
        with pytest.raises(ValueError, match=r"part|names"):
            plots.scaling(both, **wrong)  # type: ignore[arg-type]
