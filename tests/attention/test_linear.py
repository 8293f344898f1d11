"""Linear attention, retention, gated linear attention, short convolutions: strong decays, edges, memory."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_tools import Allocated, close, draw
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvlearn.attention import (
    GatedLinearAttention,
    LinearAttention,
    Retention,
    RopeConfig,
    ShortConvolution,
    ShortConvolutionMixer,
    YarnScaling,
)
from kvlearn.attention.linear import (
    elu_features,
    gated_linear_attention,
    linear_attention,
    normalised,
    taylor_features,
)
from kvlearn.attention.recurrent import GatedNorm

B, H, T, K, V = 2, 3, 45, 6, 5
FORMS = ("parallel", "recurrent", "chunked")
CORES: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "a head": (linear_attention, (B, H, T)),
    "a channel": (gated_linear_attention, (B, H, T, K)),
}
every_core = pytest.mark.parametrize(("core", "decays"), CORES.values(), ids=CORES)
every_form = pytest.mark.parametrize("form", FORMS)


def qkv(time: int = T) -> tuple[Tensor, Tensor, Tensor]:
    return draw(B, H, time, K), draw(B, H, time, K, seed=1), draw(B, H, time, V, seed=2)


def mixed(shape: tuple[int, ...]) -> Tensor:
    """Logarithms of weak decays, with a strong one now and then, and some that forget everything."""
    weak, which = -0.1 * draw(*shape, seed=3).abs(), draw(*shape, seed=4)
    return weak.masked_fill(which > 1.2, -50.0).masked_fill(which > 1.8, -1e30)


def token_by_token(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    """S_t = a_t S_{t-1} + k_t v_tᵀ, o_t = S_tᵀ q_t, in float64; a_t scales the rows of S."""
    q, k, v, S, a = q.double(), k.double(), v.double(), state.double(), log_decay.double().exp()
    a = a if a.dim() == 4 else a[..., None].expand(q.shape)
    outs = []
    for t in range(q.shape[2]):
        S = a[:, :, t, :, None] * S + torch.einsum("bhk,bhv->bhkv", k[:, :, t], v[:, :, t])
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], S))
    return torch.stack(outs, dim=2)


# Strong and weak decays


@every_core
@every_form
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_weak_decays_after_strong_ones_keep_their_digits(
    core: Callable[..., Any], decays: tuple[int, ...], form: str, chunk: int
) -> None:
    log_decay, state = mixed(decays), draw(B, H, K, V, seed=5)
    out, _ = core(*qkv(), log_decay, state, form=form, chunk=chunk)
    close(out.double(), token_by_token(*qkv(), log_decay, state), 3e-6)


@every_core
@every_form
@pytest.mark.parametrize("log_decay", [-50.0, -1e4, -1e38])
def test_a_strong_decay_leaves_the_newest_token_and_is_never_nan(
    core: Callable[..., Any], decays: tuple[int, ...], form: str, log_decay: float
) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    logs = torch.full(decays, log_decay, requires_grad=True)
    out, state = core(q, k, v, logs, form=form)
    close(out, (q * k).sum(-1, keepdim=True) * v)
    close(state, k[:, :, -1, :, None] * v[:, :, -1, None, :])
    for gradient in torch.autograd.grad(out.square().sum() + state.sum(), (q, k, v, logs)):
        assert gradient.isfinite().all()


@every_core
@pytest.mark.parametrize("form", ["parallel", "chunked"])
def test_gradients_are_those_of_the_recurrent_form(
    core: Callable[..., Any], decays: tuple[int, ...], form: str
) -> None:
    inputs = [x.double().requires_grad_() for x in (*qkv(), mixed(decays), draw(B, H, K, V, seed=5))]
    weights = draw(B, H, T, V, seed=6).double()

    def gradients(form: str) -> tuple[Tensor, ...]:
        out, state = core(*inputs, form=form, chunk=7)
        return torch.autograd.grad((out * weights).sum() + state.square().sum(), inputs)

    for got, expected in zip(gradients(form), gradients("recurrent"), strict=True):
        close(got, expected, 1e-10)


@every_core
@given(time=st.integers(1, T), cut=st.integers(0, T), chunk=st.integers(1, 50))
def test_a_sequence_cut_anywhere_goes_on_from_its_state(
    core: Callable[..., Any], decays: tuple[int, ...], time: int, cut: int, chunk: int
) -> None:
    inputs = [x[:, :, :time] for x in (*qkv(), mixed(decays))]
    start = draw(B, H, K, V, seed=5)
    expected, last = core(*inputs, start, form="recurrent")
    state, outs = start, []
    for piece in ([x[:, :, :cut] for x in inputs], [x[:, :, cut:] for x in inputs]):
        if piece[0].shape[2]:
            out, state = core(*piece, state, chunk=chunk)
            outs.append(out)
    close(torch.cat(outs, dim=2), expected)
    close(state, last)
    assert torch.equal(start, draw(B, H, K, V, seed=5))  # a state that is handed in is not written to


@every_form
def test_no_decay_is_a_decay_of_one(form: str) -> None:
    state = draw(B, H, K, V, seed=5)
    plain, ones, channels = (
        torch.cat([x.flatten() for x in core(*qkv(), log_decay, state, form=form, chunk=8)])
        for core, log_decay in (
            (linear_attention, None),
            (linear_attention, torch.zeros(B, H, T)),
            (gated_linear_attention, torch.zeros(B, H, T, K)),
        )
    )
    close(plain, ones)
    close(plain, channels)


@every_form
def test_channels_that_fade_alike_are_a_head_that_fades(form: str) -> None:
    log_decay = mixed((B, H, T))
    out, state = gated_linear_attention(*qkv(), log_decay[..., None].expand(B, H, T, K), form=form)
    expected, their_state = linear_attention(*qkv(), log_decay, form=form)
    close(out, expected)
    close(state, their_state)


# Dtypes


@every_core
@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_single_precision_though_inputs_and_state_are_half(
    core: Callable[..., Any], decays: tuple[int, ...], form: str, dtype: torch.dtype
) -> None:
    inputs = [x.to(dtype) for x in (*qkv(), -draw(*decays, seed=3).abs(), draw(B, H, K, V, seed=5))]
    out, state = core(*inputs, form=form, chunk=7)
    assert out.dtype == state.dtype == torch.float32
    close(out.double(), token_by_token(*inputs))


@every_core
def test_double_precision_meets_decays_in_single(core: Callable[..., Any], decays: tuple[int, ...]) -> None:
    log_decay, state = -draw(*decays, seed=3).abs(), torch.zeros(B, H, K, V)
    out, last = core(*(x.double() for x in qkv()), log_decay, state)
    assert last.dtype == torch.float64
    close(out, token_by_token(*qkv(), log_decay, state), 1e-12)


# Memory


@pytest.mark.parametrize("name", ["a head, none", *CORES])
def test_the_chunked_form_allocates_nothing_larger_than_its_output(name: str) -> None:
    time = 4096
    core, decays = CORES[name.removesuffix(", none")]
    q, k, v = qkv(time)
    log_decay = None if name.endswith("none") else -draw(*decays[:2], time, *decays[3:]).abs()
    with Allocated(q, k, v) as allocated:
        core(q, k, v, log_decay)
    assert allocated.largest <= B * H * time * max(K, V), allocated.by


def test_all_pairs_at_once_take_no_numbers_for_every_channel() -> None:
    time, wide = 256, 64
    q, k, log_decay = draw(1, 1, time, wide), draw(1, 1, time, wide), -draw(1, 1, time, wide).abs()
    with Allocated(q, k, log_decay) as allocated:
        gated_linear_attention(q, k, draw(1, 1, time, 4), log_decay, form="parallel")
    assert allocated.largest <= time * max(time, wide), allocated.by


@pytest.mark.parametrize("kind", [LinearAttention, Retention, GatedLinearAttention, ShortConvolutionMixer])
def test_a_layer_takes_memory_linear_in_time(kind: Any) -> None:
    def largest(time: int) -> int:
        layer, x = kind.tiny(), draw(1, time, 24)
        with Allocated(x) as allocated, torch.no_grad():
            layer(x)
        return allocated.largest

    assert largest(4096) <= 2 * largest(2048)


# Refused inputs


@every_core
@pytest.mark.parametrize(
    ("changed", "error", "names"),
    [
        ({"q": draw(H, T, K)}, ValueError, "q: expected shape"),
        ({"q": draw(B, H, 0, K)}, ValueError, "time"),
        ({"k": draw(B, H, T, K + 1)}, ValueError, "k: expected shape"),
        ({"k": draw(B, H, T, K).double()}, TypeError, "k: expected dtype"),
        ({"v": draw(B, H, T - 1, V)}, ValueError, "v: expected shape"),
        ({"v": [1.0]}, TypeError, "v: expected Tensor"),
        ({"state": draw(B, H, V, K)}, ValueError, "state: expected shape"),
        ({"state": draw(B, 1, K, V)}, ValueError, "state: expected shape"),
        ({"state": torch.zeros(B, H, K, V, dtype=torch.int64)}, TypeError, "state: expected a floating"),
        ({"log_decay": draw(B, H, T - 1)}, ValueError, "log_decay: expected shape"),
        ({"log_decay": "elsewhere"}, ValueError, "log_decay: expected device cpu"),
        ({"log_decay": 0.1}, ValueError, "log_decay: expected logarithms"),
        ({"log_decay": -math.inf}, ValueError, "log_decay: expected logarithms"),
        ({"log_decay": math.nan}, ValueError, "log_decay: expected logarithms"),
        ({"form": "fast"}, ValueError, "form: expected one of"),
        ({"chunk": 0}, ValueError, "chunk"),
        ({"chunk": 2.5}, TypeError, "chunk"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_input_of_the_cores_is_refused_by_name(
    core: Callable[..., Any],
    decays: tuple[int, ...],
    changed: dict[str, Any],
    error: type[Exception],
    names: str,
) -> None:
    q, k, v = qkv()
    arguments = {"q": q, "k": k, "v": v, "log_decay": -draw(*decays).abs(), **changed}
    if changed.get("log_decay") == "elsewhere":
        arguments["log_decay"] = torch.zeros(decays, device="meta")
    if isinstance(arguments["log_decay"], float):  # one among good ones
        one = torch.zeros(decays)
        one.view(-1)[7] = changed["log_decay"]
        arguments["log_decay"] = one
    with pytest.raises(error, match=names):
        core(**arguments)


@pytest.mark.parametrize(
    ("kind", "options", "error", "names"),
    [
        (LinearAttention, {"features": "relu"}, ValueError, "features: expected one of"),
        (LinearAttention, {"key_dim": 0}, ValueError, "key_dim"),
        (GatedLinearAttention, {"key_dim": 0}, ValueError, "key_dim"),
        (GatedLinearAttention, {"rank": 0}, ValueError, "rank"),
        (Retention, {"key_dim": 0}, ValueError, "key_dim"),
        (Retention, {"key_dim": 3}, ValueError, "key_dim: expected an even"),
        (Retention, {"rope": 10_000.0}, TypeError, "rope"),
        (Retention, {"decay": (0.9, 0.5)}, ValueError, "decay: expected 3 numbers"),
        (Retention, {"decay": (0.9, 0.5, 0.0)}, ValueError, "decay"),
        (Retention, {"decay": (0.9, 0.5, 1.01)}, ValueError, "decay"),
        (Retention, {"decay": (0.9, 0.5, math.nan)}, ValueError, "decay"),
        (Retention, {"decay": 0.9}, TypeError, "decay"),
        (ShortConvolutionMixer, {"width": 1}, ValueError, "width"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_options_are_refused_by_name(
    kind: Any, options: dict[str, Any], error: type[Exception], names: str
) -> None:
    with pytest.raises(error, match=names):
        kind(24, 3, **options)


# Features


def test_features_whose_weights_sum_below_nothing_are_refused() -> None:
    sums = torch.cat((draw(B, H, T, V), torch.full((B, H, T, 1), -0.1)), dim=-1)
    with pytest.raises(ValueError, match="q, k: expected features whose products sum to at least 0"):
        normalised(sums)


def test_a_layer_with_features_of_both_signs_refuses_to_divide_by_their_sum() -> None:
    layer = LinearAttention.tiny()
    layer.features = lambda x: x
    with pytest.raises(ValueError, match="q, k"):
        layer(draw(B, T, 24))


def test_features_that_underflow_give_zero() -> None:
    layer = LinearAttention.tiny()
    layer.features = lambda x: elu_features(torch.full_like(x, -200.0))
    for form in FORMS:
        layer.form = form
        y = layer(draw(B, T, 24))
        assert torch.equal(y, torch.zeros_like(y))
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), [layer.v_proj.weight]))


def test_small_features_keep_their_digits() -> None:
    """elu(-20) + 1 would be 0 in fp32."""
    x = torch.tensor([-80.0, -20.0, -1.0, -1e-6, 0.0, 1e-6, 3.0], requires_grad=True)
    expected = torch.where(x.double() > 0, x.double() + 1, x.double().exp())
    torch.testing.assert_close(elu_features(x).double(), expected, rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(elu_features(x).sum(), x)
    torch.testing.assert_close(slope, torch.where(x > 0, torch.ones(7), x.exp()), rtol=1e-6, atol=0)


def test_sums_of_taylor_features_are_half_of_the_count_at_least() -> None:
    q, k = 30 * draw(1000, 4), 30 * draw(1000, 4, seed=1)
    assert (taylor_features(q) * taylor_features(k)).sum(-1).min() > 0.49


# Retention


def retention(**options: Any) -> Retention:
    torch.manual_seed(0)
    return Retention(24, 3, **options)


def decays(layer: Retention) -> Tensor:
    return layer.log_decay.on(torch.device("cpu")).exp()


def test_heads_of_retention_fade_as_in_the_paper() -> None:
    expected = torch.tensor([1 - 2.0**-n for n in range(5, 13)], dtype=torch.float64)
    layer = Retention(64, 8)
    close(decays(layer), expected, 1e-15)
    assert torch.equal(decays(layer.bfloat16()), decays(Retention(64, 8)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decays_are_exact_when_built_under_a_half_default_dtype(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        layer = Retention(64, 8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.q_proj.weight.dtype == dtype
    assert torch.equal(decays(layer), decays(Retention(64, 8)))


def test_retention_forgets_half_as_its_docstring_says() -> None:
    for h in range(8):
        half_life = math.log(0.5) / Retention(64, 8).log_decay.numbers[h]
        assert half_life == pytest.approx(22 * 2**h, rel=0.02)


def test_a_state_rotated_at_every_step_is_a_state_rotated_once() -> None:
    """The sum of all roundings stays small, compared with the error of the angles of far positions."""
    layer = retention(decay=(1.0, 1.0, 1.0))
    memory = start = draw(1, 3, 8, 8)
    for _ in range(1000):
        memory = layer.rotate_back(memory, 1)
    close(memory.double(), layer.double().rotate_back(start.double(), 1000), 1e-4)
    close(memory.norm(), start.norm(), 1e-5)


def test_yarns_factor_is_in_queries_and_keys_but_not_in_the_rotation_of_a_state() -> None:
    layer = retention(rope=RopeConfig(scaling=YarnScaling(factor=4.0, original_max_len=16)))
    x, cache = draw(B, T, 24), None
    cache = layer.new_cache(B, T)
    close(torch.cat([layer(piece, cache) for piece in x.split(1, dim=1)], dim=1), layer(x).detach())


def test_without_rope_retention_keeps_no_positions() -> None:
    layer = retention(rope=None, decay=(1.0, 1.0, 1.0))
    x = draw(B, T, 24)
    shuffled = torch.cat((x[:, :-1].flip(1), x[:, -1:]), dim=1)
    close(layer(shuffled)[:, -1], layer(x)[:, -1])
    rotating = retention(decay=(1.0, 1.0, 1.0))
    assert (rotating(shuffled) - rotating(x))[:, -1].abs().max() > 1e-3


# Gated linear attention


def test_a_gate_that_is_half_open_forgets_half_in_sixteen_tokens() -> None:
    layer = GatedLinearAttention(24, 3)
    for proj in (layer.decay_up, layer.k_proj):
        torch.nn.init.zeros_(proj.weight)
    torch.nn.init.zeros_(layer.decay_up.bias)
    cache = layer.new_cache(B, 64)
    cache.state["memory"].fill_(1.0)
    layer(draw(B, 16, 24), cache)
    close(cache.state["memory"], torch.full_like(cache.state["memory"], 0.5))
    assert layer.key_dim == layer.head_dim // 2


# The gate and the norm


def test_the_norm_takes_the_size_from_a_head_and_the_gate_may_silence_it() -> None:
    norm, heads = GatedNorm(V), draw(B, H, T, V)
    gate = draw(B, H, T, V, seed=1)
    close(norm(1000 * heads, gate), norm(heads, gate))
    assert norm(heads, torch.full_like(gate, -200.0)).abs().max() == 0
    assert norm(torch.zeros_like(heads), gate).abs().max() == 0
    assert norm(heads.bfloat16(), gate.bfloat16()).dtype == torch.float32


# Short convolutions


@pytest.mark.parametrize("time", [1, 2, 3])
def test_a_text_shorter_than_the_convolution_reads_zeros_before_it(time: int) -> None:
    conv = ShortConvolution(4, 7, bias=True)
    x = draw(B, time, 4)
    y, past = conv.run(x, torch.zeros(B, *conv.past_shape))
    for t in range(time):
        terms = [conv.weight[:, 0, 6 - back] * x[:, t - back] for back in range(t + 1)]
        close(y[:, t], torch.stack(terms).sum(0) + conv.bias)
    assert torch.equal(past, torch.cat((torch.zeros(B, 6 - time, 4), x), dim=1))


def test_a_token_reaches_the_width_of_the_convolution_and_no_further() -> None:
    layer = ShortConvolutionMixer(24, 3, width=4)
    x = draw(1, T, 24)
    changed = x.clone()
    changed[:, 10] += 1
    moved = (layer(changed) - layer(x)).abs().amax(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [10, 11, 12, 13]
