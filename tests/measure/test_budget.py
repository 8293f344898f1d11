"""Designing a hybrid for a budget: what is stored, what fits, and the least time of a step."""

from dataclasses import replace

import pytest

from kvlearn.measure import (
    DEVICES,
    GB,
    KINDS,
    MODELS,
    LayerShape,
    budget_table,
    cache_bytes,
    design,
    read_bytes,
    state_bytes,
    step_seconds,
    step_work,
    weights_bytes,
)
from kvlearn.measure.budget import GPUS, fits, stack

LLAMA = MODELS["Llama 3.1 8B"]
M = 2**20


def test_one_million_tokens_on_24_gb_are_one_full_layer_or_six_latents() -> None:
    memory = DEVICES["RTX 4090"].memory
    for kind, most in (("full", 1), ("latent", 6)):
        shape = [KINDS[kind]] * most + [KINDS["state"]] * (32 - most)
        one_more = [KINDS[kind]] * (most + 1) + [KINDS["state"]] * (31 - most)
        assert fits(design(shape), M, memory)
        assert not fits(design(one_more), M, memory)


def test_a_pattern_is_repeated_and_told() -> None:
    model = design(3 * ["state"] + ["full"])
    assert [model.layer(i).kind for i in range(4)] == ["state", "state", "state", "full"]
    assert stack(model) == "24 state, 8 full"
    assert model.name == "Llama 3.1 8B with 24 state, 8 full"
    assert stack(MODELS["Gemma 3 27B"]) == "52 window, 10 full"
    assert stack(design([LayerShape(window=8), "window + state"])) == "16 window, 16 window + state"


def test_an_index_stores_more_and_reads_less() -> None:
    latent, indexed = design(["latent"]), design(["indexed"])
    assert cache_bytes(indexed, M) > cache_bytes(latent, M)
    assert read_bytes(indexed, M) < read_bytes(latent, M) / 8
    assert step_seconds(indexed, M, DEVICES["H200"]) < step_seconds(latent, M, DEVICES["H200"])


def test_a_step_of_a_plain_model_moves_weights_and_cache_once() -> None:
    work = step_work(LLAMA, 1000)
    assert work.nbytes == weights_bytes(LLAMA) + cache_bytes(LLAMA, 1000)
    assert work.flops == 2 * LLAMA.n_parameters + 32 * 4 * 32 * 128 * 1000
    device = DEVICES["RTX 4090"]
    assert step_seconds(LLAMA, 1000, device) == work.nbytes / device.bandwidth  # one user waits for memory


def test_a_state_is_read_and_written_back_and_does_not_grow() -> None:
    model = design(["state"])
    one = 32 * (4 * 32 * 128 * 128 + 2 * 3 * 32 * 128 * 3)
    assert state_bytes(model) == cache_bytes(model, 7) == read_bytes(model, M) == one
    assert step_work(model, M).nbytes == weights_bytes(model) + 2 * one
    assert step_work(model, M, batch=3).nbytes == weights_bytes(model) + 6 * one
    assert step_work(model, 1) == step_work(model, M)


def test_many_users_of_latents_wait_for_arithmetic() -> None:
    """Every latent is multiplied with all heads: 128 of them are more FLOPs per byte than an H200 has."""
    model = replace(design(["latent"]), n_heads=128, n_kv_heads=128)
    device = DEVICES["H200"]
    work = step_work(model, M, batch=8)
    assert (
        step_seconds(model, M, device, batch=8) == work.flops / device.peak > work.nbytes / device.bandwidth
    )


def test_the_table_says_what_fits_where() -> None:
    rows = budget_table(design(5 * ["state"] + ["latent"]), M).rows
    assert [row["GPU"] for row in rows] == list(GPUS)
    assert [row["fits"] for row in rows] == ["yes"] * 3
    full = budget_table(LLAMA, M).rows
    assert [row["fits"] for row in full] == ["no"] * 3  # 137 GB beside 16 GB of weights
    assert full[0]["stored, GB"] == f"{128 * 2**30 / GB:.1f}" == "137.4"
    caption = budget_table(LLAMA, M, batch=2).caption
    assert "32 full" in caption
    assert "2 users" in caption


def test_every_device_names_its_source() -> None:
    for name, device in DEVICES.items():
        assert device.name == name
        assert device.source.startswith(("NVIDIA, ", "AMD, ", "Apple, "))
        assert device.roofline.knee == device.peak / device.bandwidth


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(ValueError, match=r"layers: expected one of 'full'.*got 'linear'"):
        design(["linear"])
    with pytest.raises(ValueError, match=r"len\(layers\): expected at least 1"):
        design([])


def test_the_widget_shows_the_table_of_its_sliders(capsys: pytest.CaptureFixture[str]) -> None:
    from kvlearn.measure import budget

    budget()
    assert "24 state, 8 full" in capsys.readouterr().out
