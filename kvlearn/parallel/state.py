"""A recurrence over a ring: what travels is one state, however long the text is.

Rank r needs the state after the tokens of rank r - 1, so the ranks work one after the other; the bytes that
each sends do not depend on the number of tokens.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from kvlearn.attention import Mechanism
from kvlearn.attention.recurrent import StateCache
from kvlearn.parallel.ring import Log, Messages


@torch.no_grad()
def pass_state(
    layer: Mechanism, x: Float[Tensor, "B C M"], group: Any = None, log: Log | None = None
) -> Float[Tensor, "B C M"]:
    """``layer`` on a sequence in contiguous order, of which each rank has its part ``x``; no gradient.

    The parts may differ in length, and be empty. Every rank but the last sends once: its state, and in 8 bytes the number
    of tokens so far. Raises TypeError for a layer whose cache is not a state, and PeerLost.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    messages, log = Messages(group), log or Log()
    if not isinstance(layer.new_cache(len(x), 1), StateCache):
        raise TypeError(f"layer: expected a recurrence, got {layer.label}")
    before = torch.zeros(1, dtype=torch.int64, device=x.device)
    if rank:
        before = messages.receive(before, rank - 1, 0)()
    cache = layer.new_cache(len(x), max(1, int(before) + x.shape[1]))
    if rank:
        cache.advance(int(before))
        for tag, part in enumerate(cache.tensors(), 1):
            part.copy_(messages.receive(part, rank - 1, tag)())
    y = layer(x, cache) if x.shape[1] else x
    if rank + 1 < world:
        for tag, part in enumerate([before + x.shape[1], *cache.tensors()]):
            log.add("send", rank, rank, messages.send(part, rank + 1, tag))
    messages.finish()
    return y
