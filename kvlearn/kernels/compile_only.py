"""Triton's own launch path without a GPU: it compiles as on a GPU, and records launches instead of running.

Triton asks its driver for the GPU, to load the binary and to start it. The driver below reports the given
target, examines the binary and starts nothing. So a kernel is compiled for exactly the call that a GPU would
get: types, addresses and strides that are multiples of 16, the launcher's tiling. No separate list of
signatures has to follow the code.

Needs a process in which Triton compiles (``TRITON_INTERPRET=0``); `kvlearn.kernels.compiled` starts one.
"""

import linecache
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

from kvlearn.kernels import runtime

# Bytes of shared memory that one program may have (CUDA programming guide, compute capabilities).
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
PACKAGE = Path(__file__).parents[1]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CACHE_LINE = re.compile(r"^\s*(?:k|v|k_rope|latent|rope) = tl\.load\(")  # how all kernels here read a tile

# PTX is the assembly that Triton writes; ptxas translates it to machine code and allocates registers.
FILE = re.compile(r'^\s*\.file\s+(\d+) "(.+)"', re.MULTILINE)
PLACE = re.compile(r"^\s*\.loc\s+(\d+) (\d+)")
LOAD = re.compile(r"\bld\.global\.(?:[\w:]+\.)*?(?:v(\d)\.)?[bsuf](\d+)\s")
COPY = re.compile(r"\bcp\.async\.c[ag]\.\S+ \[[^]]*\], \[[^]]*\], (\w+)")
PRODUCT = re.compile(r"\b(wgmma|tcgen05|mma)\.(?:mma_async|mma|sync)\.")


@dataclass(frozen=True)
class Launch:
    """One launched kernel: its resources on a multiprocessor, and its loads of the cache."""

    kernel: str
    num_warps: int
    registers: int  # per thread
    stack: int  # bytes per thread that did not fit into registers and are in memory
    shared: int  # bytes per program
    loads: dict[int, int]  # of the cache: bytes that one thread loads at once -> instructions
    copies: dict[int, int]  # the asynchronous ones among them (cp.async), straight into shared memory
    products: dict[str, int]  # tensor core instructions: wgmma works for four warps together, mma for one


def examine(metadata: Any) -> Launch:
    """Read a kernel's assembly and binary from Triton's cache."""
    kept = get_cache_manager(metadata.hash)
    ptx, cubin = (kept.get_file(f"{metadata.name}.{kind}") for kind in ("ptx", "cubin"))
    command = [CUOBJDUMP, "--dump-resource-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected REG and STACK, got {usage!r}")
    loads, copies, products = read_assembly(Path(ptx).read_text())
    registers, stack = map(int, found.groups())
    return Launch(
        metadata.name, metadata.num_warps, registers, stack, metadata.shared, loads, copies, products
    )


def read_assembly(ptx: str) -> tuple[dict[int, int], dict[int, int], dict[str, int]]:
    """``loads``, ``copies`` and ``products`` of a `Launch`."""
    files = dict(FILE.findall(ptx))
    loads, copies = Counter[int](), Counter[int]()
    of_cache = False
    for line in ptx.splitlines():
        if place := PLACE.match(line):
            of_cache = _reads_cache(files[place[1]], int(place[2]))
        elif of_cache and (load := LOAD.search(line)):
            loads[int(load[1] or 1) * int(load[2]) // 8] += 1
        elif of_cache and (copy := COPY.search(line)):
            loads[int(copy[1], 0)] += 1
            copies[int(copy[1], 0)] += 1
    return dict(loads), dict(copies), dict(Counter(PRODUCT.findall(ptx)))


def _reads_cache(file: str, line: int) -> bool:
    # Triton caches binaries by source text and line: this one may come from another checkout.
    here = PACKAGE.joinpath(*file.rpartition("/kvlearn/")[2].split("/"))
    return CACHE_LINE.match(linecache.getline(str(here if here.exists() else file), line)) is not None


class CompileOnly(DriverBase):  # type: ignore[misc]  # Triton has no types
    """A driver for compute capability ``target`` without a GPU: it records launches and runs none."""

    def __init__(self, target: int) -> None:
        super().__init__()
        self.target = GPUTarget("cuda", target, 32)
        self.launches: list[Launch] = []
        self.utils = self  # Triton calls get_device_properties and load_binary on it

    @classmethod
    def is_active(cls) -> bool:
        return False  # Triton itself never selects it

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        arch: int = self.target.arch
        return arch  # Triton caches compiled kernels by device: one device per target

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[device]}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, ...]:
        threads = 1024  # the most that a program may have
        return name, name, 0, 0, threads

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        compiled = examine(metadata)
        # The driver active at the launch: Triton keeps this function and may call it for another form.
        return lambda *call: triton.runtime.driver.active.launches.append(compiled)

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


@contextmanager
def compile_only(target: int) -> Iterator[list[Launch]]:
    """Inside, kernels are compiled for ``target`` and not run; the list receives every launch.

    Raises OutOfResources, as on a GPU, if a program needs too much shared memory.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET: expected 0, since the interpreter compiles nothing")
    runtime.ASSUMED_SHARED_MEMORY, runtime.ASSUMED_CAPABILITY = SHARED_MEMORY[target], target
    runtime.shared_memory.cache_clear()
    runtime.capability.cache_clear()
    driver = CompileOnly(target)
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    try:
        yield driver.launches
    finally:
        triton.runtime.driver._active = before
