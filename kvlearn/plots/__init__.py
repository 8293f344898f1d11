"""Every figure of the course, in one style, drawn from data that a test can check."""

from kvlearn.extras import require

require("matplotlib", "kvlearn.plots")

from kvlearn.plots.compressed import path_flops, rope_on_latent, spectrum
from kvlearn.plots.full_attention import (
    cache_saves,
    loss_by_position,
    loss_curve,
    on_the_roofline,
    step_times,
)
from kvlearn.plots.hybrids import layer_stripes
from kvlearn.plots.kernels import access_pattern, achieved_bandwidth, splits
from kvlearn.plots.layers import across_layers
from kvlearn.plots.linear import state_memory
from kvlearn.plots.losses import conversion_curves, loss_over_rank, uptraining
from kvlearn.plots.measurements import (
    decode_times,
    dollars,
    predicted_and_measured,
    rooflines,
    touched_bytes,
    what_pays,
)
from kvlearn.plots.memory import bytes_per_token, cache_growth
from kvlearn.plots.patterns import gallery, lifetimes, selections
from kvlearn.plots.picture import COLOURS, Picture
from kvlearn.plots.quality import (
    above_by_position,
    converted,
    loss_over_bytes,
    pareto,
    recall_over_bytes,
    recall_over_length,
)
from kvlearn.plots.recall import recall_curves, recall_over_state
from kvlearn.plots.ring_attention import exposed_communication, timetable
from kvlearn.plots.scaling import scaling
from kvlearn.plots.serving import block_pool, leak, noise_and_leak, waste
from kvlearn.plots.shared import pools, stored_and_read
from kvlearn.plots.sliding import beyond_the_window, cone, influence, ring
from kvlearn.plots.squeeze import squeeze
from kvlearn.plots.verdict import decisions, recommendation, verdict_board
from kvlearn.plots.workbench import time_per_token

__all__ = [
    "COLOURS",
    "Picture",
    "above_by_position",
    "access_pattern",
    "achieved_bandwidth",
    "across_layers",
    "beyond_the_window",
    "block_pool",
    "bytes_per_token",
    "cache_growth",
    "cache_saves",
    "cone",
    "conversion_curves",
    "converted",
    "decisions",
    "decode_times",
    "dollars",
    "exposed_communication",
    "gallery",
    "influence",
    "layer_stripes",
    "leak",
    "lifetimes",
    "loss_by_position",
    "loss_curve",
    "loss_over_bytes",
    "loss_over_rank",
    "noise_and_leak",
    "on_the_roofline",
    "pareto",
    "path_flops",
    "pools",
    "predicted_and_measured",
    "recall_curves",
    "recall_over_bytes",
    "recall_over_length",
    "recall_over_state",
    "recommendation",
    "ring",
    "rooflines",
    "rope_on_latent",
    "scaling",
    "selections",
    "spectrum",
    "splits",
    "squeeze",
    "state_memory",
    "step_times",
    "stored_and_read",
    "time_per_token",
    "timetable",
    "touched_bytes",
    "uptraining",
    "verdict_board",
    "waste",
    "what_pays",
]
