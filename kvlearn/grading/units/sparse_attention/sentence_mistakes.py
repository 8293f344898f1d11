"""05.2: the mistakes that people make with words: tokens or blocks, what is counted, what is left out."""

import random

from kvlearn.grading.units.sparse_attention.sentence import EXERCISE

__all__ = ["EXERCISE"]


def longformer(window: int, n_global: int) -> str:
    return f"local({window}) | global({n_global})"


def bigbird(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    return written(block, n_window, n_global, draw(block, n_window, n_global, n_random, seed))


def written(block: int, n_window: int, n_global: int, rest: str) -> str:
    """The right window and the right global blocks, and a third word."""
    return f"local({(n_window + 1) * block}, block={block}) | global({n_global * block}) | {rest}"


def draw(block: int, skip_last: int, skip_first: int, n_blocks: int, seed: int) -> str:
    skips = f"skip_first={skip_first}, skip_last={skip_last}"
    return f"random({n_blocks}, block={block}, {skips}, seed={seed})"


@EXERCISE.misconception("the window counted on both sides", bigbird_sentence=bigbird)
def both_sides(window: int, n_global: int) -> str:
    """`window` was doubled, for the tokens ahead. The paper's encoder looks ahead; a decoder cannot, and
    `local` counts backwards only. So it would look twice as far back as asked for."""
    return longformer(2 * window, n_global)


@EXERCISE.misconception("half the window behind", bigbird_sentence=bigbird)
def halved(window: int, n_global: int) -> str:
    """`window` was halved, as if one half lay ahead, as in the paper's encoder. Here all of it lies behind:
    `local(window)` is the last `window` tokens."""
    return longformer(window // 2, n_global)


@EXERCISE.misconception("the query counted beside the window", bigbird_sentence=bigbird)
def one_more(window: int, n_global: int) -> str:
    """`local(window + 1)`: the query's own token was added. It is counted already: `local(3)` is the token
    itself and the two before it."""
    return longformer(window + 1, n_global)


@EXERCISE.misconception("a window without the query", bigbird_sentence=bigbird)
def one_less(window: int, n_global: int) -> str:
    """`local(window - 1)`: one was taken off for the query's own token. `local` counts it, so `window` goes
    in as it is."""
    return longformer(window - 1, n_global)


@EXERCISE.misconception("one global token for many", bigbird_sentence=bigbird)
def at_one_place(window: int, n_global: int) -> str:
    """`at` names positions: one token at the position n_global is global now. The first n_global tokens are
    `global(n_global)`."""
    return f"local({window}) | global(at=({n_global},))"


@EXERCISE.misconception("Longformer without its global tokens", bigbird_sentence=bigbird)
def window_only(window: int, n_global: int) -> str:
    """That is a sliding window, chapter 04. Longformer adds tokens that everybody sees and that see
    everything: `| global(n_global)`."""
    return f"local({window})"


@EXERCISE.misconception("+ in place of |", bigbird_sentence=bigbird)
def plus(window: int, n_global: int) -> str:
    """Words were joined by `+`. The language knows one sign, `|`, or: a token is seen if one of the words
    shows it."""
    return f"local({window}) + global({n_global})"


@EXERCISE.misconception("the own block not counted in the window", longformer_sentence=longformer)
def own_forgotten(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """`local` got n_window · block tokens. Its size counts the query's own block too, and n_window are those
    *before* it: (n_window + 1) · block."""
    near = f"local({n_window * block}, block={block})"
    return f"{near} | global({n_global * block}) | {draw(block, n_window, n_global, n_random, seed)}"


@EXERCISE.misconception("a window that slides by tokens", longformer_sentence=longformer)
def by_tokens(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """`block=` is missing in `local`, so the window moves token by token and always holds as many. BigBird's
    moves block by block: the first query of a block sees nearly a block less than the last, and all of a
    block need the same keys. That is what makes it fast."""
    near = f"local({(n_window + 1) * block})"
    return f"{near} | global({n_global * block}) | {draw(block, n_window, n_global, n_random, seed)}"


@EXERCISE.misconception("the window in blocks, where tokens are counted", longformer_sentence=longformer)
def blocks_for_tokens(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """`local(n_window + 1)` is so many *tokens*. The word counts tokens: (n_window + 1) · block, and
    `block=block` to slide by blocks."""
    near = f"local({n_window + 1})"
    return f"{near} | global({n_global * block}) | {draw(block, n_window, n_global, n_random, seed)}"


@EXERCISE.misconception("n_window blocks on either side", longformer_sentence=longformer)
def two_sided(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """The window got 2 · n_window + 1 blocks, for those ahead as well. The paper's encoder has them; in a
    decoder nothing lies ahead, and `local` would reach further back instead."""
    near = f"local({(2 * n_window + 1) * block}, block={block})"
    return f"{near} | global({n_global * block}) | {draw(block, n_window, n_global, n_random, seed)}"


@EXERCISE.misconception("n_global tokens in place of blocks", longformer_sentence=longformer)
def global_tokens(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """`global(n_global)` makes so many *tokens* global. The first n_global blocks have n_global · block
    tokens."""
    near = f"local({(n_window + 1) * block}, block={block})"
    return f"{near} | global({n_global}) | {draw(block, n_window, n_global, n_random, seed)}"


@EXERCISE.misconception("the first token of each global block alone", longformer_sentence=longformer)
def global_starts(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """Of each global block one token was made global. All tokens of the first n_global blocks are:
    `global(n_global * block)`."""
    at = ", ".join(str(number * block) for number in range(n_global))
    near = f"local({(n_window + 1) * block}, block={block})"
    return f"{near} | global(at=({at},)) | {draw(block, n_window, n_global, n_random, seed)}"


@EXERCISE.misconception("no global blocks", longformer_sentence=longformer)
def without_global(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """The word `global` is missing. Leaving the first blocks out of the draw (skip_first) makes them global
    for nobody."""
    near = f"local({(n_window + 1) * block}, block={block})"
    return f"{near} | {draw(block, n_window, n_global, n_random, seed)}"


@EXERCISE.misconception("no random blocks", longformer_sentence=longformer)
def without_random(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """Window and global blocks make a Longformer in blocks. What is BigBird's own are the random blocks: a
    third word, `random(…)`."""
    return f"local({(n_window + 1) * block}, block={block}) | global({n_global * block})"


@EXERCISE.misconception("blocks of 64 drawn", longformer_sentence=longformer)
def default_block(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """`block=` is missing in `random`. Each word has its own, and this one's is 64 where nothing is said. All
    words of BigBird need the same blocks."""
    rest = f"random({n_random}, skip_first={n_global}, skip_last={n_window}, seed={seed})"
    return written(block, n_window, n_global, rest)


@EXERCISE.misconception("global blocks drawn again", longformer_sentence=longformer)
def no_skip_first(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """skip_first is missing, so a draw may fall on a global block, which everybody sees anyway: fewer blocks
    are seen than were paid for."""
    return written(block, n_window, n_global, draw(block, n_window, 0, n_random, seed))


@EXERCISE.misconception("blocks of the window drawn again", longformer_sentence=longformer)
def no_skip_last(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """skip_last is missing, so a draw may fall on a block that the window shows already. Leave out the
    n_window just before the query's own."""
    return written(block, n_window, n_global, draw(block, 0, n_global, n_random, seed))


@EXERCISE.misconception("nothing left out of the draw", longformer_sentence=longformer)
def no_skips(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """skip_first and skip_last are missing, so draws fall on blocks that are global or in the window. BigBird
    draws from the rest: leave out the first n_global and the n_window before the query's own."""
    return written(block, n_window, n_global, draw(block, 0, 0, n_random, seed))


@EXERCISE.misconception("one block too many left out", longformer_sentence=longformer)
def skips_own(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """skip_last counts the query's own block too. `random` never draws that one; skip_last are the blocks
    just *before* it, so n_window."""
    return written(block, n_window, n_global, draw(block, n_window + 1, n_global, n_random, seed))


@EXERCISE.misconception("tokens left out, where blocks are counted", longformer_sentence=longformer)
def skips_in_tokens(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """skip_first and skip_last were given in tokens. `random` counts blocks everywhere but in `block` itself:
    n_global and n_window."""
    return written(block, n_window, n_global, draw(block, n_window * block, n_global * block, n_random, seed))


@EXERCISE.misconception("the skips exchanged", longformer_sentence=longformer)
def skips_exchanged(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """skip_first got n_window and skip_last n_global. The global blocks are the *first* of the text, the
    window is what comes *last* before the query."""
    return written(block, n_window, n_global, draw(block, n_global, n_window, n_random, seed))


@EXERCISE.misconception("n_random tokens for blocks", longformer_sentence=longformer)
def random_tokens(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """n_random · block were drawn. The first number of `random` counts blocks, not tokens: n_random."""
    return written(block, n_window, n_global, draw(block, n_window, n_global, n_random * block, seed))


@EXERCISE.misconception("the seed left out, or always the same", longformer_sentence=longformer)
def no_seed(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """The seed that was given is not in the sentence: left out, it is 0, and a number of one's own is the
    same for everyone, too. Two layers with different seeds are meant to see different blocks."""
    return written(block, n_window, n_global, draw(block, n_window, n_global, n_random, 0))


@EXERCISE.misconception("drawn anew with every call", longformer_sentence=longformer)
def fresh(block: int, n_window: int, n_global: int, n_random: int, seed: int) -> str:
    """The sentence holds a seed that was drawn on the spot, so every call means another pattern. Prefill
    would see other blocks than decode, and training others than both. The seed is given: write it down."""
    number = random.randrange(10**7, 10**9)
    return written(block, n_window, n_global, draw(block, n_window, n_global, n_random, number))
