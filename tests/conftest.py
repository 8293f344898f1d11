"""Shapes written in signatures are checked while the tests run: jaxtyping's hook, with beartype."""

from collections.abc import Iterator

import jaxtyping
import pytest

jaxtyping.install_import_hook(["kvlearn.attention", "kvlearn.model", "kvlearn.study"], "beartype.beartype")


@pytest.fixture
def doors() -> Iterator[None]:
    """Switches that hook off, for tests of what a caller sees who passes something wrong."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
