"""Shared KV: nothing is copied for a pool, routes are hard, and a decode kernel does the same steps."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_tools import Allocated, close, draw
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvlearn.attention import (
    REGISTRY,
    FullAttention,
    GroupedQueryAttention,
    Mechanism,
    NoCache,
    RoutedAttention,
    TokenRoutedAttention,
)
from kvlearn.attention.core import causal_attention, causal_mask_at, merge_heads, split_heads
from kvlearn.attention.routed import PooledAttention, one_hot_choice
from kvlearn.kernels import decode_attention
from kvlearn.measure import peak_memory

BATCH, TIME = 3, 11
RATIOS = [(4, 1), (6, 2), (6, 3), (10, 2), (12, 4), (15, 3), (7, 1), (5, 5)]  # query heads, KV heads
SHARERS = ["full", "gqa", "routed", "token_routed"]


def sharp(layer: Any, seed: int = 0) -> Any:
    """``layer`` with matrices drawn anew, so large that attention picks."""
    generator = torch.Generator().manual_seed(seed)
    for weight in layer.parameters():
        if weight.dim() > 1:
            weight.data = torch.randn(weight.shape, generator=generator) * 1.5 * weight.shape[-1] ** -0.5
    return layer.eval()


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many of them PyTorch has: a step cuts its pools by that."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def query_positions(case: str) -> Tensor:
    """Positions of the queries over TIME keys."""
    return {
        "step": torch.tensor([[TIME - 1]]),
        "step, rows differ": torch.tensor([[TIME - 1], [2], [5]]),
        "chunk": torch.arange(TIME - 4, TIME)[None],
        "chunk, rows differ": torch.tensor([[TIME - 2], [0], [4]]) + torch.arange(2),
        "whole": torch.arange(TIME)[None],
    }[case]


CASES = ["step", "step, rows differ", "chunk", "chunk, rows differ", "whole"]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), RATIOS)
def test_a_group_equals_copies_of_its_keys_and_values(case: str, n_heads: int, n_kv_heads: int) -> None:
    """Outputs and gradients, by PyTorch's SDPA over K and V repeated to H heads; with and without a scale."""
    positions, group = query_positions(case), n_heads // n_kv_heads
    q = draw(BATCH, n_heads, positions.shape[1], 8).requires_grad_()
    k, v = (draw(BATCH, n_kv_heads, TIME, 8, seed=seed).requires_grad_() for seed in (1, 2))
    mask = causal_mask_at(positions, TIME)
    for scale in (None, 0.7):
        copies = (x.repeat_interleave(group, dim=1) for x in (k, v))
        expected = F.scaled_dot_product_attention(q, *copies, attn_mask=mask, scale=scale)
        got = causal_attention(q, k, v, positions, scale)
        torch.testing.assert_close(got, expected)
        weights = draw(*got.shape, seed=3)
        for mine, theirs in zip(
            *(torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (got, expected)), strict=True
        ):
            torch.testing.assert_close(mine, theirs)


def test_values_may_be_wider_than_keys_in_a_group() -> None:
    q, k, v = draw(2, 6, TIME, 8), draw(2, 2, TIME, 8, seed=1), draw(2, 2, TIME, 5, seed=2)
    for T in (1, TIME):
        positions = torch.arange(TIME - T, TIME)[None]
        copies = (x.repeat_interleave(3, dim=1) for x in (k, v))
        mask = causal_mask_at(positions, TIME)
        expected = F.scaled_dot_product_attention(q[:, :, -T:], *copies, attn_mask=mask)
        torch.testing.assert_close(causal_attention(q[:, :, -T:], k, v, positions), expected)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("n_tokens", [1, 8])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_or_a_chunk_copies_no_keys_and_values(n_tokens: int, apart: bool, batch: int) -> None:
    """Nothing as large as the G heads that are cached comes into being, let alone H."""
    H, G, S, D = 12, 3, 500, 32
    q, cached = draw(batch, H, n_tokens, D), draw(2, batch, G, S + 4, D)
    k, v = cached[:, :, :, :S]  # as a cache gives them: the front of a longer buffer
    positions = torch.arange(S - n_tokens, S)[None]
    if apart:
        positions = positions - torch.arange(batch)[:, None]
    with Allocated(q, cached) as allocated:
        causal_attention(q, k, v, positions)
    assert 0 < allocated.largest < k.numel(), allocated.by


@pytest.mark.usefixtures("threads")
def test_a_step_of_rows_of_one_length_needs_no_mask() -> None:
    H, G, S, D = 6, 2, 500, 16
    q, k, v = draw(2, H, 1, D), draw(2, G, S, D, seed=1), draw(2, G, S, D, seed=2)
    with Allocated(q, k, v) as allocated:
        causal_attention(q, k, v, torch.tensor([[S - 1]]))
    assert allocated.largest == q.numel(), allocated.by  # the output


@pytest.mark.parametrize("batch", [1, 2])
def test_a_whole_pass_makes_no_heads_of_its_pools(batch: int) -> None:
    H, G, S, D = 12, 3, 200, 32
    q, k, v = (split_heads(draw(batch, S, n * D, seed=n), n) for n in (H, G, G))
    with Allocated(q, k, v) as allocated:
        causal_attention(q, k, v, torch.arange(S)[None])
    assert allocated.largest <= q.numel()  # as many as the queries
    with Allocated(q, k, v) as allocated:
        causal_attention(q[:, :, -20:], k, v, torch.arange(S - 20, S)[None])
    assert allocated.largest <= k.numel()


@pytest.mark.usefixtures("threads")
def test_no_operator_copies_them_internally() -> None:
    """Measured at the allocator, which counts the scratch of SDPA: one head's keys would be detected."""
    H, G, S, D = 16, 2, 4096, 64
    q, k, v = draw(1, H, 1, D), draw(1, G, S, D, seed=1), draw(1, G, S, D, seed=2)
    last = torch.tensor([[S - 1]])
    one_head = S * D * 4
    assert peak_memory(lambda: causal_attention(q, k, v, last)) < one_head / 2
    copied = peak_memory(
        lambda: F.scaled_dot_product_attention(
            q, k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
        )
    )
    assert copied > 2 * H * one_head


def test_a_whole_pass_needs_its_output_and_little_more() -> None:
    H, G, S, D = 16, 2, 1024, 64
    q, k, v = draw(1, H, S, D), draw(1, G, S, D, seed=1), draw(1, G, S, D, seed=2)
    everything, pools = H * S * D * 4, G * S * D * 4
    peak = peak_memory(lambda: causal_attention(q, k, v, torch.arange(S)[None]))
    assert everything <= peak < 1.2 * everything + pools  # its output; scratch of a block; no K, no V


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), RATIOS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cache_shrinks_by_exactly_the_ratio(n_heads: int, n_kv_heads: int, dtype: torch.dtype) -> None:
    d_model = 8 * n_heads
    full = FullAttention(d_model, n_heads).to(dtype)
    for layer in (
        GroupedQueryAttention(d_model, n_heads, n_kv_heads=n_kv_heads).to(dtype),
        RoutedAttention(d_model, n_heads, n_kv_heads=n_kv_heads).to(dtype),
        TokenRoutedAttention(d_model, n_heads, n_kv_heads=n_kv_heads).to(dtype),
    ):
        caches = [mechanism.new_cache(2, 100) for mechanism in (layer, full)]
        assert caches[0].nbytes * n_heads == caches[1].nbytes * n_kv_heads
        assert layer.read_bytes(77) * n_heads == full.read_bytes(77) * n_kv_heads
        asked: list[Any] = []
        given_out = peak_memory(lambda layer=layer, asked=asked: asked.append(layer.new_cache(2, 100)))
        assert given_out == caches[0].nbytes


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), RATIOS)
def test_head_h_reads_pool_h_over_the_group(n_heads: int, n_kv_heads: int) -> None:
    """The values of each pool are its number, so that the output of a head shows which pool it read."""
    expected = torch.tensor([h // (n_heads // n_kv_heads) for h in range(n_heads)], dtype=torch.float32)
    numbers = torch.arange(n_kv_heads, dtype=torch.float32)
    for positions in (torch.tensor([[4]]), torch.arange(5)[None], torch.tensor([[2, 3]])):
        q, k = draw(1, n_heads, positions.shape[1], 8), draw(1, n_kv_heads, 5, 8, seed=1)
        values = numbers[None, :, None, None].expand(1, n_kv_heads, 5, 8)
        heads = causal_attention(q, k, values, positions)
        close(heads, expected[None, :, None, None].expand_as(heads))
    layer, x = GroupedQueryAttention(8 * n_heads, n_heads, n_kv_heads=n_kv_heads), draw(2, 5, 8 * n_heads)
    x[..., 0] = 1
    layer.v_proj.weight.data = F.pad(numbers.repeat_interleave(8)[:, None], (0, 8 * n_heads - 1))
    layer.o_proj.weight.data = torch.eye(8 * n_heads)
    close(layer(x), expected.repeat_interleave(8).expand_as(x))


@given(
    group=st.integers(1, 5), pools=st.integers(1, 4), head_dim=st.sampled_from([2, 6, 8]), seed=st.integers(0)
)
def test_any_ratio_is_full_attention_with_repeated_weights(
    group: int, pools: int, head_dim: int, seed: int
) -> None:
    layer = sharp(GroupedQueryAttention(12, group * pools, n_kv_heads=pools, head_dim=head_dim), seed % 2**31)
    full = FullAttention(12, group * pools, head_dim=head_dim)
    weights = layer.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        weights[name] = weights[name].unflatten(0, (pools, -1)).repeat_interleave(group, 0).flatten(0, 1)
    full.load_state_dict(weights)
    x = draw(2, TIME, 12)
    close(layer(x), full(x))


def routed(pools: list[int], n_kv_heads: int, **options: Any) -> RoutedAttention:
    layer = sharp(RoutedAttention(24, len(pools), n_kv_heads=n_kv_heads, head_dim=8, **options))
    layer.route(pools)
    return layer


def by_hand(layer: PooledAttention, x: Tensor, pools: Tensor) -> Tensor:
    """Every head of every token over the keys of its pool, ``pools`` (B, H, T), one by one."""
    k, v, positions = layer.project_kv(x)
    q = layer.rope(split_heads(layer.q_proj(x), layer.n_heads), positions)
    heads = torch.empty_like(q)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        g = pools[b, h, t]
        weights = (k[b, g, : t + 1] @ q[b, h, t] / layer.head_dim**0.5).softmax(0)
        heads[b, h, t] = weights @ v[b, g, : t + 1]
    return layer.o_proj(merge_heads(heads))


ROUTES = [
    ([0, 1, 2, 0, 1, 2], 3),  # not neighbours
    ([2, 2, 2, 0, 1], 3),  # pools of 1, 1 and 3 heads; 3 does not divide 5
    ([2, 0, 2, 2], 4),  # two pools that nobody reads
    ([1, 1, 1], 2),
    ([0], 1),
]


@pytest.mark.parametrize(("pools", "n_kv_heads"), ROUTES)
def test_a_route_is_what_the_heads_read(pools: list[int], n_kv_heads: int) -> None:
    layer, x = routed(pools, n_kv_heads), draw(2, 7, 24)
    assert layer.pools == pools
    expected = by_hand(layer, x, torch.tensor(pools)[None, :, None].expand(2, -1, 7))
    close(layer(x), expected)
    with torch.no_grad():
        close(layer(x), expected)  # pool by pool, which copies nothing
        cache = layer.new_cache(2, 7)
        close(torch.cat([layer(piece, cache) for piece in x.split([3, 2, 1, 1], 1)], 1), expected)


def test_a_layer_starts_with_neighbours_in_a_pool() -> None:
    assert RoutedAttention(24, 6, n_kv_heads=2).pools == [0, 0, 0, 1, 1, 1]
    assert RoutedAttention(25, 5, n_kv_heads=2, rope=None).pools == [0, 0, 0, 1, 1]
    assert RoutedAttention(70, 7, n_kv_heads=3).pools == [0, 0, 0, 1, 1, 2, 2]


def test_with_the_route_of_gqa_it_is_gqa() -> None:
    grouped = sharp(GroupedQueryAttention(24, 6, n_kv_heads=2))
    layer = RoutedAttention(24, 6, n_kv_heads=2).eval()
    layer.load_state_dict({**layer.state_dict(), **grouped.state_dict()})
    x = draw(BATCH, TIME, 24)
    close(layer(x), grouped(x))
    results = []
    for each in (layer, grouped):
        with torch.no_grad():
            cache = each.new_cache(BATCH, TIME + 3)
            outputs = [each(x, cache)]
            cache.trim(torch.tensor([TIME, 2, 5]))
            outputs += [each(x[:, :2], cache), each(x[:, :1], cache)]
        results.append(torch.cat(outputs, 1))
    close(*results)
    layer.route([0, 0, 1, 0, 1, 1])
    assert not torch.allclose(layer(x), grouped(x), atol=1e-2)


def test_routing_twice_forgets_the_first_route() -> None:
    layer = routed([0, 1, 2, 2], 3)
    layer.route([2, 2, 1, 1])
    assert layer.pools == [2, 2, 1, 1]
    assert layer.route_logits.sum(-1).tolist() == pytest.approx(4 * [0.1])
    assert layer.route_logits.requires_grad


@pytest.mark.parametrize(
    ("pools", "error", "names"),
    [
        ([0, 1, 3, 0], ValueError, r"pools\[2\]: expected at most 2 \(n_kv_heads=3, from 0\), got 3"),
        ([0, -1, 0, 0], ValueError, r"pools\[1\]: expected at least 0, got -1"),
        ([0, 1], ValueError, "pools: expected one for each of n_heads=4, got 2"),
        ([0, 1, 2, 0, 1], ValueError, "pools: expected one for each of n_heads=4, got 5"),
        ([], ValueError, "pools: expected one for each of n_heads=4, got 0"),
        ([0, 1.5, 0, 0], TypeError, r"pools\[1\]: expected an integer, got float"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_route_to_nowhere_is_refused_and_the_old_one_kept(
    pools: list[Any], error: type[Exception], names: str
) -> None:
    layer = routed([2, 1, 0, 0], 3)
    with pytest.raises(error, match=names):
        layer.route(pools)
    assert layer.pools == [2, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_choice_is_exactly_one_pool(dtype: torch.dtype) -> None:
    """To the last bit: 1 + p - p is not 1 in half precision, and would weaken every head by up to 0.4%."""
    logits = draw(500, 4).to(dtype).requires_grad_()
    choice = one_hot_choice(logits)
    assert choice.dtype == dtype
    assert ((choice == 0) | (choice == 1)).all()
    assert (choice.sum(-1) == 1).all()
    assert torch.equal(choice.argmax(-1), logits.argmax(-1))


def test_a_choice_has_the_gradient_of_the_softmax() -> None:
    logits, weights = draw(6, 4).requires_grad_(), draw(6, 4, seed=1)
    got, expected = (
        torch.autograd.grad((c * weights).sum(), logits)[0]
        for c in (one_hot_choice(logits), logits.softmax(-1))
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", [RoutedAttention, TokenRoutedAttention])
def test_training_computes_what_inference_computes(kind: type[Mechanism]) -> None:
    layer, x = sharp(kind(24, 4, n_kv_heads=3)), draw(2, 9, 24)  # type: ignore[call-arg, arg-type]
    expected = layer.eval()(x)
    assert torch.equal(layer.train()(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_a_route_learns_from_every_pool(training: bool) -> None:
    """Straight-through: also the pools that were not selected get their share of the gradient."""
    layer = routed([0, 2, 1, 1], 3).train(training)
    layer(draw(2, 7, 24)).square().sum().backward()
    assert layer.route_logits.grad is not None
    assert (layer.route_logits.grad != 0).all()


def test_a_pool_that_nobody_reads_learns_nothing() -> None:
    layer = routed([0, 2, 2, 0], 3)
    layer(draw(2, 7, 24)).square().sum().backward()
    learned = layer.k_proj.weight.grad.unflatten(0, (3, 8)).abs().amax((1, 2)) > 0  # type: ignore[union-attr]
    assert learned.tolist() == [True, False, True]


def test_a_route_can_be_learned() -> None:
    """The route of a teacher with the same other weights is found by gradient alone."""
    torch.manual_seed(0)
    teacher, student = routed([0, 1, 1, 0], 2, rope=None), routed([0, 0, 1, 1], 2, rope=None).train()
    x = draw(8, 6, 24)
    optimiser = torch.optim.Adam([student.route_logits], lr=0.1)
    for _ in range(60):
        optimiser.zero_grad()
        (student(x) - teacher(x).detach()).square().mean().backward()
        optimiser.step()
    assert student.eval().pools == teacher.pools
    close(student(x), teacher(x))


def test_a_step_over_routed_pools_copies_none_of_them() -> None:
    layer = sharp(RoutedAttention(64, 8, n_kv_heads=2, head_dim=32)).requires_grad_(False)
    cache, x = layer.new_cache(2, 600), draw(2, 500, 64)
    layer(x, cache)
    with Allocated(x, *cache.tensors(), *layer.parameters()) as allocated:
        layer(x[:, :1], cache)
    assert allocated.largest < cache.tensors()[0].numel() / 4, allocated.by


@torch.no_grad()
def test_a_token_reads_the_pools_that_it_selects() -> None:
    layer, x = sharp(TokenRoutedAttention(24, 5, n_kv_heads=3, head_dim=8)), draw(2, 7, 24)
    selected = layer.router(x).view(2, 7, 5, 3).argmax(-1).transpose(1, 2)
    assert len(selected.unique()) == 3  # all pools are read
    close(layer(x), by_hand(layer, x, selected))
    cache = layer.new_cache(2, 7)
    close(
        torch.cat([layer(piece, cache) for piece in x.split([3, 2, 1, 1], 1)], 1), by_hand(layer, x, selected)
    )


@torch.no_grad()
def test_a_token_selects_by_its_own_content_alone() -> None:
    """At any position, with any tokens around it."""
    layer, x = sharp(TokenRoutedAttention(24, 5, n_kv_heads=3, head_dim=8)), draw(2, 7, 24)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    assert torch.equal(layer.choice(x)[..., order, :], layer.choice(x[:, order]))
    changed = x.clone()
    changed[:, 4] = -x[:, 4]
    same = (layer.choice(x) == layer.choice(changed)).all((0, 1, 2, 4))
    assert same.tolist() == [True, True, True, True, False, True, True]
    assert layer.choice(x).sum(2).eq(1).all()  # one pool per head


def test_the_router_learns() -> None:
    layer = sharp(TokenRoutedAttention(24, 4, n_kv_heads=3))
    layer(draw(2, 7, 24)).square().sum().backward()
    assert layer.router.weight.grad is not None
    assert (layer.router.weight.grad.abs().sum(-1) > 0).all()


def test_routing_by_the_token_stores_what_grouping_stores() -> None:
    sizes = {
        kind(24, 6, n_kv_heads=3).cache_bytes(50) for kind in (GroupedQueryAttention, TokenRoutedAttention)
    }
    assert len(sizes) == 1


@pytest.mark.parametrize("name", SHARERS)
@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_steps_by_a_decode_kernel_are_the_plain_ones(
    name: str, reads: bool, cache_dtype: torch.dtype
) -> None:
    """Rows of different length; a kernel is asked for single tokens alone, and reads the cache as it is."""
    kind: Callable[..., Any] = REGISTRY[name].tiny  # type: ignore[assignment]
    owner, layer = sharp(kind()), sharp(kind(reader=True) if reads else kind(), seed=5)
    if isinstance(layer, RoutedAttention):
        layer.route([2, 2, 0, 2, 0])
    x, theirs = (draw(BATCH, TIME, 24, seed=seed) for seed in (1, 2))
    asked = []

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        asked.append((k.dtype, lengths.dtype, lengths.tolist()))
        return decode_attention(q, k, v, lengths)

    results = []
    for decode in (None, step):
        layer.decode = decode
        own = layer.new_cache(BATCH, TIME, dtype=cache_dtype)
        cache = owner.new_cache(BATCH, TIME, dtype=cache_dtype) if reads else own
        outputs = []
        for start, length in ((0, 7), (7, 1), (8, 2), (10, 1)):
            piece = slice(start, start + length)
            source = owner.project_kv(theirs[:, piece], cache) if reads else None
            outputs.append(layer(x[:, piece], own, source))
            if start == 0:
                cache.trim(torch.tensor([7, 2, 4]))
        results.append(torch.cat(outputs, 1))
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-4)
    calls = len(asked) // 2
    assert calls == (2 if name == "routed" else 1)  # of three pools, one has no reader
    wanted = [[8, 3, 5], [11, 6, 8]]
    assert asked == [(cache_dtype, torch.int32, rows) for rows in wanted for _ in range(calls)]


@pytest.mark.parametrize("name", SHARERS)
def test_a_kernel_is_never_asked_where_gradients_are_wanted(name: str) -> None:
    layer = sharp(REGISTRY[name].tiny())

    def step(*_: Tensor) -> Tensor:
        raise AssertionError

    layer.decode = step
    layer(draw(1, 1, 24)).sum().backward()
    assert layer.q_proj.weight.grad is not None


@pytest.mark.parametrize(
    ("kind", "options", "error", "names"),
    [
        (GroupedQueryAttention, {"n_kv_heads": 0}, ValueError, "n_kv_heads: expected at least 1, got 0"),
        (GroupedQueryAttention, {"n_kv_heads": -2}, ValueError, "n_kv_heads: expected at least 1, got -2"),
        (GroupedQueryAttention, {"n_kv_heads": 4}, ValueError, "n_kv_heads: expected a divisor of n_heads=6"),
        (
            GroupedQueryAttention,
            {"n_kv_heads": 12},
            ValueError,
            "n_kv_heads: expected a divisor of n_heads=6",
        ),
        (GroupedQueryAttention, {"n_kv_heads": 2.0}, TypeError, "n_kv_heads: expected an integer"),
        (RoutedAttention, {"n_kv_heads": 0}, ValueError, "n_kv_heads: expected at least 1, got 0"),
        (RoutedAttention, {"n_kv_heads": 7}, ValueError, r"n_kv_heads: expected at most 6 \(n_heads"),
        (TokenRoutedAttention, {"n_kv_heads": 0}, ValueError, "n_kv_heads: expected at least 1, got 0"),
        (TokenRoutedAttention, {"n_kv_heads": 7}, ValueError, r"n_kv_heads: expected at most 6 \(n_heads"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_impossible_pools_are_refused_by_name(
    kind: Any, options: dict[str, Any], error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=names):
        kind(24, 6, **options)


@pytest.mark.parametrize("name", ["gqa", "routed", "token_routed"])
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_cache_of_another_mechanism_is_refused_by_name(name: str) -> None:
    layer = REGISTRY[name](24, 6, n_kv_heads=2)  # type: ignore[call-arg]
    x = draw(2, 4, 24)
    for other in (FullAttention(24, 6), GroupedQueryAttention(24, 6, n_kv_heads=3)):
        cache = other.new_cache(2, 9)
        with pytest.raises(ValueError, match=r"k: expected shape \(2, \d, 4, 4\)"):
            layer(x, cache)
        assert cache.length == 0
    for cache in (NoCache(2, 9, "cpu"), REGISTRY["mla"].tiny().new_cache(2, 9)):
        with pytest.raises(TypeError, match="cache: expected KVCache, got"):
            layer(x, cache)


@pytest.mark.parametrize("name", SHARERS)
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_source_for_another_number_of_pools_is_refused_by_name(name: str) -> None:
    reader = REGISTRY[name].tiny(reader=True)  # type: ignore[call-arg]
    x = draw(2, 4, 24)
    other = GroupedQueryAttention(
        24, 2 * (reader.n_kv_heads + 1), n_kv_heads=reader.n_kv_heads + 1, head_dim=8
    )
    with pytest.raises(ValueError, match=rf"source.k: expected shape \(2, {reader.n_kv_heads}, tokens, 8\)"):
        reader(x, source=other.project_kv(x))


@pytest.mark.parametrize("name", SHARERS)
@pytest.mark.usefixtures("unchecked_shapes")
def test_project_kv_checks_its_inputs_too(name: str) -> None:
    """It is called by itself for a layer that others read."""
    layer = sharp(REGISTRY[name].tiny())
    x = draw(2, 4, 24)
    with pytest.raises(TypeError, match="cache: expected KVCache, got NoCache"):
        layer.project_kv(x, NoCache(2, 9, "cpu"))
    with pytest.raises(ValueError, match="x: expected the cache's batch of 3, got 2"):
        layer.project_kv(x, layer.new_cache(3, 9))
    with pytest.raises(ValueError, match="x: expected shape"):
        layer.project_kv(x[..., 1:])
