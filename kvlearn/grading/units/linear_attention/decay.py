"""06.4: a state that fades, held against the recurrence as it is written."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial
from kvlearn.grading.units.linear_attention.given import draw, faded, tensors

EXERCISE = Exercise(
    id="06.4",
    slug="decay",
    title="A state that fades",
    answers=("decayed_attention",),
    hints=(
        "The simplest answer is a loop over the tokens that does what the equation says, in this order: "
        "fade the state, write the token, read. `a = log_decay.exp()`, and token t's is "
        "`a[:, :, t, None, None]`.",
        "What token t writes is not faded in the same step: the decay of t is for what was there before. It "
        "does apply to the state that was handed in, from the first token on.",
        "All at once: token s has faded by a_{s+1} ⋯ a_t when t reads it. With "
        "`c = log_decay.cumsum(dim=-1)` that is exp(c_t − c_s), a (T, T) matrix, 1 on the diagonal; the "
        "state has faded by exp(c_t), and in the last state token s by exp(c_{T−1} − c_s).",
        "Never divide products of decays: exp(c_t) / exp(c_s) is 0 / 0 as soon as both underflow. Subtract "
        "first, then exp. Above the diagonal c_t − c_s is positive and may overflow: set it to −∞ *before* "
        "exp, for inf · 0 is NaN.",
    ),
)

NAMES = "out, state"
Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def given(t: Trial, n_tokens: int, square: bool = True) -> Given:
    """A text with decays between 0.2 and 0.95, no two alike, and a state that it meets."""
    q, k, v = draw(t, n_tokens, square)
    decay = 0.2 + 0.75 * torch.rand(q.shape[:3], generator=t.generator)
    return q, k, v, decay.log(), 2 * t.randn(*q.shape[:2], k.shape[3], v.shape[3])


def run(t: Trial, answer: Answer, text: Given) -> list[Tensor]:
    return tensors(t, answer(*text), NAMES)


@EXERCISE.requirement(1, "one token")
def single(t: Trial, decayed_attention: Answer) -> None:
    """the state fades, the token is written, and then it is read: out and the new state"""
    text = given(t, 1, square=t.round < 2)
    out, state = run(t, decayed_attention, text)
    want = faded(*text)
    t.close(out, want[0], "out:", tolerance=3e-4)
    t.close(state, want[1], "state:", tolerance=3e-4)


@EXERCISE.requirement(2, "tokens fade from one another")
def tokens(t: Trial, decayed_attention: Answer) -> None:
    """out, (B, H, T, V), behind a state of zeros: token s has faded by a_{s+1} ⋯ a_t when t reads it, and the
    token itself not at all"""
    q, k, v, log_decay, state = given(t, t.integer(5, 9), square=t.round < 2)
    text = (q, k, v, log_decay, torch.zeros_like(state))
    t.close(run(t, decayed_attention, text)[0], faded(*text)[0], "out:", tolerance=3e-4)


@EXERCISE.requirement(1, "the state that was there")
def handed_in(t: Trial, decayed_attention: Answer) -> None:
    """with values of 0 all that is read comes from the state handed in: it has faded by a_0 ⋯ a_t; the inputs
    are unchanged afterwards"""
    q, k, v, log_decay, state = given(t, t.integer(4, 7), square=t.round < 2)
    text = (q, k, torch.zeros_like(v), log_decay, state)
    t.close(run(t, decayed_attention, text)[0], faded(*text)[0], "out:", tolerance=3e-4)
    t.unchanged()


@EXERCISE.requirement(1, "the state behind the last token")
def handed_on(t: Trial, decayed_attention: Answer) -> None:
    """(B, H, K, V), so that a text may go on from it: token s has faded by a_{s+1} ⋯ a_{T−1}, the state
    handed in by all decays"""
    text = given(t, t.integer(4, 7), square=t.round < 2)
    t.close(run(t, decayed_attention, text)[1], faded(*text)[1], "state:", tolerance=3e-4)


@EXERCISE.requirement(1, "strong decay")
def strong(t: Trial, decayed_attention: Answer) -> None:
    """40 tokens with log decays of −50 or so, and some of nearly 0 among them: finite and right; products
    that underflow are 0"""
    q, k, v, log_decay, state = given(t, 40)
    # Multiples of 1/8, so that sums of them are exact in fp32 and rounding decides nothing.
    log_decay = torch.full_like(log_decay, -50.0)
    if t.round:
        kind = torch.rand(log_decay.shape, generator=t.generator)
        log_decay = torch.where(kind < 0.6, -0.125, torch.where(kind < 0.8, 0.0, log_decay))
    log_decay[:, :, 20:] = torch.minimum(log_decay[:, :, 20:], torch.tensor(-0.125))
    log_decay[:, :, 8:20] = -50.0
    text = (q, k, v, log_decay, state)
    out, last = run(t, decayed_attention, text)
    want = faded(*text)
    t.close(out, want[0], "out:", tolerance=3e-4)
    t.close(last, want[1], "state:", tolerance=3e-4)
