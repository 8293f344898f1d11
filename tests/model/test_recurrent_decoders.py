"""Decoders of layers that keep a state, alone and between layers of full attention."""

import json
from pathlib import Path

import pytest
import torch
from model_tools import decoder, prompt

from kvlearn.attention import REGISTRY
from kvlearn.measure import running_table
from kvlearn.model import ModelConfig, Spec, load, save

NAMES = sorted(name for name, kind in REGISTRY.items() if kind.forms)
every_recurrence = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize("layers", [["mamba"], *([name, name, name, "full"] for name in NAMES)], ids=str)
def test_cache_and_no_cache_generate_the_same_tokens(layers: list[str]) -> None:
    model = decoder(layers)
    expected = model.generate(prompt(), 12, use_cache=False)
    assert torch.equal(model.generate(prompt(), 12), expected)
    assert torch.equal(model.generate(prompt(), 12, chunk=4), expected)


@every_recurrence
@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(name: str, tmp_path: Path) -> None:
    model = decoder([name, "full"], d_ff=0, norm="layer", embed_norm=True, tied=False)
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.config == model.config
    assert torch.equal(again(prompt()), model(prompt()))


def test_options_that_are_tuples_come_back_from_json() -> None:
    for decay in ((0.5, 0.9, 1.0), [0.5, 0.9, 1.0]):
        config = ModelConfig(d_model=24, n_heads=3, layers=[Spec("retention", decay=decay)])
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_configuration_from_before_there_was_a_choice_of_norms_is_read() -> None:
    config = ModelConfig()
    plain = {k: v for k, v in config.to_dict().items() if k not in ("norm", "embed_norm")}
    assert ModelConfig.from_dict(plain) == config


@torch.no_grad()
@pytest.mark.parametrize("layers", [["full", "gated_delta"], ["gated_delta", "full"]])
def test_a_hybrid_refuses_to_be_trimmed_and_goes_on_as_if_it_had_not_been_asked(layers: list[str]) -> None:
    model = decoder(list(layers))
    cache = model.new_cache(2, 12)
    model(prompt(), cache)
    with pytest.raises(ValueError, match=r"a StateCache cannot forget .* feed prompts of different lengths"):
        cache.trim(torch.tensor([9, 4]))
    assert [layer.lengths for layer in cache.layers] == 4 * [None]
    whole = model(torch.cat((prompt(), prompt()[:, :3]), dim=1))
    torch.testing.assert_close(model(prompt()[:, :3], cache), whole[:, -3:], atol=1e-4, rtol=1e-4)


def test_the_running_table_has_a_row_for_every_state() -> None:
    table = running_table(*NAMES, (*3 * ("gated_delta",), "full"), n_layers=4)
    *states, hybrid = table.rows
    assert {row["elements per token"] for row in states} == {"0"}
    assert {row["at 128K"] == row["stored at 4K, GiB"] for row in states} == {True}
    assert hybrid["elements per token"] == "8,192"
