"""What the checks of unit 11 share: how an answer is run, and attention to hold it against."""

from typing import Any

import torch
from torch import Tensor

from kvlearn.grading.exercise import Answer

LOG2E = 1.4426950408889634  # eˣ = 2^(x · log₂e)
BLOCK = 16  # keys in a tile
NAN = float("nan")
READY_MADE: dict[Any, str] = {
    torch.nn.functional.scaled_dot_product_attention: "torch's scaled_dot_product_attention",
    torch.softmax: "torch.softmax",
}


def run(answer: Answer, *args: Any) -> Any:
    """The answer's result on these inputs, on the CPU; the answer gets them where kernels run."""
    from kvlearn.kernels.runtime import HAS_TRITON, INTERPRETED

    compiled = HAS_TRITON and not INTERPRETED
    placed = [arg.cuda() if compiled and isinstance(arg, Tensor) else arg for arg in args]
    return home(answer(*placed))


def home(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    return type(value)(home(part) for part in value) if type(value) in (tuple, list) else value


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of queries (..., D) to keys (n, D) in double precision; 0 where there are no keys."""
    scores = q.double() @ k.double().T * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.double()).float() if len(k) else torch.zeros_like(q)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The same for each row of q (B, D), k and v (B, S, D), over its first ``lengths[b]`` keys."""
    live = [k.shape[1]] * len(q) if lengths is None else lengths.tolist()
    return torch.stack([attend(q[b], k[b, :n], v[b, :n]) for b, n in enumerate(live)])
