"""What the exercises on linear attention stand on: the feature map, and sums made token by token in fp64."""

from typing import Any

import torch
from torch import Tensor

from kvlearn.grading.compare import Difference, describe
from kvlearn.grading.trial import Stop, Trial

QKV = tuple[Tensor, Tensor, Tensor]


def phi(x: Tensor) -> Tensor:
    """elu(x) + 1 in fp64, and exact where x is far below 0."""
    x = x.double()
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def outer(k: Tensor, v: Tensor) -> Tensor:
    """What one token (B, H, K), (B, H, V) writes: (B, H, K, V)."""
    return k[..., :, None] * v[..., None, :]


def averages(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention with its normaliser, one token at a time; 0 where all weights are 0."""
    features, out = phi(k), torch.zeros(v.shape, dtype=torch.float64)
    for i in range(q.shape[2]):
        weights = (features[:, :, : i + 1] * phi(q[:, :, i : i + 1])).sum(-1, keepdim=True)
        total = weights.sum(2)
        sums = (weights * v[:, :, : i + 1].double()).sum(2)
        out[:, :, i] = torch.where(total > 0, sums / total, 0)
    return out.to(v.dtype)


def sums(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_{s ≤ t} (q_t · k_s) v_s one token at a time, and the state behind the last: Σ k_s v_sᵀ."""
    dtype = v.dtype
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(v)
    for i in range(q.shape[2]):
        weights = (k[:, :, : i + 1] * q[:, :, i : i + 1]).sum(-1, keepdim=True)
        out[:, :, i] = (weights * v[:, :, : i + 1]).sum(2)
    return out.to(dtype), outer(k, v).sum(2).to(dtype)


def faded(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + k_t v_tᵀ as it is written: fade, write, read."""
    dtype = v.dtype
    q, k, v, a, memory = q.double(), k.double(), v.double(), log_decay.double().exp(), state.double()
    out = torch.zeros_like(v)
    for i in range(q.shape[2]):
        memory = a[:, :, i, None, None] * memory + outer(k[:, :, i], v[:, :, i])
        out[:, :, i] = (q[:, :, i, :, None] * memory).sum(2)
    return out.to(dtype), memory.to(dtype)


def draw(t: Trial, n_tokens: int, square: bool = True) -> QKV:
    """Queries, keys and values; as many numbers in a key as in a value only where ``square``."""
    B, H, K = t.pick(2, 3), t.pick(5, 7), t.pick(8, 10, 12)
    V = K if square else K + t.pick(-2, 1, 4)
    return t.randn(B, H, n_tokens, K), t.randn(B, H, n_tokens, K), t.randn(B, H, n_tokens, V)


def tensors(t: Trial, got: Any, names: str) -> list[Tensor]:
    """What came back, taken apart into as many tensors as ``names`` lists, or the end of this round."""
    n = names.count(",") + 1
    if isinstance(got, tuple | list) and len(got) == n and all(isinstance(part, Tensor) for part in got):
        return list(got)
    t.note(got, Difference("", f"{n} tensors, ({names})", describe(got)))
    raise Stop
