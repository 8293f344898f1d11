"""The parts of ``kvlearn bench decode``: cases, tensors, the exact result, timers, comparisons."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kvlearn.bench.decode.cases import Arena, Case, Inputs, error, exact_row, new_case, quantised
from kvlearn.bench.decode.comparison import Implementation, Setup, Unavailable, compare_implementations
from kvlearn.bench.decode.grid import grid_cases
from kvlearn.bench.decode.sizes import SIZES
from kvlearn.measure.timers import CudaTimer, WallTimer, time_interleaved

CPU = torch.device("cpu")
SMALL = Case("GQA 4/2", batch=3, length=32, n_heads=4, n_kv_heads=2, head_dim=16)
LATENT = Case("MLA 4", batch=2, length=32, n_heads=4, n_kv_heads=1, head_dim=16, rope_dim=8)


@pytest.fixture
def arena() -> Arena:
    torch.manual_seed(0)
    return Arena(2**17, CPU)


@pytest.fixture
def setup(arena: Arena) -> Setup:
    return Setup(CPU, WallTimer(), arena, memory=2**20, l2=1000, backend="torch", read=1e9, peak=1e12)


def attention(x: Inputs, **options: Any) -> torch.Tensor:
    """torch's, in fp64."""
    q, k, v = (tensor.double() for tensor in (x.q[:, :, None], x.k, x.v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)[:, :, 0]


# Cases


def test_bytes_are_live_keys_and_values_once_and_queries_and_results() -> None:
    measured = new_case("GQA 32/4", 1, 65536)
    assert measured.nbytes == 2 * 4 * 65536 * 128 * 2 + 2 * 32 * 128 * 2
    assert measured.stored == 2 * 4 * 65536 * 128 * 2


def test_a_latent_counts_once_and_in_both_products() -> None:
    measured = new_case("MLA 16", 32, 16384)
    assert measured.stored == 32 * 16384 * 576 * 2
    assert measured.nbytes == measured.stored + 32 * 16 * (576 + 512) * 2
    assert measured.nbytes >= 600e6
    assert measured.flops == 32 * 16384 * 16 * 2 * (576 + 512)


def test_a_window_reads_its_own_keys_and_the_sinks_and_stores_everything() -> None:
    measured = new_case("MHA 32/32", 2, 65536, window=4096, n_sinks=4)
    assert measured.live(65536) == 4100
    assert measured.live(4097) == 4097
    assert measured.live(10) == 10
    assert measured.stored == new_case("MHA 32/32", 2, 65536).stored


def test_short_rows_count_with_their_own_length() -> None:
    measured = new_case("MHA 32/32", 4, 1024, others=16)
    assert measured.lengths == [1024, 16, 16, 16]
    assert measured.flops == (1024 + 48) * 32 * 4 * 128


def test_bytes_of_a_quantised_cache_are_half() -> None:
    whole, half = new_case("GQA 64/8", 32, 16384), new_case("GQA 64/8", 32, 16384, kv_dtype=torch.int8)
    assert half.stored * 2 == whole.stored
    assert half.nbytes >= 512e6


def test_the_grid_is_the_one_that_was_asked_for() -> None:
    cases = grid_cases(SIZES)
    assert len(set(cases)) == 4 * 4 * 4
    assert {(c.n_heads, c.n_kv_heads) for c in cases} == {(32, 32), (32, 4), (64, 8), (32, 1)}
    assert {c.batch for c in cases} == {1, 8, 32, 128}
    assert {c.length for c in cases} == {1024, 4096, 16384, 65536}


# Inputs


def test_copies_are_disjoint_and_exceed_the_working_set(arena: Arena) -> None:
    count = arena.copies(SMALL, 5 * SMALL.nbytes - 1, at_most=100)
    assert count == 5
    firsts = [x.k.data_ptr() for x in arena.inputs(SMALL, count)]
    assert [b - a for a, b in pairwise(firsts)] == [SMALL.stored] * 4


def test_copies_stay_within_the_buffer_and_the_limit(arena: Arena) -> None:
    assert arena.copies(SMALL, 1e9, at_most=7) == 7
    assert arena.copies(SMALL, 1e9, at_most=10**6) == arena.nbytes // SMALL.stored
    with pytest.raises(MemoryError, match="do not fit"):
        arena.inputs(replace(SMALL, length=2**16))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantising_keeps_the_numbers_nearly(arena: Arena, dtype: torch.dtype) -> None:
    x = arena.inputs(SMALL)[0]
    small = quantised(x, dtype)
    assert small.k.dtype == dtype
    assert small.k_scale is not None
    back = small.k.float() * small.k_scale[None, :, None, None]
    assert (back - x.k.float()).norm() / x.k.float().norm() < 0.04


# The exact result


def test_the_exact_result_agrees_with_torch(arena: Arena) -> None:
    x = arena.inputs(SMALL)[0]
    expected = attention(x)
    for row in range(SMALL.batch):
        torch.testing.assert_close(exact_row(SMALL, x, row), expected[row])


def test_the_exact_result_of_a_window_agrees_with_a_mask(arena: Arena) -> None:
    windowed = replace(SMALL, window=5, n_sinks=2)
    x = arena.inputs(windowed)[0]
    mask = torch.zeros(32, dtype=torch.bool)
    mask[:2] = mask[-5:] = True
    torch.testing.assert_close(exact_row(windowed, x, 1), attention(x, attn_mask=mask[None, None, None])[1])


def test_the_exact_result_of_pages_is_that_of_the_gathered_cache(arena: Arena) -> None:
    paged = replace(SMALL, page=8)
    x = arena.inputs(paged)[0]
    assert x.table is not None
    k, v = (t[x.table.long()].transpose(1, 2).flatten(2, 3) for t in (x.k, x.v))
    torch.testing.assert_close(exact_row(paged, x, 2), attention(Inputs(x.q, k, v, x.lengths))[2])


def test_the_exact_result_of_a_latent(arena: Arena) -> None:
    x = arena.inputs(LATENT)[0]
    assert x.q_rope is not None
    q = torch.cat([x.q, x.q_rope], -1).double()
    weights = (q[1] @ x.k[1].double().T * LATENT.scale).softmax(-1)
    torch.testing.assert_close(exact_row(LATENT, x, 1), weights @ x.k[1, :, :16].double())


def test_an_error_shows_one_wrong_head_and_a_missing_number(arena: Arena) -> None:
    x = arena.inputs(SMALL)[0]
    out = attention(x)
    assert error(SMALL, x, out) < 1e-12
    wrong = out.clone()
    wrong[2, 3] *= 1.5
    assert error(SMALL, x, wrong) == pytest.approx(0.5)
    wrong[0, 0, 0] = torch.nan
    assert not error(SMALL, x, wrong) <= 1


# Timers


class FakeCuda:
    """As much of torch.cuda as a clock uses; a call takes ``step`` seconds of its time."""

    def __init__(self, step: float) -> None:
        self.step, self.now, self.stream = step, 0.0, "default"
        self.captured: list[int] = []
        self.log: list[str] = []
        self.capturing = False

    def call(self) -> None:
        self.log.append("captured" if self.capturing else "call")
        if self.capturing:
            self.captured[-1] += 1
        else:
            self.now += self.step

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = self

        class Stream:
            def __init__(self, device: object = None) -> None: ...
            def wait_stream(self, other: object) -> None:
                fake.log.append("wait")

            def synchronize(self) -> None: ...

        class Graph:
            def __init__(self) -> None:
                self.index = len(fake.captured)
                fake.captured.append(0)

            def replay(self) -> None:
                fake.log.append("replay")
                fake.now += fake.step * fake.captured[self.index]

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now

            def synchronize(self) -> None: ...
            def elapsed_time(self, end: "Event") -> float:
                return (end.at - self.at) * 1e3

        @contextmanager
        def on(stream: object) -> Iterator[None]:
            before, fake.stream = fake.stream, "side"
            try:
                yield
            finally:
                fake.stream = before

        @contextmanager
        def capture(graph: Graph, stream: object) -> Iterator[None]:
            fake.capturing = True
            yield  # like torch's, which leaves its stream current where a capture fails
            fake.capturing = False

        for name, value in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "Event": Event,
            "stream": on,
            "graph": capture,
            "current_stream": lambda: None,
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda(step=1e-4)
    fake.install(monkeypatch)
    monkeypatch.setattr("kvlearn.measure.timers.MIB", 1)
    return fake


def test_a_graph_holds_whole_turns_and_gives_the_time_of_one_call(cuda: FakeCuda) -> None:
    graph = CudaTimer(CPU, l2=16).prepare([cuda.call] * 7)
    assert cuda.captured == [7, 35]  # 5 turns of 7 calls of 0.1 ms last 3 ms
    assert graph.calls == 35
    assert graph.seconds() == pytest.approx(1e-4)


def test_everything_runs_once_before_it_is_captured(cuda: FakeCuda) -> None:
    CudaTimer(CPU, l2=16).prepare([cuda.call] * 7)
    assert cuda.log[:15] == ["wait", *["call"] * 7, *["captured"] * 7]


def test_a_call_that_is_long_is_captured_once(cuda: FakeCuda) -> None:
    cuda.step = 0.01
    assert CudaTimer(CPU, l2=16).prepare([cuda.call]).calls == 1
    assert cuda.captured == [1]


def test_a_graph_never_holds_more_calls_than_it_may(cuda: FakeCuda) -> None:
    cuda.step = 1e-9
    assert CudaTimer(CPU, l2=16).prepare([cuda.call] * 300).calls == 900


def test_a_failed_capture_puts_the_stream_back(cuda: FakeCuda) -> None:
    def call() -> None:
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="capturing"):
        CudaTimer(CPU, l2=16).prepare([call])
    assert cuda.stream == "default"


def test_a_plain_call_finds_the_cache_written_over(cuda: FakeCuda) -> None:
    timer = CudaTimer(CPU, l2=16)
    timer.trash = torch.ones(1)

    def call() -> None:
        assert timer.trash.item() == 0
        timer.trash += 1
        cuda.call()

    assert timer.plain(call).median == pytest.approx(1e-4)
    assert timer.host(cuda.call).n == 50


def test_implementations_are_measured_in_every_round_and_the_order_turns() -> None:
    order = []

    class Clockwork:
        calls = 1

        def __init__(self, name: str) -> None:
            self.name = name

        def seconds(self) -> float:
            order.append(self.name)
            return 1e-2

    comparison = time_interleaved({name: Clockwork(name) for name in "abc"})
    assert order[3:9] == ["a", "b", "c", "b", "c", "a"]  # the first three say how many rounds there can be
    assert len(comparison.rounds["a"]) in (14, 15)
    assert comparison.ratio("a", "b").median == 1


def test_on_a_cpu_the_wall_clock_times_the_calls() -> None:
    called = []
    turn = WallTimer().prepare([lambda: called.append(1), lambda: called.append(2)])
    assert turn.seconds() > 0
    assert called == [1, 1, 2]


# Comparisons


def right(case: Case, x: Inputs) -> Callable[[], torch.Tensor]:
    return lambda: attention(x)


def test_who_is_wrong_is_noted_and_not_timed(setup: Setup) -> None:
    implementations = {
        "right": Implementation(SMALL, right),
        "wrong": Implementation(SMALL, lambda case, x: lambda: attention(x, scale=1.0)),
        "unfinished": Implementation(SMALL, lambda case, x: lambda: torch.full_like(x.q, torch.nan)),
        "broken": Implementation(SMALL, lambda case, x: lambda: torch.zeros(3)[5]),
    }
    compared = compare_implementations(setup, implementations)
    assert list(compared.calls) == list(compared.comparison.rounds) == ["right"]
    assert compared.failed["wrong"].startswith("ArithmeticError: wrong by")
    assert "nan" in compared.failed["unfinished"]
    assert compared.failed["broken"].startswith("IndexError")
    rows = list(compared.missing_rows())
    assert [row.details["names"] for row in rows] == [["wrong"], ["unfinished"], ["broken"]]
    assert {(row.details["what"], row.as_dict()["measured"]) for row in rows} == {("missing", None)}


def test_who_cannot_take_part_is_noted_and_no_failure(setup: Setup) -> None:
    def unable(case: Case, x: Inputs) -> Callable[[], torch.Tensor]:
        raise Unavailable("not made for this")

    compared = compare_implementations(setup, {"unable": Implementation(SMALL, unable)})
    assert (compared.unavailable, compared.failed) == ({"unable": "not made for this"}, {})
    (row,) = compared.missing_rows()
    assert (row.details["what"], row.reason) == ("unavailable", "not made for this")


def test_a_case_that_is_too_large_is_skipped_by_name(setup: Setup) -> None:
    compared = compare_implementations(
        setup, {name: Implementation(replace(SMALL, length=2**16), right) for name in "ab"}
    )
    (row,) = compared.missing_rows()
    assert row.case == "GQA 4/2, 3 x 64k: a, b"
    assert row.reason == "skipped, a cache of 25.17 MB is above 60% of the memory"


def test_the_inputs_of_a_comparison_exceed_five_times_the_cache(setup: Setup) -> None:
    setup.l2 = SMALL.nbytes
    assert compare_implementations(setup, {"right": Implementation(SMALL, right)}).copies == {"right": 5}


def test_a_time_row_has_what_a_plot_needs(setup: Setup) -> None:
    row = (
        compare_implementations(setup, {"right": Implementation(SMALL, right)})
        .time_row("right", bar=1.0, relation="<=")
        .as_dict()
    )
    assert row["case"] == "GQA 4/2, 3 x 32: right"
    assert row["pass"] is True
    assert row["bandwidth"] == pytest.approx(SMALL.nbytes / row["measured"])
    assert {"what", "stage", "how", "form", "batch", "length", "heads", "kv_heads", "nbytes", "error"} <= set(
        row
    )
