"""The memory arithmetic, against numbers worked out by hand and against what must hold for any model."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlearn.measure import (
    GB,
    GIB,
    MODELS,
    LayerShape,
    ModelShape,
    cache_bytes,
    elements_per_token,
    index_key_bytes,
    read_bytes,
    state_bytes,
    users,
    weights_bytes,
)

K = 1024
LLAMA = MODELS["Llama 3.1 405B"]


def test_llama_405b_as_it_is() -> None:
    assert elements_per_token(LLAMA) * 2 == 516_096
    assert cache_bytes(LLAMA, 32 * K) == 15.75 * GIB
    assert cache_bytes(LLAMA, 32 * K, dtype=torch.float32) == 31.5 * GIB
    assert cache_bytes(LLAMA, 32 * K, batch=3) == 3 * 15.75 * GIB


def test_llama_405b_as_multi_head_attention_needs_sixteen_times_as_much() -> None:
    assert cache_bytes(replace(LLAMA, n_kv_heads=LLAMA.n_heads), 32 * K) == 252 * GIB


def test_llama_405b_as_the_article_tells_it() -> None:
    assert cache_bytes(MODELS["Llama 3.1 405B as the article tells it"], 32 * K) == 128 * GIB


def test_a_latent_is_stored_once_for_keys_and_values() -> None:
    assert elements_per_token(MODELS["DeepSeek-V3"]) == 61 * 576


def test_deepseek_v3_2_stores_an_index_key_of_132_bytes_beside_1152() -> None:
    v3, v32 = (replace(MODELS[f"DeepSeek-V3{end}"], n_layers=1) for end in ("", ".2"))
    assert index_key_bytes(128) == 132
    assert cache_bytes(v3, 1) == 1152
    assert cache_bytes(v32, 1) == 1152 + 132
    assert round(100 * (cache_bytes(v32, 128 * K) / cache_bytes(v3, 128 * K) - 1)) == 11
    assert cache_bytes(v32, 1, dtype=torch.float32) == 2 * 1152 + 132  # the index has its own type
    assert elements_per_token(v32) == 576 + 128


def test_deepseek_v3_2_reads_all_index_keys_and_2048_tokens() -> None:
    one = replace(MODELS["DeepSeek-V3.2"], n_layers=1)
    assert read_bytes(one, 128 * K) == 18.75 * 2**20
    assert read_bytes(one, 128 * K) == 132 * 128 * K + 1152 * 2048
    assert read_bytes(one, 2000) == cache_bytes(one, 2000)


def test_a_window_stops_growing() -> None:
    mistral = MODELS["Mistral 7B v0.1"]
    assert cache_bytes(mistral, 4096) == cache_bytes(mistral, 8192) == 512 * 2**20
    assert elements_per_token(mistral, 4096) == 2 * 32 * 8 * 128
    assert elements_per_token(mistral, 4097) == 0


def test_five_windows_to_one_full_layer() -> None:
    gemma = MODELS["Gemma 3 27B"]
    windowed = [gemma.layer(i).window is not None for i in range(gemma.n_layers)]
    assert windowed[:7] == [True] * 5 + [False, True]
    assert windowed.count(False) == 10
    assert elements_per_token(gemma, 2 * K) == 10 * 2 * 16 * 128
    assert cache_bytes(gemma, 32 * K) == 2 * 2 * 16 * 128 * (52 * 1024 + 10 * 32 * K)


def test_shared_layers_store_nothing_and_are_read_all_the_same() -> None:
    gemma = MODELS["Gemma 4 E2B"]
    n = 8 * K
    # stored: 12 windows of 512 with heads of 256, 3 full layers with heads of 512; read: 28 and 7
    assert cache_bytes(gemma, n) == 2 * 2 * (12 * 256 * 512 + 3 * 512 * n)
    assert read_bytes(gemma, n) == 2 * 2 * (28 * 256 * 512 + 7 * 512 * n)


def test_every_second_layer_of_gpt_oss_has_a_window_of_128() -> None:
    assert cache_bytes(MODELS["gpt-oss-120b"], K) == 2 * 2 * 8 * 64 * 18 * (128 + K)


def test_jamba_at_256k_needs_an_eighth_of_mixtral_and_some_states() -> None:
    jamba, mixtral = MODELS["Jamba v0.1"], MODELS["Mixtral 8x7B"]
    n = 256 * K
    assert cache_bytes(mixtral, n) == 32 * GIB
    states = 28 * (4 * 8192 * 16 + 2 * 8192 * 3)
    assert state_bytes(jamba) == states
    assert cache_bytes(jamba, n) == 4 * GIB + states
    assert elements_per_token(jamba) == 4 * 2 * 8 * 128


def test_hybrids_with_a_delta_rule() -> None:
    qwen, kimi = MODELS["Qwen3-Next 80B-A3B"], MODELS["Kimi Linear 48B-A3B"]
    assert elements_per_token(qwen) == 12 * 2 * 2 * 256
    assert [i for i in range(27) if kimi.layer(i).kind == "latent"] == [3, 7, 11, 15, 19, 23, 26]
    assert elements_per_token(kimi) == 7 * 576
    assert state_bytes(kimi) == 20 * (4 * 32 * 128 * 128 + 2 * 3 * 3 * 4096)
    # The paper: up to 75% less cache than with attention in all layers.
    latents = replace(kimi, layers=(kimi.layer(3),))
    assert round(100 * (1 - cache_bytes(kimi, K * K) / cache_bytes(latents, K * K))) == 74


def test_a_state_is_there_before_the_first_token_and_never_grows() -> None:
    layer = LayerShape(state=100, conv=7)
    model = replace(MODELS["Llama 3.1 8B"], layers=(layer,), n_layers=1)
    assert cache_bytes(model, 0) == cache_bytes(model, 5000) == read_bytes(model, 1) == 4 * 100 + 2 * 7
    assert cache_bytes(model, 9, dtype=torch.float32) == 4 * 107  # the state is fp32 in any case
    assert cache_bytes(model, 9, batch=3) == 3 * (400 + 14)
    assert elements_per_token(model) == elements_per_token(model, 50) == 0


def test_a_state_beside_a_window_is_both() -> None:
    window, state = LayerShape(window=64), LayerShape(state=100, conv=7)
    both = LayerShape(window=64, state=100, conv=7, beside=True)
    one = replace(MODELS["Llama 3.1 8B"], n_layers=1)
    for n in (10, 1000):
        parts = [cache_bytes(replace(one, layers=(layer,)), n) for layer in (window, state)]
        assert cache_bytes(replace(one, layers=(both,)), n) == sum(parts)
    assert [layer.kind for layer in (window, state, both)] == ["window", "state", "window + state"]


def test_pythia_needs_328_kb_a_token() -> None:
    assert round(elements_per_token(MODELS["Pythia 2.8B"]) * 2 / 1000) == 328


def test_weights_as_released() -> None:
    assert weights_bytes(MODELS["Llama 3.1 8B"]) == 2 * 8_030_261_248
    # The checkpoint's size in the model card (arXiv:2508.10925, table 1) is 60.8 GiB.
    assert weights_bytes(MODELS["gpt-oss-120b"]) / GIB == pytest.approx(60.8, abs=0.05)


def test_users_are_what_fits_beside_the_weights() -> None:
    llama = MODELS["Llama 3.1 8B"]  # 16.06 GB of weights, 1 GiB of cache at 8K
    assert users(llama, 80 * GB, 8 * K) == int((80e9 - 16_060_522_496) // 2**30) == 59
    assert users(llama, 16 * GB, 8 * K) == 0
    assert users(llama, 16_060_522_496 + 2**30, 8 * K) == 1


shapes = st.builds(
    lambda layers, depth, groups, heads, width: ModelShape(
        "drawn", depth + len(layers), groups * heads, heads, width, 10**6, 4096, "drawn", tuple(layers)
    ),
    st.lists(
        st.builds(
            LayerShape,
            window=st.none() | st.integers(1, 50),
            head_dim=st.none() | st.integers(1, 8),
            latent=st.none() | st.integers(1, 8),
            shared=st.booleans(),
            state=st.none() | st.integers(1, 9),
            beside=st.just(False),
        ),
        max_size=4,
    ),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 8),
)


@given(shapes, st.integers(1, 100))
def test_the_whole_is_the_sum_of_what_each_token_adds(model: ModelShape, length: int) -> None:
    added = sum(elements_per_token(model, place) for place in range(1, length + 1))
    assert cache_bytes(model, length) == state_bytes(model) + 2 * added


@given(shapes, st.integers(0, 100), st.integers(1, 5))
def test_a_step_reads_all_that_is_stored_or_more(model: ModelShape, length: int, batch: int) -> None:
    stored, read = cache_bytes(model, length, batch=batch), read_bytes(model, length, batch=batch)
    assert stored == batch * cache_bytes(model, length)
    nothing_shared = not any(model.layer(i).shared for i in range(model.n_layers))
    assert (stored == read) if nothing_shared else (stored <= read)


@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 100))
def test_grouping_divides_the_cache_by_the_size_of_a_group(group: int, heads: int, length: int) -> None:
    gqa = ModelShape("gqa", 3, group * heads, heads, 16, 1000, 100, "drawn")
    mha = replace(gqa, n_kv_heads=gqa.n_heads)
    assert cache_bytes(mha, length) == group * cache_bytes(gqa, length)


def test_wrong_shapes_are_named_before_anything_is_computed() -> None:
    with pytest.raises(ValueError, match="n_kv_heads: expected a divisor of n_heads=128, got 7"):
        replace(LLAMA, n_kv_heads=7)
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        LayerShape(window=0)
    with pytest.raises(ValueError, match="state: expected a number with beside or conv"):
        LayerShape(conv=3)
    with pytest.raises(ValueError, match="length: expected at least 0, got -1"):
        cache_bytes(LLAMA, -1)
    with pytest.raises(TypeError, match="batch: expected an integer"):
        cache_bytes(LLAMA, 1, batch=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"len\(layers\): expected at most 126"):
        replace(LLAMA, layers=127 * (LayerShape(),))
