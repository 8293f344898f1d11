"""The pictures of chapter 04 show what a ring holds, and what can be heard through layers of windows."""

import numpy as np
import pytest

from kvlearn import plots
from kvlearn.plots.full_attention import spread


def test_the_frames_are_what_the_ring_holds() -> None:
    frames = plots.ring(3, n_sinks=1, n_tokens=7).data["frames"]
    assert frames[0] == [0, -1, -1, -1]
    assert frames[3] == [0, 1, 2, 3]
    assert frames[4] == [0, 4, 2, 3]  # in the place of 1, the oldest that is no sink
    assert frames[6] == [0, 4, 5, 6]


def test_the_replaced_token_is_beside_its_frame() -> None:
    texts = [text.get_text() for text in plots.ring(3, n_tokens=5).figure.axes[0].texts]
    assert [text for text in texts if text.startswith("in the place")] == [
        "in the place of 0",
        "in the place of 1",
    ]


@pytest.mark.parametrize(("window", "layers"), [(5, 4), (3, 2), (1, 6), (8, 1)])
def test_the_cone_reaches_as_far_as_the_layers_let_it(window: int, layers: int) -> None:
    data = plots.cone(layers * [window], n_tokens=40).data
    assert data["reach"][::-1] == [layer * (window - 1) + 1 for layer in range(layers + 1)]
    assert data["seen"][0] == list(range(39 - layers * (window - 1), 40))


def test_a_full_layer_opens_the_cone_for_those_below() -> None:
    data = plots.cone([3, None, 3], n_tokens=20).data
    assert data["reach"] == [20, 20, 3, 1]


def test_sinks_are_heard_of_too() -> None:
    assert plots.cone([3, 3], n_tokens=20, n_sinks=2).data["seen"][1] == [0, 1, 17, 18, 19]


def test_the_cone_is_what_a_model_of_windows_depends_on() -> None:
    """Its gradient reaches just these tokens."""
    import torch

    from kvlearn.attention import WindowAttention

    torch.manual_seed(0)
    x = torch.randn(1, 20, 16, requires_grad=True)
    y = x
    for window in (4, 3, 5):
        y = y + WindowAttention(16, 2, window=window, n_sinks=1)(y)
    y[0, -1].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(-1).nonzero()[:, 0].tolist()
    assert seen == plots.cone([4, 3, 5], n_tokens=20, n_sinks=1).data["seen"][0]


def test_no_influence_is_not_drawn_and_the_reach_is_a_line() -> None:
    picture = plots.influence({"window": ([1, 5, 9], [1.0, 0.1, 0.0])}, reaches={"window": 8})
    curve, reach = picture.figure.axes[0].lines
    assert np.isnan(np.asarray(curve.get_ydata())).tolist() == [False, False, True]
    assert set(reach.get_xdata()) == {8}
    assert "down to 0 at distance 9, the reach on paper being 8" in picture.alt


def test_a_panel_a_model_and_a_line_a_variant() -> None:
    rows = [
        {"run": run, "variant": variant, "first_token_weight": weight, "by_position": [level] * 40}
        for run, weight in (("as trained", 0.003), ("sink planted", 0.7))
        for variant, level in (("full", 1.0), ("window", 2.0))
    ]
    picture = plots.beyond_the_window(rows, window=32)
    panels = picture.figure.axes
    assert [p.get_title(loc="left").split("\n")[1] for p in panels] == [
        "0.3% on the first token",
        "70.0% on the first token",
    ]
    for panel in panels:
        full, window, edge = panel.lines
        assert set(full.get_ydata()) == {1.0}
        assert set(window.get_ydata()) == {2.0}
        assert set(edge.get_xdata()) == {32}
    assert picture.data["sink planted"]["window"].tolist() == [2.0, 2.0]


def test_labels_that_would_overlap_are_moved_apart() -> None:
    assert spread([1.0, 3.0, 1.05], 0.2) == pytest.approx([1.0, 3.0, 1.2])
    assert spread([2.0, 1.0], 0.5) == [2.0, 1.0]
