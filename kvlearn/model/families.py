"""Families of transformers' models as decoders of kvlearn: a table of tensor names and a configuration each.

Every line of a ``configure`` function follows from the family's configuration; what it cannot express raises
ValueError with the name of the field. Other modules of this folder add their families to ``FAMILIES``.
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
    them. ``wide``: names with {} whose dtype may differ from the other tensors'. ``ignore`` gets a tensor's
    name and their configuration, and says whether we have no use for it.
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


def expect(theirs: Any, **fields: Any) -> None:
    """Raise ValueError for a field of their configuration that is set to anything but this."""
    for name, value in fields.items():
        if (got := getattr(theirs, name, value)) != value:
            raise ValueError(f"config: {name}={got!r} is not supported, expected {value!r}")


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
    for kind in theirs.layer_types[: theirs.num_hidden_layers]:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"config: layer_types: {kind!r} is not supported")
        specs.append(spec(kind, theirs.sliding_window if kind == "sliding_attention" else None))
    n = len(specs)
    period = next(p for p in range(1, n + 1) if all(specs[i] == specs[i % p] for i in range(n)))
    return tuple(specs[:period])


def decoder_config(theirs: Any, layers: Spec | Sequence[Spec], **fields: Any) -> ModelConfig:
    """What configurations of transformers have in common; ``fields`` of ours are added or replace it."""
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


def rope(parameters: Mapping[str, Any], max_len: int | None = None) -> RopeConfig:
    """RoPE by transformers' ``rope_parameters``, and by ``max_position_embeddings`` where that matters.

    Raises ValueError for an unsupported option. ``partial_rotary_factor`` is the attention's: ``rotary_dim``.
    """
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
                scaling = YarnScaling(left.pop("factor"), original, **given)
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


FAMILIES["olmo2"] = Family(OLMO2, olmo2)


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
    share = theirs.rope_parameters.get("partial_rotary_factor") or 1.0
    return int(head_dim(theirs) * share) if share != 1 else None


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
