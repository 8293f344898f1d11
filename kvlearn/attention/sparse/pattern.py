"""What a sparse pattern is: who attends to whom, by position, whatever the tokens say.

A pattern answers four questions: who sees whom (``sees``), what does a run of queries need (``columns``), who
reads a token last (``last_readers``), and how is it written (``str``). Its words are in words.py.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import reduce
from operator import or_

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvlearn import validate
from kvlearn.attention.columns import allowed


class Pattern(ABC):
    """Some of the pairs (query, key) with key ≤ query. ``a | b`` has the pairs of both."""

    sees_itself = True  # whether every token sees at least itself

    @abstractmethod
    def sees(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Whether the query at each position attends to the key at each; asked for keys ≤ queries only."""

    @abstractmethod
    def columns(self, first: int, last: int) -> Int[Tensor, "n"]:
        """The positions that at least one of the queries first … last attends to, in order."""

    @abstractmethod
    def last_readers(self, n_tokens: int) -> Int[Tensor, "n_tokens"]:
        """For each of ``n_tokens`` tokens the last of them that attends to it, -1 for none.

        What the cache may forget: token j is done with once the token at last_readers[j] has attended.
        """

    def mask(self, n_tokens: int) -> Bool[Tensor, "n_tokens n_tokens"]:
        """All pairs of ``n_tokens`` tokens, row by row of queries."""
        positions = torch.arange(validate.positive("n_tokens", n_tokens))
        return allowed(self, positions, positions)

    def picture(self, n_tokens: int) -> str:
        """The mask as text, a row a query: ``#`` is seen, ``·`` is past and not seen."""
        rows = self.mask(n_tokens).tolist()
        return "\n".join("".join("·#"[seen] for seen in row[: i + 1]) for i, row in enumerate(rows))

    def __or__(self, other: "Pattern") -> "Pattern":
        return Union((*words(self), *words(validate.instance("pattern", other, Pattern))))

    def __str__(self) -> str:
        """The sentence; ``parse`` reads it."""
        first, *others = fields(self)  # type: ignore[arg-type]
        options = [f"{f.name}={value}" for f in others if (value := getattr(self, f.name)) != f.default]
        return f"{type(self).__name__.lower()}({', '.join([str(getattr(self, first.name)), *options])})"


@dataclass(frozen=True)
class Union(Pattern):
    """What at least one of the ``parts`` sees."""

    parts: tuple[Pattern, ...]

    @property
    def sees_itself(self) -> bool:  # type: ignore[override]
        return any(part.sees_itself for part in self.parts)

    def sees(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return reduce(or_, (part.sees(queries, keys) for part in self.parts))

    def columns(self, first: int, last: int) -> Int[Tensor, "n"]:
        return torch.cat([part.columns(first, last) for part in self.parts]).unique()

    def last_readers(self, n_tokens: int) -> Int[Tensor, "n_tokens"]:
        return torch.stack([part.last_readers(n_tokens) for part in self.parts]).amax(0)

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts))


def words(pattern: Pattern) -> tuple[Pattern, ...]:
    """The words of a sentence."""
    return pattern.parts if isinstance(pattern, Union) else (pattern,)
