"""Launches the kernel for a request: tiling, splits, and the workspace for partial results."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvlearn import validate
from kvlearn.kernels.inputs import Request
from kvlearn.kernels.runtime import INTERPRETED, capability, multiprocessors, require_triton, shared_memory
from kvlearn.kernels.tiling import Tiling, choose_latent_tiling, choose_splits, choose_tiling

REGISTERS = 65_536  # per multiprocessor, on every GPU since 2014
RESERVED = 1024  # bytes of shared memory per program that the system takes
MOST_SPLITS = 65_535  # the limit of a grid's second axis
THREADS_REGISTERS = 128  # per thread of this kernel, approximately


@dataclass(frozen=True)
class Workspace:
    """Buffers of a step other than its output, for calls that must not allocate: made once, used often.

    Partial results of the splits, ``parts`` (rows · splits · width) and ``part_lses`` (rows · splits), and
    ``lse`` (rows), all fp32; ``tickets`` (rows · splits) in int32, zero between calls. One workspace serves
    one stream at a time.
    """

    parts: Tensor
    part_lses: Tensor
    tickets: Tensor
    lse: Tensor

    def __post_init__(self) -> None:
        for name, buffer in vars(self).items():
            dtype = torch.int32 if name == "tickets" else torch.float32
            validate.tensor(f"workspace.{name}", buffer, ("numbers",), dtype=dtype)
            if not buffer.is_contiguous():
                raise ValueError(
                    f"workspace.{name}: expected a contiguous tensor, got stride {buffer.stride(0)}"
                )

    @classmethod
    def new(
        cls, batch: int, n_heads: int, head_dim: int, max_splits: int, device: torch.device | str
    ) -> "Workspace":
        """For steps of up to ``batch`` rows, ``n_heads`` query heads and ``head_dim`` numbers per value.

        A step uses at most ``max_splits`` splits per row.
        """
        device = validate.device("device", device)
        batch, n_heads = validate.positive("batch", batch), validate.positive("n_heads", n_heads)
        slots = batch * n_heads * validate.positive("max_splits", max_splits)
        return cls(
            torch.empty(slots * validate.positive("head_dim", head_dim), device=device),
            torch.empty(slots, device=device),
            torch.zeros(slots, dtype=torch.int32, device=device),
            torch.empty(batch * n_heads, device=device),
        )

    def max_splits(self, request: Request) -> int:
        """The most splits that fit this workspace."""
        rows, slots = request.batch * request.n_heads, min(self.tickets.numel(), self.part_lses.numel())
        most = min(slots // rows, self.parts.numel() // (rows * request.value_dim))
        if most < 1 or {t.device for t in vars(self).values()} != {request.q.device}:
            raise ValueError(
                f"workspace: expected room for {rows} rows of {request.value_dim} on {request.q.device}, got "
                f"{slots} slots and {self.parts.numel()} numbers on {self.parts.device}"
            )
        return most


def tiling_for(request: Request) -> Tiling:
    """The tiling that this request runs with."""
    limit, row_bytes = shared_memory(request.q.device), tile_bytes(request)
    fp32 = request.q.dtype == torch.float32
    if request.v is None:
        card = capability(request.q.device)
        return choose_latent_tiling(
            request.n_heads, row_bytes, query_bytes(request), request.page, limit, card, fp32
        )
    return choose_tiling(request.group, row_bytes, request.k.element_size(), request.page, limit, fp32)


def tile_bytes(request: Request) -> int:
    """Bytes of shared memory per key in a tile: padded widths, and a converted copy where only queries are
    fp32."""
    width = padded(request.q.shape[2])
    width += padded(request.value_dim) if request.q_rope is None else padded(request.q_rope.shape[2])
    converted = request.q.element_size() if request.k.dtype != request.q.dtype == torch.float32 else 0
    return width * (request.k.element_size() + converted)


def query_bytes(request: Request) -> int:
    """Bytes of shared memory per query head."""
    rope = padded(request.q_rope.shape[2]) if request.q_rope is not None else 0
    return (padded(request.q.shape[2]) + rope) * request.q.element_size()


def splits_for(request: Request, tiling: Tiling) -> int:
    """The number of splits for this GPU, by the cache's capacity: reading the lengths would synchronise."""
    device = request.q.device
    used = tiling.shared_bytes(tile_bytes(request), query_bytes(request), request.page) + RESERVED
    by_registers = REGISTERS // (tiling.num_warps * 32 * THREADS_REGISTERS)
    resident = max(min((shared_memory(device) + RESERVED) // used, by_registers), 1)
    reach = request.capacity
    if request.window is not None:
        reach = min(request.window + request.n_sinks, reach)
    tiles = -(-reach // tiling.block_n)
    return choose_splits(programs_for(request, tiling), tiles, multiprocessors(device), resident)


def programs_for(request: Request, tiling: Tiling) -> int:
    """Programs of one split."""
    return request.batch * request.n_kv_heads * -(-request.group // tiling.block_h)


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
    from triton.runtime.errors import OutOfResources

    tiling = tiling or tiling_for(request)
    splits = num_splits or splits_for(request, tiling)
    splits = min(splits, -(-request.capacity // tiling.block_n), MOST_SPLITS)  # at least one tile per split
    if workspace is not None:
        splits = min(splits, workspace.max_splits(request))
    elif splits > 1:
        workspace = Workspace.new(request.batch, request.n_heads, request.value_dim, splits, request.q.device)
    with on_device(request.q.device):
        while True:
            try:
                return _launch(request, out, lse, splits, workspace, tiling)
            except OutOfResources:  # a tile's shared memory was estimated; the compiler knows it
                if tiling.block_n <= 16:
                    raise
                tiling = replace(tiling, block_n=tiling.block_n // 2)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make the tensors' GPU the current one: Triton launches there."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _launch(
    request: Request, out: Tensor, lse: Tensor, splits: int, workspace: Workspace | None, tiling: Tiling
) -> None:
    from kvlearn.kernels.kernel import decode_kernel

    q, q_rope, k, v, table = request.q, request.q_rope, request.k, request.v, request.block_table
    # A single split does not use these.
    parts, part_lses, tickets = lse, lse, request.lengths
    if workspace is not None:
        parts, part_lses, tickets = workspace.parts, workspace.part_lses, workspace.tickets
    window = None if request.window is None else min(request.window, request.capacity)
    decode_kernel[(programs_for(request, tiling), splits)](
        *(q, q_rope, k, v, request.lengths, table, request.k_scale, request.v_scale),
        *(request.sink_logits, out, lse, parts, part_lses, tickets),
        *(request.scale, request.out_scale, window, min(request.n_sinks, request.capacity)),
        *(request.capacity, k.shape[0], request.n_kv_heads, splits, request.lengths.stride(0)),
        request.sink_logits.stride(0) if request.sink_logits is not None else 0,
        *(table.stride() if table is not None else (0, 0)),
        *(strides(t) for t in (q, q_rope, k, v, request.k_scale, request.v_scale, out)),
        D=q.shape[2],
        DV=request.value_dim,
        DR=q_rope.shape[2] if q_rope is not None else 0,
        GROUP=request.group,
        PAGE=request.page or 1,
        K_SLOT=k.stride(2),
        V_SLOT=v.stride(2) if v is not None else 0,
        **number_types(request),
        BLOCK_H=tiling.block_h,
        BLOCK_N=tiling.block_n,
        BLOCK_D=padded(q.shape[2]),
        BLOCK_DV=padded(request.value_dim),
        BLOCK_DR=padded(q_rope.shape[2]) if q_rope is not None else 16,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **compiler_options(k.element_size(), tiling),
    )


def number_types(request: Request) -> dict[str, object]:
    """The number types in which scores, and products of weights and values, are computed."""
    import triton.language as tl

    of = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    scores = values = request.q.dtype
    if scores == torch.float16 and (request.v_scale is not None or request.k_scale is not None):
        values = (
            torch.bfloat16
        )  # a weight times a scale may be too small for fp16; bf16 holds int8 and fp8 exactly
    if INTERPRETED:  # its arithmetic in bf16 is wrong
        scores, values = (torch.float32 if t == torch.bfloat16 else t for t in (scores, values))
    return {"QK_TYPE": of[scores], "PV_TYPE": of[values]}


def compiler_options(itemsize: int, tiling: Tiling) -> dict[str, str]:
    """Options for ptxas, which by default saves registers to fit one more program, and spills for that.

    Level 10 of 10 uses more registers. It helps with 2-byte numbers; fp32, int8 and 64 rows spill with it.
    """
    if INTERPRETED or itemsize != 2 or tiling.block_h >= 64:
        return {}
    return {"ptx_options": "--register-usage-level=10"}


def strides(t: Tensor | None) -> tuple[int, ...] | None:
    return None if t is None else t.stride()


def padded(width: int) -> int:
    """The next power of two that the tensor cores take."""
    return max(16, 1 << (width - 1).bit_length())
