"""How Triton's kernels run: compiled on a GPU, in Triton's interpreter without one, not without Triton.

A module with kernels imports this one *before* ``triton``: Triton decides at import, by ``TRITON_INTERPRET``,
whether its own functions are interpreted.
"""

import functools
import importlib.util
import os
from typing import Any

import torch

# The pinned Triton is a Linux package; everything but the kernels works without it.
HAS_TRITON = importlib.util.find_spec("triton") is not None

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Used without a GPU: enough programs to show a split, few enough to interpret.
INTERPRETED_MULTIPROCESSORS = 4
# An H100's, used without a GPU; `compile_only` sets those of its target.
ASSUMED_SHARED_MEMORY = 232_448
ASSUMED_CAPABILITY = 90


def require_triton() -> None:
    """Raise RuntimeError that says what to do, if kernels cannot run in this process."""
    if not HAS_TRITON:
        raise RuntimeError(
            "backend: expected 'torch', since Triton is not installed: "
            "pip install 'kvlearn[kernels]', on Linux"
        )
    if INTERPRETED:
        import triton.language as tl
        from triton.runtime.interpreter import InterpretedFunction

        if not isinstance(tl.max, InterpretedFunction):
            raise RuntimeError(
                "triton: it was imported to compile before kvlearn.kernels was; without a GPU, import "
                "kvlearn.kernels first or start Python with TRITON_INTERPRET=1"
            )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU, or an assumed number without one."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability: 80 for an A100, 90 for an H100 or H200, 100 for a B200."""
    if device.type != "cuda":
        return ASSUMED_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use; an assumed number without a GPU."""
    if device.type != "cuda":
        return ASSUMED_SHARED_MEMORY
    properties: Any = torch.cuda.get_device_properties(device)
    most: int = properties.shared_memory_per_block_optin
    return most
