"""Query heads that share KV heads: a step with as many of these as query heads, with a few, and with one.

Full attention that holds the KV heads in copies must answer as those who share them: so the layers are
checked before they are timed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.attention import GroupedQueryAttention
from kvlearn.attention.core import attention, causal_attention, causal_mask_at
from kvlearn.measure.results import Row
from kvlearn.measure.shared_bench.rows import Calls, agree, ratio_row, time_row
from kvlearn.measure.steps import filled_cache, next_token
from kvlearn.measure.timing import compare
from kvlearn.measure.work import Work, attention_layer_work, attention_work

LENGTH = 8192
PROMPT = 1024
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


SHAPES = (Shape(4096, 32, 8, bar=2), Shape(512, 8, 2))
WAYS = (  # to do the attention of one shape: by kvlearn, by torch's own grouping, and by copying
    "mha",
    "gqa, grouped",
    "gqa, enable_gqa",
    "gqa, repeat_interleave",
    "mqa, grouped",
    "mqa, enable_gqa",
)


def grouped_rows(shape: Shape, device: torch.device) -> Iterator[Row]:
    """The whole layer's step, then its attention alone, then a prompt's."""
    yield from layer_rows(shape, device)
    yield from core_rows(shape, device)
    yield from prompt_rows(shape, device)


def layer_rows(shape: Shape, device: torch.device) -> Iterator[Row]:
    """One token through the layer, its projections included."""
    by_turns = compare(layer_steps(shape, device), rounds=ROUNDS)
    title = f"layer {shape.d_model}, {LENGTH} tokens"
    for name in shape.kv_heads:
        moved = layer_work(shape, name).nbytes
        yield time_row(
            by_turns, title, name, shape.details("grouped_layer", name, length=LENGTH, bytes=moved)
        )
    for name in ("gqa", "mqa"):
        fewer = layer_work(shape, "mha").nbytes / layer_work(shape, name).nbytes
        found = shape.details("grouped_layer_speedup", name, length=LENGTH, by_bytes=fewer)
        yield ratio_row(by_turns, title, "mha", name, found, bar=shape.bar if name == "gqa" else None)


def layer_work(shape: Shape, name: str) -> Work:
    """FLOPs and bytes of the last step."""
    sizes = (shape.d_model, shape.n_heads, shape.kv_heads[name], shape.head_dim)
    return attention_layer_work(*sizes, new=1, cached=LENGTH - 1)


def layer_steps(shape: Shape, device: torch.device) -> Calls:
    """The last step by three layers; full attention has answered as the others before they are returned.

    It does so with their KV heads in copies, one for every query head that shares.
    """
    x = torch.randn(1, 1, shape.d_model, device=device)
    full = new_layer(shape, shape.n_heads, device)
    whole = filled_cache(full, 1, LENGTH)
    steps = {"mha": next_token(full, x, whole)}
    for name in ("gqa", "mqa"):
        layer = new_layer(shape, shape.kv_heads[name], device)
        cache = filled_cache(layer, 1, LENGTH)
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


def core_rows(shape: Shape, device: torch.device) -> Iterator[Row]:
    """The attention of one token alone, in every way."""
    by_turns = compare(core_calls(shape, device, WAYS, cached=LENGTH - 1, new=1), rounds=ROUNDS)
    title = f"attention, {shape.n_heads} heads of {shape.head_dim}, {LENGTH} tokens"
    for name in WAYS:
        found = shape.details("grouped_core", name, length=LENGTH)
        sizes = (shape.n_heads, found["n_kv_heads"], shape.head_dim)
        moved = attention_work(*sizes, new=1, cached=LENGTH - 1).nbytes
        yield time_row(by_turns, title, name, {**found, "bytes": moved})
    for name in WAYS[1:]:
        found = shape.details("grouped_core_speedup", name, length=LENGTH)
        yield ratio_row(by_turns, title, "mha", name, found)


def core_calls(shape: Shape, device: torch.device, ways: Sequence[str], cached: int, new: int) -> Calls:
    """Ways to do the attention of ``new`` tokens behind ``cached``, each checked against the equation."""
    n_tokens = cached + new
    q = torch.randn(1, shape.n_heads, new, shape.head_dim, device=device)
    positions = torch.arange(cached, n_tokens, device=device)[None]
    k, v = torch.randn(2, 1, shape.n_kv_heads, n_tokens, shape.head_dim, device=device)
    kv = {"mha": copies(shape, k, v), "gqa": (k, v), "mqa": (k[:, :1].clone(), v[:, :1].clone())}
    sdpa = partial(F.scaled_dot_product_attention, is_causal=new > 1)
    calls: dict[str, Callable[[], Tensor]] = {}
    for name in ways:
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


def prompt_rows(shape: Shape, device: torch.device) -> Iterator[Row]:
    """A prompt's attention: as many FLOPs whoever shares, so sharing must not cost time."""
    names = [name for name in WAYS if name == "mha" or name.endswith("grouped")]
    by_turns = compare(core_calls(shape, device, names, cached=0, new=PROMPT), rounds=ROUNDS // 2)
    title = f"attention, {shape.n_heads} heads of {shape.head_dim}, prompt of {PROMPT}"
    yield time_row(by_turns, title, "mha", shape.details("grouped_prompt", "mha", length=PROMPT))
    for name in names[1:]:
        found = shape.details("grouped_prompt_speedup", name, length=PROMPT)
        yield ratio_row(by_turns, title, "mha", name, found)
