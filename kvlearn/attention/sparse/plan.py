"""What a fixed pattern may forget: a slot for every token, used again once nobody will read its token.

A pattern is known before any token is. So it is known, too, who will read a token last, how many tokens must
be kept at the worst moment, and which slot each of them can have. A pattern that reads little need not keep
little: what counts is whether the *last* reader comes soon.
"""

from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush

import torch
from jaxtyping import Int
from torch import Tensor

from kvlearn.attention.slots import SlotCache
from kvlearn.attention.sparse.pattern import Pattern


def live_tokens(pattern: Pattern, n_tokens: int) -> Int[Tensor, "n_tokens"]:
    """How many tokens must be held while the token at position t attends: |{j ≤ t : last(j) ≥ t}|."""
    last = pattern.last_readers(n_tokens)
    done = torch.bincount(last[last >= 0] + 1, minlength=n_tokens + 1)[:n_tokens]
    return ((last >= 0).long() - done).cumsum(0)


@lru_cache(maxsize=64)
def n_slots(pattern: Pattern, max_len: int) -> int:
    """Slots that a cache for ``max_len`` tokens needs: as many as are live at the worst moment."""
    return int(live_tokens(pattern, max_len).max())


@dataclass(frozen=True)
class Plan:
    """``slots`` of each position, how many are ``used`` by then, and where the first is used again."""

    slots: Int[Tensor, "n"]
    used: Int[Tensor, "n"]
    first_reuse: int


@lru_cache(maxsize=64)
def plan(pattern: Pattern, max_len: int) -> Plan:
    """A slot for every token: one whose token is done with, or else the next fresh one."""
    slots: list[int] = []
    used: list[int] = []
    free: list[int] = []
    n_used, first_reuse = 0, max_len
    ends: dict[int, list[int]] = {}  # last reader -> slots
    for position, last in enumerate(pattern.last_readers(max_len).tolist()):
        for slot in ends.pop(position - 1, ()):
            heappush(free, slot)
        if free:
            slot, first_reuse = heappop(free), min(first_reuse, position)
        else:
            slot, n_used = n_used, n_used + 1
        ends.setdefault(last, []).append(slot)
        slots.append(slot)
        used.append(n_used)
    return Plan(torch.tensor(slots), torch.tensor(used), first_reuse)


class PatternCache(SlotCache):
    """Keys and values of the tokens that some later token still attends to, by the plan of their pattern."""

    def __init__(
        self,
        batch: int,
        n_heads: int,
        max_len: int,
        head_dim: int,
        pattern: Pattern,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.pattern, self.plan = pattern, plan(pattern, max_len)
        sizes = (batch, n_heads, n_slots(pattern, max_len), head_dim, max_len, self.plan.first_reuse)
        super().__init__(*sizes, dtype, device)
        self.slot_of = self.plan.slots.to(device)

    def slots(self, positions: Int[Tensor, "#B T"]) -> Int[Tensor, "#B T"]:
        return self.slot_of[positions]

    def used(self, length: int) -> int:
        return int(self.plan.used[length - 1])
