"""The kernel under test: a call allocates nothing, and its result is poisoned beforehand."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvlearn.kernels.decode import decode_attention, decode_latent
from kvlearn.kernels.inputs import Request, split_scale
from kvlearn.kernels.launch import Workspace, launch, tiling_for
from kvlearn.kernels.tiling import Tiling
from kvlearn.measure.decode_bench.bench import Bench
from kvlearn.measure.decode_bench.cells import Cell
from kvlearn.measure.decode_bench.contest import Entry
from kvlearn.measure.decode_bench.exact import TOLERANCE
from kvlearn.measure.decode_bench.inputs import Inputs
from kvlearn.measure.units import MIB

OWN = "own"
MOST_SPLITS, MOST_BYTES = 512, 512 * MIB  # of partial results


def own(
    bench: Bench,
    cell: Cell,
    tolerance: float = TOLERANCE,
    *,
    num_splits: int | None = None,
    tiling: Tiling | None = None,
) -> Entry:
    """``decode_attention``, or ``decode_latent`` for a latent; with a ``tiling`` the launch beneath them."""
    shared: dict[str, Any] = {}  # all copies write to one result: the graph runs them one after the other

    def prepare(cell: Cell, x: Inputs) -> Callable[[], Tensor]:
        if bench.backend == "triton" and not shared:
            shared["out"] = torch.full_like(x.q, torch.nan)
            shared["workspace"] = workspace(cell, x.q.device)
        if tiling is not None:
            return partial(tiled, request(cell, x), tiling, num_splits, **shared)
        given: dict[str, Any] = {
            **shared,
            "scale": cell.scale,
            "num_splits": num_splits,
            "backend": bench.backend,
        }
        given |= {"window": cell.window, "n_sinks": cell.n_sinks, "block_table": x.table, "validate": False}
        if x.q_rope is not None:
            latent: Callable[..., Any] = decode_latent
            return partial(latent, x.q, x.q_rope, x.k, x.lengths, **given)
        given |= {"k_scale": x.k_scale, "v_scale": x.v_scale}
        attention: Callable[..., Any] = decode_attention
        return partial(attention, x.q, x.k, x.v, x.lengths, **given)

    return Entry(cell, prepare, tolerance)


def workspace(cell: Cell, device: torch.device) -> Workspace:
    """Room for as many splits as are of any use."""
    a_split = cell.batch * cell.n_heads * cell.head_dim * 4
    splits = max(1, min(MOST_SPLITS, MOST_BYTES // a_split))
    return Workspace.new(cell.batch, cell.n_heads, cell.head_dim, splits, device)


def request(cell: Cell, x: Inputs) -> Request:
    """The cell as the launch takes it."""
    k, v = (x.k[:, None], None) if x.q_rope is not None else (x.k, x.v)
    scales = split_scale("k_scale", x.k_scale, x.k)[1], split_scale("v_scale", x.v_scale, x.v)[1]
    return Request(
        *(x.q, x.q_rope, k, v, x.lengths, cell.scale, cell.window, cell.n_sinks, None, x.table, *scales)
    )


def tiled(
    wanted: Request, tiling: Tiling, num_splits: int | None, *, out: Tensor, workspace: Workspace
) -> Tensor:
    """One step with this tiling."""
    lse = workspace.lse[: wanted.batch * wanted.n_heads].view(wanted.batch, wanted.n_heads)
    launch(wanted, out, lse, num_splits, workspace, tiling)
    return out


def present_tiling(cell: Cell, x: Inputs) -> Tiling:
    """What the kernel takes for this cell unless told."""
    return tiling_for(request(cell, x))
