"""v3: the context is split over programs, and their partial results are merged.

Softmax attention over some of the keys can be merged with attention over the others by the log of the sum
that normalised it: each part has the weight exp2(its log-sum - the highest of them). So a sequence can be cut
into as many pieces as the GPU runs programs. (Dao et al., "Flash-Decoding", 2023.) Each program writes its
output and log2-sum-exp2 in fp32; a second kernel merges them, one program per query head. A split beyond the
end of the context writes a log-sum of -inf and has weight 0.

Prediction (H200: 132 multiprocessors, 4.3 TB/s; bf16, D=128, H=32, G=4).
- B=1, N=64k: two programs per multiprocessor, 2 · 132 / 4 = 66 splits for 1024 tiles. A split gets 16 whole
  tiles: 64 splits have any, and 256 programs work. 134 MB: floor 31 µs, where v2 takes 0.36 ms. The partials,
  66 · 32 · 129 · 4 bytes = 1.1 MB, are written and read again: 0.3 µs each way. The second launch costs 1 to
  2 µs in a CUDA graph, its start and three rounds of 32 partials 3 µs: about 5 µs. So 40 to 50 µs, 7 to 9
  times as fast as v2.
- B=32, N=4k: 128 programs already, 264 // 128 = 2 splits: more bytes in flight, and 5 µs for the
  merge. No gain, no great loss: 70 to 105 µs, 0.9 to 1.1 times as fast as v2.
- B=1, N=1k: 2 MB, floor half a µs. The two launches take nearly all the time, as in every short context. From
  Python, where a launch takes about 11 µs of the host's time, that is 22 µs.
"""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kvlearn.kernels.runtime import INTERPRETED, multiprocessors
from kvlearn.kernels.stages.inputs import check
from kvlearn.kernels.stages.v2 import tile

PROGRAMS_PER_MULTIPROCESSOR = 2


@triton.jit
def decode_kernel(
    Q, K, V, PART, LSE, length, scale,
    q_b, q_h, k_b, k_g, k_n, v_b, v_g, v_n,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # 64 bits: an offset into a cache can exceed 2³¹
    split, n_splits = tl.program_id(1), tl.num_programs(1)
    b, g = program // G, program % G
    row = tl.arange(0, BLOCK_H)  # one query head per row
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_head = (d < D) | (D == BLOCK_D)  # compiled away where D is a power of two
    in_group = (row[:, None] < GROUP) & in_head[None, :]

    # Whole tiles for every split; the last may get fewer, or none.
    per_split = tl.cdiv(tl.cdiv(length, BLOCK_N), n_splits) * BLOCK_N
    first = split * per_split
    end = tl.minimum(length, first + per_split)

    q = tl.load(Q + b * q_b + (g * GROUP + row[:, None]) * q_h + d[None, :], mask=in_group, other=0.0)
    keys = K + b * k_b + g * k_g + n[:, None] * k_n + d[None, :]
    values = V + b * v_b + g * v_g + n[:, None] * v_n + d[None, :]
    if UPCAST:  # Triton's interpreter computes wrongly in bf16
        q = q.to(tl.float32)

    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in tl.range(first, end, BLOCK_N, num_stages=NUM_STAGES):
        live = start + n < end
        past = tl.cast(start, tl.int64)
        here = live[:, None] & in_head[None, :]
        k = tl.load(keys + past * k_n, mask=here, other=0.0).to(q.dtype)
        v = tl.load(values + past * v_n, mask=here, other=0.0).to(q.dtype)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # fp32 stays fp32, not tf32
        score = tl.where(live[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        shrink = tl.exp2(highest - higher)  # exp2(-inf) = 0 at the first tile
        weight = tl.exp2(score - higher[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        highest = higher

    # PART is (B·H, splits, D) and LSE (B·H, splits), so that the merge reads one stretch of memory.
    slot = (program * GROUP + row) * n_splits + split
    total = tl.where(total > 0, total, 1.0)  # no keys: 0 / 1 = 0, and -inf + log2(1) = -inf
    part = acc / total[:, None]
    tl.store(PART + slot[:, None] * D + d[None, :], part, mask=in_group)
    tl.store(LSE + slot, highest + tl.log2(total), mask=row < GROUP)


@triton.jit(do_not_specialize=["n_splits"])
def merge_kernel(
    PART, LSE, OUT, n_splits, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SPLITS: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_SPLITS)
    d = tl.arange(0, BLOCK_D)
    in_head = (d < D) | (D == BLOCK_D)

    highest = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, n_splits, BLOCK_SPLITS):
        live = start + s < n_splits
        slot = program * n_splits + start + s
        lse = tl.load(LSE + slot, mask=live, other=float("-inf"))
        here = live[:, None] & in_head[None, :]
        part = tl.load(PART + slot[:, None] * D + d[None, :], mask=here, other=0.0)
        higher = tl.maximum(highest, tl.max(lse, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN
        shrink = tl.exp2(highest - finite)
        weight = tl.exp2(lse - finite)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + tl.sum(weight[:, None] * part, 0)
        highest = higher

    tl.store(OUT + program * D + d, acc / tl.where(total > 0, total, 1.0), mask=in_head)


def merge(
    part: Float[Tensor, "B H splits D"], lse: Float[Tensor, "B H splits"], out: Float[Tensor, "B H D"]
) -> None:
    """out = Σ_s 2^(lse_s - lse) part_s, where 2^lse = Σ_s 2^lse_s, in one launch of B · H programs."""
    batch, n_heads, n_splits, head_dim = part.shape
    block_d = triton.next_power_of_2(head_dim)
    merge_kernel[(batch * n_heads,)](part, lse, out, n_splits, D=head_dim, BLOCK_D=block_d, BLOCK_SPLITS=32)


def decode(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    length: int,
    *,
    scale: float | None = None,
    n_splits: int | None = None,
) -> Float[Tensor, "B H D"]:
    """softmax(q Kᵀ · scale) V over the first ``length`` keys: B · G · splits programs, then B · H.

    fp16, bf16 or fp32; D must be contiguous, other strides are free. ``scale`` is 1/√D unless given;
    ``n_splits`` gives every multiprocessor two programs unless given. No keys give 0. Raises ValueError for
    shapes that do not fit and for a length outside 0…S.
    """
    check(q, k, v, length, least=0)
    batch, n_heads, head_dim = q.shape
    n_kv_heads = k.shape[1]
    group = n_heads // n_kv_heads
    sizes = tile(group, head_dim, k.element_size())
    if n_splits is None:
        room = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(q.device)
        n_splits = max(1, min(room // (batch * n_kv_heads), triton.cdiv(length, sizes["BLOCK_N"])))
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    part = torch.empty(batch, n_heads, n_splits, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, n_heads, n_splits, dtype=torch.float32, device=q.device)
    decode_kernel[(batch * n_kv_heads, n_splits)](
        q, k, v, part, lse, length, scale * math.log2(math.e),
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        G=n_kv_heads, GROUP=group, D=head_dim, UPCAST=INTERPRETED, **sizes,
    )  # fmt: skip
    merge(part, lse, out)
    return out
