"""The kernel forms that are compiled ahead of time: one call per form, as a user writes it.

``python -m kvlearn.kernels.forms 90`` prints their rows as JSON; `kvlearn.kernels.compiled` starts it.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvlearn.kernels.compiled import Compiled
from kvlearn.kernels.stages import STAGES

BATCH, SLOTS, LENGTH = 2, 4096, 4001  # like most lengths, not a multiple of 16
HALF = torch.bfloat16


@dataclass(frozen=True)
class Form:
    """A call of a launcher. ``least``: the first compute capability that has its number format."""

    name: str
    group: str
    call: Callable[[], object]
    least: int = 80


def attention(
    n_heads: int,
    n_kv_heads: int,
    head_dim: int = 128,
    dtype: torch.dtype = HALF,
    *,
    stored: torch.dtype | None = None,
    page: int = 0,
    offset: int = 0,
    scaled: bool = False,
    **options: Any,
) -> None:
    """`decode_attention` on a cache of type ``stored``, ``scaled`` by one number per key."""
    from kvlearn.kernels.decode import decode_attention

    q = torch.zeros(BATCH, n_heads, head_dim, dtype=dtype)
    k, v, paging = _caches(n_kv_heads, head_dim, stored or dtype, page, offset)
    if scaled:
        options |= {name: torch.ones(k.shape[:3]) for name in ("k_scale", "v_scale")}
    decode_attention(q, k, v, _lengths(), backend="triton", **(options | paging))


def latent(n_heads: int, page: int = 0, dtype: torch.dtype = HALF) -> None:
    """`decode_latent` on DeepSeek's sizes."""
    from kvlearn.kernels.decode import decode_latent

    q, q_rope, cache = (t.to(dtype) for t in _latent(n_heads))
    table = None
    if page:
        cache = cache.view(-1, page, cache.shape[2])
        table = torch.zeros(BATCH, SLOTS // page, dtype=torch.int32)
    decode_latent(q, q_rope, cache, _lengths(), backend="triton", block_table=table)


def stage(name: str, page: int = 0) -> None:
    """A stage of chapter 11 on the case that its file predicts."""
    selected = STAGES[name]
    q = torch.zeros(BATCH, 32, 128, dtype=HALF)
    k, v, paging = _caches(4, 128, HALF, page)
    selected.decode(q, k, v, _lengths() if selected.ragged else LENGTH, **paging)


def latent_stage(n_heads: int) -> None:
    """Stage v5 where one latent is key and value."""
    from kvlearn.kernels.stages import v5_latent

    q, q_rope, cache = _latent(n_heads)
    v5_latent.decode(q, q_rope, cache, _lengths(), scale=1.0)


def _caches(
    n_kv_heads: int, head_dim: int, dtype: torch.dtype, page: int, offset: int = 0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """K, V and, with pages, the block table; ``offset`` shifts both from their 16-byte boundary."""
    shape: tuple[int, ...] = (BATCH, n_kv_heads, SLOTS, head_dim)
    paging = {}
    if page:
        shape = (BATCH * SLOTS // page, n_kv_heads, page, head_dim)
        paging = {"block_table": torch.zeros(BATCH, SLOTS // page, dtype=torch.int32)}
    k, v = (torch.empty(offset + math.prod(shape), dtype=dtype)[offset:].view(shape) for _ in "kv")
    return k, v, paging


def _latent(n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek's sizes: 512 numbers of latent, 64 that carry RoPE."""
    q, q_rope = (torch.zeros(BATCH, n_heads, size, dtype=HALF) for size in (512, 64))
    return q, q_rope, torch.empty(BATCH, SLOTS, 512 + 64, dtype=HALF)


def _lengths() -> Tensor:
    return torch.full((BATCH,), LENGTH, dtype=torch.int32)


def _decode(name: str, *shape: Any, least: int = 80, group: str = "decode", **options: Any) -> Form:
    return Form(name, group, partial(attention, *shape, **options), least)


FORMS = (
    *(Form(name, "stage", partial(stage, name)) for name in ("v0", "v1", "v2", "v3", "v4")),
    Form("v4, pages of 16", "stage", partial(stage, "v4", page=16)),
    Form("v5", "stage", partial(stage, "v5")),
    Form("v5_latent, 16 heads", "stage", partial(latent_stage, 16)),
    Form("v5_latent, 128 heads", "stage", partial(latent_stage, 128)),
    _decode("MHA 32/32", 32, 32),
    _decode("GQA 32/8", 32, 8),
    _decode("GQA 64/8", 64, 8),
    _decode("GQA 24/8, group 3", 24, 8),
    _decode("MQA 32/1", 32, 1),
    _decode("head dim 64", 32, 8, 64),
    _decode("head dim 96, padded", 32, 8, 96),
    _decode("head dim 256", 32, 8, 256),
    _decode("head dim 320, padded", 32, 8, 320),
    _decode("fp16", 32, 8, 128, torch.float16),
    _decode("fp32", 32, 8, 128, torch.float32),
    _decode("fp32 on a bf16 cache", 32, 8, 128, torch.float32, stored=HALF),
    _decode("pages of 16", 32, 8, page=16),
    _decode("pages of 16, GQA 64/8", 64, 8, page=16),
    _decode("pages of 64", 32, 8, page=64),
    _decode("window and sinks", 32, 8, window=1024, n_sinks=4),
    _decode("sink logits", 32, 8, sink_logits=torch.zeros(32)),
    _decode("fp8, a scale a key", 32, 8, stored=torch.float8_e4m3fn, scaled=True, least=89),
    _decode("int8, a scale a key", 32, 8, stored=torch.int8, scaled=True),
    Form("latent, 16 heads", "decode", partial(latent, 16)),
    Form("latent, 16 heads, fp32", "decode", partial(latent, 16, dtype=torch.float32)),
    Form("latent, 128 heads", "decode", partial(latent, 128)),
    Form("latent, 128 heads, pages", "decode", partial(latent, 128, page=64)),
    _decode("cache 2 bytes off", 32, 8, group="broken", offset=1),
)


def compile_form(form: Form, target: int) -> list[Compiled]:
    """One row per kernel that the call launches, or one row that says why it does not compile."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    from kvlearn.kernels.compile_only import compile_only

    row = partial(Compiled, form.name, form.group, target)
    if target < form.least:
        return [row(problem=f"from sm_{form.least} on")]
    try:
        with compile_only(target) as launches:
            form.call()
    except (CompilationError, OutOfResources) as error:
        return [row(problem=str(error).strip().splitlines()[-1].partition(". ")[0])]
    return [row(**asdict(launch)) for launch in launches]


if __name__ == "__main__":
    number, *only = sys.argv[1:]
    forms = [form for form in FORMS if not only or only[0] in f"{form.group} {form.name}"]
    print(json.dumps([asdict(row) for form in forms for row in compile_form(form, int(number))]))
