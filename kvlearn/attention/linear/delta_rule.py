"""The delta rule: a state that corrects what it holds under a key, in place of adding to it; in three forms.

    S' = a_t S_{t-1},   S_t = S' + β_t k_t (v_t - S'ᵀ k_t)ᵀ,   o_t = S_tᵀ q_t         S: (K, V), one a head

This is online regression: one step of gradient descent, of size β_t, on ½ |Sᵀ k_t - v_t|², for each token.
With |k_t| = 1 and β_t = 1 the state then gives exactly v_t for k_t, whatever it gave before.

A token writes its correction u_t = β_t (v_t - S'ᵀ k_t) where linear attention writes v_t; all else is linear
attention. Corrections depend on those before them, by a triangular system (of a chunk, behind the state S_0):

    (I + A) U = β ⊙ (V - c ⊙ K S_0),   A[t, s] = β_t (k_t·k_s) L[t, s] for s < t,   else 0
    L[t, s] = a_{s+1} ⋯ a_t,   c_t = a_1 ⋯ a_t

Without decay, a = 1, it is DeltaNet's rule; where the token chooses a, Gated DeltaNet's.
Sources: Widrow & Hoff, "Adaptive Switching Circuits" (1960); Schlag et al., "Linear Transformers Are Secretly
Fast Weight Programmers" (2021), section 4.2; Yang et al., "Parallelizing Linear Transformers with the Delta
Rule over Sequence Length" (2024), section 3; Yang et al., "Gated Delta Networks" (2025), section 3.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from kvlearn import validate
from kvlearn.attention.linear.decay import decay_mask
from kvlearn.attention.linear.forms import Outcome, by_form, check_inputs, check_log_decay


def delta_rule(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    beta: Float[Tensor, "B H T"],
    log_decay: Float[Tensor, "B H T"] | None = None,
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    form: str = "chunked",
    chunk: int = 64,
) -> Outcome:
    """Outputs (B, H, T, V) and the last state (B, H, K, V), both in fp32 at least, by one of the forms.

    Nothing is scaled or normalised; keys should be short enough for 0 ≤ β_t |k_t|² ≤ 2, beyond which a step
    makes the error larger and the state may grow without bound. No ``log_decay`` is a decay of 1, no
    ``state`` one of zeros; ``chunk`` need not divide T. Raises ValueError or TypeError for tensors that do
    not fit each other, for a ``beta`` that is not finite, and for decays outside (0, 1].
    """
    state = check_inputs(q, k, v, state)
    check_beta(beta, q.shape[:3], q.device)
    if log_decay is None:
        log_decay = torch.zeros((), device=q.device).expand(q.shape[:3])
    check_log_decay(log_decay, q.shape[:3], q.device)
    return by_form(form, parallel, recurrent, (q, k, v, beta, log_decay), state, chunk)


def check_beta(beta: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """The door for step sizes: finite numbers."""
    validate.tensor("beta", beta, shape, device=device)
    if beta.device.type == "cpu" and not bool(beta.isfinite().all()):  # elsewhere a look would synchronise
        raise ValueError("beta: expected finite numbers, got NaN or infinity among them")


def parallel(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    beta: Float[Tensor, "B H T"],
    log_decay: Float[Tensor, "B H T"],
    state: Float[Tensor, "B H K V"],
) -> Outcome:
    """All pairs at once: the corrections U by one triangular system, then O = (QKᵀ ⊙ L) U + c ⊙ Q S_0."""
    fade, beta = decay_mask(log_decay), beta[..., None]
    kept = log_decay.cumsum(dim=-1).exp()[..., None]
    # The solver takes the diagonal as 1 and does not look at what stands there.
    u = torch.linalg.solve_triangular(
        beta * (k @ k.mT) * fade, beta * (v - kept * (k @ state)), upper=False, unitriangular=True
    )
    out = (q @ k.mT * fade) @ u + kept * (q @ state)
    state = kept[..., -1:, :] * state + (fade[..., -1, :, None] * k).mT @ u
    return out, state


def recurrent(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    beta: Float[Tensor, "B H T"],
    log_decay: Float[Tensor, "B H T"],
    state: Float[Tensor, "B H K V"],
) -> Outcome:
    """One token after the other: fade, compare, correct, read."""
    inputs = (q, k, v, beta[..., None], log_decay.exp()[..., None])
    outs = []
    for q_t, k_t, v_t, beta_t, a_t in zip(*(x.split(1, dim=2) for x in inputs), strict=True):
        faded = a_t * state
        state = faded + k_t.mT * (beta_t * (v_t - k_t @ faded))
        outs.append(q_t @ state)
    return torch.cat(outs, dim=2), state
