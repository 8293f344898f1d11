"""The baselines of the kernel: torch's own attention, the teaching stages, and other libraries' kernels.

Each takes a case with its inputs and gives a call that computes it. What cannot (not installed, refused, not
made for this case) raises ``Unavailable`` with the reason, or fails in its own words; a row says so.
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

from kvlearn.bench.decode.cases import Case, Inputs
from kvlearn.bench.decode.comparison import Unavailable
from kvlearn.kernels.runtime import multiprocessors

Call = Callable[[], Tensor]
Baseline = Callable[[Case, Inputs], Call]

FLEX = "FlexAttention"
MOST_REPEATED = 32 * 2**30  # bytes: more than that is not set aside for repeated heads


def sdpa_flash(case: Case, x: Inputs) -> Call:
    """torch's scaled_dot_product_attention, pinned to its flash backend, heads grouped by ``enable_gqa``."""
    grouped = case.n_heads != case.n_kv_heads
    if grouped and not flash_takes_groups(x.q.device):
        raise Unavailable("its flash backend refuses grouped heads")
    return partial(_pinned, x.q[:, :, None], x.k, x.v, case.scale, grouped)


def sdpa_flash_expanded(case: Case, x: Inputs) -> Call:
    """The same with the KV heads repeated beforehand, for a torch whose flash backend refuses groups."""
    k, v = _repeated(case, x)
    return partial(_pinned, x.q[:, :, None], k, v, case.scale, False)


def sdpa(case: Case, x: Inputs) -> Call:
    """torch's scaled_dot_product_attention as it comes."""
    grouped = case.n_heads != case.n_kv_heads
    q = x.q[:, :, None]
    return partial(F.scaled_dot_product_attention, q, x.k, x.v, scale=case.scale, enable_gqa=grouped)


def sdpa_masked(case: Case, x: Inputs) -> Call:
    """torch's attention over the whole cache with a mask for the window; it chooses the backend."""
    k, v = _repeated(case, x)
    (length,) = set(case.lengths)
    mask = torch.zeros(1, 1, 1, length, dtype=torch.bool, device=x.q.device)
    mask[..., : case.n_sinks] = True
    mask[..., length - (case.window or length) :] = True
    return partial(F.scaled_dot_product_attention, x.q[:, :, None], k, v, mask, scale=case.scale)


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


def _repeated(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    group = case.n_heads // case.n_kv_heads
    if group == 1:
        return x.k, x.v
    if case.stored * group > MOST_REPEATED:
        raise Unavailable("the repeated KV heads would not fit")
    return x.k.repeat_interleave(group, 1), x.v.repeat_interleave(group, 1)


def stage(name: str) -> Baseline:
    """A teaching stage."""

    def prepare(case: Case, x: Inputs) -> Call:
        from kvlearn.kernels.stages import STAGES

        chosen = STAGES[name]
        if case.others is not None and not chosen.ragged:
            raise Unavailable("one length for all rows")
        length = x.lengths if chosen.ragged else case.length
        options = one_launch(chosen.module, case, x) if name == "v5" else {}
        return partial(chosen.decode, x.q, x.k, x.v, length, scale=case.scale, **options)

    return prepare


def one_launch(module: Any, case: Case, x: Inputs) -> dict[str, Any]:
    """v5's workspace, with which it really is one launch; a split for each multiprocessor, as without it."""
    programs = case.batch * case.n_kv_heads
    splits = max(1, min(multiprocessors(x.q.device) // programs, case.length // 64))
    space = module.new_workspace(case.batch, case.n_heads, case.head_dim, splits, x.q.device)
    return {"workspace": space, "out": torch.empty_like(x.q)}


class Flex:
    """FlexAttention, compiled: its decode path, which takes a short query and splits the context."""

    def __init__(self) -> None:
        self.compiled: dict[Case, Callable[..., Tensor]] = {}

    def __call__(self, case: Case, x: Inputs) -> Call:
        from torch.nn.attention.flex_attention import flex_attention

        if case not in self.compiled:
            torch.compiler.reset()  # else the eighth shape would run uncompiled
            # One kernel needs no pool of compiling processes.
            options: dict[str, Any] = {"compile_threads": 1}
            self.compiled = {case: torch.compile(flex_attention, dynamic=False, options=options)}
        grouped = case.n_heads != case.n_kv_heads
        return partial(self.compiled[case], x.q[:, :, None], x.k, x.v, scale=case.scale, enable_gqa=grouped)


def flashinfer(case: Case, x: Inputs) -> Call:
    """FlashInfer's paged decode, planned beforehand; tensor cores where query heads share."""
    if find_spec("flashinfer") is None:
        raise Unavailable("FlashInfer is not installed")
    if x.table is None or case.latent or case.kind != "bf16":
        raise Unavailable("measured on paged bf16 caches only")
    decode = import_module("flashinfer")
    batch, pages = x.table.shape
    device = x.q.device
    room = torch.empty(128 * 2**20, dtype=torch.uint8, device=device)
    grouped = case.n_heads >= 4 * case.n_kv_heads
    wrapper = decode.BatchDecodeWithPagedKVCacheWrapper(room, "HND", use_tensor_cores=grouped)
    wrapper.plan(
        torch.arange(0, batch * pages + 1, pages, dtype=torch.int32, device=device),
        x.table.flatten(),
        torch.full((batch,), case.page, dtype=torch.int32, device=device),
        case.n_heads,
        case.n_kv_heads,
        case.head_dim,
        case.page,
        q_data_type=x.q.dtype,
        kv_data_type=x.k.dtype,
        sm_scale=case.scale,
    )
    return partial(wrapper.run, x.q, (x.k, x.v))


VLLM = ("vllm.v1.attention.ops.triton_decode_attention", "vllm.attention.ops.triton_decode_attention")
VLLM_SPLITS = 8


def vllm_triton(case: Case, x: Inputs) -> Call:
    """vLLM's Triton decode kernel, on its own layout (blocks, page, G, D), copied beforehand."""
    if find_spec("vllm") is None:
        raise Unavailable("vLLM is not installed")
    if x.table is None or case.latent or case.kind != "bf16":
        raise Unavailable("measured on paged bf16 caches only")
    found = next((name for name in VLLM if _exists(name)), None)
    if found is None:
        raise Unavailable("this vLLM has no triton_decode_attention")
    k, v = x.k.transpose(1, 2).contiguous(), x.v.transpose(1, 2).contiguous()
    out = torch.empty_like(x.q)
    rows = (case.batch, case.n_heads)
    lse = torch.empty(rows, dtype=torch.float32, device=x.q.device)
    partial_results = torch.empty(
        *rows, VLLM_SPLITS, case.head_dim + 1, dtype=torch.float32, device=x.q.device
    )
    forward = import_module(found).decode_attention_fwd
    arguments = (x.q, k, v, out, lse, x.table, x.lengths, partial_results, VLLM_SPLITS, case.scale, case.page)

    def call() -> Tensor:
        forward(*arguments)
        return out

    return call


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


LIBRARIES: dict[str, tuple[str, Baseline]] = {
    "FlashInfer": ("flashinfer", flashinfer),
    "vLLM's Triton kernel": ("vllm", vllm_triton),
}


def installed_libraries() -> dict[str, Baseline]:
    """Those that are installed, by name."""
    return {
        name: baseline for name, (package, baseline) in LIBRARIES.items() if find_spec(package) is not None
    }
