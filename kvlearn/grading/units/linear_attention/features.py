"""06.1: linear attention in its quadratic form, held against weights that are summed token by token."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial
from kvlearn.grading.units.linear_attention.given import averages, draw

EXERCISE = Exercise(
    id="06.1",
    slug="features",
    title="Feature map and normaliser",
    answers=("linear_attention",),
    hints=(
        "Two lines make the weights: `F.elu(q) + 1` and `F.elu(k) + 1` in place of q and k, and their "
        "product, (B, H, T, T). Values have no feature map, and nothing is scaled.",
        "Hide the future with zeros: `weights.tril()`. Minus infinity is for scores that go into a softmax; "
        "here the numbers are weights already.",
        "The normaliser of token t is the sum of *its* weights, after hiding: "
        "`weights.sum(dim=-1, keepdim=True)`. What comes later is not in it.",
        "Far below 0 elu(x) + 1 is exactly 0. Then all weights of a token may be 0, and 0 / 0 is NaN: "
        "divide by `total.clamp_min(1e-6)`, and the output is 0 there.",
    ),
)

UNDERFLOW = -2000.0  # φ of it is 0, in fp64 as well


@EXERCISE.requirement(1, "an average of values")
def average(t: Trial, linear_attention: Answer) -> None:
    """values that are all alike come back as they are, since the weights of a token sum to 1, small ones as
    well; one token alone gives its own value"""
    q, k, v = draw(t, 1 if t.round == 1 else t.integer(4, 7))
    v = v[:, :, :1].expand_as(v).clone()
    low = 2 + torch.rand(*q.shape, generator=t.generator) if t.round else 0  # sums of weights far below 1
    t.close(linear_attention(q - low, k - low, v), v)


@EXERCISE.requirement(2, "the weights")
def weights(t: Trial, linear_attention: Answer) -> None:
    """φ(q)·φ(k), divided by their sum up to the token itself, φ = elu + 1; (B, H, T, V), and the inputs are
    unchanged afterwards"""
    q, k, v = draw(t, t.integer(5, 9), square=t.round == 0)
    t.close(linear_attention(q, k, v), averages(q, k, v))
    t.unchanged()


@EXERCISE.requirement(1, "the past, and not the future")
def causal(t: Trial, linear_attention: Answer) -> None:
    """what a token gives depends on every token before it, and on none after it: neither weights nor
    normaliser"""
    n, later = t.integer(3, 5), t.integer(2, 4)
    q, k, v = draw(t, n + later)
    one = linear_attention(q, k, v)
    if not t.shape(one, tuple(v.shape)):
        raise Stop
    for x in (q, k, v):
        x[:, :, n:] = t.randn(*x[:, :, n:].shape)
    t.close(linear_attention(q, k, v)[:, :, :n], one[:, :, :n], "with other tokens to come:")
    v[:, :, 0] += 10
    moved = (linear_attention(q, k, v)[:, :, 1:n] - one[:, :, 1:n]).abs().amax()
    t.true(float(moved) > 1e-3, "outputs that change with the first value", "outputs as before")


@EXERCISE.requirement(1, "large queries and keys")
def large(t: Trial, linear_attention: Answer) -> None:
    """numbers up to about ±100: the same weights, no overflow"""
    q, k, v = draw(t, t.integer(5, 8), square=t.round == 0)
    q, k = 30 * q, 30 * k
    for x in (q, k):
        x[..., 0] = x[..., 0].abs() + 1  # so that no sum of weights is small, and rounding decides nothing
    t.close(linear_attention(q, k, v), averages(q, k, v))


@EXERCISE.requirement(1, "no key has any weight")
def empty(t: Trial, linear_attention: Answer) -> None:
    """the output is 0, not NaN, where φ of all keys so far is 0, or φ of the query; the other tokens are
    right as ever"""
    n = t.integer(2, 3)
    q, k, v = draw(t, n + t.integer(3, 5))
    k[:, :, :n] = UNDERFLOW
    q[:, :, n + 1] = UNDERFLOW
    t.close(linear_attention(q, k, v), averages(q, k, v))


def nearby(x: Tensor) -> Tensor:
    """elu(x) + 1 as an answer has it, in the dtype of ``x``."""
    return torch.nn.functional.elu(x) + 1
