"""The decode kernel of chapter 11, grown in six stages: each file is complete and reads from top to bottom.

    from kvlearn.kernels.stages import STAGES
    out = STAGES["v2"].decode(q, k, v, length)

All compute softmax(q Kᵀ · scale) V for one new token a row: q (B, H, D) over a cache k, v (B, G, S, D). They
repeat each other's lines on purpose. A stage's file opens with what it is predicted to gain, from the
roofline of an H200, written before any measurement.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

# Before any stage imports Triton: without a GPU it turns on the interpreter.
from kvlearn.kernels.runtime import require_triton


@dataclass(frozen=True)
class Stage:
    """One stage. Its module is imported when it is first asked for, so that this table needs no Triton.

    ``ragged``: the lengths come as an int32 tensor (B,), one a row, and not as one int for all rows.
    """

    name: str
    title: str
    adds: str
    expected: str
    ragged: bool = False

    @property
    def module(self) -> ModuleType:
        """Raises RuntimeError where there is no Triton."""
        require_triton()
        return importlib.import_module(f"{__name__}.{self.name}")

    @property
    def decode(self) -> Callable[..., Tensor]:
        """``decode(q, k, v, length, *, scale=None, ...) -> out``, q and out (B, H, D)."""
        return self.module.decode


_STAGES = (
    Stage(
        "v0",
        "One program a query head",
        "one program per query head walks the whole context, twice",
        "right; at B=1 it uses H of 132 multiprocessors",
    ),
    Stage(
        "v1",
        "One pass",
        "online softmax, exp2, wide loads, pipelining",
        "near the floor for MHA at large batch; GQA pays for re-reads",
    ),
    Stage(
        "v2",
        "Query heads share what they read",
        "the query heads of one KV head packed into tl.dot, M=16",
        "1.7–2.9x on GQA",
    ),
    Stage(
        "v3",
        "Split the context",
        "the context split over programs, merged by log-sum-exp",
        "≥ 5x at B=1 and long context",
    ),
    Stage(
        "v4",
        "The caches people use",
        "page table, window, sinks, fp8/int8, lengths in a tensor",
        "window time flat in N; small page cost",
        ragged=True,
    ),
    Stage(
        "v5",
        "One launch",
        "the last split to finish merges; in v5_latent one latent is key and value",
        "3–8 µs less a step; latent 2x over BLOCK_H=16",
        ragged=True,
    ),
)

STAGES: dict[str, Stage] = {stage.name: stage for stage in _STAGES}
