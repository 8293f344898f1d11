"""The delta rule with every part free: a decay for each feature, and a removal of rank one.

    S_t = diag(a_t) S_{t-1} + p_t (r_tᵀ S_{t-1}) + k_t v_tᵀ,   o_t = S_tᵀ q_t         S: (K, V), one a head

The probe r reads what the old state holds, and p writes it again, mostly to take it away: with r = a ⊙ k and
p = -β k, and β k as the key, it is Kimi's delta attention; with r = κ and p = -η ⊙ κ it is RWKV-7.
Sources: Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution" (2025); Kimi Team, "Kimi Linear"
(2025). The triangular system is that of Yang et al., "Parallelizing Linear Transformers with the Delta Rule
over Sequence Length" (2024), section 3.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvlearn import validate
from kvlearn.attention.linear.channel_decay import after, faded_products
from kvlearn.attention.linear.forms import Outcome, by_form, check_inputs, check_log_decay


def generalised_delta_rule(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    probe: Float[Tensor, "B H T K"],
    rewrite: Float[Tensor, "B H T K"],
    log_decay: Float[Tensor, "B H T K"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    form: str = "chunked",
    chunk: int = 32,
) -> Outcome:
    """Outputs (B, H, T, V) and the last state (B, H, K, V), both in fp32 at least, by one of the forms.

    ``probe`` is r, ``rewrite`` is p, ``log_decay`` is log a. Nothing is scaled or normalised: whether the
    state stays bounded is up to the caller. Raises ValueError or TypeError for tensors that do not fit each
    other, and for decays outside (0, 1].
    """
    state = check_inputs(q, k, v, state)
    for name, x in (("probe", probe), ("rewrite", rewrite)):
        validate.tensor(name, x, q.shape, dtype=q.dtype, device=q.device)
    check_log_decay(log_decay, q.shape, q.device)
    inputs = (q, k, v, probe, rewrite, log_decay)
    return by_form(form, parallel, recurrent, inputs, state, chunk)


def parallel(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    probe: Float[Tensor, "B H T K"],
    rewrite: Float[Tensor, "B H T K"],
    log_decay: Float[Tensor, "B H T K"],
    state: Float[Tensor, "B H K V"],
) -> Outcome:
    """All pairs at once, once it is known what the probes find, z_t = S_{t-1}ᵀ r_t.

        S_t = (a_1 ⋯ a_t) ⊙ S_0 + Σ_{s≤t} (a_{s+1} ⋯ a_t) ⊙ (k_s v_sᵀ + p_s z_sᵀ)

    Put into z this is a linear system, z_t = … + Σ_{s<t} (…) z_s: triangular, with ones on its diagonal.
    """
    # The state that a probe reads is the one that the query before it reads: after a shift both fade alike.
    reads = torch.stack((q, F.pad(probe[:, :, 1:], (0, 0, 0, 1))), dim=2)
    writes = torch.stack((k, rewrite), dim=2)
    reads, writes = torch.broadcast_tensors(reads[:, :, :, None], writes[:, :, None])
    scores = faded_products(reads, writes, log_decay[:, :, None, None])
    (by_key, by_rewrite), (probe_key, probe_rewrite) = (x.unbind(2) for x in scores.unbind(2))
    probe_key, probe_rewrite = (F.pad(x[:, :, :-1], (0, 0, 1, 0)) for x in (probe_key, probe_rewrite))

    from_start = log_decay.cumsum(dim=2)
    before = F.pad(from_start[:, :, :-1], (0, 0, 1, 0))
    known = probe_key @ v + (before.exp() * probe) @ state
    # (I - A) z = known: the solver takes the diagonal for ones and does not look above it.
    found = torch.linalg.solve_triangular(-probe_rewrite, known, upper=False, unitriangular=True)
    out = by_key @ v + by_rewrite @ found + (from_start.exp() * q) @ state
    until_last = after(log_decay).exp()
    state = from_start[:, :, -1, :, None].exp() * state
    return out, state + (until_last * k).mT @ v + (until_last * rewrite).mT @ found


def recurrent(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    probe: Float[Tensor, "B H T K"],
    rewrite: Float[Tensor, "B H T K"],
    log_decay: Float[Tensor, "B H T K"],
    state: Float[Tensor, "B H K V"],
) -> Outcome:
    """One token after the other: probe, fade, rewrite, write, read."""
    decay, outs = log_decay.exp(), []
    for t in range(q.shape[2]):
        found = probe[:, :, t, None] @ state
        state = decay[:, :, t, :, None] * state + rewrite[:, :, t, :, None] * found
        state = state + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append(q[:, :, t, None] @ state)
    return torch.cat(outs, dim=2), state
