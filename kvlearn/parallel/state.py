"""A recurrence over a ring: what travels is one state, however long the text is.

Rank r needs the state after the tokens of rank r - 1, so the ranks work one after the other; the bytes that
each sends do not depend on the number of tokens.

Letters are those of layout.py.
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

    The parts may differ in length, and be empty. Every rank but the last sends its state once. Raises
    TypeError for a layer whose cache is not a state, and PeerLost.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    messages, log = Messages(group), log or Log()
    cache = layer.new_cache(len(x), max(1, x.shape[1]))  # for this part: a state has no positions
    if not isinstance(cache, StateCache):
        raise TypeError(f"layer: expected a recurrence, got {layer.label}")
    if rank:
        for tag, part in enumerate(cache.tensors()):
            part.copy_(messages.receive(part, rank - 1, tag)())
    y = layer(x, cache) if x.shape[1] else x
    if rank + 1 < world:
        for tag, part in enumerate(cache.tensors()):
            log.add("send", rank, rank, messages.send(part, rank + 1, tag))
    messages.finish()
    return y
