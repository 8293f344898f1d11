"""Fixed patterns: their primitives and specs, what is computed, and what the cache may forget.

What a primitive computes fast (``visible_keys``, ``last_readers``, slots) is compared with its dense mask.
"""

import json
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_tools import close, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvlearn.attention import KV, Pattern, PatternCache, SparseAttention, WindowAttention, parse
from kvlearn.attention.core import attend_blockwise, grouped_attention
from kvlearn.attention.patterns import (
    Fixed,
    Global,
    Local,
    Random,
    Strided,
    Union,
    allocate_slots,
    bigbird,
    live_tokens,
    longformer,
    n_slots,
    primitives,
    sparse_transformer,
    sparse_transformer_fixed,
)
from kvlearn.attention.sparse import attend_pattern, visible_naive
from kvlearn.kernels import decode_attention
from kvlearn.model import Decoder, ModelConfig, Spec

TIME = 37
PRIMITIVES: list[Pattern] = [
    Local(1),
    Local(4),
    Local(100),
    Local(6, block=3),
    Local(5, block=5),
    Local(8, 2),
    Strided(1),
    Strided(4),
    Strided(7),
    Strided(99),
    Fixed(1),
    Fixed(5),
    Fixed(6, 2),
    Fixed(4, summary=4),
    Fixed(64, 3),
    Global(1),
    Global(5),
    Global(at=(0,)),
    Global(at=(9, 20)),
    Global(2, at=(20, 3)),
    Global(at=(70,)),
    Global(60),
    Random(1, block=4),
    Random(2, block=3, skip_first=1, skip_last=1),
    Random(3, 5, 0, 2, 7),
    Random(9, block=1),
    Random(1),
]
SPECS = [
    "local(4)",
    "local(5) | global(2)",
    "local(5) | global(1, at=(11, 20))",
    "strided(6)",
    "local(6) | strided(6)",
    "strided(3) | strided(5)",
    "local(2) | strided(4) | strided(6) | global(at=(9,))",
    "fixed(6, 2)",
    "fixed(5) | global(1)",
    "local(8, block=4) | global(4) | random(1, block=4, skip_first=1, skip_last=1)",
    "local(3) | random(2, block=2, seed=5) | strided(7)",
    "strided(1)",
]


small, block_sizes = st.integers(1, 9), st.integers(1, 4)
positions = st.lists(st.integers(0, 45), min_size=1, max_size=3).map(tuple)
seeds = st.integers(0, 9)
a_primitive = st.one_of(  # of a size that shows within TIME tokens
    st.builds(lambda n, block: f"local({n * block}, {block})", small, block_sizes),
    st.builds("strided({})".format, small),
    st.builds(lambda block, summary: f"fixed({block}, {min(block, summary)})", small, block_sizes),
    st.builds("global({})".format, small),
    st.builds("global({}, at={})".format, st.integers(0, 3), positions),
    st.builds(
        "random({}, {}, {}, {}, {})".format, block_sizes, small, st.integers(0, 2), st.integers(0, 2), seeds
    ),
)
specs = st.lists(a_primitive, min_size=1, max_size=4).map(" | ".join)
specs_with_self = st.builds("{} | local({})".format, specs, small)  # in which every token attends to itself
times = st.integers(1, TIME)


def sharp(layer: Any, seed: int = 0) -> Any:
    """``layer`` with its weights drawn anew, so large that attention picks."""
    generator = torch.Generator().manual_seed(seed)
    for weight in layer.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 1.5 * weight.shape[-1] ** -0.5
    return layer.eval()


def visible(pattern: Pattern, i: int, j: int) -> bool:
    """One pair, from the definition."""
    match pattern:
        case Union(parts):
            return any(visible(part, i, j) for part in parts)
        case Local(size, block):
            return i // block - j // block < size // block
        case Strided(stride):
            return (i - j) % stride == 0
        case Fixed(block, summary):
            return i // block == j // block or j % block >= block - summary
        case Global(first, at):
            return any(p < first or p in at for p in (i, j))
        case Random():
            return j // pattern.block in pattern.draw(i // pattern.block)
        case _:
            raise AssertionError(pattern)


@cache
def dense(pattern: Pattern, time: int = TIME) -> Tensor:
    return torch.tensor([[j <= i and visible(pattern, i, j) for j in range(time)] for i in range(time)])


def by_hand(mask: Tensor) -> list[int]:
    """The last reader of every token, from the mask."""
    readers = (column.nonzero()[:, 0].tolist() for column in mask.T)
    return [max(these, default=-1) for these in readers]


def check_pattern(pattern: Pattern, time: int) -> None:
    """Everything that a pattern answers, compared with the mask."""
    mask = dense(pattern, time)
    assert torch.equal(pattern.mask(time), mask)
    assert mask.tolist() == [
        [j <= i and visible_naive(pattern, i, j) for j in range(time)] for i in range(time)
    ]
    for first in range(time):
        for last in {first, min(first + 1, time - 1), min(first + 5, time - 1), time - 1}:
            keys = pattern.visible_keys(first, last)
            wanted = mask[first : last + 1].any(0).nonzero()[:, 0]
            assert keys.dtype == torch.int64
            assert torch.equal(keys, wanted), (str(pattern), first, last)
    assert pattern.last_readers(time).tolist() == by_hand(mask)
    again = parse(str(pattern))
    assert again == pattern
    assert str(again) == str(pattern)
    assert hash(again) == hash(pattern)


@pytest.mark.parametrize("pattern", PRIMITIVES, ids=str)
def test_a_primitive_agrees_with_its_mask(pattern: Pattern) -> None:
    for time in (1, 2, 12, TIME):
        check_pattern(pattern, time)


@given(specs, times)
def test_any_pattern_agrees_with_its_mask(spec: str, time: int) -> None:
    check_pattern(parse(spec), time)


def test_a_primitive_that_includes_self_does_so() -> None:
    for pattern in PRIMITIVES:
        if pattern.includes_self:
            assert dense(pattern).diagonal().all(), pattern
        else:
            assert isinstance(pattern, Global | Random)
        assert (pattern | Local(1)).includes_self, pattern


def test_specs_are_parsed_as_they_are_written() -> None:
    assert parse("local(8) | global(2)") == Local(8) | Global(2) == Union((Local(8), Global(2)))
    assert parse(" strided( 5 )|random(2,block = 4, seed=1)  ") == Strided(5) | Random(2, 4, seed=1)
    assert parse("global(at=(3, 5))") == parse("global(0, (3, 5))") == Global(0, (3, 5))
    assert (
        str(Global(at=(3,)) | Local(6, 3) | Fixed(4)) == "global(0, at=(3,)) | local(6, block=3) | fixed(4)"
    )
    assert str(Random(2, 4, seed=1)) == "random(2, block=4, seed=1)"
    assert primitives((Local(1) | Strided(2)) | (Fixed(3) | Global(1))) == (
        Local(1),
        Strided(2),
        Fixed(3),
        Global(1),
    )
    pattern = Local(3)
    assert parse(pattern) is pattern


@pytest.mark.usefixtures("unchecked_shapes")
def test_global_positions_may_come_as_a_list() -> None:
    layer = layer_of("local(2) | global(at=[3, 5])")
    assert layer.pattern == Local(2) | Global(at=(3, 5))
    assert layer.new_cache(1, 30).nbytes == layer.cache_bytes(30)


def test_the_published_patterns() -> None:
    assert str(sparse_transformer(128)) == "local(128) | strided(128)"
    assert str(sparse_transformer_fixed(128, 8)) == "fixed(128, summary=8)"
    assert str(longformer(512, 2)) == "local(512) | global(2)"
    assert str(bigbird(64, 3)) == "local(128, block=64) | global(64) | random(3, skip_first=1, skip_last=1)"
    assert bigbird(4, 2, n_window=2, n_global=3, seed=6) == Local(12, 4) | Global(12) | Random(2, 4, 3, 2, 6)
    # In the paper's encoder a block also attends to the one after it and the last: 8 of 64 at 4096 tokens.
    pattern = bigbird(64, 3)
    assert len(pattern.visible_keys(4095, 4095)) == 64 * (1 + 2 + 3)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("", "pattern: expected one of 'local', 'strided', 'fixed', 'global', 'random'; got ''"),
        ("local(4) |", "pattern: expected one of .*; got ''"),
        ("| local(4)", "pattern: expected one of .*; got ''"),
        ("local(4) || strided(2)", "pattern: expected one of .*; got ''"),
        ("locale(4)", "pattern: expected one of .*; got 'locale'"),
        ("Local(4)", "pattern: expected one of .*; got 'Local'"),
        ("window(4) | global(1)", "pattern: expected one of .*; got 'window'"),
        ("local", "pattern: 'local' is not understood; local takes size, block"),
        ("local()", r"pattern: 'local\(\)' is not understood; local takes size, block"),
        ("strided(2) | local(4", r"pattern: 'local\(4' is not understood"),
        ("local(4))", r"pattern: 'local\(4\)\)' is not understood"),
        ("local(4) strided(4)", r"pattern: 'local\(4\) strided\(4\)' is not understood"),
        ("local(4) + strided(4)", r"pattern: 'local\(4\) \+ strided\(4\)' is not understood"),
        ("local(4)(5)", r"pattern: 'local\(4\)\(5\)' is not understood"),
        ("local(4).x(5)", r"pattern: 'local\(4\).x\(5\)' is not understood"),
        ("local(n)", r"pattern: 'local\(n\)' is not understood"),
        ("local(*[4])", r"pattern: 'local\(\*\[4\]\)' is not understood"),
        ("local(2 * 4)", r"pattern: 'local\(2 \* 4\)' is not understood"),
        ("local(__import__('os'))", "pattern: .* is not understood; local takes size, block"),
        ("local(4, width=2)", r"pattern: 'local\(4, width=2\)' is not understood"),
        ("local(4, 2, 1)", "is not understood; local takes size, block"),
        ("local(4, size=4)", "is not understood; local takes size, block"),
        ("local(4.0)", "is not understood; local takes size, block: local: size: expected an integer"),
        ("local('4')", "is not understood; local takes size, block"),
        ("local(True)", "is not understood; local takes size, block"),
        ("global(at=3)", "is not understood; global takes first, at"),
        ("global(at=(1.5,))", "is not understood; global takes first, at"),
        ("local(0)", "local: size: expected at least 1, got 0"),
        ("local(-4)", "local: size: expected at least 1, got -4"),
        ("local(10, block=4)", "local: block: expected a divisor of size=10, got 4"),
        ("local(10, block=0)", "local: block: expected at least 1, got 0"),
        ("strided(0)", "strided: stride: expected at least 1, got 0"),
        ("fixed(0)", "fixed: block: expected at least 1, got 0"),
        ("fixed(4, 5)", r"fixed: summary: expected at most 4 \(block\), got 5"),
        ("fixed(4, 0)", "fixed: summary: expected at least 1, got 0"),
        ("global()", "global: expected at least one position, got none"),
        ("global(-1)", "global: first: expected at least 0, got -1"),
        ("global(at=(2, -1))", "global: at: expected at least 0, got -1"),
        ("random(0)", "random: n_blocks: expected at least 1, got 0"),
        ("random(1, 0)", "random: block: expected at least 1, got 0"),
        ("random(1, skip_first=-1)", "random: skip_first: expected at least 0, got -1"),
        ("random(1, skip_last=-1)", "random: skip_last: expected at least 0, got -1"),
        ("random(1, seed=-1)", "random: seed: expected at least 0, got -1"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_wrong_spec_is_refused_by_its_primitive(spec: str, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        parse(spec)
    with pytest.raises(ValueError, match=names):
        SparseAttention(24, 3, pattern=spec)


@pytest.mark.usefixtures("unchecked_shapes")
def test_what_is_no_spec_at_all_is_refused_by_name() -> None:
    for nothing in (5, None, ["local(4)"]):
        with pytest.raises(TypeError, match="pattern: expected str, got"):
            parse(nothing)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pattern: expected Pattern, got str"):
        Local(4) | "global(1)"  # type: ignore[operator]
    with pytest.raises(ValueError, match="n_tokens: expected at least 1, got 0"):
        Local(4).mask(0)


@pytest.mark.parametrize("spec", ["global(4)", "random(2)", "global(at=(0,)) | random(1, block=1)"])
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_pattern_in_which_a_token_may_attend_to_nothing_is_refused(spec: str) -> None:
    assert not dense(parse(spec)).diagonal().all()
    with pytest.raises(
        ValueError, match=r"pattern: expected one in which every token attends to itself, as by local\(1\)"
    ):
        SparseAttention(24, 3, pattern=spec)
    SparseAttention(24, 3, pattern=f"{spec} | local(1)")


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"block": 0}, ValueError, "block: expected at least 1, got 0"),
        ({"block": 2.0}, TypeError, "block: expected an integer"),
        ({"n_kv_heads": 4}, ValueError, "n_kv_heads: expected a divisor of n_heads=6, got 4"),
        ({"pattern": 3}, TypeError, "pattern: expected str, got int"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_impossible_options_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=names):
        SparseAttention(24, 6, **options)


@settings(max_examples=60)  # of which few are near the beginning
@given(block_sizes, block_sizes, st.integers(0, 3), st.integers(0, 3), seeds, st.integers(0, 40))
def test_a_draw_is_the_same_for_every_text_and_every_call(
    n_blocks: int, block: int, skip_first: int, skip_last: int, seed: int, number: int
) -> None:
    """And of the right blocks: none to come, none skipped, as many as there are up to n_blocks."""
    pattern = Random(n_blocks, block, skip_first, skip_last, seed)
    drawn = pattern.draw(number)
    assert drawn == pattern.draw(number) == parse(str(pattern)).draw(number)  # type: ignore[attr-defined]
    among = range(pattern.skip_first, number - pattern.skip_last)
    assert drawn == sorted(set(drawn) & set(among))
    assert len(drawn) == min(pattern.n_blocks, len(among))
    whole = pattern.mask(30)
    for time in (1, 7, 29):
        assert torch.equal(pattern.mask(time), whole[:time, :time])


def test_draws_differ_by_block_and_by_seed_and_reach_everywhere() -> None:
    pattern = Random(2, block=1)
    rows = [tuple(pattern.draw(n)) for n in range(40, 80)]
    assert len(set(rows)) > 30
    assert rows != [tuple(Random(2, block=1, seed=1).draw(n)) for n in range(40, 80)]
    often = torch.bincount(torch.tensor([b for n in range(200, 1200) for b in pattern.draw(n) if b < 200]))
    assert len(often) == 200  # each of the first blocks is drawn by somebody
    assert often.max() < 25


def test_a_draw_does_not_depend_on_the_run() -> None:
    """A checkpoint's pattern must be found again: by another Python, on another day."""
    assert [Random(3, 64, 1, 1).draw(n) for n in (2, 5, 9, 63)] == [[], [1, 2, 3], [1, 2, 5], [7, 24, 32]]


def live_by_hand(pattern: Pattern, time: int) -> list[int]:
    last = by_hand(dense(pattern, time))
    return [sum(1 for j in range(t + 1) if last[j] >= t) for t in range(time)]


def check_allocation(pattern: Pattern, time: int) -> None:
    """No token that will be read is overwritten, and no slot is taken that is not needed."""
    live = live_by_hand(pattern, time)
    assert live_tokens(pattern, time).tolist() == live
    assert n_slots(pattern, time) == max(live)
    made, last = allocate_slots(pattern, time), by_hand(dense(pattern, time))
    slots, content = made.slots.tolist(), dict[int, int]()
    first_reuse, n_used = time, 0
    for position, slot in enumerate(slots):
        if slot in content:
            assert last[content[slot]] < position, f"{pattern}: {content[slot]} is read after {position}"
            first_reuse = min(first_reuse, position)
        else:
            assert slot == n_used  # slots are first taken in order
            n_used += 1
        content[slot] = position
        assert made.used[position] == n_used
    assert n_used == max(live)
    assert made.first_reuse == first_reuse


@pytest.mark.parametrize("pattern", [p for p in PRIMITIVES if p.includes_self], ids=str)
def test_the_slots_of_a_primitive(pattern: Pattern) -> None:
    for time in (1, 2, 12, TIME):
        check_allocation(pattern, time)


@given(specs_with_self, times)
def test_the_slots_of_any_pattern(spec: str, time: int) -> None:
    check_allocation(parse(spec), time)


def test_the_slots_of_a_window_are_a_ring() -> None:
    """The same memory as chapter 04's, slot by slot."""
    made = allocate_slots(Local(5), 30)
    assert made.slots.tolist() == [p % 5 for p in range(30)]
    assert made.first_reuse == 5
    layers = (SparseAttention(24, 3, pattern="local(5)"), WindowAttention(24, 3, window=5))
    assert len({layer.cache_bytes(1000) for layer in layers}) == 1


class TestStoredIsNotRead:
    """At 4096 tokens: what is kept, and what a step reads."""

    N = 4096

    def test_a_window_and_the_global_tokens_are_all_of_longformer(self) -> None:
        pattern = longformer(512, 2)
        assert n_slots(pattern, self.N) == 512 + 2
        assert len(pattern.visible_keys(self.N - 1, self.N - 1)) == 512 + 2
        assert n_slots(Local(100), self.N) == 100

    def test_strided_reads_little_and_keeps_everything(self) -> None:
        """Up to the last stride, when it is known that some will not be read again."""
        pattern = sparse_transformer(64)
        assert live_tokens(pattern, self.N).tolist()[: self.N - 63] == list(range(1, self.N - 62))
        assert n_slots(pattern, self.N) == allocate_slots(pattern, self.N).first_reuse == self.N - 63
        assert len(pattern.visible_keys(self.N - 1, self.N - 1)) == 64 + self.N // 64 - 1

    def test_fixed_keeps_a_block_and_the_summaries(self) -> None:
        pattern = sparse_transformer_fixed(64, 4)
        assert n_slots(pattern, self.N) == 64 + (self.N // 64 - 1) * 4
        assert len(pattern.visible_keys(self.N - 1, self.N - 1)) == 64 + (self.N // 64 - 1) * 4

    @pytest.mark.parametrize("seed", range(3))
    def test_bigbird_keeps_much_more_than_it_reads(self, seed: int) -> None:
        """Every block that somebody later has drawn: about half of the text, at any length."""
        pattern = bigbird(64, 3, seed=seed)
        for length in (2048, self.N, 4 * self.N):
            assert 0.4 * length < n_slots(pattern, length) < 0.7 * length
            assert len(pattern.visible_keys(length - 1, length - 1)) == 64 * 6

    def test_until_a_global_token_has_come_nothing_may_be_forgotten(self) -> None:
        late = Local(8) | Global(at=(1000,))
        assert live_tokens(late, 1000).tolist() == [min(t + 1, 8) for t in range(1000)]  # it does not come
        live = live_tokens(late, 2000).tolist()
        assert live[:1001] == list(range(1, 1002))
        assert live[1001:1008] == 7 * [8]  # itself is in the window
        assert live[1010:] == 990 * [9]
        assert n_slots(late, 2000) == 1001
        assert allocate_slots(late, 2000).first_reuse == 1001

    def test_a_layer_says_so_in_bytes(self) -> None:
        width = 2 * 2 * 8 * 4  # K and V, KV heads, head dim, bytes
        for spec, stored, read in (
            ("local(8) | global(2)", 10, 10),
            ("strided(8)", 400 - 7, 50),
            ("fixed(8, 2)", 8 + 49 * 2, 8 + 49 * 2),
            ("local(8) | strided(8)", 400 - 7, 8 + 49),
        ):
            layer = SparseAttention(24, 6, n_kv_heads=2, head_dim=8, pattern=spec)
            assert layer.cache_bytes(400) == layer.new_cache(1, 400).nbytes == stored * width
            assert layer.read_bytes(400) == read * width


def by_sdpa(q: Tensor, kv: KV, pattern: Pattern) -> Tensor:
    """Over the dense mask."""
    return F.scaled_dot_product_attention(
        q, kv.k, kv.v, attn_mask=dense(pattern, q.shape[2]), enable_gqa=True
    )


def tensors(time: int, batch: int = 2) -> tuple[Tensor, KV]:
    k, v = draw(batch, 2, time, 8, seed=1), draw(batch, 2, time, 8, seed=2)
    return draw(batch, 6, time, 8) * 2, KV(k, v, torch.arange(time)[None])


@pytest.mark.parametrize("spec", SPECS)
def test_a_pattern_is_sdpa_with_a_dense_mask(spec: str) -> None:
    """For blocks that divide the length and blocks that do not; gradients as well."""
    pattern = parse(spec)
    q, kv = tensors(TIME)
    for x in (q, kv.k, kv.v):
        x.requires_grad_()
    expected, along = by_sdpa(q, kv, pattern), draw(*q.shape, seed=3)
    theirs = torch.autograd.grad((expected * along).sum(), (q, kv.k, kv.v))
    for block in (1, 3, 8, 16, 100):
        got = attend_pattern(q, kv, pattern, block)
        close(got, expected)
        mine = torch.autograd.grad((got * along).sum(), (q, kv.k, kv.v))
        for a, b in zip(mine, theirs, strict=True):
            close(a, b, 1e-4)


@given(specs, times, st.integers(1, 40))
def test_any_pattern_is_sdpa_with_a_dense_mask(spec: str, time: int, block: int) -> None:
    """Those too that show some tokens nothing: they get 0."""
    pattern, (q, kv) = parse(spec), tensors(time)
    close(attend_pattern(q, kv, pattern, block), by_sdpa(q, kv, pattern))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [1, 4, 6])
def test_queries_without_visible_keys_get_zero(block: int, dtype: torch.dtype) -> None:
    """The first block has no earlier block to draw: no keys at all, or only keys that other queries need."""
    pattern, (q, kv) = Random(1, block=4), tensors(TIME)
    kv = KV(kv.k.to(dtype), kv.v.to(dtype), kv.positions)
    got = attend_pattern(q.to(dtype), kv, pattern, block)
    assert (got[:, :, :4] == 0).all()
    assert got.isfinite().all()
    assert (got[:, :, 4:] != 0).any(-1).all()


SPLITS = {
    "one pass": [TIME],
    "chunks": [13, 1, 2, 9, 1, 11],
    "prompt, then tokens": [20, *17 * [1]],
    "tokens": TIME * [1],
}


def layer_of(pattern: str | Pattern, **options: Any) -> SparseAttention:
    return sharp(
        SparseAttention(24, 6, **{"pattern": pattern, "block": 5, "n_kv_heads": 2, "head_dim": 8, **options})
    )


def by_mask(layer: SparseAttention, x: Tensor) -> Tensor:
    """The whole layer over a dense mask."""
    kv = layer.project_kv(x)
    q = layer.rope(layer.q_proj(x).unflatten(-1, (6, -1)).transpose(1, 2), kv.positions)
    return layer.o_proj(by_sdpa(q, kv, layer.pattern).transpose(1, 2).flatten(-2))


@torch.no_grad()
def in_chunks(layer: Any, x: Tensor, split: list[int], cache: Any) -> Tensor:
    return torch.cat([layer(piece, cache) for piece in x.split(split, dim=1)], dim=1)


@pytest.mark.parametrize("spec", SPECS)
def test_the_cache_forgets_nothing_that_is_needed(spec: str) -> None:
    layer, x = layer_of(spec), draw(2, TIME, 24)
    expected = by_mask(layer, x)
    close(layer(x), expected)
    for split in SPLITS.values():
        cache = layer.new_cache(2, TIME)
        close(in_chunks(layer, x, split, cache), expected)
        assert cache.nbytes == layer.cache_bytes(TIME, batch=2)


@given(specs_with_self, st.lists(st.integers(1, 15), min_size=1, max_size=8), st.integers(1, 20))
def test_nor_does_the_cache_of_any_pattern(spec: str, split: list[int], block: int) -> None:
    layer, time = layer_of(spec, block=block), sum(split)
    x = draw(1, time, 24)
    close(in_chunks(layer, x, split, layer.new_cache(1, time + 4)), by_mask(layer, x))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kernel", [False, True])
@torch.no_grad()
def test_rows_of_different_length_go_on_as_if_alone(spec: str, kernel: bool) -> None:
    layer, x = layer_of(spec), draw(3, TIME, 24)
    cache = layer.new_cache(3, TIME)
    assert isinstance(cache, PatternCache)
    if kernel:
        layer.decode = decode_attention
    start = min(6, cache.first_reuse)
    layer(x[:, :start], cache)
    lengths = [max(start - 4, 0), start, start - 1]
    cache.trim(torch.tensor(lengths))
    rest = TIME - start
    got = in_chunks(layer, x[:, start:], [1, 8, 1, 1, 2, rest - 14, 1], cache)
    for row, length in enumerate(lengths):
        alone = torch.cat((x[row : row + 1, :length], x[row : row + 1, start:]), 1)
        close(got[row], by_mask(layer, alone)[0, length:])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@torch.no_grad()
def test_steps_by_a_decode_kernel_read_the_visible_keys_and_no_more(spec: str, backend: str) -> None:
    layer, x = layer_of(spec, head_dim=16), draw(2, TIME, 24)
    asked = []

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        asked.append((k.shape[2], lengths.tolist()))
        return decode_attention(q, k, v, lengths, backend=backend)  # type: ignore[arg-type]

    layer.decode = step
    split = [20, 1, 6, 1, 8, 1]
    close(in_chunks(layer, x, split, layer.new_cache(2, TIME)), by_mask(layer, x), 3e-5)
    visible = dense(layer.pattern).sum(-1).tolist()
    assert asked == [(visible[t], 2 * [visible[t]]) for t in (20, 27, 36)]


def counted(pattern: Pattern, time: int, block: int) -> list[int]:
    """Keys of every call of a blockwise pass."""
    counts = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        counts.append(k.shape[2])
        return grouped_attention(q, k, v, mask)

    q, kv = tensors(time)
    attend_blockwise(q, kv, pattern, block, attend)
    return counts


@pytest.mark.parametrize("pattern", [parse(s) for s in SPECS], ids=str)
def test_only_keys_that_a_block_attends_to_are_touched(pattern: Pattern) -> None:
    mask = dense(pattern)
    for block in (1, 5, 8):
        wanted = [int(rows.any(0).sum()) for rows in mask.split(block)]
        assert counted(pattern, TIME, block) == wanted


@pytest.mark.parametrize("pattern", [parse(s) for s in SPECS], ids=str)
@torch.no_grad()
def test_keys_that_are_not_visible_may_be_anything(pattern: Pattern) -> None:
    """NaN or infinity in all keys and values that a query, or a block of queries, does not attend to."""
    q, kv = tensors(TIME)
    expected, mask = by_sdpa(q, kv, pattern), dense(pattern)
    for block in (1, 6):
        for first in range(0, TIME, block):
            rows = slice(first, first + block)
            unseen = ~mask[rows].any(0)
            k, v = kv.k.clone(), kv.v.clone()
            k[:, :, unseen] = v[:, :, unseen] = torch.inf if first // block % 2 else torch.nan
            here = KV(k, v, kv.positions[:, rows], kv.key_positions)
            got = attend_blockwise(q[:, :, rows], here, pattern, block)
            assert got.isfinite().all()
            close(got, expected[:, :, rows])


@pytest.mark.parametrize("n_queries", [3, 1])
def test_keys_may_lie_elsewhere_in_every_row(n_queries: int) -> None:
    """Queries have the same positions, but each row has other keys; for a single query in any order."""
    orders = {3: [[0, 1, 4, 5, 6], [-1, 0, 4, 5, 6]], 1: [[6, 0, 4, 5, 1], [-1, 6, 5, 4, 0]]}
    slot_positions, positions = torch.tensor(orders[n_queries]), torch.arange(7 - n_queries, 7)[None]
    q, k, v = draw(2, 6, n_queries, 8), draw(2, 2, 5, 8, seed=1), draw(2, 2, 5, 8, seed=2)
    got = attend_blockwise(q, KV(k, v, positions, slot_positions), longformer(1, 1), 2)
    i, j = positions[:, :, None], slot_positions[:, None]
    mask = (j == 0) | (j == i)
    close(got, F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True))


@pytest.mark.parametrize("stride", [4, 6])
@torch.no_grad()
def test_a_stride_reads_the_tokens_of_its_own_remainder_alone(stride: int) -> None:
    """In the order of time it would read everything; in its own order NaN in others does not matter."""
    q, kv = tensors(TIME)
    expected = by_sdpa(q, kv, Strided(stride))
    for mine in range(stride):
        its = torch.arange(TIME) % stride == mine
        k, v = kv.k.clone(), kv.v.clone()
        k[:, :, ~its] = v[:, :, ~its] = torch.nan
        got = attend_pattern(q, KV(k, v, kv.positions), Strided(stride), 3)
        close(got[:, :, its], expected[:, :, its])
    assert max(counted(Strided(stride), TIME, stride)) > TIME - 3  # in the order of time


@pytest.mark.parametrize(
    "spec", ["strided(6)", "local(6) | strided(6)", "local(2) | strided(4) | strided(6)"]
)
def test_strided_primitives_are_computed_in_proportion(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs (query, key) that are computed, compared with those of the pattern."""
    from kvlearn.attention import sparse

    computed = 0

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
        nonlocal computed
        computed += q.shape[2] * k.shape[2]
        return original(q, k, v, mask)

    original = sparse.grouped_partial
    monkeypatch.setattr(sparse, "grouped_partial", attend)
    time, pattern = 240, parse(spec)
    q, kv = tensors(time, batch=1)
    attend_pattern(q, kv, pattern, 4)
    visible = int(pattern.mask(time).sum())
    assert visible <= computed < 2.5 * visible < time * time / 2


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_half_precision_is_as_near_as_its_numbers_allow(spec: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        check_half_precision(spec, dtype)


def check_half_precision(spec: str, dtype: torch.dtype) -> None:
    half = layer_of(spec).to(dtype)
    exact = layer_of(spec)
    exact.load_state_dict({name: weight.float() for name, weight in half.state_dict().items()})
    x = draw(2, TIME, 24).to(dtype)
    expected = exact(x.float())
    for split in SPLITS.values():
        got = in_chunks(half, x, split, half.new_cache(2, TIME))
        assert got.dtype == dtype
        assert (got.float() - expected).abs().max() < 16 * torch.finfo(dtype).eps * expected.abs().max()


def test_a_cache_can_be_trimmed_until_it_writes_over_something() -> None:
    layer, x = layer_of("local(4) | global(2)"), draw(2, 12, 24)
    cache = layer.new_cache(2, 30)
    assert isinstance(cache, PatternCache)
    assert cache.first_reuse == 6
    in_chunks(layer, x[:, :6], [5, 1], cache)
    cache.trim(torch.tensor([3, 3]))
    close(in_chunks(layer, x[:, 3:], [2, 1, 6], cache), layer(x)[:, 3:])
    with pytest.raises(ValueError, match="a PatternCache cannot forget what it has seen"):
        cache.trim(torch.tensor([1, 1]))
    summaries = layer_of("fixed(4)").new_cache(2, 30)  # its first slot is used again long before the last is
    assert isinstance(summaries, PatternCache)
    assert summaries.n_slots > 8
    for length in range(1, 9):
        summaries.append(*(draw(2, 2, 1, 8) for _ in "kv"))
        assert summaries.can_trim == (length <= 4)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_cache_of_another_kind_is_refused_by_name() -> None:
    layer, x = layer_of("local(4)"), draw(2, 4, 24)
    with pytest.raises(TypeError, match="cache: expected PatternCache, got RingCache"):
        layer(x, WindowAttention(24, 6, window=4, n_kv_heads=2, head_dim=8).new_cache(2, 9))


def config_of(*patterns: str | Pattern) -> ModelConfig:
    layers = tuple(Spec("sparse", pattern=pattern, block=8) for pattern in patterns)
    return ModelConfig(50, 24, len(patterns), n_heads=4, head_dim=8, d_ff=32, layers=layers, tied=False)


@pytest.mark.parametrize("spec", [*SPECS, "local(9, block=3) | global(0, at=(3,)) | random(2, seed=3)"])
def test_a_config_with_a_pattern_survives_json(spec: str) -> None:
    """Given as a spec, or as a pattern, which is written as its spec."""
    written, built = config_of(spec), config_of(parse(spec))
    for config in (written, built):
        plain = json.loads(json.dumps(config.to_dict()))
        again = ModelConfig.from_dict(plain)
        assert again == config
        assert parse(plain["layers"][0][1]["pattern"]) == parse(spec)
        mixer = Decoder(again).mixers[0]
        assert isinstance(mixer, SparseAttention)
        assert mixer.pattern == parse(spec)
    assert built.to_dict()["layers"][0][1]["pattern"] == str(parse(spec))


SPARSE = ("local(6) | strided(6)", "local(4) | global(2)", "fixed(5, 1)", "strided(3) | random(1, block=2)")


@cache
def decoder() -> Decoder:
    return sharp(Decoder(config_of(*SPARSE)))


@cache
def without_a_cache() -> Tensor:
    return decoder().generate(PROMPT, 20, use_cache=False)


PROMPT = torch.randint(0, 50, (2, 15), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("chunk", [None, 1, 4, 11])
def test_sparse_layers_generate_the_same_with_a_cache(chunk: int | None) -> None:
    expected = without_a_cache()
    assert len(expected[0, 15:].unique()) > 5  # not one token over and over
    assert torch.equal(decoder().generate(PROMPT, 20, chunk=chunk), expected)


@pytest.mark.parametrize("kernel", [False, True])
@torch.no_grad()
def test_a_reader_attends_to_what_its_owners_cache_holds(kernel: bool) -> None:
    spec = "local(4) | global(2)"
    owner, reader = layer_of(spec), sharp(layer_of(spec, reader=True), seed=4)
    whole = layer_of(spec)
    whole.load_state_dict(reader.state_dict(), strict=False)
    if kernel:
        reader.decode = decode_attention
    x, theirs = draw(2, TIME, 24), draw(2, TIME, 24, seed=2)
    expected = whole(x, source=owner.project_kv(theirs))
    cache, own = owner.new_cache(2, TIME), reader.new_cache(2, TIME)
    split = [9, 1, 12, 1, 1, 13]
    pieces = zip(x.split(split, 1), theirs.split(split, 1), strict=True)
    close(torch.cat([reader(a, own, source=owner.project_kv(b, cache)) for a, b in pieces], 1), expected)
    assert own.nbytes == 0


def test_a_pattern_prints_itself_as_a_picture() -> None:
    assert parse("local(2) | global(1)").picture(5) == "#\n##\n###\n#·##\n#··##"
    assert parse("strided(2)").picture(4) == "#\n·#\n#·#\n·#·#"
    assert parse("random(1, block=2)").picture(4) == "·\n··\n##·\n##··"


def test_a_cache_of_another_pattern_is_refused_and_left_alone() -> None:
    layer = SparseAttention(24, 3, pattern="local(8)")
    other = SparseAttention(24, 3, pattern="local(4)").new_cache(1, 32)
    with pytest.raises(ValueError, match=r"cache: expected shapes for local\(8\), got those for local\(4\)"):
        layer(torch.randn(1, 6, 24), other)
    assert other.length == 0
