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
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.cache import KV, Cache


class Mechanism(nn.Module, ABC):
    """A layer that mixes tokens causally.

    Every constructor takes ``d_model`` and ``n_heads``, then options of its own; among them, where they mean
    something to it, ``head_dim`` (d_model / n_heads unless given) and ``rope`` (None: no positions). Raises
    ValueError or TypeError that names the argument.
    """

    name: str  # in the registry
    chooses_by_content = False  # True where the output jumps when a choice between pools or tokens tips over
    trained_apart: tuple[str, ...] = ()  # weights that only choose: the output has no gradient for them
    undecayed: tuple[str, ...] = ()  # matrices that weight decay has to leave alone: 0 is no rest for them

    def __init__(self, d_model: int, n_heads: int, head_dim: int | None) -> None:
        super().__init__()
        self.d_model = validate.positive("d_model", d_model)
        if head_dim is None:
            head_dim = d_model // validate.divides("n_heads", n_heads, "d_model", d_model)
        self.n_heads = validate.positive("n_heads", n_heads)
        self.head_dim = validate.positive("head_dim", head_dim)

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

    def refuse(self, source: KV | None) -> None:
        """The door of a mechanism that cannot read another layer's keys and values."""
        if source is not None:
            raise TypeError(f"source: a layer of kind {self.name!r} reads no other layer's keys and values")

    def initialise(self) -> None:
        """Draw the weights that start in a way of the mechanism's own; a model calls it last."""

    def dtype_and_device(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> tuple[torch.dtype, torch.device]:
        """The given dtype and device, or else those of the weights."""
        weight = next(self.parameters())
        return dtype or weight.dtype, torch.device(device) if device is not None else weight.device

    def check(self, x: Tensor, cache: Cache | None, kind: type[Cache]) -> None:
        """The door of ``forward``: shape, dtype and device of ``x``, and a cache of this mechanism's kind."""
        dtype, device = self.dtype_and_device()
        validate.tensor("x", x, ("batch", "time", self.d_model), dtype=dtype, device=device)
        validate.at_least("x.shape[1] (time)", x.shape[1], 1)
        if cache is None:
            return
        validate.instance("cache", cache, kind)
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
