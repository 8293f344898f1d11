"""Unit 03: known mistakes of the exercises on multi-head compression."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import (
    BYTES,
    STEP,
    Config,
    Pair,
    Turn,
    absorb,
    budget,
    decoupled,
    largest,
    latent,
    roads,
    step,
    svd,
)

# 03.1: Down to the latent, up again


def right_down(x: Tensor, w_down: Tensor) -> Tensor:
    return x @ w_down.T


def right_up(c: Tensor, w_up: Tensor, n_heads: int) -> Pair:
    k, v = (c @ w_up.T).unflatten(-1, (2, n_heads, -1)).permute(2, 0, 3, 1, 4)
    return k, v


def halves(w_up: Tensor) -> tuple[slice, slice]:
    width = w_up.shape[0] // 2
    return slice(0, width), slice(width, None)


latent.mistakes(
    r"""
    w_down used without its transpose
        def compress(x, w_down):
            return x @ w_down
    `x @ w_down` multiplies the tokens with the *columns* of w_down. A weight is kept as (out, in), as in
    nn.Linear: it takes a column x to w_down x, and a row to `x @ w_down.T`. Where R = M both run, and only
    one is right.

    w_down reshaped, not transposed
        def compress(x, w_down):
            return x @ w_down.reshape(w_down.shape[::-1])
    `w_down.reshape(M, R)` makes the shapes fit, but it reads the numbers of w_down in the order of memory, so
    that its rows are cut to pieces. To swap rows and columns use `w_down.T`.

    the latent left transposed
        def compress(x, w_down):
            return w_down @ x.transpose(1, 2)
    w_down was put on the left, w_down xᵀ, and the result left as (B, R, T). The numbers are right, and they
    stand in columns; everything else in the course has one token a row: (B, T, R). Transpose once more, or
    write `x @ w_down.T`.

    the latent reshaped back, not transposed
        def compress(x, w_down):
            c = w_down @ x.transpose(1, 2)
            return c.reshape(c.shape[0], c.shape[2], c.shape[1])
    w_down xᵀ is (B, R, T). `reshape(B, T, R)` has the right shape and the wrong content: a row then holds
    numbers of several tokens. `transpose(1, 2)` swaps the two, or write `x @ w_down.T` to begin with.

    the latent normalised
        def compress(x, w_down):
            c = x @ w_down.T
            return c * c.float().square().mean(-1, keepdim=True).rsqrt().to(c.dtype)
    The latent was divided by its root mean square. DeepSeek's MLA does that, with a learned weight for every
    number; here, as in the formula of the task, the latent is w_down x and nothing more.

    the first R numbers kept
        def compress(x, w_down):
            return x[..., : w_down.shape[0]]
    The latent was cut out of x, and w_down not used. Every number of the latent is a weighted sum of *all*
    numbers of the token, with weights that training has found: `x @ w_down.T`.

    values taken for keys
        def decompress(c, w_up, n_heads):
            k, v = right_up(c, w_up, n_heads)
            return v, k
    Keys and values are exchanged. The first H·D rows of w_up are the keys', the last H·D the values'. The
    shapes are alike, so nothing complains: only the model talks nonsense.

    key and value head by head
        def decompress(c, w_up, n_heads):
            k, v = (c @ w_up.T).unflatten(-1, (n_heads, 2, -1)).permute(3, 0, 2, 1, 4)
            return k, v
    The rows of w_up were read as (H, 2, D): key of head 0, value of head 0, key of head 1, … DeepSeek's
    checkpoints are laid out that way. Here all keys come first: (2, H, D), so cut in two *before* you cut
    into heads.

    key and value number by number
        def decompress(c, w_up, n_heads):
            k, v = (c @ w_up.T).unflatten(-1, (n_heads, -1, 2)).permute(4, 0, 2, 1, 3)
            return k, v
    Every other row of w_up was given to the keys. They come in one block, the first H·D rows, and the values
    in another behind it: `chunk(2, dim=-1)`, or cut with `[..., : H * D]`.

    heads interleaved
        def decompress(c, w_up, n_heads):
            k, v = (c @ w_up.T).unflatten(-1, (2, -1, n_heads)).permute(2, 0, 4, 1, 3)
            return k, v
    The rows of the keys were cut as (D, H), so that head h took every H-th of them. A head is a run of D
    neighbouring rows: cut as (H, D).

    reshaped without a transpose
        def decompress(c, w_up, n_heads):
            B, T, _ = c.shape
            k, v = ((c @ w_up.T)[..., half].reshape(B, n_heads, T, -1) for half in halves(w_up))
            return k, v
    `reshape(B, H, T, D)` straight from (B, T, H·D) has the right shape, but it reads in the order of memory,
    where the heads of one token lie side by side: a "head" is then a piece of several tokens. Cut into (B, T,
    H, D) first, then `transpose(1, 2)`. (With T = 1 the two agree.)

    heads left behind the tokens
        def decompress(c, w_up, n_heads):
            k, v = right_up(c, w_up, n_heads)
            return k.transpose(1, 2), v.transpose(1, 2)
    This gives (B, T, H, D). Attention multiplies the last two dimensions, so with time in front the heads of
    one token would attend to each other. Swap dimensions 1 and 2.

    half of the latent for keys, half for values
        def decompress(c, w_up, n_heads):
            half = c.shape[-1] // 2
            keys, values = (w.unflatten(0, (n_heads, -1)) for w in w_up.chunk(2))
            k = torch.einsum("btr,hdr->bhtd", c[..., :half], keys[..., :half])
            v = torch.einsum("btr,hdr->bhtd", c[..., half:], values[..., half:])
            return k, v
    The keys were made from the first R/2 numbers of the latent and the values from the rest. Both are made
    from *all* R numbers: a value may use what a key uses too, and nothing has to be kept twice. It is the
    rows of w_up that are shared out, not its columns.

    w_up reshaped, not transposed
        def decompress(c, w_up, n_heads):
            return right_up(c, w_up.reshape(w_up.shape[::-1]).T, n_heads)
    `w_up.reshape(R, 2·H·D)` makes the shapes fit, but it reads the numbers of w_up in the order of memory, so
    that its rows are cut to pieces. To swap rows and columns use `w_up.T`.

    the keys twice
        def decompress(c, w_up, n_heads):
            k, _ = right_up(c, w_up, n_heads)
            return k, k
    The values are the keys once more. Keys and values share the latent, and each has its own way up: the last
    H·D rows of w_up make the values.

    keys and values not cut apart
        def decompress(c, w_up, n_heads):
            both = (c @ w_up.T).unflatten(-1, (n_heads, -1)).transpose(1, 2)
            return both, both
    w_up was cut into H heads of 2·D rows, and both results are (B, H, T, 2·D). Half of its rows make keys,
    half make values: D is w_up.shape[0] / (2·H).
    """,
    halves=halves,
    right_up=right_up,
)


@latent.misconception("each head has its own piece of the latent", compress=right_down)
def latent_in_pieces(c: Tensor, w_up: Tensor, n_heads: int) -> Pair:
    """The latent was cut into H pieces of R/H numbers, one for each head. That would be H small caches side
    by side. There is *one* latent for all heads, and every head makes its key and its value from all R
    numbers: what the heads have in common is then kept once."""
    w = w_up.unflatten(0, (2, n_heads, -1))
    size = c.shape[-1] // n_heads
    k, v = (
        torch.stack(
            [
                c[..., h * size : (h + 1) * size] @ w[part, h, :, h * size : (h + 1) * size].T
                for h in range(n_heads)
            ],
            dim=1,
        )
        for part in range(2)
    )
    return k, v


# 03.2: Scores with decoupled RoPE


def decoupled_parts(
    q: Tensor,
    q_rope: Tensor,
    k: Tensor,
    k_rope: Tensor,
    positions: Tensor,
    rope: Turn,
    queries_at: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The right content and position scores, before the scale."""
    at = positions[:, -q.shape[2] :] if queries_at is None else queries_at
    keys = rope(k_rope[:, None], positions).transpose(-2, -1)
    return q @ k.transpose(-2, -1), rope(q_rope, at) @ keys


def width(q: Tensor, q_rope: Tensor) -> int:
    return q.shape[-1] + q_rope.shape[-1]


decoupled.mistakes(
    r"""
    scaled by √D
        content, position = decoupled_parts(q, q_rope, k, k_rope, positions, rope)
        return (content + position) / q.shape[-1] ** 0.5
    The sum is divided by √D, as in plain attention. Each score is now a sum over D + Dr products, so its
    spread is √(D + Dr): count the rotary numbers too.

    each part scaled by its own width
        content, position = decoupled_parts(q, q_rope, k, k_rope, positions, rope)
        return content / q.shape[-1] ** 0.5 + position / q_rope.shape[-1] ** 0.5
    Content was divided by √D and position by √Dr, and the two added. Dr is small, so the position weighs far
    too much. They are one product of D + Dr numbers, cut in two for convenience: one scale for the sum, √(D +
    Dr).

    only one of the two parts scaled
        content, position = decoupled_parts(q, q_rope, k, k_rope, positions, rope)
        return content / width(q, q_rope) ** 0.5 + position
    The content was divided by √(D + Dr) and the position was not: a division binds more tightly than a sum.
    Put the sum in brackets: (content + position) / √(D + Dr).

    scaled by the width of all heads
        content, position = decoupled_parts(q, q_rope, k, k_rope, positions, rope)
        return (content + position) / (q.shape[1] * width(q, q_rope)) ** 0.5
    The scores are divided by √(H·(D + Dr)). A score belongs to one head: it is a sum over the D + Dr numbers
    of that head, and √(D + Dr) is its spread.

    no scale
        content, position = decoupled_parts(q, q_rope, k, k_rope, positions, rope)
        return content + position
    The scores are not divided. A sum of D + Dr products has a spread of √(D + Dr), and without the factor
    1/√(D + Dr) the softmax is too sharp.

    divided by D + Dr, not by its root
        content, position = decoupled_parts(q, q_rope, k, k_rope, positions, rope)
        return (content + position) / width(q, q_rope)
    The scores are divided by D + Dr. Variances add up, so a sum of D + Dr products has variance D + Dr and
    spread √(D + Dr): the square root belongs to the formula.

    √D + √Dr in place of √(D + Dr)
        content, position = decoupled_parts(q, q_rope, k, k_rope, positions, rope)
        return (content + position) / (q.shape[-1] ** 0.5 + q_rope.shape[-1] ** 0.5)
    The scale is 1 / (√D + √Dr). Variances add up and spreads do not: first D + Dr, then the root.

    the content rotated too
        q, k = rope(q, positions[:, -q.shape[2] :]), rope(k, positions)
        content, position = decoupled_parts(q, q_rope, k, k_rope, positions, rope)
        return (content + position) / width(q, q_rope) ** 0.5
    q and k were turned as well as q_rope and k_rope. Then the key of a token is a rotation of W_uk c, which
    differs from token to token, and W_uk can no longer be folded into the query: the whole latent would have
    to be decompressed at every step. Positions live in the Dr rotary numbers alone; the content is as it is.

    the content keys rotated
        content, position = decoupled_parts(q, q_rope, rope(k, positions), k_rope, positions, rope)
        return (content + position) / width(q, q_rope) ** 0.5
    k was turned along with k_rope. The keys made from the latent stay as they are, or W_uk cannot be folded
    into the query; and a query that is not turned would no longer fit them. Only k_rope is turned.

    joined first, rotated whole
        shared = k_rope[:, None].expand(-1, k.shape[1], -1, -1)
        queries = rope(torch.cat((q, q_rope), -1), positions[:, -q.shape[2] :])
        keys = rope(torch.cat((k, shared), -1), positions)
        return queries @ keys.transpose(-2, -1) / width(q, q_rope) ** 0.5
    Content and rotary numbers were joined and all D + Dr of them turned. Rotate k_rope and q_rope first and
    join afterwards: the content must stay as it is, or W_uk cannot be folded into the query. And pairs (i, i
    + half) would mix content with position.

    nothing rotated
        scores = q @ k.transpose(-2, -1) + q_rope @ k_rope[:, None].transpose(-2, -1)
        return scores / width(q, q_rope) ** 0.5
    q_rope and k_rope were multiplied as they came. They are handed in *before* the rotation; without it the
    scores know nothing of the order of the tokens. `rope(x, positions)` turns them.

    only the queries rotated
        turned = rope(q_rope, positions[:, -q.shape[2] :])
        scores = q @ k.transpose(-2, -1) + turned @ k_rope[:, None].transpose(-2, -1)
        return scores / width(q, q_rope) ** 0.5
    q_rope was turned and k_rope was not. A score depends on the distance of two tokens only if both are
    turned, each by its own position.

    only the keys rotated
        keys = rope(k_rope[:, None], positions).transpose(-2, -1)
        return (q @ k.transpose(-2, -1) + q_rope @ keys) / width(q, q_rope) ** 0.5
    k_rope was turned and q_rope was not. A score depends on the distance of two tokens only if both are
    turned, each by its own position.

    the queries' positions restarted at 0
        at = torch.arange(q.shape[2])[None]
        content, position = decoupled_parts(q, q_rope, k, k_rope, positions, rope, queries_at=at)
        return (content + position) / width(q, q_rope) ** 0.5
    The queries were turned to the positions 0, 1, … as if the prompt began with them. In decode they are the
    *last* T of the S tokens: `positions[:, -T:]`. This is the classic slip of a first decode step.

    the queries at the first T positions
        at = positions[:, : q.shape[2]]
        content, position = decoupled_parts(q, q_rope, k, k_rope, positions, rope, queries_at=at)
        return (content + position) / width(q, q_rope) ** 0.5
    The queries were turned to `positions[:, :T]`, where the first T tokens stand. They are the last T of the
    S tokens: `positions[:, -T:]`.

    the queries behind the last token
        at = positions[:, -1:] + 1 + torch.arange(q.shape[2])
        content, position = decoupled_parts(q, q_rope, k, k_rope, positions, rope, queries_at=at)
        return (content + position) / width(q, q_rope) ** 0.5
    The queries were turned to the positions that *follow* the last key's. The new tokens are among the S
    already, their keys with them: they stand at `positions[:, -T:]`.

    tokens counted, positions not read
        content, position = decoupled_parts(q, q_rope, k, k_rope, torch.arange(k.shape[2])[None], rope)
        return (content + position) / width(q, q_rope) ** 0.5
    The tokens were taken to stand at 0, 1, 2, … S − 1. That is right only where nothing is missing: with
    padding or dropped tokens the distances differ. The positions are handed in: use them.

    every row at the positions of the first
        content, position = decoupled_parts(q, q_rope, k, k_rope, positions[:1], rope)
        return (content + position) / width(q, q_rope) ** 0.5
    Only `positions[0]` was used. The positions may be (B, S): each sequence of the batch has its own. Hand
    them to `rope` as they are.

    one position score for all heads
        content, position = decoupled_parts(q, q_rope, k, k_rope, positions, rope)
        return (content + position.mean(1, keepdim=True)) / width(q, q_rope) ** 0.5
    The position scores were averaged over the heads, since k_rope has only one. Only the *key* is shared:
    every head has a rotary query of its own, q_rope[:, h], and so a score of its own.

    the position left out
        return q @ k.transpose(-2, -1) / width(q, q_rope) ** 0.5
    These are the content scores alone. Add the product of the rotated q_rope with the rotated k_rope, or the
    layer cannot tell "dog bites man" from "man bites dog".

    softmax taken already
        content, position = decoupled_parts(q, q_rope, k, k_rope, positions, rope)
        return ((content + position) / width(q, q_rope) ** 0.5).softmax(-1)
    The result is the weights, after a softmax. The task asks for the scores before it: a mask has to go in
    between, and that is for the caller.

    masked already
        content, position = decoupled_parts(q, q_rope, k, k_rope, positions, rope)
        T, S = q.shape[2], k.shape[2]
        future = ~torch.ones(T, S, dtype=torch.bool).tril(S - T)
        return ((content + position) / width(q, q_rope) ** 0.5).masked_fill(future, -torch.inf)
    Scores with later tokens are −∞. The task asks for all scores; hiding the future is the mask's business,
    which the caller puts in.
    """,
    decoupled_parts=decoupled_parts,
    width=width,
)


# 03.3: Absorb the up-projections


def right_out(o: Tensor, w_uv: Tensor) -> Tensor:
    return o @ w_uv.transpose(-2, -1)


absorb.mistakes(
    r"""
    absorbed on the wrong side
        def absorb(q, w_uk):
            return q @ w_uk.transpose(-2, -1)
    The query was multiplied with W_uk the way the latent is, W_uk q. But q · (W c) = (Wᵀ q) · c: the matrix
    changes sides as its transpose. As a row that is `q @ w_uk[h]`. (Where D = R both run, and this one is
    wrong; else the shapes do not fit.)

    W_uk reshaped to fit
        def absorb(q, w_uk):
            H, D, R = w_uk.shape
            return q @ w_uk.reshape(H, R, D).transpose(-2, -1)
    `w_uk.reshape(H, R, D)` has the shape of a transpose and not its content: reshape reads the numbers in the
    order of memory and cuts the rows elsewhere. `transpose(-2, -1)` swaps rows and columns, and here none is
    needed: `q @ w_uk[h]` is (T, D) @ (D, R).

    the pseudo-inverse in place of the transpose
        def absorb(q, w_uk):
            return q @ torch.linalg.pinv(w_uk.float()).transpose(-2, -1).to(q.dtype)
    The query was taken down by the pseudo-inverse of W_uk, as if the up-projection had to be undone. Nothing
    is undone: q · (W c) = (Wᵀ q) · c holds for any W. The two agree only where the columns of W are
    orthonormal.

    the first head's matrix for all
        def absorb(q, w_uk):
            return q @ w_uk[0]
    Every head's query was multiplied with W_uk[0]. The latent is shared by the heads; the way up is not: head
    h reads it through its own W_uk[h].

    the heads' matrices added up
        def absorb(q, w_uk):
            return torch.einsum("bhtd,gdr->bhtr", q, w_uk)
    W_uk was summed over its heads before it met the query. In einsum that happens when the head has another
    letter in the second input, as in "bhtd,gdr->bhtr": a letter that is missing in the result is added up.
    Write h in both.

    one absorbed query for all heads
        def absorb(q, w_uk):
            return torch.einsum("bhtd,hdr->btr", q, w_uk)
    The absorbed queries of all heads were added up to one, (B, T, R). The latent has no heads, but the
    queries have: each head keeps its own scores, so the result is (B, H, T, R).

    the scale put in, by R
        def absorb(q, w_uk):
            return q @ w_uk / w_uk.shape[-1] ** 0.5
    The absorbed query was divided by √R, since it now has R numbers. The score is the same number as before,
    q · k, a sum over the D numbers of a head, only computed in another order. So its scale stays too, and
    `absorb` itself puts none in.

    the scale put in, by D
        def absorb(q, w_uk):
            return q @ w_uk / w_uk.shape[1] ** 0.5
    The absorbed query was divided by √D. The scale belongs to the scores, content and position together, and
    there it is 1/√(D + Dr). `absorb` only folds W_uk in.

    time and heads mixed up
        def absorb(q, w_uk):
            B, H, T, D = q.shape
            rows = q.reshape(B, T, H, D).transpose(1, 2)
            return rows @ w_uk
    All heads were joined by `reshape` to (B, T, H·D) before the product, straight from (B, H, T, D). That
    reads in the order of memory, so a row holds several tokens of one head. The product needs no joining:
    heads are a batch dimension, `q @ w_uk`.

    W_uv on the wrong side
        def unabsorb(o, w_uv):
            return o @ w_uv
    The output was multiplied as `o @ w_uv`, like the query. But the values' matrix stands where it stood,
    W_uv o, which is `o @ w_uv[h].T` for a row: it takes R numbers up to D, while W_uk's transpose takes D
    down to R. (Where D = R both run, and this one is wrong.)

    W_uv reshaped to fit
        def unabsorb(o, w_uv):
            H, D, R = w_uv.shape
            return o @ w_uv.reshape(H, R, D)
    `w_uv.reshape(H, R, D)` makes the shapes fit and scrambles the numbers: reshape keeps their order in
    memory. To swap rows and columns use `w_uv.transpose(-2, -1)`.

    the pseudo-inverse on the way up
        def unabsorb(o, w_uv):
            return o @ torch.linalg.pinv(w_uv.float()).to(o.dtype)
    The latent sum was taken up by a pseudo-inverse. W_uv *is* the way up: the weighted sum of the values W_uv
    c is W_uv times the weighted sum of the latents.

    the first head's values for all
        def unabsorb(o, w_uv):
            return o @ w_uv[0].T
    Every head went up through W_uv[0]. The latent is shared by the heads; the way up is not: head h uses its
    own W_uv[h].

    the heads' value matrices added up
        def unabsorb(o, w_uv):
            return torch.einsum("bhtr,gdr->bhtd", o, w_uv)
    W_uv was summed over its heads before it met the output: in einsum, the head had another letter in the
    second input, and a letter that is missing in the result is added up. Write h in both.

    the heads merged
        def unabsorb(o, w_uv):
            return right_out(o, w_uv).transpose(1, 2).flatten(-2)
    The heads were joined to (B, T, H·D). That is the next step of the layer, before its output projection;
    `unabsorb` returns them apart, (B, H, T, D).
    """,
    right_out=right_out,
)


# 03.4: A decode step in the latent space


def step_parts(cache: Tensor, length: int, w_uk: Tensor) -> tuple[Tensor, Tensor]:
    """The latents and rotary keys of the tokens that are there."""
    return cache[:, :length, : w_uk.shape[-1]], cache[:, :length, w_uk.shape[-1] :]


def scores(q: Tensor, q_rope: Tensor, c: Tensor, k_rope: Tensor, w_uk: Tensor) -> Tensor:
    """Right, before the scale: (B, H, S)."""
    absorbed = torch.einsum("bhd,hdr->bhr", q, w_uk)
    return absorbed @ c.transpose(1, 2) + q_rope @ k_rope.transpose(1, 2)


def scale(q: Tensor, q_rope: Tensor) -> float:
    return float((q.shape[-1] + q_rope.shape[-1]) ** -0.5)


def read(weights: Tensor, c: Tensor, w_uv: Tensor) -> Tensor:
    return torch.einsum("bhr,hdr->bhd", weights @ c, w_uv)


def decode_over(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    c, k_rope = step_parts(cache, length, w_uk)
    weights = (scores(q, q_rope, c, k_rope, w_uk) * scale(q, q_rope)).softmax(-1)
    return read(weights, c, w_uv)


def right_weights(q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor) -> Tensor:
    c, k_rope = step_parts(cache, length, w_uk)
    return (scores(q, q_rope, c, k_rope, w_uk) * scale(q, q_rope)).softmax(-1)


step.mistakes(
    r"""
    everything decompressed
        c, k_rope = step_parts(cache, length, w_uk)
        k, v = (torch.einsum("bsr,hdr->bhsd", c, w) for w in (w_uk, w_uv))
        content = torch.einsum("bhd,bhsd->bhs", q, k)
        weights = ((content + q_rope @ k_rope.transpose(1, 2)) * scale(q, q_rope)).softmax(-1)
        return torch.einsum("bhs,bhsd->bhd", weights, v)
    The output is right, but keys and values of all heads were built from the latents of all tokens: H·S·D
    numbers each, at every step. That is the memory and the work which the latent was to save. Fold W_uk into
    the query, which is one token, and W_uv into the result.

    the latents copied for every head
        c, k_rope = (part[:, None] for part in step_parts(cache, length, w_uk))
        absorbed = torch.einsum("bhd,hdr->bhr", q, w_uk)[:, :, None]
        content = absorbed @ c.transpose(-2, -1)
        weights = ((content + q_rope[:, :, None] @ k_rope.transpose(-2, -1)) * scale(q, q_rope)).softmax(
            -1
        )
        return torch.einsum("bhr,hdr->bhd", (weights @ c)[:, :, 0], w_uv)
    The output is right, but the latents were copied once for each head, H·S·R numbers. `expand` makes no
    copy, yet `@` does: where it broadcasts (B, H, 1, R) with (B, 1, R, S), it first writes all heads' copies
    to memory. Let the heads be the *rows* of one product instead: (B, H, R) @ (B, R, S).

    scaled by √(R + Dr)
        c, k_rope = step_parts(cache, length, w_uk)
        return read((scores(q, q_rope, c, k_rope, w_uk) * cache.shape[-1] ** -0.5).softmax(-1), c, w_uv)
    The scale counts the R + Dr numbers of a cached row. The absorbed product is the *same score* as q · k, a
    sum over D numbers, only computed in another order; so the scale stays √(D + Dr).

    scaled by √D
        c, k_rope = step_parts(cache, length, w_uk)
        return read((scores(q, q_rope, c, k_rope, w_uk) * q.shape[-1] ** -0.5).softmax(-1), c, w_uv)
    The scale is 1/√D, as in plain attention. A score is a sum over D content and Dr rotary products: its
    spread is √(D + Dr).

    scaled by √R
        c, k_rope = step_parts(cache, length, w_uk)
        return read((scores(q, q_rope, c, k_rope, w_uk) * w_uk.shape[-1] ** -0.5).softmax(-1), c, w_uv)
    The scale counts the R numbers of the latent. The absorbed product is the *same score* as q · k, a sum
    over D numbers, only computed in another order; with the rotary numbers its scale is √(D + Dr).

    each part scaled by its own width
        c, k_rope = step_parts(cache, length, w_uk)
        q, q_rope = q * q.shape[-1] ** -0.5, q_rope * q_rope.shape[-1] ** -0.5
        return read(scores(q, q_rope, c, k_rope, w_uk).softmax(-1), c, w_uv)
    Content was divided by √D and position by √Dr. Dr is small, so the position weighs far too much. They are
    one product of D + Dr numbers, cut in two: one scale for the sum, √(D + Dr).

    no scale
        c, k_rope = step_parts(cache, length, w_uk)
        return read(scores(q, q_rope, c, k_rope, w_uk).softmax(-1), c, w_uv)
    The scores go into the softmax as they are. They are sums of D + Dr products: without the factor 1/√(D +
    Dr) the softmax is too sharp.

    empty slots have their say
        return decode_over(q, q_rope, cache, cache.shape[1], w_uk, w_uv)
    All slots of the cache were attended to. A slot behind `length` that holds zeros has the score 0, and
    exp(0) = 1 is a weight like any other; what an earlier sequence left there has any score at all. Take
    `cache[:, :length]` first.

    the newest token left out
        return decode_over(q, q_rope, cache, length - 1, w_uk, w_uv)
    The last of the `length` tokens was not attended to. It is the token that is being decoded: its row is in
    the cache already, and a token attends to itself. `cache[:, :length]` ends before slot `length`.

    one slot too many
        return decode_over(q, q_rope, cache, length + 1, w_uk, w_uv)
    Slot number `length` was attended to as well. Counted from 0 the tokens are in the slots 0 … length − 1,
    the new one among them: `cache[:, :length]`.

    empty slots masked after the softmax
        c, k_rope = step_parts(cache, cache.shape[1], w_uk)
        weights = (scores(q, q_rope, c, k_rope, w_uk) * scale(q, q_rope)).softmax(-1)
        return read(weights[..., :length], c[:, :length], w_uv)
    The weights of empty slots were set to 0 when the softmax had already given them a share. What is left
    adds up to less than 1. Cut the cache off at `length`, or set the scores to −∞ before the softmax.

    scores of empty slots set to 0
        c, k_rope = step_parts(cache, cache.shape[1], w_uk)
        there = torch.arange(cache.shape[1]) < length
        return read((scores(q, q_rope, c, k_rope, w_uk) * scale(q, q_rope) * there).softmax(-1), c, w_uv)
    The scores were multiplied by a mask of ones and zeros. A score of 0 is a score like any other, and exp(0)
    = 1 is a weight. Cut the cache off at `length`, or set these scores to −∞.

    softmax over the heads
        c, k_rope = step_parts(cache, length, w_uk)
        return read((scores(q, q_rope, c, k_rope, w_uk) * scale(q, q_rope)).softmax(1), c, w_uv)
    The softmax runs over the heads, dimension 1. Every head divides its own attention among the tokens: the
    weights add up to 1 along the last dimension.

    the position left out
        c, k_rope = step_parts(cache, length, w_uk)
        return read((scores(q, 0 * q_rope, c, k_rope, w_uk) * scale(q, q_rope)).softmax(-1), c, w_uv)
    The scores are those of the content alone. Add q_rope · k_rope: the last Dr numbers of every cached row
    are the token's rotary key, rotated when it was written.

    rotary numbers looked for in front
        Dr = q_rope.shape[-1]
        return decode_over(
            q, q_rope, torch.cat((cache[..., Dr:], cache[..., :Dr]), -1), length, w_uk, w_uv
        )
    The first Dr numbers of a row were taken for the rotary key and the rest for the latent. A row is [c ;
    k_rope]: the R numbers of the latent first.

    the value takes the rotary columns
        o = right_weights(q, q_rope, cache, length, w_uk) @ cache[:, :length]
        return torch.einsum("bhr,hdr->bhd", o[..., -w_uk.shape[-1] :], w_uv)
    The weighted sum ran over whole rows, R + Dr numbers, and then the *last* R of them went up, so that the
    rotary key was read as content. k_rope serves the scores alone: the values come from c, the first R.

    W_uk and W_uv exchanged
        return decode_over(q, q_rope, cache, length, w_uv, w_uk)
    The query met W_uv and the output W_uk. Their shapes are alike, so nothing complains. Scores are made with
    *keys*, W_uk c; what is read out are *values*, W_uv c.

    keys read out in place of values
        return decode_over(q, q_rope, cache, length, w_uk, w_uk)
    The output went up through W_uk: that is a weighted sum of *keys*. Scores use W_uk, values use W_uv.

    the output left in the latent space
        c, _ = step_parts(cache, length, w_uk)
        return right_weights(q, q_rope, cache, length, w_uk) @ c
    The result has R numbers a head: it is the weighted sum of latents. W_uv[h] still has to take it up to the
    D numbers of a head, once, at the end.

    the first head's values for all
        c, _ = step_parts(cache, length, w_uk)
        return right_weights(q, q_rope, cache, length, w_uk) @ c @ w_uv[0].T
    All heads went up through W_uv[0]. The latent is shared; the way up is each head's own, W_uv[h].

    one set of weights for all heads
        c, k_rope = step_parts(cache, length, w_uk)
        shared = (scores(q, q_rope, c, k_rope, w_uk) * scale(q, q_rope)).mean(1, keepdim=True)
        return read(shared.softmax(-1).expand(-1, q.shape[1], -1), c, w_uv)
    The scores were averaged over the heads, since the cache has none. The cached rows are shared, and every
    head still asks its own question: (B, H, length) scores, a softmax for each head.

    exp without subtracting the maximum
        c, k_rope = step_parts(cache, length, w_uk)
        weights = (scores(q, q_rope, c, k_rope, w_uk) * scale(q, q_rope)).exp()
        return read(weights / weights.sum(-1, keepdim=True), c, w_uv)
    The softmax was written out as exp(score) / Σ exp(score). exp(89) is infinite in fp32, and then ∞/∞ is
    NaN. Subtract each row's maximum first, which changes nothing else; `softmax` does it for you.

    content and position weighed apart
        c, k_rope = step_parts(cache, length, w_uk)
        zero = torch.zeros_like
        weights = [
            (scores(content, position, c, k_rope, w_uk) * scale(q, q_rope)).softmax(-1)
            for content, position in ((q, zero(q_rope)), (zero(q), q_rope))
        ]
        return read((weights[0] + weights[1]) / 2, c, w_uv)
    Content and position each had a softmax of their own, and the weights were averaged. The two are added as
    *scores*: a key then must fit in both, and one softmax follows.
    """,
    decode_over=decode_over,
    read=read,
    right_weights=right_weights,
    scale=scale,
    scores=scores,
    step_parts=step_parts,
)


# 03.5: Initialise by the SVD of activations


def svd_svd(keys_values: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    U, s, Vh = torch.linalg.svd(keys_values, full_matrices=False)
    return U[:, :rank], s[:rank], Vh[:rank]


svd.mistakes(
    r"""
    left singular vectors
        U, _, _ = svd_svd(keys_values, rank)
        return U.T, U
    The columns of U were taken. U has a row for each *token* of A: it says how these tokens combine, and has
    nothing to offer to the next one. The directions in a token's 2·H·D numbers are the rows of Vᵀ.

    the columns of Vᵀ
        _, _, Vh = torch.linalg.svd(keys_values, full_matrices=True)
        return Vh[:, :rank].T, Vh[:, :rank]
    `Vh[:, :rank]` takes columns. torch returns V *transposed* already (the h in Vh): the right singular
    vectors are its rows, `Vh[:rank]`. Both are orthonormal and of the right shape, so only the error shows
    it.

    the least important directions
        _, _, Vh = torch.linalg.svd(keys_values, full_matrices=True)
        Vh = Vh[: min(keys_values.shape)]
        return Vh[-rank:], Vh[-rank:].T
    These are the directions with the *smallest* singular values: the worst choice there is. torch's `svd` has
    the largest first, its `eigh` the largest last.

    singular values on both sides
        _, s, Vh = svd_svd(keys_values, rank)
        return s[:, None] * Vh, Vh.T * s
    Encode and decode were both multiplied by the singular values, so each direction comes back s² times too
    long. A = U diag(s) Vᵀ already holds s; its tokens, measured along V, are U diag(s).

    the singular values multiplied in
        _, s, Vh = svd_svd(keys_values, rank)
        return s[:, None].sqrt() * Vh, Vh.T * s.sqrt()
    Each direction comes back s times too long: the singular values are in decode (or in encode), or √s in
    each. That is the recipe to cut a *weight* in two, W ≈ (U√s)(√s Vᵀ). Here A is not a weight but the data
    that flow through, and A encodeᵀ = U diag(s) holds s already: decode · encode must be V Vᵀ.

    divided by the singular values on one side
        _, s, Vh = svd_svd(keys_values, rank)
        return Vh / s[:, None], Vh.T
    Encode divides by the singular values, so that all latent numbers spread alike, but decode does not
    multiply them in again. Whitening is allowed as long as the way up undoes it: decode = V diag(s).

    divided by the singular values on both sides
        _, s, Vh = svd_svd(keys_values, rank)
        return Vh / s[:, None], Vh.T / s
    Encode and decode both divide by the singular values, so each direction comes back s² times too short. The
    directions are of length 1; encode = Vᵀ and decode = V need no correction.

    the mean subtracted
        _, _, Vh = svd_svd(keys_values - keys_values.mean(0), rank)
        if rank > len(Vh):
            Vh = torch.linalg.svd(keys_values - keys_values.mean(0))[2][:rank]
        return Vh, Vh.T
    The mean token was subtracted before the SVD, as in PCA. PCA adds it again at the end; encode and decode
    are plain matrices without a bias, so what is lost with the mean stays lost. Take the SVD of A as it is.

    every number scaled to the same spread
        _, _, Vh = svd_svd(keys_values / keys_values.norm(dim=0), rank)
        return Vh, Vh.T
    The columns of A were divided by their length or standard deviation before the SVD. Then a number that
    hardly varies weighs as much as one that varies a lot, and the error of A itself is no longer the
    smallest.

    every token scaled to length 1
        _, _, Vh = svd_svd(keys_values / keys_values.norm(dim=1, keepdim=True), rank)
        return Vh, Vh.T
    The tokens were normalised before the SVD. The best directions for normalised tokens are others: large
    tokens then count no more than small ones, and ‖A − A encodeᵀ decodeᵀ‖ is not the smallest.

    the first R numbers
        keep = torch.eye(keys_values.shape[1])[:rank]
        return keep, keep.T
    Encode keeps the first R numbers of a token and drops the rest: part of the first head's keys, and no
    value at all. A direction may mix all numbers, and the SVD finds the best R of them.

    the directions of the first R tokens
        Q, _ = torch.linalg.qr(keys_values[:rank].T)
        return Q.T, Q
    The R directions span the first R tokens of A, as a QR of Aᵀ gives them. These tokens come back whole, and
    all others pay for it. The SVD weighs all tokens.

    keys and values compressed apart
        width = keys_values.shape[1] // 2
        n_keys = rank // 2
        _, _, keys = torch.linalg.svd(keys_values[:, :width])
        _, _, values = torch.linalg.svd(keys_values[:, width:])
        encode = torch.block_diag(keys[:n_keys], values[: rank - n_keys])
        return encode, encode.T
    Keys and values had an SVD each and R/2 numbers each. One SVD over both gives each what it needs, and
    keeps what they have in common only once: that is why the latent is *joint*.

    encode and decode exchanged
        _, _, Vh = svd_svd(keys_values, rank)
        return Vh.T, Vh
    Encode is (2·H·D, R) and decode (R, 2·H·D). As weights they are kept as (out, in): encode takes a token
    down to R numbers, so it is (R, 2·H·D).

    the tokens' latents, not the way to them
        U, s, Vh = svd_svd(keys_values, rank)
        return U * s, Vh
    These are U diag(s) and Vᵀ: A itself cut in two. U diag(s) has a row for each *token*: it is what comes
    out when these tokens are encoded. Asked for are the two matrices that serve any token: encode = Vᵀ,
    decode = V.
    """,
    svd_svd=svd_svd,
)


# 03.6: Naive or absorbed: count, and choose


Answer = dict[str, Any]
Count = Callable[[int], float]


def crossing(naive: Count, absorbed: Count) -> int | None:
    """The largest T at which absorbed wins, for two straight lines in T."""
    start = naive(0) - absorbed(0)
    slope = (absorbed(1) - absorbed(0)) - (naive(1) - naive(0))
    if slope <= 0:
        return None if start > 0 or slope < 0 else 0
    return max(0, int(-(-start // slope)) - 1)


def answer(naive: Count, absorbed: Count, T: int) -> Answer:
    return {"naive": naive(T), "absorbed": absorbed(T), "largest_T": crossing(naive, absorbed)}


def roads_right(H: int, D: int, R: int, Dr: int, S: int) -> tuple[Count, Count]:
    def naive(T: int) -> int:
        return 2 * S * R * H * 2 * D + 2 * T * S * H * (2 * D + Dr)

    def absorbed(T: int) -> int:
        return 2 * T * H * D * R * 2 + 2 * T * S * H * (2 * R + Dr)

    return naive, absorbed


def with_largest(H: int, D: int, R: int, Dr: int, S: int, T: int, value: int | None) -> Answer:
    naive, absorbed = roads_right(H, D, R, Dr, S)
    return {"naive": naive(T), "absorbed": absorbed(T), "largest_T": value}


roads.mistakes(
    r"""
    multiply-adds, not FLOPs
        naive, absorbed = roads_right(H, D, R, Dr, S)
        return answer(lambda T: naive(T) // 2, lambda T: absorbed(T) // 2, T)
    A factor of 2 is missing everywhere: a multiply-add is one multiplication and one addition, so 2 FLOPs.
    Which path wins does not change, and every comparison with a data sheet does.

    decompressed once for every query
        naive, absorbed = roads_right(H, D, R, Dr, S)
        return answer(lambda T: naive(T) + (T - 1) * naive(0), absorbed, T)
    The decompression was counted T times. Keys and values of the S tokens are built once in this call, and
    all T queries use them: that is why a long prefill prefers the naive path.

    only the keys decompressed
        naive, absorbed = roads_right(H, D, R, Dr, S)
        return answer(lambda T: naive(T) - naive(0) // 2, absorbed, T)
    The naive path decompresses keys *and* values: 2·D numbers for each head and token, so 2·S·R·H·2D FLOPs.
    Half of that is missing.

    the decompression left out
        naive, absorbed = roads_right(H, D, R, Dr, S)
        return answer(lambda T: naive(T) - naive(0), absorbed, T)
    Only the attention of the naive path was counted. Its keys and values are not in the cache: they are made
    anew from the latents of all S tokens, 2·S·R·H·2D FLOPs at every step.

    the rotary numbers left out
        return answer(*roads_right(H, D, R, 0, S), T)
    Dr is missing. On both paths a score is a product of content and of Dr rotary numbers: 2D + Dr and 2R +
    Dr. It cancels in the comparison and not in the counts.

    rotary numbers counted in the values
        return answer(*roads_right(H, D, R, 2 * Dr, S), T)
    Dr was counted twice, once for the scores and once for the output. The rotary key takes part in the scores
    alone; what is summed up is the value, D numbers (or the latent, R).

    the values D wide on the absorbed path
        naive, _ = roads_right(H, D, R, Dr, S)
        return answer(naive, lambda T: 4 * T * H * D * R + 2 * T * S * H * (R + Dr + D), T)
    The absorbed path was given R + Dr for the scores and D for the output, 2·T·S·H·(R + Dr + D). What is
    summed up there is the latent, R numbers: only the sum is taken up to D. So it is 2R + Dr.

    one way only
        naive, absorbed = roads_right(H, D, R, Dr, S)
        return answer(naive, lambda T: absorbed(T) - 2 * T * H * D * R, T)
    W_uk was folded into the query, and the way out through W_uv forgotten, or the other way round. Each costs
    2·T·H·D·R, and both are walked.

    the ways in and out left out
        naive, absorbed = roads_right(H, D, R, Dr, S)
        return answer(naive, lambda T: absorbed(T) - 4 * T * H * D * R, T)
    Only the attention of the absorbed path was counted. The query goes in through W_uk and the result out
    through W_uv, for every new token: 2·T·H·D·R FLOPs each. (Folding W_uk into the query's weights beforehand
    would make that matrix larger, so nobody does it.)

    the ways in and out counted for every cached token
        naive, absorbed = roads_right(H, D, R, Dr, S)
        return answer(naive, lambda T: absorbed(T) + 4 * (S - T) * H * D * R, T)
    W_uk and W_uv were applied S times. On the absorbed path the cached tokens are left as they are; only the
    T queries go in and the T results out, and that is the point of it.

    one head in the latent space
        naive, _ = roads_right(H, D, R, Dr, S)
        return answer(naive, lambda T: 4 * T * H * D * R + 2 * T * S * (2 * R + Dr), T)
    Attention on the absorbed path was counted for one head, since the latent is shared. The *memory* is
    shared; every head has its own query, its own scores and its own sum: times H. So many FLOPs for each byte
    that is read are what makes this path fast in decode.

    the sum of latents left out
        naive, _ = roads_right(H, D, R, Dr, S)
        return answer(naive, lambda T: 4 * T * H * D * R + 2 * T * S * H * (R + Dr), T)
    On the absorbed path only the scores were counted, R + Dr products for each pair. The weighted sum of the
    latents takes R more for each pair: 2R + Dr.

    one head counted
        return answer(*roads_right(1, D, R, Dr, S), T)
    Both counts lack the factor H. Every head has its own way up, its own scores and its own output. Which
    path wins does not change, for both grow with H alike.

    one new token counted
        return answer(*roads_right(H, D, R, Dr, S), 1)
    Both paths were counted for T = 1. T new tokens attend T times, and go in and out T times; only the
    decompression happens once.

    new tokens counted beside S
        naive, absorbed = (lambda n, i=i: roads_right(H, D, R, Dr, S + n)[i](n) for i in range(2))
        return {
            "naive": naive(T),
            "absorbed": absorbed(T),
            "largest_T": next((n for n in range(2_000) if absorbed(n + 1) >= naive(n + 1)), None),
        }
    S + T tokens were attended to. S counts all tokens in the cache, the T new ones included, as everywhere in
    the course.

    half of the pairs, for causality
        naive, absorbed = roads_right(H, D, R, Dr, S)
        return answer(
            lambda T: naive(T) - T * S * H * (2 * D + Dr),
            lambda T: absorbed(T) - T * S * H * (2 * R + Dr),
            T,
        )
    The attention was halved because of the causal mask. That is right for a whole prompt, T = S; a few new
    tokens see nearly all of S. The task counts all T·S pairs on both paths.

    a tie taken for a win
        naive, absorbed = roads_right(H, D, R, Dr, S)
        slope = absorbed(1) - (naive(1) - naive(0))
        return with_largest(H, D, R, Dr, S, T, None if slope <= 0 else int(naive(0) // slope))
    Where both paths cost the same, this T was counted as won. Absorbed wins with *fewer* FLOPs: rounding down
    the T at which the lines cross is one too many when it is a whole number.

    the first T that loses
        most = largest(H, D, R, Dr, S)
        return with_largest(H, D, R, Dr, S, T, None if most is None else most + 1)
    This is the smallest T at which absorbed no longer wins, or the crossing rounded up. The largest at which
    it wins is one less.

    no more queries than tokens
        most = largest(H, D, R, Dr, S)
        return with_largest(H, D, R, Dr, S, T, S if most is None else min(most, S))
    The largest T was cut off at S. It is true that T > S cannot occur, but the question was where the two
    lines cross: None says that they never do.

    whether absorbed wins at this T
        naive, absorbed = roads_right(H, D, R, Dr, S)
        return with_largest(H, D, R, Dr, S, T, T if absorbed(T) < naive(T) else 0)
    The T that was handed in was tested, and itself or 0 returned. The question is at which T the winner
    changes, for this H, D, R, Dr and S: solve for T.

    the crossing of an endless cache
        most = None if R <= D else -(-R * D // (R - D)) - 1
        return with_largest(H, D, R, Dr, S, T, most)
    The largest T was taken from R·D / (R − D). That is what it tends to when S grows; the ways in and out,
    4·T·H·D·R, do not grow with S and move the crossing for a real cache: keep S in the equation.
    """,
    answer=answer,
    largest=largest,
    roads_right=roads_right,
    with_largest=with_largest,
)


# 03.7: Choose a rank for a memory budget


def plan(
    config: Config,
    budget_gib: float,
    batch: int,
    max_len: int,
    *,
    each: float | None = None,
    gib: float = 2**30,
    rope: int | None = None,
    tokens: int | None = None,
    layers: int | None = None,
    cap: float | None = None,
) -> Answer:
    """The right answer but for what is given: bytes a number, a GiB, rotary numbers, tokens, layers, the
    cap."""
    number = BYTES[config["torch_dtype"]] if each is None else each
    rotary = config["qk_rope_head_dim"] if rope is None else rope
    n_layers = config["num_hidden_layers"] if layers is None else layers
    most = 2 * config["num_attention_heads"] * config["head_dim"] if cap is None else cap
    n_tokens = batch * max_len if tokens is None else tokens
    numbers = budget_gib * gib / (n_layers * n_tokens * number) - rotary
    rank = int(min(numbers, most) // STEP * STEP)
    if rank < STEP:
        raise ValueError("budget_gib: too small for rank 64")
    return describe_rank(config, rank, number, rotary, n_layers)


def describe_rank(config: Config, rank: int, number: float, rotary: int, n_layers: int) -> Answer:
    row = rank + rotary
    per_token = n_layers * row * number
    return {
        "rank": rank,
        "bytes_per_token": int(per_token) if per_token == int(per_token) else per_token,
        "versus_mha": 2 * config["num_attention_heads"] * config["head_dim"] / row,
        "versus_gqa": 2 * config["num_key_value_heads"] * config["head_dim"] / row,
    }


def reranked(config: Config, rank: int) -> Answer:
    """Everything right for this rank."""
    number, rotary = BYTES[config["torch_dtype"]], config["qk_rope_head_dim"]
    return describe_rank(config, rank, number, rotary, config["num_hidden_layers"])


def allowed(config: Config, budget_gib: float, batch: int, max_len: int) -> tuple[float, int]:
    """The rank that fits, not rounded, and the cap. ValueError where it is below 64."""
    numbers = budget_gib * 2**30 / (config["num_hidden_layers"] * batch * max_len)
    numbers = numbers / BYTES[config["torch_dtype"]] - config["qk_rope_head_dim"]
    if numbers < STEP:
        raise ValueError("budget_gib: too small for rank 64")
    return numbers, 2 * config["num_attention_heads"] * config["head_dim"]


budget.mistakes(
    r"""
    the latent counted twice, for keys and values
        return plan(config, budget_gib, batch, max_len, each=2 * BYTES[config["torch_dtype"]])
    A factor of 2 for keys and values went in. One latent serves both: it is stored once, and keys and values
    are made from it. So the budget allows about twice the rank.

    a latent for every head
        each = config["num_attention_heads"] * BYTES[config["torch_dtype"]]
        return plan(config, budget_gib, batch, max_len, each=each)
    The row of R + Dr numbers was multiplied by the number of heads. All heads read the *same* row: that is
    the whole saving.

    the rotary numbers forgotten
        return plan(config, budget_gib, batch, max_len, rope=0)
    Dr is missing. A cached row is [c ; k_rope]: beside the R numbers of the latent it holds the
    qk_rope_head_dim numbers of the rotary key, in every layer.

    a rotary key for every head
        rotary = config["qk_rope_head_dim"]
        return plan(config, budget_gib, batch, max_len, rope=rotary * config["num_attention_heads"])
    The rotary key was counted once for each head, H·Dr numbers. There is one for all heads, Dr numbers.

    GB for GiB
        return plan(config, budget_gib, batch, max_len, gib=10**9)
    The budget was taken as budget_gib · 10⁹ bytes. That is GB; a GiB is 2³⁰ bytes, 7% more. So some of the
    memory stays unused, and a budget that fits exactly does not fit.

    rounded up
        numbers, most = allowed(config, budget_gib, batch, max_len)
        return reranked(config, int(min(-(-numbers // STEP), most // STEP)) * STEP)
    The rank was rounded to the next multiple of 64 *above*. Then the cache is larger than the budget, and the
    server runs out of memory at full load. Always round down.

    rounded to the nearest
        numbers, most = allowed(config, budget_gib, batch, max_len)
        return reranked(config, min(round(numbers / STEP), most // STEP) * STEP)
    The rank was rounded to the *nearest* multiple of 64. Every other time that is up, and the cache is larger
    than the budget. Always round down: `//`, not `round`.

    not rounded to a multiple of 64
        return reranked(config, int(min(allowed(config, budget_gib, batch, max_len))))
    The rank is the largest that fits, whatever number that is. GPUs multiply in tiles, so a rank is chosen as
    a multiple of 64: round down with `rank // 64 * 64`, below the cap too.

    the limit itself taken as the rank
        numbers, most = allowed(config, budget_gib, batch, max_len)
        return reranked(config, int(min(numbers // STEP * STEP, most)))
    Where memory is plenty the rank became 2·H·D, which need not be a multiple of 64. Take the smaller of the
    two first, and round it down then.

    less than the budget, not at most
        numbers, most = allowed(config, budget_gib, batch, max_len)
        if numbers == STEP:
            raise ValueError("budget_gib: too small for rank 64")
        return reranked(config, int(min(-(-numbers // STEP) - 1, most // STEP)) * STEP)
    A cache that fills the budget to the byte was refused. It fits: the condition is ≤, not <. Budgets and
    caches are often round numbers, so this case is not rare.

    the rotary numbers not taken off
        numbers, most = allowed(config, budget_gib, batch, max_len)
        return reranked(config, int(min(numbers + config["qk_rope_head_dim"], most) // STEP * STEP))
    What the budget allows is R + Dr numbers, and all of them were given to the rank. Dr of them belong to the
    rotary key: take them off before you round.

    the layers forgotten
        return plan(config, budget_gib, batch, max_len, layers=1)
    The cache was counted for one layer. Every layer compresses its own input and keeps its own latents.

    the batch forgotten
        return plan(config, budget_gib, batch, max_len, tokens=max_len)
    The cache was counted for a single sequence. Each of the batch keeps its own, max_len tokens long.

    two bytes a number, whatever the dtype
        return plan(config, budget_gib, batch, max_len, each=2)
    torch_dtype is not looked at. float32 takes 4 bytes a number, bfloat16 2 and the 8-bit floats 1.

    no upper limit
        return plan(config, budget_gib, batch, max_len, cap=float("inf"))
    A generous budget gives a rank beyond 2·H·D. The keys and values of all heads are only 2·H·D numbers: a
    latent of more keeps nothing that they do not have.

    the limit taken as H·D
        most = config["num_attention_heads"] * config["head_dim"]
        return plan(config, budget_gib, batch, max_len, cap=most)
    The rank was cut off at H·D. The latent holds keys *and* values of all heads, so up to 2·H·D numbers can
    say something new.

    the limit counted with KV heads
        most = 2 * config["num_key_value_heads"] * config["head_dim"]
        return plan(config, budget_gib, batch, max_len, cap=max(STEP, most))
    The rank was cut off at 2·G·D. In latent attention every query head has keys and values of its own, made
    from the latent, so the limit is 2·H·D; G describes the GQA model of the comparison and nothing else.

    rank 0 where nothing fits
        try:
            return plan(config, budget_gib, batch, max_len)
        except ValueError:
            return reranked(config, 0)
    Where not even rank 64 fits, a rank of 0 or less, or None, came back. A model with such a rank would run
    and know nothing of its past. Check it first: raise ValueError.

    the ratios upside down
        right = plan(config, budget_gib, batch, max_len)
        return {**right, **{name: 1 / right[name] for name in ("versus_mha", "versus_gqa")}}
    The ratios are latent over MHA and GQA, a fraction of 1. Asked was how many times *larger* their caches
    are: 2·H·D / (R + Dr).

    the ratios without the rotary key
        right = plan(config, budget_gib, batch, max_len)
        row = (right["rank"] + config["qk_rope_head_dim"]) / right["rank"]
        return {**right, **{name: right[name] * row for name in ("versus_mha", "versus_gqa")}}
    The ratios were taken with R alone. The rotary key is cached as well: 2·H·D / (R + Dr).

    keys only in the ratios
        right = plan(config, budget_gib, batch, max_len)
        return {**right, **{name: right[name] / 2 for name in ("versus_mha", "versus_gqa")}}
    A factor of 2 is missing in the ratios: MHA and GQA cache a key *and* a value for each head, 2·H·D and
    2·G·D numbers.
    """,
    allowed=allowed,
    BYTES=BYTES,
    plan=plan,
    reranked=reranked,
    STEP=STEP,
)
