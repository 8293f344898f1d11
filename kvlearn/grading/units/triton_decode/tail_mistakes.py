"""11.3: the mistakes that people make at the end of a row, as short PyTorch emulations."""

import torch
from torch import Tensor

from kvlearn.grading.units.triton_decode.kernels import BLOCK
from kvlearn.grading.units.triton_decode.tail import EXERCISE

__all__ = ["EXERCISE"]


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
    """What the interpreter says where a kernel reads up to key ``ends[b]``, behind the last row's room."""
    if int(ends[-1]) > k.shape[1]:
        raise IndexError("a read behind the end of the cache")


@EXERCISE.misconception("a masked score of 0")
def zero_scores(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """The loads are masked with `other=0.0`, so masked keys have the score 0. That is a score like any other,
    and exp2(0 − m) is a weight: it makes the sum too large and the output too small. Only −∞ becomes the
    weight 0."""
    return rows(q, k, v, below(k, lengths), masked_score=0.0, tiles=tiles_of(k, lengths))


@EXERCISE.misconception("no mask")
def no_mask(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, guard: bool = True) -> Tensor:
    """The whole last tile counts, with the keys that stand behind the length: another row's, an earlier
    prompt's, or NaN. Mask the loads of K and V, and set the masked scores to −∞."""
    within(k, (lengths + BLOCK - 1) // BLOCK * BLOCK)
    return rows(q, k, v, tiles_of(k, lengths), guard=guard)


@EXERCISE.misconception("masked by the capacity")
def by_capacity(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Keys count up to the room that a row has, not up to its length. Nothing is read out of range, and
    yet the slots in between hold no keys of this sequence: the mask is `n < length`."""
    return rows(q, k, v, tiles_of(k, lengths))


@EXERCISE.misconception("one key too many")
def too_many(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """The mask is n <= length. Keys are numbered from 0, so key number `length` is the first one that is not
    there."""
    within(k, torch.where(lengths % BLOCK == 0, lengths, lengths + 1))
    return rows(q, k, v, below(k, lengths + 1) & tiles_of(k, lengths))


@EXERCISE.misconception("the last key is lost")
def too_few(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """The mask is n < length − 1. Keys are numbered from 0, so length − 1 is the number of the last live key,
    the newest token: it sees itself."""
    return rows(q, k, v, below(k, lengths - 1))


@EXERCISE.misconception("the last, partial tile is dropped")
def whole_tiles_only(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Only tiles that are full count, and the newest tokens, which matter most, are lost. The last tile is
    loaded with a mask."""
    return rows(q, k, v, below(k, lengths // BLOCK * BLOCK))


@EXERCISE.misconception("the index in the tile compared with the length")
def tile_index(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """`tl.arange(0, BLOCK) < length` compares the place in the tile, 0 to 15, with the length of the row.
    From the second tile on it is always true. The key's number is `n = start + tl.arange(0, BLOCK)`."""
    within(k, torch.where(lengths < BLOCK, lengths, (lengths + BLOCK - 1) // BLOCK * BLOCK))
    index = torch.arange(k.shape[1], device=k.device) % BLOCK
    return rows(q, k, v, (index < lengths[:, None]) & tiles_of(k, lengths))


@EXERCISE.misconception("the values loaded without a mask")
def values_unmasked(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, guard: bool = True) -> Tensor:
    """The scores are masked, so the weights behind the length are 0, but V is loaded as it stands, and
    0 · NaN is NaN (0 · ∞ too). Old memory may hold anything: mask the load of V as well."""
    within(v, (lengths + BLOCK - 1) // BLOCK * BLOCK)
    return rows(q, k, v, below(k, lengths), tiles=tiles_of(k, lengths), load_all_values=True, guard=guard)


@EXERCISE.misconception("the mask upside down")
def inverted(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """The live keys got −∞ and the others were kept. A tile whose keys are all live then has nothing but
    −∞, and −∞ − (−∞) is NaN. `tl.where(condition, a, b)` gives a where the condition holds."""
    return torch.where((lengths < BLOCK)[:, None], 0.0, torch.nan).expand_as(q).clone()


@EXERCISE.misconception("length 0 divides by 0")
def zero_over_zero(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """A row without keys never enters the loop, so both its sums are 0, and 0 / 0 is NaN. Such rows are
    real: a slot of the batch that waits for its next request. Divide by 1 there."""
    return rows(q, k, v, below(k, lengths), guard=False)


@EXERCISE.misconception("a masked score of 0, and length 0 divides by 0")
def zero_scores_unguarded(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Two mistakes. Masked keys have the score 0, and exp2(0 − m) is a weight: set them to −∞. And a row
    without keys divides 0 by 0: divide by 1 there."""
    return rows(q, k, v, below(k, lengths), masked_score=0.0, tiles=tiles_of(k, lengths), guard=False)


@EXERCISE.misconception("values unmasked, and length 0 divides by 0")
def values_unmasked_unguarded(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Two mistakes. V is loaded as it stands, and a weight of 0 times NaN is NaN: mask that load too. And
    a row without keys divides 0 by 0: divide by 1 there."""
    return values_unmasked(q, k, v, lengths, guard=False)


@EXERCISE.misconception("no mask, and length 0 divides by 0")
def no_mask_unguarded(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Two mistakes. The whole last tile counts, with whatever stands behind the length: mask the loads of
    K and V, and set the masked scores to −∞. And a row without keys divides 0 by 0: divide by 1 there."""
    return no_mask(q, k, v, lengths, guard=False)
