"""04.7: one decode step over rings of rows that differ in length, held against attention in order of time."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial
from kvlearn.grading.units.sliding_window.given import held, ring_of, same_rings, three

EXERCISE = Exercise(
    id="04.7",
    slug="step",
    title="A decode step over the ring",
    answers=("ring_step",),
    hints=(
        "Write first, then attend: the new token sees itself, and it lies where the token was that has just "
        "left the window. Row b writes to slot lengths[b] % W.",
        "`rows = torch.arange(B); ring_k[rows, :, lengths % W] = k` writes one token for each row, each to "
        "a slot of its own.",
        "After writing, row b holds min(lengths[b] + 1, W) tokens, and until the ring is full these are its "
        "first slots: slot s is filled where s ≤ lengths[b]. Hide the others with −∞, not with zeros.",
        "Without a penalty the order does not matter: a softmax and a sum take the slots as they lie. With "
        "slopes, the token in slot s is (lengths[b] − s) % W tokens old; for a slot that is filled that is "
        "true in every lap.",
    ),
)


class Rows:
    """Rows of a batch that have seen ``lengths`` tokens each, and the one that comes now."""

    def __init__(self, t: Trial, window: int, *lengths: int, penalty: bool = False) -> None:
        H, D = t.pick(5, 6, 7), 16
        self.t, self.window, self.lengths = t, window, torch.tensor(lengths)
        self.q, self.k, self.v = (
            [t.randn(1, H, n + 1, D) for n in lengths] for _ in range(3)
        )  # a row's tokens, the new one last
        self.slopes = torch.rand(H, generator=t.generator) * 0.4 + 0.2 if penalty else None
        self.rings = [
            torch.cat([ring_of(t, x[:, :, :-1], window) for x in rows]) for rows in (self.k, self.v)
        ]

    def run(self, ring_step: Answer) -> tuple[Tensor, Tensor, Tensor]:
        new = (torch.cat([x[:, :, -1] for x in rows]) for rows in (self.q, self.k, self.v))
        given = (*new, *self.rings, self.lengths)
        return three(self.t, ring_step(*given) if self.slopes is None else ring_step(*given, self.slopes))

    def want(self) -> Tensor:
        """Row by row, over the last W tokens, the oldest first."""
        outs = []
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            k, v = k[:, :, -self.window :].double(), v[:, :, -self.window :].double()
            scores = (q[:, :, -1:].double() @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
            if self.slopes is not None:
                ages = torch.arange(k.shape[2]).flip(0)
                scores = scores - self.slopes[None, :, None, None] * ages
            outs.append((scores.softmax(-1) @ v)[:, :, 0].float())
        return torch.cat(outs)

    def compare_out(self, ring_step: Answer) -> None:
        self.t.close(self.run(ring_step)[0], self.want(), "out:", tolerance=1e-3)

    def compare_rings(self, ring_step: Answer) -> None:
        _, ring_k, ring_v = self.run(ring_step)
        filled = torch.tensor([held(int(n) + 1, self.window) for n in self.lengths]) >= 0
        want = [torch.cat([ring_of(self.t, x, self.window) for x in rows]) for rows in (self.k, self.v)]
        same_rings(self.t, (ring_k, ring_v), (want[0], want[1]), filled)


def lap(t: Trial, window: int) -> int:
    """So many tokens that the next one goes into the midst of a full ring."""
    return window * t.integer(1, 4) + t.integer(2, window - 3)


@EXERCISE.requirement(1, "a full ring")
def full(t: Trial, ring_step: Answer) -> None:
    """softmax(q kᵀ / √D) v over the last W tokens, the new one among them: it takes the oldest one's slot"""
    window = t.integer(6, 9)
    n = lap(t, window)
    Rows(t, window, n, n, n).compare_out(ring_step)


@EXERCISE.requirement(1, "a ring that is not full yet")
def filling(t: Trial, ring_step: Answer) -> None:
    """over the tokens so far and the new one; what lies in empty slots counts for nothing; also for the very
    first token, and for the one that fills the last slot"""
    window = t.integer(6, 9)
    for n in (t.integer(2, window - 3), 0, window - 1):
        Rows(t, window, n, n).compare_out(ring_step)


@EXERCISE.requirement(2, "rows of different length")
def different(t: Trial, ring_step: Answer) -> None:
    """each row with its own slot and its own filled slots, full rings beside some that are not"""
    window = t.integer(6, 9)
    first = lap(t, window)
    lengths = [first, t.integer(2, window - 3), first + window + 1, 0]
    t.random.shuffle(lengths)
    Rows(t, window, *lengths).compare_out(ring_step)


@EXERCISE.requirement(1, "the rings afterwards")
def rings(t: Trial, ring_step: Answer) -> None:
    """key and value of the new token in slot length % W of their row, all other tokens where they were"""
    window = t.integer(6, 9)
    first = lap(t, window)
    Rows(t, window, first, t.integer(2, window - 3), first + window + 1).compare_rings(ring_step)


@EXERCISE.requirement(1, "a penalty for distance")
def penalty(t: Trial, ring_step: Answer) -> None:
    """score − slope · distance, the distance in tokens and not in slots"""
    window = t.integer(6, 9)
    Rows(t, window, lap(t, window), t.integer(2, window - 3), penalty=True).compare_out(ring_step)
