"""What the figure of ``kvlearn bench decode`` is drawn from: rows as they are recorded."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvlearn.measure.decode_bench.grid import EXPANDED, MUST, SDPA
from kvlearn.measure.decode_bench.others import FLEX
from kvlearn.measure.decode_bench.own import OWN
from kvlearn.measure.timing import Quartiles

SERIES = (OWN, SDPA, EXPANDED, FLEX, "v1")


def bandwidth_points(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The arguments of ``kvlearn.plots.achieved_bandwidth``; None for a run without a GPU.

    Whole bf16 caches of keys and values only, timed in CUDA graphs; windows, pages, latents and bytes have
    bars of their own.
    """
    ceiling = [row["measured"] for row in rows if row.get("what") == "bw_read"]
    launch = [row["measured"] for row in rows if row.get("what") == "launch_graph"]
    timed = [
        row
        for row in rows
        if row.get("what") == "time"
        and row["how"] == "graph"
        and row["kv_dtype"] == "bf16"
        and not (row["page"] or row["window"] or row["rope_dim"] or row["others"])
    ]
    # A cell that was measured in several contests counts once, the first time.
    points = {
        (row["stage"], row["form"], row["batch"], row["length"]): (
            row["stage"],
            row["nbytes"],
            Quartiles(row["measured"], row["q1"], row["q3"], row["n"]),
        )
        for row in reversed(timed)
        if row["stage"] in SERIES
    }
    if not ceiling or not points:
        return None
    return {
        "points": sorted(points.values(), key=lambda point: (SERIES.index(point[0]), point[1])),
        "bandwidth": ceiling[0],
        "t_fixed": launch[0] if launch else 0.0,
        "bar": MUST,
    }
