"""Mixtral and gpt-oss: a mixture of experts as the feed-forward of every layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvlearn.model.config import ModelConfig
from kvlearn.model.families import (
    ATTENTION,
    FAMILIES,
    OUTSIDE,
    PRE_NORMS,
    Family,
    attention,
    by_layer_type,
    decoder_config,
    expect,
    of_layers,
)
from kvlearn.model.moe import MoEConfig

# In files each expert has three matrices of its own, in memory all have two together.
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
    **of_layers(
        "mlp.",
        "mlp.",
        {
            "gate.weight": "router.weight",
            "experts.gate_up_proj": "gate_up_proj.weight",
            "experts.down_proj": "down_proj.weight",
        },
    ),
}


def mixtral(theirs: Any) -> ModelConfig:
    """Mixtral: each token uses the SwiGLUs of two experts of eight."""
    expect(theirs, hidden_act="silu")
    experts = MoEConfig(theirs.num_local_experts, theirs.num_experts_per_tok, theirs.intermediate_size)
    return decoder_config(theirs, attention(theirs, window=theirs.sliding_window), experts=experts)


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
FAMILIES["gpt_oss"] = Family(GPT_OSS, gpt_oss, untangle)
