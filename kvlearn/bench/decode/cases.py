"""One decode step that is measured: its shapes, its tensors, and its exact result.

A ``Case`` says what a step must read, write and multiply at the least. ``Arena`` holds the tensors of all
cases in one large buffer of random numbers, so that no case waits for them to be drawn. ``error`` compares a
result with attention in fp64.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvlearn.measure.units import GIB, KIB

KINDS = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8",
    torch.int8: "int8",
}
CHUNK = 2**26  # numbers drawn or converted at a time
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# A bf16 result of bf16 operands lies between 1e-3 and 1e-2 of the truth.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Case:
    """``batch`` rows of ``length`` tokens in a cache of ``n_kv_heads`` heads, and one query per row.

    ``rope_dim`` > 0: an absorbed latent of ``head_dim`` numbers beside so many of RoPE, K and V at once.
    ``page`` > 0: paged. ``others``: the length of all rows but the first, where they differ.
    """

    form: str
    batch: int
    length: int
    n_heads: int
    n_kv_heads: int
    head_dim: int = 128
    rope_dim: int = 0
    window: int | None = None
    n_sinks: int = 0
    page: int = 0
    kv_dtype: torch.dtype = torch.bfloat16
    others: int | None = None

    @property
    def name(self) -> str:
        """``GQA 32/4, 8 x 4k, window 4k, pages of 16, fp8``."""
        extras = {
            f"one row; the others {tokens(self.others or 0)}": self.others is not None,
            f"window {tokens(self.window or 0)} + {self.n_sinks} sinks": self.window is not None,
            f"pages of {self.page}": self.page > 0,
            self.kind: self.kind in ("fp8", "int8"),
        }
        return ", ".join(
            [f"{self.form}, {self.batch} x {tokens(self.length)}", *(e for e, true in extras.items() if true)]
        )

    @property
    def kind(self) -> str:
        """The number format of the cache."""
        return KINDS[self.kv_dtype]

    @property
    def dtype(self) -> torch.dtype:
        """Of queries and results."""
        return torch.float32 if self.kv_dtype == torch.float32 else torch.bfloat16

    @property
    def latent(self) -> bool:
        """Whether K and V are one latent."""
        return self.rope_dim > 0

    @property
    def scale(self) -> float:
        """Of the scores; a latent's is DeepSeek-V2's, whose heads have 128 + 64 numbers before absorption."""
        return (192 if self.latent else self.head_dim) ** -0.5

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [self.length] + [self.length if self.others is None else self.others] * (self.batch - 1)

    def live(self, length: int) -> int:
        """Keys that a row of ``length`` tokens really reads: its window, and the sinks in front of it."""
        start = max(0, length - (self.window or length))
        return length - start + min(self.n_sinks, start)

    @property
    def stored_numbers(self) -> int:
        """Numbers of K (or of the latent) in the cache, V counted apart."""
        return self.batch * self.n_kv_heads * self.length * (self.head_dim + self.rope_dim)

    @property
    def stored(self) -> int:
        """Bytes that the cache takes; a latent is there once."""
        return self.stored_numbers * self.kv_dtype.itemsize * (1 if self.latent else 2)

    @property
    def nbytes(self) -> int:
        """Bytes that a step must move: live K and V (a latent once), Q and O."""
        keys = sum(map(self.live, self.lengths)) * self.n_kv_heads
        cache = keys * self.kv_dtype.itemsize * (self.head_dim + (self.rope_dim or self.head_dim))
        return cache + self.dtype.itemsize * self.batch * self.n_heads * (2 * self.head_dim + self.rope_dim)

    @property
    def flops(self) -> int:
        """2 for each number of a key in the score, 2 for each of a value in the sum."""
        return sum(map(self.live, self.lengths)) * self.n_heads * 2 * (2 * self.head_dim + self.rope_dim)

    @property
    def details(self) -> dict[str, Any]:
        """The keys by which a plot finds a row."""
        return {
            "form": self.form,
            "batch": self.batch,
            "length": self.length,
            "heads": self.n_heads,
            "kv_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "rope_dim": self.rope_dim,
            "kv_dtype": self.kind,
            "page": self.page,
            "window": self.window,
            "n_sinks": self.n_sinks,
            "others": self.others,
            "nbytes": self.nbytes,
            "flops": self.flops,
        }


FORMS = {
    "MHA 32/32": Case("MHA 32/32", 1, 1, 32, 32),
    "GQA 32/4": Case("GQA 32/4", 1, 1, 32, 4),
    "GQA 64/8": Case("GQA 64/8", 1, 1, 64, 8),
    "MQA 32/1": Case("MQA 32/1", 1, 1, 32, 1),
    "MHA 16": Case("MHA 16", 1, 1, 16, 16),
    "MLA 16": Case("MLA 16", 1, 1, 16, 1, head_dim=512, rope_dim=64),
    "MLA 128": Case("MLA 128", 1, 1, 128, 1, head_dim=512, rope_dim=64),
}


def new_case(form: str, batch: int, length: int, **changes: Any) -> Case:
    """A case of one of ``FORMS``."""
    return replace(FORMS[form], batch=batch, length=length, **changes)


def tokens(n: int) -> str:
    """``65536`` is ``64k``."""
    return f"{n // KIB}k" if n and n % KIB == 0 else str(n)


# Tensors


@dataclass(frozen=True)
class Inputs:
    """q (B, H, D); k and v (B, G, S, D) or paged (blocks, G, page, D); a latent is in k as (B, S, R + Dr)."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    q_rope: Tensor | None = None
    table: Tensor | None = None
    k_scale: Tensor | None = None  # (G,)
    v_scale: Tensor | None = None


class Arena:
    """``size`` numbers from a normal distribution, and every cache a piece of them."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.buffer = torch.empty(size, dtype=dtype, device=device)
        for piece in self.buffer.split(CHUNK):
            piece.normal_()

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.buffer.nbytes

    def copies(self, case: Case, working_set: float, at_most: int) -> int:
        """As many copies of a case as read ``working_set`` bytes in all, and fit; at least 1."""
        wanted = min(math.ceil(working_set / case.nbytes), at_most)
        return max(1, min(wanted, self.buffer.numel() // numbers(case)))

    def inputs(self, case: Case, copies: int = 1) -> list[Inputs]:
        """``copies`` of the case, each with keys, values and queries of its own.

        MemoryError where the buffer is too small for one.
        """
        size = numbers(case)
        if copies * size > self.buffer.numel():
            size_of_all = self.buffer.numel() / GIB
            raise MemoryError(f"{copies} x {size / GIB:.1f} Gi numbers do not fit into {size_of_all:.1f}")
        device = self.buffer.device
        lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
        table = None
        if case.page:
            pages = case.length // case.page
            blocks = torch.randperm(case.batch * pages, device=device)
            table = blocks.view(case.batch, pages).to(torch.int32)
        made = []
        for copy in range(copies):
            piece = self.buffer[copy * size : (copy + 1) * size]
            q = torch.randn(case.batch, case.n_heads, case.head_dim, device=device).to(case.dtype)
            if case.latent:
                latent = piece.view(case.batch, case.length, case.head_dim + case.rope_dim)
                rope = torch.randn(case.batch, case.n_heads, case.rope_dim, device=device).to(case.dtype)
                made.append(Inputs(q, latent, latent, lengths, q_rope=rope))
                continue
            k, v = piece.view(2, *self._shape(case))
            made.append(quantised(Inputs(q, k, v, lengths, table=table), case.kv_dtype))
        return made

    def _shape(self, case: Case) -> tuple[int, int, int, int]:
        if case.page:
            return case.batch * case.length // case.page, case.n_kv_heads, case.page, case.head_dim
        return case.batch, case.n_kv_heads, case.length, case.head_dim


def numbers(case: Case) -> int:
    """Numbers that a case takes from the buffer: K and V, or the latent."""
    return case.stored_numbers * (1 if case.latent else 2)


def quantised(x: Inputs, dtype: torch.dtype) -> Inputs:
    """Keys and values in ``dtype``, each with one scale: the largest number becomes the largest that fits."""
    if dtype == x.k.dtype:
        return x
    k, k_scale = _quantise(x.k, dtype)
    v, v_scale = _quantise(x.v, dtype)
    return replace(x, k=k, v=v, k_scale=k_scale, v_scale=v_scale)


def _quantise(given: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = max(piece.abs().max().item() for piece in given.reshape(-1).split(CHUNK))
    scale = largest / LARGEST[dtype]
    small = torch.empty_like(given, dtype=dtype)
    for there, piece in zip(small.view(-1).split(CHUNK), given.reshape(-1).split(CHUNK), strict=True):
        scaled = piece.float() / scale
        there.copy_(scaled.round() if dtype == torch.int8 else scaled)
    return small, torch.full((given.shape[1],), scale, device=given.device)


# The exact result


def error(case: Case, x: Inputs, out: Tensor, truth: Inputs | None = None) -> float:
    """The largest ‖out − exact‖ / ‖exact‖ of any head in the rows looked at; NaN where a number is missing.

    ``truth``: the inputs to be exact about, where they are not those that ``out`` was computed from.
    """
    worst = torch.zeros((), dtype=torch.float64, device=out.device)
    for row in sorted({0, 1 % case.batch, case.batch // 2, case.batch - 1}):
        expected = exact_row(case, truth or x, row)
        got = out.reshape(case.batch, case.n_heads, -1)[row].double()
        relative = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
        worst = torch.maximum(worst, relative.max())  # both hand a NaN on
    return worst.item()


def exact_row(case: Case, x: Inputs, row: int) -> Tensor:
    """softmax(q · k · scale) · v of one row in fp64, over the keys that window and sinks leave: (H, D)."""
    length = case.lengths[row]
    start = max(0, length - (case.window or length))
    device = x.q.device
    kept = torch.cat(
        [torch.arange(min(case.n_sinks, start), device=device), torch.arange(start, length, device=device)]
    )
    q = x.q[row].double()
    if x.q_rope is not None:
        q = torch.cat([q, x.q_rope[row].double()], dim=-1)
    group = case.n_heads // case.n_kv_heads
    heads = []
    for g in range(case.n_kv_heads):
        k = _numbers(x.k, x.k_scale, x, row, g)[kept]
        v = k[:, : case.head_dim] if case.latent else _numbers(x.v, x.v_scale, x, row, g)[kept]
        scores = q[g * group : (g + 1) * group] @ k.T * case.scale
        heads.append(scores.softmax(dim=-1) @ v)
    return torch.cat(heads)


def _numbers(cache: Tensor, scale: Tensor | None, x: Inputs, row: int, g: int) -> Tensor:
    """The keys or values of one row and KV head in fp64, (S, D), from the cache or its pages."""
    if x.q_rope is not None:
        there = cache[row]
    elif x.table is None:
        there = cache[row, g]
    else:
        there = cache[x.table[row].long(), g].flatten(0, 1)
    # By way of fp32, to which all formats convert exactly.
    return there.float().double() * (1.0 if scale is None else scale[g].double())
