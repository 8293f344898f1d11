"""04.3: a chunk that goes over the edge of the window, held against attention token by token."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial
from kvlearn.grading.units.sliding_window.given import held, ring_of, same_rings, three, windowed

EXERCISE = Exercise(
    id="04.3",
    slug="prefill",
    title="Prefill over the edge of the window",
    answers=("window_prefill",),
    hints=(
        "Attend first, write afterwards. The chunk's first token still needs keys that its last token will "
        "write over, so nothing may be dropped before all have attended.",
        "Which tokens are in the ring? The positions max(0, start − W) … start − 1. Position p lies in slot "
        "p % W, so `ring_k[:, :, torch.arange(max(0, start - W), start) % W]` brings them into the order of "
        "time, and leaves the empty slots out.",
        "Put the chunk behind them: keys at positions max(0, start − W) … start + T − 1, in order. Key and "
        "query positions give the mask of 04.1, (T, number of keys).",
        "Afterwards only the chunk's last min(T, W) tokens go into the ring, each to its own slot: those at "
        "positions `torch.arange(start + T - n, start + T)` with n = min(T, W), at `% W`.",
    ),
)


class Sequence:
    """Tokens of which the first ``start`` are past and the rest is the chunk."""

    def __init__(self, t: Trial, start: int, T: int, window: int) -> None:
        B, H, D = t.pick(2, 3), t.pick(5, 7), 16
        self.t, self.start, self.window, self.n = t, start, window, start + T
        self.q, self.k, self.v = (t.randn(B, H, self.n, D) for _ in range(3))
        self.rings = [ring_of(t, x[:, :, :start], window) for x in (self.k, self.v)]

    def run(self, window_prefill: Answer) -> tuple[Tensor, Tensor, Tensor]:
        new = (x[:, :, self.start :] for x in (self.q, self.k, self.v))
        return three(self.t, window_prefill(*new, *self.rings, self.start))

    def compare_out(self, window_prefill: Answer) -> None:
        out, _, _ = self.run(window_prefill)
        want = windowed(self.q[:, :, self.start :], self.k, self.v, self.window, self.start)
        self.t.close(out, want, "out:", tolerance=1e-3)

    def compare_rings(self, window_prefill: Answer) -> None:
        _, *rings = self.run(window_prefill)
        filled = torch.tensor(held(self.n, self.window))[None] >= 0
        want = [ring_of(self.t, x, self.window) for x in (self.k, self.v)]
        same_rings(self.t, (rings[0], rings[1]), (want[0], want[1]), filled)


@EXERCISE.requirement(1, "a short prompt, T ≤ W")
def short(t: Trial, window_prefill: Answer) -> None:
    """out of an empty ring: each token sees itself and all before it; what lies in empty slots counts for
    nothing"""
    window = t.integer(5, 8)
    Sequence(t, 0, window if t.round == 0 else t.integer(2, window - 1), window).compare_out(window_prefill)


@EXERCISE.requirement(1, "a prompt longer than the window")
def long_prompt(t: Trial, window_prefill: Answer) -> None:
    """out of an empty ring, T > W: each token sees its own last W, the early ones too"""
    window = t.integer(4, 6)
    Sequence(t, 0, window + t.integer(3, 9), window).compare_out(window_prefill)


@EXERCISE.requirement(1, "a chunk behind a past, T ≤ W")
def chunk(t: Trial, window_prefill: Answer) -> None:
    """out behind a ring that has turned, and behind one that is not full yet; also for a single token"""
    window = t.integer(5, 8)
    T = 1 if t.round == 1 else t.integer(3, window)
    for start in (window * t.integer(1, 3) + t.integer(2, window - 2), t.integer(2, window - 2)):
        Sequence(t, start, T, window).compare_out(window_prefill)


@EXERCISE.requirement(2, "a chunk longer than the window, behind a past")
def long_chunk(t: Trial, window_prefill: Answer) -> None:
    """out for T > W: the first tokens see the ring, the last ones see the chunk alone"""
    window = t.integer(4, 6)
    start = window * t.integer(1, 3) + t.integer(2, window - 2)
    Sequence(t, start, window + t.integer(2, 7), window).compare_out(window_prefill)


@EXERCISE.requirement(1, "the ring afterwards")
def ring(t: Trial, window_prefill: Answer) -> None:
    """the last W tokens of all, keys and values, each in slot p % W; after short and long chunks"""
    window = t.integer(5, 7)
    start = window * t.integer(1, 3) + t.integer(2, window - 2)
    rest = t.pick(*(n for n in range(1, window) if (start + n) % window))
    for before, T in (
        (0, t.integer(2, window - 1)),
        (start, t.integer(3, window - 1)),
        (start, window + rest),
    ):
        Sequence(t, before, T, window).compare_rings(window_prefill)
