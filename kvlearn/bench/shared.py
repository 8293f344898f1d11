"""Fewer KV heads: bytes stored and read at 8K tokens, steps of decode, and converting a trained model.

Query heads that share KV heads are measured with as many KV heads as query heads, with a few, and with one.
Full attention that holds the KV heads in copies must answer as those who share them, so layers are checked
before they are timed. The two paths of a latent are in ``compressed``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kvlearn
from kvlearn.attention import GroupedQueryAttention
from kvlearn.attention.core import attention, causal_attention, causal_mask_at
from kvlearn.bench import compressed
from kvlearn.bench.common import Calls, Part, agree, ratio_row, time_row
from kvlearn.measure.results import Row
from kvlearn.measure.steps import filled_cache, next_token
from kvlearn.measure.timing import compare
from kvlearn.measure.work import Work, attention_layer_work, attention_work
from kvlearn.model import Decoder, ModelConfig, Spec, convert, load

BASE = Path(kvlearn.__file__).parent / "model" / "base.safetensors"
CONVERSION_SECONDS = 5.0  # for a conversion of the base model, at most
ROUNDS = 15


@dataclass(frozen=True)
class Shape:
    """A layer with grouped heads; ``bar``: how many times as fast as MHA its step must be."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    bar: float | None = None

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return self.d_model // self.n_heads

    @property
    def kv_heads(self) -> dict[str, int]:
        """KV heads of full attention, of the pools, and of one pool for all."""
        return {"mha": self.n_heads, "gqa": self.n_kv_heads, "mqa": 1}

    def details(self, what: str, name: str, **more: Any) -> dict[str, Any]:
        """To find a row again; ``name`` begins with whose KV heads are read."""
        n_kv_heads = self.kv_heads[name.split(",")[0]]
        sizes = {"n_heads": self.n_heads, "n_kv_heads": n_kv_heads, "head_dim": self.head_dim}
        return {"what": what, "name": name, "d_model": self.d_model, **sizes, "batch": 1, **more}


def latent(name: str, rank: int, rope_dim: int) -> Spec:
    """A layer that keeps a latent of ``rank`` numbers and a rotated key of ``rope_dim``."""
    return Spec(name, rank=rank, rope_dim=rope_dim)


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens, and the models whose caches are allocated.

    ``mechanisms``: the layers, and how many times smaller than full attention's their cache must be.
    """

    length: int = 8192
    prompt: int = 1024
    shapes: tuple[Shape, ...] = (Shape(4096, 32, 8, bar=2), Shape(512, 8, 2))
    model: dict[str, Any] = field(default_factory=lambda: {"d_model": 4096, "n_heads": 32, "n_layers": 2})
    mhc: tuple[int, int] = (960, 64)  # rank, rope_dim
    mla: tuple[int, int] = (512, 64)
    text: tuple[int, int] = (16, 512)  # windows, bytes: what the latents are fitted to

    @property
    def mechanisms(self) -> dict[str, tuple[tuple[str | Spec, ...], int | None]]:
        """By name, in a model of 32 heads."""
        return {
            "full": (("full",), 1),
            "gqa 4x": ((Spec("gqa", n_kv_heads=8),), 4),
            "mqa": ((Spec("gqa", n_kv_heads=1),), 32),
            "cla2": (("full", Spec("full", reads=-1)), 2),
            "mhc 8x": ((latent("mhc", *self.mhc),), 8),
            "mla": ((latent("mla", *self.mla),), None),
        }


SIZES = Sizes()
SMALL = Sizes(
    length=8,
    prompt=6,
    shapes=(Shape(24, 6, 2, bar=2), Shape(16, 4, 2)),
    model={"d_model": 64, "n_heads": 32, "n_layers": 2},
    mhc=(12, 4),
    mla=(8, 2),
    text=(4, 128),
)


def parts(device: torch.device, small: bool = False) -> list[Part]:
    """The parts of this benchmark, on ``device``."""
    sizes = SMALL if small else SIZES
    return [
        Part("cache", lambda: cache_rows(sizes, device)),
        *(
            Part(f"grouped heads, width {shape.d_model}", partial(grouped_rows, shape, sizes, device))
            for shape in sizes.shapes
        ),
        *compressed.parts(device, small),
        Part("conversion", lambda: conversion_rows(sizes, device)),
    ]


# Bytes


@torch.inference_mode()
def cache_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Bytes that a model's caches really allocate, and those that a step reads."""
    full: int | None = None
    for name, (layers, times) in sizes.mechanisms.items():
        with torch.device("meta"):  # weights without memory
            model = Decoder(ModelConfig(layers=layers, **sizes.model))
        total = model.table(sizes.length, dtype=torch.bfloat16)[-1]
        nbytes = model.new_cache(batch=1, max_len=sizes.length, dtype=torch.bfloat16, device=device).nbytes
        full = full or nbytes
        amounts = {"name": name, "stored": nbytes, "read": total["read"], "times_less": full / nbytes}
        details = {**amounts, **sizes.model, "length": sizes.length, "batch": 1, "dtype": "bfloat16"}
        title = f"{sizes.length} tokens, {sizes.model['n_layers']} layers, 16-bit: {name}"
        stored = {**details, "what": "stored"}
        yield Row(f"{title}, stored", nbytes, "B", total["stored"], "==", details=stored)
        yield Row(f"{title}, read by a step", total["read"], "B", details={**details, "what": "read"})
        if name != "full":
            found = {**details, "what": "times_less"}
            yield Row(f"{title}, times less", full / nbytes, "x", times, "==", details=found)


# Grouped heads

FORMS = (  # attention of one shape: by kvlearn, by torch's own grouping, and by copying
    "mha",
    "gqa, grouped",
    "gqa, enable_gqa",
    "gqa, repeat_interleave",
    "mqa, grouped",
    "mqa, enable_gqa",
)


@torch.inference_mode()
def grouped_rows(shape: Shape, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The whole layer's step, then its attention alone, then a prompt's."""
    yield from layer_rows(shape, sizes, device)
    yield from core_rows(shape, sizes, device)
    yield from prompt_rows(shape, sizes, device)


def layer_rows(shape: Shape, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """One token through the layer, its projections included."""
    compared = compare(layer_steps(shape, sizes.length, device), rounds=ROUNDS)
    title = f"layer {shape.d_model}, {sizes.length} tokens"
    for name in shape.kv_heads:
        moved = layer_work(shape, name, sizes.length).nbytes
        yield time_row(
            compared, title, name, shape.details("grouped_layer", name, length=sizes.length, bytes=moved)
        )
    for name in ("gqa", "mqa"):
        fewer = layer_work(shape, "mha", sizes.length).nbytes / layer_work(shape, name, sizes.length).nbytes
        found = shape.details("grouped_layer_speedup", name, length=sizes.length, by_bytes=fewer)
        yield ratio_row(compared, title, "mha", name, found, bar=shape.bar if name == "gqa" else None)


def layer_work(shape: Shape, name: str, length: int) -> Work:
    """FLOPs and bytes of the last step."""
    heads = (shape.d_model, shape.n_heads, shape.kv_heads[name], shape.head_dim)
    return attention_layer_work(*heads, new=1, cached=length - 1)


def layer_steps(shape: Shape, length: int, device: torch.device) -> Calls:
    """The last step by three layers; full attention has answered as the others before they are returned.

    It does so with their KV heads in copies, one for every query head that shares.
    """
    x = torch.randn(1, 1, shape.d_model, device=device)
    full = new_layer(shape, shape.n_heads, device)
    whole = filled_cache(full, 1, length)
    steps = {"mha": next_token(full, x, whole)}
    for name in ("gqa", "mqa"):
        layer = new_layer(shape, shape.kv_heads[name], device)
        cache = filled_cache(layer, 1, length)
        steps[name] = next_token(layer, x, cache)
        copy_heads(layer, full)
        for few, many in zip(cache.tensors(), whole.tensors(), strict=True):
            many.unflatten(1, (layer.n_kv_heads, -1)).copy_(few[:, :, None])
        agree({name: steps[name]}, steps["mha"]())
    return steps


def new_layer(shape: Shape, n_kv_heads: int, device: torch.device) -> GroupedQueryAttention:
    """A layer for inference; with as many KV heads as query heads it is full attention."""
    with device:
        return GroupedQueryAttention(shape.d_model, shape.n_heads, n_kv_heads=n_kv_heads).eval()


@torch.no_grad()
def copy_heads(few: GroupedQueryAttention, many: GroupedQueryAttention) -> None:
    """Make ``many`` compute what ``few`` does: each KV head in as many copies as query heads share it."""
    for name in ("q_proj", "o_proj"):
        getattr(many, name).weight.copy_(getattr(few, name).weight)
    for name in ("k_proj", "v_proj"):
        heads = getattr(few, name).weight.unflatten(0, (few.n_kv_heads, 1, -1))
        getattr(many, name).weight.unflatten(0, (few.n_kv_heads, -1, few.head_dim)).copy_(heads)


def core_rows(shape: Shape, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The attention of one token alone, in every form."""
    compared = compare(core_calls(shape, device, FORMS, cached=sizes.length - 1, new=1), rounds=ROUNDS)
    title = f"attention, {shape.n_heads} heads of {shape.head_dim}, {sizes.length} tokens"
    for name in FORMS:
        found = shape.details("grouped_core", name, length=sizes.length)
        heads = (shape.n_heads, found["n_kv_heads"], shape.head_dim)
        moved = attention_work(*heads, new=1, cached=sizes.length - 1).nbytes
        yield time_row(compared, title, name, {**found, "bytes": moved})
    for name in FORMS[1:]:
        found = shape.details("grouped_core_speedup", name, length=sizes.length)
        yield ratio_row(compared, title, "mha", name, found)


def core_calls(shape: Shape, device: torch.device, forms: Sequence[str], cached: int, new: int) -> Calls:
    """Forms of the attention of ``new`` tokens behind ``cached``, each checked against the equation."""
    n_tokens = cached + new
    q = torch.randn(1, shape.n_heads, new, shape.head_dim, device=device)
    positions = torch.arange(cached, n_tokens, device=device)[None]
    k, v = torch.randn(2, 1, shape.n_kv_heads, n_tokens, shape.head_dim, device=device)
    kv = {"mha": copies(shape, k, v), "gqa": (k, v), "mqa": (k[:, :1].clone(), v[:, :1].clone())}
    sdpa = partial(F.scaled_dot_product_attention, is_causal=new > 1)
    calls: dict[str, Callable[[], Tensor]] = {}
    for name in forms:
        k, v = kv[name.split(",")[0]]
        if name.endswith("enable_gqa"):
            calls[name] = partial(sdpa, q, k, v, enable_gqa=True)
        elif name.endswith("repeat_interleave"):
            calls[name] = partial(lambda k, v: sdpa(q, *copies(shape, k, v)), k, v)
        else:
            calls[name] = partial(causal_attention, q, k, v, positions)
    for kind, (k, v) in kv.items():
        expected = attention(q, *copies(shape, k, v), causal_mask_at(positions, n_tokens))
        agree({name: call for name, call in calls.items() if name.split(",")[0] == kind}, expected)
    return calls


def copies(shape: Shape, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Each KV head as often as query heads share it."""
    group = shape.n_heads // k.shape[1]
    return k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


def prompt_rows(shape: Shape, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """A prompt's attention: as many FLOPs with shared heads as without, so sharing must not cost time."""
    names = [name for name in FORMS if name == "mha" or name.endswith("grouped")]
    compared = compare(core_calls(shape, device, names, cached=0, new=sizes.prompt), rounds=ROUNDS // 2)
    title = f"attention, {shape.n_heads} heads of {shape.head_dim}, prompt of {sizes.prompt}"
    yield time_row(compared, title, "mha", shape.details("grouped_prompt", "mha", length=sizes.prompt))
    for name in names[1:]:
        found = shape.details("grouped_prompt_speedup", name, length=sizes.prompt)
        yield ratio_row(compared, title, "mha", name, found)


# Conversion


@torch.inference_mode()
def conversion_rows(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """The committed base model with other mechanisms in place of full attention."""
    base = load(BASE, device)
    n_heads, width = base.config.n_heads, 2 * base.config.n_heads * base.mixers[0].head_dim
    tokens = some_text(*sizes.text).to(device)

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
    compared = compare(conversions, rounds=3)
    for name in conversions:
        found = {
            "what": "conversion",
            "name": name,
            "parameters": base.n_parameters,
            "tokens": tokens.numel(),
        }
        title = f"converting {base.n_parameters:,} parameters"
        yield time_row(compared, title, name, found, bar=CONVERSION_SECONDS)


def some_text(batch: int, length: int) -> torch.Tensor:
    """Bytes of Python, as the base model knows them: kvlearn's own source, (batch, length)."""
    files = sorted(Path(kvlearn.__file__).parent.rglob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[: batch * length]
    return torch.tensor(list(text)).view(batch, length)
