"""Unit 02: the exercises on shared keys and values, one file each, their mistakes beside them."""

from kvlearn.grading.exercise import Unit
from kvlearn.grading.units.shared_kv.attend_mistakes import EXERCISE as attend
from kvlearn.grading.units.shared_kv.budget_mistakes import EXERCISE as budget
from kvlearn.grading.units.shared_kv.layers_mistakes import EXERCISE as layers
from kvlearn.grading.units.shared_kv.pool_mistakes import EXERCISE as pool
from kvlearn.grading.units.shared_kv.route_mistakes import EXERCISE as route
from kvlearn.grading.units.shared_kv.size_mistakes import EXERCISE as size
from kvlearn.grading.units.shared_kv.step_rope_mistakes import EXERCISE as step

UNIT = Unit("02_shared_kv", (attend, size, pool, route, layers, budget, step))
