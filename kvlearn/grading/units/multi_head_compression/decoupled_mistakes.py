"""03.2: the mistakes that people make with decoupled RoPE."""

import torch
from torch import Tensor

from kvlearn.grading.units.multi_head_compression.decoupled import EXERCISE, Turn

__all__ = ["EXERCISE"]


def parts(
    q: Tensor,
    q_rope: Tensor,
    k: Tensor,
    k_rope: Tensor,
    positions: Tensor,
    rope: Turn,
    queries_at: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The right content and position scores, before the scale."""
    at = positions[:, -q.shape[2] :] if queries_at is None else queries_at
    keys = rope(k_rope[:, None], positions).transpose(-2, -1)
    return q @ k.transpose(-2, -1), rope(q_rope, at) @ keys


def width(q: Tensor, q_rope: Tensor) -> int:
    return q.shape[-1] + q_rope.shape[-1]


@EXERCISE.misconception("scaled by √D")
def content_width(
    q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn
) -> Tensor:
    """The sum is divided by √D, as in plain attention. Each score is now a sum over D + Dr products, so its
    spread is √(D + Dr): count the rotary numbers too."""
    content, position = parts(q, q_rope, k, k_rope, positions, rope)
    return (content + position) / q.shape[-1] ** 0.5


@EXERCISE.misconception("each part scaled by its own width")
def own_widths(q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn) -> Tensor:
    """Content was divided by √D and position by √Dr, and the two added. Dr is small, so the position weighs
    far too much. They are one product of D + Dr numbers, cut in two for convenience: one scale for the
    sum, √(D + Dr)."""
    content, position = parts(q, q_rope, k, k_rope, positions, rope)
    return content / q.shape[-1] ** 0.5 + position / q_rope.shape[-1] ** 0.5


@EXERCISE.misconception("only one of the two parts scaled")
def content_scaled(
    q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn
) -> Tensor:
    """The content was divided by √(D + Dr) and the position was not: a division binds more tightly than a
    sum. Put the sum in brackets: (content + position) / √(D + Dr)."""
    content, position = parts(q, q_rope, k, k_rope, positions, rope)
    return content / width(q, q_rope) ** 0.5 + position


@EXERCISE.misconception("scaled by the width of all heads")
def all_heads_width(
    q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn
) -> Tensor:
    """The scores are divided by √(H·(D + Dr)). A score belongs to one head: it is a sum over the D + Dr
    numbers of that head, and √(D + Dr) is its spread."""
    content, position = parts(q, q_rope, k, k_rope, positions, rope)
    return (content + position) / (q.shape[1] * width(q, q_rope)) ** 0.5


@EXERCISE.misconception("no scale")
def unscaled(q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn) -> Tensor:
    """The scores are not divided. A sum of D + Dr products has a spread of √(D + Dr), and without the factor
    1/√(D + Dr) the softmax is too sharp."""
    content, position = parts(q, q_rope, k, k_rope, positions, rope)
    return content + position


@EXERCISE.misconception("divided by D + Dr, not by its root")
def no_root(q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn) -> Tensor:
    """The scores are divided by D + Dr. Variances add up, so a sum of D + Dr products has variance D + Dr and
    spread √(D + Dr): the square root belongs to the formula."""
    content, position = parts(q, q_rope, k, k_rope, positions, rope)
    return (content + position) / width(q, q_rope)


@EXERCISE.misconception("√D + √Dr in place of √(D + Dr)")
def root_by_root(
    q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn
) -> Tensor:
    """The scale is 1 / (√D + √Dr). Variances add up and spreads do not: first D + Dr, then the root."""
    content, position = parts(q, q_rope, k, k_rope, positions, rope)
    return (content + position) / (q.shape[-1] ** 0.5 + q_rope.shape[-1] ** 0.5)


@EXERCISE.misconception("the content rotated too")
def content_rotated(
    q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn
) -> Tensor:
    """q and k were turned as well as q_rope and k_rope. Then the key of a token is a rotation of W_uk c,
    which differs from token to token, and W_uk can no longer be folded into the query: the whole latent would
    have to be decompressed at every step. Positions live in the Dr rotary numbers alone; the content is as it
    is."""
    q, k = rope(q, positions[:, -q.shape[2] :]), rope(k, positions)
    content, position = parts(q, q_rope, k, k_rope, positions, rope)
    return (content + position) / width(q, q_rope) ** 0.5


@EXERCISE.misconception("the content keys rotated")
def content_keys_rotated(
    q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn
) -> Tensor:
    """k was turned along with k_rope. The keys made from the latent stay as they are, or W_uk cannot be
    folded into the query; and a query that is not turned would no longer fit them. Only k_rope is turned."""
    content, position = parts(q, q_rope, rope(k, positions), k_rope, positions, rope)
    return (content + position) / width(q, q_rope) ** 0.5


@EXERCISE.misconception("joined first, rotated whole")
def joined(q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn) -> Tensor:
    """Content and rotary numbers were joined and all D + Dr of them turned. Rotate k_rope and q_rope first
    and join afterwards: the content must stay as it is, or W_uk cannot be folded into the query. And pairs
    (i, i + half) would mix content with position."""
    shared = k_rope[:, None].expand(-1, k.shape[1], -1, -1)
    queries = rope(torch.cat((q, q_rope), -1), positions[:, -q.shape[2] :])
    keys = rope(torch.cat((k, shared), -1), positions)
    return queries @ keys.transpose(-2, -1) / width(q, q_rope) ** 0.5


@EXERCISE.misconception("nothing rotated")
def not_rotated(
    q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn
) -> Tensor:
    """q_rope and k_rope were multiplied as they came. They are handed in *before* the rotation; without it
    the scores know nothing of the order of the tokens. `rope(x, positions)` turns them."""
    scores = q @ k.transpose(-2, -1) + q_rope @ k_rope[:, None].transpose(-2, -1)
    return scores / width(q, q_rope) ** 0.5


@EXERCISE.misconception("only the queries rotated")
def keys_not_rotated(
    q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn
) -> Tensor:
    """q_rope was turned and k_rope was not. A score depends on the distance of two tokens only if both are
    turned, each by its own position."""
    turned = rope(q_rope, positions[:, -q.shape[2] :])
    scores = q @ k.transpose(-2, -1) + turned @ k_rope[:, None].transpose(-2, -1)
    return scores / width(q, q_rope) ** 0.5


@EXERCISE.misconception("only the keys rotated")
def queries_not_rotated(
    q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn
) -> Tensor:
    """k_rope was turned and q_rope was not. A score depends on the distance of two tokens only if both are
    turned, each by its own position."""
    keys = rope(k_rope[:, None], positions).transpose(-2, -1)
    return (q @ k.transpose(-2, -1) + q_rope @ keys) / width(q, q_rope) ** 0.5


@EXERCISE.misconception("the queries' positions restarted at 0")
def restarted(q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn) -> Tensor:
    """The queries were turned to the positions 0, 1, … as if the prompt began with them. In decode they are
    the *last* T of the S tokens: `positions[:, -T:]`. This is the classic slip of a first decode step."""
    at = torch.arange(q.shape[2])[None]
    content, position = parts(q, q_rope, k, k_rope, positions, rope, queries_at=at)
    return (content + position) / width(q, q_rope) ** 0.5


@EXERCISE.misconception("the queries at the first T positions")
def first_positions(
    q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn
) -> Tensor:
    """The queries were turned to `positions[:, :T]`, where the first T tokens stand. They are the last T of
    the S tokens: `positions[:, -T:]`."""
    at = positions[:, : q.shape[2]]
    content, position = parts(q, q_rope, k, k_rope, positions, rope, queries_at=at)
    return (content + position) / width(q, q_rope) ** 0.5


@EXERCISE.misconception("the queries behind the last token")
def behind_the_last(
    q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn
) -> Tensor:
    """The queries were turned to the positions that *follow* the last key's. The new tokens are among the S
    already, their keys with them: they stand at `positions[:, -T:]`."""
    at = positions[:, -1:] + 1 + torch.arange(q.shape[2])
    content, position = parts(q, q_rope, k, k_rope, positions, rope, queries_at=at)
    return (content + position) / width(q, q_rope) ** 0.5


@EXERCISE.misconception("tokens counted, positions not read")
def counted(q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn) -> Tensor:
    """The tokens were taken to stand at 0, 1, 2, … S − 1. That is right only where nothing is missing: with
    padding or dropped tokens the distances differ. The positions are handed in: use them."""
    content, position = parts(q, q_rope, k, k_rope, torch.arange(k.shape[2])[None], rope)
    return (content + position) / width(q, q_rope) ** 0.5


@EXERCISE.misconception("every row at the positions of the first")
def first_row(q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn) -> Tensor:
    """Only `positions[0]` was used. The positions may be (B, S): each sequence of the batch has its own. Hand
    them to `rope` as they are."""
    content, position = parts(q, q_rope, k, k_rope, positions[:1], rope)
    return (content + position) / width(q, q_rope) ** 0.5


@EXERCISE.misconception("one position score for all heads")
def averaged(q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn) -> Tensor:
    """The position scores were averaged over the heads, since k_rope has only one. Only the *key* is shared:
    every head has a rotary query of its own, q_rope[:, h], and so a score of its own."""
    content, position = parts(q, q_rope, k, k_rope, positions, rope)
    return (content + position.mean(1, keepdim=True)) / width(q, q_rope) ** 0.5


@EXERCISE.misconception("the position left out")
def content_only(
    q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn
) -> Tensor:
    """These are the content scores alone. Add the product of the rotated q_rope with the rotated k_rope, or
    the layer cannot tell "dog bites man" from "man bites dog"."""
    return q @ k.transpose(-2, -1) / width(q, q_rope) ** 0.5


@EXERCISE.misconception("softmax taken already")
def weights(q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn) -> Tensor:
    """The result is the weights, after a softmax. The task asks for the scores before it: a mask has to go in
    between, and that is for the caller."""
    content, position = parts(q, q_rope, k, k_rope, positions, rope)
    return ((content + position) / width(q, q_rope) ** 0.5).softmax(-1)


@EXERCISE.misconception("masked already")
def masked(q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor, rope: Turn) -> Tensor:
    """Scores with later tokens are −∞. The task asks for all scores; hiding the future is the mask's
    business, which the caller puts in."""
    content, position = parts(q, q_rope, k, k_rope, positions, rope)
    T, S = q.shape[2], k.shape[2]
    future = ~torch.ones(T, S, dtype=torch.bool).tril(S - T)
    return ((content + position) / width(q, q_rope) ** 0.5).masked_fill(future, -torch.inf)
