"""The decode kernel: one program reads a piece of one KV head's cache for all query heads that share it.

Stages v0 to v5 build it step by step; this one combines them. A row's visible keys are numbered without gaps,
first the kept sinks, then the window, so that the splits divide only keys that are read. The same launch
merges the splits: in each family of ``FAN_IN`` partial results the last program to finish merges them, then
continues at the next level.

Sources: Dao et al., "Flash-Decoding" (2023) for the splits; DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1
for attention in the latent space; Xiao et al., "Efficient Streaming Language Models with Attention Sinks"
(2023).
"""

import kvlearn.kernels.runtime  # noqa: F401  (before triton: it sets whether Triton interprets)

import triton  # isort: skip
import triton.language as tl  # isort: skip

from kvlearn.kernels.merging import FAN_IN, LN_2, LOG2_E, finite, log_sum, merge, with_sink_logit  # isort: skip


# Arguments that change from step to step must not be compiled in.
@triton.jit(
    do_not_specialize=[
        *("window", "n_sinks", "capacity", "n_pages", "n_kv_heads", "num_splits"),
        *("lengths_stride", "sink_stride", "table_row", "table_step"),
    ]
)
def decode_kernel(
    q_ptr,  # (B, H, D)
    q_rope_ptr,  # (B, H, Dr), or None; with it the cache's rows are latent and rope side by side
    k_ptr,  # (B, G, S, D), or (pages, G, PAGE, D)
    v_ptr,  # the same with Dv, or None: the latent is the value
    lengths_ptr,  # (B,)
    table_ptr,  # (B, pages per row), or None
    k_scale_ptr,  # (B, G, S), or (pages, G, PAGE), or None
    v_scale_ptr,
    sink_ptr,  # (H,), or None
    out_ptr,  # (B, H, Dv)
    lse_ptr,  # (B, H)
    part_ptr,  # (B, H, num_splits, Dv), fp32
    part_lse_ptr,  # (B, H, num_splits), fp32, to the base 2
    tickets_ptr,  # (programs, num_splits), zeros before and after
    scale,
    out_scale,
    window,  # None: all keys
    n_sinks,
    capacity,  # slots per row
    n_pages,  # pages in the pool
    n_kv_heads,
    num_splits,
    lengths_stride,
    sink_stride,
    table_row,
    table_step,
    q_strides,
    q_rope_strides,
    k_strides,
    v_strides,
    k_scale_strides,
    v_scale_strides,
    out_strides,
    D: tl.constexpr,
    DV: tl.constexpr,
    DR: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of one KV head
    PAGE: tl.constexpr,
    # Strides of a slot, known at compile time, so that addresses in a tile differ by constants.
    K_SLOT: tl.constexpr,
    V_SLOT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_DR: tl.constexpr,
    QK_TYPE: tl.constexpr,  # in which queries and keys are multiplied
    PV_TYPE: tl.constexpr,  # in which weights and values are multiplied
):
    """softmax(scale · q Kᵀ) V over the live keys of one split, for BLOCK_H query heads of one KV head."""
    program, split = tl.program_id(0), tl.program_id(1)
    b, g, h, real = program_heads(program, n_kv_heads, GROUP, BLOCK_H)

    length = tl.maximum(tl.minimum(tl.load(lengths_ptr + b * lengths_stride), capacity), 0)
    begin, kept = 0, 0
    if window is not None:
        begin = tl.maximum(length - window, 0)
        kept = tl.minimum(n_sinks, begin)
    # Tiles begin at multiples of BLOCK_N: first those of the kept sinks, then those that touch the window.
    sink_tiles, skipped = tl.cdiv(kept, BLOCK_N), begin // BLOCK_N
    tiles = sink_tiles + tl.cdiv(length, BLOCK_N) - skipped
    tiles_per_split = tl.maximum(tl.cdiv(tiles, num_splits), 1)
    live_splits = tl.maximum(tl.cdiv(tiles, tiles_per_split), 1)
    if split >= live_splits:
        return
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tiles)

    n = tl.arange(0, BLOCK_N)
    d, dv, dr = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_DR)
    q_at = q_ptr + b * q_strides[0] + h[:, None] * q_strides[1] + d[None, :] * q_strides[2]
    q = tl.load(q_at, mask=real[:, None] & (d < D)[None, :], other=0.0).to(QK_TYPE)
    if q_rope_ptr is not None:
        rope_at = q_rope_ptr + b * q_rope_strides[0] + h[:, None] * q_rope_strides[1]
        rope_mask = real[:, None] & (dr < DR)[None, :]
        q_rope = tl.load(rope_at + dr[None, :] * q_rope_strides[2], mask=rope_mask, other=0.0).to(QK_TYPE)

    top = tl.full([BLOCK_H], float("-inf"), tl.float32)  # the largest score so far, to the base 2
    # Summed over the keys only at the end, where registers allow it: each sum waits for all warps.
    LATE_SUM: tl.constexpr = BLOCK_H == 16
    total = tl.zeros([BLOCK_H, BLOCK_N] if LATE_SUM else [BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_DV], tl.float32)
    for tile in tl.range(first, last, disable_licm=True):
        of_sinks = tile < sink_tiles
        start = tl.where(of_sinks, tile, tile - sink_tiles + skipped) * BLOCK_N
        exists = n < tl.where(of_sinks, kept, length) - start
        if window is not None:
            exists &= of_sinks | (n >= begin - start)
        # A key lies `beyond` slots after `slot`: in a contiguous tile, addresses differ by constants.
        if table_ptr is None:
            row, slot, beyond = b, start.to(tl.int64), n
        elif PAGE % BLOCK_N == 0:  # the tile lies in one page
            row = tl.load(table_ptr + b * table_row + start // PAGE * table_step).to(tl.int64)
            slot, beyond = (start % PAGE).to(tl.int64), n
        else:
            table_at = table_ptr + b * table_row + (start + n) // PAGE * table_step
            row = tl.load(table_at, mask=exists, other=-1).to(tl.int64)
            slot, beyond = ((start + n) % PAGE).to(tl.int64), tl.zeros_like(n)
        if table_ptr is not None:
            exists &= (row >= 0) & (row < n_pages)  # a wrong table gives wrong results, never a wild read

        # Slots without a key are never loaded: 0 · NaN would be NaN.
        k_mask, v_mask = exists[:, None] & (d < D)[None, :], exists[:, None] & (dv < DV)[None, :]
        k_at = k_ptr + row * k_strides[0] + g * k_strides[1] + slot * K_SLOT + beyond * K_SLOT
        k = tl.load(k_at[:, None] + d[None, :] * k_strides[3], mask=k_mask, other=0.0).to(QK_TYPE)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if q_rope_ptr is not None:
            k_rope_mask = exists[:, None] & (dr < DR)[None, :]
            k_rope = tl.load(k_at[:, None] + (D + dr)[None, :] * k_strides[3], mask=k_rope_mask, other=0.0)
            scores = tl.dot(q_rope, k_rope.to(QK_TYPE).T, scores, input_precision="ieee")
        scores *= scale * LOG2_E
        if k_scale_ptr is not None:
            k_scale_at = k_scale_ptr + row * k_scale_strides[0] + g * k_scale_strides[1]
            k_scale = tl.load(k_scale_at + (slot + beyond) * k_scale_strides[2], mask=exists, other=0.0)
            scores *= k_scale[None, :]
        scores = tl.where(exists[None, :], scores, float("-inf"))

        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - finite(new_top)[:, None])
        shrink = tl.exp2(top - finite(new_top))
        if LATE_SUM:  # noqa: SIM108  (the shapes differ)
            total = total * shrink[:, None] + weights
        else:
            total = total * shrink + tl.sum(weights, 1)
        top = new_top

        if v_ptr is None:
            v = k.to(PV_TYPE)  # one latent is key and value
            if k_scale_ptr is not None:
                weights *= k_scale[None, :]
        else:
            v_at = v_ptr + row * v_strides[0] + g * v_strides[1] + slot * V_SLOT + beyond * V_SLOT
            v = tl.load(v_at[:, None] + dv[None, :] * v_strides[3], mask=v_mask, other=0.0).to(PV_TYPE)
            if v_scale_ptr is not None:
                v_scale_at = v_scale_ptr + row * v_scale_strides[0] + g * v_scale_strides[1]
                v_scale = tl.load(v_scale_at + (slot + beyond) * v_scale_strides[2], mask=exists, other=0.0)
                weights *= v_scale[None, :]
        acc = tl.dot(weights.to(PV_TYPE), v, acc * shrink[:, None], input_precision="ieee")

    if LATE_SUM:
        total = tl.sum(total, 1)
    out = acc * (out_scale / tl.where(total != 0, total, 1.0))[:, None]
    lse = log_sum(top, total)
    rows = b * n_kv_heads * GROUP + h
    out_at = out_ptr + b * out_strides[0] + h * out_strides[1]
    if live_splits == 1:
        if sink_ptr is not None:
            with_sink = with_sink_logit(lse, sink_ptr, h * sink_stride, real)
            out *= tl.exp2(lse - finite(with_sink))[:, None]
            lse = with_sink
        out_mask = real[:, None] & (dv < DV)[None, :]
        tl.store(out_at[:, None] + dv[None, :] * out_strides[2], out, mask=out_mask)
        tl.store(lse_ptr + rows, lse * LN_2, mask=real)
    else:
        slots = rows * num_splits
        part_mask = real[:, None] & (dv < DV)[None, :]
        tl.store(part_ptr + (slots + split)[:, None] * DV + dv[None, :], out, mask=part_mask)
        tl.store(part_lse_ptr + slots + split, lse, mask=real)
        family, stride, level, climbing = split, 1, 0, True
        while climbing:
            family = family // (stride * FAN_IN) * (stride * FAN_IN)
            members = tl.cdiv(tl.minimum(live_splits - family, stride * FAN_IN), stride)
            # A family of several at level l begins at a multiple of FAN_IN^(l+1), and has more slots than l.
            ticket_at = tickets_ptr + program * num_splits + family + level
            tl.debug_barrier()  # all threads have stored before one of them draws the ticket
            if members > 1:  # a single member needs no merge
                climbing = tl.atomic_add(ticket_at, 1, sem="acq_rel") == members - 1
                if climbing:
                    tl.store(ticket_at, 0)  # for the next call
                    whole = stride * FAN_IN >= live_splits
                    merge(
                        *(part_ptr, part_lse_ptr, slots, family, stride, members, whole),
                        *(out_at, out_strides[2], lse_ptr + rows, sink_ptr, h * sink_stride, real),
                        *(DV, BLOCK_H, BLOCK_DV),
                    )
                    climbing = not whole
            stride, level = stride * FAN_IN, level + 1


@triton.jit
def program_heads(program, n_kv_heads, GROUP: tl.constexpr, BLOCK_H: tl.constexpr):
    """A program's batch row, KV head and query heads, and which of them exist (tensor cores take 16)."""
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    # Blocks of heads that share a KV head are adjacent, so that the second finds its tiles in the L2.
    pair = program // HEAD_BLOCKS
    b, g = (pair // n_kv_heads).to(tl.int64), (pair % n_kv_heads).to(tl.int64)
    of_group = program % HEAD_BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    real = of_group < GROUP
    if GROUP % BLOCK_H == 0:
        real = tl.full([BLOCK_H], 1, tl.int1)
    return b, g, g * GROUP + of_group, real
