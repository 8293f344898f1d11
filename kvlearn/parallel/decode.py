"""Decode over a cache that is spread over ranks: each attends to its own part, and partial results merge.

In a step a ring would wait P times for a block of keys. The query is small, so it goes to the keys instead:
every rank attends to what it holds, and outputs and log-sum-exps are merged pair by pair up a tree, in
⌈log2 P⌉ rounds, and handed down again. A message has B · H · (D + 1) numbers, however long the text is.

Letters are those of layout.py.

Source: Shyam et al., "Tree Attention: Topology-aware Decoding for Long-Context Attention on GPU clusters"
(2024).
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from kvlearn import validate
from kvlearn.attention.base import Cache
from kvlearn.attention.core import Partial, merge
from kvlearn.parallel.blockwise import PADDING, Attended, Rule
from kvlearn.parallel.layout import Layout
from kvlearn.parallel.ring import Log, Messages

UP, DOWN = 0, 1  # tags


def tree_merge(part: Partial, group: Any = None, log: Log | None = None) -> Partial:
    """The merge of every rank's partial result, bit for bit the same on all ranks.

    Rank r + d gives what it has to rank r, for d = 1, 2, 4, …; the result goes back the same way. All ranks
    together send 2 · (P - 1) messages of B · H · T · (D + 1) numbers. Raises PeerLost.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    messages, log = Messages(group), log or Log()
    whole = torch.cat((part.out, part.lse[..., None]), dim=-1)
    distances = [1 << i for i in range((world - 1).bit_length())]
    for round_, d in enumerate(distances):
        if rank % (2 * d) == d:
            log.add("send", round_, rank, messages.send(whole, rank - d, UP))
            break
        if rank + d < world:
            other = messages.receive(whole, rank + d, UP)()
            merged = merge(Partial(whole[..., :-1], whole[..., -1]), Partial(other[..., :-1], other[..., -1]))
            whole = torch.cat((merged.out, merged.lse[..., None]), dim=-1)
    for round_, d in enumerate(reversed(distances), len(distances)):
        if rank % (2 * d) == d:
            whole = messages.receive(whole, rank - d, DOWN)()
        elif rank % (2 * d) == 0 and rank + d < world:
            log.add("send", round_, rank, messages.send(whole, rank + d, DOWN))
    messages.finish()
    return Partial(whole[..., :-1], whole[..., -1])


class ShardedKVCache(Cache):
    """This rank's part of a cache of keys and values.

    The prompt's tokens lie as ``layout`` says; of the new ones each goes to the rank that has the fewest. All
    are kept, whatever the window of the layer. ``slot_positions`` says which token each slot holds, -1 for
    none.
    """

    can_trim = False

    def __init__(
        self,
        batch: int,
        n_kv_heads: int,
        max_len: int,
        head_dim: int,
        layout: Layout,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(batch, max_len, device)
        validate.at_most("layout.n_tokens", layout.n_tokens, max_len, "max_len")
        self.layout, self.rank, self.counts = layout, rank, layout.world * [0]
        slots = max(layout.per_rank, -(-max_len // layout.world))
        self.k = torch.zeros(batch, n_kv_heads, slots, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.slot_positions = torch.full((slots,), PADDING, device=device)

    def tensors(self) -> list[Tensor]:
        return [self.k, self.v]

    def reset(self) -> None:
        super().reset()
        self.counts = self.layout.world * [0]
        self.slot_positions.fill_(PADDING)

    def append_prompt(self, k: Float[Tensor, "B G C D"], v: Float[Tensor, "B G C D"]) -> None:
        """Write this rank's slots of the prompt into an empty cache."""
        if self.length:
            raise ValueError(f"cache: expected an empty one for the prompt, got {self.length} tokens")
        positions = [self.layout.positions(rank) for rank in range(self.layout.world)]
        C = self.layout.per_rank
        for name, x in (("k", k), ("v", v)):
            validate.tensor(name, x, tuple(self.k[:, :, :C].shape))
        self.k[:, :, :C], self.v[:, :, :C] = k.detach(), v.detach()
        self.slot_positions[:C] = positions[self.rank]
        self.counts = [int((at > PADDING).sum()) for at in positions]
        self.advance(self.layout.n_tokens)

    def append(self, k: Float[Tensor, "B G 1 D"], v: Float[Tensor, "B G 1 D"]) -> None:
        """Write one new token, on the rank that has the fewest; the others only count it."""
        self.check_room(1)
        for name, x in (("k", k), ("v", v)):
            validate.tensor(name, x, tuple(self.k[:, :, :1].shape))
        taker = self.counts.index(min(self.counts))
        if taker == self.rank:
            slot = self.counts[taker]
            self.k[:, :, slot], self.v[:, :, slot] = k[:, :, 0].detach(), v[:, :, 0].detach()
            self.slot_positions[slot] = self.length
        self.counts[taker] += 1
        self.advance(1)

    def attend(
        self, q: Float[Tensor, "B H 1 D"], rule: Rule, group: Any = None, log: Log | None = None
    ) -> Float[Tensor, "B H 1 D"]:
        """Attention of the newest token over the cache of all ranks."""
        used = slice(0, self.counts[self.rank])
        part = Attended(q, q.shape[-1] ** -0.5, block=1 << 30)
        newest = torch.tensor([self.length - 1], device=q.device)
        slots: Int[Tensor, "n"] = self.slot_positions[used]
        part.add(self.k[:, :, used], self.v[:, :, used], newest, slots, rule)
        return tree_merge(Partial(part.out, part.lse), group, log).out.to(q.dtype)
