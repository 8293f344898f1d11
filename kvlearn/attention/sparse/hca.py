"""Heavily compressed attention (HCA): the last tokens as they are, and all of the past a block at a time."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import Mechanism, register
from kvlearn.attention.cache import KV, Cache
from kvlearn.attention.core import grouped_partial, merge, merge_heads, split_heads, upcast, with_sinks
from kvlearn.attention.rope import RopeConfig
from kvlearn.attention.sliding.ring import RingCache
from kvlearn.attention.sparse.compressor import Compressor, TrailingRope
from kvlearn.attention.sparse.entries import CompressedCache, Entries
from kvlearn.attention.sparse.indexer import Request


@register("hca")
class HeavilyCompressedAttention(Mechanism):
    """All heads attend, in one softmax, to the last W tokens and to one entry for every m tokens of the past.

        K_t = {k_s : t - W < s ≤ t} ∪ {e_i : (i + 1)·m ≤ t + 1}
        head = Σ_{k ∈ K_t} exp(q·k / √D) k / (exp(sink) + Σ_{k ∈ K_t} exp(q·k / √D)),   y = [heads] W_o

    with one k_s = norm(W_k x_s) for all heads, key and value in one, and the entries e_i of a ``Compressor``.
    An entry is seen from its block's last token on; until then the window shows that block's tokens, all of
    them where W ≥ m. Queries are normalised head by head; q, k and e are turned by RoPE in their last
    ``rope_dim`` coordinates, an entry to where its block begins, and since k is a value too, the output is
    turned back at the query's position. ``sink`` is a learned logit of each head, ``q_rank`` as in ``mla``.

    Cache: B · (min(max_len, W) + ⌊max_len / m⌋ + 2(m - 1)) · D numbers: a ring, entries, tokens that wait.
    A pass goes by ``block`` queries, which meet block + W - 1 tokens: no N · N matrix. The entries they meet
    make N · N/m scores: still quadratic, m times less.
    ``rope_dim`` is D/8 unless given, as in DeepSeek-V4, whose W and m are the defaults. What is left out is
    no part of the idea: the output projection in two steps, and the low precision of what V4 stores.

    Raises ValueError for a ``rope_dim`` that is odd or above ``head_dim``.
    Source: DeepSeek-AI, "DeepSeek-V4" (2026), section 2.3.2, equations 20 to 23; window, sinks, norms and
    partial RoPE are those of its section 2.3 for both of its mechanisms.
    """

    overlap = False  # of the blocks that are compressed
    block = 128  # queries at a time

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        window: int = 128,
        rate: int = 128,
        q_rank: int | None = None,
        rope_dim: int | None = None,
        norm_eps: float = 1e-6,
        rope: RopeConfig | None = RopeConfig(),
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        self.window, self.rate = validate.positive("window", window), validate.positive("rate", rate)
        rope_dim = max(self.head_dim // 16 * 2, 2) if rope_dim is None else rope_dim
        self.rope_dim = 0 if rope is None else validate.positive("rope_dim", rope_dim)
        validate.at_most("rope_dim", self.rope_dim, self.head_dim, "head_dim")
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim: expected an even number, got {rope_dim}")
        self.rope_config, self.norm_eps = rope, norm_eps
        self.q_rank = None if q_rank is None else validate.positive("q_rank", q_rank)
        if self.q_rank is not None:
            self.q_down = nn.Linear(d_model, self.q_rank, bias=False)
            self.q_norm = nn.RMSNorm(self.q_rank, eps=norm_eps)
        self.q_proj = nn.Linear(self.q_rank or d_model, self.n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, self.head_dim, bias=False)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=norm_eps)
        self.compressor = self.new_compressor(self.head_dim)
        self.sink_logits = nn.Parameter(torch.zeros(self.n_heads))
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, d_model, bias=False)
        self.rope = TrailingRope(self.rope_dim, rope)

    def new_compressor(self, width: int) -> Compressor:
        return Compressor(
            self.d_model, width, self.rate, self.overlap, self.rope_dim, self.rope_config, self.norm_eps
        )

    @property
    def compressors(self) -> list[Compressor]:
        return [self.compressor]

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.refuse(source)
        self.check(x, cache, CompressedCache)
        start = 0 if cache is None else cache.length
        positions = start + torch.arange(x.shape[1], device=x.device)[None]
        k, at = self.keys(x, positions), positions
        if isinstance(cache, CompressedCache):
            cache.expect_sizes(self.sizes)
            k, at, memories = cache.extend(x, k, self.compressors)
        else:
            memories = [compressor(x) for compressor in self.compressors]
        heads = self.attend(x, k, at, memories, positions, start)
        return self.o_proj(merge_heads(heads).to(x.dtype))

    def attend(
        self,
        x: Float[Tensor, "B T M"],
        k: Float[Tensor, "B 1 S D"],
        at: Int[Tensor, "1 S"],
        memories: list[Tensor],
        positions: Int[Tensor, "1 T"],
        start: int,
    ) -> Float[Tensor, "B H T D"]:
        """The new tokens, the first of which stands at ``start``, over tokens ``k`` at ``at`` and entries.

        The two parts are merged, as if they had been seen together, and then the sink takes its share.
        """
        T, W, past = x.shape[1], self.window, k.shape[2] - x.shape[1]
        a = self.latent(x)
        q, request = self.queries(a, positions), self.request(a, x, positions)
        blocks = []
        for first in range(0, T, self.block):
            now = slice(first, min(first + self.block, T))
            near = slice(max(past + first - W + 1, 0), past + now.stop)
            here, there = positions[:, None, now, None], at[:, None, None, near]
            block, tokens = q[:, :, now], k[:, :, near]
            part = grouped_partial(block, tokens, tokens, (there <= here) & (there > here - W))
            whole = (start + now.stop) // self.rate
            if whole:
                asked = None if request is None else request.part(now)
                chosen, seen = self.choose([e[:, :whole] for e in memories], asked, positions[:, now])
                chosen = chosen.to(q.dtype)
                part = merge(part, grouped_partial(block, chosen, chosen, seen))
            blocks.append(with_sinks(part, self.sink_logits))
        return self.rope(torch.cat(blocks, dim=2), positions, back=True)

    def latent(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T A"]:
        """What queries are made from."""
        return x if self.q_rank is None else self.q_norm(self.q_down(x))

    def request(
        self, a: Float[Tensor, "B T A"], x: Float[Tensor, "B T M"], positions: Tensor
    ) -> Request | None:
        """What tokens look for before they attend. Here they attend to every entry."""
        return None

    def choose(
        self, memories: list[Tensor], request: Request | None, positions: Int[Tensor, "1 T"]
    ) -> tuple[Float[Tensor, "B 1 E D"], Bool[Tensor, "#B 1 T E"] | None]:
        """The entries to attend to, and which token sees which of them: here those whose block is whole."""
        return memories[0].unsqueeze(1), self.visible(memories[0].shape[1], positions).unsqueeze(1)

    def visible(self, n_entries: int, positions: Int[Tensor, "1 T"]) -> Bool[Tensor, "1 T {n_entries}"]:
        """Entry i is seen from position (i + 1)·m - 1 on, its block's last."""
        whole = (positions + 1) // self.rate
        return whole[..., None] > torch.arange(n_entries, device=positions.device)

    def queries(self, a: Float[Tensor, "B T A"], positions: Tensor) -> Float[Tensor, "B H T D"]:
        q = split_heads(self.q_proj(a), self.n_heads)
        return self.rope(F.rms_norm(q, (self.head_dim,), eps=self.norm_eps), positions)

    def keys(self, x: Float[Tensor, "B T M"], positions: Tensor) -> Float[Tensor, "B 1 T D"]:
        """One for all heads, and the values too."""
        return self.rope(self.k_norm(self.k_proj(x)).unsqueeze(1), positions)

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        B, T = x.shape[:2]
        positions = torch.arange(T, device=x.device)[None]
        q = upcast(self.queries(self.latent(x), positions))
        k = upcast(self.keys(x, positions))[:, 0]
        heads = torch.empty_like(q)
        for b in range(B):
            entries = [self.compressor.naive(x[b : b + 1], i)[0] for i in range(T // self.rate)]
            for t in range(T):
                seen = [k[b, s] for s in range(max(t - self.window + 1, 0), t + 1)]
                seen += [entries[i] for i in self.naive_choice(x[b : b + 1], t)]
                scores = q[b, :, t] @ torch.stack(seen).T / self.head_dim**0.5
                weights = torch.cat((scores, upcast(self.sink_logits)[:, None]), dim=1).softmax(dim=1)[:, :-1]
                heads[b, :, t] = weights @ torch.stack(seen)
        heads = self.rope(heads, positions, back=True)
        return self.o_proj(merge_heads(heads).to(x.dtype))

    def naive_choice(self, x: Float[Tensor, "1 T M"], t: int) -> list[int]:
        """The entries that token ``t`` attends to."""
        return list(range((t + 1) // self.rate))

    @property
    def sizes(self) -> dict[str, object]:
        """What a cache of this layer has to fit."""
        widths = [compressor.width for compressor in self.compressors]
        return {"window": self.window, "rate": self.rate, "widths": widths, "overlap": self.overlap}

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> CompressedCache:
        dtype, at = self.dtype_and_device(dtype, device)
        validate.positive("max_len", max_len)
        window = RingCache(batch, 1, max_len, self.head_dim, self.window, 0, dtype, at, shared=True)
        memories = [Entries(compressor, batch, max_len, dtype, at) for compressor in self.compressors]
        return CompressedCache(window, memories, self.sizes)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · (min(max_len, W) · D + what each compressor stores) · bytes a number."""
        numbers = min(validate.positive("max_len", max_len), self.window) * self.head_dim
        numbers += sum(compressor.stored_numbers(max_len) for compressor in self.compressors)
        return validate.positive("batch", batch) * numbers * self.dtype_and_device(dtype)[0].itemsize

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · (min(length, W) · D + what is read of ⌊length / m⌋ entries) · bytes a number.

        Of the waiting tokens nothing: one step in m reads them, to make the next entry.
        """
        numbers = min(validate.positive("length", length), self.window) * self.head_dim
        numbers += self.read_numbers(length // self.rate)
        return validate.positive("batch", batch) * numbers * self.dtype_and_device(dtype)[0].itemsize

    def read_numbers(self, n_entries: int) -> int:
        """Of so many entries: here all."""
        return n_entries * self.head_dim

    @classmethod
    def tiny(cls) -> "HeavilyCompressedAttention":
        return cls(d_model=24, n_heads=3, head_dim=8, window=4, rate=3, q_rank=16, rope_dim=4)
