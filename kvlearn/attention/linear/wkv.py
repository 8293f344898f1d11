"""RWKV-4's recurrence: an average of all values, weighted by their keys and by how long ago they came.

    wkv_t = (Σ_{s<t} e^{k_s - (t-1-s) w} v_s + e^{k_t + u} v_t) / (the same without v)

Every channel for itself: a key is a number, not a vector, and no query asks. e^k may overflow; so the sums
are kept relative to the largest exponent in them, as FlashAttention keeps its softmax.
Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer Era" (2023), on the WKV operator, and the
appendix on its form as an RNN.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvlearn import validate
from kvlearn.attention.core import upcast

LOWEST = -1e38  # the exponent of an empty sum: finite, so that differences of two such are no NaN


class Sums(NamedTuple):
    """Numerator and denominator, both to be multiplied by e^top. ``top`` is a scale, and has no gradient."""

    num: Float[Tensor, "..."]
    den: Float[Tensor, "..."]
    top: Float[Tensor, "..."]

    def fade(self, by: Tensor) -> "Sums":
        """Both sums times e^-by."""
        return Sums(self.num, self.den, self.top - by)

    def add(self, other: "Sums") -> "Sums":
        """Sums over the terms of both. No exponent is above 0, and one of the two is 0."""
        top = torch.maximum(self.top, other.top).detach()
        a, b = torch.exp(self.top - top), torch.exp(other.top - top)
        return Sums(a * self.num + b * other.num, a * self.den + b * other.den, top)

    @staticmethod
    def of(exponent: Tensor, v: Tensor) -> "Sums":
        """The sums of a single term."""
        return Sums(v, torch.ones_like(v), exponent)


def wkv(
    w: Float[Tensor, "M"],
    u: Float[Tensor, "M"],
    k: Float[Tensor, "B T M"],
    v: Float[Tensor, "B T M"],
    state: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    form: str = "chunked",
    chunk: int = 256,
) -> tuple[Float[Tensor, "B T M"], Sums]:
    """The averages, and the ``Sums`` of (B, M) behind the last token, both in fp32 at least.

    A token loses e^-w of its weight with every token that comes; for itself it weighs e^u times as much.
    ``form`` is "recurrent", a bare loop, or "chunked": ``blocked``, over ``chunk`` tokens at a time. Raises
    ValueError or TypeError for tensors that do not fit each other, and for w below 0 or not finite.
    """
    validate.tensor("k", k, ("batch", "time", "channels"))
    validate.at_least("k.shape[1] (time)", k.shape[1], 1)
    B, T, M = k.shape
    validate.tensor("v", v, (B, T, M), dtype=k.dtype, device=k.device)
    for name, x in (("w", w), ("u", u)):
        validate.tensor(name, x, (M,), device=k.device)
    if w.device.type == "cpu" and not bool(((w >= 0) & w.isfinite()).all()):  # elsewhere it would synchronise
        raise ValueError(f"w: expected finite numbers of at least 0, decays e^-w in (0, 1], got {w.tolist()}")
    validate.one_of("form", form, ("recurrent", "chunked"))
    validate.positive("chunk", chunk)
    k, v = upcast(k), upcast(v)
    w, u = w.to(k.dtype), u.to(k.dtype)
    if state is None:
        sums = Sums(k.new_zeros(B, M), k.new_zeros(B, M), k.new_full((B, M), LOWEST))
    else:
        if len(state) != len(Sums._fields):
            raise ValueError(f"state: expected {', '.join(Sums._fields)}, got {len(state)} tensors")
        parts = zip(Sums._fields, state, strict=True)
        sums = Sums(
            *(validate.tensor(f"state.{n}", x, (B, M), device=k.device).to(k.dtype) for n, x in parts)
        )
    if form == "recurrent":
        return recurrent(w, u, k, v, sums)
    outs = []
    for k_part, v_part in zip(k.split(chunk, dim=1), v.split(chunk, dim=1), strict=True):
        out, sums = blocked(w, u, k_part, v_part, sums)
        outs.append(out)
    return torch.cat(outs, dim=1), sums


def recurrent(w: Tensor, u: Tensor, k: Tensor, v: Tensor, past: Sums) -> tuple[Tensor, Sums]:
    """One token after the other: read with the token's bonus, then fade and write."""
    outs = []
    for k_t, v_t in zip(k.unbind(dim=1), v.unbind(dim=1), strict=True):
        read = past.add(Sums.of(k_t + u, v_t))
        outs.append(read.num / read.den)
        past = past.fade(w).add(Sums.of(k_t, v_t))
    return torch.stack(outs, dim=1), past


def blocked(w: Tensor, u: Tensor, k: Tensor, v: Tensor, past: Sums) -> tuple[Tensor, Sums]:
    """The same in about 2 √T steps: T tokens as √T blocks of √T.

    First token after token, all blocks at once, each as if nothing stood before it; then block after block,
    what did stand before it; then both added, for all tokens at once.
    """
    T = k.shape[1]
    width = math.isqrt(T - 1) + 1
    k_cut, v_cut = (F.pad(x, (0, 0, 0, -T % width)).unflatten(1, (-1, width)) for x in (k, v))
    nothing = torch.zeros_like(v_cut[:, :, 0])
    inside = Sums(nothing, nothing, nothing + LOWEST)
    earlier = []  # of a token: the sums over those before it in its block
    for i in range(width):
        earlier.append(inside)
        inside = inside.fade(w).add(Sums.of(k_cut[:, :, i], v_cut[:, :, i]))
    before = []  # of a block: the sums over all tokens before it
    for block in zip(*(x.unbind(dim=1) for x in inside), strict=True):
        before.append(past)
        past = past.fade(width * w).add(Sums(*block))
    steps = torch.arange(width, dtype=w.dtype, device=w.device)[:, None]
    in_block = Sums(*(torch.stack(parts, dim=2) for parts in zip(*earlier, strict=True)))
    in_front = Sums(*(torch.stack(parts, dim=1)[:, :, None] for parts in zip(*before, strict=True)))
    seen = Sums(*(x.flatten(1, 2)[:, :T] for x in in_front.fade(steps * w).add(in_block)))
    read = seen.add(Sums.of(k + u, v))
    # Not the sum over the last block, which has the padding in it.
    last = Sums(*(x[:, -1] for x in seen)).fade(w).add(Sums.of(k[:, -1], v[:, -1]))
    return read.num / read.den, last
