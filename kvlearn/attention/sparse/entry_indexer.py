"""The lightning indexer over entries: which blocks of the past are worth reading."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kvlearn import expect
from kvlearn.attention.core import split_heads, upcast
from kvlearn.attention.sparse.compressor import Compressor
from kvlearn.attention.sparse.indexer import Request


class EntryIndexer(nn.Module):
    """Scores every whole block i for every token t, by J small heads over one small key a block.

        I_ti = Σ_j w_tj ReLU(q_tj · κ_i),   q = RoPE(W_q a),   w = W_w x / √(J · Di)

    The keys κ are entries of a compressor of its own, Di wide; a is what the queries of attention are made
    from. It is the indexer of ``dsa``, with m times fewer keys to score and to store.
    """

    def __init__(
        self, d_model: int, query_width: int, n_heads: int, top_k: int, compressor: Compressor
    ) -> None:
        super().__init__()
        self.n_heads, self.top_k = expect.positive("index_heads", n_heads), expect.positive("top_k", top_k)
        self.q_proj = nn.Linear(query_width, self.n_heads * compressor.width, bias=False)
        self.weight_proj = nn.Linear(d_model, self.n_heads, bias=False)
        self.compressor = compressor

    def request(self, a: Float[Tensor, "B T A"], x: Float[Tensor, "B T M"], positions: Tensor) -> Request:
        q = self.compressor.rope(split_heads(self.q_proj(a), self.n_heads), positions)
        return Request(q, self.weight_proj(x).mT * (self.n_heads * self.compressor.width) ** -0.5)

    def scores(self, request: Request, keys: Float[Tensor, "B E Di"]) -> Float[Tensor, "B T E"]:
        """I, in fp32 at least."""
        each = torch.relu(upcast(request.q) @ upcast(keys)[:, None].mT)
        return torch.einsum("bjt, bjte -> bte", upcast(request.weight), each)

    @torch.no_grad()
    def select(
        self, request: Request, keys: Float[Tensor, "B E Di"], visible: Bool[Tensor, "1 T E"]
    ) -> Int[Tensor, "B T K"]:
        """The entries each token reads, best first; where it sees fewer than K, hidden ones behind those.

        Of equal scores (no head answers: 0) the older entry is taken, however the sequence was cut.
        """
        scores = self.scores(request, keys).masked_fill(~visible, -torch.inf)
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]
