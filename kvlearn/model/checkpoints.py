"""Weights on disk: a decoder in one safetensors file, with its configuration, its card and a checksum."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvlearn import validate
from kvlearn.files import parse_json, replacing
from kvlearn.model.config import ModelConfig
from kvlearn.model.decoder import Decoder

FORMAT = "kvlearn.decoder.v1"


def save(model: Decoder, path: str | os.PathLike[str], card: Mapping[str, Any] | None = None) -> None:
    """Write weights, configuration and ``card`` (JSON: how it was made) to one safetensors file.

    ``path`` then holds all of it, or what it held before. Raises OSError with the path and the reason if it
    cannot be written, ValueError for a ``card`` that JSON cannot hold.
    """
    validate.instance("model", model, Decoder)
    check_path(path)
    weights = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    if model.config.tied:
        del weights["head.weight"]
    validate.instance("card", card, (Mapping, type(None)))
    try:
        described = json.dumps(dict(card or {}), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"card: expected a mapping that JSON can hold: {error}") from error
    metadata = {"format": FORMAT, "config": json.dumps(model.config.to_dict()), "card": described}
    metadata["sha256"] = checksum(metadata, weights)
    with replacing("path", path) as partial:
        try:
            save_file(weights, partial, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Decoder:
    """A decoder from a file that ``save`` wrote, in evaluation mode.

    Raises FileNotFoundError, or ValueError that says what is wrong with a damaged or foreign file: its
    checksum is computed again.
    """
    device = validate.device("device", device)
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
    """The ``card`` that ``save`` wrote to this file. Raises the errors of ``load``."""
    content = parse_json(f"path: the card of {path}", _read(path)[0].get("card", "{}"))
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"path: the card of {path}: expected a JSON object, got {kind}")
    return content


def checksum(metadata: Mapping[str, str], weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over the texts and over the names, types, shapes and bytes of the tensors, in hexadecimal."""
    total = hashlib.sha256()
    for name, text in sorted(metadata.items()):
        if name != "sha256":
            total.update(repr((name, text)).encode())
    for name, tensor in sorted(weights.items()):
        total.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise TypeError or ValueError for what cannot be the path of a file."""
    validate.instance("path", path, (str, os.PathLike))
    if not Path(path).name:
        raise ValueError(f"path: expected the path of a file, got {str(path)!r}")


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    check_path(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"path: {path} is not a decoder of kvlearn (no format {FORMAT!r} in it)")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {path} is damaged, or no safetensors file: {error}") from error
    if (found := checksum(metadata, weights)) != metadata.get("sha256"):
        written = metadata.get("sha256", "none")
        raise ValueError(
            f"path: {path} is damaged: its content has the checksum {found[:12]}…, written is {written[:12]}…"
        )
    return metadata, weights


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
    model.load_state_dict(dict(weights))
    return model
