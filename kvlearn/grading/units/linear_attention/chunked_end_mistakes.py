"""06.3: the mistakes that people make with a shorter last chunk, and with what a chunk is for."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlearn.grading.units.linear_attention.chunked_mistakes import EXERCISE, Outs, chunks, empty, own

__all__ = ["EXERCISE"]


@EXERCISE.misconception("a feature map that was not asked for")
def features(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """φ was applied to queries and keys. Here they are features already, as they come: the output is
    Σ (q·k) v."""
    return chunks(F.elu(q) + 1, F.elu(k) + 1, v, chunk)


@EXERCISE.misconception("a normaliser that was not asked for")
def normalised(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The outputs were divided by the sum of the weights. This exercise has no normaliser, and without φ that
    sum may be 0."""
    ones = v.new_ones(*v.shape[:3], 1)
    out, state = chunks(q, k, v, chunk)
    return out / chunks(q, k, ones, chunk)[0], state


@EXERCISE.misconception("the last chunk left out")
def last_left_out(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """There were T // chunk chunks, rounded down: the tokens behind the last whole chunk have no output. The
    last chunk may be shorter; it is a chunk all the same."""
    n = q.shape[2] // chunk * chunk
    if n == 0:
        return v[:, :, :0], empty(k, v)
    return chunks(q[:, :, :n], k[:, :, :n], v[:, :, :n], chunk)


@EXERCISE.misconception("zeros for the last chunk")
def last_zero(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """There were T // chunk chunks, rounded down: the outputs behind the last whole chunk stayed at the zeros
    they were made with, and the state does not know those tokens. Round up."""
    out, state = last_left_out(q, k, v, chunk)
    return F.pad(out, (0, 0, 0, q.shape[2] - out.shape[2])), state


@EXERCISE.misconception("the padding not cut off")
def padded(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The text was filled up with zeros to whole chunks, and the output kept that length. Zeros do no harm to
    the sums, but the output has T tokens: cut it off."""
    q, k, v = (F.pad(x, (0, 0, 0, -x.shape[2] % chunk)) for x in (q, k, v))
    return chunks(q, k, v, chunk)


@EXERCISE.misconception("padded in front, cut off behind")
def padded_in_front(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """Zeros were put before the text, and as many rows cut off behind it: every output stands too far back.
    Cut off where you padded."""
    T = q.shape[2]
    q, k, v = (F.pad(x, (0, 0, -T % chunk, 0)) for x in (q, k, v))
    out, state = chunks(q, k, v, chunk)
    return out[:, :, :T], state


@EXERCISE.misconception("a last state without the last chunk")
def one_behind(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The state returned is the one that the last chunk *read*. Whoever goes on from it misses that chunk:
    return it after the last chunk is written."""
    last = (q.shape[2] - 1) % chunk + 1
    out, state = chunks(q, k, v, chunk)
    return out, state - k[:, :, -last:].mT @ v[:, :, -last:]


@EXERCISE.misconception("the state transposed")
def transposed(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The state was made as vᵀk, (V, K), and read as if it were (K, V). It only fits where K = V, and then a
    query reads along the wrong side: kᵀv."""
    state, outs = empty(k, v), []
    for a, b, c in zip(q.split(chunk, 2), k.split(chunk, 2), v.split(chunk, 2), strict=True):
        outs.append(own(a, b, c) + a @ state)
        state = state + c.mT @ b
    return torch.cat(outs, 2), state


@EXERCISE.misconception("(V, K) returned")
def returned_transposed(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The outputs are right, but the state came back transposed. It is (B, H, K, V), features down, the
    numbers of a value across."""
    out, state = chunks(q, k, v, chunk)
    return out, state.mT


@EXERCISE.misconception("the whole square")
def square(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The numbers are right, but all pairs of tokens were made at once, T·T of them, and `chunk` has no part
    in it: at 100,000 tokens that is 40 GB a head. The square is for the inside of a chunk; a state goes
    across."""
    return own(q, k, v), k.mT @ v


@EXERCISE.misconception("the square in strips")
def strips(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The numbers are right, but each chunk met all keys before it, one strip of the square after the other:
    less memory, and the same T·T products. What the earlier chunks left is in the state, of the same size
    however many they were: q @ state."""
    outs = []
    for start in range(0, q.shape[2], chunk):
        end = start + chunk
        weights = q[:, :, start:end] @ k[:, :, :end].mT
        outs.append(weights.tril(start) @ v[:, :, :end])
    return torch.cat(outs, 2), k.mT @ v


@EXERCISE.misconception("the size of a chunk taken for the number of chunks")
def number_of_chunks(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The numbers are right, but there were `chunk` chunks, however long the text (as `torch.chunk` cuts):
    each is T / chunk long, and its square grows with T². `chunk` is how many tokens are in one:
    `q.split(chunk, dim=2)`."""
    return chunks(q, k, v, -(-q.shape[2] // chunk))


@EXERCISE.misconception("a shorter last chunk without the state")
def last_alone(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The tokens behind the last whole chunk were worked out for themselves, and did not read the state. The
    last chunk is like the others, but for its length."""
    out, state = chunks(q, k, v, chunk)
    n = q.shape[2] // chunk * chunk
    return torch.cat((out[:, :, :n], own(q[:, :, n:], k[:, :, n:], v[:, :, n:])), 2), state


@EXERCISE.misconception("the state of the last chunk alone")
def last_state(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The outputs are right, but the state returned is kᵀv of the last chunk. It is the sum over all tokens:
    the state as the next chunk would read it."""
    last = (q.shape[2] - 1) % chunk + 1
    return chunks(q, k, v, chunk)[0], k[:, :, -last:].mT @ v[:, :, -last:]


@EXERCISE.misconception("the state of chunk c - 1 for chunk c + 1")
def one_late(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Outs:
    """The state arrives one chunk late: the chunk right before the own one is missing from it. (States were
    shifted twice, or a list of them was read one place too far back.) Chunk c reads the sum of all chunks
    before c."""
    state, late, outs = empty(k, v), empty(k, v), []
    for a, b, c in zip(q.split(chunk, 2), k.split(chunk, 2), v.split(chunk, 2), strict=True):
        outs.append(own(a, b, c) + a @ late)
        late, state = state, state + b.mT @ c
    return torch.cat(outs, 2), state
