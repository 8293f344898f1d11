"""How the kernels of exercises 11.4, 11.5 and 11.8 are launched: memory, padding and grid."""

from typing import Any

from torch import Tensor

from kvlearn.grading.units.triton_decode.given import triton


def launch_grouped(kernel: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """11.4: one program for each sequence and KV head; GROUP query heads share a KV head."""
    B, H, D = q.shape
    G, S = k.shape[1:3]
    out = q.new_full((B * H + 16, D), float("nan"))  # room behind, so that a stray row breaks nothing
    padded = max(16, triton.next_power_of_2(D))
    kernel[(B, G)](q, k, v, out, S, H=H, G=G, GROUP=H // G, D=D, ROWS=16, BLOCK=16, BLOCK_D=padded)
    return out[: B * H].view(B, H, D)


def launch_split(
    part_kernel: Any, merge_kernel: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int
) -> tuple[Tensor, Tensor]:
    """11.5: one program for each row and split, then one for each row; out and the lse of the parts."""
    B, D = q.shape
    parts, lse = q.new_empty(B, n_splits, D), q.new_empty(B, n_splits)
    capacity, scale = k.shape[1], D**-0.5
    part_kernel[(B, n_splits)](q, k, v, lengths, parts, lse, capacity, n_splits, scale, D=D, BLOCK=16)
    out = q.new_full((B, D), float("nan"))
    merge_kernel[(B,)](parts, lse, out, n_splits, D=D, SPLITS=triton.next_power_of_2(n_splits))
    return out, lse


def launch_once(
    kernel: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, n_splits: int, first: int, tickets: Any
) -> tuple[Tensor, Tensor]:
    """11.8: one program for each split and row, once; out and how often each row was merged."""
    B, D = q.shape
    nan = float("nan")
    out, parts, lse = (
        q.new_full((B, D), nan),
        q.new_full((B, n_splits, D), nan),
        q.new_full((B, n_splits), nan),
    )
    merges = lengths.new_zeros(B)
    kernel[(n_splits, B)](
        q, k, v, lengths, parts, lse, tickets(q), merges, out, k.shape[1], n_splits, first, D**-0.5,
        D=D, SPLITS=triton.next_power_of_2(n_splits), BLOCK=16,
    )  # fmt: skip
    return out, merges
