"""Full attention: every head keeps the keys and values of every token, and every step reads them all.

The mechanism that all others of the course are held against: exact, and the most expensive to remember. The
work is done in kv_attention.py; here every query head has a KV head of its own.
"""

from typing import Any

from kvlearn.attention.base import register
from kvlearn.attention.kv_attention import KVAttention
from kvlearn.attention.rope import RopeConfig


@register("full")
class FullAttention(KVAttention):
    """Causal multi-head attention with RoPE, and the cache that makes a step cost one row.

        head_h = softmax(q_h K_hᵀ / √D) V_h,   y = [head_1 … head_H] W_o

    Cache: 2 · B · H · max_len · D numbers, all of them read by every step at full length.
    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2; RoPE as in rope.py.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        rope: RopeConfig | None = RopeConfig(),
        reader: bool = False,
    ) -> None:
        super().__init__(d_model, n_heads, n_heads, head_dim, rope, reader)

    @classmethod
    def tiny(cls, **options: Any) -> "FullAttention":
        return cls(d_model=24, n_heads=3, head_dim=8, **options)
