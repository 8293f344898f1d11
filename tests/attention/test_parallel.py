"""Several mechanisms in one layer: their outputs, caches and bytes are added."""

from typing import Any

import pytest
import torch
from attention_tools import close, draw, redraw

from kvlearn.attention import REGISTRY, ParallelMixers, RopeConfig

M = 24
PAIRS: dict[str, tuple[Any, ...]] = {
    "attention and a state": ("gqa", ("mamba2", {"d_state": 6, "n_heads": 6})),
    "memory and a window": ("mhc", ("window", {"window": 3})),
    "local and global": (("window", {"window": 3}), "full"),
    "three": ("gated_delta", ("window", {"window": 3}), "retention"),
}
every_pair = pytest.mark.parametrize("pair", PAIRS)


def layer(pair: str, **options: Any) -> ParallelMixers:
    return redraw(ParallelMixers(M, 3, parts=PAIRS[pair], **options))


@every_pair
@torch.no_grad()
def test_the_output_is_the_sum_of_the_parts_outputs(pair: str) -> None:
    both, x = layer(pair), draw(2, 9, M)
    close(both(x), torch.stack([mixer(x) for mixer in both.mixers]).sum(0))


@every_pair
@torch.no_grad()
def test_normalised_outputs_do_not_depend_on_the_parts_sizes(pair: str) -> None:
    both, x = layer(pair, normalise=True), draw(2, 9, M)
    expected = both(x)
    close(expected, both.naive(x))
    both.mixers[0].o_proj.weight *= 7
    close(both(x), expected, 1e-4)


@every_pair
@torch.no_grad()
def test_bytes_are_the_sums_of_the_parts_bytes(pair: str) -> None:
    both = layer(pair)
    for length in (1, 2, 50):
        assert both.new_cache(2, length).nbytes == both.cache_bytes(length, batch=2)
        assert both.cache_bytes(length) == sum(mixer.cache_bytes(length) for mixer in both.mixers)
        assert both.read_bytes(length) == sum(mixer.read_bytes(length) for mixer in both.mixers)


@every_pair
@torch.no_grad()
def test_pieces_of_any_size_give_what_one_pass_gives(pair: str) -> None:
    both, x = layer(pair), draw(2, 12, M)
    cache = both.new_cache(2, 12)
    close(torch.cat([both(piece, cache) for piece in x.split((5, 1, 1, 5), dim=1)], dim=1), both(x))


@torch.no_grad()
def test_attention_beside_attention_can_be_trimmed_and_a_state_cannot() -> None:
    both, x = layer("local and global"), draw(2, 5, M)
    cache = both.new_cache(2, 9)
    both(x[:, :3], cache)
    cache.trim(torch.tensor([3, 1]))
    got = both(x[:, 3:], cache)
    for row, length in enumerate((3, 1)):
        close(got[row], both(torch.cat((x[row, :length], x[row, 3:]))[None])[0, length:])
    cache.reset()
    close(both(x, cache), both(x))
    cache = layer("attention and a state").new_cache(2, 9)
    with pytest.raises(ValueError, match="cannot forget"):
        cache.trim(torch.tensor([0, 0]))


@torch.no_grad()
def test_parts_take_the_layers_head_dim_and_rope_unless_they_have_their_own() -> None:
    parts = (("gqa", {"rope": None}), ("window", {"head_dim": 4, "n_heads": 5}), "short_conv")
    both = ParallelMixers(M, 3, parts=parts, head_dim=16, rope=RopeConfig(theta=7.0))
    assert [mixer.head_dim for mixer in both.mixers] == [16, 4, 8]
    assert [mixer.n_heads for mixer in both.mixers] == [3, 5, 3]
    configs = [mixer.rope.config for mixer in both.mixers if hasattr(mixer, "rope")]
    assert configs == [None, RopeConfig(theta=7.0)]


@torch.no_grad()
def test_a_forward_that_was_interrupted_is_noticed() -> None:
    both, x = layer("local and global"), draw(2, 5, M)
    cache = both.new_cache(2, 9)
    both.mixers[0](x, cache.parts[0])
    with pytest.raises(ValueError, match=r"parts of one length, got \[5, 0\]; reset it"):
        both(x, cache)


def test_every_part_begins_as_it_does_alone() -> None:
    both = layer("attention and a state")
    both.initialise()
    assert torch.equal(both.mixers[1].D, torch.ones(6))


def test_a_parts_matrices_without_weight_decay_keep_their_exemption() -> None:
    both = ParallelMixers(M, 3, parts=("gqa", "mamba"))
    assert both.no_weight_decay == ("mixers.1.A_log",)
    assert [n for n, _ in both.named_parameters() if n.startswith(both.no_weight_decay)] == ["mixers.1.A_log"]


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ((), "parts"),
        ("full", "parts"),
        (("fuller",), "parts: expected one of"),
        ((3,), "parts: expected names, or pairs .*, got 3"),
        ((("full", {}, 3),), "parts: expected names, or pairs"),
        ((("full", ["n_heads"]),), "parts: expected names, or pairs"),
        ((("window", {"windows": 3}),), "parts: option of 'window'"),
        ((("gqa", {"reader": True}),), "parts: option of 'gqa'"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_impossible_parts_are_refused_by_name(parts: Any, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        ParallelMixers(M, 3, parts=parts)


@torch.no_grad()
def test_a_cache_of_other_parts_is_refused() -> None:
    both, x = layer("local and global"), draw(2, 5, M)
    with pytest.raises(ValueError, match="cache: expected 2 parts, got 3"):
        both(x, layer("three").new_cache(2, 9))
    with pytest.raises(TypeError, match="cache: expected ParallelCache"):
        both(x, REGISTRY["full"](M, 3).new_cache(2, 9))  # type: ignore[call-arg]
