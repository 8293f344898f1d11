"""The framework of ``kvlearn bench``, and the benchmark ``full`` at a size where it takes no time."""

import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvlearn.cli import app
from kvlearn.measure import Quartiles, Roofline, bench, results
from kvlearn.measure.bench import BENCHMARKS, Row, full, run_benchmark
from kvlearn.measure.steps import next_token

FAST = [
    Row("quick", 2.0, "x", bar=1, spread=Quartiles(2.0, 1.5, 2.5, 3), details={"length": 7}),
    Row("slow", 3.0, "s", bar=1, relation="<="),
    Row("size", 1024, "B", bar=1024, relation="=="),
    Row("just so", 5e9, "B/s"),
]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    from kvlearn.bench import common
    from kvlearn.measure import provenance, report

    monkeypatch.setattr(report, "run_benchmark", lambda name, device: iter(FAST))
    monkeypatch.setattr(common, "run_parts", lambda parts, seconds: iter(FAST))
    monkeypatch.setattr(results, "results_folders", lambda: [tmp_path])
    monkeypatch.setattr(provenance, "read_bandwidth", lambda device: 1e9)
    return tmp_path


def test_every_module_of_the_package_is_a_benchmark_with_a_line_about_it() -> None:
    assert {module.name for module in pkgutil.iter_modules(bench.__path__)} == set(BENCHMARKS)


def test_a_row_knows_whether_it_passed() -> None:
    assert [row.passed for row in FAST] == [True, False, True, None]
    assert FAST[0].texts() == ("quick", "≥ 1 x", "2 x", "1.5 x – 2.5 x", "pass")
    assert FAST[1].texts() == ("slow", "≤ 1 s", "3 s", "", "miss")
    assert FAST[2].texts()[1:3] == ("= 1 KiB", "1 KiB")
    assert FAST[3].texts()[1:3] == ("", "5 GB/s")


def test_a_row_is_kept_with_its_quartiles_and_details() -> None:
    assert FAST[0].as_dict() == {
        "case": "quick",
        "measured": 2.0,
        "unit": "x",
        "bar": 1,
        "relation": ">=",
        "pass": True,
        "length": 7,
        "q1": 1.5,
        "q3": 2.5,
        "n": 3,
    }


def test_a_missed_bar_is_printed_and_is_no_failure(fast: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "full"])
    assert done.exit_code == 0, done.output
    assert "miss" in done.output
    assert "pass" in done.output
    assert list(fast.iterdir()) == []  # nothing recorded without being asked


def test_recording_writes_what_was_measured(fast: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "all", "--record", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert results.load("models", fast)[0].rows == [row.as_dict() for row in FAST]
    (found,) = results.load("full", fast)
    assert found.rows == [row.as_dict() for row in FAST]
    assert found.command == "kvlearn bench full --record --device cpu"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["full", "--device", "tpu"]])
def test_a_wrong_argument_exits_2_and_says_what_was_expected(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert "expected" in done.output
    assert ("full" if "full" not in arguments else "cuda") in done.output


def test_the_list_shows_every_benchmark() -> None:
    done = CliRunner().invoke(app, ["bench", "--list"])
    assert done.exit_code == 0
    assert all(name in done.output for name in (*BENCHMARKS, "models"))


def test_the_benchmark_of_full_attention_measures_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {"LENGTHS": (4, 8), "LONG": 32, "PROMPT": 16}
    for name, value in small.items():
        monkeypatch.setattr(full, name, value)
    monkeypatch.setattr(full, "read_stream", lambda device: (lambda: None, 100))
    monkeypatch.setattr(full, "square_product", lambda n, device: (lambda: None, 100))
    monkeypatch.setattr(full, "measure_roofline", lambda device: Roofline(1e9, 1e9))
    rows = [row.as_dict() for row in run_benchmark("full", "cpu")]
    sizes = [row for row in rows if row["what"] == "cache_bytes"]
    assert len(sizes) == 2
    assert all(row["pass"] for row in sizes)
    assert [row["length"] for row in rows if row["what"] == "speedup"] == [4, 8]
    assert {row["what"] for row in rows} == {
        *("cache_bytes", "cached", "recomputed", "speedup"),
        *("decode_time", "decode_intensity", "decode_bandwidth", "decode_share", "decode_over_floor"),
        *("prefill_time", "prefill_rate", "prefill_intensity", "prefill_flops", "prefill_share"),
    }
    assert all(row["measured"] > 0 for row in rows)


def test_a_step_can_be_repeated_without_the_cache_growing() -> None:
    layer = full.FullAttention(d_model=16, n_heads=2)
    cache = layer.new_cache(batch=1, max_len=5)
    layer(torch.randn(1, 4, 16), cache)
    step = next_token(layer, torch.randn(1, 1, 16), cache)
    assert torch.equal(step(), step())
    assert cache.length == 5
