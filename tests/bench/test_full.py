"""``kvlearn bench``: rows, recording, the command; and the benchmark ``full`` at a small size."""

import json
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvlearn import bench
from kvlearn.bench import BENCHMARKS, BY_NAME_ONLY, common, full
from kvlearn.cli import app
from kvlearn.measure import Quartiles, Roofline, provenance, results
from kvlearn.measure.results import Row
from kvlearn.measure.steps import next_token

SHARED = {"common", "command", "compressed", "correctness", "sparse"}  # no benchmark of their own
FAST = [
    Row("quick", 2.0, "x", bar=1, spread=Quartiles(2.0, 1.5, 2.5, 3), details={"length": 7}),
    Row("slow", 3.0, "s", bar=1, relation="<="),
    Row("size", 1024, "B", bar=1024, relation="=="),
    Row("just so", 5e9, "B/s"),
]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(common, "run_parts", lambda parts, seconds, **_: iter(FAST))
    monkeypatch.setattr(results, "results_folders", lambda: [tmp_path])
    monkeypatch.setattr(provenance, "read_bandwidth", lambda device: 1e9)
    return tmp_path


def test_every_module_of_the_package_is_a_benchmark_with_a_line_about_it() -> None:
    modules = {module.name for module in pkgutil.iter_modules(bench.__path__)}
    assert modules - SHARED == set(BENCHMARKS)
    assert set(BY_NAME_ONLY) <= set(BENCHMARKS)


def test_every_benchmark_has_parts_with_names_of_their_own_at_both_sizes() -> None:
    for name in BENCHMARKS:
        module = import_module(f"kvlearn.bench.{name}")
        for small in (False, True):
            names = [part.name for part in module.parts(torch.device("cpu"), small)]
            assert len(names) == len(set(names)) > 0, name


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
    for name in set(BENCHMARKS) - set(BY_NAME_ONLY):
        (found,) = results.load(name, fast)
        assert found.rows == [row.as_dict() for row in FAST]
    (found,) = results.load("full", fast)
    assert found.rows == [row.as_dict() for row in FAST]
    assert found.command == "kvlearn bench full --record --device cpu"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nonsense"], "full, shared"),
        (["full", "--device", "tpu"], "cuda"),
        (["full", "--small", "--record"], "--out"),
        (["full", "--only", "cache", "--record"], "whole run"),
        (["full", "--only", "nothing"], "cached or recomputed"),
    ],
)
def test_a_wrong_argument_exits_2_and_says_what_was_expected(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert "expected" in done.output
    assert expected in " ".join(done.output.split())


def test_a_wrong_name_is_refused_before_torch_is_imported() -> None:
    code = """
import sys
sys.modules["torch"] = None  # importing it raises ImportError
from kvlearn.cli import app
app(["bench", "nonsense"])
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, "expected one of full" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_without_a_name_the_benchmarks_are_listed(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 0
    assert all(about in done.output for about in BENCHMARKS.values())
    if arguments:
        assert json.loads(done.output) == BENCHMARKS


def test_rows_are_printed_as_json(fast: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "all", "--json", "--device", "cpu"])
    rows = json.loads(done.stdout)
    names = [name for name in BENCHMARKS if name not in BY_NAME_ONLY]
    assert rows == [{"benchmark": name, **row.as_dict()} for name in names for row in FAST]


def test_a_log_tells_which_part_is_next_and_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 0.0, 4.0, 8.0, 9.0])
    told: list[str] = []
    parts = [common.Part(name, lambda: iter(FAST[:1])) for name in ("a", "b", "c")]
    rows = common.run_parts(parts, 9.0, lambda: next(clock), progress=lambda p: told.append(str(p)))
    assert len(list(rows)) == 3
    assert told == [
        "part 1 of 3: a (0 s elapsed)",
        "part 2 of 3: b (4 s elapsed, about 5 s left)",
        "part 3 of 3: c (8 s elapsed, about 1 s left)",
    ]


def test_the_benchmark_of_full_attention_measures_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "read_stream", lambda device: (lambda: None, 100))
    monkeypatch.setattr(full, "square_product", lambda n, device: (lambda: None, 100))
    monkeypatch.setattr(full, "measure_roofline", lambda device: Roofline(1e9, 1e9))
    rows = [row.as_dict() for row in common.run("full", small=True)]
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
