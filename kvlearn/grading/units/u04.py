"""Unit 04: the exercises on the sliding window, one file each, their mistakes beside them."""

from kvlearn.grading.exercise import Unit
from kvlearn.grading.units.sliding_window.bytes_mistakes import EXERCISE as bytes_
from kvlearn.grading.units.sliding_window.field_mistakes import EXERCISE as field
from kvlearn.grading.units.sliding_window.mask_mistakes import EXERCISE as mask
from kvlearn.grading.units.sliding_window.prefill_ring_mistakes import EXERCISE as prefill
from kvlearn.grading.units.sliding_window.ring_mistakes import EXERCISE as ring
from kvlearn.grading.units.sliding_window.sinks_softmax_mistakes import EXERCISE as sinks
from kvlearn.grading.units.sliding_window.step_ring_mistakes import EXERCISE as step

UNIT = Unit("04_sliding_window", (mask, ring, prefill, sinks, field, bytes_, step))
