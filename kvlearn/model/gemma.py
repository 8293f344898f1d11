"""Gemma 2 and 3 (text): norms around both parts of a layer, embeddings multiplied by √d_model, GeGLU.

Their RMSNorm multiplies by 1 + w, ours by w: 1 is added when the weights are loaded.
"""

from typing import Any

from torch import Tensor

from kvlearn.model.config import ModelConfig
from kvlearn.model.families import (
    ATTENTION,
    FAMILIES,
    MLP,
    OUTSIDE,
    Family,
    activation,
    attention,
    by_layer_type,
    decoder_config,
    expect,
    of_layers,
    rope,
)

GEMMA = {
    **OUTSIDE,
    **ATTENTION,
    **MLP,
    **of_layers(
        "",
        "",
        {
            "input_layernorm.weight": "mixer_norm.weight",
            "post_attention_layernorm.weight": "mixer_post_norm.weight",
            "pre_feedforward_layernorm.weight": "mlp_norm.weight",
            "post_feedforward_layernorm.weight": "mlp_post_norm.weight",
        },
    ),
}


def gemma2(theirs: Any) -> ModelConfig:
    """Gemma 2: every other layer has a window; scores and logits are capped."""
    options = {**common(theirs), "softcap": theirs.attn_logit_softcapping}
    layers = by_layer_type(theirs, lambda _, window: attention(theirs, window=window, **options))
    return like_gemma(theirs, layers, rope=rope(theirs.rope_parameters, theirs.max_position_embeddings))


def gemma3(theirs: Any) -> ModelConfig:
    """Gemma 3: queries and keys are normalised; RoPE differs between layer types."""
    expect(theirs, attn_logit_softcapping=None)
    options = {**common(theirs), "qk_norm": "head"}
    angles = {
        kind: rope(theirs.rope_parameters[kind], theirs.max_position_embeddings)
        for kind in set(theirs.layer_types)
    }
    layers = by_layer_type(
        theirs, lambda kind, window: attention(theirs, window=window, rope=angles[kind], **options)
    )
    return like_gemma(theirs, layers, rope=None)


def common(theirs: Any) -> dict[str, Any]:
    """The options of attention that both have."""
    if theirs.use_bidirectional_attention:
        raise ValueError("config: use_bidirectional_attention=True is not supported, expected False")
    return {
        "scale": theirs.query_pre_attn_scalar**-0.5,
        "qkv_bias": theirs.attention_bias,
        "o_bias": theirs.attention_bias,
    }


def like_gemma(theirs: Any, layers: Any, **fields: Any) -> ModelConfig:
    return decoder_config(
        theirs,
        layers,
        norms="both",
        activation=activation(theirs, "hidden_activation"),
        embed_scale=theirs.hidden_size**0.5,
        logit_softcap=theirs.final_logit_softcapping,
        **fields,
    )


def add_one(name: str, tensor: Tensor, theirs: Any) -> Tensor:
    """1 + w of a norm."""
    return tensor + 1 if "norm" in name else tensor


FAMILIES["gemma2"] = Family(GEMMA, gemma2, add_one)
FAMILIES["gemma3_text"] = Family(GEMMA, gemma3, add_one)
