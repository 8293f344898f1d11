"""Attention by a pattern, in an order in which neighbouring queries need the same columns."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvlearn.attention.cache import KV
from kvlearn.attention.columns import Sight, attend_columns
from kvlearn.attention.core import Partial, grouped_partial, merge_all
from kvlearn.attention.sparse.pattern import Pattern, Union, words
from kvlearn.attention.sparse.words import Strided


def attend_pattern(
    q: Float[Tensor, "B H T D"], kv: KV, pattern: Pattern, block: int
) -> Float[Tensor, "B H T D"]:
    """Every query over the keys that the pattern lets it see; of the others, some columns of a block at most.

    Neighbours need the same columns, but not by a stride: there those do that stand a stride apart. So the
    strided words are done by themselves, in that order, and merged with the rest (core.py: ``merge``).
    """
    strided = [word for word in words(pattern) if isinstance(word, Strided)]
    rows_differ = max(len(kv.positions), len(kv.places)) > 1
    if not strided or rows_differ or q.shape[2] == 1:
        return attend_columns(q, kv, pattern, block)
    done = [word for word in words(pattern) if not isinstance(word, Strided)]
    parts = [_partial(q, kv, Union(tuple(done)), block)] if done else []
    for word in strided:
        parts.append(_by_stride(q, kv, Unseen(word, tuple(done)), block))
        done.append(word)
    return merge_all(parts).out.to(q.dtype)


@dataclass(frozen=True)
class Unseen:
    """What a strided word shows to tokens that stand a stride apart, and none of ``others`` shows them."""

    word: Strided
    others: tuple[Pattern, ...]

    def sees(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        seen = self.word.sees(queries, keys)
        return seen & ~Union(self.others).sees(queries, keys) if self.others else seen

    def columns(self, first: int, last: int) -> Int[Tensor, "n"]:
        return torch.arange(first % self.word.stride, last + 1, self.word.stride)


def _by_stride(q: Tensor, kv: KV, unseen: Unseen, block: int) -> Partial:
    """One class of tokens after the other, put back into the order of time."""
    stride, order, parts = unseen.word.stride, [], []
    for first in range(stride):
        mine, its = ((x[0] % stride == first).nonzero()[:, 0] for x in (kv.positions, kv.places))
        if len(mine):
            share = KV(kv.k[:, :, its], kv.v[:, :, its], kv.positions[:, mine], kv.places[:, its])
            parts.append(_partial(q[:, :, mine], share, unseen, block))
            order.append(mine)
    back = torch.cat(order).argsort()
    return Partial(*(torch.cat(each, dim=2)[:, :, back] for each in zip(*parts, strict=True)))


def _partial(q: Tensor, kv: KV, sight: Sight, block: int) -> Partial:
    """``attend_columns`` with the log-sum-exp, which travels as one more column of the output."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out, lse = grouped_partial(q, k, v, mask)
        return torch.cat((out, lse[..., None]), dim=-1)

    both = attend_columns(q, kv, sight, block, attend)
    return Partial(both[..., :-1], both[..., -1])
