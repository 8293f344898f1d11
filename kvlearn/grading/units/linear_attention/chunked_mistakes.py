"""06.3: the mistakes that people make with chunks, and with the state that goes across."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvlearn.grading.units.linear_attention.chunked import EXERCISE

__all__ = ["EXERCISE", "Outs", "chunks", "empty", "own"]

Outs = tuple[Tensor, Tensor]


def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the own chunk gives, up to the token itself."""
    return (q @ k.mT).tril() @ v


def nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.zeros_like(v)


def empty(k: Tensor, v: Tensor) -> Tensor:
    return k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])


def chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: int,
    inside: Callable[[Tensor, Tensor, Tensor], Tensor] = own,
    carried: bool = True,
    keep: float = 1.0,
    written_first: bool = False,
) -> Outs:
    """The chunked form, with a part of it changed."""
    state, outs = empty(k, v), []
    for a, b, c in zip(q.split(chunk, 2), k.split(chunk, 2), v.split(chunk, 2), strict=True):
        after = keep * state + b.mT @ c
        past = after if written_first else state
        outs.append(inside(a, b, c) + (a @ past if carried else 0))
        state = after
    return torch.cat(outs, 2), state


@EXERCISE.misconception("the state dropped at the boundary")
def dropped(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """Each chunk was worked out for itself, and what the earlier ones left was not read: a token at the
    beginning of a chunk knows nothing of the past. Add q @ state to what the own chunk gives."""
    return chunks(q, k, v, chunk, carried=False)


@EXERCISE.misconception("the state starts anew with every chunk")
def reset(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The state was set to zeros at the beginning of each chunk, so nothing goes across, and what is returned
    knows the last chunk alone. Make the zeros once, before the loop."""
    out, _ = chunks(q, k, v, chunk, carried=False)
    return out, chunks(q, k, v, chunk, keep=0)[1]


@EXERCISE.misconception("only the chunk before")
def last_only(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The state was replaced by that of the last chunk, kᵀv, in place of being added to. A token sees its own
    chunk and the one before, and no further: a window, not a memory. state = state + kᵀv."""
    return chunks(q, k, v, chunk, keep=0)


@EXERCISE.misconception("the own chunk counted twice")
def twice(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The state was updated before it was read, so the own chunk is in it as well as in the masked part: its
    tokens count twice, and those after the query count too. Read the state first, then write the chunk."""
    return chunks(q, k, v, chunk, written_first=True)


@EXERCISE.misconception("a token sees its whole chunk")
def not_causal(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """Inside a chunk every token sees every other, later ones as well: the mask is missing, or the outputs
    were read from the state behind the chunk, which holds all of it. The state is right at the boundaries
    only; inside, a product with zeros above the diagonal says who sees whom."""
    return chunks(q, k, v, chunk, inside=lambda a, b, c: a @ b.mT @ c)


@EXERCISE.misconception("the own chunk left out")
def past_alone(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The outputs come from the state before the chunk alone: no token sees its own chunk, not even itself.
    The masked product inside the chunk belongs to it."""
    return chunks(q, k, v, chunk, inside=nothing)


@EXERCISE.misconception("a token does not see itself")
def not_itself(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The diagonal was hidden as well. A token sees the tokens of its chunk up to itself, s ≤ t:
    `tril()`, not `tril(-1)`."""
    return chunks(q, k, v, chunk, inside=lambda a, b, c: (a @ b.mT).tril(-1) @ c)


@EXERCISE.misconception("the mask upside down")
def upside_down(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The upper half was kept: inside a chunk each token sees itself and what comes *after* it. Queries go
    down, keys across; the past is below the diagonal."""
    return chunks(q, k, v, chunk, inside=lambda a, b, c: (a @ b.mT).triu() @ c)


@EXERCISE.misconception("a softmax inside the chunk")
def softmax_inside(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The own chunk went through a softmax, and the state did not: two different sums in one output. There
    is no softmax here; the products q·k are the weights."""

    def inside(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        hidden = torch.ones(a.shape[2], a.shape[2], dtype=torch.bool).triu(1)
        return (a @ b.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ c

    return chunks(q, k, v, chunk, inside=inside)


@EXERCISE.misconception("a scale inside the chunk alone")
def scaled_inside(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The products inside the chunk were divided by √K, and what comes from the state was not. Here nothing
    is scaled; whoever scales does it once, to q, before both."""
    return chunks(q, k, v, chunk, inside=lambda a, b, c: own(a, b, c) * a.shape[-1] ** -0.5)


@EXERCISE.misconception("a scale that was not asked for")
def scaled(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """Queries were divided by √K. Nothing is scaled here: the output is Σ (q·k) v."""
    return chunks(q * q.shape[-1] ** -0.5, k, v, chunk)
