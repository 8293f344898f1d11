"""06.7: RWKV-4's weighted average, held against a softmax over written-out exponents in float64."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
    id="06.7",
    slug="wkv",
    title="wkv without overflow",
    answers=("wkv",),
    hints=(
        "Write the plain recurrence first. Two sums of the past, a = Σ e^{…} v and b = Σ e^{…}, start at 0. "
        "For each token: out = (a + e^{u+k} v) / (b + e^{u+k}); then a ← e^{−w} a + e^k v, b ← e^{−w} b + "
        "e^k. That is right for small k.",
        "Now keep a and b divided by e^m, where m is the largest exponent among the past tokens: a = e^m · "
        "(what you store). m starts at −∞, or at a very negative number such as −1e38.",
        "To read, take n = max(m, u + k) and divide numerator and denominator by e^n: e^{m−n} a + e^{u+k−n} "
        "v over e^{m−n} b + e^{u+k−n}. No exponent is above 0, and one of them is 0.",
        "To write, the past fades by e^{−w}, and so its largest exponent becomes m − w: n = max(m − w, k), "
        "a ← e^{m−w−n} a + e^{k−n} v, b likewise, m ← n. The bonus u has no part in it.",
    ),
)

Given = tuple[Tensor, Tensor, Tensor, Tensor]  # w, u, k, v


def naive(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Token by token: all exponents written out, their softmax, the average."""
    w, u, k, values = w.double(), u.double(), k.double(), v.double()
    outs = []
    for t in range(k.shape[1]):
        steps = torch.arange(t - 1, -1, -1)[:, None]  # t − 1 − s for the tokens s before t
        exponents = torch.cat((k[:, :t] - steps * w, (u + k[:, t])[:, None]), 1)
        outs.append((exponents.softmax(1) * values[:, : t + 1]).sum(1))
    return torch.stack(outs, 1).to(v.dtype)


def quarters(x: Tensor) -> Tensor:
    """Rounded to quarters, so that sums of some hundreds are exact in fp32."""
    return (x * 4).round() / 4


def draw(t: Trial, T: int) -> Given:
    """Ordinary numbers: decays of 0.25 to 1.25 a step, and a bonus above 0."""
    B, C = t.pick(2, 3), t.pick(5, 6, 7)
    w = quarters(torch.rand(C, generator=t.generator)) + 0.25
    u = 0.5 + t.randn(C).abs()
    return w, u, t.randn(B, T, C), t.randn(B, T, C)


def same(t: Trial, wkv: Answer, given: Given, when: str = "") -> None:
    t.close(wkv(*given), naive(*given), when)


@EXERCISE.requirement(1, "the first token")
def first(t: Trial, wkv: Answer) -> None:
    """there is nothing but itself: its weight is 1, the output its value; (B, T, C) also for T = 1"""
    w, u, k, v = draw(t, 1)
    t.close(wkv(w, u, k, v), v)


@EXERCISE.requirement(1, "the bonus")
def bonus(t: Trial, wkv: Answer) -> None:
    """a token's own weight is e^(u + k), that of the tokens before it e^k (where w is next to nothing)"""
    w, u, k, v = draw(t, t.integer(4, 8))
    same(t, wkv, (torch.full_like(w, 1e-6), u, k, v))


@EXERCISE.requirement(1, "the decay")
def decay(t: Trial, wkv: Answer) -> None:
    """the token before fades not at all, the one before that by e^(−w), then e^(−2w) … (where u is 0)"""
    w, u, k, v = draw(t, t.integer(6, 9))
    same(t, wkv, (w, torch.zeros_like(u), k, v))


@EXERCISE.requirement(1, "a whole text")
def text(t: Trial, wkv: Answer) -> None:
    """decay and bonus together, for every row of the batch, u of either sign; the inputs stay as they were"""
    w, u, k, v = draw(t, t.integer(12, 20))
    same(t, wkv, (w, -u if t.round == 1 else u, k, v))
    t.unchanged()


@EXERCISE.requirement(1, "large keys")
def large(t: Trial, wkv: Answer) -> None:
    """k anywhere between −1000 and 1000: e^1000 is infinite in fp64 as well, but only differences of
    exponents count (where u is 0 and w next to nothing)"""
    w, u, k, v = draw(t, t.integer(10, 16))
    given = torch.full_like(w, 1e-6), torch.zeros_like(u), quarters(t.integer(900, 990) * k.tanh()), v
    same(t, wkv, given)


@EXERCISE.requirement(1, "small keys before a large one")
def small_first(t: Trial, wkv: Answer) -> None:
    """keys near −990 and, at the end, one near 990: the early outputs are averages, not 0/0 (where u is 0 and
    w next to nothing)"""
    w, u, k, v = draw(t, t.integer(6, 10))
    k = quarters(k) - 990
    k[:, -1] += 1980
    same(t, wkv, (torch.full_like(w, 1e-6), torch.zeros_like(u), k, v))


@EXERCISE.requirement(1, "large keys that fade, and a large bonus")
def fading(t: Trial, wkv: Answer) -> None:
    """a key near 990, then many near −990: it fades, e^(−w) a step, and the average never becomes 0/0, also
    when the new ones have caught up with it; and a bonus of some hundreds overflows no more than a key
    does"""
    w, u, k, v = draw(t, 36)
    k = quarters(k) - 990
    k[:, 0] += 1980
    same(t, wkv, (w + 70, quarters(u), k, v), "one large key:")
    w, u, k, v = draw(t, t.integer(10, 16))
    same(t, wkv, (w, quarters(u + t.integer(300, 500)), quarters(800 * k.tanh()), v), "a large bonus:")
