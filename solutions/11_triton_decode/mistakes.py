"""Unit 11: known mistakes of the exercises on the Triton decode kernel; kernels as PyTorch emulations."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvlearn.teaching.watch import done

from .checks import (
    BLOCK,
    LOG2E,
    READ_TICKET,
    ROWS,
    choose,
    first_block,
    floor,
    online,
    packing,
    pages,
    splits,
    tail,
    ticket,
)

# 11.1: Bytes of a decode step, and its floor


floor.mistakes(
    r"""
    query heads in place of KV heads
        config["n_kv_heads"] → config["n_heads"]
    The bytes were counted for every query head. The query heads of a group share one KV head, and a kernel
    that packs them reads its keys and values once: n_kv_heads. Counted like this, a kernel would seem to be
    faster than its memory.

    KV heads in the arithmetic
        live * config["n_heads"] → live * config["n_kv_heads"]
    The FLOPs were counted for n_kv_heads. Every *query* head computes its own scores with the shared keys:
    n_heads. This is why sharing helps: fewer bytes for the same arithmetic.

    the capacity in place of the lengths
        live = sum(lengths) → lengths = [capacity] * len(lengths)
            live = sum(lengths)
    Every sequence was counted with the room that it has, `capacity`. That is what is stored; a step reads the
    keys that are there.

    the capacity in place of the lengths, but for a window
        live = sum(lengths) → live = capacity * len(lengths)
    Without a window, all `capacity` slots of each sequence were counted. That is what the cache takes in
    memory; a step reads the keys that there are, sum(lengths).

    the bytes of the whole capacity
        live * a_key, live → capacity * len(lengths) * a_key, live
    The keys that are attended to were counted right, and the bytes for all `capacity` slots of each sequence.
    A kernel reads no slot without a key (and with a window no key behind it): bytes = live · bytes of a key.

    every sequence as long as the longest
        live = sum(lengths) → lengths = [max(lengths)] * len(lengths)
            live = sum(lengths)
    The longest sequence was taken times the batch. That is what a padded batch costs; a kernel that is told
    the lengths stops at each row's own end.

    the latent counted twice
        vector * config["number"] → 2 * vector * config["number"]
    A latent was counted as a key and as a value. It is stored once, and what was loaded for the score is
    still on the chip for the weighted sum: latent + rope numbers in all.

    a latent for each head
        vector * config["number"] → config["n_heads"] * vector * config["number"]
    The latent was multiplied by the heads. All heads read the same vector (each looks at it through its own
    up-projection, which is absorbed into the query): there is one per token.

    the latent without its RoPE part
        vector * config["number"] → config["latent"] * config["number"]
    The bytes of a latent were counted without the `rope` numbers beside it. They carry the
    position and are read for every score.

    sinks inside the window
        min(length, config["window"] + config["n_sinks"]) → min(length, config["window"])
    At most `window` keys were counted, the sinks among them. In this course they come on top: the newest
    `window` keys, and the first n_sinks as well.

    sinks for sequences that still see their beginning
        min(length, config["window"] + config["n_sinks"]) → min(length, config["window"]) + config["n_sinks"]
    min(length, window) + n_sinks counts the first keys twice as long as they are still in the window. A
    sequence never has more live keys than keys: min(length, window + n_sinks).

    every window full
        min(length, config["window"] + config["n_sinks"]) → config["window"] + config["n_sinks"]
    Every sequence was counted with window + n_sinks keys. A short one has fewer: min(length, …).

    the window ignored
        live = sum(min(length, config["window"] + config["n_sinks"]) for length in lengths) → pass
    All keys of a sequence were counted. With a window, a step reads the newest `window` and the sinks,
    however long the context is: that is why its time stays flat.

    keys only
        2 * config["n_kv_heads"] → config["n_kv_heads"]
    A factor of 2 is missing: a step reads the keys for the scores and the values for the weighted sum. (Only
    a latent is both at once.)

    two bytes per number, whatever is stored
        vector * config["number"] → vector * 2
        config["head_dim"] * config["number"] → config["head_dim"] * 2
    `number`, the bytes of a stored number, is not looked at. fp8 and int8 take 1, fp32 takes 4.

    the scales not counted
        + config["scale"] →
    A quantised key or value is read together with its scale, `scale` bytes: one for each key and each value
    of each KV head.

    scales for the keys only
        2 * config["n_kv_heads"] * (config["head_dim"] → config["n_kv_heads"] * (2 * config["head_dim"]
    One scale was counted for a key and its value together. They are quantised apart, each with a scale of its
    own: 2 · n_kv_heads scales a token.

    a scale for each number
        config["head_dim"] * config["number"] + config["scale"]
            → config["head_dim"] * (config["number"] + config["scale"])
    A scale was counted for every number. Then 8-bit numbers would save nothing: one scale serves the head_dim
    numbers of a key, or of a value.

    bits for bytes
        vector * config["number"] → vector * 8 * config["number"]
        config["head_dim"] * config["number"] → config["head_dim"] * 8 * config["number"]
    `number` is a number of bytes, and was multiplied by 8. The bytes are 8 times too many.

    the arithmetic of one head
        live * config["n_heads"] * a_head → live * a_head
    The FLOPs were counted for one head. Every query head computes its own scores and its own weighted sum:
    times n_heads.

    the RoPE part in the weighted sum
        2 * config["latent"] → 2 * vector
    The weighted sum of a latent was counted with its RoPE part. That part is for the scores alone; the value
    is the first `latent` numbers.

    the fixed cost for each sequence
        + gpu["fixed"] → + len(lengths) * gpu["fixed"]
    `fixed` was counted once for each sequence. The batch is one launch.

    a multiplication and its addition counted as one
        live * config["n_heads"] * a_head → live * config["n_heads"] * a_head // 2
    A factor of 2 is missing in the FLOPs: a product and its sum are two operations, and a GPU's peak is
    quoted that way.

    only the scores computed
        + 2 * config["latent"] →
        4 * config["head_dim"] → 2 * config["head_dim"]
    The FLOPs of q·k are there, those of the weighted sum of the values are missing: as many again (for a
    latent, without its RoPE part).

    the two times added
        max(n_bytes / gpu["bandwidth"], n_flops / gpu["flops"])
            → n_bytes / gpu["bandwidth"] + n_flops / gpu["flops"]
    Reading and computing were added. A GPU does both at once, while one tile is computed the next is on its
    way: the slower of the two counts, max(…).

    the faster of the two times
        max(n_bytes → min(n_bytes
    min was taken in place of max. The step is done when both are done.

    only the reading counts
        max(n_bytes / gpu["bandwidth"], n_flops / gpu["flops"]) → n_bytes / gpu["bandwidth"]
    The arithmetic was left out of the time. Most decode steps are bound by memory, and not all: with hundreds
    of heads on one KV head or latent, the tensor cores are the slower part.

    the fixed cost forgotten
        + gpu["fixed"] →
    `fixed` is missing: launching, the first bytes' way from memory and the merge take their microseconds
    however little there is to read, and at small sizes they are most of the time.

    the fixed cost inside the maximum
        n_flops / gpu["flops"]) + gpu["fixed"] → n_flops / gpu["flops"], gpu["fixed"])
    `fixed` was compared with the two times in place of being added. It comes before and after the reading,
    not beside it: max(…) + fixed.

    GiB called GB
        1e9 → 2**30
    gb_per_second was divided by 2³⁰. That is GiB; bandwidths are quoted in GB, 10⁹ bytes, and the 7% between
    them are more than the last improvement of most kernels.

    the floor's time in the bandwidth reached
        return { → seconds = max(n_bytes / gpu["bandwidth"], n_flops / gpu["flops"]) + gpu["fixed"]
            return {
        n_bytes / gpu["measured"] → n_bytes / seconds
    gb_per_second was taken from the floor. What a kernel reached is its bytes in the time that was
    *measured*; from the floor you get what it could reach at best.
    """,
)


# 11.2: Online softmax in a kernel


State = tuple[Tensor, Tensor, Tensor]
Body = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], State]


def walk(
    q: Tensor, k: Tensor, v: Tensor, body: Body, scale: float = LOG2E, start: float = -torch.inf
) -> Tensor:
    """``body(scores, v, m, total, acc)`` on every tile; ``scale`` is on top of 1/√D."""
    m, total, acc = q.new_full(q.shape[:1], start), q.new_zeros(len(q)), torch.zeros_like(q)
    for first in range(0, k.shape[1], BLOCK):
        tile = slice(first, first + BLOCK)
        scores = torch.einsum("bd,bnd->bn", q, k[:, tile]) * (scale * q.shape[1] ** -0.5)
        m, total, acc = body(scores, v[:, tile], m, total, acc)
    return acc / total[:, None]


def weigh(weights: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bn,bnd->bd", weights, v)


def step(scores: Tensor, v: Tensor, m: Tensor, total: Tensor, acc: Tensor) -> State:
    """The right body."""
    new = torch.maximum(m, scores.amax(1))
    weights, old = torch.exp2(scores - new[:, None]), torch.exp2(m - new)
    return new, total * old + weights.sum(1), acc * old[:, None] + weigh(weights, v)


online.mistakes(
    r"""
    the accumulator is not rescaled
        def online_attention(q, k, v):
            def body(scores, v, m, total, acc):
                new, total, right = step(scores, v, m, total, acc)
                return new, total, right + acc * (1 - torch.exp2(m - new))[:, None]

            return walk(q, k, v, body)
    When the maximum rises, `total` is brought down to the new one and `acc` is not: the values of earlier
    tiles weigh too much. Whatever was summed up under the old maximum must be multiplied by `tl.exp2(m -
    new)`, numerator and denominator alike.

    the sum is not rescaled
        def online_attention(q, k, v):
            def body(scores, v, m, total, acc):
                new, right, acc = step(scores, v, m, total, acc)
                return new, right + total * (1 - torch.exp2(m - new)), acc

            return walk(q, k, v, body)
    When the maximum rises, `acc` is brought down to the new one and `total` is not: the output comes out too
    small. Whatever was summed up under the old maximum must be multiplied by `tl.exp2(m - new)`, numerator
    and denominator alike.

    nothing is rescaled when the maximum rises
        def online_attention(q, k, v):
            def body(scores, v, m, total, acc):
                new = torch.maximum(m, scores.amax(1))
                weights = torch.exp2(scores - new[:, None])
                return new, total + weights.sum(1), acc + weigh(weights, v)

            return walk(q, k, v, body)
    Each tile is counted from the maximum known at the time, and the sums of earlier tiles stay as they are.
    Numbers that are relative to different maxima cannot be added: multiply `total` and `acc` by `tl.exp2(m -
    new)` first.

    exp2 without log₂e
        def online_attention(q, k, v):
            return walk(q, k, v, step, scale=1.0)
    exp was replaced by exp2 and the scores were left as they are, so every weight is 2^score in place of
    e^score: a softmax at a higher temperature. eˣ = 2^(x · log₂e): multiply the scores by LOG2E once.

    exp together with log₂e
        def online_attention(q, k, v):
            return walk(q, k, v, step, scale=LOG2E**2)
    The scores were multiplied by log₂e, and then `tl.exp` was taken of them: a softmax that is too sharp. The
    factor LOG2E belongs to `tl.exp2`, `tl.exp` needs none.

    the scale is forgotten
        def online_attention(q, k, v):
            return walk(q, k, v, step, scale=LOG2E * q.shape[1] ** 0.5)
    The products q·k went into the softmax without 1/√D, so it is too sharp. In a kernel the factor `scale *
    LOG2E` costs nothing: one multiplication serves the scale and the base.

    the scale is applied twice
        def online_attention(q, k, v):
            return walk(q, k, v, step, scale=LOG2E * q.shape[1] ** -0.5)
    The scores were divided by √D twice, that is, by D: the softmax is too flat. `scale` is 1/√D already.

    the scale upside down
        def online_attention(q, k, v):
            return walk(q, k, v, step, scale=LOG2E * q.shape[1])
    The scores were divided by `scale`, or multiplied by √D. `scale` is 1/√D already: multiply by it.

    the products neither scaled nor brought to base 2
        def online_attention(q, k, v):
            return walk(q, k, v, step, scale=q.shape[1] ** 0.5)
    exp2 was taken of the bare products q·k: 1/√D is missing, and log₂e too. What goes into exp2 is `scores *
    scale * LOG2E`.

    divided by the sum in every tile
        def online_attention(q, k, v):
            def body(scores, v, m, total, acc):
                new, total, acc = step(scores, v, m, total, acc)
                return new, total, acc / total[:, None]

            return walk(q, k, v, body)
    `acc` is divided by `total` inside the loop, and then once more behind it. Until the last tile has been
    seen the denominator is not known: keep `acc` a plain sum, and divide once, behind the loop (which also
    saves a division in every tile).

    the maximum is never below 0
        def online_attention(q, k, v):
            return walk(q, k, v, step, start=0.0)
    The running maximum starts at 0, so a row whose scores all lie far below 0 has nothing but exp2(−700) = 0,
    and 0 / 0 is NaN. A maximum starts at −∞, the largest number of none.

    NaN from the first tile on
        def online_attention(q, k, v):
            def body(scores, v, m, total, acc):
                new = torch.maximum(m, scores.amax(1))
                weights, old = torch.exp2(scores - m[:, None]), torch.exp2(m - new)
                return new, total * old + weights.sum(1), acc * old[:, None] + weigh(weights, v)

            return walk(q, k, v, body)
    Before the first tile m is −∞, and there are several ways from there to NaN. Weights from the *old*
    maximum, exp2(scores − m), are infinite. The factor upside down, exp2(new − m), is infinite, and ∞ · 0 is
    NaN. And if the tile's own maximum does not enter, `new` is still −∞. Weights are exp2(scores − new), the
    factor is exp2(m − new), new is finite: nothing is ever above 1.

    no maximum at all
        def online_attention(q, k, v):
            def body(scores, v, m, total, acc):
                weights = torch.exp2(scores)
                return m, total + weights.sum(1), acc + weigh(weights, v)

            return walk(q, k, v, body)
    The weights are exp of the scores themselves. On paper that is the formula; in fp32 exp(89) is infinite
    and exp(−104) is 0, so that large scores give ∞/∞ and low ones 0/0. Subtract the running maximum.

    this tile's maximum in place of the running one
        def online_attention(q, k, v):
            def body(scores, v, m, total, acc):
                new = scores.amax(1)
                weights, old = torch.exp2(scores - new[:, None]), torch.exp2(m - new)
                return new, total * old + weights.sum(1), acc * old[:, None] + weigh(weights, v)

            return walk(q, k, v, body)
    `new` is the maximum of this tile alone, and falls where the scores fall. Then exp2(m − new) is larger
    than 1, and overflows where the fall is deep. The running maximum is `tl.maximum(m, tl.max(scores,
    axis=0))` and never falls.

    rescaled after adding
        def online_attention(q, k, v):
            def body(scores, v, m, total, acc):
                new = torch.maximum(m, scores.amax(1))
                weights, old = torch.exp2(scores - new[:, None]), torch.exp2(m - new)
                return new, (total + weights.sum(1)) * old, (acc + weigh(weights, v)) * old[:, None]

            return walk(q, k, v, body)
    The factor exp2(m − new) was applied to the sums after this tile's share had been added, so it shrinks
    that share too (in the first tile: to 0). Only what was there before has the old maximum.

    only the last tile counts
        def online_attention(q, k, v):
            return walk(q, k[:, -BLOCK:], v[:, -BLOCK:], step)
    Only the last 16 keys are left. Either `acc` and `total` are set in each tile and not added to, or `m`
    keeps its −∞ (the line `m = new` is missing), so that the factor exp2(m − new) is always 0.

    the unweighted mean of the values
        def online_attention(q, k, v):
            return v.mean(1)
    Every key has the same weight: the scores do not enter, or cancel out. Each value is weighted by
    exp2(score − new) of its own key, `weights[:, None] * v`.
    """,
    BLOCK=BLOCK,
    LOG2E=LOG2E,
    step=step,
    walk=walk,
    weigh=weigh,
)


# 11.3: Masks at the tail


def rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    live: Tensor,
    masked_score: float = -torch.inf,
    tiles: Tensor | None = None,
    guard: bool = True,
    load_all_values: bool = False,
) -> Tensor:
    """Attention over the keys where ``live`` (B, S) holds; the others, as far as ``tiles`` reach, are loaded
    as 0 and have the score ``masked_score``."""
    seen = live if tiles is None else live | tiles
    keys = torch.where(live[..., None], k, 0.0)
    scores = torch.einsum("bd,bsd->bs", q, keys) * q.shape[1] ** -0.5
    scores = scores.masked_fill(seen & ~live, masked_score).masked_fill(~seen, -torch.inf)
    top = scores.amax(1, keepdim=True).nan_to_num(neginf=0.0)
    weights = (scores - top).exp()
    loaded = (seen if load_all_values else live)[..., None]
    acc = torch.einsum("bs,bsd->bd", weights, torch.where(loaded, v, 0.0))
    total = weights.sum(1, keepdim=True)
    return acc / (torch.where(total == 0, 1.0, total) if guard else total)


def below(k: Tensor, ends: Tensor) -> Tensor:
    return torch.arange(k.shape[1], device=k.device) < ends[:, None]


def tiles_of(k: Tensor, lengths: Tensor) -> Tensor:
    """The keys that lie in a tile which the loop visits."""
    return below(k, (lengths + BLOCK - 1) // BLOCK * BLOCK)


def within(k: Tensor, ends: Tensor) -> None:
    """The interpreter's error where a kernel reads up to key ``ends[b]``, beyond the last row's memory."""
    if int(ends[-1]) > k.shape[1]:
        raise IndexError("a read behind the end of the cache")


@tail.misconception("no mask")
def no_mask(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, guard: bool = True) -> Tensor:
    """The whole last tile counts, with the keys that are behind the length: another row's, an earlier
    prompt's, or NaN. Mask the loads of K and V, and set the masked scores to −∞."""
    within(k, (lengths + BLOCK - 1) // BLOCK * BLOCK)
    return rows(q, k, v, tiles_of(k, lengths), guard=guard)


@tail.misconception("the values loaded without a mask")
def values_unmasked(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, guard: bool = True) -> Tensor:
    """The scores are masked, so the weights behind the length are 0, but V is loaded as it is, and
    0 · NaN is NaN (0 · ∞ too). Old memory may hold anything: mask the load of V as well."""
    within(v, (lengths + BLOCK - 1) // BLOCK * BLOCK)
    return rows(q, k, v, below(k, lengths), tiles=tiles_of(k, lengths), load_all_values=True, guard=guard)


tail.mistakes(
    r"""
    a masked score of 0
        def ragged_attention(q, k, v, lengths):
            return rows(q, k, v, below(k, lengths), masked_score=0.0, tiles=tiles_of(k, lengths))
    The loads are masked with `other=0.0`, so masked keys have the score 0. That is a score like any other,
    and exp2(0 − m) is a weight: it makes the sum too large and the output too small. Only −∞ becomes the
    weight 0.

    masked by the capacity
        def ragged_attention(q, k, v, lengths):
            return rows(q, k, v, tiles_of(k, lengths))
    Keys count up to the room that a row has, not up to its length. Nothing is read out of range, and yet the
    slots in between hold no keys of this sequence: the mask is `n < length`.

    one key too many
        def ragged_attention(q, k, v, lengths):
            within(k, torch.where(lengths % BLOCK == 0, lengths, lengths + 1))
            return rows(q, k, v, below(k, lengths + 1) & tiles_of(k, lengths))
    The mask is n <= length. Keys are numbered from 0, so key number `length` is the first one that is not
    there.

    the last key is lost
        def ragged_attention(q, k, v, lengths):
            return rows(q, k, v, below(k, lengths - 1))
    The mask is n < length − 1. Keys are numbered from 0, so length − 1 is the number of the last live key,
    the newest token: it sees itself.

    the last, partial tile is dropped
        def ragged_attention(q, k, v, lengths):
            return rows(q, k, v, below(k, lengths // BLOCK * BLOCK))
    Only tiles that are full count, and the newest tokens, which matter most, are lost. The last tile is
    loaded with a mask.

    the index in the tile compared with the length
        def ragged_attention(q, k, v, lengths):
            within(k, torch.where(lengths < BLOCK, lengths, (lengths + BLOCK - 1) // BLOCK * BLOCK))
            index = torch.arange(k.shape[1], device=k.device) % BLOCK
            return rows(q, k, v, (index < lengths[:, None]) & tiles_of(k, lengths))
    `tl.arange(0, BLOCK) < length` compares the place in the tile, 0 to 15, with the length of the row. From
    the second tile on it is always true. The key's number is `n = start + tl.arange(0, BLOCK)`.

    the mask upside down
        def ragged_attention(q, k, v, lengths):
            return torch.where((lengths < BLOCK)[:, None], 0.0, torch.nan).expand_as(q).clone()
    The live keys got −∞ and the others were kept. A tile whose keys are all live then has nothing but −∞, and
    −∞ − (−∞) is NaN. `tl.where(condition, a, b)` gives a where the condition holds.

    length 0 divides by 0
        def ragged_attention(q, k, v, lengths):
            return rows(q, k, v, below(k, lengths), guard=False)
    A row without keys never enters the loop, so both its sums are 0, and 0 / 0 is NaN. Such rows are real: a
    slot of the batch that waits for its next request. Divide by 1 there.

    a masked score of 0, and length 0 divides by 0
        def ragged_attention(q, k, v, lengths):
            return rows(q, k, v, below(k, lengths), masked_score=0.0, tiles=tiles_of(k, lengths), guard=False)
    Two mistakes. Masked keys have the score 0, and exp2(0 − m) is a weight: set them to −∞. And a row without
    keys divides 0 by 0: divide by 1 there.

    values unmasked, and length 0 divides by 0
        def ragged_attention(q, k, v, lengths):
            return values_unmasked(q, k, v, lengths, guard=False)
    Two mistakes. V is loaded as it is, and a weight of 0 times NaN is NaN: mask that load too. And a row
    without keys divides 0 by 0: divide by 1 there.

    no mask, and length 0 divides by 0
        def ragged_attention(q, k, v, lengths):
            return no_mask(q, k, v, lengths, guard=False)
    Two mistakes. The whole last tile counts, with whatever lies behind the length: mask the loads of K and V,
    and set the masked scores to −∞. And a row without keys divides 0 by 0: divide by 1 there.
    """,
    below=below,
    BLOCK=BLOCK,
    no_mask=no_mask,
    rows=rows,
    tiles_of=tiles_of,
    values_unmasked=values_unmasked,
    within=within,
)


# 11.4: Pack the query heads of one KV head


def grouped(
    q: Tensor, k: Tensor, v: Tensor, owner: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Every query head h with KV head ``owner[h]``; right without further arguments."""
    if owner is None:
        owner = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])
    scores = torch.einsum("bhd,bhsd->bhs", q, k[:, owner]) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhs,bhsd->bhd", weights / weights.sum(-1, keepdim=True), v[:, owner])


def packing_sizes(q: Tensor, k: Tensor) -> tuple[int, int]:
    """Group and KV heads."""
    return q.shape[1] // k.shape[1], k.shape[1]


packing.mistakes(
    r"""
    heads dealt out in turn
        def grouped_attention(q, k, v):
            return grouped(q, k, v, torch.arange(q.shape[1], device=q.device) % k.shape[1])
    The rows of program g were the heads g, g + G, g + 2G, …, so head h reads KV head h % G. That is `repeat`;
    the models use `repeat_interleave`: neighbours share, head h reads KV head h // group.

    every program takes the first group
        def grouped_attention(q, k, v):
            group, _ = packing_sizes(q, k)
            out = torch.full_like(q, torch.nan)
            out[:, :group] = grouped(
                q[:, :group], k[:, :1], v[:, :1]
            )  # programs run backwards here: g = 0 is last
            return out
    The heads are `rows` alone, without g · GROUP: every program works on the first group of query heads, and
    nobody writes the others (they are still NaN). Row r of program g is head g · GROUP + r.

    heads begin at g, not at g · GROUP
        def grouped_attention(q, k, v):
            group, G = packing_sizes(q, k)
            heads = torch.arange(q.shape[1], device=q.device)
            out = grouped(q, k, v, (heads - group + 1).clamp(0, G - 1))  # g = 0 is last to write
            return out.masked_fill((heads >= G - 1 + group)[:, None], torch.nan)
    Program g took the heads g, g + 1, …, so that groups overlap and the last heads are written by nobody
    (they are still NaN). Before group g there are g whole groups: g · GROUP + r.

    the sequence is missing
        def grouped_attention(q, k, v):
            out = torch.full_like(q, torch.nan)
            out[:1] = grouped(q[:1], k[:1], v[:1])
            return out
    The heads were taken without b, so every program works on the queries of sequence 0 and stores there; the
    other sequences are still NaN. Head h of sequence b is row b · H + h of Q and of OUT.

    padded columns are stored
        def grouped_attention(q, k, v):
            group, _ = packing_sizes(q, k)
            B, H, D = q.shape
            out = grouped(q, k, v).reshape(B * H, D)
            out[group::group, : max(16, 1 << (D - 1).bit_length()) - D] = 0.0
            return out.view(B, H, D)
    The store is masked in its rows only. Column D of one head is column 0 of the next: the zeros from the
    padding of a group's last head land on the group that follows. Mask with d < D too.

    padded rows are stored
        def grouped_attention(q, k, v):
            B, H, D = q.shape
            group, G = packing_sizes(q, k)
            right = grouped(q, k, v)
            out = q.new_full((B * H + ROWS, D), torch.nan)
            for pair in reversed(range(B * G)):
                b, g = divmod(pair, G)
                out[pair * group : pair * group + ROWS] = v[b, g].mean(
                    0
                )  # the scores of a row of zeros are all 0
                out[pair * group : (pair + 1) * group] = right[b, g * group : (g + 1) * group]
            return out[: B * H].view(B, H, D)
    The tile has 16 rows and the group has fewer, and all 16 are stored: what is computed from padding lands
    on the heads that follow. On a GPU the programs run in any order, so the damage changes from run to run
    (here they run backwards, and it always shows). Mask the store with rows < GROUP.

    the group rounded down to a power of two
        def grouped_attention(q, k, v):
            group, _ = packing_sizes(q, k)
            kept = torch.arange(q.shape[1], device=q.device) % group < 1 << (group.bit_length() - 1)
            return grouped(q, k, v).masked_fill(~kept[:, None], torch.nan)
    Of groups of 3, 5, 6 and 7 only the first 2 or 4 heads are computed, and the others are still NaN. Tiles
    have sizes that are powers of two, groups have not: take the tile larger, 16 rows, and mask.

    scaled by the padded head dim
        def grouped_attention(q, k, v):
            return grouped(q, k, v, scale=max(16, 1 << (q.shape[-1] - 1).bit_length()) ** -0.5)
    The scale is 1/√BLOCK_D, the width of the tile. The padding adds zeros to a product, not spread: what
    counts is the head dim of the model, 1/√D.

    exp2 without log₂e
        def grouped_attention(q, k, v):
            return grouped(q, k, v, scale=q.shape[-1] ** -0.5 / 1.4426950408889634)
    The scores go into exp2 as they are, so every weight is 2^score in place of e^score. eˣ = 2^(x · log₂e):
    the factor is `scale * LOG2E`.

    neither the scale nor log₂e
        def grouped_attention(q, k, v):
            return grouped(q, k, v, scale=1 / 1.4426950408889634)
    The bare products go into exp2: 1/√D is missing, and log₂e too. What exp2 wants is the product times
    `scale * LOG2E`, with scale = 1/√D.

    the scale is forgotten
        def grouped_attention(q, k, v):
            return grouped(q, k, v, scale=1.0)
    The products q·k went into the softmax without 1/√D, so it is too sharp. In a kernel the factor costs
    nothing: D ** −0.5 · LOG2E is one number.

    one head's output in all rows
        def grouped_attention(q, k, v):
            group, _ = packing_sizes(q, k)
            first = torch.arange(q.shape[1], device=q.device) // group * group
            return grouped(q[:, first], k, v)
    All heads of a group gave the same: the query of the first head is in every row. The pointers need
    each row's own head, `h[:, None] * D`, not the scalar g · GROUP.

    the scale upside down
        def grouped_attention(q, k, v):
            return grouped(q, k, v, scale=q.shape[-1] ** 0.5)
    The scores were multiplied by √D and not divided by it: D ** −0.5.

    acc added twice
        def grouped_attention(q, k, v):
            doubled = torch.where(
                torch.arange(k.shape[2], device=q.device) < (k.shape[2] - 1) // ROWS * ROWS, 2.0, 1.0
            )
            return grouped(q, k, v * doubled[:, None])
    `tl.dot(weights, v, acc)` already adds to acc; with `acc +=` in front, all earlier tiles count double.
    Either `acc = tl.dot(weights, v, acc)` or `acc += tl.dot(weights, v)`.

    the last tile in place of the sum of all
        def grouped_attention(q, k, v):
            start = (k.shape[2] - 1) // ROWS * ROWS
            group, _ = packing_sizes(q, k)
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            scores = torch.einsum("bhd,bhsd->bhs", q, k) * q.shape[-1] ** -0.5
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            share = torch.einsum("bhs,bhsd->bhd", weights[..., start:], v[:, :, start:])
            return share / weights.sum(-1, keepdim=True)
    `acc` is set in each tile: `tl.dot(weights, v)` is this tile's share alone. Add it to what is there: `acc
    + tl.dot(weights, v)`, or hand acc to the product, `tl.dot(weights, v, acc)`.
    """,
    grouped=grouped,
    packing_sizes=packing_sizes,
    ROWS=ROWS,
)


@packing.misconception("the transpose is missing")
def untransposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The product was q · k in place of q · kᵀ. With a tile of 16 keys and 16 columns the shapes fit, and the
    numbers mean nothing; with other sizes it raises. `tl.dot` sums over the columns of the first and the
    *rows* of the second: `tl.trans(k)`."""
    B, _, D = q.shape
    if D > ROWS:
        raise ValueError("the shapes of q and k do not fit")
    group, G = packing_sizes(q, k)
    S = k.shape[2]
    wide = -(-S // ROWS) * ROWS
    k = (
        torch.nn.functional.pad(k, (0, ROWS - D, 0, wide - S))
        .view(B, G, -1, ROWS, ROWS)
        .repeat_interleave(group, 1)
    )
    scores = torch.einsum("bhd,bhtde->bhte", torch.nn.functional.pad(q, (0, ROWS - D)), k).flatten(2)[..., :S]
    weights = (scores * D**-0.5 - (scores * D**-0.5).amax(-1, keepdim=True)).exp()
    return torch.einsum(
        "bhs,bhsd->bhd", weights / weights.sum(-1, keepdim=True), v.repeat_interleave(group, 1)
    )


# 11.5: Split the context, merge the parts


Pair = tuple[Tensor, Tensor]
Bounds = Callable[[int, int, int, int], tuple[int, int]]  # of (split, n_splits, length, capacity)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def right_bounds(split: int, n_splits: int, length: int, capacity: int) -> tuple[int, int]:
    each = cdiv(cdiv(length, BLOCK), n_splits) * BLOCK
    return split * each, min((split + 1) * each, length)


def parts_of(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int, bounds: Bounds = right_bounds
) -> Pair:
    """The first kernel's results: (B, splits, D) normalised, and lse (B, splits) in base 2."""
    parts = q.new_zeros(len(q), n_splits, q.shape[1])
    lse = q.new_full((len(q), n_splits), -torch.inf)
    scores = torch.einsum("bd,bsd->bs", q, k) * (q.shape[1] ** -0.5 * LOG2E)
    for b, length in enumerate(lengths.tolist()):
        for split in range(n_splits):
            lo, hi = bounds(split, n_splits, length, k.shape[1])
            if lo < min(hi, k.shape[1]):
                top = scores[b, lo:hi].max()
                weights = torch.exp2(scores[b, lo:hi] - top)
                parts[b, split] = weights @ v[b, lo:hi] / weights.sum()
                lse[b, split] = top + weights.sum().log2()
    return parts, lse


def merge(parts: Tensor, lse: Tensor, guard: bool = True) -> Tensor:
    top = lse.amax(1, keepdim=True)
    weights = torch.exp2(lse - (top.nan_to_num(neginf=0.0) if guard else top))
    total = weights.sum(1, keepdim=True)
    out = torch.einsum("bn,bnd->bd", weights, parts)
    return out / (torch.where(total == 0, 1.0, total) if guard else total)


def split_by(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int, bounds: Bounds) -> Pair:
    parts, lse = parts_of(q, k, v, lengths, n_splits, bounds)
    return merge(parts, lse), lse


splits.mistakes(
    r"""
    the keys per split rounded down
        def split_attention(q, k, v, lengths, n_splits):
            def bounds(split, n_splits, length, capacity):
                each = length // n_splits
                return split * each, (split + 1) * each

            return split_by(q, k, v, lengths, n_splits, bounds)
    Each split gets length // n_splits keys, and what is left over belongs to nobody: the newest tokens are
    lost. Round up, `tl.cdiv`, and cut the last split off at the length.

    the tiles per split rounded down
        def split_attention(q, k, v, lengths, n_splits):
            def bounds(split, n_splits, length, capacity):
                each = cdiv(length, BLOCK) // n_splits * BLOCK
                return split * each, min((split + 1) * each, length)

            return split_by(q, k, v, lengths, n_splits, bounds)
    Each split gets tiles // n_splits tiles, and the tiles left over belong to nobody (with fewer tiles than
    splits that is all of them). Round up: `tl.cdiv(tiles, n_splits)`.

    the partial tile is lost
        def split_attention(q, k, v, lengths, n_splits):
            def bounds(split, n_splits, length, capacity):
                each = cdiv(length // BLOCK, n_splits) * BLOCK
                return split * each, min((split + 1) * each, length)

            return split_by(q, k, v, lengths, n_splits, bounds)
    Tiles were counted as length // BLOCK, without the last one, which is not full. The newest tokens are in
    it: `tl.cdiv(length, BLOCK)`.

    the ends not cut off at the length
        def split_attention(q, k, v, lengths, n_splits):
            def bounds(split, n_splits, length, capacity):
                each = cdiv(cdiv(length, BLOCK), n_splits) * BLOCK
                return split * each, (split + 1) * each

            return split_by(q, k, v, lengths, n_splits, bounds)
    `hi` is a multiple of the tile, so the last split goes on behind the row's keys: the mask in the loop is
    `n < hi`. `tl.minimum(…, length)` ends it.

    every split begins at 0
        def split_attention(q, k, v, lengths, n_splits):
            def bounds(split, n_splits, length, capacity):
                return 0, right_bounds(split, n_splits, length, capacity)[1]

            return split_by(q, k, v, lengths, n_splits, bounds)
    The ends are right and the beginnings are not: every split counts the keys of the ones before it too. A
    key belongs to exactly one split; split number s begins where s − 1 ends.

    neighbours share a key
        def split_attention(q, k, v, lengths, n_splits):
            def bounds(split, n_splits, length, capacity):
                lo, hi = right_bounds(split, n_splits, length, capacity)
                return lo, min(hi + 1, length) if lo < hi else hi

            return split_by(q, k, v, lengths, n_splits, bounds)
    `hi` is taken as the last key and not as the one behind it, so the key at each boundary counts in two
    splits. The mask is `n < hi`: the split ends before hi.

    split by the capacity
        def split_attention(q, k, v, lengths, n_splits):
            def bounds(split, n_splits, length, capacity):
                each = cdiv(cdiv(capacity, BLOCK), n_splits) * BLOCK
                return split * each, min((split + 1) * each, length)

            return split_by(q, k, v, lengths, n_splits, bounds)
    The splits divide the room that a row has, not its length. The result is right, but a row that fills a
    third of its room leaves two thirds of its programs idle: the length belongs into the division.

    the first split does everything
        def split_attention(q, k, v, lengths, n_splits):
            return split_by(
                q, k, v, lengths, n_splits, lambda s, n, length, c: (0, length) if s == 0 else (0, 0)
            )
    The first split goes from 0 to the length and the others get nothing. The result is right, and no time is
    saved: one program still reads all keys, one tile after the other.

    cut in the middle of a tile
        def split_attention(q, k, v, lengths, n_splits):
            def bounds(split, n_splits, length, capacity):
                each = cdiv(length, n_splits)
                return split * each, min((split + 1) * each, length)

            return split_by(q, k, v, lengths, n_splits, bounds)
    Each split got ⌈length / n_splits⌉ keys. The result is right, but the cuts fall inside tiles: every split
    ends in a partial tile of its own, and its loads no longer begin where memory likes them to. Count in
    tiles.

    tiles taken for keys
        def split_attention(q, k, v, lengths, n_splits):
            def bounds(split, n_splits, length, capacity):
                each = cdiv(cdiv(length, BLOCK), n_splits)
                return split * each, min((split + 1) * each, length)

            return split_by(q, k, v, lengths, n_splits, bounds)
    The share of a split was counted in tiles and used as a number of keys: a sixteenth of the row is read.
    `lo` and `hi` are keys, so multiply by BLOCK.

    the plain mean of the parts
        def split_attention(q, k, v, lengths, n_splits):
            parts, lse = parts_of(q, k, v, lengths, n_splits)
            return parts.mean(1), lse
    Every part has the weight 1/splits, the empty ones too. A part weighs what its keys weigh together, 2^lse:
    that is what the lse is stored for.

    the parts added up
        def split_attention(q, k, v, lengths, n_splits):
            parts, lse = parts_of(q, k, v, lengths, n_splits)
            return parts.sum(1), lse
    The parts are added as they are. Each is a mean over its own keys already; the mean over all of them lies
    in between, with weights that add up to 1.

    not divided by the sum of the weights
        def split_attention(q, k, v, lengths, n_splits):
            parts, lse = parts_of(q, k, v, lengths, n_splits)
            weights = torch.exp2(lse - lse.amax(1, keepdim=True).nan_to_num(neginf=0.0))
            return torch.einsum("bn,bnd->bd", weights, parts), lse
    The parts are weighted by exp2(lse − top) and added, but those weights add up to more than 1. Divide by
    their sum: it is the softmax's denominator over all keys.

    weighted by lse, not by 2^lse
        def split_attention(q, k, v, lengths, n_splits):
            parts, lse = parts_of(q, k, v, lengths, n_splits)
            total = lse.sum(1, keepdim=True)
            return torch.einsum("bn,bnd->bd", lse, parts) / torch.where(total == 0, 1.0, total), lse
    The weights are the log-sum-exps themselves. They are logarithms, may be negative, and of an empty split
    are −∞ (which gives NaN): the parts weigh 2^lse.

    no maximum in the merge
        def split_attention(q, k, v, lengths, n_splits):
            parts, lse = parts_of(q, k, v, lengths, n_splits)
            weights = torch.exp2(lse)
            total = weights.sum(1, keepdim=True)
            return torch.einsum("bn,bnd->bd", weights, parts) / torch.where(total == 0, 1.0, total), lse
    exp2 is taken of the log-sum-exps themselves: infinite above 128, 0 below −150, and then ∞/∞ or nothing at
    all is left. Subtract the largest of them first: only differences matter.

    no maximum in the merge, and 0 / 0
        def split_attention(q, k, v, lengths, n_splits):
            parts, lse = parts_of(q, k, v, lengths, n_splits)
            weights = torch.exp2(lse)
            return torch.einsum("bn,bnd->bd", weights, parts) / weights.sum(1, keepdim=True), lse
    exp2 is taken of the log-sum-exps themselves: infinite above 128, 0 below −150, and then ∞/∞ or 0/0 is
    NaN. Subtract the largest of them first. A row of length 0 divides 0 by 0 as well: divide by 1 there.

    −∞ − (−∞) = NaN
        def split_attention(q, k, v, lengths, n_splits):
            parts, lse = parts_of(q, k, v, lengths, n_splits)
            return merge(parts, lse, guard=False), lse
    In a row of length 0 every part has the lse −∞, so their maximum is −∞ too, and −∞ − (−∞) is NaN (or the
    weights are all 0, and 0 / 0 is). A slot of the batch that waits for its next request is such a row.

    e in place of 2
        def split_attention(q, k, v, lengths, n_splits):
            parts, lse = parts_of(q, k, v, lengths, n_splits)
            return merge(parts, lse * LOG2E), lse
    The lse of the parts is a logarithm to base 2, and exp was taken of it. The weights are `tl.exp2(lse -
    top)`: what was counted in base 2 is merged in base 2.

    padding weighs as a split
        def split_attention(q, k, v, lengths, n_splits):
            parts, lse = parts_of(q, k, v, lengths, n_splits)
            wide = (1 << (n_splits - 1).bit_length()) - n_splits
            return merge(
                torch.nn.functional.pad(parts, (0, 0, 0, wide)), torch.nn.functional.pad(lse, (0, wide))
            ), lse
    The number of splits was rounded up to a power of two, and the lse of what is only padding was loaded as
    0, not as −∞: 2^0 is a weight. `tl.load(…, mask=s < n_splits, other=float("-inf"))`.

    only the strongest part
        def split_attention(q, k, v, lengths, n_splits):
            parts, lse = parts_of(q, k, v, lengths, n_splits)
            return parts[torch.arange(len(q), device=q.device), lse.argmax(1)], lse
    The part with the largest lse was taken for the whole. The others have weights too, exp2(lse − top), and
    for parts with as many keys they are not small.

    every row weighs by the first row's lse
        def split_attention(q, k, v, lengths, n_splits):
            parts, lse = parts_of(q, k, v, lengths, n_splits)
            return merge(parts, lse[:1].expand(len(q), -1)), lse
    The lse was loaded without the row, so all rows weigh their parts as the first one does. Row b's splits
    begin at b · n_splits.
    """,
    BLOCK=BLOCK,
    cdiv=cdiv,
    LOG2E=LOG2E,
    merge=merge,
    parts_of=parts_of,
    right_bounds=right_bounds,
    split_by=split_by,
)


# 11.6: Walk the page table


# (table, b, g, n, page, G) -> the number of the (page, head, slot) in the flattened pool, for the keys n
Walk = Callable[[Tensor, int, int, Tensor, int, int], Tensor]


def entry(table: Tensor, row: int, index: Tensor) -> Tensor:
    """Entries of the table, which is one piece of memory: the next row follows at once."""
    at = row * table.shape[1] + index
    if int(at.max()) >= table.numel():
        raise IndexError("a read behind the table")
    return table.flatten()[at].long()


def pages_right(table: Tensor, b: int, g: int, n: Tensor, page: int, G: int) -> Tensor:
    return (entry(table, b, n // page) * G + g) * page + n % page


def through(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor, walk: Walk, ends: Tensor | None = None
) -> Tensor:
    """Attention to the keys where ``walk`` finds them, up to ``ends`` (the lengths) in each row."""
    _, G, page, D = k.shape
    keys, values, rows = k.reshape(-1, D), v.reshape(-1, D), []
    before = first_block(table, k) * G * page
    if before:  # the pool is the end of a larger one, of which nothing else is there
        keys, values = (torch.cat((x, torch.full_like(x[:1], torch.nan))) for x in (keys, values))
    for b, end in enumerate((lengths if ends is None else ends).tolist()):
        for g in range(G):
            at = walk(table, b, g, torch.arange(end, device=q.device), page, G) - before
            if before:
                at = torch.where((at < 0) | (at >= len(keys)), len(keys) - 1, at)
            if int(at.max()) >= len(keys) or int(at.min()) < 0:
                raise IndexError("a read behind the pool")
            scores = keys[at] @ q[b, g] * D**-0.5
            weights = (scores - scores.max()).exp()
            rows.append(weights @ values[at] / weights.sum())
    return torch.stack(rows).view_as(q)


def narrow(x: Tensor) -> Tensor:
    """The value wrapped to 32 bits."""
    return (x + 2**31) % 2**32 - 2**31


pages.mistakes(
    r"""
    a block number of 32 bits
        def paged_attention(q, k_pages, v_pages, table, lengths):
            D = q.shape[-1]

            def walk(*place):
                return narrow(pages_right(*place) * D) // D

            return through(q, k_pages, v_pages, table, lengths, walk)
    The place in the pool was counted in 32 bits, as the table's entries come, or made wider when it was
    multiplied already. Behind 2³¹ numbers, 8 GiB in fp32, it wraps round and points before the pool:
    `.to(tl.int64)` belongs to the block number, before the first product.

    widened before the last product alone
        def paged_attention(q, k_pages, v_pages, table, lengths):
            def walk(*place):
                return narrow(pages_right(*place))

            return through(q, k_pages, v_pages, table, lengths, walk)
    The slot's number, (page · G + g) · PAGE + n % PAGE, was made in 32 bits and widened only to be multiplied
    by D. That serves pools of D times as many numbers, and then wraps round as well: widen the block number
    itself.

    widened after the first product
        def paged_attention(q, k_pages, v_pages, table, lengths):
            def walk(table, b, g, n, page, G):
                return (narrow(entry(table, b, n // page) * G) + g) * page + n % page

            return through(q, k_pages, v_pages, table, lengths, walk)
    page · G was made in 32 bits, and what follows in 64. A product is as wide as its factors, so it had
    wrapped round before it was widened: `.to(tl.int64)` belongs to the block number itself.

    page and slot swapped
        def paged_attention(q, k_pages, v_pages, table, lengths):
            return through(
                q,
                k_pages,
                v_pages,
                table,
                lengths,
                lambda t, b, g, n, page, G: (entry(t, b, n % page) * G + g) * page + n // page,
            )
    n % PAGE was taken for the page and n // PAGE for the slot. Neighbouring keys are on the *same* page:
    the page is n // PAGE, which changes rarely, the slot is n % PAGE.

    logical pages taken for physical ones
        def paged_attention(q, k_pages, v_pages, table, lengths):
            return through(
                q,
                k_pages,
                v_pages,
                table,
                lengths,
                lambda t, b, g, n, page, G: (n // page * G + g) * page + n % page,
            )
    n // PAGE counts the pages of the *sequence*. Where its page number 3 is in the pool is what the table
    says; only a sequence that was there first has them in order. Look it up.

    every sequence reads the first one's table
        def paged_attention(q, k_pages, v_pages, table, lengths):
            return through(
                q,
                k_pages,
                v_pages,
                table,
                lengths,
                lambda t, b, g, n, page, G: pages_right(t, 0, g, n, page, G),
            )
    The row of the table is missing, so all sequences walk through the pages of the first: one reads another's
    context, and that is a leak, not only a wrong number. Entry j of row b is at b · max_pages + j.

    the table's rows one entry apart
        def paged_attention(q, k_pages, v_pages, table, lengths):
            def walk(table, b, g, n, page, G):
                return (entry(table, 0, n // page + b) * G + g) * page + n % page

            return through(q, k_pages, v_pages, table, lengths, walk)
    The table was read at `TABLE + b + …`. It is (B, max_pages): from one sequence's row to the next it is
    max_pages entries.

    one page for the whole tile
        def paged_attention(q, k_pages, v_pages, table, lengths):
            def walk(table, b, g, n, page, G):
                return (entry(table, b, n // BLOCK * BLOCK // page) * G + g) * page + n % page

            return through(q, k_pages, v_pages, table, lengths, walk)
    The page was looked up once for the tile, at its first key. That is right as long as a page is a whole
    number of tiles; with smaller pages a tile spans several, and every key needs its own entry: load a tile
    of entries, `TABLE + b * max_pages + n // PAGE`.

    the last page counts whole
        def paged_attention(q, k_pages, v_pages, table, lengths):
            page = k_pages.shape[2]
            ends = torch.minimum((lengths + page - 1) // page * page, (lengths + BLOCK - 1) // BLOCK * BLOCK)
            return through(q, k_pages, v_pages, table, lengths, pages_right, ends)
    Every slot of the last page has a weight, also those that hold no key yet (or an earlier owner's). The
    mask is `n < length`; pages are how memory is handed out, not how long a sequence is.

    a page has one head's size
        def paged_attention(q, k_pages, v_pages, table, lengths):
            def walk(table, b, g, n, page, G):
                return (entry(table, b, n // page) + g) * page + n % page

            return through(q, k_pages, v_pages, table, lengths, walk)
    The stride from page to page was taken as PAGE · D. A page of this pool holds all KV heads, (G, PAGE, D),
    so the next one is G · PAGE · D numbers further.

    the KV head is missing
        def paged_attention(q, k_pages, v_pages, table, lengths):
            return through(
                q,
                k_pages,
                v_pages,
                table,
                lengths,
                lambda t, b, g, n, page, G: pages_right(t, b, 0, n, page, G),
            )
    Every program reads the keys of KV head 0. Inside a page the heads are one after the other, PAGE · D
    numbers apart: add `g * PAGE * D`.

    slots before heads
        def paged_attention(q, k_pages, v_pages, table, lengths):
            def walk(table, b, g, n, page, G):
                return (entry(table, b, n // page) * page + n % page) * G + g

            return through(q, k_pages, v_pages, table, lengths, walk)
    The pool was read as (blocks, PAGE, G, D): one slot further G · D, one head further D. Here a head's keys
    are together, (blocks, G, PAGE, D), so that a tile is one long stretch of memory.

    the page in the tile looked up by its index
        def paged_attention(q, k_pages, v_pages, table, lengths):
            def walk(table, b, g, n, page, G):
                return pages_right(table, b, g, n % BLOCK, page, G)

            return through(q, k_pages, v_pages, table, lengths, walk)
    The place in the tile, 0 to 15, went into the division in place of the key's number, so every tile reads
    the first pages again. A key's number is `n = start + tl.arange(0, BLOCK)`.

    one key too many
        def paged_attention(q, k_pages, v_pages, table, lengths):
            ends = torch.minimum(lengths + 1, (lengths + BLOCK - 1) // BLOCK * BLOCK)
            return through(q, k_pages, v_pages, table, lengths, pages_right, ends)
    The mask is n <= length. Keys are numbered from 0, so key number `length` is the first one that is not
    there.

    the whole last tile counts
        def paged_attention(q, k_pages, v_pages, table, lengths):
            return through(
                q, k_pages, v_pages, table, lengths, pages_right, (lengths + BLOCK - 1) // BLOCK * BLOCK
            )
    Every key of the last tile has a weight, though the sequence ends inside it: what the table says behind
    the last page is followed too. The mask is `n < length`.
    """,
    BLOCK=BLOCK,
    entry=entry,
    narrow=narrow,
    pages_right=pages_right,
    through=through,
)


# 11.7: Choose the number of splits


choose.mistakes(
    r"""
    query heads counted
        len(lengths) * n_kv_heads → len(lengths) * n_heads
    The programs were counted with n_heads. A program serves a whole group of query heads (exercise 11.4), so
    there are only batch · n_kv_heads of them, and the machine stays emptier than you think.

    the batch not counted
        len(lengths) * n_kv_heads → n_kv_heads
    The programs were counted for one sequence. Every sequence of the batch brings its own, and a large batch
    fills the machine without any splits.

    the KV heads not counted
        len(lengths) * n_kv_heads → len(lengths)
    The programs were counted as one per sequence. Every KV head has a program of its own: batch · n_kv_heads.

    the resident programs forgotten
        multiprocessors * resident → multiprocessors
    A wave was taken to be one program a multiprocessor. As many as fit run side by side on it, `resident` of
    them, so that one computes while the other waits for memory.

    waves rounded down
        -(-pairs * splits // places) → max(pairs * splits // places, 1)
    programs // places leaves out the last wave, which is not full and takes as long as the others. Round up:
    `-(-a // b)`.

    the partial tile not counted
        -(-max(lengths) // block) → max(max(lengths) // block, 1)
    Tiles were counted as length // block. The last one is not full and has to be read all the same: round up.

    starting and merging cost nothing
        (-(-tiles // splits) + 1) → -(-tiles // splits)
    The time was taken as waves · ⌈tiles / s⌉. Every program also starts, and its result has to be merged: one
    tile's time more in every wave. Without it, splits are cut finer and finer for nothing.

    the most splits of equals
        key=time → key=lambda splits: (time(splits), -splits)
    Where several numbers of splits take the same time, the largest was taken. Fewer splits mean fewer partial
    results to write, read and merge: take the smallest.

    as many splits as fit into one wave
        min(range(1, tiles + 1), key=time) → min(max(places // pairs, 1), tiles)
    places // pairs splits fill one wave as far as whole splits go. With 20 pairs on 36 places that is 1, and
    nearly half the machine idles; two waves of shorter programs may be done sooner. Compare the times.

    rounded up to more than one wave
        min(range(1, tiles + 1), key=time) → min(-(-places // pairs), tiles)
    ⌈places / pairs⌉ splits make a few programs more than the machine holds. They wait for a wave of their
    own, and the step takes nearly twice as long. Compare the times of all numbers of splits.

    as many splits as possible
        min(range(1, tiles + 1), key=time) → tiles
    One split for each tile. The machine is full, and every program starts, computes one tile and hands over a
    partial result to merge: half of the time or more goes into that. Split only until the machine is full.

    never split
        min(range(1, tiles + 1), key=time) → 1
    Always 1, which is right only for a batch that fills the machine. One sequence with two KV heads is two
    programs, and all other multiprocessors wait. (A time with fractions of a wave gives 1 too: a machine that
    is a tenth full takes as long as a full one. Round the waves up.)

    the shortest row's tiles
        max(lengths) → min(lengths)
    The tiles were counted from the shortest row. The step ends when the *longest* row is done: max(lengths).

    all rows' tiles added up
        -(-max(lengths) // block) → sum(-(-length // block) for length in lengths)
    The tiles of all rows were added. Rows are worked on side by side, by programs of their own; a wave lasts
    as long as the longest row's share, ⌈tiles of the longest / s⌉.

    only powers of two tried
        range(1, tiles + 1) → [1 << i for i in range(tiles.bit_length())]
    Only 1, 2, 4, 8 … splits were compared. The number is a run-time argument and the grid takes any: 132
    multiprocessors and 4 pairs want 33.

    the lengths added up
        max(lengths) → sum(lengths)
    The tiles were counted from the sum of the lengths. Rows are worked on side by side, by programs of their
    own; a wave lasts as long as the longest row's share: max(lengths).

    no more than 128 splits tried
        range(1, tiles + 1) → range(1, min(tiles, 128) + 1)
    The numbers of splits were compared up to 128. A machine with more multiprocessors than that can run more
    programs at once, and one long sequence on one KV head is done first with more splits: compare all numbers
    up to that of the tiles.

    the largest number not tried
        range(1, tiles + 1) → range(1, max(tiles, 2))
    `range(1, tiles)` ends at tiles − 1. Short contexts on an empty machine are done first with one split for
    each tile: `range(1, tiles + 1)`.
    """,
)


# 11.8: Merge in the same launch, by ticket


# (ticket, live splits, n_splits, split) -> does this program merge?
Chosen = Callable[[int, int, int, int], bool]
Hold = Callable[[Tensor], Tensor]
Result = tuple[Tensor, Tensor]


def last(ticket: int, live: int, n_splits: int, split: int) -> bool:
    return ticket == live - 1


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    n_splits: int,
    first: int,
    tickets: Hold,
    chosen: Chosen = last,
    reset: int | None = 0,
    always: bool = False,
    shared: bool = False,
) -> Result:
    """One launch; ``reset`` is what the merging program leaves in the ticket, None: what is there
    (``always``: every program does); ``shared``: one counter for all rows. Parts that have not been
    stored when it merges are NaN."""
    parts, lse = parts_of(q, k, v, lengths, n_splits)
    held, out = tickets(q), torch.full_like(q, torch.nan)
    merges, stored = torch.zeros_like(held), torch.zeros(len(q), n_splits, dtype=torch.bool, device=q.device)
    for split in [(first + i) % n_splits for i in range(n_splits)]:
        for b, length in enumerate(lengths.tolist()):
            tiles = cdiv(length, BLOCK)
            live = cdiv(tiles, cdiv(tiles, n_splits))
            if split >= live:
                continue
            stored[b, split] = True
            counter = 0 if shared else b
            ticket = int(held[counter])
            held[counter] += 1
            if chosen(ticket, live, n_splits, split):
                merges[b] += 1
                there = stored[b, :live]
                seen = parts[b, :live].where(there[:, None], torch.nan)
                out[b] = merge(seen[None], lse[b, :live].where(there, torch.nan)[None])[0]
            if reset is not None and (always or chosen(ticket, live, n_splits, split)):
                held[counter] = reset
    return out, merges


ticket.mistakes(
    r"""
    the ticket is not reset
        def one_launch(q, k, v, lengths, n_splits, first, tickets):
            return launch(q, k, v, lengths, n_splits, first, tickets, reset=None)
    The first call is right, and leaves its count behind: in the second nobody draws the last number, or the
    wrong program does. The program that merges stores 0, so the next step needs no kernel to clear it.

    the ticket is reset to 1
        def one_launch(q, k, v, lengths, n_splits, first, tickets):
            return launch(q, k, v, lengths, n_splits, first, tickets, reset=1)
    The ticket is set back to 1, so in the next call the program before the last takes itself for the last,
    and merges a part that is not there yet. The first ticket of a call is 0.

    the ticket compared with n_splits
        def one_launch(q, k, v, lengths, n_splits, first, tickets):
            return launch(
                q, k, v, lengths, n_splits, first, tickets, lambda ticket, live, n, split: ticket == n - 1
            )
    The merge waits for n_splits programs, but splits without keys have left and draw no ticket. A short row
    beside a long one is then never merged. The last number is live_splits − 1.

    nobody draws the last number
        def one_launch(q, k, v, lengths, n_splits, first, tickets):
            return launch(
                q, k, v, lengths, n_splits, first, tickets, lambda ticket, live, n, split: ticket == live
            )
    The ticket is compared with live_splits. `tl.atomic_add` returns the value from *before*, and counting
    begins at 0: of n programs the last draws n − 1, so nobody merges and the output stays as it was.

    merged before all parts are there
        def one_launch(q, k, v, lengths, n_splits, first, tickets):
            return launch(q, k, v, lengths, n_splits, first, tickets, lambda ticket, live, n, split: True)
    Every program merges: the ticket is not looked at, or compared with 0, which the first one draws (and,
    once it has put the ticket back to 0, the next one too). Most of them merge parts that are not there yet.
    The last to be ready must do it alone, the one that draws live_splits − 1.

    the last split merges, not the last to finish
        def one_launch(q, k, v, lengths, n_splits, first, tickets):
            return launch(
                q, k, v, lengths, n_splits, first, tickets, lambda ticket, live, n, split: split == live - 1
            )
    The split with the highest number merges. Programs finish in any order, so the others need not be ready.
    Who is last is what the ticket tells.

    the first split merges, not the last to finish
        def one_launch(q, k, v, lengths, n_splits, first, tickets):
            return launch(
                q, k, v, lengths, n_splits, first, tickets, lambda ticket, live, n, split: split == 0
            )
    Split 0 merges. Programs finish in any order, so the others need not be ready. Who is last is what the
    ticket tells.

    every program resets the ticket
        def one_launch(q, k, v, lengths, n_splits, first, tickets):
            return launch(q, k, v, lengths, n_splits, first, tickets, always=True)
    The ticket is set to 0 by every program, so each draws 0 again and nobody is the last (but where there is
    one split). Only the program that merges may put it back, after the merge.

    one counter for all rows
        def one_launch(q, k, v, lengths, n_splits, first, tickets):
            return launch(q, k, v, lengths, n_splits, first, tickets, shared=True)
    All rows draw from the first counter, `TICKETS` without `row`. Their programs run side by side, and a row
    then takes the others' programs for its own. Each row has a counter: `TICKETS + row`.

    read, then written
        def one_launch(q, k, v, lengths, n_splits, first, tickets):
            done.add(READ_TICKET)
            return launch(q, k, v, lengths, n_splits, first, tickets)
    The counter was read by `tl.load` and written by `tl.store`. Here programs run one after the other and it
    works. On a GPU two of them read the same number before either has written: then nobody is the last, or
    two are. `tl.atomic_add` reads and writes in one.
    """,
    done=done,
    launch=launch,
    READ_TICKET=READ_TICKET,
)
