"""The words of the pattern language: local, strided, fixed, global and random.

They are joined by ``|``, and all of them look back only: a token never sees a later one.
"""

import random
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvlearn import validate
from kvlearn.attention.sparse.pattern import Pattern


@dataclass(frozen=True)
class Local(Pattern):
    """The last ``size`` tokens up to the query's own: a sliding window.

    With ``block`` it slides by whole blocks: the query's block up to itself, and those before it that fit.
    """

    size: int
    block: int = 1

    def __post_init__(self) -> None:
        validate.divides("local: block", self.block, "size", validate.positive("local: size", self.size))

    def sees(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return queries // self.block - keys // self.block < self.size // self.block

    def columns(self, first: int, last: int) -> Int[Tensor, "n"]:
        return torch.arange(max((first // self.block + 1) * self.block - self.size, 0), last + 1)

    def last_readers(self, n_tokens: int) -> Int[Tensor, "n_tokens"]:
        start_of_block = torch.arange(n_tokens) // self.block * self.block
        return (start_of_block + self.size - 1).clamp_max(n_tokens - 1)


@dataclass(frozen=True)
class Strided(Pattern):
    """Every ``stride``-th token back from the query's own: (query - key) mod stride = 0."""

    stride: int

    def __post_init__(self) -> None:
        validate.positive("strided: stride", self.stride)

    def sees(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return (queries - keys) % self.stride == 0

    def columns(self, first: int, last: int) -> Int[Tensor, "n"]:
        everything = torch.arange(last + 1)
        if last - first + 1 >= self.stride:
            return everything
        before_last = last - everything
        return everything[before_last % self.stride <= last - first]

    def last_readers(self, n_tokens: int) -> Int[Tensor, "n_tokens"]:
        j = torch.arange(n_tokens)
        return j + (n_tokens - 1 - j) // self.stride * self.stride


@dataclass(frozen=True)
class Fixed(Pattern):
    """The query's own block of ``block`` tokens, and the last ``summary`` tokens of every block before."""

    block: int
    summary: int = 1

    def __post_init__(self) -> None:
        validate.positive("fixed: block", self.block)
        validate.at_most(
            "fixed: summary", validate.positive("fixed: summary", self.summary), self.block, "block"
        )

    def sees(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return (queries // self.block == keys // self.block) | self._sums_up(keys)

    def columns(self, first: int, last: int) -> Int[Tensor, "n"]:
        j = torch.arange(last + 1)
        return j[(j >= first // self.block * self.block) | self._sums_up(j)]

    def last_readers(self, n_tokens: int) -> Int[Tensor, "n_tokens"]:
        j = torch.arange(n_tokens)
        end_of_block = (j // self.block + 1) * self.block - 1
        return torch.where(self._sums_up(j), n_tokens - 1, end_of_block.clamp_max(n_tokens - 1))

    def _sums_up(self, keys: Tensor) -> Tensor:
        return keys % self.block >= self.block - self.summary


@dataclass(frozen=True)
class Global(Pattern):
    """The first ``first`` tokens and those at the positions ``at``: all see them, and they see all before.

    A global token that is still to come will ask for everything: until it has, nothing may be forgotten.
    """

    first: int = 0
    at: tuple[int, ...] = ()
    sees_itself = False

    def __post_init__(self) -> None:
        validate.at_least("global: first", self.first, 0)
        object.__setattr__(self, "at", tuple(self.at))  # a list would have no hash
        for position in self.at:
            validate.at_least("global: at", position, 0)
        if not self.first and not self.at:
            raise ValueError("global: expected at least one position, got none")

    def sees(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return self._is_global(queries) | self._is_global(keys)

    def columns(self, first: int, last: int) -> Int[Tensor, "n"]:
        everyone = self.positions(last + 1)
        asks = len(everyone) and int(everyone[-1]) >= first  # one of the queries, for all before it
        return torch.arange(int(everyone[-1]) + 1) if asks else everyone

    def last_readers(self, n_tokens: int) -> Int[Tensor, "n_tokens"]:
        everyone = self.positions(n_tokens)
        last = torch.full((n_tokens,), -1)
        if len(everyone):
            last[: int(everyone[-1]) + 1] = everyone[-1]
        last[everyone] = n_tokens - 1
        return last

    def positions(self, n_tokens: int) -> Int[Tensor, "n"]:
        """The global ones among ``n_tokens`` tokens."""
        here = {*range(min(self.first, n_tokens)), *(p for p in self.at if p < n_tokens)}
        return torch.tensor(sorted(here), dtype=torch.int64)

    def _is_global(self, positions: Tensor) -> Tensor:
        here = positions < self.first
        for position in self.at:
            here = here | (positions == position)
        return here


@dataclass(frozen=True)
class Random(Pattern):
    """For each block of ``block`` queries, ``n_blocks`` earlier blocks of keys, drawn without replacement.

    Not among the first ``skip_first`` blocks, nor the ``skip_last`` just before: other words see those. The
    draw depends on ``seed`` and the block's number alone, so that prefill and decode, of texts of any
    length, agree.
    """

    n_blocks: int
    block: int = 64
    skip_first: int = 0
    skip_last: int = 0
    seed: int = 0
    sees_itself = False

    def __post_init__(self) -> None:
        validate.positive("random: n_blocks", self.n_blocks)
        validate.positive("random: block", self.block)
        for name in ("skip_first", "skip_last", "seed"):
            validate.at_least(f"random: {name}", getattr(self, name), 0)

    def draw(self, number: int) -> list[int]:
        """The blocks that query block ``number`` sees, in order."""
        among = range(self.skip_first, number - self.skip_last)
        return sorted(random.Random(f"{self.seed}/{number}").sample(among, min(self.n_blocks, len(among))))

    def sees(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        query_blocks, key_blocks = queries // self.block, keys // self.block
        seen = torch.zeros_like(queries + keys, dtype=torch.bool)
        for number in query_blocks.unique().tolist():
            drawn = torch.tensor(self.draw(number), dtype=torch.int64, device=keys.device)
            seen |= (query_blocks == number) & torch.isin(key_blocks, drawn)
        return seen

    def columns(self, first: int, last: int) -> Int[Tensor, "n"]:
        numbers = range(first // self.block, last // self.block + 1)
        drawn = sorted({b for number in numbers for b in self.draw(number)})
        starts = torch.tensor(drawn, dtype=torch.int64) * self.block
        return (starts[:, None] + torch.arange(self.block)).flatten()

    def last_readers(self, n_tokens: int) -> Int[Tensor, "n_tokens"]:
        n_blocks = -(-n_tokens // self.block)
        last = torch.full((n_blocks * self.block,), -1).unflatten(0, (n_blocks, self.block))
        for number in range(n_blocks):
            last[self.draw(number)] = min((number + 1) * self.block, n_tokens) - 1
        return last.flatten()[:n_tokens]
