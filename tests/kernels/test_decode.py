"""The decode kernel, in the interpreter, and its PyTorch form: both are attention, whatever the cache is."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import DEVICE, Case, in_any_order
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvlearn.attention.core import Partial, merge_all
from kvlearn.kernels import Tiling, Workspace, decode_attention, decode_latent, launch
from kvlearn.kernels.inputs import Request
from kvlearn.kernels.runtime import HAS_TRITON, INTERPRETED

SMALL = Tiling(block_h=16, block_n=16, num_warps=4, num_stages=2)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
BACKENDS = [
    "torch",
    pytest.param(
        "triton", marks=[pytest.mark.slow, pytest.mark.skipif(not HAS_TRITON, reason="no Triton here")]
    ),
]

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 keys, so that a short cache has many of them."""
    monkeypatch.setattr(launch, "tiling_for", lambda request: SMALL)


def check(case: Case, backend: str, **options: Any) -> None:
    out, lse = decode_attention(
        *case.arguments(), **case.options(), return_lse=True, backend=backend, **options
    )
    want, want_lse = case.expected()
    tolerance = TOLERANCE[case.dtype]
    assert out.dtype == case.dtype
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=tolerance)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    capacity = draw(st.integers(1, 70))
    page = draw(st.sampled_from([None, None, 1, 5, 16, 32]))
    length = st.one_of(st.integers(0, capacity), st.sampled_from([0, 1, capacity]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]))
    cache_dtype = draw(st.sampled_from([None, None, torch.int8, torch.float8_e4m3fn]))
    if cache_dtype is None and dtype == torch.float32:
        cache_dtype = draw(st.sampled_from([None, torch.bfloat16]))
    scales = draw(
        st.sampled_from(["number", "head", "key"] if cache_dtype == torch.int8 else ["", "head", "key"])
    )
    return Case(
        lengths=tuple(draw(st.lists(length, min_size=1, max_size=2))),
        n_kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 2, 3, 5, 17])),
        width=draw(st.sampled_from([16, 24, 5])),
        value_width=draw(st.sampled_from([None, None, 20])),
        capacity=capacity,
        page=page,
        window=draw(st.one_of(st.none(), st.integers(1, capacity + 5))),
        n_sinks=draw(st.integers(0, 20)),
        sink_logits=draw(st.booleans()),
        scales=scales,
        dtype=dtype,
        cache_dtype=cache_dtype,
        layout=draw(st.sampled_from(["heads first", "time first", "every other"])),
        seed=draw(st.integers(0, 99)),
    ).poisoned()


@pytest.mark.slow
@given(case=cases(), splits=st.integers(1, 6))
def test_any_step_is_attention(case: Case, splits: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "tiling_for", lambda request: SMALL)
        check(case, "torch")
        if HAS_TRITON:
            check(case, "triton", num_splits=splits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [
        Case((0, 1, 16, 17, 15), capacity=33, page=16),
        Case((64, 1, 0), n_kv_heads=1, group=8, n_sinks=4, window=9),
        Case((40, 33), window=50, n_sinks=3),
        Case((64,), window=1, n_sinks=0),
        Case((50, 20), n_kv_heads=3, group=1, sink_logits=True, page=8, window=7, n_sinks=9),
        Case((63, 2), cache_dtype=torch.int8, scales="key", page=5),
        Case((63, 2), cache_dtype=torch.float8_e5m2, scales="number"),
        Case((30, 64), cache_dtype=torch.float8_e4m3fn),
        Case((30, 64), dtype=torch.bfloat16, layout="time first", width=64),
        Case((12,), group=70, n_kv_heads=1, value_width=40),
    ],
    ids=lambda case: f"{case.lengths}" if isinstance(case, Case) else None,
)
def test_the_corners(case: Case, backend: str) -> None:
    check(case.poisoned(), backend, **({"num_splits": 3} if backend == "triton" else {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_very_long_row_beside_short_ones(backend: str) -> None:
    case = Case((600, 3, 0, 17), capacity=600, n_kv_heads=1, group=2).poisoned()
    check(case, backend, **({"num_splits": 20} if backend == "triton" else {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_may_be_huge_or_minus_infinity(backend: str) -> None:
    case = Case((40, 40, 40), n_kv_heads=1, group=2)
    case.q = case.q.abs()
    case.k[0] *= 1e4  # exp of any of these overflows
    case.k[1, :, 3:30] = -torch.inf  # some scores -inf, whole tiles of them
    case.k[2] = -torch.inf  # all of them: no keys at all
    out, lse = decode_attention(*case.arguments(), backend=backend, return_lse=True)
    want, want_lse = case.expected()
    torch.testing.assert_close(out.double(), want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-2)
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    assert (lse[2] == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_zero_and_minus_infinity(backend: str) -> None:
    case = Case((0, 0)).poisoned()
    out, lse = decode_attention(*case.arguments(), backend=backend, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_over_pieces_of_a_context_merge_by_their_lse(backend: str) -> None:
    case = Case((60, 60), capacity=60)
    parts = []
    for piece in (slice(0, 17), slice(17, 40), slice(40, 60)):
        lengths = torch.full((2,), piece.stop - piece.start, dtype=torch.int32, device=DEVICE)
        out, lse = decode_attention(
            case.q, case.k[:, :, piece], case.v[:, :, piece], lengths, backend=backend, return_lse=True
        )
        parts.append(Partial(out[:, :, None], lse[:, :, None]))
    whole = decode_attention(*case.arguments(), backend=backend)
    torch.testing.assert_close(merge_all(parts).out[:, :, 0], whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", [None, 16, 5])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8], ids=str)
def test_latent_attention_reads_one_row_as_key_and_value(
    backend: str, page: int | None, cache_dtype: torch.dtype
) -> None:
    latent, rope = 20, 8
    scales = "key" if cache_dtype == torch.int8 else ""
    case = Case(
        (37, 64, 0), n_kv_heads=1, group=5, width=latent + rope, page=page, window=30, n_sinks=2,
        cache_dtype=cache_dtype, scales=scales,
    ).poisoned()  # fmt: skip
    case.v, case.v_scale = case.k[..., :latent], case.k_scale
    options = case.options()
    del options["v_scale"]
    if isinstance(options["k_scale"], Tensor):
        options["k_scale"] = options["k_scale"][:, 0]
    q_latent, q_rope = case.q.split([latent, rope], dim=-1)
    splits = {"num_splits": 2} if backend == "triton" else {}
    out, lse = decode_latent(
        q_latent, q_rope, case.k[:, 0], case.lengths_, **options, **splits, backend=backend, return_lse=True
    )
    want, want_lse = case.expected()
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_is_the_callers(backend: str) -> None:
    case = Case((30,))
    q = case.q * (2.5 * case.width**0.5)
    got = decode_attention(case.q, case.k, case.v, case.lengths_, scale=2.5, backend=backend)
    torch.testing.assert_close(got, decode_attention(q, case.k, case.v, case.lengths_))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_validated_is_masked(backend: str) -> None:
    """A page that does not exist counts as no keys, a length past the cache as the cache's."""
    for scales in ("", "key"):
        case = Case((40, 40), page=8, capacity=40, scales=scales)
        assert case.table is not None
        case.table[0, 1], case.table[0, 2] = -7, len(case.k)  # the first page past the pool
        out = decode_attention(*case.arguments(), **case.options(), backend=backend, validate=False)
        kept = [*range(8), *range(24, 40)]
        rows = [
            torch.stack([case.at(cache, 0, p) for p in kept], dim=1)[None].float()
            for cache in (case.k, case.v)
        ]
        if scales:
            for cache, scale in zip(rows, (case.k_scale, case.v_scale), strict=True):
                cache *= torch.stack([case.at(scale, 0, p) for p in kept], dim=1)[None, ..., None]  # type: ignore[arg-type]
        want = decode_attention(case.q[:1], *rows, torch.tensor([24], dtype=torch.int32, device=DEVICE))
        torch.testing.assert_close(out[:1], want)
    case.table[0] = -1  # no page at all is no key at all
    out, lse = decode_attention(
        *case.arguments(), **case.options(), backend=backend, validate=False, return_lse=True
    )
    assert not out[0].any()
    assert (lse[0] == -torch.inf).all()
    case = Case((40, 64))
    too_long = torch.tensor([10**6, -3], dtype=torch.int32, device=DEVICE)
    out = decode_attention(*case.arguments()[:3], too_long, backend=backend, validate=False)
    full = decode_attention(*case.arguments()[:3], torch.tensor([64, 0], dtype=torch.int32, device=DEVICE))
    torch.testing.assert_close(out, full)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="no Triton here")
def test_one_workspace_serves_step_after_step() -> None:
    """The tickets are zero again after every step, at one level of merging and at two, at any lengths."""
    workspace = Workspace.new(3, 2, 16, max_splits=20, device=DEVICE)
    for seed, lengths in enumerate([(300, 3, 272), (0, 16, 17), (256, 257, 1)]):
        case = Case(lengths, n_kv_heads=1, group=2, capacity=300, seed=seed)
        for splits in (1, 7, 20):
            out = torch.full_like(case.q, torch.nan)
            got = decode_attention(
                *case.arguments(), out=out, workspace=workspace, num_splits=splits, backend="triton"
            )
            assert got is out
            assert not workspace.tickets.any()
            torch.testing.assert_close(out, decode_attention(*case.arguments()))


def test_with_a_workspace_a_step_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Allocations(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = {t.data_ptr() for t in args if isinstance(t, Tensor)}
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.data_ptr() not in given:
                self.names.append(str(func))
            return result

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: None

    monkeypatch.setattr("kvlearn.kernels.kernel.decode_kernel", Kernel())
    case = Case((60, 7), page=8)
    options = {**case.options(), "backend": "triton", "validate": False, "num_splits": 3}
    workspace, out = Workspace.new(2, 6, 16, 4, DEVICE), torch.empty_like(case.q)
    with Allocations():
        decode_attention(*case.arguments(), **options, workspace=workspace, out=out)
    assert Allocations.names == []
    with Allocations():
        decode_attention(*case.arguments(), **options)
    assert len(Allocations.names) >= 4  # out, lse and the workspace: allocations are counted


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_is_one_operator_under_torch_compile(backend: str) -> None:
    case = Case((40, 9), window=20, n_sinks=2, page=16)
    workspace = Workspace.new(2, 6, 16, 4, DEVICE)

    def step(q: Tensor, lengths: Tensor) -> Tensor:
        options = {**case.options(), "backend": backend, "workspace": workspace}
        out, lse = decode_attention(q * 2, case.k, case.v, lengths, **options, return_lse=True)
        return out + lse[..., None]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lengths in ((40, 9), (0, 64), (17, 17)):
        case.lengths_ = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        torch.testing.assert_close(compiled(case.q, case.lengths_), step(case.q, case.lengths_))


def test_the_operator_is_what_it_says_to_torch() -> None:
    case = Case((40, 9))
    out, lse = torch.empty_like(case.q), torch.empty(2, 6, device=DEVICE)
    nothing = (None,) * 4
    arguments = (case.q, None, case.k, case.v, case.lengths_, 0.3, None, 0, None, None, None, None, 1.0)
    torch.library.opcheck(
        torch.ops.kvlearn.decode.default, (*arguments, out, lse, *nothing, "torch"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


def test_the_operator_refuses_an_output_that_overlaps_itself() -> None:
    """Under ``torch.compile`` strides may be symbols, so the operator looks at them when it runs.

    Where they are none, torch refuses while it traces.
    """
    case = Case((40, 9))
    out = torch.zeros(2, 6, 1, device=DEVICE).expand(2, 6, 16)
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    words = "out: expected memory of its own|written-to tensor refers to a single memory location"
    with pytest.raises((ValueError, RuntimeError), match=words):
        compiled(*case.arguments(), out=out, backend="torch")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="no Triton here")
def test_the_kernel_is_right_with_the_tiling_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As shipped, not with the small tiles of these tests."""
    monkeypatch.undo()
    for case in (
        Case((70,), capacity=80),
        Case((70,), capacity=80, page=16, cache_dtype=torch.int8, scales="head"),
    ):
        check(case.poisoned(), "triton")
    case = replace(Case((50,), group=40, n_kv_heads=1))
    check(case.poisoned(), "triton", num_splits=2)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU sets the order itself")
@pytest.mark.parametrize("seed", range(4))
def test_programs_may_finish_in_any_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program merges, at both levels; the interpreter alone would always run them in order."""
    in_any_order(seed, monkeypatch)
    case = Case((330, 280), n_kv_heads=1, group=2, capacity=330, seed=seed).poisoned()
    check(case, "triton", num_splits=20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_step_takes_other_batches_lengths_and_windows(backend: str) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int | None) -> Tensor:
        return decode_attention(q, k, v, lengths, window=window, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lengths, capacity, window in (((9, 40), 64, None), ((3, 5, 7), 64, 4), ((50,), 80, 30)):
        case = Case(lengths, capacity=capacity)
        torch.testing.assert_close(compiled(*case.arguments(), window), step(*case.arguments(), window))


@pytest.mark.parametrize("scales", ["number", "key"])
def test_a_compiled_step_scales_what_it_reads(scales: str) -> None:
    case = Case((9, 40), cache_dtype=torch.int8, scales=scales)
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    out = compiled(*case.arguments(), **case.options(), backend="torch")
    torch.testing.assert_close(out.double(), case.expected()[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_stride_counts(backend: str) -> None:
    """Everything given as every other number of something larger, the numbers between poisoned."""

    def apart(t: Tensor) -> Tensor:
        roomy = t.new_full([2 * size for size in t.shape], -1 if not t.is_floating_point() else torch.nan)
        view = roomy[tuple(slice(None, None, 2) for _ in t.shape)]
        view.copy_(t)
        return view

    for page in (None, 16, 5):
        case = Case((40, 9), page=page, sink_logits=True, scales="key", value_width=24)
        expected = decode_attention(*case.arguments(), **case.options())
        tensors = [apart(t) for t in case.arguments()]
        options = {name: apart(t) if isinstance(t, Tensor) else t for name, t in case.options().items()}
        out = apart(torch.zeros_like(expected))
        decode_attention(*tensors, **options, out=out, backend=backend)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    q, cache = torch.randn(2, 4, 28, device=DEVICE), torch.randn(2, 40, 28, device=DEVICE)
    lengths = torch.tensor([40, 9], dtype=torch.int32, device=DEVICE)
    expected = decode_latent(q[..., :20], q[..., 20:], cache, lengths)
    got = decode_latent(*(apart(t) for t in (q[..., :20], q[..., 20:], cache, lengths)), backend=backend)
    torch.testing.assert_close(got, expected)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU nobody writes the addresses down")
@pytest.mark.parametrize("splits", [1, 3])
def test_only_live_keys_are_read_and_each_once(splits: int) -> None:
    from kvlearn.kernels.trace import trace

    case = Case((100,), capacity=128, window=33, n_sinks=3, group=4)
    with trace(k=case.k, v=case.v) as reads:
        decode_attention(*case.arguments(), **case.options(), backend="triton", num_splits=splits)
    wanted = torch.zeros(case.k.shape, dtype=torch.int64, device=DEVICE)
    wanted[:, :, case.visible(0)] = 1
    for name in ("k", "v"):
        assert (reads[name].counts.sum(0) == wanted.numpy()).all(), name


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU nobody writes the addresses down")
def test_only_the_pages_of_live_keys_are_looked_up() -> None:
    from kvlearn.kernels.trace import trace

    case = Case((100,), capacity=128, page=16, window=33, n_sinks=3, n_kv_heads=1)
    assert case.table is not None
    with trace(table=case.table) as reads:
        decode_attention(*case.arguments(), **case.options(), backend="triton")
    # Keys 0 to 2 lie on page 0, keys 67 to 99 on pages 4 to 6.
    assert reads["table"].counts.sum((0, 1)).tolist() == [1, 0, 0, 0, 1, 1, 1, 0]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="no Triton here")
@pytest.mark.parametrize(("splits", "heads", "steps"), [(16, 2, 2), (17, 2, 2), (33, 2, 2), (257, 1, 1)])
def test_a_last_family_of_one_hands_its_result_on(splits: int, heads: int, steps: int) -> None:
    """Where 16 or 256 do not divide the splits, somebody has nobody to merge with, and no ticket to draw. Of
    16 splits the first merge is the last."""
    case = Case((16 * splits,), n_kv_heads=heads, group=1, capacity=16 * splits, sink_logits=True)
    workspace, n = Workspace.new(1, heads, 16, splits, DEVICE), heads * splits
    guard = torch.full((n + 4,), 777, dtype=torch.int32, device=DEVICE)
    guard[:n] = 0
    workspace = replace(workspace, tickets=guard[:n])
    for _ in range(steps):
        got = decode_attention(
            *case.arguments(), **case.options(), workspace=workspace, num_splits=splits, backend="triton"
        )
        torch.testing.assert_close(got, decode_attention(*case.arguments(), **case.options()))
        assert not guard[:n].any()
        assert (guard[n:] == 777).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_recorded_for_gradients(backend: str) -> None:
    case, workspace = Case((40, 9)), Workspace.new(2, 6, 16, 4, DEVICE)
    q = case.q.requires_grad_()
    out = decode_attention(q, *case.arguments()[1:], backend=backend, workspace=workspace)
    assert not out.requires_grad
    assert not workspace.lse.requires_grad


def test_autocast_does_not_touch_the_pytorch_form() -> None:
    case = Case((40, 9))
    expected = decode_attention(*case.arguments(), backend="torch")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(decode_attention(*case.arguments(), backend="torch"), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_scales_do_not_vanish_in_half_precision(backend: str) -> None:
    case = Case((40,), dtype=torch.float16, cache_dtype=torch.int8, scales="key")
    case.v_scale = torch.full_like(case.v_scale, 1e-7)  # type: ignore[arg-type]
    out = decode_attention(*case.arguments(), **case.options(), backend=backend)
    want, _ = case.expected()
    assert (out.double() - want).norm() < 0.02 * want.norm()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="no Triton here")
def test_a_tiling_that_does_not_fit_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    tried = []

    def too_small_a_card(*arguments: Any) -> None:
        tried.append(arguments[-1].block_n)
        if arguments[-1].block_n > 32:
            raise OutOfResources(300_000, 200_000, "shared memory")

    monkeypatch.setattr(launch, "_launch", too_small_a_card)
    monkeypatch.setattr(launch, "tiling_for", lambda request: replace(SMALL, block_n=128))
    decode_attention(*Case((40,)).arguments(), backend="triton")
    assert tried == [128, 64, 32]


def test_splits_follow_what_a_window_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    case = Case((64,), n_kv_heads=1, group=1, capacity=8192)
    whole, windowed = (
        launch.splits_for(Request(case.q, None, case.k, case.v, case.lengths_, 1.0, window, 4), SMALL)
        for window in (None, 64)
    )
    assert whole > 100
    assert windowed == 5  # 64 keys and 4 sinks in tiles of 16
