"""Low-rank approximations of a layer's trained heads: the best latent and the best shared key.

Keys and values are linear in the layer's input x, so the second moment C = E[x xᵀ] of x determines the second
moment W C Wᵀ of the heads W x. With C = 1 this approximates the weights alone. (M is the model's width.)
"""

from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor


class Latent(NamedTuple):
    """latent = down · [keys, values];  keys ≈ k_up · latent,  values ≈ v_up · latent, head by head."""

    down: Float[Tensor, "R HD2"]
    k_up: Float[Tensor, "H D R"]
    v_up: Float[Tensor, "H D R"]


def best_latent(
    k: Float[Tensor, "H D M"], v: Float[Tensor, "H D M"], moment: Float[Tensor, "M M"], rank: int
) -> Latent:
    """The ``rank`` numbers that keep most of a token's keys (not rotated) and values.

        y = [keys, values],   E[y yᵀ] = U Λ Uᵀ,   down = U_Rᵀ,   up = U_R

    U_R are the eigenvectors of the R largest eigenvalues: no linear map to R numbers and back loses less of
    E|y|² (Eckart & Young, 1936). Keys and values are not rescaled: with equal sizes, the loss of the course's
    base model before uptraining grows at ranks 32 and 64 (and shrinks at 8 and 16).

    Source: Chang et al., "Palu" (2024).
    """
    heads = torch.cat((k, v)).flatten(0, 1)
    u = torch.linalg.eigh(heads @ moment @ heads.mT).eigenvectors.flip(-1)[:, :rank]
    return Latent(u.mT, *u.unflatten(0, (2, *k.shape[:2])))


class SharedKey(NamedTuple):
    """The rotated key of all heads, the queries for it, and the remaining part of each head's keys."""

    key: Float[Tensor, "Dr M"]
    q: Float[Tensor, "H Dr M"]
    rest: Float[Tensor, "H D M"]


def shared_rotary_key(
    q: Float[Tensor, "H D M"], k: Float[Tensor, "H D M"], moment: Float[Tensor, "M M"], rope_dim: int
) -> SharedKey:
    """One rotated key for all heads, from their fastest ``rope_dim`` / 2 rotary pairs.

    A pair (x_i, x_{i+D/2}) is a complex number that RoPE multiplies by e^{imω_i}. A complex factor c_h per
    head commutes with the rotation, so heads with proportional keys can share one: k_h ≈ c_h κ, and q_h c̄_h
    has the same score with κ as q_h with c_h κ. Per pair, c is the leading eigenvector of the
    heads' second moment and κ = c̄ · k: the best approximation of rank one.

    The rest is not rotated: the slow pairs, and the residuals k_h - c_h κ of the others. The residual of the
    fastest pair, which rotates by one radian per token, is dropped: without its rotation it does harm.

    Sources: Ji et al., "MHA2MLA" (2025), for keeping the fastest pairs; Meng et al., "TransMLA" (2025), for
    mixing the keys of different heads within a frequency.
    """
    n, half = rope_dim // 2, k.shape[1] // 2
    pairs = as_pairs(k)[:, :n]
    u = torch.linalg.eigh(
        torch.einsum("hpm, mn, gpn -> phg", pairs, moment.to(pairs.dtype), pairs.conj())
    ).eigenvectors[..., -1]  # (pairs, heads)
    key = torch.einsum("ph, hpm -> pm", u.conj(), pairs)
    left = pairs - torch.einsum("ph, pm -> hpm", u, key)
    left[:, :1] = 0
    rest = k.clone()
    rest[:, :n], rest[:, half : half + n] = left.real, left.imag
    return SharedKey(from_pairs(key), from_pairs(as_pairs(q)[:, :n] * u.mT.conj()[..., None]), rest)


def as_pairs(x: Float[Tensor, "*heads D M"]) -> Complex[Tensor, "*heads half_D M"]:
    """Rotary pairs as complex numbers: x_i + i x_{i+D/2}, which RoPE multiplies by e^{imω_i}."""
    return torch.complex(*x.chunk(2, dim=-2))


def from_pairs(x: Complex[Tensor, "*heads half_D M"]) -> Float[Tensor, "*heads D M"]:
    """The inverse of ``as_pairs``."""
    return torch.cat((x.real, x.imag), dim=-2)
