"""The lightning indexer: a narrow scorer that says which tokens of the past are worth reading.

Letters beside those of core.py: J index heads, Di numbers of an index key, K tokens selected.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.compressed.latent import LatentCache
from kvlearn.attention.core import split_heads, upcast, visible
from kvlearn.attention.rope import Rope, RopeConfig


class Request(NamedTuple):
    """What tokens look for: the queries of J index heads, and the weight of each head's answer."""

    q: Float[Tensor, "B J T Di"]
    weight: Float[Tensor, "B J T"]

    def part(self, tokens: slice) -> "Request":
        return Request(self.q[:, :, tokens], self.weight[:, :, tokens])


class Indexer(nn.Module):
    """What a lightning indexer does with a request, whether its keys stand for tokens or for entries.

    I_ts = Σ_j w_tj ReLU(q_tj · k_s)
    """

    top_k: int

    def scores(self, request: Request, keys: Float[Tensor, "B S Di"]) -> Float[Tensor, "B T S"]:
        """I of all pairs, in fp32 at least; on the way there are J numbers a pair."""
        q, weight = (upcast(part) for part in request)
        each = torch.relu(q @ keys.to(q.dtype)[:, None].mT)
        return torch.einsum("bjt, bjts -> bts", weight, each)

    @torch.no_grad()
    def best(
        self, request: Request, keys: Float[Tensor, "B S Di"], seen: Bool[Tensor, "#B T S"]
    ) -> Int[Tensor, "B T K"]:
        """The keys of highest score, best first; K is ``top_k``, or S where that is less.

        Where a query sees fewer than K, those come first, and then others, which it must not read. Of equal
        scores (no head answers: 0) the earlier key is taken, so that the choice does not depend on how a
        sequence was cut.
        """
        scores = self.scores(request, keys).masked_fill(~seen, -torch.inf)
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]


class LightningIndexer(Indexer):
    """Scores every token s for every later token t by J small heads, which share one key a token.

        I_ts = Σ_j w_tj ReLU(q_tj · k_s),   S_t = the top_k tokens s ≤ t of largest I_ts
        q = RoPE(W_q a),   k = RoPE(LayerNorm(W_k x)),   w = W_w x / √(J · Di)

    a is what the queries of attention are made from: their latent, or x. Of q and k the first ``rope_dim``
    numbers turn. Every pair is scored, O(N²), but cheaply: J · Di multiplications, where absorbed attention
    takes H · (2R + Dr). For DeepSeek-V3.2 that is 8,192 in place of 139,264.

    Raises ValueError for a ``rope_dim`` that is odd or above ``index_dim``. Source: DeepSeek-AI,
    "DeepSeek-V3.2" (2025), equation 1; the norm, the order and the constant are those of its released code.
    """

    def __init__(
        self,
        d_model: int,
        query_width: int,
        *,
        index_heads: int,
        index_dim: int,
        top_k: int,
        rope_dim: int,
        rope: RopeConfig | None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.index_heads = validate.positive("index_heads", index_heads)
        self.index_dim = validate.positive("index_dim", index_dim)
        self.top_k = validate.positive("top_k", top_k)
        self.rope = None
        if rope is not None:
            validate.at_most("rope_dim", rope_dim, index_dim, "index_dim")
            self.rope = Rope(rope_dim, rope)
        self.q_proj = nn.Linear(query_width, self.index_heads * self.index_dim, bias=False)
        self.k_proj = nn.Linear(d_model, self.index_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.index_dim, eps=norm_eps)
        self.weight_proj = nn.Linear(d_model, self.index_heads, bias=False)

    def request(
        self, a: Float[Tensor, "B T A"], x: Float[Tensor, "B T M"], positions: Int[Tensor, "#B T"]
    ) -> Request:
        q = self.rotate(split_heads(self.q_proj(a), self.index_heads), positions)
        return Request(q, self.weight_proj(x).mT * (self.index_heads * self.index_dim) ** -0.5)

    def keys(self, x: Float[Tensor, "B T M"], positions: Int[Tensor, "#B T"]) -> Float[Tensor, "B T Di"]:
        return self.rotate(self.k_norm(self.k_proj(x))[:, None], positions)[:, 0]

    def rotate(
        self, heads: Float[Tensor, "B J T Di"], positions: Int[Tensor, "#B T"]
    ) -> Float[Tensor, "B J T Di"]:
        if self.rope is None:
            return heads
        turned, still = heads.split((self.rope.head_dim, self.index_dim - self.rope.head_dim), dim=-1)
        return torch.cat((self.rope(turned, positions), still), dim=-1)

    def select(
        self, request: Request, keys: Float[Tensor, "B S Di"], positions: Int[Tensor, "#B T"]
    ) -> Int[Tensor, "B T K"]:
        """The slots each token reads: the best of those at or before its position."""
        return self.best(request, keys, visible(positions, keys.shape[1])[:, 0])


class IndexedLatentCache(LatentCache):
    """Latents, rotated keys and, in a tensor of their own since they are read apart, the index keys."""

    def __init__(
        self,
        batch: int,
        max_len: int,
        rank: int,
        rope_dim: int,
        index_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(batch, max_len, rank, rope_dim, dtype, device)
        self.index_dim = validate.positive("index_dim", index_dim)
        self.index_keys = torch.zeros(batch, max_len, index_dim, dtype=dtype, device=device)

    def tensors(self) -> list[Tensor]:
        return [self.latents, self.index_keys]

    def append_indexed(
        self,
        latent: Float[Tensor, "B T R"],
        k_rope: Float[Tensor, "B T Dr"],
        index_key: Float[Tensor, "B T Di"],
    ) -> tuple[Tensor, Tensor]:
        """``append`` with the tokens' index keys; returns views of both: (B, S, R + Dr) and (B, S, Di)."""
        shape = (self.batch, latent.shape[1], self.index_dim)
        validate.tensor("index_key", index_key, shape, device=self.device)
        positions = self.positions(latent.shape[1]).expand(self.batch, -1)
        latents = self.append(latent, k_rope)
        new = index_key.detach().to(self.index_keys.dtype)
        self.index_keys.scatter_(1, positions[..., None].expand(new.shape), new)
        return latents, self.index_keys[:, : self.length]
