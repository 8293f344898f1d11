"""05.5: the mistakes that people make about which blocks may be picked, and by whom."""

import torch
from torch import Tensor

from kvlearn.grading.units.sparse_attention.select import EXERCISE

__all__ = ["EXERCISE"]


def means(k: Tensor, block: int) -> Tensor:
    """The mean of each block (B, H, N, D), of a half-filled one that of its keys."""
    return torch.stack([part.mean(2) for part in k.split(block, dim=2)], dim=2)


def places(scores: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The own block of each query (T, 1), and the numbers of all (N,)."""
    return (torch.arange(scores.shape[2]) // block)[:, None], torch.arange(scores.shape[3])


def best(scores: Tensor, allowed: Tensor, n: int) -> Tensor:
    """True at the n best of those allowed; of equals the earlier."""
    order = scores.masked_fill(~allowed, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., : max(n, 0)], True)
    return chosen & allowed


def by_scores(scores: Tensor, block: int, n_blocks: int) -> Tensor:
    """The right choice, once every block has a score (B, H, T, N)."""
    own, index = places(scores, block)
    return best(scores, index < own, n_blocks - 1) | (index == own)


def scores_of(q: Tensor, k: Tensor, block: int) -> Tensor:
    return q @ means(k, block).mT


def right(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    return by_scores(scores_of(q, k, block), block, n_blocks)


@EXERCISE.misconception("the own block not forced")
def not_forced(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The own block competes by its mean, like the others. So a query may lose its nearest neighbours, and
    the mean holds keys of tokens that come after it: a look into the future. The own block is picked always
    and scored never."""
    scores = scores_of(q, k, block)
    own, index = places(scores, block)
    return best(scores, index <= own, n_blocks)


@EXERCISE.misconception("later blocks compete too")
def no_mask(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The blocks behind the query were scored like those before it. In training it reads what it is to
    predict; in decode they are not there. Hide every block but those before the own one."""
    scores = scores_of(q, k, block)
    own, index = places(scores, block)
    return best(scores, index != own, n_blocks - 1) | (index == own)


@EXERCISE.misconception("hidden blocks at 0 in place of −∞")
def hidden_at_zero(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The scores of the blocks that must not be picked were multiplied by 0. Scores can be negative, and then
    a 0 wins. Hide with −∞."""
    scores = scores_of(q, k, block)
    own, index = places(scores, block)
    everywhere = torch.ones_like(scores, dtype=torch.bool)
    return best(scores * (index < own), everywhere, n_blocks - 1) | (index == own)


@EXERCISE.misconception("hidden blocks picked where there are too few others")
def hidden_picked(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """A query with fewer than n_blocks − 1 blocks before it was filled up with blocks at −∞: later ones. topk
    gives as many as it is asked for, however bad they are. Take out again what is not allowed."""
    scores = scores_of(q, k, block)
    own, index = places(scores, block)
    hidden = scores.masked_fill(index >= own, -torch.inf)
    order = hidden.sort(dim=-1, descending=True, stable=True).indices[..., : n_blocks - 1]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True) | (index == own)


@EXERCISE.misconception("n_blocks besides the own one")
def one_too_many(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """n_blocks of the earlier blocks were picked, and the own one on top. n_blocks counts it: n_blocks − 1
    others."""
    return right(q, k, block, n_blocks + 1)


@EXERCISE.misconception("the own block counted twice")
def one_too_few(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The best n_blocks − 1 were picked with the own one among the candidates, at +∞ say, so it used up a
    place, though n_blocks − 1 had left one out for it already. Set it aside first, then take the best
    n_blocks − 1 of the others."""
    return right(q, k, block, max(n_blocks - 1, 1))


@EXERCISE.misconception("the nearest blocks in place of the best")
def nearest(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The blocks just before the own one were picked, whatever is in them. That is a sliding window; here the
    query's score decides."""
    own, index = places(scores_of(q, k, block), block)
    return ((index <= own) & (own - index < n_blocks)).expand(*q.shape[:2], -1, -1)


@EXERCISE.misconception("the block just before never picked")
def skips_previous(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The candidates end one block too early: the block just before the own one was left out. It is complete,
    and all of it lies in the past: c < own."""
    scores = scores_of(q, k, block)
    own, index = places(scores, block)
    return best(scores, index < own - 1, n_blocks - 1) | (index == own)


@EXERCISE.misconception("a block that the query completes competes")
def completed_by_itself(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """For the last query of a block the own block is complete, and it was scored with the others: if it wins,
    one of them is left out, since it is picked anyway. Candidates are the blocks *before* the own one."""
    scores = scores_of(q, k, block)
    own, index = places(scores, block)
    complete = (index + 1) * block <= torch.arange(q.shape[2])[:, None] + 1
    return best(scores, complete, n_blocks - 1) | (index == own)


@EXERCISE.misconception("one choice for all heads")
def heads_mixed(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The scores were added up over the heads, and all heads pick the same blocks. Each head looks for
    something else: the choice is made for each by itself. (Some designs do share it, to read less; not this
    one.)"""
    scores = scores_of(q, k, block).sum(1, keepdim=True).expand(-1, q.shape[1], -1, -1)
    return by_scores(scores, block, n_blocks)


@EXERCISE.misconception("one choice for the whole batch")
def batch_mixed(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The first sequence's choice was used for all. The sequences of a batch have nothing to do with each
    other."""
    return right(q, k, block, n_blocks)[:1].expand(len(q), -1, -1, -1)


@EXERCISE.misconception("one choice for a block of queries, by their mean")
def pooled_queries(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The queries of a block were averaged, and all of them pick the same. The mean holds queries that come
    later, so a choice depends on what is not there yet; in decode, one token at a time, it would come out
    otherwise."""
    pooled = means(q, block).repeat_interleave(block, dim=2)[:, :, : q.shape[2]]
    return right(pooled, k, block, n_blocks)


@EXERCISE.misconception("the last query of a block chooses for all")
def last_query(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The choice of a block's last query was given to all of them: to those before it, it is the future.
    Every query chooses for itself."""
    ends = (torch.arange(q.shape[2]) // block * block + block - 1).clamp_max(q.shape[2] - 1)
    return right(q[:, :, ends], k, block, n_blocks)


@EXERCISE.misconception("the first query of a block chooses for all")
def first_query(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The choice of a block's first query was given to the whole block. It sees nothing of the future, but
    asked for is the choice of each query by itself."""
    return right(q[:, :, torch.arange(q.shape[2]) // block * block], k, block, n_blocks)
