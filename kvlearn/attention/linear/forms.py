"""The forms of a recurrence, and the doors of all of them.

A recurrence goes through its tokens in one of these forms, which give the same numbers:

    parallel     all pairs of tokens at once, masked: quadratic, to be understood, and the inside of a chunk
    recurrent    one token after the other: what a step of decode does
    chunked      chunk after chunk, parallel inside, the state carried across: linear in time and in memory
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from kvlearn import validate

FORMS = ("parallel", "recurrent", "chunked")
Outcome = tuple[Tensor, Tensor]  # outputs (B, H, T, V), and the state (B, H, K, V) behind the last token


def by_form(
    form: str,
    parallel: Callable[..., Outcome],
    recurrent: Callable[..., Outcome],
    inputs: tuple[Tensor, ...],
    state: Tensor,
    chunk: int,
) -> Outcome:
    """A recurrence over ``inputs``, each (B, H, T, …), by the form of this name, in the dtype of ``state``.

    The parallel form is one chunk of all tokens; the chunked form is the parallel one chunk after chunk, each
    handed the state of the one before. The last chunk may be shorter. What a chunk needs for itself lives no
    longer than the chunk (but for gradients), so memory stays linear in T.
    """
    validate.one_of("form", form, FORMS)
    validate.positive("chunk", chunk)
    size, outs = chunk if form == "chunked" else inputs[0].shape[2], []
    with no_autocast(state.device):
        if form == "recurrent":
            return recurrent(*(x.to(state.dtype) for x in inputs), state)
        for pieces in zip(*(x.split(size, dim=2) for x in inputs), strict=True):
            out, state = parallel(*(x.to(state.dtype) for x in pieces), state)
            outs.append(out)
    return torch.cat(outs, dim=2), state


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, products of matrices keep the dtype of their factors: autocast is for projections."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def check_inputs(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> Float[Tensor, "B H K V"]:
    """The door for queries, keys and values; the state as ``check_state`` gives it."""
    validate.tensor("q", q, ("batch", "heads", "time", "features"))
    validate.at_least("q.shape[2] (time)", q.shape[2], 1)
    B, H, T, K = q.shape
    validate.tensor("k", k, (B, H, T, K), dtype=q.dtype, device=q.device)
    validate.tensor("v", v, (B, H, T, "values"), dtype=q.dtype, device=q.device)
    return check_state(state, (B, H, K, v.shape[3]), q)


def check_state(state: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The door for a state: in the dtype of its sums, fp32 or that of ``like``; zeros for None."""
    inside = torch.promote_types(like.dtype, torch.float32)
    if state is None:
        return torch.zeros(shape, dtype=inside, device=like.device)
    validate.tensor("state", state, shape, device=like.device)
    if not state.is_floating_point():
        raise TypeError(f"state: expected a floating-point type, got {state.dtype}")
    return state.to(inside)


def check_log_decay(log_decay: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """The door for decays: logarithms of numbers in (0, 1]."""
    validate.tensor("log_decay", log_decay, shape, device=device)
    if log_decay.device.type == "cpu":  # elsewhere a look at the values would synchronise
        least, most = (float(bound) for bound in log_decay.detach().aminmax())
        if not (-math.inf < least and most <= 0):  # NaN fails too
            raise ValueError(f"log_decay: expected logarithms of decays in (0, 1], got {least} to {most}")


def for_heads(x: Float[Tensor, "B G T K"], n_heads: int) -> Float[Tensor, "B H T K"]:
    """What G groups have, as the H / G neighbouring heads of each see it; with one group a view."""
    return x[:, :, None].expand(-1, -1, n_heads // x.shape[1], -1, -1).flatten(1, 2)
