"""Bytes that a call touches: operators are watched, and the numbers agree with the formulas on paper."""

import pytest
import torch
import torch.nn.functional as F

from kvlearn.attention import REGISTRY
from kvlearn.bench.hardware import fill, place
from kvlearn.measure import touched


def test_views_cost_nothing_and_each_operator_counts_its_arguments() -> None:
    cache, weights = torch.ones(10, 8), torch.ones(8, 3)
    found = touched(lambda: cache[:5].T.T @ weights, [cache], [weights])
    assert (found.cache_read, found.weights_read, found.cache_written) == (5 * 8 * 4, 8 * 3 * 4, 0)
    assert (found.flops, found.calls, found.other) == (2 * 5 * 8 * 3, 1, 5 * 3 * 4)


def test_a_gather_reads_what_it_gathers_and_a_copy_writes_what_it_copies() -> None:
    cache = torch.ones(10, 8)
    found = touched(lambda: cache[torch.tensor([1, 7])], [cache])
    assert (found.cache_read, found.cache_written) == (2 * 8 * 4, 0)
    found = touched(lambda: cache[3:4].copy_(torch.zeros(1, 8)), [cache])
    assert (found.cache_read, found.cache_written) == (0, 8 * 4)
    found = touched(lambda: cache.index_copy_(0, torch.tensor([2]), torch.zeros(1, 8)), [cache])
    assert (found.cache_read, found.cache_written) == (0, 8 * 4)


def test_numbers_changed_in_place_are_read_and_written() -> None:
    cache = torch.ones(6)
    found = touched(lambda: cache.mul_(2), [cache])
    assert (found.cache_read, found.cache_written) == (24, 24)


def test_expanded_heads_and_keys_that_are_values_count_once() -> None:
    latents, q = torch.randn(1, 1, 16, 8), torch.randn(1, 4, 1, 8)
    wide = latents.expand(1, 4, 16, 8)
    found = touched(lambda: F.scaled_dot_product_attention(q, wide, wide), [latents])
    assert found.cache_read == latents.nbytes
    assert found.flops >= 4 * 4 * 16 * 8


def test_a_mask_does_not_save_reading() -> None:
    """Attention that masks most keys is given all of them: stored, read, and not needed."""
    k, v = torch.randn(2, 1, 1, 64, 8)
    mask = (torch.arange(64) >= 60)[None, None, None]
    q = torch.randn(1, 1, 1, 8)
    found = touched(lambda: F.scaled_dot_product_attention(q, k, v, mask), [k, v])
    assert found.cache_read >= k.nbytes + v.nbytes


@pytest.mark.parametrize("name", REGISTRY)
def test_a_step_of_every_mechanism_reads_what_its_formula_says(name: str) -> None:
    layer = REGISTRY[name].tiny()
    n = 47  # no block of the small layers ends here
    cache = layer.new_cache(batch=2, max_len=n)
    fill(cache)
    place(cache, n - 1)
    x = torch.randn(2, 1, layer.d_model)
    found = touched(lambda: layer(x, cache), cache.tensors(), layer.parameters())
    formula = layer.read_bytes(n, batch=2)
    # At least that; RWKV and the short convolutions read their state twice: for the output,
    # and for the next state.
    assert 0.95 * formula <= found.cache_read <= 2.2 * formula, name
    assert 0 < found.weights_read <= 1.5 * sum(w.nbytes for w in layer.parameters())
    assert found.flops > 0
