"""Unit 02: known mistakes of the exercises on shared keys and values."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention

from kvlearn.attention import KVCache, Rope

from .checks import (
    Config,
    Layer,
    Sizes,
    attend,
    budget,
    cla,
    divisors,
    gemma,
    head_bytes,
    layers,
    pool,
    route,
    size,
    size_count,
    size_layers,
    step,
)

# 02.1: Grouped attention without a copy


Mask = Tensor | None


def weigh(scores: Tensor, mask: Mask, dim: int = -1) -> Tensor:
    """Weights from scores (B, G, R, T, S)."""
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(-3), -torch.inf)
    return scores.softmax(dim)


def grouped(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None = None, dim: int = -1) -> Tensor:
    """The right answer, but for the scale or the softmax's dimension."""
    B, H, T, D = q.shape
    q = q.reshape(B, k.shape[1], -1, T, D)
    scores = torch.einsum("bgrtd,bgsd->bgrts", q, k) * (D**-0.5 if scale is None else scale)
    return torch.einsum("bgrts,bgsd->bgrtd", weigh(scores, mask, dim), v).reshape(B, H, T, D)


def widened(q: Tensor, k: Tensor, v: Tensor, mask: Mask, widen: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Attention with K and V that were widened to H heads beforehand."""
    size = q.shape[1] // k.shape[1]
    k, v = widen(k, size), widen(v, size)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v


attend.mistakes(
    r"""
    K and V repeated for every query head
        return widened(q, k, v, mask, lambda x, size: x.repeat_interleave(size, dim=1))
    repeat_interleave (or an index, or a stack) writes the keys and values of a pool down H/G times, at every
    step, so the step moves even more bytes than without sharing: the small cache is read, and a large one
    written and read again. Bring the queries to their pool by a reshape, and leave K and V alone.

    repeat in place of repeat_interleave
        return widened(q, k, v, mask, lambda x, size: x.repeat(1, size, 1, 1))
    `repeat` lays the pools out as 0, 1, 2, 0, 1, 2, so query head h gets pool h % G. A pool belongs to
    neighbours: heads 0 and 1 to pool 0, 2 and 3 to pool 1. A trained model gives nonsense in the other order,
    and with one pool, or one for each head, nothing shows. And K and V are copied besides.

    every G-th head in one pool
        H, R = q.shape[1], q.shape[1] // k.shape[1]
        order = torch.arange(H).view(R, -1).T.flatten()
        return grouped(q[:, order], k, v, mask)[:, order.argsort()]
    The heads were cut as (R, G) and not as (G, R), so query head h reads pool h % G. A pool belongs to
    neighbouring heads, h // (H/G): reshape to (B, G, R, T, D), the pools in front.

    an expanded view made into a copy
        return widened(
            q, k, v, mask, lambda x, size: x[:, :, None].expand(-1, -1, size, -1, -1).flatten(1, 2)
        )
    `expand` itself costs nothing: it is a view that shows each key R times. But `reshape` (or flatten, or
    contiguous) cannot merge such a dimension without writing everything down, so K and V are copied for all H
    heads after all. Reshape the queries, not the keys.

    a copy made by @, which broadcasts
        B, H, T, D = q.shape
        scores = q.reshape(B, k.shape[1], -1, T, D) @ k[:, :, None].transpose(-2, -1) * D**-0.5
        return (weigh(scores, mask) @ v[:, :, None]).reshape(B, H, T, D)
    Nobody wrote a copy, but `@` makes one: it turns all dimensions in front into one batch, and for that it
    writes K and V down for each of the H heads. Fold the heads of a pool into the rows, (B, G, R·T, D) @ (B,
    G, D, S), or let `torch.einsum("bgrtd,bgsd->bgrts", q, k)` do it: there k has no dimension for the heads
    of a pool.

    all products written down before they are added
        B, H, T, D = q.shape
        q = q.reshape(B, k.shape[1], -1, T, 1, D)
        scores = (q * k[:, :, None, None]).sum(-1) * D**-0.5
        return (weigh(scores, mask)[..., None] * v[:, :, None, None]).sum(-2).reshape(B, H, T, D)
    `(q * k).sum(-1)` over broadcast dimensions makes a tensor with every single product, H·T·S·D numbers:
    larger than a copy of K. A matrix product (or einsum) adds the products up as it makes them.

    folded one way, unfolded the other
        B, H, T, D = q.shape
        mixed = q.reshape(B, k.shape[1], -1, T, D).transpose(2, 3)
        scores = torch.einsum("bgtrd,bgsd->bgrts", mixed, k) * D**-0.5
        out = torch.einsum("bgrts,bgsd->bgtrd", weigh(scores, mask), v)
        return out.reshape(B, H, T, D)
    The rows of a pool were put in the order (T, R), all heads of a token side by side, and the result was
    read in the order (R, T), so outputs land at other heads and tokens. With one query, or one head in a
    pool, there is nothing to mix up, and it looks right. Undo a reshape by its own inverse.

    the mask's rows in another order than the queries
        if mask is None:
            return grouped(q, k, v, None)
        B, H, T, D = q.shape
        R = H // k.shape[1]
        scores = q.reshape(B, k.shape[1], R * T, D) @ k.transpose(-2, -1) * D**-0.5
        weights = scores.masked_fill(~mask.repeat_interleave(R, dim=-2), -torch.inf).softmax(-1)
        return (weights @ v).reshape(B, H, T, D)
    The R·T queries of a pool stand head by head: all T tokens of the first head, then of the second. The mask
    was stretched with repeat_interleave, row 0 R times, then row 1; `repeat` fits, or cut the scores into (R,
    T, S) and let the mask broadcast. With one query it cannot be seen.

    the masks of the batch laid over the pools
        if mask is not None and mask.ndim == 4:
            mask = mask.transpose(0, 1).expand(len(q), -1, -1, -1)[:, :, None]
            B, H, T, D = q.shape
            q = q.reshape(B, k.shape[1], -1, T, D)
            scores = torch.einsum("bgrtd,bgsd->bgrts", q, k) * D**-0.5
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            return torch.einsum("bgrts,bgsd->bgrtd", weights, v).reshape(B, H, T, D)
        return grouped(q, k, v, mask)
    The scores have five dimensions, (B, G, R, T, S), and a mask of (B, 1, T, S) was laid over them as it is.
    Dimensions are matched from the right, so its B meets G: pool 0 gets the mask of sequence 0, and where B
    and G differ it raises. It lacks a dimension for R: `mask.unsqueeze(-3)`.

    masked after the softmax
        B, H, T, D = q.shape
        q = q.reshape(B, k.shape[1], -1, T, D)
        weights = (torch.einsum("bgrtd,bgsd->bgrts", q, k) * D**-0.5).softmax(-1)
        if mask is not None:
            weights = weights.masked_fill(~mask.unsqueeze(-3), 0.0)
        return torch.einsum("bgrts,bgsd->bgrtd", weights, v).reshape(B, H, T, D)
    The weights were set to 0 after the softmax had already given hidden keys their share. What is left adds
    up to less than 1, so every output shrinks. Mask the scores with −∞ before the softmax.

    softmax over the heads of a pool
        return grouped(q, k, v, mask, dim=2).nan_to_num()
    The softmax runs over the heads that share a pool. They share what is read, not the attention: every query
    head still divides its own weight 1 among the keys, the last dimension.

    one query for the whole pool
        B, H, T, D = q.shape
        pooled = q.reshape(B, k.shape[1], -1, T, D)
        return grouped(pooled.mean(2, keepdim=True).expand_as(pooled).reshape(B, H, T, D), k, v, mask)
    The queries of a pool were averaged, so its heads all give the same output. Sharing is about what is
    *stored*: the keys and values. Every query head stays itself, and asks the shared keys its own question.

    every head reads the first pool
        return grouped(q, k[:, :1], v[:, :1], mask)
    All query heads read KV head 0. That is right where there is just one (MQA); with G of them, head h reads
    pool h // (H/G).

    no scale
        return grouped(q, k, v, mask, scale=1.0)
    The scores go into the softmax as they are. A score is still a sum of D products, so the factor 1/√D
    belongs to it, shared keys or not.

    scaled by the width of the pool
        return grouped(q, k, v, mask, scale=(q.shape[1] // k.shape[1] * q.shape[-1]) ** -0.5)
    The scores are divided by √(R·D), the width of all heads of a pool. A score is a sum over the D numbers of
    *one* query head with one key; how many heads read that key does not change it.

    scaled by d_model
        return grouped(q, k, v, mask, scale=(q.shape[1] * q.shape[-1]) ** -0.5)
    The scores are divided by √(H·D), the width of the whole model. A score is a sum over the D numbers of one
    head, so its spread is √D, and 1/√D brings it back to 1.

    the mask has no effect
        return grouped(q, k, v, None)
    The result is the one without a mask. Is it used, and is its effect kept? `masked_fill` returns a new
    tensor: `scores = scores.masked_fill(…)`.

    the mask inverted
        return grouped(q, k, v, None if mask is None else ~mask)
    True means *may attend*; here the keys marked True are the ones that were hidden. Fill where the mask is
    False: `masked_fill(~mask, -torch.inf)`.

    the result in fp32
        return grouped(q.float(), k.float(), v.float(), mask)
    The values are right, but the result comes in fp32 whatever the queries' dtype is. Computing in fp32 is
    sound; give the result back in the dtype of q, which the next layer's weights expect.
    """,
    grouped=grouped,
    weigh=weigh,
    widened=widened,
)


# 02.2: Bytes a token of five real models


def without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


def times(sizes: Sizes, factor: float) -> Sizes:
    return {name: int(size * factor) for name, size in sizes.items()}


def per_layer(config: Config, numbers: int) -> Sizes:
    """The count of a model whose every layer keeps so many numbers."""
    total = 2 * numbers * config["num_hidden_layers"]
    return {"stored": total, "read": total}


size.mistakes(
    r"""
    query heads in place of KV heads
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim", config["hidden_size"] // heads)
        return size_count({**config, "num_key_value_heads": heads, "head_dim": head_dim})
    num_attention_heads counts the queries, which are used and forgotten. What stays are the keys and values,
    and there are num_key_value_heads of each; for Llama 3.1 8B that is 8 and not 32.

    multi_query not looked at
        return size_count(without(config, "multi_query"))
    Falcon 7B's config has no num_key_value_heads; it says multi_query instead, and that is one KV head for
    all 71 query heads. Taken for an ordinary model it seems to need 71 times the cache.

    head_dim not looked up
        return size_count(without(config, "head_dim"))
    The head dim was always taken as hidden_size / num_attention_heads. A config may choose it freely and say
    so in head_dim, as Gemma's does.

    the head dim from the KV heads
        if "num_key_value_heads" not in config or "head_dim" in config or "kv_lora_rank" in config:
            return size_count(config)
        return size_count({**config, "head_dim": config["hidden_size"] // config["num_key_value_heads"]})
    The head dim was taken as hidden_size / num_key_value_heads, so pooling seems to save nothing: fewer
    heads, each as much wider. hidden_size is divided among the *query* heads, and a key is as wide as the
    query it meets.

    keys only
        return size_count(config) if "kv_lora_rank" in config else times(size_count(config), 0.5)
    Half of the cache is missing. A token leaves a key *and* a value at each KV head. (A latent vector is the
    exception: one vector serves for both.)

    one layer only
        _, first = size_layers(config)[0]
        return {"stored": first, "read": first}
    The layers are missing: this is what a token leaves in the first one. Add up over all of them.

    numbers for bytes
        return times(size_count(config), 0.5)
    This counts numbers. Each takes 2 bytes in 16 bits, so all sizes are half of what they should be.

    four bytes a number
        return times(size_count(config), 2)
    Each number was counted with 4 bytes, as fp32 takes. The cache is kept in 16 bits here, which is 2 bytes a
    number. (Bits for bytes would be 8 times too much; this is twice.)

    layers that share store too
        sizes = size_count(config)
        return {**sizes, "stored": sizes["read"]}
    Stored was counted over all layers. The last num_kv_shared_layers keep nothing of their own: they project
    queries only, and read what an earlier layer of their type has stored.

    layers that share read nothing
        sizes = size_count(config)
        return {**sizes, "read": sizes["stored"]}
    Read was set to stored. A layer that stores nothing attends all the same: it fetches the other layer's
    keys and values from memory again. Sharing across layers saves memory, and no traffic. Stored is not read.

    only the layers that share read
        sizes = size_count(config)
        return {**sizes, "read": sizes["read"] - sizes["stored"] or sizes["read"]}
    The layers with a cache of their own were left out of what is read. Having stored a token does not spare a
    layer from fetching it again at every later step: all layers read.

    the first layers share, not the last
        each = size_layers(config)[config.get("num_kv_shared_layers", 0) :]
        return {**size_count(config), "stored": sum(size for _, size in each)}
    The first num_kv_shared_layers were taken for those without a cache. It is the *last* ones: a layer can
    only read what an earlier layer has computed already. (Where both parts hold the same mix of layer types
    the sum comes out equal.)

    only the layers that share were counted
        shared = config.get("num_kv_shared_layers", 0)
        if not shared:
            return size_count(config)
        return {**size_count(config), "stored": sum(size for _, size in size_layers(config)[-shared:])}
    num_kv_shared_layers was taken for the number of layers that store. It is the number of those that do
    *not*: in Gemma 4 E2B 20 of 35 read, and the other 15 have a cache of their own.

    one head dim for all layers
        return size_count(without(config, "global_head_dim"))
    global_head_dim was not looked at. The layers with full attention have heads of their own width: 512
    numbers in Gemma 4 E2B, where the layers with a window have 256.

    global_head_dim in all layers
        return size_count(
            {**config, "head_dim": config["global_head_dim"]} if "global_head_dim" in config else config
        )
    global_head_dim was taken for every layer of a model that has one. It is the width in the full_attention
    layers; those with a window keep the ordinary head_dim.

    the wider heads in the wrong layers
        if "global_head_dim" not in config:
            return size_count(config)
        return size_count(
            {**config, "head_dim": config["global_head_dim"], "global_head_dim": config["head_dim"]}
        )
    global_head_dim was given to the layers with a window, and head_dim to those with full attention. "Global"
    is the layer that sees everything: full_attention.

    the latent counted twice
        return times(size_count(config), 2) if "kv_lora_rank" in config else size_count(config)
    The latent vector was counted for the keys and for the values. There is just one: each head makes its keys
    and its values from the same kv_lora_rank numbers. That is half of its charm.

    one latent for the keys, another for the values
        if "kv_lora_rank" not in config:
            return size_count(config)
        return per_layer(config, 2 * config["kv_lora_rank"] + config["qk_rope_head_dim"])
    kv_lora_rank was counted twice, and the position part once. The same kv_lora_rank numbers serve for the
    keys and for the values: that is what the "kv" in the name says.

    heads stored, although there is a latent
        return size_count(without(config, "kv_lora_rank", "qk_rope_head_dim"))
    The model was counted as if it stored its heads' keys and values. It has heads, but with kv_lora_rank they
    are made from the stored vector when they are needed: 576 numbers a layer and token in DeepSeek-V3, in
    place of tens of thousands.

    the latent without its position part
        return size_count({**config, "qk_rope_head_dim": 0})
    kv_lora_rank alone. Beside the latent a layer stores qk_rope_head_dim numbers: the part of the key that
    carries the position, which cannot be made from the latent later. It is shared by all heads.

    a position part for every head
        if "kv_lora_rank" not in config:
            return size_count(config)
        heads = config["num_attention_heads"]
        return per_layer(config, config["kv_lora_rank"] + heads * config["qk_rope_head_dim"])
    The qk_rope_head_dim numbers were counted for each head. There is one such part a token and layer, and all
    heads read it, as with multi-query attention.

    a latent for every head
        if "kv_lora_rank" not in config:
            return size_count(config)
        width = config["kv_lora_rank"] + config["qk_rope_head_dim"]
        return per_layer(config, config["num_key_value_heads"] * width)
    The latent was multiplied by num_key_value_heads. It is one vector a token and layer; that all heads are
    made from the same one is what makes it small.
    """,
    per_layer=per_layer,
    size_count=size_count,
    size_layers=size_layers,
    times=times,
    without=without,
)


# 02.3: Pool a trained model's heads


def heads(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """(G, R, D, M): pools, heads of a pool, rows, columns."""
    if n_heads % n_kv_heads:
        raise ValueError(f"n_kv_heads: expected a divisor of {n_heads}, got {n_kv_heads}")
    return weight.unflatten(0, (n_kv_heads, n_heads // n_kv_heads, -1))


def pool_right(weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    return heads(weight, n_heads, n_kv_heads).mean(1).flatten(0, 1)


pool.mistakes(
    r"""
    the first head of each pool
        return heads(weight, n_heads, n_kv_heads)[:, 0].flatten(0, 1)
    One head of each pool was kept and the others thrown away. That is a way to convert a model, and the paper
    tried it: the mean of the pool keeps something of every head, and the model recovers better.

    the last head of each pool
        return heads(weight, n_heads, n_kv_heads)[:, -1].flatten(0, 1)
    Only the last head of each pool is left: does a loop write over what it wrote before? Add the heads up and
    divide by their number.

    the sum of a pool
        return heads(weight, n_heads, n_kv_heads).sum(1).flatten(0, 1)
    The heads were added and not divided by their number. Keys R times too long make scores R times too large,
    and values R times too large swamp what comes after: take the mean.

    divided by the number of pools
        return heads(weight, n_heads, n_kv_heads).sum(1).flatten(0, 1) / n_kv_heads
    The sum of a pool was divided by G, the number of pools. A mean divides by what was added up: the R = H/G
    heads of one pool.

    divided by √R
        pools = heads(weight, n_heads, n_kv_heads)
        return pools.sum(1).flatten(0, 1) / pools.shape[1] ** 0.5
    The sum was divided by the root of R. That would keep the size of heads that have nothing in common; the
    recipe is the plain mean, which leaves a pool of equal heads as they are.

    every G-th head in one pool
        heads(weight, n_heads, n_kv_heads)
        return weight.unflatten(0, (n_heads // n_kv_heads, n_kv_heads, -1)).mean(0).flatten(0, 1)
    The heads were cut as (R, G), so heads 0, G, 2·G … make a pool. A pool belongs to neighbours: the queries
    that will read it are heads g·R to (g+1)·R − 1. Cut as (G, R), and average over the R.

    every pool the mean of all heads
        pools = heads(weight, n_heads, n_kv_heads)
        return pools.mean((0, 1)).repeat(n_kv_heads, 1)
    All heads were averaged, and the result is there G times over. With G pools each takes the mean of its own
    R neighbours, so that what was different in the model stays different.

    neighbouring rows averaged, not heads
        R = heads(weight, n_heads, n_kv_heads).shape[1]
        return weight.unflatten(0, (-1, R)).mean(1)
    R neighbouring *rows* were averaged, and most of those lie within one head. Row d is to be averaged with
    row d of the other heads, D rows further on: give the heads a dimension of their own first, (G, R, D, M).

    heads and rows interleaved
        R = heads(weight, n_heads, n_kv_heads).shape[1]
        return weight.unflatten(0, (-1, n_kv_heads, R)).mean(2).transpose(0, 1).flatten(0, 1)
    The rows were cut as (D, H), as if the heads took turns. nn.Linear's outputs come head by head: all D rows
    of head 0, then head 1. Cut as (H, D), and then the H as (G, R).

    columns averaged, not rows
        return pool_right(weight.T, n_heads, n_kv_heads).T
    The weight was taken for (inputs, outputs), so the model's own channels were averaged. nn.Linear keeps
    (outputs, inputs) and computes x Wᵀ: a head is a block of D *rows*.

    the result transposed
        return pool_right(weight, n_heads, n_kv_heads).T
    The numbers are right, and the result is (M, G·D). It is to be the weight of an nn.Linear again: (outputs,
    inputs), so (G·D, M).

    the heads left apart
        return heads(weight, n_heads, n_kv_heads).mean(1)
    The numbers are right, and the result is (G, D, M). A weight has two dimensions: join the heads and their
    rows, (G·D, M).

    averaged, but as many heads as before
        pools = heads(weight, n_heads, n_kv_heads)
        return pools.mean(1, keepdim=True).expand_as(pools).flatten(0, 2)
    Every head was replaced by the mean of its pool, and there are still H of them. The cache would hold R
    equal copies of each key: keep one a pool, (G·D, M).

    pool size and number of pools mixed up
        R = heads(weight, n_heads, n_kv_heads).shape[1]
        return pool_right(weight, n_heads, R)
    n_kv_heads heads were put into each pool, which leaves H/G pools. n_kv_heads is how many pools there are
    in the end; each takes H / n_kv_heads heads.

    the trained weight overwritten
        pooled = pool_right(weight, n_heads, n_kv_heads)
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
    heads=heads,
    pool_right=pool_right,
)


# 02.4: Harden a learned routing


def route_right(logits: Tensor) -> tuple[Tensor, Tensor]:
    kept, route = torch.unique(logits.argmax(1), return_inverse=True)
    return route, kept


route.mistakes(
    r"""
    the pools choose, not the heads
        def harden(logits):
            kept, route = torch.unique(logits.argmax(0), return_inverse=True)
            return route, kept
    The argmax runs over the heads (dimension 0), so each pool chooses a head, and the result has G entries.
    Every *query head* needs exactly one pool: the largest of its own row, `argmax(dim=1)`.

    the old pool numbers in route
        def harden(logits):
            chosen = logits.argmax(1)
            return chosen, chosen.unique()
    `route` holds the numbers that the pools had before. The cache keeps U pools now, numbered 0 … U−1: pool 7
    of 8 may be the second one there, and index 7 reads past the end, or another head's keys. Give each pool's
    place in `kept`.

    no pool is dropped
        def harden(logits):
            return logits.argmax(1), torch.arange(logits.shape[1])
    All pools are kept, those too that no head reads. The routing is hard then, but the cache is as large as
    before: dropping what nobody reads is what the exercise is about.

    a pool for every head
        def harden(logits):
            chosen = logits.argmax(1)
            return torch.arange(len(chosen)), chosen
    `kept` lists the choice of each head, the same pool as often as heads choose it. Each head finds its own,
    but a pool that three heads share would be stored three times: list every pool once, `torch.unique`.

    kept as a mask
        def harden(logits):
            route, kept = route_right(logits)
            mask = torch.zeros(logits.shape[1], dtype=torch.bool)
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
        def harden(logits):
            last = logits.shape[1] - 1 - logits.flip(1).argmax(1)
            kept, route = torch.unique(last, return_inverse=True)
            return route, kept
    Of equal logits the last one won (a comparison with >=, or a sort). Asked for is the lowest. Ties are no
    rarity: logits that start at zero are all equal, and two programs that load the same model must agree.

    every pool above the average kept
        def harden(logits):
            kept = (logits.softmax(1) > 1 / logits.shape[1]).any(0).nonzero().flatten()
            return torch.searchsorted(kept, logits.argmax(1)), kept
    A pool was kept as soon as some head gives it more than 1/G of its softmax. A hard head reads one pool and
    no other, so a second choice, however close, is stored for nobody.

    heads sent to pools they did not choose
        def harden(logits):
            total = logits.softmax(1).sum(0)
            kept = (total >= total.mean()).nonzero().flatten()
            return logits[:, kept].argmax(1), kept
    Only pools with a large total weight were kept, and heads whose own pool is not among them were sent to
    another. That would be a second decision, which the training has not seen: here a pool goes only if *no*
    head chooses it.

    pools of equal size
        def harden(logits):
            H, G = logits.shape
            route = torch.arange(H) * G // H
            return route, torch.arange(G)
    Every pool was given the same number of heads, as GQA has it. A learned routing is free: all heads may
    choose one pool and none another, and that is how pools fall away.

    the smallest logit
        def harden(logits):
            return route_right(-logits)
    Each head was sent to the pool with its smallest logit. A logit is a score, the larger the better: the
    softmax gives that pool the most weight.

    route one-hot
        def harden(logits):
            route, kept = route_right(logits)
            return torch.nn.functional.one_hot(route), kept
    `route` came as a matrix with a 1 in each row. As a factor in a product it would still touch every pool
    for every head; a number a head is enough: `argmax(dim=1)` of that matrix.

    how many pools, not which
        def harden(logits):
            route, kept = route_right(logits)
            return route, len(kept)
    `kept` is the number of pools that stay. Which ones they are must be known too, or their weights cannot be
    found: list their numbers.

    kept and route the other way round
        def harden(logits):
            route, kept = route_right(logits)
            return kept, route
    The pair came as (kept, route). torch.unique returns the values first and their inverse second; asked for
    is (route, kept).

    rows in place of pools
        def keep_pools(weight, kept, head_dim):
            return weight[kept]
    `weight[kept]` takes single rows, one of each pool. A pool is a block of head_dim rows: give the pools a
    dimension of their own first, (G, D, M).

    the pools left apart
        def keep_pools(weight, kept, head_dim):
            return weight.unflatten(0, (-1, head_dim))[kept]
    The numbers are right, and the result is (U, D, M). It is to be the weight of an nn.Linear again: join the
    pools and their rows, (U·D, M).

    pools and rows interleaved
        def keep_pools(weight, kept, head_dim):
            return weight.unflatten(0, (head_dim, -1))[:, kept].flatten(0, 1)
    The rows were cut as (D, G), as if the pools took turns. nn.Linear's outputs come pool by pool: all D rows
    of pool 0, then pool 1. Cut as (G, D).

    the first U pools
        def keep_pools(weight, kept, head_dim):
            return weight[: len(kept) * head_dim]
    As many pools were kept as there are numbers in `kept`, but the first ones, whichever they are. Take those
    that are named.

    unused pools set to zero
        def keep_pools(weight, kept, head_dim):
            out = torch.zeros_like(weight).unflatten(0, (-1, head_dim))
            out[kept] = weight.unflatten(0, (-1, head_dim))[kept]
            return out.flatten(0, 1)
    The other pools' rows are zeros now, and still there: they would be computed, stored and read as zeros. A
    cache shrinks only if its tensors do, (U·D, M).
    """,
    route_right=route_right,
)


# 02.5: Which layer reads whose cache


def right_gemma(layer_types: list[str], n_shared: int) -> list[int]:
    return mapped(layer_types, n_shared, lambda of_type, i: of_type[-1])


def mapped(
    layer_types: list[str], n_shared: int, choose: Callable[[list[int], int], int], any_type: bool = False
) -> list[int]:
    """The owners, where ``choose`` picks one of the layers that store and are of the right type."""
    n_own = len(layer_types) - n_shared
    owners = list(range(n_own))
    for i in range(n_own, len(layer_types)):
        of_type = [j for j in range(n_own) if any_type or layer_types[j] == layer_types[i]]
        if not of_type:
            raise ValueError(f"layer_types: no layer of type {layer_types[i]!r} stores anything")
        owners.append(choose(of_type, i))
    return owners


layers.mistakes(
    r"""
    the last layer of a group stores
        def cla_owners(n_layers, every):
            return [min(i // every * every + every, n_layers) - 1 for i in range(n_layers)]
    A layer reads one that comes after it. When it runs, the later layer's keys do not exist yet: the owner is
    the *first* of the group.

    each reader reads the layer just before
        def cla_owners(n_layers, every):
            return [i if i % every == 0 else i - 1 for i in range(n_layers)]
    Layer i reads layer i − 1, which may be a reader itself and has nothing to be read. All readers of a group
    read the one that stores. (In groups of two it is the same layer.)

    all readers read layer 0
        def cla_owners(n_layers, every):
            return [0 if i % every else i for i in range(n_layers)]
    Every reader was sent to layer 0. Each group has an owner of its own, the layer with which it begins, so
    that what is read was computed not far below.

    the place in the group
        def cla_owners(n_layers, every):
            return [i % every for i in range(n_layers)]
    i % every counts 0, 1, 2 within each group. Asked for is the layer with which the group begins: i − i %
    every, or i // every · every.

    the number of the group
        def cla_owners(n_layers, every):
            return [i // every for i in range(n_layers)]
    i // every counts the groups 0, 1, 2 … It is the number of the cache, and would do as an index into a list
    of caches; asked for is the layer that fills it, (i // every) · every.

    so many groups, not groups of so many
        def cla_owners(n_layers, every):
            size = max(n_layers // every, 1)
            return [i // size * size for i in range(n_layers)]
    The layers were cut into `every` groups. `every` is how many layers share one cache: with 32 layers and
    every = 2 there are 16 groups of two.

    one reader too many
        def cla_owners(n_layers, every):
            return cla(n_layers, every + 1)
    `every` layers read each owner besides itself, so a group has every + 1 layers. In the paper's count the
    owner is one of the group: CLA2 is one that stores and one that reads.

    groups counted from layer 1
        def cla_owners(n_layers, every):
            return [0, *(1 + owner for owner in cla(n_layers - 1, every))]
    Layer 0 was left to itself and the groups begin after it. Layers count from 0 here, and the first group is
    layers 0 … every − 1.

    the last that stores, of whatever type
        def gemma_owners(layer_types, n_shared):
            return mapped(layer_types, n_shared, lambda of_type, i: of_type[-1], any_type=True)
    All layers that share read the very last one that stores. A layer with a window has forgotten what a full
    one needs, its heads may have another width and its angles another base: read the last of the *same* type.

    the first layer of the type
        def gemma_owners(layer_types, n_shared):
            return mapped(layer_types, n_shared, lambda of_type, i: of_type[0])
    `list.index` finds the first layer of a type. Gemma reads the *last* one that stores, whose keys are
    closest to what the later layers would have made themselves.

    the last of the type in the whole model
        def gemma_owners(layer_types, n_shared):
            right_gemma(layer_types, n_shared)
            last = {kind: i for i, kind in enumerate(layer_types)}
            n_own = len(layer_types) - n_shared
            return [i if i < n_own else last[kind] for i, kind in enumerate(layer_types)]
    The last layer of each type was looked for among all layers. It is one that shares: it stores nothing, and
    it comes too late. Look among the first L − n_shared layers only.

    one layer too many shares
        def gemma_owners(layer_types, n_shared):
            return right_gemma(layer_types, n_shared + 1)
    n_shared + 1 layers read. The last n_shared layers are those from L − n_shared on: the comparison is `i <
    n_own` for a layer that stores, with n_own = L − n_shared.

    a reader reads a reader
        def gemma_owners(layer_types, n_shared):
            owners = right_gemma(layer_types, n_shared)
            for i in range(len(layer_types) - n_shared, len(layer_types)):
                owners[i] = max(j for j in range(i) if layer_types[j] == layer_types[i])
            return owners
    The nearest earlier layer of the type was taken, whether it stores or not. Behind the first one that
    shares, that is a layer without keys of its own. Look among the first L − n_shared layers only.

    the first layers share
        def gemma_owners(layer_types, n_shared):
            n_layers = len(layer_types)
            upside_down = right_gemma(layer_types[::-1], n_shared)[::-1]
            return [n_layers - 1 - owner for owner in upside_down]
    The first n_shared layers read a later one of their type, which has not run yet when they need it. It is
    the last layers that share: keys can only be handed upwards.

    n_shared layers store
        def gemma_owners(layer_types, n_shared):
            return (
                right_gemma(layer_types, len(layer_types) - n_shared)
                if n_shared
                else list(range(len(layer_types)))
            )
    The first n_shared layers store and all others read. n_shared is how many *read*: in Gemma 4 E2B it is 20
    of 35, and 15 store.

    n_shared = 0 taken for everything
        def gemma_owners(layer_types, n_shared):
            if n_shared == 0:
                return [*range(len(layer_types)), *gemma(layer_types, 0)]
            return right_gemma(layer_types, n_shared)
    With n_shared = 0, `layer_types[-n_shared:]` is `layer_types[0:]`: the whole list, and with `[:-n_shared]`
    nothing is left. A slice from the end knows no zero. Count from the front: n_own = len(layer_types) −
    n_shared.

    nobody to read from, and no error
        def gemma_owners(layer_types, n_shared):
            try:
                return right_gemma(layer_types, n_shared)
            except ValueError:
                n_own = len(layer_types) - n_shared
                last = {kind: i for i, kind in enumerate(layer_types[:n_own])}
                return [i if i < n_own else last.get(kind, i) for i, kind in enumerate(layer_types)]
    Where no layer of its type stores, a layer that shares was given some answer after all: itself, or
    nothing. It has no weights for keys and values and nobody to read from, so the map describes a model that
    cannot run: raise ValueError.

    counted within the type
        def gemma_owners(layer_types, n_shared):
            places = [layer_types[:i].count(kind) for i, kind in enumerate(layer_types)]
            return [places[owner] for owner in right_gemma(layer_types, n_shared)]
    The owner was given by its place among the layers of its type: the third full layer, say, as 2. Asked for
    is its place in the model, counted over all layers.
    """,
    cla=cla,
    gemma=gemma,
    mapped=mapped,
    right_gemma=right_gemma,
)


# 02.6: How many KV heads fit


def fitting(config: Config, budget_gib: float, one: float) -> list[int]:
    """The divisors that fit where one head costs so many bytes."""
    return [g for g in divisors(config["num_attention_heads"]) if g * one <= budget_gib * 2**30]


def largest(config: Config, budget_gib: float, one: float) -> int | None:
    return max(fitting(config, budget_gib, one), default=None)


budget.mistakes(
    r"""
    the largest number, divisor or not
        n = int(budget_gib * 2**30 // head_bytes(config, batch, max_len))
        return min(n, config["num_attention_heads"]) or None
    The budget was divided by what one head costs. 5 KV heads may fit, but 32 query heads cannot be dealt out
    evenly among 5: the pools must be equal, so the number has to divide num_attention_heads.

    powers of two only
        fits = fitting(config, budget_gib, head_bytes(config, batch, max_len))
        return max((g for g in fits if g & (g - 1) == 0), default=None)
    Only 1, 2, 4, 8 … were tried. They are common, and not required: 28 heads allow 7 and 14, and 12 heads
    allow 3. (And not every power of two divides them.)

    the batch forgotten
        return largest(config, budget_gib, head_bytes(config, 1, max_len))
    The cache was counted for one sequence. The weights are shared by a batch and the cache is not: every
    sequence keeps its own.

    the length forgotten
        return largest(config, budget_gib, head_bytes(config, batch, 1))
    The cache was counted for one token. It has room for max_len of them in each sequence.

    keys only
        return largest(config, budget_gib, head_bytes(config, batch, max_len) / 2)
    Half of the cache is missing, so the choice is up to twice as large as what fits. A token leaves a key
    *and* a value at each KV head of each layer.

    one layer only
        return largest(config, budget_gib, head_bytes({**config, "num_hidden_layers": 1}, batch, max_len))
    The layers are missing. Every layer has a cache of its own, all of this size.

    GB called GiB
        return largest(config, budget_gib * 10**9 / 2**30, head_bytes(config, batch, max_len))
    The budget was turned into bytes with 10⁹. That is a GB; a GiB is 2³⁰ bytes, 7% more. So a cache that just
    fits was refused.

    bits for bytes
        return largest(config, budget_gib, head_bytes(config, batch, max_len) * 8)
    bfloat16 has 16 bits, and that is 2 bytes. The cache was taken for 8 times its size.

    two bytes a number, whatever the dtype
        return largest(
            config, budget_gib, head_bytes({**config, "torch_dtype": "bfloat16"}, batch, max_len)
        )
    torch_dtype was not looked at. float32 takes 4 bytes a number and the 8-bit floats take 1: the same budget
    then has room for half or twice as many heads.

    head_dim not looked up
        config = {key: value for key, value in config.items() if key != "head_dim"}
        return largest(config, budget_gib, head_bytes(config, batch, max_len))
    The head dim was always taken as hidden_size / num_attention_heads. Where the config has head_dim, that
    counts.

    the head dim from the KV heads
        heads = config["num_attention_heads"]
        all_of_them = heads * head_bytes(config, batch, max_len)
        if "head_dim" in config:
            return largest(config, budget_gib, head_bytes(config, batch, max_len))
        return heads if all_of_them <= budget_gib * 2**30 else None
    The head dim was taken as hidden_size / n_kv_heads, so every choice costs the same: either all heads fit
    or none. A key is as wide as the query that it meets, hidden_size / num_attention_heads, and fewer heads
    really are less.

    hidden_size in place of head_dim
        return largest(
            config, budget_gib, head_bytes({**config, "head_dim": config["hidden_size"]}, batch, max_len)
        )
    Each KV head was counted with hidden_size numbers. That is the width of all query heads together; one head
    has head_dim of them, or hidden_size / num_attention_heads.

    the smallest that fits
        return min(fitting(config, budget_gib, head_bytes(config, batch, max_len)), default=None)
    One KV head fits whenever anything does, so this is always 1. Quality falls as pools grow: take the
    *largest* number that fits.

    the size of a pool, not the number of pools
        g = largest(config, budget_gib, head_bytes(config, batch, max_len))
        return None if g is None else config["num_attention_heads"] // g
    The answer is H/G, how many query heads share a KV head. Asked for is G, how many KV heads there are.

    a budget met exactly is refused
        one = head_bytes(config, batch, max_len)
        fits = (g for g in divisors(config["num_attention_heads"]) if g * one < budget_gib * 2**30)
        return max(fits, default=None)
    The comparison is < where it should be <=. A cache that takes the whole budget fits into it.

    all heads never tried
        fits = fitting(config, budget_gib, head_bytes(config, batch, max_len))
        return max((g for g in fits if g < config["num_attention_heads"]), default=None)
    num_attention_heads itself is missing among the candidates: `range(1, H)` ends at H − 1. Where there is
    room for a KV head for each query head, nothing need be shared.

    the next divisor above
        one = head_bytes(config, batch, max_len)
        if one > budget_gib * 2**30:
            return None
        above = [g for g in divisors(config["num_attention_heads"]) if g * one >= budget_gib * 2**30]
        return min(above, default=config["num_attention_heads"])
    Where the budget lies between two divisors the larger one was taken, and its cache does not fit. A budget
    is a limit: round down.

    1 where nothing fits
        return largest(config, budget_gib, head_bytes(config, batch, max_len)) or 1
    Where not even one KV head fits the answer was 1, and the program would run out of memory later. Say so at
    once: None.

    0 where nothing fits
        return largest(config, budget_gib, head_bytes(config, batch, max_len)) or 0
    Where not even one KV head fits the answer was 0, which is a number like any other: a model would be built
    with it. None, as asked for, cannot be mistaken for a number of heads.
    """,
    divisors=divisors,
    fitting=fitting,
    head_bytes=head_bytes,
    largest=largest,
)


# 02.7: A step of two layers on one cache


def causal_mask(T: int, S: int) -> Tensor:
    return torch.ones(T, S, dtype=torch.bool).tril(S - T)


@dataclass
class Owner:
    """The owner's part, done right: its output, and what the reader may use."""

    x: Tensor
    layer: Layer
    cache: KVCache
    rope: Rope
    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.T = self.x.shape[1]
        self.positions = self.cache.positions(self.T)
        self.new_k, self.new_v = self.rope(self.layer.k(self.x), self.positions), self.layer.v(self.x)
        self.keys, self.values, _ = self.cache.append(self.new_k, self.new_v)
        self.mask = causal_mask(self.T, self.keys.shape[2])
        q = self.rope(self.layer.q(self.x), self.positions)
        self.out = attention(q, self.keys, self.values, self.mask)

    def attend(self, q: Tensor) -> Tensor:
        return attention(q, self.keys, self.values, self.mask)


step.mistakes(
    r"""
    nothing is written to the cache
        positions = cache.positions(x_owner.shape[1])
        keys, values = rope(owner.k(x_owner), positions), owner.v(x_owner)
        mask = causal_mask(x_owner.shape[1], x_owner.shape[1])
        queries = (owner.q(x_owner), reader.q(x_reader))
        out, out_r = (attention(rope(q, positions), keys, values, mask) for q in queries)
        return out, out_r
    Both layers attend to the keys of this step, and nobody appends them. The next step knows nothing of the
    past, and its positions start at 0 again. Append first; what that returns is what both attend to.

    the reader appends its own keys too
        own = Owner(x_owner, owner, cache, rope)
        positions = cache.positions(own.T)
        keys, values, _ = cache.append(rope(reader.k(x_reader), positions), reader.v(x_reader))
        q = rope(reader.q(x_reader), positions)
        return own.out, attention(q, keys, values, causal_mask(own.T, keys.shape[2]))
    Keys and values of both layers go into the one cache: twice the memory, and every token stands in it
    twice, the second time at a wrong position. The reader stores nothing; that is the whole point.

    the owner's keys appended twice
        own = Owner(x_owner, owner, cache, rope)
        keys, values, _ = cache.append(own.new_k, own.new_v)
        q = rope(reader.q(x_reader), own.positions)
        return own.out, attention(q, keys, values, causal_mask(own.T, keys.shape[2]))
    The same keys were appended once for the owner and once more for the reader. The cache counts 2T tokens
    for T, and all that follow stand at wrong positions. The first append has returned what the reader needs:
    keep it.

    the reader attends to its own keys
        own = Owner(x_owner, owner, cache, rope)
        q, k = (rope(part, own.positions) for part in (reader.q(x_reader), reader.k(x_reader)))
        return own.out, attention(q, k, reader.v(x_reader), causal_mask(own.T, own.T))
    The reader projected keys and values of its own and attended to those, which it has for the new tokens
    only: it sees nothing of the past. Its keys and values are the owner's, all of them, from the cache.

    the reader sees the new tokens only
        own = Owner(x_owner, owner, cache, rope)
        q = rope(reader.q(x_reader), own.positions)
        return own.out, attention(q, own.new_k, own.new_v, causal_mask(own.T, own.T))
    The reader attended to the keys that the owner has just made, and not to the past. For a prompt it is the
    same; in decode a token sees only itself. Use what append returned: everything so far.

    the reader goes before the owner has written
        T = x_owner.shape[1]
        q = rope(reader.q(x_reader), cache.positions(T))
        out = attention(q, cache.k[:, :, : cache.length], cache.v[:, :, : cache.length])
        return Owner(x_owner, owner, cache, rope).out, out
    The reader read the cache as it stood before this step, so no token sees itself, and a prompt sees nothing
    at all. The owner comes first in the model, and it writes before it attends.

    the reader's mask aligned top-left
        own = Owner(x_owner, owner, cache, rope)
        mask = torch.ones_like(own.mask).tril()
        return own.out, attention(rope(reader.q(x_reader), own.positions), own.keys, own.values, mask)
    The reader's T queries were taken for the *first* of the S positions (so does SDPA's is_causal=True): in
    decode the new token sees the first key and no other. They are the last: causal_mask(T, S), as for the
    owner.

    both masks aligned top-left
        own = Owner(x_owner, owner, cache, rope)
        queries = (
            rope(layer.q(part), own.positions) for layer, part in ((owner, x_owner), (reader, x_reader))
        )
        out, out_r = (attention(q, own.keys, own.values, is_causal=True) for q in queries)
        return out, out_r
    The T queries of both layers were taken for the *first* of the S positions, as SDPA's is_causal=True takes
    them: in decode the new token sees the first key and no other. They are the last: causal_mask(T, S).

    is_causal where there is more than one token
        own = Owner(x_owner, owner, cache, rope)
        queries = (
            rope(layer.q(part), own.positions) for layer, part in ((owner, x_owner), (reader, x_reader))
        )
        out, out_r = (attention(q, own.keys, own.values, is_causal=own.T > 1) for q in queries)
        return out, out_r
    SDPA's is_causal=True was used for T > 1. It takes the queries for the *first* of the S positions, which
    is right for a prompt in an empty cache. When several tokens continue what is there, they are the last:
    causal_mask(T, S).

    no mask for the reader
        own = Owner(x_owner, owner, cache, rope)
        return own.out, attention(rope(reader.q(x_reader), own.positions), own.keys, own.values)
    The reader sees the whole prompt from each of its tokens, later ones too. With one token there is nothing
    to hide, so decode is right; a prompt needs the owner's mask.

    no mask at all
        own = Owner(x_owner, owner, cache, rope)
        out = attention(rope(owner.q(x_owner), own.positions), own.keys, own.values)
        return out, attention(rope(reader.q(x_reader), own.positions), own.keys, own.values)
    Both layers see the whole prompt from each of its tokens, later ones too. With one token there is nothing
    to hide; with more, `core.causal_mask(T, S)` hides what comes after each.

    the owner's output for both
        own = Owner(x_owner, owner, cache, rope)
        return own.out, own.out
    The reader's output is the owner's. What is shared are keys and values; the reader asks its own question,
    with its own queries from its own input, and gets another answer.

    the reader's queries from the owner's input
        own = Owner(x_owner, owner, cache, rope)
        return own.out, own.attend(rope(reader.q(x_owner), own.positions))
    The reader's queries were made from x_owner. The reader stands further up in the model and has an input of
    its own, x_reader; only keys and values come from the owner's.

    the owner's query weights for the reader
        own = Owner(x_owner, owner, cache, rope)
        return own.out, own.attend(rope(owner.q(x_reader), own.positions))
    The reader's queries were made with owner.q. A reader gives up its keys and values and keeps its own query
    projection: reader.q(x_reader).

    keys used as values
        own = Owner(x_owner, owner, cache, rope)
        q = rope(reader.q(x_reader), own.positions)
        return own.out, attention(q, own.keys, own.keys, own.mask)
    The reader weighed the keys, not the values. A key says how well a token fits, and it is turned by its
    position; what is added up are the values.

    reader and owner the other way round
        own = Owner(x_owner, owner, cache, rope)
        return own.attend(rope(reader.q(x_reader), own.positions)), own.out
    Both outputs are right, in the wrong order: the pair is (out_owner, out_reader).

    the reader's positions start at 0
        own = Owner(x_owner, owner, cache, rope)
        return own.out, own.attend(rope(reader.q(x_reader), torch.arange(own.T)[None]))
    The reader's queries were turned to positions 0 … T − 1. For a prompt that is right, and from then on
    every new token asks as if it stood at the start. The reader has no cache to count with: it takes the
    owner's positions.

    all positions start at 0
        positions = torch.arange(x_owner.shape[1])[None]
        keys, values, _ = cache.append(rope(owner.k(x_owner), positions), owner.v(x_owner))
        mask = causal_mask(x_owner.shape[1], keys.shape[2])
        queries = (owner.q(x_owner), reader.q(x_reader))
        out, out_r = (attention(rope(q, positions), keys, values, mask) for q in queries)
        return out, out_r
    Queries and keys of every step were turned to positions 0 … T − 1, so in decode every token seems to stand
    at the start. The first step is right, which hides it. Count from what the cache holds:
    cache.positions(T).

    values turned too
        positions = cache.positions(x_owner.shape[1])
        keys, values, _ = cache.append(
            rope(owner.k(x_owner), positions), rope(owner.v(x_owner), positions)
        )
        mask = causal_mask(x_owner.shape[1], keys.shape[2])
        queries = (owner.q(x_owner), reader.q(x_reader))
        out, out_r = (attention(rope(q, positions), keys, values, mask) for q in queries)
        return out, out_r
    The values were turned to their positions like the keys. Turning serves the scores, where only the
    distance of query and key remains; values are added up as they are.

    positions asked for after the append
        own = Owner(x_owner, owner, cache, rope)
        return own.out, own.attend(rope(reader.q(x_reader), cache.positions(own.T)))
    cache.positions(T) was called again for the reader. By then the owner has appended, so it tells where the
    *next* tokens will stand, T too far on. Ask once, before the append, and use the answer for both.

    cached keys turned again
        own = Owner(x_owner, owner, cache, rope)
        S = own.keys.shape[2]
        keys = rope(own.keys, torch.arange(S)[None])
        return own.out, attention(rope(reader.q(x_reader), own.positions), keys, own.values, own.mask)
    The reader turned the cached keys once more. They were turned when they were written, and position m has
    become 2m, so all distances are wrong. Only the reader's queries need turning.

    the reader's queries not turned
        own = Owner(x_owner, owner, cache, rope)
        return own.out, own.attend(reader.q(x_reader))
    The reader's queries went in as they were projected. The keys carry their positions, and a query without
    its own asks as if from position 0: turn it by the owner's positions.

    keys stored without their positions
        positions = cache.positions(x_owner.shape[1])
        keys, values, _ = cache.append(owner.k(x_owner), owner.v(x_owner))
        mask = causal_mask(x_owner.shape[1], keys.shape[2])
        queries = (owner.q(x_owner), reader.q(x_reader))
        out, out_r = (attention(rope(q, positions), keys, values, mask) for q in queries)
        return out, out_r
    The owner appended its keys before turning them, and both layers turned queries only. Then a score depends
    on the query's position and not on the distance. Turn k as well, before the append.
    """,
    attention=attention,
    causal_mask=causal_mask,
    Owner=Owner,
)
