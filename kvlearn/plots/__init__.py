"""Every figure of the course, in one style, drawn from data that a test can check."""

from kvlearn.plots.full_attention import (
    cache_saves,
    loss_by_position,
    loss_curve,
    on_the_roofline,
    step_times,
)
from kvlearn.plots.kernels import access_pattern, achieved_bandwidth, splits
from kvlearn.plots.memory import bytes_per_token, cache_growth
from kvlearn.plots.picture import COLOURS, Picture

__all__ = [
    "COLOURS",
    "Picture",
    "access_pattern",
    "achieved_bandwidth",
    "bytes_per_token",
    "cache_growth",
    "cache_saves",
    "loss_by_position",
    "loss_curve",
    "on_the_roofline",
    "splits",
    "step_times",
]
