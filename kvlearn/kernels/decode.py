"""One decode step of attention over a cache, for all common layouts and number formats.

    out_bh = Σ_s w_s v_s,   w = softmax over the row's live keys s of (scale · q_bh · k_s)

A GPU runs the Triton kernel of kernel.py, a CPU its PyTorch form; both write the same two tensors. Under
``torch.compile`` a step is one operator, ``kvlearn::decode``, whose inside is not traced.
"""

from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from kvlearn import validate as checks
from kvlearn.kernels.inputs import (
    Request,
    check_caches,
    check_memory,
    check_shapes,
    check_values,
    number,
    split_scale,
    validate_tensors,
)
from kvlearn.kernels.launch import Workspace
from kvlearn.kernels.operator import decode_operator, fill
from kvlearn.kernels.options import Backend, DecodeOptions, LatentOptions


@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[DecodeOptions],
) -> Tensor: ...


@overload
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[DecodeOptions],
) -> tuple[Tensor, Tensor]: ...


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    n_sinks: int = 0,
    sink_logits: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    num_splits: int | None = None,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
    validate: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one new token per row over its cache: (B, H, D), in the dtype of ``q``.

    Query head h reads KV head h // (H / G): MHA with G = H, GQA at any ratio, MQA with G = 1. Any strides.

    q: (B, H, D) in fp16, bf16 or fp32. k_cache, v_cache: (B, G, S, D), or with a ``block_table``
    (pages, G, page, D), in any of these types, fp8 (e4m3, e5m2) or int8. lengths: (B,) int32, tokens in each
    row's cache, this one included; 0 gives 0 and a log-sum-exp of -inf. Slots past a row's length are never
    used, even if they hold NaN.

    scale: of the scores, 1/√D unless given. window: only the last ``window`` tokens, this one included, and
    in addition the first ``n_sinks``, which keep their positions. sink_logits: (H,), one more score per head,
    without a value. block_table: (B, pages per row) int32; entries past a row's length are ignored. k_scale,
    v_scale: factors of the cached numbers: a number, (G,), or one per key in the cache's shape without D;
    required for int8.

    num_splits: splits of a row's context, by the GPU's size unless given. out: (B, H, D) to write to.
    workspace: a ``Workspace``; with it and ``out`` a call allocates only the log-sum-exp that it returns.
    return_lse: return the natural log-sum-exp too, (B, H) fp32, by which such results merge. backend:
    "triton" on a CPU runs the interpreter. validate: check the values of lengths and tables too, which
    synchronises with a GPU; by default on CPUs only. Without it both are masked: a wrong table gives a wrong
    result, never a read out of range.

    No gradient is computed. The first call for each layout and format compiles: make it before capturing a
    CUDA graph.

    Raises ValueError or TypeError that names the argument.
    """
    validate_tensors(q=q, k_cache=k_cache, v_cache=v_cache, lengths=lengths)
    check_caches(k_cache, v_cache)
    k_factor, k_scale = split_scale("k_scale", k_scale, k_cache)
    v_factor, v_scale = split_scale("v_scale", v_scale, v_cache)
    checks.tensor("q", q, ("batch", "heads", "width"))
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else number("scale", scale)
    keys = (window, n_sinks, sink_logits, block_table, k_scale, v_scale)
    request = Request(q, None, k_cache, v_cache, lengths, scale * k_factor, *keys, out_scale=v_factor)
    return _decode(request, num_splits, out, workspace, return_lse, backend, validate)


@overload
def decode_latent(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    lengths: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[LatentOptions],
) -> Tensor: ...


@overload
def decode_latent(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    lengths: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[LatentOptions],
) -> tuple[Tensor, Tensor]: ...


def decode_latent(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    n_sinks: int = 0,
    sink_logits: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    num_splits: int | None = None,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
    validate: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Absorbed latent attention (MLA) of one new token per row: (B, H, R), to be multiplied by W_uv.

        score_s = scale · (q_latent · c_s + q_rope · r_s),   out = Σ_s softmax(score)_s c_s

    A cached row is one latent c of R numbers, key and value of all heads, and a rotated part r of Dr numbers.
    Each row is read once and used twice.

    q_latent: (B, H, R), the queries times W_uk. q_rope: (B, H, Dr). cache: (B, S, R + Dr), or with a
    ``block_table`` (pages, page, R + Dr). scale: pass the scale of the heads before absorption, 1/√192 in
    DeepSeek-V3; the default is 1/√(R + Dr), by the width of the products here. k_scale: a number, or one per
    key in the cache's shape without the last dimension. Other arguments as in ``decode_attention``.

    Source: DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1 and appendix C.
    """
    validate_tensors(q_latent=q_latent, q_rope=q_rope, lengths=lengths)
    cache = checks.tensor("cache", cache, ("rows", "slots", "width")).unsqueeze(1)
    factor, k_scale = split_scale("k_scale", k_scale, cache, latent=True)
    scale = max(cache.shape[-1], 1) ** -0.5 if scale is None else number("scale", scale)
    keys = (window, n_sinks, sink_logits, block_table, k_scale, None)
    request = Request(q_latent, q_rope, cache, None, lengths, scale * factor, *keys, out_scale=factor)
    return _decode(request, num_splits, out, workspace, return_lse, backend, validate)


def validate_decode_inputs(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    n_sinks: int = 0,
    sink_logits: Tensor | None = None,
    block_table: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
) -> None:
    """The checks of ``decode_attention`` with ``validate=True``; raises the same errors."""
    validate_tensors(q=q, k_cache=k_cache, v_cache=v_cache, lengths=lengths)
    check_caches(k_cache, v_cache)
    scales = (split_scale("k_scale", k_scale, k_cache)[1], split_scale("v_scale", v_scale, v_cache)[1])
    keys = (window, n_sinks, sink_logits, block_table, *scales)
    request = Request(q, None, k_cache, v_cache, lengths, 1.0, *keys)
    check_shapes(request)
    check_values(request)


@torch.no_grad()  # a decode step needs no gradient
def _decode(
    request: Request,
    num_splits: int | None,
    out: Tensor | None,
    workspace: Workspace | None,
    return_lse: bool,
    backend: Backend,
    values_too: bool | None,
) -> Tensor | tuple[Tensor, Tensor]:
    on_cpu, tracing = request.q.device.type == "cpu", torch.compiler.is_compiling()
    checks.instance("workspace", workspace, (Workspace, type(None)))
    checks.instance("return_lse", return_lse, bool)
    checks.instance("validate", values_too, (bool, type(None)))
    check_shapes(request)
    if values_too or (values_too is None and on_cpu and not tracing):
        check_values(request)
    if num_splits is not None:
        checks.positive("num_splits", num_splits)
    if checks.one_of("backend", backend, ("auto", "torch", "triton")) == "auto":
        backend = "torch" if on_cpu else "triton"
    shape = (request.batch, request.n_heads, request.value_dim)
    if out is None:
        out = request.q.new_empty(shape)
    else:
        checks.tensor("out", out, shape, dtype=request.q.dtype, device=request.q.device)
        if not tracing:
            check_memory("out", out)
    rows = request.batch * request.n_heads
    if workspace is not None and not return_lse and workspace.lse.numel() >= rows:
        lse = workspace.lse[:rows].view(shape[:2])
    else:
        lse = torch.empty(shape[:2], dtype=torch.float32, device=request.q.device)
    if not tracing:
        fill(request, out, lse, workspace, num_splits, backend)
    else:
        r, w = request, workspace
        buffers = (w.parts, w.part_lses, w.tickets) if w else (None, None, None)
        decode_operator(
            *(r.q, r.q_rope, r.k, r.v, r.lengths, r.scale, r.window, r.n_sinks, r.sink_logits),
            *(r.block_table, r.k_scale, r.v_scale, r.out_scale, out, lse, *buffers, num_splits, backend),
        )
    return (out, lse) if return_lse else out
