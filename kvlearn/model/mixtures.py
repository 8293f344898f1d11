"""Mixtral, Qwen 3's mixtures and gpt-oss: a mixture of experts as the feed-forward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvlearn.model.config import ModelConfig
from kvlearn.model.families import (
    ATTENTION,
    FAMILIES,
    LLAMA,
    OUTSIDE,
    PRE_NORMS,
    Family,
    attention,
    by_layer_type,
    decoder_config,
    expect_silu,
    of_layers,
)
from kvlearn.model.moe import MoEConfig

# In files each expert has three matrices of its own, in memory all have two together.
EXPERTS = {
    **of_layers(
        "mlp.experts.{}.",
        "mlp.",
        {
            "gate_proj.weight": "gate_up_proj.weight[{}, 0/2]",
            "up_proj.weight": "gate_up_proj.weight[{}, 1/2]",
            "down_proj.weight": "down_proj.weight[{}]",
        },
    ),
    **of_layers(
        "mlp.",
        "mlp.",
        {
            "gate.weight": "router.weight",
            "gate.e_score_correction_bias": "correction",
            "experts.gate_up_proj": "gate_up_proj.weight",
            "experts.down_proj": "down_proj.weight",
            "shared_experts.gate_proj.weight": "shared.gate_proj.weight",
            "shared_experts.up_proj.weight": "shared.up_proj.weight",
            "shared_experts.down_proj.weight": "shared.down_proj.weight",
        },
    ),
}

MIXTRAL = {
    **OUTSIDE,
    **ATTENTION,
    **PRE_NORMS,
    **of_layers("block_sparse_moe.", "mlp.", {"gate.weight": "router.weight"}),
    **of_layers(
        "block_sparse_moe.experts.{}.",
        "mlp.",
        {
            "w1.weight": "gate_up_proj.weight[{}, 0/2]",
            "w3.weight": "gate_up_proj.weight[{}, 1/2]",
            "w2.weight": "down_proj.weight[{}]",
        },
    ),
    **EXPERTS,
}


def mixtral(theirs: Any) -> ModelConfig:
    """Mixtral: each token uses the SwiGLUs of two experts of eight."""
    expect_silu(theirs)
    experts = MoEConfig(theirs.num_local_experts, theirs.num_experts_per_tok, theirs.intermediate_size)
    return decoder_config(theirs, attention(theirs, window=theirs.sliding_window), experts=experts)


def qwen3_moe(theirs: Any) -> ModelConfig:
    """Qwen 3's mixtures: every ``decoder_sparse_step``-th layer has experts, except ``mlp_only_layers``."""
    expect_silu(theirs)
    layers, step = range(theirs.num_hidden_layers), theirs.decoder_sparse_step
    dense = tuple(n for n in layers if n in theirs.mlp_only_layers or (n + 1) % step)
    experts = MoEConfig(
        theirs.num_experts,
        theirs.num_experts_per_tok,
        theirs.moe_intermediate_size,
        normalise=theirs.norm_topk_prob,
    )
    bias = theirs.attention_bias
    mixer = attention(theirs, window=theirs.sliding_window, qk_norm="head", qkv_bias=bias, o_bias=bias)
    return decoder_config(theirs, mixer, experts=experts, dense_layers=dense)


GPT_OSS = {
    **OUTSIDE,
    **ATTENTION,
    **PRE_NORMS,
    **of_layers("self_attn.", "mixer.", {"sinks": "sink_logits"}),
    **of_layers(
        "mlp.",
        "mlp.",
        {
            "router.weight": "router.weight",
            "router.bias": "router.bias",
            "experts.gate_up_proj": "gate_up_proj.weight",
            "experts.gate_up_proj_bias": "gate_up_proj.bias",
            "experts.down_proj": "down_proj.weight",
            "experts.down_proj_bias": "down_proj.bias",
        },
    ),
}


NORMS = {name for name in GPT_OSS if "norm" in name}  # fp32 in a model that was loaded as fp16


def gpt_oss(theirs: Any) -> ModelConfig:
    """gpt-oss: every other layer has a window, every softmax a sink; biases everywhere; a clamped SwiGLU."""
    bias = theirs.attention_bias
    experts = MoEConfig(
        theirs.num_local_experts,
        theirs.num_experts_per_tok,
        theirs.intermediate_size,
        bias=True,
        limit=theirs.swiglu_limit,
        alpha=theirs.swiglu_alpha,
    )
    layers = by_layer_type(
        theirs,
        lambda _, window: attention(theirs, window=window, sink_logits=True, qkv_bias=bias, o_bias=bias),
    )
    return decoder_config(theirs, layers, experts=experts)


def untangle(name: str, tensor: Tensor, theirs: Any) -> Tensor | Sequence[Tensor]:
    """Their experts multiply from the right, (E, in, out), with gate and up in alternate columns."""
    if name.endswith("experts.down_proj"):
        return tensor.mT.contiguous()
    if name.endswith("experts.gate_up_proj"):
        return torch.cat((tensor[..., 0::2].mT, tensor[..., 1::2].mT), dim=1)
    if name.endswith("experts.gate_up_proj_bias"):
        return torch.cat((tensor[..., 0::2], tensor[..., 1::2]), dim=1)
    return tensor


FAMILIES["mixtral"] = Family(MIXTRAL, mixtral)
FAMILIES["qwen3_moe"] = Family({**LLAMA, **EXPERTS}, qwen3_moe)
FAMILIES["gpt_oss"] = Family(GPT_OSS, gpt_oss, untangle, wide=NORMS)
