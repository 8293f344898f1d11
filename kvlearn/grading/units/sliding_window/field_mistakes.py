"""04.5: the mistakes that people make when they count how far a stack of windows reaches."""

import math
from typing import Any

from kvlearn.grading.units.sliding_window.field import EXERCISE, Windows, least_layers, reachable

__all__ = ["EXERCISE"]

REACH: dict[str, Any] = {"layers_needed": least_layers}
LAYERS: dict[str, Any] = {"reach": reachable}


def reached(position: int, windows: Windows, n_sinks: int, back: int) -> list[int]:
    """The right list, but for how far ``back`` windows alone reach."""
    back = position if None in windows else back
    sinks = min(n_sinks, position + 1) if windows else 0
    return sorted({*range(sinks), *range(max(0, position - back), position + 1)})


def steps(windows: Windows) -> list[int]:
    return [window - 1 for window in windows if window is not None]


@EXERCISE.misconception("each layer reaches W further: L·W", **REACH)
def times_window(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """Every layer was said to reach W tokens further back. The window counts the token itself, so it reaches
    W − 1 back, and L layers L·(W − 1). Mistral's "about 131K" for 32 layers of 4096 is this rounding up: it
    is 131,041 tokens, the token itself included."""
    return reached(position, windows, n_sinks, sum(steps(windows)) + len(steps(windows)))


@EXERCISE.misconception("L·W tokens in all", **REACH)
def times_window_in_all(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """L·W tokens were counted, the token itself among them. It is in the window of every layer, but it is the
    same token: L·(W − 1) others, and itself once."""
    return reached(position, windows, n_sinks, max(sum(steps(windows)) + len(steps(windows)) - 1, 0))


@EXERCISE.misconception("the first one left out", **REACH)
def one_short(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """The farthest position is missing: the list begins one too late. At distance Σ(W − 1) a token is still
    reached; with the token itself these are Σ(W − 1) + 1 positions."""
    return reached(position, windows, n_sinks, max(sum(steps(windows)) - 1, 0))


@EXERCISE.misconception("one layer's window only", **REACH)
def one_window(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """This is what the token reads in one layer. What it reads there has itself read others, in the layer
    below: the windows add up over the layers."""
    return reached(position, windows, n_sinks, steps(windows)[-1] if steps(windows) else 0)


@EXERCISE.misconception("the widest window only", **REACH)
def widest(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """The largest window of all layers was taken. It is one step of the way; the other layers go on from
    where it arrives, so the windows add up."""
    return reached(position, windows, n_sinks, max(steps(windows), default=0))


@EXERCISE.misconception("W − 1 halved: the middle of the window", **REACH)
def halved(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """Half of each window was counted, as for a window that is centred on its token. A decoder's window lies
    behind the token as a whole."""
    return reached(position, windows, n_sinks, sum(step // 2 for step in steps(windows)))


@EXERCISE.misconception("positions before 0", **REACH)
def negative(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """The list goes below position 0, where there is nothing. Near the start a token reaches all there is:
    `max(0, …)`."""
    back = position if None in windows else sum(steps(windows))
    sinks = range(min(n_sinks, position + 1)) if windows else range(0)
    return sorted({*sinks, *range(position - back, position + 1)})


@EXERCISE.misconception("the token itself left out", **REACH)
def without_self(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """A `range` ends before its second number, and so the token itself is missing. Nothing has more influence
    on it: even without any layer it is there."""
    return reachable(position, windows, n_sinks)[:-1]


@EXERCISE.misconception("full layers not counted", **REACH)
def full_ignored(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """The layers without a window were left out of the sum, as if they reached nothing. None means no window:
    such a layer reads everything up to the token."""
    return reachable(position, [window for window in windows if window is not None], n_sinks)


@EXERCISE.misconception("only a full layer at the top counts", **REACH)
def only_top(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """A full layer was taken to help only if it is the last one. Further down it has collected everything for
    the tokens that the layers above it read, so the top token gets it all the same."""
    return reachable(position, [w for i, w in enumerate(windows) if w or i == len(windows) - 1], n_sinks)


@EXERCISE.misconception("only a full layer at the bottom counts", **REACH)
def only_bottom(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """A full layer was taken to help only if it is the first one. Higher up it reads positions that no window
    would reach, each of which knows itself at least."""
    return reachable(position, [w for i, w in enumerate(windows) if w or i == 0], n_sinks)


@EXERCISE.misconception("a full layer reaches everything, the future too", **REACH)
def full_future(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """With a full layer the list ran past the token itself. Full attention is causal as well: a token reads
    up to itself, in every layer."""
    ahead = windows.count(None) and len(windows)
    return [*reachable(position, windows, n_sinks), *range(position + 1, position + 1 + ahead)]


@EXERCISE.misconception("sinks not counted", **REACH)
def no_sinks(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """n_sinks was not looked at. The first n_sinks tokens are read from every position, however far it is."""
    return reachable(position, windows)


@EXERCISE.misconception("sinks fill the gap", **REACH)
def gap_filled(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """With sinks everything was said to be reached. The sinks themselves are; but a sink has seen only what
    lies before it, so nothing of the gap comes through it. That is why sinks keep perplexity low and help no
    model to recall what left the window."""
    return list(range(position + 1)) if n_sinks and windows else reachable(position, windows)


@EXERCISE.misconception("sinks make every window longer", **REACH)
def longer_windows(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """n_sinks was added to the windows. Sinks are more keys, but always the same ones at the very beginning:
    they do not move along, and the windows reach as far as before."""
    return reachable(position, [w and w + n_sinks for w in windows])


@EXERCISE.misconception("new sinks in every layer", **REACH)
def sinks_add_up(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """L·n_sinks first positions. Every layer keeps the *same* first tokens, so they do not add up as windows
    do."""
    return reachable(position, windows, n_sinks * len(windows))


@EXERCISE.misconception("sinks after the token", **REACH)
def sinks_ahead(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """All n_sinks first positions were listed for a token that stands before some of them. What can have an
    influence on a token ends at the token."""
    return sorted({*(range(n_sinks) if windows else ()), *reachable(position, windows)})


@EXERCISE.misconception("each layer carries W", **LAYERS)
def by_window(distance: int, window: int) -> int | None:
    """The distance was divided by W. The token itself is one of the W, so a layer carries W − 1 further: over
    131,071 tokens 32 layers of 4096 seem to be enough, and it takes 33."""
    return None if window == 1 and distance else math.ceil(distance / window)


@EXERCISE.misconception("rounded down", **LAYERS)
def rounded_down(distance: int, window: int) -> int | None:
    """So many layers stop short of it: the division was rounded down. A rest, however small, needs one layer
    more."""
    return least_layers(distance, window) if window == 1 else distance // (window - 1)


@EXERCISE.misconception("one layer more even without a rest", **LAYERS)
def always_one_more(distance: int, window: int) -> int | None:
    """`distance // (W − 1) + 1` adds a layer where the division comes out even, and one for distance 0. (So
    does counting distance + 1 tokens.) Round up: `-(-distance // (W - 1))`."""
    return None if window == 1 and distance else distance // max(window - 1, 1) + 1


@EXERCISE.misconception("windows that multiply", **LAYERS)
def in_powers(distance: int, window: int) -> int | None:
    """The reach was taken to multiply from layer to layer, W, W², W³ … It does so in dilated convolutions,
    whose steps grow. Windows of equal width add up."""
    if window == 1:
        return least_layers(distance, window)
    layers = 0
    while window**layers - 1 < distance:
        layers += 1
    return layers


@EXERCISE.misconception("W = 1 reaches further", **LAYERS)
def window_of_one(distance: int, window: int) -> int | None:
    """With W = 1 a number came back. Such a window holds the token itself and nothing else, in every layer,
    so nothing ever arrives from elsewhere: None."""
    return least_layers(distance, max(window, 2))


@EXERCISE.misconception("not rounded to whole layers", **LAYERS)
def fraction(distance: int, window: int) -> float | None:
    """The quotient came back as it is, 5.1 layers or so. There is no tenth of a layer: round up to a whole
    number."""
    return least_layers(distance, window) if window == 1 else distance / (window - 1)


@EXERCISE.misconception("one layer even for distance 0", **LAYERS)
def at_least_one(distance: int, window: int) -> int | None:
    """At least one layer was asked for. Over distance 0 there is nothing to carry: a token has an influence
    on itself without any."""
    return None if window == 1 and distance else max(1, least_layers(distance, window) or 0)


@EXERCISE.misconception("W = 1: None for distance 0 too", **LAYERS)
def none_for_itself(distance: int, window: int) -> int | None:
    """With W = 1 None was returned whatever the distance. A window of one does hold the token itself, so
    distance 0 needs no layer here either: ask for the distance first."""
    return None if window == 1 else least_layers(distance, window)


@EXERCISE.misconception("the newest first", **REACH)
def descending(position: int, windows: Windows, n_sinks: int = 0) -> list[int]:
    """The right positions, counted back from the token. Asked for is the other order, ascending."""
    return reachable(position, windows, n_sinks)[::-1]
