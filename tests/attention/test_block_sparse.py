"""MoBA and NSA: what is selected, that nothing else is read, and the half-filled block."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_tools import Allocated, close, draw
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kvlearn.attention import core
from kvlearn.attention.base import Cache
from kvlearn.attention.core import attend_to_blocks, attention, split_heads, top_blocks
from kvlearn.attention.full import FullAttention, GroupedQueryAttention
from kvlearn.attention.moba import BlockCache, MixtureOfBlockAttention
from kvlearn.attention.nsa import BlockMap, NativeSparseAttention, NSACache, Sizes, block_scores
from kvlearn.attention.window import WindowAttention
from kvlearn.measure import peak_memory

Layer = MixtureOfBlockAttention | NativeSparseAttention
D_MODEL = 24

MOBA: dict[str, dict[str, Any]] = {
    "heads": {"n_heads": 3, "block": 4, "n_blocks": 3},
    "pools": {"n_heads": 6, "n_kv_heads": 2, "block": 3, "n_blocks": 2},
    "one pool, odd": {"n_heads": 5, "n_kv_heads": 1, "block": 5, "n_blocks": 4, "rope": None},
    "blocks of one": {"n_heads": 2, "block": 1, "n_blocks": 4},
    "own block alone": {"n_heads": 2, "block": 7, "n_blocks": 1},
    "more blocks than exist": {"n_heads": 2, "block": 7, "n_blocks": 99},
}
NSA: dict[str, dict[str, Any]] = {
    "as in the paper, a sixteenth": {
        "n_heads": 4, "n_kv_heads": 2, "compress": 2, "stride": 1, "block": 4, "n_blocks": 4, "window": 6
    },
    "far overlap": {
        "n_heads": 3, "compress": 6, "stride": 2, "block": 6, "n_blocks": 3, "n_local": 1, "window": 5
    },
    "no overlap": {
        "n_heads": 4, "n_kv_heads": 1, "compress": 3, "stride": 3, "block": 6, "n_blocks": 3, "n_local": 1,
        "window": 1,
    },
    "one and the same": {
        "n_heads": 2, "compress": 4, "stride": 4, "block": 4, "n_blocks": 4, "n_local": 1, "window": 40
    },
    "no positions": {
        "n_heads": 2, "compress": 1, "stride": 1, "block": 2, "n_blocks": 5, "n_local": 3, "window": 3,
        "rope": None,
    },
}  # fmt: skip
EVERY = [
    *((MixtureOfBlockAttention, o) for o in MOBA.values()),
    *((NativeSparseAttention, o) for o in NSA.values()),
]
NAMES = [*(f"moba: {name}" for name in MOBA), *(f"nsa: {name}" for name in NSA)]
every_layer = pytest.mark.parametrize(("kind", "options"), EVERY, ids=NAMES)
every_moba = pytest.mark.parametrize("options", MOBA.values(), ids=MOBA)
every_nsa = pytest.mark.parametrize("options", NSA.values(), ids=NSA)


def sharp(layer: Any, seed: int = 0) -> Any:
    """``layer`` with weights drawn anew, so large that attention picks."""
    for i, weight in enumerate(layer.parameters()):
        spread = 1.5 * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.5
        weight.data = draw(*weight.shape, seed=1000 * seed + i).to(weight) * spread
    return layer.eval()


def build(kind: type[Layer], options: dict[str, Any], seed: int = 0) -> Any:
    return sharp(kind(D_MODEL, head_dim=8, **options), seed)


def feed(layer: Layer, x: Tensor, cuts: list[int], cache: Cache) -> Tensor:
    edges = [0, *sorted(set(cuts)), x.shape[1]]
    return torch.cat([layer(x[:, a:b], cache) for a, b in pairwise(edges) if b > a], dim=1)


# ---- choosing, and attending to what was selected


@given(seed=st.integers(0, 999), n=st.integers(0, 6), N=st.integers(1, 7), ties=st.booleans())
def test_the_best_of_what_is_allowed(seed: int, n: int, N: int, ties: bool) -> None:
    scores, allowed = draw(2, 3, 2, N, seed=seed), draw(2, 1, 2, N, seed=seed + 1) > 0
    scores = scores.round() if ties else scores
    best = top_blocks(scores, allowed, n)
    for b, h, t in torch.cartesian_prod(*(torch.arange(m) for m in (2, 3, 2))).tolist():
        candidates = [i for i in range(N) if allowed[b, 0, t, i]]
        candidates.sort(key=lambda i: (-scores[b, h, t, i].item(), i))  # of equals the earlier
        assert best[b, h, t].nonzero()[:, 0].tolist() == sorted(candidates[:n])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("case", ["step", "step, rows apart", "chunk", "chunk, rows apart", "whole"])
def test_attention_to_selected_blocks_is_masked_attention_and_reads_no_other(case: str, shared: bool) -> None:
    B, H, G, S, D, block = 3, 6, 2, 11, 8, 4
    positions = {
        "step": torch.tensor([[S - 1]]),
        "step, rows apart": torch.tensor([[S - 1], [2], [7]]),
        "chunk": torch.arange(S - 4, S)[None],
        "chunk, rows apart": torch.tensor([[S - 2], [0], [4]]) + torch.arange(2),
        "whole": torch.arange(S)[None],
    }[case]
    T = positions.shape[1]
    q, k, v = draw(B, H, T, D), draw(B, G, S, D, seed=1), draw(B, G, S, D, seed=2)
    own = (positions // block)[:, None, :, None]
    selected = (draw(B, G if shared else H, T, 3, seed=3) > 0.6) & (torch.arange(3) < own)
    selected = selected | (torch.arange(3) == own)
    by_head = selected.repeat_interleave(H // selected.shape[1], dim=1)
    mask = by_head.repeat_interleave(block, dim=-1)[..., :S] & (
        torch.arange(S) <= positions[:, None, :, None]
    )
    expected = attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), mask)
    close(attend_to_blocks(q, k, v, positions, selected, block), expected)

    read = by_head.unflatten(1, (G, -1)).any(2).any(2).repeat_interleave(block, -1)[..., :S]
    k, v = (x.masked_fill(~read[..., None], torch.nan) for x in (k, v))
    close(attend_to_blocks(q, k, v, positions, selected, block), expected)


@every_layer
@pytest.mark.parametrize("tile", [4, 64])
def test_tiles_of_any_size_give_the_naive_form_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, kind: type[Layer], options: dict[str, Any], tile: int
) -> None:
    monkeypatch.setattr(core, "TILE", tile)
    layer, x = build(kind, options), draw(2, 15, D_MODEL)
    results = []
    for form in (layer, layer.naive):
        y = form(x)
        results.append(
            [y, *torch.autograd.grad((y * draw(*y.shape, seed=1)).sum(), list(layer.parameters()))]
        )
    for got, expected in zip(*results, strict=True):
        close(got, expected, 1e-4)
    with torch.no_grad():
        close(layer(x), results[1][0])
        close(feed(layer, x, [7], layer.new_cache(2, 15)), results[1][0])


# ---- who is selected


@every_moba
def test_moba_selects_what_a_plain_loop_selects(options: dict[str, Any]) -> None:
    layer, x = build(MixtureOfBlockAttention, options), draw(2, 22, D_MODEL)
    positions, group = torch.arange(22)[None], layer.n_heads // layer.n_kv_heads
    k = layer.rope(split_heads(layer.k_proj(x), layer.n_kv_heads), positions)
    q = layer.rope(split_heads(layer.q_proj(x), layer.n_heads), positions)
    selected = layer.selected_blocks(x)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        scores = {}
        for i in range(t // layer.block):
            keys = [k[b, h // group, s] for s in range(i * layer.block, (i + 1) * layer.block)]
            scores[i] = sum(float((q[b, h, t] @ key).detach()) for key in keys) / len(keys)
        best = sorted(scores, key=lambda i: -scores[i])[: layer.n_blocks - 1]
        assert selected[b, h, t].nonzero()[:, 0].tolist() == sorted([*best, t // layer.block])


@every_nsa
def test_nsa_selects_by_the_papers_double_sum(options: dict[str, Any]) -> None:
    """With the paper's indices, which count from 1; entries are compressed one by one."""
    layer, T = build(NativeSparseAttention, options), 27
    x, length, d, size = draw(2, T, D_MODEL), layer.sizes.compress, layer.sizes.stride, layer.block
    keys = split_heads(layer.k_proj(x), 3 * layer.n_kv_heads)[:, : layer.n_kv_heads]
    q = layer.rope(split_heads(layer.q_proj(x), layer.n_heads), torch.arange(T)[None])
    selected, free = layer.selected_blocks(x), 0
    group = layer.n_heads // layer.n_kv_heads
    for b, g, t in torch.cartesian_prod(*(torch.arange(n) for n in (2, layer.n_kv_heads, T))).tolist():
        p: dict[int, float] = {}
        entries = []
        for i in range(T):
            if i * d + length <= t + 1:
                entry = layer.k_map(keys[b, g, i * d : i * d + length])
                entries.append(layer.rope(entry[None, None, None], torch.tensor([[i * d]]))[0, 0, 0])
        for h in range(g * group, (g + 1) * group) if entries else ():
            weights = torch.softmax(torch.stack(entries) @ q[b, h, t] / 8**0.5, 0).tolist()
            for i, weight in enumerate(weights, start=1):
                p[i] = p.get(i, 0.0) + weight
        score = {
            j: sum(p.get(size // d * j - m - n, 0.0) for m in range(size // d) for n in range(length // d))
            for j in range(1, t // size + 2)
        }
        own = t // size + 1
        always = {1, *range(max(1, own - layer.n_local + 1), own + 1)}
        rest = sorted(set(score) - always, key=lambda j: -score[j])
        free += len(rest) > layer.n_blocks - len(always)
        read = always | set(rest[: layer.n_blocks - len(always)])
        assert (selected[b, g, t].nonzero()[:, 0] + 1).tolist() == sorted(read)
    assert free > 15  # choices that might have fallen otherwise


def test_each_stride_of_a_compressed_block_counts_once_where_it_lies() -> None:
    """l = 4, d = 2, l' = 6: the third compressed block, tokens 4 to 7, lies half in each of two blocks."""
    scores = block_scores(torch.eye(5)[None, None, None], Sizes(4, 2, 1), 6, 12)
    assert scores[0, 0].tolist() == [[2, 0], [2, 0], [1, 1], [0, 2], [0, 2]]


@every_layer
def test_a_query_reads_its_own_block_no_later_one_and_as_many_as_it_may(
    kind: type[Layer], options: dict[str, Any]
) -> None:
    layer = build(kind, options)
    selected = layer.selected_blocks(draw(2, 25, D_MODEL))
    own, index = torch.arange(25)[:, None] // layer.block, torch.arange(selected.shape[-1])
    assert selected.shape[-1] == own.max() + 1
    assert (selected & (index == own)).any(-1).all()
    assert not (selected & (index > own)).any()
    assert (selected.sum(-1) == (own[:, 0] + 1).clamp_max(layer.n_blocks)).all()
    if isinstance(layer, NativeSparseAttention):
        assert selected[..., 0].all()
        assert selected[
            (index <= own) & (index > own - layer.n_local).expand(2, layer.n_kv_heads, -1, -1)
        ].all()


@every_layer
@pytest.mark.parametrize("t", [1, 8, 9, 10, 11, 20])
def test_what_comes_later_changes_no_choice(kind: type[Layer], options: dict[str, Any], t: int) -> None:
    """Not even in the block of the query, which the later tokens fill."""
    layer, x = build(kind, options), draw(2, 21, D_MODEL)
    changed = torch.cat((x[:, :t], 5 * draw(2, 21 - t, D_MODEL, seed=7)), dim=1)
    whole = layer.selected_blocks(x)[:, :, :t]
    assert torch.equal(layer.selected_blocks(changed)[:, :, :t], whole)
    shorter = layer.selected_blocks(x[:, :t])
    assert torch.equal(whole[..., : shorter.shape[-1]], shorter)


@every_layer
@given(cuts=st.lists(st.integers(1, 20), max_size=12))
def test_the_cache_holds_the_same_however_the_sequence_was_cut(
    kind: type[Layer], options: dict[str, Any], cuts: list[int]
) -> None:
    """Means, compressed blocks and tokens that wait: a half-filled block goes on where it was left."""
    layer, x = build(kind, options), draw(2, 21, D_MODEL)
    at_once, cut = layer.new_cache(2, 23), layer.new_cache(2, 23)
    close(feed(layer, x, cuts, cut), feed(layer, x, [], at_once))
    for mine, other in zip(content(cut), content(at_once), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def content(cache: BlockCache | NSACache) -> list[Tensor]:
    """The tensors of a cache, without what is left of tokens that no longer count."""
    if isinstance(cache, BlockCache):
        return cache.tensors()
    start = cache.sizes.complete(cache.length) * cache.sizes.stride
    return [
        cache.waiting[:, :, :, : cache.length - start],
        cache.compressed,
        *cache.tokens.tensors(),
        *cache.ring.tensors(),
    ]


# ---- bytes


@every_moba
@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 15, 16, 20])
@torch.no_grad()
def test_a_step_of_moba_reads_what_it_says_and_nothing_else(options: dict[str, Any], length: int) -> None:
    """All that it must not read is NaN."""
    layer, x = build(MixtureOfBlockAttention, options), draw(2, length, D_MODEL)
    expected = layer(x)[:, -1:]
    cache = layer.new_cache(2, 30)
    if length > 1:
        layer(x[:, :-1], cache)
    selected = layer.selected_blocks(x)[:, :, -1].unflatten(1, (layer.n_kv_heads, -1))
    read = selected.any(2).repeat_interleave(layer.block, -1)[..., :length]  # (B, G, S)
    read = torch.cat((read, torch.zeros(2, layer.n_kv_heads, 30 - length, dtype=torch.bool)), dim=-1)
    past = (length - 1) // layer.block
    cache.k.masked_fill_(~read[..., None], torch.nan)
    cache.v.masked_fill_(~read[..., None], torch.nan)
    cache.means[:, :, past:] = torch.nan
    close(layer(x[:, -1:], cache), expected)
    touched = 4 * 8 * (2 * int(read.sum()) + 2 * layer.n_kv_heads * past)
    said = layer.read_bytes(length, batch=2)
    assert touched == said if layer.n_heads == layer.n_kv_heads else touched <= said


@every_moba
@pytest.mark.parametrize("length", [1, 6, 7, 15])
@torch.no_grad()
def test_a_step_of_moba_reads_no_mean_of_its_own_block(options: dict[str, Any], length: int) -> None:
    """Not even where the new token has just filled it."""
    layer, x = build(MixtureOfBlockAttention, options), draw(2, length, D_MODEL)
    scored, select = [], layer.select
    layer.select = lambda q, positions, means: scored.append(means.shape[2]) or select(q, positions, means)
    cache = layer.new_cache(2, 30)
    layer(x)
    layer(x, layer.new_cache(2, 30))
    if length > 1:
        layer(x[:, :-1], cache)
        scored.pop()
    layer(x[:, -1:], cache)
    assert scored == 3 * [(length - 1) // layer.block]


@every_moba
@pytest.mark.parametrize("name", ["k", "v"])
@torch.no_grad()
def test_a_step_of_moba_reads_all_that_it_has_selected(options: dict[str, Any], name: str) -> None:
    """Each key and value of a selected block counts: a NaN appears in its row, and only there."""
    layer, x = build(MixtureOfBlockAttention, options), draw(2, 20, D_MODEL)
    read = layer.selected_blocks(x)[0, :, -1].any(0).repeat_interleave(layer.block)[:19]
    for slot in range(19):
        cache = layer.new_cache(2, 20)
        layer(x[:, :-1], cache)
        getattr(cache, name)[0, :, slot] = torch.nan
        y = layer(x[:, -1:], cache)
        assert y[0].isnan().any() == read[slot]
        assert y[1].isfinite().all()


def test_readers_of_a_pool_that_disagree_read_the_union() -> None:
    """Two heads that want different blocks: read_bytes' upper bound is met."""
    layer = MixtureOfBlockAttention(4, 2, n_kv_heads=1, head_dim=2, block=2, n_blocks=2, rope=None)
    with torch.no_grad():
        layer.k_proj.weight.copy_(torch.eye(2, 4))
        layer.q_proj.weight.copy_(torch.tensor([[0, 0, 1.0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1.0, 0]]))
    x = torch.zeros(1, 7, 4)
    x[0, :2, 0], x[0, 2:4, 1], x[0, 6, 2] = 1, 1, 1  # block 0 points one way, block 1 another
    assert layer.selected_blocks(x)[0, :, 6].tolist() == [
        [True, False, False, True],
        [False, True, False, True],
    ]
    assert layer.read_bytes(7) == 4 * 2 * (2 * (2 * 2 + 1) + 3)
    x[0, 6, 2] = -1  # both score block 2 highest: its keys are 0 and better than either
    assert layer.selected_blocks(x)[0, :, 6].any(0).sum() <= 3


@every_nsa
@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 7, 8, 12, 13, 20, 21])
@torch.no_grad()
def test_a_step_of_nsa_reads_exactly_what_it_says(options: dict[str, Any], length: int) -> None:
    """All that it must not read is NaN, and what is left is counted."""
    layer, x = build(NativeSparseAttention, options), draw(2, length, D_MODEL)
    expected, cache, G = layer(x)[:, -1:], layer.new_cache(2, 30), layer.n_kv_heads
    if length > 1:
        layer(x[:, :-1], cache)
    read = layer.selected_blocks(x)[:, :, -1].repeat_interleave(layer.block, -1)[..., :length]
    before, after = (layer.sizes.complete(n) for n in (length - 1, length))
    waited = length - 1 - before * layer.sizes.stride if after > before else 0
    for buffer in (cache.tokens.k, cache.tokens.v):
        buffer[:, :, :length].masked_fill_(~read[..., None], torch.nan)
        buffer[:, :, length:] = torch.nan
    cache.waiting[:, :, :, waited:] = torch.nan
    cache.compressed[:, :, :, before:] = torch.nan
    ring = min(length, layer.sizes.window)
    for buffer in (cache.ring.k, cache.ring.v):
        buffer[:, :, ring:] = torch.nan
    close(layer(x[:, -1:], cache), expected)
    tokens = int(read.sum()) + 2 * G * (waited + after + ring)
    assert 2 * 4 * 8 * tokens == layer.read_bytes(length, batch=2)


@every_layer
@torch.no_grad()
def test_a_step_makes_nothing_as_large_as_the_cache(kind: type[Layer], options: dict[str, Any]) -> None:
    layer = build(kind, {**options, "n_blocks": min(options["n_blocks"], 9)})
    cache = layer.new_cache(1, 1500)
    layer(draw(1, 1400, D_MODEL), cache)
    x = draw(1, 1, D_MODEL, seed=3)
    with Allocated(*cache.tensors()) as allocated:
        layer(x, cache)
    compressed = 0 if kind is MixtureOfBlockAttention else 2 * layer.sizes.complete(1401) * 8 * layer.n_heads
    assert 0 < allocated.largest < max(1400 * 8, compressed), allocated.by


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", [MixtureOfBlockAttention, NativeSparseAttention])
def test_the_memory_of_a_pass_grows_with_the_length_and_not_with_its_square(
    kind: type[Layer], train: bool
) -> None:
    layer = sharp(kind(16, 2, n_kv_heads=1))

    def one_pass(T: int) -> None:
        with torch.set_grad_enabled(train):
            y = layer(draw(1, T, 16))
            if train:
                y.sum().backward()

    peaks = {T: peak_memory(lambda T=T: one_pass(T)) for T in (256, 512)}
    assert peaks[512] < 2.3 * peaks[256]


def test_stored_is_more_than_full_and_read_is_less() -> None:
    """The point of the chapter, in bytes: selection does not make the cache smaller."""
    full = FullAttention(64, 4)
    moba, nsa = MixtureOfBlockAttention(64, 4), NativeSparseAttention(64, 4)
    for layer in (moba, nsa):
        assert layer.cache_bytes(4096) > full.cache_bytes(4096)
        assert layer.read_bytes(4096) < full.read_bytes(4096)
    token = 2 * 64 * 4
    assert moba.cache_bytes(4096) == token * 4096 + token // 2 * 256
    assert moba.read_bytes(4096) == token * 64 + token // 2 * 255
    assert nsa.cache_bytes(4096) == token * (4096 + 32 + 1023 + 7)
    assert nsa.read_bytes(4096) == token * (1023 + 96 + 32 + 7)
    assert nsa.read_bytes(4095) == token * (1022 + 95 + 32)


def test_sharing_keys_saves_nsa_its_reading_and_moba_less_of_it() -> None:
    """8 heads on 2 KV heads: NSA's select together, MoBA's each for itself."""
    full, pools = ({"n_kv_heads": n} for n in (8, 2))
    assert 4 * NativeSparseAttention(64, 8, **pools).read_bytes(4096) == NativeSparseAttention(
        64, 8, **full
    ).read_bytes(4096)
    mine, all_heads = (MixtureOfBlockAttention(64, 8, **o).read_bytes(4096) for o in (pools, full))
    assert all_heads / 4 < mine < all_heads


# ---- limits


@pytest.mark.parametrize(
    "options", [{"block": 40}, {"block": 3, "n_blocks": 7}, {"block": 1, "n_blocks": 99}]
)
def test_moba_that_reads_everything_is_grouped_attention(options: dict[str, int]) -> None:
    full = sharp(GroupedQueryAttention(D_MODEL, 6, n_kv_heads=2, head_dim=8))
    layer = MixtureOfBlockAttention(D_MODEL, 6, n_kv_heads=2, head_dim=8, **options)
    layer.load_state_dict(full.state_dict())
    x = draw(2, 20, D_MODEL)
    close(layer(x), full(x))
    assert layer.selected_blocks(x).sum(-1).max() == -(-20 // layer.block)


def test_moba_of_one_block_is_attention_in_separate_pieces() -> None:
    full = sharp(FullAttention(D_MODEL, 3, rope=None))
    layer = MixtureOfBlockAttention(D_MODEL, 3, block=5, n_blocks=1, rope=None)
    layer.load_state_dict(full.state_dict())
    x = draw(2, 18, D_MODEL)
    close(layer(x), torch.cat([full(piece) for piece in x.split(5, 1)], 1))


def branch_alone(layer: NativeSparseAttention, branch: int) -> NativeSparseAttention:
    with torch.no_grad():
        layer.gate_proj.weight.zero_()
        layer.gate_proj.bias.copy_(
            200 * (torch.arange(3) == branch).float().repeat_interleave(layer.n_heads) - 100
        )
    return layer


@every_nsa
def test_the_window_branch_alone_is_window_attention(options: dict[str, Any]) -> None:
    layer = branch_alone(build(NativeSparseAttention, options), 2)
    window = WindowAttention(
        D_MODEL, layer.n_heads, n_kv_heads=layer.n_kv_heads, head_dim=8, window=layer.sizes.window,
        rope=layer.rope.config,
    )  # fmt: skip
    weights = {name: weight for name, weight in layer.state_dict().items() if name in window.state_dict()}
    for name in ("k_proj.weight", "v_proj.weight"):
        weights[name] = weights[name].chunk(3)[2]
    window.load_state_dict(weights)
    x = draw(2, 21, D_MODEL)
    close(layer(x), window(x))
    close(feed(layer, x, [3, 4, 15], layer.new_cache(2, 21)), window(x))


def test_a_compressed_branch_that_keeps_every_token_is_full_attention() -> None:
    """l = d = 1 and φ the identity: nothing is squeezed, so nothing is lost."""
    full = sharp(FullAttention(D_MODEL, 3))
    layer = NativeSparseAttention(D_MODEL, 3, compress=1, stride=1, block=2, n_blocks=3, window=2)
    for branch_map in (layer.k_map, layer.v_map):
        branch_map.forward = lambda blocks: blocks[..., 0, :]
    with torch.no_grad():
        for name in ("q_proj", "o_proj"):
            getattr(layer, name).weight.copy_(getattr(full, name).weight)
        for name in ("k_proj", "v_proj"):
            getattr(layer, name).weight.chunk(3)[0].copy_(getattr(full, name).weight)
    x = draw(2, 17, D_MODEL)
    close(branch_alone(layer, 0)(x), full(x))


def test_before_the_first_whole_block_the_compressed_branch_is_silent() -> None:
    layer = branch_alone(build(NativeSparseAttention, NSA["far overlap"]), 0)
    y = layer(draw(2, 9, D_MODEL))
    assert (y[:, :5] == 0).all()
    assert (y[:, 5:].abs().amax(-1) > 1e-3).all()


# ---- training, numbers, argument checks


def test_gradients_reach_everything_that_is_learned() -> None:
    """φ of keys and of values, its positions, the gates, and all three parts of the projections."""
    layer, x = build(NativeSparseAttention, NSA["as in the paper, a sixteenth"]), draw(2, 18, D_MODEL)
    (layer(x) ** 2).sum().backward()
    for name, weight in layer.named_parameters():
        assert weight.grad is not None, name
        for part in (
            weight.grad.chunk(3)
            if name in ("k_proj.weight", "v_proj.weight", "gate_proj.weight")
            else [weight.grad]
        ):
            assert part.abs().max() > 1e-6, name
    layer = build(MixtureOfBlockAttention, MOBA["pools"])
    (layer(x) ** 2).sum().backward()
    assert all(weight.grad.abs().max() > 1e-6 for weight in layer.parameters())


def test_the_selection_is_learned_by_training() -> None:
    """A block far back has the answer; the compressed branch learns to weight it, and it is selected."""
    torch.manual_seed(0)
    blocks = {"compress": 2, "stride": 2, "block": 4, "n_blocks": 3, "n_local": 1}
    layer = NativeSparseAttention(16, 2, window=4, rope=None, **blocks)
    mark, ask, answers = torch.randn(16), torch.randn(16), torch.randn(4, 16)

    def batch(n: int) -> tuple[Tensor, Tensor, Tensor]:
        x, target, answer = 0.3 * torch.randn(n, 33, 16), torch.randint(1, 7, (n,)), torch.randint(4, (n,))
        for row in range(n):
            x[row, 4 * target[row] : 4 * target[row] + 4] += mark + answers[answer[row]]
        x[:, -1] = ask
        return x, target, answer

    head = nn.Linear(16, 4)
    optimiser = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(40):
        x, _, answer = batch(32)
        loss = nn.functional.cross_entropy(head(layer(x)[:, -1]), answer)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, target, answer = batch(200)
    assert (head(layer(x)[:, -1]).argmax(-1) == answer).float().mean() > 0.95
    assert layer.selected_blocks(x)[torch.arange(200), :, -1, target].float().mean() > 0.7  # by chance 1 in 7


@every_layer
@pytest.mark.parametrize("case", ["zeros", "huge", "one token"])
def test_never_nan(kind: type[Layer], options: dict[str, Any], case: str) -> None:
    layer = build(kind, options)
    x = {
        "zeros": torch.zeros(2, 13, D_MODEL),
        "huge": 100 * draw(2, 13, D_MODEL),
        "one token": draw(2, 1, D_MODEL),
    }[case]
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in layer.parameters())
    assert feed(layer, x, list(range(1, x.shape[1])), layer.new_cache(2, x.shape[1])).isfinite().all()


@given(
    lengths=st.lists(st.integers(0, 12), min_size=3, max_size=3), cuts=st.lists(st.integers(1, 8), max_size=4)
)
@pytest.mark.parametrize("options", [MOBA["pools"], MOBA["heads"]], ids=["pools", "heads"])
def test_rows_of_moba_may_go_on_from_anywhere(
    options: dict[str, Any], lengths: list[int], cuts: list[int]
) -> None:
    """Trimmed into blocks that were complete, whose means must be computed again."""
    layer, x, new = build(MixtureOfBlockAttention, options), draw(3, 12, D_MODEL), draw(3, 9, D_MODEL, seed=1)
    cache = layer.new_cache(3, 21)
    layer(x, cache)
    cache.trim(torch.tensor(lengths))
    together = feed(layer, new, cuts, cache)
    for row, length in enumerate(lengths):
        close(together[row], layer(torch.cat((x[row, :length], new[row]))[None])[0, length:])


@pytest.mark.parametrize(
    ("kind", "options", "error", "names"),
    [
        (MixtureOfBlockAttention, {"block": 0}, ValueError, "block: expected at least 1, got 0"),
        (MixtureOfBlockAttention, {"block": 2.5}, TypeError, "block: expected an integer"),
        (MixtureOfBlockAttention, {"n_blocks": 0}, ValueError, "n_blocks: expected at least 1"),
        (
            MixtureOfBlockAttention,
            {"n_kv_heads": 4},
            ValueError,
            "n_kv_heads: expected a divisor of n_heads=6",
        ),
        (MixtureOfBlockAttention, {"n_kv_heads": 0}, ValueError, "n_kv_heads"),
        (NativeSparseAttention, {"window": 0}, ValueError, "window: expected at least 1, got 0"),
        (NativeSparseAttention, {"compress": 0}, ValueError, "compress: expected at least 1"),
        (
            NativeSparseAttention,
            {"compress": 7},
            ValueError,
            "stride: expected a divisor of compress=7, got 4",
        ),
        (NativeSparseAttention, {"block": 18}, ValueError, "stride: expected a divisor of block=18, got 4"),
        (NativeSparseAttention, {"stride": 0}, ValueError, "stride: expected at least 1"),
        (NativeSparseAttention, {"compress": 32}, ValueError, r"compress: expected at most 16 \(block"),
        (NativeSparseAttention, {"block": 0}, ValueError, "block: expected at least 1"),
        (NativeSparseAttention, {"n_local": 0}, ValueError, "n_local: expected at least 1"),
        (NativeSparseAttention, {"n_blocks": 2}, ValueError, "n_blocks: expected at least 3, got 2"),
        (NativeSparseAttention, {"n_blocks": None}, TypeError, "n_blocks: expected an integer"),
        (NativeSparseAttention, {"n_kv_heads": 4}, ValueError, "n_kv_heads: expected a divisor of n_heads=6"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_sizes_that_do_not_go_together_are_refused_by_name(
    kind: type[Layer], options: dict[str, Any], error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=names):
        kind(24, 6, **options)


@pytest.mark.parametrize(
    ("kind", "mine", "other", "names"),
    [
        (
            MixtureOfBlockAttention,
            {"block": 4},
            {"block": 5},
            "cache: expected one with block=4, got block=5",
        ),
        (NativeSparseAttention, {}, {"window": 31}, "cache: expected one with Sizes.*window=31"),
        (NativeSparseAttention, {}, {"stride": 8}, "cache: expected one with Sizes.*stride=8"),
        (NativeSparseAttention, {}, {"n_kv_heads": 1}, "cache.tokens.k: expected shape"),
        (MixtureOfBlockAttention, {}, {"n_kv_heads": 1}, "cache.k: expected shape"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_the_cache_of_a_layer_with_other_blocks_is_refused(
    kind: type[Layer], mine: dict[str, int], other: dict[str, int], names: str
) -> None:
    cache = kind(24, 3, **other).new_cache(2, 10)
    with pytest.raises(ValueError, match=names):
        kind(24, 3, **mine)(draw(2, 3, 24), cache)
    assert cache.length == 0
    assert all((x == 0).all() for x in cache.tensors())


@pytest.mark.parametrize("kind", [MixtureOfBlockAttention, NativeSparseAttention])
@pytest.mark.usefixtures("unchecked_shapes")
def test_they_lend_and_borrow_no_keys_and_values(kind: type[Layer]) -> None:
    layer, x = kind(24, 3), draw(2, 5, 24)
    with pytest.raises(TypeError, match="source: a layer of kind"):
        layer.project_kv(x)
    with pytest.raises(TypeError, match="source: a layer of kind"):
        layer(x, source=FullAttention(24, 3).project_kv(x))


def test_nsa_cannot_forget() -> None:
    layer = NativeSparseAttention.tiny()
    cache = layer.new_cache(1, 5)
    layer(draw(1, 3, 24), cache)
    assert not cache.can_trim
    with pytest.raises(ValueError, match="a NSACache cannot forget"):
        cache.trim(torch.tensor([1]))


def test_phi_distinguishes_the_positions_in_a_block() -> None:
    phi, block = sharp(BlockMap(8, 4)), draw(3, 4, 8)
    assert (phi(block) - phi(block.flip(1))).abs().max() > 0.1
    phi.mix.weight.data = phi.mix.weight[:, :8].repeat(1, 4)  # the same weights at every position
    moved = phi.places.detach().flip(0)
    close(phi(block), phi(block.flip(1)))
    phi.places.data = moved * 2
    assert (phi(block) - phi(block[:, [0, 1, 3, 3]])).abs().max() > 0.1
