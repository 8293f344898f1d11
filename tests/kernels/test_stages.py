"""The six stages, in Triton's interpreter, against attention in fp64 as on paper."""

import inspect
import math
import re
from collections import Counter
from itertools import pairwise

import pytest
import torch
from cases import DEVICE, in_any_order
from torch import Tensor

from kvlearn.kernels.runtime import HAS_TRITON, INTERPRETED
from kvlearn.kernels.stages import STAGES, new_lines

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_TRITON, reason="the pinned Triton is for Linux")]

TOLERANCE = {torch.float32: 2e-6 if INTERPRETED else 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def naive(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None = None, window=None, n_sinks=0
) -> Tensor:
    """Row by row, head by head, in fp64, over the visible keys by definition."""
    batch, n_heads, head_dim = q.shape
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.zeros(batch, n_heads, v.shape[-1], dtype=torch.float64, device=q.device)
    for b, length in enumerate(lengths):
        visible = [p for p in range(length) if p < n_sinks or window is None or p >= length - window]
        for h in range(n_heads):
            g = h // (n_heads // k.shape[1])
            if visible:
                scores = k[b, g, visible].double() @ q[b, h].double() * scale
                out[b, h] = scores.softmax(0) @ v[b, g, visible].double()
    return out


def draw(batch=2, n_heads=4, n_kv_heads=2, slots=96, head_dim=16, dtype=torch.float32, seed=0):
    """q, k, v of these sizes."""
    torch.manual_seed(seed)
    kv = (batch, n_kv_heads, slots, head_dim)
    return [torch.randn(s).to(DEVICE, dtype) for s in ((batch, n_heads, head_dim), kv, kv)]


def call(name: str, q: Tensor, k: Tensor, v: Tensor, length: int, **options) -> Tensor:
    """A stage at one length for all rows, however it wants to be told."""
    lengths = torch.full((len(q),), length, dtype=torch.int32, device=q.device)
    return STAGES[name].decode(q, k, v, lengths if STAGES[name].ragged else length, **options)


def close(got: Tensor, want: Tensor, dtype: torch.dtype | None = None) -> None:
    tolerance = TOLERANCE[dtype or got.dtype]
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_attention(name: str, dtype: torch.dtype) -> None:
    q, k, v = draw(dtype=dtype)
    out = call(name, q, k, v, 83)
    assert out.dtype == dtype
    close(out, naive(q, k, v, [83, 83]))


@pytest.mark.parametrize("group", [1, 3, 8, 20])
@pytest.mark.parametrize("name", STAGES)
def test_any_number_of_query_heads_share_a_kv_head(name: str, group: int) -> None:
    q, k, v = draw(1, 2 * group, 2, slots=40)
    close(call(name, q, k, v, 40), naive(q, k, v, [40]))


@pytest.mark.parametrize("head_dim", [8, 24, 64])
@pytest.mark.parametrize("name", STAGES)
def test_head_dims_are_padded(name: str, head_dim: int) -> None:
    q, k, v = draw(1, slots=33, head_dim=head_dim)
    close(call(name, q, k, v, 33), naive(q, k, v, [33]))


@pytest.mark.parametrize("length", [1, 63, 64, 65])
@pytest.mark.parametrize("name", STAGES)
def test_what_lies_beyond_the_length_never_leaks(name: str, length: int) -> None:
    q, k, v = draw(1)
    k[:, :, length:] = v[:, :, length:] = torch.nan
    close(call(name, q, k, v, length), naive(q, k, v, [length]))


@pytest.mark.parametrize("name", STAGES)
def test_neither_tensor_need_be_contiguous(name: str) -> None:
    q, k, v = draw()
    keys = torch.full((2, 96, 2, 40), torch.nan, device=DEVICE)[..., :16].transpose(1, 2).copy_(k)
    values = torch.full((2, 2, 99, 24), torch.nan, device=DEVICE)[:, :, :96, 8:].transpose(0, 1).copy_(v)
    queries = torch.full((4, 2, 20), torch.nan, device=DEVICE)[..., 2:18].transpose(0, 1).copy_(q)
    assert not any(x.is_contiguous() for x in (queries, keys, values))
    close(call(name, queries, keys, values, 70), naive(q, k, v, [70, 70]))


@pytest.mark.parametrize("name", STAGES)
def test_huge_scores_do_not_overflow(name: str) -> None:
    q, k, v = draw(1)
    close(call(name, 300 * q, 300 * k, v, 80), naive(300 * q, 300 * k, v, [80]))


@pytest.mark.parametrize("name", STAGES)
def test_the_highest_score_may_come_last_or_first(name: str) -> None:
    q, k, v = draw(1, slots=70)
    for at in (0, 69):
        peaked = k.clone()
        peaked[:, :, at] = 40 * q.unflatten(1, (2, 2))[:, :, 0]
        close(call(name, q, peaked, v, 70), naive(q, peaked, v, [70]))


@pytest.mark.parametrize("name", STAGES)
def test_the_scale_is_used(name: str) -> None:
    q, k, v = draw(1, slots=40)
    close(call(name, q, k, v, 40, scale=0.9), naive(q, k, v, [40], scale=0.9))


@pytest.mark.parametrize("name", ["v3", "v4", "v5"])
@pytest.mark.parametrize("n_splits", [1, 2, 5, 40])
def test_the_number_of_splits_changes_nothing(name: str, n_splits: int) -> None:
    q, k, v = draw(1, slots=200)
    close(call(name, q, k, v, 200, n_splits=n_splits), naive(q, k, v, [200]))


def test_the_merge_takes_any_number_of_splits() -> None:
    from kvlearn.kernels.stages import v3

    part, lse = torch.randn(1, 3, 70, 8, device=DEVICE), 9 * torch.randn(1, 3, 70, device=DEVICE)
    lse[0, 0, :40] = -torch.inf  # more empty splits than are merged at a time
    out = torch.empty(1, 3, 8, device=DEVICE)
    v3.merge(part, lse, out)
    weights = (lse.double() * math.log(2)).softmax(-1)
    close(out, (weights[..., None] * part).sum(2))


@pytest.mark.parametrize("name", ["v3", "v4", "v5"])
def test_no_keys_give_zeros(name: str) -> None:
    q, k, v = draw()
    k[:] = v[:] = torch.nan
    assert torch.equal(call(name, q, k, v, 0, n_splits=3), torch.zeros_like(q))


RAGGED = [0, 1, 63, 64, 65, 96]


@pytest.mark.parametrize("name", ["v4", "v5"])
def test_every_row_has_a_length_of_its_own(name: str) -> None:
    q, k, v = draw(len(RAGGED), 2, 1)
    for b, length in enumerate(RAGGED):
        k[b, :, length:] = v[b, :, length:] = torch.nan
    lengths = torch.tensor(RAGGED, dtype=torch.int32, device=DEVICE)
    close(STAGES[name].decode(q, k, v, lengths, n_splits=2), naive(q, k, v, RAGGED))


@pytest.mark.parametrize("name", ["v4", "v5"])
def test_a_wrong_length_reads_nothing_outside_the_cache(name: str) -> None:
    q, whole, v = draw(3, 2, 1, slots=80)
    k, values = whole[:, :, :40], v[:, :, :40]
    lengths = torch.tensor([99, -5, 40], dtype=torch.int32, device=DEVICE)
    close(STAGES[name].decode(q, k, values, lengths), naive(q, k, values, [40, 0, 40]))


@pytest.mark.parametrize(("window", "n_sinks"), [(1, 0), (10, 4), (64, 3), (70, 90), (500, 4)])
def test_v4_attends_to_the_window_and_the_sinks(window: int, n_sinks: int) -> None:
    lengths = [0, 1, 11, 68, 96]
    q, k, v = draw(len(lengths), 2, 1)
    for b, length in enumerate(lengths):
        hidden = slice(n_sinks, max(n_sinks, length - window))
        k[b, :, hidden] = v[b, :, hidden] = torch.nan
    given = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    out = STAGES["v4"].decode(q, k, v, given, window=window, n_sinks=n_sinks, n_splits=2)
    close(out, naive(q, k, v, lengths, window=window, n_sinks=n_sinks))


def paged(k: Tensor, v: Tensor, page: int, lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The same cache cut into pages in a random order; pages that no row needs are NaN, their entries -1."""
    batch, _, slots, _ = k.shape
    pages = math.ceil(slots / page)
    blocks = torch.randperm(batch * pages + 3)[: batch * pages].view(batch, pages).int()
    shape = (batch * pages + 3, k.shape[1], page, k.shape[3])
    caches = []
    for x in (k, v):
        cache = torch.full(shape, torch.nan, device=DEVICE).to(x.dtype)
        for b, length in enumerate(lengths):
            for p in range(length):
                cache[blocks[b, p // page], :, p % page] = x[b, :, p]
        caches.append(cache)
    for b, length in enumerate(lengths):
        blocks[b, math.ceil(length / page) :] = -1
    return caches[0], caches[1], blocks.to(DEVICE)


@pytest.mark.parametrize("page", [16, 12, 64])
def test_v4_walks_the_page_table(page: int) -> None:
    lengths = [0, 1, page - 1, page, page + 1, 83]
    q, k, v = draw(len(lengths), 2, 2, slots=96, head_dim=8)
    k_pages, v_pages, table = paged(k, v, page, lengths)
    given = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    out = STAGES["v4"].decode(q, k_pages, v_pages, given, block_table=table, n_splits=2)
    close(out, naive(q, k, v, lengths))
    options = {"window": 20, "n_sinks": 3}
    out = STAGES["v4"].decode(q, k_pages, v_pages, given, block_table=table, **options)
    close(out, naive(q, k, v, lengths, **options))


@pytest.mark.parametrize("page", [16, 64])  # a part of a tile, and a whole one
@pytest.mark.parametrize("entry", [-1, 6, 2**31 - 1])
def test_v4_hides_what_a_wrong_table_points_at(entry: int, page: int) -> None:
    q, k, v = draw(1, 2, 1, slots=3 * page)
    k_pages, v_pages, table = paged(k, v, page, [3 * page])
    table[0, 0] = entry
    given = torch.tensor([3 * page], dtype=torch.int32, device=DEVICE)
    out = STAGES["v4"].decode(q, k_pages, v_pages, given, block_table=table, n_splits=1)
    close(out, naive(q, k[:, :, page:], v[:, :, page:], [2 * page]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_v4_reads_a_byte_a_number(dtype: torch.dtype) -> None:
    q, k, v = draw(2, dtype=torch.bfloat16)
    k8, v8 = ((x.float() * 20).to(dtype) for x in (k, v))
    k_scale, v_scale = torch.tensor([[0.05, 0.1], [0.2, 0.04]], device=DEVICE)
    given = torch.tensor([83, 17], dtype=torch.int32, device=DEVICE)
    out = STAGES["v4"].decode(q, k8, v8, given, k_scale=k_scale, v_scale=v_scale)
    exact_k, exact_v = k8.double() * k_scale[:, None, None], v8.double() * v_scale[:, None, None]
    close(out, naive(q, exact_k, exact_v, [83, 17]))


def test_v5_can_use_its_workspace_again() -> None:
    from kvlearn.kernels.stages.v5 import new_workspace

    q, k, v = draw(slots=200)
    workspace = new_workspace(2, 4, 16, n_splits=3, device=q.device)
    workspace.part[:] = workspace.lse[:] = torch.nan  # content is never read
    out = torch.full_like(q, torch.nan)
    for length in (200, 10, 130):
        assert call("v5", q, k, v, length, workspace=workspace, out=out) is out
        close(out, naive(q, k, v, [length, length]))
        assert not workspace.tickets.any()


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has an order of its own")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", STAGES)
def test_programs_may_run_in_any_order(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_any_order(seed, monkeypatch)
    q, k, v = draw(slots=200)
    options = {"n_splits": 3} if name in ("v3", "v4", "v5") else {}
    close(call(name, q, k, v, 200, **options), naive(q, k, v, [200, 200]))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("n_heads", "block_h"), [(2, 16), (20, 16), (20, 64)])
def test_v5_latent_reads_one_latent_as_key_and_value(n_heads: int, block_h: int, dtype: torch.dtype) -> None:
    from kvlearn.kernels.stages import v5_latent

    rank, rope, lengths = 24, 8, [0, 1, 33, 50]
    q, cache, _ = draw(len(lengths), n_heads, 1, 64, rank + rope, dtype)
    for b, length in enumerate(lengths):
        cache[b, :, length:] = torch.nan
    given = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    q_latent, q_rope = q[..., :rank], q[..., rank:]
    options = {"scale": 0.3, "block_h": block_h, "n_splits": 2}
    out = v5_latent.decode(q_latent, q_rope, cache[:, 0], given, **options)
    close(out, naive(q, cache, cache[..., :rank], lengths, scale=0.3))


def test_errors_name_what_does_not_fit() -> None:
    q, k, v = draw()
    lengths = torch.tensor([5, 5], dtype=torch.int32, device=DEVICE)
    for name in ("v0", "v1", "v2", "v3"):
        with pytest.raises(ValueError, match="length: expected at most 96"):
            STAGES[name].decode(q, k, v, 97)
    for name in ("v4", "v5"):
        with pytest.raises(TypeError, match="lengths: expected dtype"):
            STAGES[name].decode(q, k, v, lengths.long())
    with pytest.raises(ValueError, match="KV heads: expected a divisor of heads=3"):
        STAGES["v0"].decode(q[:, :3], k, v, 5)
    with pytest.raises(ValueError, match="k: expected a contiguous last dimension"):
        STAGES["v2"].decode(q, k.transpose(2, 3).contiguous().transpose(2, 3), v, 5)


def test_every_stage_has_a_prediction_of_its_gain() -> None:
    assert list(STAGES) == ["v0", "v1", "v2", "v3", "v4", "v5"]
    for stage in STAGES.values():
        assert stage.module.__doc__.startswith(stage.name)
        assert "Prediction" in stage.module.__doc__
        assert re.search(r"B=\d+, .*: .*\d (ms|µs)", stage.expected), "a case and its time"


AFTER = [("v1", "v0"), ("v2", "v1"), ("v3", "v2"), ("v4", "v3"), ("v5", "v3")]


@pytest.mark.parametrize(("name", "before"), AFTER)
def test_new_lines_are_those_that_the_stage_before_has_not(name: str, before: str) -> None:
    new, old = (inspect.getsource(STAGES[stage].module.decode_kernel.fn) for stage in (name, before))
    lines = new_lines(name, before).splitlines()
    assert lines[0]
    assert lines[-1]
    assert not any(first == second == "" for first, second in pairwise(lines))
    assert all(f"    {line}\n" in new for line in lines if line)
    added = Counter(new.splitlines()) - Counter(old.splitlines())
    body = new.partition("# fmt: skip\n")[2].splitlines()
    assert {line for line in added if line and line in body} <= {f"    {line}" for line in lines}
    assert not new_lines(name, name)


@pytest.mark.parametrize(("name", "before"), AFTER)
def test_a_line_that_stays_keeps_its_comment(name: str, before: str) -> None:
    def code(line: str) -> str:
        return line.partition("  # ")[0].strip()

    old = {
        code(line): line for line in inspect.getsource(STAGES[before].module.decode_kernel.fn).splitlines()
    }
    for line in new_lines(name, before).splitlines():
        assert line.strip() == old.get(code(line), line).strip() or not line


def test_new_lines_of_v3_are_about_splits() -> None:
    lines = new_lines("v3", "v2").splitlines()
    assert lines[0] == "split, n_splits = tl.program_id(1), tl.num_programs(1)"
    assert "    live = start + n < end" in lines
    with pytest.raises(ValueError, match=r"stage: expected one of 'v0', .*; got 'v9'"):
        new_lines("v3", "v9")
