"""One decode step that is measured: its shapes, and what it must read, write and multiply at the least."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from kvlearn.measure.units import KIB

KINDS = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8",
    torch.int8: "int8",
}


@dataclass(frozen=True)
class Cell:
    """``batch`` rows of ``length`` tokens in a cache of ``n_kv_heads`` heads, and one query a row.

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
        """What the cache is kept in."""
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
        """Tokens a row."""
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
        """What a plot finds a row by."""
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
    "MHA 32/32": Cell("MHA 32/32", 1, 1, 32, 32),
    "GQA 32/4": Cell("GQA 32/4", 1, 1, 32, 4),
    "GQA 64/8": Cell("GQA 64/8", 1, 1, 64, 8),
    "MQA 32/1": Cell("MQA 32/1", 1, 1, 32, 1),
    "MHA 16": Cell("MHA 16", 1, 1, 16, 16),
    "MLA 16": Cell("MLA 16", 1, 1, 16, 1, head_dim=512, rope_dim=64),
    "MLA 128": Cell("MLA 128", 1, 1, 128, 1, head_dim=512, rope_dim=64),
}


def cell(form: str, batch: int, length: int, **changes: Any) -> Cell:
    """A cell of one of ``FORMS``."""
    return replace(FORMS[form], batch=batch, length=length, **changes)


def tokens(n: int) -> str:
    """``65536`` is ``64k``."""
    return f"{n // KIB}k" if n and n % KIB == 0 else str(n)
