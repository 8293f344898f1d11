"""The benchmark ``linear`` at a small size: what it measures, and that results are checked first."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_tools import shown_times
from torch import Tensor

from kvlearn import plots
from kvlearn.attention import REGISTRY, Cache, LinearAttention, Mechanism, StateCache
from kvlearn.bench import common, linear
from kvlearn.bench.common import label
from kvlearn.bench.linear import CORES, PEERS, Form, Sizes
from kvlearn.measure.results import Row

CPU = torch.device("cpu")
SIZES = linear.SMALL
STATES = linear.state_names()


@pytest.fixture(autouse=True)
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    return shown_times(monkeypatch, linear)


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let no other mechanism be measured."""
    monkeypatch.setattr(linear, "state_names", lambda: list(names))
    cores = {name: core for name, core in linear.CORES.items() if name in {"full", *names}}
    monkeypatch.setattr(linear, "CORES", cores)


def grows(seconds: dict[str, float], name: str, power: float) -> None:
    """Let the time of a core grow as this power of the length."""
    seconds.update({label(name, n): n**power for n in SIZES.lengths})


def found(measured: list[Row], what: str, **details: Any) -> list[Row]:
    wanted = {"what": what, **details}.items()
    return [row for row in measured if wanted <= row.details.items()]


def rows_of(part: Callable[[Sizes, torch.device], Any], what: str, **details: Any) -> list[Row]:
    return found(list(part(SIZES, CPU)), what, **details)


def test_every_part_is_measured_and_every_bar_of_the_issue_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    short = ["linear", "gated_delta"]
    only(monkeypatch, *short)
    measured = list(common.run("linear", small=True))
    assert {row.details["what"] for row in measured} == {
        *("stored", "stored_growth", "step_time", "step_growth", "prefill_speedup"),
        *("prefill_time", "prefill_memory", "prefill_time_exponent", "prefill_memory_exponent"),
        *("layer_time", "layer_speedup", "train_layer_time", "train_speedup"),
        *("train_time", "train_memory", "train_time_exponent", "train_memory_exponent"),
        *("peer_time", "peer_speedup", "peer_memory", "long_finite", "long_error"),
    }
    barred = {(row.details["what"], row.details["name"]) for row in measured if row.bar is not None}
    everyone = ("stored", "stored_growth", "step_growth", "long_finite", "long_error")
    cores_held = ("prefill_time_exponent", "prefill_memory_exponent", "prefill_speedup")
    assert barred == {
        *((what, name) for what in (*everyone, *cores_held) for name in short),
        *((what, name) for what in ("peer_speedup", "peer_memory") for name in PEERS),
    }


def test_everyone_with_a_state_is_measured() -> None:
    assert {"linear", "short_conv"} <= set(STATES)
    assert all(REGISTRY[name].forms for name in STATES)
    assert [row.details["name"] for row in rows_of(linear.layer_rows, "layer_speedup")] == STATES
    assert [row.details["name"] for row in rows_of(linear.train_rows, "train_speedup")] == STATES
    assert [row.details["name"] for row in rows_of(linear.step_rows, "step_growth")] == ["full", *STATES]


@pytest.mark.parametrize("name", STATES)
def test_a_state_takes_as_much_for_a_million_tokens_and_decodes_finitely(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    only(monkeypatch, name)
    rows = [*linear.size_rows(SIZES, CPU), *rows_of(linear.long_rows, "long_finite", state="float32")]
    assert all(row.passed for row in rows if row.details["name"] == name)


@pytest.mark.parametrize("name", [name for name in CORES if name != "full"])
def test_a_core_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = CORES[name]

    def wrong(sizes: Sizes, n: int, device: torch.device) -> Form:
        core = right(sizes, n, device)
        return lambda form: core(form) * (1.01 if form == "chunked" else 1)

    monkeypatch.setitem(linear.CORES, name, wrong)
    only(monkeypatch, name)
    with pytest.raises(AssertionError, match=rf"(?s)^{name}.*not close"):
        list(linear.prefill_rows(SIZES, CPU))


def test_a_core_is_linear_or_misses_its_bar(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]
) -> None:
    only(monkeypatch, "linear")
    for power, passed in ((1.14, True), (1.16, False)):
        grows(seconds, "full", 2)
        grows(seconds, "linear", power)
        full, core = rows_of(linear.prefill_rows, "prefill_time_exponent")
        assert (full.measured, full.passed) == (pytest.approx(2), None)
        assert (core.measured, core.passed) == (pytest.approx(power), passed)
    (core,) = rows_of(linear.prefill_rows, "prefill_memory_exponent", name="linear")
    assert core.passed
    monkeypatch.setitem(linear.CORES, "linear", lambda sizes, n, device: lambda form: torch.zeros(n, n))
    (core,) = rows_of(linear.prefill_rows, "prefill_memory_exponent", name="linear")
    assert (core.measured, core.passed) == (pytest.approx(2, abs=0.05), False)


def test_the_speedup_is_full_attentions_time_over_the_cores_own(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]
) -> None:
    only(monkeypatch, "linear")
    for times, passed in ((2.9, False), (3.1, True)):
        seconds[label("full", 160)] = times
        (row,) = rows_of(linear.prefill_rows, "prefill_speedup", name="linear")
        assert (row.measured, row.bar, row.passed) == (pytest.approx(times), 3, passed)


@pytest.mark.parametrize("part", ["prefill", "train"])
def test_the_rows_draw_the_picture_of_the_exponents(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    only(monkeypatch, "linear", "gated_delta")
    rows_from = {"prefill": linear.prefill_rows, "train": linear.train_rows}[part]
    measured = list(rows_from(SIZES, CPU))
    lines = plots.scaling([row.as_dict() for row in measured], part=part).data["lines"]
    assert {"full", "linear"} <= set(lines)
    assert all(len(lines["linear"][quantity]) > 1 for quantity in ("time", "memory"))


def wrong_from_now_on(monkeypatch: pytest.MonkeyPatch, when: Callable[[Tensor, str], bool]) -> None:
    """Let linear attention's layer give something else for some inputs and forms."""
    right = LinearAttention.forward

    def forward(self: LinearAttention, x: Tensor, cache: Cache | None = None, source: None = None) -> Tensor:
        y = right(self, x, cache, source)
        return y * 1.5 if when(x, form_of(self, x, cache)) else y

    monkeypatch.setattr(LinearAttention, "forward", forward)


def form_of(layer: Mechanism, x: Tensor, cache: Cache | None) -> str:
    """The form that this call takes."""
    return "recurrent" if cache is not None and x.shape[1] == 1 else layer.form


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_from_now_on(monkeypatch, lambda x, form: form == "chunked")
    with pytest.raises(AssertionError, match="linear"):
        rows_of(linear.layer_rows, "layer_time")


def test_wrong_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LinearAttention.forward

    def forward(self: LinearAttention, x: Tensor, cache: Cache | None = None, source: None = None) -> Tensor:
        return right(self, x.detach() + 0 * x, cache, source)

    monkeypatch.setattr(LinearAttention, "forward", forward)
    with pytest.raises(AssertionError, match="linear"):
        rows_of(linear.train_rows, "train_time")


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "linear")
    wrong_from_now_on(monkeypatch, lambda x, form: x.shape[1] == 1)
    with pytest.raises(AssertionError, match="linear"):
        rows_of(linear.step_rows, "step_time")


def test_a_step_is_flat_or_misses_its_bar(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
    only(monkeypatch, "linear")
    for growth, passed in ((1.09, True), (1.11, False)):
        seconds.update({"16 tokens": 1.0, "40 tokens": growth})
        full, core = rows_of(linear.step_rows, "step_growth")
        assert (full.passed, core.passed) == (None, passed)


def test_steps_come_after_all_of_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, right = [], linear.checked_step

    def checked_step(name: str, layer: Any, x: Tensor, **rest: Any) -> Any:
        lengths.append(x.shape[1])
        return right(name, layer, x, **rest)

    only(monkeypatch, "linear")
    monkeypatch.setattr(linear, "checked_step", checked_step)
    rows_of(linear.step_rows, "step_time")
    assert lengths == [16, 40]


def test_a_cache_that_grows_misses_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    right = StateCache.tensors
    only(monkeypatch, "linear")
    monkeypatch.setattr(
        StateCache, "tensors", lambda self: [*right(self), torch.zeros(self.max_len, dtype=torch.uint8)]
    )
    missed = {row.details["what"] for row in linear.size_rows(SIZES, CPU) if row.passed is False}
    assert missed == {"stored", "stored_growth"}


def test_sizes_are_beside_full_attentions_and_say_how_many_tokens_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only(monkeypatch, "linear")
    full, state = rows_of(linear.size_rows, "stored", length=10**6)
    assert full.measured == 10**6 * 2 * 16 * 4
    assert state.measured == 2 * 8 * 9 * 4
    assert state.details["tokens"] == state.measured / (2 * 16 * 4)


def test_an_error_that_adds_up_misses_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    def row() -> Row:
        (found,) = rows_of(linear.long_rows, "long_error", state="float32")
        return found

    only(monkeypatch, "linear")
    assert row().passed
    wrong_from_now_on(monkeypatch, lambda x, form: form == "recurrent" and x.dtype == torch.float32)
    assert (row().measured, row().passed) == (pytest.approx(0.5, rel=1e-3), False)


def test_numbers_that_are_not_finite_miss_their_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LinearAttention.forward

    def forward(self: LinearAttention, x: Tensor, cache: Cache | None = None, source: None = None) -> Tensor:
        y = right(self, x, cache, source)
        return y / 0 if self.form == "recurrent" and x.shape[1] > 1 else y

    only(monkeypatch, "linear")
    monkeypatch.setattr(LinearAttention, "forward", forward)
    (row,) = rows_of(linear.long_rows, "long_finite", state="float32")
    assert (row.measured, row.passed) == ((60 - 20) * 16, False)


def test_a_state_in_bf16_is_further_off_and_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "linear")
    fp32, bf16 = rows_of(linear.long_rows, "long_error")
    assert (fp32.details["state"], bf16.details["state"]) == ("float32", "bfloat16")
    assert bf16.measured > 100 * fp32.measured
    assert bf16.bar is None


@pytest.mark.parametrize("name", PEERS)
def test_other_peoples_mamba_has_the_same_weights_and_may_not_be_faster(
    seconds: dict[str, float], name: str
) -> None:
    for times, passed in ((0.9, False), (1.1, True)):
        seconds["transformers"] = times
        (row,) = rows_of(linear.peer_rows, "peer_speedup", name=name)
        assert (row.measured, row.passed) == (pytest.approx(times), passed)
    theirs, ours = rows_of(linear.peer_rows, "peer_memory", name=name)
    assert (theirs.bar, ours.bar, ours.relation) == (None, ours.details["states"], "<=")
    assert ours.details["states"] == 96 * (64 * 16 if name == "mamba" else 64 * 128) * 4


@pytest.mark.parametrize("name", PEERS)
def test_a_mamba_that_computes_something_else_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    right = REGISTRY[name].forward

    def forward(self: Mechanism, *given: Any) -> Tensor:
        return 1.1 * right(self, *given)

    monkeypatch.setattr(REGISTRY[name], "forward", forward)
    with pytest.raises(AssertionError, match=rf"(?s)^{name}.*not close"):
        rows_of(linear.peer_rows, "peer_time")


def test_without_transformers_its_mamba_is_left_out_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.warns(UserWarning, match="transformers is not installed"):
        assert list(linear.peer_rows(SIZES, CPU)) == []
