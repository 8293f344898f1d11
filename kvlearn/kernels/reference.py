"""The PyTorch form of a decode step: row by row, over the keys that each row attends to, in fp32.

It runs on a CPU, and the kernel is compared with it.
"""

import torch
from torch import Tensor

from kvlearn.attention.core import attend_partial, finite
from kvlearn.kernels.inputs import Request


@torch.no_grad()
def decode_reference(request: Request, out: Tensor, lse: Tensor) -> None:
    """Fills ``out`` (B, H, Dv) and ``lse`` (B, H) with softmax(scale · q Kᵀ) V over each row's live keys."""
    q = request.q if request.q_rope is None else torch.cat([request.q, request.q_rope], dim=-1)
    q = q.float().unflatten(1, (request.n_kv_heads, request.group))  # heads of a group are neighbours
    for row, length in enumerate(request.lengths.tolist()):
        k, v = live_keys(request, row, min(max(length, 0), request.capacity))
        with torch.autocast(q.device.type, enabled=False):
            part = attend_partial(q[row : row + 1], k[None], v[None], scale=request.scale)
        row_out, row_lse = part.out.flatten(0, 2) * request.out_scale, part.lse.flatten()
        if request.sink_logits is not None:
            with_sink = torch.logaddexp(row_lse, request.sink_logits.float())
            row_out = row_out * torch.exp(row_lse - finite(with_sink))[:, None]
            row_lse = with_sink
        out[row], lse[row] = row_out.to(out.dtype), row_lse


def live_keys(request: Request, row: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys (G, N, D) and values (G, N, Dv) that ``row`` attends to, dequantised, in fp32."""
    k = live_slots(request, request.k, row, length)
    if request.k_scale is not None:
        k = k * live_slots(request, request.k_scale, row, length)[..., None]
    if request.v is None:
        return k, k[..., : request.value_dim]
    v = live_slots(request, request.v, row, length)
    if request.v_scale is not None:
        v = v * live_slots(request, request.v_scale, row, length)[..., None]
    return k, v


def live_slots(request: Request, cache: Tensor, row: int, length: int) -> Tensor:
    """``row``'s visible slots, in fp32: (G, N, …) from a cache (B, G, S, …) or pages (pages, G, page, …).

    A page that does not exist counts as no slots.
    """
    parts = []
    for live in request.live(length):
        if request.block_table is None or request.page is None:
            slots = cache[row, :, live]
        else:
            first = live.start // request.page
            pages = request.block_table[row, first : -(-live.stop // request.page)]
            exists = (pages >= 0) & (pages < len(cache))  # no other row may be read through a wrong table
            within = slice(live.start - first * request.page, live.stop - first * request.page)
            slots = cache.index_select(0, pages.masked_fill(~exists, 0)).transpose(0, 1).flatten(1, 2)
            slots = slots[:, within]
            if not bool(exists.all()):
                slots = slots[:, exists.repeat_interleave(request.page)[within]]
        parts.append(slots.float())
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
