"""RWKV-7's value residual: layers after the first mix its values into their own."""

from typing import Any

import model_tools
import pytest
import torch
from attention_tools import close, draw, redraw
from model_tools import prompt

from kvlearn.attention import Rwkv7
from kvlearn.model import Decoder, ModelConfig, Spec

M, TIME = 24, 11


def layers() -> tuple[Rwkv7, Rwkv7]:
    """The first layer, and one that reads its values."""
    sizes: dict[str, Any] = {"head_dim": 8, "rank": 4}
    return redraw(Rwkv7(M, 3, **sizes)), redraw(Rwkv7(M, 3, **sizes, value_residual=True), seed=1)


@torch.no_grad()
def test_every_form_and_every_cutting_gives_the_naive_form() -> None:
    first, reader = layers()
    x, before = draw(2, TIME, M), draw(2, TIME, M, seed=1)
    expected = reader.naive(x, first.project_kv(before))
    for form in reader.forms:
        reader.form = form
        close(reader(x, source=first.project_kv(before)), expected)
        caches = first.new_cache(2, TIME), reader.new_cache(2, TIME)
        pieces = []
        for new, old in zip(x.split((4, 1, 6), dim=1), before.split((4, 1, 6), dim=1), strict=True):
            source = first.project_kv(old, caches[0])
            first(old, caches[0], source)
            pieces.append(reader(new, caches[1], source))
        close(torch.cat(pieces, dim=1), expected)


@torch.no_grad()
def test_closed_it_is_a_layer_without_and_open_it_has_the_first_layers_values() -> None:
    first, reader = layers()
    x, before = draw(2, TIME, M), draw(2, TIME, M, seed=1)
    source = first.project_kv(before)
    plain = redraw(Rwkv7(M, 3, head_dim=8, rank=4))
    plain.load_state_dict(reader.state_dict(), strict=False)
    reader.value_up.bias.fill_(-1e4)
    close(reader(x, source=source), plain(x))
    reader.value_up.bias.fill_(1e4)
    opened = reader(x, source=source)
    reader.v_proj.weight.zero_()
    close(reader(x, source=source), opened)
    assert (opened - plain(x)).abs().max() > 1e-2


def test_the_first_layer_is_itself_with_its_own_values_and_learns_from_later_ones() -> None:
    first, reader = layers()
    x = draw(2, TIME, M)
    close(first(x, source=first.project_kv(x)), first(x))
    reader(x, source=first.project_kv(x)).sum().backward()
    assert first.v_proj.weight.grad is not None
    assert first.v_proj.weight.grad.abs().max() > 0
    assert first.k_proj.weight.grad is None


def decoder() -> Decoder:
    return model_tools.decoder([Spec("rwkv7", rank=4), *3 * [Spec("rwkv7", rank=4, reads="last")]])


@torch.no_grad()
def test_a_model_generates_the_same_tokens_with_a_cache_and_without() -> None:
    model = decoder()
    assert model.config.owners == [0, 0, 0, 0]
    assert [mixer.value_residual for mixer in model.mixers] == [False, True, True, True]
    expected = model.generate(prompt(), 12, use_cache=False)
    assert torch.equal(model.generate(prompt(), 12), expected)
    assert torch.equal(model.generate(prompt(), 12, chunk=4), expected)
    assert model.table(40)[-1]["stored"] == model.new_cache(1, 40).nbytes
    assert ModelConfig.from_dict(model.config.to_dict()) == model.config


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_source_that_is_missing_or_does_not_fit_is_refused_by_name() -> None:
    first, reader = layers()
    x = draw(2, TIME, M)
    with pytest.raises(TypeError, match="source: expected KV, got NoneType"):
        reader(x)
    with pytest.raises(ValueError, match=r"source\.v"):
        reader(x, source=first.project_kv(x[:, :-1]))
    with pytest.raises(ValueError, match="layers: option of 'rwkv7'"):
        Spec("rwkv7", value_residual=True)
