"""Unit 12 takes right answers of every style, gives points for half of one, and counts a decoder."""

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from answers import earned, full_marks, right, stub, unit_module

from kvlearn import workbench
from kvlearn.grading import check, find_exercise
from kvlearn.measure.cache_size import cache_bytes, read_bytes
from kvlearn.measure.models import MODELS

pytestmark = pytest.mark.answers

CHECKS = unit_module("12_measurements", "checks")
MODEL = find_exercise("12.7")


def ours(exercise: str) -> tuple[Any, ...]:
    return right(find_exercise(exercise))


# 12.1


def test_bytes_may_be_counted_by_tensors_and_binomials() -> None:
    def step_bytes(config: Any, lengths: list[int]) -> list[Any]:
        types = config.get("layer_types", ["full_attention"] * config["num_hidden_layers"])
        weights = np.float64(config["hidden_size"]) * config["vocab_size"] + config["parameters"]["other"]
        if "num_local_experts" in config:
            E, k = config["num_local_experts"], config["num_experts_per_tok"]
            missed = Fraction(math.comb(E - 1, k), math.comb(E, k)) ** len(lengths)
            weights += float(config["parameters"]["experts"] * (1 - missed))
        each = 2 * config["num_key_value_heads"] * config["head_dim"]
        if "kv_lora_rank" in config:
            each = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        n = torch.tensor(lengths)
        seen = [n.clamp(max=config["sliding_window"]) if kind[0] == "s" else n for kind in types]
        cached = getattr(torch, config.get("cache_dtype") or config["torch_dtype"]).itemsize
        return [weights * getattr(torch, config["torch_dtype"]).itemsize, sum(seen).sum() * each * cached]

    assert full_marks("12.1", step_bytes, ours("12.1")[1])
    assert full_marks("12.1", CHECKS.library_step, CHECKS.library_stored)


def test_bytes_may_be_rounded_to_whole_ones() -> None:
    step, stored = ours("12.1")
    assert full_marks("12.1", lambda *a: tuple(map(int, step(*a))), stored)
    to_bytes, users, price = ours("12.4")
    assert full_marks("12.4", lambda quantity: int(to_bytes(quantity)), users, price)


def test_one_of_the_two_functions_earns_its_part() -> None:
    step, stored = ours("12.1")
    assert earned(check("12.1", step, stub)) == [1, 1, 0, 0, 0, 0, 0, 0]
    assert earned(check("12.1", stub, stored)) == [0] * 8
    assert earned(check("12.1", lambda *a: step(*a)[::-1], stored)) == [0] * 8


@pytest.mark.parametrize("name", ["Llama 3.1 8B", "Mistral 7B v0.1"])
def test_the_cache_of_a_real_model_is_the_courses(name: str) -> None:
    shape = MODELS[name]
    layer = shape.layer(0)
    config = {
        "num_hidden_layers": shape.n_layers,
        "hidden_size": 8,
        "vocab_size": 8,
        "tie_word_embeddings": True,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "torch_dtype": "bfloat16",
        "parameters": {"other": 0},
    }
    if layer.window:
        kinds = ["sliding_attention"] * shape.n_layers
        config |= {"layer_types": kinds, "sliding_window": layer.window}
    step, stored = ours("12.1")
    assert step(config, [10_000])[1] == read_bytes(shape, 10_000)
    assert stored(config, 3, 10_000)[1] == cache_bytes(shape, 10_000, batch=3)


# 12.2


def test_a_roofline_may_be_an_array() -> None:
    work, place, _ = ours("12.2")

    def step_seconds(layers: Any, length: int, batch: int, parameters: int, device: Any) -> Any:
        parts = [(2 * parameters * batch, 2 * parameters)]
        parts += [tuple(batch * each for each in work(layer, length)) for layer in layers]
        flops, nbytes = np.array(parts, dtype=float).T
        return np.maximum(flops / device["flops"], nbytes / device["bandwidth"]).sum()

    assert full_marks("12.2", lambda *a: list(map(np.int64, work(*a))), place, step_seconds)


def test_work_without_latents_and_states_earns_the_rest() -> None:
    work, place, step_seconds = ours("12.2")

    def heads_only(layer: Any, length: int) -> Any:
        return work({**layer, "window": layer.get("window")}, length) if layer["kind"] == "heads" else (0, 1)

    assert earned(check("12.2", heads_only, place, step_seconds)) == [1, 1, 0, 0, 2, 2]
    assert earned(check("12.2", work, stub, stub)) == [1, 1, 1, 1, 0, 0]


# 12.3


def test_cards_may_be_sorted_and_every_batch_tried() -> None:
    fastest, _ = ours("12.3")

    def flip(job: Any, tokens: int, a: Any, b: Any, most: int) -> Any:
        winners = [fastest(job, n, tokens, {"x": a, "y": b})[0] for n in range(1, most + 1)]
        for n, winner in enumerate(winners):
            if winner is None:
                return None
            if winner != winners[0]:
                return torch.tensor(n + 1)
        return None

    assert full_marks("12.3", CHECKS.fastest_reference, flip)
    assert earned(check("12.3", fastest, lambda *a: None)) == [1, 1, 1, 2, 0]
    assert earned(check("12.3", lambda *a: (fastest(*a)[0], "bandwidth"), flip))[:3] == [1, 0, 0]


# 12.4


def test_users_may_be_counted_one_by_one() -> None:
    _, _, price = ours("12.4")

    def to_bytes(quantity: Any) -> Any:
        if not isinstance(quantity, str):
            return quantity
        amount, unit = quantity.split(" ")
        return float(Decimal(amount) * CHECKS.UNITS[unit])

    def users(gpu: Any, model: Any, limit: float | None = None) -> Any:
        n, bound, _ = CHECKS.users_reference(gpu, model, limit)
        return [np.int32(n), bound]

    assert full_marks("12.4", to_bytes, users, price)
    assert full_marks("12.4", to_bytes, CHECKS.library_users, price)
    assert earned(check("12.4", to_bytes, stub, stub)) == [1, 0, 0, 0, 0]
    assert earned(check("12.4", to_bytes, lambda g, m, limit=None: users(g, m), price)) == [1, 1, 1, 0, 2]


# 12.5


def polyfit(n: Any, t: Any) -> Any:
    (slope, _), covariance = np.polyfit(np.log(n), np.log(t), 1, cov=True)
    return slope, np.sqrt(covariance[0, 0])


def at_crossings(n: Any, t: Any, noise: float, candidates: Any) -> Any:
    """The best a is where two of the lines that bound c cross."""

    def possible(p: float) -> bool:
        rows = [(s * (1 - noise), s * (1 + noise), k**p) for k, s in zip(n, t, strict=True)]
        lines = [(low, x) for low, _, x in rows] + [(high, x) for _, high, x in rows] + [(0.0, 0.0)]
        slopes = [(y1 - y2) / (x1 - x2) for y1, x1 in lines for y2, x2 in lines if x1 != x2]
        for a in filter(lambda a: a > 0, slopes):
            least = max(0.0, *(low - a * x for low, _, x in rows))
            if min(high - a * x for _, high, x in rows) >= least - 1e-12 * t[0]:
                return True
        return False

    found = [p for p in candidates if possible(p)]
    return found[0] if len(found) == 1 else None


def by_residuals(n: Any, t: Any, noise: float, candidates: Any) -> Any:
    """Least squares of the relative errors, all of them within the noise."""
    found = []
    for p in candidates:
        x, seconds = (np.array(n) / n[-1]) ** p, np.array(t)
        c, a = np.linalg.lstsq(np.stack((1 / seconds, x / seconds), 1), np.ones(len(n)), rcond=None)[0]
        if c < 0:
            c, a = 0.0, (x / seconds).sum() / ((x / seconds) ** 2).sum()
        found += [p] if abs((c + a * x) / seconds - 1).max() <= noise else []
    return found[0] if len(found) == 1 else None


@pytest.mark.parametrize("conclude", [at_crossings, by_residuals])
def test_exponents_may_be_fitted_in_other_ways(conclude: Callable[..., Any]) -> None:
    assert full_marks("12.5", polyfit, CHECKS.library_offset, conclude)


def test_a_plain_slope_earns_its_points_alone() -> None:
    assert earned(check("12.5", polyfit, stub, lambda *a: None)) == [1, 1, 0, 0, 0, 1, 1]


# 12.6


def test_a_benchmark_may_take_the_least_of_many_and_turn_the_order() -> None:
    faults, _, _ = ours("12.6")

    def once(device: Any, kernel: str, length: int) -> float:
        device.flush()
        device.synchronize()
        start = device.now()
        device.run(kernel, length)
        device.synchronize()
        return float(device.now() - start)

    def measure(device: Any, kernel: str, length: int) -> float:
        return min(once(device, kernel, length) for _ in range(40))

    def ratio(device: Any, a: str, b: str, length: int) -> Any:
        times: dict[str, list[float]] = {a: [], b: []}
        for i in range(30):
            for kernel in (a, b)[:: (1, -1)[i % 2]]:
                times[kernel].append(once(device, kernel, length))
        return np.median(times[a]) / np.median(times[b])

    assert full_marks("12.6", faults, measure, ratio)
    assert earned(check("12.6", lambda: {**faults(), "d": "mean"}, measure, stub)) == [1, 0, 1, 1, 1, 1, 0]


def test_a_benchmark_that_looks_inside_or_never_ends_earns_nothing() -> None:
    faults, _, ratio = ours("12.6")
    assert earned(check("12.6", faults, CHECKS.true_seconds, ratio))[3:6] == [0, 0, 0]
    endless = lambda device, kernel, length: [device.run(kernel, length) for _ in count()]  # noqa: E731
    assert earned(check("12.6", faults, endless, ratio))[3:6] == [0, 0, 0]


def test_more_runs_than_the_task_allows_earn_nothing() -> None:
    faults, measure, ratio = ours("12.6")

    def patient(device: Any, kernel: str, length: int) -> Any:
        for _ in range(380):
            device.run(kernel, length)
        return measure(device, kernel, length)

    assert earned(check("12.6", faults, patient, ratio))[3:6] == [0, 0, 0]


def test_each_benchmark_with_a_fault_is_wrong_and_the_right_one_is_not() -> None:
    exercise = find_exercise("12.6")
    space: dict[str, Any] = {}
    for cell in exercise.set_up:
        exec(cell, space)
    costs = {"full": lambda length: 6e-7 * length, "window": lambda length: 2e-3}
    for letter, fault in CHECKS.FAULTS.items():
        device = space["Device"](costs, seed=3, heating=0.02 if letter == "g" else 0.0)
        truth = costs["full"](8192) / (costs["window"](8192) if letter in "adg" else 1.0)
        error = abs(space[f"bench_{letter}"](device, 8192) / truth - 1)
        assert (error < 0.02) is (fault == "right"), letter


# 12.7


def notebook(**changes: Any) -> dict[str, Any]:
    """The names of a solved notebook, and these in place of some."""
    found: dict[str, Any] = {}
    for source in {source for source, _ in MODEL.wiring.parts.values()} | {"12.7"}:
        found |= dict(zip(find_exercise(source).answers, ours(source), strict=True))
    return found | changes


def points(**changes: Any) -> list[float]:
    names = notebook(**changes)
    return earned(check("12.7", *(names[each] for each in MODEL.answers), notebook=names))


def test_a_solved_notebook_earns_all_points_and_one_without_parts_those_for_its_own_functions() -> None:
    assert points() == [1, 1, 2, 2, 1, 1]
    assert points(**dict.fromkeys(MODEL.wiring.parts)) == [1, 1, 2, 2, 0, 0]
    assert points(measure=stub) == [1, 1, 2, 2, 1, 0]
    assert points(my_config=dict) == [0, 1, 2, 2, 1, 1]


@pytest.mark.parametrize(
    "choice",
    [
        {"num_key_value_heads": 3},
        {"cache_dtype": "float8_e4m3fn"},
        {"layer_types": "full"},
        {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
        {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 0},
        {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 64.0},
        {"hidden_size": 64},
    ],
)
def test_a_choice_that_is_not_allowed_is_named(choice: Any) -> None:
    score = check("12.7", lambda: choice, *ours("12.7")[1:])
    row = score.rows[0]
    assert row.earned == 0
    assert "a decoder that is allowed" in row.expected


def test_a_decoder_that_is_counted_is_the_one_that_is_built() -> None:
    config = CHECKS.complete(ours("12.7")[0]())
    decoder = CHECKS.build(config)
    weights, cache = ours("12.1")[1](config, 3, 700)
    assert weights == sum(weight.nbytes for weight in decoder.parameters())
    assert cache == decoder.new_cache(3, 700, torch.bfloat16).nbytes
    gpu = CHECKS.Gpu(config, weights + cache, 700)
    held = gpu.new_cache(3)
    with pytest.raises(MemoryError):
        gpu.new_cache(1)
    del held
    assert gpu.used == weights


def test_the_comparison_predicts_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHECKS, "MEMORY", 2**26)
    shown = workbench.compare("12.7", notebook(fit_offset=stub))
    rows = {what: values for what, *values in shown.rows}
    for column in range(2):
        predicted, measured = (
            rows[f"largest batch at 8,192 tokens, {what}"][column] for what in ("predicted", "measured")
        )
        assert predicted == measured
        stored = int(rows["bytes per sequence of 8,192 tokens"][column].replace(",", ""))
        allocated = int(rows["bytes of that cache, allocated here"][column].replace(",", ""))
        assert allocated == max(1, int(measured)) * stored
    assert rows["does that fit?"] == ["yes", "yes"]
    assert [part.name for part, _ in shown.parts if not part.is_theirs][-1:] == ["fit_offset"]
    assert len(shown.picture.data["curves"]) == 2
    assert "12.5 does not have all its points yet" in shown._repr_mimebundle_()["text/html"]
