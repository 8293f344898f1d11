"""While the tests run, shapes in signatures are checked: in the first calls of a function in every test."""

import pytest
import torch

from kvlearn.attention import core

Q, K = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 4)


@pytest.mark.parametrize("test", range(2))
def test_arguments_that_contradict_the_signature_fail_in_every_test(test: int) -> None:
    core.attention(Q, K, K)
    for _ in range(2):
        with pytest.raises(TypeError, match="whilst typechecking parameter 'k'"):
            core.attention(Q, K[0], K)


def test_a_result_that_contradicts_the_signature_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "attend_partial", lambda *_: core.Partial(Q[:, :1], Q[..., 0]))
    with pytest.raises(TypeError, match="whilst checking the return value"):
        core.attention(Q, K, K)
