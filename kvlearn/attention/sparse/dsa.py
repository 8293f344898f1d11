"""DeepSeek sparse attention (DSA): latent attention to the few tokens that an indexer picks."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvlearn import validate
from kvlearn.attention.base import register
from kvlearn.attention.cache import KV, Cache
from kvlearn.attention.compressed.latent import absorbed_attention, fold_up
from kvlearn.attention.compressed.mla import MultiHeadLatentAttention
from kvlearn.attention.core import causal_mask, merge_heads, upcast, visible
from kvlearn.attention.rope import RopeConfig
from kvlearn.attention.sparse.indexer import IndexedLatentCache, LightningIndexer, Request
from kvlearn.attention.sparse.indexer_loss import choice_loss


@register("dsa")
class DeepSeekSparseAttention(MultiHeadLatentAttention):
    """MLA in which each token attends to the ``top_k`` tokens that a lightning indexer scores highest.

        S_t = Top-k_s I_ts  (indexer.py),   head_t = Σ_{s ∈ S_t} softmax_{S_t}(scale · q_t · k_s) v_s

    Cache: B · max_len · (R + Dr + Di) numbers, the latent and an index key: more is *stored* than by MLA. A
    step *reads* all index keys and ``top_k`` latents. All queries, of a prefill too, gather their own latents
    and take the absorbed road, ``block`` queries at a time: B · block · (J · S + K · (R + Dr)) numbers are
    held, never (J, N, N) or (H, N, N). (With a graph, what was gathered is kept for the backward pass.)
    ``decode_latent_step``, where it is set, gets the gathered latents.

    The choice has no gradient, so no loss on the output trains ``trained_apart``: that is what
    ``indexer_loss`` is for. ``index_dim`` is the head's width unless given, as in DeepSeek-V3.2, or
    ``rope_dim`` where that is more; that model has 64 index heads for 128 heads.

    Raises ValueError for ``rope_dim`` 0 with ``rope`` (keys that turn after decompression would have to be
    decompressed). Source: DeepSeek-AI, "DeepSeek-V3.2" (2025), equations 1 and 2.
    """

    chooses_by_content = True
    trained_apart = ("indexer.",)  # names, as they begin, of parameters that only a loss of their own reaches
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
        super().__init__(
            d_model,
            n_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            rank=rank,
            q_rank=q_rank,
            rope_dim=rope_dim,
            scale=scale,
            norm_eps=norm_eps,
            rope=rope,
        )
        if not self.absorbable:
            raise ValueError("rope_dim: expected at least 2 with rope, got 0")
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
        self.refuse(source)
        self.check(x, cache, IndexedLatentCache)
        self.absorbs(x.shape[1], 0)
        places = torch.arange(x.shape[1], device=x.device)[None]
        positions = places if cache is None else cache.positions(x.shape[1])
        q, new = self.rotated(x, positions)
        request, keys = self.index(x, positions)
        latents = torch.cat(new, dim=-1)
        if isinstance(cache, IndexedLatentCache):
            latents, keys = cache.append_indexed(*new, keys)
        heads = [
            self.attend(q[:, :, now], latents, self.chosen(request, keys, positions, now), positions[:, now])
            for now in self.blocks(x.shape[1])
        ]
        return self.o_proj(merge_heads(torch.cat(heads, dim=2)))

    def absorbs(self, new: int, cached: int, with_cache: bool = True) -> bool:
        if self.absorb is False:
            raise ValueError(
                "absorb: expected None or True: what was selected is not decompressed, got False"
            )
        return True

    def blocks(self, n_tokens: int) -> list[slice]:
        return [slice(t, min(t + self.block, n_tokens)) for t in range(0, n_tokens, self.block)]

    def index(self, x: Float[Tensor, "B T M"], positions: Int[Tensor, "#B T"]) -> tuple[Request, Tensor]:
        """What the tokens look for, and the index keys by which they are found; x gets no gradient by it."""
        x = x.detach()
        with torch.no_grad():
            a = x if self.q_rank is None else self.q_norm(self.q_down(x))
        return self.indexer.request(a, x, positions), self.indexer.keys(x, positions)

    def chosen(
        self, request: Request, keys: Float[Tensor, "B S Di"], positions: Int[Tensor, "#B T"], now: slice
    ) -> Int[Tensor, "B C K"]:
        """The slots that the tokens ``now`` read. None of these tokens sees beyond the last of them."""
        seen = keys.shape[1] - positions.shape[1] + now.stop
        return self.indexer.select(request.part(now), keys[:, :seen], positions[:, now])

    def attend(
        self,
        q: Float[Tensor, "B H C DDr"],
        latents: Float[Tensor, "B S RDr"],
        chosen: Int[Tensor, "B C K"],
        positions: Int[Tensor, "#B C"],
    ) -> Float[Tensor, "B H C Dv"]:
        """Each query as a row of its own, one token over its own short cache of the latents it has chosen."""
        B, C, K = chosen.shape
        gathered = latents[torch.arange(B, device=q.device)[:, None, None], chosen].flatten(0, 1).to(q.dtype)
        rows = q.transpose(1, 2).flatten(0, 1)[:, :, None]  # (B·C, H, 1, D + Dr)
        last = positions.clamp(max=K - 1).expand(B, C).reshape(-1, 1)  # behind it: what must not be read
        if C == 1 and self.decode_latent_step is not None and not torch.is_grad_enabled():
            heads = self.step(rows, gathered, last)
        else:
            heads = absorbed_attention(rows, gathered, self.up, last, self.scale)
        return heads[:, :, 0].unflatten(0, (B, C)).transpose(1, 2)

    @torch.no_grad()
    def selection(self, x: Float[Tensor, "B T M"]) -> Bool[Tensor, "B T T"]:
        """Which tokens (last dimension) each token reads, True where it does."""
        B, T, _ = x.shape
        positions = torch.arange(T, device=x.device)[None]
        request, keys = self.index(x, positions)
        mask = torch.zeros(B, T, T, dtype=torch.bool, device=x.device)
        for now in self.blocks(T):
            mask[:, now].scatter_(-1, self.chosen(request, keys, positions, now), True)
        return mask & causal_mask(T, T, x.device)

    def indexer_loss(self, x: Float[Tensor, "B T M"], dense: bool = False) -> Float[Tensor, ""]:
        """What trains the indexer, and it alone: ``choice_loss`` over the selected tokens.

        With ``dense`` it goes over the whole past, as for an indexer that selects nothing useful yet. Holds
        (H, T, T) numbers.
        """
        positions = torch.arange(x.shape[1], device=x.device)[None]
        with torch.no_grad():
            seen = visible(positions, x.shape[1])[:, 0] if dense else self.selection(x)
            q, new = self.rotated(x, positions)
            latents = upcast(torch.cat(new, dim=-1))[:, None]
            read = upcast(fold_up(q, self.up, self.rope_dim)) @ latents.mT * self.scale
        return choice_loss(self.indexer.scores(*self.index(x, positions)), read, seen)

    def naive(self, x: Float[Tensor, "B T M"]) -> Float[Tensor, "B T M"]:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        (q, new), (request, index_keys) = self.rotated(x, positions), self.index(x, positions)
        q, latents, index_keys = upcast(q), upcast(torch.cat(new, dim=-1)), upcast(index_keys)
        index_q, index_weight = (upcast(part) for part in request)
        heads = torch.empty(*q.shape[:3], self.v_head_dim, dtype=q.dtype, device=q.device)
        for b in range(len(x)):
            for t in range(x.shape[1]):
                answers = (index_q[b, :, t] @ index_keys[b, : t + 1].mT).clamp_min(0)  # (J, t + 1)
                scores = (index_weight[b, :, t] @ answers).tolist()
                best = sorted(range(t + 1), key=lambda s: -scores[s])[: self.indexer.top_k]
                latent, k_rope = latents[b, best].split((self.rank, self.rope_dim), dim=-1)
                k = torch.einsum("sr, hdr -> hsd", latent, upcast(self.k_up))
                v = torch.einsum("sr, hdr -> hsd", latent, upcast(self.v_up))
                k = torch.cat((k, k_rope.expand(self.n_heads, -1, -1)), dim=-1)
                weights = (torch.einsum("hd, hsd -> hs", q[b, :, t], k) * self.scale).softmax(-1)
                heads[b, :, t] = torch.einsum("hs, hsd -> hd", weights, v)
        return self.o_proj(merge_heads(heads).to(x.dtype))

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
        """B · max_len · (R + Dr + Di) · bytes a number."""
        index_keys = batch * max_len * self.indexer.index_dim * self.dtype_and_device(dtype)[0].itemsize
        return super().cache_bytes(max_len, batch=batch, dtype=dtype) + index_keys

    def read_bytes(self, length: int, *, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """B · (length · Di + min(length, top_k) · (R + Dr)) · bytes a number."""
        validate.positive("length", length)
        index_keys = batch * length * self.indexer.index_dim * self.dtype_and_device(dtype)[0].itemsize
        read = min(length, self.indexer.top_k)
        return super().cache_bytes(read, batch=batch, dtype=dtype) + index_keys

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
