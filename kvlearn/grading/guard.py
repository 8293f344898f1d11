from kvlearn.grading.calls import *  # noqa
from kvlearn.grading.calls import CallWrapper as Guarded  # noqa
