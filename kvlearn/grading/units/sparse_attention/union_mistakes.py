"""05.3: the mistakes that people make with one softmax over many blocks, and how it is cut into pieces."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvlearn.grading.units.sparse_attention.union import EXERCISE, Lists

__all__ = ["EXERCISE"]

Hide = Callable[[Tensor, Tensor], Tensor]  # positions of queries (r, 1) and keys (1, c) -> hidden


@dataclass
class Piece:
    """A block of queries: for each listed block the scores (B, H, r, c), hidden ones at −∞, and the
    values."""

    scores: list[Tensor]
    values: list[Tensor]

    def attend(self) -> Tensor:
        return torch.cat(self.scores, -1).softmax(-1) @ torch.cat(self.values, 2)


def later(i: Tensor, j: Tensor) -> Tensor:
    return j > i


def pieces(
    q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int, hide: Hide = later, scale: float | None = None
) -> list[Piece]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    positions, made = torch.arange(q.shape[2]), []
    for own, chosen in enumerate(blocks):
        rows = slice(own * block, (own + 1) * block)
        piece = Piece([], [])
        for other in chosen:
            columns = slice(other * block, (other + 1) * block)
            scores = q[:, :, rows] @ k[:, :, columns].mT * scale
            hidden = hide(positions[rows, None], positions[None, columns])
            piece.scores.append(scores.masked_fill(hidden, -torch.inf))
            piece.values.append(v[:, :, columns])
        made.append(piece)
    return made


def attend_all(made: list[Piece]) -> Tensor:
    return torch.cat([piece.attend() for piece in made], dim=2)


def each(made: list[Piece], join: Callable[[list[Tensor], list[Tensor]], Tensor]) -> Tensor:
    return torch.cat([join(piece.scores, piece.values) for piece in made], dim=2)


@EXERCISE.misconception("a softmax for each block, then the mean")
def mean_of_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """Each listed block got a softmax of its own, and the outputs were averaged. So a block with nothing
    worth reading weighs as much as the best one. There is one softmax over all listed tokens; pieces can only
    be merged by their sums of exponentials (unit 01, `merge`)."""

    def join(scores: list[Tensor], values: list[Tensor]) -> Tensor:
        return torch.stack([s.softmax(-1) @ x for s, x in zip(scores, values, strict=True)]).mean(0)

    return each(pieces(q, k, v, blocks, block), join)


@EXERCISE.misconception("a softmax for each block, then the sum")
def sum_of_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """Each listed block got a softmax of its own, and the outputs were added up. The weights of a query add
    up to the number of its blocks, not to 1: one softmax over all listed tokens."""

    def join(scores: list[Tensor], values: list[Tensor]) -> Tensor:
        return torch.stack([s.softmax(-1) @ x for s, x in zip(scores, values, strict=True)]).sum(0)

    return each(pieces(q, k, v, blocks, block), join)


@EXERCISE.misconception("a maximum for each block that is never made up for")
def unscaled_sums(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """Each block's own maximum was taken off its scores, and then numerators and denominators were added up
    as they are. They are in different units then: a block's sums belong to its own maximum. Take one maximum
    over all of them, or multiply each by exp(its maximum − the common one)."""

    def join(scores: list[Tensor], values: list[Tensor]) -> Tensor:
        exps = [(s - s.amax(-1, keepdim=True)).exp() for s in scores]
        top = sum(e @ x for e, x in zip(exps, values, strict=True))
        bottom = sum(e.sum(-1, keepdim=True) for e in exps)
        return torch.as_tensor(top / bottom)

    return each(pieces(q, k, v, blocks, block), join)


@EXERCISE.misconception("blocks weighed by their best score alone")
def by_maximum(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """The blocks' outputs were merged with weights exp(maximum). A block with one good key and a block with
    four of them weigh the same then. The weight of a block is the *sum* of its exponentials."""

    def join(scores: list[Tensor], values: list[Tensor]) -> Tensor:
        best = torch.stack([s.amax(-1, keepdim=True) for s in scores]).softmax(0)
        outs = torch.stack([s.softmax(-1) @ x for s, x in zip(scores, values, strict=True)])
        return (best * outs).sum(0)

    return each(pieces(q, k, v, blocks, block), join)


@EXERCISE.misconception("the running maximum not made up for")
def no_rescaling(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """Block by block, with the largest score so far taken off: but when a later block raises the maximum, the
    sums that are there already must be multiplied by exp(old − new), and were not. So earlier blocks weigh
    too much (`online softmax`: rescale, then add)."""

    def join(scores: list[Tensor], values: list[Tensor]) -> Tensor:
        top, bottom = torch.zeros(()), torch.zeros(())
        best = torch.full_like(scores[0][..., :1], -torch.inf)
        for s, x in zip(scores, values, strict=True):
            best = torch.maximum(best, s.amax(-1, keepdim=True))
            exp = (s - best).exp()
            top, bottom = top + exp @ x, bottom + exp.sum(-1, keepdim=True)
        return top / bottom

    return each(pieces(q, k, v, blocks, block), join)


@EXERCISE.misconception("no maximum subtracted")
def raw_exponentials(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """exp was taken of the scores as they are. That overflows in fp32 beyond a score of 88, and where all are
    very negative the sum is 0 and the result 0/0. Take the row's maximum off first; the result is the
    same."""

    def join(scores: list[Tensor], values: list[Tensor]) -> Tensor:
        exp = torch.cat(scores, -1).exp()
        return exp @ torch.cat(values, 2) / exp.sum(-1, keepdim=True)

    return each(pieces(q, k, v, blocks, block), join)


@EXERCISE.misconception("everything computed, then masked")
def computed_and_masked(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """The numbers are right, and nothing was saved: all N·N scores were made and most of them thrown away,
    every key and value was read. (A value that is NaN shows it: 0 · NaN is NaN.) Gather the listed blocks
    first, and compute with those."""
    N = q.shape[2]
    seen = torch.zeros(N, N, dtype=torch.bool)
    for own, chosen in enumerate(blocks):
        for other in chosen:
            seen[own * block : (own + 1) * block, other * block : (other + 1) * block] = True
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen.tril(), -torch.inf)
    return scores.softmax(-1) @ v


@EXERCISE.misconception("the softmax over the queries")
def over_queries(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """The weights were divided among the queries of the block, dimension −2. Each query divides its own
    weight among the keys that it sees: dimension −1."""

    def join(scores: list[Tensor], values: list[Tensor]) -> Tensor:
        return torch.cat(scores, -1).softmax(-2) @ torch.cat(values, 2)

    return each(pieces(q, k, v, blocks, block), join)


@EXERCISE.misconception("one maximum for all rows")
def one_maximum(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """The largest score of the whole block of queries, all heads and sequences together, was subtracted. A
    row that lies hundreds below it becomes exp of that, 0 in every place, and 0 / 0 is NaN. Each row takes
    its own maximum: `amax(-1, keepdim=True)`."""

    def join(scores: list[Tensor], values: list[Tensor]) -> Tensor:
        joined = torch.cat(scores, -1)
        exp = (joined - joined.max()).exp()
        return exp @ torch.cat(values, 2) / exp.sum(-1, keepdim=True)

    return each(pieces(q, k, v, blocks, block), join)
