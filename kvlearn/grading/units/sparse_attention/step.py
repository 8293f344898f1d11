"""05.6: a decode step that selects blocks, held against a loop over sequences and heads."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlearn.grading.compare import Difference, compare, describe
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Stop, Trial

EXERCISE = Exercise(
    id="05.6",
    slug="step",
    title="A step that reads what it selects",
    answers=("select_step",),
    hints=(
        "In this order: append the new key and value, bring the means up to date, select, attend. The new "
        "token stands at position S, so its own block is S // block, and it reads itself.",
        "A mean is appended only when the new token fills its block: (S + 1) % block == 0. Then it is the "
        "mean of the last `block` keys, the new one among them. In between the means stay as they are: the "
        "keys of the half-filled block are in the cache.",
        "Candidates are the blocks before the own one, `means[:, :, : S // block]`: even where this very "
        "step has filled the own block, that one is read anyway. The scores are (B, H, S // block).",
        "Turn blocks into tokens, `(blocks[..., None] * block + torch.arange(block)).flatten(2)`, put "
        "those of the own block, S // block · block … S, behind them, and `gather` keys and values along "
        "dimension 2. Nothing is to be masked: all of it lies in the past.",
    ),
)


class State(NamedTuple):
    """A new token and the cache it finds."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    means: Tensor


def block_means(keys: Tensor, block: int) -> Tensor:
    """Of the complete blocks, one by one."""
    n = keys.shape[2] // block
    parts = [keys[:, :, c * block : (c + 1) * block].double().sum(2) / block for c in range(n)]
    return torch.stack(parts, 2).to(keys.dtype) if parts else keys[:, :, :0]


def draw(t: Trial, S: int, block: int) -> State:
    B, H, D = 2, t.pick(3, 5), t.pick(8, 16)
    q, k, v = (t.randn(B, H, 1, D) for _ in range(3))
    keys, values = t.randn(B, H, S, D), t.randn(B, H, S, D)
    return State(q, k, v, keys, values, block_means(keys, block))


def selected(state: State, block: int, n_blocks: int) -> list[list[list[int]]]:
    """The blocks that each head of each sequence reads."""
    own = state.keys.shape[2] // block
    scores = (state.means[:, :, :own] @ state.q.mT)[..., 0].tolist()
    ranked = [[sorted(range(own), key=lambda c: -head[c]) for head in row] for row in scores]
    return [[[*order[: n_blocks - 1], own] for order in row] for row in ranked]


def output(state: State, block: int, n_blocks: int) -> Tensor:
    keys, values = torch.cat((state.keys, state.k), 2), torch.cat((state.values, state.v), 2)
    out = torch.empty_like(state.q)
    for b, row in enumerate(selected(state, block, n_blocks)):
        for h, chosen in enumerate(row):
            seen = [s for s in range(keys.shape[2]) if s // block in chosen]
            weights = (keys[b, h, seen] @ state.q[b, h, 0] / state.q.shape[-1] ** 0.5).softmax(0)
            out[b, h, 0] = weights @ values[b, h, seen]
    return out


def four(t: Trial, got: Any) -> list[Tensor]:
    """What came back, taken apart, or the end of this round."""
    if isinstance(got, tuple | list) and len(got) == 4 and all(isinstance(part, Tensor) for part in got):
        return list(got)
    t.note(got, Difference("", "four tensors, (out, keys, values, means)", describe(got)))
    raise Stop


def run(t: Trial, answer: Answer, state: State, block: int, n_blocks: int) -> list[Tensor]:
    return four(t, answer(*state, block, n_blocks))


def same_output(t: Trial, answer: Answer, state: State, block: int, n_blocks: int, when: str = "") -> None:
    out = run(t, answer, state, block, n_blocks)[0]
    t.close(out, output(state, block, n_blocks), when)


@EXERCISE.requirement(1, "keys and values: one token more")
def grows(t: Trial, select_step: Answer) -> None:
    """(B, H, S + 1, D): all that was there, the new token behind it, whatever is selected; what was handed in
    is unchanged"""
    block = t.integer(3, 5)
    state = draw(t, 5 * block + t.integer(0, block - 1), block)
    _, keys, values, _ = run(t, select_step, state, block, 3)
    t.close(keys, torch.cat((state.keys, state.k), 2), "keys:")
    t.close(values, torch.cat((state.values, state.v), 2), "values:")
    t.unchanged()


@EXERCISE.requirement(1, "means, while a block fills up")
def filling(t: Trial, select_step: Answer) -> None:
    """as they were, a row for each complete block: a half-filled block has no mean yet"""
    block = t.integer(3, 5)
    part = 0 if t.round == 1 else t.integer(1, block - 2)
    state = draw(t, t.integer(3, 5) * block + part, block)
    *_, means = run(t, select_step, state, block, 3)
    t.close(means, state.means, "means:")


@EXERCISE.requirement(1, "means, when a block is full")
def filled(t: Trial, select_step: Answer) -> None:
    """a row more: the mean of the `block` keys, the new one among them"""
    block = t.integer(3, 5)
    state = draw(t, t.integer(3, 5) * block + block - 1, block)
    *_, means = run(t, select_step, state, block, 3)
    want = block_means(torch.cat((state.keys, state.k), 2), block)
    t.close(means, want, "means:")


@EXERCISE.requirement(1, "the output, with a half-filled block")
def half_filled(t: Trial, select_step: Answer) -> None:
    """softmax over the own block up to the new token and the best n_blocks − 1 before it, which every head of
    every sequence picks for itself"""
    block, n_blocks = t.integer(4, 6), t.integer(3, 4)
    state = draw(t, 7 * block + t.integer(1, block - 2), block)
    same_output(t, select_step, state, block, n_blocks)


@EXERCISE.requirement(1, "the output, at the edges of blocks")
def borders(t: Trial, select_step: Answer) -> None:
    """the first token of a block, the last one, too few blocks, an empty cache"""
    block = t.integer(3, 5)
    for S, n_blocks, when in (
        (6 * block, 3, "the first token of a block:"),
        (6 * block - 1, 3, "the last token of a block:"),
        (2 * block + 1, 6, "fewer blocks than n_blocks:"),
        (4 * block + 1, 1, "n_blocks = 1:"),
        (0, 3, "an empty cache:"),
    ):
        same_output(t, select_step, draw(t, S, block), block, n_blocks, when)


@EXERCISE.requirement(1, "what is not selected is not read")
def untouched(t: Trial, select_step: Answer) -> None:
    """the output is right though the keys and values of all blocks that a head does not select are NaN"""
    block, n_blocks = t.integer(3, 5), t.integer(3, 4)
    state = draw(t, 7 * block + t.integer(1, block - 2), block)
    want = output(state, block, n_blocks)
    for b, row in enumerate(selected(state, block, n_blocks)):
        for h, chosen in enumerate(row):
            for c in set(range(7)) - set(chosen):
                state.keys[b, h, c * block : (c + 1) * block] = torch.nan
                state.values[b, h, c * block : (c + 1) * block] = torch.nan
    out = run(t, select_step, state, block, n_blocks)[0]
    t.note(out, compare(out, want))
