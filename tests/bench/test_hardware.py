"""The hardware benchmark at a size where it takes no time."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_tools import PROVENANCE

from kvlearn.attention import REGISTRY
from kvlearn.bench import common, hardware
from kvlearn.bench.common import Row, run_parts
from kvlearn.bench.hardware import CASES, SMALL_CASES, Case, Sizes
from kvlearn.measure import Quartiles, results

CPU = torch.device("cpu")
CASE = Case("gqa", "a model", 32, 4, {"n_kv_heads": 2})
TINY = Sizes(
    "tiny",
    (CASE,),
    lengths=(16, 32, 64),
    prompts=(8, 16, 32),
    context=16,
    memory=40_000,
    rounds=2,
    flushed=4096,
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose speed is known and takes no time to measure."""
    monkeypatch.setattr(hardware, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(hardware, "matrix_bandwidth", lambda *_: 5e8)
    monkeypatch.setattr(hardware, "matmul_peak", lambda device, dtype: 1e10)
    monkeypatch.setattr(hardware, "call_seconds", lambda device: 1e-6)
    monkeypatch.setattr(hardware, "attention_rate", lambda *_, **__: 1e8)


def measured(only: str, known: list[dict[str, Any]] = [], sizes: Sizes = TINY) -> list[dict[str, Any]]:  # noqa: B006
    parts = [part for part in hardware.parts_of(sizes, CPU, known) if only in part.name]
    return [row.as_dict() for row in run_parts(parts)]


def test_every_mechanism_has_a_case_with_the_shape_of_a_model() -> None:
    assert {case.mechanism for case in CASES} == {case.mechanism for case in SMALL_CASES} == set(REGISTRY)
    assert len({case.name for case in CASES}) == len(CASES)
    models = {case.model for case in CASES}
    assert {
        "Llama 3.1 8B",
        "Mistral 7B v0.1",
        "DeepSeek-V2-Lite",
        "DeepSeek-V3",
        "Mamba-2.8B",
        "Qwen3-Next",
    } <= models


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_can_be_built(case: Case) -> None:
    layer = case.build(torch.bfloat16, "meta")
    assert layer.cache_bytes(131_072) > 0


def test_bytes_are_allocated_and_touched() -> None:
    rows = measured("bytes")
    stored = [row for row in rows if row["what"] == "stored"]
    assert [row["measured"] for row in stored] == [2 * 2 * 8 * 2 * n for n in TINY.lengths]
    assert all(row["measured"] == row["formula"] for row in stored)
    read = [row for row in rows if row["what"] == "read"]
    assert [row["measured"] for row in read] == [row["formula"] for row in read]
    assert [row["attention"] >= 4 * 32 * row["length"] for row in read] == 3 * [True]


def test_decode_has_times_work_and_an_exponent_with_its_error(quick: None) -> None:
    rows = measured("decode")
    times = [row for row in rows if row["what"] == "decode_time"]
    assert [row["length"] for row in times] == list(TINY.lengths)
    assert all(row["n"] == 2 and row["stream"] > 0 and row["calls"] > 5 for row in times)
    assert [row["cache"] for row in times] == [(2 * n + 2) * 2 * 8 * 4 for n in TINY.lengths]
    (fit,) = [row for row in rows if row["what"] == "decode_exponent"]
    assert (fit["first"], fit["last"]) == (16, 64)
    assert fit["error"] >= 0


def test_prefill_and_first_token_are_apart_and_memory_is_beside_the_cache() -> None:
    rows = measured("prefill")
    whats = [row["what"] for row in rows if row.get("length") == 32]
    assert whats == ["prefill_time", "first_token_time", "prefill_memory"]
    memory = [row["measured"] for row in rows if row["what"] == "prefill_memory"]
    assert 0 < memory[0] < memory[1] < memory[2]
    (fit,) = [row for row in rows if row["what"] == "prefill_memory_exponent"]
    assert 0.5 < fit["measured"] < 2.1


def test_the_batch_is_the_largest_whose_caches_and_step_fit() -> None:
    (row, _) = measured("batch")
    n, layer = row["measured"], CASE.build(torch.bfloat16)
    assert 0 < n <= row["predicted"] == TINY.memory // layer.cache_bytes(16)


@pytest.mark.parametrize("memory", [0, 5, 6, 17, 1000])
def test_the_largest_is_found_by_few_trials(memory: int) -> None:
    tried = []

    def needs(n: int) -> int:
        tried.append(n)
        if n > 100:
            raise torch.OutOfMemoryError("too many")
        return 3 + 3 * n + n // 7

    found = hardware.largest(needs, memory)
    fitting = [n for n in range(1, 101) if 3 + 3 * n + n // 7 <= memory]
    assert found == max(fitting, default=0)
    assert len(tried) < 20


def test_a_finished_part_is_not_measured_again(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measured("")
    monkeypatch.setattr(hardware.Case, "build", lambda *_: pytest.fail("measured again"))
    assert measured("", first) == first


def test_a_part_that_was_cut_short_is_measured_again(quick: None) -> None:
    first = measured("decode")
    cut = [row for row in first if row["what"] != "part"][:2]
    again = measured("decode", cut)
    assert [row["what"] for row in again] == [row["what"] for row in first]


def test_rows_of_other_threads_are_kept_and_not_taken_for_ours(quick: None) -> None:
    first = measured("bytes")
    other = [{**row, "threads": 99} for row in first]
    small = [{**row, "preset": "small"} for row in first]
    missing = {"what": "missing", "measured": None}
    assert hardware.others([*small, *other, missing], CPU, small=True) == other
    assert hardware.others(small, CPU, True, ["bytes: gqa, a model"]) == []
    assert hardware.others(small, CPU, True, ["another part"]) == small
    built = []
    for row in hardware.once("bytes: x", lambda: _rows(built), hardware.condition_of(TINY, CPU), other):
        assert row.details["threads"] == torch.get_num_threads()
    assert built == [1]


def _rows(built: list[int]) -> Iterator[Row]:
    built.append(1)
    yield Row("a row", 1.0, "s", details={"what": "x"})


def second_with_provenance(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as a later run keeps them: each with the provenance of the run that measured it."""
    return [{"provenance": {**PROVENANCE, "date": "2026-01-02"}, **row} for row in rows]


def test_a_recorded_run_goes_on_where_it_was_cut(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``kvlearn bench hardware --record``, killed after the bytes, then started again."""
    monkeypatch.setattr(hardware, "SMALL", TINY)

    def record(only: str, date: str) -> list[dict[str, Any]]:
        recorder = common.Recorder("hardware", "a command", {**PROVENANCE, "date": date}, tmp_path)
        list(common.run("hardware", small=True, only=only, recorder=recorder))
        (recorded,) = results.load("hardware", tmp_path)
        return recorded.rows

    first = record("bytes", "2026-01-01")
    second = record("", "2026-01-02")
    kept = [row for row in second if row["part"] == "bytes: gqa, a model"]
    assert [row["measured"] for row in kept] == [row["measured"] for row in first]
    assert {row["provenance"]["date"] for row in kept} == {"2026-01-01"}
    assert {row["part"].split(":")[0] for row in second} == {"machine", "decode", "bytes", "batch", "prefill"}
    assert all("provenance" not in row for row in second if row["part"] == "machine")

    monkeypatch.setattr(hardware, "condition_of", lambda *_: {"preset": "tiny", "threads": 99})
    third = record("machine", "2026-01-03")
    assert [row["threads"] for row in third][-1] == 99
    assert len(third) > len(second)  # one thread's rows beside the other's
    assert [row for row in third if row["threads"] != 99] == second_with_provenance(second)


def test_a_second_run_that_is_cut_loses_no_finished_row(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill is finished, the machine is not; the next run ends at once, or is killed before prefill."""
    monkeypatch.setattr(hardware, "SMALL", TINY)

    def run(only: str, seconds: float = 0, kill_after: int | None = None) -> list[dict[str, Any]]:
        recorder = common.Recorder("hardware", "a command", PROVENANCE, tmp_path)
        rows = common.run("hardware", small=True, only=only, seconds=seconds, recorder=recorder)
        list(islice(rows, kill_after))
        (recorded,) = results.load("hardware", tmp_path)
        return [row for row in recorded.rows if row["part"].startswith("prefill")]

    first = run("prefill")
    assert first[-1]["what"] == "part"
    assert [row["measured"] for row in run("", kill_after=1)] == [row["measured"] for row in first]
    with monkeypatch.context() as patch:
        patch.setattr(hardware, "machine_rows", lambda *_: time.sleep(0.05) or iter([]))
        again = run("", seconds=0.04)
    assert [row["measured"] for row in again] == [row["measured"] for row in first]
    assert len(run("")) == len(first)


def test_finished_parts_come_first(quick: None) -> None:
    known = measured("batch")
    names = [part.name for part in hardware.parts_of(TINY, CPU, known)]
    assert names[:2] == ["batch: gqa, a model", "machine"]


def test_a_row_comes_back_from_a_file_as_it_was() -> None:
    for row in (
        Row("a", 1.5, "s", 2.0, "<=", Quartiles(1.5, 1.0, 2.0, 5), {"what": "x", "length": 3}),
        Row("b", math.nan, "s", details={"what": "y"}, missing="too large"),
        Row("c", 3, "B", details={"what": "z"}),
        Row("d", 3, "s", details={"what": "z", "n": 7}),  # a number of something, and no quartiles
    ):
        assert Row.of(row.as_dict()).as_dict() == row.as_dict()


def test_no_cache_that_fits_is_a_missing_row(quick: None) -> None:
    (row, _) = measured("decode", sizes=replace(TINY, largest=1e-12))
    assert "of free memory" in row["missing"]


def test_a_cache_that_is_too_large_is_a_missing_row_with_its_reason(quick: None) -> None:
    sizes = replace(TINY, largest=2048 / 1e12)
    rows = [row for row in measured("bytes", sizes=sizes) if row["what"] == "stored"]
    assert {row["measured"] for row in rows} == {None}
    assert "of free memory" in rows[0]["missing"]


def test_lengths_stop_where_a_step_takes_too_long(quick: None) -> None:
    rows = measured("decode", sizes=replace(TINY, slowest=0.0))
    times = [row for row in rows if row["what"] == "decode_time"]
    assert [row["measured"] is None for row in times] == [False, True, True]
    assert "a shorter one took over" in times[1]["missing"]


def test_a_prediction_adds_matrices_attention_and_calls(quick: None) -> None:
    rows = measured("machine")
    machine = hardware.machine_of(rows)
    assert machine.rates == {(2, 2, 8): 1e8}
    row = {"mechanism": "gqa", "model": "a model", "weights": 1e9, "cache": 2e9, "attention": 1e8}
    row |= {"calls": 1000, "stream": 5e8}
    assert hardware.predicted(row, machine, [CASE]) == pytest.approx(4 + 4 + 1e-3)
    assert hardware.predicted({**row, "attention": 1e9}, machine, [CASE]) == pytest.approx(4 + 10 + 1e-3)
    with pytest.raises(ValueError, match="'peak' of part 'machine'"):
        hardware.machine_of([row for row in rows if row["what"] != "peak"])
    with pytest.raises(ValueError, match="expected a layer of CASES, got gqa, an old model"):
        hardware.predicted({**row, "model": "an old model"}, machine)


@pytest.mark.parametrize("name", ["window", "nsa", "csa", "moba", "mla", "parallel", "mamba", "sparse"])
def test_a_placed_cache_gives_the_step_of_a_filled_one_its_shape_and_reads_as_much(name: str) -> None:
    """A cache that was placed at a length works as one that a prompt has filled: the same bytes are read."""
    from kvlearn.measure import touched

    torch.manual_seed(0)
    layer, n = REGISTRY[name].tiny(), 40
    x = torch.randn(1, n, layer.d_model)
    filled, placed = layer.new_cache(batch=1, max_len=n), layer.new_cache(batch=1, max_len=n)
    with torch.no_grad():
        layer(x[:, :-1], filled)
    hardware.fill(placed)
    hardware.place(placed, n - 1)
    counts = [
        touched(lambda cache=cache: layer(x[:, -1:], cache), cache.tensors(), layer.parameters())
        for cache in (filled, placed)
    ]
    assert placed.length == filled.length == n
    if not layer.chooses_by_content:
        assert counts[0] == counts[1]
    assert counts[0].cache_read == pytest.approx(counts[1].cache_read, rel=0.3)


def test_conditions_lie_side_by_side_and_what_cannot_be_used_is_named(quick: None, tmp_path: Path) -> None:
    rows = [row for only in ("machine", "decode") for row in measured(only)]
    case = {"mechanism": "gqa", "model": "Llama 3.1 8B"}  # the prediction looks for a case of the benchmark
    rows = [row | case if "mechanism" in row else row for row in rows]
    one = [{**row, "threads": 1, "preset": "real"} for row in rows]
    two = [{**row, "threads": 2} for row in one]
    dirty = [{**row, "threads": 3, "provenance": {**PROVENANCE, "dirty": True}} for row in one]
    mixed = [{**row, "threads": 4} for row in one]
    mixed[0]["provenance"] = {**PROVENANCE, "machine": "another"}
    alone = [{**row, "threads": 5} for row in one if row["part"] != "machine"]
    old = [{"what": "decode_time", "measured": 1.0}]
    old.append({"what": "missing", "measured": None})
    results.save("hardware", "a command", one + two + dirty + mixed + alone + old, PROVENANCE, tmp_path)
    found, left_out = hardware.conditions(results.load("hardware", tmp_path))
    assert list(found) == ["a-machine, 1 thread", "a-machine, 2 threads"]
    assert all("predicted" in row for row in found["a-machine, 1 thread"] if row["what"] == "decode_time")
    assert [line.split(": ", 1)[1] for line in left_out] == [
        "rows of an older form",
        "measured with uncommitted changes",
        "rows of several machines",
        "rows: expected a measured row 'read_bandwidth' of part 'machine', got none",
    ]
    assert hardware.conditions(results.load("hardware", tmp_path), "small") == ({}, left_out[:1])
