"""A hybrid for a budget: which layers fit beside the weights, and how long a step takes at the least.

    seconds ≥ max(FLOPs / peak, bytes / bandwidth),   bytes = weights + cache read + states written back

The roofline of a decode step, with data sheets' peaks: a real step takes longer, never less. Activations, the
allocator's rounding and other programs need memory too, and are not counted.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from kvlearn import validate
from kvlearn.extras import require
from kvlearn.measure.cache_size import (
    LayerShape,
    ModelShape,
    cache_bytes,
    read_bytes,
    state_bytes,
    weights_bytes,
)
from kvlearn.measure.controls import table_with_controls
from kvlearn.measure.devices import DEVICES, Device
from kvlearn.measure.models import MODELS
from kvlearn.measure.table import Table
from kvlearn.measure.units import GB
from kvlearn.measure.work import Work

GPUS = ("RTX 4090", "A100 80 GB", "H200")
"""The devices of ``budget_table``: three sizes of memory."""

KINDS = {
    "full": LayerShape(),
    "window": LayerShape(window=1024),
    "latent": LayerShape(latent=512 + 64),
    "indexed": LayerShape(latent=512 + 64, index_dim=128, top_k=2048),
    "state": LayerShape(state=32 * 128 * 128, conv=3 * 32 * 128 * 3),
    "window + state": LayerShape(window=1024, state=32 * 128 * 128, conv=3 * 32 * 128 * 3, beside=True),
}
"""Layers to design with, each as a published model has it: a window as in Gemma 3, a latent as in
DeepSeek-V3, an index as in DeepSeek-V3.2, a state as in Kimi Linear; "full" has the model's own heads."""

INDEX_HEADS = 64  # DeepSeek-V3.2: how often every index key is multiplied


def design(layers: Sequence[str | LayerShape], model: ModelShape = MODELS["Llama 3.1 8B"]) -> ModelShape:
    """``model`` with other layers: a pattern of names from ``KINDS``, or shapes, repeated to its depth.

    The weights stay as many as they were; another mechanism's projections change them by a few percent.
    """
    validate.instance("layers", layers, (list, tuple))
    validate.instance("model", model, ModelShape)
    shapes = tuple(
        layer if isinstance(layer, LayerShape) else KINDS[validate.one_of("layers", layer, KINDS)]
        for layer in layers
    )
    validate.positive("len(layers)", len(shapes))
    changed = replace(model, layers=shapes, source=f"{model.source}; other layers")
    return replace(changed, name=f"{model.name} with {stack(changed)}")


def stack(model: ModelShape) -> str:
    """How many layers of each kind: "24 state, 8 latent"."""
    validate.instance("model", model, ModelShape)
    kinds = sorted(model.layer(i).kind for i in range(model.n_layers))
    counts = {kind: len(list(alike)) for kind, alike in groupby(kinds)}
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items(), key=lambda item: -item[1]))


def step_work(model: ModelShape, length: int, *, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> Work:
    """FLOPs and bytes of one decode step for ``batch`` sequences of ``length`` tokens, all weights read once.

    FLOPs: 2 per weight and sequence; 4 · H · D per token that attention reads (a latent: 4 · H · its width,
    6% too many for DeepSeek's); 2 · ``INDEX_HEADS`` per number of an index key; 4 per number of a state.
    Of a mixture of experts this counts all experts, as a large batch needs them.
    """
    validate.instance("model", model, ModelShape)
    length, batch = validate.positive("length", length), validate.positive("batch", batch)
    flops = 2.0 * model.n_parameters
    for layer in map(model.layer, range(model.n_layers)):
        flops += 4 * (layer.state or 0)
        if layer.keeps_tokens:
            n_tokens = min(length, layer.window or length)
            flops += 2 * INDEX_HEADS * (layer.index_dim or 0) * n_tokens
            width = layer.latent or layer.head_dim or model.head_dim
            flops += 4 * model.n_heads * width * min(n_tokens, layer.top_k or n_tokens)
    moved = read_bytes(model, length, batch=batch, dtype=dtype) + state_bytes(model, batch=batch, dtype=dtype)
    return Work(batch * flops, weights_bytes(model) + moved)


def step_seconds(model: ModelShape, length: int, device: Device, *, batch: int = 1) -> float:
    """The least time of one decode step: ``step_work`` on the roofline of ``device``."""
    validate.instance("device", device, Device)
    return device.roofline.floor(step_work(model, length, batch=batch))


def fits(model: ModelShape, length: int, memory: float, *, batch: int = 1) -> bool:
    """Whether weights and cache together need at most ``memory`` bytes."""
    return weights_bytes(model) + cache_bytes(model, length, batch=batch) <= validate.finite("memory", memory)


def budget_table(model: ModelShape, length: int = 2**20, *, batch: int = 1) -> Table:
    """Bytes stored and read, and for each GPU whether the model fits and how long a token takes at least."""
    stored, read = (of(model, length, batch=batch) for of in (cache_bytes, read_bytes))
    rows = []
    for device in map(DEVICES.__getitem__, GPUS):
        left = device.memory - weights_bytes(model)
        seconds = step_seconds(model, length, device, batch=batch)
        rows.append(
            {
                "GPU": device.name,
                "left beside the weights, GB": f"{left / GB:.1f}",
                "stored, GB": f"{stored / GB:.1f}",
                "fits": "yes" if fits(model, length, device.memory, batch=batch) else "no",
                "read by a step, GB": f"{read / GB:.1f}",
                "a step takes at least, ms": f"{1000 * seconds:.1f}",
            }
        )
    users = "" if batch == 1 else f", {batch} users"
    return Table(rows, f"{stack(model)}; {length:,} tokens{users}; GB are powers of ten")


def budget() -> None:
    """Choose the layers, see the table: most layers are of one kind, every n-th is of another."""
    require("ipywidgets", "budget")
    import ipywidgets as widgets

    lengths = [(f"{n // 1024}K" if n < 2**20 else f"{n // 2**20}M", n) for n in (2**p for p in range(12, 23))]
    controls: dict[str, Any] = {
        "most": widgets.Dropdown(options=list(KINDS), value="state", description="most layers"),
        "every": widgets.IntSlider(value=4, min=1, max=32, description="every n-th", continuous_update=True),
        "other": widgets.Dropdown(options=list(KINDS), value="full", description="is"),
        "length": widgets.SelectionSlider(options=lengths, value=2**20, description="tokens"),
        "batch": widgets.IntSlider(value=1, min=1, max=16, description="users"),
    }

    def show(most: str, every: int, other: str, length: int, batch: int) -> Table:
        return budget_table(design((every - 1) * [most] + [other]), length, batch=batch)

    table_with_controls(controls, show)
