"""Unit 02: known mistakes of the exercises on shared keys and values."""

from .checks import attend, budget, gemma, layers, pool, route, size, step

# 02.1: Grouped attention without a copy


attend.mistakes(
    r"""
    K and V repeated for every query head
        G, S = → k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
            G, S =
    repeat_interleave (or an index, or a stack) writes the keys and values of a pool down H/G times, at every
    step, so the step moves even more bytes than without sharing: the small cache is read, and a large one
    written and read again. Bring the queries to their pool by a reshape, and leave K and V alone.

    repeat in place of repeat_interleave
        G, S = → k, v = (x.repeat(1, H // x.shape[1], 1, 1) for x in (k, v))
            G, S =
    `repeat` lays the pools out as 0, 1, 2, 0, 1, 2, so query head h gets pool h % G. A pool belongs to
    neighbours: heads 0 and 1 to pool 0, 2 and 3 to pool 1. A trained model gives nonsense in the other order,
    and with one pool, or one for each head, nothing shows. And K and V are copied besides.

    every G-th head in one pool
        rows = q.reshape → order = torch.arange(H).view(H // G, G).T.flatten()
            rows = q[:, order].reshape
        (weights @ v).view(B, H, T, D) → (weights @ v).view(B, H, T, D)[:, order.argsort()]
    The heads were cut as (R, G) and not as (G, R), so query head h reads pool h % G. A pool belongs to
    neighbouring heads, h // (H/G): reshape to (B, G, R, T, D), the pools in front.

    an expanded view made into a copy
        G, S = → R = H // k.shape[1]
            k, v = (x[:, :, None].expand(-1, -1, R, -1, -1).flatten(1, 2) for x in (k, v))
            G, S =
    `expand` itself costs nothing: it is a view that shows each key R times. But `reshape` (or flatten, or
    contiguous) cannot merge such a dimension without writing everything down, so K and V are copied for all H
    heads after all. Reshape the queries, not the keys.

    a copy made by @, which broadcasts
        q.reshape(B, G, H // G * T, D) → q.reshape(B, G, H // G, T, D)
        k.transpose(-2, -1) → k[:, :, None].transpose(-2, -1)
        .view(B, G, H // G * T, S) →
        weights @ v → weights @ v[:, :, None]
    Nobody wrote a copy, but `@` makes one: it turns all dimensions in front into one batch, and for that it
    writes K and V down for each of the H heads. Fold the heads of a pool into the rows, (B, G, R·T, D) @ (B,
    G, D, S), or let `torch.einsum("bgrtd,bgsd->bgrts", q, k)` do it: there k has no dimension for the heads
    of a pool.

    all products written down before they are added
        q.reshape(B, G, H // G * T, D) → q.reshape(B, G, H // G, T, 1, D)
        rows @ k.transpose(-2, -1) → (rows * k[:, :, None, None]).sum(-1)
        .view(B, G, H // G * T, S) → [..., None]
        weights @ v → (weights * v[:, :, None, None]).sum(-2)
    `(q * k).sum(-1)` over broadcast dimensions makes a tensor with every single product, H·T·S·D numbers:
    larger than a copy of K. A matrix product (or einsum) adds the products up as it makes them.

    folded one way, unfolded the other
        (weights @ v).view(B, H, T, D)
            → (weights @ v).view(B, G, H // G, T, D).transpose(2, 3).reshape(B, H, T, D)
    The rows of a pool were put in the order (T, R), all heads of a token side by side, and the result was
    read in the order (R, T), so outputs land at other heads and tokens. With one query, or one head in a
    pool, there is nothing to mix up, and it looks right. Undo a reshape by its own inverse.

    the mask's rows in another order than the queries
        scores = scores.masked_fill(~mask.unsqueeze(-3), -torch.inf)
            → hidden = ~mask.repeat_interleave(H // G, dim=-2)
            scores = scores.view(B, G, H // G * T, S).masked_fill(hidden, -torch.inf)
    The R·T queries of a pool are in the order of heads: all T tokens of the first head, then of the second.
    The mask was stretched with repeat_interleave, row 0 R times, then row 1; `repeat` fits, or cut the scores
    into (R, T, S) and let the mask broadcast. With one query it cannot be seen.

    the masks of the batch laid over the pools
        ~mask.unsqueeze(-3) → ~mask
    The scores have five dimensions, (B, G, R, T, S), and a mask of (B, 1, T, S) was laid over them as it is.
    Dimensions are matched from the right, so its B meets G: pool 0 gets the mask of sequence 0, and where B
    and G differ it raises. It lacks a dimension for R: `mask.unsqueeze(-3)`.

    masked after the softmax
        scores.masked_fill(~mask.unsqueeze(-3), -torch.inf)
            → scores.softmax(dim=-1).masked_fill(~mask.unsqueeze(-3), 0.0)
        weights = scores.softmax(dim=-1) → weights = (scores.softmax(dim=-1) if mask is None else scores)
    The weights were set to 0 after the softmax had already given hidden keys their share. What is left adds
    up to less than 1, so every output shrinks. Mask the scores with −∞ before the softmax.

    softmax over the heads of a pool
        softmax(dim=-1) → softmax(dim=2)
        (weights @ v).view(B, H, T, D) → (weights @ v).view(B, H, T, D).nan_to_num()
    The softmax runs over the heads that share a pool. They share what is read, not the attention: every query
    head still divides its own weight 1 among the keys, the last dimension.

    one query for the whole pool
        rows = → q = q.reshape(B, G, H // G, T, D).mean(2, keepdim=True).expand(-1, -1, H // G, -1, -1)
            rows =
    The queries of a pool were averaged, so its heads all give the same output. Sharing is about what is
    *stored*: the keys and values. Every query head stays itself, and asks the shared keys its own question.

    every head reads the first pool
        G, S = → k, v = k[:, :1], v[:, :1]
            G, S =
    All query heads read KV head 0. That is right where there is just one (MQA); with G of them, head h reads
    pool h // (H/G).

    no scale
        k.transpose(-2, -1) * D**-0.5 → k.transpose(-2, -1)
    The scores go into the softmax as they are. A score is still a sum of D products, so the factor 1/√D
    belongs to it, shared keys or not.

    scaled by the width of the pool
        D**-0.5 → (H // G * D) ** -0.5
    The scores are divided by √(R·D), the width of all heads of a pool. A score is a sum over the D numbers of
    *one* query head with one key; how many heads read that key does not change it.

    scaled by d_model
        D**-0.5 → (H * D) ** -0.5
    The scores are divided by √(H·D), the width of the whole model. A score is a sum over the D numbers of one
    head, so its spread is √D, and 1/√D brings it back to 1.

    the mask has no effect
        scores = scores.masked_fill → scores.masked_fill
    The result is the one without a mask. Is it used, and is its effect kept? `masked_fill` returns a new
    tensor: `scores = scores.masked_fill(…)`.

    the mask inverted
        ~mask → mask
    True means *may attend*; here the keys marked True are the ones that were hidden. Fill where the mask is
    False: `masked_fill(~mask, -torch.inf)`.

    the result in fp32
        B, H, T, D = → q, k, v = q.float(), k.float(), v.float()
            B, H, T, D =
    The values are right, but the result comes in fp32 whatever the queries' dtype is. Computing in fp32 is
    sound; give the result back in the dtype of q, which the next layer's weights expect.
    """,
)


# 02.2: Bytes per token of five real models


size.mistakes(
    r"""
    query heads in place of KV heads
        config.get("num_key_value_heads", 1 if config.get("multi_query") else heads) → heads
    num_attention_heads counts the queries, which are used and forgotten. What stays are the keys and values,
    and there are num_key_value_heads of each; for Llama 3.1 8B that is 8 and not 32.

    multi_query not looked at
        1 if config.get("multi_query") else heads → heads
    Falcon 7B's config has no num_key_value_heads; it says multi_query instead, and that is one KV head for
    all 71 query heads. Taken for an ordinary model it seems to need 71 times the cache.

    multi_query taken for true wherever it is written
        config.get("multi_query") → ("multi_query" in config)
    The config was asked whether it *has* a multi_query, not what it says. Where it says false, the model has
    as many KV heads as query heads, and one head is a fraction of its cache.

    head_dim not looked up
        config.get("head_dim", config["hidden_size"] // heads) → config["hidden_size"] // heads
    The head dim was always taken as hidden_size / num_attention_heads. A config may choose it freely and say
    so in head_dim, as Gemma's does.

    the head dim from the KV heads
        config["hidden_size"] // heads → config["hidden_size"] // config.get("num_key_value_heads", heads)
    The head dim was taken as hidden_size / num_key_value_heads, so pooling seems to save nothing: fewer
    heads, each as much wider. hidden_size is divided among the *query* heads, and a key is as wide as the
    query it meets.

    keys only
        2 * kv_heads → kv_heads
    Half of the cache is missing. A token leaves a key *and* a value at each KV head. (A latent vector is the
    exception: one vector serves for both.)

    one layer only
        sum(each[:n_own]) → each[0]
        sum(each) → each[0]
    The layers are missing: this is what a token leaves in the first one. Add up over all of them.

    numbers for bytes
        widths[kind] * 2 → widths[kind]
        config["qk_rope_head_dim"]) * 2 → config["qk_rope_head_dim"])
    This counts numbers. Each takes 2 bytes in 16 bits, so all sizes are half of what they should be.

    four bytes per number
        widths[kind] * 2 → widths[kind] * 4
        config["qk_rope_head_dim"]) * 2 → config["qk_rope_head_dim"]) * 4
    Each number was counted with 4 bytes, as fp32 takes. The cache is kept in 16 bits here, which is 2 bytes
    per number. (Bits for bytes would be 8 times too much; this is twice.)

    layers that share store too
        sum(each[:n_own]) → sum(each)
    Stored was counted over all layers. The last num_kv_shared_layers keep nothing of their own: they project
    queries only, and read what an earlier layer of their type has stored.

    layers that share read nothing
        sum(each) → sum(each[:n_own])
    Read was set to stored. A layer that stores nothing attends all the same: it fetches the other layer's
    keys and values from memory again. Sharing across layers saves memory, and no traffic. Stored is not read.

    only the layers that share read
        sum(each) → sum(each[n_own:] or each)
    The layers with a cache of their own were left out of what is read. Having stored a token does not spare a
    layer from fetching it again at every later step: all layers read.

    the first layers share, not the last
        each[:n_own] → each[n_layers - n_own :]
    The first num_kv_shared_layers were taken for those without a cache. It is the *last* ones: a layer can
    only read what an earlier layer has computed already. (Where both parts hold the same mix of layer types
    the sum comes out equal.)

    only the layers that share were counted
        each[:n_own] → each[n_own:] or each
    num_kv_shared_layers was taken for the number of layers that store. It is the number of those that do
    *not*: in Gemma 4 E2B 20 of 35 read, and the other 15 have a cache of their own.

    one head dim for all layers
        config.get("global_head_dim", head_dim) → head_dim
    global_head_dim was not looked at. The layers with full attention have heads of their own width: 512
    numbers in Gemma 4 E2B, where the layers with a window have 256.

    global_head_dim in all layers
        "sliding_attention": head_dim → "sliding_attention": config.get("global_head_dim", head_dim)
    global_head_dim was taken for every layer of a model that has one. It is the width in the full_attention
    layers; those with a window keep the ordinary head_dim.

    the wider heads in the wrong layers
        "sliding_attention": head_dim, "full_attention": → "full_attention": head_dim, "sliding_attention":
    global_head_dim was given to the layers with a window, and head_dim to those with full attention. "Global"
    is the layer that sees everything: full_attention.

    the latent counted twice
        config["qk_rope_head_dim"]) * 2 → config["qk_rope_head_dim"]) * 2 * 2
    The latent vector was counted for the keys and for the values. There is just one: each head makes its keys
    and its values from the same kv_lora_rank numbers. That is half of its charm.

    one latent for the keys, another for the values
        (config["kv_lora_rank"] → (2 * config["kv_lora_rank"]
    kv_lora_rank was counted twice, and the position part once. The same kv_lora_rank numbers serve for the
    keys and for the values: that is what the "kv" in the name says.

    heads stored, although there is a latent
        each = [(config["kv_lora_rank"] + config["qk_rope_head_dim"]) * 2] * n_layers → pass
    The model was counted as if it stored its heads' keys and values. It has heads, but with kv_lora_rank they
    are made from the stored vector when they are needed: 576 numbers per layer and token in DeepSeek-V3, in
    place of tens of thousands.

    the latent without its position part
        + config["qk_rope_head_dim"] →
    kv_lora_rank alone. Beside the latent a layer stores qk_rope_head_dim numbers: the part of the key that
    carries the position, which cannot be made from the latent later. It is shared by all heads.

    a position part for every head
        config["qk_rope_head_dim"] → heads * config["qk_rope_head_dim"]
    The qk_rope_head_dim numbers were counted for each head. There is one such part a token and layer, and all
    heads read it, as with multi-query attention.

    a latent for every head
        [(config["kv_lora_rank"] → [kv_heads * (config["kv_lora_rank"]
    The latent was multiplied by num_key_value_heads. It is one vector per token and layer; that all heads are
    made from the same one is what makes it small.
    """,
)


# 02.3: Pool a trained model's heads


pool.mistakes(
    r"""
    the first head of each pool
        pools.mean(dim=1) → pools[:, 0]
    One head of each pool was kept and the others thrown away. That is a way to convert a model, and the paper
    tried it: the mean of the pool keeps something of every head, and the model recovers better.

    the last head of each pool
        pools.mean(dim=1) → pools[:, -1]
    Only the last head of each pool is left: does a loop write over what it wrote before? Add the heads up and
    divide by their number.

    the sum of a pool
        pools.mean → pools.sum
    The heads were added and not divided by their number. Keys R times too long make scores R times too large,
    and values R times too large swamp what comes after: take the mean.

    divided by the number of pools
        pools.mean(dim=1) → (pools.sum(dim=1) / n_kv_heads)
    The sum of a pool was divided by G, the number of pools. A mean divides by what was added up: the R = H/G
    heads of one pool.

    divided by √R
        pools.mean(dim=1) → (pools.sum(dim=1) / pools.shape[1] ** 0.5)
    The sum was divided by the root of R. That would keep the size of heads that have nothing in common; the
    recipe is the plain mean, which leaves a pool of equal heads as they are.

    every G-th head in one pool
        (n_kv_heads, n_heads // n_kv_heads, -1) → (n_heads // n_kv_heads, n_kv_heads, -1)
        mean(dim=1) → mean(dim=0)
    The heads were cut as (R, G), so heads 0, G, 2·G … make a pool. A pool belongs to neighbours: the queries
    that will read it are heads g·R to (g+1)·R − 1. Cut as (G, R), and average over the R.

    every pool the mean of all heads
        pools.mean(dim=1).flatten(0, 1) → pools.mean(dim=(0, 1)).repeat(n_kv_heads, 1)
    All heads were averaged, and the result is there G times over. With G pools each takes the mean of its own
    R neighbours, so that what was different in the model stays different.

    neighbouring rows averaged, not heads
        pools.mean(dim=1).flatten(0, 1) → weight.unflatten(0, (-1, n_heads // n_kv_heads)).mean(dim=1)
    R neighbouring *rows* were averaged, and most of those lie within one head. Row d is to be averaged with
    row d of the other heads, D rows further on: give the heads a dimension of their own first, (G, R, D, M).

    heads and rows interleaved
        (n_kv_heads, n_heads // n_kv_heads, -1) → (-1, n_kv_heads, n_heads // n_kv_heads)
        mean(dim=1) → mean(dim=2).transpose(0, 1)
    The rows were cut as (D, H), as if the heads took turns. nn.Linear's outputs come head by head: all D rows
    of head 0, then head 1. Cut as (H, D), and then the H as (G, R).

    columns averaged, not rows
        weight.unflatten → weight.T.unflatten
        .flatten(0, 1) → .flatten(0, 1).T
    The weight was taken for (inputs, outputs), so the model's own channels were averaged. nn.Linear keeps
    (outputs, inputs) and computes x Wᵀ: a head is a block of D *rows*.

    the result transposed
        .flatten(0, 1) → .flatten(0, 1).T
    The numbers are right, and the result is (M, G·D). It is to be the weight of an nn.Linear again: (outputs,
    inputs), so (G·D, M).

    the heads left apart
        .flatten(0, 1) →
    The numbers are right, and the result is (G, D, M). A weight has two dimensions: join the heads and their
    rows, (G·D, M).

    averaged, but as many heads as before
        pools.mean(dim=1).flatten(0, 1) → pools.mean(dim=1, keepdim=True).expand_as(pools).flatten(0, 2)
    Every head was replaced by the mean of its pool, and there are still H of them. The cache would hold R
    equal copies of each key: keep one a pool, (G·D, M).

    pool size and number of pools mixed up
        (n_kv_heads, n_heads // n_kv_heads, -1) → (n_heads // n_kv_heads, n_kv_heads, -1)
    n_kv_heads heads were put into each pool, which leaves H/G pools. n_kv_heads is how many pools there are
    in the end; each takes H / n_kv_heads heads.

    the result in fp32
        weight.unflatten → weight.float().unflatten
    The values are right, but the result is in fp32 whatever the weight's dtype is. Averaging in fp32 is
    sound; give the result back in the dtype of the weight, or the converted model holds two dtypes.

    the trained weight overwritten
        return pools.mean(dim=1).flatten(0, 1) → pooled = pools.mean(dim=1).flatten(0, 1)
            weight[: len(pooled)] = pooled
            return pooled
    The result is right, but the given weight was changed on the way: a view shares its memory, so writing to
    one (`+=`, `mul_`, `[...] =`) writes to the checkpoint. Comparing the converted model with the trained one
    is then no longer possible. Make a new tensor.

    heads left over are dropped
        R = max(n_heads // n_kv_heads, 1)
        D = len(weight) // n_heads
        kept = weight[: R * n_kv_heads * D]
        return torch.stack([pool.unflatten(0, (-1, D)).mean(0) for pool in kept.split(R * D)]).flatten(
            0, 1
        )
    H // G heads went into each pool, and where that leaves a rest those heads vanished without a word. Six
    heads and four pools is a mistake of the caller: raise ValueError.
    """,
)


# 02.4: Harden a learned routing


route.mistakes(
    r"""
    the pools choose, not the heads
        argmax(dim=1) → argmax(dim=0)
    The argmax runs over the heads (dimension 0), so each pool chooses a head, and the result has G entries.
    Every *query head* needs exactly one pool: the largest of its own row, `argmax(dim=1)`.

    the old pool numbers in route
        return route → return logits.argmax(dim=1)
    `route` holds the numbers that the pools had before. The cache keeps U pools now, numbered 0 … U−1: pool 7
    of 8 may be the second one there, and index 7 reads past the end, or another head's keys. Give each pool's
    place in `kept`.

    no pool is dropped
        return route, kept → return logits.argmax(dim=1), torch.arange(logits.shape[1])
    All pools are kept, those too that no head reads. The routing is hard then, but the cache is as large as
    before: dropping what nobody reads is what the exercise is about.

    a pool for every head
        return route, kept → return torch.arange(len(logits)), logits.argmax(dim=1)
    `kept` lists the choice of each head, the same pool as often as heads choose it. Each head finds its own,
    but a pool that three heads share would be stored three times: list every pool once, `torch.unique`.

    kept as a mask
        return route, kept → mask = torch.zeros(logits.shape[1], dtype=torch.bool)
            mask[kept] = True
            return route, mask
    `kept` says for each pool whether it stays, one boolean each. Asked for are the pools' numbers:
    `mask.nonzero().flatten()`.

    pools in the order in which heads choose them
        def harden(logits):
            chosen = logits.argmax(1).tolist()
            kept = list(dict.fromkeys(chosen))
            return torch.tensor([kept.index(pool) for pool in chosen]), torch.tensor(kept)
    `kept` lists the pools as they come up, head by head. Each head still finds its own, but code that stores
    such a model and loads it by another rule mixes up the pools. Ascending order, as asked for, needs no
    agreement: `torch.unique` sorts.

    the most popular pool first
        def harden(logits):
            chosen = logits.argmax(1).tolist()
            kept = sorted(set(chosen), key=lambda pool: (-chosen.count(pool), -pool))
            return torch.tensor([kept.index(pool) for pool in chosen]), torch.tensor(kept)
    `kept` lists the pools by the number of heads that choose them (as Counter.most_common does). Each head
    still finds its own pool, but the order asked for is ascending by the pools' numbers.

    ties to the highest pool
        logits.argmax(dim=1) → logits.shape[1] - 1 - logits.flip(1).argmax(dim=1)
    Of equal logits the last one won (a comparison with >=, or a sort). Asked for is the lowest. Ties are no
    rarity: logits that start at zero are all equal, and two programs that load the same model must agree.

    every pool above the average kept
        return route, kept → kept = (logits.softmax(1) > 1 / logits.shape[1]).any(0).nonzero().flatten()
            return torch.searchsorted(kept, logits.argmax(dim=1)), kept
    A pool was kept as soon as some head gives it more than 1/G of its softmax. A hard head reads one pool and
    no other, so a second choice, however close, is stored for nobody.

    heads sent to pools they did not choose
        return route, kept → total = logits.softmax(1).sum(0)
            kept = (total >= total.mean()).nonzero().flatten()
            return logits[:, kept].argmax(dim=1), kept
    Only pools with a large total weight were kept, and heads whose own pool is not among them were sent to
    another. That would be a second decision, which the training has not seen: here a pool goes only if *no*
    head chooses it.

    pools of equal size
        return route, kept → H, G = logits.shape
            return torch.arange(H) * G // H, torch.arange(G)
    Every pool was given the same number of heads, as GQA has it. A learned routing is free: all heads may
    choose one pool and none another, and that is how pools fall away.

    the smallest logit
        argmax → argmin
    Each head was sent to the pool with its smallest logit. A logit is a score, the larger the better: the
    softmax gives that pool the most weight.

    route one-hot
        return route → return torch.nn.functional.one_hot(route)
    `route` came as a matrix with a 1 in each row. As a factor in a product it would still touch every pool
    for every head; one number per head is enough: `argmax(dim=1)` of that matrix.

    how many pools, not which
        return route, kept → return route, len(kept)
    `kept` is the number of pools that stay. Which ones they are must be known too, or their weights cannot be
    found: list their numbers.

    kept and route the other way round
        return route, kept → return kept, route
    The pair came as (kept, route). torch.unique returns the values first and their inverse second; asked for
    is (route, kept).

    rows in place of pools
        weight.unflatten(0, (-1, head_dim))[kept].flatten(0, 1) → weight[kept]
    `weight[kept]` takes single rows, one of each pool. A pool is a block of head_dim rows: give the pools a
    dimension of their own first, (G, D, M).

    the pools left apart
        [kept].flatten(0, 1) → [kept]
    The numbers are right, and the result is (U, D, M). It is to be the weight of an nn.Linear again: join the
    pools and their rows, (U·D, M).

    pools and rows interleaved
        (-1, head_dim))[kept] → (head_dim, -1))[:, kept]
    The rows were cut as (D, G), as if the pools took turns. nn.Linear's outputs come pool by pool: all D rows
    of pool 0, then pool 1. Cut as (G, D).

    the first U pools
        weight.unflatten(0, (-1, head_dim))[kept].flatten(0, 1) → weight[: len(kept) * head_dim]
    As many pools were kept as there are numbers in `kept`, but the first ones, whichever they are. Take those
    that are named.

    unused pools set to zero
        return weight.unflatten(0, (-1, head_dim))[kept].flatten(0, 1)
            → pools = weight.unflatten(0, (-1, head_dim))
            out = torch.zeros_like(pools)
            out[kept] = pools[kept]
            return out.flatten(0, 1)
    The other pools' rows are zeros now, and still there: they would be computed, stored and read as zeros. A
    cache shrinks only if its tensors do, (U·D, M).
    """,
)


# 02.5: Which layer reads whose cache


layers.mistakes(
    r"""
    the last layer of a group stores
        i // every * every → min(i // every * every + every, n_layers) - 1
    A layer reads one that comes after it. When it runs, the later layer's keys do not exist yet: the owner is
    the *first* of the group.

    each reader reads the layer just before
        i // every * every → i - 1 if i % every else i
    Layer i reads layer i − 1, which may be a reader itself and has nothing to be read. All readers of a group
    read the one that stores. (In groups of two it is the same layer.)

    all readers read layer 0
        i // every * every → 0 if i % every else i
    Every reader was sent to layer 0. Each group has an owner of its own, the layer with which it begins, so
    that what is read was computed not far below.

    the place in the group
        i // every * every → i % every
    i % every counts 0, 1, 2 within each group. Asked for is the layer with which the group begins: i − i %
    every, or i // every · every.

    the number of the group
        i // every * every → i // every
    i // every counts the groups 0, 1, 2 … It is the number of the cache, and would do as an index into a list
    of caches; asked for is the layer that fills it, (i // every) · every.

    so many groups, not groups of so many
        return [i // every → every = max(n_layers // every, 1)
            return [i // every
    The layers were cut into `every` groups. `every` is how many layers share one cache: with 32 layers and
    every = 2 there are 16 groups of two.

    one reader too many
        i // every * every → i // (every + 1) * (every + 1)
    `every` layers read each owner besides itself, so a group has every + 1 layers. In the paper's count the
    owner is one of the group: CLA2 is one that stores and one that reads.

    groups counted from layer 1
        i // every * every → (i - 1) // every * every + 1 if i else 0
    Layer 0 was left to itself and the groups begin after it. Layers count from 0 here, and the first group is
    layers 0 … every − 1.

    the last that stores, of whatever type
        missing = set(layer_types[n_own:]) - set(last) → missing = set()
        last[kind] for kind → n_own - 1 for kind
    All layers that share read the very last one that stores. A layer with a window has forgotten what a full
    one needs, its heads may have another width and its angles another base: read the last of the *same* type.

    the first layer of the type
        kind: i for i, kind in enumerate(layer_types[:n_own])
            → kind: layer_types.index(kind) for kind in layer_types[:n_own]
    `list.index` finds the first layer of a type. Gemma reads the *last* one that stores, whose keys are
    closest to what the later layers would have made themselves.

    the last of the type in the whole model
        return [*range → last = {kind: i for i, kind in enumerate(layer_types)}
            return [*range
    The last layer of each type was looked for among all layers. It is one that shares: it stores nothing, and
    it comes too late. Look among the first L − n_shared layers only.

    one layer too many shares
        n_own = len(layer_types) - n_shared → n_own = len(layer_types) - n_shared - 1
    n_shared + 1 layers read. The last n_shared layers are those from L − n_shared on: the comparison is `i <
    n_own` for a layer that stores, with n_own = L − n_shared.

    a reader reads a reader
        return [*range(n_own), *(last[kind] for kind in layer_types[n_own:])] → owners = [*range(n_own)]
            for i in range(n_own, len(layer_types)):
                owners.append(max(j for j in range(i) if layer_types[j] == layer_types[i]))
            return owners
    The nearest earlier layer of the type was taken, whether it stores or not. Behind the first one that
    shares, that is a layer without keys of its own. Look among the first L − n_shared layers only.

    each layer that shares reads the one just before
        last[kind] for kind in layer_types[n_own:]) → i - 1 for i in range(n_own, len(layer_types)))
    Layer i reads layer i − 1, whatever its type, and that layer may have no keys of its own. All layers that
    share read among the first L − n_shared layers: the last one of their own type.

    the first layers share
        def gemma_owners(layer_types, n_shared):
            return [len(layer_types) - 1 - owner for owner in gemma(layer_types[::-1], n_shared)[::-1]]
    The first n_shared layers read a later one of their type, which has not run yet when they need it. It is
    the last layers that share: keys can only be handed upwards.

    n_shared layers store
        n_own = len(layer_types) - n_shared → n_own = n_shared or len(layer_types)
    The first n_shared layers store and all others read. n_shared is how many *read*: in Gemma 4 E2B it is 20
    of 35, and 15 store.

    n_shared = 0 taken for everything
        return [*range(n_own) → if n_shared == 0:
                return [*range(n_own), *range(n_own)]
            return [*range(n_own)
    With n_shared = 0, `layer_types[-n_shared:]` is `layer_types[0:]`: the whole list, and with `[:-n_shared]`
    nothing is left. A slice from the end knows no zero. Count from the front: n_own = len(layer_types) −
    n_shared.

    nobody to read from, and no error
        missing = set(layer_types[n_own:]) - set(last) → missing = set()
        last[kind] for kind in layer_types[n_own:])
            → last.get(kind, i) for i, kind in enumerate(layer_types[n_own:], n_own))
    Where no layer of its type stores, a layer that shares was given some answer after all: itself, or
    nothing. It has no weights for keys and values and nobody to read from, so the map describes a model that
    cannot run: raise ValueError.

    counted within the type
        return [*range(n_own) → owners = [*range(n_own)
        in layer_types[n_own:])] → in layer_types[n_own:])]
            return [layer_types[:owner].count(layer_types[owner]) for owner in owners]
    The owner was given by its place among the layers of its type: the third full layer, say, as 2. Asked for
    is its place in the model, counted over all layers.
    """,
    gemma=gemma,
)


# 02.6: How many KV heads fit


budget.mistakes(
    r"""
    the largest number, divisor or not
        range(1, heads + 1) if heads % g == 0 → range(1, heads + 1)
    The budget was divided by what one head costs. 5 KV heads may fit, but 32 query heads cannot be dealt out
    evenly among 5: the pools must be equal, so the number has to divide num_attention_heads.

    powers of two only
        if heads % g == 0 → if heads % g == 0 and g & (g - 1) == 0
    Only 1, 2, 4, 8 … were tried. They are common, and not required: 28 heads allow 7 and 14, and 12 heads
    allow 3. (And not every power of two divides them.)

    the batch forgotten
        * batch * max_len → * max_len
    The cache was counted for one sequence. The weights are shared by a batch and the cache is not: every
    sequence keeps its own.

    the length forgotten
        * batch * max_len → * batch
    The cache was counted for one token. It has room for max_len of them in each sequence.

    keys only
        2 * config["num_hidden_layers"] → config["num_hidden_layers"]
    Half of the cache is missing, so the choice is up to twice as large as what fits. A token leaves a key
    *and* a value at each KV head of each layer.

    one layer only
        2 * config["num_hidden_layers"] → 2
    The layers are missing. Every layer has a cache of its own, all of this size.

    GB called GiB
        2**30 → 10**9
    The budget was turned into bytes with 10⁹. That is a GB; a GiB is 2³⁰ bytes, 7% more. So a cache that just
    fits was refused.

    bits for bytes
        number * batch → 8 * number * batch
    bfloat16 has 16 bits, and that is 2 bytes. The cache was taken for 8 times its size.

    two bytes per number, whatever the dtype
        getattr(torch, config["torch_dtype"]).itemsize → 2
    torch_dtype was not looked at. float32 takes 4 bytes per number and the 8-bit floats take 1: the same
    budget then has room for half or twice as many heads.

    only bfloat16 taken for a dtype of 16 bits
        getattr(torch, config["torch_dtype"]).itemsize
            → {"float32": 4, "bfloat16": 2}.get(config["torch_dtype"], 1)
    float32 and bfloat16 were looked up, and everything else was counted with 1 byte. float16 takes 2 bytes,
    as its name says; only the 8-bit floats take 1. `getattr(torch, name).itemsize` knows them all.

    head_dim not looked up
        config.get("head_dim", config["hidden_size"] // heads) → config["hidden_size"] // heads
    The head dim was always taken as hidden_size / num_attention_heads. Where the config has head_dim, that
    counts.

    the head dim from the KV heads
        g * one_head → (g if "head_dim" in config else heads) * one_head
    The head dim was taken as hidden_size / n_kv_heads, so every choice costs the same: either all heads fit
    or none. A key is as wide as the query that it meets, hidden_size / num_attention_heads, and fewer heads
    really are less.

    hidden_size in place of head_dim
        config.get("head_dim", config["hidden_size"] // heads) → config["hidden_size"]
    Each KV head was counted with hidden_size numbers. That is the width of all query heads together; one head
    has head_dim of them, or hidden_size / num_attention_heads.

    the smallest that fits
        return max( → return min(
    One KV head fits whenever anything does, so this is always 1. Quality falls as pools grow: take the
    *largest* number that fits.

    the size of a pool, not the number of pools
        return max((g for → return min((heads // g for
    The answer is H/G, how many query heads share a KV head. Asked for is G, how many KV heads there are.

    a budget met exactly is refused
        <= budget_gib → < budget_gib
    The comparison is < where it should be <=. A cache that takes the whole budget fits into it.

    all heads never tried
        range(1, heads + 1) → range(1, heads)
    num_attention_heads itself is missing among the candidates: `range(1, H)` ends at H − 1. Where there is
    room for a KV head for each query head, nothing need be shared.

    the next divisor above
        return max((g for g in divisors if g * one_head <= budget_gib * 2**30), default=None)
            → if one_head > budget_gib * 2**30:
                return None
            return min((g for g in divisors if g * one_head >= budget_gib * 2**30), default=heads)
    Where the budget lies between two divisors the larger one was taken, and its cache does not fit. A budget
    is a limit: round down.

    1 where nothing fits
        default=None → default=1
    Where not even one KV head fits the answer was 1, and the program would run out of memory later. Say so at
    once: None.

    0 where nothing fits
        default=None → default=0
    Where not even one KV head fits the answer was 0, which is a number like any other: a model would be built
    with it. None, as asked for, cannot be mistaken for a number of heads.
    """,
)


# 02.7: A step of two layers on one cache


step.mistakes(
    r"""
    nothing is written to the cache
        keys, values, _ = cache.append(rope → keys, values = (rope
    Both layers attend to the keys of this step, and nobody appends them. The next step knows nothing of the
    past, and its positions start at 0 again. Append first; what that returns is what both attend to.

    the reader appends its own keys too
        out_reader = core → positions = cache.positions(T)
            keys, values, _ = cache.append(rope(reader.k(x_reader), positions), reader.v(x_reader))
            mask = core.causal_mask(T, keys.shape[2])
            out_reader = core
    Keys and values of both layers go into the one cache: twice the memory, and every token is in it
    twice, the second time at a wrong position. The reader stores nothing; that is the whole point.

    the owner's keys appended twice
        out_reader = core
            → keys, values, _ = cache.append(rope(owner.k(x_owner), positions), owner.v(x_owner))
            mask = core.causal_mask(T, keys.shape[2])
            out_reader = core
    The same keys were appended once for the owner and once more for the reader. The cache counts 2T tokens
    for T, and all that follow are at wrong positions. The first append has returned what the reader needs:
    keep it.

    the owner's keys appended twice, and no mask for the reader
        out_reader = core
            → keys, values, _ = cache.append(rope(owner.k(x_owner), positions), owner.v(x_owner))
            out_reader = core
        reader.q(x_reader), positions), keys, values, mask) → reader.q(x_reader), positions), keys, values)
    The owner's keys were appended once more for the reader, and as the mask no longer fitted, it was left
    out: every token is in the cache twice, and the reader sees later tokens too. The first append has
    returned what the reader needs, and the owner's mask fits it.

    the reader appends its own keys, and has no mask
        out_reader = core
            → keys, values, _ = cache.append(rope(reader.k(x_reader), positions), reader.v(x_reader))
            out_reader = core
        reader.q(x_reader), positions), keys, values, mask) → reader.q(x_reader), positions), keys, values)
    The reader wrote keys and values of its own into the owner's cache, and as the mask no longer fitted, it
    was left out. The reader stores nothing: it attends to what the owner's append returned, with the owner's
    mask.

    both append before either attends
        out_owner = → keys, values, _ = cache.append(rope(reader.k(x_reader), positions), reader.v(x_reader))
            mask = core.causal_mask(T, keys.shape[2])
            out_owner =
    Keys and values of both layers went into the cache before any query met them, so each layer attends to the
    other's keys as well. One append a step, the owner's, and both layers attend to what it returns.

    the reader attends to its own keys
        out_reader = core → keys, values = rope(reader.k(x_reader), positions), reader.v(x_reader)
            mask = core.causal_mask(T, T)
            out_reader = core
    The reader projected keys and values of its own and attended to those, which it has for the new tokens
    only: it sees nothing of the past. Its keys and values are the owner's, all of them, from the cache.

    the reader sees the new tokens only
        out_reader = core → keys, values, mask = keys[:, :, -T:], values[:, :, -T:], core.causal_mask(T, T)
            out_reader = core
    The reader attended to the keys that the owner has just made, and not to the past. For a prompt it is the
    same; in decode a token sees only itself. Use what append returned: everything so far.

    the reader goes before the owner has written
        out_reader = core.attention(rope(reader.q(x_reader), positions), keys, values, mask) →
        keys, values, _ = → keys, values = cache.k[:, :, : cache.length], cache.v[:, :, : cache.length]
            out_reader = core.attention(rope(reader.q(x_reader), positions), keys, values)
            keys, values, _ =
    The reader read the cache as it was before this step, so no token sees itself, and a prompt sees nothing
    at all. The owner comes first in the model, and it writes before it attends.

    the reader's mask aligned top-left
        reader.q(x_reader), positions), keys, values, mask)
            → reader.q(x_reader), positions), keys, values, torch.ones_like(mask).tril())
    The reader's T queries were taken for the *first* of the S positions (so does SDPA's is_causal=True): in
    decode the new token sees the first key and no other. They are the last: causal_mask(T, S), as for the
    owner.

    both masks aligned top-left
        core.causal_mask(T, keys.shape[2]) → torch.ones(T, keys.shape[2], dtype=torch.bool).tril()
    The T queries of both layers were taken for the *first* of the S positions, as SDPA's is_causal=True takes
    them: in decode the new token sees the first key and no other. They are the last: causal_mask(T, S).

    is_causal where there is more than one token
        core.causal_mask(T, keys.shape[2])
            → torch.ones(T, keys.shape[2], dtype=torch.bool).tril() if T > 1 else None
    SDPA's is_causal=True was used for T > 1. It takes the queries for the *first* of the S positions, which
    is right for a prompt in an empty cache. When several tokens continue what is there, they are the last:
    causal_mask(T, S).

    no mask for the reader
        reader.q(x_reader), positions), keys, values, mask) → reader.q(x_reader), positions), keys, values)
    The reader sees the whole prompt from each of its tokens, later ones too. With one token there is nothing
    to hide, so decode is right; a prompt needs the owner's mask.

    no mask for the owner
        owner.q(x_owner), positions), keys, values, mask) → owner.q(x_owner), positions), keys, values)
    The owner sees the whole prompt from each of its tokens, later ones too. With one token there is nothing
    to hide, so decode is right; a prompt needs the mask, the same for both layers.

    no mask at all
        core.causal_mask(T, keys.shape[2]) → None
    Both layers see the whole prompt from each of its tokens, later ones too. With one token there is nothing
    to hide; with more, `core.causal_mask(T, S)` hides what comes after each.

    the owner's output for both
        return out_owner, out_reader → return out_owner, out_owner
    The reader's output is the owner's. What is shared are keys and values; the reader asks its own question,
    with its own queries from its own input, and gets another answer.

    the reader's queries from the owner's input
        reader.q(x_reader) → reader.q(x_owner)
    The reader's queries were made from x_owner. The reader is further up in the model and has an input of
    its own, x_reader; only keys and values come from the owner's.

    the owner's query weights for the reader
        reader.q(x_reader) → owner.q(x_reader)
    The reader's queries were made with owner.q. A reader gives up its keys and values and keeps its own query
    projection: reader.q(x_reader).

    keys used as values
        reader.q(x_reader), positions), keys, values → reader.q(x_reader), positions), keys, keys
    The reader weighed the keys, not the values. A key says how well a token fits, and it is turned by its
    position; what is added up are the values.

    reader and owner the other way round
        return out_owner, out_reader → return out_reader, out_owner
    Both outputs are right, in the wrong order: the pair is (out_owner, out_reader).

    the reader's positions start at 0
        rope(reader.q(x_reader), positions) → rope(reader.q(x_reader), torch.arange(T)[None])
    The reader's queries were turned to positions 0 … T − 1. For a prompt that is right, and from then on
    every new token asks as if it were at the start. The reader has no cache to count with: it takes the
    owner's positions.

    all positions start at 0
        cache.positions(T) → torch.arange(T)[None]
    Queries and keys of every step were turned to positions 0 … T − 1, so in decode every token seems to be
    at the start. The first step is right, which hides it. Count from what the cache holds:
    cache.positions(T).

    values turned too
        owner.v(x_owner) → rope(owner.v(x_owner), positions)
    The values were turned to their positions like the keys. Turning serves the scores, where only the
    distance of query and key remains; values are added up as they are.

    positions asked for after the append
        rope(reader.q(x_reader), positions) → rope(reader.q(x_reader), cache.positions(T))
    cache.positions(T) was called again for the reader. By then the owner has appended, so it tells where the
    *next* tokens will be, T too far on. Ask once, before the append, and use the answer for both.

    cached keys turned again
        out_reader = core → keys = rope(keys, torch.arange(keys.shape[2])[None])
            out_reader = core
    The reader turned the cached keys once more. They were turned when they were written, and position m has
    become 2m, so all distances are wrong. Only the reader's queries need turning.

    the reader's queries not turned
        rope(reader.q(x_reader), positions) → reader.q(x_reader)
    The reader's queries went in as they were projected. The keys carry their positions, and a query without
    its own asks as if from position 0: turn it by the owner's positions.

    keys stored without their positions
        rope(owner.k(x_owner), positions) → owner.k(x_owner)
    The owner appended its keys before turning them, and both layers turned queries only. Then a score depends
    on the query's position and not on the distance. Turn k as well, before the append.
    """,
)
