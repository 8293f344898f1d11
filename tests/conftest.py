"""Shapes written in signatures are checked while the tests run: jaxtyping's hook, with beartype.

A check takes longer than most functions themselves. So each function is checked in its first three calls of
every test, and in all calls with HYPOTHESIS_PROFILE=thorough.
"""

import dataclasses
import functools
import gc
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import settings

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tests send signals to themselves. A job in the background or under nohup would ignore them, and never end.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# No test reads or records the progress of the person who runs it.
os.environ["KVLEARN_WORK"] = os.devnull

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
CHECKED_CALLS = sys.maxsize if THOROUGH else 3
jaxtyped = jaxtyping.jaxtyped
running: list[pytest.Item | None] = [None]  # the test


def at_first(function: Callable[..., Any], typechecker: Any) -> Callable[..., Any]:
    """``function``, checked in its first calls of every test."""
    test, calls, checked = running[0], 0, None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal test, calls, checked
        if test is not running[0]:
            test, calls = running[0], 0
        calls += 1
        if calls > CHECKED_CALLS:
            return function(*args, **kwargs)
        checked = checked or jaxtyped(function, typechecker=typechecker)
        return checked(*args, **kwargs)

    return call


def jaxtyped_at_first(typechecker: Any) -> Callable[[Any], Any]:
    """The decorator that the hook puts on each function and class, in place of ``jaxtyping.jaxtyped``."""

    def decorate(thing: Any) -> Any:
        if not inspect.isclass(thing):
            return at_first(thing, typechecker)
        if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
            thing.__init__ = at_first(thing.__init__, typechecker)  # type: ignore[misc]
        return thing

    return decorate


def pytest_runtest_setup(item: pytest.Item) -> None:
    running[0] = item


jaxtyping.jaxtyped = jaxtyped_at_first
jaxtyping.install_import_hook(
    ["kvlearn.attention", "kvlearn.model", "kvlearn.serving.layers", "kvlearn.study", "kvlearn.integrations"],
    "beartype.beartype",
)

# A property is tried on few examples in `make test`, on many with HYPOTHESIS_PROFILE=thorough.
settings.register_profile("few", max_examples=10, deadline=None)
settings.register_profile("thorough", max_examples=300, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "few")


def keep_together(item: Any) -> None:
    """The tests of an ``xdist_group`` run in one worker, where they share fixtures that take long to make.

    pytest-xdist 3.8 puts the group behind an item's ``_nodeid``, which pytest 9.2 does not read any more.
    """
    grouped = getattr(item, "_nodeid", item.nodeid)
    if item.nodeid != grouped:
        item._id = type(item._id).parse(grouped)
        assert item.nodeid == grouped


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests begin first, so that the workers end together."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        keep_together(item)


def pytest_collection_finish() -> None:
    """Modules and tests stay: out of the sight of the collector, which benchmarks call after each part."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Switches that hook off, for tests of what a caller sees who passes something wrong."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
