"""Unit 05: the exercises on sparse attention, one file each, their mistakes beside them."""

from kvlearn.grading.exercise import Unit
from kvlearn.grading.units.sparse_attention.bytes_token_mistakes import EXERCISE as bytes_
from kvlearn.grading.units.sparse_attention.classic_fixed_mistakes import EXERCISE as classic
from kvlearn.grading.units.sparse_attention.evict_slot_mistakes import EXERCISE as evict
from kvlearn.grading.units.sparse_attention.select_score_mistakes import EXERCISE as select
from kvlearn.grading.units.sparse_attention.sentence_mistakes import EXERCISE as sentence
from kvlearn.grading.units.sparse_attention.step_state_mistakes import EXERCISE as step
from kvlearn.grading.units.sparse_attention.union_block_mistakes import EXERCISE as union

UNIT = Unit("05_sparse_attention", (classic, sentence, union, evict, select, step, bytes_))
"""The exercises on sparse attention."""
