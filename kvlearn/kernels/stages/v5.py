"""v5: one launch. The last split to finish merges.

Each program writes its partial result and then draws a ticket from a counter that belongs to its KV head.
The program that draws the last one knows that all others have written; it merges their partials and resets
the counter to 0 for the next launch. Two things make this safe on a GPU:
- ``tl.debug_barrier()``: all threads of this program have written before one of them draws the ticket;
- ``sem="acq_rel"``: writes before a ticket is drawn (release) are visible to every program that draws a later
  one (acquire), on any multiprocessor.
Nothing is allocated (the workspace is the caller's) and the lengths are in a tensor: the launch can be
recorded in a CUDA graph once and replayed for every token.

Prediction (H200: 132 multiprocessors, 4.3 TB/s; bf16, D=128, H=32, G=4).
- A launch costs about 11 µs of the host's time from Python, 1 to 2 µs in a graph.
- The merge: 33 splits, one wave. The last program of a KV head reads 33 · 8 · 512 bytes = 135 kB alone. Eight
  partials, 32 KiB, are in flight at a time: 5 rounds of some 0.5 µs (they come from the L2, not from memory),
  half a µs for the ticket: 3 µs, where the second launch and its merge cost v3 about 5.
- B=1, N=4k: 8 MB, floor 2 µs. In a graph v3 takes some 9 µs, v5 1 to 3 less for each layer. Called from
  Python, the host's time counts: 11 µs in place of 22, half the time.
- B=1, N=64k: the same 1 to 3 µs, of 40 to 50: within 1.1x of v3.
- MQA 32/1, B=1, N=64k: 132 splits, and the last program reads 132 · 32 · 512 bytes = 2.2 MB alone: 22 µs at
  the 100 GB/s of a multiprocessor, three times the floor of 8 µs. Here v5 takes about twice as long as v3.
  (kvlearn.kernels therefore merges in two levels.)
- v4's long row of 64k beside 31 of 1k: 132 // 128 = 1 split, 0.36 ms, twice as long as v4.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int32
from torch import Tensor

from kvlearn import validate
from kvlearn.kernels.runtime import INTERPRETED, multiprocessors
from kvlearn.kernels.stages.inputs import check
from kvlearn.kernels.stages.v2 import tile


@triton.jit(do_not_specialize=["n_slots"])
def decode_kernel(
    Q, K, V, OUT, PART, LSE, TICKETS, LENGTHS, scale, n_slots,
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

    length = tl.minimum(tl.maximum(tl.load(LENGTHS + b), 0), n_slots)
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

    head = program * GROUP + row
    slot = head * n_splits
    total = tl.where(total > 0, total, 1.0)  # no keys: 0 / 1 = 0, and -inf + log2(1) = -inf
    part = acc / total[:, None]
    tl.store(PART + (slot + split)[:, None] * D + d[None, :], part, mask=in_group)
    tl.store(LSE + slot + split, highest + tl.log2(total), mask=row < GROUP)
    tl.debug_barrier()
    if tl.atomic_add(TICKETS + program, 1, sem="acq_rel") == n_splits - 1:
        tl.store(TICKETS + program, 0)
        highest = tl.full([BLOCK_H], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        for s in tl.range(0, n_splits, num_stages=1, loop_unroll_factor=8):  # eight loads set out together
            lse_s = tl.load(LSE + slot + s, mask=row < GROUP, other=float("-inf"))
            at = (slot + s)[:, None] * D + d[None, :]
            part_s = tl.load(PART + at, mask=in_group, other=0.0)
            higher = tl.maximum(highest, lse_s)
            finite = tl.where(higher == float("-inf"), 0.0, higher)  # a row without keys
            shrink = tl.exp2(highest - finite)
            weight = tl.exp2(lse_s - finite)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + weight[:, None] * part_s
            highest = higher
        merged = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(OUT + head[:, None] * D + d[None, :], merged, mask=in_group)


@dataclass(frozen=True)
class Workspace:
    """Partial outputs and log2-sums of the splits in fp32, and tickets, which are 0 between launches.

    Launches may use the same workspace one after the other, but not at the same time.
    """

    part: Float[Tensor, "B H splits D"]
    lse: Float[Tensor, "B H splits"]
    tickets: Int32[Tensor, " programs"]


def new_workspace(batch: int, n_heads: int, head_dim: int, n_splits: int, device: torch.device) -> Workspace:
    """A workspace for calls of one shape, with ``n_splits`` splits."""
    part = torch.empty(batch, n_heads, n_splits, head_dim, dtype=torch.float32, device=device)
    lse = torch.empty(batch, n_heads, n_splits, dtype=torch.float32, device=device)
    return Workspace(part, lse, torch.zeros(batch * n_heads, dtype=torch.int32, device=device))


def decode(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    lengths: Int[Tensor, " B"],
    *,
    scale: float | None = None,
    n_splits: int | None = None,
    workspace: Workspace | None = None,
    out: Float[Tensor, "B H D"] | None = None,
) -> Float[Tensor, "B H D"]:
    """softmax(q Kᵀ · scale) V over the first ``lengths[b]`` keys of row b: B · G · splits programs.

    fp16, bf16 or fp32; D must be contiguous, other strides are free. ``lengths`` is int32; length 0 gives 0,
    a length above S counts as S. ``n_splits`` is the workspace's, or gives every multiprocessor one program.
    With ``workspace`` and ``out`` (contiguous) nothing is allocated. Raises ValueError or TypeError for
    shapes that do not fit.
    """
    check(q, k, v)
    batch, n_heads, head_dim = q.shape
    n_kv_heads = k.shape[1]
    validate.tensor("lengths", lengths, (batch,), dtype=torch.int32, device=q.device)
    group = n_heads // n_kv_heads
    sizes = tile(group, head_dim, k.element_size())
    if workspace is None:
        room = multiprocessors(q.device) // (batch * n_kv_heads)
        n_splits = n_splits or max(1, min(room, triton.cdiv(k.shape[2], sizes["BLOCK_N"])))
        workspace = new_workspace(batch, n_heads, head_dim, n_splits, q.device)
    n_splits = workspace.part.shape[2]
    validate.tensor("workspace.part", workspace.part, (batch, n_heads, n_splits, head_dim), device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    scale = head_dim**-0.5 if scale is None else scale
    decode_kernel[(batch * n_kv_heads, n_splits)](
        q, k, v, out, workspace.part, workspace.lse, workspace.tickets, lengths,
        scale * math.log2(math.e), k.shape[2],
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        G=n_kv_heads, GROUP=group, D=head_dim, UPCAST=INTERPRETED, **sizes,
    )  # fmt: skip
    return out
