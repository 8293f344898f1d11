"""The state as a sum of written keys and values that fades, in three forms: no decay, or a scalar one.

    S_t = a_t S_{t-1} + k_t v_tᵀ,   o_t = S_tᵀ q_t            S: (K, V), one matrix a head
    o_t = Σ_{s ≤ t} (a_{s+1} ⋯ a_t) (q_t · k_s) v_s           the same, unrolled

Without decay, a = 1, it is linear attention; a constant a of each head is retention; where the token chooses
a, it is Mamba-2. Decays come as logarithms: products of many become sums, and nothing underflows.
Sources: Katharopoulos et al., "Transformers are RNNs" (2020), equations 9 to 12 and 16 to 20; Sun et al.,
"Retentive Network" (2023), equations 5 to 7; Dao & Gu, "Transformers are SSMs" (2024), sections 3 and 6.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from kvlearn.attention.linear.forms import Outcome, by_form, check_inputs, check_log_decay


def linear_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T"] | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    form: str = "chunked",
    chunk: int = 64,
) -> Outcome:
    """Outputs (B, H, T, V) and the last state (B, H, K, V), both in fp32 at least, by one of the forms.

    Nothing is scaled or normalised. No ``log_decay`` is a decay of 1, no ``state`` one of zeros; ``chunk``
    need not divide T. Raises ValueError or TypeError for tensors that do not fit each other, and for decays
    outside (0, 1].
    """
    state = check_inputs(q, k, v, state)
    if log_decay is None:
        ones = torch.zeros((), dtype=state.dtype, device=q.device).expand(q.shape[:3])  # their logarithms
        return by_form(form, parallel_unfaded, recurrent, (q, k, v, ones), state, chunk)
    check_log_decay(log_decay, q.shape[:3], q.device)
    return by_form(form, parallel, recurrent, (q, k, v, log_decay), state, chunk)


def parallel(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T"],
    state: Float[Tensor, "B H K V"],
) -> Outcome:
    """All pairs at once: O = (QKᵀ ⊙ L) V + what ``state`` still gives, with L of ``decay_mask``."""
    fade = decay_mask(log_decay)
    since_start = log_decay.cumsum(dim=-1).exp()[..., None]
    out = (q @ k.mT * fade) @ v + since_start * (q @ state)
    state = since_start[:, :, -1:] * state + (fade[:, :, -1, :, None] * k).mT @ v
    return out, state


def decay_mask(log_decay: Float[Tensor, "B H T"]) -> Float[Tensor, "B H T T"]:
    """L[t, s] = a_{s+1} ⋯ a_t for s ≤ t, and 0 above the diagonal.

    Summed for every s from s + 1 on: a difference of two sums from the start would lose a weak decay behind a
    strong one, and overflow in exp above the diagonal.
    """
    rows = log_decay[..., None].expand(*log_decay.shape, log_decay.shape[-1])
    return rows.tril(-1).cumsum(dim=-2).exp().tril()


def parallel_unfaded(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T"],
    state: Float[Tensor, "B H K V"],
) -> Outcome:
    """``parallel`` where every decay is 1: L is a mask."""
    return (q @ k.mT).tril() @ v + q @ state, state + k.mT @ v


def recurrent(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T"],
    state: Float[Tensor, "B H K V"],
) -> Outcome:
    """One token after the other: fade, write, read."""
    decay, outs = log_decay.exp(), []
    for t in range(q.shape[2]):
        state = decay[:, :, t, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append(q[:, :, t, None] @ state)
    return torch.cat(outs, dim=2), state
