"""Unit 03: requirements and hints of the exercises on multi-head compression."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvlearn.grading import (
    Answer,
    CheckContext,
    Difference,
    Exercise,
    Made,
    Stop,
    compare,
    describe,
    new_tensors,
    plain_number,
)


def rope(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """x (B, heads, n, Dr) with every token's pairs (i, i + Dr/2) turned to its position, as in 01.4.

    ``positions`` holds integers, (1, n) or (B, n). Computed in fp32, returned in x's dtype. ValueError where
    the shapes do not fit.
    """
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(
            f"x: expected shape (B, heads, n, Dr) with Dr even, got {tuple(x.shape)} (one head for all is "
            "heads = 1)"
        )
    if positions.ndim != 2 or positions.shape[0] not in (1, x.shape[0]) or positions.shape[1] != x.shape[2]:
        raise ValueError(
            f"positions: expected shape (1, {x.shape[2]}) or ({x.shape[0]}, {x.shape[2]}), "
            f"got {tuple(positions.shape)}"
        )
    half = x.shape[-1] // 2
    omega = theta ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angles = positions[:, None, :, None] * omega  # (B, 1, n, half)
    a, b = x.float().split(half, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# 03.1: down to the latent and up again, compared with a loop over heads and their rows

latent = Exercise(
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
        "(B, T, H·D) → (B, T, H, D) by `unflatten(-1, (n_heads, -1))`, then `transpose(1, 2)`: chapter 01's "
        "split into heads, once for the keys and once for the values.",
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


def draw_down(t: CheckContext, square: bool = False, dtype: torch.dtype = torch.float32) -> Pair:
    B, T, R = t.pick(2, 3), (1 if t.round == 1 else t.integer(4, 6)), t.pick(10, 12, 14)
    M = R if square else t.pick(18, 20, 24)
    return t.randn(B, T, M, dtype=dtype), (t.randn(R, M) / M**0.5).to(dtype)


def draw_up(t: CheckContext, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, int]:
    H, T = t.pick(3, 5), (1 if t.round == 1 else t.pick(4, 6))
    B, R, D = 2, 2 * H, t.pick(8, 12)
    return t.randn(B, T, R, dtype=dtype), (t.randn(2 * H * D, R) / R**0.5).to(dtype), H


def latent_both(t: CheckContext, got: object) -> Pair:
    return t.pair(got, "two tensors: keys, values")


@latent.requirement(1, "compress: shape and values")
def compressed(t: CheckContext, compress: Answer, decompress: Answer) -> None:
    """c = w_down x for every token: (B, T, M) becomes (B, T, R)"""
    x, w_down = draw_down(t)
    t.close(compress(x, w_down), down(x, w_down))


@latent.requirement(1, "compress: R = M, and bf16", rounds=2)
def compressed_square(t: CheckContext, compress: Answer, decompress: Answer) -> None:
    """the same where w_down is square, so that no error of shape gives a slip away, and in bf16"""
    x, w_down = draw_down(t, square=True)
    t.close(compress(x, w_down), down(x, w_down))
    x, w_down = draw_down(t, dtype=torch.bfloat16)
    t.close(compress(x, w_down), down(x.float(), w_down.float()).bfloat16(), tolerance=6e-2)


@latent.requirement(1, "decompress: the keys")
def keys(t: CheckContext, compress: Answer, decompress: Answer) -> None:
    """(B, H, T, D), head h from rows h·D to (h+1)·D − 1 of w_up"""
    c, w_up, n_heads = draw_up(t)
    k, _ = latent_both(t, decompress(c, w_up, n_heads))
    t.close(k, up(c, w_up, n_heads)[0], "keys:")


@latent.requirement(1, "decompress: the values")
def latent_values(t: CheckContext, compress: Answer, decompress: Answer) -> None:
    """(B, H, T, D), head h from rows H·D + h·D to H·D + (h+1)·D − 1 of w_up"""
    c, w_up, n_heads = draw_up(t)
    _, v = latent_both(t, decompress(c, w_up, n_heads))
    t.close(v, up(c, w_up, n_heads)[1], "values:")


@latent.requirement(1, "decompress: bf16, and inputs left alone", rounds=2)
def decompressed_half(t: CheckContext, compress: Answer, decompress: Answer) -> None:
    """bf16 in, bf16 out, keys and values right within its precision; nothing handed in is changed"""
    c, w_up, n_heads = draw_up(t, torch.bfloat16)
    want = up(c.float(), w_up.float(), n_heads)
    for got, right, what in zip(
        latent_both(t, decompress(c, w_up, n_heads)), want, ("keys:", "values:"), strict=True
    ):
        t.close(got, right.bfloat16(), what, tolerance=6e-2)
    t.unchanged()


# 03.2: scores with decoupled RoPE, compared with complex numbers, one head after the other

decoupled = Exercise(
    id="03.2",
    slug="decoupled",
    title="Scores with decoupled RoPE",
    answers=("decoupled_scores",),
    hints=(
        "A sum of two products, each (B, H, T, S): content `q @ k.transpose(-2, -1)`, and position, rotated "
        "q_rope with rotated k_rope. The scale comes last, over the sum.",
        "`rope` wants four dimensions. The one rotary key for all heads is a single head: "
        "`k_rope[:, None]` is (B, 1, S, Dr), and in the product it serves every head.",
        "The T queries are the last T of the S tokens, so they are at `positions[:, -T:]`. Only q_rope and "
        "k_rope are turned, never q and k.",
        "A score is a sum over D + Dr products, whatever they are called, so its spread is √(D + Dr): divide "
        "the sum by `(q.shape[-1] + q_rope.shape[-1]) ** 0.5`.",
    ),
)

DecoupledInputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, n, Dr): each pair as a complex number, times exp(i·m·ω)."""
    half = x.shape[-1] // 2
    omega = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones((), dtype=torch.float64), positions.double()[..., None] * omega)
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat((z.real, z.imag), dim=-1)


def decoupled_reference(q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor) -> Tensor:
    T, width = q.shape[2], q.shape[-1] + q_rope.shape[-1]
    keys = turned(k_rope, positions)
    heads = []
    for h in range(q.shape[1]):
        content = torch.einsum("btd,bsd->bts", q[:, h].double(), k[:, h].double())
        queries = turned(q_rope[:, h], positions[:, -T:])
        heads.append((content + torch.einsum("btd,bsd->bts", queries, keys)) / width**0.5)
    return torch.stack(heads, dim=1).to(q.dtype)


def decoupled_draw(
    t: CheckContext, positions: str = "from 0", dtype: torch.dtype = torch.float32
) -> DecoupledInputs:
    """Fresh inputs; T = 1 in the second round, and always more keys than queries."""
    B, H, T = 2, t.pick(3, 5), (1 if t.round == 1 else t.integer(3, 5))
    S, D, Dr = T + t.integer(4, 7), t.pick(12, 16), t.pick(4, 6)
    places = torch.arange(S)[None]
    if positions == "later":
        places = places + t.integer(20, 60)
    if positions == "gaps":
        places = torch.tensor([sorted(t.random.sample(range(5, 300), S)) for _ in range(B)])
    q, q_rope = t.randn(B, H, T, D, dtype=dtype), t.randn(B, H, T, Dr, dtype=dtype)
    return q, q_rope, t.randn(B, H, S, D, dtype=dtype), t.randn(B, S, Dr, dtype=dtype), places


def decoupled_same(t: CheckContext, decoupled_scores: Answer, inputs: DecoupledInputs) -> None:
    t.close(decoupled_scores(*inputs, rope), decoupled_reference(*inputs), tolerance=1e-3)


def same_but_for_scale(t: CheckContext, decoupled_scores: Answer, inputs: DecoupledInputs) -> None:
    got, want = decoupled_scores(*inputs, rope), decoupled_reference(*inputs)
    if isinstance(got, Tensor) and got.dtype.is_floating_point:
        fitted = got * (want.norm() / got.norm())
        got = fitted if compare(fitted, want, tolerance=1e-3) is None else got
    t.close(got, want, tolerance=1e-3)


@decoupled.requirement(1, "the content alone, whatever its scale", rounds=2)
def content(t: CheckContext, decoupled_scores: Answer) -> None:
    """some multiple of q · k, of shape (B, H, T, S), where the rotary query is zero"""
    q, q_rope, k, k_rope, positions = decoupled_draw(t, "later")
    same_but_for_scale(t, decoupled_scores, (q, 0 * q_rope, k, k_rope, positions))


@decoupled.requirement(1, "the position alone, whatever its scale", rounds=2)
def position(t: CheckContext, decoupled_scores: Answer) -> None:
    """some multiple of rotated q_rope · rotated k_rope, the same key for all heads, where q is zero"""
    q, q_rope, k, k_rope, positions = decoupled_draw(t)
    same_but_for_scale(t, decoupled_scores, (0 * q, q_rope, k, k_rope, positions))


@decoupled.requirement(1, "both, from position 0")
def decoupled_both(t: CheckContext, decoupled_scores: Answer) -> None:
    """the sum of the two over √(D + Dr)"""
    decoupled_same(t, decoupled_scores, decoupled_draw(t))


@decoupled.requirement(1, "both, tokens with gaps, rows that differ")
def gaps(t: CheckContext, decoupled_scores: Answer) -> None:
    """the same at any positions, (B, S): padding leaves gaps, and each row has its own"""
    decoupled_same(t, decoupled_scores, decoupled_draw(t, "gaps"))


@decoupled.requirement(1, "bf16, and inputs left alone", rounds=2)
def decoupled_half(t: CheckContext, decoupled_scores: Answer) -> None:
    """bf16 in, bf16 out, right within its precision; nothing handed in is changed"""
    inputs = decoupled_draw(t, "later", torch.bfloat16)
    t.close(decoupled_scores(*inputs, rope), decoupled_reference(*inputs), tolerance=6e-2)
    t.unchanged()


# 03.3: up-projections folded into query and output, compared with the path that decompresses

absorb = Exercise(
    id="03.3",
    slug="absorb",
    title="Absorb the up-projections",
    answers=("absorb", "unabsorb"),
    hints=(
        "Write a score out: q · (W c) = Σ_d q[d] Σ_r W[d, r] c[r]. Add up over d *first*, and what is left "
        "is a product with c: Σ_r (Σ_d q[d] W[d, r]) c[r]. The inner sum is the absorbed query.",
        "In matrices: q · (W c) = (Wᵀ q) · c. A transpose, no inverse: nothing has to be undone, the "
        "product is only taken in another order.",
        "The values: Σ_s p_s (W_uv c_s) = W_uv (Σ_s p_s c_s). The weighted sum of latents, o, has R "
        "numbers, and W_uv[h] takes it up to D: here the matrix is used as it is, not transposed.",
        'Every head has its own matrix and meets no other: `torch.einsum("bhtd,hdr->bhtr", q, w_uk)` and '
        '`torch.einsum("bhtr,hdr->bhtd", o, w_uv)`. The letter h is in both inputs and in the result.',
    ),
)

Draw = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def absorb_draw(t: CheckContext, dtype: torch.dtype = torch.float32) -> Draw:
    """q, the weights of some attention, latents, W_uk and W_uv; D = R in the first round, T = 1 in the
    second."""
    B, H, T = 2, t.pick(3, 5), (1 if t.round == 1 else t.pick(4, 6))
    D = t.pick(8, 12)
    R = D if t.round == 0 else t.pick(15, 20)
    S = T + t.pick(10, 14)
    weights = t.randn(B, H, T, S).softmax(-1)
    w_uk, w_uv = ((t.randn(H, D, R) / R**0.5).to(dtype) for _ in range(2))
    return t.randn(B, H, T, D, dtype=dtype), weights.to(dtype), t.randn(B, S, R, dtype=dtype), w_uk, w_uv


def per_head(c: Tensor, w: Tensor) -> Tensor:
    """Keys (or values) of all heads: (B, S, R) with (H, D, R) gives (B, H, S, D)."""
    return torch.stack([torch.einsum("bsr,dr->bsd", c, matrix) for matrix in w], dim=1)


def naive_scores(q: Tensor, c: Tensor, w_uk: Tensor) -> Tensor:
    return torch.einsum("bhtd,bhsd->bhts", q, per_head(c, w_uk))


def naive_output(weights: Tensor, c: Tensor, w_uv: Tensor) -> Tensor:
    return torch.einsum("bhts,bhsd->bhtd", weights, per_head(c, w_uv))


@absorb.requirement(1, "absorb: shape and values")
def absorb_absorbed(t: CheckContext, absorb: Answer, unabsorb: Answer) -> None:
    """(B, H, T, D) becomes (B, H, T, R): number r is q · (column r of W_uk[h])"""
    q, _, _, w_uk, _ = absorb_draw(t)
    columns = [(q[..., None] * w_uk[None, :, None])[..., r].sum(-1) for r in range(w_uk.shape[-1])]
    t.close(absorb(q, w_uk), torch.stack(columns, dim=-1))


@absorb.requirement(1, "absorb: the scores of the naive path")
def scores(t: CheckContext, absorb: Answer, unabsorb: Answer) -> None:
    """absorb(q) · c = q · (W_uk c) for every head and every latent c"""
    q, _, c, w_uk, _ = absorb_draw(t)
    got = absorb(q, w_uk)
    if t.shape(got, (*q.shape[:3], c.shape[-1])):
        t.close(torch.einsum("bhtr,bsr->bhts", got, c), naive_scores(q, c, w_uk), "scores:", tolerance=1e-3)


@absorb.requirement(1, "unabsorb: shape and values")
def unabsorbed(t: CheckContext, absorb: Answer, unabsorb: Answer) -> None:
    """(B, H, T, R) becomes (B, H, T, D): W_uv[h] o for every head and query"""
    _, weights, c, _, w_uv = absorb_draw(t)
    o = torch.randn(*weights.shape[:3], c.shape[-1], generator=t.generator)
    rows = [(o[..., None, :] * w_uv[None, :, None])[..., d, :].sum(-1) for d in range(w_uv.shape[1])]
    t.close(unabsorb(o, w_uv), torch.stack(rows, dim=-1))


@absorb.requirement(1, "unabsorb: the output of the naive path")
def output(t: CheckContext, absorb: Answer, unabsorb: Answer) -> None:
    """W_uv applied once to the weighted sum of latents gives the weighted sum of values"""
    _, weights, c, _, w_uv = absorb_draw(t)
    got = unabsorb(torch.einsum("bhts,bsr->bhtr", weights, c), w_uv)
    t.close(got, naive_output(weights, c, w_uv), tolerance=1e-3)


@absorb.requirement(1, "bf16, and inputs left alone", rounds=2)
def absorb_half(t: CheckContext, absorb: Answer, unabsorb: Answer) -> None:
    """bf16 in, bf16 out, right within its precision; nothing handed in is changed"""
    q, weights, c, w_uk, w_uv = absorb_draw(t, torch.bfloat16)
    want = torch.einsum("bhtd,hdr->bhtr", q.float(), w_uk.float())
    t.close(absorb(q, w_uk), want.bfloat16(), "absorb:", tolerance=6e-2)
    o = torch.einsum("bhts,bsr->bhtr", weights, c)
    want = torch.einsum("bhtr,hdr->bhtd", o.float(), w_uv.float())
    t.close(unabsorb(o, w_uv), want.bfloat16(), "unabsorb:", tolerance=6e-2)
    t.unchanged()


# 03.4: one decode step in the latent space, compared with decompressed keys and values

step = Exercise(
    id="03.4",
    slug="step",
    title="A decode step in the latent space",
    answers=("latent_step",),
    hints=(
        "Take the cache apart: `rows = cache[:, :length]`, `c = rows[..., :R]`, `k_rope = rows[..., R:]`, "
        "with R = `w_uk.shape[-1]`. Slices are views: nothing is copied.",
        'Fold W_uk into the query, as in 03.3: `torch.einsum("bhd,hdr->bhr", q, w_uk)`. Then the content '
        "scores of all heads are *one* product, (B, H, R) with (B, R, length): the heads are its rows.",
        "Scores = (absorbed query · c + q_rope · k_rope) / √(D + Dr), with D = `q.shape[-1]`: what a score "
        "means has not changed. Softmax over the tokens, the last dimension.",
        "The weighted sum is over latents, `weights @ c`, (B, H, R); the rotary numbers take no part. Only "
        'then go up, once for each head: `torch.einsum("bhr,hdr->bhd", o, w_uv)`.',
    ),
)

StepInputs = tuple[Tensor, Tensor, Tensor, int, Tensor, Tensor]


def step_draw(
    t: CheckContext, length: int, max_len: int, behind: str = "zeros", dtype: torch.dtype = torch.float32
) -> StepInputs:
    """q, q_rope, cache, length, W_uk, W_uv. D is odd and prime, so that no product of other sizes is taken
    for one with D; R is far from D + Dr, so that a scale by √R shows in bf16 too."""
    B, H, D, R, Dr = 2, t.pick(3, 5), t.pick(11, 17), t.pick(42, 48), t.pick(4, 6)
    cache = t.randn(B, max_len, R + Dr)
    cache[:, length:] = 0.0 if behind == "zeros" else 2 * cache[:, length:]
    w_uk, w_uv = ((t.randn(H, D, R) / R**0.5).to(dtype) for _ in range(2))
    q, q_rope = t.randn(B, H, D, dtype=dtype), t.randn(B, H, Dr, dtype=dtype)
    return 2 * q, q_rope, cache.to(dtype), length, w_uk, w_uv


def step_reference(
    q: Tensor, q_rope: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor
) -> Tensor:
    """Head by head, with keys [W_uk c ; k_rope] and values W_uv c, in double precision."""
    R, width = w_uk.shape[-1], q.shape[-1] + q_rope.shape[-1]
    rows = cache[:, :length].double()
    heads = []
    for h in range(q.shape[1]):
        keys = torch.cat((torch.einsum("bsr,dr->bsd", rows[..., :R], w_uk[h].double()), rows[..., R:]), -1)
        query = torch.cat((q[:, h], q_rope[:, h]), -1).double()
        weights = (torch.einsum("bd,bsd->bs", query, keys) / width**0.5).softmax(-1)
        values = torch.einsum("bsr,dr->bsd", rows[..., :R], w_uv[h].double())
        heads.append(torch.einsum("bs,bsd->bd", weights, values))
    return torch.stack(heads, dim=1).to(q.dtype)


@step.requirement(1, "a single token in the cache")
def single(t: CheckContext, latent_step: Answer) -> None:
    """all the weight is on it, so the output of head h is W_uv[h] c, (B, H, D), whatever the scores"""
    inputs = step_draw(t, 1, t.integer(5, 9))
    t.close(latent_step(*inputs), step_reference(*inputs))


@step.requirement(1, "a full cache")
def full(t: CheckContext, latent_step: Answer) -> None:
    """softmax((q · W_uk c + q_rope · k_rope) / √(D + Dr)) over all tokens, times W_uv c"""
    length = t.integer(7, 12)
    inputs = step_draw(t, length, length)
    t.close(latent_step(*inputs), step_reference(*inputs), tolerance=1e-3)


@step.requirement(1, "slots behind the length")
def behind(t: CheckContext, latent_step: Answer) -> None:
    """the first `length` slots count and no other, whether the rest holds zeros or what an earlier sequence
    left"""
    length = t.integer(5, 9)
    for left in ("zeros", "old tokens"):
        inputs = step_draw(t, length, length + t.integer(3, 6), left)
        t.close(latent_step(*inputs), step_reference(*inputs), tolerance=1e-3)


@step.requirement(1, "large scores, bf16, inputs left alone", rounds=2)
def hard(t: CheckContext, latent_step: Answer) -> None:
    """finite and right when scores reach ±1000; bf16 in, bf16 out; nothing handed in is changed"""
    length = t.integer(7, 12)
    q, q_rope, cache, _, w_uk, w_uv = step_draw(t, length, length)
    inputs = (300 * q, q_rope, cache, length, w_uk, w_uv)
    t.close(latent_step(*inputs), step_reference(*inputs), tolerance=5e-3)
    inputs = step_draw(t, length, length, dtype=torch.bfloat16)
    t.close(latent_step(*inputs), step_reference(*inputs), tolerance=8e-2)
    t.unchanged()


@step.requirement(2, "never the keys or values of every head", rounds=1)
def small(t: CheckContext, latent_step: Answer) -> None:
    """right, and no tensor on the way that holds D numbers for each token, or the latents once for each
    head"""
    length = t.pick(29, 31, 37)
    inputs = step_draw(t, length, t.pick(41, 43))
    with new_tensors() as made:
        got = latent_step(*inputs)
    t.close(got, step_reference(*inputs), tolerance=1e-3)
    fault, largest = too_large(made, inputs)
    came = f"{fault}: a tensor of shape {largest.shape}" if largest else ""
    t.note(fault, Difference("", "nothing of that size", came) if largest else None)


def too_large(made: list[Made], inputs: StepInputs) -> tuple[str, Made | None]:
    """Tensors that should not be built, recognised by the sizes that occur in them."""
    _, q_rope, cache, length, w_uk, _ = inputs
    H, D, R = w_uk.shape
    for one in made:
        for S in (length, cache.shape[1]):
            if one.numel and one.numel % (S * D) == 0:
                return "keys or values were decompressed", one
            if one.numel and any(one.numel % (H * S * n) == 0 for n in (R, R + q_rope.shape[-1])):
                return "the latents were copied for every head", one
    return "", None


# 03.5: compression initialised from activations, compared with the best that any rank can do

svd = Exercise(
    id="03.5",
    slug="svd",
    title="Initialise by the SVD of activations",
    answers=("svd_init",),
    hints=(
        "`torch.linalg.svd(A, full_matrices=False)` gives U, the singular values in falling order, and Vᵀ "
        "(it is returned transposed already), with A = U diag(s) Vᵀ. Which of the three speaks of columns, "
        "that is of numbers of a token, and not of single tokens?",
        "The rows of Vᵀ are directions in the space of a token's 2·H·D numbers, the most important first. "
        "The first R of them span the subspace in which A loses least.",
        "To encode is to measure a token along each of these directions: one row of `encode` for each. To "
        "decode is to walk as far along them again. They are orthonormal, so the way back is the "
        "transpose.",
        "`encode = Vh[:rank]` and `decode = encode.T`. No singular values: they say how far the tokens "
        "reach along a direction, and the latent measures that for each token anew.",
    ),
)


def svd_draw(t: CheckContext, few: bool = False, offset: float = 0.0) -> tuple[Tensor, int]:
    """Activations (tokens, 2·H·D) whose singular values fall slowly, and a rank."""
    width = 2 * t.pick(3, 5) * 4
    n_tokens = width - t.integer(5, 8) if few else width + t.integer(20, 40)
    left, right = (torch.linalg.qr(t.randn(n, n).double())[0] for n in (n_tokens, width))
    n = min(n_tokens, width)
    spectrum = torch.linspace(10.0, 1.0, n, dtype=torch.float64)
    keys_values = (left[:, :n] * spectrum) @ right[:n]
    return (keys_values + offset * right[-1]).float(), t.integer(4, 9)


def projected(keys_values: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank (Eckart and Young, 1936), in double precision."""
    U, s, Vh = torch.linalg.svd(keys_values.double(), full_matrices=False)
    return ((U[:, :rank] * s[:rank]) @ Vh[:rank]).float()


def pair(t: CheckContext, svd_init: Answer, keys_values: Tensor, rank: int) -> Pair:
    """encode and decode in their right shapes, or the end of this round."""
    encode, decode = t.pair(svd_init(keys_values, rank), "two tensors: encode, decode")
    width = keys_values.shape[1]
    fits = [t.shape(encode, (rank, width), "encode:"), t.shape(decode, (width, rank), "decode:")]
    if not all(fits):
        raise Stop
    return encode, decode


def reconstruction(
    t: CheckContext, svd_init: Answer, keys_values: Tensor, rank: int, of: Tensor | None = None
) -> Tensor:
    encode, decode = pair(t, svd_init, keys_values, rank)
    return (keys_values if of is None else of) @ encode.T @ decode.T


@svd.requirement(1, "the right subspace")
def subspace(t: CheckContext, svd_init: Answer) -> None:
    """encode (R, 2·H·D) and decode (2·H·D, R), whose rows and columns span the R directions in which the
    tokens reach furthest; in any basis, of any lengths"""
    keys_values, rank = svd_draw(t)
    encode, decode = pair(t, svd_init, keys_values, rank)
    Vh = torch.linalg.svd(keys_values.double(), full_matrices=False)[2][:rank]
    for basis, what in ((encode.T, "encode:"), (decode, "decode:")):
        Q, _ = torch.linalg.qr(basis.double())
        t.close(Q @ Q.T, Vh.T @ Vh, f"{what} projection onto its directions", tolerance=3e-3)


@svd.requirement(2, "the best of this rank")
def best(t: CheckContext, svd_init: Answer) -> None:
    """‖A − A encodeᵀ decodeᵀ‖ as small as any matrices of rank R can make it, and so every token as the best
    approximation has it"""
    keys_values, rank = svd_draw(t)
    got = reconstruction(t, svd_init, keys_values, rank)
    least = (keys_values - projected(keys_values, rank)).norm()
    error = (keys_values - got).norm() / least
    t.close(error, torch.tensor(1.0), "error / smallest error:", tolerance=2e-3)
    t.close(got, projected(keys_values, rank), "A encodeᵀ decodeᵀ:", tolerance=3e-3)


@svd.requirement(1, "tokens it has not seen", rounds=2)
def unseen(t: CheckContext, svd_init: Answer) -> None:
    """new tokens go through the same two matrices: they keep their part in the subspace and lose the rest"""
    keys_values, rank = svd_draw(t)
    new = t.randn(t.integer(3, 5), keys_values.shape[1])
    Vh = torch.linalg.svd(keys_values.double(), full_matrices=False)[2][:rank]
    got = reconstruction(t, svd_init, keys_values, rank, new)
    t.close(got, (new.double() @ Vh.T @ Vh).float(), "new tokens:", tolerance=3e-3)


@svd.requirement(1, "a mean that is not zero, and fewer tokens than numbers")
def offset(t: CheckContext, svd_init: Answer) -> None:
    """no mean is subtracted: there is no bias that could add it again; tokens may be fewer than 2·H·D"""
    keys_values, rank = svd_draw(t, few=t.round == 1, offset=2.0)
    got = reconstruction(t, svd_init, keys_values, rank)
    t.close(got, projected(keys_values, rank), "A encodeᵀ decodeᵀ:", tolerance=3e-3)


@svd.requirement(1, "full rank, and the input left alone", rounds=2)
def everything(t: CheckContext, svd_init: Answer) -> None:
    """with R = 2·H·D nothing is lost: A comes back; A itself is not changed"""
    keys_values, _ = svd_draw(t)
    got = reconstruction(t, svd_init, keys_values, keys_values.shape[1])
    t.close(got, keys_values, "A encodeᵀ decodeᵀ:", tolerance=3e-3)
    t.unchanged()


# 03.6: what the naive and the absorbed path cost, compared with a count head by head and a search

naive_or_absorbed = Exercise(
    id="03.6",
    slug="roads",
    title="Naive or absorbed: count, and choose",
    answers=("naive_or_absorbed",),
    hints=(
        "A product of an (n, m) with an (m, p) matrix has n·p results of m multiply-adds each: 2·n·m·p "
        "FLOPs. Write down the products of each path, with their shapes, and add.",
        "Naive: first S tokens go up, (S, R) @ (R, 2·H·D), once, however many queries there are. Then for "
        "every head (T, D + Dr) @ (D + Dr, S) for the scores and (T, S) @ (S, D) for the output.",
        "Absorbed: for every head (T, D) @ (D, R) in and (T, R) @ (R, D) out; between them (T, R + Dr) @ "
        "(R + Dr, S) and (T, S) @ (S, R). Nothing here happens once for each token of the cache *except* "
        "attention, whose rows are now R + Dr wide.",
        "Both are straight lines in T. Absorbed starts at 0, naive at 4·S·R·H·D. With `slope` the "
        "difference of what one more query costs, absorbed wins while T · slope < 4·S·R·H·D: always if "
        "slope ≤ 0, else up to `(4 * S * R * H * D - 1) // slope`, which leaves a tie out.",
    ),
)


# H, D, R, Dr of DeepSeek-V2-Lite, DeepSeek-V2 and -V3, MiniCPM3 and Kimi K2, from their config.json.
PATH_MODELS = [(16, 128, 512, 64), (128, 128, 512, 64), (40, 64, 256, 32), (64, 128, 512, 64)]


def product(n: int, m: int, p: int) -> int:
    """FLOPs of an (n, m) by an (m, p) matrix."""
    return 2 * n * m * p


def naive(H: int, D: int, R: int, Dr: int, S: int, T: int) -> int:
    one_head = 2 * product(S, R, D) + product(T, D + Dr, S) + product(T, S, D)
    return H * one_head


def absorbed(H: int, D: int, R: int, Dr: int, S: int, T: int) -> int:
    one_head = product(T, D, R) + product(T, R + Dr, S) + product(T, S, R) + product(T, R, D)
    return H * one_head


@cache
def largest(H: int, D: int, R: int, Dr: int, S: int) -> int | None:
    """Tries T: doubling until absorbed loses, then halving the interval."""

    def wins(T: int) -> bool:
        return absorbed(H, D, R, Dr, S, T) < naive(H, D, R, Dr, S, T)

    low, high = 0, 1
    while wins(high):
        low, high = high, 2 * high
        if high > 10**18:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if wins(middle) else (low, middle)
    return low


def model(t: CheckContext, S: int | None = None) -> tuple[int, ...]:
    """H, D, R, Dr, S, T of a real model: a few queries before a long cache. In the first round it is short
    enough that T tokens more or less in it move the largest T."""
    drawn = t.integer(300, 600) if t.round == 0 else t.integer(1000, 9000)
    return *PATH_MODELS[t.round % len(PATH_MODELS)], S or drawn, t.pick(1, 4, 256, 700)


def field(t: CheckContext, got: Any, name: str) -> Any:
    if not isinstance(got, dict) or name not in got:
        came = f"keys {list(got)[:6]}" if isinstance(got, dict) else describe(got)
        t.true(False, f"a dict with the key {name!r}", came)
        raise Stop
    return got[name]


def largest_is(t: CheckContext, naive_or_absorbed: Answer, shape: tuple[int, ...], want: int | None) -> None:
    got = field(t, naive_or_absorbed(*shape), "largest_T")
    if want is None:
        shown = describe(got) if got is not None else "None"
        t.true(got is None, "largest_T None: absorbed wins at any T", f"largest_T {shown}")
        return
    plain = plain_number(got)
    whole = int(plain) if plain is not None and abs(plain) < 1e18 and plain == int(plain) else plain
    if whole is None and got is None:
        t.true(False, f"largest_T {want:,}", "largest_T None, which means that absorbed always wins")
        return
    t.number(got if whole is None else whole, want, "largest_T")


@naive_or_absorbed.requirement(1, "naive", rounds=4)
def naive_flops(t: CheckContext, naive_or_absorbed: Answer) -> None:
    """2·S·R·H·2D to decompress, then 2·T·S·H·(2D + Dr) to attend; shapes of DeepSeek, MiniCPM3, Kimi K2"""
    shape = model(t)
    t.number(field(t, naive_or_absorbed(*shape), "naive"), naive(*shape), "naive")


@naive_or_absorbed.requirement(1, "absorbed", rounds=4)
def absorbed_flops(t: CheckContext, naive_or_absorbed: Answer) -> None:
    """2·T·H·D·R · 2 for the ways in and out, and 2·T·S·H·(2R + Dr) to attend"""
    shape = model(t)
    t.number(field(t, naive_or_absorbed(*shape), "absorbed"), absorbed(*shape), "absorbed")


@naive_or_absorbed.requirement(2, "the largest T at which absorbed wins", rounds=4)
def largest_t(t: CheckContext, naive_or_absorbed: Answer) -> None:
    """the last whole number of queries at which absorbed has fewer FLOPs, whatever T was handed in; where the
    cache is so short that it lies beyond S, it is that number all the same"""
    shape = model(t)
    largest_is(t, naive_or_absorbed, shape, largest(*shape[:-1]))
    # With R < D the lines cross behind S while S · (D − R) < D · R, and never cross beyond that.
    D = (64, 96, 128, 160)[t.round]
    R = D * 3 // 4
    short = (t.integer(3, 8), D, R, 16, D * R // (D - R) * t.integer(2, 8) // 10, t.integer(1, 9))
    largest_is(t, naive_or_absorbed, short, largest(*short[:-1]))


@naive_or_absorbed.requirement(1, "where absorbed always wins, or never")
def always_or_never(t: CheckContext, naive_or_absorbed: Answer) -> None:
    """None where it wins at every T, as with R < D and a long cache, and where each further query costs the
    same on both paths; 0 where it loses already at T = 1"""
    H, T = t.pick(3, 5, 8), t.integer(1, 9)
    D = t.pick(64, 96, 128)
    always = (H, D, D // 2, 16, t.integer(1000, 5000), T)
    largest_is(t, naive_or_absorbed, always, None)
    equal = (H, D, D // 2, 16, D, T)  # one more query costs the same on both paths
    largest_is(t, naive_or_absorbed, equal, None)
    never = (H, D, 4 * D, 16, 1, T)
    largest_is(t, naive_or_absorbed, never, 0)


@naive_or_absorbed.requirement(1, "a tie", rounds=2)
def tie(t: CheckContext, naive_or_absorbed: Answer) -> None:
    """equal FLOPs are no win: the largest T is the one before"""
    D = t.pick(16, 32, 64)
    shape = (t.pick(3, 5, 8), D, 2 * D, t.pick(8, 16), 2 * D, t.integer(1, 9))
    largest_is(t, naive_or_absorbed, shape, largest(*shape[:-1]))


# 03.7: the rank that a budget of memory allows, compared with trying every rank

budget = Exercise(
    id="03.7",
    slug="budget",
    title="Choose a rank for a memory budget",
    answers=("rank_for_budget",),
    hints=(
        "Count what one token leaves behind: in every layer R + Dr numbers, of so many bytes. No factor 2, "
        "since keys and values share the latent, and no heads. `getattr(torch, name).itemsize` knows the "
        "bytes.",
        "The budget is budget_gib · 2³⁰ bytes, for batch · max_len tokens in every layer. Divide, and you "
        "have the R + Dr numbers that a token may leave in a layer.",
        "Take off Dr, then round *down* to a multiple of 64: `numbers // 64 * 64`. Then the cap: a "
        "multiple of 64 that is at most 2·H·D.",
        "A rank below 64 is no rank: raise ValueError. The ratios compare numbers per token and layer: "
        "2·H·D / (R + Dr) with MHA, 2·G·D / (R + Dr) with GQA, G the KV heads.",
    ),
)

Config = dict[str, Any]
BYTES = {"bfloat16": 2, "float32": 4, "float8_e4m3fn": 1}
STEP = 64

# The shapes of Gemma 3 1B, Llama 3.1 8B and DeepSeek-V3, whatever each of them really caches.
BUDGET_MODELS: list[Config] = [
    {"num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256},
    {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    {"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "head_dim": 128},
]
SMALL: Config = {"num_hidden_layers": 9, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 48}


def cache_bytes(config: Config, rank: int, tokens: int) -> int:
    """Layer by layer: one row of the latent and the rotary key for every token."""
    row = (rank + config["qk_rope_head_dim"]) * BYTES[config["torch_dtype"]]
    return sum(tokens * row for _layer in range(config["num_hidden_layers"]))


def wanted(config: Config, budget_gib: float, batch: int, max_len: int) -> int:
    """Tries every rank from the largest down; 0 if none fits."""
    most = 2 * config["num_attention_heads"] * config["head_dim"]
    fits = (
        rank
        for rank in range(most // STEP * STEP, 0, -STEP)
        if cache_bytes(config, rank, batch * max_len) <= budget_gib * 2**30
    )
    return next(fits, 0)


def budget_draw(
    t: CheckContext, rank: int | None = None, exact: bool = False, model: Config | None = None
) -> tuple[Config, float, int, int]:
    """A model, a budget, a batch and a length. The budget allows ``rank`` and something over, or nothing over
    where ``exact``. What is over grows from round to round and is never enough for 64 more."""
    config = {
        **(model or BUDGET_MODELS[t.round % len(BUDGET_MODELS)]),
        "torch_dtype": list(BYTES)[t.round % 3],
    }
    config["qk_rope_head_dim"] = t.pick(32, 64)
    batch, max_len = t.integer(2, 7), 2 ** t.integer(12, 15)
    rank = STEP * t.integer(18, 28) if rank is None else rank
    room = cache_bytes(config, rank, batch * max_len)
    if not exact:
        over = (t.integer(1, 9), t.integer(36, 44), t.integer(50, 60))[t.round % 3]
        room += over * cache_bytes({**config, "qk_rope_head_dim": 0}, 1, batch * max_len)
    return config, room / 2**30, batch, max_len


def rank_is_right(t: CheckContext, rank_for_budget: Answer, case: tuple[Config, float, int, int]) -> None:
    got = field(t, rank_for_budget(*case), "rank")
    plain = plain_number(got)
    if isinstance(plain, float) and plain.is_integer():
        got = int(plain)
    t.number(got, wanted(*case), "rank")


def own_rank(got: Any, case: tuple[Config, float, int, int]) -> float:
    """The answer's own rank: a mistake in it, told above, shall not cost the other points too."""
    own = plain_number(got.get("rank")) if isinstance(got, dict) else None
    return own if own is not None and own > 0 else wanted(*case)


@budget.requirement(1, "the rank")
def rank(t: CheckContext, rank_for_budget: Answer) -> None:
    """the largest multiple of 64 at which the cache of the whole batch fits"""
    rank_is_right(t, rank_for_budget, budget_draw(t))


@budget.requirement(1, "a budget that fits exactly")
def exact(t: CheckContext, rank_for_budget: Answer) -> None:
    """a cache as large as the budget fits, to the byte"""
    rank_is_right(t, rank_for_budget, budget_draw(t, exact=True))


@budget.requirement(1, "bytes per token")
def per_token(t: CheckContext, rank_for_budget: Answer) -> None:
    """what one token leaves in the cache at the rank that was chosen, over all layers"""
    case = budget_draw(t, model=BUDGET_MODELS[0])
    got = rank_for_budget(*case)
    none = cache_bytes(case[0], 0, 1)
    want = none + (cache_bytes(case[0], 1, 1) - none) * own_rank(got, case)
    t.number(field(t, got, "bytes_per_token"), want, "bytes_per_token")


@budget.requirement(1, "the ratios")
def ratios(t: CheckContext, rank_for_budget: Answer) -> None:
    """how many times larger the cache of MHA (2·H·D numbers) and of GQA (2·G·D) is, at the rank chosen"""
    case = budget_draw(t, model=BUDGET_MODELS[0])
    got, config = rank_for_budget(*case), case[0]
    row = own_rank(got, case) + config["qk_rope_head_dim"]
    for name, heads in (("versus_mha", "num_attention_heads"), ("versus_gqa", "num_key_value_heads")):
        t.number(field(t, got, name), 2 * config[heads] * config["head_dim"] / row, name)


@budget.requirement(1, "more than enough")
def cap(t: CheckContext, rank_for_budget: Answer) -> None:
    """never more than 2·H·D, which compresses nothing any more, and still a multiple of 64"""
    config = {**SMALL, "qk_rope_head_dim": t.pick(16, 32), "torch_dtype": "bfloat16"}
    rank_is_right(t, rank_for_budget, (config, t.integer(60, 90) * 1.0, t.integer(2, 4), 4096))


@budget.requirement(1, "not enough")
def too_little(t: CheckContext, rank_for_budget: Answer) -> None:
    """a ValueError where not even rank 64 fits, and none where it just does"""
    rank_is_right(t, rank_for_budget, budget_draw(t, STEP, exact=True))
    config, budget_gib, batch, max_len = budget_draw(t, STEP, exact=True)
    t.raises(
        ValueError,
        lambda: rank_for_budget(config, budget_gib * 0.98, batch, max_len),
        "where not even rank 64 fits",
    )


EXERCISES = (latent, decoupled, absorb, step, svd, naive_or_absorbed, budget)
