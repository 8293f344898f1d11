"""The benchmark ``shared`` at a size where it takes no time: what it measures, and that it checks before."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlearn.attention import GroupedQueryAttention
from kvlearn.bench.common import run as run_benchmark
from kvlearn.measure import Comparison
from kvlearn.measure.bench import shared
from kvlearn.measure.results import Row
from kvlearn.measure.shared_bench import grouped, roads, rows
from kvlearn.measure.steps import filled_cache, last_token

CPU = torch.device("cpu")
SMALL: dict[Any, dict[str, Any]] = {
    grouped: {"LENGTH": 8, "PROMPT": 6, "SHAPES": (grouped.Shape(24, 6, 2, bar=2), grouped.Shape(16, 4, 2))},
    roads: {
        "LENGTH": 512,  # what does not grow with it no longer counts
        "PIECE": 100,
        "NEW": (1, 2, 9),
        "STEP": roads.Shape(rank=6, n_heads=3, head_dim=8, rope_dim=4),
        "CHUNKS": roads.Shape(rank=16, n_heads=2, head_dim=8, rope_dim=4),
    },
    shared: {
        "LENGTH": 8,
        "TEXT": (4, 128),
        "MODEL": {"d_model": 64, "n_heads": 32, "n_layers": 2},
        "DESIGNS": {
            **{name: shared.DESIGNS[name] for name in ("full", "gqa 4x", "mqa", "cla2")},
            "mhc 8x": ((shared.Spec("mhc", rank=12, rope_dim=4),), 8),
            "mla": ((shared.Spec("mla", rank=8, rope_dim=2),), None),
        },
    },
}


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Small sizes, and a clock that shows what stands here under a contestant's name: else one second."""
    shown: dict[str, float] = {}

    def compare(fns: Mapping[str, Callable[[], Tensor]], *, rounds: int) -> Comparison:
        for fn in fns.values():
            fn()
        return Comparison({name: rounds * (shown.get(name, 1.0),) for name in fns})

    for module, values in SMALL.items():
        monkeypatch.setattr(module, "compare", compare)
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    return shown


def found(measured: list[Row], what: str, **details: Any) -> list[Row]:
    wanted = {"what": what, **details}.items()
    return [row for row in measured if wanted <= row.details.items()]


def test_every_part_is_measured_and_every_bar_of_the_issue_is_held(seconds: dict[str, float]) -> None:
    seconds.update({"absorbed": 0.05, "mha": 3.0, "gqa 4x, mean": 6.0})
    measured = list(run_benchmark("shared", "cpu"))
    assert {row.details["what"] for row in measured} == {
        *("stored", "read", "times_less"),
        *("grouped_layer", "grouped_layer_speedup", "grouped_core", "grouped_core_speedup"),
        *("grouped_prompt", "grouped_prompt_speedup"),
        *("road_time", "road_speedup", "road_memory", "layer_time", "layer_speedup"),
        *("chunk_time", "chunk_speedup", "crossover", "conversion"),
    }
    barred = {
        (row.details["what"], row.details["name"]): row.passed for row in measured if row.bar is not None
    }
    assert barred == {
        **{("stored", name): True for name in shared.DESIGNS},
        **{("times_less", name): True for name in ("gqa 4x", "mqa", "cla2", "mhc 8x")},
        ("grouped_layer_speedup", "gqa"): True,
        ("road_speedup", "naive"): True,
        ("road_memory", "absorbed"): True,
        ("conversion", "gqa 4x, mean"): False,
        ("conversion", "mhc 8x, activations"): True,
    }


def test_stored_and_read_differ_where_layers_share(seconds: dict[str, float]) -> None:
    measured = list(shared.cache_rows(CPU))
    full, pooled, paired = (
        {row.details["what"]: row.measured for row in measured if row.details["name"] == name}
        for name in ("full", "gqa 4x", "cla2")
    )
    assert full == {"stored": 2 * 2 * 64 * 8 * 2, "read": 2 * 2 * 64 * 8 * 2}
    assert pooled == {"stored": full["stored"] / 4, "read": full["read"] / 4, "times_less": 4}
    assert paired == {"stored": full["stored"] / 2, "read": full["read"], "times_less": 2}


def test_a_cache_that_allocates_more_misses_its_bars(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = GroupedQueryAttention.new_cache

    def wasteful(self: GroupedQueryAttention, batch: int, n: int, *rest: Any) -> Any:
        return honest(self, batch, n + (self.name == "gqa"), *rest)

    monkeypatch.setattr(GroupedQueryAttention, "new_cache", wasteful)
    missed = {
        (row.details["name"], row.details["what"]) for row in shared.cache_rows(CPU) if row.passed is False
    }
    assert missed == {(name, what) for name in ("gqa 4x", "mqa") for what in ("stored", "times_less")}


def test_the_bar_is_held_against_the_best_naive_road(seconds: dict[str, float]) -> None:
    seconds.update({"absorbed": 1.0, "naive": 30.0, "naive, one product": 9.0, "naive, in pieces": 20.0})
    (ratio,) = found(list(roads.step_rows(CPU)), "road_speedup")
    assert ratio.details["name"] == "naive, one product"
    assert (ratio.measured, ratio.bar, ratio.passed) == (9, 10, False)


def test_the_absorbed_step_holds_no_decompressed_heads(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    n_heads, head_dim, scores = 3, 8, 3 * 512 * 4

    def peaks() -> dict[str, Row]:
        return {row.details["name"]: row for row in found(list(roads.step_rows(CPU)), "road_memory")}

    honest = peaks()
    assert honest["absorbed"].bar == 3 * scores
    assert n_heads * head_dim * 4 <= honest["absorbed"].measured <= 3 * scores  # small as it is, it is seen
    assert honest["naive"].measured > 2 * head_dim * scores
    monkeypatch.setattr(roads, "absorbed_attention", roads.naive_attention)
    assert peaks()["absorbed"].passed is False


@pytest.mark.parametrize("way", [*roads.NAIVE, "absorbed"])
def test_every_road_gives_what_the_equation_gives(seconds: dict[str, float], way: str) -> None:
    given = roads.draw(roads.STEP, 511, 1, CPU)
    call = {**roads.NAIVE, "absorbed": roads.absorbed_attention}[way]
    rows.agree({way: lambda: call(*given)}, roads.exact(given))
    turned = given._replace(q=given.q.flip(1))
    with pytest.raises(AssertionError, match=way):
        rows.agree({way: lambda: call(*given)}, roads.exact(turned))


@pytest.mark.parametrize("way", ["naive_attention", "absorbed_attention"])
@pytest.mark.parametrize("part", ["step_rows", "chunk_rows"])
def test_a_wrong_road_is_not_timed(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch, way: str, part: str
) -> None:
    right = getattr(roads, way)
    monkeypatch.setattr(roads, way, lambda *given: right(*given) * 1.1)
    monkeypatch.setitem(roads.NAIVE, "naive", roads.naive_attention)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        list(getattr(roads, part)(CPU))


@pytest.mark.parametrize("part", ["core_rows", "prompt_rows"])
def test_a_wrong_way_to_share_heads_is_not_timed(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    right = grouped.causal_attention

    def of_another_pool(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        return right(q, k.roll(1, dims=1) if k.shape[1] == 2 else k, v, positions)

    monkeypatch.setattr(grouped, "causal_attention", of_another_pool)
    with pytest.raises(AssertionError, match="gqa, grouped"):
        list(getattr(grouped, part)(grouped.SHAPES[0], CPU))


def test_full_attention_with_copied_heads_answers_as_the_pools(seconds: dict[str, float]) -> None:
    few = GroupedQueryAttention(24, 6, n_kv_heads=2)
    many = GroupedQueryAttention(24, 6, n_kv_heads=6)
    x = torch.randn(2, 5, 24)
    assert not torch.allclose(few(x), many(x), atol=1e-4)
    grouped.copy_heads(few, many)
    torch.testing.assert_close(few(x), many(x))


def test_layers_that_answer_differently_are_not_timed(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "copy_heads", lambda few, many: None)
    with pytest.raises(AssertionError, match="gqa"):
        list(grouped.layer_rows(grouped.SHAPES[0], CPU))


def test_the_speed_up_stands_beside_what_the_bytes_allow(seconds: dict[str, float]) -> None:
    seconds.update({"mha": 4.0, "gqa": 2.0})
    measured = list(grouped.layer_rows(grouped.SHAPES[0], CPU))
    (ratio,) = found(measured, "grouped_layer_speedup", name="gqa")
    assert (ratio.measured, ratio.bar) == (2, 2)
    moved = {row.details["name"]: row.details["bytes"] for row in found(measured, "grouped_layer")}
    assert ratio.details["by_bytes"] == moved["mha"] / moved["gqa"] > 1
    (plain,) = found(list(grouped.layer_rows(grouped.SHAPES[1], CPU)), "grouped_layer_speedup", name="gqa")
    assert plain.bar is None


def test_the_crossing_is_found_between_two_measurements() -> None:
    assert roads.crossing({1: 4.0, 64: 2.0, 256: 0.5}) == pytest.approx(128)
    assert roads.crossing({256: 0.5, 64: 2.0}) == pytest.approx(128)
    assert roads.crossing({1: 4.0, 64: 2.0}) is None
    assert roads.crossing({1: 0.9, 64: 0.5}) is None


def test_both_crossovers_are_reported(seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = iter([4.0, 2.0, 0.5])

    def compare(fns: Mapping[str, Callable[[], Tensor]], *, rounds: int) -> Comparison:
        return Comparison({"naive": (next(ratios),), "absorbed": (1.0,)})

    monkeypatch.setattr(roads, "compare", compare)
    monkeypatch.setattr(roads, "NEW", (1, 2, 8))
    formula, measured = found(list(roads.chunk_rows(CPU)), "crossover")
    assert formula.measured == 16 * (8 + 8) / (2 * 16 - 8 - 8)
    assert measured.measured == pytest.approx(4)


def test_a_conversion_that_loses_what_it_need_not_is_not_timed(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = shared.convert

    def lossy(model: Any, layers: Any, *, init: str, **options: Any) -> Any:
        return honest(model, layers, init="first" if init == "mean" else "random", **options)

    monkeypatch.setattr(shared, "convert", lossy)
    with pytest.raises(AssertionError, match="mhc"):
        list(shared.conversion_rows(CPU))


def test_the_last_step_sees_a_full_cache() -> None:
    layer = GroupedQueryAttention.tiny()
    cache = filled_cache(layer, 2, 5)
    assert cache.length == 4
    assert all((tensor != 0).all() for tensor in cache.tensors())
    assert last_token(layer, 2, 5)().shape == (2, 1, layer.d_model)
