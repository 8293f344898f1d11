"""04.5: which tokens can have an influence, held against a walk from layer to layer."""

from typing import Any

import torch

from kvlearn.grading.compare import describe
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial
from kvlearn.grading.units.sliding_window.given import whole_numbers

EXERCISE = Exercise(
    id="04.5",
    slug="field",
    title="How far back a stack of windows reaches",
    answers=("reach", "layers_needed"),
    hints=(
        "Walk down from the top. The token at t reads, in the last layer, positions t − W + 1 … t. Each of "
        "those has read W − 1 further back in the layer below. So every layer adds W − 1, not W.",
        "The first position is t − Σ(W − 1), cut off at 0. One full layer anywhere reaches everything: what "
        "is read through it comes from all positions up to the reader's own.",
        "A sink is seen from everywhere behind it, in every layer. But what the sink itself has seen lies at "
        "or before it, so sinks add the first n_sinks positions and nothing of the gap.",
        "layers_needed is the division that is rounded up: the least L with L · (W − 1) ≥ distance, `-(-"
        "distance // (window - 1))`. With W = 1 no number of layers is enough, but for distance 0.",
    ),
)

Windows = list[int | None]


def reachable(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """Down from the top, layer by layer: all that any of the positions so far reads."""
    reached = {position}
    for window in reversed(windows):
        below = set()
        for reader in reached:
            for p in range(reader + 1):
                if window is None or reader - p < window or p < n_sinks:
                    below.add(p)
        reached = below
    return sorted(reached)


def least_layers(distance: int, window: int) -> int | None:
    """Layers are added until it is reached."""
    if distance and window == 1:
        return None
    layers, far = 0, 0
    while far < distance:
        layers, far = layers + 1, far + window - 1
    return layers


def same_reach(t: Trial, got: Any, want: list[int]) -> None:
    """Whole numbers, ascending."""
    numbers = whole_numbers(got)
    if numbers is None:
        t.true(False, "a list of positions, ascending", describe(got))
        raise Stop
    t.close(torch.tensor(numbers, dtype=torch.int64), torch.tensor(want), "the positions:")


@EXERCISE.requirement(1, "reach: equal windows")
def equal(t: Trial, reach: Answer, layers_needed: Answer) -> None:
    """L layers of window W: L·(W − 1) + 1 positions, the last of them the token itself"""
    n_layers, window = t.integer(3, 5), t.integer(3, 6)
    position = n_layers * window + window**2 + t.integer(5, 20)
    windows: Windows = [window] * n_layers
    same_reach(t, reach(position, windows), reachable(position, windows))


@EXERCISE.requirement(1, "reach: other windows, and near the start")
def mixed(t: Trial, reach: Answer, layers_needed: Answer) -> None:
    """windows that differ from layer to layer add up; nothing lies before position 0; W = 1 adds nothing"""
    windows: Windows = [t.integer(2, 5), t.integer(6, 9), 1, t.integer(3, 4)]
    t.random.shuffle(windows)
    for position in (sum(w or 0 for w in windows) + t.integer(10, 90), t.integer(2, 5)):
        same_reach(t, reach(position, windows), reachable(position, windows))


@EXERCISE.requirement(1, "reach: windows and full layers")
def full(t: Trial, reach: Answer, layers_needed: Answer) -> None:
    """one full layer (None), wherever it stands, and every position up to the token's own is reached"""
    window = t.integer(3, 5)
    n_layers = t.integer(4, 6)
    middle = t.integer(1, n_layers - 2)
    for place in (n_layers - 1, 0, middle):
        windows: Windows = [window] * n_layers
        windows[place] = None
        position = n_layers * window + t.integer(5, 30)
        same_reach(t, reach(position, windows), reachable(position, windows))


@EXERCISE.requirement(1, "reach: with sinks")
def sinks(t: Trial, reach: Answer, layers_needed: Answer) -> None:
    """the first n_sinks positions and the stack's own reach, the gap between them stays; nothing after the
    token"""
    n_layers, window, n_sinks = t.integer(3, 4), t.integer(3, 5), t.integer(2, 4)
    windows: Windows = [window] * n_layers
    for position in (n_layers * (window + n_sinks) + n_sinks + t.integer(9, 30), t.integer(0, n_sinks - 2)):
        same_reach(t, reach(position, windows, n_sinks), reachable(position, windows, n_sinks))


@EXERCISE.requirement(1, "layers_needed")
def needed(t: Trial, reach: Answer, layers_needed: Answer) -> None:
    """the least number of layers of window W that carry something over the distance; an exact multiple of W −
    1 needs no layer more"""
    window = t.integer(4, 64)
    layers = t.integer(3, window - 1 if window < 9 else 9)
    for distance in (layers * (window - 1), layers * (window - 1) + 1, (layers + 1) * (window - 1) - 1):
        t.number(layers_needed(distance, window), least_layers(distance, window) or 0, f"over {distance}:")
    t.number(layers_needed(131_071, 4096), 33, "over 131,071 by windows of 4096:")


@EXERCISE.requirement(1, "the limits")
def limits(t: Trial, reach: Answer, layers_needed: Answer) -> None:
    """no layer, or W = 1 in all: the token itself alone; distance 0 needs no layer, and with W = 1 any other
    is never reached: None"""
    position = t.integer(3, 30)
    for windows in ([], [1] * t.integer(2, 4)):
        same_reach(t, reach(position, windows), [position])
    for window in (t.integer(2, 9), 1):
        t.number(layers_needed(0, window), 0, f"over 0 by windows of {window}:")
    got = layers_needed(position, 1)
    t.true(got is None, f"None over {position} by windows of 1", "None" if got is None else describe(got))
