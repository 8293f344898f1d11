from kvlearn.grading.calls import *  # noqa
