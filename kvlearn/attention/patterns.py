"""Sparse attention patterns: which earlier tokens each token attends to, by position and not by content.

A pattern is a union of primitives. Its spec is written as text; the published patterns are

    local(128) | strided(128)                                                   Sparse Transformer, strided
    fixed(128, summary=8)                                                       Sparse Transformer, fixed
    local(512) | global(2)                                                      Longformer
    local(128, block=64) | global(64) | random(3, skip_first=1, skip_last=1)    BigBird

Since a pattern is known before any token is, it also determines when each key is read for the last time, how
many keys a cache must hold, and in which slots. A pattern that reads few keys may have to keep many: a
key is kept until its *last* reader.
"""

import ast
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import lru_cache, reduce
from heapq import heappop, heappush
from operator import or_
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvlearn import validate
from kvlearn.attention.core import has_no_values, rule_mask
from kvlearn.attention.window import SlotCache


class Pattern(ABC):
    """A set of pairs (query, key), key ≤ query: a ``MaskRule`` (core.py). ``a | b`` has the pairs of both."""

    includes_self = True  # whether every token attends at least to itself

    @abstractmethod
    def visible(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Whether the query at each position attends to the key at each; asked for keys ≤ queries only."""

    @abstractmethod
    def visible_keys(self, first: int, last: int) -> Int[Tensor, "n"]:
        """The positions that at least one of the queries first … last attends to, in order."""

    @abstractmethod
    def last_readers(self, n_tokens: int) -> Int[Tensor, "n_tokens"]:
        """For each of ``n_tokens`` tokens the last of them that attends to it, -1 for none.

        The cache may drop token j once the token at last_readers[j] has attended.
        """

    def mask(self, n_tokens: int) -> Bool[Tensor, "n_tokens n_tokens"]:
        """The dense mask of ``n_tokens`` tokens, one row per query."""
        positions = torch.arange(validate.positive("n_tokens", n_tokens))
        return rule_mask(self, positions, positions)

    def picture(self, n_tokens: int) -> str:
        """The mask as text, one row per query: ``#`` is visible, ``·`` is earlier and not visible."""
        rows = self.mask(n_tokens).tolist()
        return "\n".join("".join("·#"[visible] for visible in row[: i + 1]) for i, row in enumerate(rows))

    def __or__(self, other: "Pattern") -> "Pattern":
        return Union((*primitives(self), *primitives(validate.instance("pattern", other, Pattern))))

    def __str__(self) -> str:
        """The spec; ``parse`` reads it."""
        first, *others = fields(self)  # type: ignore[arg-type]
        options = [f"{f.name}={value}" for f in others if (value := getattr(self, f.name)) != f.default]
        return f"{type(self).__name__.lower()}({', '.join([str(getattr(self, first.name)), *options])})"


@dataclass(frozen=True)
class Union(Pattern):
    """The pairs that at least one of the ``parts`` has."""

    parts: tuple[Pattern, ...]

    @property
    def includes_self(self) -> bool:  # type: ignore[override]
        return any(part.includes_self for part in self.parts)

    def visible(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return reduce(or_, (part.visible(queries, keys) for part in self.parts))

    def visible_keys(self, first: int, last: int) -> Int[Tensor, "n"]:
        return torch.cat([part.visible_keys(first, last) for part in self.parts]).unique()

    def last_readers(self, n_tokens: int) -> Int[Tensor, "n_tokens"]:
        return torch.stack([part.last_readers(n_tokens) for part in self.parts]).amax(0)

    def __str__(self) -> str:
        return " | ".join(map(str, self.parts))


def primitives(pattern: Pattern) -> tuple[Pattern, ...]:
    """The primitives that a pattern is the union of."""
    return pattern.parts if isinstance(pattern, Union) else (pattern,)


@dataclass(frozen=True)
class Local(Pattern):
    """The last ``size`` tokens up to the query's own: a sliding window, query - key < size.

    With ``block`` the window moves by whole blocks: the query's own block, and the size/block - 1 before it.
    """

    size: int
    block: int = 1

    def __post_init__(self) -> None:
        validate.fields_at_least(self, "local: ", size=1, block=1)
        validate.divides("local: block", self.block, "size", self.size)

    def visible(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return queries // self.block - keys // self.block < self.size // self.block

    def visible_keys(self, first: int, last: int) -> Int[Tensor, "n"]:
        return torch.arange(max((first // self.block + 1) * self.block - self.size, 0), last + 1)

    def last_readers(self, n_tokens: int) -> Int[Tensor, "n_tokens"]:
        start_of_block = torch.arange(n_tokens) // self.block * self.block
        return (start_of_block + self.size - 1).clamp_max(n_tokens - 1)


@dataclass(frozen=True)
class Strided(Pattern):
    """Every ``stride``-th token back from the query's own: (query - key) mod stride = 0."""

    stride: int

    def __post_init__(self) -> None:
        validate.fields_at_least(self, "strided: ", stride=1)

    def visible(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return (queries - keys) % self.stride == 0

    def visible_keys(self, first: int, last: int) -> Int[Tensor, "n"]:
        keys = torch.arange(last + 1)
        if last - first + 1 >= self.stride:
            return keys
        return keys[(last - keys) % self.stride <= last - first]

    def last_readers(self, n_tokens: int) -> Int[Tensor, "n_tokens"]:
        keys = torch.arange(n_tokens)
        return keys + (n_tokens - 1 - keys) // self.stride * self.stride


@dataclass(frozen=True)
class Fixed(Pattern):
    """The query's own block of ``block`` tokens, and the last ``summary`` tokens of every block before it."""

    block: int
    summary: int = 1

    def __post_init__(self) -> None:
        validate.fields_at_least(self, "fixed: ", block=1, summary=1)
        validate.at_most("fixed: summary", self.summary, self.block, "block")

    def visible(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return (queries // self.block == keys // self.block) | self._in_summary(keys)

    def visible_keys(self, first: int, last: int) -> Int[Tensor, "n"]:
        keys = torch.arange(last + 1)
        return keys[(keys >= first // self.block * self.block) | self._in_summary(keys)]

    def last_readers(self, n_tokens: int) -> Int[Tensor, "n_tokens"]:
        keys = torch.arange(n_tokens)
        end_of_block = (keys // self.block + 1) * self.block - 1
        return torch.where(self._in_summary(keys), n_tokens - 1, end_of_block.clamp_max(n_tokens - 1))

    def _in_summary(self, keys: Tensor) -> Tensor:
        return keys % self.block >= self.block - self.summary


@dataclass(frozen=True)
class Global(Pattern):
    """The first ``first`` tokens and those at the positions ``at``.

    Every token attends to them, and they attend to every token before them.

    A cache can drop nothing until the last global token, which will read all of it.
    """

    first: int = 0
    at: tuple[int, ...] = ()
    includes_self = False

    def __post_init__(self) -> None:
        validate.fields_at_least(self, "global: ", first=0)
        at = tuple(validate.at_least("global: at", position, 0) for position in self.at)
        object.__setattr__(self, "at", at)  # a list would have no hash
        if not self.first and not self.at:
            raise ValueError("global: expected at least one position, got none")

    def visible(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return self._is_global(queries) | self._is_global(keys)

    def visible_keys(self, first: int, last: int) -> Int[Tensor, "n"]:
        everyone = self.positions(last + 1)
        among_queries = len(everyone) and int(everyone[-1]) >= first  # it attends to all before it
        return torch.arange(int(everyone[-1]) + 1) if among_queries else everyone

    def last_readers(self, n_tokens: int) -> Int[Tensor, "n_tokens"]:
        everyone = self.positions(n_tokens)
        last = torch.full((n_tokens,), -1)
        if len(everyone):
            last[: int(everyone[-1]) + 1] = everyone[-1]
        last[everyone] = n_tokens - 1
        return last

    def positions(self, n_tokens: int) -> Int[Tensor, "n"]:
        """The global positions among ``n_tokens`` tokens, in order."""
        everyone = {*range(min(self.first, n_tokens)), *(p for p in self.at if p < n_tokens)}
        return torch.tensor(sorted(everyone), dtype=torch.int64)

    def _is_global(self, positions: Tensor) -> Tensor:
        is_global = positions < self.first
        for position in self.at:
            is_global = is_global | (positions == position)
        return is_global


@dataclass(frozen=True)
class Random(Pattern):
    """For each block of ``block`` queries, ``n_blocks`` earlier blocks of keys, drawn without replacement.

    The first ``skip_first`` blocks and the ``skip_last`` just before the query's are excluded.
    The draw depends on ``seed`` and the block's number alone, so that prefill and decode agree, whatever the
    length of the text.
    """

    n_blocks: int
    block: int = 64
    skip_first: int = 0
    skip_last: int = 0
    seed: int = 0
    includes_self = False

    def __post_init__(self) -> None:
        validate.fields_at_least(self, "random: ", n_blocks=1, block=1, skip_first=0, skip_last=0, seed=0)

    def draw(self, number: int) -> list[int]:
        """The blocks that query block ``number`` attends to, in order."""
        among = range(self.skip_first, number - self.skip_last)
        return sorted(random.Random(f"{self.seed}/{number}").sample(among, min(self.n_blocks, len(among))))

    def visible(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        if has_no_values(queries):
            options = (self.n_blocks, self.block, self.skip_first, self.skip_last, self.seed)
            return random_visible(queries, keys, *options)
        query_blocks, key_blocks = queries // self.block, keys // self.block
        visible = torch.zeros_like(queries + keys, dtype=torch.bool)
        for number in query_blocks.unique().tolist():
            drawn = torch.tensor(self.draw(number), dtype=torch.int64, device=keys.device)
            visible |= (query_blocks == number) & torch.isin(key_blocks, drawn)
        return visible

    def visible_keys(self, first: int, last: int) -> Int[Tensor, "n"]:
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


@torch.library.custom_op("kvlearn::random_visible", mutates_args=())
def random_visible(
    queries: Tensor, keys: Tensor, n_blocks: int, block: int, skip_first: int, skip_last: int, seed: int
) -> Tensor:
    """``Random.visible`` as an operator that ``torch.compile`` does not trace: Python makes the draw."""
    return Random(n_blocks, block, skip_first, skip_last, seed).visible(queries, keys)


@random_visible.register_fake
def _(queries: Tensor, keys: Tensor, *options: int) -> Tensor:
    return torch.empty_like(queries + keys, dtype=torch.bool)


PRIMITIVES: dict[str, type[Pattern]] = {
    kind.__name__.lower(): kind for kind in (Local, Strided, Fixed, Global, Random)
}


def parse(spec: str | Pattern) -> Pattern:
    """The pattern of a spec as ``str`` writes it: primitives joined by ``|``, options positional or named.

    A pattern is returned as it is. Raises ValueError that names the primitive that is not understood.
    """
    if isinstance(spec, Pattern):
        return spec
    return reduce(or_, map(_primitive, validate.instance("pattern", spec, str).split("|")))


def _primitive(text: str) -> Pattern:
    name, _, options = text.strip().partition("(")
    kind = PRIMITIVES[validate.one_of("pattern", name, PRIMITIVES)]
    known = ", ".join(f.name for f in fields(kind))  # type: ignore[arg-type]
    not_understood = f"pattern: {text.strip()!r} is not understood; {name} takes {known}"
    try:
        positional, named = _options(options)
    except (SyntaxError, ValueError) as error:
        raise ValueError(not_understood) from error
    try:
        return kind(*positional, **named)
    except TypeError as error:
        raise ValueError(f"{not_understood}: {error}") from error


def _options(text: str) -> tuple[list[Any], dict[str, Any]]:
    """The literals between a primitive's brackets: positional, and named."""
    call = ast.parse(f"primitive({text}", mode="eval").body
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        raise ValueError("expected one pair of brackets")
    positional = [ast.literal_eval(value) for value in call.args]
    return positional, {str(option.arg): ast.literal_eval(option.value) for option in call.keywords}


def sparse_transformer(stride: int) -> Pattern:
    """The last ``stride`` tokens, and every ``stride``-th before: O(N · (stride + N / stride)).

    With a stride near √N that is O(N√N). Source: Child et al., "Sparse Transformers" (2019), section 4.3
    (strided).
    """
    return Local(stride) | Strided(stride)


def sparse_transformer_fixed(block: int, summary: int) -> Pattern:
    """A token's own block, and the last ``summary`` tokens of each before: O(N√N) for a block near √N.

    Source: Child et al., "Sparse Transformers" (2019), section 4.3 (fixed).
    """
    return Fixed(block, summary)


def longformer(window: int, n_global: int) -> Pattern:
    """A window and some global tokens: O(N · (window + n_global)).

    ``window`` counts the earlier tokens and the query's own; the paper's encoder looks as far ahead again.
    Source: Beltagy et al., "Longformer" (2020), section 3.1.
    """
    return Local(window) | Global(n_global)


def bigbird(block: int, n_random: int, *, n_window: int = 1, n_global: int = 1, seed: int = 0) -> Pattern:
    """A window, global and random tokens, in blocks: O(N · block · (n_window + n_global + n_random)).

    A query block attends to itself, the ``n_window`` blocks before it, the first ``n_global`` blocks, and
    ``n_random`` drawn from the rest. Source: Zaheer et al., "Big Bird" (2020), section 2; blocks: appendix D.
    """
    near, wide = Local((n_window + 1) * block, block), Global(n_global * block)
    return near | wide | Random(n_random, block, n_global, n_window, seed)


def live_tokens(pattern: Pattern, n_tokens: int) -> Int[Tensor, "n_tokens"]:
    """How many tokens must be held while the token at position t attends: |{j ≤ t : last(j) ≥ t}|."""
    last = pattern.last_readers(n_tokens)
    dropped = torch.bincount(last[last >= 0] + 1, minlength=n_tokens + 1)[:n_tokens]
    return ((last >= 0).long() - dropped).cumsum(0)


@lru_cache(maxsize=64)
def n_slots(pattern: Pattern, max_len: int) -> int:
    """Slots that a cache for ``max_len`` tokens needs: the most tokens that are live at one time."""
    return int(live_tokens(pattern, max_len).max())


@dataclass(frozen=True)
class SlotAllocation:
    """For each position the slot of its token, and how many slots are ``used`` by then.

    ``first_reuse`` is the first position whose token takes a slot that was taken before.
    """

    slots: Int[Tensor, "n"]
    used: Int[Tensor, "n"]
    first_reuse: int


@lru_cache(maxsize=64)
def allocate_slots(pattern: Pattern, max_len: int) -> SlotAllocation:
    """A slot for every token: the first whose token has been read for the last time, or a new one."""
    slots: list[int] = []
    used: list[int] = []
    free: list[int] = []
    n_used, first_reuse = 0, max_len
    ends: dict[int, list[int]] = {}  # last reader -> slots
    for position, last in enumerate(pattern.last_readers(max_len).tolist()):
        for slot in ends.pop(position - 1, ()):
            heappush(free, slot)
        if free:
            slot, first_reuse = heappop(free), min(first_reuse, position)
        else:
            slot, n_used = n_used, n_used + 1
        ends.setdefault(last, []).append(slot)
        slots.append(slot)
        used.append(n_used)
    return SlotAllocation(torch.tensor(slots), torch.tensor(used), first_reuse)


class PatternCache(SlotCache):
    """Keys and values of the tokens that a later token will attend to, in the slots of ``allocate_slots``."""

    def __init__(
        self,
        batch: int,
        n_heads: int,
        max_len: int,
        head_dim: int,
        pattern: Pattern,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.pattern, self.allocation = pattern, allocate_slots(pattern, max_len)
        sizes = (batch, n_heads, n_slots(pattern, max_len), head_dim, max_len, self.allocation.first_reuse)
        super().__init__(*sizes, dtype, device)
        self.slot_of = self.allocation.slots.to(device)

    def slots(self, positions: Int[Tensor, "#B T"]) -> Int[Tensor, "#B T"]:
        return self.slot_of[positions]

    def used(self, length: int) -> int:
        if torch.compiler.is_compiling():  # one graph for all lengths: empty slots are masked
            return self.n_slots
        return int(self.allocation.used[length - 1])
