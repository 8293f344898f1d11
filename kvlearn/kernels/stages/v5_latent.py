"""v5, latent: one tile is both keys and values.

Multi-head latent attention caches R numbers per token that all heads share, and Dr more that carry RoPE. With
the up-projections absorbed into the query and the output, decoding is attention of H heads over *one* KV head
whose key is [latent, rope] and whose value is the latent itself: each tile is read once and used twice.
    score = (q_latent · latent + q_rope · rope) · scale,   out = softmax(score) · latent
(DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1; the absorbed form.)

BLOCK_H heads share a tile. 16 is the least for tensor cores. With 64, a quarter of the programs read a tile,
and Hopper's warpgroup instructions, which need 64 rows, apply.

The merge is v3's, a second launch: with 128 heads and 66 splits the last program of v5 would read
66 · 64 · 2 KiB = 8.6 MB alone, some 90 µs; here 128 programs share the work.

Prediction (H200: 4.3 TB/s, 788 TFLOP/s, so 183 FLOPs per byte at the ridge point; bf16, R=512, Dr=64).
- A token has 1152 bytes and costs 2 · (576 + 512) = 2176 FLOPs per head: 1.9 FLOPs per byte and head.
- 16 heads: 30 FLOPs per byte, bound by memory. BLOCK_H=16; 0.75 to 0.9 of the bandwidth from 600 MB on.
- 128 heads: 242 FLOPs per byte, bound by arithmetic. BLOCK_H=16 fetches each tile 8 times, through the L2,
  and uses the older instructions: about 150 TFLOP/s. BLOCK_H=64 fetches it twice: 250 to 350 TFLOP/s. At
  B=64, N=8k these are 1.0 ms and 0.33 to 0.46: about 2x.
"""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from kvlearn import validate
from kvlearn.kernels.runtime import INTERPRETED, multiprocessors
from kvlearn.kernels.stages.v3 import merge


@triton.jit(do_not_specialize=["n_slots"])
def decode_kernel(
    Q, Q_ROPE, CACHE, PART, LSE, LENGTHS, scale, n_slots,
    q_b, q_h, r_b, r_h, c_b, c_n,
    H: tl.constexpr, R: tl.constexpr, DR: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_DR: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    split, n_splits = tl.program_id(1), tl.num_programs(1)
    head_blocks = tl.cdiv(H, BLOCK_H)
    b = program // head_blocks
    h = program % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_R)
    dr = tl.arange(0, BLOCK_DR)
    in_latent = (d < R) | (R == BLOCK_R)
    in_rope = (dr < DR) | (DR == BLOCK_DR)
    in_rows = (h < H)[:, None] & in_latent[None, :]

    length = tl.minimum(tl.maximum(tl.load(LENGTHS + b), 0), n_slots)
    per_split = tl.cdiv(tl.cdiv(length, BLOCK_N), n_splits) * BLOCK_N
    first = split * per_split
    end = tl.minimum(length, first + per_split)

    q = tl.load(Q + b * q_b + h[:, None] * q_h + d[None, :], mask=in_rows, other=0.0)
    in_rope_rows = (h < H)[:, None] & in_rope[None, :]
    q_rope = tl.load(Q_ROPE + b * r_b + h[:, None] * r_h + dr[None, :], mask=in_rope_rows, other=0.0)
    latents = CACHE + b * c_b + n[:, None] * c_n + d[None, :]
    ropes = CACHE + b * c_b + n[:, None] * c_n + R + dr[None, :]
    if UPCAST:  # Triton's interpreter computes wrongly in bf16
        q, q_rope = q.to(tl.float32), q_rope.to(tl.float32)

    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    # Loop-invariant code motion (LICM) would keep addresses in registers through the loop, and some spill.
    for start in tl.range(first, end, BLOCK_N, num_stages=NUM_STAGES, disable_licm=True):
        live = start + n < end
        past = tl.cast(start, tl.int64) * c_n
        latent = tl.load(latents + past, mask=live[:, None] & in_latent[None, :], other=0.0).to(q.dtype)
        rope = tl.load(ropes + past, mask=live[:, None] & in_rope[None, :], other=0.0).to(q.dtype)
        score = tl.dot(q, tl.trans(latent), input_precision="ieee")
        score = tl.dot(q_rope, tl.trans(rope), score, input_precision="ieee") * scale
        score = tl.where(live[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        shrink = tl.exp2(highest - higher)
        weight = tl.exp2(score - higher[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(latent.dtype), latent, acc * shrink[:, None], input_precision="ieee")
        highest = higher

    slot = (b * H + h) * n_splits + split
    total = tl.where(total > 0, total, 1.0)  # no keys: 0 / 1 = 0, and -inf + log2(1) = -inf
    part = acc / total[:, None]
    tl.store(PART + slot[:, None] * R + d[None, :], part, mask=in_rows)
    tl.store(LSE + slot, highest + tl.log2(total), mask=h < H)


def decode(
    q_latent: Float[Tensor, "B H R"],
    q_rope: Float[Tensor, "B H Dr"],
    cache: Float[Tensor, "B S R_plus_Dr"],
    lengths: Int[Tensor, " B"],
    *,
    scale: float,
    block_h: int | None = None,
    n_splits: int | None = None,
) -> Float[Tensor, "B H R"]:
    """softmax([q_latent, q_rope] · cacheᵀ · scale) · latent over ``lengths[b]`` tokens of row b.

    ``scale`` has no default: it is 1/√ of the head dim *before* absorption, which the shapes do not give.
    ``block_h`` heads share a tile, 16 or 64: 16 for up to 16 heads, 64 for more, unless given. Types,
    strides, lengths and errors as in v5.
    """
    batch, n_heads, rank = validate.tensor("q_latent", q_latent, ("batch", "heads", "rank")).shape
    rope_dim = validate.tensor("q_rope", q_rope, (batch, n_heads, "rope dim"), device=q_latent.device).shape[
        2
    ]
    validate.tensor("cache", cache, (batch, "slots", rank + rope_dim), device=q_latent.device)
    validate.tensor("lengths", lengths, (batch,), dtype=torch.int32, device=q_latent.device)
    for name, x in (("q_latent", q_latent), ("q_rope", q_rope), ("cache", cache)):
        if x.stride(-1) != 1:
            raise ValueError(f"{name}: expected a contiguous last dimension, got stride {x.stride(-1)}")
    validate.one_of("block_h", block_h, (None, 16, 64))
    block_h = block_h or (16 if n_heads <= 16 else 64)
    programs = batch * triton.cdiv(n_heads, block_h)
    block_n = 32 if cache.element_size() <= 2 else 16
    if n_splits is None:
        room = multiprocessors(cache.device) // programs
        n_splits = max(1, min(room, triton.cdiv(cache.shape[1], block_n)))
    out = torch.empty(q_latent.shape, dtype=q_latent.dtype, device=cache.device)
    part = torch.empty(batch, n_heads, n_splits, rank, dtype=torch.float32, device=cache.device)
    lse = torch.empty(batch, n_heads, n_splits, dtype=torch.float32, device=cache.device)
    decode_kernel[(programs, n_splits)](
        q_latent, q_rope, cache, part, lse, lengths, scale * math.log2(math.e), cache.shape[1],
        *q_latent.stride()[:2], *q_rope.stride()[:2], *cache.stride()[:2],
        H=n_heads, R=rank, DR=rope_dim, BLOCK_H=block_h, BLOCK_R=max(16, triton.next_power_of_2(rank)),
        BLOCK_DR=max(16, triton.next_power_of_2(rope_dim)), BLOCK_N=block_n, NUM_STAGES=2,
        UPCAST=INTERPRETED, num_warps=4 if block_h == 16 else 8,
    )  # fmt: skip
    merge(part, lse, out)
    return out
