"""The pictures of chapter 10 draw what the rows say, whatever of the plan has run."""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvlearn import plots
from kvlearn.measure import Table
from kvlearn.plots import quality as pictures
from kvlearn.plots.quality import CLAIMS, FAMILY, above_full, apart, pareto_front
from kvlearn.study import quality
from kvlearn.study.quality.plan import (
    CPU,
    LONGER,
    RECALL_DESIGNS,
    ConversionRun,
    LanguageRun,
    RecallRun,
    Run,
    parts,
)

BUCKETS = [(0, 8), (8, 16), (16, 32), (32, 64), (64, 128), (128, 256)]
# Above full attention, in nats; what is not here is at 0.
LOSS = {
    "gqa-4x": 0.002,
    "window": 0.02,
    "bigbird": 0.03,
    "gated-delta": -0.03,
    "mamba2": 0.05,
    "gqa-8x": 0.01,
}


def by_position(loss: float, length: int) -> list[dict[str, Any]]:
    edges = BUCKETS + [(a, 2 * a) for a in (256, 512) if a < length]
    return [{"from": a, "to": b, "loss": loss + 1 / (1 + a)} for a, b in edges]


def language_row(run: LanguageRun, loss: float | None = None) -> dict[str, Any]:
    noise = np.random.default_rng([run.seed, len(run.design), run.steps]).normal(0, 0.002)
    value = 1.3 + LOSS.get(run.design, 0.0) + 0.004 * run.seed + noise if loss is None else loss
    if not np.isfinite(value):
        return row(run, {"loss": None, "diverged": "not finite", "budget": "cpu"})
    stored = pictures.stored_bytes("cpu")[run.design]
    lengths = {256: stored, 1024: 2 * stored, 4096: 4 * stored, 32768: 20 * stored}
    return row(
        run,
        {
            "loss": value,
            "diverged": None,
            "budget": run.budget,
            "by_position": by_position(value, 256),
            "slices": {name: {"loss": value + 0.5, "tokens": 9} for name in ("new", "near", "far", "other")},
            "longer": [
                {"length": n * 256, "loss": value, "error": 0.01, "by_position": by_position(value, n * 256)}
                for n in LONGER
            ],
            "memory": [{"length": n, "stored": size, "read": size} for n, size in lengths.items()],
        },
    )


def recall_row(run: RecallRun) -> dict[str, Any]:
    size = 4096 if run.design == "full" else 256 * (1 + list(RECALL_DESIGNS).index(run.design))
    accuracy = 1.0 if "full" in run.design else min(size / 3000 + 0.01 * run.seed, 1.0)
    longer = [{"length": n * run.task.length, "accuracy": accuracy / n, "state_bytes": size} for n in LONGER]
    about = {"task": run.task_name, "accuracy": accuracy, "state_bytes": size, "longer": longer}
    return row(run, {"loss": 1 - accuracy, "diverged": None, **about})


def conversion_row(run: ConversionRun) -> dict[str, Any]:
    texts = ("sympy", "networkx", "prose")
    before = 0.0 if run.conversion == "full" else 0.4
    after = before * (1 - run.share * 10) + (0.02 if run.lr > 2e-3 else 0.01) + 0.001 * run.seed
    losses = {
        when: {text: {"loss": 1 + x} for text in texts} for when, x in (("before", before), ("after", after))
    }
    base = {text: {"loss": 1.0} for text in texts}
    about = {"share": run.share, "steps": run.n_steps, "base": base, "diverged": None}
    return row(run, {**about, **losses, "loss": 1 + after})


def row(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    kind = type(run).__name__.removesuffix("Run").lower()
    about = {"run": run.name, "kind": kind, "design": run.design, "lr": run.lr, "seed": run.seed}
    return {**about, "settings": run.settings(), **found}


def rows_of(tier: str, designs: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """As if ``tier`` had run: the rate of a run without one is its first candidate's."""
    make: Any = {LanguageRun: language_row, RecallRun: recall_row, ConversionRun: conversion_row}
    runs = [run for part in parts("cpu", tier) for run in part.runs]
    rated = [run if run.lr is not None else replace(run, lr=run.candidates[0].lr) for run in runs]
    unique = {run.name: run for run in rated}.values()
    return [make[type(run)](run) for run in unique if designs is None or run.design in designs]


@cache
def tier_a() -> list[dict[str, Any]]:
    """Rows of tier A."""
    return rows_of("A")


def long_run(design: str, seed: int) -> LanguageRun:
    return LanguageRun("cpu", design, CPU.training.steps, 2e-3, seed)


def error_bars(axes: Any) -> dict[float, Any]:
    """By their place on the horizontal axis."""
    return {float(bars.lines[0].get_xdata()[0]): bars for bars in axes.containers}


def test_every_design_of_the_study_has_a_family() -> None:
    assert set(FAMILY) == set(CPU.designs) == set(quality.GPU.designs)


def test_points_are_the_paired_differences_and_bytes_of_the_study() -> None:
    points = plots.loss_over_bytes(tier_a()).data["points"]
    compared = {item.design: item for item in quality.compare(tier_a()) if item.design != "full"}
    assert points.keys() == compared.keys()
    for design, point in points.items():
        pooled = compared[design].pooled
        assert pooled is not None
        assert (point.mean, point.low, point.high) == (pooled.mean, pooled.low, pooled.high)
        assert point.tie == pooled.tie
        assert point.stored == pictures.stored_bytes("cpu")[design]
    assert points["gqa-4x"].tie
    assert not points["mamba2"].tie


def test_every_mechanism_of_the_course_is_in_the_headline_trained_or_waiting() -> None:
    picture = plots.loss_over_bytes(tier_a())
    drawn = {"full", *picture.data["points"], *picture.data["pending"]}
    assert drawn == set(CPU.designs)
    (axes,) = picture.figure.axes
    written = {text.get_text() for text in axes.texts}
    assert drawn <= written
    assert {f"article: {claim.name}" for claim in CLAIMS} <= written


def test_a_hollow_marker_is_a_tie() -> None:
    picture = plots.loss_over_bytes(tier_a())
    (axes,) = picture.figure.axes
    markers = {x: bars.lines[0] for x, bars in error_bars(axes).items()}
    for design, point in picture.data["points"].items():
        face = markers[picture.data["at"][design]].get_markerfacecolor()
        assert (face == "none") == point.tie, design


def test_a_run_that_diverged_is_named_and_in_no_mean() -> None:
    broken = [language_row(long_run("window", 2), float("inf"))]
    rows = [row for row in tier_a() if row["run"] != broken[0]["run"]]
    without = above_full(rows)["window"]
    point = above_full(rows + broken)["window"]
    assert point.mean == without.mean
    assert point.diverged == 1
    picture = plots.loss_over_bytes(rows + broken)
    assert "window, 1 diverged" in {text.get_text() for text in picture.figure.axes[0].texts}
    assert "1 runs diverged" in picture.alt


def test_a_design_that_diverged_in_all_runs_is_not_called_not_yet_run() -> None:
    broken = [language_row(long_run("window", seed), float("inf")) for seed in range(3)]
    others = [row for row in tier_a() if row["design"] != "window"]
    picture = plots.loss_over_bytes(others + broken)
    assert picture.data["failed"] == ["window"]
    assert "window" not in picture.data["pending"]
    assert "window, diverged" in {text.get_text() for text in picture.figure.axes[0].texts}
    assert "Diverged in all runs: window." in picture.alt


def test_a_claim_is_drawn_as_perplexity_at_the_share_that_is_left() -> None:
    claim = pictures.Claim("x", (0.75, 0.75), (0.01, 0.02), "")
    picture = plots.loss_over_bytes([], claims=[claim])
    (axes,) = picture.figure.axes
    bars = error_bars(axes)[picture.data["at"]["article: x"]]
    ((low, high),) = [segment[:, 1] for segment in bars.lines[2][0].get_segments()]
    assert (low, high) == pytest.approx((np.log(1.01), np.log(1.02)))


def test_short_runs_alone_are_no_result() -> None:
    short = [row for row in tier_a() if row["settings"]["training"]["steps"] < CPU.training.steps]
    assert short
    assert not above_full(short)
    assert "not yet run" in plots.pareto(short).alt


@pytest.mark.parametrize(
    ("draw", "tier"),
    [
        (plots.pareto, "A"),
        (plots.above_by_position, "A"),
        (plots.recall_over_bytes, "B"),
        (plots.recall_over_length, "B"),
        (plots.converted, "C"),
    ],
)
def test_without_rows_a_picture_says_what_to_run(draw: Any, tier: str) -> None:
    picture = draw([])
    assert "not yet run" in picture.alt
    assert f"--tier {tier}" in picture.alt


def test_neighbours_are_apart_and_stay_near_their_places() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        places = rng.uniform(0, 1, 12).tolist()
        moved = apart(places, 0.05)
        assert np.diff(sorted(moved)).min() >= 0.05 - 1e-9
        assert np.argsort(moved).tolist() == np.argsort(places).tolist()
    assert apart([0.0, 1.0], 0.5) == [0.0, 1.0]
    assert apart([1.0, 1.0], 0.5) == pytest.approx([0.75, 1.25])


def test_nothing_on_the_front_is_dominated_and_all_else_is() -> None:
    rng = np.random.default_rng(0)
    points = {str(i): tuple(rng.integers(0, 6, 2).tolist()) for i in range(15)}
    front = pareto_front(points, tolerance=0)

    def beaten(name: str) -> bool:
        x, y = points[name]
        return any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())

    assert {points[name] for name in points if not beaten(name)} == {points[name] for name in front}
    assert not any(beaten(name) for name in front)


def test_a_percent_of_the_bytes_puts_nothing_on_the_front() -> None:
    points = {"smaller": (99.0, 1.4), "better": (100.0, 1.3), "small": (50.0, 1.5)}
    assert pareto_front(points) == ["small", "better"]
    assert pareto_front(points, tolerance=0) == ["small", "smaller", "better"]


def test_the_front_at_a_longer_context_is_of_the_bytes_there() -> None:
    data = plots.pareto(tier_a()).data
    assert list(data["fronts"]) == [256, 32_768]
    for design, (stored, loss) in data["points"][32_768].items():
        assert stored == 20 * data["points"][256][design][0]
        assert loss == data["points"][256][design][1]


def test_designs_that_the_legend_cannot_tell_apart_are_named_in_every_panel() -> None:
    picture = plots.pareto(rows_of("A") + rows_of("D"))
    names = set(picture.data["points"][256])
    families = [FAMILY[name] for name in names]
    assert {"gated-delta", "mamba2", "hybrid", "hybrid-conv"} < names
    for axes in picture.figure.axes:
        shown = {text.get_text() for text in axes.texts}
        assert {name for name in names if families.count(FAMILY[name]) > 1} <= shown


def test_positions_are_paired_differences_bucket_by_bucket() -> None:
    data = plots.above_by_position(tier_a()).data
    assert data["buckets"] == BUCKETS
    (mamba,) = [item for item in quality.compare(tier_a()) if item.design == "mamba2"]
    assert mamba.difference is not None
    for point in data["curves"]["mamba2"]:
        assert point.mean == pytest.approx(mamba.difference.mean)
    assert len(plots.above_by_position(tier_a(), length=1024).data["buckets"]) == 8


def test_recall_is_at_the_best_rate_with_the_spread_of_the_seeds() -> None:
    rows = rows_of("B")
    cells = plots.recall_over_bytes(rows).data["cells"]
    for cell, own in quality.best_recall(rows).items():
        values = [row["accuracy"] for row in own]
        assert cells[cell][1] == pytest.approx(np.mean(values))
        assert cells[cell][2] == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5)


def test_the_model_as_converted_counts_once_per_seed() -> None:
    """Every share and rate of a seed starts from one model: its loss is one value, not four."""
    rows = [json.loads(json.dumps(row)) for row in rows_of("C", ["gqa-2-mean"])]
    for row in rows:
        row["before"]["sympy"]["loss"] = 1.4 + 0.1 * row["seed"]
    start = plots.converted(rows).data["curves"]["sympy"]["gqa-2-mean"][0]
    assert start == (0.0, pytest.approx(1.5), pytest.approx(0.1 / 3**0.5))


def test_recall_names_the_tasks_that_wait() -> None:
    rows = [row for row in rows_of("B") if row["task"] == "mqar-8"]
    picture = plots.recall_over_bytes(rows)
    assert picture.data["waiting"] == ["mqar-16", "needle-1", "needle-8", "copy-4", "induction"]
    assert "induction" in picture.alt


def test_no_marker_of_recall_covers_another() -> None:
    """Designs of equal bytes, all of which answer everything: each marker is seen."""
    rows = [{**row, "accuracy": 1.0, "state_bytes": 2048} for row in rows_of("B")]
    for row in rows:
        row["longer"] = [{**line, "accuracy": 1.0} for line in row["longer"]]
    for picture in (plots.recall_over_bytes(rows), plots.recall_over_length(rows)):
        picture.figure.canvas.draw()
        for axes in picture.figure.axes:
            drawn = [bars.lines[0] for bars in axes.containers]
            places = sorted(
                x
                for line in drawn
                for x, _ in axes.transData.transform(
                    np.column_stack((line.get_xdata(), line.get_ydata())).astype(float)
                )
            )
            assert len(drawn) > 4
            assert np.diff(places).min() > 3, axes.get_title()


def test_a_design_is_drawn_at_its_bytes_where_it_has_room() -> None:
    sizes = {"a": 512, "b": 2048, "c": 2048, "d": 16_384}
    at = pictures._side_by_side(sizes)
    assert at["a"] == pytest.approx(512)
    assert at["d"] == pytest.approx(16_384)
    assert at["b"] < 2048 < at["c"]
    assert at["b"] * at["c"] == pytest.approx(2048**2)
    assert pictures._side_by_side({}) == {}


def test_recall_says_in_a_panel_what_has_not_run_and_what_diverged() -> None:
    rows = [
        {**row, "loss": None} if row["design"] == "mamba2-4" else row
        for row in rows_of("B")
        if row["task"] == "mqar-8" and row["design"] not in ("window-8", "linear-8")
    ]
    picture = plots.recall_over_bytes(rows)
    (axes,) = picture.figure.axes
    assert axes.get_title(loc="right") == "not yet run: 2, diverged: 3"
    assert "mamba2-4 no answer with" in picture.alt
    assert "3 diverged" in picture.alt
    assert len(axes.containers) == 4  # full, linear, gated-delta and the larger mamba2
    longer = plots.recall_over_length(rows)
    assert longer.data["waiting"] == ["mqar-16", "needle-1", "needle-8", "copy-4", "induction"]
    assert longer.figure.axes[0].get_title(loc="right") == ""


def test_conversions_begin_with_the_text_that_is_trained_on_and_name_what_waits() -> None:
    """Rows as they come back from a file, whose keys are sorted."""
    rows = json.loads(json.dumps(rows_of("C"), sort_keys=True))
    picture = plots.converted(rows)
    assert [axes.get_title(loc="left") for axes in picture.figure.axes] == ["sympy", "networkx", "prose"]
    assert picture.data["waiting"] == []
    part = plots.converted([row for row in rows if row["design"] in ("full", "gqa-2-mean")])
    assert part.data["waiting"] == ["gqa-1-mean", "mhc-32-activations"]
    assert "Not yet run: gqa-1-mean, mhc-32-activations." in part.alt
    assert part.figure.axes[-1].get_title(loc="right") == "not yet run: 2"


def test_recall_of_one_figure_has_no_colour_or_marker_twice() -> None:
    styles = plots.picture.line_styles(pictures.RECALL_LINES, fixed=pictures.RECALL_LINES).values()
    for key in ("color", "marker"):
        seen = [style[key] for style in styles if key == "color" or style["marker"] != "X"]
        assert len(set(seen)) == len(seen)


def test_conversions_start_as_converted_and_take_the_better_rate() -> None:
    data = plots.converted(rows_of("C")).data
    line = data["curves"]["prose"]["gqa-2-mean"]
    assert line[0][:2] == (0.0, pytest.approx(1.4))
    assert [tokens for tokens, _, _ in line] == [0.0, 30 * 16 * 512, 150 * 16 * 512]
    assert data["rates"]["gqa-2-mean"] == {0.01: 1e-3, 0.05: 1e-3}


def test_names_stay_inside_the_axes() -> None:
    for rows in ([], tier_a()):
        picture = plots.loss_over_bytes(rows)
        picture.figure.canvas.draw()
        (axes,) = picture.figure.axes
        panel = axes.get_window_extent()
        for text in axes.texts:
            if text.get_rotation() == 90:
                box = text.get_window_extent()
                assert panel.y0 <= box.y0 <= box.y1 <= panel.y1, text.get_text()


def test_the_legend_is_smaller_than_the_curves() -> None:
    drawn = [plots.loss_over_bytes(tier_a()), plots.pareto(tier_a()), plots.recall_over_bytes(rows_of("B"))]
    for picture in drawn:
        picture.figure.canvas.draw()
        (legend,) = picture.figure.legends
        box, panel = legend.get_window_extent(), picture.figure.axes[0].get_window_extent()
        assert min(box.height / panel.height, box.width / panel.width) < 0.6


NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "10_quality.ipynb"


def cells_of_the_recorded_study() -> list[str]:
    """The code of chapter 10 from where the rows are read to the last figure drawn from them."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (first,) = (i for i, source in enumerate(code) if "quality.recorded()" in source)
    (last,) = (i for i, source in enumerate(code) if "plots.converted(rows)" in source)
    return code[first : last + 1]


@pytest.mark.slow
@pytest.mark.parametrize("state", ["nothing", "begun", "tier A in part", "tier A", "all tiers"])
def test_the_chapter_needs_no_edit_whatever_has_run(
    state: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [row for row in tier_a() if row["settings"]["training"]["steps"] < CPU.training.steps]
    one = language_row(long_run("full", 0))
    rows = {
        "nothing": [],
        "begun": [row for row in short if row["design"] == "full"],
        "tier A in part": [
            *short,
            one,
            language_row(long_run("gqa-4x", 0)),
            language_row(long_run("window", 1)),
        ],
        "tier A": tier_a(),
        "all tiers": [row for tier in "ABCD" for row in rows_of(tier)],
    }[state]
    monkeypatch.setattr(quality, "recorded", lambda: rows)
    namespace: dict[str, Any] = {"quality": quality, "plots": plots, "math": math, "Table": Table}
    namespace["pairwise"] = pairwise
    for source in cells_of_the_recorded_study():
        exec(source, namespace)
    told = capsys.readouterr().out
    assert ("not yet run: none" in told) == (state == "all tiers")
    assert ("full attention: not yet run" in told) == (state in ("nothing", "begun"))
    assert set(namespace["points"]) == set(above_full(rows))
