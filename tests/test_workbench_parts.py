"""Which parts are the learner's, bytes of their cache, whatever it is made of; parts replaced by name."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kvlearn import workbench
from kvlearn.grading import check, find_exercise


@dataclass(slots=True)
class Slotted:
    kept: Any


class Cyclic:
    def __init__(self, kept: Any) -> None:
        self.kept, self.itself = kept, [self]


@pytest.mark.parametrize("holder", [list, deque, Slotted, Cyclic, lambda kept: {"kept": kept}])
def test_every_tensor_of_a_cache_is_found(holder: Any) -> None:
    found = list(workbench.tensors_in([holder([torch.zeros(3), torch.zeros(4)])]))
    assert [each.numel() for each in found] == [3, 4]


def test_a_watched_cache_is_of_the_class_of_the_cache() -> None:
    assert isinstance(workbench.Watched(Cyclic([])), Cyclic)


def test_a_part_is_theirs_as_soon_as_its_check_passes() -> None:
    """The learner mends a helper that the part calls: the part is the same object."""
    model, source = find_exercise("01.9"), find_exercise("01.4")
    right = source.right[0]
    shift = [1]

    def rotate(x: Any, positions: Any, theta: float = 10000.0) -> Any:
        return right(x, positions + shift[0], theta)

    def whose() -> bool:
        parts = workbench.choose(model, {"rotate": rotate})
        return next(part.is_theirs for part in parts if part.name == "rotate")

    assert not whose()
    shift[0] = 0
    assert check("01.4", rotate).status == "passed"
    assert whose()


def test_a_part_that_the_model_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"replaced: expected one of 'attend', .*; got 'KVCach'"):
        workbench.losses("01.9", 96, KVCach=Cyclic)
