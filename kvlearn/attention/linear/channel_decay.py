"""The state as a sum that fades, each key channel at a speed of its own: the core of gated linear attention.

    S_t = diag(a_t) S_{t-1} + k_t v_tᵀ,   o_t = S_tᵀ q_t              S: (K, V), a_t: K numbers in (0, 1]
    o_t = Σ_{s ≤ t} Σ_c q_t[c] (a_{s+1}[c] ⋯ a_t[c]) k_s[c] v_s       the same, unrolled

The weight of a pair is no longer a product of two numbers: the fade stands inside the sum over channels.
Source: Yang et al., "Gated Linear Attention Transformers" (2024), sections 4.1 to 4.3.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvlearn.attention.linear.forms import Outcome, by_form, check_inputs, check_log_decay


def gated_linear_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T K"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    form: str = "chunked",
    chunk: int = 128,
) -> Outcome:
    """Outputs (B, H, T, V) and the last state (B, H, K, V), both in fp32 at least, by one of the forms.

    Nothing is scaled or normalised. No ``state`` is one of zeros; ``chunk`` need not divide T. Raises
    ValueError or TypeError for tensors that do not fit each other, and for decays outside (0, 1].
    """
    state = check_inputs(q, k, v, state)
    check_log_decay(log_decay, q.shape, q.device)
    return by_form(form, parallel, recurrent, (q, k, v, log_decay), state, chunk)


def parallel(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T K"],
    state: Float[Tensor, "B H K V"],
) -> Outcome:
    """All pairs at once, and what ``state`` still gives."""
    from_start = log_decay.cumsum(dim=2)
    out = faded_products(q, k, log_decay) @ v + (from_start.exp() * q) @ state
    state = from_start[:, :, -1, :, None].exp() * state + (after(log_decay).exp() * k).mT @ v
    return out, state


def faded_products(
    x: Float[Tensor, "*B T K"], y: Float[Tensor, "*B T K"], log_decay: Float[Tensor, "*#B T K"]
) -> Float[Tensor, "*B T T"]:
    """x_t · ((a_{s+1} ⋯ a_t) ⊙ y_s) for all pairs s ≤ t, and 0 for the others.

    The fade is no factor of each side: a_1 ⋯ a_t underflows, and its inverse overflows. But for a step m
    between s and t it is (a_{s+1} ⋯ a_m)(a_{m+1} ⋯ a_t), both at most 1. So pairs on two sides of the middle
    are one product of matrices, and the two halves are cut again; here from the smallest blocks up. (The
    paper takes two sizes of blocks, and K numbers for each pair inside the smaller.)
    """
    T = x.shape[-2]
    missing = (1 << (T - 1).bit_length()) - T
    x, y, log_decay = (F.pad(z, (0, 0, 0, missing)) for z in (x, y, log_decay))
    blocks = (x * y).sum(dim=-1)[..., None, None]  # (…, number of blocks, size, size)
    while (size := blocks.shape[-1]) < x.shape[-2]:
        (_, x_right), (y_left, _), (left, right) = (
            z.unflatten(-2, (-1, 2, size)).unbind(-3) for z in (x, y, log_decay)
        )
        across = (x_right * right.cumsum(-2).exp()) @ (y_left * after(left).exp()).mT
        upper = F.pad(blocks[..., ::2, :, :], (0, size))
        lower = torch.cat((across, blocks[..., 1::2, :, :]), dim=-1)
        blocks = torch.cat((upper, lower), dim=-2)
    return blocks[..., 0, :T, :T]


def after(log_decay: Float[Tensor, "*B T K"]) -> Float[Tensor, "*B T K"]:
    """log (a_{s+1} ⋯ a_T) for every s, each a sum for itself, as a difference would be rounded."""
    return F.pad(log_decay[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def recurrent(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B H T K"],
    v: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T K"],
    state: Float[Tensor, "B H K V"],
) -> Outcome:
    """One token after the other: fade, write, read."""
    decay, outs = log_decay.exp(), []
    for t in range(q.shape[2]):
        state = decay[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs.append(q[:, :, t, None] @ state)
    return torch.cat(outs, dim=2), state
