"""``kvlearn bench gpu``: its order, what it checks, and that a run that is cut keeps what it had.

No GPU is needed: kernels run in the interpreter, and a device that fails is a function that raises.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_tools import PROVENANCE

from kvlearn.bench import common, correctness, gpu
from kvlearn.bench.common import Limit, Part, run_parts
from kvlearn.bench.decode.cases import Arena, Case
from kvlearn.bench.decode.comparison import Implementation, Setup, compare_implementations
from kvlearn.bench.gpu import GpuRecorder, summary
from kvlearn.kernels.runtime import HAS_TRITON, INTERPRETED
from kvlearn.measure import results
from kvlearn.measure.results import Row
from kvlearn.measure.timers import WallTimer

CPU = torch.device("cpu")
NEEDS_TRITON = pytest.mark.skipif(
    not (HAS_TRITON and INTERPRETED), reason="runs the GPU's part in Triton's interpreter, which is for CPUs"
)
CASE = Case("GQA 4/2", batch=2, length=32, n_heads=4, n_kv_heads=2, head_dim=16)


def record(parts: Sequence[Part], folder: Path, seconds: float = 0, **options: Any) -> GpuRecorder:
    recorder = GpuRecorder("kvlearn bench gpu", PROVENANCE, folder)
    for row in run_parts(parts, seconds, **options):
        recorder.add(row)
    return recorder


def kept(folder: Path, name: str = "gpu") -> list[str]:
    """Cases of a file, each with the reason where it has no number."""
    (found,) = results.load(name, folder)
    return [row["case"] + (f": {row['missing']}" if "missing" in row else "") for row in found.rows]


def measured(*names: str) -> Iterator[Row]:
    for name in names:
        yield Row(name, 1.0, "s", bar=2.0, relation="<=", details={"what": "time"})


# Order and time


def test_the_parts_are_in_the_order_of_what_matters_and_each_group_has_its_time() -> None:
    parts = gpu.parts(CPU, small=True)
    groups = list(dict.fromkeys(part.details["benchmark"] for part in parts))
    assert groups == ["gpu", "decode_tune", "decode", "hardware"]
    assert [part.name.split(":")[0] for part in parts] == [part.details["benchmark"] for part in parts]
    limits = {part.details["benchmark"]: part.limit.seconds for part in parts if part.limit is not None}
    assert {name: limits[name] for name in groups[:3]} == {"gpu": 60, "decode_tune": 120, "decode": 220}
    assert sum(limits.values()) < gpu.SECONDS


def test_without_a_gpu_a_row_says_so() -> None:
    (row,) = common.run("gpu", "cpu")
    assert row.reason.startswith("no GPU")


def test_hardware_rows_are_begun_only_while_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [Part("machine", partial(measured, "bytes"))]
    monkeypatch.setattr(gpu.hardware, "parts", lambda device, small: parts)
    (part,) = gpu.hardware_parts(CPU, small=False)
    assert part.needs == gpu.HARDWARE_NEEDS
    (row,) = run_parts([part], seconds=gpu.HARDWARE_NEEDS - 1)
    assert "not reached" in row.reason
    assert gpu.hardware_parts(CPU, small=True) == parts


# Correctness


@NEEDS_TRITON
@pytest.mark.slow
def test_every_check_passes_in_the_interpreter() -> None:
    rows = list(run_parts(correctness.parts(CPU, small=True)))
    assert [row.case for row in rows if not row.passed] == []
    names = " ".join(row.case for row in rows)
    for what in (
        "splits",
        "head dim",
        "merge",
        "tickets",
        "window and sinks",
        "sink logits",
        "a scale per key",
    ):
        assert what in names
    for what in ("pages", "latent", "fp16", "fp32", "stage v0", "stage v5"):
        assert what in names


def checks_of(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., torch.Tensor], only: str) -> list[Row]:
    monkeypatch.setattr(correctness, "decode_attention", kernel)
    return list(run_parts([part for part in correctness.parts(CPU, small=True) if only in part.name]))


def pytorch_form(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    from kvlearn.kernels import decode_attention

    return decode_attention(*tensors, **{**options, "backend": "torch"})  # type: ignore[no-any-return]


@pytest.mark.parametrize("only", ["splits", "head dim", "sinks", "per key", "pages", "merge", "fp32"])
def test_a_wrong_result_fails_its_check(monkeypatch: pytest.MonkeyPatch, only: str) -> None:
    rows = checks_of(monkeypatch, pytorch_form, only)
    assert rows
    assert all(row.passed for row in rows), rows

    def wrong(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        out = pytorch_form(*tensors, **options)
        out[0, 0] *= 1.1
        return out

    rows = checks_of(monkeypatch, wrong, only)
    assert all(row.passed is False for row in rows if "tickets" not in row.case)


def test_nan_in_a_result_is_a_failed_check_and_not_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        out = pytorch_form(*tensors, **options)
        out[0, 0, 0] = torch.nan
        return out

    rows = checks_of(monkeypatch, broken, "fp32")
    assert [(row.case, row.measured, row.passed) for row in rows] == [("fp32: heads with NaN", 1, False)]
    (line,) = [line for line in summary(rows, PROVENANCE).splitlines() if "WRONG" in line]
    assert "fp32" in line


def test_a_row_without_keys_must_give_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def never_empty(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        out = pytorch_form(*tensors, **options)
        out[tensors[3] == 0] = 0.5
        return out

    assert all(row.passed is False for row in checks_of(monkeypatch, never_empty, "splits"))


# An interrupted run keeps its rows


def test_a_lost_device_keeps_every_row_before_it(tmp_path: Path) -> None:
    lost = False

    def fails() -> Iterator[Row]:
        nonlocal lost
        yield from measured("b")
        lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    def after() -> Iterator[Row]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield

    def release() -> None:
        if lost:
            raise RuntimeError("CUDA error: unspecified launch failure")

    parts = [Part("one", partial(measured, "a")), Part("two", fails), Part("three", after)]
    record(parts, tmp_path, release=release)
    access = "RuntimeError: CUDA error: an illegal memory access was encountered"
    launch = "after it: RuntimeError: CUDA error: unspecified launch failure"
    expected = ["a", "b", f"two: {access}", f"two: {launch}", f"three: {access}", f"three: {launch}"]
    assert kept(tmp_path) == expected
    assert access in (tmp_path / "gpu-a-machine.txt").read_text()


def test_out_of_memory_costs_its_part(tmp_path: Path) -> None:
    def too_large() -> Iterator[Row]:
        yield from measured("a")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90.00 GiB")

    record([Part("large", too_large), Part("small", partial(measured, "b"))], tmp_path)
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 90.00 GiB"
    assert kept(tmp_path) == ["a", f"large: {reason}", "b"]


def test_a_failed_graph_capture_costs_its_implementation(tmp_path: Path) -> None:
    class Captures(WallTimer):
        def prepare(self, calls: Sequence[Callable[[], Any]]) -> Any:
            if getattr(calls[0], "synchronises", False):
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().prepare(calls)

    def call_of(synchronises: bool) -> Any:
        def prepare(case: Case, x: Any) -> Callable[[], torch.Tensor]:
            def call() -> torch.Tensor:
                return torch.nn.functional.scaled_dot_product_attention(
                    x.q[:, :, None].float(), x.k.float(), x.v.float(), scale=case.scale, enable_gqa=True
                )[:, :, 0]

            call.synchronises = synchronises  # type: ignore[attr-defined]
            return call

        return Implementation(CASE, prepare)

    setup = Setup(CPU, Captures(), Arena(2**14, CPU), memory=2**20, l2=0, read=1e9)

    def rows() -> Iterator[Row]:
        compared = compare_implementations(setup, {"plain": call_of(False), "refused": call_of(True)})
        yield compared.time_row("plain")
        yield from compared.missing_rows()

    record([Part("graphs", rows), Part("next", partial(measured, "b"))], tmp_path)
    refused = "RuntimeError: operation not permitted when stream is capturing"
    assert kept(tmp_path) == [f"{CASE.name}: plain", f"{CASE.name}: refused: {refused}", "b"]


def test_a_nan_row_is_kept_as_missing(tmp_path: Path) -> None:
    def rows() -> Iterator[Row]:
        yield Row("broken", float("nan"), "s", bar=1.0, details={"what": "time"})
        yield from measured("b")

    recorder = record([Part("nan", rows)], tmp_path)
    assert kept(tmp_path) == ["broken: measured nan", "b"]
    assert recorder.rows[0].passed is None


def test_time_that_runs_out_keeps_rows_and_names_the_rest(tmp_path: Path) -> None:
    clock = iter(range(0, 1000, 10))
    parts = [Part(name, partial(measured, name)) for name in "abcd"]
    record(parts, tmp_path, 25, now=lambda: next(clock))
    assert kept(tmp_path) == ["a", "b", "c: not reached within 25 s", "d: not reached within 25 s"]


def test_rows_go_to_the_file_of_their_benchmark(tmp_path: Path) -> None:
    parts = gpu.of("decode", [Part("grid", partial(measured, "a"), limit=Limit(1))])
    late = gpu.of("decode", [Part("late", partial(measured, "b"), limit=Limit(0))])
    recorder = record([*parts, *late, Part("check", partial(measured, "c"))], tmp_path)
    late_reason = "not reached within the 0 s of its group"
    assert kept(tmp_path, "decode") == ["a", f"decode: late: {late_reason}"]
    assert kept(tmp_path) == ["c"]
    assert recorder.path == tmp_path / "gpu-a-machine.json"
    (found,) = results.load("decode", tmp_path)
    assert (found.command, found.provenance) == ("kvlearn bench gpu", PROVENANCE)


RUN = """
import json, os, signal, sys, time
from pathlib import Path
from kvlearn.bench import command, common, gpu
from kvlearn.measure import provenance
from kvlearn.measure.results import Row

def measured(*names):
    for name in names:
        yield Row(name, 1.0, "s")

def stops():
    yield Row("half", 1.0, "s")
    {stop}

given = json.loads(sys.argv[2])
provenance.collect_provenance = lambda device: given
gpu.parts = lambda device, small: [common.Part("one", lambda: measured("a", "b")), common.Part("two", stops)]
command.GRACE = 0
command.bench(command.Request("gpu", device="cpu", out=Path(sys.argv[1]), seconds={seconds}))
"""


@pytest.mark.parametrize(
    ("stop", "seconds", "status", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 100, -signal.SIGKILL, None),
        ("os.kill(os.getpid(), signal.SIGTERM)", 100, -signal.SIGTERM, None),
        ("time.sleep(60)", 2, 124, "two: still running 0 s after the end of 2 s: ended"),
    ],
    ids=["killed", "terminated", "hangs"],
)
def test_a_run_that_is_killed_keeps_its_rows(
    tmp_path: Path, stop: str, seconds: int, status: int, reason: str | None
) -> None:
    code = RUN.format(stop=stop, seconds=seconds)
    arguments = [sys.executable, "-c", code, str(tmp_path), json.dumps(PROVENANCE)]
    done = subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stderr
    assert kept(tmp_path) == ["a", "b", "half", *([reason] if reason else [])]
    assert "gpu: 3 rows" in (tmp_path / "gpu-a-machine.txt").read_text() or reason
    assert len(list(tmp_path.iterdir())) == 2  # no half-written file


# The summary


def test_a_summary_never_grows_too_long_and_what_matters_is_first() -> None:
    wrong = Row("head dim 64", 0.5, "x", 1e-2, "<=", details={"what": "correct"})
    many = [
        Row(f"case {i}", 2.0, "s", 1.0, "<=", details={"what": "time", "benchmark": "decode"})
        for i in range(2000)
    ]
    text = summary([*many, wrong], PROVENANCE)
    assert len(text) <= gpu.MOST_CHARACTERS
    lines = text.splitlines()
    assert lines[1:3] == ["correct: 0 of 1", "  WRONG head dim 64 0.5 x (≤ 0.01 x)"]
    assert lines[-1].startswith("… ")
    # Head, checks and their failure, a line per benchmark, and a heading: then the 2,000.
    assert int(lines[-1].split()[1]) + len(lines) - 1 == 6 + 2000


def test_a_summary_of_no_row_is_its_head() -> None:
    assert summary([], PROVENANCE).startswith("a-machine, 2026")
