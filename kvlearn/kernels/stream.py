"""Two kernels to measure a card with: one that only reads, and one that does nothing.

A decode step is a read of the cache; how fast the card reads at best is what its kernel is held against.
"""

import kvlearn.kernels.runtime  # noqa: F401  (before triton: it decides about the interpreter)

import triton  # isort: skip
import triton.language as tl  # isort: skip
from jaxtyping import Float  # isort: skip
from torch import Tensor  # isort: skip

# (numbers a program, warps): which of them reads fastest depends on the card.
TILINGS = ((4096, 4), (8192, 8), (16384, 8))


@triton.jit
def read_kernel(x_ptr, sums_ptr, n, BLOCK: tl.constexpr):
    """Each program sums BLOCK neighbouring numbers: every byte read once, 4 bytes a program written."""
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(sums_ptr + program, tl.sum(x, 0))


@triton.jit
def empty_kernel(x_ptr):
    """Nothing: what is left is the launch."""


def read(x: Float[Tensor, " N"], sums: Float[Tensor, " programs"], block: int, num_warps: int) -> Tensor:
    """Reads fp32 ``x`` once, and returns ``sums``, one of each ``block`` numbers (a power of two).

    Raises ValueError where ``sums`` has not one place a block.
    """
    programs = triton.cdiv(x.numel(), block)
    if sums.numel() != programs:
        raise ValueError(f"sums: expected {programs} numbers, one a block, got {sums.numel()}")
    read_kernel[(programs,)](x, sums, x.numel(), BLOCK=block, num_warps=num_warps)
    return sums


def nothing(x: Tensor) -> None:
    """Launches a kernel that does nothing; ``x`` is handed to it, as a tensor would be."""
    empty_kernel[(1,)](x)
