"""Weights on disk: our own as safetensors, those of transformers by one table of names a family."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvlearn.attention import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling
from kvlearn.model.config import ModelConfig
from kvlearn.model.decoder import Decoder

FORMAT = "kvlearn.decoder.v1"


def save(model: Decoder, path: str | os.PathLike[str], card: Mapping[str, Any] | None = None) -> None:
    """Write weights, configuration and ``card`` (JSON: how it came to be) to one safetensors file.

    The file appears whole or not at all.
    """
    weights = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    if model.config.tied:
        del weights["head.weight"]
    metadata = {
        "format": FORMAT,
        "config": json.dumps(model.config.to_dict()),
        "card": json.dumps(dict(card or {})),
    }
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    save_file(weights, partial, metadata)
    partial.replace(target)


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Decoder:
    """A decoder from a file that ``save`` wrote, in evaluation mode.

    Raises FileNotFoundError, or ValueError that says what is wrong with a damaged or foreign file.
    """
    metadata, weights = _read(path)
    try:
        config = ModelConfig.from_dict(json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: {path} holds a configuration that kvlearn cannot read: {error}") from error
    return _fill(Decoder(config), weights, f"path: {path}").to(device).eval()


def card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``save`` was told of how the model in this file came to be."""
    return json.loads(_read(path)[0]["card"])


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"path: {path} is not a decoder of kvlearn (no format {FORMAT!r} in it)")
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {path} is damaged, or no safetensors file: {error}") from error


def _fill(model: Decoder, weights: Mapping[str, Tensor], where: str) -> Decoder:
    """``weights`` loaded into ``model``; every name and shape must fit."""
    wanted = {name: t.shape for name, t in model.state_dict().items()}
    if model.config.tied:
        del wanted["head.weight"]
    for name in wanted.keys() ^ weights.keys():
        raise ValueError(f"{where}: tensor {name!r} is {'missing' if name in wanted else 'not expected'}")
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            expected, got = tuple(shape), tuple(weights[name].shape)
            raise ValueError(f"{where}: tensor {name!r} expected with shape {expected}, got {got}")
    model.load_state_dict(dict(weights), strict=False)  # strict would ask for the tied head
    return model


# transformers' names -> ours; {} stands for the layer's number.
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


def from_transformers(model_or_path: Any) -> Decoder:
    """A decoder with the weights of a transformers model, given as the model or as a path to one on disk.

    Known so far: Llama with as many KV heads as query heads. Anything else is a ValueError that says what.
    """
    model = model_or_path
    if isinstance(model_or_path, str | os.PathLike):
        from transformers import AutoModelForCausalLM

        if not Path(model_or_path).is_dir():
            raise FileNotFoundError(f"model_or_path: no folder at {model_or_path}")
        model = AutoModelForCausalLM.from_pretrained(model_or_path, local_files_only=True)
    if getattr(getattr(model, "config", None), "model_type", None) != "llama":
        raise ValueError(f"model_or_path: expected a Llama of transformers, got {type(model).__name__}")
    return _from_llama(model)


def _from_llama(model: Any) -> Decoder:
    theirs = model.config
    kv_heads = theirs.num_key_value_heads
    if kv_heads != theirs.num_attention_heads:
        raise ValueError(
            f"model_or_path: expected num_key_value_heads = num_attention_heads = "
            f"{theirs.num_attention_heads}, got {kv_heads}: no mechanism for shared heads is registered"
        )
    if theirs.attention_bias or theirs.mlp_bias or theirs.hidden_act != "silu":
        raise ValueError("model_or_path: expected a Llama without biases and with SiLU")
    config = ModelConfig(
        vocab_size=theirs.vocab_size,
        d_model=theirs.hidden_size,
        n_layers=theirs.num_hidden_layers,
        n_heads=theirs.num_attention_heads,
        head_dim=theirs.head_dim,
        d_ff=theirs.intermediate_size,
        rope=_rope(theirs.rope_parameters),
        norm_eps=theirs.rms_norm_eps,
        tied=theirs.tie_word_embeddings,
    )
    weights = {}
    for name, tensor in model.state_dict().items():
        number = next((part for part in name.split(".") if part.isdigit()), "")
        pattern = name.replace(f".{number}.", ".{}.") if number else name
        if pattern not in LLAMA:
            raise ValueError(f"model_or_path: tensor {name!r} is not expected in a Llama")
        weights[LLAMA[pattern].format(number)] = tensor
    if config.tied:
        weights.pop("head.weight", None)
    ours = Decoder(config).to(dtype=model.dtype, device=model.device)
    return _fill(ours, weights, "model_or_path").eval()


def _rope(parameters: Mapping[str, Any]) -> RopeConfig:
    """RoPE by transformers' ``rope_parameters``."""
    theta, kind = parameters["rope_theta"], parameters["rope_type"]
    scaling: LinearScaling | Llama3Scaling | YarnScaling
    match kind:
        case "default":
            return RopeConfig(theta)
        case "linear":
            scaling = LinearScaling(parameters["factor"])
        case "llama3":
            scaling = Llama3Scaling(
                parameters["factor"],
                parameters["low_freq_factor"],
                parameters["high_freq_factor"],
                parameters["original_max_position_embeddings"],
            )
        case "yarn":
            given = {
                name: parameters[name]
                for name in ("beta_fast", "beta_slow", "attention_factor")
                if parameters.get(name) is not None
            }
            original = parameters["original_max_position_embeddings"]
            scaling = YarnScaling(parameters["factor"], original, **given)
        case _:
            raise ValueError(f"rope_type: expected default, linear, llama3 or yarn, got {kind!r}")
    return RopeConfig(theta, scaling)
