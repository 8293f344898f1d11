"""The tensors of a cell, cut from one large buffer of random numbers: no cell waits for them to be drawn."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvlearn.measure.decode_bench.cells import Cell
from kvlearn.measure.units import GIB

CHUNK = 2**26  # numbers drawn or converted at a time
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


@dataclass(frozen=True)
class Inputs:
    """q (B, H, D); k and v (B, G, S, D) or paged (blocks, G, page, D); a latent is in k as (B, S, R + Dr)."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    q_rope: Tensor | None = None
    table: Tensor | None = None
    k_scale: Tensor | None = None  # (G,)
    v_scale: Tensor | None = None


class Arena:
    """``size`` numbers from a normal distribution, and every cache a piece of them."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.buffer = torch.empty(size, dtype=dtype, device=device)
        for piece in self.buffer.split(CHUNK):
            piece.normal_()

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.buffer.nbytes

    def copies(self, cell: Cell, working_set: float, at_most: int) -> int:
        """As many copies of a cell as read ``working_set`` bytes in all, and fit; at least 1."""
        wanted = min(math.ceil(working_set / cell.nbytes), at_most)
        return max(1, min(wanted, self.buffer.numel() // numbers(cell)))

    def inputs(self, cell: Cell, copies: int = 1) -> list[Inputs]:
        """``copies`` of the cell, each with keys, values and queries of its own.

        MemoryError where the buffer is too small for one.
        """
        size = numbers(cell)
        if copies * size > self.buffer.numel():
            room = self.buffer.numel() / GIB
            raise MemoryError(f"{copies} x {size / GIB:.1f} Gi numbers do not fit into {room:.1f}")
        device = self.buffer.device
        lengths = torch.tensor(cell.lengths, dtype=torch.int32, device=device)
        table = None
        if cell.page:
            pages = cell.length // cell.page
            blocks = torch.randperm(cell.batch * pages, device=device)
            table = blocks.view(cell.batch, pages).to(torch.int32)
        made = []
        for copy in range(copies):
            piece = self.buffer[copy * size : (copy + 1) * size]
            q = torch.randn(cell.batch, cell.n_heads, cell.head_dim, device=device).to(cell.dtype)
            if cell.latent:
                latent = piece.view(cell.batch, cell.length, cell.head_dim + cell.rope_dim)
                rope = torch.randn(cell.batch, cell.n_heads, cell.rope_dim, device=device).to(cell.dtype)
                made.append(Inputs(q, latent, latent, lengths, q_rope=rope))
                continue
            k, v = piece.view(2, *self._shape(cell))
            made.append(quantised(Inputs(q, k, v, lengths, table=table), cell.kv_dtype))
        return made

    def _shape(self, cell: Cell) -> tuple[int, int, int, int]:
        if cell.page:
            return cell.batch * cell.length // cell.page, cell.n_kv_heads, cell.page, cell.head_dim
        return cell.batch, cell.n_kv_heads, cell.length, cell.head_dim


def numbers(cell: Cell) -> int:
    """Numbers that a cell takes from the buffer: K and V, or the latent."""
    return cell.stored_numbers * (1 if cell.latent else 2)


def quantised(x: Inputs, dtype: torch.dtype) -> Inputs:
    """Keys and values in ``dtype``, each with one scale: the largest number becomes the largest that fits."""
    if dtype == x.k.dtype:
        return x
    k, k_scale = _quantise(x.k, dtype)
    v, v_scale = _quantise(x.v, dtype)
    return replace(x, k=k, v=v, k_scale=k_scale, v_scale=v_scale)


def _quantise(given: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    largest = max(piece.abs().max().item() for piece in given.reshape(-1).split(CHUNK))
    scale = largest / LARGEST[dtype]
    small = torch.empty_like(given, dtype=dtype)
    for there, piece in zip(small.view(-1).split(CHUNK), given.reshape(-1).split(CHUNK), strict=True):
        scaled = piece.float() / scale
        there.copy_(scaled.round() if dtype == torch.int8 else scaled)
    return small, torch.full((given.shape[1],), scale, device=given.device)
