"""Unit 01: known mistakes, each as an edit of the solution."""

import copy

from .checks import attend, cache, heads, mask, merge, model, prefill, rope, size

# 01.1: attention with a mask, and its log-sum-exp

attend.mistakes(
    r"""
    scaled by d_model
        q.shape[-1] ** -0.5 → (q.shape[1] * q.shape[-1]) ** -0.5
    The scores are divided by √(H·D), the width of the whole model, but a score is a sum over the D numbers of
    one head. Its spread is √D, so √D brings it back to 1; the larger divisor makes every softmax too flat.

    no scale
        * q.shape[-1] ** -0.5 →
    The scores go into the softmax as they are. A sum of D products has a spread of √D: without the factor
    1/√D the softmax is too sharp, nearly one-hot for large heads, and its gradients vanish.

    divided by D, not by √D
        q.shape[-1] ** -0.5 → q.shape[-1] ** -1.0
    The scores are divided by D. Variances add up, so the sum of D products has variance D and spread √D: the
    square root belongs to the formula.

    multiplied by √D
        q.shape[-1] ** -0.5 → q.shape[-1] ** 0.5
    The scores are multiplied by √D. A sum of D products has a spread of √D already: divide by it, and the
    spread is 1.

    scaled by √T
        q.shape[-1] → q.shape[2]
    The scores are divided by the root of dimension 2, the number of queries. A score is a sum over the D
    numbers of a head, whatever the length of the prompt: √D, `q.shape[-1]`.

    softmax over the queries
        scores.amax(dim=-1, keepdim=True) → scores.amax(dim=-2, keepdim=True)
        weights.sum(dim=-1, keepdim=True) → weights.sum(dim=-2, keepdim=True)
        weights @ v.float() / total.masked_fill(total == 0, 1.0)
            → (weights / total.masked_fill(total == 0, 1.0)) @ v.float()
        .squeeze(-1) → .squeeze(-2)
    Maximum and sum run over dimension −2, the queries. Each query divides its own attention among the keys,
    so it is the row of scores, dimension −1, whose weights must add up to 1. (With one query every weight
    becomes 1.)

    a query without keys gives NaN
        largest = largest.masked_fill(largest == -torch.inf, 0.0) →
    A row of scores that is −∞ everywhere has the maximum −∞, and −∞ − (−∞) is NaN. Such rows are real:
    padding, or a block of keys that lies wholly in the future. One NaN spreads through every later layer.

    0 / 0 for a query without keys
        total.masked_fill(total == 0, 1.0) → total
    The weights of a query without keys are all 0 and so is their sum: 0 / 0 is NaN. Divide by 1 there; the
    output is then 0, as asked.

    a small number added to the sum
        total = weights.sum(dim=-1, keepdim=True) → total = weights.sum(dim=-1, keepdim=True) + 1e-6
    1e-6 was added to the sum of the weights, so that nothing is divided by 0. The output survives it, but
    the lse of a query without keys is then log(1e-6) ≈ −14 in place of −∞. Treat that query by itself.

    lse 0 for a query without keys
        largest = largest.masked_fill(largest == -torch.inf, 0.0) →
        total.masked_fill(total == 0, 1.0) → total
        out.to(q.dtype), (largest + total.log())
            → out.nan_to_num().to(q.dtype), (largest + total.log()).nan_to_num()
    nan_to_num made 0 of every NaN. For the output that is right; an lse of 0 is that of one key with score 0,
    and in a merge such a query would count as if it had seen something. It is log 0 = −∞.

    a very negative number in place of −∞
        ~mask, -torch.inf → ~mask, torch.finfo(scores.dtype).min
    Masked scores are set to a very negative number. No NaN comes up, but in a row where *every* key is masked
    all scores are equal again, and the softmax hands out the mean of keys that must not be seen.

    −1e9 in place of −∞
        ~mask, -torch.inf → ~mask, -1e9
    Masked scores are set to −1e9. In a row where *every* key is masked all scores are equal again, and the
    softmax hands out the mean of keys that must not be seen.

    the mask inverted
        ~mask, -torch.inf → mask, -torch.inf
    True means *may attend*, as in torch's scaled_dot_product_attention; here the keys marked True are the
    ones that were hidden. (nn.MultiheadAttention and key_padding_mask use the opposite sense: read twice.)

    masked after the softmax
        scores = scores.masked_fill(~mask, -torch.inf) → pass
        out = weights
            → weights = weights if mask is None else weights.masked_fill(~mask, 0.0)
              out = weights
    The weights were set to 0 after their sum had been taken with the hidden keys in it. What is left adds up
    to less than 1, so every output shrinks. Mask the scores with −∞ before the exponential.

    the mask has no effect
        scores = scores.masked_fill( → scores.masked_fill(
    The result is the one without a mask. Is it used, and is its effect kept? `masked_fill` returns a new
    tensor and leaves its own alone: `scores = scores.masked_fill(…)`, or `masked_fill_`.

    masked scores set to 0
        ~mask, -torch.inf → ~mask, 0.0
    Hidden pairs have the score 0 (or 1e-9, or the product of score and mask). That is a score like any other,
    and exp(0) = 1 is a weight. Only −∞ becomes the weight 0.

    the boolean mask added to the scores
        scores.masked_fill(~mask, -torch.inf) → scores + mask
    True counts as 1 in a sum, so keys that may be seen gain 1 and hidden ones stay. A mask to add holds 0 and
    −∞; with a boolean one use `masked_fill(~mask, -torch.inf)`.

    always causal
        scores = q.float()
            → T, S = q.shape[2], k.shape[2]
              causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)
              mask = causal if mask is None else mask & causal
              scores = q.float()
    Later keys are hidden though nobody asked for it. Which pairs may attend is what the mask says, and
    without a mask it is all of them; one-way attention is a matter of the caller's mask.

    exp without subtracting the maximum
        scores.amax(dim=-1, keepdim=True) → torch.zeros_like(scores[..., :1])
    The softmax was written out as exp(score) / Σ exp(score). exp(89) is infinite in fp32, and then ∞/∞ is
    NaN and the lse ∞; exp(−104) is 0. Subtract each query's largest score first, and add it to the log.

    exp without subtracting the maximum, repaired with nan_to_num
        scores.amax(dim=-1, keepdim=True) → torch.zeros_like(scores[..., :1])
        weights @ v.float() / total.masked_fill(total == 0, 1.0) → (weights / total).nan_to_num() @ v.float()
    exp(89) is infinite in fp32, and nan_to_num turns the ∞/∞ that follows into 0: the NaN is gone and the
    largest score has lost its weight. Subtract each query's largest score before the exponential.

    the maximum over hidden keys too
        * q.shape[-1] ** -0.5 → * q.shape[-1] ** -0.5
            everything = scores
        scores.amax(dim=-1, keepdim=True) → everything.amax(dim=-1, keepdim=True)
    The largest score was taken before the mask was applied. If a hidden key has it, all visible scores may
    lie 100 or more below, their exponentials are 0, and the query is lost. Mask first, then take the maximum.

    one maximum for all queries
        scores.amax(dim=-1, keepdim=True) → scores.amax()
    The largest score of the whole tensor is subtracted everywhere. A query whose scores lie 200 below it has
    exp(−200) = 0 for all its weights and is lost. Every query has a maximum of its own: dimension −1.

    the maximum not added back to the lse
        largest + total.log() → total.log()
    The output is right, but the lse is log Σ exp(score − max), relative to a maximum that nobody knows any
    more. Add the maximum again, or a merge weighs this result as if its largest score were 0.

    the sum in place of its logarithm
        largest + total.log() → largest.exp() * total
    The second result is Σ exp(score) itself. It overflows as soon as one score exceeds 88; its logarithm is
    as large as the largest score: log(total) + max.

    half-precision scores
        q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5
            → (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).float()
    The scores were computed in the dtype of q and converted afterwards. bf16 keeps 8 bits, so a score of 10
    is off by up to 0.03, and so is the lse. Convert q and k first.

    the lse in the dtype of q
        total.log()).squeeze(-1) → total.log()).squeeze(-1).to(q.dtype)
    The lse came back in half precision (or all was computed in it). A merge takes exp of differences of such
    numbers: in bf16 an lse of 10 is off by 0.03, and every merged weight by 3%. Keep it in fp32.
    """
)


# 01.2: the causal mask of rows that are padded on the left

mask.mistakes(
    r"""
    aligned top-left
        keys[n_keys - n_queries :, None] → keys[:n_queries, None]
    The first query was put at position 0. But the queries are the newest tokens, the *last* T of S positions:
    in decode this one token would see only the first key. `torch.tril(torch.ones(T, S))` and SDPA's
    `is_causal=True` align this way too, which is why they are right for T = S alone.

    off by one: a token cannot see itself
        keys <= queries → keys < queries
    The comparison is strict. A token attends to itself too: its own key has been written when it asks. With
    the strict mask the first token of a prompt has nothing to attend to at all.

    off by one: a token sees the next one
        keys <= queries → keys <= queries + 1
    Each query sees one key of the future. Training then looks wonderful, since the answer can be copied, and
    generation falls apart.

    True where a key is hidden
        (keys <= queries) & (keys >= padding) → (keys > queries) | (keys < padding)
    True means *may attend* here, and what is hidden was marked: the future and the padding. Turn the mask
    round with `~`.

    a mask to add: 0 and −∞
        return (keys <= queries) & (keys >= padding)
            → hidden = (keys > queries) | (keys < padding)
              return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    This is the other kind of mask, numbers that are added to the scores. It is right in itself, but here the
    mask is boolean, True = *may attend*: smaller, and the same for scores of every dtype.

    looking forwards: the triangle upside down
        keys <= queries → keys >= queries
    Each query sees its own key and the later ones. The comparison points the wrong way: a key may be seen if
    its position is *at most* the query's.

    only the padding hidden
        (keys <= queries) & (keys >= padding) → (keys >= padding).expand(-1, -1, n_queries, -1)
    The padding is hidden and the future is not. For the one token of a decode step that is right; a prompt's
    tokens would see their own future, and what they are to predict is there.

    the mask of all S positions, not of the last T
        keys[n_keys - n_queries :, None] → keys[:, None]
    This has a row for each of the S positions. The tokens in the cache ask no more: only the T new ones have
    queries, so of this mask the last T rows are wanted, `[..., -n_queries:, :]`.

    shifted the wrong way
        keys[n_keys - n_queries :, None] → torch.arange(n_queries)[:, None] - (n_keys - n_queries)
    The diagonal was moved by T − S in place of S − T. There are S − T tokens before the first query, and each
    of them is one more column that it may see: the diagonal moves to the right.

    the past hidden
        keys <= queries → (keys <= queries) & (keys >= n_keys - n_queries)
    The triangle is in the right place, over the last T keys, but the S − T columns before it are False:
    the new tokens see each other and nothing of what is in the cache. The past may be seen, but for padding.

    decode as an exception, chunks aligned top-left
        keys[n_keys - n_queries :, None] → keys[-1:, None] if n_queries == 1 else keys[:n_queries, None]
    T = 1 got a branch of its own and the rest is aligned top-left, as if the first query were at position 0.
    With S − T tokens before the first query, one rule serves a prompt, a chunk and a single token.

    the padding not hidden
        keys >= padding → keys >= 0 * padding
    This is the causal mask of a batch without padding. The keys of padding tokens come first, so causality
    alone never hides them: every token of a padded row would attend to them.

    the padding taken to be on the right
        keys >= padding → keys < n_keys - padding
    The last keys of each row are hidden, as if the padding came after the text. On the left it takes the
    *first* positions, so that the newest token of every row is at S − 1 and all rows decode together.

    off by one: the first real token hidden
        keys >= padding → keys > padding
    With n padding tokens at the positions 0 … n − 1 the first real token is at n, and it may be seen. The
    strict comparison hides it, in a row without padding too.

    off by one: the last padding token seen
        keys >= padding → keys >= padding - 1
    With n padding tokens at the positions 0 … n − 1 the last of them is at n − 1, and it was left
    visible. Its key is that of a token without meaning.

    padding queries see themselves
        (keys >= padding) → ((keys >= padding) | (keys == queries))
    A query that is padding was given its own key, so that its softmax is not NaN. The task says that it sees
    nothing; attention of 01.1 gives 0 there, and a padding key that somebody may see is a trap for the next
    change.

    the padding hidden as queries, not as keys
        keys >= padding → queries >= padding
    The rows of padding queries are empty, but the columns of padding keys are open, so the real tokens attend
    to padding. It is the *keys* that must not be seen.

    one of the two conditions is enough
        (keys <= queries) & (keys >= padding) → (keys <= queries) | (keys >= padding)
    The two conditions are joined by "or", so a key of the future is seen because it is no padding, and a
    padding key because it is in the past. A key must meet both: `&`.

    the number of a query compared with the padding
        (keys >= padding) → (keys >= padding) & (torch.arange(n_queries)[:, None] >= padding)
    Queries 0 … n − 1 of the chunk were taken for padding. But padding is counted in positions, and query t is
    at position S − T + t. A padding query needs no condition of its own: no key meets the other two.

    the longest padding for all rows
        torch.as_tensor(padding)[ → torch.as_tensor(padding).max().expand(len(padding))[
    Every row was treated as if it had as much padding as the shortest text of the batch. The longer texts
    lose their first tokens. Each row has its own number.

    query positions counted without the padding
        keys <= queries → keys <= queries - padding
    The queries' positions were counted from the first real token and the keys' from the first slot, so each
    query misses as many of its newest keys as its row has padding. Compare slots with slots.
    """
)


# 01.3: split a fused projection, merge the heads

heads.mistakes(
    r"""
    three blocks of all heads, as GPT-2 has them
        x.view(B, T, n_heads, 3, -1).transpose(1, 2).unbind(dim=3)
            → [y.view(B, T, n_heads, -1).transpose(1, 2) for y in x.chunk(3, dim=-1)]
    x was cut into one block for q of all heads, one for k and one for v. That is GPT-2's layout; GPT-NeoX and
    Pythia put q, k and v of one head side by side. Every shape fits both layouts, only the numbers differ.

    q, k and v interleaved within a head
        x.view(B, T, n_heads, 3, -1).transpose(1, 2).unbind(dim=3)
            → x.view(B, T, n_heads, -1, 3).transpose(1, 2).unbind(dim=-1)
    The 3·D columns of a head were cut as (D, 3), so q took every third column. They come as D numbers of q,
    then D of k, then D of v: (3, D).

    split by view alone
        x.view(B, T, n_heads, 3, -1).transpose(1, 2).unbind(dim=3)
            → x.view(B, n_heads, T, 3, -1).unbind(dim=3)
    The shape is right and the content is not: a `view` with the heads before the tokens reads the numbers in
    memory order, in which the columns of one token lie side by side. So a "head" here is a piece of several
    tokens. Cut the columns first, then transpose.

    the heads last among the columns
        x.view(B, T, n_heads, 3, -1).transpose(1, 2).unbind(dim=3)
            → x.view(B, T, -1, n_heads).transpose(-1, -2).transpose(1, 2).chunk(3, dim=-1)
    The last dimension was cut as (3·D, H), so head h took every H-th column. The columns come head by head:
    cut H first.

    split without moving the heads in front
        .transpose(1, 2).unbind(dim=3) → .unbind(dim=3)
    This gives (B, T, H, D). Attention multiplies the last two dimensions, so with time in front of the heads
    the heads of one token would attend to each other. Swap dimensions 1 and 2.

    the split copies
        .unbind(dim=3) → .contiguous().unbind(dim=3)
    The values are right, but all numbers were copied (`contiguous`, `stack`, `cat` and `clone` do that, and
    `reshape` where a view cannot do). Matrix products take strided views as they are.

    k and q exchanged
        return x.view(B, T, n_heads, 3, -1).transpose(1, 2).unbind(dim=3)
            → k, q, v = x.view(B, T, n_heads, 3, -1).transpose(1, 2).unbind(dim=3)
              return q, k, v
    The first D numbers of a head were taken for k and the next for q. With no mask and no RoPE the scores are
    merely transposed, so the mistake is easy to overlook: the order is q, k, v.

    merge without transposing back
        x.transpose(1, 2).flatten(-2) → x.reshape(x.shape[0], x.shape[2], -1)
    The shape is right and the content is not: `reshape(B, T, H·D)` straight from (B, H, T, D) fills a token's
    row with several tokens of the same head. Transpose back to (B, T, H, D) first.

    merge interleaves the heads
        x.transpose(1, 2).flatten(-2) → x.permute(0, 2, 3, 1).flatten(-2)
    The numbers of the heads are interleaved: first of head 0, first of head 1, … The output projection
    expects head 0 whole, then head 1 whole: keep D last when you join the two dimensions.
    """
)


# 01.4: rotary position embedding

rope.mistakes(
    r"""
    positions restarted at 0
        positions.float() → torch.arange(x.shape[2])
    The positions handed in are not used: the tokens are counted from 0 again. In prefill nobody notices; in
    decode every new token believes that it is the first one, and all distances to the cached keys are wrong.

    neighbouring pairs (2i, 2i+1)
        x.float().chunk(2, dim=-1) → x.float()[..., 0::2], x.float()[..., 1::2]
        torch.cat((a → torch.stack((a
        dim=-1).to(x.dtype) → dim=-1).flatten(-2).to(x.dtype)
    The paper pairs neighbours; Llama and this course pair i with i + D/2. Both are sound, since they differ
    by an order of the columns only, but weights trained with the one are useless with the other.

    turned the other way
        a * cos - b * sin → a * cos + b * sin
        b * cos + a * sin → b * cos - a * sin
    The sign of the sine is the other way round: (a cos + b sin, b cos − a sin) turns backwards. Scores depend
    on distances alone and come out the same, so only a comparison with trained weights shows it.

    no minus in the rotation
        a * cos - b * sin → a * cos + b * sin
    Both halves got a plus: (a cos + b sin, b cos + a sin). That is no rotation: lengths change with the
    position. Exactly one of the two sines carries a minus.

    the exponent without its 2
        -2 * → -1 *
    The frequencies are theta^(−i/D) for i = 0 … D/2 − 1. The exponent is −2i/D, so that they reach from 1
    nearly to 1/theta; without the 2 the slowest stops at 1/√theta, and far positions look alike.

    angles in the dtype of x
        positions.float()[:, None] * omega → positions.to(x.dtype)[:, None] * omega.to(x.dtype)
        x.float().chunk → x.chunk
    The angles were computed in x's dtype. bf16 knows whole numbers up to 256 only, so position 1001 becomes
    1000 and the angle is off by a radian. Compute angles, sine and cosine in fp32, and convert the result.

    angles of neighbours in half-split pairs
        * omega → * omega.repeat_interleave(2)
        torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
            → (x.float() * cos + torch.cat((-b, a), dim=-1) * sin)
    The pairs are (i, i + D/2), but the angles were laid out for neighbours, (0, 0, 1, 1, …), as
    `repeat_interleave` gives them. So the two numbers of a pair are turned by different angles. For this
    pairing the angles come twice in a row: `torch.cat((angles, angles), dim=-1)`.

    theta ignored
        theta ** → 10_000.0 **
    The base is 10000 whatever is handed in. Models for long contexts use a larger one (Llama 3: 500000), so
    that the slow pairs have not come full circle at the end of it.

    the first half overwritten before the second is computed
        (a * cos - b * sin, → (a,
        return torch.cat → a = a * cos - b * sin
            return torch.cat
    The second half was computed from the first half *after* it had been turned. Both need the old values:
    take a and b apart first (as copies, or join the two results with `torch.cat`), then write.

    positions counted from 1
        positions.float() → (positions.float() + 1)
    Every token is turned by one position too many. The first is at position 0 and is not turned at all.
    Scores hide it, since they depend on distances; a cache filled by other code would not fit.

    the exponent without its minus
        -2 * → 2 *
    The frequencies are theta^(+2i/D), from 1 up to nearly theta, radians a token. They are to fall, so that
    the slow pairs can tell far positions apart: theta^(−2i/D).

    degrees
        * omega → * omega.rad2deg()
    The angles were turned into degrees. m·ω is an angle in radians already, and radians are what torch's sin
    and cos take.

    frequencies and angles in the dtype of x
        torch.arange(D // 2) → torch.arange(D // 2).to(x.dtype)
        positions.float() → positions.to(x.dtype)
        x.float().chunk → x.chunk
    Frequencies and angles were computed in x's dtype. bf16 keeps 8 bits: position 1001 becomes 1000, and the
    product with a rounded frequency is off by radians. Compute all of it in fp32, and convert the result.
    """
)


# 01.5: the preallocated KV cache, with undo and fork

cache.mistakes(
    r"""
    the pointer is not advanced
        self.length = end →
    The length stays where it was, so every append writes over the one before. In decode the model then sees
    its newest token and nothing else.

    the pointer is advanced by one, whatever T is
        self.length = end → self.length += 1
        return self.k[:, :, :end], self.v[:, :, :end]
            → return self.k[:, :, : self.length], self.v[:, :, : self.length]
    The length grows by 1 for T tokens. That is right in decode and wrong in prefill: all but the first of the
    prompt's tokens are lost or written over. Advance by k.shape[2].

    a new tensor at every step: torch.cat, or a copy of the buffer
        return self.k[:, :, :end], self.v[:, :, :end]
            → return self.k[:, :, :end].clone(), self.v[:, :, :end].clone()
    The values are right and the cost is not: each step allocates new memory and copies the whole past, so
    generating N tokens moves N² of them, and at the moment of copying the cache exists twice. Allocate
    max_len slots once, write into them, and return a slice, which is a view.

    the whole buffer is returned
        return self.k[:, :, :end], self.v[:, :, :end] → return self.k, self.v
    All max_len slots come back, the unwritten ones too. Zeros are no neutral keys: they score 0, and the
    softmax gives them weight. Return the slots up to the length.

    reset leaves the pointer where it was
        def reset(self):  # forget all tokens; the memory stays
        self.length = 0
            → def reset(self):
                  pass
    The length stays: the next prompt is written behind the old one, at wrong positions, and the old slots are
    attended to. Setting the length to 0 is all it takes.

    no check for a full cache
        end > self.max_len → False
    Nothing compares length + T with max_len. For several tokens torch complains about shapes, somewhere far
    from the cause; for a single one it does not even do that: a slice past the end is empty, and one token
    written to it vanishes in silence. Raise ValueError before writing.

    a full cache one token too early
        end > self.max_len → end >= self.max_len
    An append that fills the cache exactly is refused: the comparison is >= where it should be >. After the
    append the length may be equal to max_len.

    a refused append leaves its mark
        raise ValueError(f"k: → self.length = end
            raise ValueError(f"k:
    The length (or the content) had grown already when ValueError was raised, so the cache takes itself for
    full although the tokens never came in. Compare first, then write and advance.

    only the new tokens are returned
        return self.k[:, :, :end], self.v[:, :, :end]
            → return self.k[:, :, end - k.shape[2] : end], self.v[:, :, end - k.shape[2] : end]
    The tokens are written in their places, but what comes back are the ones just written. The new queries are
    to attend to the past too: return everything up to the length, `self.k[:, :, : self.length]`.

    reset clears the content and keeps the pointer
        def reset(self):  # forget all tokens; the memory stays
        self.length = 0
            → def reset(self):
                  self.k.zero_()
                  self.v.zero_()
    The memory is filled with zeros but the length stays, so the next prompt is written behind slots of zeros,
    which are attended to. Setting the length to 0 is all it takes; what is old is written over.

    keys and values in one buffer
        torch.zeros_like(self.k) → self.k
    Both names mean the same tensor (`self.k = self.v = …`), so the values are written over the keys and both
    come back equal. They are two projections of a token: two buffers.

    one state for all caches
        self.k = torch.zeros( → KVCache.k = torch.zeros(
        self.v = torch.zeros_like( → KVCache.v = torch.zeros_like(
        self.max_len = max_len
        self.length = 0
            → KVCache.max_len = max_len
              KVCache.length = 0
        self.length = end → KVCache.length = end
        self.length = 0 → KVCache.length = 0
        self.length -= n → KVCache.length -= n
    Buffers and length belong to the class, so a second cache takes the place of the first. A model has a
    cache for each of its layers: keep the state on `self`, in `__init__`.

    the wrong line is still there
        class KVCache(BrokenCache):
            def undo(self, n):
                if n > sum(self.sizes):
                    raise ValueError(n)
                while n:
                    self.sizes[-1] -= (some := min(n, self.sizes[-1]))
                    n -= some
                    if not self.sizes[-1]:
                        self.sizes.pop()

            def fork(self):
                return copy.deepcopy(self)
    A chunk begins in the slot (number of earlier chunks) · (its own size). That is right while all chunks
    have one size, which hides it; the shorter last chunk and every single token are written over earlier
    ones, and the slots behind stay zero. They begin behind the tokens that are there: `start = n_old`.

    dtype is ignored
        max_len, head_dim, dtype=dtype) → max_len, head_dim)
    The buffers have the default dtype, float32, whatever was asked for. A cache in bfloat16 takes half the
    memory, and that is why it is asked for: pass `dtype` to `torch.zeros`.

    undo forgets appends, not tokens
        self.length = end → self.ends = [*getattr(self, "ends", []), self.length]
            self.length = end
        self.length -= n → for _ in range(min(n, len(self.ends))):
                self.length = self.ends.pop()
    undo(n) took back the last n appends. A prompt is one append of many tokens, and what speculative decoding
    takes back is part of a chunk: n counts tokens.

    undo counts appends
        self.length = end → self.ends = [*getattr(self, "ends", []), self.length]
            self.length = end
        n > self.length → n > len(getattr(self, "ends", []))
        self.length -= n → if n:
                self.length = self.ends[-n]
                del self.ends[-n:]
    undo(n) took back the last n appends, and refused where there were fewer. A prompt is one append of many
    tokens, and what speculative decoding takes back is part of a chunk: n counts tokens.

    undo forgets the first tokens
        self.length -= n → self.length -= n
            self.k[:, :, : self.length] = self.k[:, :, n : n + self.length].clone()
            self.v[:, :, : self.length] = self.v[:, :, n : n + self.length].clone()
    The oldest n tokens were forgotten, as a sliding window does. undo takes back what came *last*: the length
    is all that changes.

    undo keeps n tokens
        self.length -= n → self.length = n
    The length was set to n: n tokens stayed. n is the number of tokens to forget.

    a refused undo leaves its mark
        self.length -= n → pass
        if n > self.length: → self.length -= n
            if self.length < 0:
    The length was lowered before it was compared, so it is negative when ValueError is raised, and the cache
    has lost its tokens. Compare first, then lower it.

    undo of too many tokens is not refused
        n > self.length → False
    Nothing compares n with the length. It becomes negative, and a negative slice counts from the end of the
    buffer: the next append returns nonsense without an error. Raise ValueError first.

    undo refuses to forget all tokens
        n > self.length → n >= self.length
    An undo of exactly as many tokens as there are was refused: the comparison is >= where it should be >. The
    length may become 0.

    undo clears the slots and keeps the length
        self.length -= n → self.k[:, :, self.length - n : self.length] = 0
            self.v[:, :, self.length - n : self.length] = 0
    The slots are zeros and still count as tokens, so they are attended to and the next append goes behind
    them. Lower the length; what is in the slots behind it does not matter.

    undo copies
        self.length -= n → self.length -= n
            self.k, self.v = self.k.clone(), self.v.clone()
    The tokens that stay were copied into new memory. Forgetting needs no copy: lower the length, and the next
    append writes over the slots.

    the fork writes into the same memory
        other = KVCache(*self.k.shape, self.k.dtype)
        other.append(self.k[:, :, : self.length], self.v[:, :, : self.length])
            → other = copy.copy(self)
    The fork has a length of its own and the same tensors (`copy.copy`, or `other.k = self.k`), so both write
    into the same slots and each finds the other's tokens. Give the fork memory of its own and copy the
    tokens.

    the fork shares the list of sizes
        class KVCache(BrokenCache):
            def append(self, k, v):
                n_new, start = k.shape[2], sum(self.sizes)
                if start + n_new > self.kv.shape[3]:
                    raise ValueError(n_new)
                self.sizes.append(n_new)
                self.kv[0, :, :, start : start + n_new] = k
                self.kv[1, :, :, start : start + n_new] = v
                return self.kv[0, :, :, : start + n_new], self.kv[1, :, :, : start + n_new]

            def undo(self, n):
                if n > sum(self.sizes):
                    raise ValueError(n)
                self.sizes = [sum(self.sizes) - n]

            def fork(self):
                other = copy.copy(self)
                other.kv = self.kv.clone()
                return other
    The fork has memory of its own, but both caches hold the same list of sizes (`copy.copy`, or
    `other.sizes = self.sizes`), so an append to one makes the other longer too. Copy the list as well, or
    keep the length as a number.

    the fork is the cache itself
        return other → return self
    fork returned the cache itself, so what is appended to one is appended to the other. Make a new cache.

    the fork is empty
        other.append(self.k[:, :, : self.length], self.v[:, :, : self.length]) →
    The fork has memory and no tokens. It shall go on from where the cache is: copy the keys and values of all
    tokens into it, and set its length.

    the fork has no room
        KVCache(*self.k.shape, self.k.dtype)
            → KVCache(*self.k.shape[:2], self.length, self.k.shape[3], self.k.dtype)
    The fork has room for the tokens that were there and for no more. Allocate max_len slots, as the cache
    has.

    the fork has the default dtype
        KVCache(*self.k.shape, self.k.dtype) → KVCache(*self.k.shape)
    dtype was not passed on, so the fork of a bfloat16 cache is float32 and takes twice the memory. Pass
    `self.k.dtype`.
    """,
    copy=copy,
)


# 01.6: prefill in chunks

prefill.mistakes(
    r"""
    each chunk sees itself only
        keys, values, _ = cache.append(rope(k_new, positions), v_new)
            → keys, values = rope(k_new, positions), v_new
              cache.append(keys, values)
    The chunk attends to its own keys and not to those in the cache. What was prefilled before is written and
    never read, so a long prompt is understood chunk by chunk. Attend to what append returns: all keys so far.

    positions restarted in every chunk
        cache.positions(q_new.shape[2]) → torch.arange(q_new.shape[2])[None]
    RoPE counts from 0 again in each chunk, so tokens of different chunks seem to be at the same place. The
    first chunk is right, which hides it. Count from the cache's length on: cache.positions(n).

    attending before writing
        keys, values, _ = cache.append(rope(k_new, positions), v_new)
            → keys, values = cache.k[:, :, : cache.length], cache.v[:, :, : cache.length]
        core.causal_mask(q_new.shape[2], keys.shape[2]) → None
        keys, values, mask)) → keys, values, mask))
            cache.append(rope(k_new, positions), v_new)
    The chunk attends to the tokens that the cache held before it, and is written afterwards. So no token sees
    itself or its neighbours in the chunk, and the first chunk sees nothing at all. Append first, then attend.

    the mask aligned top-left
        core.causal_mask(q_new.shape[2], keys.shape[2])
            → torch.ones(q_new.shape[2], keys.shape[2], dtype=torch.bool).tril()
    The chunk's queries are taken for the *first* of the S positions (so does SDPA's is_causal=True). From the
    second chunk on they see only the start of the prompt. The queries are the last n of S: causal_mask(n, S).

    no mask within the chunk
        core.causal_mask(q_new.shape[2], keys.shape[2]) → None
    Every query sees the whole chunk, later tokens too. With one token at a time there is no future to hide
    and no mask is needed; with more the mask must hide the rest of the chunk.

    the rest of the prompt is dropped
        range(0, q.shape[2], chunk) → range(0, max(q.shape[2] // chunk, 1) * chunk, chunk)
    Only whole chunks are processed: T // chunk of them. The tokens left over at the end are missing, and they
    are the ones that the answer follows. The last chunk may be shorter.

    the whole prompt at once
        outputs = [] → chunk = q.shape[2]
            outputs = []
    The outputs are right, but the prompt went through in one piece, with T × S scores in memory at a time.
    Chunks are there to bound that: chunk × S. Loop over range(0, T, chunk).

    what the cache holds already is not counted
        cache.positions(q_new.shape[2]) → torch.arange(start, start + q_new.shape[2])[None]
    Positions are counted from the start of this prompt. It may continue what is in the cache (the next turn
    of a chat): then its first token is at cache.length, as cache.positions(n) says.

    keys cached before RoPE
        cache.append(rope(k_new, positions), v_new) → cache.append(k_new, v_new)
    The queries were rotated and the keys went into the cache as they were. A score depends on the distance of
    two tokens only if both are turned, each by its own position: rotate the chunk's keys before you append
    them.

    no RoPE
        cache.append(rope(k_new, positions), v_new) → cache.append(k_new, v_new)
        core.attention(rope(q_new, positions), → core.attention(q_new,
    Neither queries nor keys were rotated, so the scores know nothing of the order of the tokens. Turn the
    chunk's q and k with `rope(x, positions)` before the append.

    queries not rotated
        core.attention(rope(q_new, positions), → core.attention(q_new,
    The keys were rotated and the queries were not. A score depends on the distance of two tokens only if both
    are turned, each by its own position: rotate the chunk's q as well.

    values rotated too
        positions), v_new) → positions), rope(v_new, positions))
    RoPE was applied to v as well. Positions have a say in the scores, q with k, and nowhere else: the values
    are what is averaged, and go into the cache as they are.

    positions asked after the append
        core.attention(rope(q_new, positions), → core.attention(rope(q_new, cache.positions(q_new.shape[2])),
    cache.positions(n) says where the *next* n tokens will be. After the append these are no longer the
    chunk's, so its queries are turned n positions too far. Ask before you append.

    keys rotated twice
        mask = core → keys = rope(keys, torch.arange(keys.shape[2])[None])
            mask = core
    The keys were rotated before the append, and all of them again when they came back. Every key is turned
    once, when it enters the cache: what append returns is ready for use.

    the cache emptied first
        outputs = [] → cache.reset()
            outputs = []
    cache.reset() at the start throws away what the cache holds. The prompt may be the next turn of a chat:
    its tokens go on behind the old ones and attend to them.

    chunk taken for the number of chunks
        outputs = [] → chunk = -(-q.shape[2] // chunk)
            outputs = []
    `x.chunk(n)` cuts x into n pieces; `chunk` is the *size* of a piece. The outputs come out right either
    way, but the pieces grow with the prompt. `x.split(chunk, dim=2)` cuts by size.

    one token at a time, whatever the chunk
        outputs = [] → chunk = 1
            outputs = []
    The outputs are right, but every append brought a single token: that is prefill by decoding, which reads
    all weights and the whole cache once per token. A chunk is there to share one read among its tokens.

    only the last chunk returned
        torch.cat(outputs, dim=2) → outputs[-1]
    The outputs of the earlier chunks were written over. Collect them all and join them along the tokens:
    `torch.cat(outputs, dim=2)`.
    """
)


# 01.7: one shared prompt, many answers

merge.mistakes(
    r"""
    no running maximum
        torch.logaddexp(lse_a, lse_b) → (lse_a.exp() + lse_b.exp()).log()
        torch.exp(lse_a - base)[ → (lse_a.exp() / (lse_a.exp() + lse_b.exp()))[
        torch.exp(lse_b - base)[ → (lse_b.exp() / (lse_a.exp() + lse_b.exp()))[
    exp is taken of the log-sum-exps themselves. On paper that is the formula; in fp32 exp(89) is infinite and
    exp(−104) is 0, so large scores and empty parts give ∞/∞ or 0/0. Subtract the larger one first: only
    differences matter.

    no running maximum, repaired with nan_to_num
        torch.logaddexp(lse_a, lse_b) → (lse_a.exp() + lse_b.exp()).log()
        torch.exp(lse_a - base)[ → (lse_a.exp() / (lse_a.exp() + lse_b.exp())).nan_to_num()[
        torch.exp(lse_b - base)[ → (lse_b.exp() / (lse_a.exp() + lse_b.exp())).nan_to_num()[
    exp is taken of the log-sum-exps themselves: exp(89) is infinite in fp32 and exp(−104) is 0. nan_to_num
    (or a guard for 0/0) hides the NaN that follows, and the output becomes 0. Subtract the larger one first:
    only differences matter.

    the plain average
        weight_a * out_a + weight_b * out_b → 0.5 * out_a + 0.5 * out_b
    Both parts get the weight ½. They have seen different keys: the one whose scores were higher, or that saw
    more keys, must weigh more. That is what the log-sum-exp is kept for.

    weighted by lse, not by exp(lse)
        torch.exp(lse_a - base) → (lse_a / (lse_a + lse_b))
        torch.exp(lse_b - base) → (lse_b / (lse_a + lse_b))
    The weights are lse_a / (lse_a + lse_b). The log-sum-exp is a logarithm, and may well be negative: the
    parts weigh exp(lse).

    −∞ − (−∞) = NaN
        lse.masked_fill(lse == -torch.inf, 0.0) → lse
    Where there is no prompt and no own key, the common lse is −∞ too, and −∞ minus −∞ is NaN. It happens as
    soon as rows of a batch have different lengths. Subtract a finite number there.

    not divided by the new sum
        lse.masked_fill → torch.maximum(lse_a, lse_b).masked_fill
    The outputs are rescaled to the common maximum and added, but their weights do not add up to 1. Divide by
    the sum of the two weights: it is the softmax's denominator over all keys.

    the new lse is the larger of the two
        * out_b, lse → * out_b, torch.maximum(lse_a, lse_b)
    The output is right, but the lse returned is the maximum, not log(exp(lse_a) + exp(lse_b)). Two parts look
    fine; with the third the first two weigh too little.

    the maximum not added back
        * out_b, lse → * out_b, lse - torch.maximum(lse_a, lse_b).masked_fill(lse == -torch.inf, 0.0)
    The output is right, but the lse returned is log Σ exp(lse − max): relative to a maximum that nobody knows
    any more. Add the maximum again, or the next merge weighs this part as if its scores were about 0.

    the outputs added
        weight_a * out_a + weight_b * out_b → out_a + out_b
    The outputs are added as they are. Each is an average over its own keys already; the average over all keys
    lies between the two, with weights exp(lse_a − lse) and exp(lse_b − lse) that add up to 1.

    the log-sum-exps added
        torch.logaddexp(lse_a, lse_b) → lse_a + lse_b
        lse.masked_fill(lse == -torch.inf, 0.0) → lse
    The new lse is lse_a + lse_b. They are logarithms: their sum belongs to the *product* of the two
    denominators, and what is wanted is their sum, `torch.logaddexp(lse_a, lse_b)`.

    the weights swapped
        weight_a * out_a + weight_b * out_b → weight_b * out_a + weight_a * out_b
    Each part got the other one's weight, so the one with the smaller scores counts most. out_a goes with
    exp(lse_a − lse).

    (lse, out) returned
        return weight_a * out_a + weight_b * out_b, lse → return lse, weight_a * out_a + weight_b * out_b
    The two results are there, in the wrong order: (out, lse) is asked for, as prompt gives it, so that the
    result can be merged again.

    one maximum for all rows
        lse = torch.logaddexp(lse_a, lse_b)
            → largest = torch.maximum(lse_a.max(), lse_b.max())
              lse = (torch.exp(lse_a - largest) + torch.exp(lse_b - largest)).log() + largest
        torch.exp(lse_a - base)[ → (torch.exp(lse_a - largest) / torch.exp(lse - largest)).nan_to_num()[
        torch.exp(lse_b - base)[ → (torch.exp(lse_b - largest) / torch.exp(lse - largest)).nan_to_num()[
    The largest log-sum-exp of the whole tensor is subtracted everywhere. A row that lies 200 below it becomes
    exp(−200) = 0 and is lost. Every row has a maximum of its own: `torch.maximum(lse_a, lse_b)`.

    the prompt read once per row
        prompt(q.transpose(0, 1).reshape(H, B * T, D))
            → (torch.cat(parts, dim=1) for parts in zip(*map(prompt, q)))
    prompt was called for each row of the batch. The result is right, and every call reads all keys and values
    of the prompt again: decode takes as long as if each row had its own copy. All queries fit in one call.

    rows and heads folded by reshape alone
        q.transpose(0, 1).reshape(H, B * T, D) → q.reshape(H, B * T, D)
        out_a.view(H, B, T, D).transpose(0, 1) → out_a.view(B, H, T, D)
        lse_a.view(H, B, T).transpose(0, 1) → lse_a.view(B, H, T)
    (B, H, T, D) was reshaped to (H, B·T, D) as it is. The shape fits, but reshape keeps the order of the
    numbers, so queries meet the keys of other heads. Swap the rows with the heads first.

    unfolded by view alone
        out_a.view(H, B, T, D).transpose(0, 1) → out_a.view(B, H, T, D)
        lse_a.view(H, B, T).transpose(0, 1) → lse_a.view(B, H, T)
    What prompt gave, (H, B·T, D), was viewed as (B, H, T, D). The shape fits, but the heads come first in
    memory: view it as (H, B, T, D) and swap the first two dimensions.

    one length for all rows
        < lengths[ → < lengths.max().expand(len(lengths))[
    Every row was read up to the longest row's length, so the shorter rows attend to leftovers. Each row has a
    length of its own: `lengths[:, None, None, None]` against the slot numbers.

    empty slots score 0
        ~written, -torch.inf → ~written, 0.0
    Empty slots got the score 0 in place of −∞. exp(0) = 1 is a weight like any other, so they count in the
    log-sum-exp. Only −∞ becomes the weight 0.

    −1e9 in place of −∞
        ~written, -torch.inf → ~written, -1e9
    Empty slots got the score −1e9. A row of length 0 then has an lse of about −1e9, a number, and with an
    empty prompt it is returned as if there had been keys. Only with −∞ is "no keys" the same as log 0.

    the maximum of two empty parts
        lse = torch.logaddexp(lse_a, lse_b) → largest = torch.maximum(lse_a, lse_b)
            lse = largest + (torch.exp(lse_a - largest) + torch.exp(lse_b - largest)).log()
        lse.masked_fill(lse == -torch.inf, 0.0) → lse
    The larger log-sum-exp is subtracted first, which is right. But without prompt and own keys it is −∞, and
    −∞ − (−∞) is NaN, in out and in lse. Subtract a finite number there.

    lse 0 where there are no keys
        * out_b, lse → * out_b, lse.masked_fill(lse == -torch.inf, 0.0)
    Without any key the lse came back as 0 (nan_to_num does that). An lse of 0 is that of one key with score
    0, so the next merge would give this empty part weight. It is log 0 = −∞.

    empty slots attended to
        < lengths[ → < torch.full_like(lengths, k.shape[2])[
    All S slots of a row were used, also those behind its length. They hold leftovers of an earlier answer:
    hide the slots from lengths[b] on.

    one slot too many
        torch.arange(k.shape[2]) < lengths → torch.arange(k.shape[2]) <= lengths
    The slot number lengths[b] was used as well. A row with n tokens has them in the slots 0 … n − 1.

    the own scores without the scale
        * D**-0.5 →
    The scores of the own keys were not divided by √D, and prompt's are. Two results can be merged only if
    their scores are the same function of q and k.
    """
)


# 01.8: bytes of the cache of a real model

size.mistakes(
    r"""
    query heads in place of KV heads
        * kv_heads * → * heads *
    num_attention_heads counts the queries, which are used and forgotten. What stays are keys and values, and
    of those there are num_key_value_heads: for Llama 3.1 405B 8 and not 128, so this is 16 times too much.

    hidden_size in place of KV heads times head_dim
        kv_heads * head_dim → config["hidden_size"]
    The cache is counted with query heads in place of KV heads: 2 · layers · hidden_size · bytes, or the same
    by a head_dim of hidden_size / num_key_value_heads. hidden_size is the width of all *query* heads; what
    stays is num_key_value_heads · head_dim, and head_dim is hidden_size / num_attention_heads.

    keys only
        per_token = 2 * → per_token =
    A factor of 2 is missing: the cache holds a key *and* a value for each head of each token.

    one layer only
        config["num_hidden_layers"] * →
    The layers are missing. Every layer has keys and values of its own, computed from its own input.

    bits for bytes
        .itemsize → .itemsize * 8
    bfloat16 has 16 bits, and that is 2 bytes. All sizes are 8 times too large.

    two bytes per number, whatever the dtype
        getattr(torch, config["torch_dtype"]).itemsize → 2
    torch_dtype is not looked at. float32 takes 4 bytes per number and the 8-bit floats take 1; storing the
    cache in 8 bits is one of the cheapest ways to halve it.

    the batch forgotten
        max_len * len(lengths) → max_len
    The cache is counted for a single sequence. The weights are shared by a batch and the cache is not: each
    of the len(lengths) sequences keeps its own.

    stored counts the tokens that are there
        max_len * len(lengths) → sum(lengths)
    Stored was counted as sum(lengths) tokens. This cache is allocated once for max_len tokens per sequence,
    and the empty slots take memory too; sum(lengths) is what a step *reads*.

    GB called GiB
        2**30 → 10**9
    stored_gib was divided by 10⁹. That is GB; a GiB is 2³⁰ bytes, 7% more. Data sheets of GPUs give GB, and
    tools that show memory count in GiB or MiB: compare two sizes only in one unit.

    read taken for stored
        "read": per_token * sum(lengths) → "read": stored
    What a step reads was set to what is allocated. A decode step reads the keys and values that are there,
    sum(lengths) tokens; the empty slots behind them are reserved and not touched.

    every sequence as long as the longest
        sum(lengths) → max(lengths) * len(lengths)
    What a step reads was counted as the longest sequence times the batch. That is what a padded batch costs;
    a decode step over a cache that knows its lengths reads each sequence's own tokens, sum(lengths) in all.

    head_dim not looked up
        config.get("head_dim", config["hidden_size"] // heads) → config["hidden_size"] // heads
    The head dim was always taken as hidden_size / num_attention_heads. Some models, Gemma and Qwen3 among
    them, choose it freely and say so in head_dim.
    """
)


# 01.9: the model

model.mistakes(
    r"""
    positions start at 0 in each call
        torch.arange(start, start + T) → torch.arange(T)
    Queries and keys were rotated to positions 0 … T − 1 in each call. The first chunk is right, which hides
    it; in decode every token seems to be at position 0. Count from `start`.

    the mask of the first chunk used for all
        parts.causal_mask(T, keys.shape[2], [0])
            → parts.causal_mask(keys.shape[2], keys.shape[2], [0])[:, :, :T]
    The mask treats the T tokens as the *first* of the S positions, as they are in the first chunk. From the
    second on they see only the start of the text. They are the last T of S: causal_mask(T, S, [0]).

    no mask
        mask = parts.causal_mask(T, keys.shape[2], [0]) → mask = None
    Every token sees the later ones of its chunk. One token at a time needs no mask, so decode looks right;
    the prompt is read with a look at the answer, which the model never had in training.

    keys rotated twice
        out, _ = parts.attend( → keys = parts.rotate(keys, torch.arange(keys.shape[2]), layer.theta)
            out, _ = parts.attend(
    The keys were rotated before they went into the cache, and all of them again when they came back. Every
    key is turned once.

    keys cached before the rotation
        q, k = parts.rotate(q, positions, layer.theta), parts.rotate(k, positions, layer.theta)
            → q = parts.rotate(q, positions, layer.theta)
        mask = parts → keys = torch.cat((keys[:, :, : -T], parts.rotate(k, positions, layer.theta)), dim=2)
            mask = parts
    The keys went into the cache as they were, and only those of this call were rotated. Earlier keys come
    back as if they were at position 0. Rotate first, then append.

    values rotated too
        parts.rotate(k, positions, layer.theta) → parts.rotate(k, positions, layer.theta)
            v = parts.rotate(v, positions, layer.theta)
    The rotation was applied to v as well. Positions belong to the scores, q with k; the values are what is
    averaged, and stay as they are.

    queries not rotated
        q, k = parts.rotate(q, positions, layer.theta), parts.rotate(k, positions, layer.theta)
            → k = parts.rotate(k, positions, layer.theta)
    The keys were rotated and the queries were not. A score depends on the distance of two tokens only if both
    are turned, each by its own position.

    keys not rotated
        q, k = parts.rotate(q, positions, layer.theta), parts.rotate(k, positions, layer.theta)
            → q = parts.rotate(q, positions, layer.theta)
    The queries were rotated and the keys were not. A score depends on the distance of two tokens only if both
    are turned, each by its own position.

    nothing rotated
        q, k = parts.rotate(q, positions, layer.theta), parts.rotate(k, positions, layer.theta) →
    Neither queries nor keys were rotated, so the order of earlier tokens is unknown to the scores. The model
    was trained with RoPE: rotate q and k to the tokens' positions before the keys go into the cache.

    all tokens of a call at one position
        torch.arange(start, start + T) → torch.full((T,), start)
    All T tokens were rotated to position `start`. With one token per call that is right; in a chunk token t
    is at position start + t.

    theta not passed on
        parts.rotate(q, positions, layer.theta), parts.rotate(k, positions, layer.theta)
            → parts.rotate(q, positions), parts.rotate(k, positions)
    `rotate` was called without the layer's theta. This model was trained with the default, 10000, so its text
    is right by luck; a layer with another base gets wrong positions.

    each call sees its own tokens only
        out, _ = parts.attend(q, keys, values, mask) → mask = parts.causal_mask(T, T, [0])
            out, _ = parts.attend(q, k, v, mask)
    The tokens are written into the cache and attend to each other alone. What was read before is lost to
    them. Attend to what append returns: all keys so far.

    no output projection
        return parts.merge_heads(out) @ layer.out.T → return parts.merge_heads(out)
    The heads were put side by side and returned. H · D happens to equal M here, so nothing complains. The
    output matrix mixes the heads and brings them back into the model's width: `@ layer.out.T`.

    the output projection not transposed
        @ layer.out.T → @ layer.out
    The result was multiplied by `layer.out` itself. H · D happens to equal M here, so the shapes fit. `out`
    is (M, H·D), and x @ W.T is what a linear layer computes: `@ layer.out.T`.

    the heads joined by reshape alone
        parts.merge_heads(out) → out.reshape(1, T, -1)
    (1, H, T, D) was reshaped to (1, T, H·D) as it is. The shape fits, but a token's row then holds several
    tokens of the same head. `parts.merge_heads` puts the heads of a token side by side.

    the caches not reset
        cache.reset() → pass
    The caches still hold the earlier text, and the new one was written behind it. Its tokens attend to the
    old ones, at positions that do not fit. Reset every layer's cache first.

    the whole text fed again at each step
        logits = model(token, caches, start) → for cache in caches:
                cache.reset()
            logits = model(tokens, caches, 0)
    Every step computed the whole text again, as without a cache. The text is right and the cache saves
    nothing: feed the newest token only, the others are in the cache.

    the position of decode off by one
        logits = model(token, caches, start) → logits = model(token, caches, start + 1)
    The new tokens are one position too far. After a prompt of T tokens, at positions 0 … T − 1, the first new
    token is at position T.

    start not advanced in the prompt
        logits = model(piece, caches, start) → logits = model(piece, caches, 0)
    Every chunk of the prompt was fed with start = 0, so tokens of different chunks seem to be at the same
    place. After each chunk, `start` grows by its size.

    start not advanced in decode
        start += 1 → pass
    Every new token was fed at the same position, the first one behind the prompt. After each step `start`
    grows by 1.

    start advanced by chunk, not by the tokens fed
        start += piece.shape[1] → start += chunk
    `start` grew by `chunk` after each piece of the prompt. The last piece may be shorter, and then all new
    tokens are too far: add the piece's own size, `piece.shape[1]`.

    chunk is not used
        tokens.split(chunk, dim=1) → [tokens]
    The whole prompt went through the model at once. The text is the same, but the matrix of scores is as
    large as the prompt is long, T × T: that is what chunks avoid.

    the last token of the prompt fed twice
        for _ in range(n_new - 1): → logits = model(tokens[:, -1:], caches, start)
            start += 1
            for _ in range(n_new - 1):
    After the prompt, its last token was fed once more to get logits. It is in the cache already and now
    is there twice. The logits of the next token are the last ones of the prompt's own call.

    the logits of the chunk's first token
        token = logits[:, -1:].argmax(dim=-1) → token = logits[:, :1].argmax(dim=-1)
    The next token was chosen by the first logits of the call. With one token per call that is the same; after
    the prompt they belong to the token after the chunk's *first* one. Take the last: `logits[:, -1:]`.

    a shorter last chunk is dropped
        for piece in tokens.split(chunk, dim=1): → chunk = min(chunk, tokens.shape[1])
            for piece in tokens[:, : tokens.shape[1] // chunk * chunk].split(chunk, dim=1):
    Only whole chunks of the prompt went through the model. The tokens left over at the end are missing, and
    they are the ones that the text follows.
    """
)
