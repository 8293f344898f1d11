"""Attention to few of the keys: queries in blocks, each over the columns that at least one of them sees.

What is not seen is not computed: no matrix of T x S scores comes into being, masked or not.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvlearn.attention.cache import KV
from kvlearn.attention.core import grouped_attention

# q (B, H, C, D), keys and values (B, G, n, D), mask (1, 1, C, n) or None for all -> (B, H, C, D).
AttendMasked = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@runtime_checkable
class Sight(Protocol):
    """Who sees whom, by positions, among tokens that do not lie in the future."""

    def sees(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Whether the query at each position attends to the key at each, for keys at or before it."""

    def columns(self, first: int, last: int) -> Int[Tensor, "n"]:
        """The positions that at least one of the queries first … last attends to, in order."""


def attend_columns(
    q: Float[Tensor, "B H T D"],
    kv: KV,
    sight: Sight,
    block: int,
    attend: AttendMasked = grouped_attention,
) -> Float[Tensor, "B H T _"]:
    """Each query over the keys it sees, ``block`` queries at a time: O(T · columns of a block) time.

    Keys lie in the order of their positions, empty slots first; for a single query in any order. A query that
    sees nothing gets 0. Rows of a batch that stand at different places are done one by one.
    """
    positions, places = kv.positions, kv.places
    if max(len(positions), len(places)) > 1:
        stand, lie = positions.expand(len(q), -1), places.expand(len(q), -1)
        rows = zip(q.split(1), kv.k.split(1), kv.v.split(1), stand.split(1), lie.split(1), strict=True)
        return torch.cat([attend_columns(row, KV(*its), sight, block, attend) for row, *its in rows])
    if q.shape[2] == 1:
        columns = allowed(sight, positions[0], places[0])[0].nonzero()[:, 0]
        return attend(q, *_take(kv, columns), None)
    outs = []
    for here, queries in zip(positions[0].split(block), q.split(block, dim=2), strict=True):
        wanted = sight.columns(int(here[0]), int(here[-1])).to(places.device)
        columns = torch.searchsorted(places[0].contiguous(), wanted)
        mask = allowed(sight, here, places[0, columns])
        outs.append(attend(queries, *_take(kv, columns), mask[None, None]))
    return torch.cat(outs, dim=2)


def allowed(sight: Sight, queries: Int[Tensor, "T"], keys: Int[Tensor, "S"]) -> Bool[Tensor, "T S"]:
    """The mask: seen, not in the future, and there at all."""
    i, j = queries[:, None], keys[None]
    return (j >= 0) & (j <= i) & sight.sees(i, j)


def _take(kv: KV, columns: Int[Tensor, "n"]) -> tuple[Tensor, Tensor]:
    """These columns of keys and values: a view where they are neighbours, else a copy."""
    n = len(columns)
    if n and int(columns[-1] - columns[0]) == n - 1 and bool((columns.diff() == 1).all()):
        first = int(columns[0])
        return kv.k[:, :, first : first + n], kv.v[:, :, first : first + n]
    return kv.k[:, :, columns], kv.v[:, :, columns]
