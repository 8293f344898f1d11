"""Multi-head compression (MHC): all heads' keys and values of a token squeezed into one small vector.

"MHC" is this course's name for what its article describes; the published relatives are MLA (mla.py), Palu and
the conversions of trained models to them. It is not mHC, "manifold-constrained hyper-connections" (2025),
which mixes residual streams and saves no cache.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn.attention.base import register
from kvlearn.attention.compressed.latent_attention import LatentAttention
from kvlearn.attention.compressed.latent_memory import Compressed
from kvlearn.attention.core import split_heads
from kvlearn.attention.full import FullAttention
from kvlearn.attention.rope import RopeConfig


@register("mhc")
class MultiHeadCompression(LatentAttention):
    """Latent attention with a learned linear map in front, and nothing else.

        q = W_q x,   [c, r] = W_down x,   and from there as ``LatentAttention``

    ``rank`` is 2 · H · D / 8 unless given, an eighth of what full attention keeps. Where it is the whole
    width 2 · H · D and ``rope_dim`` is 0, this is full attention.

    Source: DeepSeek-AI, "DeepSeek-V2" (2024), equations 9 to 11 and 15; with ``rope_dim=0`` the arrangement
    of Chang et al., "Palu" (2024).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        rank: int | None = None,
        rope_dim: int | None = None,
        rope: RopeConfig | None = RopeConfig(),
    ) -> None:
        super().__init__(
            d_model, n_heads, head_dim=head_dim, v_head_dim=None, rank=rank, rope_dim=rope_dim, rope=rope
        )
        self.q_proj = nn.Linear(d_model, self.n_heads * (self.head_dim + self.rope_dim), bias=False)
        self.build()

    def default_rank(self) -> int:
        return max(2 * self.n_heads * self.head_dim // 8, 1)

    def build(self) -> None:
        """The weights of ``compress``."""
        self.kv_down = nn.Linear(self.d_model, self.rank + self.rope_dim, bias=False)

    def queries(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B H T DDr"]:
        return split_heads(self.q_proj(x), self.n_heads)

    def compress(self, x: Float[Tensor, "B T M"]) -> Compressed:
        return Compressed(*self.kv_down(x).split((self.rank, self.rope_dim), dim=-1))

    def keep_all(self, heads: Float[Tensor, "HD2 M"]) -> None:
        """Let the latent be all ``heads`` of a token, keys and then values, at full rank."""
        self.kv_down.weight.copy_(heads)

    @classmethod
    def tiny(cls) -> "MultiHeadCompression":
        return cls(d_model=24, n_heads=3, head_dim=8, rank=10, rope_dim=4)

    @classmethod
    def tiny_at_limit(cls) -> "tuple[MultiHeadCompression, FullAttention]":
        """Nothing is lost at full rank with exact rotation: the latent is the heads themselves."""
        torch.manual_seed(0)
        full = FullAttention.tiny()
        width = full.n_heads * full.head_dim
        limit = cls(full.d_model, full.n_heads, head_dim=full.head_dim, rank=2 * width, rope_dim=0)
        with torch.no_grad():
            limit.q_proj.weight.copy_(full.q_proj.weight)
            limit.o_proj.weight.copy_(full.o_proj.weight)
            limit.keep_all(torch.cat((full.k_proj.weight, full.v_proj.weight)))
            k_rows, v_rows = torch.eye(2 * width).unflatten(0, (2, full.n_heads, full.head_dim))
            limit.k_up.copy_(k_rows)
            limit.v_up.copy_(v_rows)
        return limit, full
