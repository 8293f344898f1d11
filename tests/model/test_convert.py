"""Conversion of a trained model: exact where nothing has to be lost, and the least lost elsewhere."""

import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvlearn.attention import LinearScaling, RopeConfig, YarnScaling
from kvlearn.model import Decoder, ModelConfig, Spec, convert, load, save
from kvlearn.model.convert import second_moments
from kvlearn.model.low_rank import as_pairs, best_latent, from_pairs, shared_rotary_key
from kvlearn.study import base_model, corpus, windows

SMALL = ModelConfig(vocab_size=32, d_model=24, n_layers=3, n_heads=4, head_dim=8, d_ff=32)
FULL_RANK = Spec("mhc", rank=64, rope_dim=0)


def trained(config: ModelConfig = SMALL) -> Decoder:
    """Random weights as large as training makes them, so that attention is sharp and gains differ."""
    torch.manual_seed(0)
    model = Decoder(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(
                0.5 + torch.rand_like(weight) if weight.dim() == 1 else torch.randn_like(weight) * 0.4
            )
            if "mixer.q_proj" in name or "mixer.k_proj" in name:
                weight.mul_(1.5)
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(32, (3, 17), generator=torch.Generator().manual_seed(1))


def by_heads(proj: torch.nn.Linear, n_heads: int = 4) -> Tensor:
    return proj.weight.detach().unflatten(0, (n_heads, -1))


@torch.no_grad()
def largest_change(model: Decoder, other: Decoder, text: Tensor | None = None) -> float:
    """Of any log-probability."""
    text = tokens() if text is None else text
    ours, theirs = (m(text).log_softmax(-1) for m in (model, other))
    return float((ours - theirs).abs().max())


NOTHING_LOST = [
    (["full"], "random"),
    ([Spec("gqa", n_kv_heads=4)], "mean"),
    ([Spec("gqa", n_kv_heads=4)], "first"),
    ([Spec("routed", n_kv_heads=4)], "mean"),
    ([Spec("window", window=1000)], "random"),  # no shorter than the text: all heads are copied
    ([Spec("window", window=1000, n_kv_heads=4)], "mean"),
    ([Spec("sparse", pattern="strided(1)")], "first"),
    ([FULL_RANK], "activations"),
    ([FULL_RANK], "weights"),
    ([Spec("mhc_transformer", rank=64, rope_dim=0)], "activations"),
    (["full", FULL_RANK, Spec("mhc", rank=24, rope_dim=0)], "weights"),  # 24: x has no more dimensions
]


@pytest.mark.parametrize(("layers", "init"), NOTHING_LOST, ids=str)
def test_where_nothing_has_to_be_lost_the_converted_model_says_the_same(
    layers: list[str | Spec], init: str
) -> None:
    model = trained()
    assert largest_change(convert(model, layers, init=init, tokens=tokens()), model) < 1e-4


@pytest.mark.parametrize(
    "layers", [[Spec("gqa", n_kv_heads=8)], [Spec("mhc", rank=128, rope_dim=0)]], ids=str
)
def test_so_does_the_converted_base_model(layers: list[str | Spec]) -> None:
    init = "mean" if isinstance(layers[0], Spec) and layers[0].name == "gqa" else "activations"
    text = windows(corpus().valid, 2, 128, seed=0, step=0)[:, :-1]
    # At rank 128 the latent keeps all that 256 keys and values of a 128-wide input can say.
    assert largest_change(convert(base_model(), layers, init=init, tokens=text), base_model(), text) < 1e-4


def test_a_conversion_that_loses_something_changes_what_the_model_says() -> None:
    model = trained()
    for layers, init in (
        ([Spec("gqa", n_kv_heads=2)], "mean"),
        ([Spec("mhc", rank=8, rope_dim=0)], "activations"),
        (["full", Spec("full", reads=-1), "full"], "first"),
        ([Spec("window", window=2)], "first"),
        ([Spec("sparse", pattern="local(2) | global(1)")], "first"),
    ):
        assert largest_change(convert(model, layers, init=init, tokens=tokens()), model) > 0.1


def test_averaging_weights_averages_the_rotated_keys_and_the_values_that_are_cached() -> None:
    model, x = trained(), torch.randn(2, 9, 24)
    pooled = convert(model, [Spec("gqa", n_kv_heads=2)], init="mean")
    for own, full in zip(pooled.mixers, model.mixers, strict=True):
        for mean, heads in zip([*own.project_kv(x)][:2], [*full.project_kv(x)][:2], strict=True):
            torch.testing.assert_close(mean, heads.unflatten(1, (2, 2)).mean(2), atol=1e-5, rtol=1e-5)


def test_heads_of_a_pool_that_are_alike_lose_nothing_by_averaging() -> None:
    model = trained()
    with torch.no_grad():
        for mixer in model.mixers:
            for proj in (mixer.k_proj, mixer.v_proj):
                heads = proj.weight.unflatten(0, (4, 8))
                heads[1], heads[3] = heads[0], heads[2]
    for name in ("gqa", "routed"):
        converted = convert(model, [Spec(name, n_kv_heads=2)], init="mean")
        assert largest_change(converted, model) < 1e-4


def test_first_keeps_the_first_head_of_each_pool() -> None:
    model = trained()
    for n_kv_heads, heads in ((2, [0, 2]), (1, [0])):
        converted = convert(model, [Spec("gqa", n_kv_heads=n_kv_heads)], init="first")
        for own, full in zip(converted.mixers, model.mixers, strict=True):
            assert torch.equal(by_heads(own.v_proj, n_kv_heads), by_heads(full.v_proj)[heads])
    uneven = convert(model, [Spec("routed", n_kv_heads=3)], init="first").mixers[0]
    assert uneven.pools == [0, 0, 1, 2]
    assert torch.equal(by_heads(uneven.k_proj, 3), by_heads(model.mixers[0].k_proj)[[0, 2, 3]])


@pytest.mark.parametrize("layer", [Spec("gqa", n_kv_heads=2), Spec("mhc", rank=8, rope_dim=0)], ids=str)
def test_random_draws_keys_and_values_from_the_seed_and_copies_the_rest(layer: Spec) -> None:
    model = trained()
    one, same, other = (convert(model, [layer], init="random", seed=seed) for seed in (1, 1, 2))
    new = {"k_proj", "v_proj", "kv_down", "kv_up"}
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
        if new & set(name.split(".")):
            assert not torch.equal(weight, other.state_dict()[name])
            assert weight.std() == pytest.approx(0.02, rel=0.2)  # as an untrained model has them
        else:
            torch.testing.assert_close(weight, model.state_dict()[name])


def test_a_layer_that_reads_another_drops_its_keys_and_keeps_its_queries() -> None:
    model = trained()
    layers = ["full", Spec("full", reads=-1), "full"]
    first, mean = (convert(model, layers, init=init) for init in ("first", "mean"))
    assert not hasattr(first.mixers[1], "k_proj")
    assert torch.equal(first.mixers[1].q_proj.weight, model.mixers[1].q_proj.weight)
    for proj in ("k_proj", "v_proj"):
        maps = [getattr(b.mixer, proj).weight * b.mixer_norm.weight for b in model.blocks]
        assert torch.equal(getattr(first.mixers[0], proj).weight, getattr(model.mixers[0], proj).weight)
        averaged = getattr(mean.mixers[0], proj).weight * mean.blocks[0].mixer_norm.weight
        torch.testing.assert_close(averaged, (maps[0] + maps[1]) / 2)
        for converted in (first, mean):  # nobody reads the last layer: it is as it was
            assert torch.equal(
                getattr(converted.mixers[2], proj).weight, getattr(model.mixers[2], proj).weight
            )


def test_the_latent_loses_what_the_smallest_eigenvalues_hold_and_no_more() -> None:
    """Eckart and Young: the mean square of what is lost is the sum of the eigenvalues left out."""
    torch.manual_seed(0)
    k, v, x = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 4, 10), (3, 4, 10), (50, 10)))
    x = x * torch.linspace(0.1, 3, 10)
    moment = x.mT @ x / len(x)
    heads = torch.cat((k, v)).flatten(0, 1)
    y = x @ heads.mT
    spectrum = torch.linalg.eigvalsh(y.mT @ y / len(y))
    lost = {}
    for name, of in (("activations", moment), ("weights", torch.eye(10, dtype=torch.float64))):
        latent = best_latent(k, v, of, rank=4)
        up = torch.cat((latent.k_up, latent.v_up)).flatten(0, 1)
        lost[name] = (y - y @ latent.down.mT @ up.mT).square().sum(-1).mean()
    torch.testing.assert_close(lost["activations"], spectrum[:-4].sum())
    assert lost["weights"] > 1.05 * lost["activations"]


def test_keys_and_values_of_low_rank_lose_nothing_by_a_latent_of_that_rank() -> None:
    model = trained()
    with torch.no_grad():
        for mixer in model.mixers:
            narrow = torch.randn(64, 5) @ torch.randn(5, 24) * 0.2
            mixer.k_proj.weight.copy_(narrow[:32])
            mixer.v_proj.weight.copy_(narrow[32:])
    for rank, least, most in ((5, 0.0, 1e-4), (4, 0.1, 100)):
        converted = convert(model, [Spec("mhc", rank=rank, rope_dim=0)], init="activations", tokens=tokens())
        assert least <= largest_change(converted, model) < most


@pytest.mark.parametrize("kind", ["mhc", "mhc_transformer"])
@pytest.mark.parametrize(("rope_dim", "theta"), [(8, 100.0), (2, 1e24), (4, 1e24)])
def test_heads_whose_fast_keys_are_proportional_lose_nothing_by_sharing_one(
    rope_dim: int, theta: float, kind: str
) -> None:
    """Proportional as complex numbers, pair by pair. Slow pairs may differ: here they do not rotate."""
    model = trained(ModelConfig(**{**vars(SMALL), "rope": RopeConfig(theta)}))
    with torch.no_grad():
        for mixer in model.mixers:
            pairs = as_pairs(mixer.k_proj.weight.unflatten(0, (4, 8)))
            factors = torch.randn(4, rope_dim // 2, 1, dtype=torch.complex64)
            pairs[:, : rope_dim // 2] = factors * pairs[:1, : rope_dim // 2]
            mixer.k_proj.weight.copy_(from_pairs(pairs).flatten(0, 1))
    for init in ("activations", "weights"):
        converted = convert(model, [Spec(kind, rank=64, rope_dim=rope_dim)], init=init, tokens=tokens())
        assert largest_change(converted, model) < 1e-3
        frequencies = converted.mixers[0].rope.omega.numbers
        assert frequencies == pytest.approx(model.mixers[0].rope.omega.numbers[: rope_dim // 2])


def test_what_sharing_leaves_of_a_pair_loses_its_rotation_but_the_fastest_is_dropped() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(4, 8, 10, dtype=torch.float64), torch.randn(4, 8, 10, dtype=torch.float64)
    shared = shared_rotary_key(q, k, torch.eye(10, dtype=torch.float64), rope_dim=4)
    left, pairs, key = as_pairs(shared.rest), as_pairs(k), as_pairs(shared.key)
    assert left[:, 0].abs().max() == 0
    assert torch.equal(left[:, 2:], pairs[:, 2:])  # the slow ones, whole
    proportional = (pairs - left)[:, 1]
    factors = proportional / key[1]
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    # The best approximation of rank one leaves what the other singular values hold.
    torch.testing.assert_close(left[:, 1].norm(), torch.linalg.svdvals(pairs[:, 1])[1:].norm())


def test_second_moments_are_those_of_each_layers_input() -> None:
    model = trained()
    moments = second_moments(model, tokens())
    x = model.blocks[0].mixer_norm(model.embed(tokens())).detach().double().flatten(0, 1)
    torch.testing.assert_close(moments[0], x.mT @ x / len(x))
    assert len(moments) == 3
    assert not any(mixer._forward_pre_hooks for mixer in model.mixers)


def test_the_model_that_is_converted_stays_as_it_was() -> None:
    model = trained()
    before, random_state = deepcopy(model.state_dict()), torch.get_rng_state()
    converted = convert(model, [Spec("mhc", rank=16, rope_dim=4)], init="activations", tokens=tokens())
    convert(model, [Spec("gqa", n_kv_heads=2)], init="random")
    assert torch.equal(torch.get_rng_state(), random_state)
    with torch.no_grad():
        for weight in converted.parameters():
            weight.add_(1)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_a_converted_model_is_saved_and_loaded_as_any_other(tmp_path: Path) -> None:
    converted = convert(trained(), [Spec("mhc", rank=16, rope_dim=4)], init="weights")
    assert not converted.training
    save(converted, tmp_path / "small.safetensors")
    assert largest_change(load(tmp_path / "small.safetensors"), converted) == 0


def test_its_dtype_is_the_models() -> None:
    model = trained().to(torch.bfloat16)
    for layers, init in (([Spec("gqa", n_kv_heads=2)], "mean"), ([Spec("mhc", rank=16)], "weights")):
        converted = convert(model, layers, init=init)
        assert {weight.dtype for weight in converted.parameters()} == {torch.bfloat16}
        assert converted(tokens()).isfinite().all()


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("layers", "init", "names"),
    [
        ([Spec("gqa", n_kv_heads=2)], "average", "init: expected one of 'mean', 'first'"),
        ([Spec("gqa", n_kv_heads=2)], "weights", "init for 'gqa': expected one of 'mean', 'first', 'random'"),
        ([Spec("mhc", rank=8)], "mean", "init for 'mhc': expected one of 'activations', 'weights', 'random'"),
        ([Spec("mhc", rank=8)], "activations", 'tokens: expected some text for init="activations", got None'),
        ([Spec("token_routed")], "mean", "layers: expected one of .*; got 'token_routed'"),
        (["mla"], "weights", "layers: expected one of .*; got 'mla'"),
        ([Spec("gqa", n_kv_heads=3)], "mean", "n_kv_heads: expected a divisor of n_heads=4"),
        ([Spec("gqa", n_kv_heads=2, head_dim=6)], "mean", "head_dim: expected the model's 8, got 6"),
        ([Spec("mhc", rank=8, rope_dim=10)], "weights", "rope_dim: expected at most 8"),
        ([Spec("mhc", rope_dim=4, rope=RopeConfig())], "weights", "layers: rope: expected .* or none given"),
        ([Spec("full", reads=-1)], "mean", "layers: layer 0"),
        (["full", Spec("full", reads=-1), "full"], "weights", "init for 'full': expected one of 'mean'"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(layers: list[Spec], init: str, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        convert(trained(), layers, init=init)


@pytest.mark.usefixtures("unchecked_shapes")
def test_only_a_model_of_full_layers_is_converted() -> None:
    pooled = convert(trained(), [Spec("gqa", n_kv_heads=2)], init="mean")
    with pytest.raises(ValueError, match='model: expected "full" layers'):
        convert(pooled, ["full"], init="mean")
    with pytest.raises(TypeError, match="model: expected Decoder, got Linear"):
        convert(torch.nn.Linear(2, 2), ["full"], init="mean")  # type: ignore[arg-type]


def test_stretched_frequencies_are_kept_where_they_can_be() -> None:
    layers = [Spec("mhc", rank=64, rope_dim=4)]
    linear, yarn = (
        trained(ModelConfig(**{**vars(SMALL), "rope": RopeConfig(1e4, scaling)}))
        for scaling in (LinearScaling(4.0), YarnScaling(4.0, 64))
    )
    kept = convert(linear, layers, init="weights").mixers[0].rope.omega.numbers
    assert kept == pytest.approx(linear.mixers[0].rope.omega.numbers[:2])
    with pytest.raises(ValueError, match="model: frequencies stretched by YarnScaling"):
        convert(yarn, layers, init="weights")


@pytest.mark.slow
def test_converting_the_base_model_takes_less_than_five_seconds() -> None:
    """Of the processor's time: others may use the machine."""
    text = windows(corpus().train, 16, 512, seed=0, step=0)[:, :-1]
    model, started = base_model(), time.process_time()
    convert(model, [Spec("mhc", rank=32, rope_dim=0)], init="activations", tokens=text)
    assert time.process_time() - started < 5
