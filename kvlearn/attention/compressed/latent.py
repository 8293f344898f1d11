"""The latent that a layer keeps of a token in place of its heads, and the two roads of attention over it.

A cached row is [c, r]: the latent c of R numbers, from which the keys and values of all heads follow, and a
rotated key r of Dr numbers that all heads share. Widths that are sums are written together: RDr is R + Dr.

    k_s = [W_uk c_s, r_s],   v_s = W_uv c_s                                     of one head
    naive     decompress, then attend:      scores  q · k_s,                    out  Σ_s w_s v_s
    absorbed  attend to the latents:        scores  [W_ukᵀ q, q_r] · [c_s, r_s],  out  W_uv (Σ_s w_s c_s)

They are equal because ⟨q, W c⟩ = ⟨Wᵀ q, c⟩: the up-projection moves from S tokens to the new ones.
Source: DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1.2.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kvlearn import validate
from kvlearn.attention.cache import Cache
from kvlearn.attention.core import causal_attention


class LatentCache(Cache):
    """Latents of all tokens so far and their rotated keys, side by side; slot s holds position s."""

    def __init__(
        self,
        batch: int,
        max_len: int,
        rank: int,
        rope_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(batch, max_len, device)
        if not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating-point type, got {dtype}")
        self.rank = validate.positive("rank", rank)
        width = rank + validate.at_least("rope_dim", rope_dim, 0)
        # Zeros, not whatever the memory held: a masked slot weighs 0, and 0 · NaN would be NaN.
        self.latents = torch.zeros(batch, max_len, width, dtype=dtype, device=device)

    def tensors(self) -> list[Tensor]:
        return [self.latents]

    def append(self, latent: Float[Tensor, "B T R"], k_rope: Float[Tensor, "B T Dr"]) -> Tensor:
        """Write new tokens behind the old ones; return a view of all rows so far, (B, S, R + Dr)."""
        validate.tensor("latent", latent, (self.batch, "time", self.rank), device=self.device)
        n_tokens, rope_dim = latent.shape[1], self.latents.shape[2] - self.rank
        validate.tensor("k_rope", k_rope, (self.batch, n_tokens, rope_dim), device=self.device)
        self.expect_room(n_tokens)
        new = torch.cat((latent, k_rope), dim=-1).detach().to(self.latents.dtype)
        if self.lengths is None:
            self.latents[:, self.length : self.length + n_tokens] = new
        else:
            self.latents.scatter_(1, self.positions(n_tokens)[..., None].expand(new.shape), new)
        self.advance(n_tokens)
        return self.latents[:, : self.length]


def naive_attention(
    q: Float[Tensor, "B H T DDr"],
    latents: Float[Tensor, "B S RDr"],
    kv_up: Float[Tensor, "H DDv R"],
    positions: Int[Tensor, "#B T"],
    scale: float,
    rotate: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "B H T Dv"]:
    """Decompress keys and values of all S tokens for all heads, then attend as full attention does.

    ``kv_up`` holds a head's D rows W_uk, then its Dv rows W_uv. ``rotate``, where it is given, turns the
    decompressed keys (B, H, S, D) to their positions.
    """
    n_heads, _, rank = kv_up.shape
    latent, k_rope = latents[..., :rank], latents[:, None, :, rank:]
    head_dim = q.shape[-1] - k_rope.shape[-1]
    heads = F.linear(latent, kv_up.flatten(0, 1)).unflatten(-1, (n_heads, -1)).transpose(1, 2)
    k, v = heads[..., :head_dim], heads[..., head_dim:]
    if rotate is not None:
        k = rotate(k)
    k = torch.cat((k, k_rope.expand(-1, n_heads, -1, -1)), dim=-1)
    return causal_attention(q, k, v, positions, scale)


def absorbed_attention(
    q: Float[Tensor, "B H T DDr"],
    latents: Float[Tensor, "B S RDr"],
    kv_up: Float[Tensor, "H DDv R"],
    positions: Int[Tensor, "#B T"],
    scale: float,
) -> Float[Tensor, "B H T Dv"]:
    """The same without decompressing: every head attends to the latents, one key and value for all of them.

    Beside its inputs it holds numbers by heads and tokens (scores), never heads · tokens · head_dim.
    """
    rank = kv_up.shape[2]
    rope_dim = latents.shape[-1] - rank
    # Values R + Dr wide, of which R are wanted: with another width than the keys', PyTorch's attention leaves
    # its fast road and copies them.
    shared = latents[:, None]
    out = causal_attention(fold_up(q, kv_up, rope_dim), shared, shared, positions, scale)
    return unfold_up(out[..., :rank], kv_up, q.shape[-1] - rope_dim)


def fold_up(
    q: Float[Tensor, "B H T DDr"], kv_up: Float[Tensor, "H DDv R"], rope_dim: int
) -> Float[Tensor, "B H T RDr"]:
    """Queries for the latents: [q, q_r] -> [W_ukᵀ q, q_r]. The key's up-projection goes into the query."""
    head_dim = q.shape[-1] - rope_dim
    q_latent = torch.einsum("bhtd, hdr -> bhtr", q[..., :head_dim], kv_up[:, :head_dim])
    return torch.cat((q_latent, q[..., head_dim:]), dim=-1)


def unfold_up(
    latent: Float[Tensor, "B H T R"], kv_up: Float[Tensor, "H DDv R"], head_dim: int
) -> Float[Tensor, "B H T Dv"]:
    """The heads' outputs, W_uv c̄, of latents c̄ that were averaged by the weights of attention."""
    return torch.einsum("bhtr, hdr -> bhtd", latent, kv_up[:, head_dim:])
