"""Unit 10: requirements and hints of the exercises on quality."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvlearn import workbench
from kvlearn.grading import (
    Answer,
    CheckContext,
    Difference,
    Exercise,
    NotWritten,
    Raised,
    Stop,
    describe,
    plain_number,
)
from kvlearn.study.quality.statistics import student_quantile
from kvlearn.study.text import corpus

T95 = {df: student_quantile(0.975, df) for df in range(1, 31)}


def real(t: CheckContext, got: Any, want: float, what: str) -> bool:
    """A number of any type, to four digits; infinite and NaN as expected."""
    if isinstance(got, np.ndarray | Tensor) and math.prod(got.shape) == 1:
        got = got.reshape(()).item()
    came = plain_number(got)
    if came is None:
        return t.note(got, Difference(what, f"{want:.5g}", describe(got)))
    good = math.isclose(came, want, rel_tol=1e-4, abs_tol=1e-6) or (math.isnan(came) and math.isnan(want))
    return t.note(f"{came:.3e}", None if good else Difference(what, f"{want:.5g}", f"{came:.5g}"))


def parts_of(t: CheckContext, got: Any, n: int, what: str) -> list[Any]:
    """The ``n`` parts of a tuple, a list or a flat tensor, or the end of this round."""
    if isinstance(got, np.ndarray | Tensor) and tuple(got.shape) == (n,):
        got = list(got)
    if isinstance(got, tuple | list) and len(got) == n:
        return list(got)
    t.note(got, Difference("", what, describe(got)))
    raise Stop


def as_tensor(t: CheckContext, got: Any, what: str) -> Tensor:
    """A tensor, a numpy array or a list of numbers as a tensor, or the end of this round."""
    try:
        return torch.stack([torch.as_tensor(each) for each in got])
    except (TypeError, ValueError, RuntimeError, IndexError):
        t.note(got, Difference("", what, describe(got)))
        raise Stop from None


def names_in(t: CheckContext, got: Any) -> list[str]:
    """The names in a list, tuple or set, or the end of this round."""
    if isinstance(got, list | tuple | set | frozenset) and all(isinstance(each, str) for each in got):
        return list(got)
    t.note(got, Difference("", "names", describe(got)))
    raise Stop


def listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


# 10.1: perplexity and bits per byte over batches, compared with a loop over predicted tokens

perplexity = Exercise(
    id="10.1",
    slug="perplexity",
    title="Perplexity without the usual slips",
    answers=("quality",),
    hints=(
        "Take one text of four tokens. How many of them does the model predict, and which row of the logits "
        "predicts which token? Then let the first two tokens be context: what is left to count?",
        "Pseudocode: nats = tokens = bytes = 0; for each batch, for each text, for each place from 1 on: if "
        "the place is counted, add the loss of the token there to nats, 1 to tokens, its bytes to bytes. "
        "Divide only once, at the very end.",
        "Without loops over texts: `losses` of all places with F.cross_entropy(…, reduction='none'), which "
        "wants the classes in dimension 1; then a mask (B, T − 1) of the places counted, made of "
        "torch.arange(1, T), start[:, None] and length[:, None].",
        "logits[:, :-1] predict tokens[:, 1:]. Place p counts if p ≥ 1, p ≥ start and p < length. "
        "logits.float() before anything else. Perplexity: exp(nats / tokens). Bits per byte: "
        "nats / ln 2 / bytes.",
    ),
)

VOCABULARY = 11
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def texts(t: CheckContext, B: int, *, padded: bool, context: bool, dtype: torch.dtype) -> Batch:
    """One batch; what is padding holds ordinary tokens, so nothing but the lengths tells it."""
    T = t.integer(9, 13)
    scale = 30.0 if dtype == torch.bfloat16 else 1.5
    logits = (scale * t.randn(B, T, VOCABULARY)).to(dtype)
    tokens = torch.randint(VOCABULARY, (B, T), generator=t.generator)
    tokens[:, 2] = 0  # a token as good as any other
    length = torch.full((B,), T)
    start = torch.zeros(B, dtype=torch.long)
    if padded:
        length = torch.tensor([t.integer(4, T - 2) for _ in range(B)])
        length[t.integer(0, B - 1)] = T
    if context:
        start = torch.tensor([t.integer(2, 3) for _ in range(B)])
        start[0] = length[0]  # all of this text was counted before
    return logits, tokens, start, length


def quality_reference(batches: Sequence[Batch], token_bytes: Tensor) -> tuple[float, float]:
    losses, n_bytes = [], 0
    for logits, tokens, start, length in batches:
        for b in range(len(tokens)):
            for place in range(max(int(start[b]), 1), int(length[b])):
                token = int(tokens[b, place])
                losses.append(-float(logits[b, place - 1].double().log_softmax(-1)[token]))
                n_bytes += int(token_bytes[token])
    return math.exp(math.fsum(losses) / len(losses)), math.fsum(losses) / math.log(2) / n_bytes


def quality_same(t: CheckContext, quality: Answer, batches: Sequence[Batch], which: int) -> None:
    token_bytes = torch.tensor([t.integer(1, 6) for _ in range(VOCABULARY)])
    want = quality_reference(batches, token_bytes)[which]
    got = parts_of(t, quality(list(batches), token_bytes), 2, "a pair (perplexity, bits per byte)")
    real(t, got[which], want, ("perplexity:", "bits per byte:")[which])


@perplexity.requirement(1, "one text")
def quality_one(t: CheckContext, quality: Answer) -> None:
    """exp of the mean loss of all tokens but the first"""
    quality_same(t, quality, [texts(t, 1, padded=False, context=False, dtype=torch.float32)], 0)


@perplexity.requirement(1, "texts of different lengths")
def quality_ragged(t: CheckContext, quality: Answer) -> None:
    """one mean over all tokens before the padding"""
    quality_same(t, quality, [texts(t, 4, padded=True, context=False, dtype=torch.float32)], 0)


@perplexity.requirement(1, "several batches")
def quality_batches(t: CheckContext, quality: Answer) -> None:
    """one mean over the tokens of all batches, and no input changed"""
    batches = [texts(t, B, padded=True, context=False, dtype=torch.float32) for B in (1, 4, 2)]
    quality_same(t, quality, batches, 0)
    t.unchanged()


@perplexity.requirement(2, "context that was counted before")
def quality_context(t: CheckContext, quality: Answer) -> None:
    """places before `start` are not counted; a text may have none left"""
    batches = [texts(t, B, padded=True, context=True, dtype=torch.float32) for B in (3, 4)]
    quality_same(t, quality, batches, 0)


@perplexity.requirement(1, "logits in bfloat16")
def quality_half(t: CheckContext, quality: Answer) -> None:
    """computed in fp32, large logits too"""
    while True:
        batch = texts(t, 3, padded=True, context=False, dtype=torch.bfloat16)
        if quality_reference([batch], torch.ones(VOCABULARY))[0] < 1e30:
            break
    quality_same(t, quality, [batch], 0)


@perplexity.requirement(1, "bits per byte")
def quality_bits(t: CheckContext, quality: Answer) -> None:
    """the bits of the tokens counted, divided by the bytes that they stand for"""
    batches = [texts(t, B, padded=True, context=True, dtype=torch.float32) for B in (3, 4)]
    quality_same(t, quality, batches, 1)


# 10.2: loss by position, compared with a loop over the tokens of each row

positions = Exercise(
    id="10.2",
    slug="positions",
    title="Loss by position",
    answers=("loss_by_position",),
    hints=(
        "Write down the mask of a row that is padded on the left, and under it the number of tokens that "
        "come before each token *of this row*. Which running sum gives you these numbers?",
        "Pseudocode: position = (running sum of the mask along the row) − 1; for each bucket: inside = token "
        "and low ≤ position < high; count = how many; mean = sum of their losses / count.",
        "Padding may hold NaN, and 0 · NaN is NaN: pick the losses that count, `losses[inside]`, or replace "
        "the others by torch.where before you add. The mean of an empty tensor is NaN, as asked for.",
        "`mask.cumsum(dim=1) - 1` is the position at every token, whichever side the padding is on. With "
        "same_rows keep only rows whose mask has at least edges[-1] tokens, before anything else.",
    ),
)


def ragged(t: CheckContext, sides: str, edges: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Losses and mask of rows, each padded on a side drawn from ``sides``; one, the longest, reaches past the
    last edge and has no padding."""
    B = 6
    lengths = [edges[-1] + 3, edges[-1] + 1, edges[-1], edges[-1] - 1]
    lengths += [t.integer(edges[1] + 1, edges[-1] - 2) for _ in range(B - len(lengths))]
    lengths = [lengths[i] for i in torch.randperm(B, generator=t.generator)]
    T = max(lengths)
    losses, mask = 2 + t.randn(B, T).abs() * 2, torch.zeros(B, T, dtype=torch.bool)
    for b, length in enumerate(lengths):
        side = ("left", "right")[b % 2] if sides == "both" else sides
        first = T - length if side == "left" else 0
        mask[b, first : first + length] = True
        losses[b, first] = torch.nan  # nothing predicts the first token
    losses[~mask] = 50.0 if t.round == 0 else torch.nan
    return losses, mask


def position_reference(
    losses: Tensor, mask: Tensor, edges: Sequence[int], same_rows: bool = False
) -> tuple[list[float], list[int]]:
    buckets: list[list[float]] = [[] for _ in edges[1:]]
    for row, real_tokens in zip(losses.tolist(), mask.tolist(), strict=True):
        own = [loss for loss, is_token in zip(row, real_tokens, strict=True) if is_token]
        if same_rows and len(own) < edges[-1]:
            continue
        for bucket, (low, high) in zip(buckets, pairwise(edges), strict=True):
            bucket += own[low:high]
    means = [math.fsum(bucket) / len(bucket) if bucket else math.nan for bucket in buckets]
    return means, [len(bucket) for bucket in buckets]


def position_means(t: CheckContext, got: Any, want: Sequence[float]) -> None:
    means, _ = parts_of(t, got, 2, "a pair (means, counts)")
    means = as_tensor(t, means, f"{len(want)} means")
    t.close(means.float() if means.dtype.is_floating_point else means, torch.tensor(want), "means:")


def drawn_edges(t: CheckContext) -> list[int]:
    """Rising, from 1 or later; no bucket is empty for rows as ``ragged`` draws them."""
    first = t.integer(1, 2)
    second = first + t.integer(1, 2)
    third = second + t.integer(2, 3)
    return [first, second, third, third + t.integer(3, 4)]


@positions.requirement(1, "padding on the right")
def positions_right(t: CheckContext, loss_by_position: Answer) -> None:
    """the mean loss of each bucket; padding and the tokens outside of the edges are left out"""
    edges = drawn_edges(t)
    losses, mask = ragged(t, "right", edges)
    position_means(t, loss_by_position(losses, mask, edges), position_reference(losses, mask, edges)[0])
    t.unchanged()


@positions.requirement(2, "padding on either side")
def positions_left(t: CheckContext, loss_by_position: Answer) -> None:
    """positions are counted from the first token of each row"""
    edges = drawn_edges(t)
    losses, mask = ragged(t, "left" if t.round == 1 else "both", edges)
    position_means(t, loss_by_position(losses, mask, edges), position_reference(losses, mask, edges)[0])


@positions.requirement(1, "counts")
def positions_counts(t: CheckContext, loss_by_position: Answer) -> None:
    """how many tokens each bucket has"""
    edges = drawn_edges(t)
    losses, mask = ragged(t, "both", edges)
    _, counts = parts_of(t, loss_by_position(losses, mask, edges), 2, "a pair (means, counts)")
    counts = as_tensor(t, counts, f"{len(edges) - 1} counts")
    want = torch.tensor(position_reference(losses, mask, edges)[1])
    t.close(counts.long() if counts.shape == want.shape else counts, want, "counts:")


@positions.requirement(1, "buckets without a token")
def positions_empty(t: CheckContext, loss_by_position: Answer) -> None:
    """a mean of NaN and a count of 0 there, and the other buckets as before"""
    edges = drawn_edges(t)
    losses, mask = ragged(t, "both", edges)
    longer = [*edges, edges[-1] + 5, edges[-1] + 9]
    want, n = position_reference(losses, mask, longer)
    means, counts = parts_of(t, loss_by_position(losses, mask, longer), 2, "a pair (means, counts)")
    means, counts = as_tensor(t, means, "means"), as_tensor(t, counts, "counts")
    if t.close(means.isnan(), torch.tensor(want).isnan(), "is the mean NaN?"):
        t.close(means[:4].float(), torch.tensor(want[:4]), "means:")
        t.close(counts.long(), torch.tensor(n), "counts:")


@positions.requirement(2, "the same rows in every bucket")
def positions_same(t: CheckContext, loss_by_position: Answer) -> None:
    """same_rows=True: only rows that have a token at every position before edges[-1]"""
    edges = drawn_edges(t)
    losses, mask = ragged(t, "right" if t.round == 0 else "both", edges)
    got = loss_by_position(losses, mask, edges, same_rows=True)
    position_means(t, got, position_reference(losses, mask, edges, same_rows=True)[0])


# 10.3: recall batches, made and proved; compared with a walk through each row

mqar = Exercise(
    id="10.3",
    slug="mqar",
    title="A recall batch with one answer",
    answers=("make_batch", "has_one_answer"),
    hints=(
        "Lay three pairs, their three queries and two fillers on the table as cards. Shuffle them: what can "
        "be wrong with the order, and how do you mend it without a new shuffle?",
        "`make_batch`, in pseudocode: for each row draw distinct keys and distinct values; shuffle "
        "2 · n_pairs + fillers cards, of which two carry each pair's number; walk through them: the first "
        "card of a pair writes key and value, the second writes the key alone and is its query; note the "
        "place.",
        "torch.randperm(n, generator=generator)[:k] gives k distinct numbers. Keys begin at 1, values at "
        "1 + n_keys. Fillers: length − 3 · n_pairs.",
        "`has_one_answer`: first collect the pairs of a row, (place, key, value), from neighbours in which a "
        "value follows a key. Then for each query: exactly one pair of its key, its place is smaller, its "
        "value is the answer, and the row holds this value once: row.count(answer) == 1.",
    ),
)


def mqar_draw(t: CheckContext) -> tuple[int, int, int, int, int]:
    """batch, n_pairs, length, n_keys, n_values: few keys, so that drawing with replacement repeats some."""
    n_pairs = t.integer(5, 7)
    return 48, n_pairs, 3 * n_pairs + t.integer(4, 9), n_pairs + 2, n_pairs + 3


def generator_of(t: CheckContext) -> torch.Generator:
    return torch.Generator().manual_seed(t.integer(0, 2**40))


def mqar_made(t: CheckContext, make_batch: Answer) -> tuple[tuple[int, ...], list[Any]]:
    """The sizes, and the batch as lists of (row, asked, answers); the end of the round if it has no form."""
    sizes = mqar_draw(t)
    batch, n_pairs, length, *_ = sizes
    got = parts_of(t, make_batch(*sizes, generator_of(t)), 3, "a triple (tokens, asked, answers)")
    for name, tensor, shape in zip(
        ("tokens", "asked", "answers"),
        got,
        ((batch, length), (batch, n_pairs), (batch, n_pairs)),
        strict=True,
    ):
        if not isinstance(tensor, Tensor) or tensor.dtype.is_floating_point or tuple(tensor.shape) != shape:
            t.note(tensor, Difference(f"{name}:", f"integers of shape {shape}", describe(tensor)))
            raise Stop
    return sizes, list(zip(*(tensor.tolist() for tensor in got), strict=True))


def pairs_in(row: Sequence[int], n_keys: int) -> list[tuple[int, int, int]]:
    """(place, key, value) wherever a value follows a key."""
    return [(s, a, b) for s, (a, b) in enumerate(pairwise(row)) if 1 <= a <= n_keys < b]


def first_fault(rows: Sequence[Any], fault: Callable[..., str]) -> str:
    """The fault of the first wrong row, and the number of wrong rows."""
    found = [(i, text) for i, row in enumerate(rows) if (text := fault(*row))]
    return f"row {found[0][0]}: {found[0][1]}; {len(found)} of {len(rows)} rows" if found else ""


@mqar.requirement(1, "pairs")
def mqar_pairs(t: CheckContext, make_batch: Answer, has_one_answer: Answer) -> None:
    """in each row n_pairs pairs, a key and at once its value; no key and no value in two pairs; all other
    places hold a key or filler"""
    (_, n_pairs, _, n_keys, n_values), rows = mqar_made(t, make_batch)

    def fault(row: list[int], asked: Any, answers: Any) -> str:
        pairs = pairs_in(row, n_keys)
        keys, values = [key for _, key, _ in pairs], [value for *_, value in pairs]
        if not all(0 <= token <= n_keys + n_values for token in row):
            return f"a token outside of 0 to {n_keys + n_values}"
        if len(pairs) != n_pairs:
            return f"{len(pairs)} pairs"
        if len(set(keys)) < n_pairs:
            return "a key in two pairs"
        if len(set(values)) < n_pairs:
            return "a value in two pairs"
        return "a value outside of the pairs" if sum(token > n_keys for token in row) > n_pairs else ""

    came = first_fault(rows, fault)
    t.true(not came, f"{n_pairs} pairs in each row, keys and values all different", came)


@mqar.requirement(2, "queries")
def mqar_queries(t: CheckContext, make_batch: Answer, has_one_answer: Answer) -> None:
    """each key once more, after its pair; asked holds the places, answers the values, in the same order; no
    value follows a query"""
    (_, n_pairs, length, n_keys, _), rows = mqar_made(t, make_batch)

    def fault(row: list[int], asked: list[int], answers: list[int]) -> str:
        pairs = pairs_in(row, n_keys)
        for place, answer in zip(asked, answers, strict=True):
            if not 0 <= place < length or not 1 <= row[place] <= n_keys:
                return f"asked names place {place}, where no key is"
            own = [(s, value) for s, key, value in pairs if key == row[place] and s < place]
            if not own:
                return f"the key at place {place} has no pair before it"
            if place + 1 < length and row[place + 1] > n_keys:
                return f"a value follows the query at place {place}"
            if own[0][1] != answer:
                return f"the answer to the query at place {place} is {answer}, its pair says {own[0][1]}"
        n_queries = sum(1 <= token <= n_keys for token in row) - n_pairs
        if len({row[place] for place in asked}) < n_pairs or n_queries != n_pairs:
            return "not every key is asked once"
        return ""

    came = first_fault(rows, fault)
    t.true(not came, "one query of each key, after its pair", came)


@mqar.requirement(1, "drawn anew")
def mqar_drawn(t: CheckContext, make_batch: Answer, has_one_answer: Answer) -> None:
    """other keys, values and places in each row; pairs, queries and filler mixed; drawn from the generator:
    the same seed gives the same batch, and torch's own generator is left alone"""
    (*_, n_keys, _), rows = mqar_made(t, make_batch)
    pairs = [pairs_in(row, n_keys) for row, _, _ in rows]
    pairings = {frozenset((key, value) for _, key, value in own) for own in pairs}
    t.true(len(pairings) > 24, "other pairs in each row", f"{len(pairings)} different sets in 48 rows")
    places = {tuple(sorted(asked)) for _, asked, _ in rows}
    t.true(len(places) > 24, "queries at other places in each row", f"{len(places)} different in 48 rows")
    mixed = sum(bool(own) and min(asked) < own[-1][0] for own, (_, asked, _) in zip(pairs, rows, strict=True))
    t.true(mixed > 12, "a query before the last pair in many rows", f"in {mixed} of 48 rows")
    filler = sum(bool(own) and 0 in row[: own[-1][0]] for own, (row, _, _) in zip(pairs, rows, strict=True))
    t.true(filler > 12, "filler among the pairs in many rows", f"in {filler} of 48 rows")
    seed, sizes = t.integer(0, 2**40), mqar_draw(t)
    before = torch.get_rng_state()
    first, second = (
        parts_of(t, make_batch(*sizes, torch.Generator().manual_seed(seed)), 3, "a triple") for _ in range(2)
    )
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    t.true(same, "the same batch for the same seed", "another one")
    t.true(torch.equal(before, torch.get_rng_state()), "torch's own generator as before", "it was used")


def rows_to_prove(t: CheckContext, spoil: str) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Rows that have one answer, and rows spoiled in one way; the last tensor says which are good.

    Half of the good rows ask one key twice, which is allowed; in the others a query may be next to
    another. The first and last two places are filler.
    """
    n_pairs, n_keys, n_values, B = 4, 7, 9, 12
    rows: list[tuple[list[int], list[int], list[int], bool]] = []
    for b in range(B):
        keys = (1 + torch.randperm(n_keys, generator=t.generator)).tolist()
        values = (1 + n_keys + torch.randperm(n_values, generator=t.generator)).tolist()
        row = [0] * (3 * n_pairs + 9)
        for p in range(n_pairs):
            row[2 + 2 * p : 4 + 2 * p] = keys[p], values[p]
        free = range(2 + 2 * n_pairs, len(row) - 3, 1 if b % 4 == 2 else 2)
        asked = [free[i] for i in torch.randperm(len(free), generator=t.generator).tolist()[:n_pairs]]
        queries = [0, 1, 2, t.integer(0, 2) if b % 4 == 0 else 3]
        for p, place in zip(queries, asked, strict=True):
            row[place] = keys[p]
        answers = [values[p] for p in queries]
        if b % 2:
            _spoil(t, spoil, row, asked, answers, (keys[-1], values[-1]), b // 2 % 3)
        rows.append((row, asked, answers, b % 2 == 0))
    order = torch.randperm(B, generator=t.generator).tolist()
    tokens, asked_at, wanted, good = (torch.tensor([rows[i][part] for i in order]) for part in range(4))
    return tokens, asked_at, wanted, n_keys, good


def _spoil(
    t: CheckContext,
    how: str,
    row: list[int],
    asked: list[int],
    answers: list[int],
    unused: tuple[int, int],
    turn: int,
) -> None:
    """Break one query of this row; ``unused`` are a key and a value that the row does not have."""
    q = t.integer(0, 2)
    place, answer, others = asked[q], answers[q], answers[(q + 1) % 3]
    pair = row.index(answer) - 1
    if how == "answers" and turn == 0:
        answers[q] = others
    elif how == "answers" and turn == 1:
        asked[q] = place + 1  # filler
    elif how == "answers":
        row[place] = unused[0]
    elif how == "pairs":
        second = (slice(0, 2), slice(-2, None), slice(0, 2))[turn]
        row[second] = row[place], unused[1]
    elif how == "order":
        row[-2:], row[pair : pair + 2] = row[pair : pair + 2], [0, 0]
    elif turn == 0:
        row[0] = answer
    elif turn == 1:
        row[-1] = answer
    else:  # another pair has the same value
        row[row.index(others)] = answers[(q + 1) % 3] = answer


def mqar_proved(t: CheckContext, has_one_answer: Answer, spoil: str) -> None:
    tokens, asked, answers, n_keys, good = rows_to_prove(t, spoil)
    got = as_tensor(t, has_one_answer(tokens, asked, answers, n_keys), "a tensor (B,) of booleans")
    t.close(got.bool() if got.shape == good.shape else got, good)


@mqar.requirement(1, "a proof: answers")
def mqar_answers(t: CheckContext, make_batch: Answer, has_one_answer: Answer) -> None:
    """True for good rows; False where the answer is another pair's value, or there is no key or no pair"""
    mqar_proved(t, has_one_answer, "answers")


@mqar.requirement(1, "a proof: pairs")
def mqar_two(t: CheckContext, make_batch: Answer, has_one_answer: Answer) -> None:
    """False where the key asked for has two pairs"""
    mqar_proved(t, has_one_answer, "pairs")


@mqar.requirement(1, "a proof: order")
def mqar_order(t: CheckContext, make_batch: Answer, has_one_answer: Answer) -> None:
    """False where a query comes before its pair"""
    mqar_proved(t, has_one_answer, "order")


@mqar.requirement(1, "a proof: leaks")
def mqar_leaks(t: CheckContext, make_batch: Answer, has_one_answer: Answer) -> None:
    """False where the answer is in the row a second time"""
    mqar_proved(t, has_one_answer, "leaks")


# 10.4: intervals of paired differences, compared with sums written out

paired = Exercise(
    id="10.4",
    slug="paired",
    title="Better, worse, or a tie?",
    answers=("interval", "bootstrap", "verdict"),
    hints=(
        "Three seeds: ours 2.1, 2.5, 2.9, theirs 2.2, 2.6, 3.0. Is ours better? Look at the two means and "
        "spreads first, then at the three differences. Which of the two views does the seed belong to?",
        "`interval`, in pseudocode: d = differences over the seeds that both have and that did not diverge; "
        "mean ± t95[n − 1] · s / √n, with s the standard deviation of d, divided by n − 1.",
        "`bootstrap`: for each row of picks, the texts it names, as often as it names them: sum of "
        "(ours − theirs) over sum of tokens. Indexing does it: `(ours - theirs)[picks]` has the shape of "
        "picks.",
        "torch.quantile(values, 0.025) and 0.975 interpolate as asked; values and quantile in float64. "
        "`verdict` is four ifs in the order of the task.",
    ),
)

Runs = dict[int, float | None]


def paired_reference(ours: Runs, theirs: Runs) -> tuple[float, float, float]:
    """The interval from sums, with Student's t."""
    differences = []
    for seed, a in ours.items():
        b = theirs.get(seed)
        if a is not None and b is not None and not math.isnan(a) and not math.isnan(b):
            differences.append(a - b)
    n = len(differences)
    mean = math.fsum(differences) / n
    if n < 2:
        return mean, -math.inf, math.inf
    squares = math.fsum((d - mean) ** 2 for d in differences)
    half = T95[n - 1] * math.sqrt(squares / (n - 1) / n)
    return mean, mean - half, mean + half


def drawn_runs(t: CheckContext, n: int) -> tuple[Runs, Runs]:
    """Losses of n seeds that share what is hard about their seed."""
    seeds = t.random.sample(range(20), n)
    shared = {seed: 2.5 + 0.2 * t.random.gauss(0, 1) for seed in seeds}
    mean = t.pick(-0.08, 0.05, 0.11)
    ours: Runs = {seed: each + mean + 0.03 * t.random.gauss(0, 1) for seed, each in shared.items()}
    return ours, dict(shared)


def interval_same(t: CheckContext, interval: Answer, ours: Runs, theirs: Runs, which: Sequence[int]) -> None:
    got = parts_of(t, interval(ours, theirs, dict(T95)), 3, "a triple (mean, low, high)")
    want = paired_reference(ours, theirs)
    for i in which:
        real(t, got[i], want[i], ("mean:", "low:", "high:")[i])


@paired.requirement(1, "the mean difference")
def paired_mean(t: CheckContext, interval: Answer, bootstrap: Answer, verdict: Answer) -> None:
    """ours minus theirs, seed by seed, in whatever order the seeds are listed"""
    ours, theirs = drawn_runs(t, t.integer(3, 6))
    theirs = dict(sorted(theirs.items(), reverse=True))
    interval_same(t, interval, ours, theirs, [0])


@paired.requirement(1, "the interval")
def paired_interval(t: CheckContext, interval: Answer, bootstrap: Answer, verdict: Answer) -> None:
    """mean ± t95[n − 1] · s / √n of the differences"""
    interval_same(t, interval, *drawn_runs(t, t.integer(3, 6)), [1, 2])


@paired.requirement(1, "seeds that are missing or diverged", rounds=4)
def paired_missing(t: CheckContext, interval: Answer, bootstrap: Answer, verdict: Answer) -> None:
    """only seeds that finished in both; with one of them, low is −inf and high inf"""
    ours, theirs = drawn_runs(t, 7 if t.round < 3 else 3)
    seeds = sorted(ours)
    if t.round == 3:
        ours[seeds[0]], theirs[seeds[1]] = None, math.nan
    else:
        broken = (None, math.nan, None)[t.round]
        ours[seeds[1]] = broken
        if t.round:
            theirs[seeds[2]] = broken
            del ours[seeds[0]], theirs[seeds[3]]
    theirs = dict(sorted(theirs.items()))
    interval_same(t, interval, dict(sorted(ours.items())), theirs, [0, 1, 2])


def resampled(ours: Tensor, theirs: Tensor, tokens: Tensor, picks: Tensor) -> tuple[float, float]:
    """The percentiles, by loops and sorting."""
    values = []
    for row in picks.tolist():
        nats = math.fsum(float(ours[i]) - float(theirs[i]) for i in row)
        values.append(nats / sum(int(tokens[i]) for i in row))
    values.sort()
    ends = []
    for p in (0.025, 0.975):
        place = p * (len(values) - 1)
        low = math.floor(place)
        high = min(low + 1, len(values) - 1)
        ends.append(values[low] + (place - low) * (values[high] - values[low]))
    return ends[0], ends[1]


def bootstrap_same(t: CheckContext, bootstrap: Answer, tokens: Tensor) -> None:
    N = len(tokens)
    theirs = tokens * (2.2 + 0.5 * t.randn(N).abs().double())
    ours = theirs + tokens * (0.05 + 0.1 * t.randn(N).double())
    picks = torch.randint(N, (t.integer(101, 150), N), generator=t.generator)
    got = parts_of(t, bootstrap(ours, theirs, tokens, picks), 2, "a pair (low, high)")
    for came, want, what in zip(got, resampled(ours, theirs, tokens, picks), ("low:", "high:"), strict=True):
        real(t, came, want, what)


@paired.requirement(1, "bootstrap: texts of one length")
def paired_equal(t: CheckContext, interval: Answer, bootstrap: Answer, verdict: Answer) -> None:
    """from the 2.5% to the 97.5% percentile of the differences, in nats per token"""
    bootstrap_same(t, bootstrap, torch.full((t.integer(12, 20),), t.integer(40, 90)))


@paired.requirement(1, "bootstrap: texts of different lengths")
def paired_unequal(t: CheckContext, interval: Answer, bootstrap: Answer, verdict: Answer) -> None:
    """in each resample the sum of nats over the sum of tokens; no input changed"""
    bootstrap_same(t, bootstrap, torch.tensor([t.integer(5, 200) for _ in range(t.integer(12, 20))]))
    t.unchanged()


def verdict_same(t: CheckContext, verdict: Answer, low: float, high: float, margin: float, want: str) -> None:
    got = verdict(low, high, margin)
    t.true(got == want, f"{want!r} for [{low:g}, {high:g}], margin {margin:g}", f"{got!r}"[:80])


@paired.requirement(1, "better or worse")
def paired_sign(t: CheckContext, interval: Answer, bootstrap: Answer, verdict: Answer) -> None:
    """ "better" where the whole interval is below 0, "worse" where it is above, however near"""
    low, width = t.integer(1, 20) / 100, t.integer(1, 20) / 100
    for margin in (0.005, 5.0):
        verdict_same(t, verdict, low, low + width, margin, "worse")
        verdict_same(t, verdict, -low - width, -low, margin, "better")


@paired.requirement(2, "a tie or not known")
def paired_tie(t: CheckContext, interval: Answer, bootstrap: Answer, verdict: Answer) -> None:
    """with 0 inside or at an end: "tie" where both ends are within the margin, else "cannot tell" """
    low, high = -t.integer(1, 20) / 100, t.integer(21, 40) / 100
    if t.round == 1:
        low, high = -high, -low
    wide = max(-low, high)
    verdict_same(t, verdict, low, high, wide + 0.01, "tie")
    verdict_same(t, verdict, low, high, wide, "tie")
    verdict_same(t, verdict, low, high, wide - 0.005, "cannot tell")
    verdict_same(t, verdict, low, 0.0, -low, "tie")
    verdict_same(t, verdict, 0.0, high, high / 2, "cannot tell")
    verdict_same(t, verdict, -wide, wide, wide / 2, "cannot tell")
    verdict_same(t, verdict, -math.inf, math.inf, 1.0, "cannot tell")


# 10.5: a Pareto front at a context length, compared with all pairs of designs

pareto = Exercise(
    id="10.5",
    slug="pareto",
    title="Read a Pareto front for a budget",
    answers=("front", "alike", "take"),
    hints=(
        "Take three designs at 1,000 and at 100,000 tokens: full attention, a window of 256, a state. Write "
        "down their bytes twice. Who leaves the front, and who comes back to it?",
        "`front`, in pseudocode: keep each row that no other row beats; a beats b if a has no more bytes and "
        "no more loss, and less of one of them. Sort what is left by bytes.",
        "Bytes of a row: fixed + per_token · tokens, with tokens = n_tokens, or the smaller of n_tokens and "
        "most where most is not None. A diverged row (loss None) goes before anything else.",
        "`alike`: the standard error of one mean is spread / √seeds; the two add up as squares: "
        "|a − b| ≤ 2 · √(sₐ²/nₐ + s_b²/n_b).",
        "`take`: the rows that fit; the best of them by loss; the best and all fitting rows that are alike "
        "to it; of these the one with the fewest bytes.",
    ),
)

Design = dict[str, Any]
NAMES = ("full", "GQA 2x", "GQA 4x", "MLA", "window", "linear", "hybrid", "NSA", "CLA", "Mamba", "delta")


def bytes_at(row: Design, n_tokens: int) -> int:
    tokens = n_tokens if row["most"] is None or row["most"] > n_tokens else row["most"]
    return sum((row["fixed"], row["per_token"] * tokens))


def front_reference(rows: Sequence[Design], size: Callable[[Design], float]) -> set[str]:
    """Names of the rows for which no row is as good in both and better in one."""
    good = [(size(row), row["loss"], row["name"]) for row in rows if row["loss"] is not None]
    beaten = {
        b[2] for a in good for b in good if a[0] <= b[0] and a[1] <= b[1] and (a[0] < b[0] or a[1] < b[1])
    }
    return {name for *_, name in good} - beaten


def told_apart(a: Design, b: Design) -> bool:
    variance = a["spread"] ** 2 / a["seeds"] + b["spread"] ** 2 / b["seeds"]
    return (a["loss"] - b["loss"]) ** 2 > 4 * variance


def alike_reference(rows: Sequence[Design], name: str) -> set[str]:
    (own,) = (row for row in rows if row["name"] == name)
    return {
        row["name"]
        for row in rows
        if row["name"] != name and row["loss"] is not None and not told_apart(own, row)
    }


def take_reference(rows: Sequence[Design], n_tokens: int, budget: float) -> str | None:
    fit = [row for row in rows if row["loss"] is not None and bytes_at(row, n_tokens) <= budget]
    if not fit:
        return None
    best = min(fit, key=lambda row: row["loss"])
    good = [row for row in fit if not told_apart(row, best)]
    return str(min(good, key=partial(bytes_at, n_tokens=n_tokens))["name"])


def wrong_sizes(n_tokens: int) -> list[Callable[[Design], float]]:
    """Numbers that one might take for the bytes of a row with a window or a state."""
    return [
        lambda row: row["fixed"] + row["per_token"] * n_tokens,
        lambda row: row["fixed"] + row["per_token"] * (row["most"] or n_tokens),
        lambda row: row["per_token"] * min(n_tokens, row["most"] or n_tokens),
        lambda row: row["per_token"] or row["fixed"],
        lambda row: (row["fixed"] + row["per_token"]) * min(n_tokens, row["most"] or n_tokens),
    ]


def drawn_designs(t: CheckContext, kind: str) -> tuple[list[Design], int]:
    """Rows and a number of tokens, so that what the rows cost at this length decides the front.

    ``kind``: "full" has neither windows nor states, "mixed" has both.
    """
    while True:
        n_tokens = t.integer(10, 60) * 100
        rows: list[Design] = []
        for name in t.random.sample(NAMES, 9):
            row: Design = {"name": name, "fixed": 0, "per_token": 64 * t.integer(1, 40), "most": None}
            which = t.integer(0, 2) if kind == "mixed" else 0
            if which == 1:
                row |= {"most": n_tokens // t.integer(2, 9), "fixed": 64 * t.integer(0, 4000)}
            elif which == 2:
                row |= {"per_token": 0, "fixed": 64 * t.integer(300, 30_000)}
            elif kind == "mixed":
                row["most"] = t.random.choice((None, 2 * n_tokens))
            size = bytes_at(row, n_tokens)
            row["loss"] = round(2.9 - 0.12 * math.log2(size / 50_000) + 0.25 * t.random.random(), 3)
            row |= {"spread": t.integer(8, 40) / 1000, "seeds": t.integer(3, 8)}
            rows.append(row)
        right = front_reference(rows, partial(bytes_at, n_tokens=n_tokens))
        wrong = wrong_sizes(n_tokens) if kind == "mixed" else []
        fronts = [frozenset(front_reference(rows, size)) for size in wrong]
        all_differ = len({bytes_at(row, n_tokens) for row in rows}) == len(rows)
        if all_differ and 3 <= len(right) <= 6 and len({*fronts, frozenset(right)}) == len(wrong) + 1:
            return rows, n_tokens


def front_same(t: CheckContext, front: Answer, rows: list[Design], n_tokens: int) -> None:
    want = front_reference(rows, partial(bytes_at, n_tokens=n_tokens))
    size = {row["name"]: bytes_at(row, n_tokens) for row in rows}
    got = names_in(t, front([dict(row) for row in rows], n_tokens))
    in_order = all(size.get(a, 0) <= size.get(b, 0) for a, b in pairwise(got))
    good = sorted(got) == sorted(want) and in_order
    t.true(good, f"{listed(sorted(want, key=lambda name: size[name]))}, in this order", listed(got))


@pareto.requirement(1, "the front")
def pareto_front(t: CheckContext, front: Answer, alike: Answer, take: Answer) -> None:
    """names that no other row beats, the fewest bytes first; a diverged row is not among them"""
    rows, n_tokens = drawn_designs(t, "full")
    fewest = min(bytes_at(row, n_tokens) for row in rows)
    rows.insert(
        t.integer(0, len(rows)),
        {**rows[0], "name": "diverged", "per_token": fewest // n_tokens // 2, "loss": None},
    )
    front_same(t, front, rows, n_tokens)


@pareto.requirement(1, "windows and states")
def pareto_mixed(t: CheckContext, front: Answer, alike: Answer, take: Answer) -> None:
    """bytes at n_tokens: a window holds at most `most` tokens, a state is fixed"""
    front_same(t, front, *drawn_designs(t, "mixed"))


@pareto.requirement(1, "equal bytes, equal loss")
def pareto_equal(t: CheckContext, front: Answer, alike: Answer, take: Answer) -> None:
    """of two rows with the same bytes the better one, with the same loss the smaller one; two that are equal
    in both stay"""
    rows, n_tokens = drawn_designs(t, "full")
    kept = front_reference(rows, partial(bytes_at, n_tokens=n_tokens))
    member = t.random.choice([row for row in rows if row["name"] in kept])
    rows += [
        {**member, "name": "worse, same bytes", "loss": member["loss"] + 0.05},
        {**member, "name": "larger, same loss", "per_token": member["per_token"] + 64},
        {**member, "name": "twin"},
    ]
    t.random.shuffle(rows)
    front_same(t, front, rows, n_tokens)


def drawn_alike(t: CheckContext) -> tuple[list[Design], str]:
    """A row in the middle and others at chosen distances from it, in units of the limit of each."""
    seeds = [t.integer(5, 9) for _ in range(10)]
    own: Design = {"name": "own", "loss": 2.5, "spread": t.integer(20, 26) / 1000, "seeds": seeds[0]}
    rows = [own]
    far = [0.9, 1.1, -0.9, -1.1, 0.3, 1.6, 0.47, -0.47, -0.75]
    for name, distance, n in zip(NAMES, far, seeds[1:], strict=False):
        spread = t.integer(22, 40) / 1000
        limit = 2 * math.sqrt(own["spread"] ** 2 / own["seeds"] + spread**2 / n)
        rows.append({"name": name, "loss": 2.5 + distance * limit, "spread": spread, "seeds": n})
    rows.append({"name": "diverged", "loss": None, "spread": 0.02, "seeds": 1})
    t.random.shuffle(rows)
    return [{**row, "fixed": 0, "per_token": 64, "most": None} for row in rows], "own"


@pareto.requirement(2, "which cannot be told apart")
def pareto_alike(t: CheckContext, front: Answer, alike: Answer, take: Answer) -> None:
    """the names of all other rows within two standard errors of the difference"""
    rows, name = drawn_alike(t)
    got = names_in(t, alike(rows, name))
    want = alike_reference(rows, name)
    t.true(sorted(got) == sorted(want), listed(sorted(want)), listed(sorted(got)))


def drawn_budget(t: CheckContext) -> tuple[list[Design], int, int]:
    """Rows and a budget, made so that the right design is neither the best that fits nor the smallest.

    By bytes: tiny (bad), chained (alike to the window, not to the best), a window (alike to the best: the
    one to take, and too large for those who count all tokens), one more alike to the best, the best, a larger
    one alike to it, then two that do not fit, of which one is the best of all and one is alike to it.
    """
    n_tokens, unit = t.integer(10, 60) * 100, 64
    loss, error = 2.4 + t.integer(0, 20) / 100, 0.02
    steps = [t.integer(1, 4) for _ in range(6)]
    sizes = [sum(steps[: i + 1]) + 2 for i in range(6)]
    limit = 2 * math.sqrt(2 * error**2 / 4)
    losses = [
        loss + 4 * limit,
        loss + 0.9 * limit,
        loss,
        loss + 0.5 * limit,
        loss - 6 * limit,
        loss - 6.5 * limit,
    ]
    rows: list[Design] = [
        {
            "name": name,
            "fixed": 0,
            "per_token": unit * size,
            "most": None,
            "loss": each,
            "spread": error,
            "seeds": 4,
        }
        for name, size, each in zip(t.random.sample(NAMES, 6), sizes, losses, strict=True)
    ]
    budget = bytes_at(rows[3], n_tokens)
    tiny = rows[0]["per_token"]
    rows.append({**rows[1], "name": "chained", "per_token": tiny + 32, "loss": loss + 1.7 * limit})
    window = {"per_token": 2 * (tiny + 48), "most": n_tokens // 2, "loss": loss + 0.8 * limit}
    rows.append({**rows[1], "name": "half window", **window})
    t.random.shuffle(rows)
    return rows, n_tokens, budget


@pareto.requirement(2, "the design for a budget")
def pareto_take(t: CheckContext, front: Answer, alike: Answer, take: Answer) -> None:
    """of the designs that fit and cannot be told apart from the best that fits, the one with the fewest
    bytes; None if nothing fits"""
    rows, n_tokens, budget = drawn_budget(t)
    sizes = sorted(bytes_at(row, n_tokens) for row in rows)
    best = min((row for row in rows if bytes_at(row, n_tokens) <= budget), key=lambda row: row["loss"])
    diverged = {**rows[0], "name": "diverged", "loss": None, "per_token": 1}
    for limit, given in (
        (budget, rows),
        (bytes_at(best, n_tokens), [*rows, diverged]),
        (2 * sizes[-1], rows),
        (sizes[0] - 1, rows),
    ):
        want = take_reference(given, n_tokens, limit)
        got = take([dict(row) for row in given], n_tokens, limit)
        t.true(got == want, f"{want!r} for {limit:,} bytes", f"{got!r}"[:80])


# 10.6: faults of a comparison, planted in rows that are fair otherwise

unfair = Exercise(
    id="10.6",
    slug="unfair",
    title="Spot the unfair comparison",
    answers=("faults",),
    hints=(
        "Look at the example below as a reviewer: which fields of the rows would you compare first, and "
        "which numbers must be *computed* from several fields or several rows before they can be compared?",
        "One check at a time. Choose the rows of the two designs; collect a value for each row in a set; a "
        "set with more than one value is a fault. This does for tokens and for the test text; a set of "
        "rates per design does for tuning.",
        "Files are the same if their checksums are, whatever they are called: `set(files.values())`. For a "
        "leak intersect training and test files of each row.",
        "For the last two, group a design's rows by rate. A rate with a diverged run is out. The best rate "
        "is the one with the lowest mean; its rows say what may be reported, and which seeds there are.",
    ),
)

Claim = dict[str, Any]
FAULTS = ("tokens", "size", "tuning", "test", "leak", "reported", "seeds")


def best_rate(runs: Sequence[Design]) -> dict[int, float]:
    """Losses by seed at the rate with the lowest mean, among those without a diverged run."""
    rates = {run["lr"] for run in runs}
    complete = []
    for lr in rates:
        losses = {run["seed"]: run["loss"] for run in runs if run["lr"] == lr}
        if None not in losses.values():
            complete.append((math.fsum(losses.values()) / len(losses), lr, losses))
    return min(complete)[2]


def mean_of(losses: Mapping[int, float]) -> float:
    return math.fsum(losses.values()) / len(losses)


class Comparison:
    """A claim and its rows, fair as drawn, though much in them looks unfair; ``plant`` breaks one thing.

    Each design has three rates: "good" is the best; "lucky" has the best single seed of the complete ones and
    a worse mean; in "diverged" one run diverged, and the others are the lowest of all.
    """

    def __init__(self, t: CheckContext, equal: str = "") -> None:
        self.t = t
        self.names = t.random.sample(NAMES, 3)
        self.seeds = t.random.sample(range(1, 10), 4)
        self.equal = equal or t.pick("parameters", "stored", "parameters")
        self.reported: dict[str, float] = {}
        self.last: list[Design] = []  # to be handed over at the end
        texts = [f"{t.random.getrandbits(32):08x}" for _ in range(8)]
        self.runs: list[Design] = []
        for i, name in enumerate(self.names):
            size = round(100_000 * (1.0, 1.015, 3.0)[i])
            other = round(100_000 * (1.0, 1.4, 3.0)[i])
            loss = 2.4 + 0.2 * t.random.random()
            layout = ((1000, 16, 256), (500, 64, 128), (50, 16, 64))[i]
            # The same text under another name; another text under the same name.
            test = {f"{'ab'[i % 2]}/test1.py": texts[0], f"{'ab'[i % 2]}/test2.py": texts[1]}
            train = {"train1.py": texts[2], "train2.py": texts[3 + i], f"{'ab'[i % 2]}/test1.py": texts[6]}
            rates = t.random.sample(((1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3), (6e-3, 2e-3, 1e-4))[i], 3)
            third = self.seeds[3] if i == 0 else None  # another seed, or none, at a rate that is not the best
            plan: list[tuple[int, list[tuple[int | None, float | None]]]] = [
                (0, [(seed, loss + d) for seed, d in zip(self.seeds, (-0.012, 0.001, 0.013), strict=False)]),
                (
                    1,
                    list(zip((*self.seeds[:2], third), (loss - 0.05, loss + 0.07, loss + 0.09), strict=True)),
                ),
                (2, list(zip(self.seeds[:3], (loss - 0.1, None, loss - 0.11), strict=True))),
            ]
            for rate, cells in plan:
                for seed, value in cells:
                    if seed is None:
                        continue
                    run: Design = {"design": name, "lr": rates[rate], "seed": seed}
                    run |= dict(zip(("steps", "batch", "length"), layout, strict=True))
                    run |= {"parameters": other, "stored": other} | {self.equal: size}
                    run |= {"train_files": dict(train), "test_files": dict(test), "test_length": 512}
                    self.runs.append(run | {"loss": value if value is None else round(value, 4)})
        self.rates = {name: [run["lr"] for run in self.runs if run["design"] == name] for name in self.names}

    def rows(self, which: int, rate: int | None = None) -> list[Design]:
        """Rows of ours (0) or theirs (1); of all rates, or of the good (0), lucky (1) or diverged (2) one."""
        name = self.names[which]
        lrs = list(dict.fromkeys(self.rates[name]))
        return [r for r in self.runs if r["design"] == name and (rate is None or r["lr"] == lrs[rate])]

    def plant(self, fault: str, way: int) -> None:
        """Break one thing; ``way`` counts from 0."""
        rows, which = self.rows(way % 2), way % 2
        name = self.names[which]
        if fault == "tokens":
            if way == 2:  # one run alone
                rows = self.last = rows[:1]
            for run in rows:
                run[("steps", "batch", "steps", "length")[way]] *= 2
        elif fault == "size":
            for run in rows:
                run[self.equal] = round(run[self.equal] * 1.06)
        elif fault == "tuning":
            more = [{**run, "lr": 5e-2, "loss": round(run["loss"] + 0.3, 4)} for run in self.rows(which, 0)]
            self.runs += more[: 1 if way < 2 else 3]
        elif fault == "test":
            key = min(rows[0]["test_files"])
            for run in rows:
                if way == 0:
                    run["test_files"][key] = "0badf00d"
                elif way == 1:
                    run["test_length"] = 1024
                elif way == 2:
                    del run["test_files"][key]
                else:  # the same names, another text
                    run["test_files"] = dict(self.rows(0)[0]["test_files"]) | {key: "0badf00d"}
        elif fault == "leak":
            if way == 2:
                rows = self.last = rows[-1:]
            for run in rows:
                run["train_files"]["more.py"] = max(run["test_files"].values())
        elif fault == "reported":
            rates = [[run["loss"] for run in self.rows(which, rate)] for rate in range(3)]
            finite = [[loss for loss in losses if loss is not None] for losses in rates]
            self.reported[name] = (
                min(finite[0]),
                min(finite[0]),
                math.fsum(finite[2]) / len(finite[2]),
                min(finite[1]),
                math.fsum(chain(*finite)) / len(list(chain(*finite))),
            )[way]
        elif way == 2:  # two seeds of each
            gone = self.seeds[2]
            self.runs = [
                run
                for run in self.runs
                if run["seed"] != gone or run not in self.rows(0, 0) + self.rows(1, 0)
            ]
        elif way == 3:  # one seed more
            run = self.rows(1, 0)[0]
            self.runs.append({**run, "seed": 17})
        else:  # another seed
            self.rows(which, 0)[-1]["seed"] = 18

    def ask(self, faults: Answer) -> list[str]:
        """The names that the answer finds."""
        claim: Claim = {"ours": self.names[0], "theirs": self.names[1], "equal": self.equal, "reported": {}}
        for i, name in enumerate(self.names[:2]):
            claim["reported"][name] = self.reported.get(name, mean_of(best_rate(self.rows(i))))
        self.t.random.shuffle(self.runs)
        runs = [run for run in self.runs if run not in self.last] + self.last
        return names_in(self.t, faults(claim, [dict(run) for run in runs]))


def found_fault(t: CheckContext, faults: Answer, fault: str, ways: int) -> None:
    """A comparison that is fair, and one for each way in which this is not."""
    names = sorted(Comparison(t).ask(faults))
    t.true(fault not in names, f"no {fault!r} in a fair comparison", listed(names))
    for way in range(ways):
        comparison = Comparison(t)
        comparison.plant(fault, way)
        names = sorted(comparison.ask(faults))
        t.true(fault in names, f"{fault!r} among the names", listed(names))


@unfair.requirement(1, "tokens")
def unfair_tokens(t: CheckContext, faults: Answer) -> None:
    """ "tokens" where runs were trained on unequal numbers of tokens, and only there"""
    found_fault(t, faults, "tokens", 4)


@unfair.requirement(1, "size")
def unfair_size(t: CheckContext, faults: Answer) -> None:
    """ "size" where what the claim holds equal differs by more than 2%"""
    found_fault(t, faults, "size", 2)


@unfair.requirement(1, "tuning")
def unfair_tuning(t: CheckContext, faults: Answer) -> None:
    """ "tuning" where one design was tried at more learning rates"""
    found_fault(t, faults, "tuning", 4)


@unfair.requirement(1, "test")
def unfair_test(t: CheckContext, faults: Answer) -> None:
    """ "test" where the text of the test, or the context length in it, differs"""
    found_fault(t, faults, "test", 4)


@unfair.requirement(1, "leak")
def unfair_leak(t: CheckContext, faults: Answer) -> None:
    """ "leak" where a run was trained on text of its test"""
    found_fault(t, faults, "leak", 3)


@unfair.requirement(2, "reported")
def unfair_reported(t: CheckContext, faults: Answer) -> None:
    """ "reported" where a number is not the mean over the seeds at the best rate"""
    found_fault(t, faults, "reported", 5)


@unfair.requirement(1, "seeds")
def unfair_seeds(t: CheckContext, faults: Answer) -> None:
    """ "seeds" where the seeds at the best rates differ, or are fewer than three"""
    found_fault(t, faults, "seeds", 4)


@unfair.requirement(1, "several at once")
def unfair_several(t: CheckContext, faults: Answer) -> None:
    """all names of what is wrong, and no other"""
    some = t.random.sample(FAULTS, 3)
    others = [fault for fault in FAULTS if fault not in some]
    for planted, way in ((some, 0), (others, 1), (some, 1), (others, 0)):
        comparison = Comparison(t, equal="stored" if t.round == 0 else "parameters")
        for fault in sorted(planted, key=FAULTS.index):  # a leak of the text that is tested in the end
            comparison.plant(fault, way)
        names = sorted(comparison.ask(faults))
        t.true(names == sorted(planted), listed(sorted(planted)), listed(names))


# 10.7: "Your model": a training recipe beside kvlearn's, on an equal number of tokens

WIDTH, HEADS, LAYERS, LONGEST = 48, 4, 1, 64
N_TOKENS = 65_536  # of each run; a token is a byte
SEEDS = (0, 1, 2)
NOISE = 0.05  # nats per byte; recipes tried had standard deviations over seeds of 0.014 to 0.048


class SmallModel(nn.Module):
    """Layers of attention and an MLP; bytes (B, T) -> logits of the next byte (B, T, 256), T ≤ 64."""

    def __init__(self) -> None:
        super().__init__()

        def matrix(rows: int, columns: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(rows, columns))

        shrink = (2 * LAYERS) ** -0.5  # of what a layer adds to the residual stream
        self.embed, self.position = matrix(256, WIDTH, 0.05), matrix(LONGEST, WIDTH, 0.05)
        self.gain, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(256))
        self.layers = nn.ModuleList()
        for _ in range(LAYERS):
            layer = nn.Module()
            layer.attention_gain, layer.mlp_gain = (nn.Parameter(torch.ones(WIDTH)) for _ in range(2))
            layer.qkv = matrix(WIDTH, 3 * WIDTH, WIDTH**-0.5)
            layer.out = matrix(WIDTH, WIDTH, shrink * WIDTH**-0.5)
            layer.up = matrix(WIDTH, 4 * WIDTH, WIDTH**-0.5)
            layer.down = matrix(4 * WIDTH, WIDTH, shrink * (4 * WIDTH) ** -0.5)
            self.layers.append(layer)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed[tokens] + self.position[: tokens.shape[1]]
        for layer in self.layers:
            h = F.rms_norm(x, (WIDTH,), layer.attention_gain)
            q, k, v = (h @ layer.qkv).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + y.transpose(1, 2).flatten(2) @ layer.out
            h = F.rms_norm(x, (WIDTH,), layer.mlp_gain)
            x = x + F.silu(h @ layer.up) @ layer.down
        return F.rms_norm(x, (WIDTH,), self.gain) @ self.embed.T + self.bias


def train_small(recipe: Mapping[str, Any], seed: int, n_tokens: int) -> tuple[SmallModel, dict[int, float]]:
    """A model and its loss over the tokens seen. The seed draws weights and text, whatever the recipe."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallModel()
    weights = dict(model.named_parameters())
    decays = [float(recipe["decay"](name, w.detach())) for name, w in weights.items()]
    means, squares = ([torch.zeros_like(w) for w in weights.values()] for _ in range(2))
    steps, batch, length = recipe["layout"](n_tokens, LONGEST)
    text, generator = corpus().train, torch.Generator().manual_seed(seed)
    curve, recent = dict[int, float](), list[float]()
    for step in range(steps):
        starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
        rows = text[starts + torch.arange(length + 1)].long()
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        grads = recipe["clip"](list(torch.autograd.grad(loss, list(weights.values()))))
        lr = float(recipe["learning_rate"](step, steps))
        with torch.no_grad():  # AdamW, written out: torch.optim loads torch's compiler, which takes seconds
            for w, grad, mean, square, decay in zip(
                weights.values(), grads, means, squares, decays, strict=True
            ):
                mean.lerp_(grad, 0.1)
                square.lerp_(grad**2, 0.05)
                w *= 1 - lr * decay
                w -= lr * mean / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
        recent.append(loss.item())
        if (step + 1) * 16 // steps > step * 16 // steps:  # 16 points, each the mean since the one before
            curve[(step + 1) * batch * length] = sum(recent) / len(recent)
            recent.clear()
    return model, curve


@torch.no_grad()
def measure(model: SmallModel, parts: Any) -> dict[str, float]:
    """The parts' results for the model on 128 windows of the test text, the same for all models."""
    text = corpus().test
    starts = torch.arange(128) * (len(text) // 128)
    rows = text[starts[:, None] + torch.arange(LONGEST + 1)].long()
    logits = model(rows[:, :-1])
    padded = torch.cat(
        (logits, torch.zeros_like(logits[:, :1])), dim=1
    )  # nothing is predicted by the last byte
    start, length = torch.zeros(len(rows), dtype=torch.long), torch.full((len(rows),), LONGEST + 1)
    perplexity, bits = parts.quality([(padded, rows, start, length)], torch.ones(256, dtype=torch.long))
    losses = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    losses = torch.cat((torch.full((len(rows), 1), torch.nan), losses), dim=1)
    mask = torch.ones(losses.shape, dtype=torch.bool)
    near, far = parts.loss_by_position(losses, mask, [1, 9, LONGEST - 15, LONGEST + 1])[0][::2]
    loss = math.log(perplexity)
    return {"loss": loss, "perplexity": perplexity, "bits": bits, "near": float(near), "far": float(far)}


def our_recipe() -> dict[str, Any]:
    return dict(zip(model.answers, model.right, strict=True))


@cache
def our_run(seed: int) -> tuple[SmallModel, dict[int, float]]:
    return train_small(our_recipe(), seed, N_TOKENS)


@cache
def our_losses() -> dict[int, float]:
    """The test loss of kvlearn's recipe by seed."""
    return {seed: measure(our_run(seed)[0], workbench.library(TRAINING))["loss"] for seed in SEEDS}


def train_recipe(answers: Mapping[str, Any], parts: Any) -> workbench.Trained:
    """Three seeds of a recipe; the interval of its paired difference to kvlearn's recipe, and a verdict."""
    is_ours = answers == our_recipe()  # trained once
    runs = [our_run(seed) if is_ours else train_small(answers, seed, N_TOKENS) for seed in SEEDS]
    found = [measure(trained, parts) for trained, _ in runs]
    losses = {seed: each["loss"] for seed, each in zip(SEEDS, found, strict=True)}
    mean, low, high = parts.interval(losses, our_losses(), T95)
    steps, batch, length = answers["layout"](N_TOKENS, LONGEST)
    average = {name: sum(each[name] for each in found) / len(found) for name in found[0]}
    numbers = {
        "steps × rows × bytes": f"{steps} × {batch} × {length}",
        "perplexity per byte": f"{average['perplexity']:.2f}",
        "bits per byte": f"{average['bits']:.3f}",
        "loss at bytes 1 to 8": f"{average['near']:.2f}",
        "loss at bytes 49 to 64": f"{average['far']:.2f}",
        "difference to kvlearn's, nats per byte": f"{mean:+.3f}",
        "its 95% interval": f"{low:+.3f} to {high:+.3f}",
        f"verdict, margin {NOISE}": str(parts.verdict(low, high, NOISE)),
    }
    curve = {n: sum(run[1][n] for run in runs) / len(runs) for n in runs[0][1]}
    return workbench.Trained(numbers, curve)


def library_quality(batches: Sequence[Batch], token_bytes: Tensor) -> tuple[float, float]:
    nats, n, n_bytes = 0.0, 0, 0
    for logits, tokens, start, length in batches:
        each = logits.float().log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        at = torch.arange(1, tokens.shape[1]).expand(len(tokens), -1)
        counted = (at >= start[:, None]) & (at < length[:, None])
        nats -= float(each[counted].double().sum())
        n += int(counted.sum())
        n_bytes += int(token_bytes[tokens[:, 1:][counted]].sum())
    return math.exp(nats / n), nats / n_bytes / math.log(2)


def library_positions(
    losses: Tensor, mask: Tensor, edges: Sequence[int], same_rows: bool = False
) -> tuple[Tensor, Tensor]:
    means, counts = position_reference(losses, mask, edges, same_rows)
    return torch.tensor(means), torch.tensor(counts)


def library_interval(ours: Runs, theirs: Runs, t95: Mapping[int, float]) -> tuple[float, float, float]:
    return paired_reference(ours, theirs)


def library_verdict(low: float, high: float, margin: float) -> str:
    if low > 0 or high < 0:
        return "worse" if low > 0 else "better"
    return "tie" if max(-low, high) <= margin else "cannot tell"


TRAINING = workbench.Training(
    parts={
        "quality": ("10.1", library_quality),
        "loss_by_position": ("10.2", library_positions),
        "interval": ("10.4", library_interval),
        "verdict": ("10.4", library_verdict),
    },
    shown=(SmallModel, train_small, measure, train_recipe),
    train=train_recipe,
    baselines={
        "a tenth of the rate": {"learning_rate": lambda step, _: 0.001 * min(1.0, (step + 1) / 12)},
        "a quarter of the steps": {"layout": lambda n, longest: (n // (32 * longest), 32, longest)},
    },
    label="loss",
    over="bytes of training",
    unit="nats per byte",
)

model = Exercise(
    id="10.7",
    slug="model",
    title="Your model",
    answers=("layout", "learning_rate", "decay", "clip"),
    may_use_kvlearn=True,
    wiring=TRAINING,
    hints=(
        "Each function trades something. What does a recipe gain from twice the steps at half the batch, and "
        "what does it lose? Draw the rate over the steps: what must it do in the first ten steps, while "
        "Adam's second moment is a mean of very few gradients?",
        "`clip`, in pseudocode: norm = root of the sum of the squared norms of all tensors; factor = "
        "min(1, most / norm); every tensor times the same factor.",
        "`learning_rate`: peak · (step + 1) / warmup during the warm-up, then the peak for a while or not at "
        "all, then a cosine or a straight line down to a tenth of it or less. `decay`: a number for "
        "matrices, 0 where weight.ndim is 1.",
        "Rates around 0.01 train this model well; 0.001 is too slow for so few tokens and 0.1 too fast. More "
        "and smaller steps help here: try 4 or 8 rows of 64 bytes, and stay at the peak for the first half.",
    ),
)

Recipe = tuple[Answer, ...]


def recipe_of(layout: Answer, learning_rate: Answer, decay: Answer, clip: Answer) -> dict[str, Answer]:
    return {"layout": layout, "learning_rate": learning_rate, "decay": decay, "clip": clip}


def check_layout(t: CheckContext, layout: Answer) -> None:
    for n_tokens, longest in (
        (N_TOKENS, LONGEST),
        (4096 * t.integer(3, 9), 64),
        (4096 * t.integer(3, 9), 32),
    ):
        got = parts_of(t, layout(n_tokens, longest), 3, "a triple (steps, batch, length)")
        sizes = [plain_number(each) for each in got]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            t.note(f"{got}"[:80], Difference("", "three positive integers", f"{got}"[:80]))
            raise Stop
        steps, batch, length = (int(size or 0) for size in sizes)
        t.true(
            steps * batch * length == n_tokens,
            f"steps · batch · length = {n_tokens:,}",
            f"{steps} · {batch} · {length} = {steps * batch * length:,}",
        )
        t.true(length <= longest, f"rows of at most {longest} bytes", f"{length}")
        t.true(steps <= 512, "at most 512 steps", f"{steps}")


def check_rate(t: CheckContext, learning_rate: Answer) -> None:
    for steps in (t.integer(60, 120), t.integer(200, 500)):
        rates = [plain_number(learning_rate(step, steps)) for step in range(steps)]
        if any(rate is None or not math.isfinite(rate) or rate < 0 for rate in rates):
            bad = next(r for r in rates if r is None or not math.isfinite(r) or r < 0)
            t.note(f"{bad}", Difference("", "a finite rate that is not negative in every step", f"{bad}"))
            raise Stop
        known = [float(rate or 0) for rate in rates]
        peak = max(known)
        first, last = known.index(peak), steps - 1 - known[::-1].index(peak)
        t.true(known[0] <= peak / 3, "a warm-up: the first rate at most a third of the peak", f"{known[0]:g}")
        rises = all(a <= b * (1 + 1e-9) for a, b in pairwise(known[: first + 1]))
        t.true(rises, "no fall before the peak", "a fall")
        t.true(first <= steps // 2, "the peak in the first half", f"in step {first} of {steps}")
        falls = all(a >= b * (1 - 1e-9) for a, b in pairwise(known[last:]))
        t.true(falls, "no rise behind the peak", "a rise")
        t.true(
            known[-1] <= peak / 4,
            "the last rate at most a quarter of the peak",
            f"{known[-1] / peak:.3g} of it",
        )


def check_decay(t: CheckContext, decay: Answer) -> None:
    for name, weight in SmallModel().named_parameters():
        got = plain_number(decay(name, weight.detach() + 0.1 * t.randn(*weight.shape)))
        if got is None or not 0 <= got <= 1:
            t.note(f"{got}", Difference(f"{name}:", "a number from 0 to 1", f"{got}"))
        elif weight.ndim == 1:
            t.true(got == 0, f"0 for {name}, a vector", f"{got:g}")
        elif name.startswith("layers."):
            t.true(got > 0, f"more than 0 for {name}, a matrix", f"{got:g}")


def norm_of(grads: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((grad.double() ** 2).sum()) for grad in grads))


def check_clip(t: CheckContext, clip: Answer) -> None:
    shapes = [(t.integer(3, 9), t.integer(3, 9)), (t.integer(3, 9),), (t.integer(20, 40), 4)]

    def drawn(*scales: float) -> list[Tensor]:
        grads = [scale * t.randn(*shape) for scale, shape in zip(scales, shapes, strict=True)]
        return [grad / norm_of(grads) for grad in grads]

    def clipped(size: float, unit: list[Tensor]) -> list[Tensor]:
        got = parts_of(t, clip([size * grad for grad in unit]), len(unit), "a list of as many gradients")
        if not all(isinstance(a, Tensor) and a.shape == b.shape for a, b in zip(got, unit, strict=True)):
            t.note(got, Difference("", "gradients of the same shapes", describe(got)))
            raise Stop
        return got

    unit, other = drawn(1.0, 5.0, 0.2), drawn(0.01, 1.0, 0.01)  # in the second, nearly all is in one tensor
    most, again = (norm_of(clipped(1e6, each)) for each in (unit, other))
    t.true(0 < most <= 100, "a norm of at most 100 behind the clipping", f"{most:.4g}")
    same = math.isclose(most, again, rel_tol=1e-3)
    t.true(same, "the same norm behind the clipping of other gradients", f"{most:.4g} and {again:.4g}")
    for size, what in ((1e6, "very large gradients"), (3 * most, "gradients of 3 times the largest norm")):
        for i, grad in enumerate(clipped(size, unit)):
            t.close(grad / most, unit[i], f"{what}, tensor {i} by the largest norm:", tolerance=1e-3)
    for i, grad in enumerate(clipped(most / 2, unit)):
        t.close(grad * 2 / most, unit[i], f"gradients of half the largest norm, tensor {i}:", tolerance=1e-3)
    zero = clipped(0.0, unit)
    t.true(norm_of(zero) == 0, "zeros for gradients of zero", "something else")


@model.requirement(1, "layout")
def model_layout(t: CheckContext, *recipe: Answer) -> None:
    """steps · batch · length is the number of tokens; at most 512 steps; rows no longer than `longest`"""
    check_layout(t, recipe[0])


@model.requirement(1, "learning_rate")
def model_rate(t: CheckContext, *recipe: Answer) -> None:
    """a warm-up to a peak in the first half, then down to a quarter of it or less"""
    check_rate(t, recipe[1])


@model.requirement(1, "decay", rounds=1)
def model_decay(t: CheckContext, *recipe: Answer) -> None:
    """0 for vectors, more than 0 and at most 1 for the matrices of layers; embeddings as you like"""
    check_decay(t, recipe[2])


@model.requirement(2, "clip")
def model_clip(t: CheckContext, *recipe: Answer) -> None:
    """one factor for all tensors, so that their common norm is at most a number of yours; smaller gradients
    stay as they are"""
    check_clip(t, recipe[3])


def briefly(t: CheckContext, recipe: Recipe) -> SmallModel:
    """A model after a sixteenth of the training, in kvlearn's layout: a wrong one may have more steps."""
    answers = recipe_of(*recipe) | {"layout": our_recipe()["layout"]}
    try:
        return train_small(answers, t.integer(3, 99), N_TOKENS // 16)[0]
    except (NotWritten, Raised):
        raise
    except Exception as error:
        came = f"{type(error).__name__}: {error}"[:200]
        t.note(came, Difference("", "a model that trains", came))
        raise Stop from None


@model.requirement(1, "your quality and loss_by_position", rounds=1, reads_answers=True)
def model_measures(t: CheckContext, *recipe: Answer) -> None:
    """10.1 and 10.2 are solved; of a model trained briefly by your recipe they say what a loop says"""
    parts = workbench.theirs(model, t.notebook, "quality", "loss_by_position")
    trained = briefly(t, recipe)
    got, want = measure(trained, parts), measure(trained, workbench.library(TRAINING))
    for name in ("perplexity", "bits", "near", "far"):
        real(t, got[name], want[name], f"{name}:")


@model.requirement(1, "your interval and verdict", rounds=1, reads_answers=True)
def model_verdict(t: CheckContext, *recipe: Answer) -> None:
    """10.4 is solved; two models trained briefly by your recipe get an interval and a verdict"""
    parts = workbench.theirs(model, t.notebook, "interval", "verdict")
    measures = workbench.library(TRAINING)
    losses = [measure(briefly(t, recipe), measures)["loss"] for _ in range(2)]
    ours, other = dict(enumerate(losses)), {1: losses[0] + 0.1, 0: losses[1] - 0.2}
    got = parts_of(t, parts.interval(ours, other, dict(T95)), 3, "a triple (mean, low, high)")
    want = paired_reference(ours, other)
    for came, number, what in zip(got, want, ("mean:", "low:", "high:"), strict=True):
        real(t, came, number, what)
    said = parts.verdict(*want[1:], NOISE)
    t.true(
        said == library_verdict(*want[1:], NOISE), repr(library_verdict(*want[1:], NOISE)), f"{said!r}"[:80]
    )


@model.requirement(2, "trained", rounds=1, reads_answers=True)
def model_trained(t: CheckContext, *recipe: Answer) -> None:
    """with all parts yours, three seeds: the mean loss on the test text is at most 0.05 nats per byte above
    that of kvlearn's recipe"""
    parts = workbench.theirs(model, t.notebook, *TRAINING.parts)
    before = len(t.observations)
    for check, answer in zip((check_layout, check_rate, check_decay, check_clip), recipe, strict=True):
        check(t, answer)  # a mistake is seen here at once
    if any(observation.difference for observation in t.observations[before:]):
        raise Stop
    losses = {}
    for seed in SEEDS:
        losses[seed] = measure(train_small(recipe_of(*recipe), seed, N_TOKENS)[0], parts)["loss"]
    difference = parts.interval(losses, our_losses(), dict(T95))[0]
    t.true(
        difference <= NOISE,  # False for NaN
        f"a loss at most {NOISE} above kvlearn's",
        f"{difference:+.3f} nats per byte",
    )


EXERCISES = (perplexity, positions, mqar, paired, pareto, unfair, model)
