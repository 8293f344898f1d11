"""The benchmark ``window`` at a small size: what it measures, and that results are checked first."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from bench_tools import shown_times
from torch import Tensor, nn

from kvlearn.attention import KV, REGISTRY, RingCache, SlotCache, SparseAttention, WindowAttention
from kvlearn.attention.core import attention, causal_mask, rule_mask
from kvlearn.attention.window import Window
from kvlearn.bench import common, sparse, window
from kvlearn.bench.window import GROWN, RINGS, Sizes, new_layer
from kvlearn.measure import Comparison
from kvlearn.measure.results import Row

CPU = torch.device("cpu")
SIZES = window.SMALL
DESIGNS = window.designs(SIZES)


@pytest.fixture(autouse=True)
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    return shown_times(monkeypatch, window, sparse)


def grows(seconds: dict[str, float], name: str, power: float) -> None:
    """Let the time of a design grow as this power of the length."""
    seconds.update({common.label(name, n): n**power for n in SIZES.lengths})


def missed_bars(measured: list[Row]) -> set[tuple[str, str]]:
    return {(row.details["what"], row.details["name"]) for row in measured if row.passed is False}


def found(measured: list[Row], what: str, **details: Any) -> list[Row]:
    wanted = {"what": what, **details}.items()
    return [row for row in measured if wanted <= row.details.items()]


def test_every_part_is_measured_and_every_bar_of_the_issue_is_held(seconds: dict[str, float]) -> None:
    for name, power in {
        "full": 2.0,
        "window": 1.0,
        "longformer": 1.14,
        "bigbird": 1.2,
        "strided": 1.5,
    }.items():
        grows(seconds, name, power)
    measured = list(common.run("window", small=True))
    assert {row.details["what"] for row in measured} == {
        *("stored", "read", "step_time", "step_growth", "chosen_time", "chosen_speedup", "prefill_speedup"),
        *("prefill_time", "prefill_memory", "prefill_time_exponent", "prefill_memory_exponent"),
        *("train_time", "train_memory", "train_time_exponent", "train_memory_exponent"),
        *("layer_time", "layer_speedup", "layer_memory"),
    }
    barred = {(row.details["what"], row.details["name"]) for row in measured if row.bar is not None}
    assert barred == {
        *(("stored", name) for name in DESIGNS),
        *(("read", name) for name in DESIGNS),
        *(("step_growth", name) for name in RINGS),
        *(("prefill_time_exponent", name) for name in GROWN[1:]),
        *(("prefill_memory_exponent", name) for name in ("window", "longformer", "bigbird")),
        *(("train_time_exponent", "window"), ("train_memory_exponent", "window")),
        ("prefill_speedup", "window"),
        *(("layer_memory", name) for name in RINGS),
    }
    powers = {row.details["name"]: row for row in found(measured, "prefill_time_exponent")}
    assert powers["full"].measured == pytest.approx(2)
    assert [powers[n].passed for n in ("window", "longformer", "bigbird", "strided")] == [
        True,
        True,
        False,
        True,
    ]
    assert all(row.passed for row in measured if row.details["what"] in ("stored", "read", "layer_memory"))


def test_a_power_is_found_from_four_windows_on() -> None:
    amounts = {16: 1e9, 32: 2 * 32**1.5, 64: 2 * 64**1.5, 128: 2 * 128**1.5}
    assert common.exponent(amounts, least=32) == pytest.approx(1.5)
    (row,) = found(list(window.train_rows(SIZES, CPU)), "train_time_exponent")
    assert row.details["fitted"] == [32, 64, 128]


def test_an_exponent_has_the_spread_of_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(fns: Mapping[str, Callable[[], Tensor]], *, rounds: int) -> Comparison:
        lengths = dict(zip(fns, SIZES.lengths, strict=True))
        return Comparison(
            {name: tuple(n**p for p in (1.0, 1.1, 1.2, 1.3, 1.4)) for name, n in lengths.items()}
        )

    monkeypatch.setattr(window, "compare", compare)
    (row,) = found(list(window.train_rows(SIZES, CPU)), "train_time_exponent")
    assert row.spread is not None
    assert (row.measured, row.spread.q1, row.spread.q3) == pytest.approx((1.2, 1.1, 1.3))
    assert row.passed is False


def test_the_speedup_of_a_window_is_full_attentions_time_over_its_own(seconds: dict[str, float]) -> None:
    seconds[common.label("full", 128)] = 4.9
    (row,) = found(list(window.prefill_rows(SIZES, CPU)), "prefill_speedup", name="window")
    assert (row.measured, row.bar, row.passed) == (pytest.approx(4.9), 5, False)


def test_memory_that_grows_with_the_square_misses_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(self: WindowAttention, q: Tensor, kv: KV) -> Tensor:
        n = torch.arange(q.shape[2])
        return attention(q, kv.k, kv.v, rule_mask(Window(self.window, self.n_sinks), n, n))

    def power() -> Row:
        sizes = replace(SIZES, lengths=(256, 512, 1024))
        (row,) = found(list(window.train_rows(sizes, CPU)), "train_memory_exponent")
        return row

    assert power().passed
    monkeypatch.setattr(WindowAttention, "attend", dense)
    assert power().passed is False


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("n", [7, 50])
def test_the_visible_keys_are_those_of_the_layers_own_mask_rule(name: str, n: int) -> None:
    layer, s = new_layer(DESIGNS[name], n, CPU), torch.arange(n)
    if isinstance(layer, SparseAttention):
        mask = layer.pattern.mask(n)
    elif isinstance(layer, WindowAttention):
        mask = rule_mask(Window(layer.window, layer.n_sinks), s, s)
    else:
        mask = causal_mask(n, n)
    for t in range(n):
        assert torch.equal((s <= t) & DESIGNS[name].visible(n, t, s), mask[t])


@pytest.mark.parametrize("name", DESIGNS)
def test_the_reference_is_the_layers_naive_form(name: str) -> None:
    layer, x = new_layer(DESIGNS[name], 20, CPU), torch.randn(1, 20, SIZES.d_model)
    at = window.some_queries(20)
    assert at == list(range(20))
    torch.testing.assert_close(
        window.attend_in_layer(layer, x, DESIGNS[name], at), layer.naive(x), rtol=1e-4, atol=1e-5
    )


def test_of_a_long_text_the_ends_and_some_between_are_asked() -> None:
    at = window.some_queries(1000)
    assert at[0] == 0
    assert at[-1] == 999
    assert len(at) == window.SAMPLES + 2
    assert at == sorted(set(at))


def test_the_root_is_the_nearest() -> None:
    assert [window.root(n) for n in (1024, 2048, 4096, 8192, 16384)] == [32, 45, 64, 91, 128]


WRONG = {
    "window": lambda n: WindowAttention(16, 2, window=9),
    "longformer": lambda n: SparseAttention(16, 2, pattern="local(8) | global(2)"),
    "bigbird": lambda n: SparseAttention(
        16, 2, pattern="local(8, block=4) | global(4) | random(3, block=4, skip_first=1, skip_last=1, seed=1)"
    ),
    "strided": lambda n: SparseAttention(16, 2, pattern=f"local({window.root(n)}) | strided(5)"),
    "fixed": lambda n: SparseAttention(16, 2, pattern=f"fixed({window.root(n)}, summary=1)"),
    "window, sinks": lambda n: WindowAttention(16, 2, window=8, n_sinks=1),
    "window, sink logits": lambda n: WindowAttention(16, 2, window=7, sink_logits=True),
}


PARTS = [
    *((window.prefill_rows, name) for name in GROWN[1:]),
    (window.train_rows, "window"),
    (window.layer_rows, "window"),
    *((part, name) for part in (window.memory_rows, window.step_rows) for name in RINGS),
]


@pytest.mark.parametrize(("part", "name"), PARTS)
def test_a_wrong_design_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, part: Callable[[Sizes, torch.device], Any], name: str
) -> None:
    wrong = DESIGNS | {name: replace(DESIGNS[name], layer=WRONG[name])}
    monkeypatch.setattr(window, "designs", lambda sizes: wrong)
    with pytest.raises(AssertionError, match=rf"(?s)^{name}.*not close"):
        list(part(SIZES, CPU))


def test_wrong_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = WindowAttention.attend

    def no_gradient_for_keys(self: WindowAttention, q: Tensor, kv: KV) -> Tensor:
        return right(self, q, KV(kv.k.detach() + 0 * kv.k, kv.v, kv.positions))

    monkeypatch.setattr(WindowAttention, "attend", no_gradient_for_keys)
    with pytest.raises(AssertionError, match="window"):
        list(window.train_rows(SIZES, CPU))


def test_a_step_is_flat_or_misses_its_bar(seconds: dict[str, float]) -> None:
    seconds.update({"32 tokens": 1.0, "64 tokens": 1.11})
    grown = found(list(window.step_rows(SIZES, CPU)), "step_growth")
    assert {(row.details["name"], row.details["part"]): row.passed for row in grown} == {
        (name, part): None if name == "full" else False
        for name in window.STEPS
        for part in ("layer", "attention")
    }
    seconds["64 tokens"] = 1.09
    assert all(row.passed is not False for row in found(list(window.step_rows(SIZES, CPU)), "step_growth"))


def test_a_step_over_a_wrong_ring_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RingCache, "slots", lambda self, positions: positions % (self.window - 1))
    with pytest.raises(AssertionError, match="window, layer"):
        list(window.step_rows(SIZES, CPU))


def test_steps_at_their_length_see_full_rings() -> None:
    layer, x = new_layer(DESIGNS["window"], 32, CPU), torch.randn(1, 32, SIZES.d_model)
    calls = window.checked_steps("window", DESIGNS["window"], x)
    assert torch.equal(calls["layer"](), calls["layer"]())
    assert calls["attention"]().shape == (1, 2, 1, layer.head_dim)
    assert min(SIZES.steps) > SIZES.window + SIZES.n_sinks


def test_a_cache_that_allocates_more_misses_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SlotCache.__init__

    def wasteful(self: SlotCache, batch: int, n_heads: int, n_slots: int, *rest: Any) -> None:
        right(self, batch, n_heads, n_slots + 1, *rest)

    monkeypatch.setattr(SlotCache, "__init__", wasteful)
    missed = {
        (row.details["what"], row.details["name"]) for row in window.size_rows(SIZES, CPU) if not row.passed
    }
    assert missed == {("stored", name) for name in DESIGNS if name != "full"}


def test_bytes_that_nobody_reads_miss_their_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseAttention, "read_bytes", SparseAttention.cache_bytes)
    missed = {
        (row.details["what"], row.details["name"]) for row in window.size_rows(SIZES, CPU) if not row.passed
    }
    assert {("read", "bigbird"), ("read", "strided")} <= missed


def test_the_window_stores_what_it_attends_to_and_bigbird_nearly_everything() -> None:
    n, a_token = 64, 2 * 16 * 4
    stored = {
        row.details["name"]: row.measured
        for row in found(list(window.size_rows(SIZES, CPU)), "stored", length=n)
    }
    assert stored["full"] == n * a_token
    assert stored["window"] == stored["window, sink logits"] == 8 * a_token
    assert stored["window, sinks"] == (8 + 2) * a_token
    assert stored["longformer"] == (8 + 3) * a_token


def test_memory_over_a_long_prompt_is_held_to_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = found(list(window.memory_rows(SIZES, CPU)), "layer_memory", name="window")
    assert [row.details["way"] for row in rows] == ["without a cache", "into its ring"]
    assert all(row.passed for row in rows)
    tight = replace(SIZES, most=SIZES.long_prompt * SIZES.d_model)
    assert all(row.passed is False for row in found(list(window.memory_rows(tight, CPU)), "layer_memory"))


def test_the_memory_of_the_ring_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def into_ring() -> float:
        (row,) = found(
            list(window.memory_rows(SIZES, CPU)), "layer_memory", name="window", way="into its ring"
        )
        return row.measured

    lean = into_ring()
    right, held = WindowAttention.new_cache, 2**20

    def new_cache(self: WindowAttention, *given: Any, **named: Any) -> Any:
        cache = right(self, *given, **named)
        cache.more = torch.zeros(held // 4)  # type: ignore[attr-defined]
        return cache

    monkeypatch.setattr(WindowAttention, "new_cache", new_cache)
    assert into_ring() == lean + held


def test_choosers_are_timed_beside_full_attention_as_they_are_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [name for name in sparse.OPTIONS if name in REGISTRY]
    assert names[:2] == ["full", "moba"]
    rows = list(sparse.step_rows(sparse.SMALL, CPU))
    assert [row.details["name"] for row in found(rows, "chosen_time", length=64)] == names
    (moba,) = found(rows, "chosen_speedup", name="moba", length=64)
    assert moba.details["by_bytes"] > 1
    monkeypatch.setattr(sparse, "REGISTRY", {"full": REGISTRY["full"]})
    assert [row.details["name"] for row in sparse.step_rows(sparse.SMALL, CPU)] == ["full", "full"]


def test_a_chooser_that_reads_something_else_in_a_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = REGISTRY["moba"].forward

    def forward(self: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        return right(self, x, *rest) * (1.1 if x.shape[1] == 1 else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(REGISTRY["moba"], "forward", forward)
    with pytest.raises(AssertionError, match="moba"):
        list(sparse.step_rows(sparse.SMALL, CPU))
