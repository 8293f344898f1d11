"""Watches which tensors an answer makes, for exercises that forbid to build something large.

    with new_tensors() as made:
        got = answer(...)
    largest_new_tensor(made)                     # Made(shape=(2, 5, 31, 16), op="bmm")

Views cost nothing and are left out: a tensor counts if it lies in memory that no argument of its operation
holds. Copies that the guard makes of an answer's inputs are among the tensors, so draw inputs that are small
beside what is forbidden.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(NamedTuple):
    """A tensor in memory of its own: its shape, and the operation that made it."""

    shape: tuple[int, ...]
    op: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class _Watch(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would load its compiler to skip, which takes seconds and replaces functions of torch."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Made] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and memory(leaf) not in given:
                self.made.append(Made(tuple(leaf.shape), func.overloadpacket.__name__))
        return result


def memory(tensor: Tensor) -> int:
    """Names the memory that a tensor lies in; views of one memory have the same name."""
    return tensor.untyped_storage()._cdata


@contextmanager
def new_tensors() -> Iterator[list[Made]]:
    """Every tensor that is made inside, in order."""
    with _Watch() as watch:
        yield watch.made


def largest_new_tensor(made: Sequence[Made]) -> Made:
    """The one with the most numbers; ``Made((), "")`` where nothing was made."""
    return max(made, key=lambda one: one.numel, default=Made((), ""))
