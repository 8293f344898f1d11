"""Blocks of keys: choosing some for every query, and reading no others.

N is the number of blocks. Block i holds positions i · block to (i + 1) · block - 1; slot s of the keys holds
position s. A query's *own* block is the one that it stands in, half-filled as a rule.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TILE = 64  # queries that attend together: there are never scores of more of them


def best_blocks(
    scores: Float[Tensor, "B H T N"], allowed: Bool[Tensor, "#B #H #T N"], n_blocks: int
) -> Bool[Tensor, "B H T N"]:
    """True at the ``n_blocks`` of highest score among those allowed; at all of these, where they are fewer.

    Of equal scores the earlier block is taken.
    """
    order = scores.masked_fill(~allowed, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    best = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :n_blocks], True)
    return best & allowed


def attend_to_blocks(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S D"],
    positions: Int[Tensor, "#B T"],
    chosen: Bool[Tensor, "B HG T N"],
    block: int,
) -> Float[Tensor, "B H T D"]:
    """softmax(q kᵀ / √D) v of each query over the blocks chosen for it, up to its own position.

    ``chosen`` is given for each query head, or for each KV head and so for all its readers. A KV head fetches
    each block that any of its queries here has chosen, once, and touches no other key or value. Every query
    must have chosen its own block.
    """
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    rows = chosen.unflatten(1, (G, -1)).expand(-1, -1, H // G, -1, -1).flatten(2, 3)  # (B, G, H/G · T, N)
    union = rows.any(2)
    blocks = union.sort(dim=-1, descending=True, stable=True).indices[..., : int(union.sum(-1).max())]
    live = union.gather(-1, blocks)  # the unions of some KV heads are smaller
    blocks = torch.where(live, blocks, blocks[..., :1])  # there, a block again that is read anyway
    slots = (blocks[..., None] * block + torch.arange(block, device=q.device)).flatten(2)
    at = slots.clamp_max(S - 1)[..., None].expand(-1, -1, -1, D)  # the last block may be half-filled
    seen = rows.gather(-1, blocks[:, :, None].expand(-1, -1, rows.shape[2], -1)) & live[:, :, None]
    seen = seen.repeat_interleave(block, dim=-1).unflatten(2, (-1, T))
    seen = seen & (slots[:, :, None, None] <= positions[:, None, None, :, None])
    keys, values = (x.gather(2, at).to(q.dtype) for x in (k, v))
    out = F.scaled_dot_product_attention(q.reshape(B, G, -1, D), keys, values, attn_mask=seen.flatten(2, 3))
    return out.reshape(B, H, T, D)


def by_tiles(
    attend: Callable[..., Tensor],
    q: Float[Tensor, "B H T D"],
    positions: Int[Tensor, "#B T"],
    *memory: Tensor,
) -> Float[Tensor, "... T D"]:
    """``attend(q, positions, *memory)`` for ``TILE`` queries at a time, whose outputs are put together again.

    Its scores live as long as a tile: in training they are not kept but computed again for the gradient.
    """
    if torch.is_grad_enabled():
        attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
    starts = range(0, q.shape[2], TILE)
    tiles = [attend(q[:, :, a : a + TILE], positions[:, a : a + TILE], *memory) for a in starts]
    return torch.cat(tiles, dim=-2)
