"""03.2: scores with decoupled RoPE, held against complex numbers, one head after the other."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvlearn.grading.compare import compare
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial
from kvlearn.grading.units.multi_head_compression.given import rope

EXERCISE = Exercise(
    id="03.2",
    slug="decoupled",
    title="Scores with decoupled RoPE",
    answers=("decoupled_scores",),
    hints=(
        "A sum of two products, each (B, H, T, S): content `q @ k.transpose(-2, -1)`, and position, rotated "
        "q_rope with rotated k_rope. The scale comes last, over the sum.",
        "`rope` wants four dimensions. The one rotary key for all heads is a single head: "
        "`k_rope[:, None]` is (B, 1, S, Dr), and in the product it serves every head.",
        "The T queries are the last T of the S tokens, so they stand at `positions[:, -T:]`. Only q_rope and "
        "k_rope are turned, never q and k.",
        "A score is a sum over D + Dr products, whatever they are called, so its spread is √(D + Dr): divide "
        "the sum by `(q.shape[-1] + q_rope.shape[-1]) ** 0.5`.",
    ),
)

Turn = Callable[..., Tensor]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, n, Dr): each pair as a complex number, times exp(i·m·ω)."""
    half = x.shape[-1] // 2
    omega = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones((), dtype=torch.float64), positions.double()[..., None] * omega)
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat((z.real, z.imag), dim=-1)


def reference(q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, positions: Tensor) -> Tensor:
    T, width = q.shape[2], q.shape[-1] + q_rope.shape[-1]
    keys = turned(k_rope, positions)
    heads = []
    for h in range(q.shape[1]):
        content = torch.einsum("btd,bsd->bts", q[:, h].double(), k[:, h].double())
        queries = turned(q_rope[:, h], positions[:, -T:])
        heads.append((content + torch.einsum("btd,bsd->bts", queries, keys)) / width**0.5)
    return torch.stack(heads, dim=1).to(q.dtype)


def draw(t: Trial, positions: str = "from 0", dtype: torch.dtype = torch.float32) -> Inputs:
    """Fresh inputs; T = 1 in the second round, and always more keys than queries."""
    B, H, T = 2, t.pick(3, 5), (1 if t.round == 1 else t.integer(3, 5))
    S, D, Dr = T + t.integer(4, 7), t.pick(12, 16), t.pick(4, 6)
    stands = torch.arange(S)[None]
    if positions == "later":
        stands = stands + t.integer(20, 60)
    if positions == "gaps":
        stands = torch.tensor([sorted(t.random.sample(range(5, 300), S)) for _ in range(B)])
    q, q_rope = t.randn(B, H, T, D, dtype=dtype), t.randn(B, H, T, Dr, dtype=dtype)
    return q, q_rope, t.randn(B, H, S, D, dtype=dtype), t.randn(B, S, Dr, dtype=dtype), stands


def same(t: Trial, decoupled_scores: Answer, inputs: Inputs) -> None:
    t.close(decoupled_scores(*inputs, rope), reference(*inputs), tolerance=1e-3)


def same_but_for_scale(t: Trial, decoupled_scores: Answer, inputs: Inputs) -> None:
    got, want = decoupled_scores(*inputs, rope), reference(*inputs)
    if isinstance(got, Tensor) and got.dtype.is_floating_point:
        fitted = got * (want.norm() / got.norm())
        got = fitted if compare(fitted, want, tolerance=1e-3) is None else got
    t.close(got, want, tolerance=1e-3)


@EXERCISE.requirement(1, "the content alone, whatever its scale", rounds=2)
def content(t: Trial, decoupled_scores: Answer) -> None:
    """some multiple of q · k, of shape (B, H, T, S), where the rotary query is zero"""
    q, q_rope, k, k_rope, positions = draw(t, "later")
    same_but_for_scale(t, decoupled_scores, (q, 0 * q_rope, k, k_rope, positions))


@EXERCISE.requirement(1, "the position alone, whatever its scale", rounds=2)
def position(t: Trial, decoupled_scores: Answer) -> None:
    """some multiple of rotated q_rope · rotated k_rope, the same key for all heads, where q is zero"""
    q, q_rope, k, k_rope, positions = draw(t)
    same_but_for_scale(t, decoupled_scores, (0 * q, q_rope, k, k_rope, positions))


@EXERCISE.requirement(1, "both, from position 0")
def both(t: Trial, decoupled_scores: Answer) -> None:
    """the sum of the two over √(D + Dr)"""
    same(t, decoupled_scores, draw(t))


@EXERCISE.requirement(1, "both, tokens with gaps, rows that differ")
def gaps(t: Trial, decoupled_scores: Answer) -> None:
    """the same at any positions, (B, S): padding leaves gaps, and each row has its own"""
    same(t, decoupled_scores, draw(t, "gaps"))


@EXERCISE.requirement(1, "bf16, and inputs left alone", rounds=2)
def half(t: Trial, decoupled_scores: Answer) -> None:
    """bf16 in, bf16 out, right within its precision; nothing handed in is changed"""
    inputs = draw(t, "later", torch.bfloat16)
    t.close(decoupled_scores(*inputs, rope), reference(*inputs), tolerance=6e-2)
    t.unchanged()
