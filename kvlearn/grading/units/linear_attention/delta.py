"""06.5: the delta rule as one step of gradient descent, held against autograd, head by head."""

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial

EXERCISE = Exercise(
    id="06.5",
    slug="delta",
    title="The delta rule as online regression",
    answers=("delta_step",),
    hints=(
        "First ask the memory: Sᵀk is what it answers to the key today, (B, H, V). The error is v − Sᵀk.",
        "The gradient of ½|Sᵀk − v|² in S is the outer product k (Sᵀk − v)ᵀ, of shape (K, V). A step of "
        "gradient *descent* of size β takes β times that away: S + β k (v − Sᵀk)ᵀ.",
        "β has the shape (B, H): give it dimensions at the end. Products with unsqueezed dimensions do it "
        "all: `(memory * k[..., None]).sum(-2)` is Sᵀk, and `k[..., None] * error[..., None, :]` the outer "
        "product.",
        "Read last, and from the new memory, with q: out = Sᵀq. Return the new memory as a tensor of its "
        "own: `memory = memory + …`, not `memory += …`.",
    ),
)

Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, beta, memory
PARTS = "two tensors, (out, memory)"


def draw(t: Trial, *, unit: bool = False) -> Given:
    """Inputs of fresh sizes; no two of B, H, K and V are equal."""
    B, H, K, V = 2, t.pick(3, 5), t.pick(6, 8, 12), t.pick(7, 9, 14)
    q, k, v, memory = t.randn(B, H, K), t.randn(B, H, K), t.randn(B, H, V), t.randn(B, H, K, V)
    beta = 0.1 + 0.8 * t.randn(B, H).sigmoid()
    return q, (k / k.norm(dim=-1, keepdim=True) if unit else k), v, beta, memory


def descend(k: Tensor, v: Tensor, beta: Tensor, memory: Tensor) -> Tensor:
    """The new memory: the gradient of the loss by autograd in float64, for one head after the other."""
    new = memory.double().clone()
    for b in range(len(memory)):
        for h in range(memory.shape[1]):
            with torch.enable_grad():
                S = memory[b, h].double().requires_grad_()
                loss = ((S.T @ k[b, h].double() - v[b, h].double()) ** 2).sum() / 2
                new[b, h] -= float(beta[b, h]) * torch.autograd.grad(loss, S)[0]
    return new.to(memory.dtype)


def read(q: Tensor, memory: Tensor) -> Tensor:
    """Sᵀq, head by head in float64."""
    pairs = zip(memory.double().flatten(0, 1), q.double().flatten(0, 1), strict=True)
    return torch.stack([S.T @ one for S, one in pairs]).to(q.dtype).unflatten(0, q.shape[:2])


def written(t: Trial, answer: Answer, given: Given) -> None:
    _, memory = t.pair(answer(*given), PARTS)
    t.close(memory, descend(*given[1:]), "memory:")


@EXERCISE.requirement(1, "two new tensors")
def form(t: Trial, delta_step: Answer) -> None:
    """out (B, H, V) and memory (B, H, K, V) in the dtype of the inputs, and the inputs as they were before"""
    given = draw(t)
    out, memory = t.pair(delta_step(*given), PARTS)
    t.form(out, tuple(given[2].shape), torch.float32)
    t.form(memory, tuple(given[4].shape), torch.float32)
    t.unchanged()


@EXERCISE.requirement(1, "what the memory knows already")
def known(t: Trial, delta_step: Answer) -> None:
    """where Sᵀk is v, there is no error and no gradient: the memory stays as it is"""
    q, k, _, beta, memory = draw(t)
    _, new = t.pair(delta_step(q, k, read(k, memory), beta, memory), PARTS)
    t.close(new, memory, "memory:")


@EXERCISE.requirement(1, "β = 1 and a key of length 1")
def replaced(t: Trial, delta_step: Answer) -> None:
    """the value of the key is replaced: Sᵀk is v afterwards, and orthogonal keys are answered as before"""
    q, k, v, beta, memory = draw(t, unit=True)
    written(t, delta_step, (q, k, v, torch.ones_like(beta), memory))


@EXERCISE.requirement(1, "a step of size β")
def step(t: Trial, delta_step: Answer) -> None:
    """with keys of length 1: the share β of the old value goes, the share β of the new one comes; every head
    of every sequence has a β of its own"""
    written(t, delta_step, draw(t, unit=True))


@EXERCISE.requirement(1, "keys of any length")
def any_length(t: Trial, delta_step: Answer) -> None:
    """the gradient of ½|Sᵀk − v|² with the key as it is, half as long or twice as long"""
    q, k, v, beta, memory = draw(t, unit=True)
    written(t, delta_step, (q, k * t.pick(0.5, 2.0), v, beta, memory))


@EXERCISE.requirement(1, "the output")
def output(t: Trial, delta_step: Answer) -> None:
    """out = Sᵀq, read from the memory that is returned, which knows the new token already"""
    given = draw(t)
    out, memory = t.pair(delta_step(*given), PARTS)
    if t.shape(memory, tuple(given[4].shape), "memory:"):
        t.note(memory, None)  # what was read from, so that another mistake's memory is told from it
        t.close(out, read(given[0], memory), "out:")
