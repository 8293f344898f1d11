"""02.4: the mistakes that people make when they harden a routing: who chooses, what is numbered, what
goes."""

from typing import Any

import torch
from torch import Tensor

from kvlearn.grading.units.shared_kv.route import EXERCISE

__all__ = ["EXERCISE"]

Hard = tuple[Any, Any]


def right(logits: Tensor) -> tuple[Tensor, Tensor]:
    kept, route = torch.unique(logits.argmax(1), return_inverse=True)
    return route, kept


def right_pools(weight: Tensor, kept: Tensor, head_dim: int) -> Tensor:
    return weight.unflatten(0, (-1, head_dim))[kept].flatten(0, 1)


@EXERCISE.misconception("the pools choose, not the heads", keep_pools=right_pools)
def over_heads(logits: Tensor) -> Hard:
    """The argmax runs over the heads (dimension 0), so each pool chooses a head, and the result has G
    entries. Every *query head* needs exactly one pool: the largest of its own row, `argmax(dim=1)`."""
    kept, route = torch.unique(logits.argmax(0), return_inverse=True)
    return route, kept


@EXERCISE.misconception("the old pool numbers in route", keep_pools=right_pools)
def not_renumbered(logits: Tensor) -> Hard:
    """`route` holds the numbers that the pools had before. The cache keeps U pools now, numbered 0 … U−1:
    pool 7 of 8 may be the second one there, and index 7 reads past the end, or another head's keys. Give each
    pool's place in `kept`."""
    chosen = logits.argmax(1)
    return chosen, chosen.unique()


@EXERCISE.misconception("no pool is dropped", keep_pools=right_pools)
def nothing_dropped(logits: Tensor) -> Hard:
    """All pools are kept, those too that no head reads. The routing is hard then, but the cache is as large
    as before: dropping what nobody reads is what the exercise is about."""
    return logits.argmax(1), torch.arange(logits.shape[1])


@EXERCISE.misconception("a pool for every head", keep_pools=right_pools)
def one_each(logits: Tensor) -> Hard:
    """`kept` lists the choice of each head, the same pool as often as heads choose it. Each head finds its
    own, but a pool that three heads share would be stored three times: list every pool once,
    `torch.unique`."""
    chosen = logits.argmax(1)
    return torch.arange(len(chosen)), chosen


@EXERCISE.misconception("kept as a mask", keep_pools=right_pools)
def as_mask(logits: Tensor) -> Hard:
    """`kept` says for each pool whether it stays, one boolean each. Asked for are the pools' numbers:
    `mask.nonzero().flatten()`."""
    route, kept = right(logits)
    mask = torch.zeros(logits.shape[1], dtype=torch.bool)
    mask[kept] = True
    return route, mask


@EXERCISE.misconception("pools in the order in which heads choose them", keep_pools=right_pools)
def first_come(logits: Tensor) -> Hard:
    """`kept` lists the pools as they come up, head by head. Each head still finds its own, but whoever stores
    such a model and loads it by another rule mixes up the pools. Ascending order, as asked for, needs no
    agreement: `torch.unique` sorts."""
    chosen = logits.argmax(1).tolist()
    kept = list(dict.fromkeys(chosen))
    return torch.tensor([kept.index(pool) for pool in chosen]), torch.tensor(kept)


@EXERCISE.misconception("the most popular pool first", keep_pools=right_pools)
def by_popularity(logits: Tensor) -> Hard:
    """`kept` lists the pools by the number of heads that choose them (as Counter.most_common does). Each head
    still finds its own pool, but the order asked for is ascending by the pools' numbers."""
    chosen = logits.argmax(1).tolist()
    kept = sorted(set(chosen), key=lambda pool: (-chosen.count(pool), -pool))
    return torch.tensor([kept.index(pool) for pool in chosen]), torch.tensor(kept)


@EXERCISE.misconception("ties to the highest pool", keep_pools=right_pools)
def highest(logits: Tensor) -> Hard:
    """Of equal logits the last one won (a comparison with >=, or a sort). Asked for is the lowest. Ties are
    no rarity: logits that start at zero are all equal, and two programs that load the same model must
    agree."""
    last = logits.shape[1] - 1 - logits.flip(1).argmax(1)
    kept, route = torch.unique(last, return_inverse=True)
    return route, kept


@EXERCISE.misconception("every pool above the average kept", keep_pools=right_pools)
def above_average(logits: Tensor) -> Hard:
    """A pool was kept as soon as some head gives it more than 1/G of its softmax. A hard head reads one pool
    and no other, so a second choice, however close, is stored for nobody."""
    kept = (logits.softmax(1) > 1 / logits.shape[1]).any(0).nonzero().flatten()
    return torch.searchsorted(kept, logits.argmax(1)), kept


@EXERCISE.misconception("heads sent to pools they did not choose", keep_pools=right_pools)
def popular_only(logits: Tensor) -> Hard:
    """Only pools with a large total weight were kept, and heads whose own pool is not among them were sent to
    another. That would be a second decision, which the training has not seen: here a pool goes only if *no*
    head chooses it."""
    total = logits.softmax(1).sum(0)
    kept = (total >= total.mean()).nonzero().flatten()
    return logits[:, kept].argmax(1), kept


@EXERCISE.misconception("pools of equal size", keep_pools=right_pools)
def balanced(logits: Tensor) -> Hard:
    """Every pool was given the same number of heads, as GQA has it. A learned routing is free: all heads may
    choose one pool and none another, and that is how pools fall away."""
    H, G = logits.shape
    route = torch.arange(H) * G // H
    return route, torch.arange(G)


@EXERCISE.misconception("the smallest logit", keep_pools=right_pools)
def smallest(logits: Tensor) -> Hard:
    """Each head was sent to the pool with its smallest logit. A logit is a score, the larger the better: the
    softmax gives that pool the most weight."""
    return right(-logits)


@EXERCISE.misconception("route one-hot", keep_pools=right_pools)
def one_hot(logits: Tensor) -> Hard:
    """`route` came as a matrix with a 1 in each row. As a factor in a product it would still touch every pool
    for every head; a number a head is enough: `argmax(dim=1)` of that matrix."""
    route, kept = right(logits)
    return torch.nn.functional.one_hot(route), kept


@EXERCISE.misconception("how many pools, not which", keep_pools=right_pools)
def how_many(logits: Tensor) -> Hard:
    """`kept` is the number of pools that stay. Which ones they are must be known too, or their weights cannot
    be found: list their numbers."""
    route, kept = right(logits)
    return route, len(kept)


@EXERCISE.misconception("kept and route the other way round", keep_pools=right_pools)
def other_way_round(logits: Tensor) -> Hard:
    """The pair came as (kept, route). torch.unique returns the values first and their inverse second; asked
    for is (route, kept)."""
    route, kept = right(logits)
    return kept, route


@EXERCISE.misconception("rows in place of pools", harden=right)
def single_rows(weight: Tensor, kept: Tensor, head_dim: int) -> Tensor:
    """`weight[kept]` takes single rows, one of each pool. A pool is a block of head_dim rows: give the pools
    a dimension of their own first, (G, D, M)."""
    return weight[kept]


@EXERCISE.misconception("the pools left apart", harden=right)
def unflattened(weight: Tensor, kept: Tensor, head_dim: int) -> Tensor:
    """The numbers are right, and the result is (U, D, M). It is to be the weight of an nn.Linear again: join
    the pools and their rows, (U·D, M)."""
    return weight.unflatten(0, (-1, head_dim))[kept]


@EXERCISE.misconception("pools and rows interleaved", harden=right)
def interleaved(weight: Tensor, kept: Tensor, head_dim: int) -> Tensor:
    """The rows were cut as (D, G), as if the pools took turns. nn.Linear's outputs come pool by pool: all D
    rows of pool 0, then pool 1. Cut as (G, D)."""
    return weight.unflatten(0, (head_dim, -1))[:, kept].flatten(0, 1)


@EXERCISE.misconception("the first U pools", harden=right)
def first_pools(weight: Tensor, kept: Tensor, head_dim: int) -> Tensor:
    """As many pools were kept as there are numbers in `kept`, but the first ones, whichever they are. Take
    those that are named."""
    return weight[: len(kept) * head_dim]


@EXERCISE.misconception("unused pools set to zero", harden=right)
def zeroed(weight: Tensor, kept: Tensor, head_dim: int) -> Tensor:
    """The other pools' rows are zeros now, and still there: they would be computed, stored and read as zeros.
    A cache shrinks only if its tensors do, (U·D, M)."""
    out = torch.zeros_like(weight).unflatten(0, (-1, head_dim))
    out[kept] = weight.unflatten(0, (-1, head_dim))[kept]
    return out.flatten(0, 1)
