"""Silence while a learner's code runs: one line on stderr would cost all points in nbgrader."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


class Nowhere(io.TextIOBase):
    """Takes any amount of text and keeps none."""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


@contextlib.contextmanager
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


@contextlib.contextmanager
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


@contextlib.contextmanager
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
