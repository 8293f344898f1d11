"""01.2: the causal mask of queries that are the last of the keys, held against a loop over positions."""

import torch
from torch import Tensor

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


@EXERCISE.requirement(1, "a whole prompt, T = S")
def square(t: Trial, causal_mask: Answer) -> None:
    """a boolean (T, T): True on the diagonal and below it"""
    n = t.integer(4, 9)
    t.close(causal_mask(n, n), reference(n, n))


@EXERCISE.requirement(2, "a chunk behind a cache, 1 < T < S")
def chunk(t: Trial, causal_mask: Answer) -> None:
    """a boolean (T, S): the T queries are the last of the S positions"""
    T = t.integer(3, 6)
    S = T + t.integer(3, 9)
    t.close(causal_mask(T, S), reference(T, S))


@EXERCISE.requirement(1, "one token in decode, T = 1")
def decode(t: Trial, causal_mask: Answer) -> None:
    """a boolean (1, S): the newest token sees everything; also the very first one, S = 1"""
    S = t.integer(4, 12)
    t.close(causal_mask(1, S), reference(1, S))
    t.close(causal_mask(1, 1), reference(1, 1))


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
