"""Learned routing: which pool a query head reads is trained, then fixed; the pools may differ in size."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import Mechanism, register
from kvlearn.attention.cache import KV
from kvlearn.attention.core import merge_heads, split_heads, upcast
from kvlearn.attention.full import FullAttention
from kvlearn.attention.kv_attention import Attend, KVAttention
from kvlearn.attention.rope import RopeConfig
from kvlearn.attention.shared.routing import one_hot_choice

MARGIN = 0.1  # by which a route leads at first: a training of some hundred steps can overturn it


@register("routed")
class RoutedAttention(KVAttention):
    """Grouped attention whose assignment of query heads to pools is learned: head h reads argmax_g logits_hg.

        c_hg = one-hot of argmax_g logits_hg, with the gradient of the softmax
        head_h = softmax(q_h (Σ_g c_hg K_g)ᵀ / √D) Σ_g c_hg V_g

    Cache: 2 · B · G · max_len · D numbers, as for ``gqa``; the route itself is H · G weights. It is the same
    for all tokens, so that a token's keys are written once, whoever will read them. G need not divide H.
    Routing between fixed pools is the article's wording; the nearest published method is Chen et al., "DHA"
    (2024). Straight-through choice: routing.py.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int = 1,
        head_dim: int | None = None,
        rope: RopeConfig | None = RopeConfig(),
        reader: bool = False,
    ) -> None:
        super().__init__(d_model, n_heads, n_kv_heads, head_dim, rope, reader)
        validate.at_most("n_kv_heads", n_kv_heads, n_heads, "n_heads: each pool needs a reader")
        self.route_logits = nn.Parameter(MARGIN * torch.eye(n_kv_heads)[super().pools])  # neighbours

    @property
    def pools(self) -> list[int]:
        """Which KV head each query head reads."""
        return self.route_logits.argmax(-1).tolist()

    def route(self, pools: list[int]) -> None:
        """Let head h read pool ``pools[h]``, by the margin that a new layer has too.

        Raises ValueError for another number of heads, or a pool that does not exist.
        """
        if len(pools) != self.n_heads:
            raise ValueError(f"pools: expected one for each of n_heads={self.n_heads}, got {len(pools)}")
        for h, pool in enumerate(pools):
            validate.at_least(f"pools[{h}]", pool, 0)
            validate.at_most(
                f"pools[{h}]", pool, self.n_kv_heads - 1, f"n_kv_heads={self.n_kv_heads}, from 0"
            )
        with torch.no_grad():
            self.route_logits.copy_(MARGIN * torch.eye(self.n_kv_heads)[pools])

    def choice(self) -> Float[Tensor, "H G"]:
        """1 where a head reads a pool."""
        return one_hot_choice(self.route_logits)

    def attend(self, attention: Attend, x: Tensor, q: Tensor, kv: KV) -> Float[Tensor, "B H T D"]:
        if torch.is_grad_enabled():  # the choice joins the graph, at the price of H heads of K and V
            choice = self.choice().to(q.dtype)
            k, v = (torch.einsum("hg, bgsd -> bhsd", choice, pool.to(q.dtype)) for pool in (kv.k, kv.v))
            return attention(q, replace(kv, k=k, v=v))
        route, heads = torch.tensor(self.pools, device=q.device), torch.empty_like(q)
        for g in range(self.n_kv_heads):
            readers = (route == g).nonzero()[:, 0]
            if len(readers):
                pool = replace(kv, k=kv.k[:, g : g + 1], v=kv.v[:, g : g + 1])
                heads[:, readers] = attention(q[:, readers], pool)
        return heads

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        keys, values, positions = self.kv(x)
        choice = upcast(self.choice())
        k, v = (torch.einsum("hg, bgsd -> bhsd", choice, upcast(pool)) for pool in (keys, values))
        q = upcast(self.rotate(split_heads(self.q_proj(x), self.n_heads), positions))
        rows = [
            torch.einsum("bhd, bhsd -> bhs", q[:, :, t], k[:, :, : t + 1]).div(self.head_dim**0.5).softmax(-1)
            for t in range(x.shape[1])
        ]
        heads = torch.stack(
            [torch.einsum("bhs, bhsd -> bhd", row, v[:, :, : row.shape[-1]]) for row in rows], 2
        )
        return self.o_proj(merge_heads(heads).to(x.dtype))

    @classmethod
    def tiny(cls, **options: Any) -> "RoutedAttention":
        layer = cls(d_model=24, n_heads=5, n_kv_heads=3, head_dim=8, **options)
        layer.route([2, 0, 2, 1, 2])
        return layer

    @classmethod
    def tiny_at_limit(cls) -> tuple[Mechanism, Mechanism]:
        """A pool for every head, in another order."""
        full, limit, order = FullAttention.tiny(), cls(d_model=24, n_heads=3, n_kv_heads=3), [1, 2, 0]
        weights = {**full.state_dict(), "route_logits": torch.eye(3)[order]}
        for name in ("k_proj.weight", "v_proj.weight"):  # pool order[h] holds what head h reads
            pools = torch.empty(3, 8, 24)
            pools[order] = weights[name].unflatten(0, (3, 8))
            weights[name] = pools.flatten(0, 1)
        limit.load_state_dict(weights)
        return limit, full
