"""Layers that read other layers' keys and values, in a whole model: who reads whom, and what it saves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.attention import RopeConfig
from kvlearn.attention.core import attention, causal_mask, merge_heads, split_heads
from kvlearn.kernels import decode_attention
from kvlearn.model import Decoder, ModelConfig, Spec, load, save

LOCAL, GLOBAL = {"n_kv_heads": 2}, {"n_kv_heads": 3, "rope": RopeConfig(1e6)}
KINDS = {"l": LOCAL, "g": GLOBAL}


def gemma_like(kinds: str, n_shared: int) -> tuple[Spec, ...]:
    """Two types of layers; the last ``n_shared`` read the last of their type that has its own."""
    first = len(kinds) - n_shared
    return tuple(
        Spec("gqa", reads="last" if i >= first else None, **KINDS[kind]) for i, kind in enumerate(kinds)
    )


# A name for the pattern, the depth, the pattern, and whom each layer reads.
STACKS: dict[str, tuple[int, tuple[str | Spec, ...], list[int]]] = {
    "pairs": (6, ("full", Spec("full", reads=-1)), [0, 0, 2, 2, 4, 4]),
    "pairs, an odd one left": (5, ("gqa", Spec("gqa", reads=-1)), [0, 0, 2, 2, 4]),
    "triples": (
        6,
        (Spec("gqa", **LOCAL), Spec("gqa", reads=-1, **LOCAL), Spec("gqa", reads=-2, **LOCAL)),
        [0, 0, 0, 3, 3, 3],
    ),
    "triples by last": (
        6,
        ("full", Spec("full", reads="last"), Spec("full", reads="last")),
        [0, 0, 0, 3, 3, 3],
    ),
    "the first for all": (4, ("full", *(Spec("full", reads=-n) for n in (1, 2, 3))), [0, 0, 0, 0]),
    "two interleaved": (6, ("full", "full", Spec("full", reads=-2)), [0, 1, 0, 3, 4, 3]),
    "gemma": (8, gemma_like("lglglllg", 4), [0, 1, 2, 3, 2, 2, 2, 3]),
    "kinds interleaved": (
        6,
        (
            *("full", Spec("routed", **LOCAL), Spec("token_routed", **LOCAL)),
            *(Spec("token_routed", reads="last", **LOCAL), Spec("full", reads="last")),
            Spec("routed", reads="last", **LOCAL),
        ),
        [0, 1, 2, 2, 0, 1],
    ),
    "beside latents": (4, ("mhc", Spec("gqa", **LOCAL), "mla", Spec("gqa", reads=-2, **LOCAL)), [0, 1, 2, 1]),
}
every_stack = pytest.mark.parametrize("name", STACKS)


def config(name: str) -> ModelConfig:
    n_layers, layers, _ = STACKS[name]
    return ModelConfig(50, 24, n_layers, 6, d_ff=32, layers=layers)


def decoder(config: ModelConfig, seed: int = 0) -> Decoder:
    """A decoder whose weights are large enough that the next token is not a toss-up."""
    torch.manual_seed(seed)
    model = Decoder(config).eval()
    for weight in model.parameters():
        weight.data.mul_(8.0 if weight.dim() > 1 else 1.0)
    return model


def prompt(batch: int = 2, time: int = 9) -> Tensor:
    return torch.randint(0, 50, (batch, time), generator=torch.Generator().manual_seed(1))


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


@every_stack
def test_every_layer_reads_its_owner(name: str) -> None:
    assert config(name).owners == STACKS[name][2]


def test_a_model_without_readers_owns_all() -> None:
    assert ModelConfig(n_layers=4, layers=("full", "gqa")).owners == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["pairs", "triples", "two interleaved", "gemma"])
@torch.no_grad()
def test_logits_are_those_written_out_by_hand(name: str) -> None:
    """Layer by layer: an owner's keys and values are made from its own input, and kept for its readers."""
    model, tokens = decoder(config(name)), prompt()
    x, kept, mask = model.embed(tokens), {}, causal_mask(9, 9)
    positions = torch.arange(9)[None]
    for i, block in enumerate(model.blocks):
        mixer: Any = block.mixer
        mixed = F.rms_norm(x, (24,), block.mixer_norm.weight, 1e-5)
        owner = STACKS[name][2][i]
        if owner == i:
            k = mixer.rope(split_heads(mixed @ mixer.k_proj.weight.T, mixer.n_kv_heads), positions)
            kept[i] = k, split_heads(mixed @ mixer.v_proj.weight.T, mixer.n_kv_heads)
        k, v = (part.repeat_interleave(6 // mixer.n_kv_heads, 1) for part in kept[owner])
        q = mixer.rope(split_heads(mixed @ mixer.q_proj.weight.T, 6), positions)
        x = x + merge_heads(attention(q, k, v, mask)) @ mixer.o_proj.weight.T
        x = x + block.mlp(F.rms_norm(x, (24,), block.mlp_norm.weight, 1e-5))
    close(model(tokens), F.rms_norm(x, (24,), model.norm.weight, 1e-5) @ model.head.weight.T)


@every_stack
@torch.no_grad()
def test_any_cutting_gives_the_logits_of_one_pass(name: str) -> None:
    model, tokens = decoder(config(name)), prompt(time=13)
    expected = model(tokens)
    for sizes in ([13], [5, 4, 4], [7, 1, 1, 3, 1], [1] * 13):
        cache = model.new_cache(2, 13)
        got = torch.cat([model(piece, cache) for piece in tokens.split(sizes, dim=1)], dim=1)
        close(got, expected)
        assert cache.length == 13


@every_stack
def test_generation_with_the_cache_is_generation_without(name: str) -> None:
    model = decoder(config(name))
    expected = model.generate(prompt(), 10, use_cache=False)
    for chunk in (None, 1, 4):
        assert torch.equal(model.generate(prompt(), 10, chunk=chunk), expected)


@every_stack
@torch.no_grad()
def test_rows_of_different_length_continue_as_if_alone(name: str) -> None:
    model, lengths, new = decoder(config(name)), [9, 4, 6], prompt(3, 12)[:, 9:]
    cache, start = model.new_cache(3, 20), prompt(3)
    model(start, cache)
    cache.trim(torch.tensor(lengths))
    together = torch.cat([model(new[:, :2], cache), model(new[:, 2:], cache)], dim=1)
    for row, length in enumerate(lengths):
        alone = torch.cat((start[row, :length], new[row]))[None]
        close(together[row], model(alone)[0, length:])


@every_stack
@torch.no_grad()
def test_reset_really_resets(name: str) -> None:
    model = decoder(config(name))
    cache = model.new_cache(2, 12)
    model(prompt(time=12), cache)
    cache.reset()
    assert cache.length == 0
    close(torch.cat([model(piece, cache) for piece in prompt().split(4, 1)], 1), model(prompt()))


@every_stack
def test_a_token_changes_nothing_before_it(name: str) -> None:
    model, tokens = decoder(config(name)), prompt()
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5]) or (before - after)[:, :5].abs().max() < 1e-5
    assert (before - after)[:, 5].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "factor"), [("pairs", 2), ("triples", 3), ("the first for all", 4), ("triples by last", 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stored_falls_by_the_factor_and_read_does_not(name: str, factor: int, dtype: torch.dtype) -> None:
    shared = config(name)
    unshared = ModelConfig(**{**vars(shared), "layers": (STACKS[name][1][0],)})
    (*rows, total), (*_, alone) = (Decoder(c).table(70, batch=2, dtype=dtype) for c in (shared, unshared))
    assert total["stored"] * factor == alone["stored"]
    assert total["read"] == alone["read"] == alone["stored"]
    caches = [Decoder(c).new_cache(2, 70, dtype=dtype).nbytes for c in (shared, unshared)]
    assert caches == [total["stored"], alone["stored"]]
    owners = STACKS[name][2]
    assert [row["stored"] > 0 for row in rows] == [i == owner for i, owner in enumerate(owners)]
    assert len({row["read"] for row in rows}) == 1


@every_stack
def test_the_table_says_who_reads_whom_and_counts_what_is_allocated(name: str) -> None:
    model = decoder(config(name))
    *rows, total = model.table(40, batch=2)
    names = [spec.name for spec in model.config.specs]
    assert [row["mechanism"] for row in rows] == [
        kind if i == owner else f"{kind}, reads layer {owner}"
        for i, (kind, owner) in enumerate(zip(names, STACKS[name][2], strict=True))
    ]
    cache = model.new_cache(2, 40)
    assert [row["stored"] for row in rows] == [layer.nbytes for layer in cache.layers]
    assert total["stored"] == cache.nbytes
    assert total["read"] == sum(row["read"] for row in rows)


@every_stack
def test_readers_have_no_keys_and_values_of_their_own(name: str) -> None:
    """Nor weights to make them: the model is smaller by these matrices, and by nothing else."""
    shared, owners = config(name), STACKS[name][2]
    whole = ModelConfig(**{**vars(shared), "layers": tuple(Spec(s.name, **s.options) for s in shared.specs)})
    model, unshared = Decoder(shared), Decoder(whole)
    missing = unshared.state_dict().keys() - model.state_dict().keys()
    assert missing == {
        f"blocks.{i}.mixer.{part}_proj.weight"
        for i, owner in enumerate(owners)
        if i != owner
        for part in "kv"
    }
    saved = sum(unshared.state_dict()[name].numel() for name in missing)
    assert unshared.n_parameters - model.n_parameters == saved
    assert not model.state_dict().keys() - unshared.state_dict().keys()


@every_stack
def test_gradients_reach_everything(name: str) -> None:
    model = decoder(config(name)).train()
    torch.manual_seed(0)
    F.cross_entropy(model(prompt(4)).flatten(0, 1), prompt(4).flatten()).backward()
    for parameter, weight in model.named_parameters():
        assert weight.grad is not None, parameter
        assert weight.grad.isfinite().all()
        assert weight.grad.abs().sum() > 0, parameter


def test_an_owner_learns_from_its_reader_too() -> None:
    """With the owner's own output cut off, its keys and values still learn."""
    model = decoder(config("pairs"))
    model.blocks[0].mixer.o_proj.weight.data.zero_()  # type: ignore[union-attr]
    model(prompt()).square().sum().backward()
    gradients = {name: weight.grad for name, weight in model.blocks[0].mixer.named_parameters()}
    assert gradients["k_proj.weight"].abs().sum() > 0  # type: ignore[union-attr]
    assert gradients["v_proj.weight"].abs().sum() > 0  # type: ignore[union-attr]
    assert gradients["q_proj.weight"].abs().sum() == 0  # type: ignore[union-attr]


@every_stack
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_decode_kernel_does_the_steps_of_readers_too(name: str, cache_dtype: torch.dtype) -> None:
    model, rows, results = decoder(config(name)), torch.tensor([9, 4]), []
    asked = []

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        asked.append(lengths.tolist())
        return decode_attention(q, k, v, lengths)

    for decode in (None, step):
        model.decode_with(decode)
        cache = model.new_cache(2, 12, dtype=cache_dtype)
        model(prompt(), cache)
        cache.trim(rows)
        results.append(torch.cat([model(token, cache) for token in prompt(time=3).split(1, dim=1)], dim=1))
    close(*results)
    able: list[Any] = [mixer for mixer in model.mixers if mixer.name not in ("mhc", "mla")]
    calls = sum(len(set(mixer.pools)) if mixer.name == "routed" else 1 for mixer in able)
    assert asked == [rows for rows in ([10, 5], [11, 6], [12, 7]) for _ in range(calls)]
    model.decode_with(None)
    assert all(mixer.decode is None for mixer in able)


@torch.no_grad()
def test_a_routed_reader_has_a_route_of_its_own() -> None:
    routed = Spec("routed", n_kv_heads=3)
    layers = (routed, Spec("routed", n_kv_heads=3, reads=-1))
    model = decoder(ModelConfig(50, 24, 2, 6, d_ff=32, layers=layers))
    before = model(prompt())
    model.mixers[1].route([2, 1, 0, 2, 1, 0])  # type: ignore[operator]
    assert model.mixers[0].pools == [0, 0, 1, 1, 2, 2]  # type: ignore[union-attr]
    assert not torch.allclose(model(prompt()), before, atol=1e-2)
    assert torch.equal(model.generate(prompt(), 9), model.generate(prompt(), 9, use_cache=False))


@every_stack
def test_a_configuration_survives_json(name: str) -> None:
    again = ModelConfig.from_dict(json.loads(json.dumps(config(name).to_dict())))
    assert again == config(name)
    assert again.owners == STACKS[name][2]
    assert [spec.reads for spec in again.specs] == [spec.reads for spec in config(name).specs]


@every_stack
def test_what_is_saved_is_what_is_loaded(name: str, tmp_path: Path) -> None:
    model = decoder(config(name))
    save(model, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.config == model.config
    assert torch.equal(again(prompt()), model(prompt()))


def test_specs_are_equal_where_they_read_alike() -> None:
    one, same = Spec("gqa", reads=-1, n_kv_heads=2), Spec("gqa", n_kv_heads=2, reads=-1)
    assert one == same
    assert hash(one) == hash(same)
    others = [Spec("gqa", n_kv_heads=2), Spec("gqa", reads=-2, n_kv_heads=2), Spec("gqa", reads="last")]
    assert all(one != other for other in others)
    assert repr(one) == "Spec('gqa', n_kv_heads=2, reads=-1)"


def reads(whom: Any, name: str = "gqa", **options: Any) -> Spec:
    return Spec(name, reads=whom, **options)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("whom", "name", "says"),
    [
        (0, "gqa", "layers: reads: expected at most -1 .*got 0"),
        (1, "gqa", "layers: reads: expected at most -1 .*got 1"),
        (True, "gqa", "layers: reads: expected at most -1 .*got True"),
        ("first", "gqa", "layers: reads: expected one of 'last'; got 'first'"),
        (-1.0, "gqa", "layers: reads: expected one of 'last'"),
        (-1, "mhc", "layers: a layer of kind 'mhc' cannot read another's keys and values"),
        ("last", "mla", "layers: a layer of kind 'mla' cannot read another's keys and values"),
        (-1, "nobody", "layers: expected one of 'gqa', 'full', .*; got 'nobody'"),
    ],
)
def test_a_spec_that_reads_nonsense_is_refused_by_name(whom: Any, name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        reads(whom, name)


def test_only_reads_makes_a_reader() -> None:
    with pytest.raises(ValueError, match=r"layers: option of 'gqa': expected one of .*; got 'reader'"):
        Spec("gqa", reader=True)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([reads(-1)], "layer 0, .* reads layer -1; .*: there is none"),
        ([reads("last")], "layer 0, .* reads an earlier layer; .*: there is none"),
        (["gqa", reads(-2)], r"layer 1, .* reads layer -1; .*: \[0\]"),
        (["gqa", "gqa", reads(-3)], r"layer 2, .* reads layer -1; .*: \[0, 1\]"),
        (["gqa", reads(-1), reads(-1)], r"layer 2, .* reads layer 1; .*: \[0\]"),  # itself a reader
        (["full", reads(-1)], "layer 1, .* reads layer 0; .*: there is none"),
        (["full", reads("last")], "layer 1, .* reads an earlier layer; .*: there is none"),
        (["mhc", reads(-1)], "layer 1, .* reads layer 0; .*: there is none"),
        (["gqa", "full", reads(-1)], r"layer 2, .* reads layer 1; .*: \[0\]"),
        (["gqa", reads(-1, n_kv_heads=2)], "layer 1, .* reads layer 0; .*: there is none"),
        ([Spec("gqa", n_kv_heads=2), reads("last")], "layer 1, .* reads an earlier layer; .*: there is none"),
        ([Spec("gqa", rope=None), reads("last")], "layer 1, .* reads an earlier layer; .*: there is none"),
        (["full", reads(-1, "gqa"), "gqa"], "layer 1, .* reads layer 0; .*: there is none"),
    ],
)
def test_a_layer_that_reads_what_it_cannot_is_refused_by_name(layers: list[Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"layers: {says}"):
        ModelConfig(n_layers=len(layers), layers=tuple(layers))


def test_a_pattern_is_checked_as_it_repeats() -> None:
    """A layer that reads too far back in the first round would be right in the second."""
    pattern = (reads(-1), "gqa")
    with pytest.raises(ValueError, match="layers: layer 0"):
        ModelConfig(n_layers=4, layers=pattern)
    assert ModelConfig(n_layers=4, layers=pattern[::-1]).owners == [0, 0, 2, 2]


@pytest.mark.usefixtures("unchecked_shapes")
@torch.no_grad()
def test_a_cache_of_a_model_without_readers_is_refused_by_name() -> None:
    shared = config("pairs")
    unshared = ModelConfig(**{**vars(shared), "layers": ("full",)})
    with pytest.raises(TypeError, match="cache: expected NoCache, got KVCache"):
        Decoder(shared)(prompt(), Decoder(unshared).new_cache(2, 20))
    with pytest.raises(TypeError, match="cache: expected KVCache, got NoCache"):
        Decoder(unshared)(prompt(), Decoder(shared).new_cache(2, 20))


@torch.no_grad()
def test_a_pass_that_was_interrupted_between_owners_does_not_go_unnoticed() -> None:
    model = decoder(config("pairs"))
    cache = model.new_cache(2, 20)
    model(prompt(), cache)
    cache.layers[2].advance(1)
    with pytest.raises(ValueError, match=r"cache: expected layers of one length, got \[9, 10, 9\]"):
        model(prompt()[:, :1], cache)


@torch.no_grad()
def test_trim_is_for_all_owners_or_none() -> None:
    model = decoder(config("pairs"))
    cache = model.new_cache(2, 20)
    model(prompt(), cache)
    cache.layers[4].trim(torch.tensor([3, 9]))
    with pytest.raises(ValueError, match="lengths: expected 0 to"):
        cache.trim(torch.tensor([5, 5]))
    assert [layer.length for layer in cache.layers] == [9, 0, 9, 0, 9, 0]


@torch.no_grad()
def test_too_many_tokens_are_refused() -> None:
    model = decoder(config("triples"))
    with pytest.raises(ValueError, match="cache: expected at most max_len=5 tokens"):
        model(prompt(), model.new_cache(2, 5))
