"""Tables for notebooks, the running table, and the calculator."""

from typing import Any

import ipywidgets as widgets
import pytest
import torch

from kvlearn.attention import FullAttention
from kvlearn.measure import MODELS, Table, memory_table, running_table
from kvlearn.measure.calculator import CARDS, PRECISIONS
from kvlearn.measure.controls import FALLBACK, table_with_controls
from kvlearn.model import Spec

ROWS = [{"name": "a <b>", "bytes": 1234567}, {"name": "longer", "bytes": 8}]


def test_a_table_reads_as_text_with_numbers_to_the_right() -> None:
    assert repr(Table(ROWS, "Title")).splitlines() == [
        "Title",
        "name        bytes",
        "a <b>   1,234,567",
        "longer          8",
    ]


def test_a_table_reads_as_html_and_escapes_what_it_shows() -> None:
    html = Table(ROWS)._repr_html_()
    assert "a &lt;b&gt;" in html
    assert '<td style="text-align: right">1,234,567</td>' in html


def test_a_table_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="rows"):
        Table([])


def test_the_running_table_counts_with_the_mechanisms_own_formulas() -> None:
    (row,) = running_table("full").rows
    layer = FullAttention(4096, 32)
    at_32k = 32 * layer.cache_bytes(32_768, dtype=torch.bfloat16) / 1024**3
    assert row["mechanism"] == "full"
    assert row["elements per token"] == "262,144"
    assert row["KiB per token"] == "512"
    assert row["at 32K"] == row["read by a step at 32K, GiB"] == f"{at_32k:.2f}" == "16.00"


def test_the_running_table_shows_options() -> None:
    (row,) = running_table(Spec("full", head_dim=64)).rows
    assert row["mechanism"] == "full (head_dim=64)"
    assert row["KiB per token"] == "256"


def test_the_running_table_tells_two_mechanisms_in_one_layer() -> None:
    parts = ["gated_delta", Spec("window", window=512)]
    (row,) = running_table(Spec("parallel", parts=parts)).rows
    assert row["mechanism"] == "gated_delta + window (window=512)"


def test_controls_fall_back_to_a_sentence_and_their_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that GitHub shows, and JupyterLab before the cell is run."""
    shown: list[tuple[Any, dict[str, Any]]] = []

    class Handle:
        def update(self, table: Table) -> None:
            shown.append((table, {}))

    def display(what: Any, **options: Any) -> Handle:
        shown.append((what, options))
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    slider = widgets.IntSlider(value=2)
    table_with_controls({"n": slider}, lambda n: Table([{"n": n}]))
    (bundle, options), (table, _) = shown
    assert options == {"raw": True}
    assert bundle["text/plain"] == FALLBACK
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert table.rows == [{"n": "2"}]
    slider.value = 7
    assert shown[-1][0].rows == [{"n": "7"}]


def test_the_calculator_says_what_a_card_holds() -> None:
    text = repr(memory_table("Llama 3.1 405B", 32_768, 2, "16 bit", "8 × 141 GB"))
    assert "15.75 GiB" in text
    assert "31.5 GiB" in text
    assert "none: the weights alone do not fit" in repr(memory_table("Llama 3.1 405B", card="24 GB"))


def test_every_setting_of_the_calculator_gives_a_table() -> None:
    for model in MODELS:
        for precision in PRECISIONS:
            for card in CARDS:
                assert memory_table(model, 2048, 4, precision, card).rows
