"""05.5: the blocks that each query picks, held against sorting scores query by query in plain Python."""

from typing import Any

import torch
from torch import Tensor

from kvlearn.grading.compare import Difference, compare, describe
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial

EXERCISE = Exercise(
    id="05.5",
    slug="select",
    title="The best blocks, without looking ahead",
    answers=("select_blocks",),
    hints=(
        "Which blocks may be scored at all? Those before the query's own, block c < own = i // block: they "
        "are complete, and all their keys lie in the past. The own one is not scored but always picked.",
        "Means of the complete blocks: `k[:, :, : c * block].unflatten(2, (c, block)).mean(3)` with c = T // "
        "block. Scores: q times those, (B, H, T, c). A half-filled last block needs a column but no score.",
        "Hide the scores of the blocks that are not before the own one with −∞ and take the n_blocks − 1 "
        "best of each row. A row with fewer candidates picks hidden ones as well: take them out again with "
        "`&`.",
        "`scores.sort(dim=-1, descending=True, stable=True).indices[..., : n_blocks - 1]` keeps the lower of "
        "two equal blocks in front; `topk` promises nothing of the kind. `scatter_` turns indices into True.",
    ),
)


def reference(q: Tensor, k: Tensor, block: int, n_blocks: int) -> Tensor:
    B, H, T, _ = q.shape
    chosen = torch.zeros(B, H, T, -(-T // block), dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            sums = [part.double().sum(0) for part in k[b, h].split(block)]
            for i, scores in enumerate((q[b, h].double() @ torch.stack(sums).T / block).tolist()):
                own = i // block  # later scores are not looked at
                best = sorted(range(own), key=lambda c: (-scores[c], c))[: n_blocks - 1]
                chosen[b, h, i, [own, *best]] = True
    return chosen


def draw(t: Trial, T: int) -> tuple[Tensor, Tensor]:
    B, H, D = 2, 3, t.pick(8, 16)
    return t.randn(B, H, T, D), t.randn(B, H, T, D)


INDEX = "[sequence, head, query, block]:"


def boolean(got: Any, want: Tensor) -> Any:
    """Ones and zeros are as good as True and False, but for the point for the form."""
    fits = isinstance(got, Tensor) and got.shape == want.shape and not got.is_complex()
    return got.bool() if fits else got


def same(t: Trial, got: Any, want: Tensor, area: Tensor) -> None:
    got = boolean(got, want)
    if isinstance(got, Tensor) and got.shape == want.shape:
        got = torch.where(area, got, want)
    t.note(got, compare(got, want, INDEX))


def before_own(T: int, block: int) -> Tensor:
    """(T, N): where a block lies before the query's own."""
    return torch.arange(-(-T // block)) < (torch.arange(T) // block)[:, None]


@EXERCISE.requirement(1, "a boolean for each query and block", rounds=2)
def form(t: Trial, select_blocks: Answer) -> None:
    """dtype bool, (B, H, T, ⌈T / block⌉); q and k are unchanged afterwards"""
    block = t.integer(3, 5)
    T = 3 * block + t.integer(1, block - 1)
    q, k = draw(t, T)
    t.form(select_blocks(q, k, block, 3), (*q.shape[:3], -(-T // block)), torch.bool)
    t.unchanged()


@EXERCISE.requirement(1, "its own block, and none after it", rounds=2)
def own(t: Trial, select_blocks: Answer) -> None:
    """the block that the query stands in is picked always, whatever it would score; later ones never"""
    block = t.integer(3, 5)
    T = 5 * block
    q, k = draw(t, T)
    want = reference(q, k, block, 3)
    same(t, select_blocks(q, k, block, 3), want, ~before_own(T, block))


@EXERCISE.requirement(1, "the best of the blocks before")
def best(t: Trial, select_blocks: Answer) -> None:
    """the n_blocks − 1 whose mean key fits the query best, for every head and sequence by itself"""
    block, n_blocks = t.integer(3, 4), t.integer(3, 4)
    T = 6 * block
    q, k = draw(t, T)
    want = reference(q, k, block, n_blocks)
    same(t, select_blocks(q, k, block, n_blocks), want, before_own(T, block))


@EXERCISE.requirement(1, "a half-filled block, and too few of them", rounds=2)
def edges(t: Trial, select_blocks: Answer) -> None:
    """a column for the half-filled last block; all blocks before where there are no more than n_blocks − 1;
    with n_blocks = 1 the own one alone"""
    block = t.integer(3, 5)
    for whole, n_blocks in ((5, 3), (2, 6), (4, 1), (0, 2)):
        q, k = draw(t, whole * block + t.integer(1, block - 1))
        want = reference(q, k, block, n_blocks)
        got = boolean(select_blocks(q, k, block, n_blocks), want)
        when = f"n_blocks = {n_blocks}, {whole} blocks and a part, {INDEX}"
        t.note(got, compare(got, want, when))


@EXERCISE.requirement(1, "equal scores", rounds=2)
def ties(t: Trial, select_blocks: Answer) -> None:
    """of blocks with equal scores the earlier one"""
    block, n, n_blocks = 4, 6, t.integer(3, 4)
    B, H, D = 2, 3, 8
    # Small whole numbers and blocks of four: every sum is exact, so equal is equal in whatever order.
    kinds = torch.randint(-3, 4, (2, block, D), generator=t.generator).float()
    if t.round == 0:
        kinds[1] = kinds[0]
    order = [t.integer(0, 1) for _ in range(n)]
    k = torch.cat([kinds[kind] for kind in order]).expand(B, H, -1, -1).clone()
    q = torch.randint(-3, 4, (B, H, n * block, D), generator=t.generator).float()
    want = reference(q, k, block, n_blocks)
    same(t, select_blocks(q, k, block, n_blocks), want, before_own(n * block, block))


@EXERCISE.requirement(1, "nothing of the future")
def prefix(t: Trial, select_blocks: Answer) -> None:
    """what a query picks is the same whatever comes after it: other keys, other queries, more of them"""
    block, n_blocks = t.integer(3, 5), 3
    length = 5 * block + t.integer(2, block - 1)
    q, k = draw(t, 7 * block)
    other_q, other_k = draw_like(t, q), draw_like(t, k)
    first = select_blocks(q, k, block, n_blocks)
    for x, new in ((q, other_q), (k, other_k)):
        x[:, :, length:] = new[:, :, length:]
    second = select_blocks(q, k, block, n_blocks)
    shape = (*q.shape[:3], 7)
    for got in (first, second):
        if not isinstance(got, Tensor) or tuple(got.shape) != shape:
            t.true(False, f"a tensor of shape {shape}", describe(got))
            raise Stop
    one, two = (got[:, :, :length].bool() for got in (first, second))
    changed = int((one != two).any(-1).sum())
    came = f"{changed} of {one[..., 0].numel()} queries before the change pick other blocks"
    t.note(one ^ two, Difference("", "the same blocks as before", came) if changed else None)
    picked = one.any(-1).all()
    t.true(bool(picked), "at least one block for every query", "queries with none")


def draw_like(t: Trial, x: Tensor) -> Tensor:
    return t.randn(*x.shape)
