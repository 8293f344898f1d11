"""v0: one program per query head, and the equation as on paper.

Each of the B · H programs reads the whole context twice, one tile of keys at a time: first for the highest
score, then for the weights exp(score - highest) and the weighted sum of the values. This is the textbook
softmax, safe from overflow; it reads every key twice.

Prediction (H200: 132 multiprocessors, 4.3 TB/s; bf16, D=128, H=32 query heads, G=4 KV heads; BLOCK_N = 32
keys per tile). One token is 2 · 4 · 128 · 2 bytes = 2 KiB of cache, so B=1 at N=64k has 134 MB to read: a
floor of 31 µs.
- 32 programs keep 32 of 132 multiprocessors busy. One multiprocessor reads about 64 bytes per clock, some
  100 GB/s, so 32 of them read 3.2 TB/s at best, and only with loads in flight all the time.
- A program reads 2 x K + V = 3 · 64k · 256 bytes = 50 MB: 0.5 ms at 100 GB/s. But it requests a tile only
  after the one before has arrived, keys twice and values once: 3 · 65,536 / 32 = 6,144 waits of some 0.7 µs,
  the latency of a load. So 4.3 ms, 140 times the floor.
- MHA at B=32, N=4k has 1024 programs, several on each multiprocessor: one loads while another waits. It
  reads 3/2 of the bytes: 0.75 ms at best, with a floor of 0.50; predicted are 0.75 to 1.0 ms.
"""

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
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # 64 bits: an offset into a cache can exceed 2³¹
    b, h = program // H, program % H
    g = h // GROUP  # the KV head that this query head reads
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_head = (d < D) | (D == BLOCK_D)  # compiled away where D is a power of two

    q = tl.load(Q + b * q_b + h * q_h + d, mask=in_head, other=0.0).to(tl.float32)
    keys = K + b * k_b + g * k_g + n[:, None] * k_n + d[None, :]
    values = V + b * v_b + g * v_g + n[:, None] * v_n + d[None, :]

    highest = float("-inf")
    for start in range(0, length, BLOCK_N):
        live = start + n < length
        past = tl.cast(start, tl.int64)
        here = live[:, None] & in_head[None, :]
        k = tl.load(keys + past * k_n, mask=here, other=0.0)
        score = tl.sum(q[None, :] * k.to(tl.float32), 1) * scale
        highest = tl.maximum(highest, tl.max(tl.where(live, score, float("-inf")), 0))

    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, length, BLOCK_N):
        live = start + n < length
        past = tl.cast(start, tl.int64)
        here = live[:, None] & in_head[None, :]
        k = tl.load(keys + past * k_n, mask=here, other=0.0)
        score = tl.sum(q[None, :] * k.to(tl.float32), 1) * scale
        weight = tl.exp(tl.where(live, score, float("-inf")) - highest)
        v = tl.load(values + past * v_n, mask=here, other=0.0)
        total += tl.sum(weight, 0)
        acc += tl.sum(weight[:, None] * v.to(tl.float32), 0)

    tl.store(OUT + program * D + d, acc / total, mask=in_head)


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
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decode_kernel[(batch * n_heads,)](
        q, k, v, out, length, head_dim**-0.5 if scale is None else scale,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        H=n_heads, GROUP=n_heads // k.shape[1], D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_N=32,
    )  # fmt: skip
    return out
