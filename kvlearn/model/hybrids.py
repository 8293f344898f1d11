"""Hybrids of transformers as decoders: layers that keep a state, and layers that keep keys and values.

Qwen3-Next      3 of gated_delta : 1 of attention with an output gate, experts
Kimi-Linear     3 of kda : 1 of mla without positions, experts
Jamba           7 of mamba : 1 of attention without positions, experts in every second layer
Falcon-H1       mamba2 and attention side by side in every layer
LFM2            short gated convolutions, and attention in some layers; LFM2-MoE with experts

Their tensors are loaded in our form: constants that they multiply by at run time, and the 1 that Qwen3-Next
adds to the weights of its norms, become part of the weights.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvlearn.model.config import ModelConfig, Spec
from kvlearn.model.families import (
    ATTENTION,
    FAMILIES,
    OUTSIDE,
    PRE_NORMS,
    Family,
    attention,
    decoder_config,
    expect,
    expect_silu,
    of_layers,
    partial_rope,
    rope,
    rotary_dim,
    same,
)
from kvlearn.model.moe import MoEConfig

SWIGLU = [f"{part}_proj.weight" for part in ("gate", "up", "down")]


def feed_forward(theirs: str, *, router: str = "gate", shared: str | None = None) -> dict[str, str]:
    """Names of a feed-forward: a dense one; experts in one tensor, in memory, or each alone, in files."""
    names = {
        **same(*SWIGLU),
        f"{router}.weight": "router.weight",
        "experts.gate_up_proj": "gate_up_proj.weight",
        "experts.down_proj": "down_proj.weight",
        "experts.{}.gate_proj.weight": "gate_up_proj.weight[{}, 0/2]",
        "experts.{}.up_proj.weight": "gate_up_proj.weight[{}, 1/2]",
        "experts.{}.down_proj.weight": "down_proj.weight[{}]",
        **({f"{shared}.{name}": f"shared.{name}" for name in SWIGLU} if shared else {}),
    }
    return of_layers(f"{theirs}.", "mlp.", names)


def of_experts(theirs: str) -> dict[str, str]:
    """Names of the three matrices of each expert, as Mixtral calls them."""
    return {
        f"{theirs}w1.weight": "gate_up_proj.weight[{}, 0/2]",
        f"{theirs}w3.weight": "gate_up_proj.weight[{}, 1/2]",
        f"{theirs}w2.weight": "down_proj.weight[{}]",
    }


# Qwen3-Next

QWEN3_NEXT: dict[str, str | Sequence[str]] = {
    **OUTSIDE,
    **ATTENTION,
    **PRE_NORMS,
    **feed_forward("mlp", shared="shared_expert"),
    **of_layers("mlp.", "mlp.", {"shared_expert_gate.weight": "shared_gate.weight"}),
    **of_layers(
        "linear_attn.",
        "mixer.",
        {
            "conv1d.weight": "conv.weight",
            "out_proj.weight": "o_proj.weight",
            **same("norm.weight", "A_log", "dt_bias"),
        },
    ),
    "model.layers.{}.self_attn.q_proj.weight": [f"blocks.{{}}.mixer.{p}_proj.weight" for p in ("q", "gate")],
    "model.layers.{}.linear_attn.in_proj_qkvz.weight": [f"blocks.{{}}.mixer.{p}_proj.weight" for p in "qkvg"],
    "model.layers.{}.linear_attn.in_proj_ba.weight": [f"blocks.{{}}.mixer.{p}_proj.weight" for p in "ba"],
}


def qwen3_next(theirs: Any) -> ModelConfig:
    """The shape of a Qwen3-Next, from its configuration in transformers."""
    expect(theirs, attention_bias=False)
    expect_silu(theirs)
    kinds = {
        "linear_attention": Spec(
            "gated_delta",
            n_heads=theirs.linear_num_value_heads,
            head_dim=theirs.linear_value_head_dim,
            key_dim=theirs.linear_key_head_dim,
            n_key_heads=theirs.linear_num_key_heads,
            conv=theirs.linear_conv_kernel_dim,
            norm_eps=theirs.rms_norm_eps,
        ),
        "full_attention": attention(theirs, rotary_dim=rotary_dim(theirs), qk_norm="head", gate=True),
    }
    sparse = [
        theirs.num_experts > 0
        and i not in theirs.mlp_only_layers
        and (i + 1) % theirs.decoder_sparse_step == 0
        for i in range(theirs.num_hidden_layers)
    ]
    experts = MoEConfig(
        max(theirs.num_experts, theirs.num_experts_per_tok),
        theirs.num_experts_per_tok,
        theirs.moe_intermediate_size,
        normalise=theirs.norm_topk_prob,
        d_ff_shared=theirs.shared_expert_intermediate_size,
        shared_gate=True,
    )
    return decoder_config(
        theirs,
        [kinds[kind] for kind in theirs.layer_types],
        rope=partial_rope(theirs),
        **sparse_layers(experts, sparse),
    )


def sparse_layers(experts: MoEConfig, sparse: Sequence[bool]) -> dict[str, Any]:
    """Fields of our configuration for ``experts`` in the layers that are ``sparse``, if any are."""
    dense = [i for i, has_experts in enumerate(sparse) if not has_experts]
    return {"experts": experts, "dense_layers": dense} if any(sparse) else {}


def adapt_qwen3_next(name: str, tensor: Tensor, theirs: Any) -> Tensor | list[Tensor]:
    """Projections that theirs keeps together, by heads, as one tensor each; norms of weight 1 + w."""
    part = name.removesuffix(".weight").rpartition(".")[2]
    if (name.endswith("norm.weight") and part != "norm") or name == "model.norm.weight":
        return tensor + 1
    sizes = {
        "q_proj": (theirs.num_attention_heads, (theirs.head_dim, theirs.head_dim)),
        "in_proj_qkvz": (theirs.linear_num_key_heads, widths_of_key_head(theirs)),
        "in_proj_ba": (
            theirs.linear_num_key_heads,
            2 * (theirs.linear_num_value_heads // theirs.linear_num_key_heads,),
        ),
    }
    if part not in sizes:
        return tensor
    n_heads, widths = sizes[part]
    if len(tensor) != n_heads * sum(widths):
        raise ValueError(
            f"model_or_path: tensor {name!r} expected with {n_heads * sum(widths)} rows, got {len(tensor)}"
        )
    return [rows.flatten(0, 1) for rows in tensor.unflatten(0, (n_heads, -1)).split(widths, dim=1)]


def widths_of_key_head(theirs: Any) -> tuple[int, int, int, int]:
    """Rows of q, k, v and the gate that belong to one key head."""
    key = theirs.linear_key_head_dim
    values = theirs.linear_num_value_heads // theirs.linear_num_key_heads * theirs.linear_value_head_dim
    return key, key, values, values


# Jamba

JAMBA = {
    **OUTSIDE,
    "model.final_layernorm.weight": "norm.weight",
    **ATTENTION,
    **of_layers(
        "", "", {"input_layernorm.weight": "mixer_norm.weight", "pre_ff_layernorm.weight": "mlp_norm.weight"}
    ),
    **feed_forward("feed_forward", router="router"),
    **of_layers(
        "mamba.",
        "mixer.",
        {
            **same("in_proj.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D"),
            **{f"conv1d.{kind}": f"conv.{kind}" for kind in ("weight", "bias")},
            "out_proj.weight": "o_proj.weight",
            **{f"{part.lower()}_layernorm.weight": f"norms.{part}.weight" for part in ("dt", "B", "C")},
        },
    ),
}


def jamba(theirs: Any) -> ModelConfig:
    """The shape of a Jamba, from its configuration in transformers."""
    expect(theirs, mamba_proj_bias=False)
    expect_silu(theirs)
    mamba = Spec(
        "mamba",
        expand=theirs.mamba_expand,
        d_state=theirs.mamba_d_state,
        conv=theirs.mamba_d_conv,
        conv_bias=theirs.mamba_conv_bias,
        dt_rank=theirs.mamba_dt_rank,
        norms=True,
        norm_eps=theirs.rms_norm_eps,
    )
    kinds = {"mamba": mamba, "attention": attention(theirs)}
    experts = MoEConfig(
        max(theirs.num_experts, theirs.num_experts_per_tok),
        theirs.num_experts_per_tok,
        theirs.intermediate_size,
        normalise=False,
    )
    return decoder_config(
        theirs,
        [kinds[kind] for kind in theirs.layers_block_type],
        rope=None,
        **sparse_layers(experts, [n_experts > 1 for n_experts in theirs.layers_num_experts]),
    )


# Falcon-H1

FALCON_H1 = {
    **OUTSIDE,
    "model.final_layernorm.weight": "norm.weight",
    **{theirs: ours.replace(".mixer.", ".mixer.mixers.1.") for theirs, ours in ATTENTION.items()},
    **of_layers(
        "", "", {"input_layernorm.weight": "mixer_norm.weight", "pre_ff_layernorm.weight": "mlp_norm.weight"}
    ),
    **of_layers("feed_forward.", "mlp.", same(*SWIGLU)),
    **of_layers(
        "mamba.",
        "mixer.mixers.0.",
        {
            **same("in_proj.weight", "A_log", "D", "dt_bias", "norm.weight"),
            **{f"conv1d.{kind}": f"conv.{kind}" for kind in ("weight", "bias")},
            "out_proj.weight": "o_proj.weight",
        },
    ),
}


def falcon_h1(theirs: Any) -> ModelConfig:
    """The shape of a Falcon-H1, from its configuration in transformers."""
    expect(theirs, attention_bias=False, mlp_bias=False, mamba_proj_bias=False, projectors_bias=False)
    expect_silu(theirs)
    limits = tuple(float(bound) for bound in theirs.time_step_limit)
    norm = "norm_gate" if theirs.mamba_norm_before_gate else "gate_norm"
    options = {} if limits == (0, math.inf) else {"dt_limit": limits}
    mamba2 = Spec(
        "mamba2",
        n_heads=theirs.mamba_n_heads,
        head_dim=theirs.mamba_d_head,
        d_state=theirs.mamba_d_state,
        n_groups=theirs.mamba_n_groups,
        conv=theirs.mamba_d_conv,
        conv_bias=theirs.mamba_conv_bias,
        norm=norm if theirs.mamba_rms_norm else "gate",
        norm_eps=theirs.rms_norm_eps,
        **options,  # type: ignore[arg-type]
    )
    parts = Spec("parallel", parts=[mamba2, attention(theirs)])
    return decoder_config(theirs, parts, embed_scale=theirs.embedding_multiplier)


def adapt_falcon_h1(name: str, tensor: Tensor, theirs: Any) -> Tensor:
    """A tensor times the constants that theirs multiplies by at run time.

    Those of the logits go to the last norm, since the output's matrix may be the embedding's.
    """
    part = name.removeprefix("model.layers.{}.").removesuffix(".weight")
    gate, down = theirs.mlp_multipliers
    if part == "mamba.in_proj":
        inner, states = (
            theirs.mamba_n_heads * theirs.mamba_d_head,
            theirs.mamba_n_groups * theirs.mamba_d_state,
        )
        rows = torch.tensor((inner, inner, states, states, theirs.mamba_n_heads))
        factors = theirs.ssm_in_multiplier * torch.tensor(theirs.ssm_multipliers, dtype=torch.float64)
        return tensor * factors.repeat_interleave(rows)[:, None].to(tensor)
    factor = {
        "mamba.out_proj": theirs.ssm_out_multiplier,
        "self_attn.q_proj": theirs.attention_in_multiplier,
        "self_attn.k_proj": theirs.attention_in_multiplier * theirs.key_multiplier,
        "self_attn.v_proj": theirs.attention_in_multiplier,
        "self_attn.o_proj": theirs.attention_out_multiplier,
        "feed_forward.gate_proj": gate,
        "feed_forward.down_proj": down,
        "model.final_layernorm": theirs.lm_head_multiplier,
    }.get(part, 1.0)
    return tensor if factor == 1 else tensor * factor


# Kimi-Linear

KIMI_LINEAR = {
    **OUTSIDE,
    **ATTENTION,
    **PRE_NORMS,
    **feed_forward("mlp", shared="shared_experts"),
    **of_layers("mlp.", "mlp.", {"gate.e_score_correction_bias": "correction"}),
    **of_layers(
        "self_attn.",
        "mixer.",
        {
            "q_a_proj.weight": "q_down.weight",
            "q_a_layernorm.weight": "q_norm.weight",
            "q_b_proj.weight": "q_up.weight",
            "kv_a_proj_with_mqa.weight": "kv_down.weight",
            "kv_a_layernorm.weight": "kv_norm.weight",
            "kv_b_proj.weight": "kv_up.weight",
            "b_proj.weight": "b_proj.weight",
            "conv1d.weight": "conv.weight",
            "g_a_proj.weight": "gate_down.weight",
            "g_b_proj.weight": "gate_up.weight",
            "o_norm.weight": "norm.weight",
            **{
                f"{gate}{theirs}": ours
                for gate in ("forget_gate.", "")  # in memory, in files
                for theirs, ours in {
                    "f_a_proj.weight": "decay_down.weight",
                    "f_b_proj.weight": "decay_up.weight",
                    **same("A_log", "dt_bias"),
                }.items()
            },
        },
    ),
    # Other names that files have.
    **{
        theirs.replace(".mlp.", ".block_sparse_moe."): ours
        for theirs, ours in feed_forward("mlp", shared="shared_experts").items()
    },
    **of_layers("block_sparse_moe.", "mlp.", {"gate.e_score_correction_bias": "correction"}),
    **of_layers("block_sparse_moe.", "mlp.", of_experts("experts.{}.")),
    **of_layers(
        "self_attn.",
        "mixer.",
        {f"{part}_conv1d.weight": f"conv.weight[{i}/3]" for i, part in enumerate("qkv")},
    ),
}


def kimi_linear(theirs: Any) -> ModelConfig:
    """The shape of a Kimi-Linear, from its configuration in transformers."""
    expect(theirs, attention_bias=False)
    expect_silu(theirs)
    kinds = {
        "linear_attention": Spec(
            "kda",
            n_heads=theirs.linear_num_heads,
            head_dim=theirs.linear_head_dim,
            conv=theirs.linear_conv_kernel_dim,
            norm_eps=theirs.rms_norm_eps,
        ),
        "full_attention": Spec(
            "mla",
            head_dim=theirs.qk_nope_head_dim,
            v_head_dim=theirs.v_head_dim,
            rank=theirs.kv_lora_rank,
            q_rank=theirs.q_lora_rank,
            rope_dim=theirs.qk_rope_head_dim,
        ),
    }
    experts = MoEConfig(
        theirs.num_local_experts,
        theirs.num_experts_per_tok,
        theirs.moe_intermediate_size,
        "sigmoid",
        normalise=theirs.norm_topk_prob,
        scaling=theirs.routed_scaling_factor,
        n_groups=theirs.n_group,
        topk_groups=theirs.topk_group,
        group_best=2,
        correction=True,
        d_ff_shared=theirs.moe_intermediate_size * theirs.n_shared_experts,
    )
    return decoder_config(
        theirs,
        [kinds[kind] for kind in theirs.layer_types],
        head_dim=None,
        rope=None,
        tied=False,  # theirs ignores ``tie_word_embeddings``
        **sparse_layers(experts, [kind == "sparse" for kind in theirs.mlp_layer_types]),
    )


def adapt_kimi_linear(name: str, tensor: Tensor, theirs: Any) -> Tensor:
    """Their A_log, (1, 1, H, 1), as a vector."""
    return tensor.flatten() if name.endswith("A_log") else tensor


# LFM2

LFM2 = {
    **OUTSIDE,
    "model.embedding_norm.weight": "norm.weight",
    **ATTENTION,
    **of_layers(
        "self_attn.",
        "mixer.",
        {
            "out_proj.weight": "o_proj.weight",
            "q_layernorm.weight": "q_norm.weight",
            "k_layernorm.weight": "k_norm.weight",
        },
    ),
    **of_layers(
        "conv.",
        "mixer.",
        {
            f"{theirs}.{kind}": f"{ours}.{kind}"
            for theirs, ours in (("in_proj", "in_proj"), ("conv", "conv"), ("out_proj", "o_proj"))
            for kind in ("weight", "bias")
        },
    ),
    **of_layers("", "", {"operator_norm.weight": "mixer_norm.weight", "ffn_norm.weight": "mlp_norm.weight"}),
    **of_layers(
        "feed_forward.",
        "mlp.",
        {
            "w1.weight": "gate_proj.weight",
            "w3.weight": "up_proj.weight",
            "w2.weight": "down_proj.weight",
            "gate.weight": "router.weight",
            "expert_bias": "correction",
            "experts.gate_up_proj": "gate_up_proj.weight",
            "experts.down_proj": "down_proj.weight",
            **of_experts("experts.{}."),
        },
    ),
}


def lfm2(theirs: Any) -> ModelConfig:
    """The shape of an LFM2, from its configuration in transformers."""
    d_ff = theirs.intermediate_size
    if theirs.block_auto_adjust_ff_dim:  # two thirds, times a factor, rounded up to a multiple
        d_ff = int(2 * d_ff / 3)
        if theirs.block_ffn_dim_multiplier is not None:
            of = theirs.block_multiple_of
            d_ff = -(-int(theirs.block_ffn_dim_multiplier * d_ff) // of) * of
    return of_convolutions(theirs, d_ff=d_ff)


def lfm2_moe(theirs: Any) -> ModelConfig:
    """The shape of an LFM2 with experts, from its configuration in transformers."""
    experts = MoEConfig(
        theirs.num_experts,
        theirs.num_experts_per_tok,
        theirs.moe_intermediate_size,
        "sigmoid",
        normalise=theirs.norm_topk_prob,
        sum_eps=1e-6,
        scaling=theirs.routed_scaling_factor,
        correction=theirs.use_expert_bias,
    )
    sparse = [i >= theirs.num_dense_layers for i in range(theirs.num_hidden_layers)]
    return of_convolutions(theirs, d_ff=theirs.intermediate_size, **sparse_layers(experts, sparse))


def of_convolutions(theirs: Any, **fields: Any) -> ModelConfig:
    """The configuration that both share: short gated convolutions, and attention in some layers."""
    kinds = {
        "conv": Spec("gated_conv", width=theirs.conv_L_cache, bias=theirs.conv_bias),
        "full_attention": Spec(
            "released", n_kv_heads=theirs.num_key_value_heads, qk_norm="head", norm_eps=theirs.norm_eps
        ),
    }
    return ModelConfig(
        vocab_size=theirs.vocab_size,
        d_model=theirs.hidden_size,
        n_layers=theirs.num_hidden_layers,
        n_heads=theirs.num_attention_heads,
        head_dim=getattr(theirs, "head_dim", None),
        layers=[kinds[kind] for kind in theirs.layer_types],
        rope=rope(theirs.rope_parameters, theirs.max_position_embeddings),
        norm_eps=theirs.norm_eps,
        tied=theirs.tie_word_embeddings,
        **fields,
    )


def vectors(names: Iterable[str]) -> list[str]:
    """The ``names`` that models in half precision may keep in fp32: rates, steps, norms, corrections."""
    ends = ("A_log", ".D", "dt_bias", "dt_proj.bias", "norm.weight", "correction_bias", "expert_bias")
    return [name for name in names if name.endswith(ends)]


def is_unused(name: str, theirs: Any) -> bool:
    """Whether a tensor is of Qwen3-Next's second head, which predicts a further token."""
    return name.startswith("mtp.")


FAMILIES.update(
    qwen3_next=Family(QWEN3_NEXT, qwen3_next, adapt_qwen3_next, wide=vectors(QWEN3_NEXT), ignore=is_unused),
    jamba=Family(JAMBA, jamba, wide=vectors(JAMBA)),
    falcon_h1=Family(FALCON_H1, falcon_h1, adapt_falcon_h1, wide=vectors(FALCON_H1)),
    kimi_linear=Family(KIMI_LINEAR, kimi_linear, adapt_kimi_linear, wide=vectors(KIMI_LINEAR)),
    lfm2=Family(LFM2, lfm2),
    lfm2_moe=Family(LFM2, lfm2_moe, wide=vectors(LFM2)),
)
