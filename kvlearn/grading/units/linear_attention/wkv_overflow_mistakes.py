"""06.7: the mistakes that people make with the running maximum, and with the denominator."""

import torch
from torch import Tensor

from kvlearn.grading.units.linear_attention.wkv import EXERCISE
from kvlearn.grading.units.linear_attention.wkv_mistakes import by_exponents, exponents

__all__ = ["EXERCISE"]

NONE = -1e38  # the exponent of a past that is empty


def plain(w: Tensor, u: Tensor, k: Tensor, v: Tensor, top: Tensor | None = None) -> Tensor:
    """The recurrence on bare exponentials, all of them divided by e^top, which never changes."""
    a = b = torch.zeros_like(k[:, 0])
    outs, top = [], torch.zeros_like(a) if top is None else top
    for t in range(k.shape[1]):
        own, new = (u + k[:, t] - top).exp(), (k[:, t] - top).exp()
        outs.append((a + own * v[:, t]) / (b + own))
        a, b = (-w).exp() * a + new * v[:, t], (-w).exp() * b + new
    return torch.stack(outs, 1)


def running(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rescale: tuple[bool, bool] = (True, True),
    fades: bool = True,
    bonus: bool = True,
    start: float = NONE,
) -> Tensor:
    """The recurrence with a running maximum; what is written may forget to be rescaled to the new one, and
    the maximum to fade, or the one to read with to look at the bonus."""
    a = b = torch.zeros_like(k[:, 0])
    outs, m = [], torch.full_like(a, start)
    for t in range(k.shape[1]):
        n = torch.maximum(m, u + k[:, t] if bonus else k[:, t])
        old, own = (m - n).exp(), (u + k[:, t] - n).exp()
        outs.append((old * a + own * v[:, t]) / (old * b + own))
        n = torch.maximum(m - w if fades else m, k[:, t])
        old, new = (m - w - n).exp(), (k[:, t] - n).exp()
        kept = [old if right else (-w).exp() for right in rescale]
        a, b, m = kept[0] * a + new * v[:, t], kept[1] * b + new, n
    return torch.stack(outs, 1)


@EXERCISE.misconception("no running maximum")
def no_maximum(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The exponentials were computed as they stand: e^k is infinite for k above 88, and 0 for k below −104,
    so the average is ∞/∞ or 0/0, NaN. Divide both sums by e^m, m the largest exponent so far."""
    return plain(w, u, k, v)


@EXERCISE.misconception("fp64 for a running maximum")
def wide(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The exponentials were computed as they stand, in fp64. That moves the limit from 88 to 709 and no
    further, and kernels do not compute in fp64. With a running maximum fp32 does for any keys."""
    return plain(w.double(), u.double(), k.double(), v.double()).to(v.dtype)


@EXERCISE.misconception("the maximum without the bonus")
def no_bonus_in_maximum(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output was computed with the maximum of the past and k, not u + k. The token's own exponent is u +
    k, and with a large u it overflows by itself. To read, take max(m, u + k)."""
    return running(w, u, k, v, bonus=False)


@EXERCISE.misconception("the largest key of the whole text subtracted")
def global_maximum(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Everything was divided by e^max over all T tokens. Nothing overflows; but before that key comes, all
    weights may be 0, and the average is 0/0. (It looks into the future as well, which a decode step cannot.)
    The maximum must run along with the tokens."""
    return plain(w, u, k, v, k.amax(1))


@EXERCISE.misconception("the first key subtracted")
def first_key(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Everything was divided by e^(first key). That is right only as long as all the others are near it. The
    maximum must be moved when a larger key comes, and the sums with it."""
    return plain(w, u, k, v, k[:, 0])


@EXERCISE.misconception("the maximum does not fade")
def stuck_maximum(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The running maximum was that of the keys, without their decay. The sums fade beneath it, e^(−w) a step,
    until they are 0 in fp32, and new small keys are 0 beside that maximum as well: 0/0. The largest exponent
    of the past fades with the past: m − w."""
    return running(w, u, k, v, fades=False)


@EXERCISE.misconception("one maximum of the keys for everything")
def one_maximum(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The largest key so far was used to read and to write. It knows nothing of the decay, so beside a large
    key of long ago everything is 0, 0/0; nor of the bonus, so that e^(u + k) may overflow. To read take
    max(m, u + k), to write max(m − w, k)."""
    return running(w, u, k, v, fades=False, bonus=False)


@EXERCISE.misconception("the maximum starts at 0")
def starts_at_zero(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The largest exponent of an empty past was 0. That is the exponent of a token that is not there; beside
    it keys far below 0 have no weight, and the average is 0/0. Start at −∞, or at −1e38."""
    return running(w, u, k, v, start=0.0)


@EXERCISE.misconception("the sums not rescaled to the new maximum")
def not_rescaled(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The maximum was moved, but a and b stayed divided by the old one. They are in units of e^m: when m
    becomes n, both are multiplied by e^(m − w − n), decay included."""
    return running(w, u, k, v, rescale=(False, False))


@EXERCISE.misconception("the denominator not rescaled")
def denominator_not_rescaled(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The numerator was brought to the new maximum, the denominator only faded. Both sums are in units of e^m
    and both move with it, or the weights do not add up to 1 any more."""
    return running(w, u, k, v, rescale=(True, False))


@EXERCISE.misconception("keys clamped")
def clamped(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys were cut to ±60 so that nothing overflows. Then a key of 300 weighs as much as one of 60. Only
    differences count: subtract the running maximum and no key needs to be changed."""
    return by_exponents(w, u, k.clamp(-60, 60), v, exponents)


@EXERCISE.misconception("a small number added to the denominator")
def small_number(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """NaN was fought with a small number in the denominator, without a running maximum. 0/0 then gives 0
    where an average of the values is right, and ∞/∞ stays NaN."""
    a = b = torch.zeros_like(k[:, 0])
    outs = []
    for t in range(k.shape[1]):
        own, new = (u + k[:, t]).exp(), k[:, t].exp()
        outs.append((a + own * v[:, t]) / (b + own + 1e-8))
        a, b = (-w).exp() * a + new * v[:, t], (-w).exp() * b + new
    return torch.stack(outs, 1)


@EXERCISE.misconception("NaN replaced by zero")
def nan_to_zero(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The exponentials were computed as they stand and the NaN set to 0. That hides the overflow and returns
    0 where an average of the values is right. Subtract the running maximum, and there is no NaN."""
    return plain(w, u, k, v).nan_to_num()


@EXERCISE.misconception("the denominator without the bonus")
def denominator_without(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The token's own weight is e^(u + k) above and e^k below: the weights do not add up to 1, and the first
    token's output is not its value. Numerator and denominator take the same weights."""
    outs = []
    for t in range(k.shape[1]):
        with_bonus = exponents(w, u, k, t)
        without = exponents(w, torch.zeros_like(u), k, t)
        n = with_bonus.amax(1, keepdim=True)
        outs.append(((with_bonus - n).exp() * v[:, : t + 1]).sum(1) / (without - n).exp().sum(1))
    return torch.stack(outs, 1)


@EXERCISE.misconception("the denominator without the token")
def denominator_past(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The token was added to the numerator and not to the denominator (for the first one that is a division
    by 0). Both are sums over the same tokens."""
    outs = []
    for t in range(k.shape[1]):
        powers = exponents(w, u, k, t)
        n = powers.amax(1, keepdim=True)
        weights = (powers - n).exp()
        outs.append((weights * v[:, : t + 1]).sum(1) / weights[:, :-1].sum(1))
    return torch.stack(outs, 1)


@EXERCISE.misconception("keys changed in place")
def in_place(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The numbers are right, but the keys handed in were changed (`k -= …`, `k[:, t] += u`). They belong to
    the caller: work on new tensors."""
    out = running(w, u, k, v)
    k -= k.amax(1, keepdim=True)
    return out
