"""Unit 01: the exercises on full attention, one file each; a long list of mistakes has a file of its own."""

from kvlearn.grading.exercise import Unit
from kvlearn.grading.units.full_attention.attend_mistakes import EXERCISE as attend
from kvlearn.grading.units.full_attention.cache_mistakes import EXERCISE as cache
from kvlearn.grading.units.full_attention.heads import EXERCISE as heads
from kvlearn.grading.units.full_attention.mask import EXERCISE as mask
from kvlearn.grading.units.full_attention.merge_mistakes import EXERCISE as merge
from kvlearn.grading.units.full_attention.prefill_rope_mistakes import EXERCISE as prefill
from kvlearn.grading.units.full_attention.rope_mistakes import EXERCISE as rope
from kvlearn.grading.units.full_attention.size_mistakes import EXERCISE as size

UNIT = Unit("01_full_attention", (attend, mask, heads, rope, cache, prefill, merge, size))
