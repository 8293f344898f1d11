"""05.3: attention that touches listed blocks only, held against SDPA with a mask made pair by pair."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.grading.compare import Difference, compare
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial
from kvlearn.grading.watch import largest_new_tensor, new_tensors

EXERCISE = Exercise(
    id="05.3",
    slug="union",
    title="One softmax over the listed blocks",
    answers=("block_sparse_attention",),
    forbidden={F.scaled_dot_product_attention: "torch's scaled_dot_product_attention"},
    hints=(
        "Go from one block of queries to the next. Gather the keys and values of its listed blocks, one "
        "behind the other, `torch.cat([k[:, :, c * block : (c + 1) * block] for c in blocks[b]], dim=2)`, "
        "and it is ordinary attention over those.",
        "Slices end by themselves where the text ends, so a half-filled last block needs no padding. Count "
        "on the shapes you get, not on `block`.",
        "Gather the positions of the gathered keys in the same way, from `torch.arange(N)`. Hidden is each "
        "key whose position is larger than the query's: that masks the diagonal block and leaves the earlier "
        "ones open, in whatever order they are listed.",
        "One softmax over all gathered keys together: `scores.softmax(dim=-1)`, which takes the maximum off "
        "by itself. With `exp` by hand subtract `scores.amax(-1, keepdim=True)` first. Put the rows of all "
        "blocks together with `torch.cat(…, dim=2)`.",
    ),
)

Lists = list[list[int]]
QKV = tuple[Tensor, Tensor, Tensor]


def reference(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    N = q.shape[2]
    seen = [[s <= i and s // block in blocks[i // block] for s in range(N)] for i in range(N)]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.tensor(seen))


def draw(t: Trial, n_tokens: int, dtype: torch.dtype = torch.float32) -> QKV:
    B, H, D = t.pick(2, 3), t.pick(3, 5), t.pick(8, 16)
    q, k, v = (t.randn(B, H, n_tokens, D, dtype=dtype) for _ in range(3))
    return q, k, v


def some(t: Trial, n_blocks: int) -> Lists:
    """For each query block its own and some before it, in any order; the own one is not always last, and
    from the third block on at least one is left out and at least one besides its own is listed."""
    lists = []
    for own in range(n_blocks):
        before = t.random.sample(range(own), t.integer(1, own - 1) if own > 1 else own)
        chosen = [*before, own]
        t.random.shuffle(chosen)
        lists.append(chosen)
    lists[-1] = sorted(lists[-1], reverse=True)  # its own one first
    return lists


def attend(t: Trial, answer: Answer, qkv: QKV, blocks: Lists, block: int) -> None:
    t.close(answer(*qkv, blocks, block), reference(*qkv, blocks, block))


@EXERCISE.requirement(1, "every block listed", rounds=2)
def everything(t: Trial, block_sparse_attention: Answer) -> None:
    """the lists 0 … b for query block b: causal attention, (B, H, N, D); q, k, v are unchanged afterwards"""
    block, n = t.integer(3, 5), t.integer(3, 4)
    blocks = [list(range(own + 1)) for own in range(n)]
    attend(t, block_sparse_attention, draw(t, n * block), blocks, block)
    t.unchanged()


@EXERCISE.requirement(2, "some blocks listed, in any order")
def listed(t: Trial, block_sparse_attention: Answer) -> None:
    """one softmax over the tokens of all listed blocks together, up to the query's own; a list of its own for
    each block of queries"""
    block, n = t.integer(3, 5), t.integer(5, 6)
    attend(t, block_sparse_attention, draw(t, n * block), some(t, n), block)


@EXERCISE.requirement(1, "a half-filled last block", rounds=2)
def half_filled(t: Trial, block_sparse_attention: Answer) -> None:
    """N need not be a multiple of the block: the last block has fewer tokens, and N may be less than one
    block"""
    block, n = t.integer(3, 5), t.integer(4, 5)
    attend(t, block_sparse_attention, draw(t, n * block - t.integer(1, block - 1)), some(t, n), block)
    attend(t, block_sparse_attention, draw(t, block - 1), [[0]], block)


@EXERCISE.requirement(1, "what is not listed is not touched", rounds=2)
def untouched(t: Trial, block_sparse_attention: Answer) -> None:
    """the rows of a query block are right though all blocks that it does not list hold NaN; no tensor of N·N
    numbers is made, not even a mask"""
    block, n = t.integer(3, 5), t.integer(5, 6)
    (q, k, v), blocks = draw(t, n * block), some(t, n)
    own = t.integer(3, n - 1)
    rows = torch.zeros(n * block, dtype=torch.bool)
    rows[own * block : (own + 1) * block] = True
    want = reference(q, k, v, blocks, block)
    for other in set(range(n)) - set(blocks[own]):
        k[:, :, other * block : (other + 1) * block] = torch.nan
        v[:, :, other * block : (other + 1) * block] = torch.nan
    got = block_sparse_attention(q, k, v, blocks, block)
    if isinstance(got, Tensor) and got.shape == want.shape:
        got = torch.where(rows[:, None], got, want.to(got.dtype))
    t.note(got, compare(got, want))
    if t.round == 0:
        no_square(t, block_sparse_attention)


def no_square(t: Trial, answer: Callable[..., Tensor]) -> None:
    n_blocks, block = 8, 8
    N = n_blocks * block
    q, k, v = (t.randn(1, 1, N, 4) for _ in range(3))
    with new_tensors() as made:
        answer(q, k, v, [sorted({0, own}) for own in range(n_blocks)], block)
    largest = largest_new_tensor(made)
    if largest.numel >= N * N:
        came = f"{largest.op} made one of shape {largest.shape}; N = {N}"
        t.note("square", Difference("", f"fewer than {N * N:,} numbers in any tensor", came))


@EXERCISE.requirement(1, "large scores", rounds=2)
def large(t: Trial, block_sparse_attention: Answer) -> None:
    """scores of some hundreds, positive and negative: the same softmax, without overflow and without NaN"""
    block, n = t.integer(3, 5), t.integer(4, 5)
    q, k, v = draw(t, n * block)
    # Far apart, so that rounding decides nothing: the largest score of a row wins by much.
    attend(t, block_sparse_attention, (300 * q, k, v), some(t, n), block)
