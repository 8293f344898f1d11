"""v2: the query heads of one KV head in one program, so that a key is read once for all of them.

In grouped-query attention H / G query heads attend to the same keys. Stacked as the rows of a matrix, their
scores are one matrix product with the tile of keys, and their outputs one with the tile of values. Tensor
cores compute both, and need at least 16 rows. A group of 3 or 8 is padded to 16; the padding's arithmetic is
free where the kernel waits for memory, and its rows are neither loaded nor stored.

Prediction (H200: 132 multiprocessors, 4.3 TB/s, tensor cores 788 TFLOP/s; bf16, D=128, H=32, G=4).
- Each byte of cache is now used by 16 rows: 16 FLOPs per byte with the padding, 8 of them useful; arithmetic
  would be the limit at 183.
- B=32, N=4k: 128 programs, each 2 MiB. 268 MB are read once, floor 62 µs, where v1 takes 0.3 to 0.5 ms. But 4
  multiprocessors are idle, and each of the others has only one program: 70 to 100 µs, 3 to 7 times as fast as
  v1. Over the grid of the benchmark 1.7 to 2.9 times: small batches lose what large ones gain.
- B=1, N=64k: only G = 4 programs are left, each with 34 MB. Two tiles of 64 keys and values in flight are
  64 KiB: 94 GB/s, 0.36 ms. 1.3 times as fast as v1, with 128 of 132 multiprocessors idle. The next stage uses
  them.
"""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kvlearn.kernels.runtime import INTERPRETED
from kvlearn.kernels.stages.inputs import check


@triton.jit
def decode_kernel(
    Q, K, V, OUT, length, scale,
    q_b, q_h, k_b, k_g, k_n, v_b, v_g, v_n,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # 64 bits: an offset into a cache can exceed 2³¹
    b, g = program // G, program % G
    row = tl.arange(0, BLOCK_H)  # one query head per row
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_head = (d < D) | (D == BLOCK_D)  # compiled away where D is a power of two
    in_group = (row[:, None] < GROUP) & in_head[None, :]

    q = tl.load(Q + b * q_b + (g * GROUP + row[:, None]) * q_h + d[None, :], mask=in_group, other=0.0)
    keys = K + b * k_b + g * k_g + n[:, None] * k_n + d[None, :]
    values = V + b * v_b + g * v_g + n[:, None] * v_n + d[None, :]
    if UPCAST:  # Triton's interpreter computes wrongly in bf16
        q = q.to(tl.float32)

    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in tl.range(0, length, BLOCK_N, num_stages=NUM_STAGES):
        live = start + n < length
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

    out = OUT + (program * GROUP + row[:, None]) * D + d[None, :]
    tl.store(out, acc / total[:, None], mask=in_group)


def tile(group: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """Sizes of one program: a whole group of heads; tiles of up to 64 keys in 16 KiB, 16 keys at least."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    return {
        "BLOCK_H": max(16, triton.next_power_of_2(group)),
        "BLOCK_D": block_d,
        "BLOCK_N": max(16, min(64, 16384 // (block_d * itemsize))),
        "NUM_STAGES": 3,
        "num_warps": 4 if group <= 32 else 8,
    }


def decode(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    length: int,
    *,
    scale: float | None = None,
) -> Float[Tensor, "B H D"]:
    """softmax(q Kᵀ · scale) V over the first ``length`` keys, in one launch of B · G programs.

    fp16, bf16 or fp32; D must be contiguous, other strides are free. ``scale`` is 1/√D unless given. Raises
    ValueError for shapes that do not fit and for a length outside 1…S.
    """
    check(q, k, v, length)
    batch, n_heads, head_dim = q.shape
    n_kv_heads = k.shape[1]
    group = n_heads // n_kv_heads
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decode_kernel[(batch * n_kv_heads,)](
        q, k, v, out, length, scale * math.log2(math.e),
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        G=n_kv_heads, GROUP=group, D=head_dim, UPCAST=INTERPRETED, **tile(group, head_dim, k.element_size()),
    )  # fmt: skip
    return out
