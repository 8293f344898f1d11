"""The benchmark of rebuilt models at a small size, and how the rows of all benchmarks are kept."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_tools import PROVENANCE
from typer.testing import CliRunner

from kvlearn.bench import common, models
from kvlearn.bench.common import Part, Recorder
from kvlearn.cli import app
from kvlearn.measure import Comparison, Quartiles, provenance, results
from kvlearn.measure.results import Row

SECONDS = {"kvlearn": 2.0, "StaticCache": 1.9, "DynamicCache": 2.5, "transformers": 2.0}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call runs once; the clock shows ``SECONDS``."""

    def compare(fns: Mapping[str, Any], *, rounds: int, **_: Any) -> Comparison:
        for fn in fns.values():
            fn()
        return Comparison({name: rounds * (SECONDS[name],) for name in fns})

    monkeypatch.setattr(models, "compare", compare)


def part(*rows: Row, error: BaseException | None = None) -> Part:
    def measured() -> Iterator[Row]:
        yield from rows
        if error is not None:
            raise error

    return Part("a part", measured)


def run_small(only: str) -> list[dict[str, Any]]:
    rows = [row.as_dict() for row in common.run("models", small=True, only=only)]
    assert all(row["what"] != "missing" for row in rows), rows
    return rows


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_decode_has_a_bar_for_each_cache_of_transformers(kind: str, timed: None) -> None:
    ratios = [row for row in run_small(kind) if row["what"] == "decode_ratio"]
    assert [(row["who"], row["base"], row["bar"]) for row in ratios] == 2 * [
        ("StaticCache", "kvlearn", 1.0),
        ("DynamicCache", "kvlearn", 1.2),
    ]
    assert [row["batch"] for row in ratios] == [1, 1, 2, 2]
    # transformers' time over ours: 1.9 / 2.0 misses the first bar, 2.5 / 2.0 meets the second.
    assert [(row["measured"], row["pass"]) for row in ratios] == 2 * [(0.95, False), (1.25, True)]


@pytest.mark.parametrize("kind", ["qwen3_next", "mamba2"])
def test_models_with_a_state_are_compared_in_decode_and_prefill(kind: str, timed: None) -> None:
    rows = run_small(kind)
    ratios = [row for row in rows if row["what"] == "decode_ratio"]
    assert [(row["batch"], row["bar"], row["pass"]) for row in ratios] == [(1, 1.0, True), (2, 1.0, True)]
    (prefill,) = [row for row in rows if row["what"] == "prefill_ratio"]
    assert (prefill["bar"], prefill["measured"]) == (None, 1.0)


def test_a_mixture_may_take_longer_by_its_bar(timed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECONDS, "transformers", 1.6)
    rows = run_small("mixture")
    assert [(row["batch"], row["context"]) for row in rows] == [(1, 1), (2, 1), (1, 12)]
    assert [(row["bar"], row["relation"], row["measured"], row["pass"]) for row in rows] == 3 * [
        (1.2, "<=", 1.25, False)
    ]


def test_loading_is_timed_and_holds_one_copy(timed: None) -> None:
    took, memory = run_small("loading")
    assert (took["measured"], took["bar"], took["pass"]) == (2.0, 2.0, True)
    assert (memory["bar"], memory["pass"]) == (1.1, True)
    assert memory["measured"] > 0.9  # the mapped file


def test_a_second_copy_would_be_seen(timed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    load = models.from_transformers
    kept = []

    def twice(folder: Path) -> Any:
        decoder = load(folder)
        kept.append([weight.detach().clone() for weight in decoder.parameters()])
        return decoder

    monkeypatch.setattr(models, "from_transformers", twice)
    memory = run_small("loading")[1]
    assert memory["measured"] > 1.9
    assert not memory["pass"]


def test_every_step_appends_a_token_and_the_outputs_agree() -> None:
    with torch.inference_mode():
        theirs = models.build("llama", models.SMALL, torch.device("cpu"))
        steps = models.attention_steps(models.from_transformers(theirs), theirs, models.SMALL, 2)
        models.agree_in_step(steps)
        models.agree_in_step(steps)
        steps["kvlearn"]()  # one token ahead
        with pytest.raises(AssertionError, match="StaticCache: expected the same output"):
            models.agree_in_step(steps)


def test_a_killed_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("first", 1.0, "s"), Row("second", 2.0, "s")]
    killed = part(*rows, error=KeyboardInterrupt())
    monkeypatch.setattr(models, "parts", lambda device, small: [killed])
    recorder = Recorder("models", "kvlearn bench models", PROVENANCE, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        list(common.run("models", recorder=recorder))
    (found,) = results.load("models", tmp_path)
    assert [row["case"] for row in found.rows] == ["first", "second"]
    assert found.provenance == PROVENANCE


def test_a_row_without_a_number_is_kept_with_its_reason(tmp_path: Path) -> None:
    recorder = Recorder("models", "kvlearn bench models", PROVENANCE, tmp_path)
    rows = [Row("nan", math.nan, "x", bar=1), Row("inf", math.inf, "x", spread=Quartiles(1, math.nan, 1, 1))]
    failing = part(error=RuntimeError("out of memory\nand more"))
    for row in (*rows, *common.run_parts([failing]), Row("well", 2.0, "x", bar=1)):
        recorder.add(row)
    assert recorder.path is not None
    kept = json.loads(recorder.path.read_text())["rows"]
    assert [row["measured"] for row in kept] == [None, None, None, 2.0]
    reasons = ["measured nan", "measured inf", "RuntimeError: out of memory"]
    assert [row.get("missing") for row in kept] == [*reasons, None]
    assert [row["pass"] for row in kept] == [None, None, None, True]
    assert rows[0].texts()[2:] == ("missing", "", "measured nan")


def test_a_part_that_fails_costs_no_other_and_one_too_late_is_named() -> None:
    clock = iter([0.0, 0.0, 1.0, 5.0])
    parts = [part(Row("a", 1.0, "s"), error=ValueError("broken")), part(Row("b", 1.0, "s")), part()]
    rows = list(common.run_parts(parts, 5.0, lambda: next(clock)))
    assert [row.reason for row in rows] == ["", "ValueError: broken", "", "not reached within 5 s"]


def test_only_selects_parts_and_refuses_an_unknown_one(timed: None) -> None:
    assert {row["model"] for row in run_small("decode")} == {"llama", "mistral"}
    with pytest.raises(ValueError, match=r"only: expected part of llama decode.*got 'gpt'"):
        list(common.run("models", small=True, only="gpt"))
    arguments = ["bench", "models", "--small", "--only", "gpt"]
    assert "expected" in CliRunner().invoke(app, arguments).output
    with pytest.raises(ValueError, match="name: expected one of 'full'"):
        list(common.run("speed"))


def test_the_command_keeps_rows_where_it_is_told(
    timed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "collect_provenance", lambda device: PROVENANCE)
    arguments = ["bench", "models", "--small", "--only", "mixture", "--out", str(tmp_path), "--device", "cpu"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    (found,) = results.load("models", tmp_path)
    assert found.command == "kvlearn bench models --record --only mixture --small --device cpu"
    assert len(found.rows) == 3
    table = common.recorded_table(found, "mixture_ratio")
    assert len(table.rows) == 3
    assert "models-a-machine.json" in table.caption
    assert "recorded in" in done.output
