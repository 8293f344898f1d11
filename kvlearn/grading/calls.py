"""Calls of a learner's answer, wrapped: whatever it does, the check goes on and knows what happened.

Around every call: inputs are copied and compared afterwards, forbidden functions are noticed, exceptions are
kept with the learner's line, and nothing is printed (one line on stderr would cost all points in nbgrader).

For exercises that forbid to build something large, ``new_tensors`` notes which tensors an answer makes:

    with new_tensors() as made:
        got = answer(...)
    largest_new_tensor(made)                     # Made(shape=(2, 5, 31, 16), op="bmm")

Views cost nothing and are left out: a tensor counts if it lies in memory that no argument of its operation
holds. Copies of an answer's inputs are among the tensors, so draw inputs that are small beside what is
forbidden. ``undefined_writes`` notes indexed writes whose outcome torch does not define.
"""

import contextlib
import io
import linecache
import math
import os
import re
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from types import CodeType, FrameType
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kvlearn
from kvlearn.grading.folders import MARK

HOME = os.path.dirname(os.path.abspath(kvlearn.__file__))
WITHIN = os.path.join(HOME, "")
FREE = tuple(os.path.join(HOME, name) for name in ("grading", "teaching", "_solutions", "validate.py"))
UNIT_FOLDERS: set[str] = set()  # of the units loaded: their code is ours as the package's is
UNITS = "kvlearn_units"  # the package of the units' modules, and the module of our solutions
GRADING = MARK in os.environ  # a grader's kernel, where answers are a learner's and nobody else's
PLAIN = (Tensor, torch.nn.Parameter)
OURS_EDITED = re.compile(r"<\d\d\.\d+: ")  # the code of a known mistake
LIBRARIES = (
    "<frozen ",
    *(os.path.join(path, "") for path in (HOME, *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))),
    *(os.path.join(path, "") for path in site.getsitepackages()),
)


class Raised(Exception):
    """The answer raised: ``what`` in one line, with the place in the learner's code."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.what = f"{type(error).__name__}: {shorten(text_of(error))}".removesuffix(": ")
        place = place_of(error)
        if place:
            self.what += f" ({place})"
        super().__init__(self.what)


class NotWritten(Exception):
    """The answer is still the stub, or another answer that it needs is missing, as the message says."""


class Interrupted(BaseException):
    """The learner, or a limit on time, stopped the answer."""


class CallWrapper:
    """A function or class of the learner's, or an object it made.

    Every call runs on copies of its tensors, so that the check's own stay as they are, and notes whether the
    copies were changed, which forbidden function was called, and with which shapes.
    """

    def __init__(self, target: Any, name: str, record: "CallRecord") -> None:
        self._target, self._name, self._record = target, name, record

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        record = self._record
        # A class is asked for under a name in capitals; a function that makes objects is as good.
        makes_objects = self._name.rpartition(".")[2][:1].isupper()
        copies, kept = copy_tensors((args, kwargs))
        record.name = self._name
        record.handed = record.handed or any(map(runs_code, [*args, *kwargs.values()]))
        record.borrowed = record.borrowed or self._borrowed()
        record.call = f"{self._name}({', '.join(map(brief, [*args, *kwargs.values()]))})"
        try:
            with watched(record):
                result = self._target(*copies[0], **copies[1])
        except (KeyboardInterrupt, Interrupted):
            raise Interrupted from None
        except (Raised, NotWritten):  # of another answer, which this one has called
            raise
        except BaseException as error:
            if is_stub(error):
                raise NotWritten from None
            raise Raised(error) from None
        if dishonest := "" if makes_objects else disguised(result):
            raise Raised(TypeError(f"the answer returned {dishonest}")) from None
        record.changed = record.changed or any(
            was.shape != is_.shape or differ(was, is_) for was, is_ in kept
        )
        return CallWrapper(result, self._name, record) if makes_objects else result

    def __getattr__(self, name: str) -> Any:
        try:
            value = getattr(self._target, name)
        except AttributeError as error:
            self._record.call = f"{self._name}.{name}"
            raise Raised(error) from None
        if dishonest := disguised(value):
            raise Raised(TypeError(f"{self._name}.{name} is {dishonest}")) from None
        return CallWrapper(value, f"{self._name}.{name}", self._record) if callable(value) else value

    def _borrowed(self) -> str:
        """The name of the thing itself, if it is one of ours handed in as it is."""
        module = str(getattr(self._target, "__module__", ""))
        if GRADING and module.startswith(UNITS) and not self._record.ours:
            return f"{getattr(self._target, '__name__', self._name)} of the unit's own code"
        free = module.startswith(("kvlearn.grading.", "kvlearn.teaching."))
        if self._record.may_use_kvlearn or not module.startswith("kvlearn.") or free:
            return ""
        return f"{module}.{getattr(self._target, '__name__', self._name)}"


class CallRecord:
    """The notes made while an answer ran."""

    def __init__(
        self, forbidden: dict[Callable[..., Any], str], may_use_kvlearn: bool, ours: bool = False
    ) -> None:
        self.forbidden, self.may_use_kvlearn = forbidden, may_use_kvlearn
        self.ours = ours  # a known wrong answer of ours runs, to be compared
        self.handed = False  # the check gave the answer something of its own to call
        self.name = ""  # of the last thing called
        self.call = ""  # the same, with the shapes of its arguments
        self.changed = False
        self.borrowed = ""


@contextmanager
def watched(record: CallRecord) -> Iterator[None]:
    """Note calls of forbidden functions; the interpreter's profiler sees them under whatever name."""

    ours_is_free, forbidden = record.may_use_kvlearn, record.forbidden

    def note(frame: FrameType, event: str, what: Any) -> None:
        if event == "call":
            if not ours_is_free and is_borrowed(frame.f_code):
                module = os.path.relpath(frame.f_code.co_filename, os.path.dirname(HOME)).removesuffix(".py")
                name = f"{module.replace(os.sep, '.')}.{frame.f_code.co_qualname}"
                record.borrowed = record.borrowed or name
            elif GRADING and not record.handed and is_reference(frame):
                record.borrowed = record.borrowed or f"{frame.f_code.co_name} of the unit's own code"
        elif event == "c_call" and forbidden:
            if isinstance(getattr(what, "__self__", None), Tensor):  # x.softmax counts as Tensor.softmax
                what = getattr(Tensor, what.__name__, what)
            record.borrowed = record.borrowed or forbidden.get(what, "")

    if ours_is_free and not forbidden and not GRADING:
        yield  # nothing to look for, and the profiler makes every call slower
        return
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(before)


def is_borrowed(code: CodeType) -> bool:
    return code.co_filename.startswith(WITHIN) and not code.co_filename.startswith(FREE)


def is_reference(frame: FrameType) -> bool:
    """Has a learner's line called a function of a unit's checks or solutions?"""
    code, caller = frame.f_code, frame.f_back
    if code.co_name.startswith("__") or caller is None:  # torch calls __torch_function__ of a check's watch
        return False
    return is_units(code.co_filename) and is_learners(caller.f_code.co_filename)


def is_units(filename: str) -> bool:
    return filename.startswith((*UNIT_FOLDERS, "<solution ", "<set-up "))


def is_learners(filename: str) -> bool:
    """Is this file, or cell, neither ours nor a library's?"""
    return not filename.startswith(LIBRARIES) and not is_units(filename) and not OURS_EDITED.match(filename)


def runs_code(value: Any, depth: int = 2) -> bool:
    """Can an answer that is handed this call code of the check's by it?"""
    if isinstance(value, Tensor | int | float | str | torch.dtype | torch.device) or value is None:
        return False
    if type(value) in (tuple, list, dict) and depth:
        return any(runs_code(each, depth - 1) for each in (value.values() if type(value) is dict else value))
    return type(value) not in (tuple, list, dict, set)


def disguised(value: Any, depth: int = 3) -> str:
    """The fault of a value that would decide by itself how a check compares it; empty if there is none.

    A class of tensors answers for every function of torch that meets it (``__torch_function__``), and a class
    with an ``__eq__`` of its own for every comparison.
    """
    kind = type(value)
    if issubclass(kind, Tensor):
        name = "" if kind in PLAIN else kind.__name__
        return f"a {name}, which is a tensor class of its own: expected a plain torch.Tensor" if name else ""
    if issubclass(kind, tuple | list | dict) and depth:
        base = next(each for each in (tuple, list, dict) if issubclass(kind, each))
        parts: Any = dict.values(value) if base is dict else base.__iter__(value)
        found = next(filter(None, (disguised(part, depth - 1) for part in islice(parts, 1000))), "")
        if found:
            return found
    own = [each for each in kind.__mro__ if each.__module__ == "__main__" and "__eq__" in vars(each)]
    if own and not issubclass(kind, type) and "__dataclass_fields__" not in vars(own[0]):
        return f"a {kind.__name__}, whose class says itself what it is equal to: expected a plain value"
    return ""


def copy_tensors(value: Any) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """The same nest of tuples, lists and dicts with every tensor cloned, and the pairs (tensor, clone)."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def copy(part: Any) -> Any:
        if isinstance(part, Tensor):
            pairs.append((part, part.clone()))
            return pairs[-1][1]
        if type(part) in (tuple, list):
            return type(part)(copy(item) for item in part)
        if type(part) is dict:
            return {key: copy(item) for key, item in part.items()}
        return part

    return copy(value), pairs


def differ(a: Tensor, b: Tensor) -> bool:
    """Do two tensors of one shape hold different numbers? NaN is equal to NaN here, and to nothing else."""
    if a.dtype != b.dtype:
        return True
    if torch.equal(a, b):  # makes no tensor, which ``new_tensors`` would count as the answer's
        return False
    return not bool(((a == b) | (a.isnan() & b.isnan())).all())


def brief(value: Any) -> str:
    """An argument in a few characters: a tensor by its shape."""
    if isinstance(value, Tensor):
        dtype = "" if value.dtype == torch.float32 else f" {str(value.dtype).removeprefix('torch.')}"
        return f"{tuple(value.shape)}{dtype}"
    if isinstance(value, dict) and any(isinstance(each, Tensor) for each in value.values()):
        return shorten(f"{{{', '.join(f'{key!r}: {brief(each)}' for key, each in value.items())}}}", 200)
    if isinstance(value, list) and any(isinstance(each, Tensor) for each in value):
        return shorten(f"[{', '.join(map(brief, value))}]", 200)
    if value is None or isinstance(value, int | float | str | list | dict | torch.dtype):
        return shorten(str(value), 200)
    return f"a {type(value).__name__}"


def is_stub(error: BaseException) -> bool:
    """A NotImplementedError that the learner's cell raises by itself; torch raises its own, with a
    message."""
    if not isinstance(error, NotImplementedError):
        return False
    frame = learners_frame(error)
    line = linecache.getline(frame.filename, frame.lineno or 0) if frame else ""
    return text_of(error) == "" or line.strip().startswith("raise")


def place_of(error: BaseException) -> str:
    frame = learners_frame(error)
    if frame is None:
        return ""
    return f"line {frame.lineno} of your code: {shorten(frame.line or '', 120)}".removesuffix(": ")


def learners_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost line that is neither ours nor a library's."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((f for f in reversed(frames) if not f.filename.startswith((*LIBRARIES, *UNIT_FOLDERS))), None)


def text_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return "(its message could not be read)"


def shorten(text: str, most: int = 300) -> str:
    """On one line, and not longer than ``most`` characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


class Nowhere(io.TextIOBase):
    """Takes any amount of text and keeps none."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def quiet() -> Iterator[None]:
    """Swallow stdout and stderr: Python's streams, references to them held elsewhere, and the descriptors."""
    streams = {s for s in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__) if s is not None}
    flush(streams)
    with contextlib.ExitStack() as stack:
        stack.callback(flush, streams)
        for descriptor in (1, 2):
            stack.enter_context(descriptor_to_nowhere(descriptor))
        stack.callback(flush, streams)  # what was buffered must leave before the descriptors come back
        for stream in streams:
            stack.enter_context(write_to_nowhere(stream))
        stack.enter_context(contextlib.redirect_stdout(Nowhere()))
        stack.enter_context(contextlib.redirect_stderr(Nowhere()))
        yield


@contextmanager
def descriptor_to_nowhere(descriptor: int) -> Iterator[None]:
    try:
        kept = os.dup(descriptor)
    except OSError:  # closed: nothing can come out of it
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, descriptor)
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def write_to_nowhere(stream: Any) -> Iterator[None]:
    """A logging handler or a learner's variable may hold the stream itself, so its own method is replaced."""
    write: Callable[[str], int] = len
    try:
        stream.write = write
    except AttributeError:  # a stream that takes no attributes
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(AttributeError):
            del stream.write


def flush(streams: set[TextIO]) -> None:
    for stream in streams:
        with contextlib.suppress(Exception):
            stream.flush()


class Made(NamedTuple):
    """A tensor in memory of its own: its shape, and the operation that made it."""

    shape: tuple[int, ...]
    op: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class _TensorWatch(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would load its compiler to skip, which takes seconds and replaces functions of torch."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Made] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {memory(tensor) for tensor in tensors([*args, *(kwargs or {}).values()])}
        for tensor in tensors([result]):
            if memory(tensor) not in given:
                self.made.append(Made(tuple(tensor.shape), func.overloadpacket.__name__))
        return result


def tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, which are plain or in lists. (Every operation of
    an answer comes by here, and torch's own ``tree_leaves`` takes several times as long as most of them.)"""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


def memory(tensor: Tensor) -> int:
    """Names the memory that a tensor lies in; views of one memory have the same name."""
    name: int = tensor.untyped_storage()._cdata
    return name


@contextmanager
def new_tensors() -> Iterator[list[Made]]:
    """Every tensor that is made inside, in order."""
    with _TensorWatch() as watch:
        yield watch.made


class _WriteWatch(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No, as for _TensorWatch."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        write = func.overloadpacket.__name__.removesuffix("_")
        if write in ORDERS and not kwargs:
            with contextlib.suppress(
                Exception
            ):  # what does not fit raises below, where it is the answer's own
                ways = ORDERS[write](*args)
                if ways is not None and differ(*ways):
                    self.found.append(write)
        return func(*args, **(kwargs or {}))


def _put(into: Tensor, indices: Sequence[Any], values: Tensor, accumulate: bool = False) -> Any:
    """The outcome of index_put with its writes in their order, and in the opposite one."""
    at = [i for i, index in enumerate(indices) if index is not None]
    if accumulate or not at or any(indices[i].dtype in (torch.bool, torch.uint8) for i in at):
        return None
    named = torch.broadcast_tensors(*(indices[i] for i in at))
    # The dimensions of the indices are where the first of them is, or in front if others lie between.
    first = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    rest = [n for i, n in enumerate(into.shape) if i not in at]
    values = values.expand(*rest[:first], *named[0].shape, *rest[first:])
    reverse = list(indices)
    for i, index in zip(at, named, strict=True):
        reverse[i] = index.flip(tuple(range(index.ndim)))
    backwards = values.flip(tuple(range(first, first + named[0].ndim)))
    put = torch.ops.aten.index_put  # takes None where a dimension has no index
    return put(into, list(indices), values), put(into, reverse, backwards)


def _copy(into: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    """As _put, for index_copy."""
    backwards = torch.index_copy(into, dim, index.flip(0), source.flip(dim))
    return torch.index_copy(into, dim, index, source), backwards


def _scatter(into: Tensor, dim: int, index: Tensor, source: Any) -> Any:
    """As _put, for scatter."""
    if not isinstance(source, Tensor) or not source.ndim:
        return None
    source = source[tuple(slice(n) for n in index.shape)]
    backwards = torch.scatter(into, dim, index.flip(dim), source.flip(dim))
    return torch.scatter(into, dim, index, source), backwards


ORDERS: dict[str, Callable[..., Any]] = {"index_put": _put, "index_copy": _copy, "scatter": _scatter}


@contextmanager
def undefined_writes() -> Iterator[list[str]]:
    """The indexed writes made inside that write different numbers to one place: torch does not say which of
    them stays. (On a CPU it is the last one for small tensors, so the values do not give it away.)"""
    with _WriteWatch() as watch:
        yield watch.found


def largest_new_tensor(made: Sequence[Made]) -> Made:
    """The one with the most numbers; ``Made((), "")`` where nothing was made."""
    return max(made, key=lambda one: one.numel, default=Made((), ""))
