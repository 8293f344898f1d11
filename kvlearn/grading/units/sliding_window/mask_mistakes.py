"""04.1: the mistakes that people make with the edges of a window."""

import torch
from torch import Tensor

from kvlearn.grading.units.sliding_window.mask import EXERCISE

__all__ = ["EXERCISE"]


def distance(n_queries: int, n_keys: int, first: int | None = None) -> Tensor:
    """Query position minus key position, (T, S); the first query at S − T unless told otherwise."""
    first = n_keys - n_queries if first is None else first
    return first + torch.arange(n_queries)[:, None] - torch.arange(n_keys)


def band(n_queries: int, n_keys: int, window: int) -> Tensor:
    """The right mask."""
    d = distance(n_queries, n_keys)
    return (d >= 0) & (d < window)


@EXERCISE.misconception("one key too few: W − 1")
def too_few(n_queries: int, n_keys: int, window: int) -> Tensor:
    """The window ends one key early. Distances 0 … W − 1 are W tokens, the token itself among them: the
    comparison is `distance < window`, not `distance < window - 1`. With W = 1 nothing at all is seen."""
    return band(n_queries, n_keys, window - 1)


@EXERCISE.misconception("one key too many: W + 1")
def too_many(n_queries: int, n_keys: int, window: int) -> Tensor:
    """`distance <= window` lets in the distances 0 … W, which are W + 1 tokens: the window was put *beside*
    the token. Here W counts the token itself, as in Mistral's and Gemma's configs, and a ring of W slots
    would already have lost that last one."""
    return band(n_queries, n_keys, window + 1)


@EXERCISE.misconception("W tokens before it, and not itself")
def without_self(n_queries: int, n_keys: int, window: int) -> Tensor:
    """Distances 1 … W: the window stands before the token. But a token attends to itself too, and counts
    among the W; the first token of a prompt would have nothing to attend to."""
    return band(n_queries, n_keys, window + 1) & (distance(n_queries, n_keys) > 0)


@EXERCISE.misconception("a token cannot see itself")
def strict(n_queries: int, n_keys: int, window: int) -> Tensor:
    """The far edge is right, the near one is strict: distance > 0 where distance ≥ 0 is meant. A token
    attends to itself too, and with W = 1 to nothing else."""
    return band(n_queries, n_keys, window) & (distance(n_queries, n_keys) > 0)


@EXERCISE.misconception("aligned top-left")
def top_left(n_queries: int, n_keys: int, window: int) -> Tensor:
    """The first query was put at position 0. But the queries are the *last* T of S positions: behind a cache,
    this one sees only the oldest keys. It is right for T = S alone."""
    d = distance(n_queries, n_keys, first=0)
    return (d >= 0) & (d < window)


@EXERCISE.misconception("the far edge aligned top-left")
def far_edge_top_left(n_queries: int, n_keys: int, window: int) -> Tensor:
    """The near edge takes the cache into account, the far edge does not: with `tril(S - T).triu(1 - W)` the
    second diagonal was left where it is for T = S. Both move by S − T, or the window grows with the cache."""
    d = distance(n_queries, n_keys)
    return (d >= 0) & (distance(n_queries, n_keys, first=0) < window)


@EXERCISE.misconception("no window: the causal mask")
def causal(n_queries: int, n_keys: int, window: int) -> Tensor:
    """Each token sees everything before it. That is the causal mask of chapter 01; the window adds a second
    condition, which takes away what is W or more tokens back."""
    return distance(n_queries, n_keys) >= 0


@EXERCISE.misconception("the future visible")
def future(n_queries: int, n_keys: int, window: int) -> Tensor:
    """The window's far edge is there and the causal one is missing: distance < W holds for every later key,
    too, whose distance is negative. Both conditions are needed, distance ≥ 0 and distance < W."""
    return distance(n_queries, n_keys) < window


@EXERCISE.misconception("a window to both sides")
def both_sides(n_queries: int, n_keys: int, window: int) -> Tensor:
    """`abs(distance) < window` looks as far ahead as back. Encoders do that, Longformer's among them; a
    decoder that does sees the tokens it is to predict."""
    return distance(n_queries, n_keys).abs() < window


@EXERCISE.misconception("half the window to either side")
def centred(n_queries: int, n_keys: int, window: int) -> Tensor:
    """The window was centred, ⌊W/2⌋ keys to either side, as in an encoder. In a decoder all W tokens lie
    behind: the token itself and the W − 1 before it."""
    return distance(n_queries, n_keys).abs() <= window // 2


@EXERCISE.misconception("half the window behind, nothing ahead")
def half(n_queries: int, n_keys: int, window: int) -> Tensor:
    """The window was taken for the width of both sides, and the half that lies ahead was cut away. In a
    decoder's config W counts tokens behind, itself included: the whole W of them."""
    return band(n_queries, n_keys, window // 2 + 1)


@EXERCISE.misconception("blocks in place of a window")
def blocks(n_queries: int, n_keys: int, window: int) -> Tensor:
    """The positions were cut into blocks of W, and a token sees only its own block: the first of a block sees
    nothing but itself. (Llama 4 does that in its local layers and calls it chunked attention.) A sliding
    window moves along with every token."""
    d = distance(n_queries, n_keys)
    queries = torch.arange(n_keys - n_queries, n_keys)[:, None]
    return (d >= 0) & (queries // window == torch.arange(n_keys) // window)


@EXERCISE.misconception("the last W keys for every query")
def last_keys(n_queries: int, n_keys: int, window: int) -> Tensor:
    """Everything but the last W of the S keys was hidden from all queries: the window of the newest token,
    for all of them. Each query has a window of its own that ends at itself, so the earlier ones of a chunk
    see further back. This is a prompt trimmed before attending, as a mask."""
    return (distance(n_queries, n_keys) >= 0) & (torch.arange(n_keys) >= n_keys - window)


@EXERCISE.misconception("the first query's far edge for all")
def fixed_edge(n_queries: int, n_keys: int, window: int) -> Tensor:
    """All queries were given the far edge of the first one, so the window grows along the chunk. With one
    query there is no difference. The edge moves on by a key with every query."""
    first = n_keys - n_queries
    return (distance(n_queries, n_keys) >= 0) & (torch.arange(n_keys) > first - window)


@EXERCISE.misconception("True where a key is hidden")
def inverted(n_queries: int, n_keys: int, window: int) -> Tensor:
    """True means *may attend* here, and what is to be hidden was marked. Turn it round with `~`."""
    return ~band(n_queries, n_keys, window)


@EXERCISE.misconception("a mask to add: 0 and −∞")
def additive(n_queries: int, n_keys: int, window: int) -> Tensor:
    """This is the other kind of mask, numbers that are added to the scores. It is right in itself, but here
    the mask is boolean, True = *may attend*: smaller, and the same for scores of every dtype."""
    hidden = ~band(n_queries, n_keys, window)
    return torch.zeros(n_queries, n_keys).masked_fill(hidden, -torch.inf)


@EXERCISE.misconception("the mask of all S positions, not of the last T")
def uncropped(n_queries: int, n_keys: int, window: int) -> Tensor:
    """This has a row for each of the S positions. Only the T new tokens ask: of this mask the last T rows are
    wanted, `[-n_queries:]`."""
    return band(n_keys, n_keys, window)


@EXERCISE.misconception("rows for keys, columns for queries")
def transposed(n_queries: int, n_keys: int, window: int) -> Tensor:
    """The dimensions are swapped: (S, T). A score stands in the row of its query and the column of its key,
    so the queries' positions get the new dimension behind them, `queries[:, None]`, and the keys' in
    front."""
    return band(n_queries, n_keys, window).T


@EXERCISE.misconception("decode as an exception, chunks aligned top-left")
def decode_apart(n_queries: int, n_keys: int, window: int) -> Tensor:
    """T = 1 got a branch of its own and the rest is aligned top-left, as if the first query stood at position
    0. With S − T tokens before the first query, one rule serves a prompt, a chunk and a single token."""
    return band(1, n_keys, window) if n_queries == 1 else top_left(n_queries, n_keys, window)


@EXERCISE.misconception("the near edge aligned top-left")
def near_edge_top_left(n_queries: int, n_keys: int, window: int) -> Tensor:
    """The far edge takes the cache into account, the near one does not: `tril()` was left as it is for T = S,
    and behind a cache the two edges cross, so that some queries see nothing. Both move by S − T."""
    d = distance(n_queries, n_keys)
    return (distance(n_queries, n_keys, first=0) >= 0) & (d < window)


@EXERCISE.misconception("a slice that begins below 0")
def negative_slice(n_queries: int, n_keys: int, window: int) -> Tensor:
    """`mask[i, p - W + 1 : p + 1] = True` is right as long as p − W + 1 is not negative. Near the start it
    is, and Python counts a negative index from the *end*: the slice is empty, and the first tokens see
    nothing, not even themselves. Begin at `max(0, p - W + 1)`."""
    mask = torch.zeros(n_queries, n_keys, dtype=torch.bool)
    for row in range(n_queries):
        p = n_keys - n_queries + row
        mask[row, p - window + 1 : p + 1] = True
    return mask
