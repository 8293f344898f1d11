"""Sliders and menus over a table that follows them, readable where no kernel runs."""

from collections.abc import Callable, Mapping
from typing import Any

from kvlearn.extras import require
from kvlearn.measure.table import Table

FALLBACK = "Run this cell for sliders that change the table."


def table_with_controls(controls: Mapping[str, Any], show: Callable[..., Table]) -> None:
    """Display ``controls`` (ipywidgets by name) and below them ``show(**values)``, again after each change.

    The two are separate outputs. The table is an ordinary one: on GitHub, and in JupyterLab before the cell
    is run, it is there as it was saved. In place of the controls GitHub shows one sentence; ipywidgets' own
    fallback is its representation as Python code.
    """
    require("ipywidgets", "a table with controls")
    import ipywidgets as widgets
    from IPython.display import display

    def values() -> dict[str, Any]:
        return {name: control.value for name, control in controls.items()}

    box = widgets.VBox(list(controls.values()))
    view = box._repr_mimebundle_() or {}
    display({**view, "text/plain": FALLBACK}, raw=True)
    table = display(show(**values()), display_id=True)

    for control in controls.values():
        control.observe(lambda _: table.update(show(**values())), names="value")
