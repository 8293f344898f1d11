"""05.2: Longformer and BigBird as sentences, whose meaning is held against loops over blocks."""

from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from kvlearn.attention.sparse.pattern import Pattern, words
from kvlearn.attention.sparse.sentences import parse
from kvlearn.attention.sparse.words import Global, Random
from kvlearn.grading.compare import compare, describe
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.guard import shorten
from kvlearn.grading.trial import Stop, Trial

EXERCISE = Exercise(
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


def read(t: Trial, got: Any) -> Pattern:
    """What a sentence means, or the end of this round."""
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


def pairs(n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
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
    """What the word draws, block by block."""
    word = Random(n_random, block, skip_first=n_global, skip_last=n_window, seed=seed)
    mask = torch.zeros(n_tokens, n_tokens, dtype=torch.bool)
    for start in range(0, n_tokens, block):
        for number in word.draw(start // block):
            mask[start : start + block, number * block : (number + 1) * block] = True
    return mask


Sizes = tuple[int, int, int, int, int]


def sizes(t: Trial) -> Sizes:
    """block, n_window, n_global, n_random, seed; window and global differ, so that no exchange goes
    unseen."""
    n_window, n_global = t.random.sample(range(1, 4), 2)
    return t.integer(3, 4), n_window, n_global, t.integer(1, 3), t.integer(1, 10**6)


def length(t: Trial, given: Sizes) -> int:
    """Enough blocks for a choice among many, even for one who skips tokens; the last is half-filled."""
    block, n_window, n_global, *_ = given
    return block * (block * (n_window + n_global) + 4) + t.integer(1, block - 1)


def part_of(t: Trial, got: Any, given: Sizes, which: str) -> None:
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
        w for w in words(pattern) if next((k for k, c in kinds.items() if isinstance(w, c)), "near") == which
    ]
    if which in kinds and not mine:
        t.true(False, f"a word {which}(…)", f"none in {shorten(repr(got), 150)}")
        return
    mask, said = mask_of(mine, n), " | ".join(map(str, mine)) or "no word for it"
    t.note(mask, compare(mask, parts[which], f"the mask of {said}, [query, key]:"))


@EXERCISE.requirement(1, "Longformer")
def longformer(t: Trial, longformer_sentence: Answer, bigbird_sentence: Answer) -> None:
    """the `window` tokens up to the query's own, and the first `n_global`: all see them, they see all
    before"""
    window, n_global = t.integer(3, 7), t.integer(2, 5)
    n = 2 * window + n_global + t.integer(4, 9)
    i, j, past = pairs(n)
    got = longformer_sentence(window, n_global)
    want = (past & (i - j < window)) | first_tokens(n, n_global)
    mask = read(t, got).mask(n)
    t.note(mask, compare(mask, want, f"the mask of {shorten(got, 150)}, [query, key]:"))


@EXERCISE.requirement(1, "BigBird: its own block and the window")
def near(t: Trial, longformer_sentence: Answer, bigbird_sentence: Answer) -> None:
    """the query's own block up to itself, and n_window whole blocks before it"""
    given = sizes(t)
    part_of(t, bigbird_sentence(*given), given, "near")


@EXERCISE.requirement(1, "BigBird: the global blocks")
def wide(t: Trial, longformer_sentence: Answer, bigbird_sentence: Answer) -> None:
    """every token of the first n_global blocks, as a key and as a query"""
    given = sizes(t)
    part_of(t, bigbird_sentence(*given), given, "global")


@EXERCISE.requirement(2, "BigBird: the random blocks")
def rest(t: Trial, longformer_sentence: Answer, bigbird_sentence: Answer) -> None:
    """n_random blocks for each block of queries, drawn by the word with the given seed, and none among those
    that are global or in the window"""
    given = sizes(t)
    part_of(t, bigbird_sentence(*given), given, "random")


@EXERCISE.requirement(1, "one seed, one pattern", rounds=2)
def repeated(t: Trial, longformer_sentence: Answer, bigbird_sentence: Answer) -> None:
    """called again with the same seed the same pattern, with another seed another"""
    *others, seed = given = sizes(t)
    n = length(t, given)
    first, again, other = (
        read(t, bigbird_sentence(*others, number)).mask(n) for number in (seed, seed, seed + 1)
    )
    same = torch.equal(first, again)
    t.true(same, "the same pattern for the same seed", "two different ones")
    if same:
        drawn_words: list[Pattern] = [
            w for w in words(read(t, bigbird_sentence(*given))) if isinstance(w, Random)
        ]
        came = "the same" if mask_of(drawn_words, n).any() else "the same: nothing is drawn"
        t.true(not torch.equal(first, other), "another pattern for another seed", came)
