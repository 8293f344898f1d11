"""Watches Triton's interpreter: a stray pointer is an IndexError that names the tensor, not a dead process;
an error in a kernel is the error itself, with its line, not its text in another error; launches are noted.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

# The interpreter's own functions that touch memory, and where their pointers and masks are.
ACCESSES = {
    "create_masked_load": ("tl.load reads", 0, 1),
    "create_masked_store": ("tl.store writes", 0, 2),
    "create_atomic_rmw": ("an atomic operation touches", 1, 3),
}

# Name, first address and the address behind the last of every tensor that the running kernel was given.
_given: list[tuple[str, int, int]] = []
# The actions of kernels since it was cleared: ("launched", ""), ("called", the name of another function for
# kernels), ("tl.load reads", the tensor's name in the kernel's signature).
done: set[tuple[str, str]] = set()
LAUNCHED = ("launched", "")
watching: list[bool] = []  # not empty: launches and calls are noted in `done`

# Shapes of tensors and by how many numbers kernels find them further on (``far``); of the running kernel's
# tensors the first address, the address behind the last, and how many bytes further on it is found.
_far: dict[tuple[int, ...], int] = {}
_found: list[tuple[int, int, int]] = []
_nowhere = np.full(4, np.nan, np.float32)  # what is read where nothing is


@contextmanager
def far(shape: tuple[int, ...], numbers: int) -> Iterator[None]:
    """While it lasts, kernels find a tensor of this shape ``numbers`` numbers behind where it lies, and NaN
    where there is nothing: as if it were the end of a larger tensor, of which no other part exists. So a
    pointer into a tensor of more than 2³¹ numbers can be checked without such a tensor."""
    _far[shape] = numbers
    try:
        yield
    finally:
        del _far[shape]


@functools.cache
def watch_launches() -> None:
    """From now on, in this process. Does nothing where kernels are compiled, or where the interpreter is
    built otherwise than the one we know."""
    from kvlearn.kernels.runtime import INTERPRETED

    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    try:
        builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
        accesses = {name: getattr(builder, name) for name in ACCESSES}
        launch, patch = executor.__call__, interpreter._patch_lang_tensor
        function = interpreter.InterpretedFunction
        call = function.__call__
    except AttributeError:
        return
    executor.__call__ = _watched_launch(launch)
    function.__call__ = _noted_call(call)
    interpreter._patch_lang_tensor = _counting_loops(patch)
    for name, access in accesses.items():
        setattr(builder, name, _within_bounds(access, *ACCESSES[name]))
    watching.append(True)


def _watched_launch(launch: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(launch)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The check's profiler would see every step of the interpreter, which costs four times the kernel.
        done.add(LAUNCHED)
        profiler = sys.getprofile()
        before, found = list(_given), list(_found)
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        _given[:] = _spans(arguments)
        _found[:] = _places(arguments) if _far and _given else []
        sys.setprofile(None)
        try:
            with np.errstate(all="ignore"):  # a GPU does not warn of ∞ − ∞ either
                return launch(self, *args, **kwargs)
        except Exception as error:
            raise root_of(error) from None
        finally:
            sys.setprofile(profiler)
            _given[:], _found[:] = before, found

    return watched


def _noted_call(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.add(("called", self.fn.__name__))
        return call(self, *args, **kwargs)

    return noted


def _counting_loops(patch: Callable[..., None]) -> Callable[..., None]:
    """Triton 3.6 with NumPy 2.4 or newer cannot take a loop's bounds from memory; later versions do this."""

    @functools.wraps(patch)
    def patched(tensor: Any, *args: Any) -> None:
        patch(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    return patched


def root_of(error: BaseException) -> BaseException:
    """The learner's own error: the interpreter wraps it once for every function on the way."""
    while type(error).__name__ == "InterpreterError" and error.__cause__ is not None:
        error = error.__cause__
    return error


def _spans(arguments: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Empty, which means that nothing is watched, if a tensor lies elsewhere than where kernels read it."""
    tensors = {name: value for name, value in arguments.items() if hasattr(value, "data_ptr")}
    if any(str(tensor.device) != "cpu" for tensor in tensors.values()):
        return []
    spans = []
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        spans.append((name, storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    return spans


def _places(arguments: dict[str, Any]) -> list[tuple[int, int, int]]:
    places = []
    for tensor in arguments.values():
        if hasattr(tensor, "data_ptr"):
            start, size = tensor.data_ptr(), tensor.element_size()
            moved = size * _far.get(tuple(tensor.shape), 0)
            places.append((start, start + size * tensor.numel(), moved))
    return places


def _brought_near(pointers: Any) -> Any:
    """Pointers to where the numbers lie, for those that point to where they are to be found."""
    addresses = pointers.data
    near = np.full_like(addresses, _nowhere.ctypes.data)
    for start, end, moved in _found:
        inside = (addresses >= start + moved) & (addresses < end + moved)
        near = np.where(inside, addresses - np.uint64(moved), near)
    return type(pointers)(near, pointers.dtype)


def _within_bounds(access: Callable[..., Any], verb: str, at: int, mask_at: int) -> Callable[..., Any]:
    @functools.wraps(access)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        if _found and verb == "tl.load reads":
            return access(*args[:at], _brought_near(args[at]), *args[at + 1 :], **kwargs)
        if _given:
            _check(verb, args[at], args[mask_at])
        return access(*args, **kwargs)

    return bounded


def _check(verb: str, pointers: Any, mask: Any) -> None:
    addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
    addresses = addresses[np.broadcast_to(mask.data, addresses.shape).astype(bool)]
    if not addresses.size:
        return
    width = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
    low, high = int(addresses.min()), int(addresses.max()) + width
    first = int(pointers.data.flat[0])

    def unlike(span: tuple[str, int, int]) -> tuple[int, int]:
        inside = (addresses >= span[1]) & (addresses < span[2])
        return -int(inside.sum()), max(span[1] - first, first - span[2], 0)

    # The tensor that was meant is the one with most of the addresses in it, or the nearest.
    name, start, end = min(_given, key=unlike)
    done.add((verb, name))
    if high > end:
        far = (high - end) // width
        raise IndexError(f"{verb} {_elements(far)} behind the end of {name}: mask what is out of range")
    if low < start:
        far = -(-(start - low) // width)
        raise IndexError(f"{verb} {_elements(far)} in front of {name}: mask what is out of range")


def _elements(n: int) -> str:
    return "1 element" if n == 1 else f"{n:,} elements"
