"""05.3: the mistakes that people make with the blocks: which are read, and what is masked in them."""

import torch
from torch import Tensor

from kvlearn.grading.units.sparse_attention.union import Lists
from kvlearn.grading.units.sparse_attention.union_mistakes import EXERCISE, attend_all, later, pieces

__all__ = ["EXERCISE"]


@EXERCISE.misconception("no mask in the diagonal block")
def no_mask(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """Listed blocks were read whole. Those before the query's own lie in the past altogether, but the own one
    holds later tokens too: there a token sees only what stands at or before it."""
    return attend_all(pieces(q, k, v, blocks, block, lambda i, j: torch.zeros_like(i > j)))


@EXERCISE.misconception("every block masked as if it were the diagonal one")
def triangle_everywhere(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """The triangle was laid over all listed blocks, so the first query of a block sees one token of each.
    Earlier blocks lie in the past as a whole. Compare positions in the text, not places in the block."""
    return attend_all(pieces(q, k, v, blocks, block, lambda i, j: j % block > i % block))


@EXERCISE.misconception("the last listed block taken for the diagonal one")
def last_is_diagonal(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """The triangle was laid over the block that stands last in the list, and the own one, wherever it stands,
    was read whole. The lists may have any order: whether a key is hidden depends on its position."""
    outs = []
    for own, chosen in enumerate(blocks):

        def hide(i: Tensor, j: Tensor, last: int = chosen[-1]) -> Tensor:
            return (j // block == last) & (j % block > i % block)

        outs.append(pieces(q, k, v, blocks, block, hide)[own].attend())
    return torch.cat(outs, dim=2)


@EXERCISE.misconception("the own token hidden")
def strictly_before(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """A token does not see itself (`>=` where `>` belongs). The first token has nothing else to see, so its
    row is NaN."""
    return attend_all(pieces(q, k, v, blocks, block, lambda i, j: j >= i))


@EXERCISE.misconception("masked after the softmax")
def masked_late(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """Later tokens of the own block were set to 0 after the softmax had given them their share, so the
    weights of a row no longer add up to 1. Mask the scores with −∞ before."""
    outs = []
    bare = pieces(q, k, v, blocks, block, lambda i, j: torch.zeros_like(i > j))
    for open_, hidden in zip(bare, pieces(q, k, v, blocks, block), strict=True):
        weights = torch.cat(open_.scores, -1).softmax(-1)
        weights = weights.masked_fill(torch.cat(hidden.scores, -1) == -torch.inf, 0)
        outs.append(weights @ torch.cat(open_.values, 2))
    return torch.cat(outs, dim=2)


@EXERCISE.misconception("one list for all queries")
def one_list(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """The last list was used for every block of queries, with the own block added. Each block of queries has
    a list of its own."""
    lists = [sorted({own, *(c for c in blocks[-1] if c < own)}) for own in range(len(blocks))]
    return attend_all(pieces(q, k, v, lists, block))


@EXERCISE.misconception("all blocks between the first and the last listed")
def whole_range(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """A slice from the first listed block to the last was taken, with everything between. Blocks that are not
    listed are not seen, however near they lie."""
    lists = [list(range(min(chosen), max(chosen) + 1)) for chosen in blocks]
    return attend_all(pieces(q, k, v, lists, block))


@EXERCISE.misconception("the own block left out")
def own_left_out(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """Only the earlier listed blocks were read; the own block, which is always listed, was skipped, perhaps
    to spare the mask. The nearest tokens are the ones that a query needs most. (The first block has nothing
    else.)"""
    lists = [[c for c in chosen if c != own] or [own] for own, chosen in enumerate(blocks)]
    return attend_all(pieces(q, k, v, lists, block))


@EXERCISE.misconception("the own block alone")
def own_alone(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """Every block of queries read itself and nothing else; the lists were not looked at."""
    return attend_all(pieces(q, k, v, [[own] for own in range(len(blocks))], block))


@EXERCISE.misconception("all blocks read, listed or not")
def full_attention(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """This is full causal attention. The lists say which blocks a query may read; the others are not seen at
    all."""
    return attend_all(pieces(q, k, v, [list(range(own + 1)) for own in range(len(blocks))], block))


@EXERCISE.misconception("numbers of blocks taken for positions")
def blocks_as_tokens(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """`k[:, :, blocks[b]]` takes single tokens, at the positions that the list's numbers happen to be. They
    are numbers of blocks: block c holds the positions c · block to (c + 1) · block − 1."""
    outs = []
    for own, chosen in enumerate(blocks):
        rows = q[:, :, own * block : (own + 1) * block]
        at = [min(c, k.shape[2] - 1) for c in chosen]
        weights = (rows @ k[:, :, at].mT * q.shape[-1] ** -0.5).softmax(-1)
        outs.append(weights @ v[:, :, at])
    return torch.cat(outs, dim=2)


@EXERCISE.misconception("the last block filled up with zeros that are seen")
def padded(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """The text was padded with zeros to whole blocks, and the zeros were attended to: a score of 0 is no
    small weight. Whatever pads must be hidden by the mask. (With whole blocks there is nothing to pad.)"""
    N = q.shape[2]
    more = -N % block
    q, k, v = (torch.cat((x, torch.zeros_like(x[:, :, :1]).expand(-1, -1, more, -1)), 2) for x in (q, k, v))
    return attend_all(pieces(q, k, v, blocks, block, lambda i, j: (j > i) & (j < N)))[:, :, :N]


@EXERCISE.misconception("the half-filled last block forgotten")
def dropped(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """The loop runs over N // block blocks, so the tokens behind the last whole block got no output (zeros).
    There are ⌈N / block⌉ blocks, and the last one may be shorter."""
    out, whole = torch.zeros_like(q), q.shape[2] // block
    if whole:
        rows = whole * block
        out[:, :, :rows] = attend_all(pieces(q, k, v, blocks[:whole], block))[:, :, :rows]
    return out


@EXERCISE.misconception("no scale")
def no_scale(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """The scores were not divided by √D, so the softmax is sharper than it should be: the best key takes
    nearly all. 1/√D belongs to attention over few keys as to attention over all."""
    return attend_all(pieces(q, k, v, blocks, block, later, 1.0))


@EXERCISE.misconception("scaled by the block")
def scaled_by_block(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """The scores were divided by √block. The scale is 1/√D, D the numbers of a key: it has nothing to do with
    how many keys there are."""
    return attend_all(pieces(q, k, v, blocks, block, later, block**-0.5))


@EXERCISE.misconception("the triangle laid from the first gathered key")
def top_left(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """`tril()` over the gathered scores takes query 0 of the block for the first of all, so it sees the first
    gathered key and no other. The queries stand at the *end* of the past: compare positions in the text,
    those of the gathered keys with those of the queries."""
    outs = []
    for piece in pieces(q, k, v, blocks, block, lambda i, j: torch.zeros_like(i > j)):
        scores = torch.cat(piece.scores, -1)
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        outs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ torch.cat(piece.values, 2))
    return torch.cat(outs, 2)


@EXERCISE.misconception("keys used as values")
def keys_as_values(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """What was added up are the keys. They say how well a token fits; the output is a sum of values."""
    return attend_all(pieces(q, k, k, blocks, block))


@EXERCISE.misconception("hidden scores at 0 in place of −∞")
def hidden_at_zero(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    """The scores of later tokens were set to 0, and exp(0) is 1: they take weight like any other. Hidden
    means −∞, before the softmax."""
    made = pieces(q, k, v, blocks, block)
    for piece in made:
        piece.scores = [scores.masked_fill(scores == -torch.inf, 0.0) for scores in piece.scores]
    return attend_all(made)
