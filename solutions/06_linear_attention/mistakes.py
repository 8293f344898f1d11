"""Unit 06: known mistakes of the exercises on linear attention and its relatives."""

import torch
from torch import Tensor

from .checks import chunked, crossing, decay, delta, features, mamba, outer, recurrent, wkv

# 06.1: Feature map and normaliser


def softmax_of(scores: Tensor) -> Tensor:
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


features.mistakes(
    r"""
    no normaliser
        weights @ v / total.masked_fill(total == 0, 1.0) → weights @ v
    The weights were not divided by their sum. They are all positive, so the outputs grow with every token.
    Divide by what the weights of the token sum to. (Later designs leave the normaliser out on purpose, and
    put a norm behind the layer.)

    a normaliser over all tokens
        .tril() →
        weights @ v → weights.tril() @ v
    The outputs are divided by the sum over *all* keys, those to come as well: the weights were summed before
    the future was hidden. So weights sum to less than 1, and every token learns something of the future. Hide
    first, then sum.

    a normaliser without the feature map
        weights.sum( → (q @ k.transpose(-2, -1)).tril().sum(
    The outputs are divided by the sum of q·k, without φ. Such a sum may be 0 or negative, and it is not what
    the weights sum to. The same φ(q)·φ(k) is above and below.

    elu without + 1
        (F.elu(q) + 1) @ (F.elu(k) + 1) → F.elu(q) @ F.elu(k)
    φ was elu alone. Its values go down to −1, so weights may be negative, their sum may come close to 0, and
    the quotient blows up. The + 1 is what makes every feature positive.

    + 1 on the product, not on the features
        (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1) → F.elu(q) @ F.elu(k).transpose(-2, -1) + 1
    1 was added to elu(q)·elu(k). Then the features are negative still, and so may the weights be: each
    feature gets its + 1 *before* the product.

    relu in place of elu + 1
        (F.elu(q) + 1) @ (F.elu(k) + 1) → F.relu(q) @ F.relu(k)
    φ was relu. It gives no negative weights, but whatever is below 0 becomes 0, with no gradient; a query and
    a key that share no positive number do not see each other, and a sum of such weights is 0. φ = elu + 1 is
    positive everywhere.

    exp as the feature map
        (F.elu(q) + 1) @ (F.elu(k) + 1) → q.exp() @ k.exp()
    φ was exp. That is positive, but it overflows from 89 on, and it is not the map that was asked for: elu(x)
    + 1 grows like x + 1 above 0, and is eˣ only below.

    softmax as the feature map
        (F.elu(q) + 1) @ (F.elu(k) + 1) → q.softmax(-1) @ k.softmax(-1)
    φ was a softmax over the features of each query and key. Such maps exist, but here φ works on each number
    for itself: elu(x) + 1.

    the softmax left in
        weights = ( → weights = softmax_of(
        .tril() →
    The products φ(q)·φ(k) went through a softmax. They *are* the weights, in place of exp(q·k): divide them
    by their sum, with no exp. With a softmax nothing can be pulled apart into a state.

    softmax attention
        ((F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1)).tril()
            → softmax_of(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5)
    This is softmax attention as in unit 01, without a feature map. Linear attention has φ(q)·φ(k) in
    place of exp(q·k / √K).

    a scale before the feature map
        F.elu(q) → F.elu(q * q.shape[-1] ** -0.5)
    Queries were divided by √K before φ. A factor on the *weights* would cancel, above and below; inside φ it
    changes them, for φ(q / √K) is not φ(q) / √K. Nothing is scaled here.

    divided by the number of tokens
        total.masked_fill(total == 0, 1.0) → torch.arange(1, q.shape[2] + 1)[:, None]
    The sums were divided by how many tokens per token sees. That keeps them from growing with the length, but
    the weights do not sum to 1: divide by the weights' own sum.

    the future not hidden
        .tril() →
    Every token sees every other, those to come as well. Set the weights above the diagonal to 0 before they
    are summed.

    a token does not see itself
        .tril() → .tril(-1)
    The diagonal was hidden with the future, so the first token sees nothing at all. A token sees itself: s ≤
    t.

    hidden with minus infinity
        total = weights
            → weights = weights.masked_fill(torch.ones_like(weights, dtype=torch.bool).triu(1), -torch.inf)
            total = weights
    Weights of the future were set to −∞. That is the way where a softmax follows, which makes 0 of it. Here
    the numbers are weights already: a hidden token's is 0.

    the feature map on the values
        weights @ v → weights @ (F.elu(v) + 1)
    φ was applied to the values as well. It makes weights of queries and keys; values are what is averaged,
    and may be negative.

    the feature map on the keys alone
        (F.elu(q) + 1) @ → q @
    The queries went in without φ, so weights may be negative. Both sides have the feature map.

    the feature map on the queries alone
        (F.elu(k) + 1).transpose → k.transpose
    The keys went in without φ, so weights may be negative. Both sides have the feature map.

    no feature map
        (F.elu(q) + 1) @ (F.elu(k) + 1) → q @ k
    The weights were q·k itself, which may be negative; their sum may be 0, and the quotient blows up. φ makes
    every feature positive first.

    the feature map on the product
        (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1) → F.elu(q @ k.transpose(-2, -1)) + 1
    φ was applied to q·k, not to q and k. That gives weights, but ones that cannot be pulled apart: only a
    product φ(q)·φ(k) lets the sum over keys be made once, as a state, for all queries to come.

    a normaliser for each key
        sum(dim=-1 → sum(dim=-2
        weights @ v / total.masked_fill(total == 0, 1.0) → weights / total.masked_fill(total == 0, 1.0) @ v
    The weights were divided by their sum over the *queries*, down the columns. Each query's weights sum to 1:
    `sum(dim=-1)`, along the keys.

    0 / 0 where no key has any weight
        total.masked_fill(total == 0, 1.0) → total
    Far below 0, elu(x) + 1 is exactly 0. A token whose weights are all 0 divides 0 by 0, which is NaN, and
    one NaN spoils every layer above it. Put 1 in place of a sum of 0: the output is 0 then.

    a small number added to the normaliser
        total.masked_fill(total == 0, 1.0) → (total + 1e-6)
    1e-6 was added to every sum, to avoid 0 / 0. With K = 8 and all numbers at −8 the weights are 9e-7, and
    outputs come out at half their size. Only a sum of exactly 0 needs help: put 1 in its place.

    the normaliser kept above a small number
        total.masked_fill(total == 0, 1.0) → total.clamp_min(1e-6)
    Sums below 1e-6 were raised to it, to avoid 0 / 0. They are sums of small weights, and their quotient is
    an average like any other: it comes out too small. Only a sum of exactly 0 needs help: put 1 in its place.

    the mask upside down
        .tril() → .triu()
    The upper half was kept: each token sees itself and what comes *after* it. Queries go down, keys across;
    the past is below the diagonal, `tril()`.

    the future hidden in the normaliser alone
        .tril() →
        weights.sum( → weights.tril().sum(
    The values of all tokens were summed, and divided by the weights of the past: weights sum to more than 1.
    Hide the future in the weights, and use these above and below.

    the query left out of the normaliser
        weights.sum(dim=-1, keepdim=True) → (F.elu(k) + 1).sum(dim=-1, keepdim=True).cumsum(2)
    The outputs were divided by the sum of φ(k) over tokens and features. The weights of *this* query sum to
    φ(q)·Σφ(k): each feature counts as much as the query has of it.

    elu of x + 1
        (F.elu(q) + 1) @ (F.elu(k) + 1) → F.elu(q + 1) @ F.elu(k + 1)
    φ was elu(x + 1): 1 was added before, and not to the result. That still goes down to −1. φ(x) = elu(x) +
    1.

    queries and keys scaled
        F.elu(q) → F.elu(q * q.shape[-1] ** -0.5)
        F.elu(k) → F.elu(k * k.shape[-1] ** -0.5)
    Queries and keys were both divided by √K before φ. Nothing is scaled here: inside φ a factor changes the
    weights, and outside it would cancel.

    the inputs changed in place
        (F.elu(q) + 1) → q.copy_(F.elu(q) + 1)
        (F.elu(k) + 1) → k.copy_(F.elu(k) + 1)
    The numbers are right, but queries or keys that were handed in have changed (`elu_`, `+= 1`). They belong
    to the caller: `F.elu(q) + 1` makes a new tensor.

    the value itself where no key has any weight
        weights @ v / total.masked_fill(total == 0, 1.0) → torch.where(total > 0, weights @ v / total, v)
    Where all weights are 0 the output was the token's own value. A sum of no weights is nothing: 0 was asked
    for.
    """,
    softmax_of=softmax_of,
)


# 06.2: From parallel to recurrent


recurrent.mistakes(
    r"""
    read before it is written
        memory = memory + → new_memory = memory +
        normaliser = normaliser + → new_normaliser = normaliser +
        above / below, memory, normaliser → above / below, new_memory, new_normaliser
    The output was made from the memory as it was before the token. So a token does not see itself, and the
    first one divides 0 by 0. Write, then read.

    memory with the new token, normaliser without
        normaliser = normaliser + → new = normaliser +
        above / below, memory, normaliser → above / below, memory, new
    The new token is in the memory that is read, but not in the normaliser it is divided by: weights sum to
    more than 1, and the first token divides by 0. Both take the token in before they are used.

    normaliser with the new token, memory without
        memory = memory + → new = memory +
        above / below, memory → above / below, new
    The normaliser counts the new token, and the memory that is read does not hold it yet: weights sum to less
    than 1, and the first output is 0. Both take the token in before they are used.

    not divided by the normaliser
        above / below → above
    The output is Sᵀφ(q), a sum of values with weights that do not sum to 1. Divide by z·φ(q).

    the normaliser never grows
        normaliser = normaliser + → total = normaliser +
        phi_q * normaliser → phi_q * total
    The normaliser came back without φ(k). It is a sum over all tokens, as the memory is; otherwise outputs
    grow with the length of the text.

    no normaliser kept at all
        normaliser = normaliser + phi_k →
    The token was written to the memory only: the normaliser was used as it came, and came back so. Behind an
    empty memory that divides by 0. φ(k) is added to it in every step, before the output.

    the normaliser starts anew
        normaliser = normaliser + phi_k → normaliser = phi_k
    The normaliser was set to φ(k), and what had been summed before is lost. The memory holds all tokens, so
    must it: z + φ(k).

    the memory written over
        memory = memory + → memory =
    The memory was set to φ(k) vᵀ: all earlier tokens are gone. Add to what is there.

    memory and normaliser written over
        memory = memory + → memory =
        normaliser = normaliser + → normaliser =
    Memory and normaliser hold the new token alone, so every output is the token's own value. Both are sums
    over all tokens: add to what is there.

    the outer product transposed
        phi_k[..., :, None] * v[..., None, :] → v[..., :, None] * phi_k[..., None, :]
    What was written is v φ(k)ᵀ, (V, K), and not φ(k) vᵀ, (K, V). It only fits where K = V, and then a query
    reads along the wrong side. Features go down, the numbers of the value across.

    read along the wrong side
        (phi_q[..., :, None] * memory).sum(dim=-2) → (phi_q[..., None, :] * memory).sum(dim=-1)
    The memory was read as S φ(q), summed over the numbers of the value. It is Sᵀφ(q): the sum runs over the
    features, dimension −2 of the memory, and leaves V numbers.

    written in place
        memory = memory + → memory +=
        normaliser = normaliser + → normaliser +=
    The numbers are right, but something that was handed in has changed, most likely the memory or the
    normaliser (`+=`, `add_`). Code that goes on from the same past a second time (another sample, a test)
    finds a token in it that is not theirs. Make new tensors: `memory = memory + …`.

    the new state not returned
        phi_q, phi_k = → before = memory, normaliser
            phi_q, phi_k =
        above / below, memory, normaliser → above / below, *before
    The output is right, but memory and normaliser came back as they were: the next token would know nothing
    of this one.

    the key written without its feature map
        phi_k[..., :, None] → k[..., :, None]
    The memory took k vᵀ, without φ, while the normaliser took φ(k): weights above and below do not match.
    φ(k) goes into both.

    a normaliser without the feature map
        normaliser + phi_k → normaliser + k
    The normaliser took k, without φ, and may come near 0 or below. φ(k) goes into both sums.

    the query without its feature map
        F.elu(q) + 1, → q,
    Memory and normaliser were read with q itself, so weights may be negative. It is φ(q), above and below.

    no feature map
        F.elu(q) + 1, F.elu(k) + 1 → q, k
    Keys were written and queries read as they are. What is handed in are q and k; φ = elu + 1 is to be
    applied to both.

    keys without their feature map
        , F.elu(k) + 1 → , k
    Memory and normaliser took k as it is, and only the query went through φ: weights may be negative. φ(k)
    goes into both sums.

    query and key exchanged
        F.elu(q) + 1, F.elu(k) + 1 → F.elu(k) + 1, F.elu(q) + 1
    φ(q) was written, and φ(k) used to read. A token leaves its *key* behind, by which later queries find it.

    elu without + 1
        F.elu(q) + 1, F.elu(k) + 1 → F.elu(q), F.elu(k)
    φ was elu alone, which goes down to −1: the normaliser may come near 0. φ is elu + 1.

    the feature map on the value
        * v[..., None, :] → * (F.elu(v) + 1)[..., None, :]
    φ was applied to the value as well. It is for queries and keys, whose products are weights.

    the query left out of the normaliser
        (phi_q * normaliser).sum → normaliser.sum
    The output was divided by the sum of z. The weights of *this* query sum to z·φ(q): each feature counts as
    much as the query has of it.

    a small number added to the normaliser
        above / below → above / (below + 1e-6)
    1e-6 was added to the sum of the weights. Queries and keys far below 0 have features of that size and
    less, and then the output is too small: the weights of a token sum to 1 only if they are divided by their
    own sum.

    the normaliser kept above a small number
        above / below → above / below.clamp_min(1e-6)
    A sum of weights below 1e-6 was raised to it. Queries and keys far below 0 have such sums, and the output
    is too small: divide by the sum as it is.

    the new token counted twice
        return above → above = above + (phi_q * phi_k).sum(dim=-1, keepdim=True) * v
            return above
    The token was written, and its own part φ(q)·φ(k) v was added to the output once more. What is in the
    memory is read from it; nothing is to be added.

    a scale in the numerator alone
        above / below → above / below * q.shape[-1] ** -0.5
    The output was multiplied by 1/√K, and the normaliser was not. Nothing is scaled here; a factor on all
    weights would cancel.

    the division kept in the memory
        above = → memory = memory / normaliser[..., None]
            above =
        (phi_q * normaliser).sum → phi_q.sum
    Each row of the memory was divided by its place in the normaliser, and kept so; the next step adds to it
    as if it were a sum. (And Σ φ(q)·(S / z) is not Sᵀφ(q) / (z·φ(q)).) Keep sums, divide on the way out.

    memory and normaliser in the wrong order
        above / below, memory, normaliser → above / below, normaliser, memory
    The three tensors came back in another order. It is (out, memory, normaliser).

    (V, K) returned
        above / below, memory → above / below, memory.transpose(-2, -1)
    The output is right, but the memory came back transposed. It is (B, H, K, V), as it was handed in.

    one head's key for all
        phi_k[..., :, None] * v[..., None, :] → (phi_k[..., :, None] * v[..., None, :]).sum(1, keepdim=True)
    What the heads wrote was added up, and every memory took the sum. Each head of each sequence has a memory
    of its own: in `einsum` keep b and h on both sides of the arrow.
    """,
)


# 06.3: The chunked form and its boundary


chunked.mistakes(
    r"""
    the state dropped at the boundary
        past + here → here
    Each chunk was worked out for itself, and what the earlier ones left was not read: a token at the
    beginning of a chunk knows nothing of the past. Add q @ state to what the own chunk gives.

    the state starts anew with every chunk
        past + here → here
        state = state + → state =
    The state was set to zeros at the beginning of each chunk, so nothing goes across, and what is returned
    knows the last chunk alone. Make the zeros once, before the loop.

    only the chunk before
        state = state + → state =
    The state was replaced by that of the last chunk, kᵀv, in place of being added to. A token sees its own
    chunk and the one before, and no further: a window, not a memory. state = state + kᵀv.

    the own chunk counted twice
        past = a @ state → past = a @ (state + b.transpose(-2, -1) @ c)
    The state was updated before it was read, so the own chunk is in it as well as in the masked part: its
    tokens count twice, and those after the query count too. Read the state first, then write the chunk.

    a token sees its whole chunk
        .tril() →
    Inside a chunk every token sees every other, later ones as well: the mask is missing, or the outputs were
    read from the state behind the chunk, which holds all of it. The state is right at the boundaries only;
    inside, a product with zeros above the diagonal says who sees whom.

    the own chunk left out
        past + here → past
    The outputs come from the state before the chunk alone: no token sees its own chunk, not even itself. The
    masked product inside the chunk belongs to it.

    a token does not see itself
        .tril() → .tril(-1)
    The diagonal was hidden as well. A token sees the tokens of its chunk up to itself, s ≤ t: `tril()`, not
    `tril(-1)`.

    the mask upside down
        .tril() → .triu()
    The upper half was kept: inside a chunk each token sees itself and what comes *after* it. Queries go down,
    keys across; the past is below the diagonal.

    a softmax inside the chunk
        here = ( → here = softmax_of(
        .tril() →
    The own chunk went through a softmax, and the state did not: two different sums in one output. There is no
    softmax here; the products q·k are the weights.

    a scale inside the chunk alone
        .tril() @ c → .tril() @ c * a.shape[-1] ** -0.5
    The products inside the chunk were divided by √K, and what comes from the state was not. Here nothing is
    scaled; to scale, do it once, to q, before both.

    a scale that was not asked for
        q.split → (q * q.shape[-1] ** -0.5).split
    Queries were divided by √K. Nothing is scaled here: the output is Σ (q·k) v.

    a feature map that was not asked for
        q.split → (F.elu(q) + 1).split
        k.split → (F.elu(k) + 1).split
    φ was applied to queries and keys. Here they are features already, as they come: the output is Σ (q·k) v.

    a normaliser that was not asked for
        state = q.new_zeros → v = F.pad(v, (0, 1), value=1.0)
            state = q.new_zeros
        return torch.cat(outs, dim=2), state → out = torch.cat(outs, dim=2)
            return out[..., :-1] / out[..., -1:], state[..., :-1]
    The outputs were divided by the sum of the weights. This exercise has no normaliser, and without φ that
    sum may be 0.

    the last chunk left out
        state = q.new_zeros → n = q.shape[2] // chunk * chunk
            q, k, v = (x[:, :, :n] for x in (q, k, v))
            state = q.new_zeros
    There were T // chunk chunks, rounded down: the tokens behind the last whole chunk have no output. The
    last chunk may be shorter; it is a chunk all the same.

    zeros for the last chunk
        state = q.new_zeros → T, n = q.shape[2], q.shape[2] // chunk * chunk
            q, k, v = (x[:, :, :n] for x in (q, k, v))
            state = q.new_zeros
        torch.cat(outs, dim=2) → F.pad(torch.cat(outs, dim=2), (0, 0, 0, T - n))
    There were T // chunk chunks, rounded down: the outputs behind the last whole chunk stayed at the zeros
    they were made with, and the state does not know those tokens. Round up.

    the padding not cut off
        state = q.new_zeros → q, k, v = (F.pad(x, (0, 0, 0, -x.shape[2] % chunk)) for x in (q, k, v))
            state = q.new_zeros
    The text was filled up with zeros to whole chunks, and the output kept that length. Zeros do no harm to
    the sums, but the output has T tokens: cut it off.

    padded in front, cut off behind
        state = q.new_zeros → T = q.shape[2]
            q, k, v = (F.pad(x, (0, 0, -T % chunk, 0)) for x in (q, k, v))
            state = q.new_zeros
        torch.cat(outs, dim=2) → torch.cat(outs, dim=2)[:, :, :T]
    Zeros were put before the text, and as many rows cut off behind it: every output is too far back. Cut
    off where you padded.

    a last state without the last chunk
        dim=2), state → dim=2), state - b.transpose(-2, -1) @ c
    The state returned is the one that the last chunk *read*. What goes on from it misses that chunk: return
    it after the last chunk is written.

    the state transposed
        b.transpose(-2, -1) @ c → c.transpose(-2, -1) @ b
    The state was made as vᵀk, (V, K), and read as if it were (K, V). It only fits where K = V, and then a
    query reads along the wrong side: kᵀv.

    (V, K) returned
        dim=2), state → dim=2), state.transpose(-2, -1)
    The outputs are right, but the state came back transposed. It is (B, H, K, V), features down, the numbers
    of a value across.

    the whole square
        return (q @ k.mT).tril() @ v, k.mT @ v
    The numbers are right, but all pairs of tokens were made at once, T·T of them, and `chunk` has no part in
    it: at 100,000 tokens that is 40 GB a head. The square is for the inside of a chunk; a state goes across.

    one token after the other
        state = q.new_zeros → chunk = 1
            state = q.new_zeros
    The numbers are right, but the state was written and read once for each token, and `chunk` has no part in
    it: that is the recurrence of 06.2, which leaves a GPU idle. Inside a chunk all pairs are worked out at
    once, in one masked product; only the state goes from chunk to chunk.

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
        state = q.new_zeros → chunk = -(-q.shape[2] // chunk)
            state = q.new_zeros
    The numbers are right, but there were `chunk` chunks, however long the text (as `torch.chunk` cuts): each
    is T / chunk long, and its square grows with T². `chunk` is how many tokens are in one: `q.split(chunk,
    dim=2)`.

    a shorter last chunk without the state
        past = a @ state → past = a @ state if a.shape[2] == chunk else 0.0
    The tokens behind the last whole chunk were worked out for themselves, and did not read the state. The
    last chunk is like the others, but for its length.

    the state of the last chunk alone
        dim=2), state → dim=2), b.transpose(-2, -1) @ c
    The outputs are right, but the state returned is kᵀv of the last chunk. It is the sum over all tokens: the
    state as the next chunk would read it.

    the state of chunk c - 1 for chunk c + 1
        outs = [] → outs, late = [], state
        past = a @ state → past = a @ late
        state = state + → late, state = state, state +
    The state arrives one chunk late: the chunk right before the own one is missing from it. (States were
    shifted twice, or a list of them was read one place too far back.) Chunk c reads the sum of all chunks
    before c.
    """,
    softmax_of=softmax_of,
)


# 06.4: A state that fades


def by_factors(q: Tensor, k: Tensor, v: Tensor, factors: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence token by token, where the state is multiplied by these factors (B, H, T)."""
    outs = []
    for t in range(q.shape[2]):
        state = factors[:, :, t, None, None] * state + outer(k[:, :, t], v[:, :, t])
        outs.append((q[:, :, t, None] @ state)[:, :, 0])
    return torch.stack(outs, dim=2), state


decay.mistakes(
    r"""
    the new token decays as well
        between.masked_fill → (between + log_decay[..., None, :]).masked_fill
    The token was written, and then everything faded, the token itself as well: a_t (S + k vᵀ). In the matrix
    that is a_s ⋯ a_t with a factor too many. The decay of t falls on what was there before t: fade, then
    write.

    faded after the read
        log_decay.cumsum(dim=-1) → log_decay.cumsum(dim=-1) - log_decay
        return out, state → return out, log_decay[..., -1, None, None].exp() * state
    The token reads a state that has not faded yet, and its decay falls on it afterwards: all products are one
    place off, a_s ⋯ a_{t−1} in place of a_{s+1} ⋯ a_t. The order is: fade, write, read.

    read before it is written
        * fade) → * fade.tril(-1))
    The state was read before the new token was in it (or the diagonal of the pairs was hidden), so no token
    sees itself. Fade, write, read.

    the old state read
        out = ( → early = (between - log_decay[..., :, None]).masked_fill(~future.T, -torch.inf).exp()
            out = (
        * fade) → * early)
        total.exp()[..., None] → (total - log_decay).exp()[..., None]
    Each token reads the state as the one before it left it, neither faded nor written to. Fade, write, read.

    exp forgotten
        return by_factors(q, k, v, log_decay, state)
    The logarithms were used as factors. They are negative: every token turned the sign of the state. The
    decay is exp(log_decay), between 0 and 1.

    growth in place of decay
        return by_factors(q, k, v, (-log_decay).exp(), state)
    The factor was exp(−log_decay), more than 1: the state grows with every token, and overflows. The
    logarithms are negative already.

    no decay
        total = log_decay.cumsum(dim=-1) → total = torch.zeros_like(log_decay)
    Nothing fades: log_decay plays no part. S_t = a_t S_{t−1} + k_t v_tᵀ.

    the new token weighed with 1 − a
        total = → v = (1 - log_decay.exp())[..., None] * v
            total =
    The token was written with the factor 1 − a, as in a running mean. Some designs do that (HGRN, for one);
    this recurrence writes the token as it is.

    1 − a in place of a
        return by_factors(q, k, v, 1 - log_decay.exp(), state)
    The state was multiplied by 1 − a: what should be kept is thrown away, and the other way round. a is what
    remains.

    decays one place late
        log_decay.cumsum → F.pad(log_decay, (1, -1)).cumsum
    In each step the decay of the token *before* was used, and none in the first: the sums of logarithms were
    shifted by one (or made without their own term). What token t finds fades by a_t.

    a scale that was not asked for
        total = → q = q * q.shape[-1] ** -0.5
            total =
    Queries were divided by √K. Nothing is scaled here: out = Sᵀq.

    a feature map that was not asked for
        total = → q, k = F.elu(q) + 1, F.elu(k) + 1
            total =
    φ was applied to queries and keys. Here they are taken as they come.

    the state came back as it was
        state = total → new = total
    The outputs are right, but the state that came back is the one that was handed in: the text that goes on
    would know nothing of these tokens. Return the state behind the last of them.

    (V, K) returned
        return out, state → return out, state.transpose(-2, -1)
    The outputs are right, but the state came back transposed. It is (B, H, K, V), as it was handed in.

    decays multiplied up twice
        log_decay.cumsum(dim=-1) → log_decay.cumsum(dim=-1).cumsum(dim=-1)
    The state was multiplied by a_0 ⋯ a_t in step t, in a loop: the products were made by cumsum *and* by the
    loop. In a loop each step has its own a_t alone.

    the decay of one token for the whole distance
        log_decay.cumsum(dim=-1) → log_decay
        - total[..., None, :] → * ~torch.eye(q.shape[2], dtype=torch.bool)
    Everything a token reads was multiplied by its own a_t, once, however long ago it was written. Decays
    multiply up: a_{s+1} ⋯ a_t, one factor for each token in between.

    powers of one decay
        total = log_decay.cumsum(dim=-1) → steps = torch.arange(q.shape[2])
            total = log_decay * (steps + 1)
        total[..., :, None] - total[..., None, :] → log_decay[..., :, None] * (steps[:, None] - steps)
    The reading token's own decay was raised to the distance, a_t^(t − s), as if all tokens had the same. That
    holds for retention, where a head has one decay for good; here each token has its own, and the product
    runs over those in between.

    faded by the products from the beginning
        total[..., :, None] - total[..., None, :] → total[..., None, :]
    Token s was faded by a_0 ⋯ a_s, the decays *before* it, so the newest fades most. What was written at s
    fades by what comes after: a_{s+1} ⋯ a_t = exp(c_t − c_s).

    a factor too many for each pair
        * fade) → * fade * log_decay[..., None, :].exp())
    Among the pairs token s has faded by a_s as well, and so has the token itself, on the diagonal: sums of
    logarithms that start one place too early. It is a_{s+1} ⋯ a_t = exp(c_t − c_s), and 1 on the diagonal.

    the distances with the wrong sign
        * fade) → * (-between).exp().tril())
    Pairs were weighed with exp(c_s − c_t), or with sums made from the end: what is long past grows instead of
    fading. It is exp(c_t − c_s), t down and s across.

    the state handed in not read
        + total.exp()[..., None] * (q @ state) →
    The state returned is right, but no output has read what was handed in: qᵀS, faded by a_0 ⋯ a_t, is
    missing from the sum.

    the state handed in left out
        total = → state = torch.zeros_like(state)
            total =
    The recurrence began with zeros: what was handed in is not in the outputs nor in the last state. A text
    that goes on would have forgotten its beginning.

    the state handed in does not fade
        total.exp()[..., None] * → 1 *
        total[..., -1, None, None].exp() * → 1 *
    Tokens fade, but what was handed in was added undiminished to every output and to the last state. It is
    the past like everything else: by token t it has faded by a_0 ⋯ a_t.

    the state handed in fades one step late
        total.exp()[..., None] → (total - log_decay).exp()[..., None]
    The first token reads the state handed in unfaded, the second faded by a_0, and so on: a factor is
    missing. a_0 falls on it before the first read.

    quotients of products
        fade = between.masked_fill(future, -torch.inf).exp() → product = log_decay.exp().cumprod(dim=-1)
            fade = (product[..., :, None] / product[..., None, :]).tril()
    a_{s+1} ⋯ a_t was made as (a_0 ⋯ a_t) / (a_0 ⋯ a_s). That is right on paper; but after some tokens both
    products have underflowed, and 0 / 0 or 0 · ∞ is NaN. Subtract the sums of logarithms first, then exp.

    quotients of products, NaN taken for 0
        fade = between.masked_fill(future, -torch.inf).exp() → product = log_decay.exp().cumprod(dim=-1)
            fade = (product[..., :, None] / product[..., None, :]).nan_to_num().tril()
    a_{s+1} ⋯ a_t was made as (a_0 ⋯ a_t) / (a_0 ⋯ a_s), and 0 / 0 was set to 0. After some strong decays both
    products are 0, so every token seems to have faded altogether, the token itself too, whose factor is 1.
    Subtract the sums of logarithms first, then exp.

    quotients of products, a small number added below
        fade = between.masked_fill(future, -torch.inf).exp() → product = log_decay.exp().cumprod(dim=-1)
            fade = (product[..., :, None] / (product[..., None, :] + 1e-12)).tril()
    a_{s+1} ⋯ a_t was made as (a_0 ⋯ a_t) / (a_0 ⋯ a_s + ε). It is finite, and wrong: where the product below
    is smaller than ε the quotient is nearly 0, for the token itself too, whose factor is 1. Subtract the sums
    of logarithms first, then exp.

    queries and keys faded apart
        c = log_decay.cumsum(-1)
        near, far = q * c.exp()[..., None], k * (-c).exp()[..., None]
        last = c[..., -1].exp()[..., None, None]
        return (near @ far.mT).tril() @ v + near @ state, last * (state + far.mT @ v)
    Queries were multiplied by a_0 ⋯ a_t and keys by 1 / (a_0 ⋯ a_s): right on paper, and a good trick inside
    short chunks. But with strong decay the first underflows and the second overflows, and 0 · ∞ is NaN.
    Subtract the sums of logarithms first, then exp.

    hidden by a factor, after exp
        between.masked_fill(future, -torch.inf).exp() → between.exp() * ~future
    The future was hidden by multiplying with 0 after exp. Above the diagonal c_t − c_s is positive, exp of it
    overflows, and ∞ · 0 is NaN. Set it to −∞ before exp.

    the future not hidden
        between.masked_fill(future, -torch.inf).exp() → between.exp()
    exp(c_t − c_s) was used for all pairs. For s > t that is more than 1: tokens to come are seen, and
    amplified. Set c_t − c_s to −∞ above the diagonal.

    a last state that has not faded
        total[..., -1, None, None].exp() * state + (until_last * k) → state + k
    The outputs are right, but the state that is handed on is the plain sum of k vᵀ and what was there. In it
    token s has faded by a_{s+1} ⋯ a_{T−1} = exp(c_{T−1} − c_s), the state handed in by all decays.

    a last state without the state handed in
        total[..., -1, None, None].exp() * state + →
    The outputs are right, but the state that is handed on holds the tokens of this text alone. What was
    handed in is still there, faded by all decays.

    one head's decay for all
        log_decay.cumsum → log_decay[:, :1].expand_as(log_decay).cumsum
    All heads faded by the first one's decays. log_decay is (B, H, T): each head of each sequence has its own.

    an input changed in place
        state = total[..., -1, None, None].exp() * state + → state *= total[..., -1, None, None].exp()
            state +=
    The numbers are right, but something that was handed in has changed, most likely the state (`*=`, `+=`).
    Make new tensors: `state = a * state + …`.
    """,
    by_factors=by_factors,
)


# 06.5: The delta rule as online regression


delta.mistakes(
    r"""
    added, and nothing removed
        v - (memory * k[..., None]).sum(dim=-2) → v
    β k vᵀ was added to the memory, as in linear attention. What the memory had under this key is still there,
    and old and new values pile up. The delta rule writes the *error*, v − Sᵀk: what the memory answers
    already is not written again.

    added whole, β not looked at
        beta[..., None] * error → v
    k vᵀ was added: linear attention, without β and without a look at what is there. The delta rule writes β
    times the error v − Sᵀk.

    β on the new value only
        error = v - → error = beta[..., None] * v -
        (beta[..., None] * error) → error
    The old value was removed whole, and the share β of the new one written. A small β then empties the
    memory. It is one step on one error: β multiplies both, β k (v − Sᵀk)ᵀ.

    β on the old value only
        v - (memory → v - beta[..., None] * (memory
        (beta[..., None] * error) → error
    The share β of the old value was removed, and the new one written whole. So (1 − β) of the old is left
    beside all of the new, and a token with β = 0, which wants to write nothing, writes everything. β is
    before the whole error: β k (v − Sᵀk)ᵀ.

    β left out
        beta[..., None] * error → error
    The whole error was written, as if β were 1. β is the size of the step, chosen by each token for each
    head: with β = 0 the memory stays as it is.

    up the gradient, not down
        memory = memory + → memory = memory -
    The sign is wrong: the error grew. The gradient of ½|Sᵀk − v|² is k (Sᵀk − v)ᵀ, and descent takes it
    *away*: S − β k (Sᵀk − v)ᵀ, which is S + β k (v − Sᵀk)ᵀ.

    the loss without its ½
        beta[..., None] * error → 2 * beta[..., None] * error
    The step is twice as long: the gradient was that of |Sᵀk − v|². The ½ of the loss is there to cancel this
    2; with β = 1 and a key of length 1 the value is then replaced, and not overshot.

    the loss as a mean over the value
        beta[..., None] * error → beta[..., None] * error / v.shape[-1]
    The step is V times too short: the squares were averaged over the V numbers of the value, as a ready made
    squared error does. |…|² is their sum.

    the whole memory fades
        v - (memory * k[..., None]).sum(dim=-2) → v
        memory = memory + → memory = (1 - beta)[..., None, None] * memory +
    (1 − β) S + β k vᵀ: all values faded, whatever their key. The delta rule removes only the value under
    *this* key, β k (Sᵀk)ᵀ; to forget the rest takes a gate, which is another mechanism (gated delta).

    read before writing
        memory = memory + → new = memory +
        .sum(dim=-2), memory → .sum(dim=-2), new
    The output was read from the old memory, so a token does not see itself. Write first, then read: out = Sᵀq
    with the S that is returned.

    the old value removed after the writing
        v - (memory * k[..., None]).sum(dim=-2) → v
        return → error = -(memory * k[..., None]).sum(dim=-2)
            memory = memory + k[..., None] * (beta[..., None] * error)[..., None, :]
            return
    First β k vᵀ was written, then the share β of what the memory answers *now* removed. That answer holds the
    new value already, so a part of it goes at once. The error is taken against the memory as it was.

    β twice
        beta[..., None] * error → beta[..., None] ** 2 * error
    β was multiplied in twice, once into the error and once into the step. The step is β k (v − Sᵀk)ᵀ.

    the key normalised inside
        error = → k = k / k.norm(dim=-1, keepdim=True)
            error =
    k was divided by its length. A layer does that to its keys before (else β |k|² may be above 2 and the
    memory explodes), but the step asked for is the gradient with the k that is handed in.

    the step divided by |k|²
        beta[..., None] * error → beta[..., None] * error / k.square().sum(dim=-1, keepdim=True)
    The step was divided by |k|², so that β = 1 always replaces the value (Kaczmarz' rule, or normalised least
    mean squares). The plain gradient step is longer for a longer key: β k (v − Sᵀk)ᵀ.

    asked with the query, not with the key
        memory * k[..., None] → memory * q[..., None]
    The old value was read with q: that is what another key holds, and it was taken from this one. What k is
    to replace is what k itself finds, Sᵀk; q only reads the output.

    the output read with the key
        memory * q[..., None] → memory * k[..., None]
    The output is Sᵀk, what has just been written. The question of the token is q: out = Sᵀq.

    the query scaled
        .sum(dim=-2), memory → .sum(dim=-2) * q.shape[-1] ** -0.5, memory
    The output was divided by √K, as scores are before a softmax. Here there is no softmax; out = Sᵀq.

    the first head's β for all
        beta[..., None] → beta[:, :1, None]
    Every head took head 0's step. β is (B, H): each head of each sequence has its own, and against (B, H, V)
    it needs one more dimension at the end.

    the memory came back transposed
        .sum(dim=-2), memory → .sum(dim=-2), memory.transpose(-2, -1)
    The memory returned is (B, H, V, K). It came as (B, H, K, V), a row for each feature of the key, and the
    next token expects it so: the outer product is k vᵀ, not v kᵀ.

    written in place
        memory = memory + → memory +=
    The numbers are right, but something that was handed in has changed, most likely the memory (`+=`,
    `copy_`, `add_`): code that keeps it, to go back or to branch, has lost it, and gradients break. Return
    new tensors.

    the old memory returned
        memory = memory + → new = memory +
        memory * q → new * q
    The output knows the new token, the memory returned does not: the next token will not find it. Return the
    memory that was written.
    """,
)


# 06.6: Mamba's discretisation and step


mamba.mistakes(
    r"""
    the sign of A lost
        -A_log.exp() → A_log.exp()
    A = exp(A_log) without the minus: Ā = exp(Δ A) is above 1 and the state grows without end. A_log is the
    logarithm of the *size* of A; the rate itself is −exp(A_log), which makes every state fade.

    A_log taken for A
        -A_log.exp() → A_log
    Ā = exp(Δ A_log): where A_log is positive the state explodes. The parameter is stored as a logarithm so
    that A = −exp(A_log) stays negative whatever training does to it.

    A_log taken for A, with a minus before it
        -A_log.exp() → -A_log
    A = −A_log, without the exponential. A_log may be negative, and then this A is positive and the state
    grows. A = −exp(A_log).

    Δ A not exponentiated
        (delta * -A_log.exp()).exp() → delta * -A_log.exp()
    Ā = Δ A, a negative number: the state would change its sign at every step. The solution of h' = A h after
    a time Δ is exp(Δ A) h.

    Euler's form for A, too
        (delta * -A_log.exp()).exp() → 1 + delta * -A_log.exp()
    Ā = 1 + Δ A is the Euler form, good for small steps; for long ones it is negative and even below −1. Mamba
    simplifies B̄ only; Ā is the exact exp(Δ A).

    the bilinear form
        return (delta * -A_log.exp()).exp(), delta * B[:, None] → half = delta * -A_log.exp() / 2
            return (1 + half) / (1 - half), delta * B[:, None] / (1 - half)
    (1 + ΔA/2) / (1 − ΔA/2) for Ā, and ΔB / (1 − ΔA/2) for B̄: the bilinear rule, which S4 uses. For a long
    step it goes to −1, where exp(Δ A) goes to 0. Mamba takes exp(Δ A) and Δ B.

    exp(Δ) times A
        (delta * -A_log.exp()).exp() → delta.exp() * -A_log.exp()
    Ā = exp(Δ) · A. The exponential is taken of the product: exp(Δ A).

    Δ missing in A_bar
        (delta * -A_log.exp()).exp() → (-A_log.exp()).exp().expand(*dt.shape, -1)
    Ā = exp(A), the same for every token. Δ is how long the token makes the state fade: exp(Δ A). Without it
    nothing is selected.

    Δ missing in B_bar
        delta * B[:, None] → B[:, None].expand(*dt.shape, -1)
    B̄ = B: a token with a step of almost 0, which should leave the state alone, writes as much as any other.
    B̄ = Δ B; the same Δ says how much is forgotten and how much is written.

    the exact form for B
        delta * B[:, None] → ((delta * -A_log.exp()).exp() - 1) / -A_log.exp() * B[:, None]
    B̄ = (exp(Δ A) − 1) / A · B is the exact zero-order hold, as Mamba's paper writes it (equation 4). Its
    code uses the first term of the series, Δ B, since little is lost by it, and that was asked for. For small
    Δ A the two agree; for long steps Δ B is the larger.

    B times what is forgotten
        delta * B[:, None] → (1 - (delta * -A_log.exp()).exp()) * B[:, None]
    B̄ = (1 − Ā) B, as a gated unit has it: what is forgotten makes room for what is written. In Mamba the
    share written is Δ itself, B̄ = Δ B, whatever A is.

    B faded, too
        delta * B[:, None] → (delta * -A_log.exp()).exp() * delta * B[:, None]
    B̄ = Δ exp(Δ A) B: the new input has faded before it is written. It comes with this token; only the old
    state fades. B̄ = Δ B.

    softplus missing
        torch.nn.functional.softplus(dt + dt_bias) → (dt + dt_bias)
    Δ = dt + dt_bias as it is, which may be negative: then Ā is above 1 and the state grows. softplus
    makes every step positive.

    ReLU for softplus
        torch.nn.functional.softplus → torch.relu
    Negative dt + dt_bias were cut off at 0: such a token does nothing at all and gets no gradient. softplus,
    log(1 + exp(x)), is positive everywhere.

    exp for softplus
        torch.nn.functional.softplus → torch.exp
    Δ = exp(dt + dt_bias). For very negative numbers softplus is nearly that, but for positive ones it goes on
    like x itself: log(1 + exp(x)).

    softplus overflows
        torch.nn.functional.softplus(dt + dt_bias) → (1 + (dt + dt_bias).exp()).log()
    log(1 + exp(x)) was written out: from x = 89 on exp(x) is infinite in fp32, and so is Δ. For such x
    softplus(x) is x; F.softplus and logaddexp know that.

    dt_bias forgotten
        dt + dt_bias → dt
    Δ = softplus(dt), without dt_bias. The bias is where a channel's own pace is: it is initialised so that
    softplus(dt_bias) lies between 0.001 and 0.1.

    dt_bias added after the softplus
        torch.nn.functional.softplus(dt + dt_bias) → (torch.nn.functional.softplus(dt) + dt_bias)
    Δ = softplus(dt) + dt_bias may be negative. The bias belongs inside: softplus(dt + dt_bias).

    one step size for all channels
        softplus(dt + dt_bias) → softplus(dt + dt_bias).mean(-1, keepdim=True).expand_as(dt)
    Δ was averaged over the channels. In Mamba every channel has a step size of its own, (batch, E). (One for
    a whole head is Mamba-2, and there A is one number per head, too.)

    the two the wrong way round
        (delta * -A_log.exp()).exp(), delta * B[:, None] → delta * B[:, None], (delta * -A_log.exp()).exp()
    B_bar was returned first. Return what fades the state, then what writes: (A_bar, B_bar).

    one rate for all states of a channel
        -A_log.exp() → -A_log.exp().mean(-1, keepdim=True).expand_as(A_log)
    All N states of a channel were given one rate, the mean of A over N. Each has its own: slow ones remember
    long, fast ones follow the input.

    the old state read
        h = A_bar → new = A_bar
        D * x, h → D * x, new
    y was read from h as it came, so the token reaches its own output through D alone. The state is brought up
    to date first: y = C · h with the new h.

    D forgotten
        + D * x →
    y = C · h alone. D x is the way round the state: what a channel needs of the very token need not go
    through the memory.

    x added, without D
        D * x → x
    y = C · h + x, as if D were 1. It is initialised so, but it is learnt, one number for each channel.

    D added, not multiplied
        D * x → D
    y = C · h + D, a bias. D multiplies the input of its channel: D x.

    B and C exchanged
        B_bar * x[..., None] → C[:, None] * x[..., None]
        h * C[:, None] → h * B_bar
    C wrote and B̄ read. B is what an input writes (the key of attention), C what is asked for (the query): h
    = Ā h + B̄ x, y = C · h.

    the input faded, too
        A_bar * h + B_bar * x[..., None] → A_bar * (h + B_bar * x[..., None])
    h = Ā (h + B̄ x): the new input has lost a step's worth before it was ever read. Ā is for what was there
    before.

    the state does not fade
        A_bar * h + → h +
    h = h + B̄ x: everything is added up for ever and Ā is not used. h = Ā h + B̄ x.

    a mean of old and new
        + B_bar → + (1 - A_bar) * B_bar
    h = Ā h + (1 − Ā) B̄ x, as in a gated unit. How much is written is already in B̄, through Δ.

    x written without B_bar
        B_bar * x[..., None] → x[..., None]
    h = Ā h + x: all N states of a channel took the same. B̄ says into which of them the input goes, and how
    much of it.

    a mean over the states
        .sum(dim=-1) → .mean(dim=-1)
    The N products C h were averaged. y is their sum, the dot product of C with the N states of a channel.

    C forgotten
        (h * C[:, None]).sum → h.sum
    The N states of a channel were added up as they are. C, which the token chooses, says what is read of
    each: y = Σ_n C_n h_n + D x.

    written in place
        h = A_bar * h + B_bar * x[..., None] → h.mul_(A_bar).add_(B_bar * x[..., None])
    The numbers are right, but something that was handed in has changed, most likely the state (`mul_`, `+=`,
    `copy_`): code that keeps it, to go back or to branch, has lost it. Return new tensors.

    the old state returned
        h = A_bar → new = A_bar
        h * C → new * C
    y knows this token, the state returned does not: the next step begins where this one began. Return the new
    h.
    """,
)


# 06.7: wkv without overflow


wkv.mistakes(
    r"""
    the bonus without effect
        outs = [] → outs, u = [], torch.zeros_like(u)
    The weights are those of u = 0. Either u was forgotten, or it was given to the past tokens as well (kept
    in the state): what all weights have in common cancels in the average. The bonus e^u belongs to the
    token's own weight alone, and e^k without it is written to the state.

    the bonus on the past, not on the token
        outs = [] → outs, u = [], -u
    The past tokens weigh e^(u + …), the token itself e^k: it is the other way round. The state holds plain
    e^k, which only fades; u lifts the token's own weight for this one output.

    the bonus multiplied, not in the exponent
        torch.maximum(m, u + k[:, t]) → torch.maximum(m, k[:, t])
        (u + k[:, t] - n).exp() → u * (k[:, t] - n).exp()
    The token's own weight was u e^k. u is in the exponent, e^(u + k): so it may be any number, and the
    weight stays positive.

    the token's own weight without its key
        torch.maximum(m, u + k[:, t]) → torch.maximum(m, u)
        (u + k[:, t] - n).exp() → (u - n).exp()
    The token's own weight was e^u, whatever its key. u is added to the key: e^(u + k).

    faded twice a step
        outs = [] → outs, w = [], 2 * w
    The past fades by e^(−2w) a step: the decay was put into the running maximum, m − w, and once more into
    the sums. e^(m − w − n) holds it already.

    the decay off by one
        torch.maximum(m, u → torch.maximum(m - w, u
        (m - n).exp() → (m - w - n).exp()
    e^(−(t−s) w): the token before has faded by one step already. In RWKV-4 it has not, e^(−(t−1−s) w): the
    state is read as it was left, and fades when the next token is written. (So fade first and then add e^k v,
    not both.)

    written before it is read
        outs = [] → outs, u = [], torch.logaddexp(u, torch.zeros_like(u))
        torch.maximum(m, u → torch.maximum(m - w, u
        (m - n).exp() → (m - w - n).exp()
    The state was brought up to date first, so the token counts twice: once in the state, with e^k, and once
    more with its bonus; and what came before has faded a step too far. Read first, then write.

    the past grows
        outs = [] → outs, w = [], -w
    e^(+w) a step: the oldest tokens weigh most. w is positive and what fades is multiplied by e^(−w).

    no decay
        outs = [] → outs, w = [], torch.zeros_like(w)
    w was not used: every past token weighs e^k for ever. Each step multiplies both sums by e^(−w).

    w taken for the raw parameter
        outs = [] → outs, w = [], w.exp()
    The decay a step was e^(−e^w), as in RWKV's code, where the parameter is a logarithm. Here w is the rate
    itself, positive already: e^(−w).

    w taken for the factor itself
        outs = [] → outs, w = [], -w.log()
    The sums were multiplied by w a step, not by e^(−w). w is a rate, and may be above 1.

    all of the past faded alike
        torch.maximum(m, u → torch.maximum(m - w, u
        (m - n).exp(), (u → (m - w - n).exp(), (u
        torch.maximum(m - w, k → torch.maximum(m, k
        (m - w - n).exp(), (k → (m - n).exp(), (k
    All past tokens had faded by one step, e^(−w), however old. Each step fades them once more: e^(−(t−1−s)
    w).

    decay counted from the beginning
        torch.maximum(m - w, k[:, t]) → torch.maximum(m, k[:, t] - t * w)
        (m - w - n).exp(), (k[:, t] - n).exp() → (m - n).exp(), (k[:, t] - t * w - n).exp()
    The weight of token s was e^(k − s w): the oldest weighs most, and it does not change as time goes on.
    What counts is the distance to the token that reads: t − 1 − s.

    a sum, not an average
        outs = []
        for t in range(k.shape[1]):
            past = k[:, :t] - torch.arange(t - 1, -1, -1)[:, None] * w
            weights = torch.cat((past, (u + k[:, t])[:, None]), dim=1).exp()
            outs.append((weights * v[:, : t + 1]).sum(1))
        return torch.stack(outs, dim=1)
    The numerator alone was returned. wkv divides it by the sum of the same weights.

    the token missing in the average
        (past * top + own * v[:, t]) / (past * bottom + own) → top / bottom.clamp_min(1.0)
    Only the past was averaged (and the first token, which has none, gave zeros). The token itself counts with
    e^(u + k), in the numerator and in the denominator.

    every channel with the decay of the first
        outs = [] → outs, w = [], w[:1].expand_as(w)
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
        torch.maximum(m, u + k[:, t]) → torch.zeros_like(m)
        torch.maximum(m - w, k[:, t]) → torch.zeros_like(m)
    The exponentials were computed as they are: e^k is infinite for k above 88, and 0 for k below −104, so
    the average is ∞/∞ or 0/0, NaN. Divide both sums by e^m, m the largest exponent so far.

    fp64 for a running maximum
        outs = [] → outs = []
            w, u, k, v = (x.double() for x in (w, u, k, v))
        torch.maximum(m, u + k[:, t]) → torch.zeros_like(m)
        torch.maximum(m - w, k[:, t]) → torch.zeros_like(m)
        torch.stack(outs, dim=1) → torch.stack(outs, dim=1).float()
    The exponentials were computed as they are, in fp64. That moves the limit from 88 to 709 and no further,
    and kernels do not compute in fp64. With a running maximum fp32 does for any keys.

    the maximum without the bonus
        torch.maximum(m, u + k[:, t]) → torch.maximum(m, k[:, t])
    The output was computed with the maximum of the past and k, not u + k. The token's own exponent is u + k,
    and with a large u it overflows by itself. To read, take max(m, u + k).

    the largest key of the whole text subtracted
        torch.maximum(m, u + k[:, t]) → k.amax(1)
        torch.maximum(m - w, k[:, t]) → k.amax(1)
    Everything was divided by e^max over all T tokens. Nothing overflows; but before that key comes, all
    weights may be 0, and the average is 0/0. (It looks into the future as well, which a decode step cannot.)
    The maximum must run along with the tokens.

    the first key subtracted
        torch.maximum(m, u + k[:, t]) → k[:, 0]
        torch.maximum(m - w, k[:, t]) → k[:, 0]
    Everything was divided by e^(first key). That is right only as long as all the others are near it. The
    maximum must be moved when a larger key comes, and the sums with it.

    the maximum does not fade
        torch.maximum(m - w, k → torch.maximum(m, k
    The running maximum was that of the keys, without their decay. The sums fade beneath it, e^(−w) a step,
    until they are 0 in fp32, and new small keys are 0 beside that maximum as well: 0/0. The largest exponent
    of the past fades with the past: m − w.

    one maximum of the keys for everything
        torch.maximum(m, u + k[:, t]) → torch.maximum(k[:, t], m)
        torch.maximum(m - w, k → torch.maximum(m, k
    The largest key so far was used to read and to write. It knows nothing of the decay, so beside a large key
    of long ago everything is 0, 0/0; nor of the bonus, so that e^(u + k) may overflow. To read take max(m, u
    + k), to write max(m − w, k).

    the maximum starts at 0
        -1e38 → 0.0
    The largest exponent of an empty past was 0. That is the exponent of a token that is not there; beside it
    keys far below 0 have no weight, and the average is 0/0. Start at −∞, or at −1e38.

    the sums not rescaled to the new maximum
        (m - w - n).exp() → (-w).exp()
    The maximum was moved, but a and b stayed divided by the old one. They are in units of e^m: when m becomes
    n, both are multiplied by e^(m − w − n), decay included.

    the denominator not rescaled
        past * bottom + own, n → (-w).exp() * bottom + own, n
    The numerator was brought to the new maximum, the denominator only faded. Both sums are in units of e^m
    and both move with it, or the weights do not add up to 1 any more.

    keys clamped
        outs = [] → outs, k = [], k.clamp(-60, 60)
    Keys were cut to ±60 so that nothing overflows. Then a key of 300 weighs as much as one of 60. Only
    differences count: subtract the running maximum and no key needs to be changed.

    a small number added to the denominator
        torch.maximum(m, u + k[:, t]) → torch.zeros_like(m)
        torch.maximum(m - w, k[:, t]) → torch.zeros_like(m)
        (past * bottom + own)) → (past * bottom + own + 1e-8))
    NaN was fought with a small number in the denominator, without a running maximum. 0/0 then gives 0 where
    an average of the values is right, and ∞/∞ stays NaN.

    NaN replaced by zero
        torch.maximum(m, u + k[:, t]) → torch.zeros_like(m)
        torch.maximum(m - w, k[:, t]) → torch.zeros_like(m)
        torch.stack(outs, dim=1) → torch.stack(outs, dim=1).nan_to_num()
    The exponentials were computed as they are and the NaN set to 0. That hides the overflow and returns 0
    where an average of the values is right. Subtract the running maximum, and there is no NaN.

    the denominator without the bonus
        (past * bottom + own)) → (past * bottom + (k[:, t] - n).exp()))
    The token's own weight is e^(u + k) above and e^k below: the weights do not add up to 1, and the first
    token's output is not its value. Numerator and denominator take the same weights.

    the denominator without the token
        (past * bottom + own)) → (past * bottom))
    The token was added to the numerator and not to the denominator (for the first one that is a division by
    0). Both are sums over the same tokens.

    keys changed in place
        return → k -= k.amax(1, keepdim=True)
            return
    The numbers are right, but the keys handed in were changed (`k -= …`, `k[:, t] += u`). They belong to the
    caller: work on new tensors.
    """,
)


# 06.8: Where the state beats a KV cache


crossing.mistakes(
    r"""
    the state in 16 bit
        4 * state → 2 * state
    The state was counted with 2 bytes per number, like keys and values. A key is written once; a state is
    added to at every token, and its rounding errors add up as well. So it is kept in fp32: 4 bytes.

    all that is kept in 32 bit
        2 * past → 4 * past
    The past of the convolution (or of the token shift) was counted with 4 bytes. Nothing is added up there:
    it is a handful of tokens as they came, and 2 bytes do. (kvlearn's own caches keep both in fp32, for
    simplicity; here only the state has 4 bytes.)

    the widths swapped
        4 * state + 2 * past → 2 * state + 4 * past
    The state was given 2 bytes and the convolution's past 4. It is the state in which rounding adds up.

    the past of the convolution forgotten
        4 * state + 2 * past → 4 * state
    Only the matrices were counted. A short convolution, or a token shift, looks back a few tokens, and in
    decode these must be kept: (conv_width − 1) tokens of all channels that are convolved, two tokens of
    d_model in RWKV-7.

    conv_width tokens of the past
        model["d_state"], (model["conv_width"] - 1) * → model["d_state"], model["conv_width"] *
        past = (model["conv_width"] - 1) * → past = model["conv_width"] *
    conv_width tokens were kept. One of those that the convolution sees is the new token itself, so conv_width
    − 1 must wait. (Mamba's own code allocates conv_width, and shifts before it multiplies.)

    one token of the past, whatever the width
        model["d_state"], (model["conv_width"] - 1) * → model["d_state"],
        past = (model["conv_width"] - 1) * → past =
    One token of the past was counted. A convolution of width W sees W − 1 of them beside the new one.

    expand forgotten
        model["expand"] * model["d_model"] → model["d_model"]
    d_model channels were counted. Mamba widens before it convolves and scans: expand · d_model channels have
    a state.

    the channels of Mamba's convolution without expand
        model["d_state"], (model["conv_width"] - 1) * channels
            → model["d_state"], (model["conv_width"] - 1) * model["d_model"]
    The past of Mamba's convolution was counted with d_model channels. It runs behind the projection: expand ·
    d_model of them, as many as have a state.

    B and C convolved, too
        model["d_state"], (model["conv_width"] - 1) * channels
            → model["d_state"], (model["conv_width"] - 1) * (channels + 2 * model["d_state"])
    2 · d_state channels were added to Mamba's convolution. So it is in Mamba-2, where x, B and C are
    convolved together; in Mamba B and C are made from x behind the convolution.

    one token shift, not two
        2 * model["d_model"] → model["d_model"]
    Only one token was counted for RWKV-7's shifts. Both halves of its layer, time mixing and channel mixing,
    look at the token before, and they see different things: 2 · d_model numbers.

    a vector for each head, not a matrix
        model["d_model"] * model["head_dim"] → model["d_model"]
        model["value_heads"] * model["key_dim"] * → model["value_heads"] *
    A head of RWKV-7 or of gated delta was given head_dim numbers. It keeps a sum of outer products k vᵀ: a
    matrix, key dimension times value dimension. (RWKV-4 has vectors.)

    one matrix of d_model times d_model
        model["d_model"] * model["head_dim"] → model["d_model"] ** 2
    RWKV-7's heads were taken for one: d_model². Each of the d_model / head_dim heads has a matrix of head_dim
    times head_dim, together d_model · head_dim numbers.

    matrices counted by key heads
        state = model["value_heads"] → state = model["key_heads"]
    Gated delta was given one matrix for each key head. Several value heads share the keys, but each of them
    writes values of its own: a matrix for each value head.

    square matrices of the value dimension
        model["key_dim"] * model["value_dim"] → model["value_dim"] ** 2
    Gated delta's matrices were counted value_dim times value_dim. They lead from keys to values: key_dim
    times value_dim.

    only the values convolved
        channels = 2 * model["key_heads"] * model["key_dim"] + → channels =
    Of gated delta's convolution only the values were counted. Queries, keys and values all go through it, and
    the past of all three is kept: 2 · key_heads · key_dim + value_heads · value_dim channels.

    the queries' past forgotten
        channels = 2 * → channels =
    Keys and values were counted in gated delta's convolution, queries were not, as in a KV cache. But here
    the queries are convolved, too, and the convolution needs their past.

    queries counted by value heads in the convolution
        channels = 2 * model["key_heads"] → channels = 2 * model["value_heads"]
    Queries and keys were counted with value_heads heads. They are repeated for the value heads only *behind*
    the convolution; its past holds key_heads of each.

    one layer's state
        state = (model["layers"] - full) * → state =
    The state was counted for one layer and compared with keys and values of all. Every layer has a state of
    its own.

    query heads counted, not KV heads
        attention["kv_heads"] → attention["query_heads"]
    Keys and values were counted at every query head. With grouped queries only the KV heads have keys and
    values, and the crossing comes so many times later.

    keys only, or one byte per number
        * 2 * attention["kv_heads"] → * attention["kv_heads"]
    Half of a token is missing. It leaves a key *and* a value, in each layer and at each KV head, and each of
    their numbers takes 2 bytes.

    keys and values in 32 bit
        attention["head_dim"] * 2 → attention["head_dim"] * 4
    Keys and values were counted with 4 bytes. They are kept in 16 bit, 2 bytes; it is the state that has 4.

    one layer's keys and values
        (attention["layers"] - full) * 2 → 2
    Keys and values were counted for one layer, and the state for all. Every layer of the attention model has
    its own.

    the layers of the wrong model
        attention["layers"] → model["layers"]
    Keys and values were counted with the layers of the recurrent model. The two need not be equally deep: 64
    layers of Mamba-2.8B are compared with 32 of Pythia-2.8B, since a Mamba layer has no MLP beside it.

    a hybrid's states against keys and values of all layers
        attention["layers"] - full → attention["layers"]
    per_token was counted for all layers. The hybrid's full layers hold their keys and values as well, so they
    do not speak for either side: what it saves are those of the layers that have a state.

    a hybrid's states against its own full layers
        attention["layers"] - full → full or attention["layers"]
    The states were compared with the keys and values of the hybrid's *full* layers. Those it has in any case.
    The question is what its other layers would hold, were they full.

    a state in every layer of a hybrid
        (model["layers"] - full) → model["layers"]
    A state was counted in all layers. Every full_every-th layer is full attention and has none.

    a hybrid not seen as one
        model["layers"] // model["full_every"] if "full_every" in model else 0 → 0
    full_every was not looked at: states and keys and values in all layers. In `tokens` it cancels where both
    have as many layers, but not in the bytes.

    full and recurrent layers exchanged
        full = model["layers"] // model["full_every"] if
            → full = model["layers"] - model["layers"] // model["full_every"] if
    layers // full_every was taken for the number of layers with a state. It is the number of *full* ones:
    every full_every-th is full, all the others have a state.

    full layers rounded up
        model["layers"] // model["full_every"] → -(-model["layers"] // model["full_every"])
    A full layer too many was counted where full_every does not divide the number of layers. Layers are full
    where their number, from 1 on, is a multiple of full_every: layers // full_every, rounded down.

    values counted by key heads in the convolution
        + model["value_heads"] → + model["key_heads"]
    Gated delta's convolution was counted with key_heads heads of values. Queries and keys have that many,
    values have value_heads.

    the values not convolved
        + model["value_heads"] * model["value_dim"] →
    Only queries and keys were counted in gated delta's convolution. Values go through it as well, and their
    past is kept too.

    equal taken for smaller
        state // per_token + 1 → -(-state // per_token)
    state / per_token was rounded up. Where it comes out even, the two are *equal* there, and the state is
    smaller only from the next token on: state // per_token + 1.

    tokens rounded down
        state // per_token + 1 → state // per_token
    state // per_token is the last number of tokens at which keys and values take no more bytes than the
    state. The state is smaller from the next one on.

    tokens not a whole number
        state // per_token + 1 → state / per_token
    state / per_token was returned as it is. Tokens come whole: the first number of them at which the state is
    smaller.

    tokens rounded to the nearest
        state // per_token + 1 → round(state / per_token)
    state / per_token was rounded to the nearest whole number, which is sometimes one too few. The first
    number of tokens *above* it counts: state // per_token + 1.

    in KiB
        "state": state, "per_token": per_token, → "state": state / 1024, "per_token": per_token / 1024,
    The sizes were divided by 1024. Bytes were asked for, whole numbers, so that nothing is lost by rounding.

    tokens counted from the bytes of one layer each
        state // per_token + 1
            → state // (model["layers"] - full) // (per_token // (attention["layers"] - full)) + 1
    The crossing was computed for one layer against one layer. That is right only where both models have as
    many of them; here the whole state is compared with all keys and values of a token.
    """,
)
