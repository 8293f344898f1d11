"""Unit 05: known mistakes of the exercises on sparse attention."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import Lists, block_means, cache_bytes, classic, evict, kept, select, sentence, step, union

# 05.1: Two classic patterns as masks


classic.mistakes(
    r"""
    the stride counted from 0
        ((i - j) % stride == 0) → (j % stride == 0)
    The keys 0, stride, 2 · stride … were marked, the same columns for every query. A stride is counted back
    from the query: (i − j) % stride, not j % stride. (Columns that are the same for all are the other
    pattern, fixed.)

    strided columns at the ends of blocks
        ((i - j) % stride == 0) → (j % stride == stride - 1)
    The keys stride − 1, 2 · stride − 1 … were marked, for every query the same. Those are the fixed pattern's
    summaries. The strided one goes back from the query itself, (i − j) % stride == 0.

    only the strided part
        ((i - j < stride) | ((i - j) % stride == 0)) → ((i - j) % stride == 0)
    Every stride-th token is there, and the neighbours are missing: of the last `stride` tokens the query sees
    only itself. The pattern is both parts together. (In the paper one half of the heads may take the one and
    one half the other; here a single mask holds both.)

    only the local part
        ((i - j < stride) | ((i - j) % stride == 0)) → (i - j < stride)
    This is a sliding window. Nothing further back than `stride` tokens can be seen in one layer; that is what
    the strided part is for.

    both conditions at once
        (i - j < stride) | → (i - j < stride) &
    `and` in place of `or`: near *and* a multiple of the stride away is the token itself and no other. A token
    is seen if at least one part of the pattern shows it.

    the local part one short
        i - j < stride → i - j < stride - 1
    The query's own token was not counted among the last `stride`, or `<` is where `<=` belongs: the
    distances 0 … stride − 2 were marked. They are 0 … stride − 1, so `i - j < stride`.

    the local part too wide
        i - j < stride → i - j <= stride + 1
    The local part reaches one token beyond the first stride. Up to distance stride − 1 it is local, at
    distance stride the other part begins, and distance stride + 1 belongs to neither.

    the query's block in place of the last tokens
        (i - j < stride) → (i // stride == j // stride)
    The local part starts at the last multiple of the stride, as if the text were cut into blocks. So a query
    right behind a cut has hardly a neighbour. The strided pattern has a window that moves along with the
    query; blocks belong to the fixed one.

    one stride back and no further
        ((i - j < stride) | ((i - j) % stride == 0)) → (i - j <= stride)
    Only the token exactly one stride back was marked beside the neighbours. The strided part goes on: 2, 3, 4
    … strides back, to the start of the text.

    strided: both directions
        (j <= i) & ((i - j < stride) → (((i - j).abs() < stride)
    The distance was taken without its sign, so a query sees as many later tokens as earlier ones. A decoder
    must not: j ≤ i belongs to every mask here.

    rows and columns exchanged
        return (j <= i) & ((i - j → i, j = j, i
            return (j <= i) & ((i - j
        return (j <= i) & ((i // → i, j = j, i
            return (j <= i) & ((i //
    Rows are keys here and columns queries, so everything below the diagonal has moved above it: each token
    sees the later ones. Row i says what *query* i sees: queries get `[:, None]`, keys `[None, :]`.

    True means hidden
        (j <= i) & ((i - j → (j > i) | ~((i - j
        (j <= i) & ((i // → (j > i) | ~((i //
    The mask marks what must *not* be seen. Here, as everywhere in the course and in PyTorch's
    scaled_dot_product_attention, True means: may attend.

    a token does not see itself
        (j <= i) & ((i - j → (j < i) & ((i - j
        (j <= i) & ((i // → (j < i) & ((i //
    The diagonal is False (`<` where `<=` belongs). Distance 0 is the query's own token: both patterns show
    it, and without it the first token would see nothing at all.

    the future left open in both
        (j <= i) & ((i - j → ((i - j
        (j <= i) & ((i // → ((i //
    j ≤ i is missing. In the strided mask every later token has a distance below `stride` (a negative one),
    and in the fixed one a query sees its whole block and the summaries of blocks to come.

    zeros and −∞ in place of True and False
        return (j <= i) & ((i - j → return torch.log((j <= i) & ((i - j
        % stride == 0)) → % stride == 0)))
        return (j <= i) & ((i // → return torch.log((j <= i) & ((i //
        >= block - summary)) → >= block - summary)))
    The pairs are right, but as numbers to be added to the scores. Asked for is a boolean mask: it takes a
    byte a pair, can be combined with `&` and `|`, and nobody can mistake its meaning.

    ones and zeros in place of True and False
        (j <= i) & ((i - j → (j <= i).long() & ((i - j
        (j <= i) & ((i // → (j <= i).long() & ((i //
    The pairs are right, as numbers 1 and 0. `~mask` would make −2 and −1 of integers, and masked_fill refuses
    them: make it boolean.

    the first tokens of a block as its summary
        j % block >= block - summary → j % block < summary
    The summaries were taken from the start of each block. A token can only sum up what it has seen, and the
    first token of a block has seen nothing of it: the *last* ones are the summary.

    one summary token per block
        j % block >= block - summary → j % block == block - 1
    Only the last token of each block can be seen from later blocks; `summary` was not looked at. The last
    `summary` tokens count.

    the summary one token short
        j % block >= block - summary → j % block > block - summary
    One token of each summary is missing: `>` where `>=` belongs. Places count from 0, so the last `summary`
    of a block are block − summary … block − 1.

    the summary one token too long
        j % block >= block - summary → j % block >= block - 1 - summary
    One token too many of each block can be seen from later ones. Places count from 0 to block − 1, so the
    last `summary` of them start at block − summary, not one before.

    the summary of the block just before alone
        (j % block >= block - summary) → ((i // block - j // block == 1) & (j % block >= block - summary))
    Only the nearest earlier block shows its summary. *Every* earlier block does: it is the summaries that
    carry the far past.

    a window in place of the own block
        (i // block == j // block) → (i - j < block)
    The last `block` tokens were marked wherever they are. The fixed pattern is cut at fixed places: a query
    sees its own block, and of the block before only the summary, however near the rest of it is.

    the own block without the rest
        ((i // block == j // block) | (j % block >= block - summary)) → (i // block == j // block)
    Each block sees itself and nothing before: the text falls into pieces that know nothing of each other. The
    summaries of all earlier blocks are missing.

    summaries without the own block
        (i // block == j // block) → (i == j)
    Only summary tokens can be seen, in the query's own block too. There the query sees every token up to
    itself. (In the paper this is one of two parts; here the mask holds both.)

    own block and summary at once
        (i // block == j // block) | → (i == j) | (i // block == j // block) &
    `and` in place of `or`: only summary tokens of the query's own block are left. A key is seen if it is
    in the own block *or* is a summary.

    summaries that only summary tokens see
        (j % block >= block - summary) → ((j % block >= block - summary) & (i % block >= block - summary))
    The summaries can be seen by the last `summary` queries of later blocks and by no others. Every query sees
    them; whether a *key* is a summary is all that counts.

    all earlier blocks whole
        ((i // block == j // block) | (j % block >= block - summary)) → True
    This is the causal mask: everything before the query can be seen. Of earlier blocks only the last
    `summary` tokens belong to the pattern.

    the own block with what comes later in it
        (j <= i) & ((i // block == j // block) | → ((i // block == j // block) | (j <= i) &
    A query sees its block to the end, later tokens included. Whole blocks are how kernels compute; what may
    be seen still ends at the query, j ≤ i.

    summaries of later blocks
        (j <= i) & ((i // block == j // block) → ((j <= i) & (i // block == j // block)
    The summary columns are marked from top to bottom, above the diagonal too, so a query sees the ends of
    blocks that are not written yet. j ≤ i belongs to both parts of the pattern.
    """,
)


# 05.2: Longformer and BigBird in the pattern language


sentence.mistakes(
    r"""
    the window counted on both sides
        local({window}) → local({2 * window})
    `window` was doubled, for the tokens ahead. The paper's encoder looks ahead; a decoder cannot, and `local`
    counts backwards only. So it would look twice as far back as asked for.

    half the window behind
        local({window}) → local({window // 2})
    `window` was halved, as if one half lay ahead, as in the paper's encoder. Here all of it lies behind:
    `local(window)` is the last `window` tokens.

    the query counted beside the window
        local({window}) → local({window + 1})
    `local(window + 1)`: the query's own token was added. It is counted already: `local(3)` is the token
    itself and the two before it.

    a window without the query
        local({window}) → local({window - 1})
    `local(window - 1)`: one was taken off for the query's own token. `local` counts it, so `window` goes in
    as it is.

    one global token for many
        global({n_global}) → global(at=({n_global},))
    `at` names positions: one token at the position n_global is global now. The first n_global tokens are
    `global(n_global)`.

    Longformer without its global tokens
        local({window}) | global({n_global}) → local({window})
    That is a sliding window, chapter 04. Longformer adds tokens that everybody sees and that see everything:
    `| global(n_global)`.

    + in place of |
        local({window}) | → local({window}) +
    Words were joined by `+`. The language knows one sign, `|`, or: a token is seen if one of the words shows
    it.

    the own block not counted in the window
        (n_window + 1) * block → n_window * block
    `local` got n_window · block tokens. Its size counts the query's own block too, and n_window are those
    *before* it: (n_window + 1) · block.

    a window that slides by tokens
        {(n_window + 1) * block}, block={block} → {(n_window + 1) * block}
    `block=` is missing in `local`, so the window moves token by token and always holds as many. BigBird's
    moves block by block: the first query of a block sees nearly a block less than the last, and all of a
    block need the same keys. That is what makes it fast.

    the window in blocks, where tokens are counted
        {(n_window + 1) * block}, block={block} → {n_window + 1}
    `local(n_window + 1)` is so many *tokens*. The word counts tokens: (n_window + 1) · block, and
    `block=block` to slide by blocks.

    n_window blocks on either side
        (n_window + 1) * block → (2 * n_window + 1) * block
    The window got 2 · n_window + 1 blocks, for those ahead as well. The paper's encoder has them; in a
    decoder nothing lies ahead, and `local` would reach further back instead.

    n_global tokens in place of blocks
        n_global * block → n_global
    `global(n_global)` makes so many *tokens* global. The first n_global blocks have n_global · block tokens.

    the first token of each global block alone
        wide = f"global({n_global * block})"
            → at = ", ".join(str(number * block) for number in range(n_global))
            wide = f"global(at=({at},))"
    Of each global block one token was made global. All tokens of the first n_global blocks are:
    `global(n_global * block)`.

    no global blocks
        {near} | {wide} | {drawn} → {near} | {drawn}
    The word `global` is missing. Leaving the first blocks out of the draw (skip_first) makes them global for
    nobody.

    no random blocks
        {near} | {wide} | {drawn} → {near} | {wide}
    Window and global blocks make a Longformer in blocks. What is BigBird's own are the random blocks: a third
    word, `random(…)`.

    blocks of 64 drawn
        {n_random}, block={block}, → {n_random},
    `block=` is missing in `random`. Each word has its own, and this one's is 64 where nothing is said. All
    words of BigBird need the same blocks.

    global blocks drawn again
        skip_first={n_global} → skip_first=0
    skip_first is missing, so a draw may fall on a global block, which everybody sees anyway: fewer blocks are
    seen than were paid for.

    blocks of the window drawn again
        skip_last={n_window} → skip_last=0
    skip_last is missing, so a draw may fall on a block that the window shows already. Leave out the n_window
    just before the query's own.

    nothing left out of the draw
        skip_first={n_global}, skip_last={n_window} → skip_first=0, skip_last=0
    skip_first and skip_last are missing, so draws fall on blocks that are global or in the window. BigBird
    draws from the rest: leave out the first n_global and the n_window before the query's own.

    one block too many left out
        skip_last={n_window} → skip_last={n_window + 1}
    skip_last counts the query's own block too. `random` never draws that one; skip_last are the blocks just
    *before* it, so n_window.

    tokens left out, where blocks are counted
        skip_first={n_global}, skip_last={n_window}
            → skip_first={n_global * block}, skip_last={n_window * block}
    skip_first and skip_last were given in tokens. `random` counts blocks everywhere but in `block` itself:
    n_global and n_window.

    the skips exchanged
        skip_first={n_global}, skip_last={n_window} → skip_first={n_window}, skip_last={n_global}
    skip_first got n_window and skip_last n_global. The global blocks are the *first* of the text, the window
    is what comes *last* before the query.

    n_random tokens for blocks
        random({n_random} → random({n_random * block}
    n_random · block were drawn. The first number of `random` counts blocks, not tokens: n_random.

    the seed left out, or always the same
        seed={seed} → seed=0
    The seed that was given is not in the sentence: left out, it is 0, and a number of one's own is the same
    for everyone, too. Two layers with different seeds are meant to see different blocks.

    drawn anew with every call
        seed={seed} → seed={random.randrange(10**7, 10**9)}
    The sentence holds a seed that was drawn on the spot, so every call means another pattern. Prefill would
    see other blocks than decode, and training others than both. The seed is given: write it down.
    """,
    random=random,
)


# 05.3: One softmax over the listed blocks


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


def by_block(
    scores: Tensor, values: Tensor, positions: Sequence[Tensor], listed: list[int]
) -> list[tuple[Tensor, Tensor]]:
    """Scores and values of each listed block."""
    sizes = [len(positions[c]) for c in listed]
    return list(zip(scores.split(sizes, dim=-1), values.split(sizes, dim=2), strict=True))


union.mistakes(
    r"""
    a softmax for each block, then the mean
        outs.append(scores.softmax(dim=-1) @ v[:, :, there])
            → parts = by_block(scores, v[:, :, there], positions, listed)
            outs.append(torch.stack([s.softmax(-1) @ x for s, x in parts]).mean(0))
    Each listed block got a softmax of its own, and the outputs were averaged. So a block with nothing worth
    reading weighs as much as the best one. There is one softmax over all listed tokens; pieces can only be
    merged by their sums of exponentials (unit 01, `merge`).

    a softmax for each block, then the sum
        outs.append(scores.softmax(dim=-1) @ v[:, :, there])
            → parts = by_block(scores, v[:, :, there], positions, listed)
            outs.append(torch.stack([s.softmax(-1) @ x for s, x in parts]).sum(0))
    Each listed block got a softmax of its own, and the outputs were added up. The weights of a query add up
    to the number of its blocks, not to 1: one softmax over all listed tokens.

    a maximum for each block that is never made up for
        outs.append(scores.softmax(dim=-1) @ v[:, :, there])
            → parts = by_block(scores, v[:, :, there], positions, listed)
            exps = [((s - s.amax(-1, keepdim=True)).exp(), x) for s, x in parts]
            outs.append(sum(e @ x for e, x in exps) / sum(e.sum(-1, keepdim=True) for e, _ in exps))
    Each block's own maximum was taken off its scores, and then numerators and denominators were added up as
    they are. They are in different units then: a block's sums belong to its own maximum. Take one maximum
    over all of them, or multiply each by exp(its maximum − the common one).

    blocks weighed by their best score alone
        outs.append(scores.softmax(dim=-1) @ v[:, :, there])
            → parts = by_block(scores, v[:, :, there], positions, listed)
            best = torch.stack([s.amax(-1, keepdim=True) for s, _ in parts]).softmax(0)
            outs.append((best * torch.stack([s.softmax(-1) @ x for s, x in parts])).sum(0))
    The blocks' outputs were merged with weights exp(maximum). A block with one good key and a block with four
    of them weigh the same then. The weight of a block is the *sum* of its exponentials.

    the running maximum not made up for
        outs.append(scores.softmax(dim=-1) @ v[:, :, there])
            → top, bottom, best = 0.0, 0.0, scores[..., :1] - torch.inf
            for s, x in by_block(scores, v[:, :, there], positions, listed):
                best = torch.maximum(best, s.amax(-1, keepdim=True))
                exp = (s - best).exp()
                top, bottom = top + exp @ x, bottom + exp.sum(-1, keepdim=True)
            outs.append(top / bottom)
    Block by block, with the largest score so far taken off: but when a later block raises the maximum, the
    sums that are there already must be multiplied by exp(old − new), and were not. So earlier blocks weigh
    too much (`online softmax`: rescale, then add).

    no maximum subtracted
        outs.append(scores.softmax(dim=-1) @ v[:, :, there]) → exp = scores.exp()
            outs.append(exp @ v[:, :, there] / exp.sum(-1, keepdim=True))
    exp was taken of the scores as they are. That overflows in fp32 beyond a score of 88, and where all are
    very negative the sum is 0 and the result 0/0. Take the row's maximum off first; the result is the same.

    everything computed, then masked
        N = q.shape[2]
        seen = torch.zeros(N, N, dtype=torch.bool)
        for own, chosen in enumerate(blocks):
            for other in chosen:
                seen[own * block : (own + 1) * block, other * block : (other + 1) * block] = True
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen.tril(), -torch.inf)
        return scores.softmax(-1) @ v
    The numbers are right, and nothing was saved: all N·N scores were made and most of them thrown away, every
    key and value was read. (A value that is NaN shows it: 0 · NaN is NaN.) Gather the listed blocks first,
    and compute with those.

    the softmax over the queries
        softmax(dim=-1) → softmax(dim=-2)
    The weights were divided among the queries of the block, dimension −2. Each query divides its own weight
    among the keys that it sees: dimension −1.

    one maximum for all rows
        outs.append(scores.softmax(dim=-1) @ v[:, :, there]) → exp = (scores - scores.max()).exp()
            outs.append(exp @ v[:, :, there] / exp.sum(-1, keepdim=True))
    The largest score of the whole block of queries, all heads and sequences together, was subtracted. A row
    that lies hundreds below it becomes exp of that, 0 in every place, and 0 / 0 is NaN. Each row takes its
    own maximum: `amax(-1, keepdim=True)`.

    no mask in the diagonal block
        scores = scores.masked_fill(there > here[:, None], -torch.inf) →
    Listed blocks were read whole. Those before the query's own lie in the past altogether, but the own one
    holds later tokens too: there a token sees only itself and earlier ones.

    every block masked as if it were the diagonal one
        there > here[:, None] → there % block > here[:, None] % block
    The triangle was laid over all listed blocks, so the first query of a block sees one token of each.
    Earlier blocks lie in the past as a whole. Compare positions in the text, not places in the block.

    the last listed block taken for the diagonal one
        there > here[:, None] → (there // block == listed[-1]) & (there % block > here[:, None] % block)
    The triangle was laid over the block that is last in the list, and the own one, wherever it is,
    was read whole. The lists may have any order: whether a key is hidden depends on its position.

    the own token hidden
        there > here → there >= here
    A token does not see itself (`>=` where `>` belongs). The first token has nothing else to see, so its row
    is NaN.

    masked after the softmax
        scores = scores.masked_fill(there > here[:, None], -torch.inf) →
        scores.softmax(dim=-1) @ → scores.softmax(dim=-1).masked_fill(there > here[:, None], 0) @
    Later tokens of the own block were set to 0 after the softmax had given them their share, so the weights
    of a row no longer add up to 1. Mask the scores with −∞ before.

    one list for all queries
        outs = [] → outs = []
            blocks = [sorted({own, *(c for c in blocks[-1] if c < own)}) for own in range(len(blocks))]
    The last list was used for every block of queries, with the own block added. Each block of queries has a
    list of its own.

    all blocks between the first and the last listed
        for c in listed → for c in range(min(listed), max(listed) + 1)
    A slice from the first listed block to the last was taken, with everything between. Blocks that are not
    listed are not seen, however near they lie.

    the own block left out
        for c in listed → for c in [c for c in listed if c != here[0] // block] or listed
    Only the earlier listed blocks were read; the own block, which is always listed, was skipped, perhaps to
    spare the mask. The nearest tokens are the ones that a query needs most. (The first block has nothing
    else.)

    the own block alone
        there = torch.cat([positions[c] for c in listed]) → there = here
    Every block of queries read itself and nothing else; the lists were not looked at.

    all blocks read, listed or not
        there = torch.cat([positions[c] for c in listed]) → there = torch.arange(here[-1] + 1)
    This is full causal attention. The lists say which blocks a query may read; the others are not seen at
    all.

    numbers of blocks taken for positions
        there = torch.cat([positions[c] for c in listed]) → there = [min(c, k.shape[2] - 1) for c in listed]
        scores = scores.masked_fill(there > here[:, None], -torch.inf) →
    `k[:, :, blocks[b]]` takes single tokens, at the positions that the list's numbers happen to be. They are
    numbers of blocks: block c holds the positions c · block to (c + 1) · block − 1.

    the last block filled up with zeros that are seen
        N = q.shape[2]
        more = -N % block
        q, k, v = (
            torch.cat((x, torch.zeros_like(x[:, :, :1]).expand(-1, -1, more, -1)), 2) for x in (q, k, v)
        )
        return attend_all(pieces(q, k, v, blocks, block, lambda i, j: (j > i) & (j < N)))[:, :, :N]
    The text was padded with zeros to whole blocks, and the zeros were attended to: a score of 0 is no small
    weight. Whatever pads must be hidden by the mask. (With whole blocks there is nothing to pad.)

    the half-filled last block forgotten
        zip(positions, blocks, strict=True) → zip(positions[: q.shape[2] // block], blocks, strict=False)
        torch.cat(outs, dim=2)
            → torch.cat((*outs, torch.zeros_like(q[:, :, q.shape[2] // block * block :])), dim=2)
    The loop runs over N // block blocks, so the tokens behind the last whole block got no output (zeros).
    There are ⌈N / block⌉ blocks, and the last one may be shorter.

    no scale
        .transpose(-2, -1) * q.shape[-1] ** -0.5 → .transpose(-2, -1)
    The scores were not divided by √D, so the softmax is sharper than it should be: the best key takes nearly
    all. 1/√D belongs to attention over few keys as to attention over all.

    scaled by 1/D
        q.shape[-1] ** -0.5 → q.shape[-1] ** -1
    The scores were divided by D, so the softmax is much too flat. A score is a sum of D products, and its
    spread grows with √D: the scale is 1/√D.

    scaled by the block
        q.shape[-1] ** -0.5 → block**-0.5
    The scores were divided by √block. The scale is 1/√D, D the numbers of a key: it has nothing to do with
    how many keys there are.

    the triangle laid from the first gathered key
        there > here[:, None] → torch.ones(len(here), len(there), dtype=torch.bool).triu(1)
    `tril()` over the gathered scores takes query 0 of the block for the first of all, so it sees the first
    gathered key and no other. The queries are at the *end* of the past: compare positions in the text,
    those of the gathered keys with those of the queries.

    keys used as values
        @ v[:, :, there] → @ k[:, :, there]
    What was added up are the keys. They say how well a token fits; the output is a sum of values.

    hidden scores at 0 in place of −∞
        -torch.inf → 0.0
    The scores of later tokens were set to 0, and exp(0) is 1: they take weight like any other. Hidden means
    −∞, before the softmax.
    """,
    attend_all=attend_all,
    by_block=by_block,
    pieces=pieces,
)


# 05.4: Which tokens can be forgotten


# The solution's n_slots calls tokens_to_keep. Beside a wrong one it counts what `kept` says, and stays right.
evict.mistakes(
    r"""
    kept is what the step reads
        return (readers_to_come > 0).tril() → return mask
        tokens_to_keep(mask).sum → kept(mask).sum
    The mask itself came back: each step keeps what it reads. But what this step does not read a later one
    may, and a token that was let go cannot be fetched back. Reading few does not mean storing few: ask for
    the readers that are still to come.

    nothing is ever forgotten
        return (readers_to_come > 0).tril() → return torch.ones_like(mask).tril()
        tokens_to_keep(mask).sum → kept(mask).sum
    All tokens so far are kept. That is always safe, and what a full cache does. A token whose last reader has
    attended can go.

    as many tokens as a step reads, the newest
        return (readers_to_come > 0).tril()
            → return torch.ones_like(mask).tril().triu(1 - int(mask.sum(1).max()))
        tokens_to_keep(mask).sum → kept(mask).sum
    The newest tokens were kept, as many as the widest step reads: a window, whatever the pattern. A strided
    or a global reader asks for older ones, and they are gone then.

    everything within the longest reach
        return (readers_to_come > 0).tril() → i, j = mask.nonzero(as_tuple=True)
            return torch.ones_like(mask).tril().triu(-int((i - j).max()))
        tokens_to_keep(mask).sum → kept(mask).sum
    Each token was kept as long as the farthest look back anywhere in the pattern. That is safe, but one far
    pair then keeps all tokens so long. Each token has a last reader of its own.

    the next step alone looked at
        mask.flip(0).cumsum(0).flip(0) → mask | torch.cat((mask[1:], torch.zeros_like(mask[:1])))
        tokens_to_keep(mask).sum → kept(mask).sum
    A token was let go if neither this step nor the next one reads it. Its reader may come later still: look
    at all that follow.

    let go at the first step that does not read it
        (readers_to_come > 0) → ((~mask).tril().cumsum(0) == 0)
        tokens_to_keep(mask).sum → kept(mask).sum
    A token was dropped as soon as one step went by without it. A strided reader comes back after a pause. Not
    the first step without it counts, but the last one with it.

    let go after its first reader
        return (readers_to_come > 0).tril() → others = mask.tril(-1)
            own = torch.where(mask.any(0), mask.long().argmax(0), -1)
            first = torch.where(others.any(0), others.long().argmax(0), own)
            return (torch.arange(len(mask))[:, None] <= first).tril()
        tokens_to_keep(mask).sum → kept(mask).sum
    A token was kept until the first later token had read it. Others may follow: the *last* reader counts.

    readers gone by in place of readers to come
        mask.flip(0).cumsum(0).flip(0) → mask.cumsum(0)
        tokens_to_keep(mask).sum → kept(mask).sum
    A token was kept once somebody has read it, at t or before. What has been read already is no reason to
    keep it; what *will* be is. The running `any` goes from the bottom up.

    dropped before its last reader attends
        readers_to_come > 0 → readers_to_come - mask.int() > 0
        tokens_to_keep(mask).sum → kept(mask).sum
    Only readers after t were counted, so a token is gone at the very step that reads it last. It must be
    there while that step attends: readers at t *or* later.

    kept one step too long
        readers_to_come > 0 → torch.cat((readers_to_come[:1], readers_to_come[:-1])) > 0
        tokens_to_keep(mask).sum → kept(mask).sum
    A token stays one step beyond its last reader. Its slot could have gone to the new token of that step
    already: that makes a window of W take W + 1 slots.

    tokens kept that are not there yet
        (readers_to_come > 0).tril() → readers_to_come > 0
        tokens_to_keep(mask).sum → kept(mask).sum
    Tokens after t were counted, since somebody will read them. They have not come yet and take no slot: j ≤
    t.

    rows and columns exchanged
        .tril() → .tril().T
        tokens_to_keep(mask).sum → kept(mask).sum
    The result has a row for each token and a column for each step. Asked for is a row for each *step*: who is
    in the cache while token t attends.

    the token of the step itself left out
        .tril() → .tril(-1)
        tokens_to_keep(mask).sum → kept(mask).sum
    Only older tokens were counted. The new token's key and value are in the cache when it attends (it reads
    itself), so it takes a slot as well.

    a slot for tokens that nobody reads
        .tril() → .tril() | torch.eye(len(mask), dtype=torch.bool)
        tokens_to_keep(mask).sum → kept(mask).sum
    The new token was kept in any case. One that nobody reads, not even itself, need never be written: no
    reader, no slot.

    the global reader to come forgotten
        readers_to_come = → full = mask.sum(1) == torch.arange(1, len(mask) + 1)
            mask = (mask & ~full[:, None]) | (mask & torch.eye(len(mask), dtype=torch.bool))
            readers_to_come =
        tokens_to_keep(mask).sum → kept(mask).sum
    Tokens were dropped by the window, though a global token is still to come. It sees *everything* before it,
    so until it has attended nothing may go. That others see it is only half of being global.

    the global token dropped with the window
        readers_to_come = → n, seen = len(mask), mask.clone()
            for at in range(1, n - 1):
                row, column = mask[at, : at + 1].all(), mask[at:, at].all()
                if row and column and at + 3 < n and not mask[at + 3 :, at + 1].all():
                    seen[at + 3 :, at] = False
            mask = seen
            readers_to_come =
        tokens_to_keep(mask).sum → kept(mask).sum
    After the global token has attended, it was let go like any other when the window had passed. All later
    tokens read it: a column that is full to the bottom stays to the end.

    how many, not which
        .tril() → .tril().sum(1)
        tokens_to_keep(mask).sum → kept(mask).sum
    The number of tokens kept at each step came back. Asked for is which: a row of N booleans for each step.
    (The numbers are what n_slots needs.)

    kept from its first reader on
        .tril() → .tril() & (mask.int().cumsum(0) > 0)
        tokens_to_keep(mask).sum → kept(mask).sum
    A token was kept between its first reader and its last. If it does not read itself, that leaves out the
    steps before the first reader, and what is not kept then cannot be read later: a token comes once. It is
    kept from its own step on.

    slots for what a step reads
        tokens_to_keep(mask).sum(dim=1) → mask.sum(dim=1)
    The widest row of the pattern was counted: what a step *reads*. A pattern that reads few tokens may have
    to store all of them, because each step reads others. Slots are for what is kept.

    slots for the last step
        .sum(dim=1).max() → [-1].sum()
    What is kept at the end was counted. Earlier steps may need more: before a global token attends,
    everything is there. A cache must be large enough for the worst step.

    slots for the average step
        int(tokens_to_keep(mask).sum(dim=1).max()) → float(tokens_to_keep(mask).sum(dim=1).double().mean())
    The mean over all steps was taken. Half of the steps would find the cache full: take the largest.

    a slot for every token
        int(tokens_to_keep(mask).sum(dim=1).max()) → len(mask)
    N slots were counted, as for a full cache. A slot whose token is done with can be used again, so it takes
    only as many as are kept at once.

    all steps added up
        .sum(dim=1).max() → .sum()
    The tokens kept were added up over all steps. A token that stays ten steps stays in one slot: what counts
    is how many there are at the same time.

    the step in place of its number of tokens
        .max() → .argmax()
    argmax says *when* most is kept. Asked for is how much that is: max.

    the longest stay of a token
        sum(dim=1) → sum(dim=0)
    The sums go down the columns: how many steps the most patient token stays. Slots are counted along the
    rows: how many tokens there are at one step.

    no slot for the new token
        .sum(dim=1) → .tril(-1).sum(dim=1)
    Only older tokens were counted. The new one is written before it attends and takes a slot too.

    one slot too many for the new token
        .max()) → .max()) + 1
    A slot was added for the new token, which is among those that are kept already: a window of W takes W
    slots.
    """,
    kept=kept,
)


# 05.5: The best blocks, without looking ahead


select.mistakes(
    r"""
    the own block not forced
        k[:, :, : whole * block].unflatten(2, (whole, block)).mean(3)
            → torch.stack([part.mean(2) for part in k.split(block, dim=2)], dim=2)
        scores[..., :whole] → scores[:]
        index >= own → index > own
        : n_blocks - 1] → :n_blocks]
        (index < own)) | (index == own) → (index <= own))
    The own block competes by its mean, like the others. So a query may lose its nearest neighbours, and the
    mean holds keys of tokens that come after it: a look into the future. The own block is picked always and
    scored never.

    the own block picked always, and competing too
        index >= own → index > own
    The own block was set to True at the end, and its mean competed for the n_blocks − 1 places as well. Where
    it wins one, a block too few is picked; and its mean holds keys of tokens that come after the query. The
    own block is picked always and scored never.

    the own block picked always, and competing for n_blocks places
        index >= own → index > own
        : n_blocks - 1] → :n_blocks]
    The best n_blocks were picked with the own one among them, and the own one on top: where it is not among
    the best, a block too many is read. And whether it is depends on keys that come after the query: set the
    own block aside, and take the best n_blocks − 1 of those before.

    later blocks compete too
        k[:, :, : whole * block].unflatten(2, (whole, block)).mean(3)
            → torch.stack([part.mean(2) for part in k.split(block, dim=2)], dim=2)
        scores[..., :whole] → scores[:]
        index >= own → index == own
        picked & (index < own) → picked & (index != own)
    The blocks behind the query were scored like those before it. In training it reads what it is to predict;
    in decode they are not there. Hide every block but those before the own one.

    hidden blocks at 0 in place of −∞
        scores.masked_fill(index >= own, -torch.inf) → scores.masked_fill(index >= own, 0.0)
        (picked & (index < own)) → picked
    The scores of the blocks that must not be picked were multiplied by 0. Scores can be negative, and then a
    0 wins. Hide with −∞.

    hidden blocks picked where there are too few others
        (picked & (index < own)) → picked
    A query with fewer than n_blocks − 1 blocks before it was filled up with blocks at −∞: later ones. topk
    gives as many as it is asked for, however bad they are. Take out again what is not allowed.

    n_blocks besides the own one
        : n_blocks - 1] → :n_blocks]
    n_blocks of the earlier blocks were picked, and the own one on top. n_blocks counts it: n_blocks − 1
    others.

    the own block counted twice
        : n_blocks - 1] → : max(n_blocks - 2, 0)]
    The best n_blocks − 1 were picked with the own one among the candidates, at +∞ say, so it used up a place,
    though n_blocks − 1 had left one out for it already. Set it aside first, then take the best n_blocks − 1
    of the others.

    the nearest blocks in place of the best
        return (picked & (index < own)) | (index == own)
            → return ((index <= own) & (own - index < n_blocks)).expand(*q.shape[:2], -1, -1)
    The blocks just before the own one were picked, whatever is in them. That is a sliding window; here the
    query's score decides.

    the block just before never picked
        index >= own → index >= own - 1
        index < own → index < own - 1
    The candidates end one block too early: the block just before the own one was left out. It is complete,
    and all of it lies in the past: c < own.

    a block that the query completes competes
        scores = scores.masked_fill(index >= own, -torch.inf)
            → complete = (index + 1) * block <= torch.arange(T)[:, None] + 1
            scores = scores.masked_fill(~complete, -torch.inf)
        (index < own) → complete
    For the last query of a block the own block is complete, and it was scored with the others: if it wins,
    one of them is left out, since it is picked anyway. Candidates are the blocks *before* the own one.

    one choice for all heads
        (q @ means.transpose(-2, -1)).float() → (q @ means.transpose(-2, -1)).sum(1, keepdim=True)
    The scores were added up over the heads, and all heads pick the same blocks. Each head looks for something
    else: the choice is made for each by itself. (Some designs do share it, to read less; not this one.)

    one choice for the whole batch
        .scatter_(-1, best, True) → .scatter_(-1, best, True)[:1].expand(len(q), -1, -1, -1)
    The first sequence's choice was used for all. The sequences of a batch have nothing to do with each other.

    one choice for a block of queries, by their mean
        T = q.shape[2] → T = q.shape[2]
            q = torch.cat([part.mean(2, keepdim=True).expand_as(part) for part in q.split(block, 2)], dim=2)
    The queries of a block were averaged, and all of them pick the same. The mean holds queries that come
    later, so a choice depends on what is not there yet; in decode, one token at a time, it would come out
    otherwise.

    the last query of a block chooses for all
        T = q.shape[2] → T = q.shape[2]
            q = q[:, :, (torch.arange(T) // block * block + block - 1).clamp_max(T - 1)]
    The choice of a block's last query was given to all of them: to those before it, it is the future. Every
    query chooses for itself.

    the first query of a block chooses for all
        T = q.shape[2] → T = q.shape[2]
            q = q[:, :, torch.arange(T) // block * block]
    The choice of a block's first query was given to the whole block. It sees nothing of the future, but asked
    for is the choice of each query by itself.

    the worst blocks
        (q @ means → (-q @ means
    The lowest scores were picked (a sort ascends where nothing else is said). The larger q · mean, the more
    the query will find there: descending=True.

    ties to the later block
        scores.sort( → scores.flip(-1).sort(
        .scatter_(-1, best, True) → .scatter_(-1, best, True).flip(-1)
    Of equal scores the later block was picked. Asked for is the earlier one. Equal scores are no rarity (a
    text may repeat itself), and prefill and decode must pick the same.

    the first key for the block
        .mean(3) → [:, :, :, 0]
    The block was scored by its first key (`k[:, :, ::block]`). It stands for itself only; the mean of all its
    keys is asked for.

    the last key for the block
        .mean(3) → [:, :, :, -1]
    The block was scored by its last key. It stands for itself only; the mean of all its keys is asked for.

    the largest of each number in place of the mean
        .mean(3) → .amax(3)
    The keys of a block were pooled by their maximum, number by number. Asked for is the mean: `.mean`, not
    `.amax`.

    the best single key of the block
        means = k[:, :, : whole * block].unflatten(2, (whole, block)).mean(3)
            → keys = k[:, :, : whole * block]
        (q @ means.transpose(-2, -1)).float()
            → (q @ keys.transpose(-2, -1)).unflatten(-1, (whole, block)).amax(-1)
    Every key was scored, and a block was worth as much as its best one. That may choose better, but reads all
    keys to decide which to read, and nothing is saved. One product with the mean is all there is.

    the size of the score without its sign
        .float() → .abs()
    The absolute value was compared. A very negative score means that the query turns away from the block; it
    gets hardly any weight there.

    means brought to length 1
        q @ means.transpose → q @ torch.nn.functional.normalize(means, dim=-1).transpose
    The means were normalised, so that only their direction counts. Attention's own scores grow with the
    length of a key, and so do the blocks': q · mean as it is.

    every so many-th token in one block
        .unflatten(2, (whole, block)).mean(3) → .unflatten(2, (block, whole)).mean(2)
    The keys were cut as (block, N) and not as (N, block), so a block's mean is that of tokens spread over the
    whole text, later ones too. Neighbours form a block: unflatten(2, (N, block)), the blocks in front.

    blocks by number in place of a mask
        scores = scores.masked_fill(index >= own, -torch.inf)
            → scores = scores.masked_fill(index > own, -torch.inf)
            scores = scores.masked_fill(index == own, torch.inf)
        : n_blocks - 1] → :n_blocks]
        return (picked & (index < own)) | (index == own) → return best
    The numbers of the picked blocks came back. Asked for is True or False for each block: rows with fewer
    candidates have no number to put into the last places.

    no column for the half-filled block
        return (picked & (index < own)) | (index == own)
            → return ((picked & (index < own)) | (index == own))[..., :whole]
    There are T // block columns, so the tokens of a half-filled last block have no own block. There are ⌈T /
    block⌉: the last one has no mean, and is picked by its own queries all the same.
    """,
)


# 05.6: A step that reads what it selects


def attend_over(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (q @ keys.mT * q.shape[-1] ** -0.5).softmax(-1) @ values


def over_blocks(
    q: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, block: int, own: int | None = None
) -> Tensor:
    """Attention to the tokens of these blocks (B, H, n), and in any case to those of the block ``own``."""
    numbers = torch.arange(keys.shape[2]) // block
    seen = (numbers == blocks[..., None]).any(2, keepdim=True) | (numbers == (-1 if own is None else own))
    scores = (q @ keys.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ values.masked_fill(~seen.mT, 0)


step.mistakes(
    r"""
    the new token not read
        torch.arange(own * block, S + 1) → torch.arange(own * block, S)
    The step attends before it appends, so the new token does not see itself. (Where it is the first of its
    block, nothing of that block is there at all; in an empty cache there is nothing, zeros here.) Append
    first.

    the half-filled block not read
        torch.arange(own * block, S + 1) → torch.arange(S, S + 1)
    Only complete blocks were read, with the new token: those between the last complete block and it are
    invisible until their block is full. They are the nearest neighbours. The own block is read always, as far
    as it goes.

    the half-filled block competes by the mean of what is in it
        return weights @ values.gather(2, at) → own_mean = keys[:, :, own * block :].mean(dim=2, keepdim=True)
            scores = torch.cat((scores, (q @ own_mean.transpose(-2, -1))[:, :, 0]), dim=-1)
            best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :n_blocks]
            return over_blocks(q, keys, values, best, block)
    The own block was scored by the mean of its keys so far, and read only if it is among the best. So the
    step may not see the tokens just before it, not even itself. It is read always and takes one of the
    n_blocks places.

    a half-filled block's mean divided by the block size
        return weights @ values.gather(2, at)
            → own_mean = keys[:, :, own * block :].sum(dim=2, keepdim=True) / block
            scores = torch.cat((scores, (q @ own_mean.transpose(-2, -1))[:, :, 0]), dim=-1)
            best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :n_blocks]
            return over_blocks(q, keys, values, best, block)
    The own block competes, by the sum of its keys so far divided by `block`: as if the empty places held keys
    of zeros. The mean comes out too small, the smaller the emptier the block. And it should not compete at
    all: the own block is read always.

    n_blocks besides the own one
        : n_blocks - 1] → :n_blocks]
    n_blocks earlier blocks were read, and the own one on top. n_blocks counts it: the best n_blocks − 1 of
    the others.

    the own block alone
        : n_blocks - 1] → :0]
    Only the own block was read. The best n_blocks − 1 of the earlier ones belong to it: `means` tells which
    those are.

    the nearest blocks in place of the best
        scores.sort( → torch.arange(own).expand(scores.shape).sort(
    The blocks just before the own one were read: a sliding window. Which earlier blocks are read is decided
    by q · mean, and can be any.

    everything read
        torch.cat((past, here), dim=2) → torch.arange(S + 1).expand(*past.shape[:2], -1)
    This is full attention over the whole cache. The step was to select: the own block and the best n_blocks −
    1 before it.

    everything read, then masked
        [..., None].expand(-1, -1, -1, q.shape[-1]) →
        weights = (q @ keys.gather(2, at).transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
            → seen = torch.zeros(*q.shape[:2], S + 1, dtype=torch.bool).scatter_(2, at, True)[:, :, None]
            scores = q @ keys.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        weights @ values.gather(2, at) → weights @ values
    The numbers are right, but every key and value was read, and most of them masked away: the step moves as
    many bytes as full attention, which is what a decode step's time is made of. (A value that is NaN shows
    it: 0 · NaN is NaN.) Gather what is selected first.

    one choice for all heads
        scores.sort( → scores.sum(1, keepdim=True).expand_as(scores).sort(
    The scores were added up over the heads, and all read the same blocks. Every head selects for itself:
    `gather` takes other tokens for each.

    the first head's choice for all
        indices[..., : n_blocks - 1] → indices[:1, :1, : n_blocks - 1].expand(*q.shape[:2], -1)
    Head 0 of sequence 0 chose, and all the others read its blocks. Every head of every sequence has a query
    of its own and picks for itself: keep both dimensions in the indices, (B, H, n).

    one choice for the whole batch
        indices[..., : n_blocks - 1] → indices[:1, :, : n_blocks - 1].expand(len(q), -1, -1)
    The first sequence's choice was used for all. Every sequence selects in its own cache.

    the worst blocks
        scores.sort( → (-scores).sort(
    The blocks with the lowest scores were read (a sort ascends where nothing else is said). The best are
    those of the largest q · mean.

    attention to the means
        at = torch.cat((past, here), dim=2)[..., None] → at = best[..., None]
        weights = → pooled = [block_means(x, block)[:, :, :own].gather(2, at) for x in (keys, values)]
            near = [x[:, :, own * block :] for x in (keys, values)]
            weights =
        keys.gather(2, at) → torch.cat((pooled[0], near[0]), dim=2)
        values.gather(2, at) → torch.cat((pooled[1], near[1]), dim=2)
    The selected blocks' means took part in the softmax in place of their tokens. Means are here to find
    blocks; what is read are the keys and values of the tokens in them. (There are designs that read means as
    well: NSA's compressed branch.)

    a softmax for each part, then the mean
        weights = → n = past.shape[2]
            parts = [at[:, :, n:], at[:, :, :n]] if n else [at]
            outs = [attend_over(q, keys.gather(2, part), values.gather(2, part)) for part in parts]
            weights =
        return weights @ values.gather(2, at) → return torch.stack(outs).mean(0)
    The selected blocks and the own one were attended to apart, and the outputs averaged. It is one softmax
    over all tokens that are read.

    no scale
        .transpose(-2, -1) * q.shape[-1] ** -0.5 → .transpose(-2, -1)
    The scores of attention were not divided by √D. (For the choice it does not matter: the order stays the
    same.)

    scaled by 1/D
        q.shape[-1] ** -0.5 → q.shape[-1] ** -1
    The scores were divided by D, so the softmax is much too flat. A score is a sum of D products, and its
    spread grows with √D: the scale is 1/√D.

    the own block begins one token too late
        own = S // block → own = max(S - 1, 0) // block
    The own block was taken as (S − 1) // block: the new token at position S was added to the old block, even
    where that was full. The first token of a block is at a multiple of `block`: S // block.

    the own block begins one token too early
        own = S // block → own = (S + 1) // block
        best = scores.sort( → scores = (q @ means[:, :, :own].transpose(-2, -1))[:, :, 0]
            best = scores.sort(
    The own block was taken as (S + 1) // block, from the length after the append. The token that fills a
    block still belongs to it; so the next block, which is empty, was its own one here, and the new token
    itself is read only if its block is among the best.

    the block that was just filled competes
        return weights @ values.gather(2, at) → scores = (q @ means.transpose(-2, -1))[:, :, 0]
            best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : n_blocks - 1]
            return over_blocks(q, keys, values, best, block, own)
    The new token fills its block, the mean is appended, and then the block was scored with the others. It is
    read in any case; where it won a place, another block lost one. Candidates are the blocks *before* the own
    one, S // block of them.

    a half-filled block filled up with zeros
        weights = → empty = torch.zeros_like(q).expand(-1, -1, (own + 1) * block - S - 1, -1)
            weights =
        keys.gather(2, at) → torch.cat((keys.gather(2, at), empty), dim=2)
        @ values.gather(2, at) → @ torch.cat((values.gather(2, at), empty), dim=2)
    The own block was read as a whole, with zeros where no token is yet. A key of zeros has the score 0,
    and that is no small weight: the softmax gives the empty places their share.

    a mean for the half-filled block
        (S + 1) % block == 0 → True
        keys[:, :, -block:] → keys[:, :, own * block :]
    A row was appended for the half-filled block, the mean of what is in it. The next steps make it wrong, and
    a query that scores it knows less of that block than of the others. A block gets its mean when it is full.

    a mean for the half-filled block, divided by the block size
        (S + 1) % block == 0 → True
        keys[:, :, -block:].mean(dim=2, keepdim=True)
            → keys[:, :, own * block :].sum(dim=2, keepdim=True) / block
    A row was appended for the half-filled block: the sum so far divided by `block`. It comes out right in the
    step that fills the block; until then it is too small. A block gets its mean when it is full.

    the means never grow
        (S + 1) % block == 0 → False
    The means came back as they were though a block is full now. It would never be found again once it is no
    longer the own one.

    a mean with every step
        (S + 1) % block == 0 → True
    A row was appended for each token: the mean of the last `block` keys. Blocks do not slide; they begin at
    multiples of `block`, and there is one mean for each.

    the mean appended one step late
        (S + 1) % block == 0 → S and S % block == 0
        keys[:, :, -block:] → keys[:, :, -block - 1 : -1]
    The mean was appended by the first token of the *next* block (S % block == 0, the length before the
    append). The step that fills the block must do it: the next one needs it to select.

    a mean without the new key
        keys[:, :, -block:] → keys[:, :, -block:-1]
    The mean of the full block leaves out the new token, whose key had not been appended yet: block − 1 keys.
    Append first.

    keys of the block before in the mean
        keys[:, :, -block:] → keys[:, :, -block - 1 : -1]
    The mean was taken of the last `block` keys as they were before the append: one key of the block before,
    and not the new one.

    a running mean of halves
        means = torch.cat((means, keys[:, :, -block:].mean(dim=2, keepdim=True)), dim=2)
            → running = keys[:, :, own * block]
            for i in range(own * block + 1, S + 1):
                running = (running + keys[:, :, i]) / 2
            means = torch.cat((means, running[:, :, None]), dim=2)
    The mean was made step by step as (old + new) / 2. So the last key weighs one half, the one before a
    quarter. Every key of a block counts alike: their sum divided by `block`.

    the sum in place of the mean
        .mean(dim=2, keepdim=True) → .sum(dim=2, keepdim=True)
    The keys of the full block were added up and not divided. Beside the means that are there already it would
    win every comparison, or lose every one.

    the mean of the values
        keys[:, :, -block:] → values[:, :, -block:]
    The values of the full block were averaged. Blocks are found by their *keys*: a query is compared with
    keys.

    the last mean written over
        torch.cat((means, → torch.cat((means[:, :, :-1],
    The new mean took the place of the last one. Every complete block keeps its own: append.

    what was not selected thrown away
        .flatten(2) → .flatten(2).sort(-1).values
        at), keys, values, means → at), keys.gather(2, at), values.gather(2, at), means
    Only the selected tokens came back in keys and values. The next token may select any block: what this one
    does not read must be kept all the same. Selecting saves reading, not storing.

    the new token not stored
        at), keys, values, means → at), keys[:, :, :S], values[:, :, :S], means
    The output is right, but keys and values came back without the new token: the next step would not know of
    it.
    """,
    attend_over=attend_over,
    block_means=block_means,
    over_blocks=over_blocks,
)


# 05.7: Stored and read: four designs


cache_bytes.mistakes(
    r"""
    query heads in place of KV heads
        config["kv_heads"] → config["query_heads"]
    query_heads was counted. Queries are used and forgotten; what stays, and what is read, are keys and
    values, one of each at every KV head.

    what is read once for every query head
        "read": read * token → "read": read * token // config["kv_heads"] * config["query_heads"]
    Stored was counted with KV heads, read with query heads. The query heads of a pool read the same keys, and
    the step fetches them once for all of them: that is what grouped heads are for.

    keys only
        token = 2 * config → token = config
    Half is missing. A token leaves a key *and* a value at each KV head, and both are read.

    one head only
        2 * config["kv_heads"] * → 2 *
    The heads are missing: this is what a token leaves at one KV head.

    numbers for bytes
        * config["number_bytes"] →
        * config["index_bytes"] + config["scale_bytes"] → + 1
    This counts numbers. Each takes `number_bytes` bytes, and one of the index `index_bytes`.

    two bytes per number, whatever is said
        config["number_bytes"] → 2
    Each number was counted with 2 bytes. That is bf16; a cache in fp8 takes 1, in fp32 4: `number_bytes` says
    it.

    bits for bytes
        "stored": stored * token + index → "stored": 8 * (stored * token + index)
        "read": read * token + index → "read": 8 * (read * token + index)
    All is eight times too much: bits were counted. The result is in bytes.

    reads few, so it stores few
        "stored": stored * token → "stored": read * token
    Stored was set to what one step reads, for a design whose next steps read other tokens. BigBird's later
    blocks draw from the whole text, an index may find any token: they read little and store everything. Ask
    who may still come to read a token. (Only for Longformer do the two agree.)

    BigBird stores what it reads
        read = (len(seen) → stored = read = (len(seen)
    For BigBird the tokens that one step reads were taken for those that must be stored. A later block may
    draw any block before it, so none may be forgotten: it reads less, and it stores what full attention
    stores.

    BigBird stores what is near or global
        read = (len(seen) → stored = (len(seen) - 1) * block + filled
            read = (len(seen)
    BigBird's random blocks were forgotten when it came to storing: what lies between the global blocks and
    the window was counted as gone. The random readers to come may ask for any of it.

    an index stores only what it selects
        read = min(n_tokens, config["top_k"]) → stored = read = min(n_tokens, config["top_k"])
    Only top_k tokens were counted as stored. Each step selects others, and it can only select what is there:
    all N tokens stay.

    Longformer stores everything
        stored = read = min( → read = min(
    All N tokens were counted as stored. In Longformer the global tokens are the first ones: once they have
    attended, nobody will read a token that the window has passed, and it can go. Here a fixed pattern *does*
    shrink the cache.

    every design reads everything
        "read": read * token → "read": n_tokens * token
    Read was set to what full attention reads. A step reads the tokens that its pattern or its index lets it
    see, and no others.

    the block of the token to come
        (n_tokens - 1) // config["block"] → n_tokens // config["block"]
        (n_tokens - 1) % block + 1 → n_tokens % block
    N // block and N % block were taken for the own block and what is in it. The last token is at N − 1.
    When it fills its block, N belongs to the next one, which is still empty, and the own one was not counted
    at all: (N − 1) // block, and (N − 1) % block + 1 tokens.

    read without the new token
        "read": read * token → "read": (read - 1) * token
    One token too few is read. The step of the token at N − 1 is counted, and it has written its key and value
    before it reads: itself among them.

    Longformer without its global tokens
        config["window"] + config["n_global"] → config["window"]
    Only the window was counted. The n_global first tokens are read by every step, so they stay when the
    window has passed.

    window + n_global, however short the text
        min(n_tokens, config["window"] + config["n_global"]) → config["window"] + config["n_global"]
    window + n_global was counted though the text is shorter, or the window still covers the global tokens. No
    token that is not there, and none twice: min(N, window + n_global).

    global tokens counted beside a window that covers them
        min(n_tokens, config["window"] + config["n_global"])
            → min(n_tokens, config["window"]) + min(n_tokens, config["n_global"])
    min(N, window) + n_global: while the window reaches back to the start, the global tokens are in it and
    were counted a second time. Take the smaller of N and the sum.

    the query counted beside its window
        config["window"] + → config["window"] + 1 +
    window + 1 tokens: the query's own was added. The window counts it.

    the own block counted whole
        (n_tokens - 1) % block + 1 → block
    The own block was counted as full. The step at N − 1 sees it up to itself: (N − 1) % block + 1 tokens.

    the own block forgotten
        * block + filled → * block
    n_window blocks lie *before* the query's own, and the own one was not counted. The step reads it as far as
    it is filled.

    a window on both sides
        * block + filled → * block + filled + config["n_window"] * block
    n_window blocks were counted on either side. There is nothing after the last token, and in a decoder there
    never is: the own block and n_window before it.

    no random blocks read
        min(config["n_random"], own + 1 - len(seen)) → 0
    The n_random drawn blocks were not counted. They are read whole by every query of the block that drew
    them.

    BigBird without its global blocks
        (len(seen) - 1 + n_drawn) → (len(near) - 1 + n_drawn)
    The first n_global blocks were not counted. Every step reads them; and the random blocks are not drawn
    among them, so they are not in that number either.

    one token for each block
        (len(seen) - 1 + n_drawn) * block → config["n_window"] + config["n_global"] + config["n_random"]
    n_window + n_global + n_random were added up as tokens. They count blocks, and each has `block` tokens.

    blocks counted that are not there
        len(seen) - 1 + n_drawn → config["n_window"] + config["n_global"] + config["n_random"]
    n_window + n_global + n_random whole blocks were counted, however short the text. At its start there are
    fewer, and the window's may be the global ones: count each block that *is* there once.

    more random blocks than there are to draw from
        min(config["n_random"], own + 1 - len(seen)) → config["n_random"]
    n_random blocks were counted even where fewer are left that are neither global nor in the window:
    min(n_random, those that are left).

    the index forgotten
        index = n_tokens * index_key → index = 0
    The index keys are missing from both. They are stored beside every token, and a step reads all of them to
    find out what to read.

    the index stored and not read
        read * token + index → read * token
    The index was counted in stored, and in read only the top_k tokens. To know which those are, the step
    compares its query with the index key of *every* token: that part of reading still grows with N.

    the index read and not stored
        stored * token + index → stored * token
    The index was counted in read and not in stored. Index keys are made once, when a token comes, and kept:
    the cache is *larger* than full attention's.

    index keys of the selected tokens alone
        read * token + index → read * token + index * read // n_tokens
    Index keys were counted for the top_k tokens that are selected. They are needed before the choice, so for
    all N.

    the index in the cache's own numbers
        config["index_bytes"] → config["number_bytes"]
    The index keys were counted with `number_bytes`. They have a type of their own, `index_bytes`
    (DeepSeek-V3.2 keeps them in fp8: they only have to find).

    index keys without their scale
        + config["scale_bytes"] →
    The numbers of the index keys were counted, and their scale was not. Numbers of 8 bits need one to give
    back their size: `scale_bytes` for every index key, stored and read.

    a scale for every number of an index key
        + config["scale_bytes"] → + config["index_dim"] * config["scale_bytes"]
    `scale_bytes` was counted for each of the index_dim numbers. All numbers of an index key share one scale.

    an index key for every KV head
        index = n_tokens * index_key → index = n_tokens * index_key * config["kv_heads"]
    The index key was multiplied by kv_heads. There is one index key per token, for all heads: they read the
    same selection.

    an index for keys and another for values
        index = n_tokens * index_key → index = 2 * n_tokens * index_key
    The index was counted twice, like keys and values. It is one key per token; what it finds is the token.

    top_k tokens where there are fewer
        min(n_tokens, config["top_k"]) → config["top_k"]
    top_k tokens were counted as read in a text that has fewer: min(N, top_k).

    a selection for every query head
        min(n_tokens, config["top_k"])
            → min(n_tokens, config["top_k"]) * config["query_heads"] // config["kv_heads"]
    The selected tokens were counted once for every query head. All heads of a layer read the same top_k
    tokens, and each of these once.
    """,
)
