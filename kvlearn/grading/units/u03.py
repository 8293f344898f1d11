"""Unit 03: the exercises on multi-head compression, one file each, their mistakes beside them."""

from kvlearn.grading.exercise import Unit
from kvlearn.grading.units.multi_head_compression.absorb_mistakes import EXERCISE as absorb
from kvlearn.grading.units.multi_head_compression.budget_mistakes import EXERCISE as budget
from kvlearn.grading.units.multi_head_compression.decoupled_mistakes import EXERCISE as decoupled
from kvlearn.grading.units.multi_head_compression.initialise_mistakes import EXERCISE as initialise
from kvlearn.grading.units.multi_head_compression.latent_mistakes import EXERCISE as latent
from kvlearn.grading.units.multi_head_compression.roads_mistakes import EXERCISE as roads
from kvlearn.grading.units.multi_head_compression.step_value_mistakes import EXERCISE as step

UNIT = Unit("03_multi_head_compression", (latent, decoupled, absorb, step, initialise, roads, budget))
