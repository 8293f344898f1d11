"""Tables for notebooks, with one look in JupyterLab, on GitHub and as text; and the running table."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from kvlearn import html, validate
from kvlearn.measure.units import GIB, KIB
from kvlearn.model import Decoder, ModelConfig, Spec


class Table:
    """Rows of text and numbers; numbers are aligned to the right. HTML in a notebook, text elsewhere."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], caption: str = "") -> None:
        validate.positive("len(rows)", len(validate.instance("rows", rows, (list, tuple))))
        for row in rows:
            for column in validate.instance("rows", rows[0], Mapping):
                if column not in validate.instance("rows", row, Mapping):
                    raise ValueError(f"rows: expected a column {column!r} in each, got {row}")
        self.rows = [
            {name: f"{value:,}" if isinstance(value, int) else str(value) for name, value in row.items()}
            for row in rows
        ]
        self.caption = caption

    def __repr__(self) -> str:
        columns = list(self.rows[0])
        cells = [columns, *([row[c] for c in columns] for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        lines = [
            "  ".join(
                text.rjust(width) if i and self._is_number(i) else text.ljust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in cells
        ]
        return "\n".join([*([self.caption] if self.caption else []), *lines])

    def _is_number(self, column: int) -> bool:
        name = list(self.rows[0])[column]
        return all(row[name][:1] in "-0123456789" for row in self.rows)

    def _repr_html_(self) -> str:
        columns = list(self.rows[0])
        styles = [f"text-align: {'right' if self._is_number(i) else 'left'}" for i in range(len(columns))]
        return html.table(columns, [row.values() for row in self.rows], styles=styles, caption=self.caption)


def running_table(*mechanisms: str | Spec | tuple[str | Spec, ...], n_layers: int = 32) -> Table:
    """Bytes that each mechanism stores and reads in the same model: the table that grows over the course.

    The model has ``n_layers`` layers of width 4096 with 32 heads of 128 and a 16-bit cache: an 8B model as it
    was before heads were shared. A tuple is a pattern of layers, repeated to the depth. Every number comes
    from the layers' own ``cache_bytes`` and ``read_bytes``, which the contract tests hold equal to what is
    allocated. The first two columns are what the second token of a text adds to a cache for one.
    """
    validate.positive("len(mechanisms)", len(mechanisms))
    rows = []
    for given in mechanisms:
        pattern = given if isinstance(given, tuple) else (given,)
        config = ModelConfig(1, 4096, n_layers, 32, d_ff=1, layers=pattern)
        with torch.device("meta"):  # shapes without memory
            model = Decoder(config)
        table = {n: model.table(n, dtype=torch.bfloat16)[-1] for n in (1, 2, 4096, 32_768, 131_072)}
        stored = {n: total["stored"] for n, total in table.items()}
        added = stored[2] - stored[1]
        rows.append(
            {
                "mechanism": ", then ".join(_runs(config.layers)),
                "elements per token": f"{added // 2:,}",
                "KiB per token": f"{added / KIB:,.0f}",
                "stored at 4K, GiB": f"{stored[4096] / GIB:.2f}",
                "at 32K": f"{stored[32_768] / GIB:.2f}",
                "at 128K": f"{stored[131_072] / GIB:.2f}",
                "read by a step at 32K, GiB": f"{table[32_768]['read'] / GIB:.2f}",
            }
        )
    return Table(rows, "One user, 16-bit; GiB are powers of two.")


def _runs(layers: Sequence[str | Spec]) -> list[str]:
    """A pattern of layers, neighbours that are alike told once: "5 × window (window=512)", "full"."""
    runs = [(_label(spec), len(list(alike))) for spec, alike in groupby(layers)]
    return [f"{n} × {label}" if n > 1 else label for label, n in runs]


def _label(spec: str | Spec) -> str:
    """A mechanism with its options, as a reader writes it."""
    if isinstance(spec, str):
        return spec
    if spec.name == "parallel":
        return " + ".join(
            _label(part if isinstance(part, str) else Spec(part[0], **part[1]))
            for part in spec.options["parts"]
        )
    options = ", ".join(f"{key}={value}" for key, value in spec.to_dict().items())
    return f"{spec.name} ({options})" if options else spec.name
