"""Mixtures of experts against transformers' blocks: the same weights, the same numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen3NextConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextSparseMoeBlock

from kvlearn.model import MoE, MoEConfig
from kvlearn.model.moe import load_balancing_loss

M = 24
BASE: dict[str, Any] = {"hidden_size": M, "hidden_act": "silu", "num_attention_heads": 4}
DEEPSEEK = {"num_experts_per_tok": 3, "moe_intermediate_size": 20, "n_shared_experts": 2}
CASES: dict[str, tuple[type[nn.Module], Any, MoEConfig]] = {
    "mixtral": (
        MixtralSparseMoeBlock,
        MixtralConfig(**BASE, intermediate_size=20, num_local_experts=6, num_experts_per_tok=2),
        MoEConfig(6, 2, 20),
    ),
    "mixtral, one expert per token": (
        MixtralSparseMoeBlock,
        MixtralConfig(**BASE, intermediate_size=12, num_local_experts=4, num_experts_per_tok=1),
        MoEConfig(4, 1, 12),
    ),
    "gpt-oss": (
        GptOssMLP,
        GptOssConfig(**BASE, intermediate_size=20, num_local_experts=6, num_experts_per_tok=3),
        MoEConfig(6, 3, 20, bias=True, limit=7.0),
    ),
    "deepseek v2, greedy": (
        DeepseekV2Moe,
        DeepseekV2Config(
            **BASE, **DEEPSEEK, n_routed_experts=8, topk_method="greedy", routed_scaling_factor=1.7
        ),
        MoEConfig(8, 3, 20, normalise=False, scaling=1.7, d_ff_shared=40),
    ),
    "deepseek v2, groups": (
        DeepseekV2Moe,
        DeepseekV2Config(
            **BASE,
            **DEEPSEEK,
            n_routed_experts=12,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.7,
        ),
        MoEConfig(12, 3, 20, normalise=False, scaling=1.7, n_groups=4, topk_groups=2, d_ff_shared=40),
    ),
    "deepseek v3": (
        DeepseekV3MoE,
        DeepseekV3Config(
            **BASE, **DEEPSEEK, n_routed_experts=12, n_group=3, topk_group=2, routed_scaling_factor=2.5
        ),
        MoEConfig(
            12,
            3,
            20,
            "sigmoid",
            scaling=2.5,
            n_groups=3,
            topk_groups=2,
            group_best=2,
            correction=True,
            d_ff_shared=40,
        ),
    ),
    "qwen3-next": (
        Qwen3NextSparseMoeBlock,
        Qwen3NextConfig(
            **BASE,
            num_experts=7,
            num_experts_per_tok=3,
            moe_intermediate_size=20,
            shared_expert_intermediate_size=28,
        ),
        MoEConfig(7, 3, 20, d_ff_shared=28, shared_gate=True),
    ),
}
every_case = pytest.mark.parametrize("case", CASES)
NAMES = {
    "gate.weight": "router.weight",
    "router.weight": "router.weight",
    "router.bias": "router.bias",
    "gate.e_score_correction_bias": "correction",
    "experts.gate_up_proj": "gate_up_proj.weight",
    "experts.gate_up_proj_bias": "gate_up_proj.bias",
    "experts.down_proj": "down_proj.weight",
    "experts.down_proj_bias": "down_proj.bias",
    "shared_expert_gate.weight": "shared_gate.weight",
    **{
        f"{s}.{p}_proj.weight": f"shared.{p}_proj.weight"
        for s in ("shared_experts", "shared_expert")
        for p in ("gate", "up", "down")
    },
}


def pair(case: str) -> tuple[nn.Module, MoE]:
    """Their block and ours with the same weights, all drawn anew, the correction too."""
    kind, config, ours = CASES[case]
    generator = torch.Generator().manual_seed(0)
    config._experts_implementation = "eager"
    theirs, layer = kind(config), MoE(M, ours)
    weights = {}
    for name, old in theirs.state_dict().items():
        spread = 1.5 * old.shape[-1] ** -0.5 if old.dim() > 1 else 0.5
        old.copy_(torch.randn(old.shape, generator=generator) * spread)
        new = old
        if kind is GptOssMLP and "experts" in name:  # (in, out), and gate and input alternate
            if name.endswith("_proj"):
                new = new.mT
            if "gate_up" in name:
                new = torch.cat((new[:, ::2], new[:, 1::2]), dim=1)
        weights[NAMES[name]] = new
    layer.load_state_dict(weights)
    return theirs.eval(), layer.eval()


def tokens(batch: int = 3, time: int = 11) -> Tensor:
    return 2 * torch.randn(batch, time, M, generator=torch.Generator().manual_seed(1))


def out(block: nn.Module, x: Tensor) -> Tensor:
    y = block(x)
    return y[0] if isinstance(y, tuple) else y


@every_case
def test_the_same_weights_give_their_outputs(case: str) -> None:
    theirs, ours = pair(case)
    for x in (tokens(), tokens(1, 1)):
        expected = out(theirs, x.clone())
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(x), expected, atol=2e-5, rtol=2e-5)


@every_case
def test_gradients_are_theirs(case: str) -> None:
    theirs, ours = pair(case)
    x, weights = tokens().requires_grad_(), tokens()
    for block in (theirs, ours):
        for parameter in block.parameters():
            parameter.requires_grad_()
    (expected,) = torch.autograd.grad((out(theirs, x.clone()) * weights).sum(), x)
    (got,) = torch.autograd.grad((ours(x) * weights).sum(), x)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_the_load_balancing_loss_is_that_of_one_layer_of_mixtral() -> None:
    _, ours = pair("mixtral")
    x = tokens()
    logits = ours.router(x.flatten(0, 1))
    ours.train()(x)
    torch.testing.assert_close(ours.balance_loss, load_balancing_loss_func((logits,), 6, 2))
    chosen = logits.topk(2).indices
    torch.testing.assert_close(load_balancing_loss(logits.softmax(-1), chosen), ours.balance_loss)
