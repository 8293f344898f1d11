"""``kvlearn bench decode`` and ``decode_tune``: all of it at a size where the interpreter takes no time.

The GPU's part runs here as it does there, but for the timer, which does not ask the device's events.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvlearn.bench import command, common, decode, decode_tune
from kvlearn.bench.decode import cpu, features, grid, libraries, rates, tilings
from kvlearn.bench.decode.cases import Arena, Case, error, new_case
from kvlearn.bench.decode.comparison import (
    Implementation,
    Setup,
    Unavailable,
    compare_implementations,
    cuda_setup,
    kernel_under_test,
)
from kvlearn.bench.decode.grid import bandwidth_points
from kvlearn.bench.decode.sizes import SMALL
from kvlearn.cli import app
from kvlearn.kernels.runtime import HAS_TRITON, INTERPRETED
from kvlearn.measure import Quartiles, results
from kvlearn.measure.results import Row

CPU = torch.device("cpu")
NEEDS_TRITON = pytest.mark.skipif(
    not (HAS_TRITON and INTERPRETED), reason="runs the GPU's part in Triton's interpreter, which is for CPUs"
)
GQA = Case("GQA 32/4", batch=2, length=32, n_heads=4, n_kv_heads=2, head_dim=16)


class FakeTimer:
    """Calls the first of the calls once, and says that every measurement took as long as the last."""

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> "FakeTimer":
        calls[0]()
        self.calls = len(calls)
        return self

    def seconds(self) -> float:
        return 1e-3

    def plain(self, call: Callable[[], Any]) -> Quartiles:
        call()
        return Quartiles(2e-3, 2e-3, 2e-3, 1)

    host = plain


@pytest.fixture
def place() -> Setup:
    torch.manual_seed(0)
    return Setup(
        CPU, FakeTimer(), Arena(2**17, CPU), memory=2**20, l2=100, backend="torch", read=1e9, peak=1e12
    )


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)


def case_of(form: str, batch: int, length: int, **changes: Any) -> Case:
    return SMALL.case(form, batch, length, **changes)


def missing(rows: list[Row]) -> list[str]:
    return [f"{row.case}: {row.reason}" for row in rows if row.details["what"] == "missing"]


@NEEDS_TRITON
def test_the_whole_of_the_gpus_part(place: Setup) -> None:
    place.backend, place.read = "triton", 0.0
    rows = list(common.run_parts(decode.gpu_parts(SMALL, lambda: place)))
    assert missing(rows) == []
    dicts = [row.as_dict() for row in rows]
    own = [row for row in dicts if row.get("stage") == "own" and row["what"] == "time"]
    # Four forms of two lengths, each in a graph and plainly; and what a cache can be besides.
    assert sum(row["how"] == "plain" for row in own) == 8
    assert {row["kv_dtype"] for row in own} >= {"bf16"}
    assert {row["form"] for row in own} == {
        "MHA 32/32",
        "GQA 32/4",
        "GQA 64/8",
        "MQA 32/1",
        "MLA 16",
        "MLA 128",
    }
    for row in own:
        if row["how"] == "graph" and not row["rope_dim"]:
            assert row["bar"] == pytest.approx(row["nbytes"] / (0.90 * place.read) + 15e-6)
            assert row["goal"] == pytest.approx(row["nbytes"] / (0.95 * place.read) + 10e-6)
            assert row["pass"] == (row["measured"] <= row["bar"])
    ratios = {(row["against"], row["stage"], row["bar"]) for row in dicts if row["what"] == "ratio"}
    assert ratios >= {
        ("SDPA flash", "own", 1.0),
        ("v1", "own", 2.0),
        ("own, one split", "own", 2.0),
        ("FlexAttention", "own", 1.1),
        ("SDPA with a mask", "own", 10.0),
        ("own", "own at 16", 1.15),
        ("pages of 64", "contiguous", 1.05),
        ("pages of 16", "contiguous", 1.10),
        ("own, BLOCK_H=16", "own", 1.6),
        ("bf16", "fp8", 1.3),
        ("bf16", "int8", 1.3),
        ("v0", "own", None),
        ("v5", "own", None),
    }
    bars = {row["what"]: row["bar"] for row in dicts if row["what"] in ("share", "rate")}
    assert bars == {"share": 0.75, "rate": 250e12}
    assert {row["kv_dtype"] for row in dicts if row["what"] == "error"} == {"fp8", "int8"}
    assert {"bw_read", "peak", "launch_host", "launch_plain", "launch_graph"} <= {
        row["what"] for row in dicts
    }
    assert [row["what"] for row in dicts[:5]] == ["stream", "stream", "stream", "stream", "bw_read"]
    absent = [row for row in rows if row.details["what"] == "unavailable"]
    assert [(row.case, row.reason) for row in absent] == [
        (name, "not installed") for name in libraries.LIBRARIES
    ]


@NEEDS_TRITON
def test_the_figure_is_drawn_from_the_rows(place: Setup) -> None:
    place.backend = "triton"
    measured = Row("BW_read", 4e12, "B/s", details={"what": "bw_read"})
    rows = [measured, *grid.grid_rows(place, case_of("GQA 32/4", 1, 16), 32)]
    drawn = bandwidth_points([row.as_dict() for row in rows])
    assert drawn is not None
    assert [name for name, _, _ in drawn["points"]] == ["own", "SDPA flash", "v1"]
    assert drawn["bandwidth"] == 4e12
    from kvlearn import plots

    assert plots.achieved_bandwidth(**drawn).png().startswith(b"\x89PNG")


def test_without_a_gpu_there_is_nothing_to_draw(place: Setup) -> None:
    assert bandwidth_points([row.as_dict() for row in cpu.shared_rows(place, SMALL, 1, 16)]) is None


@NEEDS_TRITON
def test_a_card_is_tuned_form_by_form(place: Setup) -> None:
    place.backend = "triton"
    measured = list(common.run_parts(decode.tiling_parts(SMALL, lambda: place, 1000)))
    assert missing(measured) == []
    rows = [row.as_dict() for row in measured]
    (splits,) = [row for row in rows if row["what"] == "best_splits"]
    assert splits["splits"] in (1, 2)
    (tiling,) = [row for row in rows if row["what"] == "best_tiling"]
    assert {"block_h", "block_n", "num_warps", "num_stages"} <= set(tiling)
    assert len(tiling["times"]) == tiling["tried"] == 3
    assert tiling["untried"] == 0


@NEEDS_TRITON
def test_a_tiling_that_cannot_run_is_no_failure(place: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of resource: shared memory")

    place.backend = "triton"
    monkeypatch.setattr("kvlearn.bench.decode.comparison.launch", refuses)
    assert tilings.seconds_of(place, GQA, features.LATENT_TILINGS[0]) == float("inf")


def test_without_a_gpu_nothing_is_tuned() -> None:
    (row,) = common.run_parts(decode_tune.parts(CPU))
    assert "no GPU" in row.reason


def test_without_a_gpu_the_pytorch_forms_are_measured(place: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "read_bandwidth", lambda device: 1e10)
    rows = list(common.run("decode", small=True))
    assert rows[0].case.startswith("no GPU")
    assert missing(rows) == []
    times = [row.details for row in rows if row.details["what"] == "time"]
    assert {(row["form"], row["stage"]) for row in times} >= {
        ("MHA 32/32", "own"),
        ("GQA 32/4", "SDPA"),
        ("MLA 16", "own"),
    }
    assert {row["kv_dtype"] for row in times} == {"fp32"}
    ratios = [
        (row.details["against"], row.details["stage"]) for row in rows if row.details["what"] == "ratio"
    ]
    assert ratios[:2] == [("full", "window"), ("MHA", "latent")]
    assert ratios[2:] == [("MHA 32/32", "GQA 32/4"), ("MHA 32/32", "MQA 32/1")]


def test_a_cell_above_its_share_of_the_memory_is_skipped_and_named(place: Setup) -> None:
    (row,) = grid.grid_rows(place, new_case("MHA 32/32", 128, 65536), 65536)
    assert row.case == "MHA 32/32, 128 x 64k"
    assert row.reason == "skipped, a cache of 137.44 GB is above 60% of the memory"


# Baselines


def plain(case: Case) -> Iterator[tuple[str, libraries.Baseline]]:
    yield from {
        "flash": libraries.sdpa_flash,
        "expanded": libraries.sdpa_flash_expanded,
        "unpinned": libraries.sdpa,
        "flex": libraries.Flex(),
    }.items()


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_baselines_compute_the_same(place: Setup, n_kv_heads: int) -> None:
    case = replace(GQA, n_kv_heads=n_kv_heads)
    compared = compare_implementations(
        place, {name: Implementation(case, baseline) for name, baseline in plain(case)}
    )
    assert (compared.failed, compared.unavailable) == ({}, {})


def test_a_mask_is_the_window_with_its_sinks(place: Setup) -> None:
    windowed = replace(GQA, window=7, n_sinks=3)
    assert (
        compare_implementations(place, {"masked": Implementation(windowed, libraries.sdpa_masked)}).failed
        == {}
    )


def test_heads_are_repeated_where_flash_refuses_groups(place: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "flash_takes_groups", lambda device: False)
    rows = list(grid.grid_rows(place, case_of("GQA 32/4", 1, 16), 32))
    texts = [f"{row.case}: {row.reason}" for row in rows]
    assert any("SDPA flash: its flash backend refuses grouped heads" in text for text in texts)
    (ratio,) = [row for row in rows if "SDPA flash, heads repeated / own" in row.case]
    assert ratio.bar == 1.0


def test_a_backend_that_refuses_groups_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(libraries.F, "scaled_dot_product_attention", refuses)
    assert libraries.flash_takes_groups.__wrapped__(CPU) is False


def test_repeated_heads_that_do_not_fit_are_left_out(place: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "MOST_REPEATED", 1)
    with pytest.raises(Unavailable, match="would not fit"):
        libraries.sdpa_flash_expanded(GQA, place.arena.inputs(GQA)[0])


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer and vLLM as their documents describe them, in the plainest torch."""

    class Wrapper:
        def __init__(self, room: torch.Tensor, layout: str, use_tensor_cores: bool) -> None:
            assert layout == "HND"

        def plan(
            self, indptr: torch.Tensor, indices: torch.Tensor, last: torch.Tensor, *sizes: int, **kw: Any
        ) -> None:
            self.indptr, self.indices, self.last, self.page = indptr, indices, last, sizes[3]
            self.scale = kw["sm_scale"]
            assert (kw["q_data_type"], kw["kv_data_type"]) == (torch.bfloat16, torch.bfloat16)

        def run(self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            rows = []
            for b in range(q.shape[0]):
                pages = self.indices[self.indptr[b] : self.indptr[b + 1]].long()
                length = (len(pages) - 1) * self.page + int(self.last[b])
                k, v = (t[pages].transpose(0, 1).flatten(1, 2)[:, :length] for t in cache)
                rows.append(one_row(q[b], k, v, self.scale))
            return torch.stack(rows)

    def decode_attention_fwd(
        q: Any, k: Any, v: Any, o: Any, lse: Any, table: Any, lengths: Any, parts: Any,
        splits: int, scale: float, page_size: int = 1,
    ) -> None:  # fmt: skip
        assert parts.shape == (*q.shape[:2], splits, q.shape[2] + 1)
        assert k.shape[1] == page_size
        for b in range(q.shape[0]):
            kk, vv = (t[table[b].long()].flatten(0, 1)[: lengths[b]].transpose(0, 1) for t in (k, v))
            o[b] = one_row(q[b], kk, vv, scale)

    fakes = {
        "flashinfer": {"BatchDecodeWithPagedKVCacheWrapper": Wrapper},
        "vllm": {"__path__": []},
        "vllm.attention": {"__path__": []},
        "vllm.attention.ops": {"__path__": []},
        "vllm.attention.ops.triton_decode_attention": {"decode_attention_fwd": decode_attention_fwd},
    }
    for name, content in fakes.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def one_row(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """(H, D) over (G, S, D)."""
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    weights = (torch.einsum("hd,hsd->hs", q.float(), k.float()) * scale).softmax(-1)
    return torch.einsum("hs,hsd->hd", weights, v.float()).to(q.dtype)


def test_other_libraries_get_what_their_documents_ask_for(place: Setup, installed: None) -> None:
    made = decode.part_maker(SMALL, lambda: place, None)
    (part,) = [p for p in decode.library_parts(SMALL, made) if p.name.startswith("libraries")]
    rows = list(part.rows())
    assert missing(rows) == []
    assert {row.details["stage"] for row in rows if row.details["what"] == "time"} == set(libraries.LIBRARIES)


def test_other_libraries_take_part_with_pages_only(place: Setup, installed: None) -> None:
    x = place.arena.inputs(GQA)[0]
    for baseline in (libraries.flashinfer, libraries.vllm_triton):
        with pytest.raises(Unavailable, match="paged"):
            baseline(GQA, x)


def test_a_library_without_its_kernel_is_noted(
    place: Setup, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    paged = replace(GQA, page=16)
    monkeypatch.setattr(libraries, "VLLM", ("vllm.nowhere.kernel",))
    with pytest.raises(Unavailable, match="no triton_decode_attention"):
        libraries.vllm_triton(paged, place.arena.inputs(paged)[0])


@NEEDS_TRITON
@pytest.mark.parametrize("others", [None, 16])
def test_stages_take_part_where_they_can(place: Setup, others: int | None) -> None:
    from kvlearn.kernels.stages import STAGES

    case = replace(GQA, others=others)
    compared = compare_implementations(
        place, {name: Implementation(case, libraries.stage(name)) for name in STAGES}
    )
    assert set(compared.calls) == ({"v4", "v5"} if others else set(STAGES))
    assert compared.failed == {}


# The GPU


def test_a_card_gives_sixty_percent_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(L2_cache_size=1000, total_memory=10_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9000, 10_000))
    monkeypatch.setattr("kvlearn.bench.decode.comparison.CudaTimer", lambda device, l2: FakeTimer())
    monkeypatch.setattr("kvlearn.bench.decode.comparison.SPARE", 1000)
    made = cuda_setup(CPU)
    assert made.arena.nbytes == 6000 // 256 * 256
    assert (made.memory, made.l2) == (10_000, 1000)


@NEEDS_TRITON
def test_a_stream_that_sums_wrong_sets_no_ceiling(place: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvlearn.kernels import stream

    monkeypatch.setattr(stream, "read", lambda x, sums, block, warps: sums.fill_(1.0))
    place.read = 0.0
    rows = list(rates.bandwidth_rows(place, 2**12))
    assert sum("ArithmeticError" in row.reason for row in rows) == len(stream.TILINGS)
    assert rows[-1].details["stage"] == "torch.sum"
    assert rows[-1].measured == place.read == pytest.approx(2**12 / 1e-3)


@NEEDS_TRITON
def test_the_stream_reads_every_number_once() -> None:
    from kvlearn.kernels.stream import read

    x = torch.arange(100.0)
    assert read(x, torch.empty(7), 16, 4).tolist() == [chunk.sum().item() for chunk in x.split(16)]
    with pytest.raises(ValueError, match="sums: expected 7 numbers"):
        read(x, torch.empty(6), 16, 4)


# The command


def test_recording_decode_draws_its_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = new_case("GQA 32/4", 8, 4096)
    details = {**case.details, "what": "time", "stage": "own", "how": "graph", "copies": 9}
    time = Quartiles(20e-6, 19e-6, 21e-6, 9)
    rows = [
        Row("BW_read", 4e12, "B/s", details={"what": "bw_read"}),
        Row("own", time.median, "s", bar=1e-3, relation="<=", spread=time, details=details),
    ]
    monkeypatch.setattr(common, "run_parts", lambda parts, seconds, **_: iter(rows))
    monkeypatch.setattr(results, "results_folders", lambda: [tmp_path])
    monkeypatch.setattr("kvlearn.measure.provenance.read_bandwidth", lambda device: 1e9)
    done = CliRunner().invoke(app, ["bench", "decode", "--record"])
    assert done.exit_code == 0, done.output
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".json", ".png"]
    assert "drawn in" in done.output


def test_a_log_has_each_row_as_soon_as_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_short(parts: Any, seconds: float, **_: Any) -> Iterator[Row]:
        yield Row("first", 1e-3, "s", bar=1.0, relation="<=")
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "run_parts", cut_short)
    done = CliRunner().invoke(app, ["bench", "decode"])
    assert done.exit_code != 0
    assert "first" in done.output
    assert "pass" in done.output


def test_a_device_is_chosen() -> None:
    assert command.default_device() in ("cpu", "cuda")


def test_an_error_is_stated_against_the_unquantised_cache(place: Setup) -> None:
    eight = Implementation(replace(GQA, kv_dtype=torch.int8), kernel_under_test(place, GQA).prepare)
    row = features.error_row(place, eight, GQA)
    assert 1e-3 < row.measured < 0.1
    x = place.arena.inputs(GQA)[0]
    assert error(GQA, x, eight.prepare(GQA, x)()) < row.measured
