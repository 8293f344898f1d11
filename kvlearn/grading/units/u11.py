"""Unit 11: the exercises on the Triton decode kernel, one file each, their mistakes beside them."""

from kvlearn.grading.exercise import Unit
from kvlearn.grading.units.triton_decode.choose_mistakes import EXERCISE as choose
from kvlearn.grading.units.triton_decode.floor_time_mistakes import EXERCISE as floor
from kvlearn.grading.units.triton_decode.online_mistakes import EXERCISE as online
from kvlearn.grading.units.triton_decode.packing_mistakes import EXERCISE as packing
from kvlearn.grading.units.triton_decode.pages_mistakes import EXERCISE as pages
from kvlearn.grading.units.triton_decode.splits_merge_mistakes import EXERCISE as splits
from kvlearn.grading.units.triton_decode.tail_mistakes import EXERCISE as tail
from kvlearn.grading.units.triton_decode.ticket_mistakes import EXERCISE as ticket

UNIT = Unit("11_triton_decode", (floor, online, tail, packing, splits, pages, choose, ticket))
