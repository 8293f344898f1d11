"""01.7: merging partial attention by log-sum-exp, held against attention over all keys at once."""

import torch
from torch import Tensor

from kvlearn.grading.compare import Difference
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial

Part = tuple[Tensor, Tensor]

EXERCISE = Exercise(
    id="01.7",
    slug="merge",
    title="Merge two partial results (online softmax)",
    answers=("merge",),
    hints=(
        "out_a was divided by exp(lse_a), the sum of its exponentials. To combine, undo that: each part "
        "weighs exp(lse), and the common divisor is exp(lse_a) + exp(lse_b).",
        "So lse = log(exp(lse_a) + exp(lse_b)), which is `torch.logaddexp(lse_a, lse_b)`, and out = "
        "exp(lse_a − lse)·out_a + exp(lse_b − lse)·out_b. Weights are (B, H, T): add a dimension with "
        "`[..., None]`.",
        "exp(100) overflows in fp32. Take only differences into exp: lse_a − lse is never positive, so "
        "its exponential is at most 1.",
        "With both parts empty, lse − lse is −∞ − (−∞) = NaN. Replace −∞ by any finite number in what "
        "you subtract: `lse.masked_fill(lse == -torch.inf, 0.0)`. exp(−∞ − 0) is 0, as it should be.",
    ),
)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Part:
    """Attention over these keys in double precision, and the log-sum-exp of its scores."""
    scores = q.double() @ k.double().transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.double()).float(), scores.logsumexp(-1).float()


def draw(t: Trial, *n_keys: int) -> tuple[list[Part], Part]:
    """Partial results over these numbers of keys, and the result over all of them together."""
    B, H, T, _, D = t.sizes()
    q, k, v = t.randn(B, H, T, D), t.randn(B, H, sum(n_keys), D), t.randn(B, H, sum(n_keys), D)
    parts = [attend(q, *kv) for kv in zip(k.split(n_keys, dim=2), v.split(n_keys, dim=2), strict=True)]
    return parts, attend(q, k, v)


def part(t: Trial, got: object) -> Part:
    """What merge returned, if it has a place for both."""
    out, lse = t.pair(got, "a pair (out, lse)")
    if out.ndim == 3 and lse.ndim == 4:
        expected = "(out, lse) of shapes (B, H, T, D) and (B, H, T)"
        t.note(out, Difference("", expected, f"{tuple(out.shape)} and {tuple(lse.shape)}: swapped?"))
        raise Stop
    return out, lse


def same_as(t: Trial, got: object, want: Part, tolerance: float | None = None) -> Part:
    out, lse = part(t, got)
    t.close(out, want[0], "out:", tolerance)
    t.close(lse, want[1], "lse:", tolerance)
    return out, lse


def empty(part: Part) -> Part:
    """What attention over no keys gives, in the shape of ``part``."""
    return torch.zeros_like(part[0]), torch.full_like(part[1], -torch.inf)


@EXERCISE.requirement(2, "two ordinary parts")
def ordinary(t: Trial, merge: Answer) -> None:
    """out (B, H, T, D) and lse (B, H, T) as if all keys had been seen together"""
    (a, b), whole = draw(t, t.integer(2, 9), t.integer(2, 9))
    same_as(t, merge(*a, *b), whole)


@EXERCISE.requirement(1, "large scores")
def large(t: Trial, merge: Answer) -> None:
    """finite and right with log-sum-exps of +200 (exp overflows) and of −200 (every exp is 0), and with
    both in different rows"""
    (a, b), whole = draw(t, t.integer(2, 9), t.integer(2, 9))
    signs = torch.where(t.mask(*whole[1].shape, share=0.5), 1.0, -1.0)
    for shift in (200.0 * torch.ones(()), -200.0 * torch.ones(()), 200.0 * signs):
        got = merge(a[0], a[1] + shift, b[0], b[1] + shift)
        same_as(t, got, (whole[0], whole[1] + shift), tolerance=1e-3)


@EXERCISE.requirement(1, "one part empty")
def one_empty(t: Trial, merge: Answer) -> None:
    """an empty part (out 0, lse −∞) contributes nothing, whichever side it stands on"""
    (a,), _ = draw(t, t.integer(2, 9))
    same_as(t, merge(*a, *empty(a)), a)
    same_as(t, merge(*empty(a), *a), a)


@EXERCISE.requirement(1, "both parts empty")
def both_empty(t: Trial, merge: Answer) -> None:
    """out 0 and lse −∞, not NaN, for the rows in which both are empty; the other rows as ever"""
    (a, b), (out, lse) = draw(t, t.integer(2, 9), t.integer(2, 9))
    rows = t.mask(*lse.shape) if lse.shape[2] > 1 else torch.ones(lse.shape, dtype=torch.bool)
    for part_out, part_lse in (a, b, (out, lse)):
        part_out[rows], part_lse[rows] = 0.0, -torch.inf
    same_as(t, merge(*a, *b), (out, lse))


@EXERCISE.requirement(1, "three parts in any order")
def three(t: Trial, merge: Answer) -> None:
    """merging goes on with what merging gave, in whichever order; the inputs stay unchanged"""
    parts, whole = draw(t, t.integer(1, 6), t.integer(2, 9), t.integer(1, 6))
    t.random.shuffle(parts)
    first = part(t, merge(*parts[0], *parts[1]))
    same_as(t, merge(*parts[2], *first), whole)
    t.unchanged()
