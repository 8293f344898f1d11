"""11.4: the mistakes that people make when they pack heads, as short PyTorch emulations."""

import torch
from torch import Tensor

from kvlearn.grading.units.triton_decode.packing import EXERCISE, ROWS

__all__ = ["EXERCISE"]


def grouped(
    q: Tensor, k: Tensor, v: Tensor, owner: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Every query head h with KV head ``owner[h]``; right without further arguments."""
    if owner is None:
        owner = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])
    scores = torch.einsum("bhd,bhsd->bhs", q, k[:, owner]) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhs,bhsd->bhd", weights / weights.sum(-1, keepdim=True), v[:, owner])


def sizes(q: Tensor, k: Tensor) -> tuple[int, int]:
    """Group and KV heads."""
    return q.shape[1] // k.shape[1], k.shape[1]


@EXERCISE.misconception("heads dealt out in turn")
def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The rows of program g were the heads g, g + G, g + 2G, …, so head h reads KV head h % G. That is
    `repeat`; the models use `repeat_interleave`: neighbours share, head h reads KV head h // group."""
    return grouped(q, k, v, torch.arange(q.shape[1], device=q.device) % k.shape[1])


@EXERCISE.misconception("every program takes the first group")
def first_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads are `rows` alone, without g · GROUP: every program works on the first group of query
    heads, and nobody writes the others (they are still NaN). Row r of program g is head g · GROUP + r."""
    group, _ = sizes(q, k)
    out = torch.full_like(q, torch.nan)
    out[:, :group] = grouped(q[:, :group], k[:, :1], v[:, :1])  # programs run backwards here: g = 0 is last
    return out


@EXERCISE.misconception("heads begin at g, not at g · GROUP")
def shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Program g took the heads g, g + 1, …, so that groups overlap and the last heads are written by
    nobody (they are still NaN). Before group g there are g whole groups: g · GROUP + r."""
    group, G = sizes(q, k)
    heads = torch.arange(q.shape[1], device=q.device)
    out = grouped(q, k, v, (heads - group + 1).clamp(0, G - 1))  # g = 0 is last to write
    return out.masked_fill((heads >= G - 1 + group)[:, None], torch.nan)


@EXERCISE.misconception("the sequence is missing")
def first_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads were taken without b, so every program works on the queries of sequence 0 and stores
    there; the other sequences are still NaN. Head h of sequence b is row b · H + h of Q and of OUT."""
    out = torch.full_like(q, torch.nan)
    out[:1] = grouped(q[:1], k[:1], v[:1])
    return out


@EXERCISE.misconception("padded columns are stored")
def padded_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The store is masked in its rows only. Column D of one head is column 0 of the next: the zeros from the
    padding of a group's last head land on the group that follows. Mask with d < D too."""
    group, _ = sizes(q, k)
    B, H, D = q.shape
    out = grouped(q, k, v).reshape(B * H, D)
    out[group::group, : max(16, 1 << (D - 1).bit_length()) - D] = 0.0
    return out.view(B, H, D)


@EXERCISE.misconception("padded rows are stored")
def neighbours_overwritten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The tile has 16 rows and the group has fewer, and all 16 are stored: what is computed from padding
    lands on the heads that follow. On a GPU the programs run in any order, so the damage changes from
    run to run (here they run backwards, and it always shows). Mask the store with rows < GROUP."""
    B, H, D = q.shape
    group, G = sizes(q, k)
    right = grouped(q, k, v)
    out = q.new_full((B * H + ROWS, D), torch.nan)
    for pair in reversed(range(B * G)):
        b, g = divmod(pair, G)
        out[pair * group : pair * group + ROWS] = v[b, g].mean(0)  # the scores of a row of zeros are all 0
        out[pair * group : (pair + 1) * group] = right[b, g * group : (g + 1) * group]
    return out[: B * H].view(B, H, D)


@EXERCISE.misconception("the group rounded down to a power of two")
def power_of_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of groups of 3, 5, 6 and 7 only the first 2 or 4 heads are computed, and the others are still NaN.
    Tiles have sizes that are powers of two, groups have not: take the tile larger, 16 rows, and mask."""
    group, _ = sizes(q, k)
    kept = torch.arange(q.shape[1], device=q.device) % group < 1 << (group.bit_length() - 1)
    return grouped(q, k, v).masked_fill(~kept[:, None], torch.nan)


@EXERCISE.misconception("the transpose is missing")
def untransposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The product was q · k in place of q · kᵀ. With a tile of 16 keys and 16 columns the shapes fit, and the
    numbers mean nothing; with other sizes it raises. `tl.dot` sums over the columns of the first and the
    *rows* of the second: `tl.trans(k)`."""
    B, _, D = q.shape
    if D > ROWS:
        raise ValueError("the shapes of q and k do not fit")
    group, G = sizes(q, k)
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


@EXERCISE.misconception("scaled by the padded head dim")
def padded_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scale is 1/√BLOCK_D, the width of the tile. The padding adds zeros to a product, not spread: what
    counts is the head dim of the model, 1/√D."""
    return grouped(q, k, v, scale=max(16, 1 << (q.shape[-1] - 1).bit_length()) ** -0.5)


@EXERCISE.misconception("exp2 without log₂e")
def base_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scores go into exp2 as they are, so every weight is 2^score in place of e^score. eˣ = 2^(x ·
    log₂e): the factor is `scale * LOG2E`."""
    return grouped(q, k, v, scale=q.shape[-1] ** -0.5 / 1.4426950408889634)


@EXERCISE.misconception("neither the scale nor log₂e")
def raw(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The bare products go into exp2: 1/√D is missing, and log₂e too. What exp2 wants is the product times
    `scale * LOG2E`, with scale = 1/√D."""
    return grouped(q, k, v, scale=1 / 1.4426950408889634)


@EXERCISE.misconception("the scale is forgotten")
def no_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The products q·k went into the softmax without 1/√D, so it is too sharp. In a kernel the factor costs
    nothing: D ** −0.5 · LOG2E is one number."""
    return grouped(q, k, v, scale=1.0)


@EXERCISE.misconception("one head's output in all rows")
def one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All heads of a group gave the same: the query of the first head stands in every row. The pointers need
    each row's own head, `h[:, None] * D`, not the scalar g · GROUP."""
    group, _ = sizes(q, k)
    first = torch.arange(q.shape[1], device=q.device) // group * group
    return grouped(q[:, first], k, v)


@EXERCISE.misconception("the scale upside down")
def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The scores were multiplied by √D and not divided by it: D ** −0.5."""
    return grouped(q, k, v, scale=q.shape[-1] ** 0.5)


@EXERCISE.misconception("acc added twice")
def added_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`tl.dot(weights, v, acc)` already adds to acc; with `acc +=` in front, all earlier tiles count
    double. Either `acc = tl.dot(weights, v, acc)` or `acc += tl.dot(weights, v)`."""
    doubled = torch.where(
        torch.arange(k.shape[2], device=q.device) < (k.shape[2] - 1) // ROWS * ROWS, 2.0, 1.0
    )
    return grouped(q, k, v * doubled[:, None])


@EXERCISE.misconception("the last tile in place of the sum of all")
def last_tile(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`acc` is set in each tile: `tl.dot(weights, v)` is this tile's share alone. Add it to what is there:
    `acc + tl.dot(weights, v)`, or hand acc to the product, `tl.dot(weights, v, acc)`."""
    start = (k.shape[2] - 1) // ROWS * ROWS
    group, _ = sizes(q, k)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhd,bhsd->bhs", q, k) * q.shape[-1] ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    share = torch.einsum("bhs,bhsd->bhd", weights[..., start:], v[:, :, start:])
    return share / weights.sum(-1, keepdim=True)
