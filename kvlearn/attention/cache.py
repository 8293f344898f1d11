"""What a layer keeps of the past: the base of every cache, and the cache of keys and values."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvlearn import validate


class Cache(ABC):
    """What one layer keeps of the tokens it has seen.

    Rows of a batch may differ in length: prompts of different lengths are padded on the right, fed together,
    and cut back to their own lengths by ``trim``.
    """

    can_trim = True  # False where what was seen cannot be forgotten: a state, a ring that wrote over its past

    def __init__(self, batch: int, max_len: int, device: torch.device | str) -> None:
        self.batch = validate.positive("batch", batch)
        self.max_len = validate.positive("max_len", max_len)
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
            raise ValueError(
                f"cache: a {type(self).__name__} cannot forget what it has seen, not even "
                "padding: feed prompts of different lengths each with a cache of its own"
            )
        validate.tensor("lengths", lengths, (self.batch,))
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


@dataclass(frozen=True)
class KV:
    """Keys and values a layer attends to, and where its new tokens stand: ``k, v, positions = kv``.

    Slot s holds the key at position ``key_positions[..., s]``, -1 where it is empty; with None it holds
    position s. A layer hands these to another that reads them in place of its own (cross-layer sharing).
    """

    k: Float[Tensor, "B G S D"]
    v: Float[Tensor, "B G S D"]
    positions: Int[Tensor, "#B T"]
    key_positions: Int[Tensor, "#B S"] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.k, self.v, self.positions))

    @property
    def places(self) -> Int[Tensor, "#B S"]:
        """``key_positions``, written out where they are the slots' numbers."""
        if self.key_positions is not None:
            return self.key_positions
        return torch.arange(self.k.shape[2], device=self.k.device)[None]


class TokenCache(Cache):
    """A cache of keys and values, token by token."""

    @abstractmethod
    def append(self, k: Float[Tensor, "B H T D"], v: Float[Tensor, "B H T D"]) -> KV:
        """Write new keys and values; return all that the new tokens may attend to, themselves among it."""


class KVCache(TokenCache):
    """Keys and values of all tokens so far, in memory that is allocated once; slot s holds position s."""

    def __init__(
        self, batch: int, n_heads: int, max_len: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(batch, max_len, device)
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point type, got {dtype}")
        # Zeros, not whatever the memory held: a masked slot weighs 0, and 0 · NaN would be NaN.
        self.k = torch.zeros(batch, n_heads, max_len, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v]

    def append(self, k: Float[Tensor, "B H T D"], v: Float[Tensor, "B H T D"]) -> KV:
        """Write new keys and values behind the old ones; return views of all of them, never a copy."""
        n_heads, head_dim = self.k.shape[1], self.k.shape[3]
        for name, new in (("k", k), ("v", v)):
            validate.tensor(name, new, (self.batch, n_heads, k.shape[2], head_dim), device=self.device)
        self.expect_room(k.shape[2])
        positions = self.positions(k.shape[2])
        for buffer, new in ((self.k, k), (self.v, v)):
            new = new.detach().to(buffer.dtype)
            if self.lengths is None:
                buffer[:, :, self.length : self.length + k.shape[2]] = new
            else:
                buffer.scatter_(2, positions[:, None, :, None].expand(new.shape), new)
        self.advance(k.shape[2])
        return KV(self.k[:, :, : self.length], self.v[:, :, : self.length], positions)


class NoCache(Cache):
    """What a layer keeps that reads another layer's cache: nothing. Its ``length`` stays 0."""

    def tensors(self) -> list[Tensor]:
        return []
