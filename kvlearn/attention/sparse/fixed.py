"""Attention by a fixed pattern: only what it sees is computed, and only what it still needs is kept."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvlearn import validate
from kvlearn.attention.base import Mechanism, register
from kvlearn.attention.cache import KV, Cache
from kvlearn.attention.columns import attend_columns
from kvlearn.attention.full import FullAttention
from kvlearn.attention.kv_attention import KVAttention
from kvlearn.attention.rope import RopeConfig
from kvlearn.attention.sparse.by_pattern import attend_pattern
from kvlearn.attention.sparse.pattern import Pattern
from kvlearn.attention.sparse.plan import PatternCache, n_slots
from kvlearn.attention.sparse.sentences import parse


@register("sparse")
class SparseAttention(KVAttention):
    """Causal attention to the keys that a fixed ``pattern`` allows, given as a sentence or as a ``Pattern``.

        head_t = softmax(q_t K_Sᵀ / √D) V_S,   S = {s ≤ t : the pattern lets t see s}

    Queries are done ``block`` at a time over the columns that they need. Cache: 2 · B · G · n · D numbers,
    n = the most tokens that any moment still needs (plan.py); a step reads those alone that it sees. The two
    are far apart for most patterns. Raises ValueError for a pattern in which a token may see nothing, and for
    the cache of another pattern.
    Sources: sentences.py.
    """

    cache_kind = PatternCache

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        pattern: str | Pattern = "local(256) | global(16)",
        block: int = 128,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: RopeConfig | None = RopeConfig(),
        reader: bool = False,
    ) -> None:
        n_kv_heads = validate.positive("n_heads", n_heads) if n_kv_heads is None else n_kv_heads
        validate.divides("n_kv_heads", n_kv_heads, "n_heads", n_heads)
        super().__init__(d_model, n_heads, n_kv_heads, head_dim, rope, reader)
        self.pattern, self.block = parse(pattern), validate.positive("block", block)
        if not self.pattern.sees_itself:
            raise ValueError(
                f"pattern: expected one in which every token sees itself, as by local(1); got {self.pattern}"
            )

    def check(self, x: Tensor, cache: Cache | None, kind: type[Cache]) -> None:
        super().check(x, cache, kind)
        if isinstance(cache, PatternCache) and cache.pattern != self.pattern:
            raise ValueError(f"cache: expected shapes for {self.pattern}, got those for {cache.pattern}")

    def pass_over(self, q: Float[Tensor, "B H T D"], kv: KV) -> Float[Tensor, "B H T D"]:
        kv = KV(kv.k.to(q.dtype), kv.v.to(q.dtype), kv.positions, kv.key_positions)
        return attend_pattern(q, kv, self.pattern, self.block)

    def step(self, q: Float[Tensor, "B H 1 D"], kv: KV) -> Float[Tensor, "B H 1 D"]:
        """One token, by ``decode`` over the keys that it sees, gathered."""

        def decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            lengths = torch.full((len(q),), k.shape[2], dtype=torch.int32, device=q.device)
            return self.decode(q[:, :, 0], k, v, lengths).unsqueeze(2)  # type: ignore[misc]

        return attend_columns(q, kv, self.pattern, 1, decode)

    def seen(self, t: int) -> list[int]:
        return [s for s in range(t + 1) if self.pattern.sees(torch.tensor(t), torch.tensor(s))]

    def own_cache(self, batch: int, max_len: int, dtype: torch.dtype, at: torch.device) -> PatternCache:
        sizes = (batch, self.n_kv_heads, max_len, self.head_dim)
        return PatternCache(*sizes, self.pattern, dtype, at)

    def tokens_kept(self, max_len: int) -> int:
        return n_slots(self.pattern, max_len)

    def tokens_read(self, length: int) -> int:
        return len(self.pattern.columns(length - 1, length - 1))

    @classmethod
    def tiny(cls, **options: Any) -> "SparseAttention":
        options = {"pattern": "local(3) | global(1) | random(1, block=2) | strided(5)", "block": 4, **options}
        return cls(d_model=24, n_heads=6, n_kv_heads=2, head_dim=8, **options)

    @classmethod
    def tiny_at_limit(cls) -> tuple[Mechanism, Mechanism]:
        """Every token sees every one before."""
        full, limit = FullAttention.tiny(), cls(d_model=24, n_heads=3, pattern="strided(1)", block=4)
        limit.load_state_dict(full.state_dict())
        return limit, full
