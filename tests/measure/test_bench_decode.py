"""``kvlearn bench decode`` and ``decode_tune``: all of it at a size where the interpreter takes no time.

The GPU's part runs here as it does there, but for the clock, which does not ask the device's events.
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

from kvlearn.bench import BENCHMARKS, command, common
from kvlearn.cli import app
from kvlearn.measure import Quartiles, results
from kvlearn.measure.bench import decode, decode_tune
from kvlearn.measure.decode_bench import ceilings, cells, cpu, grid, others, rivals, special, tune
from kvlearn.measure.decode_bench.bench import Bench, cuda_bench
from kvlearn.measure.decode_bench.cells import Cell
from kvlearn.measure.decode_bench.contest import Entry, compete
from kvlearn.measure.decode_bench.exact import error
from kvlearn.measure.decode_bench.figure import bandwidth_points
from kvlearn.measure.decode_bench.inputs import Arena
from kvlearn.measure.decode_bench.jobs import Deadline
from kvlearn.measure.decode_bench.rivals import Unable
from kvlearn.measure.results import Row

CPU = torch.device("cpu")
NEEDS_TRITON = pytest.mark.skipif(sys.platform == "darwin", reason="no Triton")
GQA = Cell("GQA 32/4", batch=2, length=32, n_heads=4, n_kv_heads=2, head_dim=16)


class FakeClock:
    """Calls the first of the calls once, and says that every measurement took as long as the last."""

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> "FakeClock":
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
def place() -> Bench:
    torch.manual_seed(0)
    return Bench(
        CPU, FakeClock(), Arena(2**17, CPU), memory=2**20, l2=100, backend="torch", read=1e9, peak=1e12
    )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form and size so small that a tile holds it."""
    for name, form in cells.FORMS.items():
        tiny = {"n_heads": 4, "n_kv_heads": max(1, 4 * form.n_kv_heads // form.n_heads), "head_dim": 16}
        monkeypatch.setitem(cells.FORMS, name, replace(form, **tiny, rope_dim=16 if form.rope_dim else 0))
    sizes: list[tuple[Any, dict[str, Any]]] = [
        (grid, {"BATCHES": (1,), "LENGTHS": (16, 32), "LONGEST": 32, "STAGE_CELLS": (("GQA 32/4", 1, 32),)}),
        (others, {"FLEX_CELLS": ((1, 32),), "LIBRARY_CELLS": (("GQA 32/4", 1, 32),)}),
        (special, {"WINDOWED": (("GQA 32/4", 1, 32), ("MHA 32/32", 1, 32)), "WINDOW": 16, "SINKS": 2}),
        (special, {"PAGED": (("GQA 32/4", 1, 64),), "RAGGED": (("GQA 32/4", 2, 32, 16),)}),
        (special, {"QUANTISED": (("GQA 64/8", 1, 32),), "FEW_HEADS": ((1, 32),), "MANY_HEADS": ((1, 32),)}),
        (ceilings, {"STREAM": 2**14, "PRODUCT": 16}),
        (tune, {"FORMS": (GQA,), "SPLIT_CELLS": (GQA,), "SPLITS": (1, 2)}),
        (tune, {"CHOICES": {"block_n": (16,), "num_warps": (4, 8)}}),
    ]
    for module, values in sizes:
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)


@NEEDS_TRITON
def test_the_whole_of_the_gpus_part(small: None, place: Bench) -> None:
    place.backend, place.read = "triton", 0.0
    rows = list(decode.gpu_part(place, Deadline(1000)))
    assert place.failures == [], place.failures
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
    notes = [row.case for row in rows if row.details["what"] == "note"]
    assert len(notes) == 2
    assert all("not installed" in note for note in notes)
    assert [row.case for row in rows[-5:]][:2] == ["not reached in time", "failed"]
    assert rows[-2].case == "bars met"


@NEEDS_TRITON
def test_the_figure_is_drawn_from_the_rows(small: None, place: Bench) -> None:
    place.backend = "triton"
    measured = Row("BW_read", 4e12, "B/s", details={"what": "bw_read"})
    rows = [measured, *grid.grid_cell(place, cells.cell("GQA 32/4", 1, 16))]
    drawn = bandwidth_points([row.as_dict() for row in rows])
    assert drawn is not None
    assert [name for name, _, _ in drawn["points"]] == ["own", "SDPA flash", "v1"]
    assert drawn["bandwidth"] == 4e12
    from kvlearn import plots

    assert plots.achieved_bandwidth(**drawn).png().startswith(b"\x89PNG")


def test_without_a_gpu_there_is_nothing_to_draw(small: None, place: Bench) -> None:
    assert bandwidth_points([row.as_dict() for row in cpu.shared_heads(place, 1, 16)]) is None


@NEEDS_TRITON
def test_a_card_is_tuned_form_by_form(small: None, place: Bench) -> None:
    place.backend = "triton"
    rows = [row.as_dict() for row in decode_tune.tune(place, Deadline(1000))]
    assert place.failures == []
    (splits,) = [row for row in rows if row["what"] == "best_splits"]
    assert splits["splits"] in (1, 2)
    (tiling,) = [row for row in rows if row["what"] == "best_tiling"]
    assert {"block_h", "block_n", "num_warps", "num_stages"} <= set(tiling)
    assert len(tiling["times"]) == tiling["tried"] == 3
    assert tiling["untried"] == 0


@NEEDS_TRITON
def test_a_tiling_that_cannot_run_is_no_failure(
    small: None, place: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of resource: shared memory")

    place.backend = "triton"
    monkeypatch.setattr("kvlearn.measure.decode_bench.own.launch", refuses)
    assert tune.once(place, GQA, special.LATENT_TILINGS[0]) == float("inf")
    assert place.failures == []


def test_without_a_gpu_nothing_is_tuned() -> None:
    (row,) = decode_tune.run(CPU)
    assert "no GPU" in row.case


def test_without_a_gpu_the_pytorch_forms_are_measured(
    small: None, place: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "SIZES", ((1, 16),))
    monkeypatch.setattr(cpu, "LONG", (1, 64))
    monkeypatch.setattr(cpu, "WINDOW", 16)
    monkeypatch.setattr(cpu, "ROOM", 2**16)
    monkeypatch.setattr(cpu, "read_bandwidth", lambda device: 1e10)
    rows = list(decode.run(CPU))
    assert rows[0].case.startswith("no GPU")
    assert rows[-2].case == "failed"
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


def test_a_cell_above_its_share_of_the_memory_is_skipped_and_named(place: Bench) -> None:
    (row,) = grid.grid_cell(place, cells.cell("MHA 32/32", 128, 65536))
    assert "MHA 32/32, 128 x 64k: skipped, a cache of 137.44 GB is above 60% of the memory" in row.case


# Rivals


def plain(cell: Cell) -> Iterator[tuple[str, rivals.Rival]]:
    yield from {
        "flash": rivals.sdpa_flash,
        "expanded": rivals.sdpa_flash_expanded,
        "unpinned": rivals.sdpa,
        "flex": rivals.Flex(),
    }.items()


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_rivals_compute_the_same(small: None, place: Bench, n_kv_heads: int) -> None:
    measured = replace(GQA, n_kv_heads=n_kv_heads)
    outcome = compete(place, {name: Entry(measured, rival) for name, rival in plain(measured)})
    assert outcome.notes == {}


def test_a_mask_is_the_window_with_its_sinks(place: Bench) -> None:
    windowed = replace(GQA, window=7, n_sinks=3)
    assert compete(place, {"masked": Entry(windowed, rivals.sdpa_masked)}).notes == {}


def test_heads_are_repeated_where_flash_refuses_groups(
    small: None, place: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivals, "flash_takes_groups", lambda device: False)
    rows = list(grid.grid_cell(place, cells.cell("GQA 32/4", 1, 16)))
    names = [row.case for row in rows]
    assert any("SDPA flash: its flash backend refuses grouped heads" in name for name in names)
    (ratio,) = [row for row in rows if "SDPA flash, heads repeated / own" in row.case]
    assert ratio.bar == 1.0


def test_a_backend_that_refuses_groups_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(rivals.F, "scaled_dot_product_attention", refuses)
    assert rivals.flash_takes_groups.__wrapped__(CPU) is False


def test_repeated_heads_that_do_not_fit_are_left_out(place: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "EXPANDED", 1)
    with pytest.raises(Unable, match="would not fit"):
        rivals.sdpa_flash_expanded(GQA, place.arena.inputs(GQA)[0])


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_other_libraries_get_what_their_documents_ask_for(small: None, place: Bench, libraries: None) -> None:
    (job,) = others.library_jobs(place)
    rows = list(job.rows())
    assert place.failures == []
    assert {row.details["stage"] for row in rows if row.details["what"] == "time"} == set(others.LIBRARIES)


def test_other_libraries_take_part_with_pages_only(place: Bench, libraries: None) -> None:
    x = place.arena.inputs(GQA)[0]
    for rival in (rivals.flashinfer, rivals.vllm_triton):
        with pytest.raises(Unable, match="paged"):
            rival(GQA, x)


def test_a_library_without_its_kernel_is_noted(
    place: Bench, libraries: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    paged = replace(GQA, page=16)
    monkeypatch.setattr(rivals, "VLLM", ("vllm.nowhere.kernel",))
    with pytest.raises(Unable, match="no triton_decode_attention"):
        rivals.vllm_triton(paged, place.arena.inputs(paged)[0])


@NEEDS_TRITON
@pytest.mark.parametrize("others", [None, 16])
def test_stages_take_part_where_they_can(place: Bench, others: int | None) -> None:
    from kvlearn.kernels.stages import STAGES

    measured = replace(GQA, others=others)
    outcome = compete(place, {name: Entry(measured, rivals.stage(name)) for name in STAGES})
    assert set(outcome.calls) == ({"v4", "v5"} if others else set(STAGES))
    assert place.failures == []


# The card


def test_a_card_gives_sixty_percent_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(L2_cache_size=1000, total_memory=10_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9000, 10_000))
    monkeypatch.setattr("kvlearn.measure.decode_bench.bench.CudaClock", lambda device, l2: FakeClock())
    monkeypatch.setattr("kvlearn.measure.decode_bench.bench.SPARE", 1000)
    made = cuda_bench(CPU)
    assert made.arena.nbytes == 6000 // 256 * 256
    assert (made.memory, made.l2) == (10_000, 1000)


@NEEDS_TRITON
def test_a_stream_that_sums_wrong_sets_no_ceiling(place: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvlearn.kernels import stream

    monkeypatch.setattr(stream, "read", lambda x, sums, block, warps: sums.fill_(1.0))
    place.read = 0.0
    monkeypatch.setattr(ceilings, "STREAM", 2**12)
    rows = list(ceilings.bandwidth(place))
    assert sum("ArithmeticError" in row.case for row in rows) == len(stream.TILINGS)
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
    cell = cells.cell("GQA 32/4", 8, 4096)
    details = {**cell.details, "what": "time", "stage": "own", "how": "graph", "copies": 9}
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


def test_both_are_listed() -> None:
    assert {"decode", "decode_tune"} <= set(BENCHMARKS)
    assert command.default_device() in ("cpu", "cuda")


def test_an_error_is_stated_against_the_unquantised_cache(place: Bench) -> None:
    eight = Entry(replace(GQA, kv_dtype=torch.int8), special.own(place, GQA).prepare)
    row = special.lost(place, eight, GQA)
    assert 1e-3 < row.measured < 0.1
    x = place.arena.inputs(GQA)[0]
    assert error(GQA, x, eight.prepare(GQA, x)()) < row.measured
