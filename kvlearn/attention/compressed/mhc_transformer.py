"""Multi-head compression by a small transformer whose sequence is the heads of one token."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn.attention.base import register
from kvlearn.attention.compressed.latent_memory import Compressed
from kvlearn.attention.compressed.mhc import MultiHeadCompression


class HeadCompressor(nn.Module):
    """N head vectors of a token -> one latent, by a pre-norm transformer layer over them and a linear map.

        h' = h + Attention(norm(h + e)),   h'' = h' + MLP(norm(h' + e)),   c = W [h''_1 … h''_N]

    e is learned and says which head a vector is. W sees all of h'', flattened, where a learned query would
    pool it: with attention and MLP silent this is then a linear map of the heads, so that the transformer can
    express what ``mhc`` does, and adds to it.
    """

    def __init__(self, n_vectors: int, head_dim: int, rank: int) -> None:
        super().__init__()
        self.which = nn.Parameter(torch.randn(n_vectors, head_dim) * 0.02)
        self.attention_norm = nn.RMSNorm(head_dim)
        self.qkv_proj = nn.Linear(head_dim, 3 * head_dim, bias=False)
        self.mix_proj = nn.Linear(head_dim, head_dim, bias=False)
        self.mlp_norm = nn.RMSNorm(head_dim)
        self.widen_proj = nn.Linear(head_dim, 4 * head_dim, bias=False)
        self.narrow_proj = nn.Linear(4 * head_dim, head_dim, bias=False)
        self.latent_proj = nn.Linear(n_vectors * head_dim, rank, bias=False)

    def forward(self, heads: Float[Tensor, "*batch N D"]) -> Float[Tensor, "*batch R"]:
        q, k, v = self.qkv_proj(self.attention_norm(heads + self.which)).chunk(3, dim=-1)
        heads = heads + self.mix_proj(F.scaled_dot_product_attention(q, k, v))
        wide = F.gelu(self.widen_proj(self.mlp_norm(heads + self.which)))
        return self.latent_proj((heads + self.narrow_proj(wide)).flatten(-2))


@register("mhc_transformer")
class MultiHeadCompressionTransformer(MultiHeadCompression):
    """``mhc`` with a transformer over the heads in place of the linear map in front.

        h = W_kv x, keys and then values of all heads;   c = HeadCompressor(h),   r = W_r x

    A token is compressed by itself: tokens are not mixed over time. Decompressing stays linear: compressing
    runs once a token, while decompressing would run again for every cached token at every step, and what is
    not linear cannot be absorbed into the query.

    Source: the second of the two ways that the course's article names; no published one of this form is known
    to us.
    """

    def build(self) -> None:
        n_vectors = 2 * self.n_heads
        self.kv_proj = nn.Linear(self.d_model, n_vectors * self.head_dim, bias=False)
        self.k_rope_proj = nn.Linear(self.d_model, self.rope_dim, bias=False) if self.rope_dim else None
        self.compressor = HeadCompressor(n_vectors, self.head_dim, self.rank)

    def compress(self, x: Float[Tensor, "B T M"]) -> Compressed:
        latent = self.compressor(self.kv_proj(x).unflatten(-1, (2 * self.n_heads, -1)))
        k_rope = x[..., :0] if self.k_rope_proj is None else self.k_rope_proj(x)
        return Compressed(latent, k_rope)

    def keep_all(self, heads: Float[Tensor, "HD2 M"]) -> None:
        self.kv_proj.weight.copy_(heads)
        self.compressor.mix_proj.weight.zero_()
        self.compressor.narrow_proj.weight.zero_()
        nn.init.eye_(self.compressor.latent_proj.weight)
