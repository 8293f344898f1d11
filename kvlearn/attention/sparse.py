"""Attention by a fixed sparse pattern: only visible keys are computed, only those still needed cached.

    head_t = softmax(q_t K_Sᵀ / √D) V_S,   S = {s ≤ t : s is visible to t}

The patterns (Sparse Transformer, Longformer, BigBird, any union of primitives) are in patterns.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import KV, Cache, DecodeStep, Mechanism, NoCache, register, token_positions
from kvlearn.attention.core import (
    MaskRule,
    Partial,
    attend_blockwise,
    grouped_partial,
    has_no_values,
    merge_all,
    merge_heads,
    split_heads,
    upcast,
)
from kvlearn.attention.full import FullAttention
from kvlearn.attention.patterns import (
    Fixed,
    Global,
    Local,
    Pattern,
    PatternCache,
    Random,
    Strided,
    Union,
    n_slots,
    parse,
    primitives,
)
from kvlearn.attention.rope import Rope, RopeConfig, rotate_naive


def attend_pattern(
    q: Float[Tensor, "B H T D"], kv: KV, pattern: Pattern, block: int
) -> Float[Tensor, "B H T D"]:
    """Attention of each query over the keys that are visible to it, ``block`` queries at a time.

    Neighbouring queries need nearly the same keys, except in a strided primitive: there, queries one stride
    apart do. So strided primitives are computed separately, in that order, and merged with the rest by the
    log-sum-exp (core.py: ``merge``).
    """
    strided = [part for part in primitives(pattern) if isinstance(part, Strided)]
    rows_differ = max(len(kv.positions), len(kv.key_positions)) > 1
    if not strided or rows_differ or q.shape[2] == 1 or has_no_values(q):
        return attend_blockwise(q, kv, pattern, block)
    done = [part for part in primitives(pattern) if not isinstance(part, Strided)]
    results = [_attend_partial(q, kv, Union(tuple(done)), block)] if done else []
    for part in strided:
        results.append(_attend_strided(q, kv, StridedRest(part, tuple(done)), block))
        done.append(part)
    return merge_all(results).out.to(q.dtype)


@dataclass(frozen=True)
class StridedRest:
    """The mask rule of ``strided`` without the pairs of ``others``, for queries that are a stride apart."""

    strided: Strided
    others: tuple[Pattern, ...]

    def visible(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        visible = self.strided.visible(queries, keys)
        return visible & ~Union(self.others).visible(queries, keys) if self.others else visible

    def visible_keys(self, first: int, last: int) -> Int[Tensor, "n"]:
        return torch.arange(first % self.strided.stride, last + 1, self.strided.stride)


def _attend_strided(q: Tensor, kv: KV, rule: StridedRest, block: int) -> Partial:
    """The positions of one remainder modulo the stride after the other, put back into the order of time."""
    stride, order, results = rule.strided.stride, [], []
    for remainder in range(stride):
        queries, keys = (
            (x[0] % stride == remainder).nonzero()[:, 0] for x in (kv.positions, kv.key_positions)
        )
        if len(queries):
            positions = kv.positions[:, queries], kv.key_positions[:, keys]
            part = KV(kv.k[:, :, keys], kv.v[:, :, keys], *positions)
            results.append(_attend_partial(q[:, :, queries], part, rule, block))
            order.append(queries)
    back = torch.cat(order).argsort()
    return Partial(*(torch.cat(each, dim=2)[:, :, back] for each in zip(*results, strict=True)))


def _attend_partial(q: Tensor, kv: KV, rule: MaskRule, block: int) -> Partial:
    """``attend_blockwise`` with the log-sum-exp, passed along as one more column of the output."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out, lse = grouped_partial(q, k, v, mask)
        return torch.cat((out, lse[..., None]), dim=-1)

    both = attend_blockwise(q, kv, rule, block, attend)
    return Partial(both[..., :-1], both[..., -1])


@register("sparse")
class SparseAttention(Mechanism):
    """Causal attention to the keys that a fixed ``pattern`` selects, given as a spec or as a ``Pattern``.

        head_t = softmax(q_t K_Sᵀ / √D) V_S,   S = {s ≤ t : s is visible to t}

    Queries are computed ``block`` at a time over the keys that they need. Cache: 2 · B · G · n · D numbers,
    n = the most tokens that are still needed at one time (patterns.py: ``n_slots``); a step reads only those
    that it attends to. For most patterns the two differ widely.

    ``reader`` and ``decode`` as in ``gqa``. Raises ValueError for a pattern in which a token may attend to
    nothing, and for the cache of another pattern.
    Sources: patterns.py, with each published pattern.
    """

    decode: DecodeStep | None = None

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
        super().__init__(d_model, n_heads, head_dim)
        n_kv_heads = self.n_heads if n_kv_heads is None else n_kv_heads
        self.n_kv_heads = validate.divides("n_kv_heads", n_kv_heads, "n_heads", self.n_heads)
        self.reader = validate.instance("reader", reader, bool)
        self.pattern, self.block = parse(pattern), validate.positive("block", block)
        if not self.pattern.includes_self:
            raise ValueError(
                "pattern: expected one in which every token attends to itself, as by local(1); got "
                f"{self.pattern}"
            )
        self.q_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        if not reader:
            self.k_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=False)
            self.v_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)
        self.rope = Rope(self.head_dim, rope)

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        if source is None and not self.reader:
            kv = self.project_kv(x, cache)  # (B, G, S, D) each
        else:
            kind = NoCache if self.reader else PatternCache
            kv = self.check_source(x, cache, kind, source, self.n_kv_heads)
        q = self.rope(split_heads(self.q_proj(x), self.n_heads), kv.positions)  # (B, H, T, D)
        by_function = self.decode is not None and not has_no_values(x)  # it takes no mask
        if by_function and cache is not None and x.shape[1] == 1:
            heads = attend_blockwise(q, kv, self.pattern, 1, self._decode_visible)
        else:
            heads = self.attend(q, kv)
        return self.o_proj(merge_heads(heads))

    def attend(self, q: Float[Tensor, "B H T D"], kv: KV) -> Float[Tensor, "B H T D"]:
        """Every query over the keys that are visible to it, a block of queries at a time."""
        kv = KV(kv.k.to(q.dtype), kv.v.to(q.dtype), kv.positions, kv.slot_positions)
        return attend_pattern(q, kv, self.pattern, self.block)

    def project_kv(self, x: Float[Tensor, "B T M"], cache: Cache | None = None) -> KV:
        if self.reader:
            raise TypeError("source: this layer is a reader; it has no keys and values of its own")
        self.check_inputs(x, cache, PatternCache)
        positions = token_positions(x, cache)
        k = self.rope(split_heads(self.k_proj(x), self.n_kv_heads), positions)
        v = split_heads(self.v_proj(x), self.n_kv_heads)
        if not isinstance(cache, PatternCache):
            return KV(k, v, positions)
        if cache.pattern != self.pattern:
            raise ValueError(f"cache: expected shapes for {self.pattern}, got those for {cache.pattern}")
        return cache.append(k, v)

    def _decode_visible(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """One token by ``decode``, over the keys that it attends to, gathered."""
        assert self.decode is not None
        lengths = torch.full((len(q),), k.shape[2], dtype=torch.int32, device=q.device)
        return self.decode(q[:, :, 0], k, v, lengths).unsqueeze(2)

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        B, T, D, wide = len(x), x.shape[1], self.head_dim, upcast(x)
        q, k, v = (
            (wide @ upcast(w.weight).T).reshape(B, T, -1, D) for w in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate_naive(q, self.rope.config), rotate_naive(k, self.rope.config)
        heads = torch.zeros_like(q)
        for t in range(T):
            visible = [s for s in range(t + 1) if visible_naive(self.pattern, t, s)]
            for h in range(self.n_heads):
                g = h // (self.n_heads // self.n_kv_heads)
                scores = torch.einsum("bd, bsd -> bs", q[:, t, h], k[:, visible, g]) / D**0.5
                heads[:, t, h] = torch.einsum("bs, bsd -> bd", scores.softmax(-1), v[:, visible, g])
        return (heads.flatten(2) @ upcast(self.o_proj.weight).T).to(x.dtype)

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
        validate.positive("max_len", max_len)
        return PatternCache(batch, self.n_kv_heads, max_len, self.head_dim, self.pattern, dtype, device)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """2 · B · G · n · D · bytes per number, n = the most tokens needed at one time; 0 for a reader."""
        tokens = n_slots(self.pattern, validate.positive("max_len", max_len))
        return 0 if self.reader else self.to_bytes(2 * self.n_kv_heads * tokens * self.head_dim, batch, dtype)

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """2 · B · G · |S| · D · bytes per number, S = the tokens that the last of ``length`` attends to."""
        last = validate.positive("length", length) - 1
        tokens = len(self.pattern.visible_keys(last, last))
        return self.to_bytes(2 * self.n_kv_heads * tokens * self.head_dim, batch, dtype)

    @classmethod
    def tiny(cls, **options: Any) -> "SparseAttention":
        options = {"pattern": "local(3) | global(1) | random(1, block=2) | strided(5)", "block": 4, **options}
        return cls(d_model=24, n_heads=6, n_kv_heads=2, head_dim=8, **options)

    @classmethod
    def tiny_at_limit(cls) -> tuple[Mechanism, Mechanism]:
        """A stride of 1: every token attends to every one before."""
        full, limit = FullAttention.tiny(), cls(d_model=24, n_heads=3, pattern="strided(1)", block=4)
        limit.load_state_dict(full.state_dict())
        return limit, full


def visible_naive(pattern: Pattern, query: int, key: int) -> bool:
    """Whether one query attends to one earlier key: the definitions of the primitives, for ``naive``."""
    match pattern:
        case Union(parts):
            return any(visible_naive(part, query, key) for part in parts)
        case Local(size, block):
            return query // block * block - key <= size - block
        case Strided(stride):
            return (query - key) % stride == 0
        case Fixed(block, summary):
            return query // block == key // block or key % block >= block - summary
        case Global(first, at):
            return min(query, key) < first or query in at or key in at
        case Random(block=block):
            return key // block in pattern.draw(query // block)
    raise TypeError(f"pattern: expected one of patterns.py's primitives, got {type(pattern).__name__}")
