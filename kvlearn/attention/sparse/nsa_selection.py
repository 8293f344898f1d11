"""How native sparse attention chooses: the weights of its compressed branch say where to look closer."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvlearn.attention.core import upcast
from kvlearn.attention.sparse.blocks import best_blocks
from kvlearn.attention.sparse.nsa_memory import Sizes


def compressed_weights(
    q: Float[Tensor, "B H T D"],
    positions: Int[Tensor, "1 T"],
    entries_k: Float[Tensor, "B G C D"],
    sizes: Sizes,
) -> Float[Tensor, "B G n T C"]:
    """p = softmax(q k̃ᵀ / √D) over the compressed blocks that are whole, the n query heads of each KV head.

    A query sees a compressed block from its last token on; one that sees none yet has only zeros.
    Source: Yuan et al., "Native Sparse Attention" (2025), equation 8.
    """
    pools = upcast(q).unflatten(1, (entries_k.shape[1], -1))
    scores = torch.einsum("bgntd, bgcd -> bgntc", pools, entries_k.to(pools.dtype)) / q.shape[-1] ** 0.5
    ends = torch.arange(entries_k.shape[2], device=q.device) * sizes.stride + sizes.compress - 1
    seen = ends <= positions[0, :, None]
    scores = scores.masked_fill(~seen & seen.any(-1, keepdim=True), -torch.inf)
    return scores.softmax(-1) * seen


@torch.no_grad()
def block_scores(
    weights: Float[Tensor, "B G n T C"], sizes: Sizes, block: int, length: int
) -> Float[Tensor, "B G T N"]:
    """What the weights say of each of the N blocks of ``block`` tokens, the heads of a KV head together.

        score_j = Σ_heads Σ_{m < l'/d} Σ_{n < l/d} p[j · l'/d + m - n]

    A compressed block consists of l/d strides, a block to select of l'/d: each of the former gives its weight
    once for every stride that it has in the latter. Blocks are counted from 0; counted from 1, as in the
    paper, the index is j · l'/d - m - n. Source: equations 9 and 10.
    """
    n_blocks, overlap, parts = -(-length // block), sizes.compress // sizes.stride, block // sizes.stride
    p = F.pad(weights.sum(2), (overlap - 1, n_blocks * parts - weights.shape[-1]))
    return p.unfold(-1, overlap, 1).sum(-1).unflatten(-1, (n_blocks, parts)).sum(-1)


def select_blocks(
    scores: Float[Tensor, "B G T N"], own: Int[Tensor, "1 T"], n_blocks: int, n_local: int
) -> Bool[Tensor, "B G T N"]:
    """The first block, the last ``n_local`` up to a query's own, and the best of those between: ``n_blocks``.

    Source: equation 11; which blocks are always there: section 4.1.
    """
    own, index = own[:, None, :, None], torch.arange(scores.shape[-1], device=scores.device)
    fixed = (index <= own) & ((index == 0) | (index > own - n_local))
    return best_blocks(scores, (index < own) & ~fixed, n_blocks - 1 - n_local) | fixed
