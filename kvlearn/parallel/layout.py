"""Which rank of a ring holds which tokens, and which blocks of keys each of them needs.

Causal attention has little work at the start of a sequence and much at its end. In contiguous order the last
rank works nearly all the time and the first hardly at all; striped and zig-zag order give every rank tokens
from everywhere.

    contiguous   rank r holds [r · C, (r + 1) · C)
    striped      rank r holds r, r + P, r + 2P, …
    zigzag       rank r holds chunk r and chunk 2P - 1 - r of 2P

Letters beside those of core.py: P ranks, C tokens of a rank, N tokens of all ranks.
Where P (for zigzag 2P) does not divide the tokens, the last slots of some ranks hold padding: position -1.

Sources: Liu, Zaharia & Abbeel, "Ring Attention with Blockwise Transformers" (2023); Brandon et al., "Striped
Attention" (2023); the order in pairs from both ends is that of Llama Team, "The Llama 3 Herd of Models"
(2024), section 3.3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from kvlearn import validate
from kvlearn.parallel.blockwise import PADDING, Rule

Order = Literal["contiguous", "striped", "zigzag"]
ORDERS = get_args(Order)


@dataclass(frozen=True)
class Layout:
    """``n_tokens`` tokens on ``world`` ranks in one of three orders; see the module."""

    n_tokens: int
    world: int
    order: Order = "contiguous"

    def __post_init__(self) -> None:
        validate.fields_at_least(self, n_tokens=1, world=1)
        validate.one_of("order", self.order, ORDERS)

    @property
    def per_rank(self) -> int:
        """C: slots of each rank, padding included."""
        parts = 2 * self.world if self.order == "zigzag" else self.world
        return -(-self.n_tokens // parts) * (parts // self.world)

    def positions(self, rank: int) -> Int[Tensor, "C"]:
        """The position of the token in each slot of ``rank``, in order; -1 where there is none."""
        C, P = self.per_rank, self.world
        if not 0 <= rank < P:
            raise ValueError(f"rank: expected 0 to {P - 1}, got {rank}")
        if self.order == "contiguous":
            positions = torch.arange(rank * C, (rank + 1) * C)
        elif self.order == "striped":
            positions = torch.arange(C) * P + rank
        else:
            chunk = torch.arange(C // 2)
            positions = torch.cat((chunk + rank * len(chunk), chunk + (2 * P - 1 - rank) * len(chunk)))
        return torch.where(positions < self.n_tokens, positions, PADDING)

    def shard(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """The slots of ``rank`` from a tensor with all tokens on ``dim``; padding is 0."""
        if x.shape[dim] != self.n_tokens:
            raise ValueError(f"x: expected {self.n_tokens} tokens on dimension {dim}, got {x.shape[dim]}")
        positions = self.positions(rank).to(x.device)
        shape = [1] * x.ndim
        shape[dim] = -1
        taken = x.index_select(dim, positions.clamp_min(0))
        return taken.masked_fill((positions == PADDING).reshape(shape), 0)

    def unshard(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The inverse of ``shard``: the slots of all ranks, in order of the tokens, without padding."""
        if len(parts) != self.world:
            raise ValueError(f"parts: expected {self.world}, one per rank, got {len(parts)}")
        for rank, part in enumerate(parts):
            if part.shape[dim] != self.per_rank:
                raise ValueError(
                    f"parts: expected {self.per_rank} slots on dimension {dim}, got {part.shape[dim]} "
                    f"of rank {rank}"
                )
        positions = torch.cat([self.positions(rank) for rank in range(self.world)])
        slots = positions.argsort(stable=True)[-self.n_tokens :]  # padding, -1, comes first
        return torch.cat(list(parts), dim).index_select(dim, slots.to(parts[0].device))


@dataclass(frozen=True)
class Plan:
    """Who computes with which block of keys when, and how far each block travels.

    In step s rank r holds the block of rank r - s (mod P), if it came so far. A block is sent on as long as
    a rank further along needs it.
    """

    layout: Layout
    rule: Rule = field(default_factory=Rule)

    @cached_property
    def pairs(self) -> list[list[int]]:
        """The visible pairs of queries of a rank (row) and keys of an owner (column): its work."""
        positions = [self.layout.positions(rank) for rank in range(self.layout.world)]
        return [[self.rule.n_pairs(queries, keys) for keys in positions] for queries in positions]

    def owner(self, rank: int, step: int) -> int:
        """Whose block would be at ``rank`` in ``step``."""
        return (rank - step) % self.layout.world

    @cached_property
    def hops(self) -> list[int]:
        """How many ranks further the block of each owner travels: to the last that needs it."""
        P = self.layout.world
        return [
            max((s for s in range(1, P) if self.pairs[(owner + s) % P][owner]), default=0)
            for owner in range(P)
        ]

    @property
    def n_steps(self) -> int:
        """Steps until no block travels any more: 1 + the longest way."""
        return 1 + max(self.hops)

    def holds(self, rank: int, step: int) -> bool:
        """Whether the block of ``owner(rank, step)`` comes so far."""
        return step <= self.hops[self.owner(rank, step)]

    def sends(self, rank: int, step: int) -> bool:
        """Whether ``rank`` sends the block that it holds in ``step`` to the next rank."""
        return step < self.hops[self.owner(rank, step)]

    def receives(self, rank: int, step: int) -> bool:
        """Whether a block comes to ``rank`` while it computes ``step``, for the next."""
        return self.sends((rank - 1) % self.layout.world, step)

    def n_sent(self, rank: int) -> int:
        """Blocks of keys and values that ``rank`` sends in one forward pass."""
        return sum(self.sends(rank, step) for step in range(self.n_steps))

    def n_returned(self, rank: int) -> int:
        """Blocks of gradients that ``rank``, the last of their way, sends home in the backward pass."""
        owners = [(owner + hops) % self.layout.world for owner, hops in enumerate(self.hops) if hops]
        return owners.count(rank)

    @property
    def work(self) -> list[int]:
        """Visible pairs per rank, over all steps."""
        return [sum(row) for row in self.pairs]

    def rows(self) -> list[dict[str, Any]]:
        """One row per rank and step: whose block is there, the work, and whether it is sent on."""
        return [
            {
                "rank": rank,
                "step": step,
                "owner": self.owner(rank, step),
                "pairs": self.pairs[rank][self.owner(rank, step)],
                "sends": self.sends(rank, step),
            }
            for rank in range(self.layout.world)
            for step in range(self.n_steps)
            if self.holds(rank, step)
        ]
