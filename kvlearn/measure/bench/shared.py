"""Fewer heads to remember: what is stored and read at 8K tokens, steps of decode, and converting a model."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kvlearn
from kvlearn.measure.results import Row
from kvlearn.measure.shared_bench import grouped, roads
from kvlearn.measure.shared_bench.rows import Calls, agree, time_row
from kvlearn.measure.timing import compare
from kvlearn.model import Decoder, ModelConfig, Spec, convert, load

# What each mechanism keeps of a token, in a model of 32 heads of 128, and how many times less that is.
LENGTH = 8192
MODEL: dict[str, Any] = {"d_model": 4096, "n_heads": 32, "n_layers": 2}
DESIGNS: dict[str, tuple[tuple[str | Spec, ...], int | None]] = {
    "full": (("full",), 1),
    "gqa 4x": ((Spec("gqa", n_kv_heads=8),), 4),
    "mqa": ((Spec("gqa", n_kv_heads=1),), 32),
    "cla2": (("full", Spec("full", reads=-1)), 2),
    "mhc 8x": ((Spec("mhc", rank=960, rope_dim=64),), 8),
    "mla": ((Spec("mla", rank=512, rope_dim=64),), None),
}
BASE = Path(kvlearn.__file__).parent / "model" / "base.safetensors"
SECONDS = 5.0  # for a conversion of the base model
TEXT = (16, 512)  # windows, bytes: what the latents are fitted to


@torch.inference_mode()
def run(device: torch.device) -> Iterator[Row]:
    torch.manual_seed(0)
    yield from cache_rows(device)
    for shape in grouped.SHAPES:
        yield from grouped.grouped_rows(shape, device)
    yield from roads.step_rows(device)
    yield from roads.layer_rows(device)
    yield from roads.chunk_rows(device)
    yield from conversion_rows(device)


def cache_rows(device: torch.device) -> Iterator[Row]:
    """Bytes that a model's caches really allocate, and those that a step reads."""
    full: int | None = None
    for name, (layers, times) in DESIGNS.items():
        with torch.device("meta"):  # weights without memory
            model = Decoder(ModelConfig(layers=layers, **MODEL))
        total = model.table(LENGTH, dtype=torch.bfloat16)[-1]
        nbytes = model.new_cache(batch=1, max_len=LENGTH, dtype=torch.bfloat16, device=device).nbytes
        full = full or nbytes
        sizes = {"name": name, "stored": nbytes, "read": total["read"], "times_less": full / nbytes}
        details = {**sizes, **MODEL, "length": LENGTH, "batch": 1, "dtype": "bfloat16"}
        title = f"{LENGTH} tokens, {MODEL['n_layers']} layers, 16-bit: {name}"
        stored = {**details, "what": "stored"}
        yield Row(f"{title}, stored", nbytes, "B", total["stored"], "==", details=stored)
        yield Row(f"{title}, read by a step", total["read"], "B", details={**details, "what": "read"})
        if name != "full":
            found = {**details, "what": "times_less"}
            yield Row(f"{title}, times less", full / nbytes, "x", times, "==", details=found)


def conversion_rows(device: torch.device) -> Iterator[Row]:
    """The committed base model with other mechanisms in place of full attention."""
    base = load(BASE, device)
    n_heads, width = base.config.n_heads, 2 * base.config.n_heads * base.mixers[0].head_dim
    tokens = some_text(*TEXT).to(device)

    def pooled(n_kv_heads: int) -> Decoder:
        return convert(base, [Spec("gqa", n_kv_heads=n_kv_heads)], init="mean")

    def squeezed(rank: int) -> Decoder:
        return convert(base, [Spec("mhc", rank=rank, rope_dim=0)], init="activations", tokens=tokens)

    # As many pools as heads, a latent as wide as the heads: nothing may be lost.
    kept: Calls = {"gqa": lambda: pooled(n_heads)(tokens), "mhc": lambda: squeezed(width)(tokens)}
    agree(kept, base(tokens))
    conversions = {
        "gqa 4x, mean": partial(pooled, n_heads // 4),
        "mhc 8x, activations": partial(squeezed, width // 8),
    }
    by_turns = compare(conversions, rounds=3)
    for name in conversions:
        found = {
            "what": "conversion",
            "name": name,
            "parameters": base.n_parameters,
            "tokens": tokens.numel(),
        }
        title = f"converting {base.n_parameters:,} parameters"
        yield time_row(by_turns, title, name, found, bar=SECONDS)


def some_text(batch: int, length: int) -> torch.Tensor:
    """Bytes of Python, as the base model knows them: kvlearn's own source, (batch, length)."""
    files = sorted(Path(kvlearn.__file__).parent.rglob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[: batch * length]
    return torch.tensor(list(text)).view(batch, length)
