"""05.5: the mistakes that people make about what a block is worth, and in what form the choice comes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.grading.units.sparse_attention.select_mistakes import (
    EXERCISE,
    best,
    by_scores,
    means,
    places,
    right,
    scores_of,
)

__all__ = ["EXERCISE"]


@EXERCISE.misconception("the worst blocks")
def worst(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The lowest scores were picked (a sort ascends where nothing else is said). The larger q · mean, the
    more the query will find there: descending=True."""
    return right(-q, k, block, n_blocks)


@EXERCISE.misconception("ties to the later block")
def later_wins(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """Of equal scores the later block was picked. Asked for is the earlier one. Equal scores are no rarity (a
    text may repeat itself), and prefill and decode must pick the same."""
    scores = scores_of(q, k, block).flip(-1)
    own, index = places(scores, block)
    return best(scores, (index < own).flip(-1), n_blocks - 1).flip(-1) | (index == own)


@EXERCISE.misconception("the first key for the block")
def first_key(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The block was scored by its first key (`k[:, :, ::block]`). It stands for itself only; the mean of all
    its keys is asked for."""
    return by_scores(q @ k[:, :, ::block].mT, block, n_blocks)


@EXERCISE.misconception("the last key for the block")
def last_key(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The block was scored by its last key. It stands for itself only; the mean of all its keys is asked
    for."""
    ends = torch.stack([part[:, :, -1] for part in k.split(block, dim=2)], dim=2)
    return by_scores(q @ ends.mT, block, n_blocks)


@EXERCISE.misconception("the largest of each number in place of the mean")
def largest(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The keys of a block were pooled by their maximum, number by number. Asked for is the mean: `.mean`, not
    `.amax`."""
    tops = torch.stack([part.amax(2) for part in k.split(block, dim=2)], dim=2)
    return by_scores(q @ tops.mT, block, n_blocks)


@EXERCISE.misconception("the best single key of the block")
def best_key(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """Every key was scored, and a block was worth as much as its best one. That may choose better, but reads
    all keys to decide which to read, and nothing is saved. One product with the mean is all there is."""
    tops = [part.amax(-1) for part in (q @ k.mT).split(block, dim=-1)]
    return by_scores(torch.stack(tops, dim=-1), block, n_blocks)


@EXERCISE.misconception("the size of the score without its sign")
def absolute(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The absolute value was compared. A very negative score means that the query turns away from the block;
    it gets hardly any weight there."""
    return by_scores(scores_of(q, k, block).abs(), block, n_blocks)


@EXERCISE.misconception("means brought to length 1")
def cosine(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The means were normalised, so that only their direction counts. Attention's own scores grow with the
    length of a key, and so do the blocks': q · mean as it is."""
    return by_scores(q @ F.normalize(means(k, block), dim=-1).mT, block, n_blocks)


@EXERCISE.misconception("every so many-th token in one block")
def interleaved(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The keys were cut as (block, N) and not as (N, block), so a block's mean is that of tokens spread over
    the whole text, later ones too. Neighbours form a block: unflatten(2, (N, block)), the blocks in front."""
    n = k.shape[2] // block
    if not n:
        return right(q, k, block, n_blocks)
    mixed = k[:, :, : n * block].unflatten(2, (block, n)).mean(2)
    scores = F.pad(q @ mixed.mT, (0, -(-k.shape[2] // block) - n))
    return by_scores(scores, block, n_blocks)


@EXERCISE.misconception("blocks by number in place of a mask")
def as_indices(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """The numbers of the picked blocks came back. Asked for is True or False for each block: rows with fewer
    candidates have no number to put into the last places."""
    scores = scores_of(q, k, block)
    own, index = places(scores, block)
    hidden = scores.masked_fill(index > own, -torch.inf).masked_fill(index == own, torch.inf)
    return hidden.sort(dim=-1, descending=True, stable=True).indices[..., :n_blocks]


@EXERCISE.misconception("no column for the half-filled block")
def no_last_column(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    """There are T // block columns, so the tokens of a half-filled last block have no own block. There are
    ⌈T / block⌉: the last one has no mean, and is picked by its own queries all the same."""
    return right(q, k, block, n_blocks)[..., : q.shape[2] // block]
