"""Two kernels for measuring a GPU: one only reads, one is empty.

Reading the cache limits a decode step, so its kernel is compared with the fastest read.

Letters beside those of core.py: N numbers that are read.
"""

import kvlearn.kernels.runtime  # noqa: F401  (before triton: it sets whether Triton interprets)

import triton  # isort: skip
import triton.language as tl  # isort: skip
from jaxtyping import Float  # isort: skip
from torch import Tensor  # isort: skip

# (numbers per program, warps): the fastest one depends on the GPU.
TILINGS = ((4096, 4), (8192, 8), (16384, 8))


@triton.jit
def read_kernel(x_ptr, sums_ptr, n, BLOCK: tl.constexpr):
    """Each program sums BLOCK neighbouring numbers: every byte read once, 4 bytes written per program."""
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(sums_ptr + program, tl.sum(x, 0))


@triton.jit
def empty_kernel(x_ptr):
    """Does nothing, so that only the launch takes time."""


def read(x: Float[Tensor, " N"], sums: Float[Tensor, " programs"], block: int, num_warps: int) -> Tensor:
    """Read fp32 ``x`` once; return ``sums``, one per ``block`` numbers (a power of two).

    Raises ValueError unless ``sums`` has one number per block.
    """
    programs = triton.cdiv(x.numel(), block)
    if sums.numel() != programs:
        raise ValueError(f"sums: expected {programs} numbers, one per block, got {sums.numel()}")
    read_kernel[(programs,)](x, sums, x.numel(), BLOCK=block, num_warps=num_warps)
    return sums


def nothing(x: Tensor) -> None:
    """Launch the empty kernel with ``x`` as its argument."""
    empty_kernel[(1,)](x)
