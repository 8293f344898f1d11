"""What recurrent mechanisms share: a state of constant size as their cache, and several forms of one sum.

A recurrence goes through its tokens in one of these forms, which give the same numbers:

    parallel     all pairs of tokens at once, masked: quadratic, to be understood, and the inside of a chunk
    recurrent    one token after the other: what a step of decode does
    chunked      chunk after chunk, parallel inside, the state carried across: linear in time and in memory

Letters of this chapter: K key features a head, V numbers of a value a head, C tokens of a chunk.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from kvlearn import expect
from kvlearn.attention.base import Mechanism
from kvlearn.attention.cache import KV, Cache

State = dict[str, Tensor]  # what is kept of the past, by name; the first dimension is the batch
Outcome = tuple[Tensor, Tensor]  # outputs (B, H, T, V), and the state (B, H, K, V) behind the last token


class StateCache(Cache):
    """A state of constant size, whatever the length; fp32 at least, since rounding adds up in it.

    What it has seen it cannot forget, so it does not trim.
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

    forms: ClassVar[tuple[str, ...]] = ("parallel", "recurrent", "chunked")
    form = "chunked"  # for more than one token
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
        expect.positive("max_len", max_len)
        numbers = sum(torch.Size(shape).numel() for shape in self.state_shapes.values())
        return expect.positive("batch", batch) * numbers * self.state_dtype(dtype).itemsize

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """All of the state, once. (A step also writes all of it, which no mechanism counts here.)"""
        return self.cache_bytes(length, batch=batch, dtype=dtype)

    def state_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """fp32, or wider where the weights or ``dtype`` are."""
        dtype = self.dtype_and_device(dtype)[0]
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point type, got {dtype}")
        return torch.promote_types(dtype, torch.float32)


def by_form(
    form: str,
    parallel: Callable[..., Outcome],
    recurrent: Callable[..., Outcome],
    inputs: tuple[Tensor, ...],
    state: Tensor,
    chunk: int,
) -> Outcome:
    """A recurrence over ``inputs``, each (B, H, T, …), by the form of this name.

    The parallel form is one chunk of all tokens; the chunked form is the parallel one chunk after chunk, each
    handed the state of the one before. The last chunk may be shorter. What a chunk needs for itself lives no
    longer than the chunk (but for gradients), so memory stays linear in T.
    """
    expect.one_of("form", form, StateMechanism.forms)
    expect.positive("chunk", chunk)
    if form == "recurrent":
        return recurrent(*inputs, state)
    outs = []
    for pieces in zip(
        *(x.split(chunk if form == "chunked" else x.shape[2], dim=2) for x in inputs), strict=True
    ):
        out, state = parallel(*pieces, state)
        outs.append(out)
    return torch.cat(outs, dim=2), state


def check_inputs(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> Float[Tensor, "B H K V"]:
    """The door of every such recurrence; the state in the dtype of its sums, zeros for None."""
    expect.tensor("q", q, ("batch", "heads", "time", "features"))
    expect.at_least("q.shape[2] (time)", q.shape[2], 1)
    B, H, T, K = q.shape
    expect.tensor("k", k, (B, H, T, K), dtype=q.dtype, device=q.device)
    expect.tensor("v", v, (B, H, T, "values"), dtype=q.dtype, device=q.device)
    inside = torch.promote_types(q.dtype, torch.float32)
    if state is None:
        return torch.zeros(B, H, K, v.shape[3], dtype=inside, device=q.device)
    expect.tensor("state", state, (B, H, K, v.shape[3]), device=q.device)
    if not state.is_floating_point():
        raise TypeError(f"state: expected a floating-point type, got {state.dtype}")
    return state.to(inside)


def check_log_decay(log_decay: Tensor, shape: tuple[int | str, ...]) -> None:
    """The door for decays: logarithms of numbers in (0, 1]."""
    expect.tensor("log_decay", log_decay, shape)
    if log_decay.device.type == "cpu":  # elsewhere a look at the values would synchronise
        least, most = (float(bound) for bound in log_decay.detach().aminmax())
        if not (-math.inf < least and most <= 0):  # NaN fails too
            raise ValueError(f"log_decay: expected logarithms of decays in (0, 1], got {least} to {most}")
