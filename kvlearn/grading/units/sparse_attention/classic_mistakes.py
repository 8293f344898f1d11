"""05.1: the mistakes that people make with the strided pattern, and with either."""

import torch
from torch import Tensor

from kvlearn.grading.units.sparse_attention.classic import EXERCISE, fixed, positions, strided

__all__ = ["EXERCISE"]


def distances(n_tokens: int) -> tuple[Tensor, Tensor]:
    """i − j, and where the key is not in the future."""
    i, j = positions(n_tokens)
    return i - j, j <= i


def either(n_tokens: int, size: int, summary: int | None) -> Tensor:
    """The right mask of whichever was asked for."""
    return strided(n_tokens, size) if summary is None else fixed(n_tokens, size, summary)


@EXERCISE.misconception("the stride counted from 0", fixed_mask=fixed)
def from_zero(n_tokens: int, stride: int) -> Tensor:
    """The keys 0, stride, 2 · stride … were marked, the same columns for every query. A stride is counted
    back from the query: (i − j) % stride, not j % stride. (Columns that are the same for all are the other
    pattern, fixed.)"""
    back, past = distances(n_tokens)
    return past & ((back < stride) | (positions(n_tokens)[1] % stride == 0))


@EXERCISE.misconception("strided columns at the ends of blocks", fixed_mask=fixed)
def block_ends(n_tokens: int, stride: int) -> Tensor:
    """The keys stride − 1, 2 · stride − 1 … were marked, for every query the same. Those are the fixed
    pattern's summaries. The strided one goes back from the query itself, (i − j) % stride == 0."""
    back, past = distances(n_tokens)
    return past & ((back < stride) | (positions(n_tokens)[1] % stride == stride - 1))


@EXERCISE.misconception("only the strided part", fixed_mask=fixed)
def strided_alone(n_tokens: int, stride: int) -> Tensor:
    """Every stride-th token is there, and the neighbours are missing: of the last `stride` tokens the query
    sees only itself. The pattern is both parts together. (In the paper one half of the heads may take the one
    and one half the other; here a single mask holds both.)"""
    back, past = distances(n_tokens)
    return past & (back % stride == 0)


@EXERCISE.misconception("only the local part", fixed_mask=fixed)
def local_alone(n_tokens: int, stride: int) -> Tensor:
    """This is a sliding window. Nothing further back than `stride` tokens can be seen in one layer; that is
    what the strided part is for."""
    back, past = distances(n_tokens)
    return past & (back < stride)


@EXERCISE.misconception("both conditions at once", fixed_mask=fixed)
def conjunction(n_tokens: int, stride: int) -> Tensor:
    """`and` in place of `or`: near *and* a multiple of the stride away is the token itself and no other. A
    token is seen if at least one part of the pattern shows it."""
    back, past = distances(n_tokens)
    return past & (back < stride) & (back % stride == 0)


@EXERCISE.misconception("the local part one short", fixed_mask=fixed)
def short(n_tokens: int, stride: int) -> Tensor:
    """The query's own token was not counted among the last `stride`, or `<` stands where `<=` belongs: the
    distances 0 … stride − 2 were marked. They are 0 … stride − 1, so `i - j < stride`."""
    back, past = distances(n_tokens)
    return past & ((back < stride - 1) | (back % stride == 0))


@EXERCISE.misconception("the local part too wide", fixed_mask=fixed)
def wide(n_tokens: int, stride: int) -> Tensor:
    """The local part reaches one token beyond the first stride. Up to distance stride − 1 it is local, at
    distance stride the other part begins, and distance stride + 1 belongs to neither."""
    back, past = distances(n_tokens)
    return past & ((back <= stride + 1) | (back % stride == 0))


@EXERCISE.misconception("the query's block in place of the last tokens", fixed_mask=fixed)
def block_for_window(n_tokens: int, stride: int) -> Tensor:
    """The local part starts at the last multiple of the stride, as if the text were cut into blocks. So a
    query right behind a cut has hardly a neighbour. The strided pattern has a window that moves along with
    the query; blocks belong to the fixed one."""
    i, j = positions(n_tokens)
    return (j <= i) & ((i // stride == j // stride) | ((i - j) % stride == 0))


@EXERCISE.misconception("one stride back and no further", fixed_mask=fixed)
def one_stride(n_tokens: int, stride: int) -> Tensor:
    """Only the token exactly one stride back was marked beside the neighbours. The strided part goes on: 2,
    3, 4 … strides back, to the start of the text."""
    back, past = distances(n_tokens)
    return past & (back <= stride)


@EXERCISE.misconception("strided: both directions", fixed_mask=fixed)
def both_ways(n_tokens: int, stride: int) -> Tensor:
    """The distance was taken without its sign, so a query sees as many later tokens as earlier ones. A
    decoder must not: j ≤ i belongs to every mask here."""
    back, _ = distances(n_tokens)
    return (back.abs() < stride) | (back % stride == 0)


@EXERCISE.misconception("rows and columns exchanged")
def transposed(n_tokens: int, size: int, summary: int | None = None) -> Tensor:
    """Rows are keys here and columns queries, so everything below the diagonal has moved above it: each token
    sees the later ones. Row i says what *query* i sees: queries get `[:, None]`, keys `[None, :]`."""
    return either(n_tokens, size, summary).T


@EXERCISE.misconception("True means hidden")
def inverted(n_tokens: int, size: int, summary: int | None = None) -> Tensor:
    """The mask marks what must *not* be seen. Here, as everywhere in the course and in PyTorch's
    scaled_dot_product_attention, True means: may attend."""
    return ~either(n_tokens, size, summary)


@EXERCISE.misconception("a token does not see itself")
def without_itself(n_tokens: int, size: int, summary: int | None = None) -> Tensor:
    """The diagonal is False (`<` where `<=` belongs). Distance 0 is the query's own token: both patterns show
    it, and without it the first token would see nothing at all."""
    return either(n_tokens, size, summary).tril(-1)


@EXERCISE.misconception("the future left open in both")
def not_causal(n_tokens: int, size: int, summary: int | None = None) -> Tensor:
    """j ≤ i is missing. In the strided mask every later token has a distance below `stride` (a negative one),
    and in the fixed one a query sees its whole block and the summaries of blocks to come."""
    i, j = positions(n_tokens)
    if summary is None:
        return (i - j < size) | ((i - j) % size == 0)
    return (i // size == j // size) | (j % size >= size - summary)


@EXERCISE.misconception("zeros and −∞ in place of True and False")
def additive(n_tokens: int, size: int, summary: int | None = None) -> Tensor:
    """The pairs are right, but as numbers to be added to the scores. Asked for is a boolean mask: it takes a
    byte a pair, can be combined with `&` and `|`, and nobody can mistake its meaning."""
    seen = either(n_tokens, size, summary)
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


@EXERCISE.misconception("ones and zeros in place of True and False")
def ones(n_tokens: int, size: int, summary: int | None = None) -> Tensor:
    """The pairs are right, as numbers 1 and 0. `~mask` would make −2 and −1 of integers, and masked_fill
    refuses them: make it boolean."""
    return either(n_tokens, size, summary).long()
