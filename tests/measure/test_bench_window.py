"""The benchmark ``window`` at a size where it takes no time: what it measures, and that it checks before."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from bench_tools import small_and_timed
from torch import Tensor, nn

from kvlearn.attention import KV, REGISTRY, RingCache, SlotCache, SparseAttention, WindowAttention
from kvlearn.attention.core import attention, causal_mask, rule_mask
from kvlearn.attention.window import Window
from kvlearn.bench.common import run as run_benchmark
from kvlearn.measure import Comparison
from kvlearn.measure.results import Row
from kvlearn.measure.shared_bench import growth
from kvlearn.measure.window_bench import chosen, designs, layers, reference, scaling, sizes, steps
from kvlearn.measure.window_bench.designs import DESIGNS, WITH_SINKS, new_layer

CPU = torch.device("cpu")
SMALL: dict[Any, dict[str, Any]] = {
    designs: {
        "D_MODEL": 16,
        "N_HEADS": 2,
        "WINDOW": 8,
        "N_SINKS": 2,
        "N_GLOBAL": 3,
        "BLOCK": 4,
        "SUMMARY": 2,
    },
    scaling: {"LENGTHS": (16, 32, 64, 128)},
    layers: {"LENGTH": 40, "LONG": 48},
    steps: {"LENGTHS": (32, 64)},
    sizes: {"LENGTHS": (64, 81)},
    chosen: {
        "LENGTHS": (32, 64),
        "CHUNK": 16,
        "OPTIONS": {
            "full": {},
            "moba": {"block": 8, "n_blocks": 2},
            "nsa": {"compress": 8, "stride": 4, "block": 8, "n_blocks": 4, "n_local": 1, "window": 8},
            "dsa": {"top_k": 16, "index_heads": 16, "index_dim": 16},
            "csa": {"window": 8, "top_k": 8, "index_heads": 16, "index_dim": 16},
            "hca": {"window": 8, "rate": 16},
        },
    },
}
EVERYONE = {**DESIGNS, **WITH_SINKS}


@pytest.fixture(autouse=True)
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    return small_and_timed(monkeypatch, SMALL)


def grows(seconds: dict[str, float], name: str, power: float) -> None:
    """Let the time of a design grow as this power of the length."""
    seconds.update({growth.label(name, n): n**power for n in scaling.LENGTHS})


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
    measured = list(run_benchmark("window", "cpu"))
    assert {row.details["what"] for row in measured} == {
        *("stored", "read", "step_time", "step_growth", "chosen_time", "chosen_speedup", "prefill_speedup"),
        *("prefill_time", "prefill_memory", "prefill_time_exponent", "prefill_memory_exponent"),
        *("train_time", "train_memory", "train_time_exponent", "train_memory_exponent"),
        *("layer_time", "layer_speedup", "layer_memory"),
    }
    barred = {(row.details["what"], row.details["name"]) for row in measured if row.bar is not None}
    assert barred == {
        *(("stored", name) for name in EVERYONE),
        *(("read", name) for name in EVERYONE),
        *(("step_growth", name) for name in ("window", *WITH_SINKS)),
        *(("prefill_time_exponent", name) for name in DESIGNS if name != "full"),
        *(("prefill_memory_exponent", name) for name in ("window", "longformer", "bigbird")),
        *(("train_time_exponent", "window"), ("train_memory_exponent", "window")),
        ("prefill_speedup", "window"),
        *(("layer_memory", name) for name in ("window", *WITH_SINKS)),
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
    assert growth.exponent(amounts, least=32) == pytest.approx(1.5)
    (row,) = found(list(scaling.train_rows(CPU)), "train_time_exponent")
    assert row.details["fitted"] == [32, 64, 128]


def test_an_exponent_has_the_spread_of_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(fns: Mapping[str, Callable[[], Tensor]], *, rounds: int) -> Comparison:
        lengths = dict(zip(fns, scaling.LENGTHS, strict=True))
        return Comparison(
            {name: tuple(n**p for p in (1.0, 1.1, 1.2, 1.3, 1.4)) for name, n in lengths.items()}
        )

    monkeypatch.setattr(scaling, "compare", compare)
    (row,) = found(list(scaling.train_rows(CPU)), "train_time_exponent")
    assert row.spread is not None
    assert (row.measured, row.spread.q1, row.spread.q3) == pytest.approx((1.2, 1.1, 1.3))
    assert row.passed is False


def test_the_speedup_of_a_window_is_full_attentions_time_over_its_own(seconds: dict[str, float]) -> None:
    seconds[growth.label("full", 128)] = 4.9
    (row,) = found(list(scaling.prefill_rows(CPU)), "prefill_speedup", name="window")
    assert (row.measured, row.bar, row.passed) == (pytest.approx(4.9), 5, False)


def test_memory_that_grows_with_the_square_misses_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    def dense(self: WindowAttention, q: Tensor, kv: KV) -> Tensor:
        n = torch.arange(q.shape[2])
        return attention(q, kv.k, kv.v, rule_mask(Window(self.window, self.n_sinks), n, n))

    def power() -> Row:
        (row,) = found(list(scaling.train_rows(CPU)), "train_memory_exponent")
        return row

    monkeypatch.setattr(scaling, "LENGTHS", (256, 512, 1024))
    assert power().passed
    monkeypatch.setattr(WindowAttention, "attend", dense)
    assert power().passed is False


@pytest.mark.parametrize("name", EVERYONE)
@pytest.mark.parametrize("n", [7, 50])
def test_the_visible_keys_are_those_of_the_layers_own_mask_rule(name: str, n: int) -> None:
    layer, s = new_layer(EVERYONE[name], n, CPU), torch.arange(n)
    if isinstance(layer, SparseAttention):
        mask = layer.pattern.mask(n)
    elif isinstance(layer, WindowAttention):
        mask = rule_mask(Window(layer.window, layer.n_sinks), s, s)
    else:
        mask = causal_mask(n, n)
    for t in range(n):
        assert torch.equal((s <= t) & EVERYONE[name].visible(n, t, s), mask[t])


@pytest.mark.parametrize("name", EVERYONE)
def test_the_reference_is_the_layers_naive_form(name: str) -> None:
    layer, x = new_layer(EVERYONE[name], 20, CPU), torch.randn(1, 20, designs.D_MODEL)
    at = reference.some_queries(20)
    assert at == list(range(20))
    torch.testing.assert_close(
        reference.attend_in_layer(layer, x, EVERYONE[name], at), layer.naive(x), rtol=1e-4, atol=1e-5
    )


def test_of_a_long_text_the_ends_and_some_between_are_asked() -> None:
    at = reference.some_queries(1000)
    assert at[0] == 0
    assert at[-1] == 999
    assert len(at) == reference.SAMPLES + 2
    assert at == sorted(set(at))


def test_the_root_is_the_nearest() -> None:
    assert [designs.root(n) for n in (1024, 2048, 4096, 8192, 16384)] == [32, 45, 64, 91, 128]


WRONG = {
    "window": lambda n: WindowAttention(16, 2, window=9),
    "longformer": lambda n: SparseAttention(16, 2, pattern="local(8) | global(2)"),
    "bigbird": lambda n: SparseAttention(
        16, 2, pattern="local(8, block=4) | global(4) | random(3, block=4, skip_first=1, skip_last=1, seed=1)"
    ),
    "strided": lambda n: SparseAttention(16, 2, pattern=f"local({designs.root(n)}) | strided(5)"),
    "fixed": lambda n: SparseAttention(16, 2, pattern=f"fixed({designs.root(n)}, summary=1)"),
    "window, sinks": lambda n: WindowAttention(16, 2, window=8, n_sinks=1),
    "window, sink logits": lambda n: WindowAttention(16, 2, window=7, sink_logits=True),
}


PARTS = [
    *((scaling.prefill_rows, name) for name in DESIGNS if name != "full"),
    (scaling.train_rows, "window"),
    (layers.layer_rows, "window"),
    *((part, name) for part in (layers.memory_rows, steps.step_rows) for name in ("window", *WITH_SINKS)),
]


@pytest.mark.parametrize(("part", "name"), PARTS)
def test_a_wrong_design_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, part: Callable[[torch.device], Any], name: str
) -> None:
    for table in (DESIGNS, WITH_SINKS, steps.STEPS):
        if name in table:
            monkeypatch.setitem(table, name, replace(table[name], layer=WRONG[name]))
    with pytest.raises(AssertionError, match=rf"(?s)^{name}.*not close"):
        list(part(CPU))


def test_wrong_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = WindowAttention.attend

    def no_gradient_for_keys(self: WindowAttention, q: Tensor, kv: KV) -> Tensor:
        return right(self, q, KV(kv.k.detach() + 0 * kv.k, kv.v, kv.positions))

    monkeypatch.setattr(WindowAttention, "attend", no_gradient_for_keys)
    with pytest.raises(AssertionError, match="window"):
        list(scaling.train_rows(CPU))


def test_a_step_is_flat_or_misses_its_bar(seconds: dict[str, float]) -> None:
    seconds.update({"32 tokens": 1.0, "64 tokens": 1.11})
    grown = found(list(steps.step_rows(CPU)), "step_growth")
    assert {(row.details["name"], row.details["part"]): row.passed for row in grown} == {
        (name, part): None if name == "full" else False
        for name in steps.STEPS
        for part in ("layer", "attention")
    }
    seconds["64 tokens"] = 1.09
    assert all(row.passed is not False for row in found(list(steps.step_rows(CPU)), "step_growth"))


def test_a_step_over_a_wrong_ring_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RingCache, "slots", lambda self, positions: positions % (self.window - 1))
    with pytest.raises(AssertionError, match="window, layer"):
        list(steps.step_rows(CPU))


def test_steps_at_their_length_see_full_rings() -> None:
    layer, x = new_layer(DESIGNS["window"], 32, CPU), torch.randn(1, 32, designs.D_MODEL)
    calls = steps.checked_steps("window", DESIGNS["window"], x)
    assert torch.equal(calls["layer"](), calls["layer"]())
    assert calls["attention"]().shape == (1, 2, 1, layer.head_dim)
    assert min(steps.LENGTHS) > designs.WINDOW + designs.N_SINKS


def test_a_cache_that_allocates_more_misses_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SlotCache.__init__

    def wasteful(self: SlotCache, batch: int, n_heads: int, n_slots: int, *rest: Any) -> None:
        right(self, batch, n_heads, n_slots + 1, *rest)

    monkeypatch.setattr(SlotCache, "__init__", wasteful)
    missed = {(row.details["what"], row.details["name"]) for row in sizes.size_rows(CPU) if not row.passed}
    assert missed == {("stored", name) for name in EVERYONE if name != "full"}


def test_bytes_that_nobody_reads_miss_their_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseAttention, "read_bytes", SparseAttention.cache_bytes)
    missed = {(row.details["what"], row.details["name"]) for row in sizes.size_rows(CPU) if not row.passed}
    assert {("read", "bigbird"), ("read", "strided")} <= missed


def test_the_window_stores_what_it_attends_to_and_bigbird_nearly_everything() -> None:
    n, a_token = 64, 2 * 16 * 4
    stored = {
        row.details["name"]: row.measured for row in found(list(sizes.size_rows(CPU)), "stored", length=n)
    }
    assert stored["full"] == n * a_token
    assert stored["window"] == stored["window, sink logits"] == 8 * a_token
    assert stored["window, sinks"] == (8 + 2) * a_token
    assert stored["longformer"] == (8 + 3) * a_token


def test_memory_over_a_long_prompt_is_held_to_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = found(list(layers.memory_rows(CPU)), "layer_memory", name="window")
    assert [row.details["way"] for row in rows] == ["without a cache", "into its ring"]
    assert all(row.passed for row in rows)
    monkeypatch.setattr(layers, "MOST", layers.LONG * designs.D_MODEL)
    assert all(row.passed is False for row in found(list(layers.memory_rows(CPU)), "layer_memory"))


def test_the_memory_of_the_ring_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def into_ring() -> float:
        (row,) = found(list(layers.memory_rows(CPU)), "layer_memory", name="window", way="into its ring")
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
    names = [name for name in chosen.OPTIONS if name in REGISTRY]
    assert names[:2] == ["full", "moba"]
    rows = list(chosen.step_rows(CPU))
    assert [row.details["name"] for row in found(rows, "chosen_time", length=64)] == names
    (moba,) = found(rows, "chosen_speedup", name="moba", length=64)
    assert moba.details["by_bytes"] > 1
    for name in names[1:]:
        monkeypatch.delitem(REGISTRY, name)
    assert [row.details["name"] for row in chosen.step_rows(CPU)] == ["full", "full"]


def test_a_chooser_that_reads_something_else_in_a_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = REGISTRY["moba"].forward

    def forward(self: nn.Module, x: Tensor, *rest: Any) -> Tensor:
        return right(self, x, *rest) * (1.1 if x.shape[1] == 1 else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(REGISTRY["moba"], "forward", forward)
    with pytest.raises(AssertionError, match="moba"):
        list(chosen.step_rows(CPU))
