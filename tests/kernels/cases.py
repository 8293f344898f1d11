"""Decode steps for tests, and their expected results: attention in fp64, written out key by key."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kvlearn.kernels.runtime import INTERPRETED

# Where all tests of kernels keep their tensors: compiled kernels need a GPU, the interpreter reads the CPU's.
DEVICE = "cpu" if INTERPRETED else "cuda"
NAN = float("nan")


@dataclass
class Case:
    """A decode step as a caller passes it, contiguous or paged; ``poison`` fills what must never be read."""

    lengths: tuple[int, ...]
    n_kv_heads: int = 2
    group: int = 3
    width: int = 16
    value_width: int | None = None
    capacity: int = 64
    page: int | None = None
    window: int | None = None
    n_sinks: int = 0
    sink_logits: bool = False
    scales: str = ""  # "", "number", "head" or "key"
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    layout: str = "heads first"  # or "time first", "every other"
    seed: int = 0
    poison: float = NAN

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)
        batch, heads = len(self.lengths), self.n_kv_heads * self.group
        self.random = random
        self.q = torch.randn(batch, heads, self.width, generator=random).to(DEVICE, self.dtype)
        self.lengths_ = torch.tensor(self.lengths, dtype=torch.int32, device=DEVICE)
        self.k, self.v = (self.cache(w) for w in (self.width, self.value_width or self.width))
        self.sinks = torch.randn(heads, generator=random).to(DEVICE) if self.sink_logits else None
        self.k_scale, self.v_scale = self.scale(), self.scale()
        self.table: Tensor | None = None
        if self.page is not None:
            self.to_pages()

    def cache(self, width: int) -> Tensor:
        batch, dtype = len(self.lengths), self.cache_dtype or self.dtype
        shape = {
            "heads first": (batch, self.n_kv_heads, self.capacity, width),
            "time first": (batch, self.capacity, self.n_kv_heads, width),
            "every other": (batch, self.n_kv_heads, self.capacity, 2 * width),
        }[self.layout]
        numbers = torch.randn(shape, generator=self.random).to(DEVICE)
        cache = (numbers * 40).clamp(-127, 127).to(dtype) if dtype == torch.int8 else numbers.to(dtype)
        if self.layout == "time first":
            cache = cache.transpose(1, 2)
        return cache[..., ::2] if self.layout == "every other" else cache

    def scale(self) -> float | Tensor | None:
        shape = {
            "number": (),
            "head": (self.n_kv_heads,),
            "key": (len(self.lengths), self.n_kv_heads, self.capacity),
        }.get(self.scales)
        if shape is None:
            return None
        scale = torch.rand(shape, generator=self.random).to(DEVICE) * 0.05 + 0.01
        return float(scale) if self.scales == "number" else scale

    def to_pages(self) -> None:
        """Cut the caches into pages, shuffled among pages that belong to nobody."""
        assert self.page is not None
        per_row = -(-self.capacity // self.page)
        batch, spare = len(self.lengths), 3
        order = torch.randperm(batch * per_row + spare, generator=self.random)[: batch * per_row]
        self.table = order.to(DEVICE, torch.int32).view(batch, per_row)
        self.k, self.v = self.paged(self.k), self.paged(self.v)
        if isinstance(self.k_scale, Tensor) and self.scales == "key":
            self.k_scale = self.paged(self.k_scale[..., None])[..., 0]
            self.v_scale = self.paged(self.v_scale[..., None])[..., 0]  # type: ignore[index]

    def paged(self, cache: Tensor) -> Tensor:
        assert self.table is not None
        assert self.page is not None
        shape = (self.table.numel() + 3, cache.shape[1], self.page, cache.shape[3])
        unused = 99 if cache.dtype == torch.int8 else self.poison
        pool = torch.full(shape, unused, dtype=torch.float32, device=DEVICE)
        for row, pages in enumerate(self.table.tolist()):
            for at, page in enumerate(pages):
                piece = cache[row, :, at * self.page : (at + 1) * self.page].float()
                pool[page, :, : piece.shape[1]] = piece
        return pool.to(cache.dtype)

    def at(self, cache: Tensor, row: int, position: int) -> Tensor:
        """The numbers of one token in a cache: (G, …)."""
        if self.table is None or self.page is None:
            return cache[row, :, position]
        return cache[int(self.table[row, position // self.page]), :, position % self.page]

    def put(self, cache: Tensor, row: int, position: int, value: float) -> None:
        self.at(cache, row, position).fill_(value)

    def visible(self, row: int) -> list[int]:
        length = self.lengths[row]
        return [
            p for p in range(length) if self.window is None or p < self.n_sinks or p >= length - self.window
        ]

    def poisoned(self) -> "Case":
        """NaN in every slot that is not visible to its row."""
        if (self.cache_dtype or self.dtype) != torch.int8:
            room = self.capacity if self.page is None else self.table.shape[1] * self.page  # type: ignore[union-attr]
            for row in range(len(self.lengths)):
                for position in set(range(room)) - set(self.visible(row)):
                    self.put(self.k, row, position, self.poison)
                    self.put(self.v, row, position, self.poison)
        return self

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.lengths_

    def options(self) -> dict[str, Any]:
        return {
            "window": self.window,
            "n_sinks": self.n_sinks,
            "sink_logits": self.sinks,
            "block_table": self.table,
            "k_scale": self.k_scale,
            "v_scale": self.v_scale,
        }

    def scale_at(self, scale: float | Tensor | None, row: int, position: int, head: int) -> float:
        if scale is None:
            return 1.0
        if not isinstance(scale, Tensor):
            return scale
        return float(scale[head]) if self.scales == "head" else float(self.at(scale, row, position)[head])

    def expected(self) -> tuple[Tensor, Tensor]:
        """(out, lse) in double precision."""
        batch, heads, width = self.q.shape
        out = torch.zeros(batch, heads, self.v.shape[-1], dtype=torch.float64, device=DEVICE)
        lse = torch.full((batch, heads), -torch.inf, dtype=torch.float64, device=DEVICE)
        for row in range(batch):
            for head in range(heads):
                g = head // self.group
                scores, values = [], []
                for p in self.visible(row):
                    key = self.at(self.k, row, p)[g].double() * self.scale_at(self.k_scale, row, p, g)
                    value = self.at(self.v, row, p)[g].double() * self.scale_at(self.v_scale, row, p, g)
                    scores.append((self.q[row, head].double() @ key) / width**0.5)
                    values.append(value)
                if self.sinks is not None:
                    scores.append(self.sinks[head].double())
                    values.append(torch.zeros_like(out[row, head]))
                if scores:
                    all_scores = torch.stack(scores)
                    lse[row, head] = all_scores.logsumexp(0)
                    if lse[row, head] > -torch.inf:
                        out[row, head] = (all_scores - lse[row, head]).exp() @ torch.stack(values)
        return out, lse


def in_any_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the interpreter run programs in an order drawn by ``seed``, as a GPU might."""
    from triton.runtime.interpreter import interpreter_builder as builder

    set_grid_idx = builder.set_grid_idx

    def elsewhere(x: int, y: int, z: int) -> None:
        n_x, n_y, _ = builder.grid_dim
        order = torch.randperm(n_x * n_y, generator=torch.Generator().manual_seed(seed))
        set_grid_idx(*divmod(int(order[x * n_y + y]), n_y), z)

    monkeypatch.setattr(builder, "set_grid_idx", elsewhere)
