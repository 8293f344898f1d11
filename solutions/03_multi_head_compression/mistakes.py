"""Unit 03: known mistakes of the exercises on multi-head compression."""

from .checks import absorb, budget, decoupled, latent, naive_or_absorbed, step, svd

# 03.1: Down to the latent, up again


latent.mistakes(
    r"""
    w_down used without its transpose
        x @ w_down.T → x @ w_down
    `x @ w_down` multiplies the tokens with the *columns* of w_down. A weight is kept as (out, in), as in
    nn.Linear: it takes a column x to w_down x, and a row to `x @ w_down.T`. Where R = M both run, and only
    one is right.

    w_down reshaped, not transposed
        w_down.T → w_down.reshape(w_down.shape[::-1])
    `w_down.reshape(M, R)` makes the shapes fit, but it reads the numbers of w_down in the order of memory, so
    that its rows are cut to pieces. To swap rows and columns use `w_down.T`.

    the latent left transposed
        x @ w_down.T → w_down @ x.transpose(1, 2)
    w_down was put on the left, w_down xᵀ, and the result left as (B, R, T). The numbers are right, and they
    are in columns; everything else in the course has one token per row: (B, T, R). Transpose once more, or
    write `x @ w_down.T`.

    the latent reshaped back, not transposed
        return x @ w_down.T → c = w_down @ x.transpose(1, 2)
            return c.reshape(c.shape[0], c.shape[2], c.shape[1])
    w_down xᵀ is (B, R, T). `reshape(B, T, R)` has the right shape and the wrong content: a row then holds
    numbers of several tokens. `transpose(1, 2)` swaps the two, or write `x @ w_down.T` to begin with.

    the latent normalised
        return x @ w_down.T → c = x @ w_down.T
            return c * c.float().square().mean(-1, keepdim=True).rsqrt().to(c.dtype)
    The latent was divided by its root mean square. DeepSeek's MLA does that, with a learned weight for every
    number; here, as in the formula of the task, the latent is w_down x and nothing more.

    the first R numbers kept
        x @ w_down.T → x[..., : w_down.shape[0]]
    The latent was cut out of x, and w_down not used. Every number of the latent is a weighted sum of *all*
    numbers of the token, with weights that training has found: `x @ w_down.T`.

    values taken for keys
        return k, v → return v, k
    Keys and values are exchanged. The first H·D rows of w_up are the keys', the last H·D the values'. The
    shapes are alike, so nothing complains: only the model talks nonsense.

    key and value head by head
        .chunk(2, dim=-1) → .unflatten(-1, (n_heads, 2, -1)).transpose(-3, -2).flatten(-2).unbind(-2)
    The rows of w_up were read as (H, 2, D): key of head 0, value of head 0, key of head 1, … DeepSeek's
    checkpoints are laid out that way. Here all keys come first: (2, H, D), so cut in two *before* you cut
    into heads.

    key and value number by number
        .chunk(2, dim=-1) → .unflatten(-1, (-1, 2)).unbind(-1)
    Every other row of w_up was given to the keys. They come in one block, the first H·D rows, and the values
    in another behind it: `chunk(2, dim=-1)`, or cut with `[..., : H * D]`.

    heads interleaved
        .unflatten(-1, (n_heads, -1)).transpose(1, 2) → .unflatten(-1, (-1, n_heads)).permute(0, 3, 1, 2)
    The rows of the keys were cut as (D, H), so that head h took every H-th of them. A head is a run of D
    neighbouring rows: cut as (H, D).

    reshaped without a transpose
        .unflatten(-1, (n_heads, -1)).transpose(1, 2) → .reshape(c.shape[0], n_heads, c.shape[1], -1)
    `reshape(B, H, T, D)` straight from (B, T, H·D) has the right shape, but it reads in the order of memory,
    where the heads of one token lie side by side: a "head" is then a piece of several tokens. Cut into (B, T,
    H, D) first, then `transpose(1, 2)`. (With T = 1 the two agree.)

    heads left behind the tokens
        .transpose(1, 2) →
    This gives (B, T, H, D). Attention multiplies the last two dimensions, so with time in front the heads of
    one token would attend to each other. Swap dimensions 1 and 2.

    each head has its own piece of the latent
        keys, values = → R = c.shape[-1]
            piece = torch.arange(R) // (R // n_heads) == torch.arange(n_heads)[:, None]
            w_up = (w_up.unflatten(0, (2, n_heads, -1)) * piece[:, None]).flatten(0, 2)
            keys, values =
    The latent was cut into H pieces of R/H numbers, one for each head. That would be H small caches side by
    side. There is *one* latent for all heads, and every head makes its key and its value from all R numbers:
    what the heads have in common is then kept once.

    half of the latent for keys, half for values
        keys, values = (c @ w_up.T).chunk(2, dim=-1)
            → half, (w_keys, w_values) = c.shape[-1] // 2, w_up.chunk(2)
            keys, values = c[..., :half] @ w_keys[:, :half].T, c[..., half:] @ w_values[:, half:].T
    The keys were made from the first R/2 numbers of the latent and the values from the rest. Both are made
    from *all* R numbers: a value may use what a key uses too, and nothing has to be kept twice. It is the
    rows of w_up that are shared out, not its columns.

    w_up reshaped, not transposed
        w_up.T → w_up.reshape(w_up.shape[::-1])
    `w_up.reshape(R, 2·H·D)` makes the shapes fit, but it reads the numbers of w_up in the order of memory, so
    that its rows are cut to pieces. To swap rows and columns use `w_up.T`.

    the keys twice
        return k, v → return k, k
    The values are the keys once more. Keys and values share the latent, and each has its own way up: the last
    H·D rows of w_up make the values.

    keys and values not cut apart
        keys, values = (c @ w_up.T).chunk(2, dim=-1) → keys = values = c @ w_up.T
    w_up was cut into H heads of 2·D rows, and both results are (B, H, T, 2·D). Half of its rows make keys,
    half make values: D is w_up.shape[0] / (2·H).
    """,
)


# 03.2: Scores with decoupled RoPE


decoupled.mistakes(
    r"""
    scaled by √D
        width**0.5 → q.shape[-1] ** 0.5
    The sum is divided by √D, as in plain attention. Each score is now a sum over D + Dr products, so its
    spread is √(D + Dr): count the rotary numbers too.

    each part scaled by its own width
        q @ k.transpose(-2, -1) → q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        keys.transpose(-2, -1) → keys.transpose(-2, -1) / q_rope.shape[-1] ** 0.5
        scores / width**0.5 → scores
    Content was divided by √D and position by √Dr, and the two added. Dr is small, so the position weighs far
    too much. They are one product of D + Dr numbers, cut in two for convenience: one scale for the sum, √(D +
    Dr).

    only one of the two parts scaled
        scores / width**0.5 → scores
        q @ k.transpose(-2, -1) → q @ k.transpose(-2, -1) / width**0.5
    The content was divided by √(D + Dr) and the position was not: a division binds more tightly than a sum.
    Put the sum in brackets: (content + position) / √(D + Dr).

    scaled by the width of all heads
        width**0.5 → (q.shape[1] * width) ** 0.5
    The scores are divided by √(H·(D + Dr)). A score belongs to one head: it is a sum over the D + Dr numbers
    of that head, and √(D + Dr) is its spread.

    no scale
        scores / width**0.5 → scores
    The scores are not divided. A sum of D + Dr products has a spread of √(D + Dr), and without the factor
    1/√(D + Dr) the softmax is too sharp.

    divided by D + Dr, not by its root
        width**0.5 → width
    The scores are divided by D + Dr. Variances add up, so a sum of D + Dr products has variance D + Dr and
    spread √(D + Dr): the square root belongs to the formula.

    √D + √Dr in place of √(D + Dr)
        width**0.5 → (q.shape[-1] ** 0.5 + q_rope.shape[-1] ** 0.5)
    The scale is 1 / (√D + √Dr). Variances add up and spreads do not: first D + Dr, then the root.

    the content rotated too
        q @ k.transpose → rope(q, positions[:, -T:]) @ rope(k, positions).transpose
    q and k were turned as well as q_rope and k_rope. Then the key of a token is a rotation of W_uk c, which
    differs from token to token, and W_uk can no longer be folded into the query: the whole latent would have
    to be decompressed at every step. Positions live in the Dr rotary numbers alone; the content is as it is.

    the content keys rotated
        q @ k.transpose → q @ rope(k, positions).transpose
    k was turned along with k_rope. The keys made from the latent stay as they are, or W_uk cannot be folded
    into the query; and a query that is not turned would no longer fit them. Only k_rope is turned.

    joined first, rotated whole
        scores = q @ k.transpose(-2, -1) + queries @ keys.transpose(-2, -1)
            → queries = rope(torch.cat((q, q_rope), -1), positions[:, -T:])
            keys = rope(torch.cat((k, k_rope[:, None].expand(-1, k.shape[1], -1, -1)), -1), positions)
            scores = queries @ keys.transpose(-2, -1)
    Content and rotary numbers were joined and all D + Dr of them turned. Rotate k_rope and q_rope first and
    join afterwards: the content must stay as it is, or W_uk cannot be folded into the query. And pairs (i, i
    + half) would mix content with position.

    nothing rotated
        rope(q_rope, positions[:, -T:]) → q_rope
        rope(k_rope[:, None], positions) → k_rope[:, None]
    q_rope and k_rope were multiplied as they came. They are handed in *before* the rotation; without it the
    scores know nothing of the order of the tokens. `rope(x, positions)` turns them.

    only the queries rotated
        rope(k_rope[:, None], positions) → k_rope[:, None]
    q_rope was turned and k_rope was not. A score depends on the distance of two tokens only if both are
    turned, each by its own position.

    only the keys rotated
        rope(q_rope, positions[:, -T:]) → q_rope
    k_rope was turned and q_rope was not. A score depends on the distance of two tokens only if both are
    turned, each by its own position.

    the queries' positions restarted at 0
        positions[:, -T:] → torch.arange(T)[None]
    The queries were turned to the positions 0, 1, … as if the prompt began with them. In decode they are the
    *last* T of the S tokens: `positions[:, -T:]`. This is the classic slip of a first decode step.

    the queries at the first T positions
        positions[:, -T:] → positions[:, :T]
    The queries were turned to `positions[:, :T]`, where the first T tokens are. They are the last T of the
    S tokens: `positions[:, -T:]`.

    the queries behind the last token
        positions[:, -T:] → positions[:, -1:] + 1 + torch.arange(T)
    The queries were turned to the positions that *follow* the last key's. The new tokens are among the S
    already, their keys with them: they are at `positions[:, -T:]`.

    tokens counted, positions not read
        T, width = → positions = torch.arange(k.shape[2])[None]
            T, width =
    The tokens were taken to be at 0, 1, 2, … S − 1. That is right only where nothing is missing: with
    padding or dropped tokens the distances differ. The positions are handed in: use them.

    every row at the positions of the first
        T, width = → positions = positions[:1]
            T, width =
    Only `positions[0]` was used. The positions may be (B, S): each sequence of the batch has its own. Hand
    them to `rope` as they are.

    one position score for all heads
        queries @ keys.transpose(-2, -1) → (queries @ keys.transpose(-2, -1)).mean(1, keepdim=True)
    The position scores were averaged over the heads, since k_rope has only one. Only the *key* is shared:
    every head has a rotary query of its own, q_rope[:, h], and so a score of its own.

    the position left out
        + queries @ keys.transpose(-2, -1) →
    These are the content scores alone. Add the product of the rotated q_rope with the rotated k_rope, or the
    layer cannot tell "dog bites man" from "man bites dog".

    softmax taken already
        scores / width**0.5 → (scores / width**0.5).softmax(-1)
    The result is the weights, after a softmax. The task asks for the scores before it: a mask has to go in
    between, and that is for the caller.

    masked already
        return scores / width**0.5
            → future = ~torch.ones(T, k.shape[2], dtype=torch.bool).tril(k.shape[2] - T)
            return (scores / width**0.5).masked_fill(future, -torch.inf)
    Scores with later tokens are −∞. The task asks for all scores; hiding the future is the mask's business,
    which the caller puts in.
    """,
)


# 03.3: Absorb the up-projections


absorb.mistakes(
    r"""
    absorbed on the wrong side
        torch.einsum("bhtd,hdr->bhtr", q, w_uk) → q @ w_uk.transpose(-2, -1)
    The query was multiplied with W_uk the way the latent is, W_uk q. But q · (W c) = (Wᵀ q) · c: the matrix
    changes sides as its transpose. As a row that is `q @ w_uk[h]`. (Where D = R both run, and this one is
    wrong; else the shapes do not fit.)

    W_uk reshaped to fit
        return torch.einsum("bhtd,hdr->bhtr", q, w_uk) → H, D, R = w_uk.shape
            return q @ w_uk.reshape(H, R, D).transpose(-2, -1)
    `w_uk.reshape(H, R, D)` has the shape of a transpose and not its content: reshape reads the numbers in the
    order of memory and cuts the rows elsewhere. `transpose(-2, -1)` swaps rows and columns, and here none is
    needed: `q @ w_uk[h]` is (T, D) @ (D, R).

    the pseudo-inverse in place of the transpose
        torch.einsum("bhtd,hdr->bhtr", q, w_uk)
            → q @ torch.linalg.pinv(w_uk.float()).transpose(-2, -1).to(q.dtype)
    The query was taken down by the pseudo-inverse of W_uk, as if the up-projection had to be undone. Nothing
    is undone: q · (W c) = (Wᵀ q) · c holds for any W. The two agree only where the columns of W are
    orthonormal.

    the first head's matrix for all
        torch.einsum("bhtd,hdr->bhtr", q, w_uk) → q @ w_uk[0]
    Every head's query was multiplied with W_uk[0]. The latent is shared by the heads; the way up is not: head
    h reads it through its own W_uk[h].

    the heads' matrices added up
        "bhtd,hdr->bhtr" → "bhtd,gdr->bhtr"
    W_uk was summed over its heads before it met the query. In einsum that happens when the head has another
    letter in the second input, as in "bhtd,gdr->bhtr": a letter that is missing in the result is added up.
    Write h in both.

    one absorbed query for all heads
        "bhtd,hdr->bhtr" → "bhtd,hdr->btr"
    The absorbed queries of all heads were added up to one, (B, T, R). The latent has no heads, but the
    queries have: each head keeps its own scores, so the result is (B, H, T, R).

    the scale put in, by R
        "bhtd,hdr->bhtr", q → "bhtd,hdr->bhtr", q / w_uk.shape[-1] ** 0.5
    The absorbed query was divided by √R, since it now has R numbers. The score is the same number as before,
    q · k, a sum over the D numbers of a head, only computed in another order. So its scale stays too, and
    `absorb` itself puts none in.

    the scale put in, by D
        "bhtd,hdr->bhtr", q → "bhtd,hdr->bhtr", q / w_uk.shape[1] ** 0.5
    The absorbed query was divided by √D. The scale belongs to the scores, content and position together, and
    there it is 1/√(D + Dr). `absorb` only folds W_uk in.

    time and heads mixed up
        return torch.einsum("bhtd,hdr->bhtr", q, w_uk) → B, H, T, D = q.shape
            return q.reshape(B, T, H, D).transpose(1, 2) @ w_uk
    All heads were joined by `reshape` to (B, T, H·D) before the product, straight from (B, H, T, D). That
    reads in the order of memory, so a row holds several tokens of one head. The product needs no joining:
    heads are a batch dimension, `q @ w_uk`.

    W_uv on the wrong side
        torch.einsum("bhtr,hdr->bhtd", o, w_uv) → o @ w_uv
    The output was multiplied as `o @ w_uv`, like the query. But the values' matrix is not moved:
    W_uv o, which is `o @ w_uv[h].T` for a row: it takes R numbers up to D, while W_uk's transpose takes D
    down to R. (Where D = R both run, and this one is wrong.)

    W_uv reshaped to fit
        return torch.einsum("bhtr,hdr->bhtd", o, w_uv) → H, D, R = w_uv.shape
            return o @ w_uv.reshape(H, R, D)
    `w_uv.reshape(H, R, D)` makes the shapes fit and scrambles the numbers: reshape keeps their order in
    memory. To swap rows and columns use `w_uv.transpose(-2, -1)`.

    the pseudo-inverse on the way up
        torch.einsum("bhtr,hdr->bhtd", o, w_uv) → o @ torch.linalg.pinv(w_uv.float()).to(o.dtype)
    The latent sum was taken up by a pseudo-inverse. W_uv *is* the way up: the weighted sum of the values W_uv
    c is W_uv times the weighted sum of the latents.

    the first head's values for all
        torch.einsum("bhtr,hdr->bhtd", o, w_uv) → o @ w_uv[0].T
    Every head went up through W_uv[0]. The latent is shared by the heads; the way up is not: head h uses its
    own W_uv[h].

    the heads' value matrices added up
        "bhtr,hdr->bhtd" → "bhtr,gdr->bhtd"
    W_uv was summed over its heads before it met the output: in einsum, the head had another letter in the
    second input, and a letter that is missing in the result is added up. Write h in both.

    the heads merged
        "bhtr,hdr->bhtd", o, w_uv) → "bhtr,hdr->bhtd", o, w_uv).transpose(1, 2).flatten(-2)
    The heads were joined to (B, T, H·D). That is the next step of the layer, before its output projection;
    `unabsorb` returns them apart, (B, H, T, D).
    """,
)


# 03.4: A decode step in the latent space


step.mistakes(
    r"""
    everything decompressed
        absorbed = torch.einsum("bhd,hdr->bhr", q, w_uk)
            → k, v = (torch.einsum("bsr,hdr->bhsd", c, w) for w in (w_uk, w_uv))
        absorbed @ c.transpose(1, 2) → torch.einsum("bhd,bhsd->bhs", q, k)
        torch.einsum("bhr,hdr->bhd", weights @ c, w_uv) → torch.einsum("bhs,bhsd->bhd", weights, v)
    The output is right, but keys and values of all heads were built from the latents of all tokens: H·S·D
    numbers each, at every step. That is the memory and the work which the latent was to save. Fold W_uk into
    the query, which is one token, and W_uv into the result.

    the latents copied for every head
        absorbed @ c.transpose(1, 2) → (absorbed[:, :, None] @ c[:, None].transpose(-2, -1))[:, :, 0]
        q_rope @ k_rope.transpose(1, 2) → (q_rope[:, :, None] @ k_rope[:, None].transpose(-2, -1))[:, :, 0]
        weights @ c → (weights[:, :, None] @ c[:, None])[:, :, 0]
    The output is right, but the latents were copied once for each head, H·S·R numbers. `expand` makes no
    copy, yet `@` does: where it broadcasts (B, H, 1, R) with (B, 1, R, S), it first writes all heads' copies
    to memory. Let the heads be the *rows* of one product instead: (B, H, R) @ (B, R, S).

    scaled by √(R + Dr)
        width**0.5 → cache.shape[-1] ** 0.5
    The scale counts the R + Dr numbers of a cached row. The absorbed product is the *same score* as q · k, a
    sum over D numbers, only computed in another order; so the scale stays √(D + Dr).

    scaled by √D
        width**0.5 → q.shape[-1] ** 0.5
    The scale is 1/√D, as in plain attention. A score is a sum over D content and Dr rotary products: its
    spread is √(D + Dr).

    scaled by √R
        width**0.5 → R**0.5
    The scale counts the R numbers of the latent. The absorbed product is the *same score* as q · k, a sum
    over D numbers, only computed in another order; with the rotary numbers its scale is √(D + Dr).

    each part scaled by its own width
        absorbed = → q, q_rope = q / q.shape[-1] ** 0.5, q_rope / q_rope.shape[-1] ** 0.5
            absorbed =
        scores / width**0.5 → scores
    Content was divided by √D and position by √Dr. Dr is small, so the position weighs far too much. They are
    one product of D + Dr numbers, cut in two: one scale for the sum, √(D + Dr).

    no scale
        scores / width**0.5 → scores
    The scores go into the softmax as they are. They are sums of D + Dr products: without the factor 1/√(D +
    Dr) the softmax is too sharp.

    empty slots have their say
        R, width = → length = cache.shape[1]
            R, width =
    All slots of the cache were attended to. A slot behind `length` that holds zeros has the score 0, and
    exp(0) = 1 is a weight like any other; what an earlier sequence left there has any score at all. Take
    `cache[:, :length]` first.

    the newest token left out
        R, width = → length = length - 1
            R, width =
    The last of the `length` tokens was not attended to. It is the token that is being decoded: its row is in
    the cache already, and a token attends to itself. `cache[:, :length]` ends before slot `length`.

    one slot too many
        R, width = → length = length + 1
            R, width =
    Slot number `length` was attended to as well. Counted from 0 the tokens are in the slots 0 … length − 1,
    the new one among them: `cache[:, :length]`.

    the last rows of the cache
        cache[:, :length, :R], cache[:, :length, R:] → cache[:, -length:, :R], cache[:, -length:, R:]
    The last `length` rows were read. The cache has room for max_len tokens and is filled from the front, so
    the tokens are its *first* `length` rows, `cache[:, :length]`. In a full cache it is the same, which hides
    it.

    empty slots masked after the softmax
        cache[:, :length, :R], cache[:, :length, R:] → cache[..., :R], cache[..., R:]
        weights @ c → weights[..., :length] @ c[:, :length]
    The weights of empty slots were set to 0 when the softmax had already given them a share. What is left
    adds up to less than 1. Cut the cache off at `length`, or set the scores to −∞ before the softmax.

    scores of empty slots set to 0
        cache[:, :length, :R], cache[:, :length, R:] → cache[..., :R], cache[..., R:]
        scores / width**0.5 → scores / width**0.5 * (torch.arange(cache.shape[1]) < length)
    The scores were multiplied by a mask of ones and zeros. A score of 0 is a score like any other, and exp(0)
    = 1 is a weight. Cut the cache off at `length`, or set these scores to −∞.

    softmax over the heads
        softmax(dim=-1) → softmax(dim=1)
    The softmax runs over the heads, dimension 1. Every head divides its own attention among the tokens: the
    weights add up to 1 along the last dimension.

    the position left out
        + q_rope @ k_rope.transpose(1, 2) →
    The scores are those of the content alone. Add q_rope · k_rope: the last Dr numbers of every cached row
    are the token's rotary key, rotated when it was written.

    rotary numbers looked for in front
        cache[:, :length, :R], cache[:, :length, R:] → cache[:, :length, -R:], cache[:, :length, :-R]
    The first Dr numbers of a row were taken for the rotary key and the rest for the latent. A row is [c ;
    k_rope]: the R numbers of the latent first.

    the value takes the rotary columns
        weights @ c → (weights @ cache[:, :length])[..., -R:]
    The weighted sum ran over whole rows, R + Dr numbers, and then the *last* R of them went up, so that the
    rotary key was read as content. k_rope serves the scores alone: the values come from c, the first R.

    W_uk and W_uv exchanged
        "bhd,hdr->bhr", q, w_uk → "bhd,hdr->bhr", q, w_uv
        weights @ c, w_uv → weights @ c, w_uk
    The query met W_uv and the output W_uk. Their shapes are alike, so nothing complains. Scores are made with
    *keys*, W_uk c; what is read out are *values*, W_uv c.

    keys read out in place of values
        weights @ c, w_uv → weights @ c, w_uk
    The output went up through W_uk: that is a weighted sum of *keys*. Scores use W_uk, values use W_uv.

    the output left in the latent space
        torch.einsum("bhr,hdr->bhd", weights @ c, w_uv) → weights @ c
    The result has R numbers per head: it is the weighted sum of latents. W_uv[h] still has to take it up to
    the D numbers of a head, once, at the end.

    the first head's values for all
        torch.einsum("bhr,hdr->bhd", weights @ c, w_uv) → weights @ c @ w_uv[0].T
    All heads went up through W_uv[0]. The latent is shared; the way up is each head's own, W_uv[h].

    one set of weights for all heads
        weights = → scores = scores.mean(1, keepdim=True).expand_as(scores)
            weights =
    The scores were averaged over the heads, since the cache has none. The cached rows are shared, and every
    head still asks its own question: (B, H, length) scores, a softmax for each head.

    exp without subtracting the maximum
        weights = (scores / width**0.5).softmax(dim=-1) → weights = (scores / width**0.5).exp()
            weights = weights / weights.sum(-1, keepdim=True)
    The softmax was written out as exp(score) / Σ exp(score). exp(89) is infinite in fp32, and then ∞/∞ is
    NaN. Subtract each row's maximum first, which changes nothing else; `softmax` does it for you.

    content and position weighed apart
        absorbed @ c.transpose(1, 2) + q_rope @ k_rope.transpose(1, 2)
            → torch.stack((absorbed @ c.transpose(1, 2), q_rope @ k_rope.transpose(1, 2)))
        softmax(dim=-1) → softmax(dim=-1).mean(0)
    Content and position each had a softmax of their own, and the weights were averaged. The two are added as
    *scores*: a key then must fit in both, and one softmax follows.
    """,
)


# 03.5: Initialise by the SVD of activations


svd.mistakes(
    r"""
    left singular vectors
        _, _, Vh → U, _, _
        Vh[:rank] → U[:, :rank].T
    The columns of U were taken. U has a row for each *token* of A: it says how these tokens combine, and has
    nothing to offer to the next one. The directions in a token's 2·H·D numbers are the rows of Vᵀ.

    the columns of Vᵀ
        full_matrices=False → full_matrices=True
        Vh[:rank] → Vh[:, :rank].T
    `Vh[:, :rank]` takes columns. torch returns V *transposed* already (the h in Vh): the right singular
    vectors are its rows, `Vh[:rank]`. Both are orthonormal and of the right shape, so only the error shows
    it.

    the least important directions
        Vh[:rank] → Vh[-rank:]
    These are the directions with the *smallest* singular values: the worst choice there is. torch's `svd` has
    the largest first, its `eigh` the largest last.

    singular values on both sides
        _, _, Vh → _, s, Vh
        return encode, encode.T → return encode * s[:rank, None], encode.T * s[:rank]
    Encode and decode were both multiplied by the singular values, so each direction comes back s² times too
    long. A = U diag(s) Vᵀ already holds s; its tokens, measured along V, are U diag(s).

    the singular values multiplied in
        _, _, Vh → _, s, Vh
        return encode, encode.T → return encode * s[:rank, None].sqrt(), encode.T * s[:rank].sqrt()
    Each direction comes back s times too long: the singular values are in decode (or in encode), or √s in
    each. That is the recipe to cut a *weight* in two, W ≈ (U√s)(√s Vᵀ). Here A is not a weight but the data
    that flow through, and A encodeᵀ = U diag(s) holds s already: decode · encode must be V Vᵀ.

    divided by the singular values on one side
        _, _, Vh → _, s, Vh
        return encode → return encode / s[:rank, None]
    Encode divides by the singular values, so that all latent numbers spread alike, but decode does not
    multiply them in again. Whitening is allowed as long as the way up undoes it: decode = V diag(s).

    divided by the singular values on both sides
        _, _, Vh → _, s, Vh
        return encode, encode.T → return encode / s[:rank, None], encode.T / s[:rank]
    Encode and decode both divide by the singular values, so each direction comes back s² times too short. The
    directions are of length 1; encode = Vᵀ and decode = V need no correction.

    the mean subtracted
        linalg.svd(keys_values → linalg.svd(keys_values - keys_values.mean(0)
    The mean token was subtracted before the SVD, as in PCA. PCA adds it again at the end; encode and decode
    are plain matrices without a bias, so what is lost with the mean stays lost. Take the SVD of A as it is.

    every number scaled to the same spread
        linalg.svd(keys_values → linalg.svd(keys_values / keys_values.norm(dim=0)
    The columns of A were divided by their length or standard deviation before the SVD. Then a number that
    hardly varies weighs as much as one that varies a lot, and the error of A itself is no longer the
    smallest.

    every token scaled to length 1
        linalg.svd(keys_values → linalg.svd(keys_values / keys_values.norm(dim=1, keepdim=True)
    The tokens were normalised before the SVD. The best directions for normalised tokens are others: large
    tokens then count no more than small ones, and ‖A − A encodeᵀ decodeᵀ‖ is not the smallest.

    the first R numbers
        Vh[:rank] → torch.eye(keys_values.shape[1])[:rank]
    Encode keeps the first R numbers of a token and drops the rest: part of the first head's keys, and no
    value at all. A direction may mix all numbers, and the SVD finds the best R of them.

    the directions of the first R tokens
        Vh[:rank] → torch.linalg.qr(keys_values[:rank].T)[0].T
    The R directions span the first R tokens of A, as a QR of Aᵀ gives them. These tokens come back whole, and
    all others pay for it. The SVD weighs all tokens.

    keys and values compressed apart
        encode = Vh[:rank]
            → keys, values = (torch.linalg.svd(part)[2] for part in keys_values.chunk(2, dim=1))
            encode = torch.block_diag(keys[: rank // 2], values[: rank - rank // 2])
    Keys and values had an SVD each and R/2 numbers each. One SVD over both gives each what it needs, and
    keeps what they have in common only once: that is why the latent is *joint*.

    encode and decode exchanged
        return encode, encode.T → return encode.T, encode
    Encode is (2·H·D, R) and decode (R, 2·H·D). As weights they are kept as (out, in): encode takes a token
    down to R numbers, so it is (R, 2·H·D).

    the tokens' latents, not the way to them
        _, _, Vh → U, s, Vh
        return encode, encode.T → return U[:, :rank] * s[:rank], encode
    These are U diag(s) and Vᵀ: A itself cut in two. U diag(s) has a row for each *token*: it is what comes
    out when these tokens are encoded. Asked for are the two matrices that serve any token: encode = Vᵀ,
    decode = V.
    """,
)


# 03.6: Naive or absorbed: count, and choose


naive_or_absorbed.mistakes(
    r"""
    multiply-adds, not FLOPs
        decompress = 2 * S → decompress = S
        naive_query = 2 * S → naive_query = S
        2 * H * D * R * 2 + 2 * S → H * D * R * 2 + S
    A factor of 2 is missing everywhere: a multiply-add is one multiplication and one addition, so 2 FLOPs.
    Which path wins does not change, and every comparison with a data sheet does.

    decompressed once for every query
        naive_query = → naive_query = decompress +
        decompress + T * naive_query → T * naive_query
        None if slope <= 0 else (decompress - 1) // slope → None if slope < 0 else 0
    The decompression was counted T times. Keys and values of the S tokens are built once in this call, and
    all T queries use them: that is why a long prefill takes fewer operations on the naive path.

    only the keys decompressed
        R * H * 2 * D → R * H * D
    The naive path decompresses keys *and* values: 2·D numbers for each head and token, so 2·S·R·H·2D FLOPs.
    Half of that is missing.

    the decompression left out
        decompress = 2 * S * R * H * 2 * D → decompress = 0
        None if slope <= 0 else (decompress - 1) // slope → None if slope < 0 else 0
    Only the attention of the naive path was counted. Its keys and values are not in the cache: they are made
    anew from the latents of all S tokens, 2·S·R·H·2D FLOPs at every step.

    the rotary numbers left out
        2 * D + Dr → 2 * D
        2 * R + Dr → 2 * R
    Dr is missing. On both paths a score is a product of content and of Dr rotary numbers: 2D + Dr and 2R +
    Dr. It cancels in the comparison and not in the counts.

    rotary numbers counted in the values
        2 * D + Dr → 2 * D + 2 * Dr
        2 * R + Dr → 2 * R + 2 * Dr
    Dr was counted twice, once for the scores and once for the output. The rotary key takes part in the scores
    alone; what is summed up is the value, D numbers (or the latent, R).

    the values D wide on the absorbed path
        2 * R + Dr → R + Dr + D
    The absorbed path was given R + Dr for the scores and D for the output, 2·T·S·H·(R + Dr + D). What is
    summed up there is the latent, R numbers: only the sum is taken up to D. So it is 2R + Dr.

    one way only
        2 * H * D * R * 2 → 2 * H * D * R
    W_uk was folded into the query, and the way out through W_uv forgotten, or the other way round. Each costs
    2·T·H·D·R, and both are walked.

    the ways in and out left out
        2 * H * D * R * 2 + →
    Only the attention of the absorbed path was counted. The query goes in through W_uk and the result out
    through W_uv, for every new token: 2·T·H·D·R FLOPs each. (Folding W_uk into the query's weights beforehand
    would make that matrix larger, so nobody does it.)

    the ways in and out counted for every cached token
        2 * H * D * R * 2 + →
        "absorbed": → "absorbed": 4 * S * H * D * R +
        None if slope <= 0 else (decompress - 1) // slope → None if slope < 0 else 0
    W_uk and W_uv were applied S times. On the absorbed path the cached tokens are left as they are; only the
    T queries go in and the T results out, and that is the point of it.

    one head in the latent space
        2 * S * H * (2 * R + Dr) → 2 * S * (2 * R + Dr)
    Attention on the absorbed path was counted for one head, since the latent is shared. The *memory* is
    shared; every head has its own query, its own scores and its own sum: times H. So many FLOPs for each byte
    that is read are what makes this path fast in decode.

    the sum of latents left out
        2 * R + Dr → R + Dr
    On the absorbed path only the scores were counted, R + Dr products for each pair. The weighted sum of the
    latents takes R more for each pair: 2R + Dr.

    one head counted
        decompress = 2 → H = 1
            decompress = 2
    Both counts lack the factor H. Every head has its own way up, its own scores and its own output. Which
    path wins does not change, for both grow with H alike.

    one new token counted
        decompress = 2 → T = 1
            decompress = 2
    Both paths were counted for T = 1. T new tokens attend T times, and go in and out T times; only the
    decompression happens once.

    new tokens counted beside S
        naive = lambda n: 2 * (S + n) * H * (2 * R * D + n * (2 * D + Dr))
        absorbed = lambda n: 4 * n * H * D * R + 2 * n * (S + n) * H * (2 * R + Dr)
        most = next((n for n in range(2_000) if absorbed(n + 1) >= naive(n + 1)), None)
        return {"naive": naive(T), "absorbed": absorbed(T), "largest_T": most}
    S + T tokens were attended to. S counts all tokens in the cache, the T new ones included, as everywhere in
    the course.

    half of the pairs, for causality
        naive_query = 2 * S → naive_query = S
        + 2 * S * H → + S * H
    The attention was halved because of the causal mask. That is right for a whole prompt, T = S; a few new
    tokens see nearly all of S. The task counts all T·S pairs on both paths.

    a tie taken for a win
        (decompress - 1) // slope → decompress // slope
    Where both paths cost the same, this T was counted as won. Absorbed wins with *fewer* FLOPs: rounding down
    the T at which the lines cross is one too many when it is a whole number.

    the first T that loses
        (decompress - 1) // slope → (decompress - 1) // slope + 1
    This is the smallest T at which absorbed no longer wins, or the crossing rounded up. The largest at which
    it wins is one less.

    no more queries than tokens
        None if slope <= 0 else (decompress - 1) // slope
            → S if slope <= 0 else min((decompress - 1) // slope, S)
    The largest T was cut off at S. It is true that T > S cannot occur, but the question was where the two
    lines cross: None says that they never do.

    a crossing beyond S cut off at S
        (decompress - 1) // slope → min((decompress - 1) // slope, S)
    Where the lines cross at more than S queries, S came back. The question is where they cross, for this H,
    D, R, Dr and S; that so many new tokens do not fit in this cache is no matter.

    R < D taken for "always"
        None if slope <= 0 → None if R < D
    None was returned wherever the latent is smaller than a head. Attention is then cheaper in the latent
    space, but each query also pays 4·H·D·R for the ways in and out: in a short cache that is more than it
    saves, and the lines cross. Compare what one more query costs on both paths.

    parallel lines taken to cross
        None if slope <= 0 else (decompress - 1) // slope
            → None if slope < 0 else (decompress - 1) // max(slope, 1)
    Where one more query costs the same on both paths a crossing was computed, with the division by 0 avoided.
    Absorbed starts at 0 and naive at 4·S·R·H·D, so parallel lines never meet, and absorbed wins at every T:
    None if slope ≤ 0.

    whether absorbed wins at this T
        None if slope <= 0 else (decompress - 1) // slope → T if T * slope < decompress else 0
    The T that was handed in was tested, and itself or 0 returned. The question is at which T the winner
    changes, for this H, D, R, Dr and S: solve for T.

    the crossing of an endless cache
        None if slope <= 0 else (decompress - 1) // slope → None if R <= D else (R * D - 1) // (R - D)
    The largest T was taken from R·D / (R − D). That is what it tends to when S grows; the ways in and out,
    4·T·H·D·R, do not grow with S and move the crossing for a real cache: keep S in the equation.
    """,
)


# 03.7: Choose a rank for a memory budget


budget.mistakes(
    r"""
    the latent counted twice, for keys and values
        column = → column = 2 *
    A factor of 2 for keys and values went in. One latent serves both: it is stored once, and keys and values
    are made from it. So the budget allows about twice the rank.

    a latent for every head
        column = → column = config["num_attention_heads"] *
    The row of R + Dr numbers was multiplied by the number of heads. All heads read the *same* row: that is
    the whole saving.

    the rotary numbers forgotten
        rotary = config["qk_rope_head_dim"] → rotary = 0
    Dr is missing. A cached row is [c ; k_rope]: beside the R numbers of the latent it holds the
    qk_rope_head_dim numbers of the rotary key, in every layer.

    a rotary key for every head
        rotary = → rotary = config["num_attention_heads"] *
    The rotary key was counted once for each head, H·Dr numbers. There is one for all heads, Dr numbers.

    GB for GiB
        2**30 → 10**9
    The budget was taken as budget_gib · 10⁹ bytes. That is GB; a GiB is 2³⁰ bytes, 7% more. So some of the
    memory stays unused, and a budget that fits exactly does not fit.

    rounded up
        min(numbers - rotary, mha) // 64 * 64 → min(-(-(numbers - rotary) // 64), mha // 64) * 64
        rank < 64 → numbers - rotary < 64
    The rank was rounded to the next multiple of 64 *above*. Then the cache is larger than the budget, and the
    server runs out of memory at full load. Always round down.

    rounded to the nearest
        min(numbers - rotary, mha) // 64 * 64 → min(round((numbers - rotary) / 64), mha // 64) * 64
        rank < 64 → numbers - rotary < 64
    The rank was rounded to the *nearest* multiple of 64. Every other time that is up, and the cache is larger
    than the budget. Always round down: `//`, not `round`.

    not rounded to a multiple of 64
        // 64 * 64 →
    The rank is the largest that fits, whatever number that is. GPUs multiply in tiles, so a rank is chosen as
    a multiple of 64: round down with `rank // 64 * 64`, below the cap too.

    the limit itself taken as the rank
        min(numbers - rotary, mha) // 64 * 64 → min((numbers - rotary) // 64 * 64, mha)
    Where memory is plenty the rank became 2·H·D, which need not be a multiple of 64. Take the smaller of the
    two first, and round it down then.

    less than the budget, not at most
        numbers - rotary → numbers - rotary - 1
    A cache that fills the budget to the byte was refused. It fits: the condition is ≤, not <. Budgets and
    caches are often round numbers, so this case is not rare.

    the rotary numbers not taken off
        numbers - rotary → numbers
        rank < 64 → numbers - rotary < 64
    What the budget allows is R + Dr numbers, and all of them were given to the rank. Dr of them belong to the
    rotary key: take them off before you round.

    the layers forgotten
        config["num_hidden_layers"] * →
    The cache was counted for one layer. Every layer compresses its own input and keeps its own latents.

    the batch forgotten
        column * batch → column
    The cache was counted for a single sequence. Each of the batch keeps its own, max_len tokens long.

    two bytes per number, whatever the dtype
        getattr(torch, config["torch_dtype"]).itemsize → 2
    torch_dtype is not looked at. float32 takes 4 bytes per number, bfloat16 2 and the 8-bit floats 1.

    no upper limit
        min(numbers - rotary, mha) → (numbers - rotary)
    A generous budget gives a rank beyond 2·H·D. The keys and values of all heads are only 2·H·D numbers: a
    latent of more keeps nothing that they do not have.

    the limit taken as H·D
        min(numbers - rotary, mha) → min(numbers - rotary, mha // 2)
    The rank was cut off at H·D. The latent holds keys *and* values of all heads, so up to 2·H·D numbers can
    say something new.

    the limit counted with KV heads
        min(numbers - rotary, mha) → min(numbers - rotary, max(gqa, 64))
    The rank was cut off at 2·G·D. In latent attention every query head has keys and values of its own, made
    from the latent, so the limit is 2·H·D; G describes the GQA model of the comparison and nothing else.

    rank 0 where nothing fits
        raise ValueError(f"budget_gib: expected room for rank 64, got {budget_gib}") → rank = 0
    Where not even rank 64 fits, a rank of 0 or less, or None, came back. A model with such a rank would run
    and know nothing of its past. Check it first: raise ValueError.

    the ratios upside down
        mha / (rank + rotary) → (rank + rotary) / mha
        gqa / (rank + rotary) → (rank + rotary) / gqa
    The ratios are latent over MHA and GQA, a fraction of 1. Asked was how many times *larger* their caches
    are: 2·H·D / (R + Dr).

    the ratios without the rotary key
        mha / (rank + rotary) → mha / rank
        gqa / (rank + rotary) → gqa / rank
    The ratios were taken with R alone. The rotary key is cached as well: 2·H·D / (R + Dr).

    keys only in the ratios
        mha / (rank → mha / 2 / (rank
        gqa / (rank → gqa / 2 / (rank
    A factor of 2 is missing in the ratios: MHA and GQA cache a key *and* a value for each head, 2·H·D and
    2·G·D numbers.
    """,
)
