"""Unit 06: the exercises on linear attention and its relatives, one file each, their mistakes beside them."""

from kvlearn.grading.exercise import Unit
from kvlearn.grading.units.linear_attention.chunked_end_mistakes import EXERCISE as chunked
from kvlearn.grading.units.linear_attention.crossing_token_mistakes import EXERCISE as crossing
from kvlearn.grading.units.linear_attention.decay_product_mistakes import EXERCISE as decay
from kvlearn.grading.units.linear_attention.delta_mistakes import EXERCISE as delta
from kvlearn.grading.units.linear_attention.features_sum_mistakes import EXERCISE as features
from kvlearn.grading.units.linear_attention.mamba_step_mistakes import EXERCISE as mamba
from kvlearn.grading.units.linear_attention.recurrent_read_mistakes import EXERCISE as recurrent
from kvlearn.grading.units.linear_attention.wkv_overflow_mistakes import EXERCISE as wkv

UNIT = Unit("06_linear_attention", (features, recurrent, chunked, decay, delta, mamba, wkv, crossing))
