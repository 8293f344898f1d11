"""Unit 01: the exercises on full attention, one file each."""

from kvlearn.grading.exercise import Unit
from kvlearn.grading.units.full_attention.attend import EXERCISE as attend
from kvlearn.grading.units.full_attention.cache import EXERCISE as cache
from kvlearn.grading.units.full_attention.heads import EXERCISE as heads
from kvlearn.grading.units.full_attention.mask import EXERCISE as mask
from kvlearn.grading.units.full_attention.merge import EXERCISE as merge
from kvlearn.grading.units.full_attention.prefill import EXERCISE as prefill
from kvlearn.grading.units.full_attention.rope import EXERCISE as rope
from kvlearn.grading.units.full_attention.size import EXERCISE as size

UNIT = Unit("01_full_attention", (attend, mask, heads, rope, cache, prefill, merge, size))
