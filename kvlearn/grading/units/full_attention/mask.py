"""01.2: the causal mask of queries that are the last of the keys, held against a loop over positions."""

import torch
from torch import Tensor

from kvlearn.grading.compare import compare
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
    id="01.2",
    slug="mask",
    title="The causal mask when keys outnumber queries",
    answers=("causal_mask",),
    hints=(
        "Write down the position of every query first. With S keys the last query stands at position S "
        "− 1; where does the first of T queries stand?",
        "Query t stands at position S − T + t and may see every key whose position is at most that.",
        "Compare a column of query positions with a row of key positions: `a[:, None] >= b[None, :]` "
        "gives (T, S).",
    ),
)


def reference(n_queries: int, n_keys: int) -> Tensor:
    """One pair at a time."""
    start = n_keys - n_queries
    rows = [[key <= start + query for key in range(n_keys)] for query in range(n_queries)]
    return torch.tensor(rows)


def hides_the_future(t: Trial, got: object, T: int, S: int) -> None:
    """The right pairs are marked, be the mask of ones and zeros, of 0 and −∞, or with dimensions of size 1 in
    front: those cost the point for the form and no other."""
    mask = got
    if isinstance(mask, Tensor) and not mask.is_complex() and mask.numel() == T * S:
        mask = mask.squeeze(tuple(range(mask.ndim - 2))) if mask.ndim > 2 else mask
        additive = mask.dtype.is_floating_point and not (mask > 0).any()
        mask = mask == 0 if additive else mask.bool()
    t.note(got, compare(mask, reference(T, S)))


@EXERCISE.requirement(1, "a boolean mask, (T, S)")
def form(t: Trial, causal_mask: Answer) -> None:
    """dtype bool and two dimensions, a row for each query and a column for each key"""
    T = t.integer(3, 6)
    S = T + t.integer(3, 9)
    t.form(causal_mask(T, S), (T, S), torch.bool)


@EXERCISE.requirement(1, "a whole prompt, T = S")
def square(t: Trial, causal_mask: Answer) -> None:
    """True on the diagonal and below it"""
    n = t.integer(4, 9)
    hides_the_future(t, causal_mask(n, n), n, n)


@EXERCISE.requirement(1, "a chunk behind a cache, 1 < T < S")
def chunk(t: Trial, causal_mask: Answer) -> None:
    """True up to each query's own position: the T queries are the last of the S positions"""
    T = t.integer(3, 6)
    S = T + t.integer(3, 9)
    hides_the_future(t, causal_mask(T, S), T, S)


@EXERCISE.requirement(1, "one token in decode, T = 1")
def decode(t: Trial, causal_mask: Answer) -> None:
    """True everywhere: the newest token sees all S; also the very first one, S = 1"""
    S = t.integer(4, 12)
    hides_the_future(t, causal_mask(1, S), 1, S)
    hides_the_future(t, causal_mask(1, 1), 1, 1)


@EXERCISE.misconception("aligned top-left")
def top_left(n_queries: int, n_keys: int) -> Tensor:
    """The first query was put at position 0. But the queries are the newest tokens, the *last* T of S
    positions: in decode this one token would see only the first key. `torch.tril(torch.ones(T, S))` and
    SDPA's `is_causal=True` align this way too, which is why they are right for T = S alone."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril()


@EXERCISE.misconception("off by one: a token cannot see itself")
def strict(n_queries: int, n_keys: int) -> Tensor:
    """The comparison is strict. A token attends to itself too: its own key has been written when it asks.
    With the strict mask the first token of a prompt has nothing to attend to at all."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries - 1)


@EXERCISE.misconception("off by one: a token sees the next one")
def one_ahead(n_queries: int, n_keys: int) -> Tensor:
    """Each query sees one key of the future. Training then looks wonderful, since the answer can be copied,
    and generation falls apart."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries + 1)


@EXERCISE.misconception("the upper triangle: True where a key is hidden")
def upper(n_queries: int, n_keys: int) -> Tensor:
    """True means *may attend* here, and the future was marked. `torch.triu(…, diagonal=1)` makes the mask of
    what is hidden: turn it round with `~`."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool).triu(n_keys - n_queries + 1)


@EXERCISE.misconception("a mask to add: 0 and −∞")
def additive(n_queries: int, n_keys: int) -> Tensor:
    """This is the other kind of mask, numbers that are added to the scores. It is right in itself, but here
    the mask is boolean, True = *may attend*: smaller, and the same for scores of every dtype."""
    hidden = torch.ones(n_queries, n_keys, dtype=torch.bool).triu(n_keys - n_queries + 1)
    return torch.zeros(n_queries, n_keys).masked_fill(hidden, -torch.inf)


@EXERCISE.misconception("looking forwards: the triangle upside down")
def forwards(n_queries: int, n_keys: int) -> Tensor:
    """Each query sees its own key and the later ones. The comparison points the wrong way: a key may be
    seen if its position is *at most* the query's."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool).triu(n_keys - n_queries)


@EXERCISE.misconception("nothing hidden")
def all_true(n_queries: int, n_keys: int) -> Tensor:
    """Every pair is allowed. For the one token of a decode step that is right; a prompt's tokens would see
    their own future, and what they are to predict stands there."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool)


@EXERCISE.misconception("the mask of all S positions, not of the last T")
def uncropped(n_queries: int, n_keys: int) -> Tensor:
    """This has a row for each of the S positions. The tokens in the cache ask no more: only the T new ones
    have queries, so of this mask the last T rows are wanted, `[-n_queries:]`."""
    return torch.ones(n_keys, n_keys, dtype=torch.bool).tril()


@EXERCISE.misconception("shifted the wrong way")
def wrong_sign(n_queries: int, n_keys: int) -> Tensor:
    """The diagonal was moved by T − S in place of S − T. There are S − T tokens before the first query, and
    each of them is one more column that it may see: the diagonal moves to the right."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_queries - n_keys)


@EXERCISE.misconception("the past hidden")
def past_hidden(n_queries: int, n_keys: int) -> Tensor:
    """The triangle stands in the right place, over the last T keys, but the S − T columns before it are
    False: the new tokens see each other and nothing of what is in the cache. The past may always be seen."""
    past = torch.zeros(n_queries, n_keys - n_queries, dtype=torch.bool)
    return torch.cat((past, torch.ones(n_queries, n_queries, dtype=torch.bool).tril()), dim=1)


@EXERCISE.misconception("decode as an exception, chunks aligned top-left")
def decode_apart(n_queries: int, n_keys: int) -> Tensor:
    """T = 1 got a branch of its own and the rest is aligned top-left, as if the first query stood at position
    0. With S − T tokens before the first query, one rule serves a prompt, a chunk and a single token."""
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool)
    return mask if n_queries == 1 else mask.tril()
