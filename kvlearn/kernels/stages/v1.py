"""v1: the same programs in one pass, while the next tiles are loaded.

- Online softmax: the highest score *so far* is enough. When a higher one appears, the sums so far are
  scaled by exp(old - new). Every key is read once. (Milakov & Gimelshein, "Online normalizer calculation",
  2018.)
- exp2 in place of exp: the hardware computes only 2ˣ. log2(e) is folded into the scale, so it costs nothing.
- Pipelining: while a tile is computed, the next three are copied to shared memory, 16 bytes per thread.
- The sum over a tile's keys is taken at the end; until then each thread sums its own keys.

Prediction (H200: 132 multiprocessors, 4.3 TB/s; bf16, D=128). For 4.3 TB/s at a latency of 0.7 µs, 3 MB must
be in flight, 23 kB per multiprocessor. Three tiles of 32 keys and values are 48 KiB: one program reads
48 KiB / 0.7 µs = 70 GB/s, and one per multiprocessor is enough, if each has one.
- MHA, H=32, B=32, N=4k: 2.1 GB, floor 0.50 ms. 1024 programs occupy the GPU: within 1.2x of the floor, 0.50
  to 0.60 ms, which is two thirds of v0's time for two thirds of its bytes.
- GQA, G=4: eight programs read the same key. The cache has 268 MB (62 µs), but 2.1 GB pass through the L2
  and plain cores do the arithmetic, 8 heads x 1 FLOP per byte: 0.3 to 0.5 ms, 5 to 8 times the floor.
- B=1, N=64k, G=4: still 32 programs, each 34 MB at 70 GB/s: 0.48 ms. A ninth of v0's time, 15 times the
  floor of 31 µs.
"""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from kvlearn.kernels.stages.inputs import check


@triton.jit
def decode_kernel(
    Q, K, V, OUT, length, scale,
    q_b, q_h, k_b, k_g, k_n, v_b, v_g, v_n,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # 64 bits: an offset into a cache can exceed 2³¹
    b, h = program // H, program % H
    g = h // GROUP  # the KV head that this query head reads
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_head = (d < D) | (D == BLOCK_D)  # compiled away where D is a power of two

    q = tl.load(Q + b * q_b + h * q_h + d, mask=in_head, other=0.0).to(tl.float32) * scale
    keys = K + b * k_b + g * k_g + n[:, None] * k_n + d[None, :]
    values = V + b * v_b + g * v_g + n[:, None] * v_n + d[None, :]

    highest = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in tl.range(0, length, BLOCK_N, num_stages=NUM_STAGES):
        live = start + n < length
        past = tl.cast(start, tl.int64)
        here = live[:, None] & in_head[None, :]
        k = tl.load(keys + past * k_n, mask=here, other=0.0)
        v = tl.load(values + past * v_n, mask=here, other=0.0)
        score = tl.where(live, tl.sum(q[None, :] * k.to(tl.float32), 1), float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 0))
        shrink = tl.exp2(highest - higher)  # exp2(-inf) = 0 at the first tile
        weight = tl.exp2(score - higher)
        total = total * shrink + tl.sum(weight, 0)
        acc = acc * shrink + weight[:, None] * v.to(tl.float32)
        highest = higher

    tl.store(OUT + program * D + d, tl.sum(acc, 0) / total, mask=in_head)


def decode(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    length: int,
    *,
    scale: float | None = None,
) -> Float[Tensor, "B H D"]:
    """softmax(q Kᵀ · scale) V over the first ``length`` keys, in one launch of B · H programs.

    fp16, bf16 or fp32; D must be contiguous, other strides are free. ``scale`` is 1/√D unless given. Raises
    ValueError for shapes that do not fit and for a length outside 1…S.
    """
    check(q, k, v, length)
    batch, n_heads, head_dim = q.shape
    block_d = triton.next_power_of_2(head_dim)
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decode_kernel[(batch * n_heads,)](
        q, k, v, out, length, scale * math.log2(math.e),
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        H=n_heads, GROUP=n_heads // k.shape[1], D=head_dim, BLOCK_D=block_d,
        BLOCK_N=max(8, min(32, 8192 // (block_d * k.element_size()))), NUM_STAGES=4,  # tiles of 8 KiB
    )  # fmt: skip
    return out
