"""Merges partial results of attention: the kernel's form of ``kvlearn.attention.core.merge``.

    lse = log2 Σ_i exp2(lse_i),   out = Σ_i exp2(lse_i - lse) · out_i

Sources: Milakov & Gimelshein, "Online normalizer calculation for softmax" (2018), section 3.1; Dao et al.,
"Flash-Decoding" (2023).
"""

import kvlearn.kernels.runtime  # noqa: F401  (before triton: it sets whether Triton interprets)

import triton  # isort: skip
import triton.language as tl  # isort: skip

LOG2_E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x · log2 e): the hardware computes exp2
LN_2 = tl.constexpr(0.6931471805599453)
FAN_IN = tl.constexpr(16)  # partial results that one program merges, at most


@triton.jit
def merge(
    part_ptr,
    part_lse_ptr,
    slots,  # (BLOCK_H,): where each row's partial results begin
    family,  # of the first one; the merged result is written there unless it is final
    stride,  # from one partial result to the next
    members,
    whole,
    out_at,
    out_stride,
    lse_at,
    sink_ptr,
    sink_at,
    real,
    DV: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Merge ``members`` partial results by their log-sum-exp, a few columns at a time.

    ``.cg`` bypasses the L1, which may hold outdated numbers of another program.
    """
    member = tl.arange(0, FAN_IN)
    lses_at = part_lse_ptr + slots[:, None] + (family + member * stride)[None, :]
    lses_mask = real[:, None] & (member < members)[None, :]
    lses = tl.load(lses_at, mask=lses_mask, other=float("-inf"), cache_modifier=".cg")
    top = tl.max(lses, 1)
    lse = log_sum(top, tl.sum(tl.exp2(lses - finite(top)[:, None]), 1))
    if sink_ptr is not None:
        lse = tl.where(whole, with_sink_logit(lse, sink_ptr, sink_at, real), lse)
    COLUMNS: tl.constexpr = min(BLOCK_DV, 2048 // BLOCK_H)
    for column in range(0, DV, COLUMNS):
        c = column + tl.arange(0, COLUMNS)
        mask = real[:, None] & (c < DV)[None, :]
        merged = tl.zeros([BLOCK_H, COLUMNS], tl.float32)
        for i in tl.range(0, members, num_stages=1, loop_unroll_factor=4):
            slot = slots + family + i * stride
            part_lse = tl.load(part_lse_ptr + slot, mask=real, other=float("-inf"), cache_modifier=".cg")
            part_at = part_ptr + slot[:, None] * DV + c[None, :]
            part = tl.load(part_at, mask=mask, other=0.0, cache_modifier=".cg")
            merged += tl.exp2(part_lse - finite(lse))[:, None] * part
        if whole:
            tl.store(out_at[:, None] + c[None, :] * out_stride, merged, mask=mask)
        else:
            tl.store(part_ptr + (slots + family)[:, None] * DV + c[None, :], merged, mask=mask)
    tl.debug_barrier()  # no thread overwrites a log-sum-exp that another has not read yet
    if whole:
        tl.store(lse_at, lse * LN_2, mask=real)
    else:
        tl.store(part_lse_ptr + slots + family, lse, mask=real)


@triton.jit
def finite(lse):
    """-inf replaced by 0, so that exp2(-inf - lse) is 0 where it would be NaN."""
    return tl.where(lse == float("-inf"), 0.0, lse)


@triton.jit
def log_sum(top, total):
    """log2 of Σ exp2(score), from the largest score and the sum relative to it; -inf for no keys."""
    return tl.where(total != 0, top + tl.log2(tl.where(total != 0, total, 1.0)), float("-inf"))


@triton.jit
def with_sink_logit(lse, sink_ptr, sink_at, real):
    """The learned sink logit in the log-sum-exp: log2(exp2(lse) + exp2(sink))."""
    sink = tl.load(sink_ptr + sink_at, mask=real, other=float("-inf")).to(tl.float32) * LOG2_E
    top = tl.maximum(lse, sink)
    return log_sum(top, tl.exp2(lse - finite(top)) + tl.exp2(sink - finite(top)))
