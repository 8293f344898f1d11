"""The mixture of experts: its fast form against its loop over tokens, routing, balance and counts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kvlearn.model import MoE, MoEConfig, balance_loss
from kvlearn.model.moe import load_balancing_loss

M = 16
SHAPES = {
    "plain": MoEConfig(5, 2, 12),
    "one of one": MoEConfig(1, 1, 12),
    "all of them": MoEConfig(4, 4, 12, normalise=False),
    "biases, clamped": MoEConfig(5, 2, 12, bias=True, limit=0.5, alpha=1.3),
    "groups": MoEConfig(12, 3, 8, n_groups=4, topk_groups=2, scaling=3.0, d_ff_shared=20),
    "sigmoid, corrected": MoEConfig(
        12, 2, 8, "sigmoid", n_groups=3, topk_groups=1, group_best=2, correction=True, scaling=0.5
    ),
    "a sum that may be small": MoEConfig(3, 1, 8, "sigmoid", sum_eps=0.5),
    "gated shared": MoEConfig(5, 3, 8, d_ff_shared=4, shared_gate=True),
}
every_shape = pytest.mark.parametrize("shape", SHAPES)


def layer(config: MoEConfig, seed: int = 0) -> MoE:
    generator = torch.Generator().manual_seed(seed)
    moe = MoE(M, config)
    for weight in (*moe.parameters(), *moe.buffers()):
        spread = 1.5 * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.5
        weight.data = torch.randn(weight.shape, generator=generator) * spread
    return moe.eval()


def tokens(batch: int = 2, time: int = 9, seed: int = 1) -> Tensor:
    return 2 * torch.randn(batch, time, M, generator=torch.Generator().manual_seed(seed))


@every_shape
def test_tokens_sorted_by_expert_give_what_a_loop_over_tokens_gives(shape: str) -> None:
    moe = layer(SHAPES[shape])
    for x in (tokens(), tokens(1, 1), tokens(3, 1), tokens(2, 0), tokens(0, 3)):
        torch.testing.assert_close(moe(x), moe.naive(x), atol=2e-5, rtol=2e-5)


@given(
    groups=st.integers(1, 4),
    in_group=st.integers(1, 4),
    routing=st.sampled_from(["softmax", "sigmoid"]),
    data=st.data(),
)
def test_any_shape_gives_what_a_loop_over_tokens_gives(
    groups: int, in_group: int, routing: Any, data: st.DataObject
) -> None:
    chosen = data.draw(st.integers(1, groups))
    config = MoEConfig(
        groups * in_group,
        data.draw(st.integers(1, chosen * in_group)),
        data.draw(st.integers(1, 9)),
        routing,
        normalise=data.draw(st.booleans()),
        n_groups=groups,
        topk_groups=chosen,
        group_best=data.draw(st.integers(1, in_group)),
        correction=data.draw(st.booleans()),
    )
    moe = layer(config, seed=data.draw(st.integers(0, 99)))
    torch.testing.assert_close(moe(tokens()), moe.naive(tokens()), atol=2e-5, rtol=2e-5)


@every_shape
def test_gradients_are_those_of_the_loop(shape: str) -> None:
    moe, x, weights = layer(SHAPES[shape]), tokens(), tokens(seed=2)
    learned = list(moe.parameters())
    fast, naive = (torch.autograd.grad((form(x) * weights).sum(), learned) for form in (moe, moe.naive))
    for got, expected in zip(fast, naive, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@every_shape
def test_only_the_chosen_experts_are_computed_and_counted(shape: str) -> None:
    """An expert that is not chosen may hold NaN; n_active_parameters counts all others."""
    config = SHAPES[shape]
    moe, x = layer(config), tokens(1, 1)
    expected = moe(x)
    _, chosen = moe.route(x[0])
    idle = sorted(set(range(config.n_experts)) - set(chosen.flatten().tolist()))
    for weight in (*moe.gate_up_proj.parameters(), *moe.down_proj.parameters()):
        weight.data[idle] = torch.nan
    assert torch.equal(moe(x), expected)
    used = sum(int((~parameter.isnan()).sum()) for parameter in moe.parameters())
    assert moe.n_active_parameters == used


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    """No expert has a capacity that other tokens could fill."""
    moe, x = layer(SHAPES["plain"]), tokens(4, 8)
    alone = torch.cat([moe(x[b : b + 1, t : t + 1]) for b in range(4) for t in range(8)])
    torch.testing.assert_close(moe(x).flatten(0, 1), alone[:, 0], atol=1e-5, rtol=1e-5)


def test_softmax_of_chosen_logits_is_the_chosen_probabilities_over_their_sum() -> None:
    moe, x = layer(replace(SHAPES["plain"], bias=True)), tokens().flatten(0, 1)
    weights, chosen = moe.route(x)
    torch.testing.assert_close(weights, moe.router(x).gather(1, chosen).softmax(-1))


def test_the_correction_changes_the_choice_and_not_the_weights() -> None:
    config = MoEConfig(6, 2, 8, "sigmoid", correction=True, normalise=False)
    moe, x = layer(config), tokens().flatten(0, 1)
    moe.correction.copy_(torch.tensor([9.0, 0, 0, 7.0, 0, 0]))
    weights, chosen = moe.route(x)
    assert chosen.tolist() == len(x) * [[0, 3]]
    torch.testing.assert_close(weights, moe.router(x).sigmoid()[:, [0, 3]])


def test_the_loss_is_k_for_equal_loads_and_up_to_e_for_a_single_expert() -> None:
    even = torch.full((12, 4), 0.25)
    assert load_balancing_loss(even, torch.arange(24).view(12, 2) % 4) == 2
    one = torch.tensor([[1.0, 0, 0, 0]]).expand(12, 4)
    assert load_balancing_loss(one, torch.zeros(12, 1, dtype=torch.int64)) == 4


def trained(config: MoEConfig, weight: float, rate: float = 0.0) -> Tensor:
    """Loads after 60 steps on tokens that all point one way, which one expert attracts."""
    moe = layer(config).train()
    optimiser = torch.optim.Adam(moe.router.parameters(), lr=1e-2)
    for seed in range(60):
        x = tokens(4, 32, seed) + 6
        moe(x)
        if rate:
            moe.update_correction(rate)
        else:
            optimiser.zero_grad()
            (weight * balance_loss(moe)).backward()
            optimiser.step()
    assert moe.load is not None
    return moe.load / moe.load.sum()


def test_the_loss_spreads_tokens_over_experts() -> None:
    before, after = (trained(MoEConfig(8, 2, 8), weight) for weight in (0.0, 1.0))
    assert before.max() > 0.3
    assert after.max() < 0.2


def test_the_update_of_the_correction_spreads_tokens_without_a_loss() -> None:
    config = MoEConfig(8, 2, 8, "sigmoid", correction=True)
    before, after = trained(config, 0.0), trained(config, 0.0, rate=0.02)
    assert before.max() > 0.3
    assert after.max() < 0.2


def test_the_loss_of_a_model_is_the_mean_of_its_layers_and_needs_a_pass_in_training() -> None:
    moes = nn.Sequential(layer(SHAPES["plain"]), layer(SHAPES["groups"], seed=3))
    with pytest.raises(ValueError, match="training"):
        balance_loss(moes)
    moes.train()(tokens())
    first, second = (moe.balance_loss for moe in moes)
    torch.testing.assert_close(balance_loss(moes), (first + second) / 2)
    with pytest.raises(ValueError, match="training"):
        balance_loss(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="correction"):
        moes[0].update_correction()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_stays_itself(dtype: torch.dtype) -> None:
    moe, x = layer(SHAPES["gated shared"]), tokens()
    got = moe.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    expected, tolerance = moe.naive(x.to(dtype)), 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, expected, atol=tolerance * expected.abs().max().item(), rtol=tolerance)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"n_experts": 0}, "n_experts"),
        ({"top_k": 9}, "top_k"),
        ({"n_groups": 3}, "n_groups"),
        ({"n_groups": 4, "topk_groups": 5}, "topk_groups"),
        ({"n_groups": 4, "group_best": 3}, "group_best"),
        ({"n_groups": 4, "topk_groups": 1, "top_k": 3}, "top_k"),
        ({"routing": "hash"}, "routing"),
        ({"shared_gate": True}, "shared_gate"),
        ({"d_ff_shared": -1}, "d_ff_shared"),
        ({"limit": 0.0}, "limit"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_an_impossible_shape_is_refused_by_name(options: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        MoEConfig(**{"n_experts": 8, "top_k": 2, "d_ff": 4, **options})
