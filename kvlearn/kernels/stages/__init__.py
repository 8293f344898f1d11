"""The decode kernel of chapter 11, built in six stages; each file holds its whole kernel, from top to bottom.

    from kvlearn.kernels.stages import STAGES
    out = STAGES["v2"].decode(q, k, v, length)

All compute softmax(q Kᵀ · scale) V for one new token per row: q (B, H, D) over a cache k, v (B, G, S, D).
The kernels repeat each other's lines on purpose; tile sizes and the merge are imported from the stage that
introduced them. A stage's file begins with its predicted gain, from the roofline of an H200, written before
any measurement; `new_lines` returns the lines that its kernel adds to an earlier one.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from kvlearn import validate

# Before any stage imports Triton: without a GPU it turns on the interpreter.
from kvlearn.kernels.runtime import require_triton


@dataclass(frozen=True)
class Stage:
    """One stage. Its module is imported at first use, so that this table needs no Triton.

    ``expected``: the prediction for an H200 in bf16, in a CUDA graph; 32 query heads on 4 KV heads unless it
    says otherwise. ``ragged``: lengths are an int32 tensor (B,), one per row, not one int for all rows.
    """

    name: str
    title: str
    adds: str
    expected: str
    ragged: bool = False

    @property
    def module(self) -> ModuleType:
        """The stage's module. Raises RuntimeError without Triton."""
        require_triton()
        return importlib.import_module(f"{__name__}.{self.name}")

    @property
    def decode(self) -> Callable[..., Tensor]:
        """``decode(q, k, v, length, *, scale=None, ...) -> out``, q and out (B, H, D)."""
        decode: Callable[..., Tensor] = self.module.decode
        return decode


_STAGES = (
    Stage(
        "v0",
        "One program per query head",
        "one program per query head walks the whole context, twice",
        "B=1, N=64k: 4.3 ms, 140 times the floor",
    ),
    Stage(
        "v1",
        "One pass",
        "online softmax, exp2, wide loads, pipelining",
        "B=1, N=64k: 0.48 ms, 9x as fast as v0; MHA, B=32, N=4k: 0.50–0.60 ms",
    ),
    Stage(
        "v2",
        "Query heads share what they read",
        "the query heads of one KV head packed into tl.dot, M=16",
        "B=32, N=4k: 70–100 µs, 3–7x as fast as v1; over the grid 1.7–2.9x",
    ),
    Stage(
        "v3",
        "Split the context",
        "the context split over programs, merged by log-sum-exp",
        "B=1, N=64k: 40–50 µs, 7–9x as fast as v2",
    ),
    Stage(
        "v4",
        "The caches people use",
        "page table, window, sinks, fp8/int8, lengths in a tensor",
        "B=32, one row of 64k, 31 of 1k: 0.18 ms; window 4k: 70–105 µs at any N",
        ragged=True,
    ),
    Stage(
        "v5",
        "One launch",
        "the last split to finish merges; in v5_latent one latent is key and value",
        "B=1, N=64k: 1–3 µs less than v3; latent, 128 heads: 2x as fast as with BLOCK_H=16",
        ragged=True,
    ),
)

STAGES: dict[str, Stage] = {stage.name: stage for stage in _STAGES}


def new_lines(stage: str, before: str) -> str:
    """The lines that the kernel of ``stage`` adds to the kernel of ``before``, an empty line at each gap.

    Compares the functions' bodies, without signatures, dedented. Raises ValueError for a name that is not in
    `STAGES`, RuntimeError without Triton.
    """
    old, new = _body(before), _body(stage)
    changes = difflib.SequenceMatcher(None, old, new).get_opcodes()
    pieces = ["\n".join(new[start:end]).strip("\n") for tag, _, _, start, end in changes if tag != "equal"]
    return "\n\n".join(piece for piece in pieces if piece)


def _body(name: str) -> list[str]:
    """The lines of a stage's kernel after its signature, which ends with ``# fmt: skip``."""
    module = STAGES[validate.one_of("stage", name, STAGES)].module
    _, _, body = inspect.getsource(module.decode_kernel.fn).partition("# fmt: skip\n")
    return inspect.cleandoc(body).splitlines()
