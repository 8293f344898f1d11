"""Snapshots of states: all of a prefix or nothing."""

from typing import Any

import pytest
import torch

from kvlearn.model import Decoder, ModelConfig, Spec
from kvlearn.serving import StatePrefixes


def tiny(*layers: str | Spec) -> Decoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 11, "d_model": 24, "n_heads": 3, "n_layers": 2, "d_ff": 32}
    model = Decoder(ModelConfig(**sizes, layers=list(layers))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return model.requires_grad_(False)


@pytest.mark.parametrize("layers", [["gated_delta"], ["mamba2", "linear"]])
def test_a_prompt_continues_from_the_longest_snapshot_of_its_start(layers: list[str]) -> None:
    model = tiny(*layers)
    prefixes = StatePrefixes(model, every=4, room=8)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    for tokens, found in ((prompt, 0), ([*prompt[:9], 0], 8), (prompt[:8], 4), (prompt[:4], 0)):
        cache, logits, cached = prefixes.prefill(tokens, 12)
        assert cached == found
        torch.testing.assert_close(logits, model(torch.tensor([tokens]))[:, -1], atol=1e-4, rtol=1e-4)
        after = model(torch.tensor([[2]]), cache)[:, -1]
        torch.testing.assert_close(after, model(torch.tensor([[*tokens, 2]]))[:, -1], atol=1e-4, rtol=1e-4)


def test_one_other_token_makes_a_snapshot_useless_to_its_last_byte() -> None:
    prefixes = StatePrefixes(tiny("gated_delta"), every=8, room=8)
    prompt = [1] * 9
    prefixes.prefill(prompt, 12)
    assert prefixes.prefill(prompt, 12)[2] == 8
    assert prefixes.prefill([*prompt[:7], 2, 1], 12)[2] == 0  # the eighth token differs


def test_a_snapshot_is_not_changed_by_those_that_continue_from_it() -> None:
    prefixes = StatePrefixes(tiny("gated_delta"), every=4, room=8)
    prefixes.prefill([1] * 5, 12)
    kept = [part.clone() for part in prefixes.snapshots[b"", (1,) * 4]]
    cache, _, _ = prefixes.prefill([1, 1, 1, 1, 5], 12)
    prefixes.model(torch.tensor([[2, 3]]), cache)
    assert all(map(torch.equal, kept, prefixes.snapshots[b"", (1,) * 4]))


def test_salts_keep_tenants_apart() -> None:
    prefixes = StatePrefixes(tiny("gated_delta"), every=4, room=8)
    prefixes.prefill([1] * 9, 12, b"a")
    assert prefixes.prefill([1] * 9, 12, b"b")[2] == 0
    assert prefixes.prefill([1] * 9, 12, b"a")[2] == 8


def test_every_snapshot_costs_the_whole_state_and_the_oldest_is_evicted() -> None:
    model = tiny("gated_delta")
    prefixes = StatePrefixes(model, every=4, room=3)
    prefixes.prefill([1] * 9, 12)
    assert prefixes.nbytes == 2 * model.new_cache(1, 1).nbytes
    prefixes.prefill([2] * 9, 12)
    assert [key[1] for key in prefixes.snapshots] == [(1,) * 8, (2,) * 4, (2,) * 8]


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"len\(prompt\): expected at least 1, got 0"):
        StatePrefixes(tiny("gated_delta"), 4, 4).prefill([], 4)


def test_keys_and_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer 1 \(full\): expected a state, got a KVCache"):
        StatePrefixes(tiny("gated_delta", "full"), 4, 4)
