"""04.4: kept first tokens, held against a loop over positions; the learned sink, against one key more."""

from typing import Any

import torch
from torch import Tensor

from kvlearn.grading.compare import describe
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial
from kvlearn.grading.units.sliding_window.given import whole_numbers

EXERCISE = Exercise(
    id="04.4",
    slug="sinks",
    title="Sinks: tokens that stay, and a logit that takes",
    answers=("seen", "sink_softmax"),
    hints=(
        "seen: there are two reasons to be seen, being among the first n_sinks or being among the last W. Go "
        "through the positions 0 … position and keep each that has one of the two: none is listed twice.",
        "sink_softmax: think of one more key, the same for every query of a head, whose score is the head's "
        "logit and whose value is 0. It takes a share of the weight and adds nothing.",
        "So put the logit beside the scores as one more column, `sink_logits.view(1, H, 1, 1).expand(B, H, "
        "T, 1)`, take the softmax over S + 1 numbers, and return all columns but that one. Don't normalise "
        "again.",
        "torch's softmax subtracts the largest number before exp. By hand: m is the largest of the scores "
        "*and the logit*; weights = exp(scores − m) / (exp(scores − m).sum() + exp(logit − m)).",
    ),
)


def positions_seen(position: int, window: int, n_sinks: int) -> list[int]:
    """One after the other, with the two reasons."""
    return [p for p in range(position + 1) if p < n_sinks or position - p < window]


def same_positions(t: Trial, seen: Answer, position: int, window: int, n_sinks: int) -> None:
    """Whole numbers, ascending."""
    got: Any = seen(position, window, n_sinks)
    numbers = whole_numbers(got)
    if numbers is None:
        t.true(False, "a list of positions, ascending", describe(got))
        raise Stop
    want = torch.tensor(positions_seen(position, window, n_sinks))
    what = f"from position {position}, W = {window}, {n_sinks} sinks:"
    t.close(torch.tensor(numbers, dtype=torch.int64), want, what)


def weights(scores: Tensor, sinks: Tensor) -> Tensor:
    """In double precision: the share of each key, where one more key has the logit for its score."""
    column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
    return (
        (scores.double() - torch.cat((scores.double(), column), -1).logsumexp(-1, keepdim=True)).exp().float()
    )


def draw(t: Trial, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scores (B, H, T, S), some of them hidden, and a logit for each head."""
    B, H, T, S, _ = t.sizes()
    scores = spread * t.randn(B, H, T, S)
    return scores.masked_fill(~t.mask(T, S), -torch.inf), spread * (t.randn(H) + 0.5)


@EXERCISE.requirement(1, "seen: far behind the sinks")
def far(t: Trial, seen: Answer, sink_softmax: Answer) -> None:
    """the first n_sinks positions, a gap, and the last W: n_sinks + W positions"""
    n_sinks, window = t.integer(2, 4), t.integer(5, 8)
    same_positions(t, seen, n_sinks + window + t.integer(3, 30), window, n_sinks)
    same_positions(t, seen, 1_000 + t.integer(0, 99), window, n_sinks)


@EXERCISE.requirement(1, "seen: the window still over the sinks")
def near(t: Trial, seen: Answer, sink_softmax: Answer) -> None:
    """every position so far, once: a sink inside the window is not counted twice"""
    n_sinks, window = t.integer(3, 5), t.integer(7, 10)
    same_positions(t, seen, window + t.integer(0, n_sinks - 2), window, n_sinks)
    same_positions(t, seen, t.integer(n_sinks, window - 2), window, n_sinks)


@EXERCISE.requirement(1, "seen: the first tokens, and no sinks")
def limits(t: Trial, seen: Answer, sink_softmax: Answer) -> None:
    """nothing behind the token itself, be it a sink; with n_sinks = 0 the window of 04.1"""
    n_sinks, window = t.integer(3, 5), t.integer(6, 9)
    same_positions(t, seen, t.integer(0, n_sinks - 2), window, n_sinks)
    same_positions(t, seen, window + t.integer(3, 20), window, 0)


@EXERCISE.requirement(1, "sink_softmax: a logit for each head")
def ordinary(t: Trial, seen: Answer, sink_softmax: Answer) -> None:
    """exp(score) / (Σ exp(score) + exp(logit)), (B, H, T, S): the weights add up to less than 1"""
    scores, sinks = draw(t)
    t.close(sink_softmax(scores, sinks), weights(scores, sinks))
    t.unchanged()


@EXERCISE.requirement(1, "sink_softmax: large scores and large logits")
def large(t: Trial, seen: Answer, sink_softmax: Answer) -> None:
    """the same around +300 and around −300, where exp overflows or gives 0, in scores and logits alike; also
    with heads and rows that far apart in one tensor"""
    scores, sinks = draw(t)
    for shift in (300.0, -300.0):
        t.close(sink_softmax(scores + shift, sinks + shift), weights(scores, sinks), tolerance=1e-3)
    # A head at +300 and the next at −300, and within a head rows that far from others.
    apart = 300.0 * (1 - 2 * (torch.arange(len(sinks)) % 2))
    scores, sinks = scores + apart[:, None, None], sinks + apart
    t.close(sink_softmax(scores, sinks), weights(scores, sinks), "heads far apart:", tolerance=1e-3)
    scores, sinks = torch.cat((scores, scores - 300.0), dim=2), sinks - 300.0
    t.close(sink_softmax(scores, sinks), weights(scores, sinks), "rows far apart:", tolerance=1e-3)


@EXERCISE.requirement(1, "sink_softmax: a row with every key hidden")
def hidden(t: Trial, seen: Answer, sink_softmax: Answer) -> None:
    """weights of 0, not NaN: all of it goes to the sink; the other rows as ever"""
    scores, sinks = draw(t)
    scores[t.pick(0, 1), t.pick(0, 1, 2), 0] = -torch.inf
    t.close(sink_softmax(scores, sinks), weights(scores, sinks))
