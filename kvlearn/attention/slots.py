"""A cache that forgets: keys and values in a fixed number of slots, used again when their token is done with.

Which slot a token takes depends on its position alone. So every row of a batch, and every way of cutting a
sequence into chunks, comes to the same memory. A ring is the plainest such rule.
"""

from abc import abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvlearn import validate
from kvlearn.attention.cache import KV, TokenCache


class SlotCache(TokenCache):
    """Keys and values in ``n_slots`` slots; with ``shared`` the values are the keys, and stored once.

    ``held`` says which position each slot holds, -1 for none: book-keeping, 8 bytes a slot, not counted.
    ``first_reuse`` is the first position whose token takes a slot that was taken before.
    """

    def __init__(
        self,
        batch: int,
        n_heads: int,
        n_slots: int,
        head_dim: int,
        max_len: int,
        first_reuse: int,
        dtype: torch.dtype,
        device: torch.device,
        shared: bool = False,
    ) -> None:
        super().__init__(batch, max_len, device)
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point type, got {dtype}")
        self.n_slots, self.first_reuse = validate.positive("n_slots", n_slots), first_reuse
        self.k = torch.zeros(batch, n_heads, n_slots, head_dim, dtype=dtype, device=device)
        self.v = self.k if shared else torch.zeros_like(self.k)
        self.held = torch.full((1, n_slots), -1, device=device)  # a row each where rows differ

    @abstractmethod
    def slots(self, positions: Int[Tensor, "#B T"]) -> Int[Tensor, "#B T"]:
        """The slot that the token at each position takes. A slot is first taken after all before it."""

    @abstractmethod
    def used(self, length: int) -> int:
        """How many slots ``length`` tokens have taken; they are the first ones."""

    @property
    def can_trim(self) -> bool:  # type: ignore[override]
        """Whether nothing has been written over: what is gone cannot come back."""
        return self.length <= self.first_reuse

    def tensors(self) -> list[Tensor]:
        return [self.k] if self.v is self.k else [self.k, self.v]

    def append(self, k: Float[Tensor, "B H T D"], v: Float[Tensor, "B H T D"]) -> KV:
        """Write new keys and values; return what the new tokens may attend to.

        One token: views of the slots in use, in the order of storage, itself among them. Several: a copy of
        what was held before, in the order of positions, and the new ones behind it. The first of them may
        still need what the last of them write over, so nothing is trimmed before they have attended.
        """
        B, n_heads, _, head_dim = self.k.shape
        T = k.shape[2]
        for name, new in (("k", k), ("v", v)):
            validate.tensor(name, new, (B, n_heads, T, head_dim), device=self.device)
        self.expect_room(T)
        positions = self.positions(T)
        everything = None if T == 1 else self._behind(k, v, positions)
        self._write(k, v, positions)
        self.advance(T)
        if everything is not None:
            return everything
        used = self.used(self.length)
        return KV(self.k[:, :, :used], self.v[:, :, :used], positions, self.held[:, :used])

    def _behind(self, k: Tensor, v: Tensor, positions: Tensor) -> KV:
        """The tokens held so far, oldest first, then the new ones."""
        if not self.length:
            return KV(k, v, positions, positions)
        held, order = self.held[:, : self.used(self.length)].sort(dim=-1)
        at = order[:, None, :, None].expand(len(k), k.shape[1], -1, k.shape[3])
        k, v = (torch.cat((old.gather(2, at).to(n.dtype), n), dim=2) for old, n in ((self.k, k), (self.v, v)))
        rows = max(len(held), len(positions))
        return KV(k, v, positions, torch.cat((held.expand(rows, -1), positions.expand(rows, -1)), dim=-1))

    def _write(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Each new token to its slot; of several for one slot the last."""
        slots = self.slots(positions)
        if len(slots) > len(self.held):
            self.held = self.held.repeat(len(slots), 1)
        if k.shape[2] == 1:
            row, token = torch.arange(len(slots), device=self.device), torch.zeros_like(slots[:, 0])
        else:
            token = torch.arange(k.shape[2], device=self.device).expand_as(slots)
            last = torch.zeros_like(self.held).scatter_reduce(1, slots, token, "amax").gather(1, slots)
            row, token = (token == last).nonzero(as_tuple=True)
        slot = slots[row, token]
        self.held[row, slot] = positions[row, token]
        rows = row if len(slots) > 1 else slice(None)
        for buffer, new in zip(self.tensors(), (k, v), strict=False):
            buffer[rows, :, slot] = new.detach().to(buffer.dtype)[rows, :, token]

    def trim(self, lengths: Int[Tensor, "B"]) -> None:
        super().trim(lengths)
        ends = self.positions(1)  # of every row, or of all
        held = self.held[:1] if self.lengths is None else self.held  # rows of one length hold the same
        self.held = torch.where(held < ends, held, -1)

    def reset(self) -> None:
        super().reset()
        self.held = torch.full((1, self.n_slots), -1, device=self.device)
