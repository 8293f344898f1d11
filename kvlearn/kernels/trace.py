"""Which program reads what: a record of every load of a kernel in Triton's interpreter.

    with trace(K=k, V=v) as reads:
        STAGES["v2"].decode(q, k, v, length)
    reads["K"].counts  # (programs, *k.shape): how often each program read each number

Nothing is modelled: the kernel computed these addresses and masks. Loads of other tensors (the queries, a
launcher's own buffers) are not counted. It works only in the interpreter, not on a GPU.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from kvlearn import validate
from kvlearn.kernels.runtime import INTERPRETED, require_triton


@dataclass(frozen=True)
class Reads:
    """How often each program read each number of one tensor; programs in the order in which they ran."""

    counts: np.ndarray  # (programs, *shape of the tensor)
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes that all programs read together; bytes read twice count twice."""
        return int(self.counts.sum()) * self.itemsize

    @property
    def unique_bytes(self) -> int:
        """Bytes that at least one program read: the least that must come from memory."""
        return int(self.counts.any(0).sum()) * self.itemsize

    @property
    def programs(self) -> np.ndarray:
        """The numbers of the programs that read any of it."""
        return np.flatnonzero(self.counts.reshape(len(self.counts), -1).any(1))

    def along(self, axis: int) -> np.ndarray:
        """(programs, size of that axis of the tensor): reads of the most-read number at that index."""
        kept = axis % (self.counts.ndim - 1) + 1
        others = tuple(i for i in range(1, self.counts.ndim) if i != kept)
        most: np.ndarray = self.counts.max(others, initial=0)
        return most


class Trace(Mapping[str, Reads]):
    """``trace[name]``: the reads of a tensor so far; ``trace.grids``: the grid of every launch so far."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.grids: list[tuple[int, ...]] = []
        self._tensors = tensors
        self._counts: dict[str, list[np.ndarray]] = {name: [] for name in tensors}

    @property
    def n_programs(self) -> int:
        """Programs of all launches."""
        return sum(int(np.prod(grid)) for grid in self.grids)

    def __getitem__(self, name: str) -> Reads:
        tensor = self._tensors[name]
        flat = np.array(self._counts[name]).reshape(len(self._counts[name]), _span(tensor))
        strides = (flat.strides[0], *(stride * flat.itemsize for stride in tensor.stride()))
        counts = np.lib.stride_tricks.as_strided(flat, (len(flat), *tensor.shape), strides, writeable=False)
        return Reads(counts, tensor.element_size())

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def start_program(self) -> None:
        for name, tensor in self._tensors.items():
            self._counts[name].append(np.zeros(_span(tensor), np.int32))

    def load(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        live = np.broadcast_to(mask, pointers.shape).astype(bool)  # the interpreter's masks may be integers
        addresses = pointers[live].astype(np.int64)
        for name, tensor in self._tensors.items():
            at = (addresses - tensor.data_ptr()) // tensor.element_size()
            at = at[(at >= 0) & (at < _span(tensor))]
            np.add.at(self._counts[name][-1], at, 1)


def _span(tensor: Tensor) -> int:
    """Numbers from a tensor's first to its last, gaps between its strides included."""
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


@contextmanager
def trace(**tensors: Tensor) -> Iterator[Trace]:
    """Record how the kernels launched inside read these tensors, by name.

    Raises RuntimeError if kernels are not interpreted, ValueError for an empty tensor.
    """
    require_triton()
    if not INTERPRETED:
        raise RuntimeError("trace: expected Triton's interpreter; start Python with TRITON_INTERPRET=1")
    from triton.runtime.interpreter import interpreter_builder as builder

    for name, tensor in tensors.items():
        validate.positive(f"{name}.numel()", validate.instance(name, tensor, Tensor).numel())
    reads = Trace(tensors)

    def on_launch(*grid: int) -> None:
        reads.grids.append(grid)

    def on_program(*_: int) -> None:
        reads.start_program()

    def on_load(pointers: Any, mask: Any, *_: Any) -> None:
        reads.load(pointers.data, mask.data)  # unmasked loads too, with a mask of ones

    hooks: dict[str, Callable[..., None]] = {
        "set_grid_dim": on_launch,
        "set_grid_idx": on_program,
        "create_masked_load": on_load,
    }
    methods = {name: getattr(builder, name) for name in hooks}
    for name, method in methods.items():
        setattr(builder, name, _before(method, hooks[name]))
    try:
        yield reads
    finally:
        for name, method in methods.items():
            setattr(builder, name, method)


def _before(method: Callable[..., Any], hook: Callable[..., None]) -> Callable[..., Any]:
    """The method, with the hook called first."""

    def both(*args: Any) -> Any:
        hook(*args)
        return method(*args)

    return both
