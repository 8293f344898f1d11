"""Weights on disk: a decoder in one safetensors file, with its configuration and its card."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvlearn.model.config import ModelConfig
from kvlearn.model.decoder import Decoder

FORMAT = "kvlearn.decoder.v1"


def save(model: Decoder, path: str | os.PathLike[str], card: Mapping[str, Any] | None = None) -> None:
    """Write weights, configuration and ``card`` (JSON: how it was made) to one safetensors file.

    An interrupted call leaves no incomplete file at ``path``.
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
    dtypes = {tensor.dtype for tensor in weights.values()}
    if len(dtypes) != 1 or not (dtype := dtypes.pop()).is_floating_point:
        raise ValueError(f"path: {path} holds no weights of one floating-point type")
    try:
        model = Decoder(ModelConfig.from_dict(json.loads(metadata["config"])))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"path: {path} holds a configuration that kvlearn cannot build: {error}") from error
    return fill(model.to(dtype), weights, f"path: {path}").to(device).eval()


def card(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``card`` that ``save`` wrote to this file."""
    return json.loads(_read(path)[0].get("card", "{}"))


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


def fill(model: Decoder, weights: Mapping[str, Tensor], where: str) -> Decoder:
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
    model.load_state_dict(dict(weights), strict=False)  # strict would require the tied head
    return model
