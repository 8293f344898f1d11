"""Multi-head compression (MHC): all heads' keys and values of a token compressed into one small vector.

    [c_t, r_t] = compress(x_t),   k_t = [W_uk c_t, RoPE(r_t)],   v_t = W_uv c_t            of each head

"MHC" is this course's name for the method of its article: a learned linear map (``mhc``) or a small
transformer over the heads (``mhc_transformer``) in front of the cache. From the latent c on it is MLA: cache,
decompression and the naive and the absorbed path are those of mla.py. Published relatives are MLA, Palu, and
the conversions of trained models to them. mHC, "manifold-constrained hyper-connections" (2025), is something
else: it mixes residual streams and saves no cache.

Letters beside those of core.py: N vectors that are compressed to one latent.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import KV, Cache, Mechanism, register, token_positions
from kvlearn.attention.core import merge_heads, rms_norm_naive, split_heads, upcast
from kvlearn.attention.full import FullAttention
from kvlearn.attention.mla import (
    LatentCache,
    LatentStep,
    absorbed_attention,
    absorbed_step,
    absorbed_wins,
    check_absorb,
    check_rank,
    latent_attention_naive,
    naive_attention,
    rotary_width,
)
from kvlearn.attention.rope import Rope, RopeConfig


@register("mhc")
class MultiHeadCompression(Mechanism):
    """Multi-head compression: latent attention with a learned linear map in front, and nothing else.

        q = W_q x,   [c, r] = W_down x
        head = Σ_s softmax_s([q, RoPE(q_r)] · k_s / √(D + Dr)) v_s,     y = [head_1 … head_H] W_o

    Cache: B · max_len · (R + Dr) numbers, all of them read by a step, once for all heads. ``rank`` (R) is
    2 · H · D / 8 unless given, an eighth of what full attention keeps. Where it is the whole width 2 · H · D
    and ``rope_dim`` is 0, this is full attention. ``rope_dim``, ``absorb``, ``decode_latent_step`` and the
    errors are those of ``mla``.

    Source: DeepSeek-AI, "DeepSeek-V2" (2024), equations 9 to 11 and 15; with ``rope_dim=0`` the arrangement
    of Chang et al., "Palu" (2024).
    """

    absorb: bool | None = None
    decode_latent_step: LatentStep | None = None

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
        super().__init__(d_model, n_heads, head_dim)
        width = 2 * self.n_heads * self.head_dim
        self.rank = check_rank(max(width // 8, 1) if rank is None else rank, width)
        self.rope_dim = rotary_width(rope_dim, self.head_dim, rope)
        self.scale = (self.head_dim + self.rope_dim) ** -0.5
        self.rope = Rope(self.rope_dim or self.head_dim, rope)
        self.kv_up = nn.Linear(self.rank, width, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)
        self.q_proj = nn.Linear(d_model, self.n_heads * (self.head_dim + self.rope_dim), bias=False)
        self.add_compression()

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, LatentCache, source)
        T, D = x.shape[1], self.head_dim
        absorb = self.absorbs(T, None if cache is None else cache.length)
        positions = token_positions(x, cache)

        q = split_heads(self.q_proj(x), self.n_heads)  # (B, H, T, D + Dr)
        latent, k_rope = self.compress(x)  # (B, T, R), (B, T, Dr)
        if self.rope_dim:
            q = torch.cat((q[..., :D], self.rope(q[..., D:], positions)), dim=-1)
            k_rope = self.rope(k_rope[:, None], positions)[:, 0]
        else:
            q = self.rope(q, positions)

        if isinstance(cache, LatentCache):
            latents = cache.append(latent, k_rope)  # (B, S, R + Dr)
        else:
            latents = torch.cat((latent, k_rope), dim=-1)

        if not absorb:  # decompress S tokens
            key_rope = None if self.rope_dim else self.rope
            heads = naive_attention(q, latents.to(q.dtype), self.up, positions, self.scale, key_rope)
        elif self.decode_latent_step is None or cache is None or T > 1:  # fold T queries, unfold T outputs
            heads = absorbed_attention(q, latents.to(q.dtype), self.up, positions, self.scale)
        else:
            heads = absorbed_step(self.decode_latent_step, q, latents, self.up, positions, self.scale)
        return self.o_proj(merge_heads(heads))

    # ``mhc_transformer`` overrides these: the weights in front of the cache, and their use.

    def add_compression(self) -> None:
        """The weights of ``compress``."""
        self.kv_down = nn.Linear(self.d_model, self.rank + self.rope_dim, bias=False)

    def compress(self, x: Float[Tensor, "B T M"]) -> tuple[Float[Tensor, "B T R"], Float[Tensor, "B T Dr"]]:
        """Each token alone as a latent and a shared key, not rotated."""
        latent, k_rope = self.kv_down(x).split((self.rank, self.rope_dim), dim=-1)
        return latent, k_rope

    def compress_naive(
        self, x: Float[Tensor, "B T M"]
    ) -> tuple[Float[Tensor, "B T R"], Float[Tensor, "B T Dr"]]:
        down = upcast(self.kv_down.weight)
        return x @ down[: self.rank].T, x @ down[self.rank :].T

    def keep_all(self, heads: Float[Tensor, "HD2 M"]) -> None:
        """Let the latent be all ``heads`` of a token, keys and then values, at full rank."""
        self.kv_down.weight.copy_(heads)

    @property
    def up(self) -> Float[Tensor, "H DDv R"]:
        """The up-projection by heads: of each, D rows W_uk, then D rows W_uv. A view of ``kv_up.weight``."""
        return self.kv_up.weight.unflatten(0, (self.n_heads, -1))

    @property
    def k_up(self) -> Float[Tensor, "H D R"]:
        """W_uk of every head, a view that may be written to."""
        return self.up[:, : self.head_dim]

    @property
    def v_up(self) -> Float[Tensor, "H Dv R"]:
        """W_uv of every head, a view that may be written to."""
        return self.up[:, self.head_dim :]

    @property
    def absorbable(self) -> bool:
        """Whether the up-projection can be absorbed: not where decompressed keys are rotated."""
        return self.rope.config is None or self.rope_dim > 0

    def absorbs(self, new: int, cached: int | None) -> bool:
        """Whether a call with ``new`` tokens after ``cached`` ones takes the absorbed path; None: no cache.

        Raises ValueError for ``absorb=True`` where ``absorbable`` is False.
        """
        check_absorb(self.absorb, self.absorbable)
        if self.absorb is not None or cached is None or not self.absorbable:
            return bool(self.absorb)
        return absorbed_wins(self.n_heads, self.head_dim, self.rank, self.rope_dim, new=new, cached=cached)

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        wide = upcast(x)
        q = (wide @ upcast(self.q_proj.weight).T).reshape(*x.shape[:2], self.n_heads, -1)
        latent, k_rope = self.compress_naive(wide)
        up = upcast(self.kv_up.weight)
        heads = latent_attention_naive(
            q, latent, k_rope[:, :, None], up, self.head_dim, self.scale, self.rope.config
        )
        return (heads @ upcast(self.o_proj.weight).T).to(x.dtype)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LatentCache:
        return LatentCache(batch, max_len, self.rank, self.rope_dim, *self.dtype_and_device(dtype, device))

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · max_len · (R + Dr) · bytes per number."""
        numbers = validate.positive("max_len", max_len) * (self.rank + self.rope_dim)
        return self.to_bytes(numbers, batch, dtype)

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Everything stored so far, once for all heads: B · length · (R + Dr) · bytes per number."""
        numbers = validate.positive("length", length) * (self.rank + self.rope_dim)
        return self.to_bytes(numbers, batch, dtype)

    @classmethod
    def tiny(cls) -> "MultiHeadCompression":
        return cls(d_model=24, n_heads=3, head_dim=8, rank=10, rope_dim=4)

    @classmethod
    def tiny_at_limit(cls) -> "tuple[MultiHeadCompression, FullAttention]":
        """Nothing is lost at full rank with exact rotation: the latent is the heads themselves."""
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


class HeadCompressor(nn.Module):
    """N head vectors of a token -> one latent, by a pre-norm transformer layer over them and a linear map.

        h' = h + Attention(norm(h + e)),   h'' = h' + MLP(norm(h' + e)),   c = W [h''_1 … h''_N]

    e is learned and says which head a vector is. W reads all of h'', flattened, where a learned query would
    pool it: with attention and MLP silent this is then a linear map of the heads, so that the transformer can
    express what ``mhc`` does, and adds to it.
    """

    def __init__(self, n_vectors: int, head_dim: int, rank: int) -> None:
        super().__init__()
        self.which = nn.Parameter(torch.randn(n_vectors, head_dim) * 0.02)
        eps = torch.finfo(torch.float32).eps  # in half precision too, whose own is 1000 times as large
        self.attention_norm = nn.RMSNorm(head_dim, eps)
        self.qkv_proj = nn.Linear(head_dim, 3 * head_dim, bias=False)
        self.mix_proj = nn.Linear(head_dim, head_dim, bias=False)
        self.mlp_norm = nn.RMSNorm(head_dim, eps)
        self.widen_proj = nn.Linear(head_dim, 4 * head_dim, bias=False)
        self.narrow_proj = nn.Linear(4 * head_dim, head_dim, bias=False)
        self.latent_proj = nn.Linear(n_vectors * head_dim, rank, bias=False)

    def forward(self, heads: Float[Tensor, "*batch N D"]) -> Float[Tensor, "*batch R"]:
        q, k, v = self.qkv_proj(self.attention_norm(heads + self.which)).chunk(3, dim=-1)
        heads = heads + self.mix_proj(F.scaled_dot_product_attention(q, k, v))
        wide = F.gelu(self.widen_proj(self.mlp_norm(heads + self.which)))
        return self.latent_proj((heads + self.narrow_proj(wide)).flatten(-2))

    def naive(self, heads: Float[Tensor, "*batch N D"]) -> Float[Tensor, "*batch R"]:
        """The equations above, head by head; gelu(x) = x · (1 + erf(x / √2)) / 2."""
        (N, D), e = heads.shape[-2:], upcast(self.which)
        w_q, w_k, w_v = upcast(self.qkv_proj.weight).reshape(3, D, D)
        normed = [rms_norm_naive(heads[..., n, :] + e[n], self.attention_norm) for n in range(N)]
        latent = torch.zeros((), dtype=heads.dtype, device=heads.device)
        for n in range(N):
            scores = torch.stack([((normed[n] @ w_q.T) * (z @ w_k.T)).sum(-1) for z in normed], dim=-1)
            weights = (scores / D**0.5).softmax(-1)
            read = sum(weights[..., m, None] * (normed[m] @ w_v.T) for m in range(N))
            head = heads[..., n, :] + read @ upcast(self.mix_proj.weight).T
            wide = rms_norm_naive(head + e[n], self.mlp_norm) @ upcast(self.widen_proj.weight).T
            wide = wide * (1 + torch.erf(wide / math.sqrt(2))) / 2
            head = head + wide @ upcast(self.narrow_proj.weight).T
            latent = latent + head @ upcast(self.latent_proj.weight)[:, n * D : (n + 1) * D].T
        return latent


@register("mhc_transformer")
class MultiHeadCompressionTransformer(MultiHeadCompression):
    """``mhc`` with a transformer over the heads in place of the linear map in front.

        h = W_kv x, keys and then values of all heads;   c = HeadCompressor(h),   r = W_r x

    A token is compressed by itself: tokens are not mixed over time. Decompressing stays linear: compressing
    runs once per token, while decompressing would run again for every cached token at every step, and only a
    linear map can be absorbed into the query.

    Source: the second of the two ways that the course's article names; no published one of this form is known
    to us.
    """

    def add_compression(self) -> None:
        n_vectors = 2 * self.n_heads
        self.kv_proj = nn.Linear(self.d_model, n_vectors * self.head_dim, bias=False)
        self.k_rope_proj = nn.Linear(self.d_model, self.rope_dim, bias=False) if self.rope_dim else None
        self.compressor = HeadCompressor(n_vectors, self.head_dim, self.rank)

    def compress(self, x: Float[Tensor, "B T M"]) -> tuple[Float[Tensor, "B T R"], Float[Tensor, "B T Dr"]]:
        latent = self.compressor(self.kv_proj(x).unflatten(-1, (2 * self.n_heads, -1)))
        return latent, x[..., :0] if self.k_rope_proj is None else self.k_rope_proj(x)

    def compress_naive(
        self, x: Float[Tensor, "B T M"]
    ) -> tuple[Float[Tensor, "B T R"], Float[Tensor, "B T Dr"]]:
        heads = (x @ upcast(self.kv_proj.weight).T).reshape(*x.shape[:2], -1, self.head_dim)
        k_rope = x[..., :0] if self.k_rope_proj is None else x @ upcast(self.k_rope_proj.weight).T
        return self.compressor.naive(heads), k_rope

    def keep_all(self, heads: Float[Tensor, "HD2 M"]) -> None:
        self.kv_proj.weight.copy_(heads)
        self.compressor.mix_proj.weight.zero_()
        self.compressor.narrow_proj.weight.zero_()
        nn.init.eye_(self.compressor.latent_proj.weight)
