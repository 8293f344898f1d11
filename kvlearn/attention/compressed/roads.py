"""The two roads of latent attention on paper: FLOPs and bytes of each, and where they cross.

For ``new`` tokens a sequence that follow ``cached`` ones: S = cached + new tokens stand in the cache, and the
causal mask lets through P = new · cached + new · (new + 1) / 2 pairs. A multiplication with its addition is
2 FLOPs. What both roads do alike (projections of x, softmax, RoPE, output matrix) is not counted.
"""

import math
from typing import Literal

from kvlearn import validate

Road = Literal["naive", "absorbed"]


def road_flops(
    road: Road,
    n_heads: int,
    head_dim: int,
    rank: int,
    rope_dim: int,
    *,
    new: int,
    cached: int = 0,
    v_head_dim: int | None = None,
    batch: int = 1,
) -> int:
    """FLOPs from queries and latents to the heads' outputs.

    naive     2 · B · H · (S · R · (D + Dv)  +  P · (D + Dr + Dv))    all S tokens decompressed
    absorbed  2 · B · H · (T · R · (D + Dv)  +  P · (2R + Dr))        the T new ones folded in and out
    """
    value_dim = _check(road, n_heads, head_dim, rank, rope_dim, new, cached, v_head_dim, batch)
    pairs = new * cached + new * (new + 1) // 2
    if road == "naive":
        each, width = cached + new, head_dim + rope_dim + value_dim
    else:
        each, width = new, 2 * rank + rope_dim
    return 2 * batch * n_heads * (each * rank * (head_dim + value_dim) + pairs * width)


def road_bytes(
    road: Road,
    n_heads: int,
    head_dim: int,
    rank: int,
    rope_dim: int,
    *,
    new: int,
    cached: int = 0,
    v_head_dim: int | None = None,
    batch: int = 1,
    itemsize: int = 4,
) -> int:
    """Bytes moved: cache, W_uk and W_uv, queries and outputs once; what lies between is written, then read.

    Between lie, on the naive road, the decompressed keys and values, 2 · B · S · H · (D + Dv) numbers; on the
    absorbed road the queries and outputs in the latent space, 2 · B · T · H · (2R + Dr). Scores stay on the
    chip.
    """
    value_dim = _check(road, n_heads, head_dim, rank, rope_dim, new, cached, v_head_dim, batch)
    tokens, heads = cached + new, head_dim + value_dim
    ends = batch * (tokens * (rank + rope_dim) + new * n_heads * (heads + rope_dim))
    between = tokens * heads if road == "naive" else new * (2 * rank + rope_dim)
    return itemsize * (ends + n_heads * heads * rank + 2 * batch * n_heads * between)


def absorbed_wins(
    n_heads: int,
    head_dim: int,
    rank: int,
    rope_dim: int,
    *,
    new: int,
    cached: int = 0,
    v_head_dim: int | None = None,
) -> bool:
    """Whether the absorbed road does fewer FLOPs for this call."""
    sizes = (n_heads, head_dim, rank, rope_dim)
    naive, absorbed = (
        road_flops(road, *sizes, new=new, cached=cached, v_head_dim=v_head_dim)
        for road in ("naive", "absorbed")
    )
    return absorbed < naive


def crossover(head_dim: int, rank: int, v_head_dim: int | None = None) -> float:
    """New tokens a call, over a long cache, below which the absorbed road does fewer FLOPs.

    R · (D + Dv) / (2R - D - Dv): decompressing a token costs R · (D + Dv) a head whoever asks, and each query
    then saves 2R - (D + Dv) on it. Infinite where the latent is no wider than a head's key and value together
    (2R ≤ D + Dv): absorbed always wins. Independent of heads and rotary part. DeepSeek-V3: 170.7.
    """
    value_dim = _check("naive", 1, head_dim, rank, 0, 1, 0, v_head_dim, 1)
    saved = 2 * rank - head_dim - value_dim
    return rank * (head_dim + value_dim) / saved if saved > 0 else math.inf


def _check(
    road: Road,
    n_heads: int,
    head_dim: int,
    rank: int,
    rope_dim: int,
    new: int,
    cached: int,
    v_head_dim: int | None,
    batch: int,
) -> int:
    """The door of all of these; returns the width of a head's value."""
    validate.one_of("road", road, ("naive", "absorbed"))
    sizes = {"n_heads": n_heads, "head_dim": head_dim, "rank": rank, "new": new, "batch": batch}
    for name, value in sizes.items():
        validate.positive(name, value)
    for name, value in {"rope_dim": rope_dim, "cached": cached}.items():
        validate.at_least(name, value, 0)
    return head_dim if v_head_dim is None else validate.positive("v_head_dim", v_head_dim)
