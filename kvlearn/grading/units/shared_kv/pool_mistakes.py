"""02.3: the mistakes that people make when they pool heads: which rows are averaged with which."""

import torch
from torch import Tensor

from kvlearn.grading.units.shared_kv.pool import EXERCISE

__all__ = ["EXERCISE"]


def heads(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """(G, R, D, M): pools, heads of a pool, rows, columns."""
    if n_heads % n_kv_heads:
        raise ValueError(f"n_kv_heads: expected a divisor of {n_heads}, got {n_kv_heads}")
    return weight.unflatten(0, (n_kv_heads, n_heads // n_kv_heads, -1))


def right(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    return heads(weight, n_heads, n_kv_heads).mean(1).flatten(0, 1)


@EXERCISE.misconception("the first head of each pool")
def first(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """One head of each pool was kept and the others thrown away. That is a way to convert a model, and the
    paper tried it: the mean of the pool keeps something of every head, and the model recovers better."""
    return heads(weight, n_heads, n_kv_heads)[:, 0].flatten(0, 1)


@EXERCISE.misconception("the last head of each pool")
def last(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """Only the last head of each pool is left: does a loop write over what it wrote before? Add the heads up
    and divide by their number."""
    return heads(weight, n_heads, n_kv_heads)[:, -1].flatten(0, 1)


@EXERCISE.misconception("the sum of a pool")
def summed(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """The heads were added and not divided by their number. Keys R times too long make scores R times too
    large, and values R times too large swamp what comes after: take the mean."""
    return heads(weight, n_heads, n_kv_heads).sum(1).flatten(0, 1)


@EXERCISE.misconception("divided by the number of pools")
def divided_by_pools(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """The sum of a pool was divided by G, the number of pools. A mean divides by what was added up: the
    R = H/G heads of one pool."""
    return heads(weight, n_heads, n_kv_heads).sum(1).flatten(0, 1) / n_kv_heads


@EXERCISE.misconception("divided by √R")
def root(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """The sum was divided by the root of R. That would keep the size of heads that have nothing in common;
    the recipe is the plain mean, which leaves a pool of equal heads as they are."""
    pools = heads(weight, n_heads, n_kv_heads)
    return pools.sum(1).flatten(0, 1) / pools.shape[1] ** 0.5


@EXERCISE.misconception("every G-th head in one pool")
def strided(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """The heads were cut as (R, G), so heads 0, G, 2·G … make a pool. A pool belongs to neighbours: the
    queries that will read it are heads g·R to (g+1)·R − 1. Cut as (G, R), and average over the R."""
    heads(weight, n_heads, n_kv_heads)
    return weight.unflatten(0, (n_heads // n_kv_heads, n_kv_heads, -1)).mean(0).flatten(0, 1)


@EXERCISE.misconception("every pool the mean of all heads")
def all_heads(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """All heads were averaged, and the result is there G times over. With G pools each takes the mean of its
    own R neighbours, so that what was different in the model stays different."""
    pools = heads(weight, n_heads, n_kv_heads)
    return pools.mean((0, 1)).repeat(n_kv_heads, 1)


@EXERCISE.misconception("neighbouring rows averaged, not heads")
def rows(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """R neighbouring *rows* were averaged, and most of those lie within one head. Row d is to be averaged
    with row d of the other heads, D rows further on: give the heads a dimension of their own first, (G, R,
    D, M)."""
    R = heads(weight, n_heads, n_kv_heads).shape[1]
    return weight.unflatten(0, (-1, R)).mean(1)


@EXERCISE.misconception("heads and rows interleaved")
def interleaved(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """The rows were cut as (D, H), as if the heads took turns. nn.Linear's outputs come head by head: all D
    rows of head 0, then head 1. Cut as (H, D), and then the H as (G, R)."""
    R = heads(weight, n_heads, n_kv_heads).shape[1]
    return weight.unflatten(0, (-1, n_kv_heads, R)).mean(2).transpose(0, 1).flatten(0, 1)


@EXERCISE.misconception("columns averaged, not rows")
def columns(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """The weight was taken for (inputs, outputs), so the model's own channels were averaged. nn.Linear keeps
    (outputs, inputs) and computes x Wᵀ: a head is a block of D *rows*."""
    return right(weight.T, n_heads, n_kv_heads).T


@EXERCISE.misconception("the result transposed")
def transposed(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """The numbers are right, and the result is (M, G·D). It is to be the weight of an nn.Linear again:
    (outputs, inputs), so (G·D, M)."""
    return right(weight, n_heads, n_kv_heads).T


@EXERCISE.misconception("the heads left apart")
def unflattened(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """The numbers are right, and the result is (G, D, M). A weight has two dimensions: join the heads and
    their rows, (G·D, M)."""
    return heads(weight, n_heads, n_kv_heads).mean(1)


@EXERCISE.misconception("averaged, but as many heads as before")
def not_smaller(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """Every head was replaced by the mean of its pool, and there are still H of them. The cache would hold R
    equal copies of each key: keep one a pool, (G·D, M)."""
    pools = heads(weight, n_heads, n_kv_heads)
    return pools.mean(1, keepdim=True).expand_as(pools).flatten(0, 2)


@EXERCISE.misconception("pool size and number of pools mixed up")
def swapped(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """n_kv_heads heads were put into each pool, which leaves H/G pools. n_kv_heads is how many pools there
    are in the end; each takes H / n_kv_heads heads."""
    R = heads(weight, n_heads, n_kv_heads).shape[1]
    return right(weight, n_heads, R)


@EXERCISE.misconception("the trained weight overwritten")
def overwritten(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """The result is right, but the given weight was changed on the way: a view shares its memory, so writing
    to one (`+=`, `mul_`, `[...] =`) writes to the checkpoint. Comparing the converted model with the trained
    one is then no longer possible. Make a new tensor."""
    pooled = right(weight, n_heads, n_kv_heads)
    weight[: len(pooled)] = pooled
    return pooled


@EXERCISE.misconception("heads left over are dropped")
def dropped(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """H // G heads went into each pool, and where that leaves a rest those heads vanished without a word. Six
    heads and four pools is a mistake of whoever asks: raise ValueError."""
    R = max(n_heads // n_kv_heads, 1)
    D = len(weight) // n_heads
    kept = weight[: R * n_kv_heads * D]
    return torch.stack([pool.unflatten(0, (-1, D)).mean(0) for pool in kept.split(R * D)]).flatten(0, 1)
