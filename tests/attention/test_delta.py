"""The delta rule: what it writes, that it is a step of gradient descent, and its forms at extreme inputs."""

import pytest
import torch
import torch.nn.functional as F
from attention_tools import Allocated, close, draw
from torch import Tensor

from kvlearn.attention import DeltaNet, GatedDeltaNet, Mechanism
from kvlearn.attention.delta import delta_rule
from kvlearn.attention.linear import linear_attention
from kvlearn.attention.recurrent import l2_normalize
from kvlearn.model import Decoder, ModelConfig

HEADS, TIME, K, V = 2, 37, 8, 6
FORMS = ["parallel", "recurrent", "chunked"]

every_form = pytest.mark.parametrize("form", FORMS)


def inputs(time: int = TIME, batch: int = 2) -> dict[str, Tensor]:
    """Keys of length 1, steps in (0, 1), and decays of which some are weak and some strong."""
    return {
        "q": draw(batch, HEADS, time, K),
        "k": l2_normalize(draw(batch, HEADS, time, K, seed=1)),
        "v": draw(batch, HEADS, time, V, seed=2),
        "beta": draw(batch, HEADS, time, seed=3).sigmoid(),
        "log_decay": -F.softplus(3 * draw(batch, HEADS, time, seed=4) - 3),
        "state": draw(batch, HEADS, K, V, seed=5),
    }


@every_form
def test_a_key_written_again_holds_its_new_value_alone(form: str) -> None:
    """Where linear attention gives the sum of both."""
    k, v = l2_normalize(draw(1, 1, 1, K)).expand(1, 1, 2, K), draw(1, 1, 2, V, seed=1)
    out, state = delta_rule(k, k, v, torch.ones(1, 1, 2), form=form)
    close(out, v)
    close(k[:, :, :1] @ state, v[:, :, 1:])
    close(linear_attention(k, k, v, form=form)[0][:, :, 1], v.sum(dim=2))


@every_form
def test_a_key_written_again_leaves_the_values_under_orthogonal_keys(form: str) -> None:
    k = torch.linalg.qr(draw(K, K)).Q[None, None]
    v = draw(1, 1, K + 1, V, seed=1)
    again = torch.cat((k, k[:, :, 3:4]), dim=2)
    values = k @ delta_rule(again, again, v, torch.ones(1, 1, K + 1), form=form, chunk=4)[1]
    expected = v[:, :, :K].clone()
    expected[:, :, 3] = v[:, :, K]
    close(values, expected)


@every_form
def test_orthonormal_keys_make_it_linear_attention_of_values_times_beta(form: str) -> None:
    x = inputs(K)
    x["k"] = torch.linalg.qr(draw(2, HEADS, K, K)).Q
    del x["state"]
    beta = x.pop("beta")
    expected = linear_attention(**{**x, "v": beta[..., None] * x["v"]}, form=form)
    for got, wanted in zip(delta_rule(**x, beta=beta, form=form, chunk=3), expected, strict=True):
        close(got, wanted)


@every_form
def test_a_step_of_size_0_only_fades(form: str) -> None:
    x = inputs()
    x["beta"] = torch.zeros_like(x["beta"])
    kept = x["log_decay"].cumsum(-1).exp()[..., None]
    out, state = delta_rule(**x, form=form, chunk=5)
    close(out, kept * (x["q"] @ x["state"]))
    close(state, kept[:, :, -1:] * x["state"])
    x.pop("log_decay")
    close(delta_rule(**x, form=form, chunk=5)[1], x["state"])


@every_form
def test_a_token_takes_a_step_of_gradient_descent_from_the_faded_state(form: str) -> None:
    x = inputs(1)
    faded = (x["log_decay"].exp()[..., None] * x["state"]).requires_grad_()
    loss = 0.5 * (x["k"] @ faded - x["v"]).square().sum()
    (gradient,) = torch.autograd.grad(loss, faded)
    out, state = delta_rule(**x, form=form)
    close(state, (faded - x["beta"][..., None] * gradient).detach())
    close(out, x["q"] @ state)


@pytest.mark.parametrize("chunk", [1, 2, 5, 36, 37, 64])
def test_a_chunk_need_not_divide_the_time(chunk: int) -> None:
    expected = delta_rule(**inputs(), form="recurrent")
    for got, wanted in zip(delta_rule(**inputs(), chunk=chunk), expected, strict=True):
        close(got, wanted)


@pytest.mark.parametrize("form", ["parallel", "chunked"])
@pytest.mark.parametrize("strength", [0.0, 1.0, 50.0])
def test_gradients_are_those_of_the_loop(form: str, strength: float) -> None:
    """Of all inputs, through outputs and last state; decays down to e⁻⁵⁰ a token."""

    def gradients(form: str) -> tuple[Tensor, ...]:
        x = inputs()
        x["log_decay"] = torch.full_like(x["log_decay"], -strength)
        x = {name: t.requires_grad_() for name, t in x.items()}
        out, state = delta_rule(**x, form=form, chunk=8)
        assert out.isfinite().all()
        loss = (out * draw(*out.shape, seed=6)).sum() + (state * draw(*state.shape, seed=7)).sum()
        return torch.autograd.grad(loss, list(x.values()))

    for got, expected in zip(gradients(form), gradients("recurrent"), strict=True):
        assert got.isfinite().all()
        close(got, expected)


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_thousands_of_tokens_stay_near_float64(form: str) -> None:
    """Rounding errors do not add up: an error under a key is corrected when the key is written again."""
    x = inputs(5000, batch=1)
    x["log_decay"] = torch.zeros_like(x["log_decay"])
    expected = delta_rule(**{name: t.double() for name, t in x.items()}, form="recurrent")
    for got, wanted in zip(delta_rule(**x, form=form), expected, strict=True):
        close(got.double(), wanted, 1e-5)


@every_form
def test_a_weak_decay_after_a_strong_one_keeps_its_digits(form: str) -> None:
    """A token that clears the state, by any decay, leaves the decays of the tokens after it exact."""
    x = inputs()
    x["log_decay"][:, :, ::9] = -1e6
    expected = delta_rule(**{name: t.double() for name, t in x.items()}, form="recurrent")
    for got, wanted in zip(delta_rule(**x, form=form, chunk=16), expected, strict=True):
        close(got.double(), wanted)


@torch.no_grad()
def test_memory_in_chunks_is_linear_in_time() -> None:
    x = inputs(4096, batch=1)
    with Allocated(*x.values()) as allocated:
        delta_rule(**x)
    assert allocated.largest <= HEADS * 4096 * K, allocated.by


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_form
def test_half_precision_is_computed_in_single(form: str, dtype: torch.dtype) -> None:
    x = {name: t.to(dtype) for name, t in inputs().items()}
    expected = delta_rule(**{name: t.float() for name, t in x.items()}, form=form)
    for got, wanted in zip(delta_rule(**x, form=form), expected, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"state": draw(2, HEADS, V, K)}, ValueError, "state: expected shape"),
        ({"state": torch.zeros(2, HEADS, K, V, dtype=torch.int64)}, TypeError, "state"),
        ({"k": draw(2, HEADS, TIME, K + 1)}, ValueError, "k: expected shape"),
        ({"v": draw(2, HEADS, TIME, V).double()}, TypeError, "v: expected dtype"),
        ({"beta": torch.ones(2, HEADS, TIME, 1)}, ValueError, "beta: expected shape"),
        ({"beta": torch.full((2, HEADS, TIME), torch.nan)}, ValueError, "beta: expected finite"),
        ({"beta": torch.full((2, HEADS, TIME), torch.inf)}, ValueError, "beta: expected finite"),
        ({"beta": 1.0}, TypeError, "beta: expected Tensor"),
        ({"beta": torch.ones(2, HEADS, TIME, device="meta")}, ValueError, "beta: expected device cpu"),
        ({"log_decay": torch.full((2, HEADS, TIME), 0.1)}, ValueError, "log_decay"),
        ({"log_decay": torch.full((2, HEADS, TIME), torch.nan)}, ValueError, "log_decay"),
        ({"log_decay": torch.zeros(2, HEADS, TIME - 1)}, ValueError, "log_decay: expected shape"),
        ({"chunk": 0}, ValueError, "chunk"),
        ({"form": "quick"}, ValueError, "form"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_input_is_refused_by_name(change: dict[str, object], error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        delta_rule(**{**inputs(), **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [DeltaNet, GatedDeltaNet])
@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"key_dim": 0}, ValueError, "key_dim"),
        ({"n_key_heads": 3}, ValueError, "n_key_heads: expected a divisor"),
        ({"n_key_heads": 0}, ValueError, "n_key_heads"),
        ({"conv": 1}, ValueError, "conv"),
        ({"conv": 2.5}, TypeError, "conv"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_options_are_refused_by_name(
    kind: type[DeltaNet], options: dict[str, int], error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=names):
        kind(24, 4, **options)  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("kind", [DeltaNet, GatedDeltaNet])
def test_without_convolution_only_the_state_is_kept(kind: type[DeltaNet]) -> None:
    layer, x = kind(24, 4, conv=None), draw(2, TIME, 24)
    cache = layer.new_cache(2, TIME)
    assert set(cache.state) == {"memory"}
    assert cache.nbytes == layer.cache_bytes(TIME, batch=2) == 2 * 4 * 6 * 6 * 4
    close(torch.cat([layer(part, cache) for part in (x[:, :5], x[:, 5:6], x[:, 6:])], dim=1), layer(x))


def test_a_layer_of_qwen3_next_keeps_two_megabytes() -> None:
    with torch.device("meta"):
        layer = GatedDeltaNet(2048, 32, head_dim=128, n_key_heads=16)
    assert layer.cache_bytes(262144) == 4 * 548_864


def drawn(layer: Mechanism) -> dict[str, tuple[Tensor, Tensor]]:
    """A and the step of each head as they are drawn, and the bounds of each."""
    assert isinstance(layer, GatedDeltaNet)
    return {
        "A": (layer.A_log.exp(), torch.tensor([0.01, 16.0])),
        "step": (F.softplus(layer.dt_bias), torch.tensor([0.001, 0.1])),
    }


def test_heads_start_with_all_rates_of_forgetting() -> None:
    torch.manual_seed(0)
    start = drawn(GatedDeltaNet(4, 4000, head_dim=1, conv=None))
    quartiles = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    for name, expected in (("A", 0.01 + 15.99 * quartiles), ("step", 0.001 * 100**quartiles)):
        got, bounds = start[name]
        torch.testing.assert_close(got.quantile(quartiles), expected, atol=1e-3 * bounds[1], rtol=0.1)
        torch.testing.assert_close(torch.stack(got.aminmax()), bounds, atol=2e-2 * bounds[1], rtol=0)


def test_a_model_leaves_the_decays_as_the_mechanism_draws_them() -> None:
    model = Decoder(ModelConfig(d_model=32, n_heads=4, layers=3 * ["gated_delta"] + ["full"]))
    for got, (least, most) in drawn(model.mixers[0]).values():
        assert (got > 0.99 * least).all()
        assert (got < 1.01 * most).all()
        assert got.unique().numel() == 4


@torch.no_grad()
def test_a_hybrid_decodes_as_it_reads() -> None:
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig(d_model=32, n_heads=4, layers=(*3 * ("gated_delta",), "full"))).eval()
    tokens = torch.randint(decoder.config.vocab_size, (2, 20))
    cache = decoder.new_cache(batch=2, max_len=20)
    pieces = [decoder(part, cache) for part in (tokens[:, :7], *tokens[:, 7:].split(1, dim=1))]
    close(torch.cat(pieces, dim=1), decoder(tokens))
