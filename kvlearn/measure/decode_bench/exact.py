"""Attention in fp64, one row at a time: every result is compared with it before it is timed."""

import torch
from torch import Tensor

from kvlearn.measure.decode_bench.cells import Cell
from kvlearn.measure.decode_bench.inputs import Inputs

# A bf16 result of bf16 operands lies between 1e-3 and 1e-2 of the truth.
TOLERANCE = 1e-2


def error(cell: Cell, x: Inputs, out: Tensor, truth: Inputs | None = None) -> float:
    """The largest ‖out − exact‖ / ‖exact‖ of any head in the rows looked at; NaN where a number is missing.

    ``truth``: the inputs to be exact about, where they are not those that ``out`` was computed from.
    """
    worst = torch.zeros((), dtype=torch.float64, device=out.device)
    for row in sorted({0, 1 % cell.batch, cell.batch // 2, cell.batch - 1}):
        expected = exact_row(cell, truth or x, row)
        got = out.reshape(cell.batch, cell.n_heads, -1)[row].double()
        relative = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
        worst = torch.maximum(worst, relative.max())  # both hand a NaN on
    return worst.item()


def exact_row(cell: Cell, x: Inputs, row: int) -> Tensor:
    """softmax(q · k · scale) · v of one row in fp64, over the keys that window and sinks leave: (H, D)."""
    length = cell.lengths[row]
    start = max(0, length - (cell.window or length))
    device = x.q.device
    kept = torch.cat(
        [torch.arange(min(cell.n_sinks, start), device=device), torch.arange(start, length, device=device)]
    )
    q = x.q[row].double()
    if x.q_rope is not None:
        q = torch.cat([q, x.q_rope[row].double()], dim=-1)
    group = cell.n_heads // cell.n_kv_heads
    heads = []
    for g in range(cell.n_kv_heads):
        k = _numbers(x.k, x.k_scale, x, row, g)[kept]
        v = k[:, : cell.head_dim] if cell.latent else _numbers(x.v, x.v_scale, x, row, g)[kept]
        scores = q[g * group : (g + 1) * group] @ k.T * cell.scale
        heads.append(scores.softmax(dim=-1) @ v)
    return torch.cat(heads)


def _numbers(cache: Tensor, scale: Tensor | None, x: Inputs, row: int, g: int) -> Tensor:
    """The keys or values of one row and KV head in fp64, (S, D), wherever they lie."""
    if x.q_rope is not None:
        there = cache[row]
    elif x.table is None:
        there = cache[row, g]
    else:
        there = cache[x.table[row].long(), g].flatten(0, 1)
    # By way of fp32, to which all formats convert exactly.
    return there.float().double() * (1.0 if scale is None else scale[g].double())
