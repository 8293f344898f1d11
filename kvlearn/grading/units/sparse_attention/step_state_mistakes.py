"""05.6: the mistakes that people make with blocks that begin and end, and with the state."""

from typing import Any

import torch
from torch import Tensor

from kvlearn.grading.units.sparse_attention.step_mistakes import EXERCISE, Step, attend_over

__all__ = ["EXERCISE"]

Outs = tuple[Tensor, ...]


@EXERCISE.misconception("the own block begins one token too late")
def late_block(*given: Any) -> Outs:
    """The own block was taken as (S − 1) // block: the new token at position S was added to the old block,
    even where that was full. The first token of a block stands at a multiple of `block`: S // block."""
    s = Step(*given)
    own = max(s.S - 1, 0) // s.block
    blocks = s.best(s.n_blocks - 1, s.scores[..., :own])
    return s.done(s.attend(blocks, s.own_tokens(first=own * s.block)))


@EXERCISE.misconception("the own block begins one token too early")
def early_block(*given: Any) -> Outs:
    """The own block was taken as (S + 1) // block, from the length after the append. The token that fills a
    block still belongs to it; so the next block, which is empty, was its own one here, and the new token
    itself is read only if its block is among the best."""
    s = Step(*given)
    own = (s.S + 1) // s.block
    scores = (s.q @ s.means[:, :, :own].mT)[:, :, 0]
    blocks = s.best(s.n_blocks - 1, scores)
    return s.done(s.attend(blocks, s.own_tokens(first=own * s.block)))


@EXERCISE.misconception("the block that was just filled competes")
def full_one_competes(*given: Any) -> Outs:
    """The new token fills its block, the mean is appended, and then the block was scored with the others. It
    is read in any case; where it won a place, another block lost one. Candidates are the blocks *before* the
    own one, S // block of them."""
    s = Step(*given)
    scores = (s.q @ s.means.mT)[:, :, 0]
    blocks = s.best(s.n_blocks - 1, scores)
    seen = (torch.arange(s.S + 1) // s.block == blocks[..., None]).any(2) if blocks.numel() else None
    own = torch.arange(s.S + 1) >= s.own * s.block
    seen = own.expand(*s.q.shape[:2], -1) if seen is None else seen | own
    keys, values = (x.masked_fill(~seen[..., None], 0) for x in (s.keys, s.values))
    scores = (s.q @ keys.mT * s.q.shape[-1] ** -0.5).masked_fill(~seen[:, :, None], -torch.inf)
    return s.done(scores.softmax(-1) @ values)


@EXERCISE.misconception("a half-filled block filled up with zeros")
def padded(*given: Any) -> Outs:
    """The own block was read as a whole, with zeros where no token stands yet. A key of zeros has the score
    0, and that is no small weight: the softmax gives the empty places their share."""
    s = Step(*given)
    at = torch.cat((s.tokens(s.best(s.n_blocks - 1)), s.own_tokens()), 2)
    rows = at[..., None].expand(-1, -1, -1, s.q.shape[-1])
    empty = torch.zeros_like(s.q).expand(-1, -1, (s.own + 1) * s.block - s.S - 1, -1)
    keys, values = (torch.cat((x.gather(2, rows), empty), 2) for x in (s.keys, s.values))
    return s.done(attend_over(s.q, keys, values))


@EXERCISE.misconception("a mean for the half-filled block")
def mean_of_part(*given: Any) -> Outs:
    """A row was appended for the half-filled block, the mean of what is in it. The next steps make it wrong,
    and whoever scores it knows less of that block than of the others. A block gets its mean when it is
    full."""
    s = Step(*given)
    if (s.S + 1) % s.block:
        s.means = torch.cat((s.means, s.keys[:, :, s.own * s.block :].mean(2, keepdim=True)), 2)
    return s.done(s.right())


@EXERCISE.misconception("a mean for the half-filled block, divided by the block size")
def sum_of_part(*given: Any) -> Outs:
    """A row was appended for the half-filled block: the sum so far divided by `block`. It comes out right in
    the step that fills the block; until then it is too small. A block gets its mean when it is full."""
    s = Step(*given)
    if (s.S + 1) % s.block:
        part = s.keys[:, :, s.own * s.block :].sum(2, keepdim=True) / s.block
        s.means = torch.cat((s.means, part), 2)
    return s.done(s.right())


@EXERCISE.misconception("the means never grow")
def no_new_mean(*given: Any) -> Outs:
    """The means came back as they were though a block is full now. It would never be found again once it is
    no longer the own one."""
    s = Step(*given)
    s.means = s.old_means
    return s.done(s.right())


@EXERCISE.misconception("a mean with every step")
def mean_each_step(*given: Any) -> Outs:
    """A row was appended for each token: the mean of the last `block` keys. Blocks do not slide; they begin
    at multiples of `block`, and there is one mean for each."""
    s = Step(*given)
    s.means = torch.cat((s.old_means, s.keys[:, :, -s.block :].mean(2, keepdim=True)), 2)
    return s.done(s.right())


@EXERCISE.misconception("the mean appended one step late")
def one_step_late(*given: Any) -> Outs:
    """The mean was appended by the first token of the *next* block (S % block == 0, the length before the
    append). The step that fills the block must do it: the next one needs it to select."""
    s = Step(*given)
    s.means = s.old_means
    if s.S and s.S % s.block == 0:
        s.means = torch.cat((s.means, s.old_keys[:, :, -s.block :].mean(2, keepdim=True)), 2)
    return s.done(s.right())


@EXERCISE.misconception("a mean without the new key")
def without_new(*given: Any) -> Outs:
    """The mean of the full block leaves out the new token, whose key had not been appended yet: block − 1
    keys. Append first."""
    s = Step(*given)
    if (s.S + 1) % s.block == 0:
        part = s.old_keys[:, :, s.own * s.block :].mean(2, keepdim=True)
        s.means = torch.cat((s.old_means, part), 2)
    return s.done(s.right())


@EXERCISE.misconception("keys of the block before in the mean")
def shifted(*given: Any) -> Outs:
    """The mean was taken of the last `block` keys as they were before the append: one key of the block
    before, and not the new one."""
    s = Step(*given)
    if (s.S + 1) % s.block == 0:
        s.means = torch.cat((s.old_means, s.old_keys[:, :, -s.block :].mean(2, keepdim=True)), 2)
    return s.done(s.right())


@EXERCISE.misconception("a running mean of halves")
def halves(*given: Any) -> Outs:
    """The mean was made step by step as (old + new) / 2. So the last key weighs one half, the one before a
    quarter. Every key of a block counts alike: their sum divided by `block`."""
    s = Step(*given)
    if (s.S + 1) % s.block == 0:
        running = s.keys[:, :, s.own * s.block]
        for at in range(s.own * s.block + 1, s.S + 1):
            running = (running + s.keys[:, :, at]) / 2
        s.means = torch.cat((s.old_means, running[:, :, None]), 2)
    return s.done(s.right())


@EXERCISE.misconception("the sum in place of the mean")
def sums(*given: Any) -> Outs:
    """The keys of the full block were added up and not divided. Beside the means that are there already it
    would win every comparison, or lose every one."""
    s = Step(*given)
    if (s.S + 1) % s.block == 0:
        s.means = torch.cat((s.old_means, s.keys[:, :, -s.block :].sum(2, keepdim=True)), 2)
    return s.done(s.right())


@EXERCISE.misconception("the mean of the values")
def mean_of_values(*given: Any) -> Outs:
    """The values of the full block were averaged. Blocks are found by their *keys*: a query is compared with
    keys."""
    s = Step(*given)
    if (s.S + 1) % s.block == 0:
        s.means = torch.cat((s.old_means, s.values[:, :, -s.block :].mean(2, keepdim=True)), 2)
    return s.done(s.right())


@EXERCISE.misconception("the last mean written over")
def overwritten(*given: Any) -> Outs:
    """The new mean took the place of the last one. Every complete block keeps its own: append."""
    s = Step(*given)
    if (s.S + 1) % s.block == 0:
        last = s.keys[:, :, -s.block :].mean(2, keepdim=True)
        s.means = torch.cat((s.old_means[:, :, :-1], last), 2)
    return s.done(s.right())


@EXERCISE.misconception("what was not selected thrown away")
def thrown_away(*given: Any) -> Outs:
    """Only the selected tokens came back in keys and values. The next token may select any block: what this
    one does not read must be kept all the same. Selecting saves reading, not storing."""
    s = Step(*given)
    out = s.right()
    at = torch.cat((s.tokens(s.best(s.n_blocks - 1)).sort(-1).values, s.own_tokens()), 2)
    rows = at[..., None].expand(-1, -1, -1, s.q.shape[-1])
    return out, s.keys.gather(2, rows), s.values.gather(2, rows), s.means


@EXERCISE.misconception("the new token not stored")
def not_stored(*given: Any) -> Outs:
    """The output is right, but keys and values came back without the new token: the next step would not know
    of it."""
    s = Step(*given)
    return s.right(), s.old_keys, s.old_values, s.means
