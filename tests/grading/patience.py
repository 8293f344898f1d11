"""Limits on time that an answer which ends does not run into, however busy the machine is."""

import os

from kvlearn.grading.sandbox import Limits


def limits(seconds: float) -> Limits:
    """``seconds`` for an exercise on a machine that does nothing else, more on a busy one."""
    busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    return Limits(seconds=round(busy * seconds), grace=busy, total=3600)
