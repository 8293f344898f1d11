"""Shapes written in signatures are checked while the tests run: jaxtyping's hook, with beartype."""

import os
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from hypothesis import settings

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No test reads or records the progress of the person who runs it.
os.environ["KVLEARN_WORK"] = os.devnull

jaxtyping.install_import_hook(
    ["kvlearn.attention", "kvlearn.model", "kvlearn.serving.layers", "kvlearn.study", "kvlearn.integrations"],
    "beartype.beartype",
)

# A property is tried on few examples in `make test`, on many with HYPOTHESIS_PROFILE=thorough.
settings.register_profile("few", max_examples=25, deadline=None)
settings.register_profile("thorough", max_examples=300, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "few")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests begin first, so that the workers end together."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Switches that hook off, for tests of what a caller sees who passes something wrong."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
