"""06.1: the mistakes that people make with the mask, with what stands below, and with elu + 1."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.grading.units.linear_attention.features import nearby
from kvlearn.grading.units.linear_attention.features_mistakes import EXERCISE, divided, scores

__all__ = ["EXERCISE"]


@EXERCISE.misconception("the mask upside down")
def upside_down(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The upper half was kept: each token sees itself and what comes *after* it. Queries go down, keys
    across; the past is below the diagonal, `tril()`."""
    return divided(scores(q, k).triu(), v)


@EXERCISE.misconception("the future hidden in the normaliser alone")
def half_hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The values of all tokens were summed, and divided by the weights of the past: weights sum to more than
    1. Hide the future in the weights, and use these above and below."""
    weights = scores(q, k)
    return divided(weights, v, weights.tril().sum(-1, keepdim=True))


@EXERCISE.misconception("the query left out of the normaliser")
def keys_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The outputs were divided by the sum of φ(k) over tokens and features. The weights of *this* query sum
    to φ(q)·Σφ(k): each feature counts as much as the query has of it."""
    total = nearby(k).sum(-1, keepdim=True).cumsum(2)
    return divided(scores(q, k).tril(), v, total)


@EXERCISE.misconception("elu of x + 1")
def added_inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """φ was elu(x + 1): 1 was added before, and not to the result. That still goes down to −1. φ(x) =
    elu(x) + 1."""
    return divided(scores(q, k, lambda x: F.elu(x + 1)).tril(), v)


@EXERCISE.misconception("queries and keys scaled")
def both_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries and keys were both divided by √K before φ. Nothing is scaled here: inside φ a factor changes
    the weights, and outside it would cancel."""
    scale = q.shape[-1] ** -0.5
    return divided(scores(q * scale, k * scale).tril(), v)


@EXERCISE.misconception("the inputs changed in place")
def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The numbers are right, but queries or keys that were handed in have changed (`elu_`, `+= 1`). They
    belong to the caller: `F.elu(q) + 1` makes a new tensor."""
    out = divided(scores(q, k).tril(), v)
    for x in (q, k):
        x.copy_(nearby(x))
    return out


@EXERCISE.misconception("the value itself where no key has any weight")
def own_value(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Where all weights are 0 the output was the token's own value. A sum of no weights is nothing: 0 was
    asked for."""
    weights = scores(q, k).tril()
    return torch.where(weights.sum(-1, keepdim=True) > 0, divided(weights, v), v)
