"""DeepSeek-V2, V3 and V3.2 of transformers as decoders with MLA or DSA and a mixture of experts.

Their RoPE pairs neighbours (2i, 2i + 1), ours the halves (i, i + Dr/2): ``half_split`` reorders the rotated
rows, the last Dr of every query head and of the compressed token, when weights are loaded; ``interleave`` is
its inverse. All other weights are loaded unchanged, V3.2's indexer too, which pairs halves.

Letters beside those of core.py: N rows of a matrix.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvlearn import validate
from kvlearn.model.config import ModelConfig, Spec
from kvlearn.model.families import (
    FAMILIES,
    LLAMA,
    Family,
    decoder_config,
    expect,
    expect_silu,
    has_angles,
    rope,
)
from kvlearn.model.mixtures import EXPERTS
from kvlearn.model.moe import MoEConfig

DEEPSEEK = {
    **LLAMA,
    **EXPERTS,
    **{
        f"model.layers.{{}}.self_attn.{theirs}.weight": f"blocks.{{}}.mixer.{ours}.weight"
        for theirs, ours in {
            "q_a_proj": "q_down",
            "q_a_layernorm": "q_norm",
            "q_b_proj": "q_up",
            "kv_a_proj_with_mqa": "kv_down",
            "kv_a_layernorm": "kv_norm",
            "kv_b_proj": "kv_up",
        }.items()
    },
    **{
        f"model.layers.{{}}.self_attn.indexer.{theirs}": f"blocks.{{}}.mixer.indexer.{ours}"
        for theirs, ours in {
            "wq_b.weight": "q_proj.weight",
            "wk.weight": "k_proj.weight",
            "k_norm.weight": "k_norm.weight",
            "k_norm.bias": "k_norm.bias",
            "weights_proj.weight": "weight_proj.weight",
        }.items()
    },
}


# Kept in fp32 where the other weights are half precision.
WIDE = (
    "model.layers.{}.mlp.gate.e_score_correction_bias",
    "model.layers.{}.self_attn.indexer.weights_proj.weight",
)


def deepseek(theirs: Any) -> ModelConfig:
    """The shape of a DeepSeek-V2, V3 or V3.2, from its configuration in transformers."""
    expect(theirs, attention_bias=False)
    if theirs.model_type != "deepseek_v3":  # which has no such option
        expect(theirs, mlp_bias=False)
    expect_silu(theirs)
    parameters, sharper = yarn_scale(theirs.rope_parameters)
    scale = (theirs.qk_nope_head_dim + theirs.qk_rope_head_dim) ** -0.5 * sharper
    options = {
        "v_head_dim": theirs.v_head_dim,
        "rank": theirs.kv_lora_rank,
        "q_rank": theirs.q_lora_rank,
        "rope_dim": theirs.qk_rope_head_dim,
        "scale": scale,
    }
    mixer = Spec("mla", **options)
    if theirs.model_type == "deepseek_v32":
        index = {"index_heads": theirs.index_n_heads, "index_dim": theirs.index_head_dim}
        mixer = Spec("dsa", **options, **index, top_k=theirs.index_topk)
    layers = range(theirs.num_hidden_layers)
    if theirs.model_type == "deepseek_v32":
        dense = tuple(n for n in layers if theirs.mlp_layer_types[n] != "sparse")
    else:
        dense = tuple(layers[: theirs.first_k_dense_replace])
    return decoder_config(
        theirs,
        mixer,
        head_dim=theirs.qk_nope_head_dim,
        rope=rope(parameters, theirs.max_position_embeddings),
        experts=experts(theirs) if len(dense) < len(layers) else None,
        dense_layers=dense if len(dense) < len(layers) else (),
    )


def experts(theirs: Any) -> MoEConfig:
    """V2 chooses by softmax, from groups by their best expert; V3 by sigmoid, by their two best."""
    routing: dict[str, Any] = {"n_groups": theirs.n_group or 1, "topk_groups": theirs.topk_group or 1}
    if theirs.model_type == "deepseek_v2":
        routing["normalise"] = False
        if theirs.topk_method == "greedy":
            routing = {"normalise": False}
        elif theirs.topk_method != "group_limited_greedy":
            raise ValueError(f"config: topk_method={theirs.topk_method!r} is not supported")
    else:
        routing |= {"routing": "sigmoid", "normalise": theirs.norm_topk_prob, "correction": True}
        routing["group_best"] = 2
    return MoEConfig(
        theirs.n_routed_experts,
        theirs.num_experts_per_tok,
        theirs.moe_intermediate_size,
        scaling=theirs.routed_scaling_factor,
        d_ff_shared=theirs.moe_intermediate_size * (theirs.n_shared_experts or 0),
        **routing,
    )


def is_unused(name: str, theirs: Any) -> bool:
    """Whether this is a layer that predicts further tokens (they follow the others), or a table of angles."""
    number = next((int(part) for part in name.split(".") if part.isdigit()), 0)
    return number >= theirs.num_hidden_layers or has_angles(name, theirs)


def yarn_scale(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """``rope_parameters`` without DeepSeek's two mscales, and the factor on the scores' scale.

    With m(a) = 0.1 · a · ln(factor) + 1, rotated queries and keys are multiplied by m(mscale) /
    m(mscale_all_dim), if both are given, and all scores by m(mscale_all_dim)².
    """
    left = dict(parameters)
    if left.get("rope_type") != "yarn":
        return left, 1.0
    mscale, all_dim = left.pop("mscale", None), left.pop("mscale_all_dim", None)
    stretch = 0.1 * math.log(max(left["factor"], 1.0))
    if mscale and all_dim and left.get("attention_factor") is None:
        left["attention_factor"] = (mscale * stretch + 1) / (all_dim * stretch + 1)
    return left, (all_dim * stretch + 1) ** 2 if all_dim else 1.0


def adapt(name: str, tensor: Tensor, theirs: Any) -> Tensor:
    """A tensor of theirs with the rotated rows in our order."""
    if not getattr(theirs, "rope_interleave", True):  # V2 has no such option: always interleaved
        return tensor
    part = name.removesuffix(".weight").rpartition(".")[2]
    if part in ("q_proj", "q_b_proj"):
        return half_split(tensor, theirs.qk_rope_head_dim, theirs.num_attention_heads)
    return half_split(tensor, theirs.qk_rope_head_dim) if part == "kv_a_proj_with_mqa" else tensor


def half_split(weight: Float[Tensor, "N M"], rope_dim: int, n_heads: int = 1) -> Float[Tensor, "N M"]:
    """Reorder the last ``rope_dim`` rows of every head: 0, 1, 2, 3, … become 0, 2, 4, … 1, 3, 5, …"""
    return _reorder(weight, rope_dim, n_heads, (-1, 2))


def interleave(weight: Float[Tensor, "N M"], rope_dim: int, n_heads: int = 1) -> Float[Tensor, "N M"]:
    """The inverse of ``half_split``."""
    return _reorder(weight, rope_dim, n_heads, (2, -1))


def _reorder(weight: Tensor, rope_dim: int, n_heads: int, pairs: tuple[int, int]) -> Tensor:
    validate.tensor("weight", weight, ("rows", "columns"))
    n_heads = validate.divides("n_heads", n_heads, "rows", len(weight))
    rows, rope_dim = len(weight) // n_heads, validate.positive("rope_dim", rope_dim)
    validate.at_most("rope_dim", rope_dim, rows, "rows of a head")
    if rope_dim % 2:
        raise ValueError(f"rope_dim: expected an even number, got {rope_dim}")
    other, rotated = weight.unflatten(0, (n_heads, -1)).split((rows - rope_dim, rope_dim), dim=1)
    rotated = rotated.unflatten(1, pairs).transpose(1, 2).flatten(1, 2)
    return torch.cat((other, rotated), dim=1).flatten(0, 1)


FAMILIES.update(
    dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "deepseek_v32"),
        Family(DEEPSEEK, deepseek, adapt, wide=WIDE, ignore=is_unused),
    )
)
