"""06.4: the mistakes that people make with a decay: what it falls on, and how products of many are made."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvlearn.grading.units.linear_attention.decay import EXERCISE
from kvlearn.grading.units.linear_attention.features import nearby
from kvlearn.grading.units.linear_attention.given import outer

__all__ = ["EXERCISE", "Outs", "plain", "turns"]

Outs = tuple[Tensor, Tensor]
Turn = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def turns(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, turn: Turn) -> Outs:
    """One token after the other; ``turn`` makes of (q, a, what is written, state) what is read, and the new
    state."""
    outs = []
    for i in range(q.shape[2]):
        wrote = outer(k[:, :, i], v[:, :, i])
        memory, state = turn(q[:, :, i], decay[:, :, i, None, None], wrote, state)
        outs.append((q[:, :, i, None] @ memory)[:, :, 0])
    return torch.stack(outs, 2), state


def plain(q: Tensor, a: Tensor, wrote: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    state = a * state + wrote
    return state, state


@EXERCISE.misconception("the new token decays as well")
def new_one_too(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The token was written, and then everything faded, the token itself as well: a_t (S + k vᵀ). In the
    matrix that is a_s ⋯ a_t with a factor too many. The decay of t falls on what was there before t: fade,
    then write."""

    def turn(q: Tensor, a: Tensor, wrote: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = a * (state + wrote)
        return state, state

    return turns(q, k, v, log_decay.exp(), state, turn)


@EXERCISE.misconception("faded after the read")
def after_read(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The token reads a state that has not faded yet, and its decay falls on it afterwards: all products are
    one place off, a_s ⋯ a_{t−1} in place of a_{s+1} ⋯ a_t. The order is: fade, write, read."""
    return turns(
        q, k, v, log_decay.exp(), state, lambda q, a, wrote, state: (state + wrote, a * (state + wrote))
    )


@EXERCISE.misconception("read before it is written")
def before_write(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The state was read before the new token was in it (or the diagonal of the pairs was hidden), so no
    token sees itself. Fade, write, read."""
    return turns(q, k, v, log_decay.exp(), state, lambda q, a, wrote, state: (a * state, a * state + wrote))


@EXERCISE.misconception("the old state read")
def old_state(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """Each token reads the state as the one before it left it, neither faded nor written to. Fade, write,
    read."""
    return turns(q, k, v, log_decay.exp(), state, lambda q, a, wrote, state: (state, a * state + wrote))


@EXERCISE.misconception("exp forgotten")
def no_exp(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The logarithms were used as factors. They are negative: every token turned the sign of the state. The
    decay is exp(log_decay), between 0 and 1."""
    return turns(q, k, v, log_decay, state, plain)


@EXERCISE.misconception("growth in place of decay")
def growth(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The factor was exp(−log_decay), more than 1: the state grows with every token, and overflows. The
    logarithms are negative already."""
    return turns(q, k, v, (-log_decay).exp(), state, plain)


@EXERCISE.misconception("no decay")
def none(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """Nothing fades: log_decay plays no part. S_t = a_t S_{t−1} + k_t v_tᵀ."""
    return turns(q, k, v, torch.ones_like(log_decay), state, plain)


@EXERCISE.misconception("the new token weighed with 1 − a")
def mixed(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The token was written with the factor 1 − a, as in a running mean. Some designs do that (HGRN, for
    one); this recurrence writes the token as it is."""

    def turn(q: Tensor, a: Tensor, wrote: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = a * state + (1 - a) * wrote
        return state, state

    return turns(q, k, v, log_decay.exp(), state, turn)


@EXERCISE.misconception("1 − a in place of a")
def complement(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The state was multiplied by 1 − a: what should be kept is thrown away, and the other way round. a is
    what remains."""
    return turns(q, k, v, 1 - log_decay.exp(), state, plain)


@EXERCISE.misconception("decays one place late")
def one_place_late(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """In each step the decay of the token *before* was used, and none in the first: the sums of logarithms
    were shifted by one (or made without their own term). What token t finds fades by a_t."""
    late = torch.cat((torch.zeros_like(log_decay[..., :1]), log_decay[..., :-1]), -1)
    return turns(q, k, v, late.exp(), state, plain)


@EXERCISE.misconception("a scale that was not asked for")
def scaled(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """Queries were divided by √K. Nothing is scaled here: out = Sᵀq."""
    return turns(q * q.shape[-1] ** -0.5, k, v, log_decay.exp(), state, plain)


@EXERCISE.misconception("a feature map that was not asked for")
def features(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """φ was applied to queries and keys. Here they are taken as they come."""
    return turns(nearby(q), nearby(k), v, log_decay.exp(), state, plain)


@EXERCISE.misconception("the state came back as it was")
def state_not_returned(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The outputs are right, but the state that came back is the one that was handed in: the text that goes
    on would know nothing of these tokens. Return the state behind the last of them."""
    return turns(q, k, v, log_decay.exp(), state, plain)[0], state


@EXERCISE.misconception("(V, K) returned")
def returned_transposed(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Outs:
    """The outputs are right, but the state came back transposed. It is (B, H, K, V), as it was handed in."""
    out, state = turns(q, k, v, log_decay.exp(), state, plain)
    return out, state.mT
