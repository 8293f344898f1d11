"""The reference mathematics: attention as on paper, its masks, and the form in pieces."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvlearn.attention import core


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def qkv(n_queries: int = 5, n_keys: int = 9, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    return draw(2, 3, n_queries, 8, scale=scale), draw(2, 3, n_keys, 8, seed=1), draw(2, 3, n_keys, 4, seed=2)


def loop(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention one query and one key at a time, in float64."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])):
        visible = [s for s in range(k.shape[2]) if mask[t, s]]
        weights = [torch.exp(q[b, h, t].double() @ k[b, h, s].double() / q.shape[-1] ** 0.5) for s in visible]
        for weight, s in zip(weights, visible, strict=True):
            out[b, h, t] += weight / sum(weights) * v[b, h, s].double()
    return out


def test_attention_is_the_weighted_mean_it_says() -> None:
    q, k, v = qkv()
    mask = core.causal_mask(5, 9)
    torch.testing.assert_close(
        core.attention(q, k, v, mask).double(), loop(q, k, v, mask), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("scale", [None, 1.0, 0.05])
def test_attention_agrees_with_sdpa(scale: float | None) -> None:
    q, k, v = qkv()
    mask = core.causal_mask(5, 9)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    torch.testing.assert_close(core.attention(q, k, v, mask, scale), expected)


def test_the_causal_mask_is_aligned_to_the_last_key() -> None:
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert core.causal_mask(3, 5).int().tolist() == expected
    assert core.causal_mask(1, 4).all()


def test_more_queries_than_keys_have_no_causal_mask() -> None:
    with pytest.raises(ValueError, match="n_queries"):
        core.causal_mask(4, 2)


def test_causal_mask_at_is_the_causal_mask_where_rows_have_one_length() -> None:
    positions = torch.arange(3, 8)[None]
    assert torch.equal(core.causal_mask_at(positions, 8)[0, 0], core.causal_mask(5, 8))


def test_causal_mask_at_hides_what_lies_past_each_row() -> None:
    positions = torch.tensor([[4], [1]])
    assert core.causal_mask_at(positions, 5).int()[:, 0, 0].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]


def test_a_query_without_visible_keys_gets_zero() -> None:
    q, k, v = qkv()
    mask = torch.ones(5, 9, dtype=torch.bool)
    mask[2] = False
    partial = core.attend_partial(q, k, v, mask)
    assert (partial.out[:, :, 2] == 0).all()
    assert (partial.lse[:, :, 2] == -torch.inf).all()
    assert partial.out.isfinite().all()


@pytest.mark.parametrize("case", ["whole", "last 4 of 9", "one", "rows differ", "rows differ, as many keys"])
def test_the_fast_form_equals_the_reference(case: str) -> None:
    n_queries = {"whole": 9, "last 4 of 9": 4, "one": 1, "rows differ": 2, "rows differ, as many keys": 9}[
        case
    ]
    q, k, v = qkv(n_queries)
    positions = torch.arange(9 - n_queries, 9)[None]
    if case == "rows differ":
        positions = torch.tensor([[7, 8], [2, 3]])
    if case == "rows differ, as many keys":
        positions = torch.stack((torch.arange(9), torch.arange(9) // 2))
    expected = core.attention(q, k, v, core.causal_mask_at(positions, 9))
    torch.testing.assert_close(core.causal_attention(q, k, v, positions), expected)


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("lengths", [[9], [9, 4]])
@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_a_grouped_step_is_the_same_for_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, threads: int, lengths: list[int], n_kv_heads: int
) -> None:
    """Fewer pools than threads: the query heads of a pool are cut into parts, of which none is left out."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q, k, v = draw(2, 6, 1, 8), draw(2, n_kv_heads, 9, 8, seed=1), draw(2, n_kv_heads, 9, 4, seed=2)
    positions = torch.tensor(lengths)[:, None] - 1
    repeated = (x.repeat_interleave(6 // n_kv_heads, 1) for x in (k, v))
    expected = core.attention(q, *repeated, core.causal_mask_at(positions, 9))
    torch.testing.assert_close(core.causal_attention(q, k, v, positions), expected)


@given(cuts=st.lists(st.integers(0, 9), max_size=6), scale=st.sampled_from([1.0, 40.0, 1e4]))
def test_partial_results_merge_to_the_whole(cuts: list[int], scale: float) -> None:
    """In any pieces (empty ones too) and any order; scores so large that exp() of them has no fp32."""
    q, k, v = qkv(scale=scale)
    edges = [0, *sorted(cuts), 9]
    parts = [core.attend_partial(q, k[:, :, a:b], v[:, :, a:b]) for a, b in itertools.pairwise(edges)]
    for order in (parts, parts[::-1]):
        merged = core.merge_all(order)
        torch.testing.assert_close(merged.out, F.scaled_dot_product_attention(q, k, v), atol=1e-4, rtol=1e-4)
        whole = (q @ k.transpose(-1, -2) / 8**0.5).logsumexp(-1)
        torch.testing.assert_close(merged.lse, whole, atol=1e-4, rtol=1e-4)


def test_merging_nothing_with_nothing_is_nothing() -> None:
    q, k, v = qkv()
    nothing = core.attend_partial(q, k[:, :, :0], v[:, :, :0])
    merged = core.merge(nothing, nothing)
    assert (merged.out == 0).all()
    assert (merged.lse == -torch.inf).all()
    something = core.attend_partial(q, k, v)
    torch.testing.assert_close(core.merge(nothing, something).out, something.out)


@pytest.mark.parametrize("block", [1, 4, 9, 100])
def test_blockwise_attention_equals_attention(block: int) -> None:
    q, k, v = qkv()
    mask = core.causal_mask(5, 9)
    torch.testing.assert_close(core.blockwise_attention(q, k, v, mask, block), core.attention(q, k, v, mask))


def test_heads_split_and_merge() -> None:
    x = draw(2, 5, 12)
    heads = core.split_heads(x, 3)
    assert heads.shape == (2, 3, 5, 4)
    assert torch.equal(heads[1, 2, 3], x[1, 3, 8:12])
    assert torch.equal(core.merge_heads(heads), x)
