"""05.6: the mistakes that people make with the output of a step that selects."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvlearn.grading.units.sparse_attention.step import EXERCISE, block_means

__all__ = ["EXERCISE", "Step", "attend_over"]


@dataclass
class Step:
    """The parts of a right step, to be taken apart: state is right, the selection may be changed."""

    q: Tensor
    k: Tensor
    v: Tensor
    old_keys: Tensor
    old_values: Tensor
    old_means: Tensor
    block: int
    n_blocks: int

    def __post_init__(self) -> None:
        self.S = self.old_keys.shape[2]
        self.own = self.S // self.block
        self.keys = torch.cat((self.old_keys, self.k), 2)
        self.values = torch.cat((self.old_values, self.v), 2)
        full = (self.S + 1) % self.block == 0
        last = self.keys[:, :, -self.block :].mean(2, keepdim=True)
        self.means = torch.cat((self.old_means, last), 2) if full else self.old_means
        self.scores = (self.q @ self.means[:, :, : self.own].mT)[:, :, 0]  # (B, H, own)

    def best(self, n: int, scores: Tensor | None = None) -> Tensor:
        scores = self.scores if scores is None else scores
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., : max(n, 0)]

    def tokens(self, blocks: Tensor) -> Tensor:
        """(B, H, n) blocks to (B, H, n · block) positions."""
        return (blocks[..., None] * self.block + torch.arange(self.block)).flatten(2)

    def own_tokens(self, first: int | None = None, last: int | None = None) -> Tensor:
        first = self.own * self.block if first is None else first
        at = torch.arange(first, self.S + 1 if last is None else last)
        return at.expand(*self.q.shape[:2], -1)

    def attend(self, blocks: Tensor, own: Tensor | None = None) -> Tensor:
        at = torch.cat((self.tokens(blocks), self.own_tokens() if own is None else own), 2)
        return self.read(at)

    def read(self, at: Tensor) -> Tensor:
        rows = at[..., None].expand(-1, -1, -1, self.q.shape[-1])
        return attend_over(self.q, self.keys.gather(2, rows), self.values.gather(2, rows))

    def right(self) -> Tensor:
        return self.attend(self.best(self.n_blocks - 1))

    def done(self, out: Tensor) -> tuple[Tensor, ...]:
        return out, self.keys, self.values, self.means


def attend_over(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (q @ keys.mT * q.shape[-1] ** -0.5).softmax(-1) @ values


@EXERCISE.misconception("the new token not read")
def before_append(*given: Any) -> tuple[Tensor, ...]:
    """The step attends before it appends, so the new token does not see itself. (Where it is the first of its
    block, nothing of that block is there at all; in an empty cache there is nothing, zeros here.) Append
    first."""
    s = Step(*given)
    own = s.own_tokens(last=s.S)
    return s.done(s.attend(s.best(s.n_blocks - 1), own) if s.S else torch.zeros_like(s.q))


@EXERCISE.misconception("the half-filled block not read")
def complete_only(*given: Any) -> tuple[Tensor, ...]:
    """Only complete blocks were read, with the new token: those between the last complete block and it are
    invisible until their block is full. They are the nearest neighbours. The own block is read always, as far
    as it goes."""
    s = Step(*given)
    return s.done(s.attend(s.best(s.n_blocks - 1), s.own_tokens(first=s.S)))


def competing(s: Step, own_mean: Tensor) -> Tensor:
    """The own block is scored like the others, and the best n_blocks are read, head by head."""
    scores = torch.cat((s.scores, (s.q @ own_mean.mT)[:, :, 0]), -1)
    blocks = s.best(s.n_blocks, scores)
    seen = (torch.arange(s.S + 1) // s.block == blocks[..., None]).any(2, keepdim=True)
    hidden = (s.q @ s.keys.mT * s.q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return hidden.softmax(-1).nan_to_num() @ s.values.masked_fill(~seen.mT, 0)


@EXERCISE.misconception("the half-filled block competes by the mean of what is in it")
def own_competes(*given: Any) -> tuple[Tensor, ...]:
    """The own block was scored by the mean of its keys so far, and read only if it is among the best. So the
    step may not see the tokens just before it, not even itself. It is read always and takes one of the
    n_blocks places."""
    s = Step(*given)
    return s.done(competing(s, s.keys[:, :, s.own * s.block :].mean(2, keepdim=True)))


@EXERCISE.misconception("a half-filled block's mean divided by the block size")
def divided_by_block(*given: Any) -> tuple[Tensor, ...]:
    """The own block competes, by the sum of its keys so far divided by `block`: as if the empty places held
    keys of zeros. The mean comes out too small, the smaller the emptier the block. And it should not compete
    at all: the own block is read always."""
    s = Step(*given)
    return s.done(competing(s, s.keys[:, :, s.own * s.block :].sum(2, keepdim=True) / s.block))


@EXERCISE.misconception("n_blocks besides the own one")
def one_too_many(*given: Any) -> tuple[Tensor, ...]:
    """n_blocks earlier blocks were read, and the own one on top. n_blocks counts it: the best n_blocks − 1 of
    the others."""
    s = Step(*given)
    return s.done(s.attend(s.best(s.n_blocks)))


@EXERCISE.misconception("the own block alone")
def own_alone(*given: Any) -> tuple[Tensor, ...]:
    """Only the own block was read. The best n_blocks − 1 of the earlier ones belong to it: `means` tells
    which those are."""
    s = Step(*given)
    return s.done(s.attend(s.best(0)))


@EXERCISE.misconception("the nearest blocks in place of the best")
def nearest(*given: Any) -> tuple[Tensor, ...]:
    """The blocks just before the own one were read: a sliding window. Which earlier blocks are read is
    decided by q · mean, and can be any."""
    s = Step(*given)
    by_time = torch.arange(s.own).expand(*s.q.shape[:2], -1)
    return s.done(s.attend(s.best(s.n_blocks - 1, by_time)))


@EXERCISE.misconception("everything read")
def full(*given: Any) -> tuple[Tensor, ...]:
    """This is full attention over the whole cache. The step was to select: the own block and the best
    n_blocks − 1 before it."""
    s = Step(*given)
    return s.done(s.read(torch.arange(s.S + 1).expand(*s.q.shape[:2], -1)))


@EXERCISE.misconception("everything read, then masked")
def masked(*given: Any) -> tuple[Tensor, ...]:
    """The numbers are right, but every key and value was read, and most of them masked away: the step moves
    as many bytes as full attention, which is what a decode step's time is made of. (A value that is NaN shows
    it: 0 · NaN is NaN.) Gather what is selected first."""
    s = Step(*given)
    at = torch.cat((s.tokens(s.best(s.n_blocks - 1)), s.own_tokens()), 2)
    seen = torch.zeros(*s.q.shape[:2], s.S + 1, dtype=torch.bool).scatter_(2, at, True)[:, :, None]
    scores = (s.q @ s.keys.mT * s.q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return s.done(scores.softmax(-1) @ s.values)


@EXERCISE.misconception("one choice for all heads")
def heads_mixed(*given: Any) -> tuple[Tensor, ...]:
    """The scores were added up over the heads, and all read the same blocks. Every head selects for itself:
    `gather` takes other tokens for each."""
    s = Step(*given)
    scores = s.scores.sum(1, keepdim=True).expand(-1, s.q.shape[1], -1)
    return s.done(s.attend(s.best(s.n_blocks - 1, scores)))


@EXERCISE.misconception("the first head's choice for all")
def first_head(*given: Any) -> tuple[Tensor, ...]:
    """Head 0 of sequence 0 chose, and all the others read its blocks. Every head of every sequence has a
    query of its own and picks for itself: keep both dimensions in the indices, (B, H, n)."""
    s = Step(*given)
    return s.done(s.attend(s.best(s.n_blocks - 1)[:1, :1].expand(*s.q.shape[:2], -1)))


@EXERCISE.misconception("one choice for the whole batch")
def batch_mixed(*given: Any) -> tuple[Tensor, ...]:
    """The first sequence's choice was used for all. Every sequence selects in its own cache."""
    s = Step(*given)
    return s.done(s.attend(s.best(s.n_blocks - 1)[:1].expand(len(s.q), -1, -1)))


@EXERCISE.misconception("the worst blocks")
def worst(*given: Any) -> tuple[Tensor, ...]:
    """The blocks with the lowest scores were read (a sort ascends where nothing else is said). The best are
    those of the largest q · mean."""
    s = Step(*given)
    return s.done(s.attend(s.best(s.n_blocks - 1, -s.scores)))


@EXERCISE.misconception("attention to the means")
def over_means(*given: Any) -> tuple[Tensor, ...]:
    """The selected blocks' means took part in the softmax in place of their tokens. Means are here to find
    blocks; what is read are the keys and values of the tokens in them. (There are designs that read means as
    well: NSA's compressed branch.)"""
    s = Step(*given)
    best = s.best(s.n_blocks - 1)[..., None].expand(-1, -1, -1, s.q.shape[-1])
    pooled = [block_means(x, s.block)[:, :, : s.own].gather(2, best) for x in (s.keys, s.values)]
    own = [x[:, :, s.own * s.block :] for x in (s.keys, s.values)]
    return s.done(attend_over(s.q, torch.cat((pooled[0], own[0]), 2), torch.cat((pooled[1], own[1]), 2)))


@EXERCISE.misconception("a softmax for each part, then the mean")
def two_softmaxes(*given: Any) -> tuple[Tensor, ...]:
    """The selected blocks and the own one were attended to apart, and the outputs averaged. It is one softmax
    over all tokens that are read."""
    s = Step(*given)
    own, blocks = s.read(s.own_tokens()), s.best(s.n_blocks - 1)
    return s.done((own + s.read(s.tokens(blocks))) / 2 if blocks.numel() else own)


@EXERCISE.misconception("no scale")
def no_scale(*given: Any) -> tuple[Tensor, ...]:
    """The scores of attention were not divided by √D. (For the choice it does not matter: the order stays the
    same.)"""
    s = Step(*given)
    larger = Step(s.q * s.q.shape[-1] ** 0.5, *given[1:])
    return s.done(larger.right())
