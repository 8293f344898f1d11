"""06.2: the mistakes that people make with a step of linear attention."""

from torch import Tensor

from kvlearn.grading.units.linear_attention.features import nearby
from kvlearn.grading.units.linear_attention.given import outer
from kvlearn.grading.units.linear_attention.recurrent import EXERCISE

__all__ = ["EXERCISE", "Outs", "read"]

Outs = tuple[Tensor, Tensor, Tensor]


def read(f: Tensor, S: Tensor, z: Tensor) -> Tensor:
    """Sᵀf / (z·f)."""
    return (f[..., :, None] * S).sum(-2) / (f * z).sum(-1, keepdim=True)


@EXERCISE.misconception("read before it is written")
def read_first(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The output was made from the memory as it was before the token. So a token does not see itself, and the
    first one divides 0 by 0. Write, then read."""
    return read(nearby(q), S, z), S + outer(nearby(k), v), z + nearby(k)


@EXERCISE.misconception("memory with the new token, normaliser without")
def old_total(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The new token is in the memory that is read, but not in the normaliser it is divided by: weights sum to
    more than 1, and the first token divides by 0. Both take the token in before they are used."""
    S = S + outer(nearby(k), v)
    return read(nearby(q), S, z), S, z + nearby(k)


@EXERCISE.misconception("normaliser with the new token, memory without")
def old_memory(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The normaliser counts the new token, and the memory that is read does not hold it yet: weights sum to
    less than 1, and the first output is 0. Both take the token in before they are used."""
    z = z + nearby(k)
    return read(nearby(q), S, z), S + outer(nearby(k), v), z


@EXERCISE.misconception("not divided by the normaliser")
def undivided(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The output is Sᵀφ(q), a sum of values with weights that do not sum to 1. Divide by z·φ(q)."""
    S, z = S + outer(nearby(k), v), z + nearby(k)
    return (nearby(q)[..., None] * S).sum(-2), S, z


@EXERCISE.misconception("the normaliser never grows")
def z_forgotten(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The normaliser came back without φ(k). It is a sum over all tokens, as the memory is; otherwise
    outputs grow with the length of the text."""
    S = S + outer(nearby(k), v)
    return read(nearby(q), S, z + nearby(k)), S, z


@EXERCISE.misconception("no normaliser kept at all")
def z_neither(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The token was written to the memory only: the normaliser was used as it came, and came back so. Behind
    an empty memory that divides by 0. φ(k) is added to it in every step, before the output."""
    S = S + outer(nearby(k), v)
    return read(nearby(q), S, z), S, z


@EXERCISE.misconception("the normaliser starts anew")
def z_reset(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The normaliser was set to φ(k), and what had been summed before is lost. The memory holds all tokens,
    so must it: z + φ(k)."""
    S, z = S + outer(nearby(k), v), nearby(k)
    return read(nearby(q), S, z), S, z


@EXERCISE.misconception("the memory written over")
def overwritten(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The memory was set to φ(k) vᵀ: all earlier tokens are gone. Add to what is there."""
    S, z = outer(nearby(k), v), z + nearby(k)
    return read(nearby(q), S, z), S, z


@EXERCISE.misconception("memory and normaliser written over")
def both_overwritten(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """Memory and normaliser hold the new token alone, so every output is the token's own value. Both are sums
    over all tokens: add to what is there."""
    S, z = outer(nearby(k), v), nearby(k)
    return read(nearby(q), S, z), S, z


@EXERCISE.misconception("the outer product transposed")
def transposed(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """What was written is v φ(k)ᵀ, (V, K), and not φ(k) vᵀ, (K, V). It only fits where K = V, and then a
    query reads along the wrong side. Features go down, the numbers of the value across."""
    S, z = S + outer(v, nearby(k)), z + nearby(k)
    return read(nearby(q), S, z), S, z


@EXERCISE.misconception("read along the wrong side")
def wrong_side(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The memory was read as S φ(q), summed over the numbers of the value. It is Sᵀφ(q): the sum runs over
    the features, dimension −2 of the memory, and leaves V numbers."""
    S, z = S + outer(nearby(k), v), z + nearby(k)
    return (S @ nearby(q)[..., None])[..., 0] / (nearby(q) * z).sum(-1, keepdim=True), S, z


@EXERCISE.misconception("written in place")
def in_place(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The numbers are right, but something that was handed in has changed, most likely the memory or the
    normaliser (`+=`, `add_`). Whoever goes on from the same past a second time (another sample, a test) finds
    a token in it that is not theirs. Make new tensors: `memory = memory + …`."""
    S += outer(nearby(k), v)
    z += nearby(k)
    return read(nearby(q), S, z), S, z
