"""Attention over a compressed sequence: blocks that fill, entries that appear, and the choice among them."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvlearn.attention import deepseek_v4
from kvlearn.attention.core import attention, causal_mask
from kvlearn.attention.deepseek_v4 import (
    CompressedCache,
    CompressedSparseAttention,
    Compressor,
    HeavilyCompressedAttention,
    TrailingRope,
)
from kvlearn.attention.dsa import index_scores
from kvlearn.attention.rope import RopeConfig, YarnScaling

BATCH, TIME, WIDTH = 2, 23, 24
KINDS: dict[str, type[HeavilyCompressedAttention]] = {
    "hca": HeavilyCompressedAttention,
    "csa": CompressedSparseAttention,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def layer_of(kind: str, seed: int = 0, **options: Any) -> HeavilyCompressedAttention:
    """A small layer, every weight of which is drawn anew: gains and sinks too."""
    sizes: dict[str, Any] = {"head_dim": 8, "window": 4, "rate": 3, "rope_dim": 4}
    if kind == "csa":
        sizes |= {"top_k": 2, "index_heads": 16, "index_dim": 6}
    return randomised(KINDS[kind](WIDTH, 3, **{**sizes, **options}), seed)


def sparse(**options: Any) -> CompressedSparseAttention:
    layer = layer_of("csa", **options)
    assert isinstance(layer, CompressedSparseAttention)
    return layer


def randomised(module: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        spread = 1.5 * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.5
        weight.data = torch.randn(weight.shape, generator=generator) * spread + (weight.dim() == 1)
    return module.eval()


def tokens(time: int = TIME, seed: int = 1, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, time, WIDTH, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    atol = tolerance * max([1.0, *expected.abs().flatten().tolist()])
    torch.testing.assert_close(got, expected, atol=atol, rtol=tolerance)


def filled(layer: HeavilyCompressedAttention, x: Tensor, max_len: int = TIME) -> CompressedCache:
    cache = layer.new_cache(len(x), max_len)
    layer(x, cache)
    return cache


def compressor(overlap: bool, rate: int = 3) -> Compressor:
    return randomised(Compressor(WIDTH, 8, rate, overlap, 4, None, 1e-6))


# The compressor's entries


@pytest.mark.parametrize("overlap", [False, True])
def test_without_a_gate_an_entry_is_the_mean_of_its_tokens(overlap: bool) -> None:
    """Of m tokens; with overlap of 2m, series a of the block before and b of its own, the first of m."""
    layer, x = compressor(overlap), tokens(12)
    layer.gate_proj.weight.data.zero_()
    layer.position_bias.data.zero_()
    content = layer.kv_proj(x)
    for i, entry in enumerate(layer(x).unbind(1)):
        own = content[:, 3 * i : 3 * i + 3, -8:]
        before = content[:, max(3 * i - 3, 0) : 3 * i, :8] if overlap else own[:, :0]
        close(entry, layer.norm(torch.cat((before, own), dim=1).mean(1)))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_gate_picks_a_token_for_each_coordinate_apart(overlap: bool) -> None:
    layer, x = compressor(overlap), tokens(9)
    layer.gate_proj.weight.data.zero_()
    layer.position_bias.data.zero_()
    layer.position_bias.data[0, -8:-4] = 100.0  # half of the coordinates from a block's first token
    layer.position_bias.data[2, -4:] = 100.0  # the others from its last
    content = layer.kv_proj(x)[..., -8:]
    for i, entry in enumerate(layer(x).unbind(1)):
        picked = torch.cat((content[:, 3 * i, :4], content[:, 3 * i + 2, 4:]), dim=-1)
        close(entry, layer.norm(picked))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("rate", [1, 2, 5])
def test_entries_are_those_made_token_by_token(overlap: bool, rate: int) -> None:
    layer, x = compressor(overlap, rate), tokens(11)
    entries = layer(x)
    assert entries.shape[1] == 11 // rate
    for i, entry in enumerate(entries.unbind(1)):
        close(entry, layer.naive(x, i))


@pytest.mark.parametrize("scaling", [None, YarnScaling(4.0, 16), YarnScaling(4.0, 16, attention_factor=1.0)])
def test_turning_back_undoes_turning_and_leaves_the_leading_coordinates_alone(scaling: Any) -> None:
    rope, x = TrailingRope(4, RopeConfig(100.0, scaling)), torch.randn(1, 2, 5, 10)
    positions = torch.arange(3, 8)[None]
    rotated = rope(x, positions)
    assert torch.equal(rotated[..., :6], x[..., :6])
    assert (rotated[..., 6:] - x[..., 6:]).abs().amax(-1).min() > 1e-2
    close(rope(rotated, positions, back=True), x)


# The content of the cache


@every_kind
@given(cuts=st.lists(st.integers(1, TIME - 1), max_size=8), rate=st.integers(1, 6))
def test_at_any_cut_the_cache_holds_what_tokens_one_by_one_leave(
    kind: str, cuts: list[int], rate: int
) -> None:
    layer, x = layer_of(kind, rate=rate), tokens()
    one_by_one, pieces = layer.new_cache(BATCH, TIME), layer.new_cache(BATCH, TIME)
    edges = sorted({0, *cuts, TIME})
    with torch.no_grad():
        for a, b in pairwise(edges):
            layer(x[:, a:b], pieces)
            for t in range(a, b):
                layer(x[:, t : t + 1], one_by_one)
            close(pieces.window.k, one_by_one.window.k)
            for memory, other in zip(pieces.memories, one_by_one.memories, strict=True):
                whole, left = divmod(b, rate)
                close(memory.entries[:, :whole], other.entries[:, :whole])
                close(memory.waiting[:, :left], other.waiting[:, :left])
                close(memory.previous, other.previous)
                assert not memory.entries[:, whole:].any()


@every_kind
@pytest.mark.parametrize("length", range(1, 8))
@torch.no_grad()
def test_the_tokens_of_the_last_block_wait_until_it_is_whole(kind: str, length: int) -> None:
    layer, x = layer_of(kind), tokens(length)
    cache, whole = filled(layer, x), length // 3 * 3
    for memory, compress in zip(cache.memories, layer.compressors, strict=True):
        projected = compress.project(x)
        assert memory.waiting.shape[1] == 2  # never three: the third makes an entry of them
        close(memory.waiting[:, : length - whole], projected[:, whole:])
        close(memory.entries[:, : whole // 3], compress(x))
        if kind == "csa" and whole:
            close(memory.previous, projected[:, whole - 3 : whole, :, : compress.width])


@every_kind
@torch.no_grad()
def test_only_entries_grow_with_the_text(kind: str) -> None:
    layer = layer_of(kind)
    short, long = (layer.new_cache(1, n) for n in (30, 300))
    assert short.window.nbytes == long.window.nbytes
    for a, b in zip(short.memories, long.memories, strict=True):
        assert (a.waiting.shape, a.previous.shape) == (b.waiting.shape, b.previous.shape)
        assert (a.entries.shape[1], b.entries.shape[1]) == (10, 100)


# When an entry is visible


@every_kind
@pytest.mark.parametrize("rate", [2, 3, 5])
@pytest.mark.parametrize("block", [1, 4, 128])
@torch.no_grad()
def test_an_entry_is_visible_from_its_blocks_last_token_on(kind: str, rate: int, block: int) -> None:
    """With a window of one token, earlier tokens reach the output through entries alone."""
    options = {"top_k": 64} if kind == "csa" else {}
    layer, x = layer_of(kind, rate=rate, window=1, **options), tokens(4 * rate)
    layer.block = block
    before = layer(x)
    for first in range(0, 4 * rate, rate):
        changed, last = x.clone(), first + rate - 1
        changed[:, first] += 1
        heard = (layer(changed) - before).abs().amax(-1)
        assert not heard[:, :first].any()
        assert not heard[:, first + 1 : last].any()
        assert heard[:, first].min() > 1e-4
        assert heard[:, last:].min() > 1e-4


@every_kind
@torch.no_grad()
def test_a_step_attends_to_the_entry_that_it_completes(kind: str) -> None:
    layer, x = layer_of(kind, window=1), tokens(6)
    for length in (2, 5):
        clean, spoilt = (filled(layer, x[:, :length]) for _ in range(2))
        spoilt.memories[0].waiting[:] += 1.0
        new = x[:, length : length + 1]
        assert (layer(new, spoilt) - layer(new, clean)).abs().amax(-1).min() > 1e-4
    clean, spoilt = (filled(layer, x[:, :4]) for _ in range(2))
    spoilt.memories[0].waiting[:] += 1.0
    assert torch.equal(layer(x[:, 4:5], spoilt), layer(x[:, 4:5], clean))  # the fifth of six completes none


# Which entries are selected


@pytest.mark.parametrize("top_k", [1, 2, 3, 50])
@torch.no_grad()
def test_the_selection_is_that_of_a_loop_over_tokens_and_entries(top_k: int) -> None:
    layer, x = sparse(top_k=top_k), tokens()
    keys = layer.indexer.compressor(x)
    q, weight = layer.indexer.query(x, x, torch.arange(TIME)[None])
    selection = layer.selection(x)
    for b in range(BATCH):
        for t in range(TIME):
            scores = {}
            for i in range(TIME // 3):
                if 3 * i + 2 <= t:
                    answers = [max(0.0, float(q[b, j, t] @ keys[b, i])) for j in range(16)]
                    scores[i] = sum(float(weight[b, j, t]) * answers[j] for j in range(16))
            best = sorted(scores, key=lambda i: (-scores[i], i))[:top_k]
            assert selection[b, t].nonzero()[:, 0].tolist() == sorted(best)


@torch.no_grad()
def test_of_equal_scores_the_older_entry_is_selected_in_any_cutting() -> None:
    layer, x = sparse(), tokens()
    layer.indexer.weight_proj.weight.zero_()
    assert layer.selection(x)[:, -1, :2].all()
    cache = layer.new_cache(BATCH, TIME)
    pieces = [layer(piece, cache) for piece in (x[:, :10], *x[:, 10:].split(1, dim=1))]
    close(torch.cat(pieces, dim=1), layer(x))


@pytest.mark.parametrize("length", [20, 21, 22])
@torch.no_grad()
def test_a_step_reads_no_entry_that_it_has_not_selected(length: int) -> None:
    """Position 20 completes a block, 21 and 22 do not."""
    layer, x = sparse(), tokens()
    x = x[:, : length + 1]
    expected, selected = layer(x)[:, -1:], layer.selection(x)[:, -1]
    cache = filled(layer, x[:, :length])
    entries = cache.memories[0].entries
    n_entries = length // 3
    assert not torch.equal(selected[0], selected[1])
    entries[:, :n_entries].masked_fill_(~selected[:, :n_entries, None], torch.nan)
    close(layer(x[:, -1:], cache), expected)
    row, entry = selected[:, :n_entries].nonzero()[0]
    cache = filled(layer, x[:, :length])
    cache.memories[0].entries[row, entry] = torch.nan
    assert layer(x[:, -1:], cache)[row].isnan().all()


@torch.no_grad()
def test_without_a_selection_a_step_reads_every_entry() -> None:
    layer, x = layer_of("hca"), tokens()
    for entry in range(7):
        cache = filled(layer, x[:, :-1])
        cache.memories[0].entries[:, entry] = torch.nan
        assert layer(x[:, -1:], cache).isnan().all()


@torch.no_grad()
def test_a_selection_of_all_entries_is_hca() -> None:
    layer, x = sparse(top_k=50), tokens()
    expected = HeavilyCompressedAttention.forward(layer, x)  # over every entry of these weights
    close(layer(x), expected)
    assert (sparse(top_k=2)(x) - expected).abs().max() > 1e-2


# The limit, and the way there


@every_kind
@torch.no_grad()
def test_a_long_window_without_a_whole_block_is_full_attention_with_keys_for_values(kind: str) -> None:
    layer, x = layer_of(kind, window=TIME, rate=TIME + 1), tokens()
    layer.sink_logits.fill_(-torch.inf)
    positions = torch.arange(TIME)[None]
    q, k = layer.queries(x, positions), layer.keys(x, positions).expand(-1, 3, -1, -1)
    heads = layer.rope(attention(q, k, k, causal_mask(TIME, TIME)), positions, back=True)
    expected = layer.o_proj(heads.transpose(1, 2).flatten(2))
    close(layer(x), expected)
    cache = layer.new_cache(BATCH, TIME)
    close(torch.cat([layer(piece, cache) for piece in x.split(6, dim=1)], dim=1), expected)


@every_kind
@torch.no_grad()
def test_values_come_out_unrotated(kind: str) -> None:
    """A token that attends to itself alone gets its own value, at any position."""
    layer, x = layer_of(kind, window=1, rate=TIME + 1), tokens()
    layer.sink_logits.fill_(-torch.inf)
    value = layer.k_norm(layer.k_proj(x))
    close(layer(x), layer.o_proj(value.repeat(1, 1, 3)))


@every_kind
@torch.no_grad()
def test_a_sink_takes_weight_from_tokens_and_entries_alike(kind: str) -> None:
    layer, x = layer_of(kind), tokens()
    layer.sink_logits.fill_(100.0)
    assert layer(x).abs().max() < 1e-6
    layer.sink_logits.fill_(-torch.inf)
    assert layer(x).isfinite().all()
    close(layer(x), layer.naive(x))


@every_kind
@pytest.mark.parametrize(
    "options", [{"q_rank": 10}, {"rope": None}, {"rate": 1}, {"window": 1}, {"rope_dim": 8}]
)
@torch.no_grad()
def test_every_option_gives_what_the_naive_form_gives(kind: str, options: dict[str, Any]) -> None:
    if kind == "csa" and "rope_dim" in options:
        options = {**options, "index_dim": 8}
    layer, x = layer_of(kind, **options), tokens()
    close(layer(x), layer.naive(x))
    cache = layer.new_cache(BATCH, TIME)
    close(torch.cat([layer(p, cache) for p in (x[:, :8], *x[:, 8:].split(1, 1))], dim=1), layer.naive(x))


@every_kind
@pytest.mark.parametrize("block", [1, 2, 5, 100])
@torch.no_grad()
def test_a_pass_meets_no_more_tokens_than_block_and_window(
    kind: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = layer_of(kind, rate=TIME + 1), tokens()
    expected, met = layer(x), []
    partial = deepseek_v4.grouped_partial
    monkeypatch.setattr(
        deepseek_v4, "grouped_partial", lambda q, k, *rest: met.append(k.shape[2]) or partial(q, k, *rest)
    )
    layer.block = block
    close(layer(x), expected)
    assert max(met) == min(block + 4 - 1, TIME)
    assert len(met) == -(-TIME // block)


@every_kind
@torch.no_grad()
def test_a_step_meets_the_window_and_what_the_formula_says_is_read(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = layer_of(kind), tokens()
    cache, met = layer.new_cache(BATCH, TIME), []
    partial = deepseek_v4.grouped_partial
    monkeypatch.setattr(
        deepseek_v4, "grouped_partial", lambda q, k, *rest: met.append(k[0].numel()) or partial(q, k, *rest)
    )
    for t in range(TIME):
        met.clear()
        layer(x[:, t : t + 1], cache)
        index_keys = (t + 1) // 3 * 6 if kind == "csa" else 0
        assert 4 * (sum(met) + index_keys) == layer.read_bytes(t + 1)


# Bytes


def test_bytes_are_those_on_paper() -> None:
    """DeepSeek-V4's sizes at 16 bits: 512 wide, a window of 128; 4 to 1 with keys 128 wide, or 128 to 1."""
    sparse_layer = CompressedSparseAttention(8, 1, head_dim=512)
    heavy = HeavilyCompressedAttention(8, 1, head_dim=512)
    assert (sparse_layer.rope_dim, sparse_layer.indexer.compressor.width) == (64, 128)
    half = {"dtype": torch.bfloat16}
    assert sparse_layer.cache_bytes(4096, **half) == 2 * (128 * 512 + (1024 + 2 * (3 + 3 + 4)) * (512 + 128))
    assert heavy.cache_bytes(4096, **half) == 2 * (128 + 32 + 2 * 127) * 512
    for layer in (sparse_layer, heavy):
        assert layer.new_cache(3, 4096, **half).nbytes == layer.cache_bytes(4096, batch=3, **half)
    assert sparse_layer.read_bytes(4096, **half) == 2 * (128 * 512 + 1024 * 128 + 512 * 512)
    assert sparse_layer.read_bytes(1024, **half) == 2 * (
        128 * 512 + 256 * 128 + 256 * 512
    )  # fewer than top_k
    assert heavy.read_bytes(4096, **half) == 2 * (128 + 32) * 512
    assert heavy.read_bytes(127, **half) == 2 * 127 * 512  # no block is whole
    # Numbers that a token adds in the long run: MLA's 576 are 160 and 4.
    for layer, numbers in ((sparse_layer, 160), (heavy, 4)):
        assert layer.cache_bytes(2**20, **half) - layer.cache_bytes(2**19, **half) == 2 * numbers * 2**19


# The indexer's own loss


@pytest.mark.parametrize("dense", [False, True])
def test_the_loss_of_the_indexer_reaches_it_alone_and_teaches_it(dense: bool) -> None:
    layer, x = sparse(q_rank=10), tokens()
    apart = [name for name, _ in layer.named_parameters() if name.startswith(layer.auxiliary_parameters)]
    assert len(apart) == 6
    optimiser = torch.optim.Adam(layer.indexer.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = layer.indexer_loss(x, dense)
        layer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        got = [name for name, weight in layer.named_parameters() if weight.grad is not None]
        assert got == apart
        optimiser.step()
    assert min(losses) > 0
    assert losses[-1] < 0.8 * losses[0]


def test_the_loss_of_the_indexer_is_the_divergence_from_what_heads_read() -> None:
    layer, x = sparse(), tokens(11)
    positions = torch.arange(11)[None]
    with torch.no_grad():
        q, entries, keys = layer.queries(x, positions), layer.compressor(x), layer.indexer.compressor(x)
        scores = index_scores(layer.indexer.query(x, x, positions), keys)
        terms = []
        for b in range(BATCH):
            for t in range(2, 11):
                visible = layer.selection(x)[b, t]
                read = (q[b, :, t] @ entries[b, visible].T / 8**0.5).softmax(-1).mean(0)
                terms.append((read * (read.log() - scores[b, t, visible].log_softmax(-1))).sum())
    close(layer.indexer_loss(x).detach(), torch.stack(terms).mean())


# Argument checks


@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        ("hca", {"window": 0}, "window"),
        ("hca", {"rate": 0}, "rate"),
        ("hca", {"rope_dim": 3}, "rope_dim: expected an even"),
        ("hca", {"rope_dim": 0}, "rope_dim: expected at least"),
        ("hca", {"rope_dim": 10}, "rope_dim: expected at most 8"),
        ("hca", {"q_rank": 0}, "q_rank"),
        ("csa", {"window": 0}, "window"),
        ("csa", {"rate": 0}, "rate"),
        ("csa", {"rope_dim": 5}, "rope_dim"),
        ("csa", {"top_k": 0}, "top_k"),
        ("csa", {"index_heads": 0}, "index_heads"),
        ("csa", {"index_dim": 0}, "index_dim"),
        ("csa", {"rope_dim": 8}, r"rope_dim: expected at most 6 \(index_dim\)"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_sizes_that_make_no_sense_are_refused_by_name(kind: str, options: dict[str, int], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        layer_of(kind, **options)


@every_kind
@pytest.mark.usefixtures("unchecked_shapes")
def test_types_that_make_no_sense_are_refused_by_name(kind: str) -> None:
    for name in ("window", "rate", "rope_dim"):
        with pytest.raises(TypeError, match=name):
            layer_of(kind, **{name: 2.0})
    layer = layer_of(kind)
    with pytest.raises(TypeError, match="source"):
        layer(tokens(), source=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="source"):
        layer.project_kv(tokens())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("hca", {"rate": 4}),
        ("hca", {"window": 5}),
        ("hca", {"head_dim": 12}),
        ("csa", {}),
        ("csa", {"index_dim": 8}),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_cache_of_other_sizes_is_refused_and_left_alone(kind: str, options: dict[str, int]) -> None:
    layer = layer_of("csa" if "index_dim" in options else "hca")
    cache = layer_of(kind, **options).new_cache(BATCH, TIME)
    with pytest.raises(ValueError, match="cache: expected shapes"):
        layer(tokens(), cache)
    assert cache.length == cache.window.length == 0
    assert not any(t.any() for t in cache.tensors())


@every_kind
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_compressed_past_cannot_be_cut_back(kind: str) -> None:
    cache = filled(layer_of(kind), tokens(5))
    with pytest.raises(ValueError, match="cannot forget"):
        cache.trim(torch.tensor([4, 5]))


@pytest.mark.usefixtures("unchecked_shapes")
def test_the_loss_of_the_indexer_needs_a_whole_block() -> None:
    with pytest.raises(ValueError, match="time"):
        sparse().indexer_loss(tokens(2))
