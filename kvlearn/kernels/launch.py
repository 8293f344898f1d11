"""From a request to a launch of the kernel: tiling, splits, and the room in which the splits meet."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvlearn import expect
from kvlearn.kernels.inputs import Request
from kvlearn.kernels.runtime import INTERPRETED, capability, multiprocessors, require_triton, shared_memory
from kvlearn.kernels.tiling import Tiling, choose_latent_tiling, choose_splits, choose_tiling

REGISTERS = 65_536  # of a multiprocessor, on every card since 2014
THREADS_REGISTERS = 128  # that a thread of this kernel needs, about


@dataclass(frozen=True)
class Workspace:
    """Room for what a step needs beside its output, for calls that must not allocate: made once, used often.

    Partial results of the splits, ``parts`` (rows · splits · width) and ``part_lses`` (rows · splits), and
    ``lse`` (rows), all fp32; ``tickets`` (rows · splits) in int32, zero between calls. One workspace serves
    one stream at a time.
    """

    parts: Tensor
    part_lses: Tensor
    tickets: Tensor
    lse: Tensor

    @classmethod
    def new(
        cls, batch: int, n_heads: int, head_dim: int, max_splits: int, device: torch.device | str
    ) -> "Workspace":
        """Room for steps of ``batch`` rows, ``n_heads`` query heads and values ``head_dim`` wide, or smaller.

        A step whose rows would be cut into more pieces than ``max_splits`` is cut into that many.
        """
        expect.positive("batch", batch)
        expect.positive("n_heads", n_heads)
        slots = batch * n_heads * expect.positive("max_splits", max_splits)
        return cls(
            torch.empty(slots * expect.positive("head_dim", head_dim), device=device),
            torch.empty(slots, device=device),
            torch.zeros(slots, dtype=torch.int32, device=device),
            torch.empty(batch * n_heads, device=device),
        )

    def max_splits(self, request: Request) -> int:
        """The most splits that this workspace has room for."""
        rows = request.batch * request.n_heads
        most = min(self.tickets.numel() // rows, self.parts.numel() // (rows * request.value_dim))
        if most < 1 or self.parts.device != request.q.device:
            raise ValueError(
                f"workspace: expected room for {rows} rows of {request.value_dim} on {request.q.device}, got "
                f"{self.tickets.numel()} slots and {self.parts.numel()} numbers on {self.parts.device}"
            )
        return most


def tiling_for(request: Request) -> Tiling:
    """The tiling that this request runs with."""
    limit = shared_memory(request.q.device)
    itemsize, width = request.k.element_size(), request.k.shape[3]
    if request.v is None:
        query_bytes = width * request.q.element_size()
        card = capability(request.q.device)
        return choose_latent_tiling(request.n_heads, width * itemsize, query_bytes, request.page, limit, card)
    row_bytes = (width + request.value_dim) * itemsize
    return choose_tiling(request.group, row_bytes, itemsize, request.page, limit)


def splits_for(request: Request, tiling: Tiling) -> int:
    """How many splits fill this machine; decided by the cache's room, since the lengths are on the GPU."""
    device = request.q.device
    row_bytes = (
        request.k.shape[3] + (request.value_dim if request.v is not None else 0)
    ) * request.k.element_size()
    by_memory = shared_memory(device) // tiling.shared_bytes(row_bytes, 0, request.page)
    by_registers = REGISTERS // (tiling.num_warps * 32 * THREADS_REGISTERS)
    programs = request.batch * request.n_kv_heads * -(-request.group // tiling.block_h)
    reach = (
        request.capacity
        if request.window is None
        else min(request.window + request.n_sinks, request.capacity)
    )
    resident = max(min(by_memory, by_registers), 1)
    return choose_splits(programs, -(-reach // tiling.block_n), multiprocessors(device), resident)


def launch(
    request: Request,
    out: Tensor,
    lse: Tensor,
    num_splits: int | None = None,
    workspace: Workspace | None = None,
    tiling: Tiling | None = None,
) -> None:
    """Run the kernel; ``out`` (B, H, Dv) and ``lse`` (B, H), contiguous fp32, receive the result."""
    require_triton()
    from kvlearn.kernels.kernel import decode_kernel

    tiling = tiling or tiling_for(request)
    splits = num_splits or splits_for(request, tiling)
    if workspace is not None:
        splits = min(splits, workspace.max_splits(request))
    elif splits > 1:
        workspace = Workspace.new(request.batch, request.n_heads, request.value_dim, splits, request.q.device)
    # A single split touches none of these.
    parts, part_lses, tickets = lse, lse, request.lengths
    if workspace is not None:
        parts, part_lses, tickets = workspace.parts, workspace.part_lses, workspace.tickets
    q, q_rope, k, v = request.q, request.q_rope, request.k, request.v
    width, rope_width = q.shape[2], q_rope.shape[2] if q_rope is not None else 0
    programs = request.batch * request.n_kv_heads * -(-request.group // tiling.block_h)
    decode_kernel[(programs, splits)](
        *(q, q_rope, k, v, request.lengths, request.block_table, request.k_scale, request.v_scale),
        *(request.sink_logits, out, lse, parts, part_lses, tickets),
        *(request.scale, request.window, request.n_sinks, request.capacity, k.shape[0]),
        *(request.n_kv_heads, splits, request.lengths.stride(0)),
        *(strides(t) for t in (q, q_rope, k, v, request.block_table, request.k_scale, request.v_scale, out)),
        D=width,
        DV=request.value_dim,
        DR=rope_width,
        GROUP=request.group,
        PAGE=request.page or 1,
        K_SLOT=k.stride(2),
        V_SLOT=v.stride(2) if v is not None else 0,
        BLOCK_H=tiling.block_h,
        BLOCK_N=tiling.block_n,
        BLOCK_D=padded(width),
        BLOCK_DV=padded(request.value_dim),
        BLOCK_DR=padded(rope_width),
        UPCAST=INTERPRETED,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **compiler_options(request.k.element_size(), tiling),
    )


def compiler_options(itemsize: int, tiling: Tiling) -> dict[str, str]:
    """What ptxas must be told: left alone it saves registers, to fit one more program, at the price of spills.

    Level 10 of 10 spends them. Numbers of two bytes want it; fp32, int8 and 64 rows spill with it.
    """
    if INTERPRETED or itemsize != 2 or tiling.block_h >= 64:
        return {}
    return {"ptx_options": "--register-usage-level=10"}


def strides(t: Tensor | None) -> tuple[int, ...] | None:
    return None if t is None else t.stride()


def padded(width: int) -> int:
    """The next power of two that the tensor cores take."""
    return max(16, 1 << (width - 1).bit_length())
