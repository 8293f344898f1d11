"""The operator ``kvlearn::decode``: one decode step for ``torch.compile`` and CUDA graphs."""

import torch
from torch import Tensor

from kvlearn.kernels.inputs import Request, check_memory
from kvlearn.kernels.launch import Workspace, launch
from kvlearn.kernels.reference import decode_reference


def fill(
    request: Request,
    out: Tensor,
    lse: Tensor,
    workspace: Workspace | None,
    num_splits: int | None,
    backend: str,
) -> None:
    """Write one decode step to ``out`` and ``lse``, by the kernel ("triton") or in PyTorch ("torch")."""
    if backend == "torch":
        decode_reference(request, out, lse)
    else:
        launch(request, out, lse, num_splits, workspace)


@torch.library.custom_op("kvlearn::decode", mutates_args=("out", "lse", "parts", "part_lses", "tickets"))
def decode_operator(
    q: Tensor,
    q_rope: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    lengths: Tensor,
    scale: float,
    window: int | None,
    n_sinks: int,
    sink_logits: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out_scale: float,
    out: Tensor,
    lse: Tensor,
    parts: Tensor | None,
    part_lses: Tensor | None,
    tickets: Tensor | None,
    num_splits: int | None,
    backend: str,
) -> None:
    """``fill`` with the request's fields as arguments: an operator takes tensors and numbers only."""
    keys = (scale, window, n_sinks, sink_logits, block_table, k_scale, v_scale, out_scale)
    workspace = None
    if parts is not None and part_lses is not None and tickets is not None:
        workspace = Workspace(parts, part_lses, tickets, lse.flatten())
    check_memory("out", out)  # strides may be symbols while the call is traced
    fill(Request(q, q_rope, k, v, lengths, *keys), out, lse, workspace, num_splits, backend)


@decode_operator.register_fake
def _(*_: object) -> None:
    """It writes to its arguments, so it has no output shape."""
