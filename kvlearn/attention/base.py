"""The contract: what every mechanism of the course offers, from full attention to Mamba.

    y = layer(x)                                   training: (batch, time, d_model) -> the same, causal
    cache = layer.new_cache(batch=2, max_len=4096)
    y = layer(x, cache)                            continues the cached sequence: prefill, chunk or token
    cache.nbytes                                   bytes really allocated
    layer.cache_bytes(max_len)                     STORED, by the formula on paper
    layer.read_bytes(length)                       READ by one decode step at this length

The model, the measurements and the tests know a mechanism by these methods alone. Whoever registers a class
here has it tested by tests/attention/test_contract.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvlearn import expect


class Cache(ABC):
    """What one layer keeps of the tokens it has seen.

    Rows of a batch may differ in length: prompts of different lengths are padded on the right, fed together,
    and cut back to their own lengths by ``trim``.
    """

    can_trim = True  # False where what was seen cannot be forgotten: a state, a ring that wrote over its past

    def __init__(self, batch: int, max_len: int, device: torch.device | str) -> None:
        self.batch = expect.positive("batch", batch)
        self.max_len = expect.positive("max_len", max_len)
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors say it
        self.length = 0  # of the longest row
        self.lengths: Int[Tensor, "B"] | None = None  # of every row, where they differ

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All tensors that hold content. (``lengths``, 8 bytes a row, is book-keeping and not counted.)"""

    @property
    def nbytes(self) -> int:
        """Bytes really allocated for content, counted at the storages, each once."""
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in self.tensors())}
        return sum(storages.values())

    def positions(self, n_tokens: int) -> Int[Tensor, "#B T"]:
        """Where the next ``n_tokens`` tokens stand, from 0: (1, T), or (B, T) if rows differ."""
        start = self.length if self.lengths is None else self.lengths[:, None]
        return start + torch.arange(n_tokens, device=self.device)[None]

    def expect_room(self, n_tokens: int) -> None:
        """Raise ValueError where ``max_len`` has no room for ``n_tokens`` more; asked before writing."""
        if self.length + n_tokens > self.max_len:
            raise ValueError(
                f"cache: expected at most max_len={self.max_len} tokens, got {self.length} and {n_tokens} new"
            )

    def advance(self, n_tokens: int) -> None:
        """Note that every row has grown by ``n_tokens``; to be called after writing."""
        self.expect_room(n_tokens)
        self.length += n_tokens
        if self.lengths is not None:
            self.lengths = self.lengths + n_tokens

    def trim(self, lengths: Int[Tensor, "B"]) -> None:
        """Forget in each row what lies past its own length: right padding, or tokens that were rejected.

        Raises ValueError for lengths that the rows never had, and where ``can_trim`` is False.
        """
        lengths = self.expect_lengths(lengths)
        self.length = int(lengths.max())
        self.lengths = None if bool((lengths == self.length).all()) else lengths

    def expect_lengths(self, lengths: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        """A copy of ``lengths`` for ``trim``, if it may be trimmed to these."""
        if not self.can_trim:
            raise ValueError(f"cache: a {type(self).__name__} cannot forget what it has seen")
        expect.tensor("lengths", lengths, (self.batch,))
        if lengths.is_floating_point():
            raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
        lengths = lengths.to(self.device, torch.int64, copy=True)
        current = torch.full_like(lengths, self.length) if self.lengths is None else self.lengths
        if (lengths < 0).any() or (lengths > current).any():
            raise ValueError(
                f"lengths: expected 0 to {current.tolist()} in every row, got {lengths.tolist()}"
            )
        return lengths

    def reset(self) -> None:
        """Empty the cache; its memory stays allocated."""
        self.length, self.lengths = 0, None
        for t in self.tensors():
            t.zero_()


class KV(NamedTuple):
    """Keys and values a layer attends to, and where its new tokens stand. Slot s holds position s.

    A layer hands these to another that reads them in place of its own (cross-layer sharing).
    """

    k: Float[Tensor, "B G S D"]
    v: Float[Tensor, "B G S D"]
    positions: Int[Tensor, "#B T"]


class Mechanism(nn.Module, ABC):
    """A layer that mixes tokens causally.

    Every constructor takes ``d_model``, ``n_heads``, ``head_dim`` (d_model / n_heads unless given) and
    ``rope`` (None: no positions), then options of its own. Raises ValueError or TypeError that names the
    argument.
    """

    name: str  # in the registry

    def __init__(self, d_model: int, n_heads: int, head_dim: int | None) -> None:
        super().__init__()
        self.d_model = expect.positive("d_model", d_model)
        if head_dim is None:
            head_dim = d_model // expect.divides("n_heads", n_heads, "d_model", d_model)
        self.n_heads = expect.positive("n_heads", n_heads)
        self.head_dim = expect.positive("head_dim", head_dim)

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        """The layer's output for the new tokens ``x``, which continue the sequence in ``cache``.

        ``source`` holds another layer's keys and values, to be read in place of this layer's own; ``cache``
        is then left alone.
        """

    def __call__(self, x: Tensor, cache: Cache | None = None, source: KV | None = None) -> Tensor:
        """``forward``; with a cache no graph is kept, since a cache holds numbers and is written in place."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            return super().__call__(x, cache, source)

    @abstractmethod
    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        """The slow and obvious form of ``forward(x)``: fp32, and a bare loop over time."""

    @abstractmethod
    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Cache:
        """An empty cache for up to ``max_len`` tokens; dtype and device are the weights' unless given."""

    @abstractmethod
    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """STORED: bytes that a cache for ``max_len`` tokens allocates, by the formula on paper."""

    @abstractmethod
    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """READ: bytes of cache that one decode step touches when ``length`` tokens stand in it."""

    @classmethod
    @abstractmethod
    def tiny(cls) -> "Mechanism":
        """A small instance for the contract tests."""

    @classmethod
    def tiny_at_limit(cls) -> "tuple[Mechanism, Mechanism] | None":
        """A small instance at the setting where it must equal full attention, and that full attention.

        The two hold the same weights. None where there is no such setting.
        """
        return None

    def kv(self, x: Float[Tensor, "B T M"], cache: Cache | None = None) -> KV:
        """Keys and values of ``x``, written behind what ``cache`` holds; for another layer's ``source``."""
        raise TypeError(
            f"source: a layer of kind {self.name!r} has no keys and values that another could read"
        )

    def dtype_and_device(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> tuple[torch.dtype, torch.device]:
        """The given dtype and device, or else those of the weights."""
        weight = next(self.parameters())
        return dtype or weight.dtype, torch.device(device) if device is not None else weight.device

    def check(self, x: Tensor, cache: Cache | None, kind: type[Cache]) -> None:
        """The door of ``forward``: shape, dtype and device of ``x``, and a cache of this mechanism's kind."""
        dtype, device = self.dtype_and_device()
        expect.tensor("x", x, ("batch", "time", self.d_model), dtype=dtype, device=device)
        expect.at_least("x.shape[1] (time)", x.shape[1], 1)
        if cache is None:
            return
        expect.instance("cache", cache, kind)
        if cache.batch != len(x):
            raise ValueError(f"x: expected the cache's batch of {cache.batch}, got {len(x)}")
        if cache.device != device:
            raise ValueError(f"cache: expected device {device}, got {cache.device}")


M = TypeVar("M", bound=type[Mechanism])
REGISTRY: dict[str, type[Mechanism]] = {}


def register(name: str) -> Callable[[M], M]:
    """Class decorator: makes a mechanism known as ``name`` to tests, models, results and the command line."""

    def add(mechanism: M) -> M:
        if name in REGISTRY:
            raise ValueError(f"name: {name!r} is registered already, by {REGISTRY[name].__name__}")
        REGISTRY[name] = mechanism
        mechanism.name = name
        return mechanism

    return add
