"""The one writer of HTML tables."""

from kvlearn import html


def test_text_is_escaped_and_markup_is_kept() -> None:
    table = html.table(["a & b"], [["<script>"], [html.Cell("<b>bold</b>")]], caption="x < y")
    assert table == (
        "<table><caption>x &lt; y</caption><thead><tr><th>a &amp; b</th></tr></thead>"
        "<tbody><tr><td>&lt;script&gt;</td></tr><tr><td><b>bold</b></td></tr></tbody></table>"
    )


def test_a_cell_adds_its_style_to_that_of_its_column() -> None:
    table = html.table(
        ["n"], [[html.Cell("1", "color: red")]], styles=["text-align: right"], style="margin: 0"
    )
    assert table == (
        '<table style="margin: 0"><thead><tr><th style="text-align: right">n</th></tr></thead>'
        '<tbody><tr><td style="text-align: right; color: red">1</td></tr></tbody></table>'
    )
