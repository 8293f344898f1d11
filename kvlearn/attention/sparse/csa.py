"""Compressed sparse attention (CSA): compress the sequence, then let every token choose among the entries."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvlearn import validate
from kvlearn.attention.base import register
from kvlearn.attention.core import upcast
from kvlearn.attention.rope import RopeConfig
from kvlearn.attention.sparse.compressor import Compressor
from kvlearn.attention.sparse.entry_indexer import EntryIndexer
from kvlearn.attention.sparse.hca import HeavilyCompressedAttention
from kvlearn.attention.sparse.indexer import Request
from kvlearn.attention.sparse.indexer_loss import choice_loss


@register("csa")
class CompressedSparseAttention(HeavilyCompressedAttention):
    """As ``hca``, but blocks are short and overlap, and a token attends to the ``top_k`` entries it chooses.

        K_t = {k_s : t - W < s ≤ t} ∪ Top-k {e_i : (i + 1)·m ≤ t + 1} by I_ti          (``EntryIndexer``)

    A step of one token gathers the entries it has chosen and touches no other. A longer pass makes N · N/m
    scores and masks most of them.

    Cache: that of ``hca`` with twice as much for the tokens that wait and as many again to overlap with, and
    the same once more, Di wide, for the indexer: B · (min(max_len, W) · D + (⌊max_len / m⌋ + 2(3m - 2)) ·
    (D + Di)) numbers. A step reads all ⌊length / m⌋ keys of the index and min(top_k, ⌊length / m⌋) entries.

    The choice has no gradient, so no loss on the output trains ``trained_apart``: that is what
    ``indexer_loss`` is for. ``index_dim`` is D/4 unless given, or ``rope_dim`` where that is more, and
    ``index_heads`` H, as in DeepSeek-V4-Flash, whose m = 4 and top_k = 512 are the defaults.

    Raises ValueError for a ``rope_dim`` above ``index_dim``.
    Source: DeepSeek-AI, "DeepSeek-V4" (2026), section 2.3.1: equations 9 to 12 (entries), 13 to 17 (choice).
    """

    chooses_by_content = True
    trained_apart = ("indexer.",)  # names, as they begin, of parameters that only a loss of their own reaches
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
        validate.at_most("rope_dim", self.rope_dim, validate.positive("index_dim", index_dim), "index_dim")
        index_heads = self.n_heads if index_heads is None else index_heads
        compressor = self.new_compressor(index_dim)
        self.indexer = EntryIndexer(d_model, self.q_rank or d_model, index_heads, top_k, compressor)

    @property
    def compressors(self) -> list[Compressor]:
        return [self.compressor, self.indexer.compressor]

    def request(self, a: Float[Tensor, "B T A"], x: Float[Tensor, "B T M"], positions: Tensor) -> Request:
        return self.indexer.request(a.detach(), x.detach(), positions)

    def choose(
        self, memories: list[Tensor], request: Request | None, positions: Int[Tensor, "1 T"]
    ) -> tuple[Float[Tensor, "B 1 E D"], Bool[Tensor, "#B 1 T E"] | None]:
        """What was chosen: for one token those entries alone, for more all entries and a mask."""
        assert request is not None
        entries, keys = memories
        visible = self.visible(keys.shape[1], positions)
        chosen = self.indexer.best(request, keys, visible)
        if positions.shape[1] == 1:  # it sees all of these entries, so all that it has chosen
            at = chosen.mT.expand(-1, -1, entries.shape[2])
            return entries.gather(1, at).unsqueeze(1), None
        return entries.unsqueeze(1), self.mask(chosen, visible).unsqueeze(1)

    @torch.no_grad()
    def selection(self, x: Float[Tensor, "B T M"]) -> Bool[Tensor, "B T E"]:
        """Which entries each token attends to, True where it does."""
        positions = torch.arange(x.shape[1], device=x.device)[None]
        keys = self.indexer.compressor(x)
        visible = self.visible(keys.shape[1], positions)
        chosen = self.indexer.best(self.request(self.latent(x), x, positions), keys, visible)
        return self.mask(chosen, visible)

    def mask(self, chosen: Int[Tensor, "B T K"], visible: Bool[Tensor, "1 T E"]) -> Bool[Tensor, "B T E"]:
        return visible.expand(len(chosen), -1, -1) & torch.zeros(
            *chosen.shape[:2], visible.shape[2], dtype=torch.bool, device=chosen.device
        ).scatter(-1, chosen, True)

    def indexer_loss(self, x: Float[Tensor, "B T M"], dense: bool = False) -> Float[Tensor, ""]:
        """What trains the indexer, and it alone: ``choice_loss`` over the chosen entries.

        With ``dense`` it goes over all whole blocks. Tokens before the first of them do not count. Holds
        (H, T, E) numbers. Raises ValueError for a sequence without a whole block.
        """
        validate.at_least("x.shape[1] (time)", x.shape[1], self.rate)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        a, from_first = self.latent(x), slice(self.rate - 1, None)
        with torch.no_grad():
            entries = upcast(self.compressor(x))[:, None]
            seen = self.visible(entries.shape[2], positions) if dense else self.selection(x)
            read = upcast(self.queries(a, positions)) @ entries.mT * self.head_dim**-0.5
        scores = self.indexer.scores(self.request(a, x, positions), self.indexer.compressor(x.detach()))
        return choice_loss(scores[:, from_first], read[:, :, from_first], seen[:, from_first])

    @torch.no_grad()
    def naive_choice(self, x: Float[Tensor, "1 T M"], t: int) -> list[int]:
        q, weight = self.request(self.latent(x), x, torch.arange(x.shape[1], device=x.device)[None])
        scores = []
        for i in range((t + 1) // self.rate):
            answers = (upcast(q[0, :, t]) @ self.indexer.compressor.naive(x, i)[0]).clamp_min(0)
            scores.append(float(upcast(weight[0, :, t]) @ answers))
        return sorted(range(len(scores)), key=lambda i: -scores[i])[: self.indexer.top_k]

    def read_numbers(self, n_entries: int) -> int:
        """Every key of the index, and the entries that were chosen."""
        index = n_entries * self.indexer.compressor.width
        return index + min(n_entries, self.indexer.top_k) * self.head_dim

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
