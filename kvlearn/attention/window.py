"""Sliding window attention: a token attends to the last W tokens, itself included, and only those are kept.

Over L layers the receptive field grows: after L windows an output can depend on the L · (W - 1) tokens before
its own. The cache is a ring buffer: W slots, in which each new token replaces the one that leaves the window.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import (
    KV,
    Cache,
    DecodeStep,
    Mechanism,
    NoCache,
    decode_step,
    register,
    token_positions,
)
from kvlearn.attention.core import (
    attend_blockwise,
    grouped_attention,
    grouped_partial,
    merge_heads,
    split_heads,
    upcast,
    with_sinks,
)
from kvlearn.attention.full import FullAttention
from kvlearn.attention.rope import Rope, RopeConfig, rotate_naive

BLOCK = 256  # queries at a time, over W + BLOCK - 1 keys: smaller blocks compute less and need more calls


class SlotCache(Cache):
    """Keys and values in ``n_slots`` slots, which are reused when their token is no longer needed.

    The slot of a token depends on its position alone, so every row of a batch and every division of a
    sequence into chunks leads to the same content. With ``shared`` the values are the keys, stored once; else
    they are as wide as the keys, ``head_dim``, unless ``v_head_dim`` is given.

    ``slot_positions`` is the position that each slot holds, -1 for none (8 bytes per slot, not counted).
    ``first_reuse`` is the first position whose token takes a slot that was taken before.
    """

    def __init__(
        self,
        batch: int,
        n_heads: int,
        n_slots: int,
        head_dim: int,
        max_len: int,
        first_reuse: int,
        dtype: torch.dtype,
        device: torch.device,
        shared: bool = False,
        v_head_dim: int | None = None,
    ) -> None:
        super().__init__(batch, max_len, device)
        validate.floating("dtype", dtype)
        self.n_slots, self.first_reuse = validate.positive("n_slots", n_slots), first_reuse
        self.k = torch.zeros(batch, n_heads, n_slots, head_dim, dtype=dtype, device=device)
        v_shape = (*self.k.shape[:3], v_head_dim or head_dim)
        self.v = self.k if shared else torch.zeros(v_shape, dtype=dtype, device=device)
        self.slot_positions = torch.full((1, n_slots), -1, device=device)  # one row per differing row

    @abstractmethod
    def slots(self, positions: Int[Tensor, "#B T"]) -> Int[Tensor, "#B T"]:
        """The slot that the token at each position takes. A slot is first taken after all before it."""

    @abstractmethod
    def used(self, length: int) -> int:
        """How many slots ``length`` tokens have taken; they are the first ones."""

    @property
    def can_trim(self) -> bool:  # type: ignore[override]
        """Whether no slot has been overwritten: an overwritten token cannot be restored."""
        return self.length <= self.first_reuse

    def tensors(self) -> list[Tensor]:
        return [self.k] if self.v is self.k else [self.k, self.v]

    def append(self, k: Float[Tensor, "B H T D"], v: Float[Tensor, "B H T Dv"]) -> KV:
        """Write new keys and values; return those that the new tokens may attend to.

        One token: views of the slots in use, in the order of storage, its own included. Several: a copy of
        the earlier ones, in the order of positions, and then the new ones. The first new tokens may still
        need slots that the last ones overwrite, so nothing is dropped before they have attended.
        """
        T = k.shape[2]
        for name, new, buffer in (("k", k, self.k), ("v", v, self.v)):
            validate.tensor(name, new, (*buffer.shape[:2], T, buffer.shape[3]), device=self.device)
        self.check_room(T)
        positions = self.positions(T)
        past_and_new = None if T == 1 else self._in_order(k, v, positions)
        self._write(k, v, positions)
        self.advance(T)
        if past_and_new is not None:
            return past_and_new
        used = self.used(self.length)
        return KV(self.k[:, :, :used], self.v[:, :, :used], positions, self.slot_positions[:, :used])

    def _in_order(self, k: Tensor, v: Tensor, positions: Tensor) -> KV:
        """The tokens kept so far, oldest first, then the new ones."""
        if not self.length:
            return KV(k, v, positions, positions)
        kept, order = self.slot_positions[:, : self.used(self.length)].sort(dim=-1)
        at = order[:, None, :, None].expand(len(k), k.shape[1], -1, 1)
        k, v = (
            torch.cat((old.gather(2, at.expand(-1, -1, -1, old.shape[3])).to(n.dtype), n), dim=2)
            for old, n in ((self.k, k), (self.v, v))
        )
        rows = max(len(kept), len(positions))
        return KV(k, v, positions, torch.cat((kept.expand(rows, -1), positions.expand(rows, -1)), dim=-1))

    def _write(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write each new token to its slot; of several for one slot, the last."""
        slots = self.slots(positions)
        if k.shape[2] == len(slots) == len(self.slot_positions) == 1:  # one slot, the same in every row
            self.slot_positions.index_copy_(1, slots[0], positions)
            for buffer, new in zip(self.tensors(), (k, v), strict=False):
                buffer.index_copy_(2, slots[0], new.detach().to(buffer.dtype))
            return
        if len(slots) > len(self.slot_positions):
            self.slot_positions = self.slot_positions.repeat(len(slots), 1)
        if k.shape[2] == 1:
            row, token = torch.arange(len(slots), device=self.device), torch.zeros_like(slots[:, 0])
        else:
            token = torch.arange(k.shape[2], device=self.device).expand_as(slots)
            last = torch.zeros_like(self.slot_positions).scatter_reduce(1, slots, token, "amax")
            row, token = (token == last.gather(1, slots)).nonzero(as_tuple=True)
        slot = slots[row, token]
        self.slot_positions[row, slot] = positions[row, token]
        rows = row if len(slots) > 1 else slice(None)
        for buffer, new in zip(self.tensors(), (k, v), strict=False):
            buffer[rows, :, slot] = new.detach().to(buffer.dtype)[rows, :, token]

    def trim(self, lengths: Int[Tensor, "B"]) -> None:
        super().trim(lengths)
        ends = self.positions(1)  # of every row, or of all
        kept = self.slot_positions[:1] if self.lengths is None else self.slot_positions
        self.slot_positions = torch.where(kept < ends, kept, -1)

    def reset(self) -> None:
        super().reset()
        self.slot_positions = torch.full((1, self.n_slots), -1, device=self.device)


class RingCache(SlotCache):
    """Keys and values of the first ``n_sinks`` tokens, which stay, and of the last ``window``, in a ring.

        slot(p) = p                                      p < n_sinks
                  n_sinks + (p - n_sinks) mod window     else

    It holds min(max_len, n_sinks + window) tokens, however long the sequence is. Sources: Jiang et al.,
    "Mistral 7B" (2023), section 2 (the rolling buffer); Xiao et al., "Efficient Streaming Language Models
    with Attention Sinks" (2023), section 3.2 (the tokens that stay).
    """

    def __init__(
        self,
        batch: int,
        n_heads: int,
        max_len: int,
        head_dim: int,
        window: int,
        n_sinks: int,
        dtype: torch.dtype,
        device: torch.device,
        shared: bool = False,
        v_head_dim: int | None = None,
    ) -> None:
        self.window, self.n_sinks = window, n_sinks
        sizes = (min(max_len, n_sinks + window), head_dim, max_len, n_sinks + window)
        super().__init__(batch, n_heads, *sizes, dtype, device, shared, v_head_dim)

    def slots(self, positions: Int[Tensor, "#B T"]) -> Int[Tensor, "#B T"]:
        if not self.n_sinks:
            return positions % self.window
        in_ring = self.n_sinks + (positions - self.n_sinks) % self.window
        return torch.where(positions < self.n_sinks, positions, in_ring)

    def used(self, length: int) -> int:
        return min(length, self.n_slots)


@dataclass(frozen=True)
class Window:
    """The mask rule: the last ``size`` tokens up to the query's own, and also the first ``n_sinks``."""

    size: int
    n_sinks: int = 0

    def visible(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return (queries - keys < self.size) | (keys < self.n_sinks)

    def visible_keys(self, first: int, last: int) -> Int[Tensor, "n"]:
        start = max(first - self.size + 1, 0)
        sinks = torch.arange(min(self.n_sinks, start))
        return torch.cat((sinks, torch.arange(start, last + 1)))


@register("window")
class WindowAttention(Mechanism):
    """Causal attention to the last W tokens and to the first ``n_sinks`` ones; a ring buffer as its cache.

        head_t = softmax(q_t K_Sᵀ / √D) V_S,   S = {s ≤ t : t - s < W or s < n_sinks}

    Time O(T · W), memory O(T). In training memory is O(T · W) too: every block keeps its mask, and with
    ``sink_logits`` its weights, for the gradient. A window longer than the text is full attention.

    Cache: 2 · B · G · min(max_len, n_sinks + W) · D numbers. It stops growing; every step reads all of it.

    ``n_sinks`` kept tokens keep their own positions. (StreamingLLM uses positions in the cache instead, so
    that no distance is longer than in training.) ``sink_logits`` gives each head a learned logit that takes
    weight and has no value (core.py: ``with_sinks``). ``reader`` and ``decode`` as in ``gqa``. Raises
    ValueError for a window below 1, sinks below 0, more sinks than the window is long, and a cache for
    another window or other sinks.
    Sources: Jiang et al., "Mistral 7B" (2023), section 2; Xiao et al., "Efficient Streaming Language Models
    with Attention Sinks" (2023), section 3.2; OpenAI, "gpt-oss" (2025), section 2.2.
    """

    decode: DecodeStep | None = None

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
        super().__init__(d_model, n_heads, head_dim)
        n_kv_heads = self.n_heads if n_kv_heads is None else n_kv_heads
        self.n_kv_heads = validate.divides("n_kv_heads", n_kv_heads, "n_heads", self.n_heads)
        self.reader = validate.instance("reader", reader, bool)
        self.window = validate.positive("window", window)
        self.n_sinks = validate.at_least("n_sinks", n_sinks, 0)
        validate.at_most(
            "n_sinks", self.n_sinks, self.window, f"window={window}: the tokens kept beside the window"
        )
        self.q_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=False)
        if not reader:
            self.k_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=False)
            self.v_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)
        self.rope = Rope(self.head_dim, rope)
        validate.instance("sink_logits", sink_logits, bool)
        self.sink_logits = nn.Parameter(torch.zeros(self.n_heads)) if sink_logits else None

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        if source is None and not self.reader:
            kv = self.project_kv(x, cache)
        else:
            kind = NoCache if self.reader else RingCache
            kv = self.check_source(x, cache, kind, source, self.n_kv_heads)
        q = self.rope(split_heads(self.q_proj(x), self.n_heads), kv.positions)  # (B, H, T, D)
        if self.decode is not None and cache is not None and self.in_ring(q, kv):
            options = {} if self.sink_logits is None else {"sink_logits": self.sink_logits}
            heads = decode_step(
                self.decode, q, kv, **options
            )  # keys are rotated: their order does not matter
        else:
            heads = self.attend(q, kv)
        return self.o_proj(merge_heads(heads))

    def attend(self, q: Float[Tensor, "B H T D"], kv: KV) -> Float[Tensor, "B H T D"]:
        """Every query over its window, a block of queries at a time."""
        if self.in_ring(q, kv) and len(kv.positions) == 1:
            return self.attend_masked(q, kv.k, kv.v, None)
        return attend_blockwise(q, kv, Window(self.window, self.n_sinks), BLOCK, self.attend_masked)

    def in_ring(self, q: Tensor, kv: KV) -> bool:
        """Whether this is one token per row over a ring, whose keys are all visible to it."""
        return q.shape[2] == 1 and kv.k.shape[2] <= self.window + self.n_sinks

    def project_kv(self, x: Float[Tensor, "B T M"], cache: Cache | None = None) -> KV:
        if self.reader:
            raise TypeError("source: this layer is a reader; it has no keys and values of its own")
        self.check_inputs(x, cache, RingCache)
        positions = token_positions(x, cache)
        k = self.rope(split_heads(self.k_proj(x), self.n_kv_heads), positions)
        v = split_heads(self.v_proj(x), self.n_kv_heads)
        if not isinstance(cache, RingCache):
            return KV(k, v, positions)
        if (cache.window, cache.n_sinks) != (self.window, self.n_sinks):
            raise ValueError(
                f"cache: expected shapes for window={self.window} and n_sinks={self.n_sinks}, "
                f"got those for window={cache.window} and n_sinks={cache.n_sinks}"
            )
        return cache.append(k, v)

    def attend_masked(
        self, q: Float[Tensor, "B H T D"], k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Float[Tensor, "B H T D"]:
        """Some queries over some keys, and over the sink logit if there is one."""
        k, v = k.to(q.dtype), v.to(q.dtype)
        if self.sink_logits is None:
            return grouped_attention(q, k, v, mask)
        return with_sinks(grouped_partial(q, k, v, mask), self.sink_logits).to(q.dtype)

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        B, T, D, wide = len(x), x.shape[1], self.head_dim, upcast(x)
        q, k, v = (
            (wide @ upcast(w.weight).T).reshape(B, T, -1, D) for w in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate_naive(q, self.rope.config), rotate_naive(k, self.rope.config)
        heads = torch.zeros_like(q)
        for t in range(T):
            visible = [s for s in range(t + 1) if t - s < self.window or s < self.n_sinks]
            for h in range(self.n_heads):
                g = h // (self.n_heads // self.n_kv_heads)
                scores = torch.einsum("bd, bsd -> bs", q[:, t, h], k[:, visible, g]) / D**0.5
                if self.sink_logits is not None:
                    scores = torch.cat((scores, upcast(self.sink_logits[h]).expand(B, 1)), dim=-1)
                weights = scores.softmax(-1)[:, : len(visible)]
                heads[:, t, h] = torch.einsum("bs, bsd -> bd", weights, v[:, visible, g])
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
        sizes = (self.head_dim, self.window, self.n_sinks)
        return RingCache(batch, self.n_kv_heads, max_len, *sizes, dtype, device)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """2 · B · G · min(max_len, n_sinks + W) · D · bytes per number; 0 for a reader."""
        validate.positive("max_len", max_len)
        return 0 if self.reader else self.read_bytes(max_len, batch=batch, dtype=dtype)

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """2 · B · G · min(length, n_sinks + W) · D · bytes per number: all that is kept."""
        tokens = min(validate.positive("length", length), self.n_sinks + self.window)
        return self.to_bytes(2 * self.n_kv_heads * tokens * self.head_dim, batch, dtype)

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
