"""06.2: one token through a memory and its normaliser, held against sums over all tokens so far."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial
from kvlearn.grading.units.linear_attention.given import averages, draw, outer, phi, tensors

EXERCISE = Exercise(
    id="06.2",
    slug="recurrent",
    title="From parallel to recurrent",
    answers=("linear_step",),
    hints=(
        "Write first, then read: the new token sees itself. Both the memory and the normaliser take it in "
        "before the output is made.",
        "φ(k) as a column, the value as a row: `phi_k[..., :, None] * v[..., None, :]` is (B, H, K, V), what "
        "this token writes. `memory + …` makes a new tensor, `memory += …` changes the one you were given.",
        "Reading sums over the features: `(phi_q[..., :, None] * memory).sum(dim=-2)` is (B, H, V), and "
        "`(phi_q * normaliser).sum(dim=-1, keepdim=True)` is (B, H, 1), what to divide by.",
        "Return (out, memory, normaliser): the sums go on undivided, and the division happens on the way "
        "out only.",
    ),
)

NAMES = "out, memory, normaliser"


class State(NamedTuple):
    """One token and the past that it meets, as the answer is handed it."""

    q: Tensor
    k: Tensor
    v: Tensor
    memory: Tensor
    normaliser: Tensor


def meet(t: Trial, n_past: int, square: bool = True) -> State:
    """The last of ``n_past`` + 1 tokens, and the sums over those before it."""
    q, k, v = draw(t, n_past + 1, square)
    memory = outer(phi(k[:, :, :-1]), v[:, :, :-1].double()).sum(2)
    return State(q[:, :, -1], k[:, :, -1], v[:, :, -1], memory.float(), phi(k[:, :, :-1]).sum(2).float())


def written(state: State) -> tuple[Tensor, Tensor]:
    """Memory and normaliser with the new token in them, in fp64."""
    memory = state.memory.double() + outer(phi(state.k), state.v.double())
    return memory, state.normaliser.double() + phi(state.k)


def run(t: Trial, answer: Answer, state: State) -> list[Tensor]:
    return tensors(t, answer(*state), NAMES)


@EXERCISE.requirement(1, "the first token")
def first(t: Trial, linear_step: Answer) -> None:
    """behind an empty memory the output is the token's own value: all the weight is on itself, also where
    that is small"""
    state = meet(t, 0, square=t.round == 0)
    if t.round == 2:  # features far below 1
        state = state._replace(q=-state.q.abs() - 2, k=-state.k.abs() - 2)
    t.close(run(t, linear_step, state)[0], state.v, "out:")


@EXERCISE.requirement(1, "the new memory")
def memory(t: Trial, linear_step: Answer) -> None:
    """S + φ(k) vᵀ, (B, H, K, V): features down, the numbers of a value across"""
    state = meet(t, t.integer(3, 6), square=t.round < 2)
    t.close(run(t, linear_step, state)[1], written(state)[0].float(), "memory:")


@EXERCISE.requirement(1, "the new normaliser")
def normaliser(t: Trial, linear_step: Answer) -> None:
    """z + φ(k), (B, H, K)"""
    state = meet(t, t.integer(3, 6), square=t.round < 2)
    t.close(run(t, linear_step, state)[2], written(state)[1].float(), "normaliser:")


@EXERCISE.requirement(1, "the output")
def output(t: Trial, linear_step: Answer) -> None:
    """Sᵀφ(q) / (z·φ(q)) with the new token in both, (B, H, V)"""
    state = meet(t, t.integer(3, 6), square=t.round < 2)
    (S, z), f = written(state), phi(state.q)
    want = (f[..., :, None] * S).sum(-2) / (f * z).sum(-1, keepdim=True)
    t.close(run(t, linear_step, state)[0], want.float(), "out:")


@EXERCISE.requirement(1, "what was handed in stays as it is")
def two_ways(t: Trial, linear_step: Answer) -> None:
    """two tokens that go on from the same past leave memories that differ by what they wrote; the tensors
    handed in are unchanged"""
    state = meet(t, t.integer(2, 4))
    other = state._replace(k=t.randn(*state.k.shape), v=t.randn(*state.v.shape))
    _, one, _ = run(t, linear_step, state)
    _, two, _ = run(t, linear_step, other)
    want = written(state)[0] - written(other)[0]
    if t.shape(one, tuple(want.shape), "memory:") and t.shape(two, tuple(want.shape), "memory:"):
        t.close(one - two, want.float(), "the difference of the memories:")
    t.unchanged()


@EXERCISE.requirement(1, "a text, token by token", rounds=2)
def text(t: Trial, linear_step: Answer) -> None:
    """from an empty memory on, each step handed what the one before returned: the outputs are those of
    attention over all tokens at once"""
    q, k, v = draw(t, t.integer(12, 20), square=t.round == 0)
    memory: Any = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3])
    normaliser: Any = torch.zeros(*k.shape[:2], k.shape[3])
    outs = []
    for i in range(q.shape[2]):
        given = State(q[:, :, i], k[:, :, i], v[:, :, i], memory, normaliser)
        out, memory, normaliser = run(t, linear_step, given)
        outs.append(out)
    if all(t.shape(out, (*v.shape[:2], v.shape[3]), "out:") for out in outs):
        t.close(torch.stack(outs, 2), averages(q, k, v), "all outputs:")
