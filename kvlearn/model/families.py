"""Families of transformers' models as decoders of kvlearn: a table of tensor names and a configuration each.

Every line of a ``configure`` function follows from the family's configuration; a value that no
field of ours expresses raises ValueError with the name of theirs. Other modules of this folder add their
families to ``FAMILIES``.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlearn import validate
from kvlearn.attention import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)
from kvlearn.attention.rope import Scaling
from kvlearn.model.config import ModelConfig, Spec


class Family(NamedTuple):
    """The tensor names of a family, and the functions that convert its configuration and its tensors.

    ``names``: transformers' names -> ours. {} is a number in the name: the layer's, n, then an expert's.
    Where one layer of theirs is two of ours, {twice[0]} and {twice[1]} are 2n and 2n + 1. Several names: the
    tensor is split. "name[{}]" is one matrix of a stack, "name[{}, 1/2]" the second half of its rows.

    ``configure`` makes our configuration from theirs. ``adapt`` gets the tensor's name, with {} for numbers,
    the tensor and their configuration, and returns the tensor in our form, or one per name of ours.
    ``weights`` gets a model in memory and returns the trained weights, if its ``state_dict`` may differ from
    them. ``wide``: names with {} of tensors that may be fp32 where the others are half precision; they get
    the others' dtype, but buffers keep theirs. ``ignore`` gets a tensor's name and their configuration, and
    says whether we have no use for it.
    """

    names: Mapping[str, str | Sequence[str]]
    configure: Callable[[Any], ModelConfig]
    adapt: Callable[[str, Tensor, Any], Tensor | Sequence[Tensor]] | None = None
    weights: Callable[[Any], Mapping[str, Tensor]] | None = None
    wide: Collection[str] = ()
    ignore: Callable[[str, Any], bool] | None = None


FAMILIES: dict[str, Family] = {}  # by transformers' model_type


# Configurations

ACTIVATION = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "moe_intermediate_size",
    "num_experts_per_tok",
    "num_local_experts",
    "n_routed_experts",
    "decoder_sparse_step",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "index_topk",
    "index_n_heads",
    "index_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "linear_head_dim",
    "linear_num_heads",
    "attn_layer_period",
    "expert_layer_period",
    "mamba_d_state",
    "mamba_d_conv",
    "mamba_expand",
    "mamba_dt_rank",
    "mamba_n_heads",
    "mamba_d_head",
    "mamba_n_groups",
    "state_size",
    "conv_kernel",
    "expand",
    "time_step_rank",
    "num_heads",
    "n_groups",
    "conv_L_cache",
    "block_multiple_of",
    "shared_expert_intermediate_size",
    "swiglu_limit",
]  # of all families


def check_sizes(theirs: Any) -> None:
    """Raise ValueError for a size in their configuration that is not above 0, or does not divide another."""
    own_names = getattr(theirs, "attribute_map", {})
    for name in SIZES:
        if (size := getattr(theirs, name, None)) is not None and not size > 0:
            name = own_names.get(name, name)
            raise ValueError(f"config: {name}={size!r} is not supported, expected a number above 0")
    for part, whole in (
        ("num_key_value_heads", "num_attention_heads"),
        ("linear_num_key_heads", "linear_num_value_heads"),
        ("mamba_n_groups", "mamba_n_heads"),
        ("n_groups", "num_heads"),
    ):
        few, many = getattr(theirs, part, None), getattr(theirs, whole, None)
        if few and many and many % few:
            raise ValueError(f"config: {part}={few} is not supported, expected a divisor of {whole}={many}")


def expect(theirs: Any, **fields: Any) -> None:
    """Raise ValueError for a field of their configuration that is set to anything but this."""
    for name, value in fields.items():
        if (got := getattr(theirs, name, value)) != value:
            raise ValueError(f"config: {name}={got!r} is not supported, expected {value!r}")


def expect_silu(theirs: Any, field: str = "hidden_act") -> None:
    """Raise ValueError for an activation that is not SiLU, by whatever name."""
    if activation(theirs, field) != "silu":
        raise ValueError(f"config: {field}={getattr(theirs, field)!r} is not supported, expected 'silu'")


def head_dim(theirs: Any) -> int:
    """The width of a head: its own field, or else hidden_size // num_attention_heads."""
    return getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads


def attention(theirs: Any, **options: Any) -> Spec:
    """Grouped-query attention with ``options`` of "released", by the simplest mechanism that has them."""
    options = {name: value for name, value in options.items() if value is not None and value is not False}
    n_kv_heads = theirs.num_key_value_heads or theirs.num_attention_heads
    if "window" in options and options.keys() <= {"window", "rope"}:
        return Spec("window", n_kv_heads=n_kv_heads, **options)
    if options.keys() <= {"rope"}:
        grouped = n_kv_heads != theirs.num_attention_heads
        return Spec("gqa", n_kv_heads=n_kv_heads, **options) if grouped else Spec("full", **options)
    if "qk_norm" in options:
        options["norm_eps"] = theirs.rms_norm_eps
    return Spec("released", n_kv_heads=n_kv_heads, **options)


def by_layer_type(theirs: Any, spec: Callable[[str, int | None], Spec]) -> tuple[Spec, ...]:
    """``spec(layer type, its window)`` of every layer, as the shortest pattern that repeats to all."""
    specs = []
    if theirs.layer_types is None or len(theirs.layer_types) < theirs.num_hidden_layers:
        raise ValueError(
            f"config: layer_types={theirs.layer_types!r} is not supported, expected one per layer of "
            f"num_hidden_layers={theirs.num_hidden_layers}"
        )
    for kind in theirs.layer_types[: theirs.num_hidden_layers]:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"config: layer_types: {kind!r} is not supported")
        specs.append(spec(kind, theirs.sliding_window if kind == "sliding_attention" else None))
    n = len(specs)
    period = next(p for p in range(1, n + 1) if all(specs[i] == specs[i % p] for i in range(n)))
    return tuple(specs[:period])


def decoder_config(theirs: Any, layers: Spec | Sequence[Spec], **fields: Any) -> ModelConfig:
    """The fields that transformers' configurations share; ``fields`` of ours are added or replace them."""
    common = {
        "vocab_size": theirs.vocab_size,
        "d_model": theirs.hidden_size,
        "n_layers": theirs.num_hidden_layers,
        "n_heads": theirs.num_attention_heads,
        "head_dim": head_dim(theirs),
        "d_ff": theirs.intermediate_size,
        "layers": (layers,) if isinstance(layers, Spec) else layers,
        "norm_eps": theirs.rms_norm_eps,
        "tied": theirs.tie_word_embeddings,
    }
    if "rope" not in fields:
        common["rope"] = rope(theirs.rope_parameters, theirs.max_position_embeddings)
    if "activation" not in fields:
        common["activation"] = activation(theirs, "hidden_act")
    return ModelConfig(**{**common, **fields})


def activation(theirs: Any, field: str) -> str:
    """Our name for the activation in this field of theirs."""
    if (name := getattr(theirs, field)) not in ACTIVATION:
        raise ValueError(
            f"config: {field}={name!r} is not supported, expected one of {', '.join(ACTIVATION)}"
        )
    return ACTIVATION[name]


def rope(parameters: Mapping[str, Any] | None, max_len: int | None = None) -> RopeConfig:
    """RoPE by transformers' ``rope_parameters``, and by ``max_position_embeddings`` where that matters.

    Raises ValueError for an unsupported option. ``partial_rotary_factor`` is the attention's: ``rotary_dim``.
    """
    if not parameters or parameters.get("rope_theta") is None:
        raise ValueError(f"config: rope_parameters: rope_theta is missing in {parameters!r}")
    left = {name: value for name, value in parameters.items() if value is not None}
    theta, kind = left.pop("rope_theta"), left.pop("rope_type", "default")
    original = left.pop("original_max_position_embeddings", max_len)
    if left.get("partial_rotary_factor") == 1 or left.get("type") == kind:
        left = {name: value for name, value in left.items() if name not in ("partial_rotary_factor", "type")}
    scaling: Scaling | None = None
    try:
        match kind:
            case "default":
                pass
            case "linear":
                scaling = LinearScaling(left.pop("factor"))
            case "dynamic":
                scaling = DynamicScaling(left.pop("factor"), validate.positive("max_len", max_len))
            case "llama3":
                factor, low, high = (left.pop(n) for n in ("factor", "low_freq_factor", "high_freq_factor"))
                scaling = Llama3Scaling(factor, low, high, original)
            case "yarn":
                options = ("beta_fast", "beta_slow", "attention_factor", "truncate")
                given = {name: left.pop(name) for name in options if name in left}
                factor, scales = left.pop("factor"), [left.pop(n, 0) for n in ("mscale", "mscale_all_dim")]
                if all(scales):  # one alone changes nothing
                    growth, all_dim = (yarn_growth(factor, scale) for scale in scales)
                    given.setdefault("attention_factor", growth / all_dim)
                scaling = YarnScaling(factor, original, **given)
            case "longrope":
                scaling = longrope(left, original, max_len)
            case _:
                raise ValueError(
                    f"rope_type: expected one of transformers', got {kind!r}, which is not supported"
                )
    except KeyError as missing:
        raise ValueError(f"rope_parameters: {missing.args[0]} is missing for rope_type={kind!r}") from None
    for name, value in left.items():
        raise ValueError(f"rope_parameters: {name}={value!r} is not supported with rope_type={kind!r}")
    return RopeConfig(theta, scaling)


def ropes(theirs: Any) -> dict[str, RopeConfig]:
    """RoPE of each type of layer, where these differ."""
    kinds = set(theirs.layer_types)
    return {kind: rope(theirs.rope_parameters[kind], theirs.max_position_embeddings) for kind in kinds}


def yarn_growth(factor: float, mscale: float) -> float:
    """0.1 · mscale · ln(factor) + 1. Source: Peng et al., "YaRN" (2023), section 3.4, for mscale 1."""
    return 0.1 * mscale * math.log(max(factor, 1.0)) + 1


def longrope(left: dict[str, Any], original: int, max_len: int | None) -> LongRopeScaling:
    """Phi's: queries and keys grow with √(1 + ln(factor) / ln(original)), factor = max_len / original."""
    short, long = left.pop("short_factor"), left.pop("long_factor")
    factor = left.pop("factor", None) or (max_len or original) / original
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return LongRopeScaling(short, long, original, left.pop("attention_factor", default))


# Tables


def of_layers(theirs: str, ours: str, parts: Mapping[str, str]) -> dict[str, str]:
    """Names of parts of a layer: "model.layers.{}.THEIRS" -> "blocks.{}.OURS" for each."""
    return {f"model.layers.{{}}.{theirs}{a}": f"blocks.{{}}.{ours}{b}" for a, b in parts.items()}


def same(*names: str) -> dict[str, str]:
    """Names that are equal in both libraries."""
    return {name: name for name in names}


OUTSIDE = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
PROJECTIONS = [f"{part}_proj.{kind}" for part in ("q", "k", "v", "o") for kind in ("weight", "bias")]
ATTENTION = of_layers("self_attn.", "mixer.", same(*PROJECTIONS, "q_norm.weight", "k_norm.weight"))
MLP = of_layers(
    "mlp.",
    "mlp.",
    same(*(f"{part}_proj.{kind}" for part in ("gate", "up", "down") for kind in ("weight", "bias"))),
)
PRE_NORMS = of_layers(
    "",
    "",
    {"input_layernorm.weight": "mixer_norm.weight", "post_attention_layernorm.weight": "mlp_norm.weight"},
)
LLAMA = {**OUTSIDE, **ATTENTION, **MLP, **PRE_NORMS}


def has_angles(name: str, theirs: Any) -> bool:
    """Whether this is RoPE's table of angles, which old checkpoints store and which follows from theta."""
    return name.endswith("rotary_emb.inv_freq")


# Llama and its relatives


def llama(theirs: Any) -> ModelConfig:
    """Llama 1 to 3, and the many models that use its code."""
    bias = theirs.attention_bias
    return decoder_config(theirs, attention(theirs, qkv_bias=bias, o_bias=bias), mlp_bias=theirs.mlp_bias)


def mistral(theirs: Any) -> ModelConfig:
    """Mistral: a Llama with a window of ``sliding_window`` tokens, the token itself included.

    None, as from version 0.2 on, makes it a Llama.
    """
    expect(theirs, layer_types=None)
    return decoder_config(theirs, attention(theirs, window=theirs.sliding_window))


def ministral3(theirs: Any) -> ModelConfig:
    """Ministral 3: a Mistral whose queries grow with their position."""
    parameters = dict(theirs.rope_parameters)
    parameters.pop("max_position_embeddings", None)  # a copy of the field beside ``rope_parameters``
    for name in ("llama_4_scaling_beta", "original_max_position_embeddings"):
        if parameters.get(name) is None:
            raise ValueError(f"config: rope_parameters: {name} is missing")
    growth = (parameters.pop("llama_4_scaling_beta"), parameters["original_max_position_embeddings"], 0)
    layer = attention(theirs, window=theirs.sliding_window, query_growth=growth)
    return decoder_config(theirs, layer, rope=rope(parameters, theirs.max_position_embeddings))


def qwen2(theirs: Any) -> ModelConfig:
    """Qwen 2 and 2.5: biases of queries, keys and values; a window in the upper layers, if any."""
    return decoder_config(
        theirs, by_layer_type(theirs, lambda _, window: attention(theirs, window=window, qkv_bias=True))
    )


def qwen3(theirs: Any) -> ModelConfig:
    """Qwen 3: queries and keys are normalised head by head."""
    options = {"qk_norm": "head", "qkv_bias": theirs.attention_bias, "o_bias": theirs.attention_bias}
    return decoder_config(
        theirs, by_layer_type(theirs, lambda _, window: attention(theirs, window=window, **options))
    )


FAMILIES["llama"] = Family(LLAMA, llama, ignore=has_angles)
FAMILIES["mistral"] = Family(LLAMA, mistral, ignore=has_angles)
FAMILIES["ministral3"] = Family(LLAMA, ministral3)
FAMILIES["qwen2"] = Family(LLAMA, qwen2, ignore=has_angles)
FAMILIES["qwen3"] = Family(LLAMA, qwen3)


# OLMo 2: the norms follow attention and feed-forward; queries and keys are normalised over all heads.

OLMO2 = {
    **OUTSIDE,
    **ATTENTION,
    **MLP,
    **of_layers(
        "",
        "",
        {
            "post_attention_layernorm.weight": "mixer_post_norm.weight",
            "post_feedforward_layernorm.weight": "mlp_post_norm.weight",
        },
    ),
}


def olmo2(theirs: Any) -> ModelConfig:
    bias = theirs.attention_bias
    layer = attention(theirs, qk_norm="width", qkv_bias=bias, o_bias=bias)
    return decoder_config(theirs, layer, norms="post")


def olmo3(theirs: Any) -> ModelConfig:
    """OLMo 3: three layers with a window, and a RoPE of their own, per full one."""
    bias, angles = theirs.attention_bias, ropes(theirs)
    layers = by_layer_type(
        theirs,
        lambda kind, window: attention(
            theirs, window=window, rope=angles[kind], qk_norm="width", qkv_bias=bias, o_bias=bias
        ),
    )
    return decoder_config(theirs, layers, rope=None, norms="post")


FAMILIES["olmo2"] = Family(OLMO2, olmo2)
FAMILIES["olmo3"] = Family(OLMO2, olmo3)


# Phi 3: one matrix for queries, keys and values, one for gate and up; LongRoPE, partial from Phi 4 mini on.

FUSED_MLP = {
    "model.layers.{}.mlp.gate_up_proj.weight": [f"blocks.{{}}.mlp.{p}_proj.weight" for p in ("gate", "up")]
}
PHI3 = {
    **LLAMA,
    **FUSED_MLP,
    "model.layers.{}.self_attn.qkv_proj.weight": [
        f"blocks.{{}}.mixer.{p}_proj.weight" for p in ("q", "k", "v")
    ],
}


def rotary_dim(theirs: Any) -> int | None:
    """How many coordinates of a head RoPE turns, by ``partial_rotary_factor``; None for all."""
    share, width = theirs.rope_parameters.get("partial_rotary_factor") or 1.0, head_dim(theirs)
    turned = int(width * share)
    if share != 1 and (turned < 2 or turned % 2):
        raise ValueError(
            f"config: partial_rotary_factor={share} is not supported with head_dim={width}: expected an even "
            f"number of rotated coordinates, got {turned}"
        )
    return turned if share != 1 else None


def partial_rope(theirs: Any) -> RopeConfig:
    """RoPE without the field that ``rotary_dim`` reads."""
    others = {name: v for name, v in theirs.rope_parameters.items() if name != "partial_rotary_factor"}
    return rope(others, theirs.max_position_embeddings)


def phi3(theirs: Any) -> ModelConfig:
    layer = attention(theirs, window=theirs.sliding_window, rotary_dim=rotary_dim(theirs))
    return decoder_config(theirs, layer, rope=partial_rope(theirs))


def split_fused(name: str, tensor: Tensor, theirs: Any) -> Tensor | Sequence[Tensor]:
    """Queries, keys and values of a fused projection; gate and up of another."""
    if name.endswith("qkv_proj.weight"):
        heads = (theirs.num_attention_heads, theirs.num_key_value_heads, theirs.num_key_value_heads)
        return tensor.split([n * head_dim(theirs) for n in heads])
    return tensor.chunk(2) if name.endswith("gate_up_proj.weight") else tensor


FAMILIES["phi3"] = Family(PHI3, phi3, split_fused)


# GLM-4: RoPE turns neighbouring pairs (2i, 2i + 1) of the first coordinates of a head; ours are half-split,
# so the rows of queries and keys are permuted.

GLM = {**LLAMA, **FUSED_MLP}
GLM4 = {
    **GLM,
    **of_layers(
        "",
        "",
        {
            "post_self_attn_layernorm.weight": "mixer_post_norm.weight",
            "post_mlp_layernorm.weight": "mlp_post_norm.weight",
        },
    ),
}


def glm(theirs: Any) -> ModelConfig:
    return glm_with(theirs, "pre")


def glm4(theirs: Any) -> ModelConfig:
    return glm_with(theirs, "both")


def glm_with(theirs: Any, norms: str) -> ModelConfig:
    layer = attention(theirs, rotary_dim=rotary_dim(theirs), qkv_bias=theirs.attention_bias)
    return decoder_config(theirs, layer, rope=partial_rope(theirs), norms=norms)


def half_split_first(name: str, tensor: Tensor, theirs: Any) -> Tensor | Sequence[Tensor]:
    """The first rows of every head reordered: 0, 1, 2, 3, … become 0, 2, 4, … 1, 3, 5, …"""
    if not name.endswith(("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")):
        return split_fused(name, tensor, theirs)
    heads = tensor.unflatten(0, (-1, head_dim(theirs)))
    turned = heads[:, : rotary_dim(theirs)]
    rest = heads[:, turned.shape[1] :]
    return torch.cat((turned[:, 0::2], turned[:, 1::2], rest), dim=1).flatten(0, 1)


FAMILIES["glm"] = Family(GLM, glm, half_split_first)
FAMILIES["glm4"] = Family(GLM4, glm4, half_split_first)
