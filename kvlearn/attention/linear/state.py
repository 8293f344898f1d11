"""What recurrent mechanisms share: a state of constant size as their cache, and a mixer that goes on from it.

Letters of this chapter: K key features a head, V numbers of a value a head, C tokens of a chunk.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvlearn import validate
from kvlearn.attention.base import Mechanism
from kvlearn.attention.cache import KV, Cache
from kvlearn.attention.linear.forms import FORMS

State = dict[str, Tensor]  # what is kept of the past, by name; the first dimension is the batch


class StateCache(Cache):
    """A state of constant size, whatever the length; fp32 at least, since rounding adds up in it.

    What it has seen it cannot forget, so it does not trim: rows of a batch have one length, and prompts of
    different lengths are fed each with a cache of its own.
    """

    can_trim = False

    def __init__(
        self,
        batch: int,
        max_len: int,
        shapes: Mapping[str, tuple[int, ...]],
        starts: Mapping[str, float],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(batch, max_len, device)
        self.starts = starts
        self.state = {
            name: torch.full((batch, *shape), starts.get(name, 0.0), dtype=dtype, device=device)
            for name, shape in shapes.items()
        }

    def tensors(self) -> list[Tensor]:
        return list(self.state.values())

    def expect_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError where this is the state of a layer of other sizes; asked before writing."""
        own = {name: tuple(t.shape[1:]) for name, t in self.state.items()}
        if own != dict(shapes):
            raise ValueError(f"cache: expected shapes {dict(shapes)} in a row, got {own}")

    def replace(self, state: State, n_tokens: int) -> None:
        """The state behind ``n_tokens`` more."""
        self.advance(n_tokens)
        for name, new in state.items():
            self.state[name].copy_(new)

    def reset(self) -> None:
        super().reset()
        for name, start in self.starts.items():
            self.state[name].fill_(start)


class StateMechanism(Mechanism):
    """A mechanism that keeps a state in place of keys and values; ``mix`` is all that it has to give.

    Cache: the numbers of ``state_shapes``, B times, in fp32 (fp64 with weights or a ``dtype`` of fp64; a
    narrower ``dtype`` is for keys and values, and leaves states alone). Every step reads all of it.
    """

    forms: ClassVar[tuple[str, ...]] = FORMS
    form = "chunked"  # for more than one token
    chunk = 64  # tokens a chunk, where it is by chunks: of speed and memory, the numbers are the same
    state_starts: ClassVar[Mapping[str, float]] = {}  # what a part of the state starts from, where not 0

    @property
    @abstractmethod
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The parts of the state and their shapes, for one row of a batch."""

    @abstractmethod
    def mix(self, x: Float[Tensor, "B T M"], state: State, form: str) -> tuple[Tensor, State]:
        """The outputs (B, T, M) for ``x`` behind ``state``, and the state behind ``x``, in a new dictionary.

        ``state`` comes in fp32 at least and is not written to; ``form`` is one of ``forms``.
        """

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.refuse(source)
        self.check(x, cache, StateCache)
        n_tokens = x.shape[1]
        if not isinstance(cache, StateCache):
            return self.mix(x, self.start(x), self.form)[0]
        cache.expect_shapes(self.state_shapes)
        cache.expect_room(n_tokens)
        inside = torch.promote_types(x.dtype, torch.float32)
        before = {name: t.to(inside) for name, t in cache.state.items()}
        y, state = self.mix(x, before, "recurrent" if n_tokens == 1 else self.form)
        cache.replace(state, n_tokens)
        return y

    def start(self, x: Float[Tensor, "B T M"]) -> State:
        """The state before the first token."""
        return self.new_cache(len(x), 1, x.dtype, x.device).state

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        return self.mix(x, self.start(x), "recurrent")[0]

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StateCache:
        at = self.dtype_and_device(dtype, device)[1]
        return StateCache(batch, max_len, self.state_shapes, self.state_starts, self.state_dtype(dtype), at)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · the numbers of the state · 4 bytes (8 in fp64), whatever ``max_len`` is."""
        validate.positive("max_len", max_len)
        numbers = sum(torch.Size(shape).numel() for shape in self.state_shapes.values())
        return validate.positive("batch", batch) * numbers * self.state_dtype(dtype).itemsize

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """All of the state, once. (A step also writes all of it, which no mechanism counts here.)"""
        return self.cache_bytes(length, batch=batch, dtype=dtype)

    def state_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """fp32, or wider where the weights or ``dtype`` are."""
        dtype = self.dtype_and_device(dtype)[0]
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point type, got {dtype}")
        return torch.promote_types(dtype, torch.float32)
