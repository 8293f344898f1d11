"""Lines of one figure differ in colour and marker, a mechanism looks alike in all, legends stay small."""

from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from kvlearn import plots
from kvlearn.measure import Quartiles, Roofline, Work, results
from kvlearn.plots import Picture
from kvlearn.plots.picture import COLOURS, MECHANISMS, MISTAKES, OTHERS, Line, line_styles

SOME = Quartiles(0.002, 0.001, 0.003, 5)
NAMES = ("one", "another", "a third", "a fourth")
POINTS = [(8, 2.0, 0.1), (16, 1.5, 0.1)]
ENERGIES = {name: [8.0, 1.0, 1.0] for name in ("keys", "keys after RoPE", "values", "both")}
CONVERTED = {
    "mhc-32-activations": "activations",
    "mhc-32-weights": "weights",
    "mhc-32-random": "random",
    "mhc-20-12-activations": "activations, decoupled",
    "gqa-1-mean": "MQA, mean of the heads",
}

FIGURES: dict[str, Callable[[], Picture]] = {
    "step_times": lambda: plots.step_times([64, 128], {f"{w} a cache": [SOME] for w in ("with", "without")}),
    "on_the_roofline": lambda: plots.on_the_roofline(
        Roofline(1e11, 2e10), {name: (Work(1e9, 1e7), SOME) for name in NAMES}
    ),
    "loss_by_position": lambda: plots.loss_by_position(
        {name: np.ones(64) for name in ("right", *NAMES)}, chunk=32
    ),
    "uptraining": lambda: plots.uptraining(results.load("convert")[0].rows, CONVERTED, family="compressed"),
    "loss_over_rank": lambda: plots.loss_over_rank(dict.fromkeys((*NAMES, "random"), POINTS), base=1.0),
    "path_flops": lambda: plots.path_flops([1], {"naive": [4e9], "absorbed": [1e8]}),
    "spectrum": lambda: plots.spectrum({"as they are": ENERGIES, "without their mean": ENERGIES}),
    "rope_on_latent": lambda: plots.rope_on_latent(dict.fromkeys((*NAMES, "RoPE on the latent"), np.ones(8))),
    "influence": lambda: plots.influence(
        dict.fromkeys(("full", *NAMES), ([1, 2], [1.0, 0.1])), reaches={"one": 2}
    ),
    "beyond_the_window": lambda: plots.beyond_the_window(results.load("sinks")[0].rows, window=32),
    "scaling, chapter 05": lambda: plots.scaling(results.load("window")[0].rows),
    "scaling, chapter 06": lambda: plots.scaling(results.load("linear")[0].rows),
    "recall_over_state": lambda: plots.recall_over_state(results.load("recall")[0].rows),
    "achieved_bandwidth": lambda: plots.achieved_bandwidth(
        [(name, 1e9, SOME) for name in NAMES], bandwidth=4e12, t_fixed=5e-6
    ),
}


def lines_of(panel: Axes) -> dict[str, tuple[str, str]]:
    """Colour and marker of every named line that connects or marks points; levels and limits have none."""
    handles, labels = panel.get_legend_handles_labels()
    found = {}
    for handle, label in zip(handles, labels, strict=True):
        line = handle[0] if isinstance(handle, tuple) else handle
        if isinstance(line, Line2D) and line.get_marker() not in ("None", "none", None):
            found[label] = (to_hex(line.get_color()), str(line.get_marker()))
    return found


@pytest.mark.parametrize("figure", FIGURES)
def test_lines_of_a_panel_differ_in_colour_and_in_marker(figure: str) -> None:
    for panel in FIGURES[figure]().figure.axes:
        found = lines_of(panel).values()
        if panel.get_legend_handles_labels()[1]:
            assert len(found) > 1
        assert len({colour for colour, _ in found}) == len(found)
        assert len({marker for _, marker in found}) == len(found)


def test_lines_of_the_scaling_figures_differ_though_their_names_are_in_a_figures_legend() -> None:
    for name in ("window", "linear"):
        picture = plots.scaling(results.load(name)[0].rows)
        for panel in picture.figure.axes:
            drawn = [container[0] for container in panel.containers]
            assert len(drawn) == len(picture.data["lines"]) > 4
            assert len({to_hex(line.get_color()) for line in drawn}) == len(drawn)
            assert len({line.get_marker() for line in drawn}) == len(drawn)


def test_a_mechanism_has_one_colour_in_every_figure() -> None:
    seen: dict[str, set[str]] = {}
    for name in ("window", "linear"):
        picture = plots.scaling(results.load(name)[0].rows)
        for label, container in zip(picture.data["lines"], picture.figure.axes[0].containers, strict=True):
            seen.setdefault(label, set()).add(to_hex(container[0].get_color()))
    for label, (colour, _) in lines_of(FIGURES["recall_over_state"]().figure.axes[0]).items():
        seen.setdefault(label, set()).add(colour)
    assert {label: len(colours) for label, colours in seen.items()} == dict.fromkeys(seen, 1)
    assert {label: {MECHANISMS[label].colour.lower()} for label in seen} == seen


def test_unknown_names_get_what_is_free_and_too_many_are_refused() -> None:
    styles = line_styles(["full", "one", "window", "another"], family="full")
    assert styles["full"]["color"] == COLOURS["full"]
    assert len({style["color"] for style in styles.values()}) == 4
    given = Line(COLOURS["hybrid"], "-", "*")
    assert line_styles(["window"], fixed={"window": given})["window"] == given.style()
    with pytest.raises(ValueError, match="names: expected at most 8 in one figure"):
        line_styles([str(i) for i in range(9)])


@pytest.mark.parametrize("table", [MISTAKES, OTHERS])
def test_no_two_lines_of_a_table_look_alike(table: tuple[Line, ...]) -> None:
    for column in zip(*table, strict=True):
        assert len(set(column)) == len(table)


def test_mistakes_are_never_solid() -> None:
    assert all(line.dashes != "-" for line in MISTAKES)


@pytest.mark.parametrize("figure", FIGURES)
def test_a_legend_is_lower_than_its_curves(figure: str) -> None:
    drawn = FIGURES[figure]().figure
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    legends = [*drawn.legends, *(panel.get_legend() for panel in drawn.axes if panel.get_legend())]
    height = min(panel.get_window_extent().height for panel in drawn.axes)
    for legend in legends:
        assert legend.get_window_extent().height < 0.6 * height
