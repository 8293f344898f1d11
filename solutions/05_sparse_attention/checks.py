"""Unit 05: requirements and hints of the exercises on sparse attention."""

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.attention.patterns import Global, Pattern, Random, parse, primitives
from kvlearn.grading import (
    Answer,
    CheckContext,
    Difference,
    Exercise,
    Stop,
    compare,
    describe,
    largest_new_tensor,
    new_tensors,
    shorten,
)

# 05.1: the two patterns of the Sparse Transformer as masks, compared with counting back from each query

classic = Exercise(
    id="05.1",
    slug="classic",
    title="Two classic patterns as masks",
    answers=("strided_mask", "fixed_mask"),
    hints=(
        "Write each pattern as a condition on one pair, query i and key j, and j ≤ i first of all. Then let "
        "`i = torch.arange(n)[:, None]` and `j = torch.arange(n)[None, :]` do all pairs at once.",
        "Strided: the distance i − j is all that counts. It is smaller than the stride, *or* a multiple of "
        "it. Counted from the query: for i = 7 and stride 3 the keys 7, 4, 1 and not 6, 3, 0.",
        "Fixed: here the positions count, not the distance. The same block is `i // block == j // block`. A "
        "summary token is one of the last of its block, `j % block >= block - summary`.",
        "`(j <= i) & ((i - j < stride) | ((i - j) % stride == 0))`, and the same with the two conditions of "
        "the fixed pattern. The last block may be half-filled; neither formula needs a case for that.",
    ),
)


def classic_strided(n_tokens: int, stride: int) -> Tensor:
    """One token after the other back from each query, then one stride after the other."""
    rows = []
    for i in range(n_tokens):
        seen = {*range(max(0, i - stride + 1), i + 1), *range(i, -1, -stride)}
        rows.append([j in seen for j in range(n_tokens)])
    return torch.tensor(rows)


def fixed(n_tokens: int, block: int, summary: int) -> Tensor:
    """Block by block from the start of the text."""
    rows = []
    for start in range(0, n_tokens, block):
        summaries = {j for end in range(block, start + 1, block) for j in range(end - summary, end)}
        queries = range(start, min(start + block, n_tokens))
        rows += [[j in summaries or start <= j <= i for j in range(n_tokens)] for i in queries]
    return torch.tensor(rows)


def classic_pairs(got: Any, n: int) -> Any:
    """The mask as it is meant: ones and zeros, 0 and −∞, or numpy's, cost the point for the form and no
    other."""
    got = torch.as_tensor(got) if isinstance(got, np.ndarray) else got
    if not isinstance(got, Tensor) or got.is_complex() or got.numel() != n * n:
        return got
    got = got.detach().reshape(n, n)
    return got == 0 if got.dtype.is_floating_point and not (got > 0).any() else got.bool()


def classic_same(t: CheckContext, got: Any, want: Tensor, area: Tensor, what: str) -> None:
    """The right pairs are marked within ``area``; of the others nothing is asked here."""
    got = classic_pairs(got, len(want))
    if isinstance(got, Tensor) and got.shape == want.shape:
        got = torch.where(area, got, want)
    t.note(got, compare(got, want, what))


def positions(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n)[:, None], torch.arange(n)[None]


def strided_sizes(t: CheckContext) -> tuple[int, int]:
    """Tokens and stride; a stride of 1 or a text shorter than the stride comes in the last round."""
    stride = t.integer(3, 5)
    return 3 * stride + t.integer(1, stride + 2), stride


def fixed_sizes(t: CheckContext) -> tuple[int, int, int]:
    """Tokens, block, summary; the last block is half-filled from the second round on."""
    block = t.integer(5, 7)
    half = t.integer(1, block - 1) if t.round else 0
    return 3 * block + half, block, t.integer(2, block - 3)


@classic.requirement(1, "boolean masks, (N, N)")
def classic_form(t: CheckContext, strided_mask: Answer, fixed_mask: Answer) -> None:
    """dtype bool and two dimensions, a row for each query and a column for each key"""
    n = t.integer(9, 14)
    t.form(strided_mask(n, 3), (n, n), torch.bool)
    t.form(fixed_mask(n, 4, 2), (n, n), torch.bool)


@classic.requirement(1, "itself, and nobody later")
def causal(t: CheckContext, strided_mask: Answer, fixed_mask: Answer) -> None:
    """on the diagonal True, above it False, in both masks"""
    for name, mask, right, sizes in (
        ("strided, [query, key]:", strided_mask, classic_strided, strided_sizes(t)),
        ("fixed, [query, key]:", fixed_mask, fixed, fixed_sizes(t)),
    ):
        want = right(*sizes)
        classic_same(t, mask(*sizes), want, torch.ones_like(want).triu(), name)


@classic.requirement(1, "strided: the last tokens")
def classic_near(t: CheckContext, strided_mask: Answer, fixed_mask: Answer) -> None:
    """the `stride` tokens up to the query's own, whatever their position"""
    n, stride = strided_sizes(t)
    i, j = positions(n)
    classic_same(
        t,
        strided_mask(n, stride),
        classic_strided(n, stride),
        (i > j) & (i - j < stride),
        "strided, [query, key]:",
    )


@classic.requirement(1, "strided: every stride-th before")
def far(t: CheckContext, strided_mask: Answer, fixed_mask: Answer) -> None:
    """stride, 2 · stride, 3 · stride … tokens back from the query, and none between; stride 1 is the causal
    mask, and so is a stride longer than the text"""
    n, stride = strided_sizes(t)
    i, j = positions(n)
    classic_same(
        t, strided_mask(n, stride), classic_strided(n, stride), i - j >= stride, "strided, [query, key]:"
    )
    for stride in (1, n + 2):
        classic_same(t, strided_mask(n, stride), classic_strided(n, stride), i > j, "strided, [query, key]:")


@classic.requirement(1, "fixed: the query's own block")
def classic_own(t: CheckContext, strided_mask: Answer, fixed_mask: Answer) -> None:
    """all tokens of the block that the query is in, up to itself"""
    n, block, summary = fixed_sizes(t)
    i, j = positions(n)
    own_block = (i > j) & (i // block == j // block)
    classic_same(
        t, fixed_mask(n, block, summary), fixed(n, block, summary), own_block, "fixed, [query, key]:"
    )


@classic.requirement(1, "fixed: the summaries of the blocks before")
def summaries(t: CheckContext, strided_mask: Answer, fixed_mask: Answer) -> None:
    """the last `summary` tokens of every earlier block, and no others of it; summary = block is the causal
    mask"""
    n, block, summary = fixed_sizes(t)
    i, j = positions(n)
    earlier = i // block > j // block
    classic_same(t, fixed_mask(n, block, summary), fixed(n, block, summary), earlier, "fixed, [query, key]:")
    classic_same(t, fixed_mask(n, block, block), fixed(n, block, block), i > j, "fixed, [query, key]:")


# 05.2: Longformer and BigBird as sentences, whose meaning is compared with loops over blocks

sentence = Exercise(
    id="05.2",
    slug="sentence",
    title="Longformer and BigBird in the pattern language",
    answers=("longformer_sentence", "bigbird_sentence"),
    hints=(
        "A sentence is text: words joined by ` | `, and a key is seen if one of them shows it. Build it as "
        'an f-string, `f"local({window}) | …"`, and print its mask with `parse(…).mask(12)`.',
        "`local` and `global` count tokens, not blocks. BigBird's window is the query's own block and "
        "`n_window` before it, so (n_window + 1) · block tokens, and it slides by whole blocks: `block=` "
        "says so.",
        "`random(n_blocks, block=…, skip_first=…, skip_last=…, seed=…)` counts blocks, all but `block` "
        "itself. It never draws the query's own block; skip_first and skip_last leave out what the other "
        "words show.",
        "The draw is that of the word, not yours: it depends on `seed` and the block's number alone. So "
        "write the seed that is given into the sentence and draw nothing yourself.",
    ),
)


def read(t: CheckContext, got: Any) -> Pattern:
    """The mask of a sentence, or the end of this round."""
    if not isinstance(got, str):
        t.true(False, "a sentence: text", describe(got))
        raise Stop
    try:
        return parse(got)
    except Exception as error:
        came = f"{shorten(repr(got), 120)}, which cannot be read: {shorten(str(error), 300)}"
        t.true(False, "a sentence of the pattern language", came)
        raise Stop from None


def mask_of(parts: list[Pattern], n_tokens: int) -> Tensor:
    return reduce(or_, (part.mask(n_tokens) for part in parts), torch.zeros(n_tokens, n_tokens).bool())


def sentence_pairs(n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    i, j = torch.arange(n_tokens)[:, None], torch.arange(n_tokens)[None]
    return i, j, j <= i


def near_blocks(n_tokens: int, block: int, n_window: int) -> Tensor:
    """Block by block: a query's own and so many before it."""
    mask = torch.zeros(n_tokens, n_tokens, dtype=torch.bool)
    for start in range(0, n_tokens, block):
        mask[start : start + block, max(0, start - n_window * block) : start + block] = True
    return mask.tril()


def first_tokens(n_tokens: int, n: int) -> Tensor:
    """The first n see all before them, and all see them."""
    mask = torch.zeros(n_tokens, n_tokens, dtype=torch.bool)
    mask[:n], mask[:, :n] = True, True
    return mask.tril()


def drawn(n_tokens: int, block: int, n_window: int, n_global: int, n_random: int, seed: int) -> Tensor:
    """The blocks that the word draws, block by block."""
    word = Random(n_random, block, skip_first=n_global, skip_last=n_window, seed=seed)
    mask = torch.zeros(n_tokens, n_tokens, dtype=torch.bool)
    for start in range(0, n_tokens, block):
        for number in word.draw(start // block):
            mask[start : start + block, number * block : (number + 1) * block] = True
    return mask


SentenceSizes = tuple[int, int, int, int, int]


def sentence_sizes(t: CheckContext) -> SentenceSizes:
    """block, n_window, n_global, n_random, seed; window and global differ, so that no exchange goes
    unseen."""
    n_window, n_global = t.random.sample(range(1, 4), 2)
    return t.integer(3, 4), n_window, n_global, t.integer(1, 3), t.integer(1, 10**6)


def length(t: CheckContext, given: SentenceSizes) -> int:
    """Enough blocks for a choice among many, even for one who skips tokens; the last is half-filled."""
    block, n_window, n_global, *_ = given
    return block * (block * (n_window + n_global) + 4) + t.integer(1, block - 1)


def part_of(t: CheckContext, got: Any, given: SentenceSizes, which: str) -> None:
    """The words of one part show what that part of BigBird shows, in however many words."""
    block, n_window, n_global, _, _ = given
    n = length(t, given)
    parts = {
        "near": near_blocks(n, block, n_window),
        "global": first_tokens(n, n_global * block),
        "random": drawn(n, *given),
    }
    pattern = read(t, got)
    kinds = {"global": Global, "random": Random}
    mine = [
        w
        for w in primitives(pattern)
        if next((k for k, c in kinds.items() if isinstance(w, c)), "near") == which
    ]
    if which in kinds and not mine:
        t.true(False, f"a word {which}(…)", f"none in {shorten(repr(got), 150)}")
        return
    mask, said = mask_of(mine, n), " | ".join(map(str, mine)) or "no word for it"
    t.note(mask, compare(mask, parts[which], f"the mask of {said}, [query, key]:"))


@sentence.requirement(1, "Longformer")
def sentence_longformer(t: CheckContext, longformer_sentence: Answer, bigbird_sentence: Answer) -> None:
    """the `window` tokens up to the query's own, and the first `n_global`: all see them, they see all
    before"""
    window, n_global = t.integer(3, 7), t.integer(2, 5)
    n = 2 * window + n_global + t.integer(4, 9)
    i, j, past = sentence_pairs(n)
    got = longformer_sentence(window, n_global)
    want = (past & (i - j < window)) | first_tokens(n, n_global)
    mask = read(t, got).mask(n)
    t.note(mask, compare(mask, want, f"the mask of {shorten(got, 150)}, [query, key]:"))


@sentence.requirement(1, "BigBird: its own block and the window")
def sentence_near(t: CheckContext, longformer_sentence: Answer, bigbird_sentence: Answer) -> None:
    """the query's own block up to itself, and n_window whole blocks before it"""
    given = sentence_sizes(t)
    part_of(t, bigbird_sentence(*given), given, "near")


@sentence.requirement(1, "BigBird: the global blocks")
def wide(t: CheckContext, longformer_sentence: Answer, bigbird_sentence: Answer) -> None:
    """every token of the first n_global blocks, as a key and as a query"""
    given = sentence_sizes(t)
    part_of(t, bigbird_sentence(*given), given, "global")


@sentence.requirement(2, "BigBird: the random blocks")
def rest(t: CheckContext, longformer_sentence: Answer, bigbird_sentence: Answer) -> None:
    """n_random blocks for each block of queries, drawn by the word with the given seed, and none among those
    that are global or in the window"""
    given = sentence_sizes(t)
    part_of(t, bigbird_sentence(*given), given, "random")


@sentence.requirement(1, "one seed, one pattern", rounds=2)
def repeated(t: CheckContext, longformer_sentence: Answer, bigbird_sentence: Answer) -> None:
    """called again with the same seed the same pattern, with another seed another"""
    *others, seed = given = sentence_sizes(t)
    n = length(t, given) + 6 * given[0]  # one who skips tokens has a choice among many as well
    first, again, other = (
        read(t, bigbird_sentence(*others, number)).mask(n) for number in (seed, seed, seed + 1)
    )
    same = torch.equal(first, again)
    t.true(same, "the same pattern for the same seed", "two different ones")
    if same:
        drawn_words: list[Pattern] = [
            w for w in primitives(read(t, bigbird_sentence(*given))) if isinstance(w, Random)
        ]
        came = "the same" if mask_of(drawn_words, n).any() else "the same: nothing is drawn"
        t.true(not torch.equal(first, other), "another pattern for another seed", came)


# 05.3: attention that touches listed blocks only, compared with SDPA with a mask made pair by pair

union = Exercise(
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


def union_reference(q: Tensor, k: Tensor, v: Tensor, blocks: Lists, block: int) -> Tensor:
    N = q.shape[2]
    seen = [[s <= i and s // block in blocks[i // block] for s in range(N)] for i in range(N)]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.tensor(seen))


def union_draw(t: CheckContext, n_tokens: int, dtype: torch.dtype = torch.float32) -> QKV:
    B, H, D = t.pick(2, 3), t.pick(3, 5), t.pick(8, 16)
    q, k, v = (t.randn(B, H, n_tokens, D, dtype=dtype) for _ in range(3))
    return q, k, v


def some(t: CheckContext, n_blocks: int) -> Lists:
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


def attend(t: CheckContext, answer: Answer, qkv: QKV, blocks: Lists, block: int) -> None:
    t.close(answer(*qkv, blocks, block), union_reference(*qkv, blocks, block))


@union.requirement(1, "every block listed", rounds=2)
def everything(t: CheckContext, block_sparse_attention: Answer) -> None:
    """the lists 0 … b for query block b: causal attention, (B, H, N, D); q, k, v are unchanged afterwards"""
    block, n = t.integer(3, 5), t.integer(3, 4)
    blocks = [list(range(own + 1)) for own in range(n)]
    attend(t, block_sparse_attention, union_draw(t, n * block), blocks, block)
    t.unchanged()


@union.requirement(2, "some blocks listed, in any order")
def listed(t: CheckContext, block_sparse_attention: Answer) -> None:
    """one softmax over the tokens of all listed blocks together, up to the query's own; a list of its own for
    each block of queries"""
    block, n = t.integer(3, 5), t.integer(5, 6)
    attend(t, block_sparse_attention, union_draw(t, n * block), some(t, n), block)


@union.requirement(1, "a half-filled last block", rounds=2)
def union_half_filled(t: CheckContext, block_sparse_attention: Answer) -> None:
    """N need not be a multiple of the block: the last block has fewer tokens, and N may be less than one
    block"""
    block, n = t.integer(3, 5), t.integer(4, 5)
    attend(t, block_sparse_attention, union_draw(t, n * block - t.integer(1, block - 1)), some(t, n), block)
    attend(t, block_sparse_attention, union_draw(t, block - 1), [[0]], block)


@union.requirement(1, "what is not listed is not touched", rounds=2)
def union_untouched(t: CheckContext, block_sparse_attention: Answer) -> None:
    """the rows of a query block are right though all blocks that it does not list hold NaN; no tensor of N·N
    numbers is made, not even a mask"""
    block, n = t.integer(3, 5), t.integer(5, 6)
    (q, k, v), blocks = union_draw(t, n * block), some(t, n)
    # With a gap before the own block, which is listed first or last; the last query block lists another.
    one = t.pick(0, 1)
    blocks[3], blocks[-1] = [one, 3], [n - 1, 1 - one]
    own = (n - 1, 3)[t.round]
    rows = torch.zeros(n * block, dtype=torch.bool)
    rows[own * block : (own + 1) * block] = True
    want = union_reference(q, k, v, blocks, block)
    for other in set(range(n)) - set(blocks[own]):
        k[:, :, other * block : (other + 1) * block] = torch.nan
        v[:, :, other * block : (other + 1) * block] = torch.nan
    got = block_sparse_attention(q, k, v, blocks, block)
    if isinstance(got, Tensor) and got.shape == want.shape:
        got = torch.where(rows[:, None], got, want.to(got.dtype))
    t.note(got, compare(got, want))
    if t.round == 0:
        no_square(t, block_sparse_attention)


def no_square(t: CheckContext, answer: Callable[..., Tensor]) -> None:
    n_blocks, block = 8, 8
    N = n_blocks * block
    q, k, v = (t.randn(1, 1, N, 4) for _ in range(3))
    with new_tensors() as made:
        answer(q, k, v, [sorted({0, own}) for own in range(n_blocks)], block)
    largest = largest_new_tensor(made)
    if largest.numel >= N * N:
        came = f"{largest.op} made one of shape {largest.shape}; N = {N}"
        t.note("square", Difference("", f"fewer than {N * N:,} numbers in any tensor", came))


@union.requirement(1, "large scores", rounds=2)
def large(t: CheckContext, block_sparse_attention: Answer) -> None:
    """scores of some hundreds, positive and negative: the same softmax, without overflow and without NaN"""
    block, n = t.integer(3, 5), t.integer(4, 5)
    q, k, v = union_draw(t, n * block)
    # Far apart, so that rounding decides nothing, but for a key that is twice in block 0 and once in 1.
    k[:, :, 1] = k[:, :, block] = k[:, :, 0]
    given = 100 * q, k, v, some(t, n), block
    t.close(block_sparse_attention(*given), union_reference(*given), tolerance=1e-3)


# 05.4: what must be kept at each step, compared with asking every later query one by one

evict = Exercise(
    id="05.4",
    slug="evict",
    title="Which tokens can be forgotten",
    answers=("tokens_to_keep", "n_slots"),
    hints=(
        "A token may go once its *last* reader has attended. What the step at t reads itself does not matter "
        "for that: ask for each token j whether any query t, t + 1, … N − 1 reads it.",
        "Column j of the mask lists the readers of token j. Whether one of them is at t or later: a running "
        "`any` from the bottom up, `mask.flip(0).cumsum(0).flip(0) > 0`.",
        "The row of a global token to come is full: it is the reader that keeps everything before it alive. "
        "And a token that does not exist yet is not kept: j ≤ t, `.tril()`.",
        "A cache needs as many slots as tokens are kept at the worst step, not at the last one: the largest "
        "row sum.",
    ),
)


def kept(mask: Tensor) -> Tensor:
    columns, n = mask.T.tolist(), len(mask)
    return torch.tensor([[j <= t and any(columns[j][t:]) for j in range(n)] for t in range(n)])


def window(n: int, size: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril().triu(1 - size)


def evict_strided(n: int, stride: int) -> Tensor:
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    return window(n, 2) | ((j <= i) & ((i - j) % stride == 0))


def scattered(t: CheckContext, n: int) -> Tensor:
    """Few pairs, drawn; every token sees itself, but for one that nobody ever reads. None sees all before it,
    as a global one would."""
    mask = (t.mask(n, n, share=0.15) | torch.eye(n, dtype=torch.bool)).tril()
    mask[1:5, 0] = False
    mask[:, t.integer(2, n - 3)] = False
    return mask


def not_itself(n: int) -> Tensor:
    """A token sees the one before it and the third before, and never itself."""
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    return (i - j == 3) | ((i - j == 1) & (j % 2 == 0))


def with_global(n: int, size: int, at: int) -> Tensor:
    """A window, and one token that sees all before it and that all see."""
    mask = window(n, size)
    mask[at, : at + 1] = True
    mask[at:, at] = True
    return mask


def drawn_global(t: CheckContext) -> Tensor:
    """The global token is in the first half or at the end of it, far enough from both ends."""
    size = t.integer(2, 3)
    at = size + t.integer(4, 6)
    return with_global(at + size + t.integer(6, 9), size, at)


def evict_same(t: CheckContext, got: Any, mask: Tensor, what: str) -> None:
    """Ones and zeros are as good as True and False."""
    want = kept(mask)
    if isinstance(got, Tensor) and got.shape == want.shape and not got.is_complex():
        got = got.bool()
    t.note(got, compare(got, want, what))


@evict.requirement(1, "a window")
def windows(t: CheckContext, tokens_to_keep: Answer, n_slots: Answer) -> None:
    """at step t the last W tokens, the token at t among them; nothing that is not there yet"""
    mask = window(t.integer(9, 14), t.integer(3, 5))
    evict_same(t, tokens_to_keep(mask), mask, "[step, token]:")


@evict.requirement(1, "readers that come late, or never")
def late(t: CheckContext, tokens_to_keep: Answer, n_slots: Answer) -> None:
    """a token stays while some query at t or later reads it, however many steps between do not; one that
    nobody reads, not even itself, is not kept at all, and one that is read only later is kept from
    its own step on"""
    for mask, what in (
        (evict_strided(t.integer(10, 14), t.integer(4, 5)), "strided, [step, token]:"),
        (scattered(t, t.integer(9, 12)), "drawn at random, [step, token]:"),
        (not_itself(t.integer(9, 12)), "not itself, but the third before, [step, token]:"),
    ):
        evict_same(t, tokens_to_keep(mask), mask, what)


@evict.requirement(1, "a global reader to come")
def global_reader(t: CheckContext, tokens_to_keep: Answer, n_slots: Answer) -> None:
    """until the global token has attended everything stays; after it the window, and the global token
    itself"""
    mask = drawn_global(t)
    evict_same(t, tokens_to_keep(mask), mask, "[step, token]:")


@evict.requirement(1, "slots of the cache")
def slots(t: CheckContext, tokens_to_keep: Answer, n_slots: Answer) -> None:
    """as many as tokens are kept at once, whatever the pattern"""
    n = t.integer(10, 14)
    for mask, what in (
        (window(n, t.integer(3, 5)), "a window:"),
        (scattered(t, n), "drawn at random:"),
        (evict_strided(n, t.integer(4, 5)), "strided:"),
    ):
        t.number(n_slots(mask), int(kept(mask).sum(1).max()), what)


@evict.requirement(1, "slots at the worst step")
def peak(t: CheckContext, tokens_to_keep: Answer, n_slots: Answer) -> None:
    """the most that any step needs, though later steps need far fewer"""
    mask = drawn_global(t)
    t.number(n_slots(mask), int(kept(mask).sum(1).max()), "a window and one global token:")


# 05.5: the blocks that each query picks, compared with sorting scores query by query in plain Python

select = Exercise(
    id="05.5",
    slug="select",
    title="The best blocks, without looking ahead",
    answers=("select_blocks",),
    hints=(
        "Which blocks may be scored at all? Those before the query's own, block c < own = i // block: they "
        "are complete, and all their keys lie in the past. The own one is not scored but always picked.",
        "Means of the complete blocks: `k[:, :, : c * block].unflatten(2, (c, block)).mean(3)` with c = T // "
        "block. Scores: q times those, (B, H, T, c). A half-filled last block needs a column but no score.",
        "Hide the scores of the blocks that are not before the own one with −∞ and take the n_blocks − 1 "
        "best of each row. A row with fewer candidates picks hidden ones as well: take them out again with "
        "`&`.",
        "`scores.sort(dim=-1, descending=True, stable=True).indices[..., : n_blocks - 1]` keeps the lower of "
        "two equal blocks in front; `topk` promises nothing of the kind. `scatter_` turns indices into True.",
    ),
)


def select_reference(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    B, H, T, _ = q.shape
    chosen = torch.zeros(B, H, T, -(-T // block), dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            sums = [part.double().sum(0) for part in k[b, h].split(block)]
            for i, scores in enumerate((q[b, h].double() @ torch.stack(sums).T / block).tolist()):
                own = i // block  # later scores are not looked at
                best = sorted(range(own), key=lambda c: (-scores[c], c))[: n_blocks - 1]
                chosen[b, h, i, [own, *best]] = True
    return chosen


def select_draw(t: CheckContext, T: int) -> tuple[Tensor, Tensor]:
    B, H, D = 2, 3, t.pick(8, 16)
    return t.randn(B, H, T, D), t.randn(B, H, T, D)


INDEX = "[sequence, head, query, block]:"


def boolean(got: Any, want: Tensor) -> Any:
    """Ones and zeros are as good as True and False, but for the point for the form."""
    fits = isinstance(got, Tensor) and got.shape == want.shape and not got.is_complex()
    return got.bool() if fits else got


def select_same(t: CheckContext, got: Any, want: Tensor, area: Tensor) -> None:
    got = boolean(got, want)
    if isinstance(got, Tensor) and got.shape == want.shape:
        got = torch.where(area, got, want)
    t.note(got, compare(got, want, INDEX))


def before_own(T: int, block: int) -> Tensor:
    """(T, N): where a block lies before the query's own."""
    return torch.arange(-(-T // block)) < (torch.arange(T) // block)[:, None]


@select.requirement(1, "a boolean for each query and block", rounds=2)
def select_form(t: CheckContext, select_blocks: Answer) -> None:
    """dtype bool, (B, H, T, ⌈T / block⌉); q and k are unchanged afterwards"""
    block = t.integer(3, 5)
    T = 3 * block + t.integer(1, block - 1)
    q, k = select_draw(t, T)
    t.form(select_blocks(q, k, block, 3), (*q.shape[:3], -(-T // block)), torch.bool)
    t.unchanged()


@select.requirement(1, "its own block, and none after it", rounds=2)
def select_own(t: CheckContext, select_blocks: Answer) -> None:
    """the block that the query is in is picked always, whatever it would score; later ones never"""
    block = t.integer(3, 5)
    T = 5 * block
    q, k = select_draw(t, T)
    want = select_reference(q, k, block, 3)
    select_same(t, select_blocks(q, k, block, 3), want, ~before_own(T, block))


@select.requirement(1, "the best of the blocks before")
def best(t: CheckContext, select_blocks: Answer) -> None:
    """the n_blocks − 1 whose mean key fits the query best, for every head and sequence by itself"""
    block, n_blocks = t.integer(3, 4), t.integer(3, 4)
    T = 6 * block
    q, k = select_draw(t, T)
    want = select_reference(q, k, block, n_blocks)
    select_same(t, select_blocks(q, k, block, n_blocks), want, before_own(T, block))


@select.requirement(1, "a half-filled block, and too few of them", rounds=2)
def edges(t: CheckContext, select_blocks: Answer) -> None:
    """a column for the half-filled last block; all blocks before where there are no more than n_blocks − 1;
    with n_blocks = 1 the own one alone"""
    block = t.integer(3, 5)
    for whole, n_blocks in ((5, 3), (2, 6), (4, 1), (0, 2)):
        q, k = select_draw(t, whole * block + t.integer(1, block - 1))
        want = select_reference(q, k, block, n_blocks)
        got = boolean(select_blocks(q, k, block, n_blocks), want)
        when = f"n_blocks = {n_blocks}, {whole} blocks and a part, {INDEX}"
        t.note(got, compare(got, want, when))


@select.requirement(1, "equal scores", rounds=2)
def ties(t: CheckContext, select_blocks: Answer) -> None:
    """of blocks with equal scores the earlier one"""
    block, n, n_blocks = 4, 6, t.integer(3, 4)
    B, H, D = 2, 3, 8
    # Small whole numbers and blocks of four: every sum is exact, so equal is equal in whatever order.
    while True:
        kinds = torch.randint(-3, 4, (2, block, D), generator=t.generator).float()
        shorter, longer = kinds.mean(1).norm(dim=-1)
        if longer > 2 * shorter > 0:
            break
    if t.round == 0:
        kinds[1] = kinds[0]
    # The first of the second kind comes after as many of the first kind as can be picked.
    order = [0, 0, 0, 1, 1, 1]
    k = torch.cat([kinds[kind] for kind in order]).expand(B, H, -1, -1).clone()
    q = torch.randint(-3, 4, (B, H, n * block, D), generator=t.generator).float()
    want = select_reference(q, k, block, n_blocks)
    select_same(t, select_blocks(q, k, block, n_blocks), want, before_own(n * block, block))


@select.requirement(1, "nothing of the future")
def prefix(t: CheckContext, select_blocks: Answer) -> None:
    """what a query picks is the same whatever comes after it: other keys, other queries, more of them"""
    block, n_blocks = t.integer(3, 5), 3
    length = 5 * block + t.integer(2, block - 1)
    q, k = select_draw(t, 7 * block)
    other_q, other_k = draw_like(t, q), draw_like(t, k)
    first = select_blocks(q, k, block, n_blocks)
    for x, new in ((q, other_q), (k, other_k)):
        x[:, :, length:] = new[:, :, length:]
    second = select_blocks(q, k, block, n_blocks)
    shape = (*q.shape[:3], 7)
    for got in (first, second):
        if not isinstance(got, Tensor) or tuple(got.shape) != shape:
            t.true(False, f"a tensor of shape {shape}", describe(got))
            raise Stop
    one, two = (got[:, :, :length].bool() for got in (first, second))
    changed = int((one != two).any(-1).sum())
    came = f"{changed} of {one[..., 0].numel()} queries before the change pick other blocks"
    t.note(one ^ two, Difference("", "the same blocks as before", came) if changed else None)
    picked = one.any(-1).all()
    t.true(bool(picked), "at least one block for every query", "queries with none")


def draw_like(t: CheckContext, x: Tensor) -> Tensor:
    return t.randn(*x.shape)


# 05.6: a decode step that selects blocks, compared with a loop over sequences and heads

step = Exercise(
    id="05.6",
    slug="step",
    title="A step that reads what it selects",
    answers=("select_step",),
    hints=(
        "In this order: append the new key and value, bring the means up to date, select, attend. The new "
        "token is at position S, so its own block is S // block, and it reads itself.",
        "A mean is appended only when the new token fills its block: (S + 1) % block == 0. Then it is the "
        "mean of the last `block` keys, the new one among them. In between the means stay as they are: the "
        "keys of the half-filled block are in the cache.",
        "Candidates are the blocks before the own one, `means[:, :, : S // block]`: even where this very "
        "step has filled the own block, that one is read anyway. The scores are (B, H, S // block).",
        "Turn blocks into tokens, `(blocks[..., None] * block + torch.arange(block)).flatten(2)`, put "
        "those of the own block, S // block · block … S, behind them, and `gather` keys and values along "
        "dimension 2. Nothing is to be masked: all of it lies in the past.",
    ),
)


class State(NamedTuple):
    """A new token and the cache it finds."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    means: Tensor


def block_means(keys: Tensor, block: int) -> Tensor:
    """Of the complete blocks, one by one."""
    n = keys.shape[2] // block
    parts = [keys[:, :, c * block : (c + 1) * block].double().sum(2) / block for c in range(n)]
    return torch.stack(parts, 2).to(keys.dtype) if parts else keys[:, :, :0]


def step_draw(t: CheckContext, S: int, block: int) -> State:
    B, H, D = 2, t.pick(3, 5), t.pick(8, 16)
    q, k, v = (t.randn(B, H, 1, D) for _ in range(3))
    keys, values = t.randn(B, H, S, D), t.randn(B, H, S, D)
    return State(q, k, v, keys, values, block_means(keys, block))


def selected(state: State, block: int, n_blocks: int) -> list[list[list[int]]]:
    """The blocks that each head of each sequence reads."""
    own = state.keys.shape[2] // block
    scores = (state.means[:, :, :own] @ state.q.mT)[..., 0].tolist()
    ranked = [[sorted(range(own), key=lambda c: -head[c]) for head in row] for row in scores]
    return [[[*order[: n_blocks - 1], own] for order in row] for row in ranked]


def output(state: State, block: int, n_blocks: int) -> Tensor:
    keys, values = torch.cat((state.keys, state.k), 2), torch.cat((state.values, state.v), 2)
    out = torch.empty_like(state.q)
    for b, row in enumerate(selected(state, block, n_blocks)):
        for h, chosen in enumerate(row):
            seen = [s for s in range(keys.shape[2]) if s // block in chosen]
            weights = (keys[b, h, seen] @ state.q[b, h, 0] / state.q.shape[-1] ** 0.5).softmax(0)
            out[b, h, 0] = weights @ values[b, h, seen]
    return out


def four(t: CheckContext, got: Any) -> list[Tensor]:
    """The returned values, or the end of this round."""
    if isinstance(got, tuple | list) and len(got) == 4 and all(isinstance(part, Tensor) for part in got):
        return list(got)
    t.note(got, Difference("", "four tensors, (out, keys, values, means)", describe(got)))
    raise Stop


def step_run(t: CheckContext, answer: Answer, state: State, block: int, n_blocks: int) -> list[Tensor]:
    return four(t, answer(*state, block, n_blocks))


def same_output(
    t: CheckContext, answer: Answer, state: State, block: int, n_blocks: int, when: str = ""
) -> None:
    out = step_run(t, answer, state, block, n_blocks)[0]
    t.close(out, output(state, block, n_blocks), when)


@step.requirement(1, "keys and values: one token more")
def grows(t: CheckContext, select_step: Answer) -> None:
    """(B, H, S + 1, D): all that was there, the new token behind it, whatever is selected; what was handed in
    is unchanged"""
    block = t.integer(3, 5)
    state = step_draw(t, 5 * block + t.integer(0, block - 1), block)
    _, keys, values, _ = step_run(t, select_step, state, block, 3)
    t.close(keys, torch.cat((state.keys, state.k), 2), "keys:")
    t.close(values, torch.cat((state.values, state.v), 2), "values:")
    t.unchanged()


@step.requirement(1, "means, while a block fills up")
def filling(t: CheckContext, select_step: Answer) -> None:
    """as they were, a row for each complete block: a half-filled block has no mean yet"""
    block = t.integer(3, 5)
    part = 0 if t.round == 1 else t.integer(1, block - 2)
    state = step_draw(t, t.integer(3, 5) * block + part, block)
    *_, means = step_run(t, select_step, state, block, 3)
    t.close(means, state.means, "means:")


@step.requirement(1, "means, when a block is full")
def filled(t: CheckContext, select_step: Answer) -> None:
    """a row more: the mean of the `block` keys, the new one among them"""
    block = t.integer(3, 5)
    state = step_draw(t, t.integer(3, 5) * block + block - 1, block)
    *_, means = step_run(t, select_step, state, block, 3)
    want = block_means(torch.cat((state.keys, state.k), 2), block)
    t.close(means, want, "means:")


@step.requirement(1, "the output, with a half-filled block")
def step_half_filled(t: CheckContext, select_step: Answer) -> None:
    """softmax over the own block up to the new token and the best n_blocks − 1 before it, which every head of
    every sequence picks for itself"""
    block, n_blocks = t.integer(4, 6), t.integer(3, 4)
    state = step_draw(t, 7 * block + t.integer(1, block - 2), block)
    same_output(t, select_step, state, block, n_blocks)


@step.requirement(1, "the output, at the edges of blocks")
def borders(t: CheckContext, select_step: Answer) -> None:
    """the first token of a block, the last one, too few blocks, an empty cache"""
    block = t.integer(3, 5)
    for S, n_blocks, when in (
        (6 * block, 3, "the first token of a block:"),
        (6 * block - 1, 3, "the last token of a block:"),
        (2 * block + 1, 6, "fewer blocks than n_blocks:"),
        (4 * block + 1, 1, "n_blocks = 1:"),
        (0, 3, "an empty cache:"),
    ):
        same_output(t, select_step, step_draw(t, S, block), block, n_blocks, when)


@step.requirement(1, "what is not selected is not read")
def step_untouched(t: CheckContext, select_step: Answer) -> None:
    """the output is right though the keys and values of all blocks that a head does not select are NaN"""
    block, n_blocks = t.integer(3, 5), t.integer(3, 4)
    state = step_draw(t, 7 * block + t.integer(1, block - 2), block)
    want = output(state, block, n_blocks)
    for b, row in enumerate(selected(state, block, n_blocks)):
        for h, chosen in enumerate(row):
            for c in set(range(7)) - set(chosen):
                state.keys[b, h, c * block : (c + 1) * block] = torch.nan
                state.values[b, h, c * block : (c + 1) * block] = torch.nan
    out = step_run(t, select_step, state, block, n_blocks)[0]
    t.note(out, compare(out, want))


# 05.7: bytes stored and read by four designs, compared with sets of positions

cache_bytes = Exercise(
    id="05.7",
    slug="bytes",
    title="Stored and read: four designs",
    answers=("sparse_bytes",),
    hints=(
        "Count tokens first, bytes last. One token is 2 · kv_heads · head_dim numbers of `number_bytes` "
        "bytes; query heads do not count. Then ask for each kind: how many tokens must be there, and how "
        "many of them does the step at position N − 1 read?",
        "`longformer` forgets: behind the window only the n_global first tokens have readers to come, so "
        "min(N, window + n_global) tokens are stored, and the step reads the same ones.",
        "`bigbird` forgets nothing: some later block may draw any block. It reads its own block as far as "
        "it is filled, n_window blocks before, n_global at the start and n_random others: so many as there "
        "*are*, and none twice. Python's `set(range(…))` does the union for you.",
        "`indexed` stores an index key beside every token, and the step reads the index keys of *all* N "
        "tokens to find the min(N, top_k) tokens that it reads then. An index key is index_dim numbers of "
        "`index_bytes` bytes and one scale of `scale_bytes` bytes; there is one key for all heads.",
    ),
)

Config = dict[str, Any]
CacheBytesSizes = dict[str, int]


def tokens_read(config: Config, N: int) -> set[int]:
    """The positions that the token at N − 1 reads."""
    t, everything = N - 1, set(range(N))
    if config["kind"] == "longformer":
        window = {t - back for back in range(config["window"]) if back <= t}
        return window | {p for p in everything if p < config["n_global"]}
    if config["kind"] == "bigbird":
        block = config["block"]
        own, n_global = t // block, config["n_global"]
        near = {c for c in range(own + 1) if own - c <= config["n_window"]}
        others = [c for c in range(own) if c >= n_global and c not in near]
        blocks = near | set(range(n_global)) | set(others[: config["n_random"]])
        return {p for p in everything if p // block in blocks}
    if config["kind"] == "indexed":
        return set(range(min(N, config["top_k"])))  # which ones, the content says
    return everything


def tokens_stored(config: Config, N: int) -> set[int]:
    """The positions that this or some later token may read."""
    return tokens_read(config, N) if config["kind"] == "longformer" else set(range(N))


def token_bytes(config: Config) -> int:
    key = value = config["kv_heads"] * config["head_dim"] * config["number_bytes"]
    return key + value


def index_bytes(config: Config, N: int) -> int:
    if config["kind"] != "indexed":
        return 0
    return N * (config["index_dim"] * config["index_bytes"] + config["scale_bytes"])


def cache_bytes_count(config: Config, N: int) -> CacheBytesSizes:
    index, one = index_bytes(config, N), token_bytes(config)
    return {
        "stored": one * len(tokens_stored(config, N)) + index,
        "read": one * len(tokens_read(config, N)) + index,
    }


def cache_bytes_draw(t: CheckContext, kind: str) -> Config:
    kv_heads = t.pick(2, 3, 4, 5)
    config = {
        "kind": kind,
        "query_heads": kv_heads * t.pick(3, 6, 7),
        "kv_heads": kv_heads,
        "head_dim": t.pick(64, 96, 128),
        "number_bytes": t.pick(1, 2, 4),
    }
    if kind == "longformer":
        config |= {"window": t.pick(96, 200, 256), "n_global": t.integer(3, 16)}
    if kind == "bigbird":
        n_window, n_global = t.random.sample(range(1, 4), 2)
        blocks = {"n_window": n_window, "n_global": n_global, "n_random": t.integer(2, 4)}
        config |= {"block": t.pick(16, 24, 64), **blocks}
    if kind == "indexed":
        number = config["number_bytes"]
        index = {"index_bytes": t.pick(*({1, 2, 4} - {number})), "scale_bytes": t.pick(2, 4)}
        config |= {"top_k": t.pick(100, 128, 300), "index_dim": t.pick(32, 48), **index}
    return config


def cache_bytes_same(t: CheckContext, sparse_bytes: Answer, config: Config, N: int, *names: str) -> None:
    got, want = sparse_bytes(config, N), cache_bytes_count(config, N)
    for name in names or ("stored", "read"):
        if not isinstance(got, dict) or name not in got:
            came = f"keys {list(got)[:6]}" if isinstance(got, dict) else describe(got)
            t.true(False, f"a dict with the key {name!r}", came)
            raise Stop
        t.number(got[name], want[name], f"{config['kind']}, N = {N}, {name}:")


@cache_bytes.requirement(1, "full attention")
def full(t: CheckContext, sparse_bytes: Answer) -> None:
    """keys and values of N tokens at every KV head, in numbers of 1, 2 or 4 bytes: stored and read"""
    for _ in range(3):
        cache_bytes_same(t, sparse_bytes, cache_bytes_draw(t, "full"), t.integer(1, 3000))


@cache_bytes.requirement(1, "Longformer")
def cache_bytes_longformer(t: CheckContext, sparse_bytes: Answer) -> None:
    """stored and read: the window and the global tokens, once the text is longer than both"""
    cache_bytes_same(t, sparse_bytes, cache_bytes_draw(t, "longformer"), t.integer(500, 3000))


def long_text(t: CheckContext, config: Config) -> int:
    """A length at which the last block is half-filled and every word has blocks of its own."""
    block = config["block"]
    return block * t.integer(20, 60) + t.integer(2, block - 2)


@cache_bytes.requirement(1, "BigBird, read")
def bigbird_read(t: CheckContext, sparse_bytes: Answer) -> None:
    """its own block as far as it is filled, and n_window + n_global + n_random whole ones; also for a token
    that fills its block"""
    config = cache_bytes_draw(t, "bigbird")
    cache_bytes_same(t, sparse_bytes, config, long_text(t, config), "read")
    cache_bytes_same(t, sparse_bytes, config, config["block"] * t.integer(20, 60), "read")


@cache_bytes.requirement(1, "BigBird, stored")
def bigbird_stored(t: CheckContext, sparse_bytes: Answer) -> None:
    """every token: a later block may draw any block"""
    config = cache_bytes_draw(t, "bigbird")
    cache_bytes_same(t, sparse_bytes, config, long_text(t, config), "stored")


@cache_bytes.requirement(1, "an index")
def indexed(t: CheckContext, sparse_bytes: Answer) -> None:
    """stored: keys, values and an index key with its scale of every token; read: all index keys, and keys and
    values of the top_k tokens"""
    cache_bytes_same(t, sparse_bytes, cache_bytes_draw(t, "indexed"), t.integer(400, 3000))


@cache_bytes.requirement(1, "texts shorter than what a design reads")
def short(t: CheckContext, sparse_bytes: Answer) -> None:
    """no design stores or reads a token that is not there, or one of them twice"""
    config = cache_bytes_draw(t, "longformer")
    window, n_global = config["window"], config["n_global"]
    for N in (window - t.integer(1, 50), window + t.integer(1, n_global - 1), 1):
        cache_bytes_same(t, sparse_bytes, config, N)
    config = cache_bytes_draw(t, "bigbird")
    block, wide, near = config["block"], config["n_global"], config["n_window"]
    for blocks in (wide + near + 1, wide + near, wide, wide - 1):  # complete ones, before the own
        cache_bytes_same(t, sparse_bytes, config, blocks * block + t.integer(2, block - 2), "stored", "read")
    config = cache_bytes_draw(t, "indexed")
    cache_bytes_same(t, sparse_bytes, config, config["top_k"] - t.integer(1, 50))


EXERCISES = (classic, sentence, union, evict, select, step, cache_bytes)
