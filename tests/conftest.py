"""Shapes written in signatures are checked while the tests run: jaxtyping's hook, with beartype."""

import os
from collections.abc import Iterator

import jaxtyping
import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No test reads or records the progress of the person who runs it.
os.environ["KVLEARN_WORK"] = os.devnull

jaxtyping.install_import_hook(
    ["kvlearn.attention", "kvlearn.model", "kvlearn.serving.layers", "kvlearn.study"], "beartype.beartype"
)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Switches that hook off, for tests of what a caller sees who passes something wrong."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
