"""The corpus: the Python source of sympy, which the extra ``study`` pins. Real text with long reach.

Byte-level (a token is a byte, the vocabulary 256), split by file, so that training sees no validation text.
sympy 1.14.0 is BSD-licensed. Its tests are left out, and its one file above 250 kB, a table of numbers that
would be a third of the validation text.
"""

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from kvlearn import validate

SYMPY_VERSION = "1.14.0"
CHECKSUM = "3ba4ae46b05ffe5bb4f98fef40cd6c360c0150b94334f03dd85071ec3fcf9e89"
LARGEST = 250_000  # bytes
SEPARATOR = b"\x00"  # before each file; no source file holds this byte
MOST = 2**43  # of a seed and of a step: what both make together fits 64 bits


class Corpus(NamedTuple):
    """The text in three parts, as bytes, and the SHA-256 over the paths and contents of all its files."""

    train: UInt8[Tensor, "N"]
    valid: UInt8[Tensor, "N"]
    test: UInt8[Tensor, "N"]
    checksum: str


@cache
def corpus() -> Corpus:
    """All of sympy's source: nine files in ten for training, one in twenty each for validation and test.

    Raises RuntimeError where the installed sympy is another version or its files have been changed: numbers
    measured on another text could not be compared.
    """
    parts: dict[str, list[bytes]] = {"train": [], "valid": [], "test": []}
    for path, text in source_files("sympy", SYMPY_VERSION, CHECKSUM).items():
        parts[split_of(path)].append(SEPARATOR + text)
    train, valid, test = (as_tokens(b"".join(part)) for part in parts.values())
    return Corpus(train, valid, test, CHECKSUM)


def source_files(package: str, version: str, checksum: str) -> dict[str, bytes]:
    """Path and content of every Python file of an installed package but its tests and very large files.

    Raises RuntimeError where the SHA-256 over all of them is not ``checksum``.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = "'kvlearn[study]'" if package == "sympy" else f"{package}=={version}"
        raise RuntimeError(f"corpus: {package} is not installed: pip install {name}")
    root = Path(spec.submodule_search_locations[0])
    files, total = dict[str, bytes](), hashlib.sha256()
    for path in sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py")):
        if "tests" in path.split("/"):
            continue
        text = (root / path).read_bytes()
        if len(text) > LARGEST:
            continue
        total.update(path.encode() + SEPARATOR + text + SEPARATOR)
        files[path] = text
    if total.hexdigest() != checksum:
        raise RuntimeError(
            f"corpus: the files of {package} at {root} are not those of version {version} "
            f"(checksum {total.hexdigest()[:16]}…, expected {checksum[:16]}…); "
            f"pip install --force-reinstall {package}=={version}"
        )
    return files


def as_tokens(text: bytes) -> UInt8[Tensor, "N"]:
    """Bytes as tokens."""
    validate.instance("text", text, bytes)
    return torch.tensor(np.frombuffer(text, np.uint8))


def split_of(path: str) -> str:
    """Which part a file belongs to, by the hash of its path: the same on every machine."""
    validate.instance("path", path, str)
    bucket = hashlib.sha256(path.encode()).digest()[0] % 20
    return {0: "valid", 1: "test"}.get(bucket, "train")


def check_text(name: str, text: UInt8[Tensor, "N"], length: int) -> UInt8[Tensor, "N"]:
    """A text that holds a window of ``length`` bytes and the one that follows."""
    validate.integers(name, validate.tensor(name, text, ("bytes",)))
    if len(text) <= length:
        raise ValueError(f"{name}: expected more than length={length} bytes, got {len(text)}")
    return text


def check_seed(seed: int) -> int:
    """A seed that leaves room for the steps in ``step_seed``."""
    return validate.at_most("seed", validate.at_least("seed", seed, 0), MOST, "with the step it has 64 bits")


def step_seed(seed: int, step: int) -> int:
    """A number of its own for every step of every seed."""
    step = validate.at_most("step", validate.at_least("step", step, 0), MOST, "with the seed it has 64 bits")
    return check_seed(seed) * 1_000_003 + step


def windows(
    text: UInt8[Tensor, "N"], batch: int, length: int, *, seed: int, step: int
) -> Int[Tensor, "{batch} {length}+1"]:
    """The batch of training step ``step``: random windows of ``length`` bytes and the one that follows.

    A pure function of its arguments, so that a run that was killed goes on with exactly the batches it would
    have seen.
    """
    batch, length = validate.positive("batch", batch), validate.positive("length", length)
    check_text("text", text, length)
    generator = torch.Generator().manual_seed(step_seed(seed, step))
    starts = torch.randint(len(text) - length, (batch,), generator=generator)
    return text[starts[:, None] + torch.arange(length + 1)].long()
