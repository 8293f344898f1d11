"""The keyword arguments of a decode step, for type checkers: ``return_lse`` sets the return type."""

from typing import Literal, TypedDict

from torch import Tensor

from kvlearn.kernels.launch import Workspace

Backend = Literal["auto", "torch", "triton"]


class LatentOptions(TypedDict, total=False):
    """Keyword arguments of ``decode_latent``."""

    scale: float | None
    window: int | None
    n_sinks: int
    sink_logits: Tensor | None
    block_table: Tensor | None
    k_scale: float | Tensor | None
    num_splits: int | None
    out: Tensor | None
    workspace: Workspace | None
    backend: Backend
    validate: bool | None


class DecodeOptions(LatentOptions, total=False):
    """Keyword arguments of ``decode_attention``."""

    v_scale: float | Tensor | None
