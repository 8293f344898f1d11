"""The picture of chapter 07 shows the layers and bytes that the models' shapes say."""

from dataclasses import replace

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from kvlearn import plots
from kvlearn.measure import MODELS, cache_bytes, design, read_bytes
from kvlearn.model import Decoder, ModelConfig
from kvlearn.plots.hybrids import KIND_STYLES
from kvlearn.study import recall

NAMES = ["Gemma 3 27B", "Jamba v0.1", "DeepSeek-V3.2", "Gemma 4 E2B"]


def test_bytes_and_kinds_are_those_of_the_shapes() -> None:
    data = plots.layer_stripes([MODELS[name] for name in NAMES], length=4096).data
    for name in NAMES:
        assert data["stored"][name] == cache_bytes(MODELS[name], 4096) / 4096
        assert data["read"][name] == read_bytes(MODELS[name], 4096) / 4096
    assert data["kinds"]["Jamba v0.1"][:8] == 4 * ["state"] + ["full"] + 3 * ["state"]
    assert data["kinds"]["Gemma 3 27B"].count("full") == 10


def test_one_stripe_per_layer_in_the_colour_and_height_of_its_kind() -> None:
    jamba = MODELS["Jamba v0.1"]
    stripes = [p for p in plots.layer_stripes([jamba]).figure.axes[0].patches if isinstance(p, Rectangle)]
    assert len(stripes) == 32
    for i, stripe in enumerate(stripes):
        colour, height = KIND_STYLES[jamba.layer(i).kind]
        assert to_hex(stripe.get_facecolor()).lower() == colour.lower()
        assert stripe.get_height() == pytest.approx(height)
        assert stripe.get_x() == pytest.approx((i + 0.1) / 32)


def test_no_two_kinds_have_a_colour_or_a_height_in_common() -> None:
    colours, heights = zip(*KIND_STYLES.values(), strict=True)
    assert len(set(colours)) == len(set(heights)) == len(KIND_STYLES)


def test_a_layer_that_reads_anothers_cache_is_an_outline() -> None:
    gemma = MODELS["Gemma 4 E2B"]
    stripes = plots.layer_stripes([gemma]).figure.axes[0].patches
    assert [stripe.get_facecolor()[3] for stripe in stripes] == 15 * [1.0] + 20 * [0.0]


def test_two_mechanisms_in_a_layer_are_two_stripes() -> None:
    model = replace(design(["window + state"]), n_layers=2)
    stripes = plots.layer_stripes([model]).figure.axes[0].patches
    assert [stripe.get_height() for stripe in stripes] == 2 * [0.38, 0.2]


def test_the_legend_names_what_is_drawn_and_no_more() -> None:
    def legend(*names: str) -> list[str]:
        (box,) = plots.layer_stripes([MODELS[name] for name in names]).figure.legends
        return [text.get_text() for text in box.get_texts()]

    assert legend("Llama 3.1 8B") == ["all tokens: keys and values", "stored", "read by a step"]
    assert "a state" in legend("Jamba v0.1")
    assert "outline: reads an earlier layer's" in legend("Gemma 4 E2B")


def test_the_legend_is_smaller_than_the_stripes() -> None:
    picture = plots.layer_stripes([MODELS[name] for name in NAMES])
    picture.figure.canvas.draw()
    (box,) = picture.figure.legends
    legend, stripes = box.get_window_extent(), picture.figure.axes[0].get_window_extent()
    assert legend.height < stripes.height / 2


def test_the_alt_text_says_layers_and_bytes() -> None:
    alt = plots.layer_stripes([MODELS["Jamba v0.1"]]).alt
    assert "28 state, 4 full" in alt
    assert "16.12 KiB stored" in alt


def test_at_least_one_model() -> None:
    with pytest.raises(ValueError, match=r"len\(models\): expected at least 1"):
        plots.layer_stripes([])


def test_a_mix_has_the_colour_of_hybrids_beside_its_parts() -> None:
    model = Decoder(ModelConfig(d_model=8, n_layers=1, n_heads=1))
    run = recall.Run(model, [recall.Point(20, 3.0, 0.1)], 0.9, 0.7, 5.0)
    picture = plots.recall_curves(
        dict.fromkeys(("full", "linear", "3 linear : 1 full"), run), family="hybrid"
    )
    colours = [line.get_color() for line in picture.figure.axes[0].lines]
    assert colours == [plots.COLOURS[name] for name in ("full", "linear", "hybrid")]
