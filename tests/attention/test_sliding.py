"""Sliding windows: the content of the ring, its constant size, sinks of both kinds, skipped work."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_tools import Allocated, close, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvlearn.attention import KV, FullAttention, NoCache, RingCache, WindowAttention
from kvlearn.attention.core import attend_blockwise, merge_heads, rule_mask, split_heads
from kvlearn.attention.window import BLOCK, Window
from kvlearn.kernels import decode_attention
from kvlearn.measure import peak_memory
from kvlearn.model import Decoder, ModelConfig, Spec

BATCH, TIME = 3, 23
SHAPE: dict[str, Any] = {"d_model": 24, "n_heads": 6, "n_kv_heads": 2, "head_dim": 8}
WINDOWS = [(1, 0), (1, 1), (2, 0), (4, 0), (5, 2), (5, 5), (7, 1), (TIME, 3), (99, 0)]  # window, sinks
every_window = pytest.mark.parametrize(("window", "n_sinks"), WINDOWS)
every_sort_of_sinks = pytest.mark.parametrize("sink_logits", [False, True], ids=["plain", "sink logits"])
LONG = 4 * BLOCK + 50


def sharp(layer: Any, seed: int = 0) -> Any:
    """``layer`` with its weights drawn anew, so large that attention picks."""
    generator = torch.Generator().manual_seed(seed)
    for weight in layer.parameters():
        spread = 1.5 * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 1.0
        weight.data = torch.randn(weight.shape, generator=generator) * spread
    return layer.eval()


def window_layer(window: int, n_sinks: int = 0, sink_logits: bool = False, **options: Any) -> WindowAttention:
    kept = {"window": window, "n_sinks": n_sinks, "sink_logits": sink_logits}
    return sharp(WindowAttention(**{**SHAPE, **kept, **options}))


def dense_mask(window: int, n_sinks: int, time: int = TIME) -> Tensor:
    """Pair by pair, from the definition."""
    pairs = [[j <= i and (i - j < window or j < n_sinks) for j in range(time)] for i in range(time)]
    return torch.tensor(pairs)


def by_sdpa(layer: WindowAttention, x: Tensor) -> Tensor:
    """The layer by PyTorch's SDPA over a dense mask. A sink's logit is the score of one more key without a
    value, in one more dimension, in which queries are 1."""
    k, v, positions = layer.project_kv(x)
    q = layer.rope(split_heads(layer.q_proj(x), layer.n_heads), positions)
    group = layer.n_heads // layer.n_kv_heads
    k, v = (each.repeat_interleave(group, 1) for each in (k, v))
    mask = dense_mask(layer.window, layer.n_sinks, x.shape[1])
    if layer.sink_logits is not None:
        logit = (layer.sink_logits * layer.head_dim**0.5)[None, :, None, None].expand(len(x), -1, 1, 1)
        sink = torch.cat((torch.zeros(*logit.shape[:3], layer.head_dim), logit), -1)
        k = torch.cat((F.pad(k, (0, 1)), sink), 2)
        q, v, mask = F.pad(q, (0, 1), value=1.0), F.pad(v, (0, 0, 0, 1)), F.pad(mask, (0, 1), value=True)
    heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=layer.head_dim**-0.5)
    return layer.o_proj(merge_heads(heads))


@torch.no_grad()
def in_chunks(layer: Any, x: Tensor, split: list[int], cache: Any) -> Tensor:
    return torch.cat([layer(piece, cache) for piece in x.split(split, dim=1)], dim=1)


class Model:
    """A ring as one dictionary per row: the slot's number -> the position of its token."""

    def __init__(self, rows: int, window: int, n_sinks: int) -> None:
        self.rows: list[dict[int, int]] = [{} for _ in range(rows)]
        self.lengths = rows * [0]
        self.window, self.n_sinks = window, n_sinks

    def append(self, n_tokens: int) -> None:
        for row, slots in enumerate(self.rows):
            for _ in range(n_tokens):
                p = self.lengths[row]
                slot = p if p < self.n_sinks else self.n_sinks + (p - self.n_sinks) % self.window
                slots[slot] = p
                self.lengths[row] += 1

    def trim(self, lengths: list[int]) -> None:
        self.lengths = list(lengths)
        self.rows = [
            {slot: p for slot, p in slots.items() if p < length}
            for slots, length in zip(self.rows, lengths, strict=True)
        ]

    @property
    def can_trim(self) -> bool:
        return max(self.lengths) <= self.n_sinks + self.window


def content(row: int, position: int) -> float:
    """A number that identifies a row and a position."""
    return 1000.0 * (row + 1) + position


def agrees(cache: RingCache, model: Model) -> None:
    """Slot by slot: the recorded positions and the content."""
    slot_positions = cache.slot_positions.expand(len(model.rows), -1).tolist()
    for row, expected in enumerate(model.rows):
        assert {slot: p for slot, p in enumerate(slot_positions[row]) if p >= 0} == expected
        for slot, p in expected.items():
            assert (cache.k[row, :, slot] == content(row, p)).all()
            assert (cache.v[row, :, slot] == -content(row, p)).all()


@settings(max_examples=80)
@given(
    window=st.integers(1, 7),
    extra=st.integers(0, 6),
    sizes=st.lists(st.integers(1, 3) | st.integers(1, 17), min_size=1, max_size=8),
    cuts=st.lists(
        st.lists(st.integers(0, 12), min_size=BATCH, max_size=BATCH)
        | st.integers(0, 4).map(lambda cut: BATCH * [cut]),
        max_size=4,
    ),
)
def test_the_ring_holds_what_a_dictionary_would(
    window: int, extra: int, sizes: list[int], cuts: list[list[int]]
) -> None:
    """After any appends, and rows cut back to any lengths between them, equal ones too."""
    n_sinks = min(extra, window)
    max_len = sum(sizes) + 3
    cache = RingCache(BATCH, 2, max_len, 4, window, n_sinks, torch.float32, torch.device("cpu"))
    model = Model(BATCH, window, n_sinks)
    for step, size in enumerate(sizes):
        new = cache.positions(size).expand(BATCH, -1)
        numbers = torch.tensor(
            [[content(row, int(p)) for p in positions] for row, positions in enumerate(new)]
        )
        k = numbers[:, None, :, None].expand(-1, 2, -1, 4)
        before = [dict(slots) for slots in model.rows]
        kv = cache.append(k, -k)
        model.append(size)
        agrees(cache, model)
        slot_positions = kv.key_positions.expand(BATCH, -1).tolist()
        for row, positions in enumerate(slot_positions):
            there = [p for p in positions if p >= 0]
            if size == 1:  # all tokens in the ring, the new one included
                assert sorted(there) == sorted(model.rows[row].values())
            else:  # all tokens from before, in order, and the new ones
                assert there == [*sorted(before[row].values()), *new[row].tolist()]
                assert positions == sorted(positions)
            for slot, p in enumerate(positions):
                assert p < 0 or (kv.k[row, :, slot] == content(row, p)).all()
        assert cache.can_trim == model.can_trim
        if step < len(cuts) and cache.can_trim:
            lengths = [min(cut, length) for cut, length in zip(cuts[step], model.lengths, strict=True)]
            cache.trim(torch.tensor(lengths))
            model.trim(lengths)
            agrees(cache, model)
    assert cache.nbytes == 2 * BATCH * 2 * 4 * 4 * min(max_len, n_sinks + window)


@every_window
def test_the_cache_stops_growing(window: int, n_sinks: int) -> None:
    layer = window_layer(window, n_sinks)
    width = 2 * 2 * 8 * 4  # K and V, KV heads, head dim, bytes
    for max_len in (1, 5, 30, 1000, 10**6):
        kept = min(max_len, window + n_sinks)
        assert layer.cache_bytes(max_len) == layer.read_bytes(max_len) == kept * width
        assert layer.new_cache(1, max_len).nbytes == kept * width


@torch.no_grad()
def test_no_number_of_tokens_makes_it_grow() -> None:
    layer, x = window_layer(5, 2), draw(2, 300, 24)
    cache = layer.new_cache(2, 10_000)
    memory = [t.data_ptr() for t in cache.tensors()]
    for size in (1, 3, 200, 1, 1, 8, *30 * [1], 150):
        kv = layer.project_kv(x[:, :size], cache)
        if size == 1:
            assert kv.k.shape[2] <= 7
        assert [t.data_ptr() for t in cache.tensors()] == memory
        assert cache.nbytes == layer.cache_bytes(10_000, batch=2) == 2 * 2 * 2 * 7 * 8 * 4
    assert cache.length == 395 - 1


SPLITS = {
    "one pass": [TIME],
    "prompt longer than the window, then tokens": [14, *9 * [1]],
    "chunks": [3, 9, 1, 6, 4],
    "chunks as long as some windows": [5, 5, 5, 5, 3],
    "tokens": TIME * [1],
}


@every_window
@every_sort_of_sinks
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_a_window_is_sdpa_with_a_dense_mask(
    window: int, n_sinks: int, sink_logits: bool, split: list[int]
) -> None:
    """Without a cache and with it, around the ring several times."""
    layer, x = window_layer(window, n_sinks, sink_logits), draw(2, TIME, 24)
    expected = by_sdpa(layer, x)
    close(layer(x), expected)
    close(in_chunks(layer, x, split, layer.new_cache(2, TIME)), expected)


@every_sort_of_sinks
@torch.no_grad()
def test_texts_longer_than_a_block_of_queries_are_exact_too(sink_logits: bool) -> None:
    layer = window_layer(40, 3, sink_logits, rope=None)
    x = draw(1, LONG, 24)
    expected = by_sdpa(layer, x)
    close(layer(x), expected)
    cache = layer.new_cache(1, LONG)
    close(in_chunks(layer, x, [BLOCK + 1, 1, BLOCK, 7, LONG - 2 * BLOCK - 9], cache), expected)


@every_window
def test_the_mask_is_the_one_on_paper(window: int, n_sinks: int) -> None:
    positions = torch.arange(TIME)
    rule = Window(window, n_sinks)
    mask = rule_mask(rule, positions, positions)
    assert torch.equal(mask, dense_mask(window, n_sinks))
    for first in range(TIME):
        for last in range(first, TIME):
            assert torch.equal(rule.visible_keys(first, last), mask[first : last + 1].any(0).nonzero()[:, 0])


@torch.no_grad()
def test_sinks_keep_their_positions() -> None:
    """A sink's key is rotated by its own position, at any distance, not by its slot in the cache."""
    layer, x = window_layer(4, 2), draw(1, TIME, 24)
    cache = layer.new_cache(1, TIME)
    in_chunks(layer, x, TIME * [1], cache)
    k, v, _ = layer.project_kv(x)
    assert isinstance(cache, RingCache)
    for slot, position in enumerate(cache.slot_positions[0].tolist()):
        close(cache.k[:, :, slot], k[:, :, position])
        close(cache.v[:, :, slot], v[:, :, position])
    assert cache.slot_positions[0, :2].tolist() == [0, 1]


@pytest.mark.parametrize("split", [[9], 9 * [1], [2, 3, 1, 3]], ids=len)
@torch.no_grad()
def test_a_sink_within_the_window_counts_once(split: list[int]) -> None:
    """With equal scores each token weighs 1 / n; as long as sinks are in the window, they are no more."""
    layer = window_layer(4, 2, d_model=48)
    layer.q_proj.weight.zero_()
    layer.o_proj.weight.copy_(torch.eye(48))
    x = draw(1, 9, 48)
    values = split_heads(layer.v_proj(x), 2).repeat_interleave(3, 1)
    visible = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 3, 4, 5, 6]]
    heads = split_heads(in_chunks(layer, x, split, layer.new_cache(1, 9)), 6)
    for t, tokens in enumerate(visible):
        close(heads[:, :, t], values[:, :, tokens].mean(2))


@every_window
def test_a_sink_logit_is_one_more_column_of_the_softmax(window: int, n_sinks: int) -> None:
    """Written out with softmax itself: outputs, and the gradients of every weight and of the logits."""
    layer, x = window_layer(window, n_sinks, sink_logits=True), draw(2, TIME, 24)
    assert layer.sink_logits is not None
    k, v, positions = layer.project_kv(x)
    q = layer.rope(split_heads(layer.q_proj(x), 6), positions)
    k, v = (each.repeat_interleave(3, 1) for each in (k, v))
    scores = (q @ k.mT / 8**0.5).masked_fill(~dense_mask(window, n_sinks), -torch.inf)
    column = layer.sink_logits[None, :, None, None].expand(2, -1, TIME, 1)
    weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    expected = layer.o_proj(merge_heads(weights @ v))
    got = layer(x)
    close(got, expected)
    learned, along = list(layer.parameters()), draw(*got.shape, seed=3)
    mine, theirs = (torch.autograd.grad((out * along).sum(), learned) for out in (got, expected))
    for a, b in zip(mine, theirs, strict=True):
        assert a.isfinite().all()
        close(a, b, 1e-4)
    assert (mine[0] if learned[0] is layer.sink_logits else mine[-1]).abs().sum() > 0


@torch.no_grad()
def test_a_sink_logit_that_is_very_low_or_high_takes_nothing_or_all() -> None:
    plain, layer, x = window_layer(5), window_layer(5, sink_logits=True), draw(2, TIME, 24)
    layer.load_state_dict({**layer.state_dict(), **plain.state_dict()})
    for logit, factor in ((-torch.inf, 1.0), (-1e4, 1.0), (1e4, 0.0)):
        layer.sink_logits.fill_(logit)  # type: ignore[union-attr]
        for split in ([TIME], TIME * [1]):
            close(in_chunks(layer, x, split, layer.new_cache(2, TIME)), factor * plain(x))


def test_logits_start_at_nothing_and_are_the_heads_own() -> None:
    layer = WindowAttention(**SHAPE, window=5, sink_logits=True)
    assert layer.sink_logits is not None
    assert layer.sink_logits.tolist() == 6 * [0.0]
    assert WindowAttention(**SHAPE, window=5).sink_logits is None


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many of them PyTorch has: a step cuts its pools by that."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@every_sort_of_sinks
@pytest.mark.parametrize("apart", [False, True])
@torch.no_grad()
def test_a_step_copies_no_keys_and_values(sink_logits: bool, apart: bool) -> None:
    """It attends to views of the ring, though the oldest token lies in its middle."""
    layer = window_layer(500, 4, sink_logits, d_model=32, n_heads=4, head_dim=32)
    cache, x = layer.new_cache(2, 1000), draw(2, 1, 32)
    layer(draw(2, 400, 32, seed=1), cache)
    if apart:
        cache.trim(torch.tensor([400, 260]))
    for _ in range(3):
        in_chunks(layer, draw(2, 60, 32, seed=2), [60], cache)
        with Allocated(x, *cache.tensors(), *layer.parameters()) as allocated:
            kv = layer.project_kv(x, cache)
            layer(x, cache, source=kv)
        assert kv.k.untyped_storage().data_ptr() == cache.tensors()[0].untyped_storage().data_ptr()
        # Besides one row of scores per head, the largest is the record of both rows' positions.
        most = max(2 * 4 * 504, 4 * 32 * 32)
        assert allocated.largest <= most < cache.tensors()[0].numel() / 4, allocated.by


@every_sort_of_sinks
def test_training_needs_memory_by_the_length_not_by_its_square(sink_logits: bool) -> None:
    """Nothing as large as N x N is allocated in forward or backward, for one head or all."""
    layer = window_layer(32, 2, sink_logits, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8)

    def train(x: Tensor) -> None:
        layer(x).square().sum().backward()

    peaks = {n: peak_memory(lambda n=n: train(draw(1, n, 16))) for n in (768, 1536)}
    assert peaks[1536] < 2.2 * peaks[768]
    x = draw(1, 1536, 16)
    with Allocated(x, *layer.parameters()) as allocated:
        train(x)
    assert allocated.largest <= 2 * BLOCK * (BLOCK + 34), allocated.by  # a block of queries over its keys
    with Allocated(x) as dense:
        by_sdpa(layer, x)
    assert dense.largest >= 1536 * 1536


@every_sort_of_sinks
@pytest.mark.parametrize("n_sinks", [0, 3])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_steps_by_a_decode_kernel_are_the_plain_ones(
    sink_logits: bool, n_sinks: int, backend: str, cache_dtype: torch.dtype
) -> None:
    """Over a ring that has turned, in rows of different length; the kernel needs to know no order."""
    layer = window_layer(6, n_sinks, sink_logits, head_dim=16)
    x, asked = draw(BATCH, TIME, 24), []

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, **options: Any) -> Tensor:
        asked.append((lengths.tolist(), k.dtype, set(options)))
        return decode_attention(q, k, v, lengths, backend=backend, **options)  # type: ignore[arg-type]

    results = []
    for decode in (None, step):
        layer.decode = decode
        cache = layer.new_cache(BATCH, TIME, dtype=cache_dtype)
        layer(x[:, :6], cache)
        cache.trim(torch.tensor([6, 2, 4]))
        results.append(in_chunks(layer, x[:, 6:], [1, 4, 1, 7, 1, 1, 2], cache))
    torch.testing.assert_close(*results, atol=3e-5, rtol=1e-4)
    taken = ([7, 3, 5], [12, 8, 10], [20, 16, 18], [21, 17, 19])  # of chunks the kernel knows nothing
    assert [lengths for lengths, _, _ in asked] == [[min(n, 6 + n_sinks) for n in row] for row in taken]
    assert {dtype for _, dtype, _ in asked} == {cache_dtype}
    wanted = {"sink_logits"} if sink_logits else set()
    assert all(options == wanted for _, _, options in asked)


def test_a_kernel_is_never_asked_where_gradients_are_wanted() -> None:
    layer = window_layer(3, 1, sink_logits=True)

    def step(*_: Any, **__: Any) -> Tensor:
        raise AssertionError

    layer.decode = step
    layer(draw(1, 1, 24)).sum().backward()
    assert layer.sink_logits is not None
    assert layer.sink_logits.grad is not None


@pytest.mark.parametrize("kernel", [False, True])
@every_sort_of_sinks
@torch.no_grad()
def test_a_reader_reads_its_owners_ring(kernel: bool, sink_logits: bool) -> None:
    """Far past the window, and with rows of different length; it has no ring of its own."""
    owner, reader = window_layer(5, 2, sink_logits), window_layer(5, 2, sink_logits, reader=True)
    sharp(reader, seed=4)
    whole = window_layer(5, 2, sink_logits)
    whole.load_state_dict(reader.state_dict(), strict=False)
    x, theirs = draw(BATCH, TIME, 24), draw(BATCH, TIME, 24, seed=2)
    if kernel:
        reader.decode = decode_attention
    cache, own = owner.new_cache(BATCH, TIME), reader.new_cache(BATCH, TIME)
    assert isinstance(own, NoCache)
    lengths = [6, 3, 5]
    reader(x[:, :6], own, source=owner.project_kv(theirs[:, :6], cache))
    cache.trim(torch.tensor(lengths))
    pieces = zip(x[:, 6:].split([1, 9, 1, 6], 1), theirs[:, 6:].split([1, 9, 1, 6], 1), strict=True)
    got = torch.cat([reader(a, own, source=owner.project_kv(b, cache)) for a, b in pieces], 1)
    for row, length in enumerate(lengths):
        mine, its = (
            torch.cat((each[row : row + 1, :length], each[row : row + 1, 6:]), 1) for each in (x, theirs)
        )
        close(got[row], whole(mine, source=owner.project_kv(its))[0, length:])


@torch.no_grad()
def test_rows_cut_back_to_one_length_continue_together() -> None:
    """Rows of different lengths that are cut to one length: positions are recorded for all of them."""
    layer, x = window_layer(6, 1), draw(BATCH, TIME, 24)
    for split in ([1, 1, 3], [2, 2, 1], 5 * [1]):
        cache = layer.new_cache(BATCH, TIME)
        layer(x[:, :5], cache)
        cache.trim(torch.tensor([5, 3, 4]))
        layer(x[:, 5:6], cache)
        cache.trim(torch.tensor([2, 2, 2]))
        got = torch.cat([layer(x[:, 2:9], cache), in_chunks(layer, x[:, 9:14], split, cache)], 1)
        close(got, layer(x[:, :14])[:, 2:])


@torch.no_grad()
def test_rows_at_different_positions_begin_together_after_a_reset() -> None:
    layer, x = window_layer(6, 1), draw(BATCH, TIME, 24)
    cache = layer.new_cache(BATCH, TIME)
    layer(x[:, :5], cache)
    cache.trim(torch.tensor([5, 0, 2]))
    layer(x[:, 5:7], cache)
    cache.reset()
    close(in_chunks(layer, x, [3, 1, 7, 1, 11], cache), layer(x))


def test_a_ring_that_has_written_over_its_past_cannot_go_back() -> None:
    layer, x = window_layer(5, 2), draw(2, 9, 24)
    cache = layer.new_cache(2, 20)
    layer(x[:, :7], cache)
    assert cache.can_trim
    cache.trim(torch.tensor([7, 1]))
    layer(x[:, :1], cache)
    assert not cache.can_trim
    with pytest.raises(ValueError, match="a RingCache cannot forget what it has seen"):
        cache.trim(torch.tensor([1, 1]))
    cache.reset()
    assert cache.can_trim
    close(layer(x, cache), layer(x))


@pytest.mark.parametrize("max_len", [1, 2, 4, 7, 8])
@torch.no_grad()
def test_a_window_longer_than_max_len_takes_no_more_room(max_len: int) -> None:
    layer, full = window_layer(8, 2), sharp(FullAttention(24, 3))
    cache = layer.new_cache(2, max_len)
    assert cache.nbytes == layer.cache_bytes(max_len, batch=2) == 2 * 2 * 2 * max_len * 8 * 4
    x = draw(2, max_len, 24)
    close(in_chunks(layer, x, max_len * [1], cache), layer(x))
    with pytest.raises(ValueError, match=f"cache: expected at most max_len={max_len} tokens"):
        layer(x[:, :1], cache)
    wide = WindowAttention(24, 3, window=max_len).eval()
    wide.load_state_dict(full.state_dict())
    close(wide(x), full(x))


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"window": 0}, ValueError, "window: expected at least 1, got 0"),
        ({"window": -3}, ValueError, "window: expected at least 1, got -3"),
        ({"window": 2.0}, TypeError, r"window: expected an integer, got float \(2.0\)"),
        ({"window": None}, TypeError, "window: expected an integer, got NoneType"),
        ({"window": 4, "n_sinks": 5}, ValueError, r"n_sinks: expected at most 4 \(window=4"),
        ({"window": 4, "n_sinks": -1}, ValueError, "n_sinks: expected at least 0, got -1"),
        ({"window": 4, "n_sinks": True}, TypeError, "n_sinks: expected an integer, got bool"),
        ({"n_kv_heads": 4}, ValueError, "n_kv_heads: expected a divisor of n_heads=6, got 4"),
        ({"n_kv_heads": 0}, ValueError, "n_kv_heads: expected at least 1, got 0"),
        ({"n_kv_heads": 12}, ValueError, "n_kv_heads: expected a divisor of n_heads=6, got 12"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_impossible_windows_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=names):
        WindowAttention(24, 6, **options)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_cache_for_another_window_or_layer_is_refused_by_name() -> None:
    layer, x = window_layer(5), draw(2, 4, 24)
    with pytest.raises(TypeError, match="cache: expected RingCache, got KVCache"):
        layer(x, FullAttention(24, 6).new_cache(2, 9))
    other = WindowAttention(24, 6, window=5, n_kv_heads=3).new_cache(2, 9)
    with pytest.raises(ValueError, match=r"k: expected shape \(2, 3, 4, 4\)"):
        layer(x, other)
    assert other.length == 0


@pytest.mark.usefixtures("unchecked_shapes")
def test_keys_and_positions_that_do_not_fit_are_refused_by_name() -> None:
    layer, x = window_layer(5), draw(2, 4, 24)
    kv = layer.project_kv(x)
    with pytest.raises(ValueError, match=r"source.slot_positions: expected shape \(1 or batch, 4\)"):
        layer(x, source=KV(kv.k, kv.v, kv.positions, torch.arange(5)[None]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_sort_of_sinks
@torch.no_grad()
def test_half_precision_is_as_near_as_its_numbers_allow(dtype: torch.dtype, sink_logits: bool) -> None:
    """Far past the window, where positions are large: as near as SDPA in the same type, and no NaN."""
    layer, x = window_layer(9, 2, sink_logits), draw(2, 400, 24).to(dtype)
    half = window_layer(9, 2, sink_logits).to(dtype)
    layer.load_state_dict(half.float().state_dict())
    half = half.to(dtype)
    exact = layer(x.float())
    got = in_chunks(half, x, [150, *50 * [1], 200], half.new_cache(2, 400))
    assert got.dtype == dtype
    assert got.isfinite().all()
    step = torch.finfo(dtype).eps
    error = (got.float() - exact).abs()
    assert error.max() < 12 * step * exact.abs().max()
    assert error[:, -100:].mean() < 1.5 * error[:, :100].mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_query_without_visible_keys_gets_zero(dtype: torch.dtype) -> None:
    """PyTorch's SDPA gives 0 for a row without a key, and for no keys at all; so does ours."""
    q, k, v = (draw(2, 4, 6, 8, seed=seed).to(dtype) for seed in (1, 2, 3))
    mask = torch.ones(6, 6, dtype=torch.bool).tril(-1)
    for out in (
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, :, :1],
        F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros_like(mask)),
        F.scaled_dot_product_attention(q, k[:, :, :0], v[:, :, :0]),
    ):
        assert (out == 0).all()

    class Earlier(Window):
        def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
            return super().visible(queries, keys) & (keys < queries)

    for T in (6, 1):
        kv = KV(k[:, :, :T], v[:, :, :T], torch.arange(T)[None])
        out = attend_blockwise(q[:, :, :T], kv, Earlier(3), 4)
        assert (out[:, :, 0] == 0).all()
        assert out.isfinite().all()


FIVE_TO_ONE = (*5 * (Spec("window", window=6, n_sinks=2, n_kv_heads=2),), Spec("gqa", n_kv_heads=2))


def five_to_one(layers: tuple[str | Spec, ...] = FIVE_TO_ONE) -> Decoder:
    """Six layers, the last with full attention."""
    config = ModelConfig(50, 24, 6, n_heads=4, head_dim=8, d_ff=32, layers=layers, tied=False)
    return sharp(Decoder(config))


PROMPT = torch.randint(0, 50, (2, 15), generator=torch.Generator().manual_seed(1))


@cache
def without_a_cache() -> Tensor:
    return five_to_one().generate(PROMPT, 30, use_cache=False)


@pytest.mark.parametrize(
    ("chunk", "kernel"), [(None, False), (1, False), (4, False), (6, False), (11, False), (4, True)]
)
def test_five_local_layers_to_a_global_one_generate_the_same_with_a_cache(
    chunk: int | None, kernel: bool
) -> None:
    model, expected = five_to_one(), without_a_cache()
    assert len(expected[0, 15:].unique()) > 5  # not one token over and over
    if kernel:
        model.decode_with(decode_attention)
    assert torch.equal(model.generate(PROMPT, 30, chunk=chunk), expected)


def test_only_the_global_layer_grows() -> None:
    model = five_to_one()
    rows = {length: model.table(length) for length in (4, 100, 1000)}
    width = 2 * 2 * 8 * 4
    for length, table in rows.items():
        local, total = min(length, 8) * width, table[-1]
        assert [row["stored"] for row in table[:6]] == [row["read"] for row in table[:6]]
        assert [row["stored"] for row in table[:6]] == [*5 * [local], length * width]
        assert total["stored"] == model.new_cache(1, length).nbytes


@torch.no_grad()
def test_a_window_may_be_read_by_later_layers() -> None:
    """Readers in a decoder: the same with a cache as without, past the window."""
    own = Spec("window", window=6, n_sinks=1, sink_logits=True)
    model = five_to_one((own, "full", Spec("window", window=6, n_sinks=1, sink_logits=True, reads="last")))
    assert model.config.owners == [0, 1, 0, 3, 4, 3]
    tokens = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(2))
    cache = model.new_cache(2, 30)
    got = torch.cat([model(piece, cache) for piece in tokens.split([10, 1, 1, 9, 1, 8], 1)], 1)
    close(got, model(tokens), 1e-4)


def test_a_config_with_windows_survives_json() -> None:
    config = ModelConfig(n_layers=6, layers=FIVE_TO_ONE)
    text = json.dumps(config.to_dict())
    assert ModelConfig.from_dict(json.loads(text)) == config
    assert config.to_dict()["layers"][0] == ["window", {"window": 6, "n_sinks": 2, "n_kv_heads": 2}]
    with pytest.raises(ValueError, match="layers: option of 'window'"):
        Spec("window", size=5)
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        Decoder(ModelConfig(layers=(Spec("window", window=0),)))


def test_the_receptive_field_grows_with_the_layers() -> None:
    """After L windows an output depends on the L · (W - 1) tokens before its own, and on no more."""
    model = five_to_one(6 * (Spec("window", window=4),))
    tokens = torch.randint(0, 50, (1, 30), generator=torch.Generator().manual_seed(2))
    x = model.embed(tokens).detach().requires_grad_()
    hidden = x
    for block in model.blocks:
        hidden = block(hidden, None, {})
    (grad,) = torch.autograd.grad(hidden[0, 25].sum(), x)
    field = grad[0].abs().amax(-1).nonzero()[:, 0].tolist()
    assert field == list(range(25 - 6 * 3, 26))


@pytest.mark.parametrize("other", [{"window": 4}, {"window": 8, "n_sinks": 1}], ids=str)
def test_a_ring_of_another_window_is_refused_and_left_alone(other: dict[str, int]) -> None:
    layer, ring = WindowAttention(24, 3, window=8), WindowAttention(24, 3, **other).new_cache(1, 32)
    with pytest.raises(ValueError, match="cache: expected shapes for window=8 and n_sinks=0"):
        layer(draw(1, 6, 24), ring)
    assert ring.length == 0


def test_a_step_over_a_source_longer_than_the_window_does_not_reach_the_kernel() -> None:
    owner, reader = FullAttention(24, 3), WindowAttention(24, 3, window=4, reader=True)
    x, cache, none = draw(1, 12, 24), owner.new_cache(1, 12), reader.new_cache(1, 12)
    owner.project_kv(x[:, :11], cache)
    kv = owner.project_kv(x[:, 11:], cache)
    expected = reader(x[:, 11:], none, kv)

    def kernel(*_: Tensor) -> Tensor:
        raise AssertionError("it would read all 12")

    reader.decode = kernel
    close(reader(x[:, 11:], none, kv), expected)
