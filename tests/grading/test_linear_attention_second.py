"""Unit 06, exercises 5 to 8: right answers of every style, the course's own mechanisms, and what is said."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from answers import earned, names, right, unit_module
from torch import Tensor

from kvlearn.attention import GatedDeltaNet, Mamba, Rwkv7
from kvlearn.attention.delta import delta_rule
from kvlearn.attention.mamba import selective_scan
from kvlearn.attention.rwkv import wkv as course_wkv
from kvlearn.grading import Score, check, find_exercise, judge

pytestmark = pytest.mark.answers

CHECKS = unit_module("06_linear_attention", "checks")


def graded(exercise: str, *answers: Any, seed: int = 1) -> Score:
    return judge(find_exercise(exercise), answers, seed)


# Right answers of other styles


def delta_by_projection(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    step = beta[..., None, None]
    keep = torch.eye(k.shape[-1]) - step * torch.einsum("bhi,bhj->bhij", k, k)
    memory = keep @ memory + step * torch.einsum("bhi,bhv->bhiv", k, v)
    return torch.einsum("bhk,bhkv->bhv", q, memory), memory


def delta_by_autograd(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> list[Tensor]:
    learnt = memory.clone().requires_grad_()
    loss = 0.5 * (torch.einsum("bhk,bhkv->bhv", k, learnt) - v).square().sum()
    (gradient,) = torch.autograd.grad(loss, learnt)
    memory = memory - beta[:, :, None, None] * gradient
    return [torch.einsum("bhk,bhkv->bhv", q, memory), memory]


def delta_without_reading_twice(q, k, v, beta, memory):  # type: ignore[no-untyped-def]
    error = beta[..., None] * (v - (k[..., None, :] @ memory)[..., 0, :])
    out = (q[..., None, :] @ memory)[..., 0, :] + (q * k).sum(-1, keepdim=True) * error
    return out, torch.baddbmm(memory.flatten(0, 1), *parts(k, error)).view_as(memory)


def parts(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k.flatten(0, 1)[:, :, None], v.flatten(0, 1)[:, None, :]


def discretise_by_logaddexp(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    delta = torch.logaddexp(dt + dt_bias, torch.zeros(()))
    decay = torch.einsum("be,en->ben", -delta, A_log.exp()).exp()
    return decay, torch.einsum("be,bn->ben", delta, B)


def discretise_in_double(A_log: Tensor, dt: Tensor, dt_bias: Tensor, B: Tensor) -> list[Tensor]:
    raw = (dt + dt_bias).double()
    delta = raw.clamp_min(0) + torch.log1p((-raw.abs()).exp())
    return [
        x.float() for x in ((delta[:, :, None] * -A_log.double().exp()).exp(), delta[:, :, None] * B[:, None])
    ]


def step_by_channels(
    x: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    new = torch.stack([A_bar[:, e] * h[:, e] + B_bar[:, e] * x[:, e, None] for e in range(x.shape[1])], 1)
    return (new @ C[:, :, None])[..., 0] + torch.einsum("e,be->be", D, x), new


def wkv_as_softmax(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All pairs of tokens at once."""
    at = torch.arange(k.shape[1])
    age = (at[:, None] - 1 - at)[None, :, :, None]
    exponents = torch.where(age < 0, (u + k)[:, None], k[:, None] - age * w)
    return (exponents.masked_fill(age < -1, -torch.inf).softmax(2) * v[:, None]).sum(2)


def wkv_as_moving_average(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The average itself is kept, and the logarithm of its weight."""
    average, weight, outs = torch.zeros_like(k[:, 0]), torch.full_like(k[:, 0], -1e30), []
    for key, value in zip(k.unbind(1), v.unbind(1), strict=True):
        outs.append(average.lerp(value, (u + key - weight).sigmoid()))
        weight = weight - w
        average = average.lerp(value, (key - weight).sigmoid())
        weight = torch.logaddexp(weight, key)
    return torch.stack(outs, 1)


def wkv_from_infinity(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The running maximum starts at −∞, and numerator and denominator are one tensor."""
    sums = torch.zeros(2, *k[:, 0].shape)
    top, out = torch.full_like(k[:, 0], -torch.inf), torch.empty_like(v)
    for t in range(k.shape[1]):
        new = torch.stack((v[:, t], torch.ones_like(v[:, t])))
        best = torch.maximum(top, k[:, t] + u)
        read = (top - best).exp() * sums + (k[:, t] + u - best).exp() * new
        out[:, t] = read[0] / read[1]
        best = torch.maximum(top - w, k[:, t])
        sums, top = (top - w - best).exp() * sums + (k[:, t] - best).exp() * new, best
    return out


def crossing_by_loops(model: dict[str, Any], attention: dict[str, Any]) -> dict[str, Any]:
    full = [i for i in range(1, model["layers"] + 1) if i % model.get("full_every", 10**9) == 0]
    n_layers = model["layers"] - len(full)
    if model["kind"] == "mamba":
        one = model["expand"] * model["d_model"] * (4 * model["d_state"] + 2 * (model["conv_width"] - 1))
    elif model["kind"] == "rwkv7":
        one = 4 * model["d_model"] // model["head_dim"] * model["head_dim"] ** 2 + 4 * model["d_model"]
    else:
        heads = [model["key_heads"], model["key_heads"], model["value_heads"]]
        dims = [model["key_dim"], model["key_dim"], model["value_dim"]]
        one = 4 * heads[2] * dims[1] * dims[2]
        one += sum(2 * h * d for h, d in zip(heads, dims, strict=True)) * (model["conv_width"] - 1)
    token = (attention["layers"] - len(full)) * 4 * attention["kv_heads"] * attention["head_dim"]
    tokens = 0
    while tokens * token <= one * n_layers:
        tokens += 1
    state = np.int64(one * n_layers)
    return {"state": state, "per_token": torch.tensor(token), "tokens": Fraction(tokens), "more": None}


OTHER_STYLES: list[tuple[str, tuple[Callable[..., Any], ...]]] = [
    ("06.5", (delta_by_projection,)),
    ("06.5", (delta_by_autograd,)),
    ("06.5", (delta_without_reading_twice,)),
    ("06.6", (discretise_by_logaddexp, step_by_channels)),
    ("06.6", (discretise_in_double, step_by_channels)),
    ("06.7", (wkv_as_softmax,)),
    ("06.7", (wkv_as_moving_average,)),
    ("06.7", (wkv_from_infinity,)),
    ("06.8", (crossing_by_loops,)),
]


@pytest.mark.parametrize(("exercise", "answers"), OTHER_STYLES)
def test_a_right_answer_in_another_style_earns_full_marks(exercise: str, answers: tuple[Any, ...]) -> None:
    for seed in (1, 20, 300):
        score = graded(exercise, *answers, seed=seed)
        assert score.status == "passed", score.to_text()


# The exercises ask for the course's own results


def test_the_gradient_step_is_the_courses_delta_rule() -> None:
    q, k, v, beta, memory = (
        torch.randn(2, 3, 4),
        torch.randn(2, 3, 4),
        torch.randn(2, 3, 5),
        torch.rand(2, 3),
        torch.randn(2, 3, 4, 5),
    )
    out, state = delta_rule(q[:, :, None], k[:, :, None], v[:, :, None], beta[..., None], state=memory)
    new = CHECKS.descend(k, v, beta, memory)
    torch.testing.assert_close(new, state)
    torch.testing.assert_close(CHECKS.read(q, new), out[:, :, 0])


def test_the_step_of_mamba_is_the_courses_scan() -> None:
    discretise, step = right(find_exercise("06.6"))
    A_log, D, dt_bias = torch.randn(5, 3), torch.randn(5), torch.randn(5)
    x, dt, B, C, h = (
        torch.randn(2, 4, 5),
        torch.randn(2, 4, 5),
        torch.randn(2, 4, 3),
        torch.randn(2, 4, 3),
        torch.randn(2, 5, 3),
    )
    y, last = selective_scan(x, F.softplus(dt + dt_bias), -A_log.exp(), B, C, D, h)
    for t in range(4):
        bars = CHECKS.bars(A_log, dt[:, t], dt_bias, B[:, t])
        torch.testing.assert_close(discretise(A_log, dt[:, t], dt_bias, B[:, t]), bars)
        out, h = step(x[:, t], *bars, C[:, t], D, h)
        torch.testing.assert_close(out, y[:, t])
    torch.testing.assert_close(h, last)


def test_the_average_is_the_courses_wkv() -> None:
    w, u, k, v = torch.rand(5) + 0.2, torch.randn(5), 100 * torch.randn(2, 9, 5), torch.randn(2, 9, 5)
    torch.testing.assert_close(CHECKS.naive(w, u, k, v), course_wkv(w, u, k, v)[0])


def test_the_states_are_those_of_the_courses_layers() -> None:
    """All but RWKV-7's second token shift, which belongs to the channel mixing beside the mechanism."""
    sizes = {"layers": 1, "d_model": 48}
    layers = [
        (Mamba(48, 3, d_state=8, conv=3), {"kind": "mamba", "expand": 2, "d_state": 8, "conv_width": 3}, 0),
        (Rwkv7(48, 3), {"kind": "rwkv7", "head_dim": 16}, 48),
        (
            GatedDeltaNet(48, 6, head_dim=8, key_dim=12, n_key_heads=3),
            {
                "kind": "gated_delta",
                "key_heads": 3,
                "value_heads": 6,
                "key_dim": 12,
                "value_dim": 8,
                "conv_width": 4,
            },
            0,
        ),
    ]
    for layer, model, elsewhere in layers:
        numbers = sum(torch.Size(shape).numel() for _, shape in CHECKS.kept(sizes | model))
        assert layer.cache_bytes(7) == 4 * (numbers - elsewhere)


def test_three_real_models_cross_after_71_578_and_1049_tokens() -> None:
    sizes = [CHECKS.crossing_count(*pair) for pair in CHECKS.REAL]
    assert [s["tokens"] for s in sizes] == [71, 578, 1049]
    assert [s["per_token"] for s in sizes] == [327_680, 36_864, 73_728]
    assert [s["state"] for s in sizes] == [22_937_600, 21_299_200, 77_266_944]


def test_the_hybrids_shape_is_the_one_in_transformers() -> None:
    config = pytest.importorskip("transformers").Qwen3NextConfig()
    ours, full = CHECKS.QWEN_3_NEXT, CHECKS.ALL_FULL
    assert [kind == "full_attention" for kind in config.layer_types] == [
        (i + 1) % ours["full_every"] == 0 for i in range(ours["layers"])
    ]
    heads = (config.linear_num_key_heads, config.linear_num_value_heads)
    assert heads == (ours["key_heads"], ours["value_heads"])
    dims = (config.linear_key_head_dim, config.linear_value_head_dim, config.linear_conv_kernel_dim)
    assert dims == (ours["key_dim"], ours["value_dim"], ours["conv_width"])
    assert (config.num_attention_heads, config.num_key_value_heads) == (full["query_heads"], full["kv_heads"])
    assert (config.head_dim, config.num_hidden_layers) == (full["head_dim"], full["layers"])


# The worked examples of the tasks


def test_the_example_of_the_delta_rule_is_true() -> None:
    (step,) = right(find_exercise("06.5"))
    memory, one = torch.tensor([2.0, 7.0]).reshape(1, 1, 2, 1), torch.ones(1, 1, 2)
    key, value = torch.tensor([1.0, 0.0]).reshape(1, 1, 2), torch.tensor([[[10.0]]])
    for beta, answer in ((1.0, 10), (0.5, 6), (0.0, 2)):
        out, new = step(one, key, value, torch.tensor([[beta]]), memory)
        assert (new.flatten().tolist(), out.item()) == ([answer, 7], answer + 7)


def test_the_example_of_mamba_is_true() -> None:
    discretise, step = right(find_exercise("06.6"))
    A_log, B, C = torch.tensor([[1.0, 2.0]]).log(), torch.tensor([[1.0, 3.0]]), torch.ones(1, 2)
    D, h, x = torch.tensor([10.0]), torch.full((1, 1, 2), 4.0), torch.ones(1, 1)
    for raw, decay, write, state, y in (
        (0.5413, [0.368, 0.135], [1, 3], [2.47, 3.54], 16.01),
        (-100, [1, 1], [0, 0], [4, 4], 18),
    ):
        bars = discretise(A_log, torch.tensor([[raw]]), torch.zeros(1), B)
        out, new = step(x, *bars, C, D, h)
        for got, want in zip((*bars, new), (decay, write, state), strict=True):
            assert got.flatten().tolist() == pytest.approx(want, abs=5e-3)
        assert out.item() == pytest.approx(y, abs=5e-3)


@pytest.mark.parametrize("key", [0.0, 1000.0, -1000.0])
def test_the_example_of_wkv_is_true(key: float) -> None:
    (average,) = right(find_exercise("06.7"))
    w, u = torch.tensor([2.0]).log(), torch.tensor([3.0]).log()
    out = average(w, u, torch.full((1, 4, 1), key), torch.tensor([8.0, 0, 0, 0]).reshape(1, 4, 1))
    assert out.flatten().tolist() == pytest.approx([8, 2, 4 / 4.5, 2 / 4.75], rel=1e-4)


def test_the_example_of_the_crossing_is_true() -> None:
    (cross,) = right(find_exercise("06.8"))
    model = {"kind": "mamba", "layers": 3, "d_model": 8, "expand": 2, "d_state": 4, "conv_width": 3}
    attention = {"layers": 2, "query_heads": 6, "kv_heads": 2, "head_dim": 4}
    assert cross(model, attention) == {"state": 960, "per_token": 64, "tokens": 16}


# Differences without effect on the score, and the points of half an answer


def test_the_courses_own_functions_earn_nothing() -> None:
    def borrowed(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return course_wkv(w, u, k, v)[0]

    score = check("06.7", borrowed)
    assert (score, "which does the work" in score.message) == (0, True)


def test_one_half_of_mamba_earns_its_half() -> None:
    discretise, step = right(find_exercise("06.6"))
    assert earned(graded("06.6", discretise, None)) == [1, 1, 1, 1, 0, 0, 0]
    assert earned(graded("06.6", None, step)) == [0, 0, 0, 0, 1, 1, 0]


def test_a_wrong_memory_does_not_cost_the_output_read_from_it() -> None:
    def doubled(*given: Tensor) -> tuple[Tensor, Tensor]:
        out, memory = right(find_exercise("06.5"))[0](*given)
        return 2 * out, 2 * memory

    assert earned(graded("06.5", doubled)) == [1, 0, 0, 0, 0, 1]


def test_a_wrong_decay_does_not_cost_the_stability() -> None:
    def faster(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return wkv_as_softmax(2 * w, u, k, v)

    assert earned(graded("06.7", faster)) == [1, 1, 0, 0, 1, 1, 0]


def test_tokens_are_checked_by_ones_own_bytes() -> None:
    def in_bits(model: dict[str, Any], attention: dict[str, Any]) -> dict[str, int]:
        sizes = CHECKS.crossing_count(model, attention)
        return {name: size if name == "tokens" else 8 * size for name, size in sizes.items()}

    assert earned(graded("06.8", in_bits)) == [0, 0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("broken", [0, -1, float("nan"), float("inf"), "many", None, True, [1]])
@pytest.mark.parametrize("name", ["state", "per_token", "tokens"])
def test_no_number_whatever_breaks_the_check(name: str, broken: Any) -> None:
    score = graded("06.8", lambda model, attention: CHECKS.crossing_count(model, attention) | {name: broken})
    assert score.status in ("partial", "wrong")
    assert 0 < score < 7


def test_a_state_of_another_kind_is_not_called_the_old_one() -> None:
    """Both read the right output from a state that is not returned; what is returned differs."""
    discretise, step = right(find_exercise("06.6"))

    def squared(x, A_bar, B_bar, C, D, h):  # type: ignore[no-untyped-def]
        return step(x, A_bar, B_bar, C, D, h)[0], A_bar * h + B_bar * x[..., None] ** 2

    score = graded("06.6", discretise, squared)
    assert (earned(score), names(score)) == ([1, 1, 1, 1, 0, 0, 1], [])


def test_full_layers_rounded_to_the_nearest_are_wrong_on_every_draw() -> None:
    def nearest(model: dict[str, Any], attention: dict[str, Any]) -> dict[str, int]:
        (right_count,) = right(find_exercise("06.8"))
        full = round(model["layers"] / model.get("full_every", 10**9))
        whole = {key: value for key, value in model.items() if key != "full_every"}
        layers = {"layers": attention["layers"] - full}
        return right_count(whole | {"layers": model["layers"] - full}, attention | layers)

    for seed in range(10):
        assert judge(find_exercise("06.8"), [nearest], seed).rows[4].earned == 0


def test_qwen3_nexts_equal_widths_do_not_give_one_mistake_anothers_name() -> None:
    """Its values are as wide as queries and keys together, so that half of them look like no queries."""

    def narrow(model: dict[str, Any], attention: dict[str, Any]) -> dict[str, int]:
        (right_count,) = right(find_exercise("06.8"))
        sizes = right_count(model, attention)
        if model["kind"] == "gated_delta":
            full = model["layers"] // model.get("full_every", 10**9)
            heads = model["value_heads"] - model["key_heads"]
            past = 2 * (model["conv_width"] - 1) * heads * model["value_dim"]
            sizes["state"] -= (model["layers"] - full) * past
            sizes["tokens"] = sizes["state"] // sizes["per_token"] + 1
        return sizes

    assert names(graded("06.8", narrow)) == ["values counted by key heads in the convolution"]


def test_a_bonus_that_is_taken_without_its_sign_is_wrong() -> None:
    (answer,) = right(find_exercise("06.7"))
    score = graded("06.7", lambda w, u, k, v: answer(w, u.abs(), k, v))
    assert earned(score) == [1, 1, 1, 0, 1, 1, 1]


def test_the_table_says_what_overflowed() -> None:
    def plain(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = b = torch.zeros_like(k[:, 0])
        outs = []
        for t in range(k.shape[1]):
            own, new = (u + k[:, t]).exp(), k[:, t].exp()
            outs.append((a + own * v[:, t]) / (b + own))
            a, b = (-w).exp() * a + new * v[:, t], (-w).exp() * b + new
        return torch.stack(outs, 1)

    score = graded("06.7", plain)
    assert names(score) == ["no running maximum"]
    assert "elements are NaN" in score.rows[4].came
