"""Latent attention: what multi-head compression and MLA have in common.

A subclass says how queries are made and how a token is compressed; the two roads are chosen and taken here.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from kvlearn.attention.cache import KV, Cache
from kvlearn.attention.compressed.latent import (
    LatentCache,
    absorbed_attention,
    fold_up,
    naive_attention,
    unfold_up,
)
from kvlearn.attention.compressed.latent_memory import LatentMemory
from kvlearn.attention.compressed.roads import absorbed_wins
from kvlearn.attention.core import merge_heads, upcast

# One token a row over its latents: q_latent (B, H, R), q_rope (B, H, Dr), cache (B, S, R + Dr), lengths (B,)
# int32, and scale= -> (B, H, R); kvlearn.kernels.decode_latent, say.
LatentStep = Callable[..., Tensor]


class LatentAttention(LatentMemory):
    """Causal attention over keys and values that are decompressed from one latent a token.

        head = Σ_s softmax_s(scale · [q, RoPE(q_r)] · k_s) v_s,   y = [head_1 … head_H] W_o

    with k_s, v_s, cache and positions as ``LatentMemory`` says. ``absorb`` names the road that a call takes:
    True or False, or None for the one with fewer FLOPs (without a cache the naive one, which is what training
    wants). ``decode_latent_step``, where it is set, does the absorbed steps of one token.
    """

    absorb: bool | None = None
    decode_latent_step: LatentStep | None = None

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.refuse(source)
        self.check(x, cache, LatentCache)
        n_tokens, cached = x.shape[1], 0 if cache is None else cache.length
        absorb = self.absorbs(n_tokens, cached, with_cache=cache is not None)
        positions = (
            torch.arange(n_tokens, device=x.device)[None] if cache is None else cache.positions(n_tokens)
        )
        q, new = self.rotated(x, positions)
        latents = cache.append(*new) if isinstance(cache, LatentCache) else torch.cat(new, dim=-1)
        if absorb and cache is not None and n_tokens == 1 and self.decode_latent_step is not None:
            heads = self.step(q, latents, positions)
        elif absorb:
            heads = absorbed_attention(q, latents.to(q.dtype), self.up, positions, self.scale)
        else:
            rotate = None if self.absorbable else self.rotate_keys
            heads = naive_attention(q, latents.to(q.dtype), self.up, positions, self.scale, rotate)
        return self.o_proj(merge_heads(heads))

    def absorbs(self, new: int, cached: int, with_cache: bool = True) -> bool:
        """Whether a call with ``new`` tokens behind ``cached`` ones takes the absorbed road.

        Raises ValueError where ``absorb`` asks for what cannot be done.
        """
        if self.absorb and not self.absorbable:
            raise ValueError("absorb: expected None or False: keys are rotated after decompression, got True")
        if self.absorb is not None or not with_cache or not self.absorbable:
            return bool(self.absorb)
        sizes = (self.n_heads, self.head_dim, self.rank, self.rope_dim)
        return absorbed_wins(*sizes, new=new, cached=cached, v_head_dim=self.v_head_dim)

    def step(
        self, q: Float[Tensor, "B H 1 DDr"], latents: Float[Tensor, "B S RDr"], positions: Tensor
    ) -> Float[Tensor, "B H 1 Dv"]:
        """One token a row, its attention done by ``decode_latent_step``."""
        assert self.decode_latent_step is not None
        q_latent = fold_up(q, self.up, self.rope_dim)[:, :, 0]
        parts = q_latent.split((self.rank, self.rope_dim), dim=-1)
        lengths = (positions[:, 0] + 1).expand(len(q)).to(torch.int32)
        out = self.decode_latent_step(*parts, latents, lengths, scale=self.scale)
        return unfold_up(out[:, :, None], self.up, self.head_dim)

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        q, _ = self.rotated(x, torch.arange(x.shape[1], device=x.device)[None])
        q, cached = upcast(q), []
        heads = torch.empty(*q.shape[:3], self.v_head_dim, dtype=q.dtype, device=q.device)
        for t in range(x.shape[1]):
            one = self.rotated(x[:, t : t + 1], torch.tensor([[t]], device=x.device))[1]
            cached.append(upcast(torch.cat(one, dim=-1)))
            latent, k_rope = torch.cat(cached, dim=1).split((self.rank, self.rope_dim), dim=-1)
            k = torch.einsum("bsr, hdr -> bhsd", latent, upcast(self.k_up))
            v = torch.einsum("bsr, hdr -> bhsd", latent, upcast(self.v_up))
            if not self.absorbable:
                k = self.rotate_keys(k)
            k = torch.cat((k, k_rope[:, None].expand(-1, self.n_heads, -1, -1)), dim=-1)
            scores = torch.einsum("bhd, bhsd -> bhs", q[:, :, t], k) * self.scale
            heads[:, :, t] = torch.einsum("bhs, bhsd -> bhd", scores.softmax(-1), v)
        return self.o_proj(merge_heads(heads).to(x.dtype))
