"""The options of released models' attention, one at a time; all together are in the contract's tests."""

from typing import Any

import pytest
import torch
from attention_tools import close, draw, redraw

from kvlearn.attention import DynamicScaling, LongRopeScaling, ReleasedAttention, Rope, RopeConfig
from kvlearn.attention.rope import rotate_naive
from kvlearn.kernels import decode_attention

LONG = LongRopeScaling((1.0, 1.5, 2.0, 3.0), (2.0, 3.0, 5.0, 9.0), 8, 1.2)
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "qkv_bias": {"qkv_bias": True},
    "o_bias": {"o_bias": True},
    "qk_norm head": {"qk_norm": "head"},
    "qk_norm width": {"qk_norm": "width"},
    "rotary_dim": {"rotary_dim": 2},
    "scale": {"scale": 0.9},
    "softcap": {"softcap": 0.7},
    "v_head_dim": {"v_head_dim": 5},
    "window": {"window": 4},
    "sink_logits": {"sink_logits": True},
    "query_growth": {"query_growth": (0.8, 3, 1)},
    "gate": {"gate": True},
    "rope dynamic": {"rope": RopeConfig(100.0, DynamicScaling(3.0, 8))},
    "rope longrope": {"rope": RopeConfig(100.0, LONG)},
}


def layer(**options: Any) -> ReleasedAttention:
    return redraw(ReleasedAttention(24, 6, n_kv_heads=2, head_dim=8, **options))


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_alone_is_what_the_naive_form_says(option: str) -> None:
    one, x = layer(**OPTIONS[option]), draw(2, 13, 24, seed=1)
    close(one(x), one.naive(x))
    if option != "none":
        plain = layer()
        plain.load_state_dict(one.state_dict(), strict=False) if option != "v_head_dim" else None
        assert (one(x) - plain(x)).abs().max() > 1e-2


@pytest.mark.parametrize("option", [name for name in OPTIONS if not name.startswith("rope")])
def test_each_option_alone_continues_its_cache(option: str) -> None:
    one, x = layer(**OPTIONS[option]), draw(2, 13, 24, seed=1)
    cache = one.new_cache(2, 13)
    with torch.no_grad():
        pieces = [one(piece, cache) for piece in x.split([6, 1, 3, 1, 2], dim=1)]
    close(torch.cat(pieces, dim=1), one(x))
    assert cache.nbytes == one.cache_bytes(13, batch=2)


@pytest.mark.parametrize("option", ["none", "scale", "window", "sink_logits", "softcap", "v_head_dim"])
def test_a_decode_function_is_used_where_it_can_be(option: str) -> None:
    one, x = layer(**OPTIONS[option]), draw(2, 11, 24, seed=1)
    calls = []

    def decode(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(options)
        return decode_attention(*args, **options)

    one.decode = decode
    cache = one.new_cache(2, 11)
    with torch.no_grad():
        one(x[:, :9], cache)
        steps = torch.cat([one(x[:, 9:10], cache), one(x[:, 10:], cache)], dim=1)
        close(steps, one(x)[:, 9:], 1e-4)
    assert len(calls) == (0 if option in ("softcap", "v_head_dim") else 2)


@pytest.mark.parametrize("scaling", [DynamicScaling(3.0, 8), LONG])
def test_angles_change_where_a_call_ends_past_the_original_length(scaling: Any) -> None:
    rope, x = Rope(8, RopeConfig(100.0, scaling)), draw(1, 3, 12, 8)
    positions = torch.arange(12)[None]
    expected = rotate_naive(x.transpose(1, 2), rope.config, range(12)).transpose(1, 2)
    close(rope(x, positions), expected)
    short = rope(x[:, :, :8], positions[:, :8])
    assert (short - rope(x, positions)[:, :, :8]).abs().max() > 0.1
    close(rope(x[:, :, :5], positions[:, :5]), short[:, :, :5])


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"rotary_dim": 3}, "rotary_dim: expected an even number"),
        ({"query_growth": (0.5, 0, 1)}, "query_growth: expected .* with F above 0"),
        ({"query_growth": (0.5, 4)}, "query_growth: expected"),
        ({"rotary_dim": 10}, "rotary_dim: expected at most 8"),
        ({"softcap": 0.0}, "softcap: expected a number above 0"),
        ({"qk_norm": "all"}, "qk_norm: expected one of"),
        ({"window": 0}, "window: expected at least 1"),
        ({"v_head_dim": 0}, "v_head_dim: expected at least 1"),
        ({"rope": RopeConfig(1e4, LongRopeScaling((1.0,), (1.0,), 8))}, "short_factor: expected 4 numbers"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_bad_option_is_refused_by_name(options: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        layer(**options)
