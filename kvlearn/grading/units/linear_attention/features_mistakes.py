"""06.1: the mistakes that people make with a feature map and its normaliser."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.grading.units.linear_attention.features import EXERCISE, nearby

__all__ = ["EXERCISE"]


def scores(q: Tensor, k: Tensor, features: Callable[[Tensor], Tensor] = nearby) -> Tensor:
    return features(q) @ features(k).mT


def divided(weights: Tensor, v: Tensor, total: Tensor | None = None) -> Tensor:
    """The average with these weights; guarded against 0 / 0, whatever the sign."""
    total = weights.sum(-1, keepdim=True) if total is None else total
    return weights @ v / torch.where(total == 0, 1, total)


def softmax_of(scores: Tensor) -> Tensor:
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


@EXERCISE.misconception("no normaliser")
def unnormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weights were not divided by their sum. They are all positive, so the outputs grow with every token.
    Divide by what the weights of the token sum to. (Later designs leave the normaliser out on purpose, and
    put a norm behind the layer.)"""
    return scores(q, k).tril() @ v


@EXERCISE.misconception("a normaliser over all tokens")
def total_of_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The outputs are divided by the sum over *all* keys, those to come as well: the weights were summed
    before the future was hidden. So weights sum to less than 1, and every token learns something of the
    future. Hide first, then sum."""
    weights = scores(q, k)
    return divided(weights.tril(), v, weights.sum(-1, keepdim=True))


@EXERCISE.misconception("a normaliser without the feature map")
def raw_total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The outputs are divided by the sum of q·k, without φ. Such a sum may be 0 or negative, and it is not
    what the weights sum to. The same φ(q)·φ(k) stand above and below."""
    return divided(scores(q, k).tril(), v, (q @ k.mT).tril().sum(-1, keepdim=True))


@EXERCISE.misconception("elu without + 1")
def plain_elu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """φ was elu alone. Its values go down to −1, so weights may be negative, their sum may come close to 0,
    and the quotient blows up. The + 1 is what makes every feature positive."""
    return divided(scores(q, k, F.elu).tril(), v)


@EXERCISE.misconception("+ 1 on the product, not on the features")
def one_too_late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """1 was added to elu(q)·elu(k). Then the features are negative still, and so may the weights be: each
    feature gets its + 1 *before* the product."""
    return divided((scores(q, k, F.elu) + 1).tril(), v)


@EXERCISE.misconception("relu in place of elu + 1")
def relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """φ was relu. It gives no negative weights, but whatever is below 0 becomes 0, with no gradient; a query
    and a key that share no positive number do not see each other, and a sum of such weights is 0. φ = elu + 1
    is positive everywhere."""
    return divided(scores(q, k, F.relu).tril(), v)


@EXERCISE.misconception("exp as the feature map")
def exponential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """φ was exp. That is positive, but it overflows from 89 on, and it is not the map that was asked for:
    elu(x) + 1 grows like x + 1 above 0, and is eˣ only below."""
    return divided(scores(q, k, torch.exp).tril(), v)


@EXERCISE.misconception("softmax as the feature map")
def softmax_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """φ was a softmax over the features of each query and key. Such maps exist, but here φ works on each
    number for itself: elu(x) + 1."""
    return divided(scores(q, k, lambda x: x.softmax(-1)).tril(), v)


@EXERCISE.misconception("the softmax left in")
def still_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The products φ(q)·φ(k) went through a softmax. They *are* the weights, in place of exp(q·k): divide
    them by their sum, with no exp. With a softmax nothing can be pulled apart into a state."""
    return softmax_of(scores(q, k)) @ v


@EXERCISE.misconception("softmax attention")
def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """This is softmax attention as in unit 01, without a feature map. Linear attention puts φ(q)·φ(k) where
    exp(q·k / √K) stood."""
    return softmax_of(q @ k.mT * q.shape[-1] ** -0.5) @ v


@EXERCISE.misconception("a scale before the feature map")
def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries were divided by √K before φ. A factor on the *weights* would cancel, above and below; inside φ
    it changes them, for φ(q / √K) is not φ(q) / √K. Nothing is scaled here."""
    return divided(scores(q * q.shape[-1] ** -0.5, k).tril(), v)


@EXERCISE.misconception("divided by the number of tokens")
def by_position(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sums were divided by how many tokens a token sees. That keeps them from growing with the length,
    but the weights do not sum to 1: divide by the weights' own sum."""
    return scores(q, k).tril() @ v / torch.arange(1, q.shape[2] + 1)[:, None]


@EXERCISE.misconception("the future not hidden")
def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token sees every other, those to come as well. Set the weights above the diagonal to 0 before
    they are summed."""
    return divided(scores(q, k), v)


@EXERCISE.misconception("a token does not see itself")
def not_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The diagonal was hidden with the future, so the first token sees nothing at all. A token sees itself:
    s ≤ t."""
    return divided(scores(q, k).tril(-1), v)


@EXERCISE.misconception("hidden with minus infinity")
def minus_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights of the future were set to −∞. That is the way where a softmax follows, which makes 0 of it.
    Here the numbers are weights already: a hidden token's is 0."""
    weights = scores(q, k)
    return divided(weights.masked_fill(torch.ones_like(weights, dtype=torch.bool).triu(1), -torch.inf), v)


@EXERCISE.misconception("the feature map on the values")
def featured_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """φ was applied to the values as well. It makes weights of queries and keys; values are what is averaged,
    and may be negative."""
    return divided(scores(q, k).tril(), nearby(v))


@EXERCISE.misconception("the feature map on the keys alone")
def keys_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The queries went in without φ, so weights may be negative. Both sides have the feature map."""
    return divided((q @ nearby(k).mT).tril(), v)


@EXERCISE.misconception("the feature map on the queries alone")
def queries_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The keys went in without φ, so weights may be negative. Both sides have the feature map."""
    return divided((nearby(q) @ k.mT).tril(), v)


@EXERCISE.misconception("no feature map")
def no_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weights were q·k itself, which may be negative; their sum may be 0, and the quotient blows up.
    φ makes every feature positive first."""
    return divided((q @ k.mT).tril(), v)


@EXERCISE.misconception("the feature map on the product")
def of_the_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """φ was applied to q·k, not to q and k. That gives weights, but ones that cannot be pulled apart: only a
    product φ(q)·φ(k) lets the sum over keys be made once, as a state, for all queries to come."""
    return divided(nearby(q @ k.mT).tril(), v)


@EXERCISE.misconception("a normaliser for each key")
def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weights were divided by their sum over the *queries*, down the columns. Each query's weights sum to
    1: `sum(dim=-1)`, along the keys."""
    weights = scores(q, k).tril()
    total = weights.sum(-2, keepdim=True)
    return weights / torch.where(total == 0, 1, total) @ v


@EXERCISE.misconception("0 / 0 where no key has any weight")
def unguarded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Far below 0, elu(x) + 1 is exactly 0. A token whose weights are all 0 divides 0 by 0, which is NaN, and
    one NaN spoils every layer above it. Divide by at least some tiny number: the output is 0 then."""
    weights = scores(q, k).tril()
    return weights @ v / weights.sum(-1, keepdim=True)
