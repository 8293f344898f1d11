"""Triton for exercises: its kernels run on the CPU, in its interpreter.

That is so with a GPU too: a kernel's error then names its line, a stray pointer is caught (``watch.py``) and
the points do not depend on the card. Where Triton does not exist, a stand-in says so when a kernel is
launched, and every other exercise works.
"""

import os
import sys
from typing import Any

__all__ = ["LOG2E", "NEEDS_TRITON", "NeedsTriton", "WithoutTriton", "tl", "triton"]

LOG2E: Any = 1.4426950408889634  # eˣ = 2^(x · log₂e)
NEEDS_TRITON = (
    "this exercise needs Triton, of which the course pins the Linux package (on Windows: inside WSL)"
)


class NeedsTriton(RuntimeError):
    """A kernel was launched where there is no Triton."""


class WithoutTriton:
    """Stands in for Triton: every name is there, and launching a kernel says what is missing."""

    def __getattr__(self, name: str) -> "WithoutTriton":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def jit(self, kernel: Any = None, **_: Any) -> "WithoutTriton":
        return self

    def cdiv(self, a: int, b: int) -> int:
        return -(-a // b)

    def next_power_of_2(self, n: int) -> int:
        return 1 << (n - 1).bit_length() if n > 1 else 1

    def __getitem__(self, grid: Any) -> "WithoutTriton":
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NeedsTriton(NEEDS_TRITON)


# Triton looks at this when it is imported; after that it is too late.
if not {"triton", "kvlearn.kernels.runtime"} & sys.modules.keys():
    os.environ["TRITON_INTERPRET"] = "1"

from kvlearn.kernels.runtime import HAS_TRITON  # noqa: E402

if HAS_TRITON:
    import triton
    import triton.language as tl

    from kvlearn.teaching.watch import watch_launches

    LOG2E = tl.constexpr(LOG2E)  # a kernel sees no other globals than these
    watch_launches()
else:
    triton = tl = WithoutTriton()
