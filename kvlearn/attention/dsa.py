"""DeepSeek sparse attention (DSA): latent attention to the few tokens that an indexer selects.

A *lightning indexer*, a narrow scorer, scores every token s for every later token t by J small heads, which
share one key per token; attention as in MLA (mla.py) then reads the ``top_k`` tokens of highest score alone:

    I_ts = Σ_j w_tj ReLU(q_tj · κ_s),     S_t = the top_k tokens s ≤ t of largest I_ts
    head_t = Σ_{s ∈ S_t} softmax_{S_t}(scale · q_t · k_s) v_s

Letters beside those of core.py: J index heads, Di numbers of an index key, K tokens selected, A numbers of a
compressed query.

Source: DeepSeek-AI, "DeepSeek-V3.2" (2025), equations 1 and 2.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kvlearn import validate
from kvlearn.attention.base import KV, Cache, Mechanism, register, token_positions
from kvlearn.attention.core import (
    causal_mask,
    causal_mask_at,
    merge_heads,
    rms_norm_naive,
    split_heads,
    upcast,
)
from kvlearn.attention.mla import (
    LatentCache,
    LatentStep,
    absorbed_attention,
    absorbed_step,
    check_rank,
    fold_up,
    rotary_width,
)
from kvlearn.attention.rope import Rope, RopeConfig, rotate_naive

# The indexer: scores, selection and loss. (deepseek_v4.py uses these functions over entries, not tokens.)


class IndexQuery(NamedTuple):
    """The search input of tokens: the queries of J index heads, and the weight of each head's score."""

    q: Float[Tensor, "B J T Di"]
    weight: Float[Tensor, "B J T"]

    def part(self, tokens: slice) -> "IndexQuery":
        return IndexQuery(self.q[:, :, tokens], self.weight[:, :, tokens])


def index_scores(query: IndexQuery, keys: Float[Tensor, "B S Di"]) -> Float[Tensor, "B T S"]:
    """I_ts = Σ_j w_tj ReLU(q_tj · κ_s) of all pairs, in fp32 at least; holds J numbers per pair meanwhile."""
    q, weight = (upcast(part) for part in query)
    each = torch.relu(q @ keys.to(q.dtype)[:, None].mT)  # (B, J, T, S)
    return torch.einsum("bjt, bjts -> bts", weight, each)


@torch.no_grad()
def select_top_k(
    query: IndexQuery, keys: Float[Tensor, "B S Di"], visible: Bool[Tensor, "#B T S"], top_k: int
) -> Int[Tensor, "B T K"]:
    """The visible keys of highest score, best first; K is ``top_k``, or S where that is less.

    Where fewer than K are visible to a query, those come first, and then others, which it must not read. Of
    equal scores (0, where no head has an answer) the earlier key is taken, so that the selection does not
    depend on how a sequence was cut.
    """
    scores = index_scores(query, keys).masked_fill(~visible, -torch.inf)
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]


def indexer_loss(
    scores: Float[Tensor, "B T S"],
    attention_scores: Float[Tensor, "B H T S"],
    visible: Bool[Tensor, "#B T S"],
) -> Float[Tensor, ""]:
    """Mean over t of KL(p_t ‖ softmax(I_t)), p_t = the mean over the heads of softmax(attention's scores).

    It trains an indexer, which no loss on the output reaches: ``scores`` approach attention's weights.
    ``attention_scores`` get no gradient. Both softmaxes go over the ``visible`` keys, of which every query
    needs at least one. Source: DeepSeek-AI, "DeepSeek-V3.2" (2025), equation 3 where all of a query's past is
    visible, 4 where only the selected tokens are.
    """
    target = attention_scores.detach().masked_fill(~visible[:, None], -torch.inf).softmax(-1).mean(1)
    # The lowest finite number, not -inf: a weight of 0 times that is 0, and not NaN.
    predicted = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).log_softmax(-1)
    return F.kl_div(predicted, target, reduction="sum") / target.shape[:2].numel()


class LightningIndexer(nn.Module):
    """The index queries and keys of tokens.

        q = RoPE(W_q a),   κ = RoPE(LayerNorm(W_k x)),   w = W_w x / √(J · Di)

    a is the input of attention's query projection: the queries' latent, or x. The first ``rope_dim`` numbers
    of q and κ are rotated. Every pair is scored, O(N²), but cheaply: J · Di multiplications, where absorbed
    attention takes H · (2R + Dr). For DeepSeek-V3.2 that is 8,192 in place of 139,264.

    Raises ValueError for a ``rope_dim`` that is odd or above ``index_dim``. Source: DeepSeek-AI,
    "DeepSeek-V3.2" (2025), equation 1; the norm, the order and the constant are those of its released code.
    """

    def __init__(
        self,
        d_model: int,
        query_width: int,
        *,
        index_heads: int,
        index_dim: int,
        top_k: int,
        rope_dim: int,
        rope: RopeConfig | None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.index_heads = validate.positive("index_heads", index_heads)
        self.index_dim = validate.positive("index_dim", index_dim)
        self.top_k = validate.positive("top_k", top_k)
        if rope is not None:
            validate.at_most("rope_dim", rope_dim, index_dim, "index_dim")
        self.rope = Rope(rope_dim, rope)
        self.q_proj = nn.Linear(query_width, self.index_heads * self.index_dim, bias=False)
        self.k_proj = nn.Linear(d_model, self.index_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.index_dim, eps=validate.above("norm_eps", norm_eps, 0))
        self.weight_proj = nn.Linear(d_model, self.index_heads, bias=False)

    def query(
        self, a: Float[Tensor, "B T A"], x: Float[Tensor, "B T M"], positions: Int[Tensor, "#B T"]
    ) -> IndexQuery:
        q = self.rotate(split_heads(self.q_proj(a), self.index_heads), positions)
        return IndexQuery(q, self.weight_proj(x).mT * (self.index_heads * self.index_dim) ** -0.5)

    def keys(self, x: Float[Tensor, "B T M"], positions: Int[Tensor, "#B T"]) -> Float[Tensor, "B T Di"]:
        return self.rotate(self.k_norm(self.k_proj(x))[:, None], positions)[:, 0]

    def rotate(
        self, heads: Float[Tensor, "B J T Di"], positions: Int[Tensor, "#B T"]
    ) -> Float[Tensor, "B J T Di"]:
        if self.rope.config is None:
            return heads
        rotated, rest = heads.split((self.rope.head_dim, self.index_dim - self.rope.head_dim), dim=-1)
        return torch.cat((self.rope(rotated, positions), rest), dim=-1)

    def select(
        self, query: IndexQuery, keys: Float[Tensor, "B S Di"], positions: Int[Tensor, "#B T"]
    ) -> Int[Tensor, "B T K"]:
        """The slots each token reads: the best of those at or before its position."""
        return select_top_k(query, keys, causal_mask_at(positions, keys.shape[1])[:, 0], self.top_k)

    def naive(
        self, a: Float[Tensor, "B T A"], x: Float[Tensor, "B T M"]
    ) -> tuple[Float[Tensor, "B T J Di"], Float[Tensor, "B T Di"], Float[Tensor, "B T J"]]:
        """q, κ and w written again from the equations above, for tokens at positions 0, 1, 2, …"""
        n = self.rope.head_dim if self.rope.config is not None else 0
        q = (a @ upcast(self.q_proj.weight).T).reshape(*x.shape[:2], self.index_heads, self.index_dim)
        k = x @ upcast(self.k_proj.weight).T
        k = k - k.mean(dim=-1, keepdim=True)
        k = k / (k.square().mean(dim=-1, keepdim=True) + self.k_norm.eps).sqrt()
        k = (k * upcast(self.k_norm.weight) + upcast(self.k_norm.bias))[:, :, None]
        q, k = (torch.cat((rotate_naive(z[..., :n], self.rope.config), z[..., n:]), dim=-1) for z in (q, k))
        weight = x @ upcast(self.weight_proj.weight).T / (self.index_heads * self.index_dim) ** 0.5
        return q, k[:, :, 0], weight


# The cache and the layer


class IndexedLatentCache(LatentCache):
    """Latents, rotated keys and, in a tensor of their own since they are read apart, the index keys."""

    def __init__(
        self,
        batch: int,
        max_len: int,
        rank: int,
        rope_dim: int,
        index_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(batch, max_len, rank, rope_dim, dtype, device)
        self.index_dim = validate.positive("index_dim", index_dim)
        self.index_keys = torch.zeros(batch, max_len, index_dim, dtype=dtype, device=device)

    def tensors(self) -> list[Tensor]:
        return [self.latents, self.index_keys]

    def append_indexed(
        self,
        latent: Float[Tensor, "B T R"],
        k_rope: Float[Tensor, "B T Dr"],
        index_key: Float[Tensor, "B T Di"],
    ) -> tuple[Float[Tensor, "B S RDr"], Float[Tensor, "B S Di"]]:
        """``append`` with the tokens' index keys; returns views of both."""
        shape = (self.batch, latent.shape[1], self.index_dim)
        validate.tensor("index_key", index_key, shape, device=self.device)
        positions = self.positions(latent.shape[1]).expand(self.batch, -1)
        latents = self.append(latent, k_rope)
        new = index_key.detach().to(self.index_keys.dtype)
        self.index_keys.scatter_(1, positions[..., None].expand(new.shape), new)
        return latents, self.index_keys[:, : self.length]


@register("dsa")
class DeepSeekSparseAttention(Mechanism):
    """The layer of DeepSeek-V3.2: MLA over the tokens that a lightning indexer selects.

        c = norm(W_c x),  r = W_r x;     q = W_uq norm(W_dq x),  or W_q x without ``q_rank``
        head_t = Σ_{s ∈ S_t} softmax_{S_t}(scale · [q, RoPE(q_r)] · k_s) v_s,     y = [head_1 … head_H] W_o

    with k_s and v_s as in mla.py. Cache: B · max_len · (R + Dr + Di) numbers, the latent and an index key:
    more is *stored* than by MLA. A step *reads* all index keys and ``top_k`` latents. All queries, of a
    prefill too, gather their own latents and take the absorbed path, ``block`` queries at a time: B · block ·
    (J · S + K · (R + Dr)) numbers are held, never (J, N, N) or (H, N, N). (With gradients, gathered latents
    are kept for the backward pass.) ``decode_latent_step``, where it is set, gets the gathered latents.

    The selection has no gradient, so no loss on the output trains ``auxiliary_parameters``:
    ``indexer_loss`` does. ``index_dim`` is the head's width unless given, as in DeepSeek-V3.2, or
    ``rope_dim`` where that is more; that model has 64 index heads for 128 heads. The other options are those
    of ``mla``.

    Raises ValueError for ``rope_dim`` 0 with ``rope`` (keys that are rotated after decompression would have
    to be decompressed), and for ``absorb=False``. Source: DeepSeek-AI, "DeepSeek-V3.2" (2025), equations 1
    and 2.
    """

    chooses_by_content = True
    auxiliary_parameters = ("indexer.",)
    absorb: bool | None = None  # as of ``mla``, so that both can be set alike
    decode_latent_step: LatentStep | None = None
    block = 64

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
        top_k: int = 2048,
        index_heads: int = 64,
        index_dim: int | None = None,
        rope: RopeConfig | None = RopeConfig(),
    ) -> None:
        super().__init__(d_model, n_heads, head_dim)
        self.v_head_dim = self.head_dim if v_head_dim is None else validate.positive("v_head_dim", v_head_dim)
        width = self.n_heads * (self.head_dim + self.v_head_dim)
        self.rank = check_rank(min(4 * self.head_dim, width) if rank is None else rank, width)
        self.rope_dim = rotary_width(rope_dim, self.head_dim, rope)
        if rope is not None and self.rope_dim == 0:
            raise ValueError("rope_dim: expected at least 2 with rope, got 0")
        self.scale = (self.head_dim + self.rope_dim) ** -0.5
        if scale is not None:
            self.scale = validate.above("scale", validate.in_fp32("scale", scale), 0)
        validate.above("norm_eps", norm_eps, 0)
        self.rope = Rope(self.rope_dim, rope)
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
        self.indexer = LightningIndexer(
            d_model,
            self.q_rank or d_model,
            index_heads=index_heads,
            index_dim=max(self.head_dim, self.rope_dim) if index_dim is None else index_dim,
            top_k=top_k,
            rope_dim=self.rope_dim,
            rope=rope,
        )

    def forward(
        self, x: Float[Tensor, "B T M"], cache: Cache | None = None, source: KV | None = None
    ) -> Float[Tensor, "B T M"]:
        self.check_inputs(x, cache, IndexedLatentCache, source)
        if self.absorb is False:
            raise ValueError(
                "absorb: expected None or True: selected latents are not decompressed, got False"
            )
        positions = token_positions(x, cache)
        q, latent, k_rope = self.project(x, positions)  # (B, H, T, D + Dr), (B, T, R), (B, T, Dr)
        index_query, index_keys = self.index(x, positions)
        if isinstance(cache, IndexedLatentCache):
            latents, index_keys = cache.append_indexed(latent, k_rope, index_keys)
        else:
            latents = torch.cat((latent, k_rope), dim=-1)  # (B, S, R + Dr)
        heads = []
        for now in self.blocks(x.shape[1]):
            slots = self.select(index_query, index_keys, positions, now)  # (B, C, K)
            heads.append(self.attend(q[:, :, now], latents, slots, positions[:, now]))
        return self.o_proj(merge_heads(torch.cat(heads, dim=2)))

    def project(
        self, x: Float[Tensor, "B T M"], positions: Int[Tensor, "#B T"]
    ) -> tuple[Float[Tensor, "B H T DDr"], Float[Tensor, "B T R"], Float[Tensor, "B T Dr"]]:
        """Queries, latents and shared keys of MLA, rotated to their positions."""
        D = self.head_dim
        q = self.q_proj(x) if self.q_rank is None else self.q_up(self.q_norm(self.q_down(x)))
        q = split_heads(q, self.n_heads)
        latent, k_rope = self.kv_down(x).split((self.rank, self.rope_dim), dim=-1)
        if self.rope.config is not None:
            q = torch.cat((q[..., :D], self.rope(q[..., D:], positions)), dim=-1)
            k_rope = self.rope(k_rope[:, None], positions)[:, 0]
        return q, self.kv_norm(latent), k_rope

    def index(
        self, x: Float[Tensor, "B T M"], positions: Int[Tensor, "#B T"]
    ) -> tuple[IndexQuery, Float[Tensor, "B T Di"]]:
        """Index queries and keys of the tokens; ``x`` and the query's latent get no gradient from them."""
        x = x.detach()
        with torch.no_grad():
            a = x if self.q_rank is None else self.q_norm(self.q_down(x))
        return self.indexer.query(a, x, positions), self.indexer.keys(x, positions)

    def blocks(self, n_tokens: int) -> list[slice]:
        return [slice(t, min(t + self.block, n_tokens)) for t in range(0, n_tokens, self.block)]

    def select(
        self,
        query: IndexQuery,
        keys: Float[Tensor, "B S Di"],
        positions: Int[Tensor, "#B T"],
        now: slice,
    ) -> Int[Tensor, "B C K"]:
        """The slots that the tokens ``now`` read. No key after the last of these tokens is visible."""
        visible = keys.shape[1] - positions.shape[1] + now.stop
        return self.indexer.select(query.part(now), keys[:, :visible], positions[:, now])

    def attend(
        self,
        q: Float[Tensor, "B H C DDr"],
        latents: Float[Tensor, "B S RDr"],
        slots: Int[Tensor, "B C K"],
        positions: Int[Tensor, "#B C"],
    ) -> Float[Tensor, "B H C Dv"]:
        """Each query as a row of its own: one token over a short cache of its selected latents."""
        B, C, K = slots.shape
        gathered = latents[torch.arange(B, device=q.device)[:, None, None], slots].flatten(0, 1).to(q.dtype)
        rows = q.transpose(1, 2).flatten(0, 1)[:, :, None]  # (B · C, H, 1, D + Dr)
        last = positions.clamp(max=K - 1).expand(B, C).reshape(-1, 1)  # later slots must not be read
        if C == 1 and self.decode_latent_step is not None and not torch.is_grad_enabled():
            heads = absorbed_step(self.decode_latent_step, rows, gathered, self.up, last, self.scale)
        else:
            heads = absorbed_attention(rows, gathered, self.up, last, self.scale)
        return heads[:, :, 0].unflatten(0, (B, C)).transpose(1, 2)

    @property
    def up(self) -> Float[Tensor, "H DDv R"]:
        """The up-projection by heads: of each, D rows W_uk, then Dv rows W_uv. A view of ``kv_up.weight``."""
        return self.kv_up.weight.unflatten(0, (self.n_heads, -1))

    @torch.no_grad()
    def selection(self, x: Float[Tensor, "B T M"]) -> Bool[Tensor, "B T T"]:
        """Which tokens (last dimension) each token reads, True where it does."""
        B, T, _ = x.shape
        positions = torch.arange(T, device=x.device)[None]
        query, keys = self.index(x, positions)
        mask = torch.zeros(B, T, T, dtype=torch.bool, device=x.device)
        for now in self.blocks(T):
            mask[:, now].scatter_(-1, self.select(query, keys, positions, now), True)
        return mask & causal_mask(T, T, x.device)

    def indexer_loss(self, x: Float[Tensor, "B T M"], dense: bool = False) -> Float[Tensor, ""]:
        """The loss of the indexer alone: the function ``indexer_loss`` over the selected tokens.

        With ``dense`` it goes over the whole past, as for an indexer that selects nothing useful yet. Holds
        (H, T, T) numbers.
        """
        positions = torch.arange(x.shape[1], device=x.device)[None]
        with torch.no_grad():
            visible = causal_mask_at(positions, x.shape[1])[:, 0] if dense else self.selection(x)
            q, latent, k_rope = self.project(x, positions)
            latents = upcast(torch.cat((latent, k_rope), dim=-1))[:, None]
            scores = upcast(fold_up(q, self.up, self.rope_dim)) @ latents.mT * self.scale
        return indexer_loss(index_scores(*self.index(x, positions)), scores, visible)

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        (B, T, _), H, D, R, wide = x.shape, self.n_heads, self.head_dim, self.rank, upcast(x)
        if self.q_rank is None:
            a, q = wide, wide @ upcast(self.q_proj.weight).T
        else:
            a = rms_norm_naive(wide @ upcast(self.q_down.weight).T, self.q_norm)
            q = a @ upcast(self.q_up.weight).T
        q = q.reshape(B, T, H, -1)  # (B, T, H, D + Dr)
        down = wide @ upcast(self.kv_down.weight).T
        latent = rms_norm_naive(down[..., :R], self.kv_norm)
        q_rope = rotate_naive(q[..., D:], self.rope.config)
        k_rope = rotate_naive(down[:, :, None, R:], self.rope.config)[:, :, 0]
        up = upcast(self.kv_up.weight).reshape(H, -1, R)
        with torch.no_grad():
            index_q, index_keys, index_weight = self.indexer.naive(a, wide)
        heads = torch.zeros(B, T, H, self.v_head_dim, dtype=q.dtype, device=q.device)
        for b in range(B):
            for t in range(T):
                answers = (index_keys[b, : t + 1] @ index_q[b, t].T).clamp_min(0)  # (t + 1, J)
                scores = (answers @ index_weight[b, t]).tolist()
                best = sorted(range(t + 1), key=lambda s: -scores[s])[: self.indexer.top_k]
                for h in range(H):
                    k = latent[b, best] @ up[h, :D].T
                    of_heads = k @ q[b, t, h, :D] + k_rope[b, best] @ q_rope[b, t, h]
                    v = latent[b, best] @ up[h, D:].T
                    heads[b, t, h] = (of_heads * self.scale).softmax(0) @ v
        return (heads.flatten(2) @ upcast(self.o_proj.weight).T).to(x.dtype)

    def new_cache(
        self,
        batch: int,
        max_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> IndexedLatentCache:
        sizes = (self.rank, self.rope_dim, self.indexer.index_dim)
        return IndexedLatentCache(batch, max_len, *sizes, *self.dtype_and_device(dtype, device))

    def cache_bytes(self, max_len: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · max_len · (R + Dr + Di) · bytes per number."""
        per_token = self.rank + self.rope_dim + self.indexer.index_dim
        return self.to_bytes(validate.positive("max_len", max_len) * per_token, batch, dtype)

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · (length · Di + min(length, top_k) · (R + Dr)) · bytes per number."""
        selected = min(validate.positive("length", length), self.indexer.top_k)
        numbers = length * self.indexer.index_dim + selected * (self.rank + self.rope_dim)
        return self.to_bytes(numbers, batch, dtype)

    @classmethod
    def tiny(cls) -> "DeepSeekSparseAttention":
        return cls(
            d_model=24,
            n_heads=3,
            head_dim=8,
            v_head_dim=6,
            rank=12,
            q_rank=16,
            rope_dim=4,
            top_k=4,
            index_heads=16,
            index_dim=8,
        )
