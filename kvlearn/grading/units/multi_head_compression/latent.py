"""03.1: down to the latent and up again, held against a loop over heads and their rows."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
    id="03.1",
    slug="latent",
    title="Down to the latent, up again",
    answers=("compress", "decompress"),
    hints=(
        "A matrix W of shape (out, in) takes a column x to W x. Tokens are *rows* here, so it is `x @ "
        "W.T`: the last dimension goes from in to out, and batch and time stay. Both functions begin with "
        "this.",
        "`c @ w_up.T` is (B, T, 2·H·D). Which numbers are the keys? Those of the first H·D rows of w_up, "
        "so the first half of the columns: `keys, values = (c @ w_up.T).chunk(2, dim=-1)`.",
        "Within one half the heads come one after the other, D numbers each. D is not handed in: w_up has "
        "2·H·D rows, so D = `w_up.shape[0] // (2 * n_heads)`.",
        "(B, T, H·D) → (B, T, H, D) by `unflatten(-1, (n_heads, -1))`, then `transpose(1, 2)`: the split "
        "into heads of 01.3, once for the keys and once for the values.",
    ),
)

Pair = tuple[Tensor, Tensor]


def down(x: Tensor, w_down: Tensor) -> Tensor:
    """One latent number at a time: a row of w_down with every token."""
    return torch.stack([(x * row).sum(-1) for row in w_down], dim=-1)


def up(c: Tensor, w_up: Tensor, n_heads: int) -> Pair:
    """One head at a time: its D rows of w_up."""
    D = w_up.shape[0] // (2 * n_heads)
    heads = [torch.einsum("btr,dr->btd", c, rows) for rows in w_up.split(D)]
    return torch.stack(heads[:n_heads], dim=1), torch.stack(heads[n_heads:], dim=1)


def draw_down(t: Trial, square: bool = False, dtype: torch.dtype = torch.float32) -> Pair:
    B, T, R = t.pick(2, 3), (1 if t.round == 1 else t.integer(4, 6)), t.pick(10, 12, 14)
    M = R if square else t.pick(18, 20, 24)
    return t.randn(B, T, M, dtype=dtype), (t.randn(R, M) / M**0.5).to(dtype)


def draw_up(t: Trial, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, int]:
    H, T = t.pick(3, 5), (1 if t.round == 1 else t.pick(4, 6))
    B, R, D = 2, 2 * H, t.pick(8, 12)
    return t.randn(B, T, R, dtype=dtype), (t.randn(2 * H * D, R) / R**0.5).to(dtype), H


def both(t: Trial, got: object) -> Pair:
    return t.pair(got, "two tensors: keys, values")


@EXERCISE.requirement(1, "compress: shape and values")
def compressed(t: Trial, compress: Answer, decompress: Answer) -> None:
    """c = w_down x for every token: (B, T, M) becomes (B, T, R)"""
    x, w_down = draw_down(t)
    t.close(compress(x, w_down), down(x, w_down))


@EXERCISE.requirement(1, "compress: R = M, and bf16", rounds=2)
def compressed_square(t: Trial, compress: Answer, decompress: Answer) -> None:
    """the same where w_down is square, so that no error of shape gives a slip away, and in bf16"""
    x, w_down = draw_down(t, square=True)
    t.close(compress(x, w_down), down(x, w_down))
    x, w_down = draw_down(t, dtype=torch.bfloat16)
    t.close(compress(x, w_down), down(x.float(), w_down.float()).bfloat16(), tolerance=6e-2)


@EXERCISE.requirement(1, "decompress: the keys")
def keys(t: Trial, compress: Answer, decompress: Answer) -> None:
    """(B, H, T, D), head h from rows h·D to (h+1)·D − 1 of w_up"""
    c, w_up, n_heads = draw_up(t)
    k, _ = both(t, decompress(c, w_up, n_heads))
    t.close(k, up(c, w_up, n_heads)[0], "keys:")


@EXERCISE.requirement(1, "decompress: the values")
def values(t: Trial, compress: Answer, decompress: Answer) -> None:
    """(B, H, T, D), head h from rows H·D + h·D to H·D + (h+1)·D − 1 of w_up"""
    c, w_up, n_heads = draw_up(t)
    _, v = both(t, decompress(c, w_up, n_heads))
    t.close(v, up(c, w_up, n_heads)[1], "values:")


@EXERCISE.requirement(1, "decompress: bf16, and inputs left alone", rounds=2)
def decompressed_half(t: Trial, compress: Answer, decompress: Answer) -> None:
    """bf16 in, bf16 out, keys and values right within its precision; nothing handed in is changed"""
    c, w_up, n_heads = draw_up(t, torch.bfloat16)
    want = up(c.float(), w_up.float(), n_heads)
    for got, right, what in zip(
        both(t, decompress(c, w_up, n_heads)), want, ("keys:", "values:"), strict=True
    ):
        t.close(got, right.bfloat16(), what, tolerance=6e-2)
    t.unchanged()
