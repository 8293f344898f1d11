"""04.4: the mistakes that people make with a learned sink logit."""

from typing import Any

import torch
from torch import Tensor

from kvlearn.grading.units.sliding_window.sinks import positions_seen, weights
from kvlearn.grading.units.sliding_window.sinks_mistakes import EXERCISE

__all__ = ["EXERCISE"]

RIGHT: dict[str, Any] = {"seen": positions_seen}


def column(scores: Tensor, sinks: Tensor) -> Tensor:
    """The logits as one more key, (B, H, T, 1)."""
    return sinks[None, :, None, None].expand(*scores.shape[:3], 1)


def with_column(scores: Tensor, sinks: Tensor) -> Tensor:
    """The softmax over S + 1 numbers, the sink last."""
    return torch.cat((scores, column(scores, sinks)), dim=-1).softmax(-1)


@EXERCISE.misconception("the sink does nothing", **RIGHT)
def no_sink(scores: Tensor, sinks: Tensor) -> Tensor:
    """This is the ordinary softmax, its weights add up to 1. Perhaps the logit was added to every score,
    which a softmax does not notice, or the column was dropped and the rest normalised again, which undoes
    it. The logit belongs into the denominator and nowhere else."""
    return scores.softmax(-1)


@EXERCISE.misconception("the sink's own column returned too", **RIGHT)
def column_kept(scores: Tensor, sinks: Tensor) -> Tensor:
    """The weights have S + 1 columns. The sink has no key and no value: its share is what goes missing, so
    its column is left out of what is returned."""
    return with_column(scores, sinks)


@EXERCISE.misconception("the wrong column dropped", **RIGHT)
def wrong_column(scores: Tensor, sinks: Tensor) -> Tensor:
    """The logit was put at one end of the scores and a column dropped at the other: the sink's share stands
    where a token's weight should be, and every weight belongs to its neighbour. Drop the column that you
    added."""
    return torch.cat((column(scores, sinks), scores), dim=-1).softmax(-1)[..., :-1]


@EXERCISE.misconception("the sink added after the softmax", **RIGHT)
def after(scores: Tensor, sinks: Tensor) -> Tensor:
    """The softmax was finished, and then its weights were divided by 1 + exp(logit). So the sink takes the
    same share of every row, whatever the scores are. It has to compete with the scores: exp(logit) stands
    beside Σ exp(score), in one denominator."""
    return scores.softmax(-1) / (1 + sinks.exp()[None, :, None, None])


@EXERCISE.misconception("the sink in the numerator", **RIGHT)
def numerator(scores: Tensor, sinks: Tensor) -> Tensor:
    """exp(logit) was added to each exp(score) as well. A key's weight then never falls to 0, hidden keys are
    seen too. The sink belongs into the denominator alone."""
    largest = torch.maximum(scores.amax(-1, keepdim=True), column(scores, sinks))
    sink = (column(scores, sinks) - largest).exp()
    exp = (scores - largest).exp()
    return (exp + sink) / (exp.sum(-1, keepdim=True) + sink)


@EXERCISE.misconception("no maximum subtracted", **RIGHT)
def unstable(scores: Tensor, sinks: Tensor) -> Tensor:
    """exp was taken of the numbers as they are. exp(89) is infinite in fp32, and ∞ / ∞ is NaN; exp(−104) is
    0, and 0 / 0 is NaN. Subtract the largest of scores and logit from all of them first: nothing else
    changes."""
    exp = scores.exp()
    return exp / (exp.sum(-1, keepdim=True) + column(scores, sinks).exp())


@EXERCISE.misconception("the maximum taken without the logit", **RIGHT)
def without_logit(scores: Tensor, sinks: Tensor) -> Tensor:
    """The largest *score* was subtracted from all. Where every key is hidden it is −∞, and −∞ − (−∞) is NaN;
    and a logit far above the scores would overflow. The logit is one of the numbers: take it into the
    maximum."""
    largest = scores.amax(-1, keepdim=True)
    exp = (scores - largest).exp()
    return exp / (exp.sum(-1, keepdim=True) + (column(scores, sinks) - largest).exp())


@EXERCISE.misconception("the maximum subtracted from the scores, not from the logit", **RIGHT)
def logit_not_shifted(scores: Tensor, sinks: Tensor) -> Tensor:
    """The scores were lowered by their maximum and the logit was not. The two no longer stand on the same
    ground: the sink weighs exp(maximum) times too much. What is subtracted from one is subtracted from
    all."""
    exp = (scores - scores.amax(-1, keepdim=True).clamp_min(-1e30)).exp()
    return exp / (exp.sum(-1, keepdim=True) + column(scores, sinks).exp())


@EXERCISE.misconception("the logit itself, not its exp", **RIGHT)
def not_exponentiated(scores: Tensor, sinks: Tensor) -> Tensor:
    """The logit was added to the denominator as it is. It is a score, and a score enters as exp(score); as it
    is it may even be negative."""
    largest = scores.amax(-1, keepdim=True).clamp_min(-1e30)
    exp = (scores - largest).exp()
    return exp / (exp.sum(-1, keepdim=True) + column(scores, sinks))


@EXERCISE.misconception("the same sink for every head: a 1 in the denominator", **RIGHT)
def plus_one(scores: Tensor, sinks: Tensor) -> Tensor:
    """A 1 was added to the denominator, which is a logit of 0 for all ("softmax plus one"). Here each head
    has learned a logit of its own: exp(logit) in place of the 1."""
    return weights(scores, torch.zeros_like(sinks))


@EXERCISE.misconception("the first head's logit for all", **RIGHT)
def first_head(scores: Tensor, sinks: Tensor) -> Tensor:
    """Every head got the logit of head 0. There are H logits, one a head; to lay them over (B, H, T, S) they
    need the shape (1, H, 1, 1)."""
    return weights(scores, sinks[:1].expand_as(sinks))


@EXERCISE.misconception("all heads' logits in every denominator", **RIGHT)
def all_heads(scores: Tensor, sinks: Tensor) -> Tensor:
    """All H logits were put beside the scores of every head, as H more keys. A head has one sink, its own."""
    return weights(scores, sinks.logsumexp(0).expand_as(sinks))


@EXERCISE.misconception("the softmax over the queries", **RIGHT)
def over_queries(scores: Tensor, sinks: Tensor) -> Tensor:
    """The weights were divided among the queries, dimension −2. Each query divides its own weight among the
    keys and the sink: dimension −1."""
    return weights(scores.transpose(-2, -1), sinks).transpose(-2, -1)


@EXERCISE.misconception("one maximum for the whole tensor", **RIGHT)
def one_maximum(scores: Tensor, sinks: Tensor) -> Tensor:
    """The largest of *all* scores and logits was subtracted. A row that lies far below it becomes exp(−600) =
    0 in every place, its sink too, and 0 / 0 is NaN. Each row has its own denominator, and takes its own
    maximum: over its keys and its head's logit, `amax(-1, keepdim=True)`."""
    largest = torch.maximum(scores.max(), sinks.max())
    exp = (scores - largest).exp()
    return exp / (exp.sum(-1, keepdim=True) + (column(scores, sinks) - largest).exp())
