"""FLOPs and bytes by formula, against torch's own counter and against what must add up."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kvlearn.attention import FullAttention
from kvlearn.measure import Work, attention_layer_work, attention_work, decoder_work, linear_work

sizes = st.integers(1, 64)


def test_a_matrix_product_by_hand() -> None:
    assert linear_work(3, 5, tokens=7) == Work(2 * 3 * 5 * 7, 4 * (3 * 5 + 7 * 3 + 7 * 5))


def test_torch_counts_as_many_flops_in_a_decode_step() -> None:
    layer = FullAttention(d_model=32, n_heads=4)
    cache = layer.new_cache(batch=2, max_len=50)
    layer(torch.randn(2, 49, 32), cache)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # it knows no other on the CPU
        layer(torch.randn(2, 1, 32), cache)
    assert attention_layer_work(32, 4, 4, 8, new=1, cached=49, batch=2).flops == counter.get_total_flops()


def test_a_decode_step_moves_the_layers_read_bytes() -> None:
    layer = FullAttention(d_model=32, n_heads=4)
    core = attention_work(4, 4, 8, new=1, cached=99, batch=3)
    queries_and_outputs = 2 * 3 * 4 * 8 * 4
    assert core.nbytes == layer.read_bytes(100, batch=3) + queries_and_outputs


def test_causal_prefill_does_half_the_pairs_and_the_diagonal() -> None:
    assert attention_work(1, 1, 1, new=100).flops == 4 * (100 * 101 // 2)


@given(sizes, sizes, st.integers(0, 64))
def test_a_prompt_in_chunks_costs_the_same_flops(first: int, second: int, cached: int) -> None:
    whole = attention_work(8, 2, 16, new=first + second, cached=cached)
    chunks = attention_work(8, 2, 16, new=first, cached=cached) + attention_work(
        8, 2, 16, new=second, cached=cached + first
    )
    assert chunks.flops == whole.flops
    assert chunks.nbytes > whole.nbytes  # the cache is read again


@given(st.integers(1, 16), st.integers(1, 8))
def test_decode_intensity_grows_with_the_group(group: int, kv_heads: int) -> None:
    """At long contexts: 4 FLOPs for a key and a value, 4 bytes in bf16, by every query head of the group."""
    work = attention_work(group * kv_heads, kv_heads, 128, new=1, cached=10**6, dtype=torch.bfloat16)
    assert work.intensity == pytest.approx(group, rel=1e-3)


def test_decode_waits_for_memory_and_prefill_for_arithmetic() -> None:
    decode = decoder_work(10**9, 24, 16, 16, 64, new=1, cached=2047, dtype=torch.bfloat16)
    prefill = decoder_work(10**9, 24, 16, 16, 64, new=2048, dtype=torch.bfloat16)
    assert decode.intensity < 2 < 1000 < prefill.intensity


def test_works_add_and_multiply() -> None:
    assert 3 * Work(1, 2) + Work(1, 1) == Work(4, 7)
    with pytest.raises(ValueError, match="cached: expected at least 0, got -1"):
        attention_work(1, 1, 1, new=1, cached=-1)
