"""Multi-head latent attention (MLA): a small latent per token is cached in place of keys and values.

A token is compressed to a latent c of R numbers, from which the keys and values of all heads follow linearly,
and a key r of Dr numbers, which all heads share and which alone carries the position ("decoupled RoPE"):

    [c_t, r_t] = W_down x_t,    k_t = [W_uk c_t, RoPE(r_t)],    v_t = W_uv c_t             of each head

A cached row is [c, RoPE(r)]. Two paths lead from these rows to the heads' outputs:

    naive     decompress, then attend:      scores  q · k_s,                      out  Σ_s w_s v_s
    absorbed  attend to the latents:        scores  [W_ukᵀ q, q_r] · [c_s, r_s],  out  W_uv (Σ_s w_s c_s)

They are equal because ⟨q, W c⟩ = ⟨Wᵀ q, c⟩: the up-projection moves from S cached tokens to T new ones.
Widths that are sums are written together in shapes: RDr is R + Dr.

Source: DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import KV, Cache, Mechanism, register, token_positions
from kvlearn.attention.core import causal_attention, merge_heads, rms_norm_naive, split_heads, upcast
from kvlearn.attention.rope import Rope, RopeConfig, rotate_naive


class LatentCache(Cache):
    """Latents of all tokens so far and their rotated keys, side by side; slot s holds position s."""

    def __init__(
        self,
        batch: int,
        max_len: int,
        rank: int,
        rope_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(batch, max_len, device)
        validate.floating("dtype", dtype)
        self.rank = validate.positive("rank", rank)
        width = rank + validate.at_least("rope_dim", rope_dim, 0)
        # Zeros, since a masked slot has weight 0, and 0 · NaN would be NaN.
        self.latents = torch.zeros(batch, max_len, width, dtype=dtype, device=device)

    def tensors(self) -> list[Tensor]:
        return [self.latents]

    def append(
        self, latent: Float[Tensor, "B T R"], k_rope: Float[Tensor, "B T Dr"]
    ) -> Float[Tensor, "B S RDr"]:
        """Write new tokens after the old ones; return a view of all rows so far."""
        validate.tensor("latent", latent, (self.batch, "time", self.rank), device=self.device)
        n_tokens, rope_dim = latent.shape[1], self.latents.shape[2] - self.rank
        validate.tensor("k_rope", k_rope, (self.batch, n_tokens, rope_dim), device=self.device)
        self.check_room(n_tokens)
        new = torch.cat((latent, k_rope), dim=-1).detach().to(self.latents.dtype)
        if self.lengths is None:
            self.latents[:, self.length : self.length + n_tokens] = new
        else:
            self.latents.scatter_(1, self.positions(n_tokens)[..., None].expand(new.shape), new)
        self.advance(n_tokens)
        return self.latents[:, : self.length]


# The two paths


def naive_attention(
    q: Float[Tensor, "B H T DDr"],
    latents: Float[Tensor, "B S RDr"],
    kv_up: Float[Tensor, "H DDv R"],
    positions: Int[Tensor, "#B T"],
    scale: float,
    rope: Rope | None = None,
) -> Float[Tensor, "B H T Dv"]:
    """Decompress keys and values of all S tokens for all heads, then attend as full attention does.

    ``kv_up`` holds a head's D rows W_uk, then its Dv rows W_uv. ``rope``, where it is given, rotates the
    decompressed keys: slot s to position s.
    """
    (n_heads, _, R), S = kv_up.shape, latents.shape[1]
    latent, k_rope = latents[..., :R], latents[:, None, :, R:]
    D = q.shape[-1] - k_rope.shape[-1]
    heads = split_heads(F.linear(latent, kv_up.flatten(0, 1)), n_heads)  # (B, H, S, D + Dv)
    k, v = heads[..., :D], heads[..., D:]
    if rope is not None:
        k = rope(k, torch.arange(S, device=k.device)[None])
    k = torch.cat((k, k_rope.expand(-1, n_heads, -1, -1)), dim=-1)  # (B, H, S, D + Dr)
    return causal_attention(q, k, v, positions, scale)


def absorbed_attention(
    q: Float[Tensor, "B H T DDr"],
    latents: Float[Tensor, "B S RDr"],
    kv_up: Float[Tensor, "H DDv R"],
    positions: Int[Tensor, "#B T"],
    scale: float,
) -> Float[Tensor, "B H T Dv"]:
    """The same without decompressing: every head attends to the latents, one key and value for all of them.

    Beside its inputs it holds numbers by heads and tokens (scores), never heads · tokens · head_dim.
    """
    R = kv_up.shape[2]
    rope_dim = latents.shape[-1] - R
    # Values R + Dr wide, of which R are used: with another width than the keys', PyTorch's attention leaves
    # its fast path and copies them.
    shared = latents[:, None]  # (B, 1, S, R + Dr)
    out = causal_attention(fold_up(q, kv_up, rope_dim), shared, shared, positions, scale)
    return unfold_up(out[..., :R], kv_up, q.shape[-1] - rope_dim)


def fold_up(
    q: Float[Tensor, "B H T DDr"], kv_up: Float[Tensor, "H DDv R"], rope_dim: int
) -> Float[Tensor, "B H T RDr"]:
    """Queries for the latents: [q, q_r] -> [W_ukᵀ q, q_r]. The keys' up-projection goes into the query."""
    D = q.shape[-1] - rope_dim
    q_latent = torch.einsum("bhtd, hdr -> bhtr", q[..., :D], kv_up[:, :D])
    return torch.cat((q_latent, q[..., D:]), dim=-1)


def unfold_up(
    latent: Float[Tensor, "B H T R"], kv_up: Float[Tensor, "H DDv R"], head_dim: int
) -> Float[Tensor, "B H T Dv"]:
    """The heads' outputs, W_uv c̄, of latents c̄ that were averaged with the attention weights."""
    return torch.einsum("bhtr, hdr -> bhtd", latent, kv_up[:, head_dim:])


# One token per row over its latents: q_latent (B, H, R), q_rope (B, H, Dr), cache (B, S, R + Dr), lengths
# (B,) int32, and scale= -> (B, H, R); kvlearn.kernels.decode_latent, for one.
LatentStep = Callable[..., Tensor]


def absorbed_step(
    decode: LatentStep,
    q: Float[Tensor, "B H 1 DDr"],
    latents: Float[Tensor, "B S RDr"],
    kv_up: Float[Tensor, "H DDv R"],
    positions: Int[Tensor, "#B 1"],
    scale: float,
) -> Float[Tensor, "B H 1 Dv"]:
    """``absorbed_attention`` of one token per row, with ``decode`` for the attention to the latents."""
    R = kv_up.shape[2]
    rope_dim = latents.shape[-1] - R
    q_latent, q_rope = fold_up(q, kv_up, rope_dim)[:, :, 0].split((R, rope_dim), dim=-1)
    lengths = (positions[:, 0] + 1).expand(len(q)).to(torch.int32)
    out = decode(q_latent, q_rope, latents, lengths, scale=scale)
    return unfold_up(out[:, :, None], kv_up, q.shape[-1] - rope_dim)


# The layer


@register("mla")
class MultiHeadLatentAttention(Mechanism):
    """Multi-head latent attention: the complete layer of DeepSeek-V2, V3 and their successors.

        c = norm(W_c x),  r = W_r x;     q = W_uq norm(W_dq x),  or W_q x without ``q_rank``
        head = Σ_s softmax_s(scale · [q, RoPE(q_r)] · k_s) v_s,     y = [head_1 … head_H] W_o

    with k_s and v_s as above. Cache: B · max_len · (R + Dr) numbers, all of them read by a step, once for all
    heads. The query's latent saves no cache; it saves weights, and activations in training.

    ``rank`` is 4 · D unless given, the paper's choice, or the heads' width H · (D + Dv) where that is less.
    ``scale`` of the scores is 1/√(D + Dr) unless given; DeepSeek multiplies it by mscale² where YaRN
    stretches the context. ``absorb`` names the path that a call takes: True or False, or None for the one
    with fewer FLOPs (without a cache, as in training, the naive one). ``decode_latent_step``,
    where it is set, computes the absorbed steps of one token.

    Positions, by ``rope_dim`` (None: half a head; 0 without ``rope``):
    - Dr > 0, *decoupled*: only r and the queries' last Dr numbers are rotated; the latent is not, and W_uk
      can be absorbed (DeepSeek-V2, equations 14 to 18).
    - 0 with ``rope``: the decompressed keys are rotated. Exact, but a rotation that differs from key to key
      is between query and W_uk, so nothing can be absorbed (Chang et al., "Palu", 2024).

    Raises ValueError for a ``rank`` above the heads' width, for an odd ``rope_dim``, and for ``absorb=True``
    with rotated decompressed keys.
    Source: DeepSeek-AI, "DeepSeek-V2" (2024), equations 9 to 19; 3.1.2 for the ranks.
    """

    absorb: bool | None = None
    decode_latent_step: LatentStep | None = None

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        rank: int | None = None,
        q_rank: int | None = None,
        rope_dim: int | None = None,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        rope: RopeConfig | None = RopeConfig(),
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        self.v_head_dim = self.head_dim if v_head_dim is None else validate.positive("v_head_dim", v_head_dim)
        width = self.n_heads * (self.head_dim + self.v_head_dim)
        self.rank = check_rank(min(4 * self.head_dim, width) if rank is None else rank, width)
        self.rope_dim = rotary_width(rope_dim, self.head_dim, rope)
        self.scale = (self.head_dim + self.rope_dim) ** -0.5
        if scale is not None:
            self.scale = validate.above("scale", validate.in_fp32("scale", scale), 0)
        validate.above("norm_eps", norm_eps, 0)
        self.rope = Rope(self.rope_dim or self.head_dim, rope)
        self.kv_up = nn.Linear(self.rank, width, bias=False)
        self.o_proj = nn.Linear(self.n_heads * self.v_head_dim, d_model, bias=False)
        q_width = self.n_heads * (self.head_dim + self.rope_dim)
        self.q_rank = None if q_rank is None else validate.positive("q_rank", q_rank)
        if self.q_rank is None:
            self.q_proj = nn.Linear(d_model, q_width, bias=False)
        else:
            self.q_down = nn.Linear(d_model, self.q_rank, bias=False)
            self.q_norm = nn.RMSNorm(self.q_rank, eps=norm_eps)
            self.q_up = nn.Linear(self.q_rank, q_width, bias=False)
        self.kv_down = nn.Linear(d_model, self.rank + self.rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(self.rank, eps=norm_eps)

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, LatentCache, source)
        T, D = x.shape[1], self.head_dim
        absorb = self.absorbs(T, None if cache is None else cache.length)
        positions = token_positions(x, cache)

        q = self.q_proj(x) if self.q_rank is None else self.q_up(self.q_norm(self.q_down(x)))
        q = split_heads(q, self.n_heads)  # (B, H, T, D + Dr)
        latent, k_rope = self.kv_down(x).split((self.rank, self.rope_dim), dim=-1)
        latent = self.kv_norm(latent)  # (B, T, R)
        if self.rope_dim:
            q = torch.cat((q[..., :D], self.rope(q[..., D:], positions)), dim=-1)
            k_rope = self.rope(k_rope[:, None], positions)[:, 0]  # (B, T, Dr)
        else:
            q = self.rope(q, positions)

        if isinstance(cache, LatentCache):
            latents = cache.append(latent, k_rope)  # (B, S, R + Dr)
        else:
            latents = torch.cat((latent, k_rope), dim=-1)

        if not absorb:  # decompress S tokens
            key_rope = None if self.rope_dim else self.rope
            heads = naive_attention(q, latents.to(q.dtype), self.up, positions, self.scale, key_rope)
        elif self.decode_latent_step is None or cache is None or T > 1:  # fold T queries, unfold T outputs
            heads = absorbed_attention(q, latents.to(q.dtype), self.up, positions, self.scale)
        else:
            heads = absorbed_step(self.decode_latent_step, q, latents, self.up, positions, self.scale)
        return self.o_proj(merge_heads(heads))

    @property
    def up(self) -> Float[Tensor, "H DDv R"]:
        """The up-projection by heads: of each, D rows W_uk, then Dv rows W_uv. A view of ``kv_up.weight``."""
        return self.kv_up.weight.unflatten(0, (self.n_heads, -1))

    @property
    def k_up(self) -> Float[Tensor, "H D R"]:
        """W_uk of every head, a view that may be written to."""
        return self.up[:, : self.head_dim]

    @property
    def v_up(self) -> Float[Tensor, "H Dv R"]:
        """W_uv of every head, a view that may be written to."""
        return self.up[:, self.head_dim :]

    @property
    def absorbable(self) -> bool:
        """Whether the up-projection can be absorbed: not where decompressed keys are rotated."""
        return self.rope.config is None or self.rope_dim > 0

    def absorbs(self, new: int, cached: int | None) -> bool:
        """Whether a call with ``new`` tokens after ``cached`` ones takes the absorbed path; None: no cache.

        Raises ValueError for ``absorb=True`` where ``absorbable`` is False.
        """
        check_absorb(self.absorb, self.absorbable)
        if self.absorb is not None or cached is None or not self.absorbable:
            return bool(self.absorb)
        sizes = (self.n_heads, self.head_dim, self.rank, self.rope_dim)
        return absorbed_wins(*sizes, new=new, cached=cached, v_head_dim=self.v_head_dim)

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        H, D, R, wide = self.n_heads, self.head_dim, self.rank, upcast(x)
        if self.q_rank is None:
            q = wide @ upcast(self.q_proj.weight).T
        else:
            q = rms_norm_naive(wide @ upcast(self.q_down.weight).T, self.q_norm) @ upcast(self.q_up.weight).T
        q = q.reshape(len(x), x.shape[1], H, -1)  # (B, T, H, D + Dr)
        down = wide @ upcast(self.kv_down.weight).T
        latent, k_rope = rms_norm_naive(down[..., :R], self.kv_norm), down[:, :, None, R:]
        heads = latent_attention_naive(
            q, latent, k_rope, upcast(self.kv_up.weight), D, self.scale, self.rope.config
        )
        return (heads @ upcast(self.o_proj.weight).T).to(x.dtype)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LatentCache:
        return LatentCache(batch, max_len, self.rank, self.rope_dim, *self.dtype_and_device(dtype, device))

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · max_len · (R + Dr) · bytes per number."""
        numbers = validate.positive("max_len", max_len) * (self.rank + self.rope_dim)
        return self.to_bytes(numbers, batch, dtype)

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Everything stored so far, once for all heads: B · length · (R + Dr) · bytes per number.

        (The absorbed path reads no more; the naive one also writes and reads what it decompresses.)
        """
        numbers = validate.positive("length", length) * (self.rank + self.rope_dim)
        return self.to_bytes(numbers, batch, dtype)

    @classmethod
    def tiny(cls) -> "MultiHeadLatentAttention":
        return cls(d_model=24, n_heads=3, head_dim=8, v_head_dim=6, rank=12, q_rank=16, rope_dim=4)


# Shared with mhc.py and dsa.py


def check_rank(rank: int, heads_width: int) -> int:
    """``rank``, if it is positive and no wider than the keys and values of all heads."""
    why = "the heads' width, n_heads · (head_dim + v_head_dim)"
    return validate.at_most("rank", validate.positive("rank", rank), heads_width, why)


def rotary_width(rope_dim: int | None, head_dim: int, rope: RopeConfig | None) -> int:
    """Dr: ``rope_dim``, if it is even; or for None half a head made even, and 0 without ``rope``."""
    if rope_dim is None:
        return 0 if rope is None else max(head_dim // 4 * 2, 2)
    if validate.at_least("rope_dim", rope_dim, 0) % 2:
        raise ValueError(f"rope_dim: expected an even number, got {rope_dim}")
    return rope_dim


def check_absorb(absorb: bool | None, absorbable: bool) -> None:
    """Raise ValueError if ``absorb=True`` is given with rotated decompressed keys."""
    if absorb and not absorbable:
        raise ValueError("absorb: expected None or False: keys are rotated after decompression, got True")


def latent_attention_naive(
    q: Float[Tensor, "B T H DDr"],
    latent: Float[Tensor, "B T R"],
    k_rope: Float[Tensor, "B T 1 Dr"],
    kv_up: Float[Tensor, "HDDv R"],
    head_dim: int,
    scale: float,
    rope: RopeConfig | None,
) -> Float[Tensor, "B T HDv"]:
    """Heads' outputs, token by token, from queries and keys that are not rotated yet: the equations above."""
    T, H = q.shape[1:3]
    D, up = head_dim, kv_up.reshape(H, -1, latent.shape[-1])
    k = torch.stack([latent @ up[h, :D].T for h in range(H)], dim=2)  # (B, T, H, D)
    v = torch.stack([latent @ up[h, D:].T for h in range(H)], dim=2)  # (B, T, H, Dv)
    if k_rope.shape[-1]:
        q, q_rope, k_rope = q[..., :D], rotate_naive(q[..., D:], rope), rotate_naive(k_rope, rope)
    else:
        q, q_rope, k = rotate_naive(q, rope), q[..., D:], rotate_naive(k, rope)
    heads = torch.zeros_like(v)
    for t in range(T):
        for h in range(H):
            scores = torch.einsum("bd, bsd -> bs", q[:, t, h], k[:, : t + 1, h])
            scores = scores + torch.einsum("bd, bsd -> bs", q_rope[:, t, h], k_rope[:, : t + 1, 0])
            weights = (scores * scale).softmax(-1)
            heads[:, t, h] = torch.einsum("bs, bsd -> bd", weights, v[:, : t + 1, h])
    return heads.flatten(2)


# The cost of both paths on paper
#
# For ``new`` tokens (T) of a sequence after ``cached`` ones, S = cached + T tokens are in the cache, and the
# causal mask lets P = T · cached + T · (T + 1) / 2 pairs through. A multiplication with its addition is 2
# FLOPs. The common work (projections of x, softmax, RoPE, output matrix) is not counted.


AttentionPath = Literal["naive", "absorbed"]


def path_flops(
    path: AttentionPath,
    n_heads: int,
    head_dim: int,
    rank: int,
    rope_dim: int,
    *,
    new: int,
    cached: int = 0,
    v_head_dim: int | None = None,
    batch: int = 1,
) -> int:
    """FLOPs from queries and latents to the heads' outputs.

    naive     2 · B · H · (S · R · (D + Dv)  +  P · (D + Dr + Dv))    all S tokens decompressed
    absorbed  2 · B · H · (T · R · (D + Dv)  +  P · (2R + Dr))        T queries folded, T outputs unfolded
    """
    n_heads, head_dim, rank, rope_dim, new, cached, value_dim, batch = _check_sizes(
        path, n_heads, head_dim, rank, rope_dim, new, cached, v_head_dim, batch
    )
    pairs = new * cached + new * (new + 1) // 2
    if path == "naive":
        projected, width = cached + new, head_dim + rope_dim + value_dim
    else:
        projected, width = new, 2 * rank + rope_dim
    return 2 * batch * n_heads * (projected * rank * (head_dim + value_dim) + pairs * width)


def path_bytes(
    path: AttentionPath,
    n_heads: int,
    head_dim: int,
    rank: int,
    rope_dim: int,
    *,
    new: int,
    cached: int = 0,
    v_head_dim: int | None = None,
    batch: int = 1,
    itemsize: int = 4,
) -> int:
    """Bytes moved: cache, W_uk and W_uv, queries and outputs once; intermediate results written and read.

    Intermediate results are the decompressed keys and values on the naive path, 2 · B · S · H · (D + Dv)
    numbers, and the queries and outputs in the latent space on the absorbed one, 2 · B · T · H · (2R + Dr).
    Scores stay on the chip.
    """
    n_heads, head_dim, rank, rope_dim, new, cached, value_dim, batch = _check_sizes(
        path, n_heads, head_dim, rank, rope_dim, new, cached, v_head_dim, batch
    )
    tokens, heads = cached + new, head_dim + value_dim
    ends = batch * (tokens * (rank + rope_dim) + new * n_heads * (heads + rope_dim))
    between = tokens * heads if path == "naive" else new * (2 * rank + rope_dim)
    return itemsize * (ends + n_heads * heads * rank + 2 * batch * n_heads * between)


def absorbed_wins(
    n_heads: int,
    head_dim: int,
    rank: int,
    rope_dim: int,
    *,
    new: int,
    cached: int = 0,
    v_head_dim: int | None = None,
) -> bool:
    """Whether the absorbed path does fewer FLOPs for this call."""
    sizes = (n_heads, head_dim, rank, rope_dim)
    naive, absorbed = (
        path_flops(path, *sizes, new=new, cached=cached, v_head_dim=v_head_dim)
        for path in ("naive", "absorbed")
    )
    return absorbed < naive


def crossover(head_dim: int, rank: int, v_head_dim: int | None = None, cached: int | None = None) -> float:
    """The number T of new tokens at which both paths do as many FLOPs; for fewer the absorbed path does less.

    Folding a query and unfolding its output costs R · (D + Dv) per head, exactly what the naive path pays to
    decompress that new token, so both cancel. It remains to compare decompressing the cached tokens with
    the wider scores and outputs of all pairs:

        cached · R · (D + Dv) = P · (2R - D - Dv),    P = T · cached + T · (T + 1) / 2

    With ``cached`` None it is the limit of a long cache, T = R · (D + Dv) / (2R - D - Dv); for DeepSeek-V3
    170.7, and 158.3 after 1024 tokens. Infinite where the latent is no wider than a head's key and value
    together (2R ≤ D + Dv). Independent of the number of heads and of the rotary part.
    """
    sizes = _check_sizes("naive", 1, head_dim, rank, 0, 1, 0, v_head_dim, 1)
    head_dim, rank, value_dim = sizes[1], sizes[2], sizes[6]
    saved = 2 * rank - head_dim - value_dim
    if saved <= 0:
        return math.inf
    limit = rank * (head_dim + value_dim) / saved
    if cached is None:
        return limit
    cached = validate.positive("cached", cached)
    half = cached + 0.5
    # The positive root of T² / 2 + half · T - cached · limit.
    return 2 * cached * limit / (half + math.sqrt(half**2 + 2 * cached * limit))


def _check_sizes(
    path: AttentionPath,
    n_heads: int,
    head_dim: int,
    rank: int,
    rope_dim: int,
    new: int,
    cached: int,
    v_head_dim: int | None,
    batch: int,
) -> tuple[int, ...]:
    """The arguments of all of these but ``path``, checked, and the width of a head's value."""
    validate.one_of("path", path, ("naive", "absorbed"))
    return (
        validate.positive("n_heads", n_heads),
        validate.positive("head_dim", head_dim),
        validate.positive("rank", rank),
        validate.at_least("rope_dim", rope_dim, 0),
        validate.positive("new", new),
        validate.at_least("cached", cached, 0),
        validate.positive("v_head_dim", head_dim if v_head_dim is None else v_head_dim),
        validate.positive("batch", batch),
    )
