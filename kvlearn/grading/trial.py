from kvlearn.grading.context import *  # noqa
from kvlearn.grading.context import CheckContext as Trial  # noqa
