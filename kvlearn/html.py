"""HTML tables for notebooks and pages, with inline styles: JupyterLab keeps those in untrusted notebooks."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple


class Cell(NamedTuple):
    """Markup, written as it is, and a style added to its column's. Any other content is text, and escaped."""

    html: str
    style: str = ""


def table(
    columns: Sequence[str],
    rows: Iterable[Iterable[str | Cell]],
    *,
    styles: Sequence[str] = (),
    caption: str = "",
    style: str = "",
) -> str:
    """A table with a head; ``styles`` has one for each column, ``style`` is the whole table's."""
    styles = styles or [""] * len(columns)

    def line(tag: str, cells: Iterable[str | Cell]) -> str:
        return f"<tr>{''.join(_cell(tag, cell, each) for cell, each in zip(cells, styles, strict=True))}</tr>"

    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(line("td", row) for row in rows)
    return f"<table{_styled(style)}>{title}<thead>{line('th', columns)}</thead><tbody>{body}</tbody></table>"


def _cell(tag: str, cell: str | Cell, style: str) -> str:
    html, own = cell if isinstance(cell, Cell) else (escape(cell), "")
    return f"<{tag}{_styled('; '.join(filter(None, (style, own))))}>{html}</{tag}>"


def _styled(style: str) -> str:
    return f' style="{style}"' if style else ""
