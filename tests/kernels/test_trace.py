"""Which program reads which bytes: the claims of chapter 11, counted from the pointers that stages load."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kvlearn.kernels.runtime import HAS_TRITON, INTERPRETED
from kvlearn.kernels.stages import STAGES
from kvlearn.kernels.trace import Trace, trace

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="needs Triton's interpreter"),
]

B, H, G, S, D = 1, 6, 2, 160, 8
GROUP = H // G
LENGTH = 150
NEEDED = B * G * LENGTH * D * 4  # bytes of K, and of V, that an attention step cannot do without


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, H, D), torch.randn(B, G, S, D), torch.randn(B, G, S, D)


def run(name: str, q: Tensor, k: Tensor, v: Tensor, **options) -> Trace:
    lengths = torch.tensor([LENGTH], dtype=torch.int32)
    with trace(q=q, k=k, v=v) as reads:
        STAGES[name].decode(q, k, v, lengths if STAGES[name].ragged else LENGTH, **options)
    return reads


@pytest.mark.parametrize(
    ("name", "of_k", "of_v"),
    [("v0", 2 * GROUP, GROUP), ("v1", GROUP, GROUP), *((name, 1, 1) for name in ("v2", "v3", "v4", "v5"))],
)
def test_how_many_times_the_floor_a_stage_reads(name: str, of_k: int, of_v: int, tensors) -> None:
    reads = run(name, *tensors)
    assert reads["k"].unique_bytes == reads["v"].unique_bytes == NEEDED
    assert reads["k"].nbytes == of_k * NEEDED
    assert reads["v"].nbytes == of_v * NEEDED
    assert not reads["k"].along(2)[:, LENGTH:].any()


def test_v0_and_v1_are_one_program_a_query_head(tensors) -> None:
    for name, passes in (("v0", 2), ("v1", 1)):
        reads = run(name, *tensors)
        assert reads.grids == [(H, 1, 1)]
        for head in range(H):
            mine = np.zeros((B, G, S, D))
            mine[:, head // GROUP, :LENGTH] = passes
            assert (reads["k"].counts[head] == mine).all()


def test_v2_is_one_program_a_kv_head(tensors) -> None:
    reads = run("v2", *tensors)
    assert reads.grids == [(G, 1, 1)]
    assert (reads["k"].along(1) == np.eye(G)).all()
    assert (reads["q"].along(1) == np.repeat(np.eye(G), GROUP, 1)).all()  # padding rows load nothing


@pytest.mark.parametrize("name", ["v3", "v4", "v5"])
def test_splits_share_the_same_bytes_between_more_programs(name: str, tensors) -> None:
    reads = run(name, *tensors, n_splits=2)
    assert reads.grids[0] == (G, 2, 1)
    keys = reads["k"].along(2)[: 2 * G]
    assert (keys.sum(0)[:LENGTH] == G).all()  # each key of each head by one program
    assert list(keys[0].nonzero()[0]) == list(range(128))  # the first split: two tiles of 64
    assert list(keys[1].nonzero()[0]) == list(range(128, LENGTH))


def test_v4_reads_the_window_and_the_sinks_only(tensors) -> None:
    reads = run("v4", *tensors, window=20, n_sinks=4)
    for name in ("k", "v"):
        touched = reads[name].along(2).any(0)
        assert list(touched.nonzero()[0]) == [0, 1, 2, 3, *range(LENGTH - 20, LENGTH)]
        assert reads[name].nbytes == G * 24 * D * 4


def test_v4_reads_the_pages_in_the_table_only(tensors) -> None:
    q, k, v = tensors
    k_pages, v_pages = (x.reshape(G, 10, 16, D).transpose(0, 1).contiguous() for x in (k, v))
    table = torch.tensor([[7, 2, 9, 0]], dtype=torch.int32)
    with trace(k=k_pages, v=v_pages, table=table) as reads:
        STAGES["v4"].decode(q, k_pages, v_pages, torch.tensor([40], dtype=torch.int32), block_table=table)
    assert list(reads["k"].along(0).any(0).nonzero()[0]) == [2, 7, 9]
    assert list(reads["v"].along(0).any(0).nonzero()[0]) == [2, 7, 9]
    assert reads["k"].nbytes == G * 40 * D * 4
    assert not reads["table"].along(1)[:, 3].any()  # no key is on the fourth page


def test_in_v5_the_last_split_of_each_kv_head_reads_the_partials(tensors) -> None:
    from kvlearn.kernels.stages.v5 import new_workspace

    q, k, v = tensors
    workspace = new_workspace(B, H, D, n_splits=3, device=q.device)
    with trace(part=workspace.part, lse=workspace.lse) as reads:
        STAGES["v5"].decode(q, k, v, torch.tensor([LENGTH], dtype=torch.int32), workspace=workspace)
    assert reads.grids == [(G, 3, 1)]
    assert reads.n_programs == 6
    assert list(reads["part"].programs) == [2, 5]
    assert reads["part"].nbytes == workspace.part.nbytes
    assert reads["lse"].nbytes == workspace.lse.nbytes


def test_the_latent_is_read_once_for_keys_and_values() -> None:
    from kvlearn.kernels.stages import v5_latent

    q, cache = torch.randn(1, 20, 40), torch.randn(1, 70, 40)
    lengths = torch.tensor([60], dtype=torch.int32)
    for block_h, times in ((16, 2), (64, 1)):
        with trace(cache=cache) as reads:
            v5_latent.decode(q[..., :32], q[..., 32:], cache, lengths, scale=0.2, block_h=block_h)
        assert reads["cache"].nbytes == times * 60 * 40 * 4
        assert reads["cache"].unique_bytes == 60 * 40 * 4


def test_strides_and_narrow_types_are_counted_too() -> None:
    wide = torch.randn(1, S, G, D + 3).half()
    k = v = wide[..., :D].transpose(1, 2)
    reads = run("v2", torch.randn(B, H, D).half(), k, v)
    assert reads["k"].unique_bytes == NEEDED // 2
    assert reads["k"].nbytes == NEEDED  # k and v are one tensor here, so both loads count for both


def test_a_trace_ends_where_its_block_ends(tensors) -> None:
    reads = run("v2", *tensors)
    before = reads["k"].nbytes
    with trace(k=tensors[1]) as outer:
        inner = run("v2", *tensors)
    run("v2", *tensors)
    assert reads["k"].nbytes == inner["k"].nbytes == outer["k"].nbytes == before
    with pytest.raises(ValueError, match="nothing"), trace(nothing=torch.empty(0)):
        pass
