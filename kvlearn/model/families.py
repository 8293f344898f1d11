"""Models of transformers as decoders of kvlearn: one table of tensor names per family."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kvlearn.attention import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from kvlearn.model.checkpoints import fill
from kvlearn.model.config import ModelConfig, Spec
from kvlearn.model.decoder import Decoder

# transformers' names -> ours; {} is the layer's number n; where one layer of theirs is two of ours,
# {twice[0]} and {twice[1]} are 2n and 2n + 1.
LLAMA = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    "model.layers.{}.input_layernorm.weight": "blocks.{}.mixer_norm.weight",
    "model.layers.{}.post_attention_layernorm.weight": "blocks.{}.mlp_norm.weight",
    **{
        f"model.layers.{{}}.self_attn.{part}_proj.weight": f"blocks.{{}}.mixer.{part}_proj.weight"
        for part in ("q", "k", "v", "o")
    },
    **{
        f"model.layers.{{}}.mlp.{part}_proj.weight": f"blocks.{{}}.mlp.{part}_proj.weight"
        for part in ("gate", "up", "down")
    },
}


class Family(NamedTuple):
    """The tensor names of a family, and the functions that convert its configuration and its tensors.

    ``adapt`` gets the tensor's name, with {} for the layer, the tensor and their configuration. ``weights``
    gets the model and returns the trained weights, if its ``state_dict`` may differ from them.
    """

    names: Mapping[str, str]
    configure: Callable[[Any], ModelConfig]
    adapt: Callable[[str, Tensor, Any], Tensor] | None = None
    weights: Callable[[Any], Mapping[str, Tensor]] | None = None


def from_transformers(model_or_path: Any) -> Decoder:
    """A decoder with the weights of a transformers model, given as the model or as a path to one on disk.

    Families: those of ``FAMILIES``. Raises FileNotFoundError for a missing folder, and ValueError that
    names an unsupported property: another family, biases, an unknown RoPE option.
    """
    model = model_or_path
    if isinstance(model_or_path, str | os.PathLike):
        from transformers import AutoModelForCausalLM

        if not Path(model_or_path).is_dir():
            raise FileNotFoundError(f"model_or_path: no folder at {model_or_path}")
        model = AutoModelForCausalLM.from_pretrained(model_or_path, local_files_only=True)
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"model_or_path: expected a model of {known}, got {family or type(model).__name__}")
    names, configure, adapt, read = FAMILIES[family]
    config = configure(model.config)
    weights = {}
    for name, tensor in (read(model) if read else model.state_dict()).items():
        number = next((part for part in name.split(".") if part.isdigit()), "")
        pattern = name.replace(f".{number}.", ".{}.") if number else name
        if pattern not in names:
            raise ValueError(f"model_or_path: tensor {name!r} is not expected in a model of {family}")
        n = int(number or 0)
        ours = names[pattern].format(number, twice=(2 * n, 2 * n + 1))
        weights[ours] = adapt(pattern, tensor, model.config) if adapt else tensor
    if config.tied:
        weights.pop("head.weight", None)
    decoder = Decoder(config).to(dtype=model.dtype, device=model.device)
    return fill(decoder, weights, "model_or_path").eval()


def llama(theirs: Any) -> ModelConfig:
    """The shape of a Llama, from its configuration in transformers."""
    if theirs.attention_bias or theirs.mlp_bias or theirs.hidden_act != "silu":
        raise ValueError("model_or_path: expected a Llama without biases and with SiLU")
    return like_llama(theirs, _over_all(theirs))


def mistral(theirs: Any) -> ModelConfig:
    """The shape of a Mistral: a Llama with a window of ``sliding_window`` tokens, the token itself included.

    None, as from version 0.2 on, makes it a Llama.
    """
    if theirs.hidden_act != "silu":
        raise ValueError(f"model_or_path: expected a Mistral with SiLU, got {theirs.hidden_act!r}")
    if getattr(theirs, "layer_types", None) is not None:
        raise ValueError("model_or_path: expected a Mistral with layers of one kind, got layer_types")
    if theirs.sliding_window is None:
        return like_llama(theirs, _over_all(theirs))
    return like_llama(
        theirs, Spec("window", window=theirs.sliding_window, n_kv_heads=theirs.num_key_value_heads)
    )


def _over_all(theirs: Any) -> Spec:
    """Attention to all earlier tokens, with shared KV heads or without."""
    grouped = theirs.num_key_value_heads != theirs.num_attention_heads
    return Spec("gqa", n_kv_heads=theirs.num_key_value_heads) if grouped else Spec("full")


def like_llama(theirs: Any, mixer: Spec) -> ModelConfig:
    """The shape of a Llama with another ``mixer``."""
    return ModelConfig(
        vocab_size=theirs.vocab_size,
        d_model=theirs.hidden_size,
        n_layers=theirs.num_hidden_layers,
        n_heads=theirs.num_attention_heads,
        head_dim=theirs.head_dim,
        d_ff=theirs.intermediate_size,
        layers=(mixer,),
        rope=rope(theirs.rope_parameters),
        norm_eps=theirs.rms_norm_eps,
        tied=theirs.tie_word_embeddings,
    )


def rope(parameters: Mapping[str, Any]) -> RopeConfig:
    """RoPE by transformers' ``rope_parameters``. Raises ValueError for an unsupported option."""
    left = {name: value for name, value in parameters.items() if value is not None}
    theta, kind = left.pop("rope_theta"), left.pop("rope_type")
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None
    match kind:
        case "default":
            pass
        case "linear":
            scaling = LinearScaling(left.pop("factor"))
        case "llama3":
            factor, low, high = (left.pop(n) for n in ("factor", "low_freq_factor", "high_freq_factor"))
            scaling = Llama3Scaling(factor, low, high, left.pop("original_max_position_embeddings"))
        case "yarn":
            options = ("beta_fast", "beta_slow", "attention_factor", "truncate")
            given = {name: left.pop(name) for name in options if name in left}
            scaling = YarnScaling(left.pop("factor"), left.pop("original_max_position_embeddings"), **given)
        case _:
            raise ValueError(f"rope_type: expected default, linear, llama3 or yarn, got {kind!r}")
    for name, value in left.items():
        raise ValueError(f"rope_parameters: {name}={value!r} is not supported with rope_type={kind!r}")
    return RopeConfig(theta, scaling)


# By transformers' model_type. Other modules of this folder add theirs.
FAMILIES = {"llama": Family(LLAMA, llama), "mistral": Family(LLAMA, mistral)}
