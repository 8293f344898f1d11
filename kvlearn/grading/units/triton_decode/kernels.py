"""What the checks of unit 11 share: how an answer is run, and attention to hold it against."""

from typing import Any

import torch
from torch import Tensor

from kvlearn.grading.guard import Guarded, Raised
from kvlearn.grading.units.triton_decode.interpreter import LAUNCHED, done, watching

LOG2E = 1.4426950408889634  # eˣ = 2^(x · log₂e)
BLOCK = 16  # keys in a tile
NAN = float("nan")
READY_MADE: dict[Any, str] = {
    torch.nn.functional.scaled_dot_product_attention: "torch's scaled_dot_product_attention",
    torch.softmax: "torch.softmax",
}


class NoKernel(Raised):
    """The answer came by its result without a kernel; shown like an error of its own."""

    def __init__(self) -> None:
        self.error = self
        self.what = (
            "NoKernel: no kernel was launched: this exercise asks for a Triton kernel that does the work"
        )


def run(answer: Any, *args: Any, own: tuple[str, ...] = ()) -> Any:
    """The answer's result on these inputs, on the CPU; the answer gets them where kernels run.

    ``own`` names the functions of ``known.py`` that are this exercise's own answer.
    """
    from kvlearn.grading.units.triton_decode import given  # noqa: F401  (it has launches watched)
    from kvlearn.kernels.runtime import HAS_TRITON, INTERPRETED

    compiled = HAS_TRITON and not INTERPRETED
    placed = [arg.cuda() if compiled and isinstance(arg, Tensor) else arg for arg in args]
    done.clear()
    result = home(answer(*placed))
    if is_emulation(answer):
        return result
    if LAUNCHED not in done and (watching or not HAS_TRITON):
        raise NoKernel
    # As with a ready-made softmax: the check says which function does the work of the exercise.
    answer._record.borrowed = answer._record.borrowed or next((f for f in own if ("called", f) in done), "")
    return result


def is_emulation(answer: Guarded) -> bool:
    """One of the catalogue's own mistakes, which are short PyTorch functions and launch nothing."""
    module = str(getattr(answer._target, "__module__", ""))
    return module.startswith(f"{__package__}.") and module.endswith("_mistakes")


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
