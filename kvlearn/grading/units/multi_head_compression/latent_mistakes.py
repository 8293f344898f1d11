"""03.1: the mistakes that people make with the latent."""

import torch
from torch import Tensor

from kvlearn.grading.units.multi_head_compression.latent import EXERCISE, Pair

__all__ = ["EXERCISE"]


def right_down(x: Tensor, w_down: Tensor) -> Tensor:
    return x @ w_down.T


def right_up(c: Tensor, w_up: Tensor, n_heads: int) -> Pair:
    k, v = (c @ w_up.T).unflatten(-1, (2, n_heads, -1)).permute(2, 0, 3, 1, 4)
    return k, v


@EXERCISE.misconception("w_down used without its transpose", decompress=right_up)
def not_transposed_weight(x: Tensor, w_down: Tensor) -> Tensor:
    """`x @ w_down` multiplies the tokens with the *columns* of w_down. A weight is kept as (out, in), as in
    nn.Linear: it takes a column x to w_down x, and a row to `x @ w_down.T`. Where R = M both run, and only
    one is right."""
    return x @ w_down


@EXERCISE.misconception("w_down reshaped, not transposed", decompress=right_up)
def reshaped_weight(x: Tensor, w_down: Tensor) -> Tensor:
    """`w_down.reshape(M, R)` makes the shapes fit, but it reads the numbers of w_down in the order of memory,
    so that its rows are cut to pieces. To swap rows and columns use `w_down.T`."""
    return x @ w_down.reshape(w_down.shape[::-1])


@EXERCISE.misconception("the latent left transposed", decompress=right_up)
def latent_transposed(x: Tensor, w_down: Tensor) -> Tensor:
    """w_down was put on the left, w_down xᵀ, and the result left as (B, R, T). The numbers are right, and
    they stand in columns; everything else in the course has one token a row: (B, T, R). Transpose once more,
    or write `x @ w_down.T`."""
    return w_down @ x.transpose(1, 2)


@EXERCISE.misconception("the latent reshaped back, not transposed", decompress=right_up)
def latent_reshaped(x: Tensor, w_down: Tensor) -> Tensor:
    """w_down xᵀ is (B, R, T). `reshape(B, T, R)` has the right shape and the wrong content: a row then holds
    numbers of several tokens. `transpose(1, 2)` swaps the two, or write `x @ w_down.T` to begin with."""
    c = w_down @ x.transpose(1, 2)
    return c.reshape(c.shape[0], c.shape[2], c.shape[1])


@EXERCISE.misconception("the latent normalised", decompress=right_up)
def normalised(x: Tensor, w_down: Tensor) -> Tensor:
    """The latent was divided by its root mean square. DeepSeek's MLA does that, with a learned weight for
    every number; here, as in the formula of the task, the latent is w_down x and nothing more."""
    c = x @ w_down.T
    return c * c.float().square().mean(-1, keepdim=True).rsqrt().to(c.dtype)


@EXERCISE.misconception("the first R numbers kept", decompress=right_up)
def cut_off(x: Tensor, w_down: Tensor) -> Tensor:
    """The latent was cut out of x, and w_down not used. Every number of the latent is a weighted sum of *all*
    numbers of the token, with weights that training has found: `x @ w_down.T`."""
    return x[..., : w_down.shape[0]]


@EXERCISE.misconception("values taken for keys", compress=right_down)
def swapped(c: Tensor, w_up: Tensor, n_heads: int) -> Pair:
    """Keys and values are exchanged. The first H·D rows of w_up are the keys', the last H·D the values'. The
    shapes are alike, so nothing complains: only the model talks nonsense."""
    k, v = right_up(c, w_up, n_heads)
    return v, k


@EXERCISE.misconception("key and value head by head", compress=right_down)
def interleaved_by_head(c: Tensor, w_up: Tensor, n_heads: int) -> Pair:
    """The rows of w_up were read as (H, 2, D): key of head 0, value of head 0, key of head 1, … DeepSeek's
    checkpoints are laid out that way. Here all keys come first: (2, H, D), so cut in two *before* you cut
    into heads."""
    k, v = (c @ w_up.T).unflatten(-1, (n_heads, 2, -1)).permute(3, 0, 2, 1, 4)
    return k, v


@EXERCISE.misconception("key and value number by number", compress=right_down)
def interleaved_by_number(c: Tensor, w_up: Tensor, n_heads: int) -> Pair:
    """Every other row of w_up was given to the keys. They come in one block, the first H·D rows, and the
    values in another behind it: `chunk(2, dim=-1)`, or cut with `[..., : H * D]`."""
    k, v = (c @ w_up.T).unflatten(-1, (n_heads, -1, 2)).permute(4, 0, 2, 1, 3)
    return k, v


@EXERCISE.misconception("heads interleaved", compress=right_down)
def heads_interleaved(c: Tensor, w_up: Tensor, n_heads: int) -> Pair:
    """The rows of the keys were cut as (D, H), so that head h took every H-th of them. A head is a run of D
    neighbouring rows: cut as (H, D)."""
    k, v = (c @ w_up.T).unflatten(-1, (2, -1, n_heads)).permute(2, 0, 4, 1, 3)
    return k, v


@EXERCISE.misconception("reshaped without a transpose", compress=right_down)
def viewed(c: Tensor, w_up: Tensor, n_heads: int) -> Pair:
    """`reshape(B, H, T, D)` straight from (B, T, H·D) has the right shape, but it reads in the order of
    memory, where the heads of one token lie side by side: a "head" is then a piece of several tokens. Cut
    into (B, T, H, D) first, then `transpose(1, 2)`. (With T = 1 the two agree.)"""
    B, T, _ = c.shape
    k, v = ((c @ w_up.T)[..., half].reshape(B, n_heads, T, -1) for half in halves(w_up))
    return k, v


@EXERCISE.misconception("heads left behind the tokens", compress=right_down)
def not_in_front(c: Tensor, w_up: Tensor, n_heads: int) -> Pair:
    """This gives (B, T, H, D). Attention multiplies the last two dimensions, so with time in front the heads
    of one token would attend to each other. Swap dimensions 1 and 2."""
    k, v = right_up(c, w_up, n_heads)
    return k.transpose(1, 2), v.transpose(1, 2)


@EXERCISE.misconception("each head has its own piece of the latent", compress=right_down)
def latent_in_pieces(c: Tensor, w_up: Tensor, n_heads: int) -> Pair:
    """The latent was cut into H pieces of R/H numbers, one for each head. That would be H small caches side
    by side. There is *one* latent for all heads, and every head makes its key and its value from all R
    numbers: what the heads have in common is then kept once."""
    w = w_up.unflatten(0, (2, n_heads, -1))
    size = c.shape[-1] // n_heads
    k, v = (
        torch.stack(
            [
                c[..., h * size : (h + 1) * size] @ w[part, h, :, h * size : (h + 1) * size].T
                for h in range(n_heads)
            ],
            dim=1,
        )
        for part in range(2)
    )
    return k, v


@EXERCISE.misconception("half of the latent for keys, half for values", compress=right_down)
def latent_halved(c: Tensor, w_up: Tensor, n_heads: int) -> Pair:
    """The keys were made from the first R/2 numbers of the latent and the values from the rest. Both are made
    from *all* R numbers: a value may use what a key uses too, and nothing has to be kept twice. It is the
    rows of w_up that are shared out, not its columns."""
    half = c.shape[-1] // 2
    keys, values = (w.unflatten(0, (n_heads, -1)) for w in w_up.chunk(2))
    k = torch.einsum("btr,hdr->bhtd", c[..., :half], keys[..., :half])
    v = torch.einsum("btr,hdr->bhtd", c[..., half:], values[..., half:])
    return k, v


@EXERCISE.misconception("w_up reshaped, not transposed", compress=right_down)
def up_reshaped(c: Tensor, w_up: Tensor, n_heads: int) -> Pair:
    """`w_up.reshape(R, 2·H·D)` makes the shapes fit, but it reads the numbers of w_up in the order of memory,
    so that its rows are cut to pieces. To swap rows and columns use `w_up.T`."""
    return right_up(c, w_up.reshape(w_up.shape[::-1]).T, n_heads)


@EXERCISE.misconception("the keys twice", compress=right_down)
def keys_twice(c: Tensor, w_up: Tensor, n_heads: int) -> Pair:
    """The values are the keys once more. Keys and values share the latent, and each has its own way up: the
    last H·D rows of w_up make the values."""
    k, _ = right_up(c, w_up, n_heads)
    return k, k


@EXERCISE.misconception("keys and values not cut apart", compress=right_down)
def not_apart(c: Tensor, w_up: Tensor, n_heads: int) -> Pair:
    """w_up was cut into H heads of 2·D rows, and both results are (B, H, T, 2·D). Half of its rows make keys,
    half make values: D is w_up.shape[0] / (2·H)."""
    both = (c @ w_up.T).unflatten(-1, (n_heads, -1)).transpose(1, 2)
    return both, both


def halves(w_up: Tensor) -> tuple[slice, slice]:
    width = w_up.shape[0] // 2
    return slice(0, width), slice(width, None)
