"""Chapter 09 shows what is recorded, and needs no edit when more is."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvlearn.bench.serving import SMALL, account_rows
from kvlearn.measure import Table

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "09_shared_caches.ipynb"


def test_every_recorded_simulation_of_a_million_requests_has_its_row() -> None:
    (source,) = [
        text
        for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
        if (text := "".join(cell["source"])).startswith("million = {}")
    ]
    rows = [{**row.as_dict(), "requests": 10**6} for row in account_rows(50, SMALL)]
    ended = {"what": "missing", "case": "million", "reason": "ended"}
    names: dict[str, Any] = {"served": [SimpleNamespace(rows=[*rows, ended])], "Table": Table}
    exec(source, names)
    assert [row["sharing"] for row in names["rows"]] == ["none", "all", "salts", "quotas"]
    assert all(all(row.values()) for row in names["rows"])
    names["served"] = [SimpleNamespace(rows=rows[:3])]  # a run that was killed
    exec(source, names)
    assert [row["simulated in"] for row in names["rows"]] == [""]
