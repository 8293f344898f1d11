"""Sliding window attention: a token sees the last W tokens, itself among them, and no more are remembered.

Layer by layer the sight adds up: after L windows a token can have heard of L · (W - 1) tokens before it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import Mechanism, register
from kvlearn.attention.cache import KV, Cache
from kvlearn.attention.columns import attend_columns
from kvlearn.attention.core import grouped_attention, grouped_partial, upcast, with_sinks
from kvlearn.attention.full import FullAttention
from kvlearn.attention.kv_attention import KVAttention
from kvlearn.attention.rope import RopeConfig
from kvlearn.attention.sliding.ring import RingCache, ring_slots

BLOCK = 256  # queries at a time: they see W + BLOCK - 1 columns, so fewer compute less and cost more calls


@dataclass(frozen=True)
class Window:
    """The last ``size`` tokens up to the query's own, and the first ``n_sinks``, which come on top."""

    size: int
    n_sinks: int = 0

    def sees(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return (queries - keys < self.size) | (keys < self.n_sinks)

    def columns(self, first: int, last: int) -> Int[Tensor, "n"]:
        start = max(first - self.size + 1, 0)
        sinks = torch.arange(min(self.n_sinks, start))
        return torch.cat((sinks, torch.arange(start, last + 1)))


@register("window")
class WindowAttention(KVAttention):
    """Causal attention to the last W tokens and to the first ``n_sinks`` ones; a ring buffer as its cache.

        head_t = softmax(q_t K_Sᵀ / √D) V_S,   S = {s ≤ t : t - s < W or s < n_sinks}

    Time O(T · W), memory O(T). In training memory is O(T · W) too: every block keeps its mask, and with
    ``sink_logits`` its weights, for the gradient. A window longer than the text is full attention.

    Cache: 2 · B · G · min(max_len, n_sinks + W) · D numbers. It stops growing; every step reads all of it.

    ``n_sinks`` kept tokens keep their own positions. (StreamingLLM counts places in the cache instead, so no
    distance is longer than the trained ones.) ``sink_logits`` gives each head a learned logit that takes
    weight and has no value (core.py: ``with_sinks``). Raises ValueError for a window below 1, sinks below 0,
    more kept tokens than the window is long, and a cache for another window or other sinks.
    Sources: Jiang et al., "Mistral 7B" (2023), section 2; Xiao et al., "Efficient Streaming Language Models
    with Attention Sinks" (2023), section 3.2; OpenAI, "gpt-oss" (2025), section 2.2.
    """

    cache_kind = RingCache

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        window: int = 512,
        n_sinks: int = 0,
        sink_logits: bool = False,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: RopeConfig | None = RopeConfig(),
        reader: bool = False,
    ) -> None:
        n_kv_heads = validate.positive("n_heads", n_heads) if n_kv_heads is None else n_kv_heads
        validate.divides("n_kv_heads", n_kv_heads, "n_heads", n_heads)
        super().__init__(d_model, n_heads, n_kv_heads, head_dim, rope, reader)
        self.window = validate.positive("window", window)
        self.n_sinks = validate.at_least("n_sinks", n_sinks, 0)
        validate.at_most(
            "n_sinks", n_sinks, window, f"window={window}: tokens that stay, beside a window that turns"
        )
        self.sight = Window(self.window, self.n_sinks)
        self.sink_logits = nn.Parameter(torch.zeros(self.n_heads)) if sink_logits else None

    def check(self, x: Tensor, cache: Cache | None, kind: type[Cache]) -> None:
        super().check(x, cache, kind)
        if isinstance(cache, RingCache) and (cache.window, cache.n_sinks) != (self.window, self.n_sinks):
            raise ValueError(
                f"cache: expected shapes for window={self.window} and n_sinks={self.n_sinks}, "
                f"got those for window={cache.window} and n_sinks={cache.n_sinks}"
            )

    def pass_over(self, q: Float[Tensor, "B H T D"], kv: KV) -> Float[Tensor, "B H T D"]:
        together, held = len(kv.positions) == 1, kv.k.shape[2]
        if q.shape[2] == 1 and together and held <= self.window + self.n_sinks:
            return self.attend_masked(q, kv.k, kv.v, None)  # a ring holds just what its newest token sees
        return attend_columns(q, kv, self.sight, BLOCK, self.attend_masked)

    def attend_masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """A block of queries over the columns that it sees."""
        k, v = k.to(q.dtype), v.to(q.dtype)
        if self.sink_logits is None:
            return grouped_attention(q, k, v, mask)
        return with_sinks(grouped_partial(q, k, v, mask), self.sink_logits).to(q.dtype)

    def step(self, q: Float[Tensor, "B H 1 D"], kv: KV) -> Float[Tensor, "B H 1 D"]:
        """One token, by ``decode``: keys are rotated already, so the order of the ring does not matter."""
        if kv.k.shape[2] > self.window + self.n_sinks:  # no ring's: another layer's source, which holds more
            return self.pass_over(q, kv)
        if self.sink_logits is None:
            return super().step(q, kv)
        lengths = self.step_lengths(q, kv)
        return self.decode(q[:, :, 0], kv.k, kv.v, lengths, sink_logits=self.sink_logits).unsqueeze(2)  # type: ignore[misc,call-arg]

    def seen(self, t: int) -> list[int]:
        return [s for s in range(t + 1) if t - s < self.window or s < self.n_sinks]

    def weigh(self, scores: Float[Tensor, "B S"], h: int) -> Float[Tensor, "B S"]:
        if self.sink_logits is None:
            return super().weigh(scores, h)
        sink = upcast(self.sink_logits[h]).expand(len(scores), 1)
        return torch.cat((scores, sink), dim=-1).softmax(-1)[:, :-1]

    def own_cache(self, batch: int, max_len: int, dtype: torch.dtype, at: torch.device) -> RingCache:
        sizes = (max_len, self.head_dim, self.window, self.n_sinks)
        return RingCache(batch, self.n_kv_heads, *sizes, dtype, at)

    def tokens_kept(self, max_len: int) -> int:
        return ring_slots(max_len, self.window, self.n_sinks)

    def tokens_read(self, length: int) -> int:
        return ring_slots(length, self.window, self.n_sinks)

    @classmethod
    def tiny(cls, **options: Any) -> "WindowAttention":
        options = {"window": 5, "n_sinks": 2, "sink_logits": True, **options}
        return cls(d_model=24, n_heads=6, n_kv_heads=2, head_dim=8, **options)

    @classmethod
    def tiny_at_limit(cls) -> tuple[Mechanism, Mechanism]:
        """A window longer than the text."""
        full, limit = FullAttention.tiny(), cls(d_model=24, n_heads=3, window=100)
        limit.load_state_dict(full.state_dict())
        return limit, full
