"""RWKV-4's average and the generalised delta rule: equations, extremes, memory, errors; and their layers."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_tools import Allocated, close, draw
from torch import Tensor

from kvlearn.attention.delta import delta_rule, generalised_delta_rule
from kvlearn.attention.linear import gated_linear_attention
from kvlearn.attention.recurrent import l2_normalize
from kvlearn.attention.rwkv import LOWEST, Rwkv4, Rwkv4ChannelMix, Rwkv7, Sums, wkv
from kvlearn.model import Decoder, ModelConfig

B, H, T, M, K, V = 2, 3, 37, 5, 8, 6
every_average = pytest.mark.parametrize("form", ["recurrent", "chunked"])
every_form = pytest.mark.parametrize("form", ["parallel", "recurrent", "chunked"])


def average_inputs(size: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w, u, k, v in float64; channels that hardly fade, and one that does so at once."""
    w = torch.tensor([0.0, 0.01, 0.3, 3.0, 200.0], dtype=torch.float64)
    return w, draw(M, seed=1).double(), draw(B, T, M, seed=2).double() * size, draw(B, T, M, seed=3).double()


def average_on_paper(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax over all tokens up to t, each channel for itself."""
    outs = []
    for t in range(k.shape[1]):
        ages = torch.arange(t - 1, -1, -1, dtype=w.dtype)[:, None]
        exponents = torch.cat((k[:, :t] - ages * w, k[:, t : t + 1] + u), dim=1)
        outs.append((exponents.softmax(dim=1) * v[:, : t + 1]).sum(dim=1))
    return torch.stack(outs, dim=1)


@pytest.mark.parametrize(
    ("form", "chunk"), [("recurrent", 64), ("chunked", 1), ("chunked", 6), ("chunked", 64)]
)
def test_wkv_is_the_average_on_paper(form: str, chunk: int) -> None:
    inputs = average_inputs()
    out, _ = wkv(*inputs, form=form, chunk=chunk)
    torch.testing.assert_close(out, average_on_paper(*inputs), atol=1e-12, rtol=1e-12)


@every_average
def test_wkv_continues_after_a_state(form: str) -> None:
    w, u, k, v = average_inputs()
    whole, last = wkv(w, u, k, v)
    _, state = wkv(w, u, k[:, :11], v[:, :11])
    out, continued = wkv(w, u, k[:, 11:], v[:, 11:], tuple(state), form=form, chunk=16)
    torch.testing.assert_close(out, whole[:, 11:], atol=1e-12, rtol=1e-12)
    for got, expected in zip(continued, last, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


@every_average
def test_keys_of_300_give_right_averages_and_gradients_in_single_precision(form: str) -> None:
    inputs = average_inputs(size=100.0)
    assert inputs[2].max() > 250
    assert inputs[2].min() < -250
    weights = draw(B, T, M, seed=4)
    double = [x.clone().requires_grad_() for x in inputs]
    expected = average_on_paper(*double)
    wanted = torch.autograd.grad((expected * weights).sum(), double)
    single = [x.float().requires_grad_() for x in inputs]
    out, state = wkv(*single, form=form, chunk=16)
    assert all(part.isfinite().all() for part in state)
    close(out, expected.float(), 1e-4)  # a key of 300 is rounded by 1.5e-5
    for got, gradient in zip(torch.autograd.grad((out * weights).sum(), single), wanted, strict=True):
        close(got, gradient.float(), 2e-4)


def test_gradients_of_wkv_are_right() -> None:
    w, u, k, v = (x[..., 1:4].requires_grad_() for x in average_inputs())
    num, den = draw(B, 3).double().requires_grad_(), draw(B, 3, seed=1).double().exp().requires_grad_()
    top = torch.zeros(B, 3, dtype=torch.float64)
    inputs = [x.detach().clone().requires_grad_() for x in (w, u, k[:, :7], v[:, :7], num, den)]
    for form in ("recurrent", "chunked"):
        assert torch.autograd.gradcheck(
            lambda w, u, k, v, n, d, form=form: wkv(w, u, k, v, (n, d, top), form=form, chunk=4)[0], inputs
        )


def test_wkv_goes_through_many_tokens_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, add = [], Sums.add
    monkeypatch.setattr(Sums, "add", lambda a, b: calls.append(1) or add(a, b))
    wkv(torch.ones(M), torch.ones(M), draw(1, 400, M), draw(1, 400, M), chunk=400)
    assert len(calls) <= 2 * math.isqrt(400) + 3


def test_the_past_of_a_first_token_weighs_nothing() -> None:
    k, v = torch.full((1, 1, M), -300.0), draw(1, 1, M)
    for form in ("recurrent", "chunked"):
        assert torch.equal(wkv(torch.ones(M), torch.zeros(M), k, v, form=form)[0], v)
    assert (Rwkv4(M, 1).new_cache(1, 4).state["top"] == LOWEST).all()


@pytest.mark.parametrize("time_decay", [-200.0, 20.0, 88.0, 200.0])
def test_no_speed_of_fading_makes_an_rwkv4_nan(time_decay: float) -> None:
    layer = Rwkv4(8, 1)
    torch.nn.init.constant_(layer.time_decay, time_decay)
    x = draw(2, 20, 8)
    layer(x).sum().backward()
    for weight in (layer.time_decay, layer.k_proj.weight):
        assert weight.grad is not None
        assert weight.grad.isfinite().all()
    close(layer(x), layer.naive(x))
    cache = layer.new_cache(2, 20)
    close(torch.cat([layer(part, cache) for part in x.split(7, dim=1)], dim=1), layer(x))


def test_wkv_needs_no_memory_larger_than_its_result() -> None:
    k, v = draw(B, 500, M), draw(B, 500, M)
    with Allocated(k, v) as allocated, torch.no_grad():
        out, _ = wkv(torch.ones(M), torch.ones(M), k, v, chunk=49)
    assert allocated.largest == out.numel(), allocated.by


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("wrong", "error", "names"),
    [
        ({"k": draw(B, T)}, ValueError, "k: expected shape"),
        ({"k": draw(B, 0, M), "v": draw(B, 0, M)}, ValueError, "time"),
        ({"v": draw(B, T, M + 1)}, ValueError, "v: expected shape"),
        ({"v": draw(B, T, M).double()}, TypeError, "v: expected dtype"),
        ({"u": draw(M + 1)}, ValueError, "u: expected shape"),
        ({"w": -torch.ones(M)}, ValueError, "w: expected finite numbers of at least 0"),
        ({"w": torch.full((M,), torch.nan)}, ValueError, "w: expected finite"),
        ({"w": torch.full((M,), torch.inf)}, ValueError, "w: expected finite"),
        ({"state": (draw(B, M), draw(B, M), draw(B, M + 1))}, ValueError, "state.top: expected shape"),
        ({"state": (draw(B, M), draw(B, M))}, ValueError, "state: expected num, den, top, got 2"),
        ({"state": True}, TypeError, "state: expected tuple or list, got bool"),
        ({"w": torch.ones(M, dtype=torch.complex64)}, TypeError, "w: expected a floating-point type"),
        ({"form": "parallel"}, ValueError, "form"),
        ({"chunk": 0}, ValueError, "chunk"),
    ],
)
def test_wkv_refuses_by_name(wrong: dict[str, Any], error: type[Exception], names: str) -> None:
    right = {"w": torch.ones(M), "u": torch.ones(M), "k": draw(B, T, M), "v": draw(B, T, M)}
    with pytest.raises(error, match=names):
        wkv(**{**right, **wrong})


def rule_inputs(time: int = T) -> dict[str, Tensor]:
    """In float64. Removal subtracts a part of the state, as in both layers."""
    key = l2_normalize(draw(B, H, time, K, seed=1).double())
    rate = draw(B, H, time, K, seed=2).double().sigmoid()
    return {
        "q": draw(B, H, time, K).double(),
        "k": draw(B, H, time, K, seed=3).double(),
        "v": draw(B, H, time, V, seed=4).double(),
        "probe": key,
        "rewrite": -rate * key,
        "log_decay": -F.softplus(draw(B, H, time, K, seed=5).double()),
    }


@every_form
@pytest.mark.parametrize("after", [True, False], ids=["after a state", "from the start"])
@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
def test_the_rule_is_the_equation_with_matrices(form: str, after: bool, chunk: int) -> None:
    x = rule_inputs()
    start = draw(B, H, K, V, seed=6).double() if after else torch.zeros(B, H, K, V, dtype=torch.float64)
    out, last = generalised_delta_rule(**x, state=start if after else None, form=form, chunk=chunk)
    for b in range(B):
        for h in range(H):
            q, k, v, r, p, log_decay = (part[b, h] for part in x.values())
            state = start[b, h]
            for t in range(T):
                transition = torch.diag(log_decay[t].exp()) + torch.outer(p[t], r[t])
                state = transition @ state + torch.outer(k[t], v[t])
                torch.testing.assert_close(out[b, h, t], state.T @ q[t], atol=1e-12, rtol=1e-11)
            torch.testing.assert_close(last[b, h], state, atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("chunk", [2, 7])
def test_gradients_of_the_rule_are_right(chunk: int) -> None:
    inputs = [x[:1, :1, :, :3].clone().requires_grad_() for x in rule_inputs(time=5).values()]
    inputs.append(draw(1, 1, 3, 3).double().requires_grad_())
    assert torch.autograd.gradcheck(lambda *x: generalised_delta_rule(*x, chunk=chunk), inputs)


@pytest.mark.parametrize("strong", [-200.0, -1e4, -1e30, -3e38])
def test_a_strong_decay_makes_nothing_nan_and_rounds_no_weak_one_after_it(strong: float) -> None:
    x = rule_inputs()
    x["log_decay"] = torch.where(draw(B, H, T, K, seed=7) > 1, strong, x["log_decay"] * 1e-2)
    expected, last = generalised_delta_rule(**x, form="recurrent")
    single = {name: part.float().requires_grad_() for name, part in x.items()}
    for form in ("parallel", "chunked"):
        out, state = generalised_delta_rule(**single, form=form)
        close(out, expected.float())
        close(state, last.float())
        for gradient in torch.autograd.grad(out.sum() + state.sum(), list(single.values())):
            assert gradient.isfinite().all()


@every_form
def test_without_removal_the_rule_is_gated_linear_attention(form: str) -> None:
    x = rule_inputs()
    x["rewrite"] = torch.zeros_like(x["rewrite"])
    expected = gated_linear_attention(x["q"], x["k"], x["v"], x["log_decay"], form="recurrent")
    for got, wanted in zip(generalised_delta_rule(**x, form=form), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


@every_form
def test_with_one_decay_for_all_features_the_rule_is_the_delta_rule(form: str) -> None:
    x, beta = rule_inputs(), draw(B, H, T, seed=8).double().sigmoid()
    q, v, key, log_decay = x["q"], x["v"], x["probe"], x["log_decay"][..., :1]
    written = beta[..., None] * key
    expected = delta_rule(q, key, v, beta, log_decay[..., 0], form="recurrent")
    got = generalised_delta_rule(
        q, written, v, log_decay.exp() * key, -written, log_decay.expand_as(q), form=form
    )
    for part, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(part, wanted, atol=1e-12, rtol=1e-12)


def test_the_rule_needs_no_memory_larger_than_its_result() -> None:
    x = {name: part.float() for name, part in rule_inputs(time=600).items()}
    with Allocated(*x.values()) as allocated, torch.no_grad():
        out, _ = generalised_delta_rule(**x, chunk=16)
    assert allocated.largest == out.numel(), allocated.by


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("wrong", "error", "names"),
    [
        ({"q": draw(B, T, K)}, ValueError, "q: expected shape"),
        ({"k": draw(B, H, T + 1, K)}, ValueError, "k: expected shape"),
        ({"probe": draw(B, H, T, K + 1)}, ValueError, "probe: expected shape"),
        ({"rewrite": draw(B, H, T, K).double()}, TypeError, "rewrite: expected dtype"),
        ({"log_decay": draw(B, H, T)}, ValueError, "log_decay: expected shape"),
        ({"log_decay": torch.full((B, H, T, K), 0.1)}, ValueError, "log_decay: expected logarithms"),
        ({"log_decay": torch.full((B, H, T, K), torch.nan)}, ValueError, "log_decay: expected logarithms"),
        ({"state": draw(B, H, V, K)}, ValueError, "state: expected shape"),
        ({"form": "fast"}, ValueError, "form"),
        ({"chunk": 0}, ValueError, "chunk"),
    ],
)
def test_the_rule_refuses_what_does_not_fit(
    wrong: dict[str, Any], error: type[Exception], names: str
) -> None:
    right = {name: part.float() for name, part in rule_inputs().items()}
    with pytest.raises(error, match=names):
        generalised_delta_rule(**{**right, **wrong})


def test_channel_mixing_reads_two_tokens() -> None:
    layer, x = Rwkv4ChannelMix(8, 1), draw(1, 9, 8)
    changed = x.clone()
    changed[:, 4] += 1
    differs = (layer(x) != layer(changed)).any(dim=-1)[0]
    assert differs.nonzero().flatten().tolist() == [4, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Rwkv4, Rwkv4ChannelMix, Rwkv7])
def test_layers_can_be_built_under_a_half_default_dtype(kind: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    expected = kind(32, 2).state_dict()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        layer = kind(32, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, weight in layer.state_dict().items():
        assert weight.dtype == dtype
        if "up.weight" not in name and "proj" not in name:  # those are drawn, in this dtype
            close(weight.float(), expected[name], 2e-2)
    x = draw(B, T, 32).to(dtype)
    close(layer(x).float(), layer.naive(x).float(), 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_low_rank_parts_of_rwkv7_start_orthogonal(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        layer = Rwkv7(64, 2, rank=8)
    finally:
        torch.set_default_dtype(torch.float32)
    for up in (layer.decay_up, layer.rate_up, layer.gate_up):
        columns = up.weight.float()
        close(columns.T @ columns, 0.01 * torch.eye(up.in_features), 1e-4)


def test_a_decoder_leaves_rwkv_as_it_starts() -> None:
    layers = ("rwkv4", "rwkv4_channel", "rwkv7")
    model = Decoder(ModelConfig(d_model=32, n_layers=3, n_heads=2, d_ff=0, layers=layers, norm="layer"))
    four, channel, seven = model.mixers
    assert isinstance(four, Rwkv4)
    assert isinstance(channel, Rwkv4ChannelMix)
    assert isinstance(seven, Rwkv7)
    assert (four.time_decay.min(), four.time_decay.max()) == (-5, 3)
    assert channel.time_mix_key[0] == 0
    assert (channel.time_mix_key.diff() > 0).all()
    assert (seven.decay_down.weight == 0).all()
    assert (seven.gate_up.weight != 0).any()
