"""DeepSeek sparse attention: the right tokens are selected, and no others are read."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kvlearn.attention import MultiHeadLatentAttention
from kvlearn.attention.dsa import (
    DeepSeekSparseAttention,
    IndexedLatentCache,
    IndexQuery,
    LightningIndexer,
    index_scores,
)
from kvlearn.attention.mla import absorbed_attention
from kvlearn.attention.rope import RopeConfig, rotate_naive
from kvlearn.kernels import decode_latent
from kvlearn.measure import peak_memory
from kvlearn.model import Decoder, ModelConfig, Spec

SIZES = {"head_dim": 8, "v_head_dim": 6, "rank": 12, "q_rank": 16, "rope_dim": 4}
INDEX = {"top_k": 4, "index_heads": 16, "index_dim": 8}
RNG = torch.Generator


def sharp(layer: DeepSeekSparseAttention, seed: int = 0) -> None:
    """Weights drawn anew, so that attention picks, heads disagree and no gain is one."""
    torch.manual_seed(seed)
    for weight in layer.parameters():
        spread = 1.3 * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.3
        nn.init.normal_(weight, mean=float(weight.dim() == 1), std=spread)
    layer.eval()


def tiny(seed: int = 0, **options: Any) -> DeepSeekSparseAttention:
    layer = DeepSeekSparseAttention(24, 3, **{**SIZES, **INDEX, **options})
    sharp(layer, seed)
    return layer


def tokens(time: int = 13, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, time, 24, generator=RNG().manual_seed(seed))


# The selection


@given(
    sizes=st.fixed_dictionaries({n: st.integers(1, 6) for n in ("batch", "heads", "dim", "new", "top_k")}),
    cached=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_the_tokens_selected_are_those_of_a_bare_loop(sizes: dict[str, int], cached: int, seed: int) -> None:
    """Any sizes, rows at positions of their own; few heads, so that scores are often 0."""
    batch, heads, dim, new, top_k = sizes.values()
    generator = RNG().manual_seed(seed)
    q = torch.randn(batch, heads, new, dim, generator=generator)
    keys = torch.randn(batch, cached + new, dim, generator=generator)
    weight = torch.randn(batch, heads, new, generator=generator)
    starts = torch.randint(0, cached + 1, (batch, 1), generator=generator)
    indexer = LightningIndexer(5, 5, index_heads=heads, index_dim=dim, top_k=top_k, rope_dim=0, rope=None)
    got = indexer.select(IndexQuery(q, weight), keys, starts + torch.arange(new))
    for b in range(batch):
        for t in range(new):
            now = int(starts[b]) + t
            scores = [
                sum(weight[b, j, t] * max(float(q[b, j, t] @ keys[b, s]), 0.0) for j in range(heads))
                for s in range(now + 1)
            ]
            best = sorted(range(now + 1), key=lambda s: (-scores[s], s))[:top_k]
            assert got[b, t, : len(best)].tolist() == best


def test_scores_are_the_equation() -> None:
    """Two tokens, the second looking at the first, from the weights; positions 5 and 9."""
    layer = tiny().double()
    indexer, x, at = layer.indexer, tokens(2, 1).double(), torch.tensor([[5, 9]])

    def rotated(heads: Tensor, position: int) -> Tensor:
        first = rotate_naive(heads[None, None, :, :4], RopeConfig(), [position])[0, 0]
        return torch.cat((first, heads[:, 4:]), dim=-1)

    with torch.no_grad():
        q = (indexer.q_proj.weight @ layer.q_norm(layer.q_down(x[0, 1]))).view(16, 8)
        key = indexer.k_proj.weight @ x[0, 0]
        key = (key - key.mean()) / (key.var(unbiased=False) + 1e-6).sqrt()
        key = key * indexer.k_norm.weight + indexer.k_norm.bias
        answers = rotated(q, 9) @ rotated(key[None], 5)[0]
        weights = indexer.weight_proj.weight @ x[0, 1] / (16 * 8) ** 0.5
        expected = sum(w * max(float(answer), 0.0) for w, answer in zip(weights, answers, strict=True))
        scores = index_scores(*layer.index(x, at))
    assert scores.shape == (1, 2, 2)
    assert float(scores[0, 1, 0]) == pytest.approx(float(expected), rel=1e-6)


def test_a_token_reads_top_k_of_its_past_and_all_of_a_short_one() -> None:
    reads = tiny().selection(tokens())
    assert not reads.triu(1).any()
    assert reads.sum(-1).tolist() == [[min(t + 1, 4) for t in range(13)]] * 2
    assert not reads[:, 4:].all(1).any()  # and not always the same four
    assert reads[:, 12].sum() == 8
    assert not torch.equal(reads[0], reads[1])


def test_blocks_of_queries_select_alike() -> None:
    layer, x = tiny(), tokens(30)
    expected, output = layer.selection(x), layer(x)
    for layer.block in (1, 7, 30):
        assert torch.equal(layer.selection(x), expected)
        torch.testing.assert_close(layer(x), output)


def test_a_weight_may_count_against_a_token() -> None:
    """One index head, whose weight is negative: tokens that score above 0 in it are avoided."""
    indexer = LightningIndexer(5, 5, index_heads=1, index_dim=1, top_k=2, rope_dim=0, rope=None)
    keys, q = torch.tensor([[[2.0], [-1.0], [1.0], [-3.0]]]), torch.ones(1, 1, 1, 1)
    at = torch.tensor([[3]])
    assert indexer.select(IndexQuery(q, torch.full((1, 1, 1), 1.0)), keys, at).tolist() == [[[0, 2]]]
    assert indexer.select(IndexQuery(q, torch.full((1, 1, 1), -1.0)), keys, at).tolist() == [[[1, 3]]]


@given(cuts=st.lists(st.integers(1, 12), max_size=5), heads=st.integers(1, 2))
def test_equal_scores_are_ordered_alike_however_a_sequence_is_cut(cuts: list[int], heads: int) -> None:
    """With one or two index heads many scores are 0."""
    layer, x = tiny(index_heads=heads), tokens()
    query, keys = layer.index(x, torch.arange(13)[None])
    assert (index_scores(query, keys) == 0).float().mean() > 0.1
    cache, edges = layer.new_cache(2, 13), [0, *sorted(set(cuts)), 13]
    pieces = [layer(x[:, a:b], cache) for a, b in pairwise(edges)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), layer(x), atol=1e-5, rtol=1e-5)


def test_of_tokens_that_are_all_alike_the_first_are_read() -> None:
    layer = tiny()
    nn.init.zeros_(layer.indexer.weight_proj.weight)
    reads = layer.selection(tokens())
    assert torch.equal(reads, (torch.arange(13) < 4).expand(2, 13, 13) & torch.ones(13, 13).tril().bool())
    assert layer(tokens()).isfinite().all()
    assert layer(torch.zeros(2, 13, 24)).isfinite().all()


# The limit: all selected


@pytest.mark.parametrize("top_k", [13, 2048])
@pytest.mark.parametrize("q_rank", [None, 16])
def test_where_all_is_selected_it_is_mla(top_k: int, q_rank: int | None) -> None:
    """MLA's norm leaves it no setting at which it is full attention; this is the limit that there is."""
    limit = tiny(top_k=top_k, q_rank=q_rank)
    dense = MultiHeadLatentAttention(24, 3, **{**SIZES, "q_rank": q_rank})
    dense.load_state_dict({n: w for n, w in limit.state_dict().items() if not n.startswith("indexer.")})
    x = tokens()
    expected = dense(x)
    torch.testing.assert_close(limit(x), expected, atol=1e-5, rtol=1e-5)
    cache, their = limit.new_cache(2, 13), dense.new_cache(2, 13)
    for piece in x.split([6, 1, 4, 1, 1], dim=1):
        torch.testing.assert_close(limit(piece, cache), dense(piece, their), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tiny(q_rank=q_rank)(x), expected, atol=1e-2)


# Bytes stored and read


def test_more_is_stored_than_by_mla_and_less_is_read() -> None:
    """DeepSeek-V3.2: 512 + 64 numbers of latent and 128 of index key, 2,048 latents read."""
    with torch.device("meta"):
        layer = DeepSeekSparseAttention(7168, 128, head_dim=128, q_rank=1536)
    assert layer.indexer.index_dim == 128
    assert layer.cache_bytes(1, dtype=torch.bfloat16) == 2 * (576 + 128)
    assert layer.read_bytes(2048, batch=3, dtype=torch.bfloat16) == 3 * 2 * 2048 * 704
    assert layer.read_bytes(131_072, dtype=torch.bfloat16) == 2 * (131_072 * 128 + 2048 * 576)
    with torch.device("meta"):
        dense = MultiHeadLatentAttention(7168, 128, head_dim=128, q_rank=1536)
    assert layer.read_bytes(131_072) < 0.25 * dense.read_bytes(131_072)


@pytest.mark.parametrize("length", [1, 4, 5, 13])
def test_bytes_are_those_counted_by_hand(length: int) -> None:
    layer = tiny()
    assert layer.cache_bytes(length, batch=3) == 3 * length * (12 + 4 + 8) * 4
    assert layer.read_bytes(length, batch=3) == 3 * 4 * (length * 8 + min(length, 4) * 16)
    cache = layer.new_cache(3, length, dtype=torch.bfloat16)
    assert cache.nbytes == layer.cache_bytes(length, batch=3, dtype=torch.bfloat16)
    assert [t.dtype for t in cache.tensors()] == [torch.bfloat16] * 2
    assert [tuple(t.shape) for t in cache.tensors()] == [(3, length, 16), (3, length, 8)]


def test_a_step_reads_no_latent_that_is_not_selected() -> None:
    """Latents that are NaN: those not selected do not change the output, each of those selected does."""
    layer, x = tiny(), tokens()
    reads = layer.selection(x)[:, -1]

    def last(poisoned: Tensor) -> Tensor:
        cache = layer.new_cache(2, 13)
        layer(x[:, :12], cache)
        cache.latents[poisoned] = torch.nan
        return layer(x[:, 12:], cache)

    expected = layer(x)[:, 12:]
    left_out = ~reads
    assert left_out.sum() == 2 * 9
    torch.testing.assert_close(last(left_out), expected, atol=1e-5, rtol=1e-5)
    for slot in (reads[0, :12]).nonzero().flatten().tolist():
        poisoned = torch.zeros(2, 13, dtype=torch.bool)
        poisoned[0, slot] = True
        output = last(poisoned)
        assert output[0].isnan().all()
        assert output[1].isfinite().all()


def test_attention_gets_as_many_latents_as_are_counted_as_read(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, gathered, scored = tiny(), [], []

    def watched(q: Tensor, latents: Tensor, *rest: Any) -> Tensor:
        gathered.append(tuple(latents.shape))
        return absorbed_attention(q, latents, *rest)

    def counted(query: IndexQuery, keys: Tensor) -> Tensor:
        scored.append(keys.shape[1])
        return index_scores(query, keys)

    monkeypatch.setattr("kvlearn.attention.dsa.absorbed_attention", watched)
    monkeypatch.setattr("kvlearn.attention.dsa.index_scores", counted)
    layer.block = 5
    cache = layer.new_cache(2, 40)
    for time in (3, 1, 1, 12):
        layer(tokens(time), cache)
    assert gathered == [(6, 3, 16), (2, 4, 16), (2, 4, 16), (10, 4, 16), (10, 4, 16), (4, 4, 16)]
    assert scored == [3, 4, 5, 10, 15, 17]  # no key after the last query of its block


def test_a_prefill_never_holds_the_scores_of_all_pairs() -> None:
    torch.manual_seed(0)
    time, heads = 2048, 8
    layer = DeepSeekSparseAttention(32, 2, rank=16, rope_dim=4, top_k=16, index_heads=heads, index_dim=8)
    x, pair = torch.randn(1, time, 32), 4 * time * time
    with torch.no_grad():
        peak = peak_memory(lambda: layer(x))
        layer.block = time
        whole = peak_memory(lambda: layer(x))
    assert peak < pair  # one number per pair of tokens, not J
    assert whole > heads * pair


# The cache


def test_an_indexed_cache_returns_views_and_writes_rows_after_their_own_ends() -> None:
    cache = IndexedLatentCache(2, 5, 3, 2, 4, torch.float16, "cpu")

    def append(number: float, time: int) -> tuple[Tensor, Tensor]:
        return cache.append_indexed(*(torch.full((2, time, width), number) for width in (3, 2, 4)))

    latents, keys = append(1.0, 3)
    assert (latents.shape, keys.shape) == ((2, 3, 5), (2, 3, 4))
    assert keys.data_ptr() == cache.index_keys.data_ptr()
    assert keys.dtype == torch.float16
    cache.trim(torch.tensor([1, 3]))
    append(5.0, 1)
    assert cache.index_keys[:, :, 0].tolist() == [[1, 5, 1, 0, 0], [1, 1, 1, 5, 0]]
    assert cache.index_keys[..., 0].tolist() == cache.latents[..., 0].tolist()
    assert cache.length == 4


def test_scores_are_single_precision_whatever_the_cache_holds() -> None:
    layer, x = tiny().bfloat16(), tokens().bfloat16()
    cache = layer.new_cache(2, 13, dtype=torch.float16)
    layer(x, cache)
    query, _ = layer.index(x, torch.arange(13)[None])
    assert query.q.dtype == torch.bfloat16
    assert index_scores(query, cache.index_keys).dtype == torch.float32
    double = tiny().double()
    query, keys = double.index(tokens().double(), torch.arange(13)[None])
    assert index_scores(query, keys).dtype == torch.float64


def test_a_kernel_gets_the_latents_that_were_gathered() -> None:
    layer, calls = tiny(), []

    def step(q_latent: Tensor, q_rope: Tensor, cache: Tensor, lengths: Tensor, *, scale: float) -> Tensor:
        assert cache.shape == (2, min(max_seen, 4), 16)
        calls.append(lengths.tolist())
        return decode_latent(q_latent, q_rope, cache, lengths, scale=scale)

    def run() -> Tensor:
        nonlocal max_seen
        cache, parts = layer.new_cache(2, 13), []
        for number, part in enumerate(tokens(9).split([2, 1, 1, 1, 1, 3], dim=1)):
            if number == 4:
                cache.trim(torch.tensor([1, 5]))
            max_seen = cache.length + part.shape[1]
            parts.append(layer(part, cache))
        return torch.cat(parts, dim=1)

    max_seen = 0
    expected = run()
    layer.decode_latent_step = step
    torch.testing.assert_close(run(), expected, atol=1e-5, rtol=1e-5)
    assert calls == [[3, 3], [4, 4], [4, 4], [2, 4]]


# How the indexer is trained


def test_the_output_trains_everything_but_the_indexer() -> None:
    layer = tiny()
    layer(tokens()).sum().backward()
    for name, weight in layer.named_parameters():
        assert (weight.grad is None) == name.startswith(layer.auxiliary_parameters), name


@pytest.mark.parametrize("dense", [False, True])
def test_the_indexers_loss_trains_the_indexer_alone(dense: bool) -> None:
    layer = tiny()
    x = tokens().requires_grad_()
    layer.indexer_loss(x, dense).backward()
    assert x.grad is None
    for name, weight in layer.named_parameters():
        if name.startswith(layer.auxiliary_parameters):
            assert weight.grad is not None
            assert weight.grad.isfinite().all()
            assert weight.grad.abs().sum() > 0
        else:
            assert weight.grad is None, name


@pytest.mark.parametrize("dense", [False, True])
def test_the_loss_is_the_divergence_of_the_equation(dense: bool) -> None:
    """Token by token, from decompressed keys."""
    layer, x, positions = tiny().double(), tokens(9).double(), torch.arange(9)[None]
    reads, total = layer.selection(x), 0.0
    q, latent, k_rope = layer.project(x, positions)
    scores = index_scores(*layer.index(x, positions))
    for b in range(2):
        for t in range(9):
            past = [s for s in range(t + 1) if dense or reads[b, t, s]]
            heads = []
            for h in range(3):
                keys = torch.cat((latent[b, past] @ layer.up[h, :8].T, k_rope[b, past]), dim=-1)
                heads.append((keys @ q[b, h, t] * layer.scale).softmax(0))
            p, guess = sum(heads) / 3, scores[b, t, past].softmax(0)
            total += (p * (p / guess).log()).sum().item()
    assert layer.indexer_loss(x, dense).item() == pytest.approx(total / 18, rel=1e-9)


def test_a_trained_indexer_finds_what_attention_would_read() -> None:
    """The share of full attention's weights that falls on the selected tokens comes closer to the
    best that as many tokens can have."""
    layer, x = tiny(), tokens(48, batch=8)
    q, latent, k_rope = layer.project(x, torch.arange(48)[None])
    k = torch.einsum("bsr, hdr -> bhsd", latent, layer.up[:, :8])
    k = torch.cat((k, k_rope[:, None].expand(-1, 3, -1, -1)), dim=-1)
    hidden = torch.ones(48, 48).triu(1).bool()
    weights = (q @ k.mT * layer.scale).masked_fill(hidden, -math.inf).softmax(-1).mean(1).detach()

    def share() -> float:
        return float((weights * layer.selection(x))[:, 8:].sum(-1).mean())

    best = float(weights[:, 8:].topk(4).values.sum(-1).mean())
    before, loss = share(), layer.indexer_loss(x, dense=True)
    optimiser = torch.optim.Adam(layer.indexer.parameters(), lr=1e-2)
    for _ in range(100):
        optimiser.zero_grad()
        layer.indexer_loss(x, dense=True).backward()
        optimiser.step()
    assert layer.indexer_loss(x, dense=True) < 0.5 * loss
    assert best - share() < 0.5 * (best - before)


# The model


def test_a_decoder_takes_it_in_any_layer() -> None:
    torch.manual_seed(0)
    options = {"top_k": 4, "index_heads": 16}
    config = ModelConfig(d_model=32, n_heads=4, n_layers=3, layers=(Spec("dsa", **options), Spec("full")))
    assert ModelConfig.from_dict(config.to_dict()) == config
    model = Decoder(config).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.2)
    prompt = torch.randint(0, 256, (2, 7))
    assert torch.equal(model.generate(prompt, 8), model.generate(prompt, 8, use_cache=False))
    row = model.table(16, batch=2)[0]
    assert row["read"] < row["stored"] == model.new_cache(2, 16).layers[0].nbytes


# Wrong arguments


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_k": 2.5}, TypeError, "top_k"),
        ({"index_heads": 0}, ValueError, "index_heads"),
        ({"index_dim": 0}, ValueError, "index_dim"),
        ({"index_dim": 2}, ValueError, r"rope_dim: expected at most 2 \(index_dim\), got 4"),
        ({"rope_dim": 3}, ValueError, "rope_dim: expected an even number"),
        ({"rope_dim": 0}, ValueError, "rope_dim: expected at least 2 with rope"),
        ({"q_rank": 0}, ValueError, "q_rank"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=names):
        tiny(**options)


def test_without_rope_nothing_is_rotated() -> None:
    layer = tiny(rope=None, rope_dim=0)
    assert layer.indexer.rope.config is None
    x = tokens(1).expand(-1, 6, -1)
    keys = layer.index(x, torch.arange(6)[None])[1]
    torch.testing.assert_close(keys, keys[:, :1].expand(-1, 6, -1))
    torch.testing.assert_close(layer(tokens()), layer.naive(tokens()), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_belongs_to_other_mechanisms_is_refused_by_name() -> None:
    layer, dense = tiny(), MultiHeadLatentAttention(24, 3, **SIZES)
    with pytest.raises(TypeError, match="cache: expected IndexedLatentCache, got LatentCache"):
        layer(tokens(), dense.new_cache(2, 20))
    other = tiny(index_dim=10).new_cache(2, 20)
    with pytest.raises(ValueError, match="index_key: expected shape"):
        layer(tokens(), other)
    assert other.length == 0
    assert not other.latents.any()
    with pytest.raises(TypeError, match="source"):
        layer(tokens(), source=5)  # type: ignore[arg-type]
    layer.absorb = False
    with pytest.raises(ValueError, match="absorb"):
        layer(tokens())
    with pytest.raises(ValueError, match="index_dim"):
        IndexedLatentCache(2, 5, 6, 4, 0, torch.float32, "cpu")
