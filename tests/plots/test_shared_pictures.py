"""The pictures of chapter 02 show the routes, the owners and the bytes that the mechanisms have."""

import pytest

from kvlearn import plots


def test_the_wires_are_the_routes() -> None:
    data = plots.pools({"MHA": range(8), "MQA": 8 * [0], "pair": 2 * [[0, 0, 1, 1]]}, head_dim=16).data
    assert data["MHA"]["wires"] == [(0, h, h) for h in range(8)]
    assert data["MQA"]["wires"] == [(0, h, 0) for h in range(8)]
    assert data["pair"]["wires"] == [(i, h, h // 2) for i in range(2) for h in range(4)]


def test_the_wires_end_where_the_heads_are() -> None:
    panel = plots.pools({"routed": [2, 0, 2, 1]}).figure.axes[0]
    wires = {tuple(line.get_xdata()) for line in panel.lines if len(line.get_xdata()) == 2}
    boxes = sorted({round(box.get_x() + box.get_width() / 2, 6) for box in panel.patches})
    assert {(h, boxes.index(round(x, 6))) for h, x in wires} == {(0, 2), (1, 0), (2, 2), (3, 1)}


def test_the_numbers_under_the_pools_are_the_layers_bytes() -> None:
    from kvlearn.attention import GroupedQueryAttention

    layer = GroupedQueryAttention(128, 8, n_kv_heads=2)
    own, pair = plots.pools({"own": layer.pools, "pair": 2 * [layer.pools]}, head_dim=16).data.values()
    assert own["stored"] * 4 == layer.cache_bytes(1)
    assert pair["stored"] * 2 == own["stored"]
    assert own["read"] * 4 == pair["read"] * 4 == layer.read_bytes(1)


@pytest.mark.parametrize("route", [[], [0, -1], [[0], []], [[0], [0], [0]]])
def test_a_route_that_cannot_be_drawn_is_named(route: list) -> None:
    with pytest.raises(ValueError, match=r"designs\['bad'\]"):
        plots.pools({"good": [0], "bad": route})


def test_an_arrow_goes_from_each_reader_to_its_owner() -> None:
    owners, kinds = [0, 1, 2, 1, 2, 1], ["window", "window", "full"] * 2
    picture = plots.across_layers(owners, kinds, stored=[8, 8, 1024, 0, 0, 0])
    assert picture.data["arrows"] == [(3, 1), (4, 2), (5, 1)]
    ends = [patch.get_path().vertices[[0, 3], 1] for patch in picture.figure.axes[0].patches[6:]]
    assert [tuple(y.round(6)) for y in ends] == [(3, 1), (4, 2), (5, 1)]
    assert "layer 1 is read by 3, 5; layer 2 is read by 4" in picture.alt


def test_the_stack_stores_what_the_decoders_table_says() -> None:
    from kvlearn.model import Decoder, ModelConfig, Spec

    config = ModelConfig(d_model=32, n_heads=4, layers=(Spec("gqa"), Spec("gqa", reads=-1)))
    table = Decoder(config).table(64)
    stored = [row["stored"] for row in table[:-1]]
    data = plots.across_layers(config.owners, [s.name for s in config.specs], stored=stored).data
    assert data["total"] == table[-1]["stored"]
    assert data["arrows"] == [(1, 0), (3, 2)]
    assert plots.across_layers(config.owners).data["total"] == 2


@pytest.mark.parametrize("arguments", [{"owners": [0, 2]}, {"owners": [0, 0], "stored": [1]}])
def test_a_stack_that_cannot_be_drawn_is_named(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"owners\[1\]|stored"):
        plots.across_layers(**arguments)


def test_bars_far_apart_are_on_a_logarithmic_axis() -> None:
    rows = [{"name": "full", "stored": 2**20, "read": 2**20}, {"name": "mhc", "stored": 2**10, "read": 2**20}]
    assert plots.stored_and_read(rows).data["logarithmic"]
    assert not plots.stored_and_read(rows[:1]).data["logarithmic"]
    assert "full 1 MiB stored, 1 MiB read; mhc 1 KiB stored, 1 MiB read" in plots.stored_and_read(rows).alt


def test_a_panel_a_text_with_its_base_as_a_dotted_line() -> None:
    mean = [(0, 2.0, 0.1), (1e6, 1.5, 0.1)]
    curves = {"Python": {"mean": mean}, "prose": {"mean": mean}}
    panels = plots.conversion_curves(curves, base={"Python": 1.2, "prose": 2.5}).figure.axes
    assert [panel.get_title(loc="left") for panel in panels] == ["Python", "prose"]
    for panel, base in zip(panels, (1.2, 2.5), strict=True):
        (line,) = (line for line in panel.lines if line.get_label().startswith("base"))
        assert set(line.get_ydata()) == {base}
