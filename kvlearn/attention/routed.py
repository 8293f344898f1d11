"""Learned routing: grouped attention in which it is learned which KV head each query head reads.

Either once for all tokens (``routed``: trained, then fixed; groups may differ in size), or by every token for
itself (``token_routed``). The G KV heads are called pools here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import (
    KV,
    Cache,
    DecodeStep,
    KVCache,
    Mechanism,
    NoCache,
    decode_step,
    register,
    token_positions,
)
from kvlearn.attention.core import causal_attention, has_no_values, merge_heads, split_heads, upcast
from kvlearn.attention.full import FullAttention
from kvlearn.attention.rope import Rope, RopeConfig, rotate_naive

MARGIN = 0.1  # initial margin of a route: a training of some hundred steps can change it


def one_hot_choice(logits: Float[Tensor, "... G"]) -> Float[Tensor, "... G"]:
    """1 at the largest logit and 0 elsewhere, with the gradient of softmax(logits): straight-through.

    So training and inference compute the same. (Gumbel noise on the logits, which would let every pool be
    tried, made the course's small models clearly worse: a head whose keys change from step to step does not
    learn to read them.) Source: Bengio et al., "Estimating or Propagating Gradients" (2013), section 4.
    """
    soft = logits.softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())  # the bracket is 0 exactly, so that half precision keeps the 1


class PooledAttention(Mechanism):
    """The common part of the two mechanisms of this file: projections, cache and bytes, as in ``gqa``.

    Cache: 2 · B · G · max_len · D numbers. G is at most H, and need not divide it. ``reader`` and ``decode``
    are those of ``gqa``.
    """

    decode: DecodeStep | None = None

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
        super().__init__(d_model, n_heads, head_dim)
        self.n_kv_heads = validate.positive("n_kv_heads", n_kv_heads)
        validate.at_most(
            "n_kv_heads", self.n_kv_heads, self.n_heads, "n_heads: one head at least for each pool"
        )
        self.reader = validate.instance("reader", reader, bool)
        self.q_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        if not reader:
            self.k_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=False)
            self.v_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)
        self.rope = Rope(self.head_dim, rope)

    def project_kv(self, x: Float[Tensor, "B T M"], cache: Cache | None = None) -> KV:
        if self.reader:
            raise TypeError("source: this layer is a reader; it has no keys and values of its own")
        self.check_inputs(x, cache, KVCache)
        positions = token_positions(x, cache)
        k = self.rope(split_heads(self.k_proj(x), self.n_kv_heads), positions)
        v = split_heads(self.v_proj(x), self.n_kv_heads)
        return cache.append(k, v) if isinstance(cache, KVCache) else KV(k, v, positions)

    def own_or_source(self, x: Float[Tensor, "B T M"], cache: Cache | None, source: KV | None) -> KV:
        """The keys and values to attend to: this layer's, or those of ``source``."""
        if source is None and not self.reader:
            return self.project_kv(x, cache)
        return self.check_source(x, cache, NoCache if self.reader else KVCache, source, self.n_kv_heads)

    def attend(self, q: Float[Tensor, "B H T D"], kv: KV, cache: Cache | None) -> Float[Tensor, "B H T D"]:
        """Causal attention of query heads over KV heads, in neighbouring groups."""
        if self.decode is not None and cache is not None and q.shape[2] == 1:
            return decode_step(self.decode, q, kv)
        return causal_attention(q, kv.k.to(q.dtype), kv.v.to(q.dtype), kv.positions)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Cache:
        dtype, device = self.dtype_and_device(dtype, device)
        if self.reader:
            return NoCache(batch, max_len, device)
        return KVCache(batch, self.n_kv_heads, max_len, self.head_dim, dtype, device)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """2 · B · G · max_len · D · bytes per number; 0 for a reader."""
        numbers = 2 * self.n_kv_heads * validate.positive("max_len", max_len) * self.head_dim
        return 0 if self.reader else self.to_bytes(numbers, batch, dtype)

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """2 · B · G · length · D · bytes per number; for a reader too, which reads its source again."""
        numbers = 2 * self.n_kv_heads * validate.positive("length", length) * self.head_dim
        return self.to_bytes(numbers, batch, dtype)

    def project_naive(self, x: Float[Tensor, "B T M"]) -> list[Float[Tensor, "B T _ D"]]:
        """Queries, keys and values in fp32 for ``naive``; queries and keys rotated pair by pair."""
        B, T, wide = len(x), x.shape[1], upcast(x)
        q, k, v = (
            (wide @ upcast(w.weight).T).reshape(B, T, -1, self.head_dim)
            for w in (self.q_proj, self.k_proj, self.v_proj)
        )
        return [rotate_naive(q, self.rope.config), rotate_naive(k, self.rope.config), v]


@register("routed")
class RoutedAttention(PooledAttention):
    """Grouped attention whose assignment of query heads to pools is learned: head h reads argmax_g logits_hg.

        c_hg = one-hot of argmax_g logits_hg, with the gradient of the softmax
        head_h = softmax(q_h (Σ_g c_hg K_g)ᵀ / √D) Σ_g c_hg V_g

    Cache: 2 · B · G · max_len · D numbers, as for ``gqa``; the route itself is H · G weights. It is the same
    for all tokens, so that a token's keys are written once for all heads.
    Routing between fixed pools is the article's wording; the nearest published method is Chen et al., "DHA"
    (2024). Straight-through choice: ``one_hot_choice``.
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
        super().__init__(d_model, n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, rope=rope, reader=reader)
        neighbours = [h * self.n_kv_heads // self.n_heads for h in range(self.n_heads)]
        self.route_logits = nn.Parameter(MARGIN * torch.eye(self.n_kv_heads)[neighbours])

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

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        kv = self.own_or_source(x, cache, source)  # (B, G, S, D) each
        q = self.rope(split_heads(self.q_proj(x), self.n_heads), kv.positions)  # (B, H, T, D)
        # Where the choice is part of the graph, it costs H heads of K and V.
        if torch.is_grad_enabled() or has_no_values(x):
            choice = one_hot_choice(self.route_logits).to(q.dtype)  # (H, G)
            k, v = (torch.einsum("hg, bgsd -> bhsd", choice, pool.to(q.dtype)) for pool in (kv.k, kv.v))
            heads = self.attend(q, KV(k, v, kv.positions), cache)
        else:
            route, heads = torch.tensor(self.pools, device=q.device), torch.empty_like(q)
            for g in range(self.n_kv_heads):
                of_pool = (route == g).nonzero()[:, 0]
                if len(of_pool):
                    pool = KV(kv.k[:, g : g + 1], kv.v[:, g : g + 1], kv.positions)
                    heads[:, of_pool] = self.attend(q[:, of_pool], pool, cache)
        return self.o_proj(merge_heads(heads))

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        q, k, v = self.project_naive(x)
        logits = upcast(self.route_logits)
        soft = logits.softmax(-1)
        choice = F.one_hot(logits.argmax(-1), self.n_kv_heads) - soft.detach() + soft
        heads = torch.zeros_like(q)
        for t in range(x.shape[1]):
            for h in range(self.n_heads):
                k_h, v_h = ((choice[h, :, None] * pools[:, : t + 1]).sum(2) for pools in (k, v))
                scores = torch.einsum("bd, bsd -> bs", q[:, t, h], k_h) / self.head_dim**0.5
                heads[:, t, h] = torch.einsum("bs, bsd -> bd", scores.softmax(-1), v_h)
        return (heads.flatten(2) @ upcast(self.o_proj.weight).T).to(x.dtype)

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


@register("token_routed")
class TokenRoutedAttention(PooledAttention):
    """Grouped attention in which the token chooses the pools: at token t, head h reads argmax_g (x_t W_r)_hg.

        c_thg = one-hot of argmax_g (x_t W_r)_hg, with the gradient of the softmax
        head_th = Σ_g c_thg softmax(q_th K_gᵀ / √D) V_g

    Cache: 2 · B · G · max_len · D numbers. The query's token makes the choice, after the keys were written.
    So each token writes keys to every pool, since any of them may be read later. This routing saves nothing
    over ``gqa`` with as many pools; it can only improve quality, and computes G times the scores.
    Close to: Gumaan, "Mixture of Attention Schemes" (2025), which routes between whole schemes.
    """

    chooses_by_content = True

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
        super().__init__(d_model, n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, rope=rope, reader=reader)
        self.router = nn.Linear(d_model, self.n_heads * self.n_kv_heads, bias=False)

    def choice(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B H G T 1"]:
        """1 where a head of a token reads a pool."""
        logits = self.router(x).unflatten(-1, (self.n_heads, self.n_kv_heads))
        return one_hot_choice(logits).movedim(1, 3)[..., None]

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        kv = self.own_or_source(x, cache, source)  # (B, G, S, D) each
        q = self.rope(split_heads(self.q_proj(x), self.n_heads), kv.positions)  # (B, H, T, D)
        in_each_pool = self.attend(q.repeat(1, self.n_kv_heads, 1, 1), kv, cache)  # (B, G·H, T, D)
        by_head = in_each_pool.unflatten(1, (self.n_kv_heads, self.n_heads)).transpose(1, 2)
        heads = (by_head * self.choice(x)).sum(2)  # (B, H, G, T, D) -> (B, H, T, D)
        return self.o_proj(merge_heads(heads))

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        q, k, v = self.project_naive(x)
        logits = (upcast(x) @ upcast(self.router.weight).T).reshape(*q.shape[:3], self.n_kv_heads)
        soft = logits.softmax(-1)
        choice = F.one_hot(logits.argmax(-1), self.n_kv_heads) - soft.detach() + soft  # (B, T, H, G)
        heads = torch.zeros_like(q)
        for t in range(x.shape[1]):
            for h in range(self.n_heads):
                for g in range(self.n_kv_heads):
                    scores = torch.einsum("bd, bsd -> bs", q[:, t, h], k[:, : t + 1, g]) / self.head_dim**0.5
                    read = torch.einsum("bs, bsd -> bd", scores.softmax(-1), v[:, : t + 1, g])
                    heads[:, t, h] += choice[:, t, h, g, None] * read
        return (heads.flatten(2) @ upcast(self.o_proj.weight).T).to(x.dtype)

    @classmethod
    def tiny(cls, **options: Any) -> "TokenRoutedAttention":
        return cls(d_model=24, n_heads=5, n_kv_heads=3, head_dim=8, **options)

    @classmethod
    def tiny_at_limit(cls) -> tuple[Mechanism, Mechanism]:
        """Equal pools: for any choice it is full attention whose heads have one key."""
        limit, full = cls(d_model=24, n_heads=3, n_kv_heads=3), FullAttention.tiny()
        for proj in (limit.k_proj, limit.v_proj):
            proj.weight.data = proj.weight.data[:8].repeat(3, 1)
        full.load_state_dict({n: w for n, w in limit.state_dict().items() if n != "router.weight"})
        return limit, full
