"""The bytes of a model's layers as a table: stored, and read by one step, at one or more lengths."""

from collections.abc import Iterable, Sequence
from typing import Any

from kvlearn import html

LENGTHS = (4096, 32_768, 131_072, 1_048_576)  # 4K, 32K, 128K, 1M


class BytesTable(list[dict[str, Any]]):
    """Rows of a layer each, then their total; bytes as integers. Printed, they are in one binary unit.

    With one length the columns are "stored" and "read", with several "stored at 4K", "read at 4K", …
    """

    def __init__(
        self, layers: Iterable[tuple[str, Sequence[tuple[int, int]]]], lengths: Sequence[int]
    ) -> None:
        """``layers``: the mechanism of each, and its bytes stored and read at each of ``lengths``."""
        columns = [
            f"{what}{'' if len(lengths) == 1 else f' at {short(length)}'}"
            for length in lengths
            for what in ("stored", "read")
        ]
        rows: list[dict[str, Any]] = [
            {
                "layer": i,
                "mechanism": mechanism,
                **dict(zip(columns, (n for pair in pairs for n in pair), strict=True)),
            }
            for i, (mechanism, pairs) in enumerate(layers)
        ]
        total = {column: sum(row[column] for row in rows) for column in columns}
        super().__init__([*rows, {"layer": "all", "mechanism": "", **total}])
        self.columns = columns

    @property
    def unit(self) -> tuple[str, int]:
        """The largest binary unit that the largest total is at least one of, and its bytes."""
        most: int = max(self[-1][column] for column in self.columns)
        units = [(name, 2**power) for name, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10))]
        return next((unit for unit in units if most >= unit[1]), ("B", 1))

    def cells(self) -> list[list[str]]:
        """The rows as text, numbers in ``unit`` to three significant digits."""
        size = self.unit[1]
        return [
            [
                str(row["layer"]),
                row["mechanism"],
                *(three_digits(row[column] / size) for column in self.columns),
            ]
            for row in self
        ]

    def __repr__(self) -> str:
        lines = [["layer", "mechanism", *self.columns], *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [
            "  ".join(
                text.rjust(width) if i > 1 else text.ljust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([f"Bytes in {self.unit[0]}", *padded])

    def _repr_html_(self) -> str:
        styles = ["text-align: left"] * 2 + ["text-align: right"] * len(self.columns)
        heads = ["layer", "mechanism", *self.columns]
        return html.table(heads, self.cells(), styles=styles, caption=f"Bytes in {self.unit[0]}")


def short(length: int) -> str:
    """4096 as "4K", 1048576 as "1M", others as they are."""
    for name, size in (("M", 2**20), ("K", 2**10)):
        if length % size == 0:
            return f"{length // size}{name}"
    return str(length)


def three_digits(value: float) -> str:
    """Three significant digits without an exponent; more before the point where a number has more."""
    return f"{value:,.0f}" if value >= 100 else f"{float(f'{value:.3g}'):.10g}"
