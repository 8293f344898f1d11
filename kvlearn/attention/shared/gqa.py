"""Grouped-query attention: pools of neighbouring query heads on one KV head each. One pool for all is MQA."""

from typing import Any

from kvlearn import validate
from kvlearn.attention.base import Mechanism, register
from kvlearn.attention.full import FullAttention
from kvlearn.attention.kv_attention import KVAttention
from kvlearn.attention.rope import RopeConfig


@register("gqa")
class GroupedQueryAttention(KVAttention):
    """H query heads on G KV heads: head h reads pool h // (H/G).

        head_h = softmax(q_h K_gᵀ / √D) V_g,  g = h // (H/G),   y = [head_1 … head_H] W_o

    Cache: 2 · B · G · max_len · D numbers, G/H of full attention's, stored and read: the queries of a pool
    meet its keys together, so that each is read once. ``n_kv_heads`` must divide ``n_heads``; 1 is
    multi-query attention, n_heads is full attention.
    Sources: Shazeer, "Fast Transformer Decoding" (2019), section 3 (MQA); Ainslie et al., "GQA" (2023),
    section 2.2.
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
        validate.divides("n_kv_heads", n_kv_heads, "n_heads", validate.positive("n_heads", n_heads))
        super().__init__(d_model, n_heads, n_kv_heads, head_dim, rope, reader)

    @classmethod
    def tiny(cls, **options: Any) -> "GroupedQueryAttention":
        return cls(d_model=24, n_heads=6, n_kv_heads=2, head_dim=8, **options)

    @classmethod
    def tiny_at_limit(cls) -> tuple[Mechanism, Mechanism]:
        """As many KV heads as query heads."""
        full, limit = FullAttention.tiny(), cls(d_model=24, n_heads=3, n_kv_heads=3)
        limit.load_state_dict(full.state_dict())
        return limit, full
