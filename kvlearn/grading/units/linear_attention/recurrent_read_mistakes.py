"""06.2: the mistakes that people make with the feature map of a step, and with what it reads and returns."""

import torch.nn.functional as F
from torch import Tensor

from kvlearn.grading.units.linear_attention.features import nearby
from kvlearn.grading.units.linear_attention.given import outer
from kvlearn.grading.units.linear_attention.recurrent_mistakes import EXERCISE, Outs, read

__all__ = ["EXERCISE"]


@EXERCISE.misconception("the new state not returned")
def state_not_returned(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The output is right, but memory and normaliser came back as they were: the next token would know
    nothing of this one."""
    return read(nearby(q), S + outer(nearby(k), v), z + nearby(k)), S, z


@EXERCISE.misconception("the key written without its feature map")
def raw_key(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The memory took k vᵀ, without φ, while the normaliser took φ(k): weights above and below do not
    match. φ(k) goes into both."""
    S, z = S + outer(k, v), z + nearby(k)
    return read(nearby(q), S, z), S, z


@EXERCISE.misconception("a normaliser without the feature map")
def raw_total(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The normaliser took k, without φ, and may come near 0 or below. φ(k) goes into both sums."""
    S, z = S + outer(nearby(k), v), z + k
    return read(nearby(q), S, z), S, z


@EXERCISE.misconception("the query without its feature map")
def raw_query(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """Memory and normaliser were read with q itself, so weights may be negative. It is φ(q), above and
    below."""
    S, z = S + outer(nearby(k), v), z + nearby(k)
    return read(q, S, z), S, z


@EXERCISE.misconception("no feature map")
def no_features(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """Keys were written and queries read as they are. What is handed in are q and k; φ = elu + 1 is to be
    applied to both."""
    S, z = S + outer(k, v), z + k
    return read(q, S, z), S, z


@EXERCISE.misconception("keys without their feature map")
def raw_keys(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """Memory and normaliser took k as it is, and only the query went through φ: weights may be negative.
    φ(k) goes into both sums."""
    S, z = S + outer(k, v), z + k
    return read(nearby(q), S, z), S, z


@EXERCISE.misconception("query and key exchanged")
def exchanged(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """φ(q) was written, and φ(k) used to read. A token leaves its *key* behind, by which later queries find
    it."""
    S, z = S + outer(nearby(q), v), z + nearby(q)
    return read(nearby(k), S, z), S, z


@EXERCISE.misconception("elu without + 1")
def plain_elu(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """φ was elu alone, which goes down to −1: the normaliser may come near 0. φ is elu + 1."""
    S, z = S + outer(F.elu(k), v), z + F.elu(k)
    return read(F.elu(q), S, z), S, z


@EXERCISE.misconception("the feature map on the value")
def featured_value(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """φ was applied to the value as well. It is for queries and keys, whose products are weights."""
    S, z = S + outer(nearby(k), nearby(v)), z + nearby(k)
    return read(nearby(q), S, z), S, z


@EXERCISE.misconception("the query left out of the normaliser")
def sum_of_z(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The output was divided by the sum of z. The weights of *this* query sum to z·φ(q): each feature counts
    as much as the query has of it."""
    S, z = S + outer(nearby(k), v), z + nearby(k)
    return (nearby(q)[..., None] * S).sum(-2) / z.sum(-1, keepdim=True), S, z


@EXERCISE.misconception("the new token counted twice")
def twice(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The token was written, and its own part φ(q)·φ(k) v was added to the output once more. What is in the
    memory is read from it; nothing is to be added."""
    S, z, f = S + outer(nearby(k), v), z + nearby(k), nearby(q)
    return read(f, S, z) + (f * nearby(k)).sum(-1, keepdim=True) * v / (f * z).sum(-1, keepdim=True), S, z


@EXERCISE.misconception("a scale in the numerator alone")
def scaled(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The output was multiplied by 1/√K, and the normaliser was not. Nothing is scaled here; a factor on all
    weights would cancel."""
    S, z = S + outer(nearby(k), v), z + nearby(k)
    return read(nearby(q), S, z) * q.shape[-1] ** -0.5, S, z


@EXERCISE.misconception("the division kept in the memory")
def divided_memory(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """Each row of the memory was divided by its place in the normaliser, and kept so; the next step adds to
    it as if it were a sum. (And Σ φ(q)·(S / z) is not Sᵀφ(q) / (z·φ(q)).) Keep sums, divide on the way
    out."""
    z = z + nearby(k)
    S = (S + outer(nearby(k), v)) / z[..., None]
    f = nearby(q)
    return (f[..., None] * S).sum(-2) / f.sum(-1, keepdim=True), S, z


@EXERCISE.misconception("memory and normaliser in the wrong order")
def swapped(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The three tensors came back in another order. It is (out, memory, normaliser)."""
    S, z = S + outer(nearby(k), v), z + nearby(k)
    return read(nearby(q), S, z), z, S


@EXERCISE.misconception("(V, K) returned")
def returned_transposed(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """The output is right, but the memory came back transposed. It is (B, H, K, V), as it was handed in."""
    S, z = S + outer(nearby(k), v), z + nearby(k)
    return read(nearby(q), S, z), S.mT, z


@EXERCISE.misconception("one head's key for all")
def heads_mixed(q: Tensor, k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> Outs:
    """What the heads wrote was added up, and every memory took the sum. Each head of each sequence has a
    memory of its own: in `einsum` keep b and h on both sides of the arrow."""
    wrote = outer(nearby(k), v).sum(1, keepdim=True)
    S, z = S + wrote, z + nearby(k)
    return read(nearby(q), S, z), S, z
