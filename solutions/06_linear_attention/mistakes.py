"""Unit 06: known mistakes of the exercises on linear attention and its relatives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    Config,
    Sizes,
    chunked,
    crossing,
    decay,
    delta,
    features,
    mamba,
    nearby,
    outer,
    recurrent,
    wkv,
)

# 06.1: Feature map and normaliser


def scores(q: Tensor, k: Tensor, features: Callable[[Tensor], Tensor] = nearby) -> Tensor:
    return features(q) @ features(k).mT


def divided(weights: Tensor, v: Tensor, total: Tensor | None = None) -> Tensor:
    """The average with these weights; guarded against 0 / 0, whatever the sign."""
    total = weights.sum(-1, keepdim=True) if total is None else total
    return weights @ v / torch.where(total == 0, 1, total)


def softmax_of(scores: Tensor) -> Tensor:
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


features.mistakes(
    r"""
    no normaliser
        return scores(q, k).tril() @ v
    The weights were not divided by their sum. They are all positive, so the outputs grow with every token.
    Divide by what the weights of the token sum to. (Later designs leave the normaliser out on purpose, and
    put a norm behind the layer.)

    a normaliser over all tokens
        weights = scores(q, k)
        return divided(weights.tril(), v, weights.sum(-1, keepdim=True))
    The outputs are divided by the sum over *all* keys, those to come as well: the weights were summed before
    the future was hidden. So weights sum to less than 1, and every token learns something of the future. Hide
    first, then sum.

    a normaliser without the feature map
        return divided(scores(q, k).tril(), v, (q @ k.mT).tril().sum(-1, keepdim=True))
    The outputs are divided by the sum of q·k, without φ. Such a sum may be 0 or negative, and it is not what
    the weights sum to. The same φ(q)·φ(k) stand above and below.

    elu without + 1
        return divided(scores(q, k, F.elu).tril(), v)
    φ was elu alone. Its values go down to −1, so weights may be negative, their sum may come close to 0, and
    the quotient blows up. The + 1 is what makes every feature positive.

    + 1 on the product, not on the features
        return divided((scores(q, k, F.elu) + 1).tril(), v)
    1 was added to elu(q)·elu(k). Then the features are negative still, and so may the weights be: each
    feature gets its + 1 *before* the product.

    relu in place of elu + 1
        return divided(scores(q, k, F.relu).tril(), v)
    φ was relu. It gives no negative weights, but whatever is below 0 becomes 0, with no gradient; a query and
    a key that share no positive number do not see each other, and a sum of such weights is 0. φ = elu + 1 is
    positive everywhere.

    exp as the feature map
        return divided(scores(q, k, torch.exp).tril(), v)
    φ was exp. That is positive, but it overflows from 89 on, and it is not the map that was asked for: elu(x)
    + 1 grows like x + 1 above 0, and is eˣ only below.

    softmax as the feature map
        return divided(scores(q, k, lambda x: x.softmax(-1)).tril(), v)
    φ was a softmax over the features of each query and key. Such maps exist, but here φ works on each number
    for itself: elu(x) + 1.

    the softmax left in
        return softmax_of(scores(q, k)) @ v
    The products φ(q)·φ(k) went through a softmax. They *are* the weights, in place of exp(q·k): divide them
    by their sum, with no exp. With a softmax nothing can be pulled apart into a state.

    softmax attention
        return softmax_of(q @ k.mT * q.shape[-1] ** -0.5) @ v
    This is softmax attention as in unit 01, without a feature map. Linear attention puts φ(q)·φ(k) where
    exp(q·k / √K) stood.

    a scale before the feature map
        return divided(scores(q * q.shape[-1] ** -0.5, k).tril(), v)
    Queries were divided by √K before φ. A factor on the *weights* would cancel, above and below; inside φ it
    changes them, for φ(q / √K) is not φ(q) / √K. Nothing is scaled here.

    divided by the number of tokens
        return scores(q, k).tril() @ v / torch.arange(1, q.shape[2] + 1)[:, None]
    The sums were divided by how many tokens a token sees. That keeps them from growing with the length, but
    the weights do not sum to 1: divide by the weights' own sum.

    the future not hidden
        return divided(scores(q, k), v)
    Every token sees every other, those to come as well. Set the weights above the diagonal to 0 before they
    are summed.

    a token does not see itself
        return divided(scores(q, k).tril(-1), v)
    The diagonal was hidden with the future, so the first token sees nothing at all. A token sees itself: s ≤
    t.

    hidden with minus infinity
        weights = scores(q, k)
        return divided(
            weights.masked_fill(torch.ones_like(weights, dtype=torch.bool).triu(1), -torch.inf), v
        )
    Weights of the future were set to −∞. That is the way where a softmax follows, which makes 0 of it. Here
    the numbers are weights already: a hidden token's is 0.

    the feature map on the values
        return divided(scores(q, k).tril(), nearby(v))
    φ was applied to the values as well. It makes weights of queries and keys; values are what is averaged,
    and may be negative.

    the feature map on the keys alone
        return divided((q @ nearby(k).mT).tril(), v)
    The queries went in without φ, so weights may be negative. Both sides have the feature map.

    the feature map on the queries alone
        return divided((nearby(q) @ k.mT).tril(), v)
    The keys went in without φ, so weights may be negative. Both sides have the feature map.

    no feature map
        return divided((q @ k.mT).tril(), v)
    The weights were q·k itself, which may be negative; their sum may be 0, and the quotient blows up. φ makes
    every feature positive first.

    the feature map on the product
        return divided(nearby(q @ k.mT).tril(), v)
    φ was applied to q·k, not to q and k. That gives weights, but ones that cannot be pulled apart: only a
    product φ(q)·φ(k) lets the sum over keys be made once, as a state, for all queries to come.

    a normaliser for each key
        weights = scores(q, k).tril()
        total = weights.sum(-2, keepdim=True)
        return weights / torch.where(total == 0, 1, total) @ v
    The weights were divided by their sum over the *queries*, down the columns. Each query's weights sum to 1:
    `sum(dim=-1)`, along the keys.

    0 / 0 where no key has any weight
        weights = scores(q, k).tril()
        return weights @ v / weights.sum(-1, keepdim=True)
    Far below 0, elu(x) + 1 is exactly 0. A token whose weights are all 0 divides 0 by 0, which is NaN, and
    one NaN spoils every layer above it. Divide by at least some tiny number: the output is 0 then.

    the mask upside down
        return divided(scores(q, k).triu(), v)
    The upper half was kept: each token sees itself and what comes *after* it. Queries go down, keys across;
    the past is below the diagonal, `tril()`.

    the future hidden in the normaliser alone
        weights = scores(q, k)
        return divided(weights, v, weights.tril().sum(-1, keepdim=True))
    The values of all tokens were summed, and divided by the weights of the past: weights sum to more than 1.
    Hide the future in the weights, and use these above and below.

    the query left out of the normaliser
        total = nearby(k).sum(-1, keepdim=True).cumsum(2)
        return divided(scores(q, k).tril(), v, total)
    The outputs were divided by the sum of φ(k) over tokens and features. The weights of *this* query sum to
    φ(q)·Σφ(k): each feature counts as much as the query has of it.

    elu of x + 1
        return divided(scores(q, k, lambda x: F.elu(x + 1)).tril(), v)
    φ was elu(x + 1): 1 was added before, and not to the result. That still goes down to −1. φ(x) = elu(x) +
    1.

    queries and keys scaled
        scale = q.shape[-1] ** -0.5
        return divided(scores(q * scale, k * scale).tril(), v)
    Queries and keys were both divided by √K before φ. Nothing is scaled here: inside φ a factor changes the
    weights, and outside it would cancel.

    the inputs changed in place
        out = divided(scores(q, k).tril(), v)
        for x in (q, k):
            x.copy_(nearby(x))
        return out
    The numbers are right, but queries or keys that were handed in have changed (`elu_`, `+= 1`). They belong
    to the caller: `F.elu(q) + 1` makes a new tensor.

    the value itself where no key has any weight
        weights = scores(q, k).tril()
        return torch.where(weights.sum(-1, keepdim=True) > 0, divided(weights, v), v)
    Where all weights are 0 the output was the token's own value. A sum of no weights is nothing: 0 was asked
    for.
    """,
    divided=divided,
    nearby=nearby,
    scores=scores,
    softmax_of=softmax_of,
)


# 06.2: From parallel to recurrent


def recurrent_read(f: Tensor, S: Tensor, z: Tensor) -> Tensor:
    """Sᵀf / (z·f)."""
    return (f[..., :, None] * S).sum(-2) / (f * z).sum(-1, keepdim=True)


recurrent.mistakes(
    r"""
    read before it is written
        return (
            recurrent_read(nearby(q), memory, normaliser),
            memory + outer(nearby(k), v),
            normaliser + nearby(k),
        )
    The output was made from the memory as it was before the token. So a token does not see itself, and the
    first one divides 0 by 0. Write, then read.

    memory with the new token, normaliser without
        memory = memory + outer(nearby(k), v)
        return recurrent_read(nearby(q), memory, normaliser), memory, normaliser + nearby(k)
    The new token is in the memory that is read, but not in the normaliser it is divided by: weights sum to
    more than 1, and the first token divides by 0. Both take the token in before they are used.

    normaliser with the new token, memory without
        normaliser = normaliser + nearby(k)
        return recurrent_read(nearby(q), memory, normaliser), memory + outer(nearby(k), v), normaliser
    The normaliser counts the new token, and the memory that is read does not hold it yet: weights sum to less
    than 1, and the first output is 0. Both take the token in before they are used.

    not divided by the normaliser
        memory, normaliser = memory + outer(nearby(k), v), normaliser + nearby(k)
        return (nearby(q)[..., None] * memory).sum(-2), memory, normaliser
    The output is Sᵀφ(q), a sum of values with weights that do not sum to 1. Divide by z·φ(q).

    the normaliser never grows
        memory = memory + outer(nearby(k), v)
        return recurrent_read(nearby(q), memory, normaliser + nearby(k)), memory, normaliser
    The normaliser came back without φ(k). It is a sum over all tokens, as the memory is; otherwise outputs
    grow with the length of the text.

    no normaliser kept at all
        memory = memory + outer(nearby(k), v)
        return recurrent_read(nearby(q), memory, normaliser), memory, normaliser
    The token was written to the memory only: the normaliser was used as it came, and came back so. Behind an
    empty memory that divides by 0. φ(k) is added to it in every step, before the output.

    the normaliser starts anew
        memory, normaliser = memory + outer(nearby(k), v), nearby(k)
        return recurrent_read(nearby(q), memory, normaliser), memory, normaliser
    The normaliser was set to φ(k), and what had been summed before is lost. The memory holds all tokens, so
    must it: z + φ(k).

    the memory written over
        memory, normaliser = outer(nearby(k), v), normaliser + nearby(k)
        return recurrent_read(nearby(q), memory, normaliser), memory, normaliser
    The memory was set to φ(k) vᵀ: all earlier tokens are gone. Add to what is there.

    memory and normaliser written over
        memory, normaliser = outer(nearby(k), v), nearby(k)
        return recurrent_read(nearby(q), memory, normaliser), memory, normaliser
    Memory and normaliser hold the new token alone, so every output is the token's own value. Both are sums
    over all tokens: add to what is there.

    the outer product transposed
        memory, normaliser = memory + outer(v, nearby(k)), normaliser + nearby(k)
        return recurrent_read(nearby(q), memory, normaliser), memory, normaliser
    What was written is v φ(k)ᵀ, (V, K), and not φ(k) vᵀ, (K, V). It only fits where K = V, and then a query
    reads along the wrong side. Features go down, the numbers of the value across.

    read along the wrong side
        memory, normaliser = memory + outer(nearby(k), v), normaliser + nearby(k)
        return (
            (memory @ nearby(q)[..., None])[..., 0] / (nearby(q) * normaliser).sum(-1, keepdim=True),
            memory,
            normaliser,
        )
    The memory was read as S φ(q), summed over the numbers of the value. It is Sᵀφ(q): the sum runs over the
    features, dimension −2 of the memory, and leaves V numbers.

    written in place
        memory += outer(nearby(k), v)
        normaliser += nearby(k)
        return recurrent_read(nearby(q), memory, normaliser), memory, normaliser
    The numbers are right, but something that was handed in has changed, most likely the memory or the
    normaliser (`+=`, `add_`). Code that goes on from the same past a second time (another sample, a test)
    finds a token in it that is not theirs. Make new tensors: `memory = memory + …`.

    the new state not returned
        return (
            recurrent_read(nearby(q), memory + outer(nearby(k), v), normaliser + nearby(k)),
            memory,
            normaliser,
        )
    The output is right, but memory and normaliser came back as they were: the next token would know nothing
    of this one.

    the key written without its feature map
        memory, normaliser = memory + outer(k, v), normaliser + nearby(k)
        return recurrent_read(nearby(q), memory, normaliser), memory, normaliser
    The memory took k vᵀ, without φ, while the normaliser took φ(k): weights above and below do not match.
    φ(k) goes into both.

    a normaliser without the feature map
        memory, normaliser = memory + outer(nearby(k), v), normaliser + k
        return recurrent_read(nearby(q), memory, normaliser), memory, normaliser
    The normaliser took k, without φ, and may come near 0 or below. φ(k) goes into both sums.

    the query without its feature map
        memory, normaliser = memory + outer(nearby(k), v), normaliser + nearby(k)
        return recurrent_read(q, memory, normaliser), memory, normaliser
    Memory and normaliser were read with q itself, so weights may be negative. It is φ(q), above and below.

    no feature map
        memory, normaliser = memory + outer(k, v), normaliser + k
        return recurrent_read(q, memory, normaliser), memory, normaliser
    Keys were written and queries read as they are. What is handed in are q and k; φ = elu + 1 is to be
    applied to both.

    keys without their feature map
        memory, normaliser = memory + outer(k, v), normaliser + k
        return recurrent_read(nearby(q), memory, normaliser), memory, normaliser
    Memory and normaliser took k as it is, and only the query went through φ: weights may be negative. φ(k)
    goes into both sums.

    query and key exchanged
        memory, normaliser = memory + outer(nearby(q), v), normaliser + nearby(q)
        return recurrent_read(nearby(k), memory, normaliser), memory, normaliser
    φ(q) was written, and φ(k) used to read. A token leaves its *key* behind, by which later queries find it.

    elu without + 1
        memory, normaliser = memory + outer(F.elu(k), v), normaliser + F.elu(k)
        return recurrent_read(F.elu(q), memory, normaliser), memory, normaliser
    φ was elu alone, which goes down to −1: the normaliser may come near 0. φ is elu + 1.

    the feature map on the value
        memory, normaliser = memory + outer(nearby(k), nearby(v)), normaliser + nearby(k)
        return recurrent_read(nearby(q), memory, normaliser), memory, normaliser
    φ was applied to the value as well. It is for queries and keys, whose products are weights.

    the query left out of the normaliser
        memory, normaliser = memory + outer(nearby(k), v), normaliser + nearby(k)
        return (
            (nearby(q)[..., None] * memory).sum(-2) / normaliser.sum(-1, keepdim=True),
            memory,
            normaliser,
        )
    The output was divided by the sum of z. The weights of *this* query sum to z·φ(q): each feature counts as
    much as the query has of it.

    the new token counted twice
        memory, normaliser, f = memory + outer(nearby(k), v), normaliser + nearby(k), nearby(q)
        return (
            recurrent_read(f, memory, normaliser)
            + (f * nearby(k)).sum(-1, keepdim=True) * v / (f * normaliser).sum(-1, keepdim=True),
            memory,
            normaliser,
        )
    The token was written, and its own part φ(q)·φ(k) v was added to the output once more. What is in the
    memory is read from it; nothing is to be added.

    a scale in the numerator alone
        memory, normaliser = memory + outer(nearby(k), v), normaliser + nearby(k)
        return recurrent_read(nearby(q), memory, normaliser) * q.shape[-1] ** -0.5, memory, normaliser
    The output was multiplied by 1/√K, and the normaliser was not. Nothing is scaled here; a factor on all
    weights would cancel.

    the division kept in the memory
        normaliser = normaliser + nearby(k)
        memory = (memory + outer(nearby(k), v)) / normaliser[..., None]
        f = nearby(q)
        return (f[..., None] * memory).sum(-2) / f.sum(-1, keepdim=True), memory, normaliser
    Each row of the memory was divided by its place in the normaliser, and kept so; the next step adds to it
    as if it were a sum. (And Σ φ(q)·(S / z) is not Sᵀφ(q) / (z·φ(q)).) Keep sums, divide on the way out.

    memory and normaliser in the wrong order
        memory, normaliser = memory + outer(nearby(k), v), normaliser + nearby(k)
        return recurrent_read(nearby(q), memory, normaliser), normaliser, memory
    The three tensors came back in another order. It is (out, memory, normaliser).

    (V, K) returned
        memory, normaliser = memory + outer(nearby(k), v), normaliser + nearby(k)
        return recurrent_read(nearby(q), memory, normaliser), memory.mT, normaliser
    The output is right, but the memory came back transposed. It is (B, H, K, V), as it was handed in.

    one head's key for all
        wrote = outer(nearby(k), v).sum(1, keepdim=True)
        memory, normaliser = memory + wrote, normaliser + nearby(k)
        return recurrent_read(nearby(q), memory, normaliser), memory, normaliser
    What the heads wrote was added up, and every memory took the sum. Each head of each sequence has a memory
    of its own: in `einsum` keep b and h on both sides of the arrow.
    """,
    nearby=nearby,
    outer=outer,
    recurrent_read=recurrent_read,
)


# 06.3: The chunked form and its boundary


ChunkedOuts = tuple[Tensor, Tensor]


def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the own chunk gives, up to the token itself."""
    return (q @ k.mT).tril() @ v


def nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.zeros_like(v)


def empty(k: Tensor, v: Tensor) -> Tensor:
    return k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])


def chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: int,
    inside: Callable[[Tensor, Tensor, Tensor], Tensor] = own,
    carried: bool = True,
    keep: float = 1.0,
    written_first: bool = False,
) -> ChunkedOuts:
    """The chunked form, with a part of it changed."""
    state, outs = empty(k, v), []
    for a, b, c in zip(q.split(chunk, 2), k.split(chunk, 2), v.split(chunk, 2), strict=True):
        after = keep * state + b.mT @ c
        past = after if written_first else state
        outs.append(inside(a, b, c) + (a @ past if carried else 0))
        state = after
    return torch.cat(outs, 2), state


@chunked.misconception("the last chunk left out")
def last_left_out(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> ChunkedOuts:
    """There were T // chunk chunks, rounded down: the tokens behind the last whole chunk have no output. The
    last chunk may be shorter; it is a chunk all the same."""
    n = q.shape[2] // chunk * chunk
    if n == 0:
        return v[:, :, :0], empty(k, v)
    return chunks(q[:, :, :n], k[:, :, :n], v[:, :, :n], chunk)


chunked.mistakes(
    r"""
    the state dropped at the boundary
        return chunks(q, k, v, chunk, carried=False)
    Each chunk was worked out for itself, and what the earlier ones left was not read: a token at the
    beginning of a chunk knows nothing of the past. Add q @ state to what the own chunk gives.

    the state starts anew with every chunk
        out, _ = chunks(q, k, v, chunk, carried=False)
        return out, chunks(q, k, v, chunk, keep=0)[1]
    The state was set to zeros at the beginning of each chunk, so nothing goes across, and what is returned
    knows the last chunk alone. Make the zeros once, before the loop.

    only the chunk before
        return chunks(q, k, v, chunk, keep=0)
    The state was replaced by that of the last chunk, kᵀv, in place of being added to. A token sees its own
    chunk and the one before, and no further: a window, not a memory. state = state + kᵀv.

    the own chunk counted twice
        return chunks(q, k, v, chunk, written_first=True)
    The state was updated before it was read, so the own chunk is in it as well as in the masked part: its
    tokens count twice, and those after the query count too. Read the state first, then write the chunk.

    a token sees its whole chunk
        return chunks(q, k, v, chunk, inside=lambda a, b, c: a @ b.mT @ c)
    Inside a chunk every token sees every other, later ones as well: the mask is missing, or the outputs were
    read from the state behind the chunk, which holds all of it. The state is right at the boundaries only;
    inside, a product with zeros above the diagonal says who sees whom.

    the own chunk left out
        return chunks(q, k, v, chunk, inside=nothing)
    The outputs come from the state before the chunk alone: no token sees its own chunk, not even itself. The
    masked product inside the chunk belongs to it.

    a token does not see itself
        return chunks(q, k, v, chunk, inside=lambda a, b, c: (a @ b.mT).tril(-1) @ c)
    The diagonal was hidden as well. A token sees the tokens of its chunk up to itself, s ≤ t: `tril()`, not
    `tril(-1)`.

    the mask upside down
        return chunks(q, k, v, chunk, inside=lambda a, b, c: (a @ b.mT).triu() @ c)
    The upper half was kept: inside a chunk each token sees itself and what comes *after* it. Queries go down,
    keys across; the past is below the diagonal.

    a softmax inside the chunk
        def chunked_attention(q, k, v, chunk):
            def inside(a, b, c):
                hidden = torch.ones(a.shape[2], a.shape[2], dtype=torch.bool).triu(1)
                return (a @ b.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ c

            return chunks(q, k, v, chunk, inside=inside)
    The own chunk went through a softmax, and the state did not: two different sums in one output. There is no
    softmax here; the products q·k are the weights.

    a scale inside the chunk alone
        return chunks(q, k, v, chunk, inside=lambda a, b, c: own(a, b, c) * a.shape[-1] ** -0.5)
    The products inside the chunk were divided by √K, and what comes from the state was not. Here nothing is
    scaled; to scale, do it once, to q, before both.

    a scale that was not asked for
        return chunks(q * q.shape[-1] ** -0.5, k, v, chunk)
    Queries were divided by √K. Nothing is scaled here: the output is Σ (q·k) v.

    a feature map that was not asked for
        return chunks(F.elu(q) + 1, F.elu(k) + 1, v, chunk)
    φ was applied to queries and keys. Here they are features already, as they come: the output is Σ (q·k) v.

    a normaliser that was not asked for
        ones = v.new_ones(*v.shape[:3], 1)
        out, state = chunks(q, k, v, chunk)
        return out / chunks(q, k, ones, chunk)[0], state
    The outputs were divided by the sum of the weights. This exercise has no normaliser, and without φ that
    sum may be 0.

    zeros for the last chunk
        out, state = last_left_out(q, k, v, chunk)
        return F.pad(out, (0, 0, 0, q.shape[2] - out.shape[2])), state
    There were T // chunk chunks, rounded down: the outputs behind the last whole chunk stayed at the zeros
    they were made with, and the state does not know those tokens. Round up.

    the padding not cut off
        q, k, v = (F.pad(x, (0, 0, 0, -x.shape[2] % chunk)) for x in (q, k, v))
        return chunks(q, k, v, chunk)
    The text was filled up with zeros to whole chunks, and the output kept that length. Zeros do no harm to
    the sums, but the output has T tokens: cut it off.

    padded in front, cut off behind
        T = q.shape[2]
        q, k, v = (F.pad(x, (0, 0, -T % chunk, 0)) for x in (q, k, v))
        out, state = chunks(q, k, v, chunk)
        return out[:, :, :T], state
    Zeros were put before the text, and as many rows cut off behind it: every output stands too far back. Cut
    off where you padded.

    a last state without the last chunk
        last = (q.shape[2] - 1) % chunk + 1
        out, state = chunks(q, k, v, chunk)
        return out, state - k[:, :, -last:].mT @ v[:, :, -last:]
    The state returned is the one that the last chunk *read*. What goes on from it misses that chunk: return
    it after the last chunk is written.

    the state transposed
        state, outs = empty(k, v), []
        for a, b, c in zip(q.split(chunk, 2), k.split(chunk, 2), v.split(chunk, 2), strict=True):
            outs.append(own(a, b, c) + a @ state)
            state = state + c.mT @ b
        return torch.cat(outs, 2), state
    The state was made as vᵀk, (V, K), and read as if it were (K, V). It only fits where K = V, and then a
    query reads along the wrong side: kᵀv.

    (V, K) returned
        out, state = chunks(q, k, v, chunk)
        return out, state.mT
    The outputs are right, but the state came back transposed. It is (B, H, K, V), features down, the numbers
    of a value across.

    the whole square
        return own(q, k, v), k.mT @ v
    The numbers are right, but all pairs of tokens were made at once, T·T of them, and `chunk` has no part in
    it: at 100,000 tokens that is 40 GB a head. The square is for the inside of a chunk; a state goes across.

    the square in strips
        outs = []
        for start in range(0, q.shape[2], chunk):
            end = start + chunk
            weights = q[:, :, start:end] @ k[:, :, :end].mT
            outs.append(weights.tril(start) @ v[:, :, :end])
        return torch.cat(outs, 2), k.mT @ v
    The numbers are right, but each chunk met all keys before it, one strip of the square after the other:
    less memory, and the same T·T products. What the earlier chunks left is in the state, of the same size
    however many they were: q @ state.

    the size of a chunk taken for the number of chunks
        return chunks(q, k, v, -(-q.shape[2] // chunk))
    The numbers are right, but there were `chunk` chunks, however long the text (as `torch.chunk` cuts): each
    is T / chunk long, and its square grows with T². `chunk` is how many tokens are in one: `q.split(chunk,
    dim=2)`.

    a shorter last chunk without the state
        out, state = chunks(q, k, v, chunk)
        n = q.shape[2] // chunk * chunk
        return torch.cat((out[:, :, :n], own(q[:, :, n:], k[:, :, n:], v[:, :, n:])), 2), state
    The tokens behind the last whole chunk were worked out for themselves, and did not read the state. The
    last chunk is like the others, but for its length.

    the state of the last chunk alone
        last = (q.shape[2] - 1) % chunk + 1
        return chunks(q, k, v, chunk)[0], k[:, :, -last:].mT @ v[:, :, -last:]
    The outputs are right, but the state returned is kᵀv of the last chunk. It is the sum over all tokens: the
    state as the next chunk would read it.

    the state of chunk c - 1 for chunk c + 1
        state, late, outs = empty(k, v), empty(k, v), []
        for a, b, c in zip(q.split(chunk, 2), k.split(chunk, 2), v.split(chunk, 2), strict=True):
            outs.append(own(a, b, c) + a @ late)
            late, state = state, state + b.mT @ c
        return torch.cat(outs, 2), state
    The state arrives one chunk late: the chunk right before the own one is missing from it. (States were
    shifted twice, or a list of them was read one place too far back.) Chunk c reads the sum of all chunks
    before c.
    """,
    chunks=chunks,
    empty=empty,
    last_left_out=last_left_out,
    nothing=nothing,
    own=own,
)


# 06.4: A state that fades


DecayOuts = tuple[Tensor, Tensor]
Turn = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def turns(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, turn: Turn) -> DecayOuts:
    """One token after the other; ``turn`` makes of (q, a, what is written, state) what is read, and the new
    state."""
    outs = []
    for i in range(q.shape[2]):
        wrote = outer(k[:, :, i], v[:, :, i])
        memory, state = turn(q[:, :, i], decay[:, :, i, None, None], wrote, state)
        outs.append((q[:, :, i, None] @ memory)[:, :, 0])
    return torch.stack(outs, 2), state


def decay_plain(q: Tensor, a: Tensor, wrote: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    state = a * state + wrote
    return state, state


def pairs(
    q: Tensor, k: Tensor, v: Tensor, fade: Tensor, from_state: Tensor, to_last: Tensor, state: Tensor
) -> DecayOuts:
    """All at once: ``fade`` (B, H, T, T) of tokens, ``from_state`` (B, H, T) of the state as each reads it,
    ``to_last`` (B, H, T) of tokens in the last state."""
    out = (q @ k.mT * fade) @ v + from_state[..., None] * (q @ state)
    return out, from_state[..., -1, None, None] * state + (to_last[..., None] * k).mT @ v


def distances(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Sums c_t of logarithms, and c_t − c_s with −∞ above the diagonal."""
    c = log_decay.cumsum(-1)
    future = torch.ones(c.shape[-1], c.shape[-1], dtype=torch.bool).triu(1)
    return c, (c[..., :, None] - c[..., None, :]).masked_fill(future, -torch.inf)


decay.mistakes(
    r"""
    the new token decays as well
        def decayed_attention(q, k, v, log_decay, state):
            def turn(q, a, wrote, state):
                state = a * (state + wrote)
                return state, state

            return turns(q, k, v, log_decay.exp(), state, turn)
    The token was written, and then everything faded, the token itself as well: a_t (S + k vᵀ). In the matrix
    that is a_s ⋯ a_t with a factor too many. The decay of t falls on what was there before t: fade, then
    write.

    faded after the read
        return turns(
            q,
            k,
            v,
            log_decay.exp(),
            state,
            lambda q, a, wrote, state: (state + wrote, a * (state + wrote)),
        )
    The token reads a state that has not faded yet, and its decay falls on it afterwards: all products are one
    place off, a_s ⋯ a_{t−1} in place of a_{s+1} ⋯ a_t. The order is: fade, write, read.

    read before it is written
        return turns(
            q, k, v, log_decay.exp(), state, lambda q, a, wrote, state: (a * state, a * state + wrote)
        )
    The state was read before the new token was in it (or the diagonal of the pairs was hidden), so no token
    sees itself. Fade, write, read.

    the old state read
        return turns(
            q, k, v, log_decay.exp(), state, lambda q, a, wrote, state: (state, a * state + wrote)
        )
    Each token reads the state as the one before it left it, neither faded nor written to. Fade, write, read.

    exp forgotten
        return turns(q, k, v, log_decay, state, decay_plain)
    The logarithms were used as factors. They are negative: every token turned the sign of the state. The
    decay is exp(log_decay), between 0 and 1.

    growth in place of decay
        return turns(q, k, v, (-log_decay).exp(), state, decay_plain)
    The factor was exp(−log_decay), more than 1: the state grows with every token, and overflows. The
    logarithms are negative already.

    no decay
        return turns(q, k, v, torch.ones_like(log_decay), state, decay_plain)
    Nothing fades: log_decay plays no part. S_t = a_t S_{t−1} + k_t v_tᵀ.

    the new token weighed with 1 − a
        def decayed_attention(q, k, v, log_decay, state):
            def turn(q, a, wrote, state):
                state = a * state + (1 - a) * wrote
                return state, state

            return turns(q, k, v, log_decay.exp(), state, turn)
    The token was written with the factor 1 − a, as in a running mean. Some designs do that (HGRN, for one);
    this recurrence writes the token as it is.

    1 − a in place of a
        return turns(q, k, v, 1 - log_decay.exp(), state, decay_plain)
    The state was multiplied by 1 − a: what should be kept is thrown away, and the other way round. a is what
    remains.

    decays one place late
        late = torch.cat((torch.zeros_like(log_decay[..., :1]), log_decay[..., :-1]), -1)
        return turns(q, k, v, late.exp(), state, decay_plain)
    In each step the decay of the token *before* was used, and none in the first: the sums of logarithms were
    shifted by one (or made without their own term). What token t finds fades by a_t.

    a scale that was not asked for
        return turns(q * q.shape[-1] ** -0.5, k, v, log_decay.exp(), state, decay_plain)
    Queries were divided by √K. Nothing is scaled here: out = Sᵀq.

    a feature map that was not asked for
        return turns(nearby(q), nearby(k), v, log_decay.exp(), state, decay_plain)
    φ was applied to queries and keys. Here they are taken as they come.

    the state came back as it was
        return turns(q, k, v, log_decay.exp(), state, decay_plain)[0], state
    The outputs are right, but the state that came back is the one that was handed in: the text that goes on
    would know nothing of these tokens. Return the state behind the last of them.

    (V, K) returned
        out, state = turns(q, k, v, log_decay.exp(), state, decay_plain)
        return out, state.mT
    The outputs are right, but the state came back transposed. It is (B, H, K, V), as it was handed in.

    decays multiplied up twice
        return turns(q, k, v, log_decay.cumsum(-1).exp(), state, decay_plain)
    The state was multiplied by a_0 ⋯ a_t in step t, in a loop: the products were made by cumsum *and* by the
    loop. In a loop each step has its own a_t alone.

    the decay of one token for the whole distance
        past = torch.ones(q.shape[2], q.shape[2]).tril(-1)
        fade = log_decay.exp()[..., None] * past + torch.eye(q.shape[2])
        a = log_decay.exp()
        to_last = torch.cat((a[..., -1:].expand_as(a)[..., 1:], torch.ones_like(a[..., :1])), -1)
        return pairs(q, k, v, fade, a, to_last, state)
    Everything a token reads was multiplied by its own a_t, once, however long ago it was written. Decays
    multiply up: a_{s+1} ⋯ a_t, one factor for each token in between.

    powers of one decay
        T = q.shape[2]
        steps = torch.arange(T)[:, None] - torch.arange(T)
        fade = (log_decay[..., None] * steps.clamp(min=0)).exp().tril()
        from_state = (log_decay * torch.arange(1, T + 1)).exp()
        return pairs(q, k, v, fade, from_state, fade[..., -1, :], state)
    The reading token's own decay was raised to the distance, a_t^(t − s), as if all tokens had the same. That
    holds for retention, where a head has one decay for good; here each token has its own, and the product
    runs over those in between.

    faded by the products from the beginning
        c, _ = distances(log_decay)
        fade = c.exp()[..., None, :].expand(*c.shape, c.shape[-1]).tril()
        return pairs(q, k, v, fade, c.exp(), c.exp(), state)
    Token s was faded by a_0 ⋯ a_s, the decays *before* it, so the newest fades most. What was written at s
    fades by what comes after: a_{s+1} ⋯ a_t = exp(c_t − c_s).

    a factor too many for each pair
        c, d = distances(log_decay)
        return pairs(
            q, k, v, (d + log_decay[..., None, :]).exp(), c.exp(), (c[..., -1:] - c).exp(), state
        )
    Among the pairs token s has faded by a_s as well, and so has the token itself, on the diagonal: sums of
    logarithms that start one place too early. It is a_{s+1} ⋯ a_t = exp(c_t − c_s), and 1 on the diagonal.

    the distances with the wrong sign
        c, d = distances(log_decay)
        return pairs(q, k, v, (-d).exp().tril(), c.exp(), (c[..., -1:] - c).exp(), state)
    Pairs were weighed with exp(c_s − c_t), or with sums made from the end: what is long past grows instead of
    fading. It is exp(c_t − c_s), t down and s across.

    the state handed in not read
        c, d = distances(log_decay)
        out, _ = pairs(q, k, v, d.exp(), c.exp(), (c[..., -1:] - c).exp(), torch.zeros_like(state))
        return out, turns(q, k, v, log_decay.exp(), state, decay_plain)[1]
    The state returned is right, but no output has read what was handed in: qᵀS, faded by a_0 ⋯ a_t, is
    missing from the sum.

    the state handed in left out
        return turns(q, k, v, log_decay.exp(), torch.zeros_like(state), decay_plain)
    The recurrence began with zeros: what was handed in is not in the outputs nor in the last state. A text
    that goes on would have forgotten its beginning.

    the state handed in does not fade
        c, d = distances(log_decay)
        return pairs(q, k, v, d.exp(), torch.ones_like(c), (c[..., -1:] - c).exp(), state)
    Tokens fade, but what was handed in was added undiminished to every output and to the last state. It is
    the past like everything else: by token t it has faded by a_0 ⋯ a_t.

    the state handed in fades one step late
        c, d = distances(log_decay)
        out, last = pairs(q, k, v, d.exp(), (c - log_decay).exp(), (c[..., -1:] - c).exp(), state)
        return out, last + (c[..., -1].exp() - (c - log_decay)[..., -1].exp())[..., None, None] * state
    The first token reads the state handed in unfaded, the second faded by a_0, and so on: a factor is
    missing. a_0 falls on it before the first read.

    quotients of products
        product = log_decay.exp().cumprod(-1)
        fade = (product[..., :, None] / product[..., None, :]).tril()
        return pairs(q, k, v, fade, product, product[..., -1:] / product, state)
    a_{s+1} ⋯ a_t was made as (a_0 ⋯ a_t) / (a_0 ⋯ a_s). That is right on paper; but after some tokens both
    products have underflowed, and 0 / 0 or 0 · ∞ is NaN. Subtract the sums of logarithms first, then exp.

    queries and keys faded apart
        c = log_decay.cumsum(-1)
        near, far = q * c.exp()[..., None], k * (-c).exp()[..., None]
        last = c[..., -1].exp()[..., None, None]
        return (near @ far.mT).tril() @ v + near @ state, last * (state + far.mT @ v)
    Queries were multiplied by a_0 ⋯ a_t and keys by 1 / (a_0 ⋯ a_s): right on paper, and a good trick inside
    short chunks. But with strong decay the first underflows and the second overflows, and 0 · ∞ is NaN.
    Subtract the sums of logarithms first, then exp.

    hidden by a factor, after exp
        c = log_decay.cumsum(-1)
        seen = torch.ones(c.shape[-1], c.shape[-1]).tril()
        fade = (c[..., :, None] - c[..., None, :]).exp() * seen
        return pairs(q, k, v, fade, c.exp(), (c[..., -1:] - c).exp(), state)
    The future was hidden by multiplying with 0 after exp. Above the diagonal c_t − c_s is positive, exp of it
    overflows, and ∞ · 0 is NaN. Set it to −∞ before exp.

    the future not hidden
        c = log_decay.cumsum(-1)
        fade = (c[..., :, None] - c[..., None, :]).exp()
        return pairs(q, k, v, fade, c.exp(), (c[..., -1:] - c).exp(), state)
    exp(c_t − c_s) was used for all pairs. For s > t that is more than 1: tokens to come are seen, and
    amplified. Set c_t − c_s to −∞ above the diagonal.

    a last state that has not faded
        return turns(q, k, v, log_decay.exp(), state, decay_plain)[0], state + k.mT @ v
    The outputs are right, but the state that is handed on is the plain sum of k vᵀ and what was there. In it
    token s has faded by a_{s+1} ⋯ a_{T−1} = exp(c_{T−1} − c_s), the state handed in by all decays.

    a last state without the state handed in
        out, _ = turns(q, k, v, log_decay.exp(), state, decay_plain)
        return out, turns(q, k, v, log_decay.exp(), torch.zeros_like(state), decay_plain)[1]
    The outputs are right, but the state that is handed on holds the tokens of this text alone. What was
    handed in is still there, faded by all decays.

    one head's decay for all
        return turns(q, k, v, log_decay[:, :1].expand_as(log_decay).exp(), state, decay_plain)
    All heads faded by the first one's decays. log_decay is (B, H, T): each head of each sequence has its own.

    an input changed in place
        def decayed_attention(q, k, v, log_decay, state):
            def turn(q, a, wrote, state):
                state *= a
                state += wrote
                return state, state

            return turns(q, k, v, log_decay.exp(), state, turn)
    The numbers are right, but something that was handed in has changed, most likely the state (`*=`, `+=`).
    Make new tensors: `state = a * state + …`.
    """,
    decay_plain=decay_plain,
    distances=distances,
    nearby=nearby,
    pairs=pairs,
    turns=turns,
)


# 06.5: The delta rule as online regression


DeltaOuts = tuple[Tensor, Tensor]


def ask(memory: Tensor, k: Tensor) -> Tensor:
    """Sᵀk."""
    return (k[..., None, :] @ memory)[..., 0, :]


def wide(beta: Tensor) -> Tensor:
    return beta[..., None]


def delta_right(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> DeltaOuts:
    memory = memory + outer(k, wide(beta) * (v - ask(memory, k)))
    return ask(memory, q), memory


def done(q: Tensor, memory: Tensor) -> DeltaOuts:
    return ask(memory, q), memory


delta.mistakes(
    r"""
    added, and nothing removed
        return done(q, memory + outer(k, wide(beta) * v))
    β k vᵀ was added to the memory, as in linear attention. What the memory had under this key is still there,
    and old and new values pile up. The delta rule writes the *error*, v − Sᵀk: what the memory answers
    already is not written again.

    added whole, β not looked at
        return done(q, memory + outer(k, v))
    k vᵀ was added: linear attention, without β and without a look at what is there. The delta rule writes β
    times the error v − Sᵀk.

    β on the new value only
        return done(q, memory + outer(k, wide(beta) * v - ask(memory, k)))
    The old value was removed whole, and the share β of the new one written. A small β then empties the
    memory. It is one step on one error: β stands before both, β k (v − Sᵀk)ᵀ.

    β on the old value only
        return done(q, memory + outer(k, v - wide(beta) * ask(memory, k)))
    The share β of the old value was removed, and the new one written whole. So (1 − β) of the old is left
    beside all of the new, and a token with β = 0, which wants to write nothing, writes everything. β stands
    before the whole error: β k (v − Sᵀk)ᵀ.

    β left out
        return done(q, memory + outer(k, v - ask(memory, k)))
    The whole error was written, as if β were 1. β is the size of the step, chosen by each token for each
    head: with β = 0 the memory stays as it is.

    up the gradient, not down
        return done(q, memory - outer(k, wide(beta) * (v - ask(memory, k))))
    The sign is wrong: the error grew. The gradient of ½|Sᵀk − v|² is k (Sᵀk − v)ᵀ, and descent takes it
    *away*: S − β k (Sᵀk − v)ᵀ, which is S + β k (v − Sᵀk)ᵀ.

    the loss without its ½
        return done(q, memory + outer(k, 2 * wide(beta) * (v - ask(memory, k))))
    The step is twice as long: the gradient was that of |Sᵀk − v|². The ½ of the loss is there to cancel this
    2; with β = 1 and a key of length 1 the value is then replaced, and not overshot.

    the loss as a mean over the value
        return done(q, memory + outer(k, wide(beta) * (v - ask(memory, k)) / v.shape[-1]))
    The step is V times too short: the squares were averaged over the V numbers of the value, as a ready made
    squared error does. |…|² is their sum.

    the whole memory fades
        return done(q, (1 - beta)[..., None, None] * memory + outer(k, wide(beta) * v))
    (1 − β) S + β k vᵀ: all values faded, whatever their key. The delta rule removes only what stands under
    *this* key, β k (Sᵀk)ᵀ; to forget the rest takes a gate, which is another mechanism (gated delta).

    read before writing
        return ask(memory, q), delta_right(q, k, v, beta, memory)[1]
    The output was read from the old memory, so a token does not see itself. Write first, then read: out = Sᵀq
    with the S that is returned.

    the old value removed after the writing
        memory = memory + outer(k, wide(beta) * v)
        return done(q, memory - outer(k, wide(beta) * ask(memory, k)))
    First β k vᵀ was written, then the share β of what the memory answers *now* removed. That answer holds the
    new value already, so a part of it goes at once. The error is taken against the memory as it was.

    β twice
        return done(q, memory + outer(k, wide(beta) ** 2 * (v - ask(memory, k))))
    β was multiplied in twice, once into the error and once into the step. The step is β k (v − Sᵀk)ᵀ.

    the key normalised inside
        return delta_right(q, k / k.norm(dim=-1, keepdim=True), v, beta, memory)
    k was divided by its length. A layer does that to its keys before (else β |k|² may be above 2 and the
    memory explodes), but the step asked for is the gradient with the k that is handed in.

    the step divided by |k|²
        length = k.square().sum(-1, keepdim=True)
        return done(q, memory + outer(k, wide(beta) * (v - ask(memory, k)) / length))
    The step was divided by |k|², so that β = 1 always replaces the value (Kaczmarz' rule, or normalised least
    mean squares). The plain gradient step is longer for a longer key: β k (v − Sᵀk)ᵀ.

    asked with the query, not with the key
        return done(q, memory + outer(k, wide(beta) * (v - ask(memory, q))))
    The old value was read with q: that is what another key holds, and it was taken from this one. What k is
    to replace is what k itself finds, Sᵀk; q only reads the output.

    the output read with the key
        memory = delta_right(q, k, v, beta, memory)[1]
        return ask(memory, k), memory
    The output is Sᵀk, what has just been written. The question of the token is q: out = Sᵀq.

    the query scaled
        out, memory = delta_right(q, k, v, beta, memory)
        return out * q.shape[-1] ** -0.5, memory
    The output was divided by √K, as scores are before a softmax. Here there is no softmax; out = Sᵀq.

    the first head's β for all
        return delta_right(q, k, v, beta[:, :1].expand_as(beta), memory)
    Every head took head 0's step. β is (B, H): each head of each sequence has its own, and against (B, H, V)
    it needs one more dimension at the end.

    the memory came back transposed
        out, memory = delta_right(q, k, v, beta, memory)
        return out, memory.mT.contiguous()
    The memory returned is (B, H, V, K). It came as (B, H, K, V), a row for each feature of the key, and the
    next token expects it so: the outer product is k vᵀ, not v kᵀ.

    written in place
        memory += outer(k, wide(beta) * (v - ask(memory, k)))
        return done(q, memory)
    The numbers are right, but something that was handed in has changed, most likely the memory (`+=`,
    `copy_`, `add_`): code that keeps it, to go back or to branch, has lost it, and gradients break. Return
    new tensors.

    the old memory returned
        return delta_right(q, k, v, beta, memory)[0], memory.clone()
    The output knows the new token, the memory returned does not: the next token will not find it. Return the
    memory that was written.
    """,
    ask=ask,
    delta_right=delta_right,
    done=done,
    outer=outer,
    wide=wide,
)


# 06.6: Mamba's discretisation and step


MambaOuts = tuple[Tensor, Tensor]


def rates(A_log: Tensor) -> Tensor:
    return -A_log.exp()


def step_of(dt: Tensor, dt_bias: Tensor) -> Tensor:
    return F.softplus(dt + dt_bias)


def from_delta(A_log: Tensor, delta: Tensor, B: Tensor) -> MambaOuts:
    """The right discretisation for a step size (batch, E)."""
    delta = delta[..., None]
    return (delta * rates(A_log)).exp(), delta * B[:, None]


def right_step(x: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor, D: Tensor, h: Tensor) -> MambaOuts:
    h = A_bar * h + B_bar * x[..., None]
    return (h * C[:, None]).sum(-1) + D * x, h


def mamba_read(h: Tensor, C: Tensor) -> Tensor:
    return (h * C[:, None]).sum(-1)


mamba.mistakes(
    r"""
    the sign of A lost
        def discretise(A_log, dt, dt_bias, B):
            delta = step_of(dt, dt_bias)[..., None]
            return (delta * A_log.exp()).exp(), delta * B[:, None]
    A = exp(A_log) without the minus: Ā = exp(Δ A) is above 1 and the state grows without end. A_log is the
    logarithm of the *size* of A; the rate itself is −exp(A_log), which makes every state fade.

    A_log taken for A
        def discretise(A_log, dt, dt_bias, B):
            delta = step_of(dt, dt_bias)[..., None]
            return (delta * A_log).exp(), delta * B[:, None]
    Ā = exp(Δ A_log): where A_log is positive the state explodes. The parameter is stored as a logarithm so
    that A = −exp(A_log) stays negative whatever training does to it.

    A_log taken for A, with a minus before it
        def discretise(A_log, dt, dt_bias, B):
            delta = step_of(dt, dt_bias)[..., None]
            return (-delta * A_log).exp(), delta * B[:, None]
    A = −A_log, without the exponential. A_log may be negative, and then this A is positive and the state
    grows. A = −exp(A_log).

    Δ A not exponentiated
        def discretise(A_log, dt, dt_bias, B):
            delta = step_of(dt, dt_bias)[..., None]
            return delta * rates(A_log), delta * B[:, None]
    Ā = Δ A, a negative number: the state would change its sign at every step. The solution of h' = A h after
    a time Δ is exp(Δ A) h.

    Euler's form for A, too
        def discretise(A_log, dt, dt_bias, B):
            delta = step_of(dt, dt_bias)[..., None]
            return 1 + delta * rates(A_log), delta * B[:, None]
    Ā = 1 + Δ A is the Euler form, good for small steps; for long ones it is negative and even below −1. Mamba
    simplifies B̄ only; Ā is the exact exp(Δ A).

    the bilinear form
        def discretise(A_log, dt, dt_bias, B):
            delta = step_of(dt, dt_bias)[..., None]
            half = delta * rates(A_log) / 2
            return (1 + half) / (1 - half), delta * B[:, None] / (1 - half)
    (1 + ΔA/2) / (1 − ΔA/2) for Ā, and ΔB / (1 − ΔA/2) for B̄: the bilinear rule, which S4 uses. For a long
    step it goes to −1, where exp(Δ A) goes to 0. Mamba takes exp(Δ A) and Δ B.

    exp(Δ) times A
        def discretise(A_log, dt, dt_bias, B):
            delta = step_of(dt, dt_bias)[..., None]
            return delta.exp() * rates(A_log), delta * B[:, None]
    Ā = exp(Δ) · A. The exponential is taken of the product: exp(Δ A).

    Δ missing in A_bar
        def discretise(A_log, dt, dt_bias, B):
            delta = step_of(dt, dt_bias)[..., None]
            return rates(A_log).exp().expand(*dt.shape, -1), delta * B[:, None]
    Ā = exp(A), the same for every token. Δ is how long the token makes the state fade: exp(Δ A). Without it
    nothing is selected.

    Δ missing in B_bar
        def discretise(A_log, dt, dt_bias, B):
            A_bar, _ = from_delta(A_log, step_of(dt, dt_bias), B)
            return A_bar, B[:, None].expand_as(A_bar)
    B̄ = B: a token with a step of almost 0, which should leave the state alone, writes as much as any other.
    B̄ = Δ B; the same Δ says how much is forgotten and how much is written.

    the exact form for B
        def discretise(A_log, dt, dt_bias, B):
            A_bar, _ = from_delta(A_log, step_of(dt, dt_bias), B)
            return A_bar, (A_bar - 1) / rates(A_log) * B[:, None]
    B̄ = (exp(Δ A) − 1) / A · B is the exact zero-order hold, as Mamba's paper writes it (equation 4). Its
    code uses the first term of the series, Δ B, since little is lost by it, and that was asked for. For small
    Δ A the two agree; for long steps Δ B is the larger.

    B times what is forgotten
        def discretise(A_log, dt, dt_bias, B):
            A_bar, _ = from_delta(A_log, step_of(dt, dt_bias), B)
            return A_bar, (1 - A_bar) * B[:, None]
    B̄ = (1 − Ā) B, as a gated unit has it: what is forgotten makes room for what is written. In Mamba the
    share written is Δ itself, B̄ = Δ B, whatever A is.

    B faded, too
        def discretise(A_log, dt, dt_bias, B):
            A_bar, B_bar = from_delta(A_log, step_of(dt, dt_bias), B)
            return A_bar, A_bar * B_bar
    B̄ = Δ exp(Δ A) B: the new input has faded before it is written. It comes with this token; only the old
    state fades. B̄ = Δ B.

    softplus missing
        def discretise(A_log, dt, dt_bias, B):
            return from_delta(A_log, dt + dt_bias, B)
    Δ = dt + dt_bias as it stands, which may be negative: then Ā is above 1 and the state grows. softplus
    makes every step positive.

    ReLU for softplus
        def discretise(A_log, dt, dt_bias, B):
            return from_delta(A_log, (dt + dt_bias).relu(), B)
    Negative dt + dt_bias were cut off at 0: such a token does nothing at all and gets no gradient. softplus,
    log(1 + exp(x)), is positive everywhere.

    exp for softplus
        def discretise(A_log, dt, dt_bias, B):
            return from_delta(A_log, (dt + dt_bias).exp(), B)
    Δ = exp(dt + dt_bias). For very negative numbers softplus is nearly that, but for positive ones it goes on
    like x itself: log(1 + exp(x)).

    softplus overflows
        def discretise(A_log, dt, dt_bias, B):
            return from_delta(A_log, (1 + (dt + dt_bias).exp()).log(), B)
    log(1 + exp(x)) was written out: from x = 89 on exp(x) is infinite in fp32, and so is Δ. For such x
    softplus(x) is x; F.softplus and logaddexp know that.

    dt_bias forgotten
        def discretise(A_log, dt, dt_bias, B):
            return from_delta(A_log, F.softplus(dt), B)
    Δ = softplus(dt), without dt_bias. The bias is where a channel's own pace is: it is initialised so that
    softplus(dt_bias) lies between 0.001 and 0.1.

    dt_bias added after the softplus
        def discretise(A_log, dt, dt_bias, B):
            return from_delta(A_log, F.softplus(dt) + dt_bias, B)
    Δ = softplus(dt) + dt_bias may be negative. The bias belongs inside: softplus(dt + dt_bias).

    one step size for all channels
        def discretise(A_log, dt, dt_bias, B):
            delta = step_of(dt, dt_bias)
            return from_delta(A_log, delta.mean(-1, keepdim=True).expand_as(delta), B)
    Δ was averaged over the channels. In Mamba every channel has a step size of its own, (batch, E). (One for
    a whole head is Mamba-2, and there A is one number a head, too.)

    the two the wrong way round
        def discretise(A_log, dt, dt_bias, B):
            A_bar, B_bar = from_delta(A_log, step_of(dt, dt_bias), B)
            return B_bar, A_bar
    B_bar was returned first. Return what fades the state, then what writes: (A_bar, B_bar).

    one rate for all states of a channel
        def discretise(A_log, dt, dt_bias, B):
            delta = step_of(dt, dt_bias)[..., None]
            A = rates(A_log).mean(-1, keepdim=True).expand_as(A_log)
            return (delta * A).exp(), delta * B[:, None]
    All N states of a channel were given one rate, the mean of A over N. Each has its own: slow ones remember
    long, fast ones follow the input.

    the old state read
        def mamba_step(x, A_bar, B_bar, C, D, h):
            return mamba_read(h, C) + D * x, right_step(x, A_bar, B_bar, C, D, h)[1]
    y was read from h as it came, so the token reaches its own output through D alone. The state is brought up
    to date first: y = C · h with the new h.

    D forgotten
        def mamba_step(x, A_bar, B_bar, C, D, h):
            y, h = right_step(x, A_bar, B_bar, C, D, h)
            return y - D * x, h
    y = C · h alone. D x is the way round the state: what a channel needs of the very token need not go
    through the memory.

    x added, without D
        def mamba_step(x, A_bar, B_bar, C, D, h):
            y, h = right_step(x, A_bar, B_bar, C, D, h)
            return y - D * x + x, h
    y = C · h + x, as if D were 1. It is initialised so, but it is learnt, one number for each channel.

    D added, not multiplied
        def mamba_step(x, A_bar, B_bar, C, D, h):
            y, h = right_step(x, A_bar, B_bar, C, D, h)
            return y - D * x + D, h
    y = C · h + D, a bias. D multiplies the input of its channel: D x.

    B and C exchanged
        def mamba_step(x, A_bar, B_bar, C, D, h):
            h = A_bar * h + C[:, None] * x[..., None]
            return (h * B_bar).sum(-1) + D * x, h
    C wrote and B̄ read. B is what an input writes (the key of attention), C what is asked for (the query): h
    = Ā h + B̄ x, y = C · h.

    the input faded, too
        def mamba_step(x, A_bar, B_bar, C, D, h):
            h = A_bar * (h + B_bar * x[..., None])
            return mamba_read(h, C) + D * x, h
    h = Ā (h + B̄ x): the new input has lost a step's worth before it was ever read. Ā is for what was there
    before.

    the state does not fade
        def mamba_step(x, A_bar, B_bar, C, D, h):
            h = h + B_bar * x[..., None]
            return mamba_read(h, C) + D * x, h
    h = h + B̄ x: everything is added up for ever and Ā is not used. h = Ā h + B̄ x.

    a mean of old and new
        def mamba_step(x, A_bar, B_bar, C, D, h):
            h = A_bar * h + (1 - A_bar) * B_bar * x[..., None]
            return mamba_read(h, C) + D * x, h
    h = Ā h + (1 − Ā) B̄ x, as in a gated unit. How much is written is already in B̄, through Δ.

    x written without B_bar
        def mamba_step(x, A_bar, B_bar, C, D, h):
            h = A_bar * h + x[..., None]
            return mamba_read(h, C) + D * x, h
    h = Ā h + x: all N states of a channel took the same. B̄ says into which of them the input goes, and how
    much of it.

    a mean over the states
        def mamba_step(x, A_bar, B_bar, C, D, h):
            h = A_bar * h + B_bar * x[..., None]
            return (h * C[:, None]).mean(-1) + D * x, h
    The N products C h were averaged. y is their sum, the dot product of C with the N states of a channel.

    C forgotten
        def mamba_step(x, A_bar, B_bar, C, D, h):
            h = A_bar * h + B_bar * x[..., None]
            return h.sum(-1) + D * x, h
    The N states of a channel were added up as they are. C, which the token chooses, says what is read of
    each: y = Σ_n C_n h_n + D x.

    written in place
        def mamba_step(x, A_bar, B_bar, C, D, h):
            h.mul_(A_bar).add_(B_bar * x[..., None])
            return mamba_read(h, C) + D * x, h
    The numbers are right, but something that was handed in has changed, most likely the state (`mul_`, `+=`,
    `copy_`): code that keeps it, to go back or to branch, has lost it. Return new tensors.

    the old state returned
        def mamba_step(x, A_bar, B_bar, C, D, h):
            return right_step(x, A_bar, B_bar, C, D, h)[0], torch.clone(h)
    y knows this token, the state returned does not: the next step begins where this one began. Return the new
    h.
    """,
    from_delta=from_delta,
    mamba_read=mamba_read,
    rates=rates,
    right_step=right_step,
    step_of=step_of,
)


# 06.7: wkv without overflow


def faded(w: Tensor, u: Tensor, k: Tensor, t: int, steps: Tensor) -> Tensor:
    """Exponents of the tokens up to t, (B, t + 1, C): the past by so many steps, the token's own last."""
    return torch.cat((k[:, :t] - steps[:, None] * w, (u + k[:, t])[:, None]), 1)


def exponents(w: Tensor, u: Tensor, k: Tensor, t: int) -> Tensor:
    """The right ones."""
    return faded(w, u, k, t, torch.arange(t - 1, -1, -1))


def by_exponents(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, give: Callable[[Tensor, Tensor, Tensor, int], Tensor]
) -> Tensor:
    """A stable average with whatever exponents ``give`` gives, all outputs one after the other."""
    outs = []
    for t in range(k.shape[1]):
        weights = give(w, u, k, t).softmax(1)
        outs.append((weights * v[:, : t + 1]).sum(1))
    return torch.stack(outs, 1)


NONE = -1e38  # the exponent of a past that is empty


def wkv_plain(w: Tensor, u: Tensor, k: Tensor, v: Tensor, top: Tensor | None = None) -> Tensor:
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


wkv.mistakes(
    r"""
    the bonus without effect
        return by_exponents(w, torch.zeros_like(u), k, v, exponents)
    The weights are those of u = 0. Either u was forgotten, or it was given to the past tokens as well (kept
    in the state): what all weights have in common cancels in the average. The bonus e^u belongs to the
    token's own weight alone, and e^k without it is written to the state.

    the bonus on the past, not on the token
        return by_exponents(w, -u, k, v, exponents)
    The past tokens weigh e^(u + …), the token itself e^k: it is the other way round. The state holds plain
    e^k, which only fades; u lifts the token's own weight for this one output.

    the bonus multiplied, not in the exponent
        outs = []
        for t in range(k.shape[1]):
            weights = exponents(w, torch.zeros_like(u), k, t).softmax(1)
            weights[:, -1] *= u
            outs.append((weights * v[:, : t + 1]).sum(1) / weights.sum(1))
        return torch.stack(outs, 1)
    The token's own weight was u e^k. u stands in the exponent, e^(u + k): so it may be any number, and the
    weight stays positive.

    the token's own weight without its key
        def wkv(w, u, k, v):
            def give(w, u, k, t):
                return torch.cat((exponents(w, u, k, t)[:, :-1], u.expand(len(k), 1, -1)), 1)

            return by_exponents(w, u, k, v, give)
    The token's own weight was e^u, whatever its key. u is added to the key: e^(u + k).

    faded twice a step
        return by_exponents(2 * w, u, k, v, exponents)
    The past fades by e^(−2w) a step: the decay was put into the running maximum, m − w, and once more into
    the sums. e^(m − w − n) holds it already.

    the decay off by one
        def wkv(w, u, k, v):
            def give(w, u, k, t):
                return faded(w, u, k, t, torch.arange(t, 0, -1))

            return by_exponents(w, u, k, v, give)
    e^(−(t−s) w): the token before has faded by one step already. In RWKV-4 it has not, e^(−(t−1−s) w): the
    state is read as it was left, and fades when the next token is written. (So fade first and then add e^k v,
    not both.)

    written before it is read
        def wkv(w, u, k, v):
            def give(w, u, k, t):
                return faded(w, torch.logaddexp(u, torch.zeros_like(u)), k, t, torch.arange(t, 0, -1))

            return by_exponents(w, u, k, v, give)
    The state was brought up to date first, so the token counts twice: once in the state, with e^k, and once
    more with its bonus; and what came before has faded a step too far. Read first, then write.

    the past grows
        return by_exponents(-w, u, k, v, exponents)
    e^(+w) a step: the oldest tokens weigh most. w is positive and what fades is multiplied by e^(−w).

    no decay
        return by_exponents(torch.zeros_like(w), u, k, v, exponents)
    w was not used: every past token weighs e^k for ever. Each step multiplies both sums by e^(−w).

    w taken for the raw parameter
        return by_exponents(w.exp(), u, k, v, exponents)
    The decay a step was e^(−e^w), as in RWKV's code, where the parameter is a logarithm. Here w is the rate
    itself, positive already: e^(−w).

    w taken for the factor itself
        return by_exponents(-w.log(), u, k, v, exponents)
    The sums were multiplied by w a step, not by e^(−w). w is a rate, and may be above 1.

    all of the past faded alike
        def wkv(w, u, k, v):
            def give(w, u, k, t):
                return faded(w, u, k, t, torch.ones(t))

            return by_exponents(w, u, k, v, give)
    All past tokens had faded by one step, e^(−w), however old. Each step fades them once more: e^(−(t−1−s)
    w).

    decay counted from the beginning
        def wkv(w, u, k, v):
            def give(w, u, k, t):
                return faded(w, u, k, t, torch.arange(t))

            return by_exponents(w, u, k, v, give)
    The weight of token s was e^(k − s w): the oldest weighs most, and it does not change as time goes on.
    What counts is the distance to the token that reads: t − 1 − s.

    a sum, not an average
        outs = []
        for t in range(k.shape[1]):
            weights = exponents(w, u, k, t).exp()
            outs.append((weights * v[:, : t + 1]).sum(1))
        return torch.stack(outs, 1)
    The numerator alone was returned. wkv divides it by the sum of the same weights.

    the token missing in the average
        out = torch.zeros_like(v)
        for t in range(1, k.shape[1]):
            weights = exponents(w, u, k, t)[:, :-1].softmax(1)
            out[:, t] = (weights * v[:, :t]).sum(1)
        return out
    Only the past was averaged (and the first token, which has none, gave zeros). The token itself counts with
    e^(u + k), in the numerator and in the denominator.

    every channel with the decay of the first
        return by_exponents(w[:1].expand_as(w), u, k, v, exponents)
    One w was used for all channels. w and u are (C,): each channel fades at a pace of its own.

    the future seen
        at = torch.arange(k.shape[1])
        distance = (at[:, None] - 1 - at).abs()[..., None]
        powers = k[:, None] - distance * w  # (B, T, T, C): the last T is the past and the future
        powers[:, at, at] = u + k
        return (powers.softmax(2) * v[:, None]).sum(2)
    Tokens to come were averaged, too, with |t − 1 − s| steps of decay. A token sees those before it and
    itself.

    no running maximum
        return wkv_plain(w, u, k, v)
    The exponentials were computed as they stand: e^k is infinite for k above 88, and 0 for k below −104, so
    the average is ∞/∞ or 0/0, NaN. Divide both sums by e^m, m the largest exponent so far.

    fp64 for a running maximum
        return wkv_plain(w.double(), u.double(), k.double(), v.double()).to(v.dtype)
    The exponentials were computed as they stand, in fp64. That moves the limit from 88 to 709 and no further,
    and kernels do not compute in fp64. With a running maximum fp32 does for any keys.

    the maximum without the bonus
        return running(w, u, k, v, bonus=False)
    The output was computed with the maximum of the past and k, not u + k. The token's own exponent is u + k,
    and with a large u it overflows by itself. To read, take max(m, u + k).

    the largest key of the whole text subtracted
        return wkv_plain(w, u, k, v, k.amax(1))
    Everything was divided by e^max over all T tokens. Nothing overflows; but before that key comes, all
    weights may be 0, and the average is 0/0. (It looks into the future as well, which a decode step cannot.)
    The maximum must run along with the tokens.

    the first key subtracted
        return wkv_plain(w, u, k, v, k[:, 0])
    Everything was divided by e^(first key). That is right only as long as all the others are near it. The
    maximum must be moved when a larger key comes, and the sums with it.

    the maximum does not fade
        return running(w, u, k, v, fades=False)
    The running maximum was that of the keys, without their decay. The sums fade beneath it, e^(−w) a step,
    until they are 0 in fp32, and new small keys are 0 beside that maximum as well: 0/0. The largest exponent
    of the past fades with the past: m − w.

    one maximum of the keys for everything
        return running(w, u, k, v, fades=False, bonus=False)
    The largest key so far was used to read and to write. It knows nothing of the decay, so beside a large key
    of long ago everything is 0, 0/0; nor of the bonus, so that e^(u + k) may overflow. To read take max(m, u
    + k), to write max(m − w, k).

    the maximum starts at 0
        return running(w, u, k, v, start=0.0)
    The largest exponent of an empty past was 0. That is the exponent of a token that is not there; beside it
    keys far below 0 have no weight, and the average is 0/0. Start at −∞, or at −1e38.

    the sums not rescaled to the new maximum
        return running(w, u, k, v, rescale=(False, False))
    The maximum was moved, but a and b stayed divided by the old one. They are in units of e^m: when m becomes
    n, both are multiplied by e^(m − w − n), decay included.

    the denominator not rescaled
        return running(w, u, k, v, rescale=(True, False))
    The numerator was brought to the new maximum, the denominator only faded. Both sums are in units of e^m
    and both move with it, or the weights do not add up to 1 any more.

    keys clamped
        return by_exponents(w, u, k.clamp(-60, 60), v, exponents)
    Keys were cut to ±60 so that nothing overflows. Then a key of 300 weighs as much as one of 60. Only
    differences count: subtract the running maximum and no key needs to be changed.

    a small number added to the denominator
        a = b = torch.zeros_like(k[:, 0])
        outs = []
        for t in range(k.shape[1]):
            own, new = (u + k[:, t]).exp(), k[:, t].exp()
            outs.append((a + own * v[:, t]) / (b + own + 1e-8))
            a, b = (-w).exp() * a + new * v[:, t], (-w).exp() * b + new
        return torch.stack(outs, 1)
    NaN was fought with a small number in the denominator, without a running maximum. 0/0 then gives 0 where
    an average of the values is right, and ∞/∞ stays NaN.

    NaN replaced by zero
        return wkv_plain(w, u, k, v).nan_to_num()
    The exponentials were computed as they stand and the NaN set to 0. That hides the overflow and returns 0
    where an average of the values is right. Subtract the running maximum, and there is no NaN.

    the denominator without the bonus
        outs = []
        for t in range(k.shape[1]):
            with_bonus = exponents(w, u, k, t)
            without = exponents(w, torch.zeros_like(u), k, t)
            n = with_bonus.amax(1, keepdim=True)
            outs.append(((with_bonus - n).exp() * v[:, : t + 1]).sum(1) / (without - n).exp().sum(1))
        return torch.stack(outs, 1)
    The token's own weight is e^(u + k) above and e^k below: the weights do not add up to 1, and the first
    token's output is not its value. Numerator and denominator take the same weights.

    the denominator without the token
        outs = []
        for t in range(k.shape[1]):
            powers = exponents(w, u, k, t)
            n = powers.amax(1, keepdim=True)
            weights = (powers - n).exp()
            outs.append((weights * v[:, : t + 1]).sum(1) / weights[:, :-1].sum(1))
        return torch.stack(outs, 1)
    The token was added to the numerator and not to the denominator (for the first one that is a division by
    0). Both are sums over the same tokens.

    keys changed in place
        out = running(w, u, k, v)
        k -= k.amax(1, keepdim=True)
        return out
    The numbers are right, but the keys handed in were changed (`k -= …`, `k[:, t] += u`). They belong to the
    caller: work on new tensors.
    """,
    by_exponents=by_exponents,
    exponents=exponents,
    faded=faded,
    running=running,
    wkv_plain=wkv_plain,
)


# 06.8: Where the state beats a KV cache


@dataclass
class Count:
    """The parts of a right count, to be changed one by one: numbers of one layer, bytes, layers."""

    model: Config
    attention: Config
    state_bytes: int = 4
    past_bytes: int = 2

    def __post_init__(self) -> None:
        model = self.model
        self.past = model.get("conv_width", 2) - 1  # tokens
        every = model.get("full_every")
        self.full = model["layers"] // every if every else 0
        self.layers = model["layers"] - self.full
        self.attention_layers = self.attention["layers"] - self.full
        if model["kind"] == "mamba":
            self.channels = model["expand"] * model["d_model"]
            self.matrix = self.channels * model["d_state"]
        elif model["kind"] == "rwkv7":
            self.channels = 2 * model["d_model"]
            self.matrix = model["d_model"] * model["head_dim"]
        else:
            keys = model["key_heads"] * model["key_dim"]
            self.channels = 2 * keys + model["value_heads"] * model["value_dim"]
            self.matrix = model["value_heads"] * model["key_dim"] * model["value_dim"]

    @property
    def state(self) -> int:
        return self.layers * (self.matrix * self.state_bytes + self.past * self.channels * self.past_bytes)

    @property
    def per_token(self) -> int:
        return self.attention_layers * 2 * self.attention["kv_heads"] * self.attention["head_dim"] * 2

    def done(self, **changed: Any) -> Sizes:
        state, per_token = changed.get("state", self.state), changed.get("per_token", self.per_token)
        tokens = changed.get("tokens", state // per_token + 1)
        return {"state": state, "per_token": per_token, "tokens": tokens}


crossing.mistakes(
    r"""
    the state in 16 bit
        return Count(model, attention, state_bytes=2).done()
    The state was counted with 2 bytes a number, like keys and values. A key is written once; a state is added
    to at every token, and its rounding errors add up as well. So it is kept in fp32: 4 bytes.

    all that is kept in 32 bit
        return Count(model, attention, past_bytes=4).done()
    The past of the convolution (or of the token shift) was counted with 4 bytes. Nothing is added up there:
    it is a handful of tokens as they came, and 2 bytes do. (kvlearn's own caches keep both in fp32, for
    simplicity; here only the state has 4 bytes.)

    the widths swapped
        return Count(model, attention, state_bytes=2, past_bytes=4).done()
    The state was given 2 bytes and the convolution's past 4. It is the state in which rounding adds up.

    the past of the convolution forgotten
        count = Count(model, attention)
        count.past = 0
        return count.done()
    Only the matrices were counted. A short convolution, or a token shift, looks back a few tokens, and in
    decode these must be kept: (conv_width − 1) tokens of all channels that are convolved, two tokens of
    d_model in RWKV-7.

    conv_width tokens of the past
        count = Count(model, attention)
        count.past = model.get("conv_width", 1)
        return count.done()
    conv_width tokens were kept. One of those that the convolution sees is the new token itself, so conv_width
    − 1 must wait. (Mamba's own code allocates conv_width, and shifts before it multiplies.)

    one token of the past, whatever the width
        count = Count(model, attention)
        count.past = 1
        return count.done()
    One token of the past was counted. A convolution of width W sees W − 1 of them beside the new one.

    expand forgotten
        return Count({**model, "expand": 1}, attention).done()
    d_model channels were counted. Mamba widens before it convolves and scans: expand · d_model channels have
    a state.

    the channels of Mamba's convolution without expand
        count = Count(model, attention)
        count.channels //= model.get("expand", 1)
        return count.done()
    The past of Mamba's convolution was counted with d_model channels. It runs behind the projection: expand ·
    d_model of them, as many as have a state.

    B and C convolved, too
        count = Count(model, attention)
        count.channels += 2 * model.get("d_state", 0)
        return count.done()
    2 · d_state channels were added to Mamba's convolution. So it is in Mamba-2, where x, B and C are
    convolved together; in Mamba B and C are made from x behind the convolution.

    one token shift, not two
        count = Count(model, attention)
        if model["kind"] == "rwkv7":
            count.channels = model["d_model"]
        return count.done()
    Only one token was counted for RWKV-7's shifts. Both halves of its layer, time mixing and channel mixing,
    look at the token before, and they see different things: 2 · d_model numbers.

    a vector for each head, not a matrix
        count = Count(model, attention)
        if model["kind"] != "mamba":
            count.matrix //= model.get("head_dim", model.get("key_dim"))
        return count.done()
    A head of RWKV-7 or of gated delta was given head_dim numbers. It keeps a sum of outer products k vᵀ: a
    matrix, key dimension times value dimension. (RWKV-4 has vectors.)

    one matrix of d_model times d_model
        count = Count(model, attention)
        if model["kind"] == "rwkv7":
            count.matrix = model["d_model"] ** 2
        return count.done()
    RWKV-7's heads were taken for one: d_model². Each of the d_model / head_dim heads has a matrix of head_dim
    times head_dim, together d_model · head_dim numbers.

    matrices counted by key heads
        count = Count(model, attention)
        if model["kind"] == "gated_delta":
            count.matrix = model["key_heads"] * model["key_dim"] * model["value_dim"]
        return count.done()
    Gated delta was given one matrix for each key head. Several value heads share the keys, but each of them
    writes values of its own: a matrix for each value head.

    square matrices of the value dimension
        count = Count(model, attention)
        if model["kind"] == "gated_delta":
            count.matrix = model["value_heads"] * model["value_dim"] ** 2
        return count.done()
    Gated delta's matrices were counted value_dim times value_dim. They lead from keys to values: key_dim
    times value_dim.

    only the values convolved
        count = Count(model, attention)
        if model["kind"] == "gated_delta":
            count.channels = model["value_heads"] * model["value_dim"]
        return count.done()
    Of gated delta's convolution only the values were counted. Queries, keys and values all go through it, and
    the past of all three is kept: 2 · key_heads · key_dim + value_heads · value_dim channels.

    the queries' past forgotten
        count = Count(model, attention)
        if model["kind"] == "gated_delta":
            count.channels -= model["key_heads"] * model["key_dim"]
        return count.done()
    Keys and values were counted in gated delta's convolution, queries were not, as in a KV cache. But here
    the queries are convolved, too, and the convolution needs their past.

    queries counted by value heads in the convolution
        count = Count(model, attention)
        if model["kind"] == "gated_delta":
            count.channels = model["value_heads"] * (2 * model["key_dim"] + model["value_dim"])
        return count.done()
    Queries and keys were counted with value_heads heads. They are repeated for the value heads only *behind*
    the convolution; its past holds key_heads of each.

    one layer's state
        count = Count(model, attention)
        count.layers = 1
        return count.done()
    The state was counted for one layer and compared with keys and values of all. Every layer has a state of
    its own.

    query heads counted, not KV heads
        return Count(model, {**attention, "kv_heads": attention["query_heads"]}).done()
    Keys and values were counted at every query head. With grouped queries only the KV heads have keys and
    values, and the crossing comes so many times later.

    keys only, or one byte a number
        count = Count(model, attention)
        return count.done(per_token=count.per_token // 2)
    Half of a token is missing. It leaves a key *and* a value, in each layer and at each KV head, and each of
    their numbers takes 2 bytes.

    keys and values in 32 bit
        count = Count(model, attention)
        return count.done(per_token=count.per_token * 2)
    Keys and values were counted with 4 bytes. They are kept in 16 bit, 2 bytes; it is the state that has 4.

    one layer's keys and values
        count = Count(model, attention)
        count.attention_layers = 1
        return count.done()
    Keys and values were counted for one layer, and the state for all. Every layer of the attention model has
    its own.

    the layers of the wrong model
        count = Count(model, attention)
        count.attention_layers = model["layers"] - count.full
        return count.done()
    Keys and values were counted with the layers of the recurrent model. The two need not be equally deep: 64
    layers of Mamba-2.8B stand against 32 of Pythia-2.8B, since a Mamba layer has no MLP beside it.

    a hybrid's states against keys and values of all layers
        count = Count(model, attention)
        count.attention_layers = attention["layers"]
        return count.done()
    per_token was counted for all layers. The hybrid's full layers hold their keys and values as well, so they
    do not speak for either side: what it saves are those of the layers that have a state.

    a hybrid's states against its own full layers
        count = Count(model, attention)
        count.attention_layers = count.full or count.attention_layers
        return count.done()
    The states were compared with the keys and values of the hybrid's *full* layers. Those it has in any case.
    The question is what its other layers would hold, were they full.

    a state in every layer of a hybrid
        count = Count(model, attention)
        count.layers = model["layers"]
        return count.done()
    A state was counted in all layers. Every full_every-th layer is full attention and has none.

    a hybrid not seen as one
        return Count({**model, "full_every": None}, attention).done()
    full_every was not looked at: states and keys and values in all layers. In `tokens` it cancels where both
    have as many layers, but not in the bytes.

    full and recurrent layers exchanged
        count = Count(model, attention)
        if count.full:
            count.layers, count.attention_layers = count.full, attention["layers"] - count.layers
        return count.done()
    layers // full_every was taken for the number of layers with a state. It is the number of *full* ones:
    every full_every-th is full, all the others have a state.

    full layers rounded up
        count = Count(model, attention)
        if count.full:
            more = int(model["layers"] % model["full_every"] > 0)
            count.layers, count.attention_layers = count.layers - more, count.attention_layers - more
        return count.done()
    A full layer too many was counted where full_every does not divide the number of layers. Layers are full
    where their number, from 1 on, is a multiple of full_every: layers // full_every, rounded down.

    values counted by key heads in the convolution
        count = Count(model, attention)
        if model["kind"] == "gated_delta":
            count.channels = model["key_heads"] * (2 * model["key_dim"] + model["value_dim"])
        return count.done()
    Gated delta's convolution was counted with key_heads heads of values. Queries and keys have that many,
    values have value_heads.

    the values not convolved
        count = Count(model, attention)
        if model["kind"] == "gated_delta":
            count.channels = 2 * model["key_heads"] * model["key_dim"]
        return count.done()
    Only queries and keys were counted in gated delta's convolution. Values go through it as well, and their
    past is kept too.

    equal taken for smaller
        count = Count(model, attention)
        return count.done(tokens=-(-count.state // count.per_token))
    state / per_token was rounded up. Where it comes out even, the two are *equal* there, and the state is
    smaller only from the next token on: state // per_token + 1.

    tokens rounded down
        count = Count(model, attention)
        return count.done(tokens=count.state // count.per_token)
    state // per_token is the last number of tokens at which keys and values take no more bytes than the
    state. The state is smaller from the next one on.

    tokens not a whole number
        count = Count(model, attention)
        return count.done(tokens=count.state / count.per_token)
    state / per_token was returned as it is. Tokens come whole: the first number of them at which the state is
    smaller.

    tokens rounded to the nearest
        count = Count(model, attention)
        return count.done(tokens=round(count.state / count.per_token))
    state / per_token was rounded to the nearest whole number, which is sometimes one too few. The first
    number of tokens *above* it counts: state // per_token + 1.

    in KiB
        count = Count(model, attention)
        return count.done(
            state=count.state / 1024, per_token=count.per_token / 1024, tokens=count.done()["tokens"]
        )
    The sizes were divided by 1024. Bytes were asked for, whole numbers, so that nothing is lost by rounding.

    tokens counted from the bytes of one layer each
        count = Count(model, attention)
        one = count.per_token // count.attention_layers
        return count.done(tokens=count.state // count.layers // one + 1)
    The crossing was computed for one layer against one layer. That is right only where both models have as
    many of them; here the whole state stands against all keys and values of a token.
    """,
    Count=Count,
)
