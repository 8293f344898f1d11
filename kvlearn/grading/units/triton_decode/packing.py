"""11.4: the query heads of one KV head as the rows of a matrix product, held against each head on its own."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial
from kvlearn.grading.units.triton_decode.kernels import READY_MADE, attend, run

EXERCISE = Exercise(
    id="11.4",
    slug="packing",
    title="Pack the query heads of one KV head",
    answers=("grouped_attention",),
    forbidden=READY_MADE,
    hints=(
        "KV head g serves the query heads g · GROUP, …, g · GROUP + GROUP − 1: neighbours. So row r of the "
        "packed tile is head `g * GROUP + r`, as long as r < GROUP.",
        "The pointers into Q are `Q + (b * H + h)[:, None] * D + d[None, :]`, a (16, BLOCK_D) tile. Mask "
        "the rows with `rows < GROUP` and the columns with `d < D`; `other=0.0` makes the padding harmless "
        "in the product.",
        '`tl.dot(q, tl.trans(k), input_precision="ieee")` is (16, BLOCK_D) times (BLOCK_D, BLOCK): every '
        "head's score with every key of the tile. The scale is 1/√D with the *true* D.",
        "Store with the mask `(rows < GROUP)[:, None] & (d < D)[None, :]`. Without it the padded rows land "
        "on the heads of the next group, and which program writes last is anybody's guess.",
    ),
)

ROWS = 16  # of the packed tile: what tl.dot wants at least
QKV = tuple[Tensor, Tensor, Tensor]


def draw(t: Trial, n_kv_heads: int, group: int, head_dim: int = 16) -> QKV:
    B, S = 2, t.pick(9, 21, 27)
    k, v = t.randn(B, n_kv_heads, S, head_dim), t.randn(B, n_kv_heads, S, head_dim)
    return t.randn(B, n_kv_heads * group, head_dim), k, v


def head_by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    heads = [
        [attend(q[b, h], k[b, h // group], v[b, h // group]) for h in range(q.shape[1])]
        for b in range(len(q))
    ]
    return torch.stack([torch.stack(row) for row in heads])


def same(t: Trial, grouped_attention: Answer, inputs: QKV) -> None:
    t.close(run(grouped_attention, *inputs), head_by_head(*inputs))


@EXERCISE.requirement(1, "one query head a KV head", rounds=1)
def multi_head(t: Trial, grouped_attention: Answer) -> None:
    """multi-head attention, groups of 1: (B, H, D)"""
    same(t, grouped_attention, draw(t, 3, 1))


@EXERCISE.requirement(1, "groups of 4", rounds=2)
def fours(t: Trial, grouped_attention: Answer) -> None:
    """grouped-query attention with 2 or 3 KV heads: query head h reads KV head h // 4; inputs unchanged"""
    same(t, grouped_attention, draw(t, t.pick(2, 3), 4))
    t.unchanged()


@EXERCISE.requirement(2, "groups of 3, 5, 6 and 7", rounds=2)
def odd(t: Trial, grouped_attention: Answer) -> None:
    """the same where a group is no power of two: no head left out, none overwritten"""
    same(t, grouped_attention, draw(t, 2, t.pick(3, 5, 6, 7)))


@EXERCISE.requirement(1, "a head dim that is padded", rounds=2)
def padded(t: Trial, grouped_attention: Answer) -> None:
    """the same with D = 12 or 20, in tiles of 16 or 32 columns"""
    same(t, grouped_attention, draw(t, 2, t.pick(2, 3), t.pick(12, 20)))


@EXERCISE.requirement(1, "all heads on one KV head", rounds=1)
def multi_query(t: Trial, grouped_attention: Answer) -> None:
    """multi-query attention: groups of 9, 12 or 16 heads"""
    same(t, grouped_attention, draw(t, 1, t.pick(9, 12, 16)))
