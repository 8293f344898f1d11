"""02.1: query heads on common KV heads, held against PyTorch's attention over repeated keys."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kvlearn.grading.compare import Difference
from kvlearn.grading.exercise import Answer, Exercise
from kvlearn.grading.trial import Trial
from kvlearn.grading.watch import Made, new_tensors

EXERCISE = Exercise(
    id="02.1",
    slug="attend",
    title="Grouped attention without a copy",
    answers=("grouped_attention",),
    forbidden={F.scaled_dot_product_attention: "torch's scaled_dot_product_attention"},
    hints=(
        "H/G = R query heads belong to each pool, and they are neighbours: heads 0 … R−1 to pool 0. So "
        "`q.reshape(B, G, R, T, D)` puts every query head beside its pool, and nothing is moved.",
        "R heads of T queries each are R·T queries to the pool's keys. `q.reshape(B, G, R * T, D)` has "
        "the same number of dimensions as k, and one matrix product a pool does the rest.",
        "Cut the scores open again, (B, G, R·T, S) → (B, G, R, T, S), to lay the mask over them: (T, S) "
        "fits as it is, and (B, 1, T, S) needs one dimension more, `mask.unsqueeze(-3)`. That serves both.",
        "`q.reshape(B, G, R, T, D) @ k[:, :, None].transpose(-2, -1)` gives the right values, but `@` "
        "copies what it broadcasts: every key R times. Fold R into the rows, or let "
        '`torch.einsum("bgrtd,bgsd->bgrts", …)` do it.',
    ),
)

QKV = tuple[Tensor, Tensor, Tensor]


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """SDPA in fp32, with every pool written down for each of its heads."""
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q.float(), k, v, attn_mask=mask).to(q.dtype)


def draw(t: Trial, H: int, G: int, dtype: torch.dtype = torch.float32) -> QKV:
    """T, S and D differ from H, G and H/G, so that no confusion of dimensions goes unseen; T = 1 in the
    second round."""
    T = 1 if t.round == 1 else t.pick(4, 9)
    S, D = T + t.pick(7, 13), t.pick(16, 24)
    return (
        t.randn(2, H, T, D, dtype=dtype),
        t.randn(2, G, S, D, dtype=dtype),
        t.randn(2, G, S, D, dtype=dtype),
    )


@EXERCISE.requirement(1, "one pool for all heads (MQA), and a pool for each")
def limits(t: Trial, grouped_attention: Answer) -> None:
    """softmax(q kᵀ / √D) v for G = 1 and for G = H, one output for each query: (B, H, T, D)"""
    H = t.pick(3, 5, 7)
    for G in (1, H):
        q, k, v = draw(t, H, G)
        t.close(grouped_attention(q, k, v), reference(q, k, v))


@EXERCISE.requirement(1, "pools of neighbouring heads (GQA)")
def pools(t: Trial, grouped_attention: Answer) -> None:
    """the same for every ratio: query head h reads pool h // (H/G)"""
    for G, size in ((3, 2), (2, t.pick(3, 5))):
        q, k, v = draw(t, G * size, G)
        t.close(grouped_attention(q, k, v), reference(q, k, v))


@EXERCISE.requirement(1, "with a mask")
def masked(t: Trial, grouped_attention: Answer) -> None:
    """over the keys where the mask is True; masks of shape (T, S) and (B, 1, T, S)"""
    q, k, v = draw(t, t.pick(6, 10), 2)  # G = B: the masks of a batch laid over the pools would fit
    for lead in ((), (2, 1)):
        mask = t.mask(*lead, q.shape[2], k.shape[2])
        t.close(grouped_attention(q, k, v, mask), reference(q, k, v, mask))


@EXERCISE.requirement(1, "half precision, and inputs left alone")
def half(t: Trial, grouped_attention: Answer) -> None:
    """bf16 and fp16 in, the same dtype out, right within its precision; q, k, v unchanged afterwards"""
    for dtype in (torch.bfloat16, torch.float16):
        q, k, v = draw(t, 6, 3, dtype)
        t.close(grouped_attention(q, k, v), reference(q, k, v))
    t.unchanged()


@EXERCISE.requirement(2, "no copy of K and V for every query head")
def no_copy(t: Trial, grouped_attention: Answer) -> None:
    """no tensor of H·S·D numbers or more is made on the way"""
    G, size = t.pick((2, 3), (2, 4), (3, 2))
    H, T, S, D = G * size, t.integer(1, 3), t.integer(30, 40), 16
    # Queries of zeros give every key the same weight, and all pools hold the same values: whether the scores
    # and the pools are right is asked above and costs nothing here.
    q, k = torch.zeros(1, H, T, D), t.randn(1, G, S, D)
    v = t.randn(1, 1, S, D).repeat(1, G, 1, 1)
    with called() as copies, new_tensors() as made:
        copies.made = made
        got = grouped_attention(q, k, v)
    t.close(got, reference(q, k, v))
    name, copy = copies.largest
    if copy.numel >= H * S * D:
        came = f"{name} made a tensor of shape {copy.shape}, H·S·D = {H}·{S}·{D} numbers"
        t.note(KINDS.get(name, name), Difference("", f"fewer than {H * S * D:,} numbers in any tensor", came))


KINDS = {
    **dict.fromkeys(("repeat", "repeat_interleave", "tile", "index_select", "cat", "stack"), "copied heads"),
    **dict.fromkeys(("__getitem__", "gather"), "copied heads"),
    **dict.fromkeys(("reshape", "contiguous", "clone", "flatten", "reshape_as"), "copied an expanded view"),
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__", "bmm", "einsum"), "copied by a product"),
    **dict.fromkeys(("mul", "__mul__", "__rmul__"), "products"),
}
"""How the large tensor was made, in as many words as the catalogue of mistakes knows."""


class Calls(TorchFunctionMode):
    """Puts the name of the call in the answer's code beside every tensor that it makes."""

    made: list[Made]
    largest: tuple[str, Made] = ("", Made((), ""))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.made)
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        for made in self.made[before:]:
            if made.numel > self.largest[1].numel:
                self.largest = name, made
        return result


@contextmanager
def called() -> Iterator[Calls]:
    with Calls() as calls:
        yield calls
