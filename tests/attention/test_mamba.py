"""The selective scan: its two forms, gradients, memory and errors; the defaults of Mamba and Mamba-2.

Weights exchanged with transformers are tested in tests/oracles/test_mamba.py.
"""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_tools import Allocated, close, draw
from torch import Tensor, nn

from kvlearn.attention import REGISTRY, Mamba, Mamba2, StateCache
from kvlearn.attention.mamba import SCAN_FORMS, selective_scan
from kvlearn.attention.recurrent import expand_heads
from kvlearn.measure.memory import peak_memory
from kvlearn.model import Decoder, ModelConfig

ROWS, TIME, E, N = 2, 13, 5, 3
NAMES = ("x", "dt", "A", "B", "C", "D", "state")

both_layers = pytest.mark.parametrize("name", ["mamba", "mamba2"])
either_form = pytest.mark.parametrize("form", SCAN_FORMS)


def inputs(time: int = TIME, rows: int = ROWS, channels: int = E, numbers: int = N) -> dict[str, Tensor]:
    shapes = (rows, time, channels), (rows, time, numbers)
    return {
        "x": draw(*shapes[0], seed=1),
        "dt": draw(*shapes[0], seed=2).abs(),
        "A": -draw(channels, numbers, seed=3).abs(),
        "B": draw(*shapes[1], seed=4),
        "C": draw(*shapes[1], seed=5),
        "D": draw(channels, seed=6),
        "state": draw(rows, channels, numbers, seed=7),
    }


def in_double(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double().requires_grad_() for name, t in given.items()}


@pytest.mark.parametrize("chunk", [1, 2, 4, 64])
def test_gradients_of_the_scan_are_its_differences(chunk: int) -> None:
    given = in_double(inputs(time=5, channels=3, numbers=2))
    scan = partial(selective_scan, chunk=chunk)
    assert torch.autograd.gradcheck(scan, tuple(given.values()))


@pytest.mark.parametrize("chunk", [1, 5, 13, 64])
@pytest.mark.parametrize("uses", ["outputs", "state", "both"])
def test_gradients_of_both_forms_agree_after_a_state(chunk: int, uses: str) -> None:
    """Of a loss in the outputs alone, in the last state alone, and in both."""
    grads = {}
    for form in SCAN_FORMS:
        given = in_double(inputs())
        y, last = selective_scan(**given, form=form, chunk=chunk)
        loss = (uses != "state") * (y * draw(*y.shape, seed=8)).sum() + (uses != "outputs") * last.cos().sum()
        grads[form] = torch.autograd.grad(loss, list(given.values()))
    for name, got, expected in zip(NAMES, *grads.values(), strict=True):
        assert torch.allclose(got, expected, atol=1e-12, rtol=1e-10), name


def test_the_scan_is_differentiated_once() -> None:
    given = in_double(inputs())
    (grad,) = torch.autograd.grad(selective_scan(**given)[0].square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_last_state_continues_the_scan() -> None:
    given = inputs()
    whole, last = selective_scan(**given, chunk=4)
    early, late = (
        {name: given[name][:, part] for name in ("x", "dt", "B", "C")} for part in (slice(6), slice(6, None))
    )
    weights = {name: given[name] for name in ("A", "D")}
    first, state = selective_scan(**early, **weights, state=given["state"], chunk=4)
    second, state = selective_scan(**late, **weights, state=state, chunk=4)
    close(torch.cat((first, second), dim=1), whole)
    close(state, last)


@either_form
def test_no_state_is_one_of_zeros(form: str) -> None:
    given = inputs()
    zeros = {**given, "state": torch.zeros(ROWS, E, N)}
    for got, expected in zip(
        selective_scan(**{**given, "state": None}, form=form), selective_scan(**zeros, form=form), strict=True
    ):
        assert torch.equal(got, expected)


@either_form
def test_a_very_long_step_forgets_all_of_the_past(form: str) -> None:
    """Every decay is e^-10000 = 0: the state holds the token's own write alone, and gradients are finite."""
    given = inputs()
    given |= {"dt": torch.full_like(given["dt"], 1e4), "A": torch.full_like(given["A"], -1.0)}
    given = {name: t.requires_grad_() for name, t in given.items()}
    y, last = selective_scan(**given, form=form, chunk=4)
    alone = 1e4 * given["x"] * (given["B"] * given["C"]).sum(-1, keepdim=True) + given["D"] * given["x"]
    close(y, alone)
    close(last, 1e4 * given["x"][:, -1, :, None] * given["B"][:, -1, None])
    assert all(
        grad.isfinite().all() for grad in torch.autograd.grad(y.sum() + last.sum(), list(given.values()))
    )


@either_form
def test_a_step_of_size_0_leaves_the_state_as_it_is(form: str) -> None:
    given = inputs(time=3000)
    given["dt"].zero_()
    y, last = selective_scan(**given, form=form)
    assert torch.equal(last, given["state"])
    close(y, torch.einsum("ben,btn->bte", given["state"], given["C"]) + given["D"] * given["x"])


def test_a_long_sequence_stays_near_the_same_in_double() -> None:
    given = inputs(time=5000)
    exact, last = selective_scan(**{name: t.double() for name, t in given.items()}, form="recurrent")
    y, state = selective_scan(**given)
    close(y, exact.float())
    close(state, last.float())


def test_half_precision_is_summed_in_single() -> None:
    given = {name: t.bfloat16() for name, t in inputs(time=300).items()}
    y, last = selective_scan(**given)
    assert y.dtype == last.dtype == torch.float32
    close(y, selective_scan(**{name: t.float() for name, t in given.items()})[0])


def test_nothing_holds_the_states_of_all_tokens() -> None:
    """Forward and backward. One segment of all tokens does hold them, so the test can fail."""
    time, channels, numbers = 512, 64, 16

    def largest(chunk: int) -> int:
        given = {name: t.requires_grad_() for name, t in inputs(time, 1, channels, numbers).items()}
        with Allocated(*given.values()) as allocated:
            y, last = selective_scan(**given, chunk=chunk)
            (y.sum() + last.sum()).backward()
        return allocated.largest

    assert largest(chunk=time) >= time * channels * numbers
    assert largest(chunk=16) <= max(time * channels, 17 * channels * numbers)


def test_without_gradients_states_between_segments_are_not_kept() -> None:
    time, channels, numbers, chunk = 256, 32, 64, 4
    given = {name: t.requires_grad_() for name, t in inputs(time, 1, channels, numbers).items()}
    with torch.no_grad():
        peak = peak_memory(lambda: selective_scan(**given, chunk=chunk))
    assert peak < 4 * (3 * time * channels + 4 * (chunk + 1) * channels * numbers)
    assert peak < 4 * time // chunk * channels * numbers  # what is kept for gradients


def test_in_training_only_the_states_between_segments_are_kept() -> None:
    """All that is alive at one time, not only its largest piece: a state that is a view keeps its segment."""
    time, channels, numbers, chunk = 1024, 32, 64, 32
    given = {name: t.requires_grad_() for name, t in inputs(time, 1, channels, numbers).items()}

    def train() -> None:
        y, last = selective_scan(**given, chunk=chunk)
        (y.sum() + last.sum()).backward()

    between, segment = time // chunk * channels * numbers, (chunk + 1) * channels * numbers
    beside = 5 * time * (2 * channels + 2 * numbers)  # inputs, outputs and gradients
    assert peak_memory(train) < 4 * (between + 4 * segment + beside) < 4 * time * channels * numbers


@pytest.mark.parametrize(
    ("changed", "error", "names"),
    [
        ({"x": draw(ROWS, TIME)}, ValueError, "x: expected shape"),
        ({"x": draw(0, TIME, E)}, ValueError, r"x\.shape\[0\] \(batch\)"),
        ({"x": draw(ROWS, 0, E)}, ValueError, "time"),
        ({"dt": draw(ROWS, TIME, E + 1).abs()}, ValueError, "dt: expected shape"),
        ({"dt": -torch.ones(ROWS, TIME, E)}, ValueError, "dt: expected at least 0"),
        ({"dt": torch.full((ROWS, TIME, E), torch.nan)}, ValueError, "dt: expected at least 0"),
        ({"A": -draw(E + 1, N).abs()}, ValueError, "A: expected shape"),
        ({"A": torch.ones(E, N)}, ValueError, "A: expected finite numbers of at most 0"),
        ({"A": torch.full((E, N), -torch.inf)}, ValueError, "A: expected finite"),
        ({"B": draw(ROWS, TIME, N + 1)}, ValueError, "B: expected shape"),
        ({"C": draw(ROWS, TIME - 1, N)}, ValueError, "C: expected shape"),
        ({"D": draw(E, 1)}, ValueError, "D: expected shape"),
        ({"state": draw(ROWS, N, E)}, ValueError, "state: expected shape"),
        ({"state": torch.ones(ROWS, E, N, dtype=torch.int64)}, TypeError, "state: expected a floating"),
        ({"form": "parallel"}, ValueError, "form: expected one of 'recurrent', 'chunked'"),
        ({"chunk": 0}, ValueError, "chunk: expected at least 1"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_input_of_the_scan_is_refused_by_name(
    changed: dict[str, Any], error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=names):
        selective_scan(**{**inputs(), **changed})


@pytest.mark.parametrize(
    ("name", "options", "names"),
    [
        *((name, {option: 0}, option) for name in ("mamba", "mamba2") for option in ("expand", "d_state")),
        ("mamba", {"conv": 1}, "conv: expected at least 2"),
        ("mamba2", {"conv": 1}, "conv: expected at least 2"),
        ("mamba", {"dt_rank": 0}, "dt_rank"),
        ("mamba2", {"head_dim": 0}, "head_dim"),
        ("mamba2", {"n_groups": 3}, "n_groups: expected a divisor of n_heads=4"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_options_are_refused_by_name(name: str, options: dict[str, int], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        REGISTRY[name](24, 4, **options)


@both_layers
def test_a_state_of_another_size_is_refused_and_left_alone(name: str) -> None:
    layer, other = (REGISTRY[name](24, 4, d_state=n) for n in (4, 5))  # type: ignore[call-arg]
    cache = other.new_cache(2, 9)
    with pytest.raises(ValueError, match="cache: expected shapes"):
        layer(draw(2, 3, 24), cache)
    assert cache.length == 0


@both_layers
def test_a_text_may_be_shorter_than_the_convolution(name: str) -> None:
    layer = REGISTRY[name](24, 4, conv=7).eval()  # type: ignore[call-arg]
    x = draw(2, 9, 24)
    cache = layer.new_cache(2, 9)
    pieces = [layer(piece, cache) for piece in x.split((2, 3, 1, 3), dim=1)]
    close(torch.cat(pieces, dim=1), layer(x))


@both_layers
def test_a_model_leaves_the_weights_it_starts_from_alone(name: str) -> None:
    """Steps dt between 0.001 and 0.1, A from its own range, D = 1; projections as in every model."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig(d_model=256, n_layers=2, n_heads=128, d_ff=0, layers=(name,)))
    for mixer in model.mixers:
        assert isinstance(mixer, Mamba | Mamba2)
        bias = mixer.dt_proj.bias if isinstance(mixer, Mamba) else mixer.dt_bias
        steps = F.softplus(bias).log10()
        assert -3.001 < steps.min() < -2.8 < -1.2 < steps.max() < -0.999
        assert abs(steps.mean() + 2) < 0.2
        assert (mixer.D == 1).all()
        assert 0.018 < mixer.in_proj.weight.std() < 0.022
        A = mixer.A_log.exp()
        if isinstance(mixer, Mamba):
            close(A, torch.arange(1.0, 17).expand_as(A))
            weight = mixer.dt_proj.weight
            assert 0.24 < weight.abs().max() <= 16**-0.5
            assert abs(weight.std() - (16 * 3) ** -0.5) < 0.01
        else:
            assert 1 <= A.min() < 2 < 15 < A.max() <= 16
    assert all(block.mlp is None for block in model.blocks)  # type: ignore[union-attr]


def test_a_cache_has_the_numbers_that_the_docstrings_say() -> None:
    assert Mamba(768, 1).cache_bytes(10**6) == 4 * 38 * 768
    assert Mamba2(768, 24).cache_bytes(10**6) == 4 * (196_608 + 5376)
    weights = sum(p.numel() for p in Mamba(768, 1).parameters())
    assert 6 < weights / 768**2 < 6.5


def test_heads_mean_nothing_to_mamba() -> None:
    torch.manual_seed(0)
    one, three = Mamba(24, 1), Mamba(24, 3)
    three.load_state_dict(one.state_dict())
    assert torch.equal(one(draw(2, 9, 24)), three(draw(2, 9, 24)))


@pytest.mark.parametrize("groups", [1, 4])
def test_with_one_group_or_one_per_head_nothing_is_copied(groups: int) -> None:
    shared = draw(2, groups, 9, 6)
    views = expand_heads(shared, 4)
    assert views.shape == (2, 4, 9, 6)
    assert views.untyped_storage().data_ptr() == shared.untyped_storage().data_ptr()


def test_neighbouring_heads_read_their_own_group() -> None:
    shared = draw(2, 2, 9, 6)
    first, second = shared.unbind(1)
    heads = expand_heads(shared, 4)
    for head, expected in enumerate((first, first, second, second)):
        assert torch.equal(heads[:, head], expected)


@both_layers
def test_a_step_keeps_the_last_inputs_of_the_convolution(name: str) -> None:
    layer, x = REGISTRY[name](24, 4).eval(), draw(1, 9, 24)
    cache = layer.new_cache(1, 9)
    layer(x, cache)
    assert isinstance(cache, StateCache)
    assert isinstance(layer.in_proj, nn.Linear)
    fed = layer.in_proj(x)
    fed = fed[..., : layer.d_inner] if name == "mamba" else fed[..., layer.d_inner : -layer.n_heads]
    close(cache.state["past"], fed[:, -3:].detach())
