"""The benchmark ``shared`` at a small size: what it measures, and that results are checked first."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from bench_tools import shown_times
from torch import Tensor

from kvlearn.attention import GroupedQueryAttention
from kvlearn.bench import common, compressed, shared
from kvlearn.measure import Comparison
from kvlearn.measure.results import Row
from kvlearn.measure.steps import filled_cache, last_token

CPU = torch.device("cpu")
SIZES = shared.SMALL
SHAPES = SIZES.shapes


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    return shown_times(monkeypatch, shared, compressed)


def found(measured: list[Row], what: str, **details: Any) -> list[Row]:
    wanted = {"what": what, **details}.items()
    return [row for row in measured if wanted <= row.details.items()]


def test_every_part_is_measured_and_every_bar_of_the_issue_is_held(seconds: dict[str, float]) -> None:
    seconds.update({"absorbed": 0.05, "mha": 3.0, "gqa 4x, mean": 6.0})
    measured = list(common.run("shared", small=True))
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
        **{("stored", name): True for name in SIZES.mechanisms},
        **{("times_less", name): True for name in ("gqa 4x", "mqa", "cla2", "mhc 8x")},
        ("grouped_layer_speedup", "gqa"): True,
        ("road_speedup", "naive"): True,
        ("road_memory", "absorbed"): True,
        ("conversion", "gqa 4x, mean"): False,
        ("conversion", "mhc 8x, activations"): True,
    }


def test_stored_and_read_differ_where_layers_share(seconds: dict[str, float]) -> None:
    measured = list(shared.cache_rows(SIZES, CPU))
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
        (row.details["name"], row.details["what"])
        for row in shared.cache_rows(SIZES, CPU)
        if row.passed is False
    }
    assert missed == {(name, what) for name in ("gqa 4x", "mqa") for what in ("stored", "times_less")}


def test_the_bar_is_compared_with_the_best_naive_path(seconds: dict[str, float]) -> None:
    seconds.update({"absorbed": 1.0, "naive": 30.0, "naive, one product": 9.0, "naive, in pieces": 20.0})
    (ratio,) = found(list(compressed.step_rows(compressed.SMALL, CPU)), "road_speedup")
    assert ratio.details["name"] == "naive, one product"
    assert (ratio.measured, ratio.bar, ratio.passed) == (9, 10, False)


def test_the_absorbed_step_holds_no_decompressed_heads(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    n_heads, head_dim, scores = 3, 8, 3 * 512 * 4

    def peaks() -> dict[str, Row]:
        return {
            row.details["name"]: row
            for row in found(list(compressed.step_rows(compressed.SMALL, CPU)), "road_memory")
        }

    honest = peaks()
    assert honest["absorbed"].bar == 3 * scores
    assert n_heads * head_dim * 4 <= honest["absorbed"].measured <= 3 * scores  # small as it is, it is seen
    assert honest["naive"].measured > 2 * head_dim * scores
    monkeypatch.setattr(compressed, "absorbed_attention", compressed.naive_attention)
    assert peaks()["absorbed"].passed is False


@pytest.mark.parametrize("form", [*compressed.naive_forms(100), "absorbed"])
def test_every_path_gives_what_the_equation_gives(seconds: dict[str, float], form: str) -> None:
    given = compressed.draw(compressed.SMALL.step, 511, 1, CPU)
    call = {**compressed.naive_forms(100), "absorbed": compressed.absorbed_attention}[form]
    common.agree({form: lambda: call(*given)}, compressed.exact(given))
    turned = given._replace(q=given.q.flip(1))
    with pytest.raises(AssertionError, match=form):
        common.agree({form: lambda: call(*given)}, compressed.exact(turned))


@pytest.mark.parametrize("form", ["naive_attention", "absorbed_attention"])
@pytest.mark.parametrize("part", ["step_rows", "chunk_rows"])
def test_a_wrong_path_is_not_timed(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch, form: str, part: str
) -> None:
    right = getattr(compressed, form)
    monkeypatch.setattr(compressed, form, lambda *given: right(*given) * 1.1)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        list(getattr(compressed, part)(compressed.SMALL, CPU))


@pytest.mark.parametrize("part", ["core_rows", "prompt_rows"])
def test_a_wrong_form_to_share_heads_is_not_timed(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    right = shared.causal_attention

    def of_another_pool(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        return right(q, k.roll(1, dims=1) if k.shape[1] == 2 else k, v, positions)

    monkeypatch.setattr(shared, "causal_attention", of_another_pool)
    with pytest.raises(AssertionError, match="gqa, grouped"):
        list(getattr(shared, part)(SHAPES[0], SIZES, CPU))


def test_full_attention_with_copied_heads_answers_as_the_pools(seconds: dict[str, float]) -> None:
    few = GroupedQueryAttention(24, 6, n_kv_heads=2)
    many = GroupedQueryAttention(24, 6, n_kv_heads=6)
    x = torch.randn(2, 5, 24)
    assert not torch.allclose(few(x), many(x), atol=1e-4)
    shared.copy_heads(few, many)
    torch.testing.assert_close(few(x), many(x))


def test_layers_that_answer_differently_are_not_timed(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "copy_heads", lambda few, many: None)
    with pytest.raises(AssertionError, match="gqa"):
        list(shared.layer_rows(SHAPES[0], SIZES, CPU))


def test_the_speed_up_is_beside_what_the_bytes_allow(seconds: dict[str, float]) -> None:
    seconds.update({"mha": 4.0, "gqa": 2.0})
    measured = list(shared.layer_rows(SHAPES[0], SIZES, CPU))
    (ratio,) = found(measured, "grouped_layer_speedup", name="gqa")
    assert (ratio.measured, ratio.bar) == (2, 2)
    moved = {row.details["name"]: row.details["bytes"] for row in found(measured, "grouped_layer")}
    assert ratio.details["by_bytes"] == moved["mha"] / moved["gqa"] > 1
    (plain,) = found(list(shared.layer_rows(SHAPES[1], SIZES, CPU)), "grouped_layer_speedup", name="gqa")
    assert plain.bar is None


def test_the_crossing_is_found_between_two_measurements() -> None:
    assert compressed.crossing({1: 4.0, 64: 2.0, 256: 0.5}) == pytest.approx(128)
    assert compressed.crossing({256: 0.5, 64: 2.0}) == pytest.approx(128)
    assert compressed.crossing({1: 4.0, 64: 2.0}) is None
    assert compressed.crossing({1: 0.9, 64: 0.5}) is None


def test_both_crossovers_are_reported(seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = iter([4.0, 2.0, 0.5])

    def compare(fns: Mapping[str, Callable[[], Tensor]], *, rounds: int) -> Comparison:
        return Comparison({"naive": (next(ratios),), "absorbed": (1.0,)})

    monkeypatch.setattr(compressed, "compare", compare)
    formula, measured = found(
        list(compressed.chunk_rows(replace(compressed.SMALL, new=(1, 2, 8)), CPU)), "crossover"
    )
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
        list(shared.conversion_rows(SIZES, CPU))


def test_the_last_step_sees_a_full_cache() -> None:
    layer = GroupedQueryAttention.tiny()
    cache = filled_cache(layer, 2, 5)
    assert cache.length == 4
    assert all((tensor != 0).all() for tensor in cache.tensors())
    assert last_token(layer, 2, 5)().shape == (2, 1, layer.d_model)
