"""Attention to few of the keys: queries in blocks, each over the columns that at least one of them sees.

What is not seen is not computed: no matrix of T x S scores comes into being, masked or not.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

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
        each = (q, kv.k, kv.v, positions.expand(len(q), -1), places.expand(len(q), -1))
        rows = zip(*(x.split(1) for x in each), strict=True)
        return torch.cat([attend_columns(row, KV(*its), sight, block, attend) for row, *its in rows])
    if q.shape[2] == 1:
        seen = allowed(sight, positions[0], places[0])[0].nonzero()[:, 0]
        return attend(q, *_take(kv, seen), None)
    stand, lie = positions[0].split(block), places[0].contiguous()
    wanted = (sight.columns(int(here[0]), int(here[-1])).to(lie.device) for here in stand)
    columns = [torch.searchsorted(lie, keys) for keys in wanted]
    blocks = zip(q.split(block, dim=2), stand, columns, _each(kv, columns), strict=True)
    outs = [attend(q, *kv, allowed(sight, here, lie[at])[None, None]) for q, here, at, kv in blocks]
    return torch.cat(outs, dim=2)


def allowed(sight: Sight, queries: Int[Tensor, "T"], keys: Int[Tensor, "S"]) -> Bool[Tensor, "T S"]:
    """The mask: seen, not in the future, and there at all."""
    i, j = queries[:, None], keys[None]
    return (j >= 0) & (j <= i) & sight.sees(i, j)


def _each(kv: KV, columns: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values at each of ``columns``, one after the other; all at once where gradients will come."""
    if torch.is_grad_enabled() and (kv.k.requires_grad or kv.v.requires_grad):
        yield from zip(Taken.apply(kv.k, columns), Taken.apply(kv.v, columns), strict=True)
    else:
        yield from (_take(kv, at) for at in columns)


class Taken(torch.autograd.Function):
    """Runs of columns of one tensor, whose gradients are added into one tensor as long as the text.

    Taken one by one, each would have a gradient of that length, nearly all zeros: O(T²) bytes to add up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: list[Tensor]) -> tuple[Tensor, ...]:
        ctx.columns, ctx.shape = [_slice(at) for at in columns], x.shape
        return tuple(x[:, :, at] for at in ctx.columns)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].new_zeros(ctx.shape)
        for at, grad in zip(ctx.columns, grads, strict=True):
            total[:, :, at] += grad
        return total, None


def _take(kv: KV, columns: Int[Tensor, "n"]) -> tuple[Tensor, Tensor]:
    at = _slice(columns)
    return kv.k[:, :, at], kv.v[:, :, at]


def _slice(columns: Int[Tensor, "n"]) -> slice | Int[Tensor, "n"]:
    """The same columns, as a slice where they are neighbours: a view then, and else a copy."""
    n = len(columns)
    if n and int(columns[-1] - columns[0]) == n - 1 and bool((columns.diff() == 1).all()):
        return slice(int(columns[0]), int(columns[0]) + n)
    return columns
