"""Tests for all recurrences: single precision inside, also under autocast, and shapes on the meta device."""

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from attention_tools import draw, redraw
from torch import Tensor

from kvlearn.attention import REGISTRY
from kvlearn.attention.delta import delta_rule, generalised_delta_rule
from kvlearn.attention.linear import gated_linear_attention, linear_attention
from kvlearn.attention.mamba import selective_scan
from kvlearn.attention.recurrent import load_state
from kvlearn.attention.rwkv import wkv

B, H, T, K = 2, 3, 45, 8
Q, KEY, V, RATE = draw(B, H, T, K), F.normalize(draw(B, H, T, K, seed=1), dim=-1), draw(B, H, T, K), 0.5
FADE = -draw(B, H, T, K, seed=2).abs()
CORES: dict[str, Callable[[str], tuple[Tensor, Iterable[Tensor]]]] = {
    "no decay": lambda form: linear_attention(Q, KEY, V, form=form),
    "a head's": lambda form: linear_attention(Q, KEY, V, FADE[..., 0], form=form),
    "a channel's": lambda form: gated_linear_attention(Q, KEY, V, FADE, form=form),
    "delta": lambda form: delta_rule(Q, KEY, V, FADE[..., 0].exp(), FADE[..., 1], form=form),
    "generalised": lambda form: generalised_delta_rule(Q, KEY, V, KEY, -RATE * KEY, FADE, form=form),
    "scan": lambda form: selective_scan(
        Q[0], -FADE[0], FADE[0, 0, :K], V[0], KEY[0], FADE[0, 0, 0], form=form
    ),
    "wkv": lambda form: wkv(-FADE[0, 0, 0], FADE[0, 0, 1], Q[0], V[0], form=form),
}
every_recurrence = pytest.mark.parametrize(
    "name", sorted(name for name, kind in REGISTRY.items() if kind.forms)
)


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
def test_autocast_does_not_touch_a_recurrence(
    core: Callable[[str], tuple[Tensor, Iterable[Tensor]]], form: str
) -> None:
    expected = core(form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = core(form)
    assert torch.equal(out, expected[0])
    assert all(torch.equal(got, wanted) for got, wanted in zip(state, expected[1], strict=True))


@every_recurrence
def test_a_layer_works_under_autocast(name: str) -> None:
    layer = redraw(REGISTRY[name].tiny())
    x, expected = draw(B, T, layer.d_model), layer(draw(B, T, layer.d_model))
    cache = layer.new_cache(B, T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.cat([layer(piece, cache) for piece in x.split([20, 1, 24], dim=1)], dim=1)
    assert (y - expected).abs().max() < 0.06 * expected.abs().max()
    assert {t.dtype for t in cache.tensors()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_state_is_read_as_wide_as_it_is_stored(dtype: torch.dtype) -> None:
    """Rounded once per step to the weights' dtype, its error would grow with the length."""
    layer = REGISTRY["linear"].tiny().to(dtype)
    cache = layer.new_cache(B, T)
    for part in cache.tensors():
        part.uniform_()
    state, _ = load_state(layer, draw(B, 1, layer.d_model).to(dtype), cache)
    for got, stored in zip(state.values(), cache.tensors(), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, stored)


@every_recurrence
def test_shapes_are_known_without_memory(name: str) -> None:
    layer = REGISTRY[name].tiny().to("meta")
    x, cache = torch.empty(B, T, layer.d_model, device="meta"), layer.new_cache(B, T)
    assert layer(x).shape == layer(x, cache).shape == layer.naive(x).shape == x.shape
    assert cache.device == torch.device("meta")
