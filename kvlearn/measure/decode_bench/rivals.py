"""Those that the kernel is measured against: torch's own, the teaching stages, and other libraries' kernels.

Each takes a cell with its inputs and gives a call that computes it. What cannot (not installed, refused, not
made for this cell) raises ``Unable`` with the reason, or fails in its own words; the contest notes it.
"""

import functools
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvlearn.kernels.runtime import multiprocessors
from kvlearn.measure.decode_bench.cells import Cell
from kvlearn.measure.decode_bench.inputs import Inputs

Call = Callable[[], Tensor]
Rival = Callable[[Cell, Inputs], Call]

EXPANDED = 32 * 2**30  # bytes: more than that is not set aside for repeated heads


class Unable(RuntimeError):
    """A rival that does not take part in this cell, and why."""


def sdpa_flash(cell: Cell, x: Inputs) -> Call:
    """torch's scaled_dot_product_attention, pinned to its flash backend, heads grouped by ``enable_gqa``."""
    grouped = cell.n_heads != cell.n_kv_heads
    if grouped and not flash_takes_groups(x.q.device):
        raise Unable("its flash backend refuses grouped heads")
    return partial(_pinned, x.q[:, :, None], x.k, x.v, cell.scale, grouped)


def sdpa_flash_expanded(cell: Cell, x: Inputs) -> Call:
    """The same with the KV heads repeated beforehand, for a torch whose flash backend refuses groups."""
    k, v = _repeated(cell, x)
    return partial(_pinned, x.q[:, :, None], k, v, cell.scale, False)


def sdpa(cell: Cell, x: Inputs) -> Call:
    """torch's scaled_dot_product_attention as it comes."""
    grouped = cell.n_heads != cell.n_kv_heads
    q = x.q[:, :, None]
    return partial(F.scaled_dot_product_attention, q, x.k, x.v, scale=cell.scale, enable_gqa=grouped)


def sdpa_masked(cell: Cell, x: Inputs) -> Call:
    """torch's attention over the whole cache with a mask for the window; it chooses the backend."""
    k, v = _repeated(cell, x)
    (length,) = set(cell.lengths)
    mask = torch.zeros(1, 1, 1, length, dtype=torch.bool, device=x.q.device)
    mask[..., : cell.n_sinks] = True
    mask[..., length - (cell.window or length) :] = True
    return partial(F.scaled_dot_product_attention, x.q[:, :, None], k, v, mask, scale=cell.scale)


@functools.cache
def flash_takes_groups(device: torch.device) -> bool:
    """Whether torch's flash backend takes ``enable_gqa``; unpinned, a refusal would go unnoticed."""
    q = torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16, device=device)
    try:
        _pinned(q, q[:, :1], q[:, :1], 1.0, grouped=True)
    except RuntimeError:
        return False
    return True


def _pinned(q: Tensor, k: Tensor, v: Tensor, scale: float, grouped: bool) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)


def _repeated(cell: Cell, x: Inputs) -> tuple[Tensor, Tensor]:
    group = cell.n_heads // cell.n_kv_heads
    if group == 1:
        return x.k, x.v
    if cell.stored * group > EXPANDED:
        raise Unable("the repeated KV heads would not fit")
    return x.k.repeat_interleave(group, 1), x.v.repeat_interleave(group, 1)


def stage(name: str) -> Rival:
    """A teaching stage."""

    def prepare(cell: Cell, x: Inputs) -> Call:
        from kvlearn.kernels.stages import STAGES

        chosen = STAGES[name]
        if cell.others is not None and not chosen.ragged:
            raise Unable("one length for all rows")
        length = x.lengths if chosen.ragged else cell.length
        options = one_launch(chosen.module, cell, x) if name == "v5" else {}
        return partial(chosen.decode, x.q, x.k, x.v, length, scale=cell.scale, **options)

    return prepare


def one_launch(module: Any, cell: Cell, x: Inputs) -> dict[str, Any]:
    """v5's workspace, with which it really is one launch; a split for each multiprocessor, as without it."""
    programs = cell.batch * cell.n_kv_heads
    splits = max(1, min(multiprocessors(x.q.device) // programs, cell.length // 64))
    space = module.new_workspace(cell.batch, cell.n_heads, cell.head_dim, splits, x.q.device)
    return {"workspace": space, "out": torch.empty_like(x.q)}


class Flex:
    """FlexAttention, compiled: its decode path, which takes a short query and splits the context."""

    def __init__(self) -> None:
        self.compiled: dict[Cell, Callable[..., Tensor]] = {}

    def __call__(self, cell: Cell, x: Inputs) -> Call:
        from torch.nn.attention.flex_attention import flex_attention

        if cell not in self.compiled:
            torch.compiler.reset()  # else the eighth shape would run uncompiled
            # One kernel needs no pool of compiling processes.
            options: dict[str, Any] = {"compile_threads": 1}
            self.compiled = {cell: torch.compile(flex_attention, dynamic=False, options=options)}
        grouped = cell.n_heads != cell.n_kv_heads
        return partial(self.compiled[cell], x.q[:, :, None], x.k, x.v, scale=cell.scale, enable_gqa=grouped)


def flashinfer(cell: Cell, x: Inputs) -> Call:
    """FlashInfer's paged decode, planned beforehand; tensor cores where query heads share."""
    if find_spec("flashinfer") is None:
        raise Unable("FlashInfer is not installed")
    if x.table is None or cell.latent or cell.kind != "bf16":
        raise Unable("measured on paged bf16 caches only")
    decode = import_module("flashinfer")
    batch, pages = x.table.shape
    device = x.q.device
    room = torch.empty(128 * 2**20, dtype=torch.uint8, device=device)
    grouped = cell.n_heads >= 4 * cell.n_kv_heads
    wrapper = decode.BatchDecodeWithPagedKVCacheWrapper(room, "HND", use_tensor_cores=grouped)
    wrapper.plan(
        torch.arange(0, batch * pages + 1, pages, dtype=torch.int32, device=device),
        x.table.flatten(),
        torch.full((batch,), cell.page, dtype=torch.int32, device=device),
        cell.n_heads,
        cell.n_kv_heads,
        cell.head_dim,
        cell.page,
        q_data_type=x.q.dtype,
        kv_data_type=x.k.dtype,
        sm_scale=cell.scale,
    )
    return partial(wrapper.run, x.q, (x.k, x.v))


VLLM = ("vllm.v1.attention.ops.triton_decode_attention", "vllm.attention.ops.triton_decode_attention")
VLLM_SPLITS = 8


def vllm_triton(cell: Cell, x: Inputs) -> Call:
    """vLLM's Triton decode kernel, on its own layout (blocks, page, G, D), copied beforehand."""
    if find_spec("vllm") is None:
        raise Unable("vLLM is not installed")
    if x.table is None or cell.latent or cell.kind != "bf16":
        raise Unable("measured on paged bf16 caches only")
    found = next((name for name in VLLM if _exists(name)), None)
    if found is None:
        raise Unable("this vLLM has no triton_decode_attention")
    k, v = x.k.transpose(1, 2).contiguous(), x.v.transpose(1, 2).contiguous()
    out = torch.empty_like(x.q)
    rows = (cell.batch, cell.n_heads)
    lse = torch.empty(rows, dtype=torch.float32, device=x.q.device)
    partial_results = torch.empty(
        *rows, VLLM_SPLITS, cell.head_dim + 1, dtype=torch.float32, device=x.q.device
    )
    forward = import_module(found).decode_attention_fwd
    arguments = (x.q, k, v, out, lse, x.table, x.lengths, partial_results, VLLM_SPLITS, cell.scale, cell.page)

    def call() -> Tensor:
        forward(*arguments)
        return out

    return call


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
