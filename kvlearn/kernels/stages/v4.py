"""v4: cache formats in use: rows of different lengths, pages, windows, sinks, one byte per number.

- Lengths are in a tensor on the GPU, one per row. They are not compiled in, and the host never reads them:
  the number of splits follows from the GPU and the cache, and empty splits cost almost nothing.
- A page table gives the block of memory in which a page of keys lies: one more load, four bytes per page.
- A window hides all but the newest W keys (the token itself counts), n sinks at the start stay visible. The
  kernel numbers the visible keys 0, 1, 2 … and reads only these: j < kept is a sink, the rest the window.
- int8 or fp8 keys and values, one scale per KV head: K's multiplies the scores, V's multiplies the output.

Prediction (H200: 132 multiprocessors, 4.3 TB/s; bf16, D=128, H=32, G=4).
- Window 4k of 64k: a 16th of the bytes, B=32: 268 MB, floor 62 µs. So the time of v3 at N=4k, 70 to
  105 µs, and the same at any N ≥ 4k, within 5 %.
- Pages of 16: a table entry of 4 bytes for 16 · 512 bytes of keys and values, 0.05 %. The cost is time:
  the address of a tile is known one load later, which pipelining hides. Within 1.1x; pages of 64, 1.05x.
- fp8 or int8: half of the bytes, and one conversion per number, on plain cores. From 512 MB of bf16 on
  1.3 to 1.8 times as fast, not twice.
- One row of 64k beside 31 of 1k: 199 MB, floor 46 µs. All rows get 264 // 128 = 2 splits; the long row's 8
  programs have 17 MB each, at 94 GB/s: 0.18 ms, four times the floor. v3 cannot run it.
"""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Num
from torch import Tensor

from kvlearn import validate
from kvlearn.kernels.runtime import INTERPRETED, multiprocessors
from kvlearn.kernels.stages.inputs import check, check_heads
from kvlearn.kernels.stages.v2 import tile
from kvlearn.kernels.stages.v3 import PROGRAMS_PER_MULTIPROCESSOR, merge


@triton.jit(do_not_specialize=["window", "n_sinks", "n_slots", "n_blocks", "n_pages"])
def decode_kernel(
    Q, K, V, PART, LSE, LENGTHS, TABLE, K_SCALE, V_SCALE, scale, window, n_sinks, n_slots, n_blocks,
    q_b, q_h, k_b, k_g, k_n, v_b, v_g, v_n, n_pages,
    G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, NUM_STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # 64 bits: an offset into a cache can exceed 2³¹
    split, n_splits = tl.program_id(1), tl.num_programs(1)
    b, g = program // G, program % G
    row = tl.arange(0, BLOCK_H)  # one query head per row
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_head = (d < D) | (D == BLOCK_D)  # compiled away where D is a power of two
    in_group = (row[:, None] < GROUP) & in_head[None, :]

    # Visible: position < kept, or first_in_window ≤ position < length. A wrong length reads nothing outside.
    length = tl.minimum(tl.maximum(tl.load(LENGTHS + b), 0), n_slots)
    first_in_window = tl.maximum(length - window, 0)
    kept = tl.minimum(n_sinks, first_in_window)
    visible = kept + length - first_in_window
    per_split = tl.cdiv(tl.cdiv(visible, BLOCK_N), n_splits) * BLOCK_N
    first = split * per_split
    end = tl.minimum(visible, first + per_split)

    q = tl.load(Q + b * q_b + (g * GROUP + row[:, None]) * q_h + d[None, :], mask=in_group, other=0.0)
    if UPCAST:  # Triton's interpreter computes wrongly in bf16
        q = q.to(tl.float32)
    if K_SCALE is not None:
        scale *= tl.load(K_SCALE + g)

    highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in tl.range(first, end, BLOCK_N, num_stages=NUM_STAGES):
        j = start + n
        live = j < end
        position = tl.where(j < kept, j, j - kept + first_in_window)
        if PAGE:
            block = tl.load(TABLE + b * n_pages + position // PAGE, mask=live, other=-1).to(tl.int64)
            live &= (block >= 0) & (block < n_blocks)  # an entry that is no block hides its keys
            slot = (position % PAGE).to(tl.int64)
        else:
            block = b
            slot = position.to(tl.int64)
        at_k = block * k_b + g * k_g + slot * k_n
        at_v = block * v_b + g * v_g + slot * v_n
        here = live[:, None] & in_head[None, :]
        k = tl.load(K + at_k[:, None] + d[None, :], mask=here, other=0.0).to(q.dtype)
        v = tl.load(V + at_v[:, None] + d[None, :], mask=here, other=0.0).to(q.dtype)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # fp32 stays fp32, not tf32
        score = tl.where(live[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # a tile may lie wholly on hidden pages
        shrink = tl.exp2(highest - finite)
        weight = tl.exp2(score - finite[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        highest = higher

    slot = (program * GROUP + row) * n_splits + split
    total = tl.where(total > 0, total, 1.0)  # no keys: 0 / 1 = 0, and -inf + log2(1) = -inf
    part = acc / total[:, None]
    if V_SCALE is not None:
        part *= tl.load(V_SCALE + g)
    tl.store(PART + slot[:, None] * D + d[None, :], part, mask=in_group)
    tl.store(LSE + slot, highest + tl.log2(total), mask=row < GROUP)


def decode(
    q: Float[Tensor, "B H D"],
    k: Num[Tensor, "blocks G page D"],
    v: Num[Tensor, "blocks G page D"],
    lengths: Int[Tensor, " B"],
    *,
    scale: float | None = None,
    window: int | None = None,
    n_sinks: int = 0,
    block_table: Int[Tensor, "B pages"] | None = None,
    k_scale: Float[Tensor, " G"] | None = None,
    v_scale: Float[Tensor, " G"] | None = None,
    n_splits: int | None = None,
) -> Float[Tensor, "B H D"]:
    """softmax(q Kᵀ · scale) V over each row's visible keys: p < n_sinks or length - window ≤ p < length.

    Without ``block_table`` the cache is contiguous, (B, G, S, D). With it, int32, position p of row b lies in
    block ``block_table[b, p // page]`` at slot p % page. The cache is fp16, bf16, fp32, int8 or
    float8_e4m3fn; ``k_scale`` and ``v_scale``, fp32, multiply its numbers. ``lengths`` is int32; length 0
    gives 0. Raises ValueError or TypeError for shapes that do not fit; the host does not read lengths and
    table, the kernel masks slots outside the cache.
    """
    batch, n_heads, head_dim = q.shape
    n_blocks, n_kv_heads, page, _ = k.shape
    group = n_heads // n_kv_heads
    sizes = tile(group, head_dim, k.element_size())
    validate.tensor("lengths", lengths, (batch,), dtype=torch.int32, device=q.device)
    if block_table is None:
        check(q, k, v)
        n_slots = page
    else:
        validate.tensor("k", k, ("blocks", "KV heads", "page", head_dim), device=q.device)
        check_heads(q, k, v)
        validate.tensor("block_table", block_table, (batch, "pages"), dtype=torch.int32, device=q.device)
        block_table = block_table.contiguous()
        n_slots = page * block_table.shape[1]
        sizes["NUM_STAGES"] += 2  # the loads of a tile wait for its table entries
    window = n_slots if window is None else validate.positive("window", window)
    n_sinks = validate.at_least("n_sinks", n_sinks, 0)
    for name, given in (("k_scale", k_scale), ("v_scale", v_scale)):
        if given is not None:
            validate.tensor(name, given, (n_kv_heads,), dtype=torch.float32, device=q.device)
    if n_splits is None:
        room = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(q.device)
        tiles = triton.cdiv(min(n_slots, window + n_sinks), sizes["BLOCK_N"])
        n_splits = max(1, min(room // (batch * n_kv_heads), tiles))
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    part = torch.empty(batch, n_heads, n_splits, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, n_heads, n_splits, dtype=torch.float32, device=q.device)
    decode_kernel[(batch * n_kv_heads, n_splits)](
        q, k, v, part, lse, lengths, block_table, k_scale, v_scale,
        scale * math.log2(math.e), window, n_sinks, n_slots, n_blocks,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], n_slots // page,
        G=n_kv_heads, GROUP=group, D=head_dim, PAGE=0 if block_table is None else page,
        UPCAST=INTERPRETED, **sizes,
    )  # fmt: skip
    merge(part, lse, out)
    return out
