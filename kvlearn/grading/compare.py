from kvlearn.grading.context import *  # noqa
