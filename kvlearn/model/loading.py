"""Models of transformers as decoders of kvlearn: read, rename, and give each tensor to its module.

A family (families.py) has a table from their tensors' names to ours. Tensors of a folder are views of the
files: nothing is copied but what is stored in another form, such as fused projections of experts. Tensors of
a model in memory are copied once, so that the two models are independent. Pickled weights are never loaded.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvlearn.extras import require
from kvlearn.files import read_json
from kvlearn.model.config import ModelConfig
from kvlearn.model.decoder import Decoder
from kvlearn.model.families import FAMILIES, Family, check_sizes

INDEX = "model.safetensors.index.json"


@dataclass
class Checkpoint:
    """A model of transformers: its configuration, its tensors, and what ends a text that it generates."""

    config: Any
    tensors: Mapping[str, Tensor]
    stop_tokens: Any
    pad_token: int | None
    in_memory: bool


def from_transformers(model_or_path: Any) -> Decoder:
    """A decoder with the weights of a transformers model, given as the model or as a folder that has one.

    A folder has config.json and safetensors files, one or several with an index; transformers reads the
    configuration, not the weights. Families: those of ``FAMILIES``. The decoder is in evaluation mode, has
    the weights' dtype and device, and the model's ``stop_tokens``.

    Raises FileNotFoundError for a missing folder or config.json; ValueError that names the field of the
    configuration that is not supported, or the tensor that is missing, not expected, or of another shape or
    dtype, or the file that is damaged or holds pickled weights.
    """
    if isinstance(model_or_path, str | os.PathLike):
        checkpoint = read_folder(Path(model_or_path))
    else:
        checkpoint = read_model(model_or_path)
    family = FAMILIES[checkpoint.config.model_type]
    config = configure(family, checkpoint.config)
    stop = stop_tokens(checkpoint.stop_tokens)
    tied = config.tied and not has_own_head(checkpoint.tensors, family)
    config = replace(config, stop_tokens=stop, pad_token=checkpoint.pad_token, tied=tied)
    with torch.device("meta"):  # no memory, no random numbers
        decoder = Decoder(config)
    return assign(decoder, rename(checkpoint, family, decoder)).eval()


# Reading


def check_family(model_type: Any) -> str:
    """``model_type``, if it is one of ``FAMILIES``."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"model_or_path: expected a model of {known}; got model_type {model_type!r}")
    return model_type


def read_model(model: Any) -> Checkpoint:
    """A model in memory."""
    config = getattr(model, "config", None)
    family = FAMILIES[check_family(getattr(config, "model_type", type(model).__name__))]
    tensors = family.weights(model) if family.weights else model.state_dict()
    generation = getattr(model, "generation_config", None) or config
    stop, pad = (getattr(generation, name, None) for name in ("eos_token_id", "pad_token_id"))
    return Checkpoint(config, tensors, stop, pad, True)


def read_folder(folder: Path) -> Checkpoint:
    """A folder with config.json, safetensors files, and generation_config.json if there is one."""
    if not folder.is_dir():
        raise FileNotFoundError(f"model_or_path: no folder at {folder}")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model_or_path: no config.json in {folder}")
    fields = read_object(folder / "config.json")
    check_family(fields.get("model_type"))
    if fields.get("quantization_config") is not None:
        raise ValueError("config.json: quantization_config is not supported, expected unquantised weights")
    require("transformers", "from_transformers of a folder")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # their validation has many types of error
        raise ValueError(f"config.json: transformers refuses it: {error}") from error
    generation = folder / "generation_config.json"
    ends = read_object(generation) if generation.is_file() else {}
    stop, pad = (ends.get(name, getattr(config, name, None)) for name in ("eos_token_id", "pad_token_id"))
    return Checkpoint(config, dict(read_files(files_of(folder))), stop, pad, False)


def stop_tokens(given: Any) -> tuple[int, ...]:
    """``eos_token_id``, a number, several or None, as a tuple."""
    tokens = () if given is None else tuple(given) if isinstance(given, list | tuple) else (given,)
    if not all(isinstance(token, int) for token in tokens):
        raise ValueError(f"eos_token_id: expected integers, got {given!r}")
    return tokens


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError that names the file."""
    content = read_json(f"model_or_path: {path}", path)
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"model_or_path: {path}: expected a JSON object, got {kind}")
    return content


def files_of(folder: Path) -> list[Path]:
    """The safetensors files of a model: those that its index names, or all."""
    if (folder / INDEX).is_file():
        names = read_object(folder / INDEX).get("weight_map")
        texts = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
        if not names or not texts:
            raise ValueError(f"{INDEX}: expected a weight_map of tensor names to files, got {names!r}")
        files = [folder / name for name in sorted(set(names.values()))]
        for file in files:
            if file.parent != folder or file.suffix != ".safetensors" or not file.is_file():
                raise ValueError(f"{INDEX}: no safetensors file {file.name!r} in {folder}")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if files := sorted(folder.glob("*.safetensors")):
        return files
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    found = f"{pickled[0]}, which is pickled and never loaded" if pickled else "none"
    raise ValueError(f"model_or_path: expected safetensors files in {folder}, got {found}")


def read_files(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of safetensors files, as views of the files (copied only where they are written to)."""
    seen: dict[str, str] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in seen:
                        raise ValueError(f"{path.name}: tensor {name!r} is also in {seen[name]}")
                    seen[name] = path.name
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path.name}: damaged, or no safetensors file: {error}") from error


def configure(family: Family, theirs: Any) -> ModelConfig:
    """Our configuration, from theirs. Raises ValueError for one that ours cannot express."""
    try:
        check_sizes(theirs)
        return family.configure(theirs)
    except (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError) as error:
        kind = type(error).__name__
        raise ValueError(f"config: a field is missing or of the wrong type: {kind}: {error}") from error


# Renaming


def has_own_head(tensors: Mapping[str, Tensor], family: Family) -> bool:
    """Whether the output's matrix differs from the embedding's; transformers does not tie it then."""
    pair = [
        tensors[theirs]
        for ours in ("embed.weight", "head.weight")
        for theirs, target in family.names.items()
        if target == ours and theirs in tensors
    ]
    if len(pair) < 2 or pair[0].data_ptr() == pair[1].data_ptr():
        return False
    return pair[0].dtype != pair[1].dtype or not torch.equal(*pair)


def rename(checkpoint: Checkpoint, family: Family, decoder: Decoder) -> dict[str, Tensor]:
    """Their tensors by our names, in our form. Raises ValueError for a name, shape or dtype that is wrong."""
    ours, model_type = Weights(decoder), checkpoint.config.model_type
    seen: dict[str, torch.dtype] = {}
    for name, tensor in checkpoint.tensors.items():
        if family.ignore is not None and family.ignore(name, checkpoint.config):
            continue
        pattern, numbers = re.sub(NUMBER, "{}", name), re.findall(NUMBER, name)
        if pattern not in family.names:
            raise ValueError(f"model_or_path: tensor {name!r} is not expected in a model of {model_type}")
        targets = targets_of(family.names[pattern], numbers)
        if decoder.config.tied and targets == ["head.weight"]:
            continue
        if tensor.dtype not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise ValueError(f"model_or_path: tensor {name!r} expected of {known}, got {tensor.dtype}")
        if pattern not in family.wide:
            seen[name] = tensor.dtype
            first, dtype = next(iter(seen.items()))
            if tensor.dtype != dtype:
                raise ValueError(
                    f"model_or_path: tensor {name!r} expected as {dtype}, like {first!r}, got {tensor.dtype}"
                )
        try:
            given = family.adapt(pattern, tensor, checkpoint.config) if family.adapt else tensor
        except (IndexError, RuntimeError, ValueError) as error:
            shape = tuple(tensor.shape)
            raise ValueError(
                f"model_or_path: tensor {name!r} of shape {shape} does not fit: {error}"
            ) from error
        pieces = [given] if isinstance(given, Tensor) else given
        for target, piece in zip(targets, pieces, strict=True):
            if checkpoint.in_memory and "[" not in target and shares_memory(piece, tensor):
                piece = piece.clone()
            ours.put(target, piece, name)
    ours.check_complete(family)
    dtype = next(iter(seen.values()))
    return {n: t if n in ours.buffers else t.to(dtype) for n, t in ours.tensors.items()}


NUMBER = r"(?<=\.)(?:0|[1-9]\d*)(?=\.|$)"
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def targets_of(targets: str | Sequence[str], numbers: Sequence[str]) -> list[str]:
    """Our names for a tensor of theirs, by the numbers in its name."""
    n = int(numbers[0]) if numbers else 0
    listed = [targets] if isinstance(targets, str) else targets
    return [target.format(*numbers, twice=(2 * n, 2 * n + 1)) for target in listed]


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether one tensor is a view of the other's memory."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class Weights:
    """Tensors of a decoder, put together from those of another library."""

    def __init__(self, decoder: Decoder) -> None:
        self.wanted = {name: t.shape for name, t in decoder.state_dict().items()}
        if decoder.config.tied:
            del self.wanted["head.weight"]
        self.buffers = {name for name, _ in decoder.named_buffers()}
        self.tensors: dict[str, Tensor] = {}
        self.filled: dict[str, int] = {}  # numbers written to stacks, which are put together from several
        self.sources: dict[str, str] = {}  # by target

    def put(self, target: str, piece: Tensor, source: str) -> None:
        """``piece`` of the tensor ``source`` as our tensor ``target``, or as the part of it in brackets."""
        name, _, place = target.partition("[")
        if name not in self.wanted:
            raise ValueError(
                f"model_or_path: tensor {source!r} is not expected with this configuration (as {name!r})"
            )
        if name in self.tensors and (not place or name not in self.filled or target in self.sources):
            given = (theirs for ours, theirs in self.sources.items() if ours.partition("[")[0] == name)
            other = self.sources.get(target) or next(given)
            raise ValueError(f"model_or_path: tensor {source!r} is also there as {other!r}")
        self.sources[target] = source
        shape = self.wanted[name]
        if not place:
            check_shape(source, piece, shape)
            self.tensors[name] = piece
            return
        if name not in self.tensors:
            self.tensors[name] = torch.empty(shape, dtype=piece.dtype, device=piece.device)
        slot = part_of(self.tensors[name], place.rstrip("]"), source)
        check_shape(source, piece, slot.shape)
        slot.copy_(piece)
        self.filled[name] = self.filled.get(name, 0) + piece.numel()

    def check_complete(self, family: Family) -> None:
        """Raise ValueError that names the first tensor of theirs that is missing."""
        for name, shape in self.wanted.items():
            if name not in self.tensors or self.filled.get(name, shape.numel()) != shape.numel():
                theirs = next(self.missing(name, family), name)
                raise ValueError(f"model_or_path: tensor {theirs!r} is missing")

    def missing(self, name: str, family: Family) -> Iterator[str]:
        """Tensors of theirs that would make ours and were not there."""
        layer, found = (
            next((part for part in name.split(".") if part.isdigit()), "0"),
            {*self.sources.values()},
        )
        for pattern, targets in family.names.items():
            for n in {layer, str(int(layer) // 2)}:
                for e in range(self.wanted[name][0] if pattern.count("{}") > 1 else 1):
                    ours = [target.partition("[")[0] for target in targets_of(targets, (n, str(e)))]
                    if name in ours and (theirs := pattern.format(n, e)) not in found:
                        yield theirs


def part_of(whole: Tensor, place: str, source: str) -> Tensor:
    """The part at ``place``: "3" is whole[3], "1/2" the second half of its rows, "3, 1/2" those of [3]."""
    part = whole
    for step in place.split(","):
        number, _, count = step.partition("/")
        part = part.unflatten(0, (int(count), -1)) if count else part
        if int(number) >= len(part):
            raise ValueError(f"model_or_path: tensor {source!r} is not expected: there are {len(part)}")
        part = part[int(number)]
    return part


def check_shape(source: str, piece: Tensor, expected: torch.Size) -> None:
    """Raise ValueError if a tensor of theirs, in our form, has another shape than ours."""
    if piece.shape != expected:
        raise ValueError(
            f"model_or_path: tensor {source!r} expected with shape {(*expected,)}, got {(*piece.shape,)}"
        )


# Loading


def assign(decoder: Decoder, weights: Mapping[str, Tensor]) -> Decoder:
    """``weights`` as the parameters of a decoder on "meta", without a copy."""
    decoder.load_state_dict(dict(weights), assign=True)
    device = decoder.embed.weight.device

    def materialise(t: Tensor) -> Tensor:
        return torch.empty_like(t, device=device) if t.is_meta else t

    for module in decoder.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            module._apply(materialise)  # RoPE computes its angles again whenever it is moved
    return decoder
