"""Multi-head compression and MLA: both paths agree, the cheap one is cheap, and the latent is not rotated."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kvlearn.attention import (
    REGISTRY,
    FullAttention,
    LatentCache,
    MultiHeadCompression,
    MultiHeadCompressionTransformer,
    MultiHeadLatentAttention,
)
from kvlearn.attention.mla import (
    absorbed_attention,
    absorbed_wins,
    crossover,
    fold_up,
    naive_attention,
    path_bytes,
    path_flops,
    unfold_up,
)
from kvlearn.attention.rope import Rope, RopeConfig, rotate_naive
from kvlearn.kernels import decode_latent
from kvlearn.measure import peak_memory
from kvlearn.model import Decoder, ModelConfig, Spec

Latent = MultiHeadCompression | MultiHeadLatentAttention
every_kind = pytest.mark.parametrize("name", ["mhc", "mhc_transformer", "mla"])


def sharp(layer: Latent, seed: int = 0) -> Latent:
    """``layer`` with weights drawn anew, so that attention picks and no gain is one."""
    torch.manual_seed(seed)
    for weight in layer.parameters():
        spread = weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.3
        nn.init.normal_(weight, mean=float(weight.dim() == 1), std=1.3 * spread)
    return layer.eval()


def tiny(name: str, **options: Any) -> Latent:
    sizes = {"head_dim": 8, "rank": 10, "rope_dim": 4, **options}
    layer = REGISTRY[name](24, 3, **sizes)  # type: ignore[call-arg]
    assert isinstance(layer, Latent)
    return sharp(layer)


def tokens(time: int = 11, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, time, 24, generator=torch.Generator().manual_seed(seed))


def compressed(layer: Latent, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and shared keys of ``x``, not rotated."""
    if isinstance(layer, MultiHeadCompression):
        return layer.compress(x)
    latent, k_rope = layer.kv_down(x).split((layer.rank, layer.rope_dim), dim=-1)
    return layer.kv_norm(latent), k_rope


def inputs(  # the arguments of both paths
    heads: int = 3,
    head_dim: int = 5,
    value_dim: int = 5,
    rank: int = 7,
    rope_dim: int = 4,
    new: int = 1,
    cached: int = 6,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    torch.manual_seed(0)
    q = torch.randn(batch, heads, new, head_dim + rope_dim, dtype=dtype)
    latents = torch.randn(batch, cached + new, rank + rope_dim, dtype=dtype)
    kv_up = torch.randn(heads, head_dim + value_dim, rank, dtype=dtype)
    return q, latents, kv_up, torch.arange(cached, cached + new)[None], 0.4


# The two paths


@given(
    sizes=st.fixed_dictionaries(
        {name: st.integers(1, 9) for name in ("heads", "head_dim", "value_dim", "rank", "new")}
    ),
    rope_dim=st.sampled_from([0, 2, 6]),
    cached=st.integers(0, 12),
    data=st.data(),
)
def test_the_absorbed_path_gives_what_the_naive_one_gives(
    sizes: dict[str, int], rope_dim: int, cached: int, data: st.DataObject
) -> None:
    """Any sizes, and rows at any positions of their own."""
    q, latents, kv_up, positions, scale = inputs(**sizes, rope_dim=rope_dim, cached=cached)
    if data.draw(st.booleans(), "rows differ"):
        starts = data.draw(st.tuples(*[st.integers(0, cached)] * 2), "starts")
        positions = torch.tensor(starts)[:, None] + torch.arange(sizes["new"])
    naive = naive_attention(q, latents, kv_up, positions, scale)
    absorbed = absorbed_attention(q, latents, kv_up, positions, scale)
    torch.testing.assert_close(absorbed, naive, atol=1e-9, rtol=1e-9)


def test_both_paths_are_the_equation() -> None:
    """One head, one row, one query, written out."""
    q, latents, kv_up, positions, scale = inputs(heads=1, batch=1, head_dim=5, value_dim=3)
    w_uk, w_uv = kv_up[0, :5], kv_up[0, 5:]
    scores = [q[0, 0, 0, :5] @ (w_uk @ row[:7]) + q[0, 0, 0, 5:] @ row[7:] for row in latents[0]]
    weights = (torch.stack(scores) * scale).softmax(0)
    expected = sum(w * (w_uv @ row[:7]) for w, row in zip(weights, latents[0], strict=True))
    for path in (naive_attention, absorbed_attention):
        torch.testing.assert_close(path(q, latents, kv_up, positions, scale)[0, 0, 0], expected)


def test_folding_moves_the_up_projection_from_the_keys_to_the_query() -> None:
    q, latents, kv_up, _, _ = inputs()
    keys = torch.einsum("bsr, hdr -> bhsd", latents[..., :7], kv_up[:, :5])
    plain = torch.einsum("bhtd, bhsd -> bhts", q[..., :5], keys)
    folded = torch.einsum("bhtr, bsr -> bhts", fold_up(q, kv_up, 4)[..., :7], latents[..., :7])
    torch.testing.assert_close(folded, plain)
    assert torch.equal(fold_up(q, kv_up, 4)[..., 7:], q[..., 5:])
    assert unfold_up(torch.randn(2, 3, 1, 7).double(), kv_up, 5).shape == (2, 3, 1, 5)


@every_kind
def test_a_layer_gives_the_same_on_either_path(name: str) -> None:
    layer = tiny(name, **({"v_head_dim": 6, "q_rank": 9} if name == "mla" else {})).double()
    x = tokens(7, 3).double()
    outputs = []
    for layer.absorb in (False, True, None):
        cache = layer.new_cache(3, 11)
        parts = [layer(part, cache) for part in x.split([4, 1, 2], dim=1)]
        cache.trim(torch.tensor([6, 2, 5]))
        parts += [layer(part, cache) for part in x[:, :4].split([1, 3], dim=1)]
        outputs.append(torch.cat(parts, dim=1))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], atol=1e-9, rtol=1e-9)
    layer.absorb = True
    torch.testing.assert_close(layer(x), layer.naive(x), atol=1e-9, rtol=1e-9)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("absorb", [False, True])
def test_either_path_stays_near_in_half_precision(name: str, dtype: torch.dtype, absorb: bool) -> None:
    layer, x = tiny(name), tokens()
    expected = layer(x)
    half = copy.deepcopy(layer).to(dtype)
    half.absorb = absorb
    cache = half.new_cache(2, 11)
    got = torch.cat([half(part.to(dtype), cache) for part in x.split([6, 1, 4], dim=1)], dim=1)
    assert got.dtype == dtype
    error = (got.float() - expected).abs().mean() / expected.abs().mean()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.008)


# The choice of the path, and the cost of each


def test_the_counts_are_those_worked_out_on_paper() -> None:
    """H 2, D = Dv 3, R 4, Dr 2; 2 new tokens after 1: S 3, 2 + 3 pairs."""
    sizes = (2, 3, 4, 2)
    assert path_flops("naive", *sizes, new=2, cached=1) == 2 * 2 * (3 * 4 * 6 + 5 * 8) == 448
    assert path_flops("absorbed", *sizes, new=2, cached=1) == 2 * 2 * (2 * 4 * 6 + 5 * 10) == 392
    assert path_bytes("naive", *sizes, new=2, cached=1) == 4 * (18 + 32 + 48 + 2 * 36) == 680
    assert path_bytes("absorbed", *sizes, new=2, cached=1) == 4 * (18 + 32 + 48 + 2 * 40) == 712
    assert path_flops("naive", *sizes, new=2, cached=1, v_head_dim=5) == 2 * 2 * (3 * 4 * 8 + 5 * 10)
    assert path_flops("naive", *sizes, new=2, cached=1, batch=3) == 3 * 448
    assert path_bytes("naive", *sizes, new=2, cached=1, batch=3, itemsize=2) == 2 * (3 * (50 + 72) + 48)


@pytest.mark.parametrize("path", ["naive", "absorbed"])
def test_the_flops_counted_are_those_that_torch_counts(path: Any) -> None:
    """For one token, where the mask hides nothing; without rotary part, which the absorbed path pads."""
    arguments = inputs(heads=4, head_dim=6, value_dim=6, rank=16, rope_dim=0, cached=40, dtype=torch.float32)
    run = naive_attention if path == "naive" else absorbed_attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # counts matrix products
        run(*arguments)
    assert counter.get_total_flops() == path_flops(path, 4, 6, 16, 0, new=1, cached=40, batch=2)


@pytest.mark.parametrize(("head_dim", "value_dim", "rank"), [(128, 128, 512), (16, 16, 19), (24, 8, 40)])
@pytest.mark.parametrize("cached", [None, 1000, 10**9])
def test_the_paths_cross_where_the_formula_says(
    head_dim: int, value_dim: int, rank: int, cached: int | None
) -> None:
    tokens = crossover(head_dim, rank, value_dim, cached)
    assert not tokens.is_integer()
    sizes, past = (8, head_dim, rank, 32), {"cached": cached or 10**9, "v_head_dim": value_dim}
    assert absorbed_wins(*sizes, new=math.floor(tokens), **past)
    assert not absorbed_wins(*sizes, new=math.ceil(tokens), **past)


@given(head_dim=st.integers(1, 64), value_dim=st.integers(1, 64), cached=st.integers(1, 5000), data=st.data())
def test_at_the_crossover_both_paths_do_as_many_flops(
    head_dim: int, value_dim: int, cached: int, data: st.DataObject
) -> None:
    """Folding included: the formulas of ``path_flops``, at a number of tokens that is no integer."""
    rank = data.draw(st.integers((head_dim + value_dim) // 2 + 1, 256), "rank")
    new = crossover(head_dim, rank, value_dim, cached)
    pairs, heads = new * cached + new * (new + 1) / 2, head_dim + value_dim
    naive = (cached + new) * rank * heads + pairs * (heads + 8)
    absorbed = new * rank * heads + pairs * (2 * rank + 8)
    assert naive == pytest.approx(absorbed, rel=1e-9)
    assert new <= crossover(head_dim, rank, value_dim)
    far = crossover(head_dim, rank, value_dim, 10**12)
    assert far == pytest.approx(crossover(head_dim, rank, value_dim), rel=1e-3)


def test_deepseek_v3_crosses_at_171_tokens() -> None:
    assert crossover(128, 512) == pytest.approx(512 * 256 / 768)
    assert crossover(128, 512, cached=1024) == pytest.approx(158.3, abs=0.05)


def test_a_latent_no_wider_than_a_head_is_always_absorbed() -> None:
    assert crossover(64, 64) == crossover(64, 64, cached=100) == math.inf
    for new in (1, 100, 10_000):
        assert absorbed_wins(8, 64, 64, 32, new=new, cached=1)


def test_without_a_past_nothing_is_gained_by_absorbing() -> None:
    """And where nothing is lost either, R = D, the naive path is taken."""
    for new in (1, 10, 10_000):
        assert not absorbed_wins(8, 64, 128, 32, new=new)
        assert not absorbed_wins(8, 64, 64, 32, new=new)


@pytest.mark.usefixtures("unchecked_shapes")
def test_counts_refuse_bad_sizes_by_name() -> None:
    sizes: dict[str, Any] = {"n_heads": 2, "head_dim": 3, "rank": 4, "rope_dim": 2, "new": 1}
    for name, wrong in {"path": "x", "rank": 0, "rope_dim": -1, "cached": -1, "v_head_dim": 0}.items():
        with pytest.raises(ValueError, match=name):
            path_flops(**{"path": "naive", **sizes, name: wrong})
    with pytest.raises(TypeError, match="new"):
        path_bytes("naive", **{**sizes, "new": 1.5})
    with pytest.raises(ValueError, match="rank"):
        crossover(8, 0)
    with pytest.raises(ValueError, match="cached"):
        crossover(8, 16, cached=0)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that layers take from now on, in order."""
    taken: list[str] = []
    for name, path in (("naive", naive_attention), ("absorbed", absorbed_attention)):

        def watched(*a: Any, name: str = name, path: Any = path) -> Tensor:
            taken.append(name)
            return path(*a)

        for module in ("mla", "mhc"):
            monkeypatch.setattr(f"kvlearn.attention.{module}.{name}_attention", watched)
    return taken


@every_kind
def test_a_layer_takes_the_path_with_fewer_flops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, taken = tiny(name, rank=16), spied(monkeypatch)  # crosses at 16 new tokens over a long cache
    assert crossover(8, 16) == 16
    layer(tokens(30))  # training
    cache = layer.new_cache(2, 200)
    for time in (30, 1, 10, 100):  # a prefill, a step, a short chunk, a long one
        layer(tokens(time), cache)
    assert taken == ["naive", "naive", "absorbed", "absorbed", "naive"]
    taken.clear()
    for layer.absorb in (True, False):
        layer(tokens(3))
        layer(tokens(3), cache)
    assert taken == ["absorbed", "absorbed", "naive", "naive"]
    taken.clear()
    tiny(name, rank=4)(tokens(3))  # training takes the naive path though the absorbed one has fewer
    assert taken == ["naive"]


def test_the_width_of_values_counts_in_the_choice() -> None:
    """D + Dv = 2R: always absorbed; with values as narrow as keys, up to 16 new tokens."""
    assert tiny("mla", rank=16, v_head_dim=24).absorbs(100, 40)
    assert not tiny("mla", rank=16).absorbs(100, 40)


def test_rotated_keys_cannot_be_absorbed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, taken = tiny("mhc", rope_dim=0), spied(monkeypatch)
    assert not layer.absorbable
    cache = layer.new_cache(2, 20)
    for part in tokens(9).split([8, 1], dim=1):
        layer(part, cache)
    assert taken == ["naive", "naive"]
    layer.absorb = True
    with pytest.raises(ValueError, match="absorb"):
        layer(tokens(1), cache)
    assert cache.length == 9  # nothing was half written
    assert tiny("mhc", rope_dim=0, rope=None).absorbable


# Memory


@pytest.mark.parametrize("rows", ["together", "of their own lengths"])
def test_an_absorbed_step_never_holds_the_heads_of_all_tokens(rows: str) -> None:
    """At most 3 · H · N numbers beside inputs and output; the naive path has H · N · (D + Dv) and more."""
    heads, n_tokens, head_dim = 8, 4096, 32
    q, latents, kv_up, positions, scale = inputs(
        heads, head_dim, head_dim, 96, 16, 1, n_tokens - 1, batch=2, dtype=torch.float32
    )
    if rows != "together":
        positions = torch.tensor([[n_tokens - 1], [100]])
    output = 4 * q.shape[0] * heads * head_dim
    bound = 4 * q.shape[0] * heads * n_tokens
    absorbed = peak_memory(lambda: absorbed_attention(q, latents, kv_up, positions, scale))
    naive = peak_memory(lambda: naive_attention(q, latents, kv_up, positions, scale))
    assert absorbed - output <= 3 * bound
    assert naive >= 2 * head_dim * bound


def test_an_absorbed_chunk_holds_scores_at_most() -> None:
    q, latents, kv_up, positions, scale = inputs(8, 32, 32, 96, 16, 16, 2032, batch=2, dtype=torch.float32)
    peak = peak_memory(lambda: absorbed_attention(q, latents, kv_up, positions, scale))
    assert peak <= 3 * 4 * 2 * 8 * 16 * 2048
    assert peak < 4 * 2 * 8 * 2048 * 32


@every_kind
def test_a_whole_step_of_a_layer_keeps_within_the_bound(name: str) -> None:
    torch.manual_seed(0)
    layer = REGISTRY[name](64, 4, rank=32, rope_dim=16)  # type: ignore[call-arg]
    cache = layer.new_cache(1, 4096)
    with torch.no_grad():
        layer(torch.randn(1, 4000, 64), cache)
        x = torch.randn(1, 1, 64)
        assert peak_memory(lambda: layer(x, cache)) <= 3 * 4 * 4 * 4001


# The cache


@every_kind
def test_the_shared_key_is_rotated_and_the_latent_is_not(name: str) -> None:
    layer = tiny(name)
    x = tokens(1).expand(-1, 6, -1)  # the same token at six positions
    cache = layer.new_cache(2, 6)
    for part in x.split([2, 1, 3], dim=1):
        layer(part, cache)
    assert isinstance(cache, LatentCache)
    latent, k_rope = cache.latents.split((10, 4), dim=-1)
    expected, unrotated = compressed(layer, x)
    torch.testing.assert_close(latent, expected)
    torch.testing.assert_close(k_rope, rotate_naive(unrotated[:, :, None], RopeConfig())[:, :, 0])
    torch.testing.assert_close(k_rope[:, 0], unrotated[:, 0])
    assert ((k_rope[:, 1:] - k_rope[:, :-1]).abs().amax(-1) > 1e-3).all()


@every_kind
@pytest.mark.parametrize("rope_dim", [0, 4])
def test_outputs_depend_on_distances_alone(name: str, rope_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens at positions moved by 5; where decompressed keys are rotated, theirs are moved too."""
    layer, rotate, shift = tiny(name, rope_dim=rope_dim).double(), Rope.forward, 5
    x = tokens(4).double()
    expected = layer(x)

    def moved(x: Tensor, cache: object) -> Tensor:
        return torch.arange(shift, shift + x.shape[1])[None]

    def rotate_moved(rope: Rope, heads: Tensor, positions: Tensor) -> Tensor:
        return rotate(rope, heads, positions if positions[0, 0] == shift else positions + shift)

    for module in ("mla", "mhc"):
        monkeypatch.setattr(f"kvlearn.attention.{module}.token_positions", moved)
    for layer.absorb in (False, True) if rope_dim else (False,):
        if not rope_dim:
            assert not torch.allclose(layer(x), expected, atol=1e-2)  # queries alone were moved
        monkeypatch.setattr(Rope, "forward", rotate_moved)
        torch.testing.assert_close(layer(x), expected, atol=1e-9, rtol=1e-9)


def test_the_default_keeps_an_eighth_of_what_full_attention_keeps() -> None:
    full = FullAttention(64, 8)
    without_positions = MultiHeadCompression(64, 8, rope_dim=0)
    assert 8 * without_positions.cache_bytes(100) == full.cache_bytes(100)
    assert 8 * without_positions.read_bytes(100) == full.read_bytes(100)
    assert MultiHeadCompression(64, 8).cache_bytes(10, batch=3, dtype=torch.float16) == 3 * 10 * (16 + 4) * 2


@pytest.mark.parametrize(("head_dim", "rope_dim"), [(1, 2), (2, 2), (6, 2), (8, 4), (10, 4), (64, 32)])
def test_positions_take_half_a_head_made_even(head_dim: int, rope_dim: int) -> None:
    assert MultiHeadCompression(8, 2, head_dim=head_dim).rope_dim == rope_dim
    assert MultiHeadCompression(8, 2, head_dim=head_dim, rope=None).rope_dim == 0


def test_the_papers_sizes_are_mlas_defaults() -> None:
    """DeepSeek-V2, section 3.1.2: 4 d_h = 512 and d_h / 2 = 64 at d_h = 128."""
    with torch.device("meta"):
        layer = MultiHeadLatentAttention(5120, 128, head_dim=128)
    assert (layer.rank, layer.rope_dim) == (512, 64)
    assert layer.cache_bytes(1, dtype=torch.bfloat16) == 576 * 2
    assert layer.scale == (128 + 64) ** -0.5


@every_kind
def test_a_wider_latent_costs_its_width(name: str) -> None:
    narrow, wide = tiny(name, rank=10), tiny(name, rank=20)
    assert wide.cache_bytes(7) - narrow.cache_bytes(7) == 7 * 10 * 4
    assert narrow.read_bytes(7) == narrow.cache_bytes(7) == narrow.new_cache(1, 7).nbytes


def test_views_of_the_up_projection_write_to_it() -> None:
    layer = tiny("mla", v_head_dim=6)
    with torch.no_grad():
        layer.k_up.fill_(1.0)
        layer.v_up.fill_(2.0)
    heads = layer.kv_up.weight.view(3, 8 + 6, 10)
    assert (heads[:, :8] == 1).all()
    assert (heads[:, 8:] == 2).all()


# The transformer over the heads


def test_the_transformer_mixes_heads_and_never_tokens() -> None:
    layer = tiny("mhc_transformer")
    x = tokens(9)
    latent, k_rope = layer.compress(x)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for got, whole in zip(layer.compress(x[:, order]), (latent, k_rope), strict=True):
        torch.testing.assert_close(got, whole[:, order])
    torch.testing.assert_close(layer.compress(x[1:, 3:4])[0], latent[1:, 3:4])


def test_the_transformer_is_not_linear_and_contains_the_linear_map() -> None:
    layer = tiny("mhc_transformer")
    assert isinstance(layer, MultiHeadCompressionTransformer)
    x, y = tokens(), tokens(seed=2)
    bent = layer.compress(x + y)[0] - layer.compress(x)[0] - layer.compress(y)[0]
    assert bent.abs().mean() > 0.1 * layer.compress(x)[0].abs().mean()
    with torch.no_grad():
        layer.compressor.mix_proj.weight.zero_()
        layer.compressor.narrow_proj.weight.zero_()
    linear = layer.compressor.latent_proj.weight @ layer.kv_proj.weight
    torch.testing.assert_close(layer.compress(x)[0], x @ linear.T, atol=1e-5, rtol=1e-4)


def test_the_compressor_is_its_equation() -> None:
    """A pre-norm transformer layer, a head at a time."""
    c, heads = tiny("mhc_transformer").compressor.double(), torch.randn(6, 8, dtype=torch.float64)
    with torch.no_grad():
        projected = [
            c.qkv_proj(c.attention_norm(h + e)).chunk(3) for h, e in zip(heads, c.which, strict=True)
        ]
        mixed = []
        for n, head in enumerate(heads):
            scores = torch.stack([projected[n][0] @ k for _, k, _ in projected]) / 8**0.5
            mixed.append(head + c.mix_proj(scores.softmax(0) @ torch.stack([v for *_, v in projected])))
        out = [
            h + c.narrow_proj(nn.functional.gelu(c.widen_proj(c.mlp_norm(h + e))))
            for h, e in zip(mixed, c.which, strict=True)
        ]
        torch.testing.assert_close(c(heads), c.latent_proj(torch.cat(out)))


def test_each_head_reaches_every_other_in_the_transformer() -> None:
    """Through attention alone: the output of one head follows a change in another's."""
    compressor = tiny("mhc_transformer").compressor
    heads = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        compressor.latent_proj.weight.zero_()
        compressor.latent_proj.weight[:8, -8:] = torch.eye(8)  # the last head's output, unchanged
        for other in range(5):
            changed = heads.clone()
            changed[other] = -changed[other]
            assert (compressor(changed) - compressor(heads)).abs().max() > 1e-3


@pytest.mark.parametrize("silent", ["mix_proj", "narrow_proj"])
def test_heads_are_told_apart_by_their_embedding(silent: str) -> None:
    """In the MLP, and in the attention: with the other silent, what the layer says of a head depends on which
    it is."""
    compressor = tiny("mhc_transformer").compressor
    heads = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        getattr(compressor, silent).weight.zero_()
        told = compressor(heads)
        compressor.which.zero_()
        assert (compressor(heads) - told).abs().max() > 1e-2


# The decode hook


@every_kind
@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_a_kernel_does_the_steps_of_one_token(name: str, positions: str) -> None:
    layer = tiny(name, **({"rope_dim": 0, "rope": None} if positions == "none" else {}))
    calls = []

    def step(q_latent: Tensor, q_rope: Tensor, cache: Tensor, lengths: Tensor, *, scale: float) -> Tensor:
        assert cache.shape == (2, int(lengths.max()), layer.rank + layer.rope_dim)
        assert lengths.dtype == torch.int32
        assert scale == layer.scale
        calls.append(lengths.tolist())
        return decode_latent(q_latent, q_rope, cache, lengths, scale=scale)

    def run() -> Tensor:
        cache = layer.new_cache(2, 9)
        with torch.no_grad():
            parts = [layer(part, cache) for part in tokens(6).split([4, 1, 1], dim=1)]
            cache.trim(torch.tensor([2, 5]))
            parts += [layer(part, cache) for part in tokens(3, seed=2).split([1, 2], dim=1)]
        return torch.cat(parts, dim=1)

    expected = run()
    layer.decode_latent_step = step
    torch.testing.assert_close(run(), expected, atol=1e-5, rtol=1e-5)
    assert calls == [[5, 5], [6, 6], [3, 6]]
    layer.decode_latent_step = decode_latent
    torch.testing.assert_close(run(), expected, atol=1e-5, rtol=1e-5)


def test_the_kernel_is_asked_for_absorbed_steps_only() -> None:
    def never(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("called")

    naive, rotated = tiny("mla"), tiny("mhc", rope_dim=0)
    naive.absorb = False
    for layer in (naive, rotated):
        layer.decode_latent_step = never
        layer(tokens(1), layer.new_cache(2, 3))
    naive.absorb = True
    naive(tokens(1))  # without a cache: training keeps a graph, which a kernel does not
    naive(tokens(2), naive.new_cache(2, 3))


# The model


@every_kind
def test_a_decoder_takes_it_in_any_layer(name: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(d_model=32, n_heads=4, n_layers=3, layers=(Spec(name, rank=6), Spec("full")))
    assert ModelConfig.from_dict(config.to_dict()) == config
    model = Decoder(config).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.2)
    prompt = torch.randint(0, 256, (2, 7))
    assert torch.equal(model.generate(prompt, 8), model.generate(prompt, 8, use_cache=False))
    cache = model.new_cache(2, 16)
    rows = model.table(16, batch=2)
    assert [row["stored"] for row in rows[:3]] == [layer.nbytes for layer in cache.layers]
    assert 3 < rows[1]["stored"] / rows[0]["stored"] < 8


# Wrong arguments


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("name", "options", "error", "names"),
    [
        ("mhc", {"rank": 0}, ValueError, "rank"),
        ("mhc", {"rank": 2.5}, TypeError, "rank"),
        ("mhc", {"rank": 49}, ValueError, "rank: expected at most 48"),
        ("mla", {"rank": 43, "v_head_dim": 6}, ValueError, "rank: expected at most 42"),
        ("mhc", {"rope_dim": 3}, ValueError, "rope_dim: expected an even number"),
        ("mhc", {"rope_dim": -2}, ValueError, "rope_dim"),
        ("mhc_transformer", {"head_dim": 7, "rope_dim": 0}, ValueError, "head_dim: expected an even number"),
        ("mla", {"v_head_dim": 0}, ValueError, "v_head_dim"),
        ("mla", {"q_rank": 0}, ValueError, "q_rank"),
        ("mla", {"rope": 10_000.0}, TypeError, "rope"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(
    name: str, options: dict[str, Any], error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=names):
        REGISTRY[name](24, 3, **{"head_dim": 8, **options})  # type: ignore[call-arg]


@every_kind
@pytest.mark.usefixtures("unchecked_shapes")
def test_what_belongs_to_other_mechanisms_is_refused_by_name(name: str) -> None:
    layer, full = tiny(name), FullAttention(24, 3)
    with pytest.raises(TypeError, match="cache: expected LatentCache, got KVCache"):
        layer(tokens(), full.new_cache(2, 20))
    with pytest.raises(TypeError, match="cache: expected KVCache, got LatentCache"):
        full(tokens(), layer.new_cache(2, 20))
    with pytest.raises(TypeError, match="source"):
        layer(tokens(), source=full.project_kv(tokens()))
    with pytest.raises(TypeError, match="source"):
        layer.project_kv(tokens())
    other = tiny(name, rank=12, rope_dim=2).new_cache(2, 20)  # as wide, but divided elsewhere
    with pytest.raises(ValueError, match="latent: expected shape"):
        layer(tokens(), other)
    assert other.length == 0


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_latent_cache_refuses_other_shapes_and_stays_as_it_was() -> None:
    cache = LatentCache(2, 5, 6, 4, torch.float32, "cpu")
    latent, k_rope = torch.ones(2, 3, 6), torch.ones(2, 3, 4)
    wrong = {
        "latent": (latent[..., :5], k_rope),
        "k_rope": (latent, k_rope[:, :2]),
        "max_len": (torch.ones(2, 6, 6), torch.ones(2, 6, 4)),
        "device": (latent, k_rope.to("meta")),
    }
    for names, new in wrong.items():
        with pytest.raises(ValueError, match=names):
            cache.append(*new)
    assert cache.length == 0
    assert not cache.latents.any()
    for arguments, error, names in (
        ((2, 5, 6, 4, torch.int32), TypeError, "dtype"),
        ((2, 5, 0, 4, torch.float32), ValueError, "rank"),
        ((2, 5, 6, -1, torch.float32), ValueError, "rope_dim"),
    ):
        with pytest.raises(error, match=names):
            LatentCache(*arguments, "cpu")


def test_a_latent_cache_hands_out_views() -> None:
    cache = LatentCache(2, 5, 6, 4, torch.float32, "cpu")
    view = cache.append(torch.ones(2, 3, 6), 2 * torch.ones(2, 3, 4))
    assert view.data_ptr() == cache.latents.data_ptr()
    assert view.shape == (2, 3, 10)
    assert view[0, 0].tolist() == [1.0] * 6 + [2.0] * 4
    cache.trim(torch.tensor([1, 3]))
    cache.append(torch.full((2, 1, 6), 5.0), torch.full((2, 1, 4), 6.0))
    assert cache.latents[:, :, 0].tolist() == [[1, 5, 1, 0, 0], [1, 1, 1, 5, 0]]
