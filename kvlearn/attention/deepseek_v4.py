"""Attention over a compressed sequence, as in DeepSeek-V4: HCA and CSA.

A block of m tokens becomes one entry, which the cache holds in place of all of them; a ring keeps the last W
tokens too. Multi-head compression (mla.py) makes every token smaller; here there are fewer
of them. Heavily compressed attention (HCA) reads all entries of long blocks. Compressed sparse attention
(CSA) makes short blocks and reads the ``top_k`` entries that an indexer scores highest.

    K_t  = {k_s : t - W < s ≤ t} ∪ {e_i : (i + 1)·m ≤ t + 1}                                          (HCA)
    K_t  = {k_s : t - W < s ≤ t} ∪ Top-k {e_i : (i + 1)·m ≤ t + 1} by I_ti                            (CSA)
    head = Σ_{k ∈ K_t} exp(q·k / √D) k / (exp(sink) + Σ_{k ∈ K_t} exp(q·k / √D)),   y = [heads] W_o

Letters beside those of core.py:

    m   tokens of a block, for one entry: the rate     J   index heads
    E   entries, complete blocks: E = ⌊S / m⌋          Di  numbers of an index key
    K   entries selected                               A   numbers of a compressed query

Source: DeepSeek-AI, "DeepSeek-V4" (2026), section 2.3.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import KV, Cache, Mechanism, register, token_positions
from kvlearn.attention.core import (
    grouped_partial,
    merge,
    merge_heads,
    rms_norm_naive,
    split_heads,
    upcast,
    with_sinks,
)
from kvlearn.attention.dsa import IndexQuery, index_scores, indexer_loss, select_top_k
from kvlearn.attention.rope import Rope, RopeConfig, angular_frequencies, rotate_naive
from kvlearn.attention.window import RingCache


class TrailingRope(nn.Module):
    """RoPE on the last ``rope_dim`` coordinates; the others stay as they are, and all of them without it.

    ``back`` rotates the other way. Where keys are values too, a mean of values is rotated by its keys'
    positions; rotated back by the query's own, it depends on distances only.
    """

    def __init__(self, rope_dim: int, config: RopeConfig | None) -> None:
        super().__init__()
        self.rope_dim, self.config = rope_dim, config
        self.rope = None if config is None else Rope(rope_dim, config)

    def forward(
        self, x: Float[Tensor, "B H T D"], positions: Int[Tensor, "#B T"], back: bool = False
    ) -> Float[Tensor, "B H T D"]:
        if self.rope is None:
            return x
        other, rotated = x[..., : -self.rope_dim], x[..., -self.rope_dim :]
        rotated = self.rope(rotated, -positions if back else positions)
        if back:
            rotated = rotated / self.rope.factor**2  # of YaRN: once from the keys, once from this rotation
        return torch.cat((other, rotated), dim=-1)

    def naive(
        self, x: Float[Tensor, "B T H D"], positions: list[int], back: bool = False
    ) -> Float[Tensor, "B T H D"]:
        """The same pair by pair, with the dimension of heads after time."""
        if self.config is None:
            return x
        rotated = rotate_naive(x[..., -self.rope_dim :], self.config, [-t if back else t for t in positions])
        if back:
            rotated = rotated / angular_frequencies(self.rope_dim, self.config)[1] ** 2
        return torch.cat((x[..., : x.shape[-1] - self.rope_dim], rotated), dim=-1)


class Compressor(nn.Module):
    """One entry of D numbers for every ``rate`` tokens: their mean, weighted for each coordinate apart.

        C = W_c x,  Z = W_z x,   e_i = RoPE_{i·m}(norm(Σ_j softmax_j(Z_j + b_j) ⊙ C_j)),   j in block i

    With ``overlap`` C and Z are two series, a and b: entry i takes series a of block i - 1 and series b of
    block i, 2m tokens under one softmax, so that neighbouring entries share tokens. Entry 0 has no block
    before it. The projections of a token are [C, Z], (2, D) or with ``overlap`` (2, 2D).

    Source: DeepSeek-AI, "DeepSeek-V4" (2026), equations 20 to 23 (one series), 9 to 12 (two).
    """

    def __init__(
        self,
        d_model: int,
        width: int,
        rate: int,
        overlap: bool,
        rope_dim: int,
        rope: RopeConfig | None,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.width, self.rate, self.overlap = width, validate.positive("rate", rate), overlap
        both = 2 * width if overlap else width
        self.kv_proj = nn.Linear(d_model, both, bias=False)
        self.gate_proj = nn.Linear(d_model, both, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(rate, both))
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        self.rope = TrailingRope(rope_dim, rope)

    def forward(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B E D"]:
        """The entries of all complete blocks of a sequence from its start."""
        return self.compress(self.project(x[:, : x.shape[1] // self.rate * self.rate]))

    def project(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T 2 nD"]:
        """[C, Z] of every token."""
        return torch.stack((self.kv_proj(x), self.gate_proj(x)), dim=2)

    def compress(
        self,
        tokens: Float[Tensor, "B T 2 nD"],
        previous: Float[Tensor, "B m 2 D"] | None = None,
        first: int = 0,
    ) -> Float[Tensor, "B E D"]:
        """Entries ``first`` and on, of the projections of tokens that fill blocks.

        ``previous`` is series a of the block before them, where there is one and series overlap.
        """
        blocks = tokens.unflatten(1, (-1, self.rate))  # (B, E, m, 2, W)
        bias: Tensor = self.position_bias
        if self.overlap:
            a, b = blocks.split(self.width, dim=-1)
            if previous is None:
                previous = torch.zeros_like(a[:, :1])
                previous[:, :, :, 1] = -torch.inf  # weight 0 in the softmax
            else:
                previous = previous.unsqueeze(1)
            blocks = torch.cat((torch.cat((previous, a), dim=1)[:, : a.shape[1]], b), dim=2)
            bias = torch.cat(bias.split(self.width, dim=-1))  # (2m, D)
        content, gate = upcast(blocks).unbind(3)
        entries = ((gate + bias).softmax(dim=2) * content).sum(dim=2)
        starts = (first + torch.arange(entries.shape[1], device=tokens.device)) * self.rate
        return self.rope(self.norm(entries.to(tokens.dtype))[:, None], starts[None])[:, 0]

    def naive(self, x: Float[Tensor, "B T M"], i: int) -> Float[Tensor, "B D"]:
        """Entry ``i`` token by token, in fp32."""
        x, kv_weight, gate_weight, bias = (
            upcast(t) for t in (x, self.kv_proj.weight, self.gate_proj.weight, self.position_bias)
        )
        contents, gates = [], []
        for t in range(max(i - 1, 0) * self.rate if self.overlap else i * self.rate, (i + 1) * self.rate):
            series = slice(self.width) if t < i * self.rate else slice(-self.width, None)
            contents.append(x[:, t] @ kv_weight[series].T)
            gates.append(x[:, t] @ gate_weight[series].T + bias[t % self.rate, series])
        weights = torch.stack(gates).softmax(dim=0)  # (m or 2m, B, D)
        entry = rms_norm_naive((weights * torch.stack(contents)).sum(dim=0), self.norm)
        return self.rope.naive(entry[:, None, None], [i * self.rate])[:, 0, 0]


class Entries:
    """The past of one compressor: all entries, up to m - 1 tokens that wait, and the block to overlap with.

    A block is compressed as its last token comes, so that m tokens never wait. Once compressed, a block
    cannot be restored.

    ``entries``   (B, ⌊max_len / m⌋, D)
    ``waiting``   projections of the tokens of the block that is not complete yet  (B, m - 1, 2, W)
    ``previous``  series a of the last complete block, where series overlap        (B, m, 2, D)
    """

    def __init__(
        self, compressor: Compressor, batch: int, max_len: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        rate, width = compressor.rate, compressor.width
        both = 2 * width if compressor.overlap else width
        self.rate = rate
        self.entries = torch.zeros(batch, max_len // rate, width, dtype=dtype, device=device)
        self.waiting = torch.zeros(batch, rate - 1, 2, both, dtype=dtype, device=device)
        n_previous = rate if compressor.overlap else 0
        self.previous = torch.zeros(batch, n_previous, 2, width, dtype=dtype, device=device)

    def tensors(self) -> list[Tensor]:
        return [self.entries, self.waiting, self.previous]

    def append(
        self, compressor: Compressor, x: Float[Tensor, "B T M"], length: int
    ) -> Float[Tensor, "B E D"]:
        """Append the tokens after the first ``length``; return a view of all complete entries."""
        first, waiting = length // self.rate, length % self.rate  # (torch.compile has no divmod)
        new = compressor.project(x).detach()
        if waiting + x.shape[1] < self.rate:  # the block is not complete yet: its tokens wait
            self.waiting.narrow(1, waiting, x.shape[1]).copy_(new)
            return self.entries[:, :first]
        tokens = torch.cat((self.waiting[:, :waiting].to(x.dtype), new), dim=1)
        n_blocks, left = tokens.shape[1] // self.rate, tokens.shape[1] % self.rate
        complete = tokens[:, : n_blocks * self.rate]
        previous = self.previous.to(x.dtype) if compressor.overlap and first else None
        entries = compressor.compress(complete, previous, first).detach()
        self.entries[:, first : first + n_blocks] = entries.to(self.entries.dtype)
        if compressor.overlap:
            self.previous.copy_(complete[:, -self.rate :, :, : compressor.width])
        self.waiting[:, :left] = tokens[:, tokens.shape[1] - left :].to(self.waiting.dtype)
        return self.entries[:, : first + n_blocks]


class CompressedCache(Cache):
    """The last tokens in a ring, and the entries of one compressor or more.

    It does not trim: the tokens of a block that has been compressed cannot be restored.
    """

    can_trim = False

    def __init__(self, window: RingCache, memories: list[Entries], sizes: dict[str, object]) -> None:
        super().__init__(window.batch, window.max_len, window.device)
        self.window, self.memories, self.sizes = window, memories, sizes

    def tensors(self) -> list[Tensor]:
        return [self.window.k, *(t for memory in self.memories for t in memory.tensors())]

    def check_sizes(self, sizes: dict[str, object]) -> None:
        """Raise ValueError where this is the cache of a layer of other sizes; called before writing."""
        if self.sizes != sizes:
            raise ValueError(f"cache: expected shapes for {sizes}, got those for {self.sizes}")

    def append(
        self, x: Float[Tensor, "B T M"], k: Float[Tensor, "B 1 T D"], compressors: list[Compressor]
    ) -> tuple[KV, list[Tensor]]:
        """Append new tokens; return keys of the window and of the new tokens, and all complete entries."""
        window = self.window.append(k, k)
        entries = [
            memory.append(compressor, x, self.length)
            for memory, compressor in zip(self.memories, compressors, strict=True)
        ]
        self.advance(x.shape[1])
        return window, entries

    def reset(self) -> None:
        super().reset()
        self.window.reset()


# The queries of a slice, and how many entries are complete by the last of them, to the entries that they
# attend to, (B, 1, E, D), and the mask of these, (#B, 1, T, E), or None for all.
EntriesOf = Callable[[slice, int], tuple[Tensor, Tensor | None]]


@register("hca")
class HeavilyCompressedAttention(Mechanism):
    """All heads attend, in one softmax, to the last W tokens and to one entry for every m tokens of the past.

    The equation is that of the module, with one k_s = norm(W_k x_s) for all heads, key and value in one, and
    the entries e_i of a ``Compressor``. An entry is visible from its block's last token on; until then the
    window shows that block's tokens, all of them where W ≥ m. Queries are normalised head by head; q, k and e
    are rotated by RoPE in their last ``rope_dim`` coordinates, an entry to where its block begins, and since
    k is a value too, the output is rotated back at the query's position. ``sink`` is a learned logit of each
    head, ``q_rank`` as in ``mla``.

    Cache: B · (min(max_len, W) + ⌊max_len / m⌋ + 2(m - 1)) · D numbers: a ring, entries, tokens that wait.
    A pass computes ``block`` queries at a time, over block + W - 1 tokens: no N · N matrix. The entries make
    N · N/m scores: still quadratic, m times less.
    ``rope_dim`` is D/8 unless given, as in DeepSeek-V4, whose W and m are the defaults. Left out are the
    output projection in two steps and the low precision of V4's cache.

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
        self.rope_config, self.norm_eps = rope, validate.above("norm_eps", norm_eps, 0)
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
        self.check_inputs(x, cache, CompressedCache, source)
        positions = token_positions(x, cache)
        start = 0 if cache is None else cache.length
        q, k = self.queries(self.latent(x), positions), self.keys(x, positions)  # (B, H, T, D), (B, 1, T, D)
        window, (entries, *_) = self.compress(x, k, positions, cache)  # (B, 1, S, D), (B, E, D)

        def all_complete(now: slice, complete: int) -> tuple[Tensor, Tensor]:
            return entries[:, None, :complete], self.visible(complete, positions[:, now])[:, None]

        heads = self.rope(self.attend(q, window, all_complete, start), positions, back=True)
        return self.o_proj(merge_heads(heads).to(x.dtype))

    def latent(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T A"]:
        """The input of the query projections: x, or its latent where there is a ``q_rank``."""
        return x if self.q_rank is None else self.q_norm(self.q_down(x))

    def queries(self, a: Float[Tensor, "B T A"], positions: Int[Tensor, "1 T"]) -> Float[Tensor, "B H T D"]:
        q = split_heads(self.q_proj(a), self.n_heads)
        return self.rope(F.rms_norm(q, (self.head_dim,), eps=self.norm_eps), positions)

    def keys(self, x: Float[Tensor, "B T M"], positions: Int[Tensor, "1 T"]) -> Float[Tensor, "B 1 T D"]:
        """One for all heads, and the values too."""
        return self.rope(self.k_norm(self.k_proj(x)).unsqueeze(1), positions)

    def compress(
        self,
        x: Float[Tensor, "B T M"],
        k: Float[Tensor, "B 1 T D"],
        positions: Int[Tensor, "1 T"],
        cache: Cache | None,
    ) -> tuple[KV, list[Tensor]]:
        """The tokens that the window may show, and the entries of each compressor; ``cache`` included."""
        if not isinstance(cache, CompressedCache):
            return KV(k, k, positions), [compressor(x) for compressor in self.compressors]
        cache.check_sizes(self.sizes)
        return cache.append(x, k, self.compressors)

    def attend(
        self, q: Float[Tensor, "B H T D"], window: KV, entries_of: EntriesOf, start: int
    ) -> Float[Tensor, "B H T D"]:
        """Queries from position ``start`` on over the tokens of their windows and over entries.

        The two parts are merged as one softmax, and then the sink takes its share. For ``block`` queries at a
        time, which meet only the tokens of their windows.
        """
        T, W, past, blocks = q.shape[2], self.window, window.k.shape[2] - q.shape[2], []
        for first in range(0, T, self.block):
            now = slice(first, min(first + self.block, T))
            near = slice(max(past + first - W + 1, 0), past + now.stop)
            here, there = window.positions[:, None, now, None], window.key_positions[:, None, None, near]
            part_q, tokens = q[:, :, now], window.k[:, :, near].to(q.dtype)
            part = grouped_partial(part_q, tokens, tokens, (there <= here) & (there > here - W))
            complete = (start + now.stop) // self.rate
            if complete:
                entries, mask = entries_of(now, complete)
                entries = entries.to(q.dtype)
                part = merge(part, grouped_partial(part_q, entries, entries, mask))
            blocks.append(with_sinks(part, self.sink_logits))
        return torch.cat(blocks, dim=2)

    def visible(self, n_entries: int, positions: Int[Tensor, "1 T"]) -> Bool[Tensor, "1 T {n_entries}"]:
        """Entry i is visible from position (i + 1)·m - 1 on, its block's last."""
        complete = (positions + 1) // self.rate
        return complete[..., None] > torch.arange(n_entries, device=positions.device)

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        B, T, D = len(x), x.shape[1], self.head_dim
        positions = list(range(T))
        q = (self.latent_naive(x) @ upcast(self.q_proj.weight).T).reshape(B, T, -1, D)
        q = self.rope.naive(q / (q.square().mean(-1, keepdim=True) + self.norm_eps).sqrt(), positions)
        k = rms_norm_naive(upcast(x) @ upcast(self.k_proj.weight).T, self.k_norm)
        k = self.rope.naive(k[:, :, None], positions)[:, :, 0]
        entries = [self.compressor.naive(x, i) for i in range(T // self.rate)]  # (B, D) each
        selected = self.selected_naive(x)
        heads = torch.zeros_like(q)
        for b in range(B):
            for t in range(T):
                near = [k[b, s] for s in range(max(t - self.window + 1, 0), t + 1)]
                keys = torch.stack(near + [entries[i][b] for i in selected[b][t]])
                scores = torch.cat((q[b, t] @ keys.T / D**0.5, upcast(self.sink_logits)[:, None]), dim=1)
                heads[b, t] = scores.softmax(dim=1)[:, :-1] @ keys
        heads = self.rope.naive(heads, positions, back=True)
        return (heads.flatten(2) @ upcast(self.o_proj.weight).T).to(x.dtype)

    def latent_naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T A"]:
        if self.q_rank is None:
            return upcast(x)
        return rms_norm_naive(upcast(x) @ upcast(self.q_down.weight).T, self.q_norm)

    def selected_naive(self, x: Float[Tensor, "B T M"]) -> list[list[list[int]]]:
        """The entries that each token of each row attends to: here all complete ones."""
        return [[list(range((t + 1) // self.rate)) for t in range(x.shape[1])] for _ in x]

    @property
    def sizes(self) -> dict[str, object]:
        """The sizes that a cache of this layer has to have."""
        widths = [compressor.width for compressor in self.compressors]
        return {"window": self.window, "rate": self.rate, "widths": widths, "overlap": self.overlap}

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> CompressedCache:
        dtype, device = self.dtype_and_device(dtype, device)
        validate.positive("max_len", max_len)
        window = RingCache(batch, 1, max_len, self.head_dim, self.window, 0, dtype, device, shared=True)
        memories = [Entries(compressor, batch, max_len, dtype, device) for compressor in self.compressors]
        return CompressedCache(window, memories, self.sizes)

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · (min(max_len, W) + ⌊max_len / m⌋ + 2(m - 1)) · D · bytes per number."""
        tokens = min(validate.positive("max_len", max_len), self.window)
        vectors = tokens + max_len // self.rate + 2 * (self.rate - 1)
        return self.to_bytes(vectors * self.head_dim, batch, dtype)

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · (min(length, W) + ⌊length / m⌋) · D · bytes per number.

        The waiting tokens do not count: one step in m reads them, to make the next entry.
        """
        vectors = min(validate.positive("length", length), self.window) + length // self.rate
        return self.to_bytes(vectors * self.head_dim, batch, dtype)

    @classmethod
    def tiny(cls) -> "HeavilyCompressedAttention":
        return cls(d_model=24, n_heads=3, head_dim=8, window=4, rate=3, q_rank=16, rope_dim=4)


class EntryIndexer(nn.Module):
    """Scores every complete block i for every token t, by J small heads over one small key per block.

        I_ti = Σ_j w_tj ReLU(q_tj · κ_i),   q = RoPE(W_q a),   w = W_w x / √(J · Di)

    The keys κ are entries of a compressor of its own, Di wide; a is the input of attention's query
    projection. It is the indexer of ``dsa``, with m times fewer keys to score and to store.
    """

    def __init__(
        self, d_model: int, query_width: int, n_heads: int, top_k: int, compressor: Compressor
    ) -> None:
        super().__init__()
        self.n_heads = validate.positive("index_heads", n_heads)
        self.top_k = validate.positive("top_k", top_k)
        self.q_proj = nn.Linear(query_width, self.n_heads * compressor.width, bias=False)
        self.weight_proj = nn.Linear(d_model, self.n_heads, bias=False)
        self.compressor = compressor

    def query(
        self, a: Float[Tensor, "B T A"], x: Float[Tensor, "B T M"], positions: Int[Tensor, "1 T"]
    ) -> IndexQuery:
        """The tokens' queries and the weights of their heads; ``a`` and ``x`` get no gradient by them."""
        a, x = a.detach(), x.detach()
        q = self.compressor.rope(split_heads(self.q_proj(a), self.n_heads), positions)
        return IndexQuery(q, self.weight_proj(x).mT * (self.n_heads * self.compressor.width) ** -0.5)


@register("csa")
class CompressedSparseAttention(HeavilyCompressedAttention):
    """As ``hca``, but blocks are short and overlap, and a token attends to ``top_k`` entries it selects.

        K_t = {k_s : t - W < s ≤ t} ∪ Top-k {e_i : (i + 1)·m ≤ t + 1} by I_ti          (``EntryIndexer``)

    A step of one token gathers the entries it has selected and touches no other. A longer pass makes N · N/m
    scores and masks most of them.

    Cache: that of ``hca`` with twice as much for the tokens that wait and as many again to overlap with, and
    the same once more, Di wide, for the indexer: B · (min(max_len, W) · D + (⌊max_len / m⌋ + 2(3m - 2)) ·
    (D + Di)) numbers. A step reads all ⌊length / m⌋ index keys and min(top_k, ⌊length / m⌋) entries.

    The selection has no gradient, so no loss on the output trains ``auxiliary_parameters``:
    ``indexer_loss`` does. ``index_dim`` is D/4 unless given, or ``rope_dim`` where that is more, and
    ``index_heads`` H, as in DeepSeek-V4-Flash, whose m = 4 and top_k = 512 are the defaults.

    Raises ValueError for a ``rope_dim`` above ``index_dim``.
    Source: DeepSeek-AI, "DeepSeek-V4" (2026), section 2.3.1: equations 9 to 12 (entries) and 13 to 17
    (selection).
    """

    chooses_by_content = True
    auxiliary_parameters = ("indexer.",)  # prefixes of their names
    overlap = True

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        window: int = 128,
        rate: int = 4,
        top_k: int = 512,
        index_heads: int | None = None,
        index_dim: int | None = None,
        q_rank: int | None = None,
        rope_dim: int | None = None,
        norm_eps: float = 1e-6,
        rope: RopeConfig | None = RopeConfig(),
    ) -> None:
        super().__init__(
            d_model,
            n_heads,
            head_dim=head_dim,
            window=window,
            rate=rate,
            q_rank=q_rank,
            rope_dim=rope_dim,
            norm_eps=norm_eps,
            rope=rope,
        )
        index_dim = max(self.head_dim // 4, self.rope_dim, 1) if index_dim is None else index_dim
        index_dim = validate.positive("index_dim", index_dim)
        validate.at_most("rope_dim", self.rope_dim, index_dim, "index_dim")
        index_heads = self.n_heads if index_heads is None else index_heads
        compressor = self.new_compressor(index_dim)
        self.indexer = EntryIndexer(d_model, self.q_rank or d_model, index_heads, top_k, compressor)

    @property
    def compressors(self) -> list[Compressor]:
        return [self.compressor, self.indexer.compressor]

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, CompressedCache, source)
        positions, a = token_positions(x, cache), self.latent(x)
        start = 0 if cache is None else cache.length
        q, k = self.queries(a, positions), self.keys(x, positions)  # (B, H, T, D), (B, 1, T, D)
        index_query = self.indexer.query(a, x, positions)  # (B, J, T, Di), (B, J, T)
        window, (entries, index_keys) = self.compress(
            x, k, positions, cache
        )  # S tokens; (B, E, D), (B, E, Di)

        def best(now: slice, complete: int) -> tuple[Tensor, Tensor | None]:
            """For one token its selected entries alone, for more all entries and a mask."""
            visible = self.visible(complete, positions[:, now])
            top = select_top_k(index_query.part(now), index_keys[:, :complete], visible, self.indexer.top_k)
            if top.shape[1] == 1:  # all complete entries are visible to it, so all selected ones are
                at = top.mT.expand(-1, -1, entries.shape[2])
                return entries.gather(1, at).unsqueeze(1), None
            return entries[:, None, :complete], selection_mask(top, visible)[:, None]

        heads = self.rope(self.attend(q, window, best, start), positions, back=True)
        return self.o_proj(merge_heads(heads).to(x.dtype))

    @torch.no_grad()
    def selection(self, x: Float[Tensor, "B T M"]) -> Bool[Tensor, "B T E"]:
        """True at the entries that each token of a whole sequence attends to."""
        positions, keys = token_positions(x, None), self.indexer.compressor(x)
        visible = self.visible(keys.shape[1], positions)
        query = self.indexer.query(self.latent(x), x, positions)
        return selection_mask(select_top_k(query, keys, visible, self.indexer.top_k), visible)

    def indexer_loss(self, x: Float[Tensor, "B T M"], dense: bool = False) -> Float[Tensor, ""]:
        """The loss that trains the indexer, and it alone: ``dsa.indexer_loss`` over the selected entries.

        With ``dense`` over all complete blocks. Tokens before the first of them do not count. Holds (H, T, E)
        numbers. Raises ValueError for a sequence without a complete block.
        """
        validate.at_least("x.shape[1] (time)", x.shape[1], self.rate)
        positions, a = token_positions(x, None), self.latent(x)
        from_first = slice(self.rate - 1, None)
        with torch.no_grad():
            entries = upcast(self.compressor(x))[:, None]
            visible = self.visible(entries.shape[2], positions) if dense else self.selection(x)
            read = upcast(self.queries(a, positions)) @ entries.mT * self.head_dim**-0.5
        scores = index_scores(self.indexer.query(a, x, positions), self.indexer.compressor(x.detach()))
        return indexer_loss(scores[:, from_first], read[:, :, from_first], visible[:, from_first])

    @torch.no_grad()
    def selected_naive(self, x: Float[Tensor, "B T M"]) -> list[list[list[int]]]:
        """The ``top_k`` complete entries of highest score, the earlier one of equals."""
        B, T, J, indexer = len(x), x.shape[1], self.indexer.n_heads, self.indexer
        q = (self.latent_naive(x) @ upcast(indexer.q_proj.weight).T).reshape(B, T, J, -1)
        q = self.rope.naive(q, list(range(T)))
        weight = upcast(x) @ upcast(indexer.weight_proj.weight).T / (J * q.shape[-1]) ** 0.5
        keys = [indexer.compressor.naive(x, i) for i in range(T // self.rate)]
        selected: list[list[list[int]]] = [[] for _ in x]
        for b in range(B):
            for t in range(T):
                scores = [
                    float(weight[b, t] @ (q[b, t] @ key[b]).clamp_min(0))
                    for key in keys[: (t + 1) // self.rate]
                ]
                selected[b].append(sorted(range(len(scores)), key=lambda i: -scores[i])[: indexer.top_k])
        return selected

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · (min(max_len, W) · D + (⌊max_len / m⌋ + 2(3m - 2)) · (D + Di)) · bytes per number.

        Of the 2(3m - 2) vectors 4(m - 1) wait, content and gate of two series; 2m overlap.
        """
        tokens, m = min(validate.positive("max_len", max_len), self.window), self.rate
        entries = max_len // m + 2 * (3 * m - 2)
        numbers = tokens * self.head_dim + entries * (self.head_dim + self.indexer.compressor.width)
        return self.to_bytes(numbers, batch, dtype)

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · (min(length, W) · D + ⌊length / m⌋ · Di + min(⌊length / m⌋, top_k) · D) · bytes per number."""
        tokens, entries = min(validate.positive("length", length), self.window), length // self.rate
        numbers = (tokens + min(entries, self.indexer.top_k)) * self.head_dim
        return self.to_bytes(numbers + entries * self.indexer.compressor.width, batch, dtype)

    @classmethod
    def tiny(cls) -> "CompressedSparseAttention":
        return cls(
            d_model=24,
            n_heads=3,
            head_dim=8,
            window=4,
            rate=2,
            top_k=2,
            index_heads=16,
            index_dim=6,
            q_rank=16,
            rope_dim=4,
        )


def selection_mask(selected: Int[Tensor, "B T K"], visible: Bool[Tensor, "1 T E"]) -> Bool[Tensor, "B T E"]:
    """True at the entries that are ``selected`` and visible: ``select_top_k`` adds others where few are."""
    mask = torch.zeros(*selected.shape[:2], visible.shape[2], dtype=torch.bool, device=selected.device)
    return visible & mask.scatter(-1, selected, True)
