"""The contract of every mechanism, parametrised over the registry: every registered class is covered.

Weights are drawn anew with a large spread, norms and other vectors too: at the usual initialisation attention
is nearly uniform, and a wrong mask or a wrong position would hide within the tolerance.
"""

from dataclasses import replace
from inspect import signature
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvlearn.attention import REGISTRY, Cache, Mechanism

BATCH, TIME = 3, 13
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}

every_mechanism = pytest.mark.parametrize("name", sorted(REGISTRY))
every_sharer = pytest.mark.parametrize(
    "name", sorted(name for name, kind in REGISTRY.items() if "reader" in signature(kind).parameters)
)
every_recurrence = pytest.mark.parametrize(
    "name", sorted(name for name, kind in REGISTRY.items() if kind.forms)
)


def randomised(layer: Mechanism, seed: int = 0) -> Mechanism:
    """``layer`` with all its weights drawn anew, sharp enough that attention picks."""
    generator = torch.Generator().manual_seed(seed)
    for weight in layer.parameters():
        spread = 1.5 * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.5
        weight.data = (torch.randn(weight.shape, generator=generator) * spread + (weight.dim() == 1)).to(
            weight
        )
    return layer.eval()


def tiny(name: str, seed: int = 0) -> Mechanism:
    return randomised(REGISTRY[name].tiny(), seed)


def tiny_reader(name: str, seed: int = 0) -> Mechanism:
    """A small layer without keys and values of its own."""
    return randomised(REGISTRY[name].tiny(reader=True), seed)  # type: ignore[call-arg]


def tokens(layer: Mechanism, batch: int = BATCH, time: int = TIME, seed: int = 1) -> Tensor:
    return torch.randn(batch, time, layer.d_model, generator=torch.Generator().manual_seed(seed))


def in_chunks(layer: Mechanism, x: Tensor, cuts: list[int], cache: Cache) -> Tensor:
    """The outputs of ``layer`` when ``x`` is fed in pieces that end at ``cuts``."""
    edges = [0, *sorted(set(cuts)), x.shape[1]]
    with torch.no_grad():
        pieces = [layer(x[:, a:b], cache) for a, b in pairwise(edges) if b > a]
    return torch.cat(pieces, dim=1)


def mostly_close(layer: Mechanism, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """``close``; where the layer selects by content, rounding may change a selection, so one token in ten may
    differ."""
    if layer.chooses_by_content:
        off = ((got.float() - expected.float()).abs() > tolerance * (1 + expected.float().abs())).any(-1)
        assert off.float().mean() < 0.1
    else:
        close(got, expected, tolerance)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """To ``tolerance``; of the largest number, where that is above 1: sums round as their terms are large."""
    atol = tolerance * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got.float(), expected.float(), atol=atol, rtol=tolerance)


@every_mechanism
@given(cuts=st.lists(st.integers(1, TIME - 1), max_size=TIME))
def test_any_cutting_into_chunks_gives_what_one_pass_gives(name: str, cuts: list[int]) -> None:
    layer = tiny(name)
    x = tokens(layer)
    close(in_chunks(layer, x, cuts, layer.new_cache(BATCH, TIME + 2)), layer(x))


@every_mechanism
def test_one_token_at_a_time_gives_what_one_pass_gives(name: str) -> None:
    layer = tiny(name)
    x = tokens(layer)
    close(in_chunks(layer, x, list(range(TIME)), layer.new_cache(BATCH, TIME)), layer(x))


@every_mechanism
def test_the_fast_form_equals_the_naive_form(name: str) -> None:
    layer = tiny(name)
    for time in (1, 2, TIME):
        x = tokens(layer, time=time)
        close(layer(x), layer.naive(x))


@every_mechanism
def test_gradients_are_those_of_the_naive_form(name: str) -> None:
    layer = tiny(name)
    x = tokens(layer)
    weights = tokens(layer, seed=2)
    learned = [
        weight for name, weight in layer.named_parameters() if not name.startswith(layer.auxiliary_parameters)
    ]
    fast, naive = (torch.autograd.grad((form(x) * weights).sum(), learned) for form in (layer, layer.naive))
    for got, expected in zip(fast, naive, strict=True):
        assert got.isfinite().all()
        close(got, expected, 1e-4)


@every_mechanism
def test_a_token_changes_no_output_before_it_and_its_own(name: str) -> None:
    layer = tiny(name)
    x = tokens(layer)
    before = layer(x)
    for t in (0, 5, TIME - 1):
        changed = x.clone()
        changed[:, t] += 1
        after = layer(changed)
        assert torch.equal(before[:, :t], after[:, :t]) or (before - after)[:, :t].abs().max() < 1e-6
        assert ((before - after)[:, t].abs().amax(-1) > 1e-3).all()


@every_mechanism
def test_rows_of_a_batch_do_not_touch_each_other(name: str) -> None:
    layer = tiny(name)
    x = tokens(layer)
    together = in_chunks(layer, x, [4, 5], layer.new_cache(BATCH, TIME))
    for row in range(BATCH):
        alone = in_chunks(layer, x[row : row + 1], [4, 5], layer.new_cache(1, TIME))
        close(together[row : row + 1], alone)


@every_mechanism
def test_rows_may_differ_in_length(name: str) -> None:
    """Prompts padded on the right, cut back to their own lengths, then continued together."""
    layer = tiny(name)
    lengths, x, new = torch.tensor([7, 3, 5]), tokens(layer, time=7), tokens(layer, time=4, seed=3)
    cache = layer.new_cache(3, TIME)
    with torch.no_grad():
        layer(x, cache)
        if not cache.can_trim:
            pytest.skip("this cache cannot forget its newest tokens")
        handed = lengths.clone()
        cache.trim(handed)
        handed += 1  # the cache has kept a copy
        together = torch.cat([layer(new[:, :3], cache), layer(new[:, 3:], cache)], dim=1)
        for row, length in enumerate(lengths.tolist()):
            whole = layer(torch.cat((x[row, :length], new[row]))[None])
            close(together[row], whole[0, length:])


@every_mechanism
def test_reset_really_resets(name: str) -> None:
    layer = tiny(name)
    cache = layer.new_cache(BATCH, TIME)
    in_chunks(layer, tokens(layer, seed=9), [6], cache)
    cache.reset()
    x = tokens(layer)
    assert cache.length == 0
    close(in_chunks(layer, x, [6], cache), layer(x))
    assert cache.length == TIME


@every_mechanism
def test_bytes_stored_are_what_the_formula_says(name: str) -> None:
    layer = tiny(name)
    for max_len, dtype in product((1, 5, 64), DTYPES):
        cache = layer.new_cache(2, max_len, dtype=dtype)
        assert cache.nbytes == layer.cache_bytes(max_len, batch=2, dtype=dtype), (max_len, dtype)
        assert cache.nbytes == sum(t.numel() * t.element_size() for t in cache.tensors())


@every_mechanism
def test_memory_is_allocated_once(name: str) -> None:
    layer = tiny(name)
    cache = layer.new_cache(BATCH, TIME)
    before = [t.data_ptr() for t in cache.tensors()]
    nbytes = cache.nbytes
    in_chunks(layer, tokens(layer), [1, 2, 8], cache)
    assert [t.data_ptr() for t in cache.tensors()] == before
    assert cache.nbytes == nbytes


@every_mechanism
def test_a_step_reads_no_more_than_is_stored(name: str) -> None:
    layer = tiny(name)
    for length in (1, 7, 64):
        assert 0 < layer.read_bytes(length, batch=2) <= layer.cache_bytes(length, batch=2)


@every_mechanism
@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_stays_near_single(name: str, dtype: torch.dtype) -> None:
    layer = tiny(name)
    x = tokens(layer)
    expected = layer(x)
    layer = layer.to(dtype)
    got = in_chunks(layer, x.to(dtype), [5, 6], layer.new_cache(BATCH, TIME))
    assert got.dtype == dtype
    mostly_close(layer, got, expected, DTYPES[dtype] * max(1.0, expected.abs().max().item()))


@every_mechanism
def test_far_positions_survive_half_precision_weights(name: str) -> None:
    """Half precision changes numbers, not positions: outputs stay as near after 900 tokens as at first."""
    layer = tiny(name)
    x = tokens(layer, batch=1, time=900)
    error = (layer.to(torch.bfloat16)(x.bfloat16()).float() - tiny(name)(x.bfloat16().float())).abs()
    first, last = (part.flatten().quantile(0.8) for part in (error[:, :100], error[:, -100:]))
    assert last < 3 * first + 1e-3


@every_mechanism
def test_double_precision_stays_double(name: str) -> None:
    layer, x = tiny(name).double(), tokens(tiny(name), time=5).double()
    torch.testing.assert_close(layer(x), layer.naive(x), atol=1e-10, rtol=1e-10)


@every_mechanism
def test_with_a_cache_no_graph_is_kept(name: str) -> None:
    layer = tiny(name)
    y = layer(tokens(layer), layer.new_cache(BATCH, TIME))
    assert not y.requires_grad
    assert layer(tokens(layer)).requires_grad


@every_mechanism
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_cache_of_another_shape_or_type_is_refused_and_left_alone(name: str) -> None:
    layer = tiny(name)
    with pytest.raises(TypeError, match="dtype"):
        layer.new_cache(BATCH, TIME, dtype=torch.int64)
    other = REGISTRY[name](layer.d_model, 1)  # type: ignore[call-arg]
    cache = other.new_cache(BATCH, TIME)
    if [t.shape for t in cache.tensors()] != [t.shape for t in layer.new_cache(BATCH, TIME).tensors()]:
        with pytest.raises(ValueError, match="expected shape"):
            layer(tokens(layer), cache)
        assert cache.length == 0


@every_mechanism
def test_a_cache_may_have_another_dtype_than_the_weights(name: str) -> None:
    layer = tiny(name)
    x = tokens(layer)
    got = in_chunks(layer, x, [5, 6], layer.new_cache(BATCH, TIME, dtype=torch.float16))
    assert got.dtype == x.dtype
    close(got, layer(x), 2e-2)


@every_mechanism
def test_a_cache_may_be_wider_than_the_weights(name: str) -> None:
    layer = tiny(name)
    x = tokens(layer)
    close(in_chunks(layer, x, [5, 6], layer.new_cache(BATCH, TIME, dtype=torch.float64)), layer(x))


@every_mechanism
def test_the_limit_is_full_attention(name: str) -> None:
    pair = REGISTRY[name].tiny_at_limit()
    if pair is None:
        pytest.skip(f"{name} has no setting at which it is full attention")
    limit, full = (layer.eval() for layer in pair)
    x = tokens(limit)
    close(limit(x), full(x))
    close(in_chunks(limit, x, [4, 5], limit.new_cache(BATCH, TIME)), full(x))


@every_recurrence
def test_the_forms_of_a_recurrence_agree(name: str) -> None:
    """From an empty state and after one, chunks of one token, of some that do not divide T, and of more."""
    layer = tiny(name)
    x = tokens(layer)
    layer.form = "recurrent"
    expected = layer(x)
    for form in layer.forms:
        layer.form = form
        for chunk in (1, 5, 64):
            if hasattr(layer, "chunk"):
                layer.chunk = chunk
            close(layer(x), expected)
            close(in_chunks(layer, x, [6], layer.new_cache(BATCH, TIME)), expected)


@every_recurrence
def test_a_state_never_grows_and_stays_single_at_least(name: str) -> None:
    layer = tiny(name).to(torch.bfloat16)
    assert layer.cache_bytes(1) == layer.cache_bytes(10**6) == layer.read_bytes(10**6)
    for dtype in (None, torch.bfloat16, torch.float16, torch.float32):
        cache = layer.new_cache(1, 10**6, dtype=dtype)
        assert cache.nbytes == layer.cache_bytes(10**6)
        assert {t.dtype for t in cache.tensors()} == {torch.float32}


@every_sharer
def test_a_layer_that_reads_its_own_keys_and_values_is_itself(name: str) -> None:
    layer = tiny(name)
    x = tokens(layer)
    cache = layer.new_cache(BATCH, TIME)
    with torch.no_grad():
        pieces = [layer(part, cache, source=layer.project_kv(part, cache)) for part in x.split(5, dim=1)]
    close(torch.cat(pieces, dim=1), layer(x))


@every_sharer
def test_a_reader_follows_its_owner_and_stores_nothing(name: str) -> None:
    owner, reader = tiny(name), tiny(name, seed=5)
    x, theirs = tokens(owner), tokens(owner, seed=2)
    whole = reader(x, source=owner.project_kv(theirs))
    assert not torch.allclose(whole, reader(x), atol=1e-2)
    cache, own = owner.new_cache(BATCH, TIME), reader.new_cache(BATCH, TIME)
    with torch.no_grad():
        pieces = [
            reader(a, own, source=owner.project_kv(b, cache))
            for a, b in zip(x.split(4, 1), theirs.split(4, 1), strict=True)
        ]
    close(torch.cat(pieces, dim=1), whole)
    assert own.length == 0


@every_sharer
@given(cuts=st.lists(st.integers(1, TIME - 1), max_size=TIME))
def test_a_layer_without_keys_and_values_reads_its_owners(name: str, cuts: list[int]) -> None:
    """It gives what a whole layer with the same other weights gives, however the sequence is cut."""
    owner, reader, whole = tiny(name), tiny_reader(name), tiny(name, seed=5)
    whole.load_state_dict(reader.state_dict(), strict=False)
    x, theirs = tokens(owner), tokens(owner, seed=2)
    expected = whole(x, source=owner.project_kv(theirs))
    cache, own = owner.new_cache(BATCH, TIME), reader.new_cache(BATCH, TIME)
    edges = [0, *sorted(set(cuts)), TIME]
    with torch.no_grad():
        pieces = [
            reader(x[:, a:b], own, source=owner.project_kv(theirs[:, a:b], cache)) for a, b in pairwise(edges)
        ]
    close(torch.cat(pieces, dim=1), expected)


@every_sharer
def test_a_reader_stores_nothing_and_reads_what_its_owner_stores(name: str) -> None:
    owner, reader = tiny(name), tiny_reader(name)
    assert reader.new_cache(2, 64).nbytes == reader.cache_bytes(64, batch=2) == 0
    assert reader.read_bytes(9, batch=2) == owner.read_bytes(9, batch=2) > 0
    owned, left = (sum(w.numel() for w in layer.parameters()) for layer in (owner, reader))
    width = owner.new_cache(1, 1).nbytes // 4  # numbers per token, each computed by a row of weights
    assert owned - left == width * owner.d_model


@every_sharer
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_reader_without_a_source_is_refused_by_name(name: str) -> None:
    reader = tiny_reader(name)
    x = tokens(reader)
    with pytest.raises(TypeError, match="source: expected KV, got NoneType"):
        reader(x)
    with pytest.raises(TypeError, match="source"):
        reader.project_kv(x)
    with pytest.raises(TypeError, match="cache: expected NoCache"):
        reader(x, tiny(name).new_cache(BATCH, TIME), source=tiny(name).project_kv(x))


@every_sharer
def test_gradients_reach_the_owner_through_its_reader(name: str) -> None:
    owner, reader = tiny(name), tiny_reader(name)
    x = tokens(owner)
    reader(x, source=owner.project_kv(x)).sum().backward()
    for weight in (owner.k_proj.weight, owner.v_proj.weight, reader.q_proj.weight):  # type: ignore[union-attr]
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0


@every_sharer
@pytest.mark.usefixtures("unchecked_shapes")
def test_keys_and_values_that_do_not_fit_are_refused_by_name(name: str) -> None:
    layer = tiny(name)
    source = layer.project_kv(tokens(layer))
    wrong = {
        "expected KV": 5,
        "source.k": replace(source, k=source.k[:1]),
        "source.v": replace(source, v=source.v[..., :-1]),
        "source.positions": replace(source, positions=source.positions[:, :-1]),
        "source.slot_positions": replace(source, slot_positions=torch.arange(TIME - 1)[None]),
    }
    for names, other in wrong.items():
        with pytest.raises((TypeError, ValueError), match=names):
            layer(tokens(layer), source=other)  # type: ignore[arg-type]


@every_mechanism
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_input_is_refused_by_name(name: str) -> None:
    layer = tiny(name)
    x, cache = tokens(layer), layer.new_cache(BATCH, TIME)
    for case, error, names, arguments in (
        ("two dimensions", ValueError, "x: expected shape", (x[0], cache)),
        ("wrong width", ValueError, "x: expected shape", (x[..., :-1], cache)),
        ("no tokens", ValueError, "time", (x[:, :0], cache)),
        ("wrong dtype", TypeError, "x: expected dtype", (x.double(), cache)),
        ("not a tensor", TypeError, "x: expected Tensor", (x.tolist(), cache)),
        ("wrong batch", ValueError, "batch", (x[:2], cache)),
        ("too many tokens", ValueError, "cache: expected at most max_len", (torch.cat((x, x), 1), cache)),
        ("no cache at all", TypeError, "cache: expected", (x, "cache")),
        ("another device", ValueError, "device", (x.to("meta"), cache)),
    ):
        with pytest.raises(error, match=names):
            layer(*arguments)
        assert cache.length == 0, f"{case}: half written"


@every_mechanism
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_cache_or_a_layer_of_no_size_is_refused_by_name(name: str) -> None:
    layer = tiny(name)
    for batch, max_len, names in ((0, 4, "batch"), (2, 0, "max_len"), (2, -1, "max_len")):
        with pytest.raises(ValueError, match=names):
            layer.new_cache(batch, max_len)
    for d_model, n_heads, names in ((0, 1, "d_model"), (24, 0, "n_heads"), (24, 5, "n_heads")):
        with pytest.raises(ValueError, match=names):
            REGISTRY[name](d_model, n_heads)  # type: ignore[call-arg]


@every_mechanism
@pytest.mark.usefixtures("unchecked_shapes")
def test_trim_refuses_lengths_that_never_were(name: str) -> None:
    layer = tiny(name)
    cache = layer.new_cache(BATCH, TIME)
    in_chunks(layer, tokens(layer, time=4), [], cache)
    if not cache.can_trim:
        with pytest.raises(ValueError, match="cannot forget"):
            cache.trim(torch.tensor([1, 1, 1]))
        return
    with pytest.raises(ValueError, match="lengths"):
        cache.trim(torch.tensor([5, 1, 1]))
    with pytest.raises(ValueError, match="lengths"):
        cache.trim(torch.tensor([1, 1]))
    with pytest.raises(TypeError, match="lengths"):
        cache.trim(torch.tensor([1.0, 1.0, 1.0]))


def test_a_name_is_registered_once() -> None:
    from kvlearn.attention import register

    with pytest.raises(ValueError, match="'full' is registered already"):
        register("full")(REGISTRY["full"])
