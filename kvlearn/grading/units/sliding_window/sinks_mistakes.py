"""04.4: the mistakes that people make with the tokens that stay."""

from typing import Any

from kvlearn.grading.units.sliding_window.sinks import EXERCISE, positions_seen, weights

__all__ = ["EXERCISE"]

RIGHT: dict[str, Any] = {"sink_softmax": weights}


def window_of(position: int, window: int) -> list[int]:
    return list(range(max(0, position + 1 - window), position + 1))


@EXERCISE.misconception("the sinks counted inside the window", **RIGHT)
def inside(position: int, window: int, n_sinks: int) -> list[int]:
    """The sinks were taken out of the W, which leaves W − n_sinks recent tokens. Here they come on top: W
    recent tokens, and n_sinks first ones besides. (StreamingLLM's "4 + 1020" is n_sinks = 4 and W = 1020 in
    these letters.)"""
    return positions_seen(position, max(window - n_sinks, 1), n_sinks)


@EXERCISE.misconception("a sink inside the window counted twice", **RIGHT)
def twice(position: int, window: int, n_sinks: int) -> list[int]:
    """The sinks and the window were listed one after the other, and while the window still reaches over the
    first tokens these stand there twice. In a softmax they would get twice their weight. A position has two
    reasons to be seen, and is seen once."""
    return [*range(min(n_sinks, position + 1)), *window_of(position, window)]


@EXERCISE.misconception("no sinks", **RIGHT)
def none(position: int, window: int, n_sinks: int) -> list[int]:
    """The window alone. As soon as the first tokens leave it, the heads that had put their surplus weight on
    them have nowhere to put it: StreamingLLM's finding is that perplexity breaks down just then."""
    return window_of(position, window)


@EXERCISE.misconception("a longer window in place of sinks", **RIGHT)
def longer(position: int, window: int, n_sinks: int) -> list[int]:
    """These are the last W + n_sinks tokens. As many as there should be, but all of them move along: sinks
    are the first tokens of the *sequence* and stay for good."""
    return window_of(position, window + n_sinks)


@EXERCISE.misconception("one sink only", **RIGHT)
def one(position: int, window: int, n_sinks: int) -> list[int]:
    """Position 0 alone was kept. n_sinks says how many of the first tokens stay; one would do only for a
    model that was trained with a token made for it."""
    return positions_seen(position, window, min(n_sinks, 1))


@EXERCISE.misconception("one sink too many", **RIGHT)
def one_more(position: int, window: int, n_sinks: int) -> list[int]:
    """`p <= n_sinks` lets in n_sinks + 1 tokens, since positions count from 0: the sinks are 0 … n_sinks −
    1."""
    return positions_seen(position, window, n_sinks + 1)


@EXERCISE.misconception("one key too few: W − 1", **RIGHT)
def too_few(position: int, window: int, n_sinks: int) -> list[int]:
    """The window ends one token early. W counts the token itself: positions position − W + 1 … position."""
    return positions_seen(position, window - 1, n_sinks)


@EXERCISE.misconception("one key too many: W + 1", **RIGHT)
def too_many(position: int, window: int, n_sinks: int) -> list[int]:
    """The window begins at position − W, which makes W + 1 tokens with the token itself. It begins at
    position − W + 1."""
    return positions_seen(position, window + 1, n_sinks)


@EXERCISE.misconception("the token itself left out", **RIGHT)
def without_self(position: int, window: int, n_sinks: int) -> list[int]:
    """A `range` ends before its second number, and so these positions end before the token itself. It has
    written its key before it attends: `range(…, position + 1)`."""
    return [p for p in positions_seen(position, window, n_sinks) if p < position]


@EXERCISE.misconception("sinks that do not exist yet", **RIGHT)
def unborn(position: int, window: int, n_sinks: int) -> list[int]:
    """The first n_sinks positions were listed even where the token stands before some of them: it sees its
    own future. What is seen ends at the token itself, be it a sink or not."""
    return sorted({*range(n_sinks), *window_of(position, window)})


@EXERCISE.misconception("places in the cache in place of positions", **RIGHT)
def renumbered(position: int, window: int, n_sinks: int) -> list[int]:
    """These are 0, 1, 2 … without the gap: how the kept tokens lie in the cache. StreamingLLM does turn its
    keys by such numbers; asked for is where the tokens stand in the sequence, and the gap is real."""
    return list(range(len(positions_seen(position, window, n_sinks))))


@EXERCISE.misconception("the gap and not the tokens", **RIGHT)
def gap(position: int, window: int, n_sinks: int) -> list[int]:
    """These are the positions that are *not* seen: neither sinks nor in the window. Turn the condition
    round."""
    return [p for p in range(position + 1) if p >= n_sinks and position - p >= window]


@EXERCISE.misconception("positions below 0", **RIGHT)
def negative(position: int, window: int, n_sinks: int) -> list[int]:
    """While fewer than W tokens have come, position − W + 1 is negative, and the list begins before the first
    token. There is nothing: `max(0, position - W + 1)`."""
    first = range(min(n_sinks, position + 1))
    return sorted({*first, *range(position - window + 1, position + 1)})


@EXERCISE.misconception("the window listed before the sinks", **RIGHT)
def unsorted(position: int, window: int, n_sinks: int) -> list[int]:
    """The right positions, and not in the order asked for: ascending, so the sinks stand in front of the
    window."""
    recent = window_of(position, window)
    return recent + [p for p in range(min(n_sinks, position + 1)) if p not in recent]


@EXERCISE.misconception("the newest first", **RIGHT)
def descending(position: int, window: int, n_sinks: int) -> list[int]:
    """The right positions, counted back from the token. Asked for is the other order, ascending."""
    return positions_seen(position, window, n_sinks)[::-1]
