"""05.1: the mistakes that people make with the fixed pattern: which block, which end of it, who sees it."""

import torch
from torch import Tensor

from kvlearn.grading.units.sparse_attention.classic import positions, strided
from kvlearn.grading.units.sparse_attention.classic_mistakes import EXERCISE

__all__ = ["EXERCISE"]


def parts(n_tokens: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """j ≤ i, the same block, and each key's place in its block."""
    i, j = positions(n_tokens)
    return j <= i, i // block == j // block, j % block


@EXERCISE.misconception("the first tokens of a block as its summary", strided_mask=strided)
def first_tokens(n_tokens: int, block: int, summary: int) -> Tensor:
    """The summaries were taken from the start of each block. A token can only sum up what it has seen, and
    the first token of a block has seen nothing of it: the *last* ones are the summary."""
    past, same_block, place = parts(n_tokens, block)
    return past & (same_block | (place < summary))


@EXERCISE.misconception("one summary token a block", strided_mask=strided)
def last_token_only(n_tokens: int, block: int, summary: int) -> Tensor:
    """Only the last token of each block can be seen from later blocks; `summary` was not looked at. The last
    `summary` tokens count."""
    past, same_block, place = parts(n_tokens, block)
    return past & (same_block | (place == block - 1))


@EXERCISE.misconception("the summary one token short", strided_mask=strided)
def one_short(n_tokens: int, block: int, summary: int) -> Tensor:
    """One token of each summary is missing: `>` where `>=` belongs. Places count from 0, so the last
    `summary` of a block are block − summary … block − 1."""
    past, same_block, place = parts(n_tokens, block)
    return past & (same_block | (place > block - summary))


@EXERCISE.misconception("the summary one token too long", strided_mask=strided)
def one_long(n_tokens: int, block: int, summary: int) -> Tensor:
    """One token too many of each block can be seen from later ones. Places count from 0 to block − 1, so the
    last `summary` of them start at block − summary, not one before."""
    past, same_block, place = parts(n_tokens, block)
    return past & (same_block | (place >= block - 1 - summary))


@EXERCISE.misconception("the summary of the block just before alone", strided_mask=strided)
def block_before(n_tokens: int, block: int, summary: int) -> Tensor:
    """Only the nearest earlier block shows its summary. *Every* earlier block does: it is the summaries that
    carry the far past."""
    i, j = positions(n_tokens)
    past, same_block, place = parts(n_tokens, block)
    return past & (same_block | ((i // block - j // block == 1) & (place >= block - summary)))


@EXERCISE.misconception("a window in place of the own block", strided_mask=strided)
def window_for_block(n_tokens: int, block: int, summary: int) -> Tensor:
    """The last `block` tokens were marked wherever they stand. The fixed pattern is cut at fixed places: a
    query sees its own block, and of the block before only the summary, however near the rest of it is."""
    i, j = positions(n_tokens)
    past, _, place = parts(n_tokens, block)
    return past & ((i - j < block) | (place >= block - summary))


@EXERCISE.misconception("the own block without the rest", strided_mask=strided)
def own_alone(n_tokens: int, block: int, summary: int) -> Tensor:
    """Each block sees itself and nothing before: the text falls into pieces that know nothing of each other.
    The summaries of all earlier blocks are missing."""
    past, same_block, _ = parts(n_tokens, block)
    return past & same_block


@EXERCISE.misconception("summaries without the own block", strided_mask=strided)
def summaries_alone(n_tokens: int, block: int, summary: int) -> Tensor:
    """Only summary tokens can be seen, in the query's own block too. There the query sees every token up to
    itself. (In the paper this is one of two parts; here the mask holds both.)"""
    i, j = positions(n_tokens)
    past, _, place = parts(n_tokens, block)
    return past & ((place >= block - summary) | (i == j))


@EXERCISE.misconception("own block and summary at once", strided_mask=strided)
def conjunction(n_tokens: int, block: int, summary: int) -> Tensor:
    """`and` in place of `or`: only summary tokens of the query's own block are left. A key is seen if it
    stands in the own block *or* is a summary."""
    i, j = positions(n_tokens)
    past, same_block, place = parts(n_tokens, block)
    return past & ((same_block & (place >= block - summary)) | (i == j))


@EXERCISE.misconception("summaries that only summary tokens see", strided_mask=strided)
def among_themselves(n_tokens: int, block: int, summary: int) -> Tensor:
    """The summaries can be seen by the last `summary` queries of later blocks and by no others. Every query
    sees them; whether a *key* is a summary is all that counts."""
    i, _ = positions(n_tokens)
    past, same_block, place = parts(n_tokens, block)
    return past & (same_block | ((place >= block - summary) & (i % block >= block - summary)))


@EXERCISE.misconception("all earlier blocks whole", strided_mask=strided)
def everything(n_tokens: int, block: int, summary: int) -> Tensor:
    """This is the causal mask: everything before the query can be seen. Of earlier blocks only the last
    `summary` tokens belong to the pattern."""
    return torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()


@EXERCISE.misconception("the own block with what comes later in it", strided_mask=strided)
def whole_block(n_tokens: int, block: int, summary: int) -> Tensor:
    """A query sees its block to the end, later tokens included. Whole blocks are how kernels compute; what
    may be seen still ends at the query, j ≤ i."""
    past, same_block, place = parts(n_tokens, block)
    return same_block | (past & (place >= block - summary))


@EXERCISE.misconception("summaries of later blocks", strided_mask=strided)
def later_summaries(n_tokens: int, block: int, summary: int) -> Tensor:
    """The summary columns are marked from top to bottom, above the diagonal too, so a query sees the ends of
    blocks that are not written yet. j ≤ i belongs to both parts of the pattern."""
    past, same_block, place = parts(n_tokens, block)
    return (past & same_block) | (place >= block - summary)
